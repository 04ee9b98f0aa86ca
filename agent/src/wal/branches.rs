//! To which branch this server's WAL goes: its timeline's, until another member is found to have stored other records under
//! the same names; from the first such segment on a branch of its own.
//!
//! Two servers' WAL is never mixed under one branch, whatever is in flight:
//! - nothing counts as stored before all segments before it are settled ([`Ticket`]). If one of those turns out to differ,
//!   what was stored behind it is stored again where it belongs;
//! - a branch is left while nothing is on its way to the store, and what this server had stored in the other branch behind
//!   the first difference is named in the new one's origin, so that no reader takes it for the other's ([`evidence`]);
//! - a process that begins finds where its predecessor was by what lies in `pg_wal` and in the archive ([`locate`]).

mod evidence;
mod locate;
mod others;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{RwLock, RwLockReadGuard, watch};
use walfleet_repository::format::wal_history::{Divergence, Joint};
use walfleet_repository::ids::ChunkId;
use walfleet_repository::postgres::{Branch, Segment, Timeline, WalBranch};
use walfleet_repository::recovery_window::BranchName;
use walfleet_repository::wal_archive::{ArchiveError, Archived, OwnedSegment, OwnedTail, SealedSegment, WalArchive};

use super::read::read_segment;
use super::ship::{ShipError, ShipSource};

/// Before what a new branch needs is tried again, after the store's own attempts.
const AGAIN: Duration = Duration::from_secs(5);

/// One server's, shared by all that store its WAL.
pub struct Branches {
    source: ShipSource,
    pieces: WalArchive,
    /// Shared while something is on its way to the store; alone while it is found out, or changed, where that belongs.
    ways: RwLock<HashMap<WalBranch, Way>>,
    /// Segments that are not settled, and how many store each.
    unsettled: Mutex<BTreeMap<(Timeline, u64), usize>>,
    /// The newest of each branch that this process saw stored with the content that lay here.
    newest: Mutex<HashMap<WalBranch, Segment>>,
    settled: watch::Sender<()>,
    /// Whether the last segment was new to the archive: nobody else is ahead with this timeline.
    leads: AtomicBool,
    /// How often a branch was left.
    partings: watch::Sender<u64>,
    stored_histories: Mutex<BTreeSet<Branch>>,
}

/// The branches of one timeline that this server's WAL went to, oldest first.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Way {
    /// Each with its first segment; never empty, the first from 0 on.
    steps: Vec<(u64, WalBranch)>,
    standing: Standing,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Standing {
    /// What comes next goes on from the last branch, for all that is known.
    There,
    /// It does not, and is on no branch that is known: somebody else's WAL lies before it.
    Astray { whose: String },
}

/// What became of one attempt.
#[derive(Debug)]
pub enum Put {
    /// Where it is now.
    Stored(WalBranch, Archived),
    Refused(Refusal),
}

/// A branch has, or follows from, other records.
#[derive(Debug)]
pub struct Refusal {
    wal: WalBranch,
    /// Of what was to be stored.
    content: ChunkId,
    stored_by: String,
}

impl Way {
    fn of(base: WalBranch) -> Way {
        Way { steps: vec![(0, base)], standing: Standing::There }
    }

    fn home(&self, number: u64) -> WalBranch {
        let (_, wal) = self.steps.iter().rev().find(|(first, _)| *first <= number).unwrap_or(&self.steps[0]);
        *wal
    }
}

impl Branches {
    pub fn new(source: ShipSource) -> Arc<Branches> {
        Arc::new(Branches {
            pieces: source.archive_of_pieces(),
            source,
            ways: RwLock::default(),
            unsettled: Mutex::default(),
            newest: Mutex::default(),
            settled: watch::Sender::default(),
            leads: AtomicBool::new(false),
            partings: watch::Sender::default(),
            stored_histories: Mutex::default(),
        })
    }

    /// How often a branch was left: what was done for a segment before that may have to be done again.
    pub fn partings(&self) -> u64 {
        *self.partings.borrow()
    }

