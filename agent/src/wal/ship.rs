//! From `pg_wal` into the archive: several segments at once, ahead of what Postgres asks for.
//!
//! Postgres asks for one file at a time and waits. The shipper looks at `archive_status/*.ready`, begins the next files
//! as well, and answers at once when Postgres comes to ask for them. An answer is only ever given for what the store
//! has confirmed; nothing else is remembered across a restart of the agent, since asking the archive again is cheap.

mod home;
mod segment;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, watch};
use walfleet_repository::format::sealed::Effort;
use walfleet_repository::ids::ChunkId;
use walfleet_repository::postgres::{Lsn, Segment, SegmentSize, SystemId, Timeline};
use walfleet_repository::shipping::Compression;
use walfleet_repository::wal_archive::{ArchiveError, Archived, WalArchive};

use crate::limits::HostLimits;
use crate::limits::queueing::Queueing;
use crate::postgres::wal_record::Carry;
use crate::wal::branches::{Branches, Ticket};
use crate::wal::read::{WalFile, WalReadError, read_segment, read_small};
use crate::wal::receive::StreamStatus;

/// Files that were shipped ahead and not asked for yet are remembered; beyond this, the oldest are forgotten and would
/// only be compared again.
const REMEMBERED: usize = 4096;

/// How long a segment that the WAL stream brings is waited for before it is stored from its file.
const STREAM_PATIENCE: Duration = Duration::from_secs(30);

/// Segments being read, decoded and sealed hold at most this much content, and about as much again; always one.
const CONTENT_BYTES: u32 = 48 << 20;

/// Sealed segments on their way hold at most this much; always one.
const SEALED_KIB: u32 = 32 << 10;

/// With so many segments waiting they are compressed lightly, and from more on as lightly as pays: then time counts, and
/// not space.
const BACKLOG: usize = 8;
const LARGE_BACKLOG: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    #[error(transparent)]
    Read(#[from] WalReadError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("timeline {0} has no history file in pg_wal, so its branch is not known\nHINT: copy {name} back into pg_wal.", name = .0.history_name())]
    NoHistory(Timeline),
    #[error("what lies in pg_wal as {name} is not a finished segment: {suspicion}")]
    Unfinished { name: String, suspicion: String },
    #[error("the agent is stopping")]
    Stopping,
}

/// How hard the shipper works.
#[derive(Clone, Copy, Debug)]
pub struct ShipOptions {
    /// Files in flight.
    pub parallel: usize,
    /// Files taken ahead of the one asked for.
    pub read_ahead: usize,
}

/// One instance and where its WAL goes.
#[derive(Clone)]
pub struct ShipSource {
    pub data_dir: PathBuf,
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
    pub archive: WalArchive,
    /// This agent's name.
    pub member: String,
    pub compression: Compression,
    /// What is shipped is counted there, and never waits.
    pub limits: Arc<HostLimits>,
}

/// What the shipper has done, for facts and metrics.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ShipStatus {
    /// The newest segment that the repository confirmed, by LSN.
    pub last_segment: Option<Segment>,
    /// Its end: no WAL before it is missing from what this shipper was asked to ship.
    pub durable_lsn: Lsn,
    pub durable_at: Option<Timestamp>,
    pub shipped: u64,
    pub already_there: u64,
    pub stored_bytes: u64,
    pub failures: u64,
    pub last_error: Option<String>,
}

/// Which file of a segment is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SegmentForm {
    /// Finished, as Postgres says: its last record ends with it or continues in the next.
    Whole,
    /// Finished, if its records say so: under its name may also lie one that is being written, or that was recycled.
    Presumed,
    /// The last of its timeline, which a promotion left unfinished (`.partial`).
    Partial,
}

type Outcome = Option<Result<(), Arc<ShipError>>>;

#[derive(Default)]
struct State {
    /// In flight or done; failures are forgotten at once, so that the next ask tries anew.
    files: HashMap<WalFile, watch::Receiver<Outcome>>,
    /// In the order they were begun.
    order: std::collections::VecDeque<WalFile>,
    /// How often a branch had been left when something was last begun.
    partings: u64,
    /// Confirmed segments ahead of the contiguous end, by number.
    confirmed: BTreeSet<Segment>,
    /// Whether the last segment was new to the archive: nobody else is ahead with this timeline. The first goes alone and tells.
    leads: bool,
    /// The first segment whose durability is promised, and from which the contiguous end grows.
    next: Option<Segment>,
    first: Option<Segment>,
}

