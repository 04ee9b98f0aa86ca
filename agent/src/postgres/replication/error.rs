//! What goes wrong with a WAL stream, told such that the reader knows what to do.

use std::io;

use walfleet_repository::postgres::{Lsn, Timeline};

use super::refusal::told;
use crate::postgres::server::{Refusal, Target};

/// A `refusal` is the server's own complaint, with its SQLSTATE.
#[derive(Debug, thiserror::Error)]
pub enum ReplicationError {
    #[error(
        "read the connection string\n\
         HINT: it reads as \"host=/var/run/postgresql port=5432 user=walfleet dbname=postgres\"."
    )]
    ConnectionString { source: tokio_postgres::Error },
    #[error(
        "the connection string names no {missing}\n\
         HINT: it reads as \"host=/var/run/postgresql port=5432 user=walfleet\"."
    )]
    Incomplete { missing: &'static str },
    #[error(
        "the connection string demands TLS\n\
         HINT: connect by the Unix socket, or with sslmode=disable: the agent speaks to its own host only."
    )]
    Tls,
    #[error("connect to {target}\nHINT: is the server running, and is this where it listens?")]
    Unreachable { target: Target, source: io::Error },
    #[error(
        "{operation} with {target}: no answer within {seconds} s\n\
         HINT: is the server overloaded or stopped, or a firewall between?"
    )]
    NoAnswer { operation: &'static str, target: Target, seconds: u64 },
    #[error("connect to {target}: {}\nHINT: the server answers again by itself.", told(.refusal))]
    StartingUp { target: Target, refusal: Box<Refusal> },
    /// This side's complaint: no password given, a method it does not speak, a server that does not prove itself.
    #[error("authenticate at {target}\nHINT: check user and password of the connection string, or pg_hba.conf.")]
    Unauthenticated { target: Target, source: io::Error },
    #[error("connect to {target}: {}\nHINT: {hint}", told(.refusal))]
    Rejected { target: Target, refusal: Box<Refusal>, hint: String },
    #[error("connect to {target}: {}\nHINT: as a superuser, run: {grant}", told(.refusal))]
    MissingRight { target: Target, refusal: Box<Refusal>, grant: String },
    #[error(
        "connect to {target}: {}\n\
         HINT: raise max_wal_senders, which takes a restart, or end one that pg_stat_replication shows; \
         a role may have a CONNECTION LIMIT too.",
        told(.refusal)
    )]
    NoSenderLeft { target: Target, refusal: Box<Refusal> },
    #[error(
        "{operation}: {}\n\
         HINT: wal_level must be replica or logical; changing it takes a restart.",
        told(.refusal)
    )]
    WalLevel { operation: &'static str, refusal: Box<Refusal> },
    #[error(
        "\"{slot}\" is not a replication slot's name\nHINT: it has 1 to 63 lower-case letters, digits and underscores."
    )]
    SlotName { slot: String },
    #[error("create the replication slot {slot}: {}", told(.refusal))]
    SlotExists { slot: String, refusal: Box<Refusal> },
    #[error(
        "create the replication slot {slot}: {}\n\
         HINT: drop a slot that nobody needs, or raise max_replication_slots, which takes a restart.",
        told(.refusal)
    )]
    NoSlotLeft { slot: String, refusal: Box<Refusal> },
    #[error("{operation}: {}\nHINT: slots do not follow a failover: create {slot} on this server.", told(.refusal))]
    NoSlot { operation: &'static str, slot: String, refusal: Box<Refusal> },
    #[error(
        "{operation}: {}\n\
         HINT: one client at a time uses {slot}; a lost one holds it for up to wal_sender_timeout.",
        told(.refusal)
    )]
    SlotInUse {
        operation: &'static str,
        slot: String,
        /// Of the server's process that uses it.
        pid: Option<u32>,
        refusal: Box<Refusal>,
    },
    #[error(
        "stream from the replication slot {slot}: {}\n\
         HINT: name a physical slot; if {slot} is one, the server gave its WAL up \
         (max_slot_wal_keep_size, idle_replication_slot_timeout): drop it and create it again.",
        told(.refusal)
    )]
    SlotInvalid { slot: String, refusal: Box<Refusal> },
    #[error("read the history of timeline {timeline}: {}", told(.refusal))]
    NoHistory { timeline: Timeline, refusal: Box<Refusal> },
    #[error(
        "stream timeline {timeline} from {at}: {}\n\
         HINT: take it from the archive, or begin anew with a base backup; a slot keeps WAL for its client.",
        told(.refusal)
    )]
    WalRemoved {
        timeline: Timeline,
        /// The end of what was received, at first what was asked for.
        at: Lsn,
        refusal: Box<Refusal>,
    },
    #[error(
        "stream timeline {timeline} from {at}: {}\n\
         HINT: this server is behind what was received, or another's.",
        told(.refusal)
    )]
    Ahead { timeline: Timeline, at: Lsn, refusal: Box<Refusal> },
    #[error(
        "stream timeline {timeline} from {at}: {}\n\
         HINT: the server's way to its timeline leads not through here.",
        told(.refusal)
    )]
    NotInHistory { timeline: Timeline, at: Lsn, refusal: Box<Refusal> },
    /// The server ended in good order, and this side has received and reported everything.
    #[error("{target} shut down; its WAL was received up to {at}")]
    ShutDown { target: Target, at: Lsn },
    #[error(
        "{operation}: {target} ended the session: {}\nHINT: it shuts down, or an administrator ended this session.",
        told(.refusal)
    )]
    Terminated { operation: &'static str, target: Target, refusal: Box<Refusal> },
    #[error(
        "{operation}: the connection to {target} was lost\n\
         HINT: the server's log says whether it stopped or the session was ended."
    )]
    Lost { operation: &'static str, target: Target, source: Option<io::Error> },
    #[error("{operation}: {refusal}")]
    Refused { operation: &'static str, refusal: Box<Refusal> },
    #[error("{operation}: the server answered \"{found}\", expected {expected}")]
    Answer { operation: &'static str, found: String, expected: &'static str },
    #[error(
        "{operation}: {target} sent {detail}\n\
         HINT: is it a PostgreSQL server, and nothing between that changes what it sends?"
    )]
    Malformed { operation: &'static str, target: Target, detail: String },
    #[error("stream WAL: {target} sent WAL of {found}, expected {expected}")]
    NotContiguous { target: Target, found: Lsn, expected: Lsn },
    #[error("{operation}: an earlier command to {target} was given up before its answer came\nHINT: connect again.")]
    Abandoned { operation: &'static str, target: Target },
    #[error("{operation}: a name or setting holds a character that cannot be sent")]
    Unsendable { operation: &'static str, source: io::Error },
}

impl ReplicationError {
    /// Whether the same call may succeed later without anybody's doing.
    pub fn is_transient(&self) -> bool {
        match self {
            ReplicationError::Unreachable { .. }
            | ReplicationError::NoAnswer { .. }
            | ReplicationError::StartingUp { .. }
            | ReplicationError::NoSenderLeft { .. }
            | ReplicationError::SlotInUse { .. }
            // A standby that lags, and catches up.
            | ReplicationError::Ahead { .. }
            | ReplicationError::ShutDown { .. }
            | ReplicationError::Terminated { .. }
            | ReplicationError::Lost { .. }
            | ReplicationError::Abandoned { .. } => true,
            ReplicationError::ConnectionString { .. }
            | ReplicationError::Incomplete { .. }
            | ReplicationError::Tls
            | ReplicationError::Unauthenticated { .. }
            | ReplicationError::Rejected { .. }
            | ReplicationError::MissingRight { .. }
            | ReplicationError::WalLevel { .. }
            | ReplicationError::SlotName { .. }
            | ReplicationError::SlotExists { .. }
            | ReplicationError::NoSlotLeft { .. }
            | ReplicationError::NoSlot { .. }
            | ReplicationError::SlotInvalid { .. }
            | ReplicationError::NoHistory { .. }
            | ReplicationError::WalRemoved { .. }
            | ReplicationError::NotInHistory { .. }
            | ReplicationError::Refused { .. }
            | ReplicationError::Answer { .. }
            | ReplicationError::Malformed { .. }
            | ReplicationError::NotContiguous { .. }
            | ReplicationError::Unsendable { .. } => false,
        }
    }
}
