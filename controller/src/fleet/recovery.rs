//! What repositories hold, as agents report it: windows, gaps, backups. Seen, never computed here.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::{BackupId, ClusterName};
use walfleet_repository::postgres::Lsn;

/// What one repository can give back of one cluster, as of a moment.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RecoveryWindow {
    pub repository: String,
    pub as_of: Timestamp,
    pub ranges: Vec<RecoveryRange>,
    pub gaps: Vec<WalGap>,
    /// What was noted of WAL that is there by now.
    #[serde(default)]
    pub filled: Vec<WalGap>,
    pub newest_commit: Option<Timestamp>,
    pub newest_lsn: Option<Lsn>,
    pub newest_timeline: u32,
}

/// Every point between the two, both included.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RecoveryRange {
    /// Absent where no commit tells the time.
    pub from: Option<Timestamp>,
    pub to: Option<Timestamp>,
    pub from_lsn: Lsn,
    pub to_lsn: Lsn,
    pub timeline: u32,
    /// As the agent wrote it: 16 hexadecimal digits.
    pub branch: String,
}

/// `[from_lsn, to_lsn)`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct WalGap {
    pub timeline: u32,
    pub branch: String,
    pub from_lsn: Lsn,
    pub to_lsn: Lsn,
    pub acknowledged: bool,
    /// The last commit before it, and the first behind it.
    #[serde(default)]
    pub from: Option<Timestamp>,
    #[serde(default)]
    pub to: Option<Timestamp>,
    /// Who had it last and no longer has it.
    #[serde(default)]
    pub recorded: Option<GapNote>,
    #[serde(default)]
    pub acknowledgement: Option<GapNote>,
    /// 0: the agent is of an earlier release.
    #[serde(default)]
    pub system_identifier: u64,
}

/// What somebody said of a gap.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct GapNote {
    /// A member or an operator.
    pub by: String,
    pub at: Timestamp,
    pub reason: String,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BackupSummary {
    pub id: BackupId,
    pub cluster: ClusterName,
    pub system_identifier: u64,
    pub server_version_num: u32,
    pub timeline: u32,
    pub start_lsn: Option<Lsn>,
    pub stop_lsn: Option<Lsn>,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub member: String,
    pub parents: Vec<String>,
    pub cluster_bytes: u64,
    pub read_bytes: u64,
    pub new_bytes: u64,
    pub stored_bytes: u64,
    pub damaged_pages: u64,
    /// "committed" or "expired".
    pub state: String,
    pub store_requests: u64,
    #[serde(default)]
    pub unexplained_slots: u64,
    /// Empty: only what changed was read.
    #[serde(default)]
    pub read_all_because: String,
}
