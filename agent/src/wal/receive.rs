//! WAL by streaming: what the server flushes is in the repository about a second later.
//!
//! The agent speaks the physical replication protocol to its own server, with a slot. What it reports as flushed is durable
//! in the repository, so the slot never lets go of what the store lacks, and commits may wait for it. A finished segment
//! is stored whole; what is received of an unfinished one goes up in pieces on a timer while there is traffic
//! ([`open_segment`]). One [`session`] is one connection; [`Receiver`] makes them, one after the other, for ever.
//!
//! Where streaming cannot go on, `archive_command` and the other members still can, and the status says so.

mod bridge;
mod clock;
mod complete;
mod follow;
mod frontier;
mod give_way;
pub mod known_place;
mod leftover;
mod open_segment;
mod rescue;
mod session;
mod slot;
mod spare;
mod spooling;
mod timelines;
mod uploads;

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use walfleet_repository::gap_notes::GapNotesError;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::{Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};
use walfleet_repository::shipping::WithoutPeer;
use walfleet_repository::wal_archive::ArchiveError;

use crate::access::InstanceAccess;
use crate::access::instance::ReachError;
use crate::durable::DurableError;
use crate::identity::connect::chain;
use crate::link::backoff::Backoff;
use crate::postgres::control::ControlFile;
use crate::postgres::replication::ReplicationError;
use crate::postgres::server::{Server, ServerError};
use crate::postgres::wal_record::WalError;
use crate::spool::Spool;
use crate::spool::files::Owner;
use crate::spool::spooler::Spooling;
use crate::wal::breaks::Breaks;
use crate::wal::ship::{ShipError, Shipper};
use bridge::Bridge;
use follow::{Follow, Followed};
use known_place::{Kept, KnownPlace};
pub use leftover::BESIDE_AFTER;
use leftover::Leftover;
use session::{Role, Session};
pub use spooling::{SpoolStatus, WaitsFor};

/// In pg_stat_replication, and what synchronous_standby_names matches.
pub const APPLICATION_NAME: &str = "walfleet";

/// How soon a lost connection is tried again at the latest.
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// A session that ran for so long did not fail at its beginning.
const LASTED: Duration = Duration::from_secs(10);

/// The same while the server is away: it is on this host, asking costs nothing, and when it is back nothing is streamed
/// before it is seen.
const LONGEST_WITHOUT_SERVER: Duration = Duration::from_secs(1);

/// A session that has not begun for so long waits for the repository.
pub const UNANSWERED: Duration = Duration::from_secs(3);

/// Between two questions to a repository that has refused one.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// The same where the repository has answered, and was slow.
pub const LONGEST_UNANSWERED: Duration = Duration::from_secs(60);

/// How long a standby's agent streams in place of its primary's before it looks for that one again.
const RELIEF: Duration = Duration::from_secs(300);

/// What a commit on the server may wait for.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Synchronous {
    /// Nothing of ours: pieces leave on the timer.
    #[default]
    Off,
    /// That the repository has it: the next piece leaves when the last returns.
    Repository,
    /// That two spools have it, and while one of them is away as the policy says.
    Spool(WithoutPeer),
}

/// How WAL is received.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReceiveOptions {
    /// The replication slot's name: 1 to 63 of a-z, 0-9 and _.
    pub slot: String,
    /// Between two pieces.
    pub interval: Duration,
    pub synchronous: Synchronous,
    /// Finished segments on their way at once, at most.
    pub parallel: usize,
}

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
    fn is_of_a_server_that_is_away(&self) -> bool {
        match self {
            ReceiveError::Reach(_) | ReceiveError::Server(_) | ReceiveError::GaveWay => true,
            ReceiveError::Replication(error) => error.is_transient(),
            _ => false,
        }
    }

    /// Whether the repository did not answer, or refused: what commits wait for must not wait for either to be mended.
    fn is_of_the_store(&self) -> bool {
        match self {
            ReceiveError::Archive(error) | ReceiveError::Ship(ShipError::Archive(error)) => {
                matches!(error, ArchiveError::Store(_)) && !error.is_not_found()
            }
            _ => false,
        }
    }
}

/// What streaming is doing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum StreamPhase {
    /// Not asked for, or not begun.
    #[default]
    Off,
    Streaming,
    /// A standby: its primary's agent streams, and the archive is watched.
    Following,
    /// Why not; it is tried again.
    Waiting(String),
}

impl StreamPhase {
    /// Whether WAL gets where it belongs by it.
    pub fn is_well(&self) -> bool {
        matches!(self, StreamPhase::Streaming | StreamPhase::Following)
    }

