//! Commits that wait for two spools: which pieces are where, what that lets a commit return for, and what is waited for
//! instead while a spool is away.

use std::collections::VecDeque;
use std::sync::Arc;

use walfleet_repository::postgres::Lsn;
use walfleet_repository::shipping::WithoutPeer;
use walfleet_repository::wal_archive::{OwnedTail, WalArchive};

use super::frontier::Frontier;
use crate::spool::Spool;
use crate::spool::files::Spools;
use crate::spool::spooler::{Spooled, Spooler, Spooling};

/// Pieces that the peer has not answered for: so many may be on their way before the next is cut. Two hide its way there.
const ON_THEIR_WAY: u64 = 2;

/// Nothing more is received while so much waits for this host's disk.
const UNWRITTEN_BYTES: u64 = 32 << 20;

/// Of the room in this host's spool, the part that what a session begins behind with may take.
const SHARE_OF_ROOM: u64 = 2;

/// What a commit waits for now.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum WaitsFor {
    /// Both spools.
    #[default]
    Spools,
    /// The repository, since a spool is away.
    Repository,
    /// This host's spool, since the peer's is away.
    Alone,
    /// The peer, or the repository by its timer.
    Peer,
}

impl WaitsFor {
    pub fn word(self) -> &'static str {
        match self {
            WaitsFor::Spools => "spools",
            WaitsFor::Repository => "repository",
            WaitsFor::Alone => "alone",
            WaitsFor::Peer => "peer",
        }
    }
}

/// For facts and metrics.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct SpoolStatus {
    pub peer: Option<String>,
    pub waits_for: WaitsFor,
    /// Why not for both spools.
    pub problem: Option<String>,
    /// Everything before it is where commits wait for it.
    pub written: Lsn,
    /// In this host's spool, of whatever cluster.
    pub held_bytes: u64,
}

impl SpoolStatus {
    /// Without what moves all the time.
    pub fn outline(&self) -> SpoolStatus {
        SpoolStatus { written: Lsn::INVALID, held_bytes: 0, ..self.clone() }
    }
}

struct Piece {
    from: Lsn,
    to: Lsn,
    bytes: u64,
}

/// Of one session.
pub struct SpoolWaiting {
    spools: Arc<Spools>,
    spooler: Spooler,
    without_peer: WithoutPeer,
    /// The server's end was near, or all up to it fits into the spools. More than that goes to the repository alone when a session
    /// begins. From then on all goes to the spools, or what they lack would be waited for until the repository has it.
    has_begun: bool,
    /// As it was last looked at.
    spooled: Spooled,
    /// Those that the repository may lack; the first has the number `first`.
    pieces: VecDeque<Piece>,
    first: u64,
    /// Up to this piece they are in `written`.
    counted: u64,
    /// Where a commit's record may lie for the commit to return: spooled, or durable.
    written: Frontier,
    unwritten: u64,
}

impl SpoolWaiting {
    pub fn begin(
        spool: &Arc<Spool>,
        spooling: Spooling,
        archive: WalArchive,
        without_peer: WithoutPeer,
        (from, end): (Lsn, Lsn),
    ) -> SpoolWaiting {
        // Commits wait for what is behind to be somewhere, and the spools take it sooner than the repository, if that takes it.
        let fits = end.saturating_sub(from) <= spool.spools.room() / SHARE_OF_ROOM;
        let spooler = Spooler::start(spool, spooling, archive);
        SpoolWaiting {
            spools: Arc::clone(&spool.spools),
            spooled: spooler.state(),
            spooler,
            without_peer,
            has_begun: fits,
            pieces: VecDeque::new(),
            first: 1,
            counted: 0,
            written: Frontier::new(from),
            unwritten: 0,
        }
    }

    pub fn waits_for(&self) -> WaitsFor {
        match (&self.spooled, self.without_peer) {
            (Spooled { own_problem: None, peer_problem: None, .. }, _) => WaitsFor::Spools,
            (Spooled { own_problem: None, .. }, WithoutPeer::Alone) => WaitsFor::Alone,
            (_, WithoutPeer::Wait) => WaitsFor::Peer,
            (_, WithoutPeer::Repository | WithoutPeer::Alone) => WaitsFor::Repository,
        }
    }

    /// Whether the next piece may be cut: the last is on this host's disk, and few are on their way to the peer.
    pub fn is_ready(&self) -> bool {
        let newest = self.spooler.newest();
        let is_here = self.spooled.here >= newest || self.spooled.own_problem.is_some();
        self.has_begun && is_here && (self.spooled.peer_problem.is_some() || newest < self.spooled.there + ON_THEIR_WAY)
    }

    pub fn note_near(&mut self) {
        self.has_begun = true;
    }

    pub fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Whether more may be received.
    pub fn has_room(&self) -> bool {
        self.unwritten < UNWRITTEN_BYTES
    }

    pub fn put(&mut self, tail: OwnedTail) {
        let lsn = |offset| tail.segment.at(tail.segment_size, offset);
        let (from, to, bytes) = (lsn(tail.name.from), lsn(tail.name.to), tail.bytes.len() as u64);
        self.unwritten += bytes;
        self.pieces.push_back(Piece { from, to, bytes });
        self.spooler.put(tail);
    }

    /// The repository has `[from, to)`, and everything before `durable`.
    pub fn stored(&mut self, from: Lsn, to: Lsn, durable: Lsn) {
        self.written.confirm(from, to);
        let before = self.first;
        while let Some(piece) = self.pieces.pop_front_if(|piece| piece.to <= durable) {
            if self.first > self.spooled.here {
                self.unwritten -= piece.bytes;
            }
            self.first += 1;
        }
        self.counted = self.counted.max(self.first - 1);
        if self.first > before {
            self.spooler.release(self.first - 1);
        }
    }

    /// Until something moved. Safe to drop.
    pub async fn changed(&mut self) {
        self.spooler.changed().await;
    }

    /// Takes in what moved; whether more commits may return.
    pub fn take_in(&mut self) -> bool {
        let here_before = self.spooled.here.max(self.first - 1);
        self.spooled = self.spooler.state();
        for number in here_before + 1..=self.spooled.here {
            self.unwritten -= self.piece(number).map_or(0, |piece| piece.bytes);
        }
        let reached = match self.waits_for() {
            WaitsFor::Alone => self.spooled.here,
            WaitsFor::Spools | WaitsFor::Repository | WaitsFor::Peer => self.spooled.here.min(self.spooled.there),
        };
        let mut has_moved = false;
        while self.counted < reached {
            self.counted += 1;
            if let Some((from, to)) = self.piece(self.counted).map(|piece| (piece.from, piece.to)) {
                has_moved |= self.written.confirm(from, to);
            }
        }
        has_moved
    }

    fn piece(&self, number: u64) -> Option<&Piece> {
        self.pieces.get(usize::try_from(number.checked_sub(self.first)?).ok()?)
    }

    pub fn written(&self) -> Lsn {
        self.written.at()
    }

    pub fn status(&self) -> SpoolStatus {
        let Spooled { peer, own_problem, peer_problem, .. } = &self.spooled;
        SpoolStatus {
            peer: peer.clone(),
            waits_for: self.waits_for(),
            problem: own_problem.clone().or_else(|| peer_problem.clone()),
            written: self.written(),
            held_bytes: self.spools.held_bytes(),
        }
    }
}