/// Ships one instance's WAL. Cheap to share.
pub struct Shipper {
    source: ShipSource,
    branches: Arc<Branches>,
    options: ShipOptions,
    state: Mutex<State>,
    /// Decoding goes in WAL order, so that a record across two segments is read whole.
    decoding: tokio::sync::Mutex<Option<(Segment, Carry)>>,
    /// The segments that were begun and are not decoded yet: the first of them is next.
    to_decode: watch::Sender<BTreeSet<Segment>>,
    slots: Arc<Semaphore>,
    contents: Semaphore,
    /// Of contents that were sealed, for the next while some wait.
    buffers: Mutex<Vec<Vec<u8>>>,
    sealed_kib: Semaphore,
    /// Compress lightly.
    light: WalArchive,
    lightest: WalArchive,
    /// Of the server's processes for a CPU.
    queueing: Arc<Queueing>,
    /// Segments that waited when it was last looked.
    backlog: AtomicUsize,
    status: watch::Sender<ShipStatus>,
    /// What the same server's WAL stream has brought.
    stream: watch::Sender<StreamStatus>,
    /// Postgres has asked for a timeline's history: it was promoted.
    promoted: Notify,
    /// What was stored is there no more.
    anew: Notify,
    /// The one it was made on: a backup that asks runs on threads that may have to wait.
    runtime: Handle,
}

impl ShipSource {
    /// The archive for pieces, which lie there for no longer than their segment takes: they are compressed as lightly as pays.
    pub fn archive_of_pieces(&self) -> WalArchive {
        match self.compression {
            Compression::Adaptive => self.archive.with_less(Effort::Least),
            Compression::Fixed => self.archive.clone(),
        }
    }
}

impl Shipper {
    /// To be made on the runtime that it is to work on.
    pub fn new(source: ShipSource, options: ShipOptions) -> Arc<Shipper> {
        let (status, _) = watch::channel(ShipStatus::default());
        let fitting = (CONTENT_BYTES / source.segment_size.bytes()).max(1) as usize;
        Arc::new(Shipper {
            slots: Arc::new(Semaphore::new(options.parallel.max(1))),
            contents: Semaphore::new(fitting),
            buffers: Mutex::default(),
            sealed_kib: Semaphore::new(SEALED_KIB as usize),
            light: source.archive.with_less(Effort::Level(1)),
            lightest: source.archive.with_less(Effort::Least),
            queueing: Queueing::of(&source.data_dir),
            backlog: AtomicUsize::new(0),
            to_decode: watch::Sender::default(),
            branches: Branches::new(source.clone()),
            source,
            options,
            state: Mutex::default(),
            decoding: tokio::sync::Mutex::new(None),
            status,
            stream: watch::Sender::default(),
            promoted: Notify::new(),
            anew: Notify::new(),
            runtime: Handle::current(),
        })
    }

    pub fn status(&self) -> watch::Receiver<ShipStatus> {
        self.status.subscribe()
    }

    pub fn source(&self) -> &ShipSource {
        &self.source
    }

    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Where this server's WAL goes, whoever stores it.
    pub fn branches(&self) -> &Arc<Branches> {
        &self.branches
    }

    /// Where whoever streams this server's WAL says how far that is.
    pub fn stream(&self) -> &watch::Sender<StreamStatus> {
        &self.stream
    }

    /// Returns when Postgres has asked for a timeline's history to be archived since it was last waited for.
    pub async fn promoted(&self) {
        self.promoted.notified().await;
    }

    /// Whoever receives this server's WAL is to look anew what the repository has of it.
    pub fn ask_to_begin_anew(&self) {
        self.anew.notify_one();
    }

    /// Returns when that was asked for. Safe to drop.
    pub async fn asked_to_begin_anew(&self) {
        self.anew.notified().await;
    }

