//! Where a recovery is to stop, in the controller's own terms. Whether it can be reached is the agent's to plan.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::postgres::{Lsn, Timeline};
use walfleet_repository::recovery_window::BranchName;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RecoveryTarget {
    pub stop: Stop,
    pub timeline: TimelineChoice,
    pub action: TargetAction,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    Time {
        at: Timestamp,
        edge: Edge,
    },
    Lsn {
        at: Lsn,
        edge: Edge,
    },
    Xid {
        xid: u64,
        edge: Edge,
    },
    /// A restore point made by `pg_create_restore_point()`.
    Name(String),
    /// As soon as the backup is consistent.
    Immediate,
    /// The end of the WAL that the repository holds.
    Latest,
}

/// `recovery_target_inclusive`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Edge {
    After,
    Before,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimelineChoice {
    Latest,
    Current,
    Number(Timeline),
    /// One of several timelines with one number.
    Branch(BranchName),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetAction {
    Promote,
    Pause,
    Shutdown,
}
