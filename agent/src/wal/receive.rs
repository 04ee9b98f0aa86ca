//! WAL by streaming: what the server flushes is in the repository about a second later.
//!
//! The agent speaks the physical replication protocol to its own server, with a slot. What it reports as flushed is durable
//! in the repository, so the slot never lets go of what the store lacks, and commits may wait for it. A finished segment
//! is stored whole; what is received of an unfinished one goes up in pieces on a timer while there is traffic
//! ([`open_segment`]). One [`session`] is one connection; [`Receiver`] makes them, one after the other, for ever.
//!
//! Where streaming cannot go on, `archive_command` and the other members still can, a primary's files are read instead
//! ([`leftover`]), and the status says so.

mod bridge;
mod clock;
mod complete;
mod error;
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
mod status;
mod timelines;
mod uploads;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::{Segment, WalBranch};
use walfleet_repository::shipping::WithoutPeer;

use crate::access::InstanceAccess;
use crate::identity::connect::chain;
use crate::link::backoff::Backoff;
use crate::postgres::control::ControlFile;
use crate::postgres::replication::SystemIdentity;
use crate::postgres::server::Server;
use crate::spool::Spool;
use crate::spool::files::Owner;
use crate::spool::spooler::Spooling;
use crate::wal::breaks::Breaks;
use crate::wal::ship::Shipper;
use bridge::Bridge;
pub use error::ReceiveError;
use follow::{Follow, Followed};
use known_place::{Kept, KnownPlace};
pub use leftover::BESIDE_AFTER;
use leftover::Leftover;
use session::{Role, Session};
pub use spooling::{SpoolStatus, WaitsFor};
pub use status::{StreamPhase, StreamStatus};

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

    /// The connection leads to the server whose data directory this is.
    fn must_be_ours(&self, identity: &SystemIdentity) -> Result<(), ReceiveError> {
        let (found, expected) = (identity.system_id, self.shipper.source().system_id);
        if found == expected { Ok(()) } else { Err(ReceiveError::OtherSystem { found, expected }) }
    }

    fn status(&self) -> &watch::Sender<StreamStatus> {
        self.shipper.stream()
    }
}