    /// Returns once the file is durable in the repository. Dropping it leaves the upload running.
    pub async fn ship(self: &Arc<Self>, name: &str) -> Result<(), Arc<ShipError>> {
        let file = WalFile::parse(name, self.source.segment_size).map_err(|e| Arc::new(ShipError::Read(e)))?;
        if let WalFile::Segment(segment) = file {
            if self.is_brought_by_stream(segment).await {
                // What failed before is of no more interest.
                self.status.send_if_modified(|status| status.last_error.take().is_some());
                return Ok(());
            }
            self.expect(segment);
        }
        let receiver = self.begin(file, SegmentForm::Whole);
        self.read_ahead(file).await;
        self.outcome(file, receiver).await
    }

    /// Begins to store a segment from its file, whoever may have brought it before, if its records go to its end:
    /// [`ShipError::Unfinished`] otherwise. Postgres may ask for it meanwhile or afterwards, and is answered without storing it
    /// twice.
    pub fn store(self: &Arc<Self>, segment: Segment) -> impl Future<Output = Result<(), Arc<ShipError>>> + use<> {
        self.store_as(segment, SegmentForm::Presumed)
    }

    /// The same of one that is known to be finished.
    pub fn store_finished(
        self: &Arc<Self>,
        segment: Segment,
    ) -> impl Future<Output = Result<(), Arc<ShipError>>> + use<> {
        self.store_as(segment, SegmentForm::Whole)
    }

    fn store_as(
        self: &Arc<Self>,
        segment: Segment,
        form: SegmentForm,
    ) -> impl Future<Output = Result<(), Arc<ShipError>>> + use<> {
        let file = WalFile::Segment(segment);
        let is_over = self.state().files.get(&file).is_some_and(|known| known.borrow().is_some());
        if is_over {
            self.forget(file);
        }
        result_of(self.begin(file, form))
    }

    /// How many segments whoever stores them is about to store.
    pub fn note_backlog(&self, segments: usize) {
        self.backlog.store(segments, Ordering::Relaxed);
    }

    /// Files in flight at once, at most.
    pub fn parallel(&self) -> usize {
        self.options.parallel.max(1)
    }

    async fn outcome(&self, file: WalFile, receiver: watch::Receiver<Outcome>) -> Result<(), Arc<ShipError>> {
        let result = result_of(receiver).await;
        // Answered: Postgres will not ask again unless it failed, and then it must be tried anew.
        self.forget(file);
        result
    }

    /// Whether the WAL stream has stored a finished segment, or does so soon: then it is not read and stored twice. On a standby
    /// that follows, another member brings it: it is waited for likewise, and compared then.
    async fn is_brought_by_stream(&self, segment: Segment) -> bool {
        let size = self.source.segment_size;
        let mut stream = self.stream.subscribe();
        let comes = |status: &StreamStatus| status.covers(segment, size) || status.follows(segment);
        let decided = stream.wait_for(|status| !comes(status) || segment.end(size) <= status.sealed);
        let decided = tokio::time::timeout(STREAM_PATIENCE, decided).await;
        decided.is_ok_and(|status| status.is_ok_and(|status| status.covers(segment, size)))
    }

    /// Begins a file unless it is in flight or done.
    fn begin(self: &Arc<Self>, file: WalFile, form: SegmentForm) -> watch::Receiver<Outcome> {
        let mut state = self.state();
        self.heed_partings(&mut state);
        if let Some(receiver) = state.files.get(&file) {
            return receiver.clone();
        }
        let (sender, receiver) = watch::channel(None);
        state.files.insert(file, receiver.clone());
        state.order.push_back(file);
        if let WalFile::Segment(segment) = file {
            self.to_decode.send_if_modified(|waiting| waiting.insert(segment));
        }
        while state.order.len() > REMEMBERED {
            if let Some(oldest) = state.order.pop_front() {
                state.files.remove(&oldest);
            }
        }
        let ticket = match file {
            WalFile::Segment(segment) => Some(self.branches.ticket(segment)),
            _ => None,
        };
        drop(state);
        let shipper = Arc::clone(self);
        self.runtime.spawn(async move {
            let turn = Turn { shipper: Arc::clone(&shipper), file };
            let result = shipper.ship_file(file, ticket, form).await.map_err(Arc::new);
            drop(turn);
            shipper.note(file, &result);
            if result.is_err() {
                shipper.forget(file);
            }
            sender.send_replace(Some(result.map(|_| ())));
        });
        receiver
    }

