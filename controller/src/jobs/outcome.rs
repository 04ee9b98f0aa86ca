//! How an attempt ended, as the agent reports it or as the controller must conclude.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::fleet::recovery::BackupSummary;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub verdict: Verdict,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub report: Option<Report>,
    /// What it asked of the store and where its time went, as it came: encoded protobuf in hexadecimal, which
    /// `wire::job` alone reads.
    #[serde(default)]
    pub cost: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Succeeded,
    Failed(JobError),
    Cancelled(JobError),
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JobError {
    /// Stable, dotted: "wal.missing".
    pub code: String,
    /// For people; may end in one HINT.
    pub message: String,
    /// What `walfleet … --wait` exits with.
    pub exit_code: i32,
    /// Whether trying again may help.
    pub retryable: bool,
}

/// What an attempt found or made.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    Backup(Box<BackupSummary>),
    /// Of a restore or a verification: passed on as it came, since the controller draws nothing from it. Encoded
    /// protobuf in hexadecimal, which `wire::job` alone reads.
    Restore(String),
    Verify(String),
    BackupPlan(String),
    WalFind(String),
}

impl Outcome {
    /// The controller's own conclusion, where no agent can tell.
    pub fn concluded(verdict: Verdict, now: Timestamp) -> Outcome {
        Outcome { verdict, started_at: None, finished_at: Some(now), report: None, cost: None }
    }
}

impl JobError {
    /// The attempt vanished: its agent came back without it, or never came back.
    pub fn lost(message: impl Into<String>) -> JobError {
        JobError { code: "job.lost".to_owned(), message: message.into(), exit_code: 1, retryable: true }
    }

    pub fn cancelled(by: &str) -> JobError {
        JobError {
            code: "job.cancelled".to_owned(),
            message: format!("cancelled by {by}"),
            exit_code: 1,
            retryable: false,
        }
    }

    /// The agent does not take it on, at no other time either.
    pub fn declined(agent: &str, reason: &str) -> JobError {
        JobError {
            code: "job.declined".to_owned(),
            message: format!("agent {agent} declined it: {reason}"),
            exit_code: 4,
            retryable: false,
        }
    }
}
