//! Spools: what two hosts keep of a cluster's newest WAL until the repository has it, so that commits need not wait for the
//! object store and nothing acknowledged is lost with one host.
//!
//! What is kept are pieces, sealed as the repository would have them: this host's in its own spool and in that of the agent
//! which the controller names, its peer. A piece is let go of once the repository has what it holds. If the host is gone, the
//! peer stores what the repository lacks ([`left`]), with no right but to create pieces of that cluster, and no key.
//!
//! [`files`] keeps pieces on disk, [`outbox`] and [`link`] bring them to the peer, [`keep`] takes in another host's,
//! [`trust`] says who is who. What a commit may wait for is decided where WAL is received (`wal::receive::spooling`).

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;
use walfleet_repository::postgres::{Branch, Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};
use walfleet_repository::wal_archive::TailPlace;

use crate::access::Access;
use crate::identity::Identity;
use files::Spools;

pub mod door;
pub mod files;
pub mod keep;
pub mod left;
mod link;
pub mod message;
mod outbox;
mod seats;
pub mod spooler;
pub mod trust;

#[cfg(test)]
mod tests;

/// Of a sealed piece; a receiver cuts at half of it.
pub const MOST_PIECE_BYTES: usize = 8 << 20;

/// This agent's share in spools.
pub struct Spool {
    pub spools: Arc<Spools>,
    pub access: watch::Receiver<Option<Arc<Access>>>,
    pub identity: watch::Receiver<Arc<Identity>>,
}

/// A piece of a segment, sealed under its name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SpooledPiece {
    pub place: TailPlace,
    /// It holds `[from, to)` of the segment.
    pub from: u32,
    pub to: u32,
    pub sealed: Bytes,
}

/// The numbers that name a piece, wherever they come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PieceNumbers {
    pub system_identifier: u64,
    pub timeline: u32,
    pub branch: [u8; 8],
    pub start_lsn: u64,
    pub segment_bytes: u32,
    pub from: u32,
    pub to: u32,
}

impl PieceNumbers {
    /// `None`: no piece has such.
    pub fn place(self) -> Option<TailPlace> {
        let size = SegmentSize::new(self.segment_bytes.into()).ok()?;
        let timeline = Timeline::new(self.timeline).ok()?;
        let segment = Segment { timeline, number: Lsn(self.start_lsn).segment_number(size) };
        let wal = WalBranch { system_id: SystemId(self.system_identifier), timeline, branch: Branch(self.branch) };
        let fits = segment.start(size) == Lsn(self.start_lsn) && self.from < self.to && self.to <= size.bytes();
        fits.then_some(TailPlace { wal, segment, size })
    }
}

impl SpooledPiece {
    pub fn numbers(&self) -> PieceNumbers {
        let TailPlace { wal, segment, size } = self.place;
        PieceNumbers {
            system_identifier: wal.system_id.0,
            timeline: wal.timeline.0,
            branch: wal.branch.0,
            start_lsn: segment.start(size).0,
            segment_bytes: size.bytes(),
            from: self.from,
            to: self.to,
        }
    }
}
