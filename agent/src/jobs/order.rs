//! What an agent is asked to do, typed: the same orders whether a controller or a person at the host gives them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::{BackupId, ClusterName, JobId};
use walfleet_repository::postgres::{Lsn, Timeline};
use walfleet_repository::recovery_window::{BranchName, BranchNameError, KnownComplete};

use crate::estimate::Past;
use crate::wal::find::select::Show;

/// One attempt of one job. Re-delivery of the same changes nothing.
#[derive(Clone, PartialEq, Debug)]
pub struct JobOrder {
    pub job: JobId,
    /// From 1.
    pub attempt: u32,
    /// Grows with every attempt of any job; an older one for the same job is refused.
    pub fencing_token: u64,
    pub cluster: ClusterName,
    /// W3C trace context of the call that made the job.
    pub traceparent: Option<String>,
    /// What others say that jobs of this cluster took, newest first.
    pub past: Vec<Past>,
    pub work: WorkOrder,
}

impl JobOrder {
    /// Given at the host itself, where nothing can come before it.
    pub fn of_a_person(job: JobId, cluster: ClusterName, work: WorkOrder) -> JobOrder {
        JobOrder { job, attempt: 1, fencing_token: 0, cluster, traceparent: None, past: Vec::new(), work }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WorkOrder {
    Backup(BackupOrder),
    Restore(RestoreOrder),
    Verify(VerifyOrder),
    BackupPlan(BackupPlanOrder),
    WalFind(WalFindOrder),
}

impl WorkOrder {
    pub fn kind(&self) -> WorkKind {
        match self {
            WorkOrder::Backup(_) => WorkKind::Backup,
            WorkOrder::Restore(_) => WorkKind::Restore,
            WorkOrder::Verify(_) => WorkKind::Verify,
            WorkOrder::BackupPlan(_) => WorkKind::BackupPlan,
            WorkOrder::WalFind(_) => WorkKind::WalFind,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkKind {
    Backup,
    Restore,
    Verify,
    BackupPlan,
    WalFind,
}

impl WorkKind {
    pub const ALL: [WorkKind; 5] =
        [WorkKind::Backup, WorkKind::Restore, WorkKind::Verify, WorkKind::BackupPlan, WorkKind::WalFind];

    pub fn name(self) -> &'static str {
        match self {
            WorkKind::Backup => "backup",
            WorkKind::Restore => "restore",
            WorkKind::Verify => "verify",
            WorkKind::BackupPlan => "backup_plan",
            WorkKind::WalFind => "wal_find",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checkpoint {
    /// At once, as fast as the disks allow.
    Fast,
    /// Over half of checkpoint_timeout, sparing the server.
    Spread,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupOrder {
    /// The repository's name in the desired state.
    pub repository: String,
    /// The scheduled run this serves; for a backup on demand, the job's id.
    pub run: String,
    pub checkpoint: Checkpoint,
    /// Reads every file whole for proof.
    pub read_all: bool,
    /// zstd level, 1 to 19; `None`: the agent's default.
    pub compression_level: Option<i32>,
    pub processes: Option<u32>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RestoreOrder {
    pub repository: String,
    pub target: RecoveryTarget,
    pub data_dir: PathBuf,
    /// Old location (or oid) to new location.
    pub tablespaces: BTreeMap<String, PathBuf>,
    /// A given backup instead of the best one for the target.
    pub backup: Option<BackupId>,
    /// Start Postgres and wait until it stands at its target.
    pub start: bool,
    /// Leave archive_mode as it was at the source.
    pub keep_archiving: bool,
    /// For the started server; `None`: as in its configuration.
    pub port: Option<u16>,
    pub delta: bool,
    pub standby: bool,
    /// How far a standby stays behind.
    pub apply_delay: Option<Duration>,
    /// Answer with the plan and restore nothing.
    pub plan_only: bool,
    /// What the cluster's servers were seen to have.
    pub complete: Vec<KnownComplete>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifyOrder {
    pub repository: String,
    /// `None`: all that is live.
    pub backup: Option<BackupId>,
    /// Decrypt, decompress and check chunk ids, beyond comparing hashes of stored bytes.
    pub deep: bool,
}

/// What a backup would cost. Nothing is read of the server's files, nothing is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupPlanOrder {
    /// The repository's name in the desired state.
    pub repository: String,
    pub read_all: bool,
}

/// Which transactions committed around a moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WalFindOrder {
    /// The repository's name in the desired state.
    pub repository: String,
    pub around: Timestamp,
    /// On either side.
    pub within: Duration,
    pub timeline: TargetTimeline,
    /// Transactions listed at most.
    pub limit: usize,
    pub show: Show,
}

/// Where recovery is to stop, and what Postgres does there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecoveryTarget {
    pub point: TargetPoint,
    /// Stop just before the point instead of just after it. Time, LSN and xid only.
    pub exclusive: bool,
    pub timeline: TargetTimeline,
    pub action: TargetAction,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetPoint {
    Time(Timestamp),
    Lsn(Lsn),
    /// 64 bits as pg_current_xact_id() gives it, or the low 32.
    Xid(u64),
    /// A restore point made by pg_create_restore_point().
    Name(String),
    /// As soon as the backup is consistent.
    Immediate,
    /// The end of the WAL that the repository holds.
    Latest,
}

impl TargetPoint {
    /// Whether "just before" means anything here (recovery_target_inclusive, PostgreSQL's documentation).
    pub fn can_be_exclusive(&self) -> bool {
        matches!(self, TargetPoint::Time(_) | TargetPoint::Lsn(_) | TargetPoint::Xid(_))
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum TargetTimeline {
    #[default]
    Latest,
    /// The backup's own.
    Current,
    Number(Timeline),
    /// One of several timelines with one number.
    Branch(BranchName),
}

/// As people write it, as orders carry it.
impl FromStr for TargetTimeline {
    type Err = TimelineError;

    fn from_str(text: &str) -> Result<Self, TimelineError> {
        match text {
            "" | "latest" => Ok(TargetTimeline::Latest),
            "current" => Ok(TargetTimeline::Current),
            branch if branch.contains('-') => Ok(TargetTimeline::Branch(branch.parse()?)),
            number => {
                // u32's own reading would take a sign.
                let digits = number.bytes().all(|byte| byte.is_ascii_digit());
                let number = number.parse().ok().filter(|_| digits).and_then(|number| Timeline::new(number).ok());
                Ok(TargetTimeline::Number(number.ok_or_else(|| TimelineError::Word(text.to_owned()))?))
            }
        }
    }
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TimelineError {
    #[error(
        "\"{0}\" is no timeline\nHINT: write latest, current, a number from 1, or a branch such as 5-9f3c07a1b2d4e680."
    )]
    Word(String),
    #[error(transparent)]
    Branch(#[from] BranchNameError),
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum TargetAction {
    #[default]
    Promote,
    Pause,
    Shutdown,
}
