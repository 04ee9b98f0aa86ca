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
    /// Where other agents reach its spool, "host:port". Absent: it keeps nothing for others.
    #[serde(default)]
    pub spool_address: Option<String>,
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
    /// Absent: the agent is of an earlier release.
    #[serde(default)]
    pub durable_timeline: Option<u32>,
    pub durable_at: Option<Timestamp>,
    /// Behind it a primary has written nothing but what an idle one writes by itself. Absent: more, or it is not known.
    #[serde(default)]
    pub quiet_from: Option<Lsn>,
    pub ready_segments: u64,
    pub failed_count: u64,
    pub last_error: String,
    pub pg_wal_bytes: u64,
    pub pg_wal_free_bytes: u64,
    pub archive_command_set: bool,
    /// Absent: the agent is of an earlier release.
    #[serde(default)]
    pub stream: Option<StreamObserved>,
    /// Absent: WAL that the repository lacks does not accumulate.
    #[serde(default)]
    pub pg_wal_full_in_seconds: Option<u64>,
    #[serde(default)]
    pub requests_last_hour: u64,
    #[serde(default)]
    pub stored_bytes_last_hour: u64,
}

/// WAL over the replication protocol.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StreamObserved {
    pub phase: StreamPhase,
    /// Why it waits.
    pub problem: String,
    pub store_error: String,
    pub received_lsn: Option<Lsn>,
    /// By the server's clock: everything committed before is in the repository.
    pub complete_until: Option<Timestamp>,
    pub pieces: u64,
    pub segments: u64,
    pub piece_interval_ms: u64,
    pub synchronous: String,
    /// While commits may wait for spools.
    #[serde(default)]
    pub spool: Option<SpoolObserved>,
}

/// Commits that wait for two hosts' spools.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SpoolObserved {
    /// Empty: none is named.
    pub peer: String,
    /// "spools", or for what instead.
    pub waits_for: String,
    /// Why instead.
    pub problem: String,
    pub written_lsn: Option<Lsn>,
    pub held_bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum StreamPhase {
    Off,
    Streaming,
    /// A standby: its primary's agent streams.
    Following,
    Waiting,
}

impl StreamPhase {
    pub fn as_str(self) -> &'static str {
        match self {
            StreamPhase::Off => "off",
            StreamPhase::Streaming => "streaming",
            StreamPhase::Following => "following",
            StreamPhase::Waiting => "waiting",
        }
    }

    /// Whatever a newer agent may call it, it is not known to be well.
    pub fn read(word: &str) -> StreamPhase {
        match word {
            "streaming" => StreamPhase::Streaming,
            "following" => StreamPhase::Following,
            "off" | "" => StreamPhase::Off,
            _ => StreamPhase::Waiting,
        }
    }
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