    /// Forgets where this server's WAL went: its data directory may have been made anew from another's. What lies in the
    /// archive and in `pg_wal` says it again, at the cost of some requests.
    pub async fn forget(&self) {
        let mut ways = self.ways.write().await;
        ways.clear();
        self.newest_of().clear();
        self.stored_histories.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Where a segment belongs. `base` is its timeline's own branch.
    pub async fn home(&self, base: WalBranch, segment: Segment) -> Result<WalBranch, ShipError> {
        let ways = self.located(base, segment).await?;
        Ok(ways.get(&base).map_or(base, |way| way.home(segment.number)))
    }

    /// Where this server's newest WAL goes: everything before lies on the way there. `segment`: one that it writes.
    pub async fn newest(&self, base: WalBranch, segment: Segment) -> Result<WalBranch, ShipError> {
        let ways = self.located(base, segment).await?;
        Ok(ways.get(&base).map_or(base, |way| way.home(u64::MAX)))
    }

    async fn located(
        &self,
        base: WalBranch,
        segment: Segment,
    ) -> Result<RwLockReadGuard<'_, HashMap<WalBranch, Way>>, ShipError> {
        loop {
            let ways = self.ways.read().await;
            if ways.contains_key(&base) {
                return Ok(ways);
            }
            drop(ways);
            let mut ways = self.ways.write().await;
            if let Entry::Vacant(unknown) = ways.entry(base) {
                unknown.insert(self.locate(base, segment).await?);
            }
        }
    }

    /// Where a segment belongs, as far as that is known without waiting: what is sealed for it is mostly sealed once.
    pub fn likely_home(&self, base: WalBranch, segment: Segment) -> Option<WalBranch> {
        self.ways.try_read().ok()?.get(&base).map(|way| way.home(segment.number))
    }

    /// One attempt to store a finished segment, whichever branch it was sealed for. `base` is its timeline's own.
    pub async fn put_segment(&self, base: WalBranch, sealed: &SealedSegment) -> Result<Put, ShipError> {
        let put = |wal| self.source.archive.store_segment_in(wal, sealed);
        self.put((base, sealed.segment()), sealed.content_id(), put).await
    }

