//! What an agent last said of itself and its instances. Kept in memory, stored at a low rate (`fleet::store`), and
//! never trusted further than its certificate goes: an agent speaks for itself only.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::RecipientId;
use walfleet_repository::postgres::Lsn;

use super::recovery::{BackupSummary, RecoveryWindow};
use crate::resources::Labels;

/// All that is known of one agent beside its connection.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct AgentObserved {
    pub hello: Option<HelloObserved>,
    pub facts: Option<FactsObserved>,
    /// By the controller's clock.
    pub last_seen: Option<Timestamp>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct HelloObserved {
    pub version: String,
    pub incarnation: String,
    pub hostname: String,
    /// As the host claims; labels given with the join token stand over them.
    pub labels: Labels,
    #[serde(with = "as_text")]
    pub recipient: RecipientId,
    pub capabilities: Vec<String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FactsObserved {
    /// By the agent's clock: what the facts' own times compare with.
    pub at: Timestamp,
    /// By the controller's clock: what staleness is measured by.
    pub received_at: Timestamp,
    pub instances: Vec<InstanceObserved>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceRole {
    Primary,
    Standby,
    /// Found, but it does not answer.
    Down,
}

impl InstanceRole {
    pub fn as_str(self) -> &'static str {
        match self {
            InstanceRole::Primary => "primary",
            InstanceRole::Standby => "standby",
            InstanceRole::Down => "down",
        }
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct InstanceObserved {
    /// The cluster it is configured to belong to, as the agent wrote it; empty: found but not enrolled.
    pub cluster: String,
    /// 0: not known.
    pub system_identifier: u64,
    pub server_version_num: u32,
    pub role: InstanceRole,
    pub data_dir: String,
    pub port: u32,
    pub timeline: u32,
    /// Where the server is; on a standby, what it has replayed.
    pub current_lsn: Option<Lsn>,
    pub cluster_bytes: u64,
    pub data_checksums: bool,
    pub archive: Option<ArchiveObserved>,
    pub windows: Vec<RecoveryWindow>,
    pub backups: Vec<BackupSummary>,
    pub problems: Vec<String>,
    /// By oid.
    pub tablespaces: BTreeMap<u32, TablespaceObserved>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TablespaceObserved {
    pub name: String,
    pub location: String,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ArchiveObserved {
    pub last_segment: String,
    pub durable_lsn: Option<Lsn>,
    pub durable_at: Option<Timestamp>,
    pub ready_segments: u64,
    pub failed_count: u64,
    pub last_error: String,
    pub pg_wal_bytes: u64,
    pub pg_wal_free_bytes: u64,
    pub archive_command_set: bool,
}

/// A value by its text, for types that have no serde form of their own.
pub mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr,
        T::Err: Display,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
