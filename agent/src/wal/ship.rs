//! From `pg_wal` into the archive: several segments at once, ahead of what Postgres asks for.
//!
//! Postgres asks for one file at a time and waits. The shipper looks at `archive_status/*.ready`, begins the next files
//! as well, and answers at once when Postgres comes to ask for them. An answer is only ever given for what the store
//! has confirmed; nothing else is remembered across a restart of the agent, since asking the archive again is cheap.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use walfleet_repository::ids::ChunkId;
use walfleet_repository::postgres::{Branch, Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};
use walfleet_repository::wal_archive::{ArchiveError, Archived, OwnedSegment, WalArchive};

use crate::limits::{HostLimits, threads};
use crate::postgres::wal_record::Carry;
use crate::wal::read::{SegmentContent, WalFile, WalReadError, read_segment};

/// Files that were shipped ahead and not asked for yet are remembered; beyond this, the oldest are forgotten and would
/// only be compared again.
const REMEMBERED: usize = 4096;

/// Segments in flight hold at most this much content, and about as much again sealed; always one.
const IN_FLIGHT_BYTES: u32 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    #[error(transparent)]
    Read(#[from] WalReadError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("timeline {0} has no history file in pg_wal, so its branch is not known\nHINT: copy {name} back into pg_wal.", name = .0.history_name())]
    NoHistory(Timeline),
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
    /// Finished: its last record ends with it or continues in the next.
    Whole,
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
    /// Whose history file the archive holds.
    stored_histories: BTreeSet<Branch>,
    /// Confirmed segments ahead of the contiguous end, by number.
    confirmed: BTreeSet<Segment>,
    /// Whether the last segment was new to the archive: nobody else is ahead with this timeline.
    leads: bool,
    /// The first segment whose durability is promised, and from which the contiguous end grows.
    next: Option<Segment>,
    first: Option<Segment>,
}

/// Ships one instance's WAL. Cheap to share.
pub struct Shipper {
    source: ShipSource,
    options: ShipOptions,
    state: Mutex<State>,
    /// Decoding goes in WAL order, so that a record across two segments is read whole.
    decoding: tokio::sync::Mutex<Option<(Segment, Carry)>>,
    slots: Arc<Semaphore>,
    status: watch::Sender<ShipStatus>,
    /// The one it was made on: a backup that asks runs on threads that may have to wait.
    runtime: Handle,
}

impl Shipper {
    /// To be made on the runtime that it is to work on.
    pub fn new(source: ShipSource, options: ShipOptions) -> Arc<Shipper> {
        let (status, _) = watch::channel(ShipStatus::default());
        let fitting = (IN_FLIGHT_BYTES / source.segment_size.bytes()).max(1) as usize;
        let options = ShipOptions { parallel: options.parallel.clamp(1, fitting), ..options };
        Arc::new(Shipper {
            slots: Arc::new(Semaphore::new(options.parallel)),
            source,
            options,
            state: Mutex::default(),
            decoding: tokio::sync::Mutex::new(None),
            status,
            runtime: Handle::current(),
        })
    }

    pub fn status(&self) -> watch::Receiver<ShipStatus> {
        self.status.subscribe()
    }

    /// Returns once the file is durable in the repository. Dropping it leaves the upload running.
    pub async fn ship(self: &Arc<Self>, name: &str) -> Result<(), Arc<ShipError>> {
        let file = WalFile::parse(name, self.source.segment_size).map_err(|e| Arc::new(ShipError::Read(e)))?;
        if let WalFile::Segment(segment) = file {
            self.expect(segment);
        }
        let mut receiver = self.begin(file);
        self.read_ahead(file).await;
        let outcome = receiver.wait_for(Option::is_some).await;
        let result = match outcome {
            Ok(outcome) => (*outcome).clone().unwrap_or(Err(Arc::new(ShipError::Stopping))),
            Err(_) => Err(Arc::new(ShipError::Stopping)),
        };
        // Answered: Postgres will not ask again unless it failed, and then it must be tried anew.
        self.forget(file);
        result
    }

