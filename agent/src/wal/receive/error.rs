//! Why WAL is not received.

use std::sync::Arc;

use walfleet_repository::gap_notes::GapNotesError;
use walfleet_repository::postgres::{SystemId, Timeline};
use walfleet_repository::wal_archive::ArchiveError;

use crate::access::instance::ReachError;
use crate::durable::DurableError;
use crate::postgres::replication::ReplicationError;
use crate::postgres::server::ServerError;
use crate::postgres::wal_record::WalError;
use crate::wal::ship::ShipError;

#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error(transparent)]
    Reach(#[from] ReachError),
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Ship(#[from] ShipError),
    #[error(transparent)]
    Rescue(Arc<ShipError>),
    #[error(transparent)]
    Part(Arc<ShipError>),
    #[error(transparent)]
    Break(#[from] DurableError),
    #[error(transparent)]
    Notes(#[from] GapNotesError),
    #[error("the server's WAL does not read: {0}")]
    Wal(#[from] WalError),
    #[error(
        "the server is system {found}, the data directory is of system {expected}\nHINT: the instance's connection leads to another server."
    )]
    OtherSystem { found: SystemId, expected: SystemId },
    #[error("the history of timeline {timeline} does not read: {problem}")]
    History { timeline: Timeline, problem: String },
    #[error("the repository does not answer, and until it does commits wait: {why}")]
    Unknown { why: &'static str },
    #[error("{why} ({store})")]
    NoBridge { why: Box<ReceiveError>, store: Box<ReceiveError> },
    #[error("the server stops and the repository does not answer: its end is not held up for it")]
    GaveWay,
    #[error("the slot {slot} reserves no WAL\nHINT: drop it, and it is made anew.")]
    NothingReserved { slot: String },
    #[error("replication slot {slot} keeps no WAL any more; it is made anew")]
    SlotGone { slot: String },
    #[error(
        "a slot of the name {slot} is there, and it is one for logical decoding\nHINT: give the agent's another name: wal.slot in its configuration."
    )]
    LogicalSlot { slot: String },
}

impl ReceiveError {
    /// Servers come and go; what that means for the cluster is judged elsewhere.
    pub(super) fn is_of_a_server_that_is_away(&self) -> bool {
        match self {
            ReceiveError::Reach(_) | ReceiveError::Server(_) | ReceiveError::GaveWay => true,
            ReceiveError::Replication(error) => error.is_transient(),
            _ => false,
        }
    }

    /// Whether the repository did not answer, or refused: what commits wait for must not wait for either to be mended.
    pub(super) fn is_of_the_store(&self) -> bool {
        match self {
            ReceiveError::Archive(error) | ReceiveError::Ship(ShipError::Archive(error)) => {
                matches!(error, ArchiveError::Store(_)) && !error.is_not_found()
            }
            ReceiveError::NoBridge { store, .. } => store.is_of_the_store(),
            ReceiveError::Unknown { .. } => true,
            _ => false,
        }
    }
}
