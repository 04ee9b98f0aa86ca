//! What is on its way to the repository, in any number at once. A part that was taken on is tried until it is stored or
//! the session ends: nothing behind it counts before.
//!
//! What is held in memory meanwhile is bounded. Where commits wait for spools, more is received while the store is away: of
//! those segments only the numbers are kept. The slot does not pass a segment there before it is stored whole, so they lie in
//! `pg_wal` until then.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::task::JoinSet;
use walfleet_repository::ids::ChunkId;
use walfleet_repository::postgres::{Lsn, Segment, WalBranch};
use walfleet_repository::wal_archive::{Archived, Mark, OwnedTail, SealedSegment, WalArchive};

use super::StreamStatus;
use super::open_segment::{FinishedContent, Place};
use crate::limits::HostLimits;
use crate::tasks;
use crate::wal::branches::{Branches, Ticket};
use crate::wal::ship::{ShipError, Shipper};

/// Before a part is tried again, after the store's own attempts.
const AGAIN: Duration = Duration::from_secs(1);

/// Contents of finished segments held at once until they are sealed, and sealed ones until they are stored, together; one more
/// always may be.
const HELD_BYTES: u64 = 24 << 20;

/// What was done.
#[derive(Debug)]
pub enum Stored {
    Piece {
        from: Lsn,
        to: Lsn,
        /// How often a branch had been left when it was cut.
        partings: u64,
    },
    Segment(Segment),
    /// Under the name of a piece of it lies something else.
    Spoiled(Segment),
    /// What other members have of a segment in a branch.
    Marks {
        wal: WalBranch,
        segment: Segment,
        marks: Vec<Mark>,
    },
    /// Nothing that counts.
    Nothing,
}

/// How a part ended.
enum Ended {
    Piece {
        from: Lsn,
        to: Lsn,
        partings: u64,
    },
    Sealed {
        segment: Segment,
        plain_bytes: u64,
        sealed: Box<SealedSegment>,
        ticket: Ticket,
    },
    Segment {
        segment: Segment,
        sealed_bytes: u64,
    },
    Marks {
        wal: WalBranch,
        segment: Segment,
        marks: Vec<Mark>,
    },
    /// A piece.
    Spoiled(Segment),
    /// Nothing that anybody waits for.
    Aside,
}

pub struct Uploads {
    shipper: Arc<Shipper>,
    branches: Arc<Branches>,
    /// The timeline's own branch.
    base: WalBranch,
    limits: Arc<HostLimits>,
    status: watch::Sender<StreamStatus>,
    tasks: JoinSet<Result<Ended, Arc<ShipError>>>,
    /// Finished segments that are not held, the oldest first: each is read from its file when its turn comes.
    owed: VecDeque<Segment>,
    segments: usize,
    pieces: usize,
    plain_bytes: u64,
    sealed_bytes: u64,
}

impl Uploads {
    pub fn new(shipper: &Arc<Shipper>, base: WalBranch) -> Uploads {
        Uploads {
            shipper: Arc::clone(shipper),
            branches: Arc::clone(shipper.branches()),
            base,
            limits: Arc::clone(&shipper.source().limits),
            status: shipper.stream().clone(),
            tasks: JoinSet::new(),
            owed: VecDeque::new(),
            segments: 0,
            pieces: 0,
            plain_bytes: 0,
            sealed_bytes: 0,
        }
    }

    fn has_room(&self, parallel: usize) -> bool {
        self.segments < parallel && self.plain_bytes + self.sealed_bytes < HELD_BYTES
    }

    /// Whether another finished segment may come, `parallel` being on their way at most. They go in their order.
    pub fn takes_more(&self, parallel: usize) -> bool {
        self.owed.is_empty() && self.has_room(parallel)
    }

    /// Takes on a finished segment that goes up from its file, once there is room.
    pub fn later(&mut self, segment: Segment) {
        self.owed.push_back(segment);
    }