    pub fn word(&self) -> &'static str {
        match self {
            StreamPhase::Off => "off",
            StreamPhase::Streaming => "streaming",
            StreamPhase::Following => "following",
            StreamPhase::Waiting(_) => "waiting",
        }
    }

    pub fn problem(&self) -> Option<&str> {
        match self {
            StreamPhase::Waiting(problem) => Some(problem),
            _ => None,
        }
    }
}

/// What has been received and stored, for facts and metrics.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StreamStatus {
    pub phase: StreamPhase,
    /// Since when it waits, if it does.
    pub waiting_since: Option<Instant>,
    pub timeline: Option<Timeline>,
    /// From here on everything up to the next two was received by this process.
    pub from: Lsn,
    /// The repository has everything before it in whole segments.
    pub sealed: Lsn,
    /// The repository has everything before it.
    pub durable: Lsn,
    pub received: Lsn,
    /// The end of the server's WAL, as it said last.
    pub server_end: Lsn,
    pub durable_at: Option<Timestamp>,
    /// By the server's clock: everything committed before is durable.
    pub complete_until: Option<Timestamp>,
    pub pieces: u64,
    pub segments: u64,
    pub already_there: u64,
    pub stored_bytes: u64,
    pub failures: u64,
    /// Of the store, while it fails.
    pub last_error: Option<String>,
    /// While commits may wait for spools.
    pub spool: Option<SpoolStatus>,
}

impl StreamStatus {
    pub fn is_streaming(&self) -> bool {
        self.phase == StreamPhase::Streaming
    }

    /// Whether it has brought this segment of the same server, or found it in the archive with the content that lies here. A
    /// standby that only follows has not compared everything.
    pub fn has_brought(&self, segment: Segment, size: SegmentSize) -> bool {
        let within = self.from <= segment.start(size) && segment.end(size) <= self.sealed;
        self.timeline == Some(segment.timeline) && within && self.phase != StreamPhase::Following
    }

    /// On a standby whose WAL others store: how much of what was there at the last look the archive lacked.
    pub fn lacking(&self) -> Option<u64> {
        (self.phase == StreamPhase::Following).then(|| self.received.0.saturating_sub(self.durable.0))
    }

    /// Nothing is received, and this is why.
    pub fn wait(&mut self, problem: String) {
        if !matches!(self.phase, StreamPhase::Waiting(_)) {
            self.waiting_since = Some(Instant::now());
        }
        self.phase = StreamPhase::Waiting(problem);
        self.spool = None;
    }

    /// A connection begins to receive from `at` on; what the archive has from `seen` on was found to be this server's. What a
    /// connection before brought counts on if nothing lies between.
    fn begin(&mut self, timeline: Timeline, seen: Lsn, at: Lsn) {
        let goes_on = self.timeline == Some(timeline) && self.from <= seen && seen <= self.sealed;
        if !goes_on {
            self.from = seen;
        }
        if self.timeline != Some(timeline) {
            // It was of another timeline's WAL.
            self.complete_until = None;
        }
        self.timeline = Some(timeline);
        // What failed to be stored is on its way anew, or nobody's here any more.
        self.last_error = None;
        (self.sealed, self.durable, self.received) = (at, at, at);
    }

    /// Whether another member is looked to for this segment.
    pub fn follows(&self, segment: Segment) -> bool {
        self.phase == StreamPhase::Following && self.timeline == Some(segment.timeline)
    }

    /// Whether it has brought, or will bring, this segment of the same server.
    pub fn covers(&self, segment: Segment, size: SegmentSize) -> bool {
        self.timeline == Some(segment.timeline) && self.from <= segment.start(size) && self.is_streaming()
    }
}

/// Receives one instance's WAL.
pub struct Receiver {
    pub instance: InstanceAccess,
    pub shipper: Arc<Shipper>,
    pub breaks: Arc<Breaks>,
    pub options: ReceiveOptions,
    /// Absent on a host without a controller.
    pub spool: Option<Arc<Spool>>,
    pub cluster: ClusterName,
    /// What this host needs to go on while the repository does not answer; `None`: nothing waits for spools.
    pub kept: Option<Arc<Kept>>,
}

impl Receiver {
    /// Of the pieces that are received here.
    fn spooling(&self) -> Spooling {
        let source = self.shipper.source();
        let owner = Owner { cluster: self.cluster.clone(), member: source.member.clone() };
        Spooling { owner, system_id: source.system_id, segment_size: source.segment_size }
    }