    /// Begins a file unless it is in flight or done.
    fn begin(self: &Arc<Self>, file: WalFile) -> watch::Receiver<Outcome> {
        let mut state = self.state();
        if let Some(receiver) = state.files.get(&file) {
            return receiver.clone();
        }
        let (sender, receiver) = watch::channel(None);
        state.files.insert(file, receiver.clone());
        state.order.push_back(file);
        while state.order.len() > REMEMBERED {
            if let Some(oldest) = state.order.pop_front() {
                state.files.remove(&oldest);
            }
        }
        drop(state);
        let shipper = Arc::clone(self);
        self.runtime.spawn(async move {
            let result = shipper.ship_file(file).await.map_err(Arc::new);
            shipper.note(file, &result);
            if result.is_err() {
                shipper.forget(file);
            }
            sender.send_replace(Some(result.map(|_| ())));
        });
        receiver
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
        let ahead = ready.into_iter().filter(|segment| *segment > asked && segment.timeline == asked.timeline);
        for segment in ahead.take(self.options.read_ahead) {
            self.begin(WalFile::Segment(segment));
        }
    }

    async fn ship_file(&self, file: WalFile) -> Result<Archived, ShipError> {
        let _slot = self.slots.acquire().await.map_err(|_| ShipError::Stopping)?;
        match file {
            WalFile::Segment(segment) => self.ship_segment(segment, SegmentForm::Whole).await,
            WalFile::Partial(segment) => self.ship_segment(segment, SegmentForm::Partial).await,
            WalFile::History(timeline) => {
                let content = self.read_small(&timeline.history_name()).await?;
                let (system_id, now) = (self.source.system_id, Timestamp::now().as_microsecond());
                let archive = &self.source.archive;
                Ok(archive.put_history(system_id, timeline, &content, &self.source.member, now).await?)
            }
            WalFile::BackupHistory(segment, offset) => {
                let size = self.source.segment_size;
                let content = self.read_small(&format!("{}.{offset:08X}.backup", segment.file_name(size))).await?;
                let wal = self.find_branch(segment.timeline).await?;
                let now = Timestamp::now().as_microsecond();
                let place = (segment, size, offset);
                Ok(self.source.archive.put_backup_history(wal, place, &content, &self.source.member, now).await?)
            }
        }
    }

    async fn ship_segment(&self, segment: Segment, form: SegmentForm) -> Result<Archived, ShipError> {
        let wal = self.find_branch(segment.timeline).await?;
        let mut content = self.decode(segment, form).await?;
        if let Some(suspicion) = content.suspicion.filter(|_| form == SegmentForm::Whole) {
            content.facts.valid_bytes = self.source.segment_size.bytes();
            let name = segment.file_name(self.source.segment_size);
            tracing::warn!(
                segment = name,
                "a finished segment does not read to its end and is archived as it is: {suspicion}"
            );
        }
        let upload = OwnedSegment {
            wal,
            segment,
            segment_size: self.source.segment_size,
            content: content.bytes,
            facts: content.facts,
            predecessor: None,
            member: self.source.member.clone(),
            shipped_at_us: Timestamp::now().as_microsecond(),
        };
        Ok(match form {
            SegmentForm::Whole => self.source.archive.put_segment(upload).await?,
            SegmentForm::Partial => self.source.archive.put_partial(upload).await?,
        })
    }

    /// Reads and decodes a segment behind its predecessor.
    async fn decode(&self, segment: Segment, form: SegmentForm) -> Result<SegmentContent, ShipError> {
        let mut last = self.decoding.lock().await;
        let known = last.take().filter(|(previous, _)| previous.next() == segment).map(|(_, carry)| carry);
        let (source, size) = (self.source.clone(), self.source.segment_size);
        let read = tokio::task::spawn_blocking(move || {
            let carry = known.or_else(|| predecessor_carry(&source, segment));
            let name = match form {
                SegmentForm::Whole => segment.file_name(size),
                SegmentForm::Partial => format!("{}.partial", segment.file_name(size)),
            };
            let path = source.data_dir.join("pg_wal").join(name);
            let content = read_segment(&path, segment, size, source.system_id, carry)?;
            Ok::<_, WalReadError>(content)
        });
        let mut content = read.await.map_err(|_| ShipError::Stopping)??;
        if form == SegmentForm::Whole {
            *last = content.carry.take().map(|carry| (segment, carry));
        }
        Ok(content)
    }

