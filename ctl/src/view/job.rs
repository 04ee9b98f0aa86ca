//! A job: what it does, how far it is, and how it ended.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::backup::Backup;
use super::cost::{BackupPlan, Cost};
use super::found::Found;
use super::restore::Restore;
use super::verify::Verification;
use crate::ink::Ink;
use crate::print::{Page, Table, View};
use crate::quantity::{seconds, size};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Queued,
    Offered,
    Running,
    /// The agent's lease ran out; not final.
    Unknown,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobState {
    pub fn word(self) -> &'static str {
        match self {
            JobState::Queued => "queued",
            JobState::Offered => "offered",
            JobState::Running => "running",
            JobState::Unknown => "unknown",
            JobState::Succeeded => "succeeded",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        }
    }

    pub fn is_over(self) -> bool {
        match self {
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => true,
            JobState::Queued | JobState::Offered | JobState::Running | JobState::Unknown => false,
        }
    }

    fn shown(self) -> String {
        match self {
            JobState::Succeeded => Ink::Good.on(self.word()),
            JobState::Failed => Ink::Bad.on(self.word()),
            JobState::Unknown | JobState::Cancelled => Ink::Warn.on(self.word()),
            JobState::Queued | JobState::Offered | JobState::Running => self.word().to_owned(),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Job {
    pub id: String,
    pub kind: String,
    pub cluster: String,
    /// Null: none is chosen yet.
    pub agent: Option<String>,
    pub state: JobState,
    /// Why it waits or is unknown.
    pub reason: Option<String>,
    pub attempt: u32,
    pub created_at: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub requested_by: String,
    pub progress: Option<Progress>,
    pub order: Option<Order>,
    pub error: Option<JobError>,
    /// What came of it, by kind; at most one is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup: Option<Backup>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore: Option<Restore>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verification: Option<Verification>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup_plan: Option<BackupPlan>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<Found>,
    /// Null: it is not over, or its agent did not count.
    pub cost: Option<Cost>,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Progress {
    pub phase: String,
    pub done_bytes: u64,
    /// Null: not known.
    pub total_bytes: Option<u64>,
    pub at: Option<Timestamp>,
    /// Of those done, what need not be read.
    pub spared_bytes: u64,
    /// What moved lately. Null: nothing does, or it is too early to tell.
    pub bytes_per_second: Option<u64>,
    /// Until the job is over. Null: not known.
    pub left_seconds: Option<u64>,
    /// How long neither phase nor bytes have changed. Null: they do.
    pub still_seconds: Option<u64>,
    pub store_requests: u64,
    /// Of the whole job, when it began. Null: nothing was known.
    pub expected: Option<Expected>,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Expected {
    pub seconds: f64,
    /// What it was made of: "the last 5 backups that read what changed".
    pub basis: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct JobError {
    /// Stable, for scripts: "wal.missing".
    pub code: String,
    pub message: String,
    pub exit_code: u8,
    pub retryable: bool,
}

/// What was asked for; fields of other kinds of jobs are left out.
#[derive(Clone, Default, Debug, Serialize)]
pub struct Order {
    pub repository: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tablespaces: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deep: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan_only: Option<bool>,
}

impl Job {
    /// `backup of orders on db1`
    pub fn title(&self) -> String {
        let kind = match self.order.as_ref().and_then(|order| order.plan_only) {
            Some(true) => "restore plan".to_owned(),
            _ => self.kind.replace('_', " "),
        };
        let on = self.agent.as_ref().map(|agent| format!(" on {agent}")).unwrap_or_default();
        format!("{kind} of {}{on}", self.cluster)
    }

    fn is_plan(&self) -> bool {
        self.order.as_ref().is_some_and(|order| order.plan_only == Some(true))
    }

    fn took(&self) -> Option<f64> {
        let (start, end) = (self.started_at?, self.finished_at?);
        Some(end.duration_since(start).as_secs_f64()).filter(|seconds| *seconds >= 0.0)
    }

    /// What it was asked to do and came to, in full.
    pub fn draw_report(&self, page: &mut Page) {
        let agent = self.agent.as_deref().unwrap_or("-");
        let target = self.order.as_ref().and_then(|order| order.target.as_deref()).unwrap_or_default();
        if let Some(backup) = &self.backup {
            backup.draw(page);
        }
        match &self.restore {
            Some(restore) if self.is_plan() => restore.draw_plan(&self.cluster, agent, target, page),
            Some(restore) => restore.draw_done(&self.cluster, agent, target, page),
            None => {}
        }
        if let Some(verification) = &self.verification {
            verification.draw(&self.cluster, page);
        }
        if let Some(plan) = &self.backup_plan {
            plan.draw(&self.cluster, agent, page);
        }
        if let Some(found) = &self.found {
            found.draw(&self.cluster, page);
        }
    }
}

impl Progress {
    /// `310.0 MiB/s, about 12s left`, or that it stands still; empty while there is nothing to say.
    pub fn pace(&self) -> String {
        let mut parts = Vec::new();
        parts.extend(self.bytes_per_second.map(|rate| format!("{}/s", size(rate))));
        parts.extend(self.left_seconds.map(|left| format!("about {} left", seconds(left as f64))));
        let counts = self.total_bytes.is_some() || self.done_bytes > 0;
        let word = if counts { "stalled for" } else { "for" };
        parts.extend(self.still_seconds.map(|still| format!("{word} {}", seconds(still as f64))));
        parts.join(", ")
    }

    /// `copy  1.2 GiB of 4.8 GiB (25%)`
    pub fn shown(&self) -> String {
        match self.total_bytes {
            Some(total) => {
                let percent = u128::from(self.done_bytes.min(total)) * 100 / u128::from(total.max(1));
                format!("{}  {} of {} ({percent}%)", self.phase, size(self.done_bytes), size(total))
            }
            None if self.done_bytes > 0 => format!("{}  {}", self.phase, size(self.done_bytes)),
            None => self.phase.clone(),
        }
    }
}

fn now(progress: &Progress) -> String {
    let pace = progress.pace();
    if pace.is_empty() { progress.shown() } else { format!("{}  {pace}", progress.shown()) }
}

impl Expected {
    /// `about 3m 20s in all, as the last 5 backups that read what changed`
    pub fn shown(&self) -> String {
        format!("about {} in all, as {}", seconds(self.seconds), self.basis)
    }
}

impl View for Job {
    fn draw(&self, page: &mut Page) {
        let reason = self.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        page.line(format!("{}  {}  {}{reason}", self.id, self.title(), self.state.shown()));
        let order = self.order.clone().unwrap_or_default();
        let progress = self.progress.as_ref().filter(|_| !self.state.is_over());
        page.pairs(&[
            ("requested by", self.requested_by.clone()),
            ("created", page.when(self.created_at)),
            ("started", page.when(self.started_at)),
            ("finished", page.when(self.finished_at)),
            ("took", self.took().map(seconds).unwrap_or_default()),
            ("attempt", if self.attempt > 1 { self.attempt.to_string() } else { String::new() }),
            ("target", order.target.unwrap_or_default()),
            ("data directory", order.data_dir.unwrap_or_default()),
            ("now", progress.map(now).unwrap_or_default()),
            (
                "expected",
                progress.and_then(|progress| progress.expected.as_ref()).map(Expected::shown).unwrap_or_default(),
            ),
            ("store", self.cost.as_ref().map(Cost::shown_store).unwrap_or_default()),
            ("time", self.cost.as_ref().map(Cost::shown_phases).unwrap_or_default()),
            (
                "error",
                self.error
                    .as_ref()
                    .filter(|error| !error.message.is_empty())
                    .map_or(String::new(), |error| format!("{} ({})", Ink::Bad.on(&error.message), error.code)),
            ),
        ]);
        let is_report = self.backup.is_some() || self.restore.is_some() || self.verification.is_some();
        if is_report || self.backup_plan.is_some() || self.found.is_some() {
            page.gap();
            self.draw_report(page);
        }
    }
}

/// A job that was just asked for, or waited for: the report alone, once there is one.
#[derive(Serialize)]
#[serde(transparent)]
pub struct Started<'a>(pub &'a Job);

impl View for Started<'_> {
    fn draw(&self, page: &mut Page) {
        if self.0.state == JobState::Succeeded {
            self.0.draw_report(page);
        } else {
            page.line(format!("{}  {}  {}", self.0.id, self.0.title(), self.0.state.shown()));
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Jobs {
    pub jobs: Vec<Job>,
}

impl View for Jobs {
    fn draw(&self, page: &mut Page) {
        if self.jobs.is_empty() {
            page.line("No jobs.");
            return;
        }
        let mut table = Table::new(&[
            "ID",
            "KIND",
            "CLUSTER",
            "AGENT",
            "STATE",
            "CREATED",
            ">TOOK",
            "+REQUESTED BY",
            "+>ATTEMPT",
            "DETAIL",
        ]);
        for job in &self.jobs {
            let detail = match (&job.error, &job.reason, &job.progress) {
                (Some(error), ..) => error.message.lines().next().unwrap_or_default().to_owned(),
                (None, Some(reason), _) => reason.clone(),
                (None, None, Some(progress)) if !job.state.is_over() => progress.shown(),
                _ => String::new(),
            };
            table.row([
                job.id.clone(),
                job.kind.clone(),
                job.cluster.clone(),
                job.agent.clone().unwrap_or_default(),
                job.state.shown(),
                page.when(job.created_at),
                job.took().map(seconds).unwrap_or_default(),
                job.requested_by.clone(),
                job.attempt.to_string(),
                detail,
            ]);
        }
        page.table(table);
    }
}