    /// Streams until told to stop; a lost connection is made anew.
    pub async fn run(&self, stop: CancellationToken) {
        let mut backoff = Backoff::default();
        let mut reported = String::new();
        let mut patience = UNANSWERED;
        let (mut leftover, mut beside) = (Leftover::default(), Leftover::default());
        while !stop.is_cancelled() {
            let begun = Instant::now();
            let ended = self.session(&mut patience, &stop).await;
            if !matches!(self.status().borrow().phase, StreamPhase::Waiting(_)) {
                (leftover, beside) = (Leftover::default(), Leftover::default());
                // One that fails as soon as it has begun would be begun four times a second.
                if begun.elapsed() >= LASTED {
                    backoff.reset();
                }
            }
            let mut longest = LONGEST_WAIT;
            if let Err(error) = ended {
                if error.is_of_a_server_that_is_away() {
                    longest = LONGEST_WITHOUT_SERVER;
                }
                let (problem, data_dir) = (chain(&error), self.instance.data_dir.display());
                if problem == reported {
                    tracing::debug!(%data_dir, "WAL is not streamed: {problem}");
                } else if error.is_of_a_server_that_is_away() {
                    tracing::info!(%data_dir, "WAL is not streamed for now: {problem}");
                } else {
                    tracing::warn!(%data_dir, "WAL is not streamed: {problem}");
                }
                reported.clone_from(&problem);
                self.status().send_modify(|status| status.wait(problem));
                if self.may_read_beside(&error) {
                    if beside.is_due(Instant::now()) {
                        tokio::select! {
                            () = self.store_beside() => beside.tried(false, Instant::now()),
                            () = stop.cancelled() => {}
                        }
                    }
                } else {
                    beside = Leftover::default();
                }
                match error.is_of_a_server_that_is_away() {
                    true if !leftover.is_due(Instant::now()) => {}
                    true => tokio::select! {
                        is_stored = self.store_leftover() => leftover.tried(is_stored, Instant::now()),
                        // What is left by then is streamed, and what that cannot bring is stored after the next stop.
                        () = self.runs_again() => {}
                        () = stop.cancelled() => {}
                    },
                    // It runs again, whatever else keeps it from being streamed: it will leave more.
                    false => leftover = Leftover::default(),
                }
            }
            let wait = backoff.next(rand::random::<f64>()).min(longest);
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
        self.status().send_modify(|status| status.phase = StreamPhase::Off);
    }

    /// One connection, or one stretch of following.
    async fn session(&self, patience: &mut Duration, stop: &CancellationToken) -> Result<(), ReceiveError> {
        let reach = self.instance.reach().await?;
        if !Server::connect(&reach).await?.is_standby().await? {
            return self.session_or_bridge(&reach, patience, stop).await;
        }
        let data_dir = self.instance.data_dir.display();
        match Follow::run(self, &reach, stop).await? {
            Followed::Stopped => return Ok(()),
            Followed::Promoted => return Session::run(self, &reach, Role::Primary, stop).await,
            Followed::Behind => {
                tracing::warn!(%data_dir, "nobody stores the WAL that this standby receives; its own agent does for now");
            }
            Followed::Diverged { segment, stored_by } => {
                tracing::warn!(%data_dir, segment,
                    "{stored_by} stored other WAL than this standby receives; its own agent stores that, on a branch");
            }
        }
        // After a while it is seen again whether the primary's agent is back.
        let relief = stop.child_token();
        let timer = tokio::time::sleep(RELIEF);
        tokio::pin!(timer);
        let session = Session::run(self, &reach, Role::Standby, &relief);
        tokio::pin!(session);
        tokio::select! {
            ended = &mut session => ended,
            () = &mut timer => {
                relief.cancel();
                session.await
            }
        }
    }

    /// A session; where none can begin because the repository does not answer, the spools take what comes until it does.
    async fn session_or_bridge(
        &self,
        reach: &str,
        patience: &mut Duration,
        stop: &CancellationToken,
    ) -> Result<(), ReceiveError> {
        let mut session = Box::pin(Session::run(self, reach, Role::Primary, stop));
        if self.kept.is_none() {
            return session.await;
        }
        self.status().send_if_modified(|status| {
            let was_streaming = status.phase == StreamPhase::Streaming;
            if was_streaming {
                status.wait("it begins anew".to_owned());
            }
            was_streaming
        });
        let ended = tokio::select! {
            ended = &mut session => Some(ended),
            () = self.stuck(*patience) => None,
        };
        if self.status().borrow().phase == StreamPhase::Streaming {
            *patience = UNANSWERED;
        } else if !stop.is_cancelled() && !matches!(&ended, Some(Err(error)) if !error.is_of_the_store()) {
            match Bridge::prepare(self, reach).await {
                Ok(bridge) => {
                    drop(session);
                    // A slow repository gets its time.
                    *patience = (*patience * 2).min(LONGEST_UNANSWERED);
                    return bridge.run(stop).await;
                }
                Err(why) => match ended {
                    Some(Err(store)) => {
                        return Err(ReceiveError::NoBridge { why: Box::new(why), store: Box::new(store) });
                    }
                    // Commits wait for the repository, and this is why.
                    _ => self.status().send_modify(|status| status.wait(chain(&why))),
                },
            }
        }
        match ended {
            Some(ended) => ended,
            None => session.await,
        }
    }

    /// Only what can be done without the repository, until that answers. For a receiver that was made without it.
    pub async fn bridge(&self, stop: &CancellationToken) -> Result<(), ReceiveError> {
        let bridged = async {
            let reach = self.instance.reach().await?;
            Bridge::prepare(self, &reach).await?.run(stop).await
        };
        let bridged = bridged.await;
        if let Err(error) = &bridged {
            let problem = chain(error);
            self.status().send_modify(|status| status.wait(problem));
        }
        bridged
    }

    /// Returns if no session has begun and the repository has not answered for so long. One that answers gets its time: a session
    /// may have hundreds of segments to look at before it begins.
    async fn stuck(&self, patience: Duration) {
        let mut status = self.status().subscribe();
        let source = self.shipper.source();
        let unanswered = async {
            while tokio::time::timeout(patience, bridge::answers(source, ASK_AGAIN)).await.is_ok() {
                tokio::time::sleep(patience).await;
            }
        };
        let begun = async { drop(status.wait_for(|status| status.phase == StreamPhase::Streaming).await) };
        let has_begun = tokio::select! {
            () = begun => true,
            () = unanswered => false,
        };
        if has_begun {
            std::future::pending().await
        }
    }

    /// Notes where WAL goes, in the background.
    fn note_place(&self, wal: WalBranch, first: Segment) {
        let Some(kept) = self.kept.clone() else { return };
        let (state_dir, cluster, slot) =
            (self.breaks.state_dir.clone(), self.cluster.clone(), self.options.slot.clone());
        let (data_dir, branches) = (self.instance.data_dir.clone(), Arc::clone(self.shipper.branches()));
        let partings = branches.partings();
        drop(tokio::task::spawn_blocking(move || {
            let Ok(control) = ControlFile::read(&data_dir) else { return };
            let place = KnownPlace {
                repository: kept.repository.clone(),
                system_id: wal.system_id.0,
                timeline: wal.timeline.0,
                branch: wal.branch.0,
                first: first.number,
                slot,
                checkpoint_lsn: control.checkpoint_lsn,
                cluster: kept.cluster.clone(),
            };
            if let Err(error) = known_place::write(&state_dir, &cluster, place) {
                tracing::warn!("while the repository is away, commits will wait if this agent is restarted: {error}");
            }
            if branches.partings() != partings {
                known_place::forget(&state_dir, &cluster);
            }
        }));
    }

    /// What was noted may be wrong from now on. Blocks for a moment, since nothing may come between.
    fn forget_place(&self) {
        known_place::forget(&self.breaks.state_dir, &self.cluster);
    }

    fn status(&self) -> &watch::Sender<StreamStatus> {
        self.shipper.stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_connection_before_brought_counts_on_if_nothing_is_between() {
        let mut status = StreamStatus { phase: StreamPhase::Streaming, ..StreamStatus::default() };
        let size = SegmentSize::new(1 << 20).unwrap();
        let lsn = |segment: u64| Lsn(segment << 20);
        let covers = |status: &StreamStatus, number| status.covers(Segment { timeline: Timeline(1), number }, size);
        status.begin(Timeline(1), lsn(4), lsn(6));
        assert!(covers(&status, 4), "found in the archive with this server's content");
        status.sealed = lsn(9);
        status.begin(Timeline(1), lsn(9), lsn(11));
        assert_eq!((covers(&status, 3), covers(&status, 4), covers(&status, 10)), (false, true, true));
        status.phase = StreamPhase::Waiting("it is away".into());
        let brought = |number| status.has_brought(Segment { timeline: Timeline(1), number }, size);
        assert_eq!((brought(3), brought(4), brought(10), brought(11)), (false, true, true, false));
        status.phase = StreamPhase::Streaming;
        status.begin(Timeline(1), lsn(20), lsn(20));
        assert_eq!((covers(&status, 10), covers(&status, 20)), (false, true));
        status.complete_until = Some(Timestamp::UNIX_EPOCH);
        status.begin(Timeline(1), lsn(20), lsn(20));
        assert!(status.complete_until.is_some(), "of the same WAL");
        status.begin(Timeline(2), lsn(20), lsn(20));
        assert!(!covers(&status, 20), "of another timeline");
        assert_eq!(status.complete_until, None, "what the other server's clock said");
    }
}