    /// Where a timeline's WAL lies: said by the history file that lies in `pg_wal` at this moment, since a host can be
    /// rewound and promoted to the same number again. It is archived before any of the timeline's segments.
    pub async fn branch(self: &Arc<Self>, timeline: Timeline) -> Result<WalBranch, ShipError> {
        let shipper = Arc::clone(self);
        threads::settled(self.runtime.spawn(async move { shipper.find_branch(timeline).await })).await
    }

    async fn find_branch(&self, timeline: Timeline) -> Result<WalBranch, ShipError> {
        let system_id = self.source.system_id;
        if timeline == Timeline::FIRST {
            return Ok(WalBranch { system_id, timeline, branch: Branch::ROOT });
        }
        let content = match self.read_small(&timeline.history_name()).await {
            Ok(content) => content,
            Err(WalReadError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Err(ShipError::NoHistory(timeline));
            }
            Err(error) => return Err(error.into()),
        };
        let branch = Branch::of_history(&content);
        let is_stored = self.state().stored_histories.contains(&branch);
        if !is_stored {
            let now = Timestamp::now().as_microsecond();
            self.source.archive.put_history(system_id, timeline, &content, &self.source.member, now).await?;
            self.state().stored_histories.insert(branch);
        }
        Ok(WalBranch { system_id, timeline, branch })
    }

    /// A history file: a few lines, never more than a page or two.
    async fn read_small(&self, name: &str) -> Result<Vec<u8>, WalReadError> {
        const LIMIT: u64 = 1 << 20;
        let path = self.source.data_dir.join("pg_wal").join(name);
        let read = tokio::task::spawn_blocking(move || {
            let io = |source| WalReadError::Io { path: path.clone(), source };
            let found = std::fs::metadata(&path).map_err(io)?.len();
            if found == 0 || found > LIMIT {
                return Err(WalReadError::Length { path: path.clone(), found, expected: LIMIT });
            }
            std::fs::read(&path).map_err(io)
        });
        read.await.unwrap_or_else(|_| Err(WalReadError::Name { name: name.to_owned() }))
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
        let state = self.state();
        state.confirmed.contains(&segment)
            || state.next.is_some_and(|next| segment.timeline == next.timeline && segment < next)
                && state.first.is_some_and(|first| first <= segment)
    }

    /// Compares a finished segment in `pg_wal` with the archived one; `None`: there is nothing to compare.
    pub async fn agrees(&self, segment: Segment, archived: ChunkId) -> Result<Option<bool>, ShipError> {
        let (source, size) = (self.source.clone(), self.source.segment_size);
        let read = tokio::task::spawn_blocking(move || {
            let path = source.data_dir.join("pg_wal").join(segment.file_name(size));
            match read_segment(&path, segment, size, source.system_id, None) {
                Ok(content) if content.suspicion.is_none() => Ok(Some(content)),
                Ok(_) => Ok(None),
                Err(WalReadError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            }
        });
        let Some(content) = read.await.map_err(|_| ShipError::Stopping)?? else { return Ok(None) };
        let valid = content.bytes.get(..content.facts.valid_bytes as usize).unwrap_or_default();
        Ok(Some(self.source.archive.id_of(valid) == archived))
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
fn predecessor_carry(source: &ShipSource, segment: Segment) -> Option<Carry> {
    let previous = Segment { number: segment.number.checked_sub(1)?, ..segment };
    let path = source.data_dir.join("pg_wal").join(previous.file_name(source.segment_size));
    read_segment(&path, previous, source.segment_size, source.system_id, None).ok()?.carry
}

#[cfg(test)]
mod tests;
