//! What came of a piece of work: kept in the journal, sent to the controller, printed by the host's own commands.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::{BackupId, ClusterName};
use walfleet_repository::postgres::{Lsn, Timeline};

use super::order::WorkKind;
use crate::wal::find::report::FindReport;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    Backup(BackupReport),
    Restore(RestoreReport),
    Verify(VerifyReport),
    BackupPlan(BackupPlanReport),
    WalFind(Box<FindReport>),
}

impl Report {
    pub fn kind(&self) -> WorkKind {
        match self {
            Report::Backup(_) => WorkKind::Backup,
            Report::Restore(_) => WorkKind::Restore,
            Report::Verify(_) => WorkKind::Verify,
            Report::BackupPlan(_) => WorkKind::BackupPlan,
            Report::WalFind(_) => WorkKind::WalFind,
        }
    }
}

/// A backup, as lists show it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackupReport {
    pub id: BackupId,
    pub cluster: ClusterName,
    /// As text in JSON: most readers hold numbers in 53 bits.
    #[serde(with = "as_text")]
    pub system_identifier: u64,
    pub server_version_num: u32,
    pub timeline: Timeline,
    pub start_lsn: Lsn,
    pub stop_lsn: Lsn,
    pub started_at: Timestamp,
    pub finished_at: Timestamp,
    /// The agent it was taken by.
    pub member: String,
    pub parents: Vec<BackupId>,
    pub cluster_bytes: u64,
    pub read_bytes: u64,
    pub new_bytes: u64,
    pub stored_bytes: u64,
    /// Pages whose checksum did not fit, after reading them again.
    pub damaged_pages: u64,
    pub state: BackupState,
    pub store_requests: u64,
    /// Slots that were other than the parent's though no WAL says so.
    #[serde(default)]
    pub unexplained_slots: u64,
    /// Why everything was read; `None`: only what the WAL says has changed.
    #[serde(default)]
    pub read_all_because: Option<String>,
}

impl BackupReport {
    /// Of the cluster's bytes, those that the backup knew without reading them.
    pub fn spared_bytes(&self) -> u64 {
        self.cluster_bytes.saturating_sub(self.read_bytes)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupState {
    Committed,
    Expired,
}

impl BackupState {
    pub fn name(self) -> &'static str {
        match self {
            BackupState::Committed => "committed",
            BackupState::Expired => "expired",
        }
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RestoreReport {
    pub data_dir: PathBuf,
    pub backup: BackupId,
    pub cluster_bytes: u64,
    pub fetched_bytes: u64,
    pub store_requests: u64,
    /// WAL that replay needs, [from, to).
    pub wal_from_lsn: Lsn,
    pub wal_to_lsn: Lsn,
    pub timeline: Timeline,
    /// Where the started server stands; `None` if it was not started.
    pub reached_lsn: Option<Lsn>,
    pub reached_commit: Option<Timestamp>,
    /// "running (promoted)", "running (paused at target)", "shut down at target", "prepared", "planned".
    pub server_state: String,
    /// For psql, when started.
    pub connection: Option<String>,
    pub copy_seconds: f64,
    pub replay_seconds: f64,
    /// What it was expected to take; `None`: nothing is known that it could be told from.
    pub estimated_seconds: Option<f64>,
    /// What that was made of, for people.
    #[serde(default)]
    pub estimated_from: Option<String>,
    /// Of a plan: bytes to fetch, requests and time are what it takes at most, since what is right already is kept.
    #[serde(default)]
    pub at_most: bool,
    /// That replay reads.
    #[serde(default)]
    pub wal_bytes: u64,
    #[serde(default)]
    pub wal_segments: u64,
    /// Settings changed and things to know, one a line.
    pub notes: Vec<String>,
}

/// Of [`RestoreReport::server_state`].
pub const PLANNED: &str = "planned";

impl RestoreReport {
    pub fn is_planned(&self) -> bool {
        self.server_state == PLANNED
    }
}

/// What a backup is expected to cost; of what nothing is known there is no figure.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BackupPlanReport {
    /// Of the cluster now.
    pub cluster_bytes: u64,
    pub read_bytes: Option<u64>,
    pub stored_bytes: Option<u64>,
    pub store_requests: Option<u64>,
    pub estimated_seconds: Option<f64>,
    /// What the figures were made of, for people.
    pub estimated_from: Option<String>,
    /// Why everything would be read, as far as that is known beforehand.
    pub read_all_because: Option<String>,
    pub notes: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VerifyReport {
    pub packs: u64,
    pub segments: u64,
    pub bytes: u64,
    pub findings: Vec<VerifyFinding>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VerifyFinding {
    /// The object's key.
    pub object: String,
    pub problem: String,
    /// Backups that cannot be restored whole because of it.
    pub backups: Vec<BackupId>,
}

mod as_text {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journalled_report_reads_back_and_keeps_all_64_bits() {
        let report = Report::Backup(BackupReport {
            id: "bk_a".parse().unwrap(),
            cluster: "orders".parse().unwrap(),
            system_identifier: 7_710_514_706_050_377_753,
            server_version_num: 150_018,
            timeline: Timeline(1),
            start_lsn: Lsn(0x300_0028),
            stop_lsn: Lsn(0x300_0100),
            started_at: Timestamp::UNIX_EPOCH,
            finished_at: Timestamp::UNIX_EPOCH,
            member: "db1".into(),
            parents: vec!["bk_b".parse().unwrap()],
            cluster_bytes: 1,
            read_bytes: 1,
            new_bytes: 1,
            stored_bytes: 1,
            damaged_pages: 0,
            state: BackupState::Committed,
            store_requests: 1,
            unexplained_slots: 0,
            read_all_because: Some("it was asked for".into()),
        });
        let text = serde_json::to_string(&report).unwrap();
        for part in
            [r#""system_identifier":"7710514706050377753""#, r#""stop_lsn":"0/3000100""#, "1970-01-01T00:00:00Z"]
        {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