    /// Where a branch was left, what had been stored ahead in it may not be this server's there: it is asked for anew.
    fn heed_partings(&self, state: &mut State) {
        let partings = self.branches.partings();
        if std::mem::replace(&mut state.partings, partings) == partings {
            return;
        }
        let (files, confirmed) = (&mut state.files, &mut state.confirmed);
        files.retain(|file, receiver| !matches!(file, WalFile::Segment(_)) || receiver.borrow().is_none());
        confirmed.clear();
        state.order.retain(|file| state.files.contains_key(file));
    }

    fn forget(&self, file: WalFile) {
        let mut state = self.state();
        state.files.remove(&file);
        state.order.retain(|known| *known != file);
    }

    /// Begins the segments behind the one asked for that Postgres has marked ready.
    ///
    /// Where another server has stored the same timeline already, segments go one by one instead: if this one's records
    /// differ from some segment on, that segment is refused, and none behind it may get into the archive before.
    async fn read_ahead(self: &Arc<Self>, asked: WalFile) {
        let WalFile::Segment(asked) = asked else { return };
        if self.options.read_ahead == 0 || !self.state().leads {
            return;
        }
        let (data_dir, size) = (self.source.data_dir.clone(), self.source.segment_size);
        let listed = tokio::task::spawn_blocking(move || ready_segments(&data_dir, size)).await;
        let ready = listed.unwrap_or_default();
        let stream = self.stream.borrow().clone();
        self.note_backlog(ready.len());
        let ahead = ready
            .into_iter()
            .filter(|segment| *segment > asked && segment.timeline == asked.timeline && !stream.covers(*segment, size));
        for segment in ahead.take(self.options.read_ahead) {
            self.begin(WalFile::Segment(segment), SegmentForm::Whole);
        }
    }

    async fn ship_file(&self, file: WalFile, ticket: Option<Ticket>, form: SegmentForm) -> Result<Archived, ShipError> {
        if let (WalFile::Segment(segment), Some(ticket)) = (file, ticket) {
            // In WAL order, before anything is taken that the one before may need.
            let is_next = |waiting: &BTreeSet<Segment>| waiting.first().is_none_or(|first| *first >= segment);
            let _ = self.to_decode.subscribe().wait_for(is_next).await;
            return self.ship_segment(segment, &ticket, form).await;
        }
        let _slot = self.slot().await?;
        match file {
            WalFile::Segment(segment) | WalFile::Partial(segment) => {
                let _content_permit = self.contents.acquire().await.map_err(|_| ShipError::Stopping)?;
                let home = self.find_home(segment).await?;
                let upload = self.upload(home, segment, SegmentForm::Partial).await?;
                Ok(self.source.archive.put_partial(upload).await?)
            }
            WalFile::History(timeline) => {
                self.promoted.notify_one();
                let content = self.read_small(&timeline.history_name()).await?;
                let (_, archived) = self.branches.store_history(timeline, &content).await?;
                Ok(archived)
            }
            WalFile::BackupHistory(segment, offset) => {
                let size = self.source.segment_size;
                let content = self.read_small(&format!("{}.{offset:08X}.backup", segment.file_name(size))).await?;
                let wal = self.find_home(segment).await?;
                let now = Timestamp::now().as_microsecond();
                let place = (segment, size, offset);
                Ok(self.source.archive.put_backup_history(wal, place, &content, &self.source.member, now).await?)
            }
        }
    }

    async fn read_small(&self, name: &str) -> Result<Vec<u8>, WalReadError> {
        let path = self.source.data_dir.join("pg_wal").join(name);
        let gone = || WalReadError::Io { path, source: std::io::ErrorKind::NotFound.into() };
        read_small(&self.source.data_dir, name).await?.ok_or_else(gone)
    }