    async fn put<F: Future<Output = Result<Archived, ArchiveError>>>(
        &self,
        (base, segment): (WalBranch, Segment),
        content: ChunkId,
        put: impl FnOnce(WalBranch) -> F,
    ) -> Result<Put, ShipError> {
        let ways = self.located(base, segment).await?;
        let way = ways.get(&base).cloned().unwrap_or_else(|| Way::of(base));
        let wal = way.home(segment.number);
        if let Standing::Astray { whose } = way.standing {
            return Ok(Put::Refused(Refusal { wal, content, stored_by: whose }));
        }
        match put(wal).await {
            Ok(archived) => Ok(Put::Stored(wal, archived)),
            Err(ArchiveError::Diverged { stored_by, content, .. }) => {
                Ok(Put::Refused(Refusal { wal, content, stored_by }))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Stores a finished segment where it belongs.
    ///
    /// Where another server is ahead with the timeline, segments go one by one: if this one's differ from some on, what went
    /// along with the first of those would take the names of the other's next segments.
    pub async fn store_segment(
        &self,
        base: WalBranch,
        sealed: &SealedSegment,
        ticket: &Ticket,
    ) -> Result<Archived, ShipError> {
        self.until(|| self.leads() || !self.is_any_before(ticket.place)).await;
        self.look_at_others(base, sealed.segment()).await?;
        loop {
            let put = self.put_segment(base, sealed).await?;
            if let Some(archived) = self.settle(base, sealed.segment(), put, ticket).await? {
                return Ok(archived);
            }
        }
    }

    /// Stores a piece where it belongs. One that does not begin its segment is of use only beside those before it.
    pub async fn store_tail(&self, base: WalBranch, tail: &OwnedTail) -> Result<Archived, ShipError> {
        self.store_tail_in(&self.pieces, base, tail).await
    }

    /// The same of one that the next ones wait for. The more `tries` were in vain, the longer an answer is waited for.
    pub async fn store_piece(&self, base: WalBranch, tail: &OwnedTail, tries: u32) -> Result<Archived, ShipError> {
        self.store_tail_in(&self.pieces.hurried(tries), base, tail).await
    }

    async fn store_tail_in(
        &self,
        archive: &WalArchive,
        base: WalBranch,
        tail: &OwnedTail,
    ) -> Result<Archived, ShipError> {
        loop {
            let put = |wal| archive.put_tail(OwnedTail { wal, ..tail.clone() });
            match self.put((base, tail.segment), tail.after, put).await? {
                Put::Stored(_, archived) => return Ok(archived),
                Put::Refused(refusal) => {
                    self.until_settled_before((tail.segment.timeline, tail.segment.number)).await;
                    self.part(base, tail.segment, refusal).await?;
                }
            }
        }
    }

    /// Waits until all segments before are settled. `None`: where it was put is not where it belongs, so that it has to be
    /// put once more.
    pub async fn settle(
        &self,
        base: WalBranch,
        segment: Segment,
        put: Put,
        ticket: &Ticket,
    ) -> Result<Option<Archived>, ShipError> {
        self.until_settled_before(ticket.place).await;
        match put {
            Put::Stored(wal, archived) if self.home(base, segment).await? == wal => {
                self.newest_of().insert(wal, segment);
                self.leads.store(matches!(archived, Archived::Stored { .. }), Ordering::Relaxed);
                Ok(Some(archived))
            }
            Put::Stored(..) => Ok(None),
            Put::Refused(refusal) => self.part(base, segment, refusal).await.map(|()| None),
        }
    }

    /// Leaves a branch for a new one, unless that was done meanwhile.
    async fn part(&self, base: WalBranch, segment: Segment, refusal: Refusal) -> Result<(), ShipError> {
        let mut ways = self.ways.write().await;
        let mut way = ways.get(&base).cloned().unwrap_or_else(|| Way::of(base));
        if way.home(segment.number) != refusal.wal {
            return Ok(());
        }
        if let Some(found) = self.way_back(base, (refusal.wal, segment)).await? {
            tracing::info!(branch = %BranchName::from(&found.home(segment.number)), data_dir = %self.source.data_dir.display(),
                "this server's WAL goes to the branch that has what lies before it");
            ways.insert(base, found);
            self.partings.send_modify(|partings| *partings += 1);
            return Ok(());
        }
        let size = self.source.segment_size;
        let (first, joint) = self.where_it_left(&way, segment, &refusal.stored_by).await?;
        let (content, stored_by) = match first == segment {
            true => (refusal.content, refusal.stored_by),
            false => self.first_difference(refusal.wal, first).await?,
        };
        let strays = self.strays(refusal.wal, first).await?;
        let divergence = Divergence {
            member: self.source.member.clone(),
            stored_by,
            from: refusal.wal.branch,
            at: first.start(size),
            content,
            joint,
            strays: strays.segments,
            stray_tails: strays.tails,
            found_at_us: Timestamp::now().as_microsecond(),
        };
        let wal = self.source.archive.diverge(refusal.wal, &divergence).await?;
        way.steps.push((first.number, wal));
        way.standing = Standing::There;
        ways.insert(base, way);
        self.partings.send_modify(|partings| *partings += 1);
        let other = match divergence.stored_by == self.source.member {
            true => "split brain with itself, which was rolled back: it".to_owned(),
            false => format!("split brain: {}", divergence.stored_by),
        };
        tracing::error!(branch = %BranchName::from(&wal), data_dir = %self.source.data_dir.display(),
            "{other} has stored other WAL of timeline {} from {} on than this server writes; this server's goes to a branch of its own",
            wal.timeline, first.file_name(size));
        if joint == Joint::Open {
            tracing::error!("what this server wrote before is not known to the repository: take a backup of it");
        }
        self.bring_along(wal, first, segment).await;
        Ok(())
    }

    /// To a branch that is there already: this member's own from before, or its primary's, that begins behind the segment that
    /// was looked for first. Not if something of this server's lies in the branch that is left: a new one's origin names that.
    async fn way_back(&self, base: WalBranch, (left, segment): (WalBranch, Segment)) -> Result<Option<Way>, ShipError> {
        let found = self.found_way(base, segment).await?.filter(|found| found.home(segment.number) != left);
        let Some(found) = found else { return Ok(None) };
        let number = found.steps.last().map_or(segment.number, |(first, _)| *first);
        let strays = self.strays(left, Segment { number, ..segment }).await?;
        Ok((strays.segments.is_empty() && strays.tails.is_empty()).then_some(found))
    }

    /// Stores what lies in `pg_wal` of the segments `[first, end)`, which nobody asks to have archived again.
    async fn bring_along(&self, wal: WalBranch, first: Segment, end: Segment) {
        let mut segment = first;
        while segment < end {
            let (source, size) = (self.source.clone(), self.source.segment_size);
            let read = tokio::task::spawn_blocking(move || {
                let path = source.data_dir.join("pg_wal").join(segment.file_name(size));
                let carry = super::ship::predecessor_carry(&source, segment);
                read_segment(&path, segment, size, source.system_id, carry)
            });
            let stored = match read.await {
                Ok(Ok(content)) => {
                    let upload = OwnedSegment {
                        wal,
                        segment,
                        segment_size: size,
                        content: content.bytes,
                        facts: content.facts,
                        predecessor: None,
                        member: self.source.member.clone(),
                        shipped_at_us: Timestamp::now().as_microsecond(),
                    };
                    self.until_stored(Arc::new(upload)).await
                }
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(ShipError::Stopping),
            };
            if let Err(error) = stored {
                tracing::warn!(segment = segment.file_name(size), "it is missing on the new branch: {error}");
            }
            segment = segment.next();
        }
    }

    /// Tried until the store takes it: its file may be gone by the time that anybody looks again.
    async fn until_stored(&self, upload: Arc<OwnedSegment>) -> Result<(), ShipError> {
        loop {
            match self.source.archive.put_segment(Arc::clone(&upload)).await {
                Ok(_) => return Ok(()),
                Err(error) if error.is_retryable() => {
                    tracing::warn!("a segment of the new branch is not stored, and tried again: {error}");
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn newest_of(&self) -> std::sync::MutexGuard<'_, HashMap<WalBranch, Segment>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes on a segment. To be called in the order of the segments.
    pub fn ticket(self: &Arc<Self>, segment: Segment) -> Ticket {
        let place = (segment.timeline, segment.number);
        *self.unsettled().entry(place).or_default() += 1;
        Ticket { branches: Arc::clone(self), place }
    }

    /// Returns once nothing of the timeline before a segment is on its way.
    async fn until_settled_before(&self, place: (Timeline, u64)) {
        self.until(|| !self.is_any_before(place)).await;
    }

    fn is_any_before(&self, (timeline, number): (Timeline, u64)) -> bool {
        self.unsettled().range((timeline, 0)..(timeline, number)).next().is_some()
    }

    fn leads(&self) -> bool {
        self.leads.load(Ordering::Relaxed)
    }

    /// Looks again whenever a segment was settled.
    async fn until(&self, holds: impl Fn() -> bool) {
        let mut settled = self.settled.subscribe();
        loop {
            settled.borrow_and_update();
            if holds() {
                return;
            }
            // The sender lives as long as this does.
            let _ = settled.changed().await;
        }
    }

    fn unsettled(&self) -> std::sync::MutexGuard<'_, BTreeMap<(Timeline, u64), usize>> {
        self.unsettled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a timeline's history file, once, and says which branch that makes.
    pub async fn store_history(&self, timeline: Timeline, content: &[u8]) -> Result<(WalBranch, Archived), ShipError> {
        let (system_id, branch) = (self.source.system_id, Branch::of_history(content));
        let wal = WalBranch { system_id, timeline, branch };
        let stored = || self.stored_histories.lock().unwrap_or_else(PoisonError::into_inner);
        if stored().contains(&branch) {
            return Ok((wal, Archived::AlreadyThere));
        }
        let parent = self.parent_of(timeline, content).await?;
        let (archive, member, now) = (&self.source.archive, &self.source.member, Timestamp::now().as_microsecond());
        let archived = archive.put_history(system_id, timeline, content, parent, member, now).await?;
        stored().insert(branch);
        Ok((wal, archived))
    }
}

/// A segment that is being stored. While it lives nothing behind it counts as stored.
pub struct Ticket {
    branches: Arc<Branches>,
    place: (Timeline, u64),
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut unsettled = self.branches.unsettled();
        if let Some(count) = unsettled.get_mut(&self.place) {
            *count -= 1;
            if *count == 0 {
                unsettled.remove(&self.place);
            }
        }
        drop(unsettled);
        self.branches.settled.send_replace(());
    }
}

#[cfg(test)]
mod tests;