    /// Begins with those that were put off, once little is held of those before them: the shipper holds some of its own.
    pub fn catch_up(&mut self, parallel: usize) {
        while self.has_room(parallel)
            && self.plain_bytes + self.sealed_bytes < HELD_BYTES / 2
            && let Some(segment) = self.owed.pop_front()
        {
            self.shipper.note_backlog(self.owed.len());
            self.segments += 1;
            let (attempt, shipper) = (self.attempt(), Arc::clone(&self.shipper));
            self.tasks.spawn(async move {
                attempt.until_stored(|_| shipper.store_finished(segment), is_not_in_pg_wal).await?;
                attempt.note_well(|_| ());
                Ok(Ended::Segment { segment, sealed_bytes: 0 })
            });
        }
    }

    pub fn pieces(&self) -> usize {
        self.pieces
    }

    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty() && self.owed.is_empty()
    }

    /// `archive`: compressing as hard as there is time for.
    pub fn segment(&mut self, segment: Segment, content: FinishedContent, archive: &WalArchive) {
        self.segments += 1;
        let ticket = self.branches.ticket(segment);
        match content {
            FinishedContent::Sealed(sealed) => self.sealed(segment, sealed, ticket),
            FinishedContent::Plain(upload) => {
                let (plain_bytes, sealer) = (upload.content.len() as u64, archive.clone());
                self.plain_bytes += plain_bytes;
                self.tasks.spawn(async move {
                    let sealed = Box::new(sealer.seal_segment(*upload).await.map_err(|error| Arc::new(error.into()))?);
                    Ok(Ended::Sealed { segment, plain_bytes, sealed, ticket })
                });
            }
        }
    }

    fn sealed(&mut self, segment: Segment, sealed: Box<SealedSegment>, ticket: Ticket) {
        let sealed_bytes = sealed.len();
        self.sealed_bytes += sealed_bytes;
        let (attempt, branches, base) = (self.attempt(), Arc::clone(&self.branches), self.base);
        let archive = self.shipper.source().archive.clone();
        self.tasks.spawn(async move {
            let store = async |_| branches.store_segment(base, &sealed, &ticket).await.map_err(Arc::new);
            let archived = attempt.until_stored(store, |_| false).await?;
            attempt.note(archived, |status| status.segments += 1);
            archive.reuse(*sealed);
            Ok(Ended::Segment { segment, sealed_bytes })
        });
    }

    /// `partings`: how often a branch has been left as yet.
    pub fn piece(&mut self, tail: OwnedTail, partings: u64) {
        self.pieces += 1;
        let lsn = |offset| tail.segment.at(tail.segment_size, offset);
        let (from, to) = (lsn(tail.name.from), lsn(tail.name.to));
        let (attempt, branches, base) = (self.attempt(), Arc::clone(&self.branches), self.base);
        self.tasks.spawn(async move {
            let store = async |tries| branches.store_piece(base, &tail, tries).await.map_err(Arc::new);
            match attempt.until_stored(store, is_spoiled).await {
                Ok(archived) => {
                    attempt.note(archived, |status| status.pieces += 1);
                    Ok(Ended::Piece { from, to, partings })
                }
                Err(error) => {
                    attempt.failed(&error).await;
                    Ok(Ended::Spoiled(tail.segment))
                }
            }
        });
    }

    /// Looks what other members have, where it belongs, of the segment that is being received, up to a byte of it.
    pub fn look(&mut self, place: Place, upto: u32, archive: WalArchive) {
        let (branches, base) = (Arc::clone(&self.branches), self.base);
        self.tasks.spawn(async move {
            let Place { segment, size, member, .. } = place;
            let looked = async {
                let wal = branches.home(base, segment).await?;
                let marks = archive.others_marks(wal, (segment, size), (&member, upto)).await?;
                Ok::<_, ShipError>(Ended::Marks { wal, segment, marks })
            };
            // What keeps it from looking keeps it from storing, too, and that tells of it.
            Ok(looked.await.unwrap_or(Ended::Aside))
        });
    }

    /// Another member has another beginning of a segment: one of the two leaves the branch.
    pub fn differ(
        &mut self,
        (wal, segment): (WalBranch, Segment),
        content: ChunkId,
        (stored_by, same): (String, Vec<Mark>),
    ) {
        let (branches, base) = (Arc::clone(&self.branches), self.base);
        self.tasks.spawn(async move {
            if let Err(error) = branches.yield_to(base, (wal, segment), content, (stored_by.clone(), &same)).await {
                tracing::warn!("{stored_by} stores other WAL than this server writes, and whose branch it is was not found out: {error}");
            }
            Ok(Ended::Aside)
        });
    }

    /// A branch has other bytes of a segment from an earlier time: it is left.
    pub fn leave(&mut self, (wal, segment): (WalBranch, Segment), content: ChunkId, stored_by: String) {
        let (branches, base) = (Arc::clone(&self.branches), self.base);
        self.tasks.spawn(async move {
            while let Err(error) = branches.leave(base, (wal, segment), content, stored_by.clone()).await {
                tracing::warn!("the repository has other WAL of this segment, and a branch for this server's is not made yet: {error}");
                tokio::time::sleep(AGAIN).await;
            }
            Ok(Ended::Aside)
        });
    }

    fn attempt(&self) -> Attempt {
        Attempt { limits: self.limits.clone(), status: self.status.clone() }
    }

    /// The next thing that was done; waits for ever if nothing is on its way. Safe to drop.
    pub async fn next(&mut self) -> Result<Stored, Arc<ShipError>> {
        let Some(ended) = self.tasks.join_next().await else { return std::future::pending().await };
        match tasks::outcome(ended).await? {
            Ended::Piece { from, to, partings } => {
                self.pieces -= 1;
                Ok(Stored::Piece { from, to, partings })
            }
            Ended::Sealed { segment, plain_bytes, sealed, ticket } => {
                self.plain_bytes -= plain_bytes;
                self.sealed(segment, sealed, ticket);
                Ok(Stored::Nothing)
            }
            Ended::Spoiled(segment) => {
                self.pieces -= 1;
                Ok(Stored::Spoiled(segment))
            }
            Ended::Marks { wal, segment, marks } => Ok(Stored::Marks { wal, segment, marks }),
            Ended::Aside => Ok(Stored::Nothing),
            Ended::Segment { segment, sealed_bytes } => {
                self.segments -= 1;
                self.sealed_bytes -= sealed_bytes;
                Ok(Stored::Segment(segment))
            }
        }
    }
}