    fn note(&self, file: WalFile, result: &Result<Archived, Arc<ShipError>>) {
        let size = self.source.segment_size;
        if let WalFile::Segment(_) = file {
            self.state().leads = matches!(result, Ok(Archived::Stored { .. }));
        }
        let reached = match (file, result) {
            (WalFile::Segment(segment), Ok(_)) => self.confirm(segment),
            _ => None,
        };
        self.status.send_modify(|status| match result {
            Ok(archived) => {
                match archived {
                    Archived::Stored { stored_bytes } => {
                        self.source.limits.note_upload(*stored_bytes);
                        status.shipped += 1;
                        status.stored_bytes += stored_bytes;
                    }
                    Archived::AlreadyThere => status.already_there += 1,
                }
                if let Some(segment) = reached {
                    status.last_segment = Some(segment);
                    status.durable_lsn = segment.end(size);
                    status.durable_at = Some(Timestamp::now());
                }
                status.last_error = None;
            }
            // Nobody said that it is finished.
            Err(error) if matches!(**error, ShipError::Unfinished { .. }) => {}
            Err(error) => {
                status.failures += 1;
                status.last_error = Some(error.to_string());
            }
        });
    }

    /// Postgres asks in WAL order: what it asks for first, or after a change of timeline, is where durability begins.
    fn expect(&self, asked: Segment) {
        let mut state = self.state();
        if state.next.is_none_or(|next| next.timeline < asked.timeline) {
            (state.first, state.next) = (Some(asked), Some(asked));
            state.confirmed.clear();
        }
    }

    /// Takes in a confirmed segment; the new contiguous end, if it grew.
    fn confirm(&self, segment: Segment) -> Option<Segment> {
        let mut state = self.state();
        let mut next = state.next?;
        if segment < next || segment.timeline != next.timeline {
            return None;
        }
        state.confirmed.insert(segment);
        let mut reached = None;
        while state.confirmed.remove(&next) {
            reached = Some(next);
            next = next.next();
        }
        state.next = Some(next);
        reached
    }

    /// Whether this process has seen the archive confirm the segment with the content that lay here.
    pub fn has_confirmed(&self, segment: Segment) -> bool {
        if self.stream.borrow().has_brought(segment, self.source.segment_size) {
            return true;
        }
        let state = self.state();
        state.confirmed.contains(&segment)
            || state.next.is_some_and(|next| segment.timeline == next.timeline && segment < next)
                && state.first.is_some_and(|first| first <= segment)
    }

    /// Compares a finished segment in `pg_wal` with the archived one; `None`: there is nothing to compare.
    pub async fn agrees(&self, segment: Segment, archived: ChunkId) -> Result<Option<bool>, ShipError> {
        self.branches.agrees(segment, archived).await
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing is in flight, or the deadline.
    pub async fn drain(&self, deadline: Duration) {
        let all = u32::try_from(self.options.parallel).unwrap_or(u32::MAX);
        let _ = tokio::time::timeout(deadline, self.slots.acquire_many(all)).await;
    }
}

/// Gives up a segment's place in the order of decoding, whatever became of it.
struct Turn {
    shipper: Arc<Shipper>,
    file: WalFile,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let WalFile::Segment(segment) = self.file {
            self.shipper.is_decoded(segment);
        }
    }
}

async fn result_of(mut receiver: watch::Receiver<Outcome>) -> Result<(), Arc<ShipError>> {
    match receiver.wait_for(Option::is_some).await {
        Ok(outcome) => (*outcome).clone().unwrap_or(Err(Arc::new(ShipError::Stopping))),
        Err(_) => Err(Arc::new(ShipError::Stopping)),
    }
}

/// The segments that Postgres has marked ready to archive, ascending.
pub fn ready_segments(data_dir: &Path, size: SegmentSize) -> Vec<Segment> {
    let Ok(entries) = std::fs::read_dir(data_dir.join("pg_wal/archive_status")) else { return Vec::new() };
    let mut ready: Vec<Segment> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            Segment::from_file_name(name.to_str()?.strip_suffix(".ready")?, size).ok()
        })
        .collect();
    ready.sort_unstable();
    ready
}

/// What leads into `segment`, from its predecessor in `pg_wal`, if that is still there.
pub(super) fn predecessor_carry(source: &ShipSource, segment: Segment) -> Option<Carry> {
    let previous = Segment { number: segment.number.checked_sub(1)?, ..segment };
    let path = source.data_dir.join("pg_wal").join(previous.file_name(source.segment_size));
    read_segment(&path, previous, source.segment_size, source.system_id, None).ok()?.carry
}

#[cfg(test)]
mod tests;
