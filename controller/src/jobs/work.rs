//! What a job does, in the controller's own terms.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::BackupId;
use walfleet_repository::postgres::Lsn;

use super::target::{RecoveryTarget, TimelineChoice};

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    Backup(BackupWork),
    Restore(RestoreWork),
    Verify(VerifyWork),
    BackupPlan(BackupPlanWork),
    WalFind(WalFindWork),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    Backup,
    Restore,
    Verify,
    BackupPlan,
    WalFind,
}

impl JobKind {
    /// Also the agent's capability that it takes.
    pub fn as_str(self) -> &'static str {
        match self {
            JobKind::Backup => "backup",
            JobKind::Restore => "restore",
            JobKind::Verify => "verify",
            JobKind::BackupPlan => "backup_plan",
            JobKind::WalFind => "wal_find",
        }
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BackupWork {
    pub repository: String,
    pub fast_checkpoint: bool,
    #[serde(default)]
    pub read_all: bool,
    pub compression_level: Option<i32>,
    pub processes: Option<u32>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RestoreWork {
    pub repository: String,
    pub target: RecoveryTarget,
    pub data_dir: String,
    /// Old location (or oid) to new location.
    pub tablespaces: BTreeMap<String, String>,
    pub backup: Option<BackupId>,
    pub start: bool,
    pub keep_archiving: bool,
    pub port: Option<u16>,
    pub delta: bool,
    pub standby: Option<StandbyWork>,
    pub plan_only: bool,
    /// What the cluster's servers were seen to have when the work was asked for.
    #[serde(default)]
    pub complete: Vec<CompleteWork>,
}

/// Up to a moment a server wrote no more WAL than this, and the repository has it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CompleteWork {
    pub system_identifier: u64,
    pub timeline: u32,
    pub lsn: Lsn,
    pub at: Timestamp,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StandbyWork {
    pub apply_delay_seconds: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VerifyWork {
    pub repository: String,
    /// Absent: all that is live.
    pub backup: Option<BackupId>,
    pub deep: bool,
}

/// What a backup would cost, asked of an agent that could take it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BackupPlanWork {
    pub repository: String,
    pub read_all: bool,
}

/// Which transactions committed around a moment, asked of an agent that may read the WAL.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct WalFindWork {
    pub repository: String,
    pub around: Timestamp,
    pub within_seconds: u64,
    pub timeline: TimelineChoice,
    /// Absent: as many as the agent thinks right.
    pub limit: Option<u32>,
    pub all: bool,
}

impl Work {
    pub fn kind(&self) -> JobKind {
        match self {
            Work::Backup(_) => JobKind::Backup,
            Work::Restore(_) => JobKind::Restore,
            Work::Verify(_) => JobKind::Verify,
            Work::BackupPlan(_) => JobKind::BackupPlan,
            Work::WalFind(_) => JobKind::WalFind,
        }
    }

    pub fn repository(&self) -> &str {
        match self {
            Work::Backup(work) => &work.repository,
            Work::Restore(work) => &work.repository,
            Work::Verify(work) => &work.repository,
            Work::BackupPlan(work) => &work.repository,
            Work::WalFind(work) => &work.repository,
        }
    }
}