/// Something that does not read lies under the name of a piece: the same can be stored under another.
fn is_spoiled(error: &ShipError) -> bool {
    matches!(error, ShipError::Archive(error) if error.is_damage())
}

/// Though the slot keeps it.
fn is_not_in_pg_wal(error: &ShipError) -> bool {
    matches!(error, ShipError::Read(_))
}

struct Attempt {
    limits: Arc<HostLimits>,
    status: watch::Sender<StreamStatus>,
}

impl Attempt {
    /// Tries until the store takes it, or until an error that no further try mends. `put` is told how often that was in vain.
    async fn until_stored<T, F, Fut>(&self, put: F, is_final: fn(&ShipError) -> bool) -> Result<T, Arc<ShipError>>
    where
        F: Fn(u32) -> Fut,
        Fut: Future<Output = Result<T, Arc<ShipError>>>,
    {
        let mut tries = 0_u32;
        loop {
            match put(tries).await {
                Err(error) if !is_final(&error) => self.failed(&error).await,
                ended => return ended,
            }
            tries = tries.saturating_add(1);
        }
    }

    async fn failed(&self, error: &ShipError) {
        self.status.send_modify(|status| {
            if status.last_error.is_none() {
                tracing::warn!("WAL is not stored, and tried again: {error}");
            }
            status.failures += 1;
            status.last_error = Some(error.to_string());
        });
        tokio::time::sleep(AGAIN).await;
    }

    fn note(&self, archived: Archived, count: impl FnOnce(&mut StreamStatus)) {
        self.note_well(|status| match archived {
            Archived::Stored { stored_bytes } => {
                self.limits.note_upload(stored_bytes);
                status.stored_bytes += stored_bytes;
                count(status);
            }
            Archived::AlreadyThere => status.already_there += 1,
        });
    }

    fn note_well(&self, count: impl FnOnce(&mut StreamStatus)) {
        self.status.send_modify(|status| {
            count(status);
            if status.last_error.take().is_some() {
                tracing::info!("WAL is stored again");
            }
            status.durable_at = Some(Timestamp::now());
        });
    }
}
