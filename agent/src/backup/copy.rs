//! From the data directory into packs: one thread walks, several read, check, hash, compress and seal.
//!
//! ```text
//! walk (this thread)     scan order = list order; meets each file's entry in the parent; hands out stretches
//!   │ work               bounded: a few stretches a thread
//! read (n threads)       pread, page checksums, chunk ids, packs of their own ──► uploader (repository)
//!   │ placed stretches   bounded by the files that may be under way
//! assemble (this thread) puts stretches back into files and files into list order
//! ```
//!
//! Memory is the packs under way plus a fixed number of files, whatever the size of the cluster.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use walfleet_repository::backup::file_list::{FileListWriter, PlacedContent, PlacedFile, PlacedKind};
use walfleet_repository::backup::read::{BackupReader, ParentFiles, ReadError};
use walfleet_repository::backup::write::{PackSession, PlacedSlot, WriteError};
use walfleet_repository::format::file_map::{ChunkPlace, FileMap, SLOT_BYTES, Slot};
use walfleet_repository::format::manifest::{Content, EntryKind, FileEntry};

use crate::backup::damage::DamageLog;
use crate::backup::scan::{Omitted, OmittedReason, Scan, ScanError, Scanned, ScannedFile, ScannedKind};
use crate::backup::stretch::{self, PageCheck, ReadCounters, StretchError, StretchJob, StretchResult};
use crate::progress::Progress;

/// Slots of one stretch: 32 MiB, the unit that threads share. Small enough that the last one does not leave a thread
/// alone for long, large enough that handing out costs nothing.
const STRETCH_SLOTS: usize = 256;

/// Files that may be under way: what the assembler has to hold back while a large file is being read.
const FILES_UNDER_WAY: usize = 16_384;

/// Small files are handed out together, up to this many bytes or files.
const BATCH_BYTES: u64 = 4 << 20;
const BATCH_FILES: usize = 256;

/// Entries left out that the log names.
const OMITTED_TOLD: u64 = 20;

#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error(transparent)]
    Read(#[from] StretchError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("cancelled")]
    Cancelled,
    #[error("a reading thread ended before its work was done")]
    ThreadLost,
}

/// What copying needs to know.
pub struct CopySpec {
    pub threads: usize,
    pub pages: PageCheck,
    pub parent: Option<Arc<BackupReader>>,
}

/// What was copied.
#[derive(Debug, Default)]
pub struct CopyReport {
    pub file_list: Vec<ChunkPlace>,
    pub file_count: u64,
    pub cluster_bytes: u64,
    pub read_bytes: u64,
    pub damage: DamageLog,
    /// Entries that no rule of PostgreSQL leaves out, and that were.
    pub omitted: u64,
}

/// Copies everything that the scan yields. Blocks; call it off the runtime's own threads, with `runtime` at hand for
/// the store. After an error or cancellation the session's packs are garbage.
pub fn copy(
    scan: Scan,
    session: &Arc<PackSession>,
    spec: &CopySpec,
    runtime: &Handle,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<CopyReport, CopyError> {
    // Two pieces of work a thread wait: the walk stays ahead without opening many files.
    let (work_sender, work) = mpsc::sync_channel::<Work>(2 * spec.threads.max(1));
    let (done_sender, done) = mpsc::channel::<Done>();
    let work = Arc::new(Mutex::new(work));
    let counters = ReadCounters::default();
    std::thread::scope(|scope| {
        for number in 0..spec.threads.max(1) {
            let (work, done, session) = (work.clone(), done_sender.clone(), session.clone());
            let (pages, counters) = (&spec.pages, &counters);
            let name = format!("backup-read-{number}");
            let thread = move || read_all(&work, &done, &session, pages, counters, progress, cancel);
            std::thread::Builder::new().name(name).spawn_scoped(scope, thread).map_err(|_| CopyError::ThreadLost)?;
        }
        drop((done_sender, work));
        let mut walk = Walk::new(session, spec, runtime, done);
        let walked = walk.run(scan, work_sender, cancel);
        // The first failure of a thread explains more than the walk's own "nobody listens".
        let result = match (walk.failure.take(), walked) {
            (Some(failure), _) => Err(failure),
            (None, walked) => walked,
        };
        result.and_then(|()| walk.finish(counters.read_bytes.load(Ordering::Relaxed)))
    })
}

/// One piece of work for a thread.
enum Work {
    Files(Vec<(u64, FileJob)>),
    Stretch { number: u64, job: StretchJob },
}

/// A small file: one slot at most.
struct FileJob {
    file: ScannedFile,
    parent: Option<ChunkPlace>,
}

enum Done {
    Stretch {
        number: u64,
        result: StretchResult,
    },
    /// Read whole.
    File {
        number: u64,
        result: StretchResult,
    },
    Vanished {
        number: u64,
    },
    Failed(CopyError),
    /// The thread flushed its pack and ended.
    Ended,
}

/// Reads until there is no more work, then finishes the thread's pack.
fn read_all(
    work: &Mutex<Receiver<Work>>,
    done: &mpsc::Sender<Done>,
    session: &Arc<PackSession>,
    pages: &PageCheck,
    counters: &ReadCounters,
    progress: &Progress,
    cancel: &CancellationToken,
) {
    let mut reader = stretch::Reader::new(session.writer(), pages, progress, counters, cancel);
    let mut run = || -> Result<(), CopyError> {
        loop {
            let next = work.lock().unwrap_or_else(PoisonError::into_inner).recv();
            match next {
                Ok(Work::Stretch { number, job }) => {
                    let result = reader.stretch(&job)?;
                    let _ = done.send(Done::Stretch { number, result });
                }
                Ok(Work::Files(files)) => {
                    for (number, job) in files {
                        let finished = match reader.small_file(&job.file, job.parent.as_ref())? {
                            Some(result) => Done::File { number, result },
                            None => Done::Vanished { number },
                        };
                        let _ = done.send(finished);
                    }
                }
                Err(_) => return reader.flush().map_err(CopyError::from),
            }
        }
    };
    let _ = done.send(match run() {
        Ok(()) => Done::Ended,
        Err(error) => Done::Failed(error),
    });
}

/// A file under way, in list order.
struct UnderWay {
    file: ScannedFile,
    state: FileState,
}

enum FileState {
    Directory,
    Small(Option<StretchResult>),
    Stretches { parts: Vec<Option<StretchResult>>, missing: usize, parent: Option<ChunkPlace> },
    Vanished,
}

impl UnderWay {
    fn is_done(&self) -> bool {
        match &self.state {
            FileState::Directory | FileState::Vanished => true,
            FileState::Small(result) => result.is_some(),
            FileState::Stretches { missing, .. } => *missing == 0,
        }
    }
}

struct Walk<'a> {
    parent_files: Option<ParentFiles>,
    parent: Option<Arc<BackupReader>>,
    list: FileListWriter,
    runtime: &'a Handle,
    done: Receiver<Done>,
    under_way: VecDeque<UnderWay>,
    /// The number of the first file under way.
    first: u64,
    batch: Vec<(u64, FileJob)>,
    batch_bytes: u64,
    threads_left: usize,
    failure: Option<CopyError>,
    report: CopyReport,
}

impl<'a> Walk<'a> {
    fn new(session: &'a Arc<PackSession>, spec: &CopySpec, runtime: &'a Handle, done: Receiver<Done>) -> Walk<'a> {
        let parent_parts = spec.parent.as_ref().map_or(&[][..], |parent| &parent.manifest.file_list);
        Walk {
            list: FileListWriter::new(session.clone(), parent_parts),
            parent_files: spec.parent.clone().map(ParentFiles::new),
            parent: spec.parent.clone(),
            runtime,
            done,
            under_way: VecDeque::new(),
            first: 0,
            batch: Vec::new(),
            batch_bytes: 0,
            threads_left: spec.threads.max(1),
            failure: None,
            report: CopyReport::default(),
        }
    }

    fn run(&mut self, scan: Scan, work: SyncSender<Work>, cancel: &CancellationToken) -> Result<(), CopyError> {
        for scanned in scan {
            if cancel.is_cancelled() {
                return Err(CopyError::Cancelled);
            }
            match scanned? {
                Scanned::File(file) => self.hand_out(file, &work)?,
                Scanned::Omitted(omitted) => self.note_omitted(&omitted),
            }
            self.collect(Wait::No)?;
            while self.under_way.len() >= FILES_UNDER_WAY {
                self.send_batch(&work)?;
                self.collect(Wait::Yes)?;
            }
        }
        self.send_batch(&work)?;
        drop(work);
        while self.threads_left > 0 {
            self.collect(Wait::Yes)?;
        }
        Ok(())
    }

    fn finish(self, read_bytes: u64) -> Result<CopyReport, CopyError> {
        if !self.under_way.is_empty() {
            return Err(CopyError::ThreadLost);
        }
        let (file_list, file_count) = self.list.finish()?;
        Ok(CopyReport { file_list, file_count, read_bytes, ..self.report })
    }

    fn hand_out(&mut self, file: ScannedFile, work: &SyncSender<Work>) -> Result<(), CopyError> {
        let number = self.first + self.under_way.len() as u64;
        if file.kind == ScannedKind::Directory {
            self.under_way.push_back(UnderWay { file, state: FileState::Directory });
            return Ok(());
        }
        let parent = self.parent_entry(&file);
        let parent_content = parent.and_then(|entry| match entry.kind {
            EntryKind::File { content, .. } => Some(content),
            EntryKind::Directory => None,
        });
        if file.size <= u64::from(SLOT_BYTES) {
            let parent = match parent_content {
                Some(Content::Chunk(place)) => Some(place),
                _ => None,
            };
            self.batch_bytes += file.size;
            self.batch.push((number, FileJob { file: file.clone(), parent }));
            self.under_way.push_back(UnderWay { file, state: FileState::Small(None) });
            if self.batch_bytes >= BATCH_BYTES || self.batch.len() >= BATCH_FILES {
                self.send_batch(work)?;
            }
            return Ok(());
        }
        let parent = match parent_content {
            Some(Content::Map(place)) => Some(place),
            _ => None,
        };
        self.hand_out_stretches(number, file, parent, work)
    }

    fn hand_out_stretches(
        &mut self,
        number: u64,
        file: ScannedFile,
        parent: Option<ChunkPlace>,
        work: &SyncSender<Work>,
    ) -> Result<(), CopyError> {
        let open = match File::open(&file.absolute) {
            Ok(open) => Arc::new(open),
            // Dropped while the backup runs: WAL replay drops it, too.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.under_way.push_back(UnderWay { file, state: FileState::Vanished });
                return Ok(());
            }
            Err(source) => return Err(StretchError::Open { path: file.absolute, source }.into()),
        };
        let map = match (&parent, &self.parent) {
            (Some(place), Some(reader)) => {
                let map: Result<FileMap, ReadError> = self.runtime.block_on(reader.file_map(place));
                // Without it, or with another slot size, nothing is compared and everything is stored.
                let readable = map.map_err(|error| tracing::warn!(path = %file.absolute.display(), "the parent's map of this file does not read: {error}"));
                readable.ok().filter(|map| map.slot_bytes == SLOT_BYTES)
            }
            _ => None,
        };
        let slots = file.size.div_ceil(u64::from(SLOT_BYTES)) as usize;
        let count = slots.div_ceil(STRETCH_SLOTS);
        let state = FileState::Stretches { parts: (0..count).map(|_| None).collect(), missing: count, parent };
        self.under_way.push_back(UnderWay { file: file.clone(), state });
        for part in 0..count {
            let from = part * STRETCH_SLOTS;
            let to = (from + STRETCH_SLOTS).min(slots);
            let known = map.as_ref().and_then(|map| map.slots.get(from..to.min(map.slots.len())));
            let job = StretchJob {
                file: open.clone(),
                path: file.absolute.clone(),
                kind: file.kind,
                size: file.size,
                part,
                first_slot: from,
                slots: to - from,
                parent: known.map_or_else(Vec::new, <[Slot]>::to_vec),
            };
            self.send(Work::Stretch { number, job }, work)?;
        }
        Ok(())
    }

    fn parent_entry(&mut self, file: &ScannedFile) -> Option<FileEntry> {
        let Some(files) = &mut self.parent_files else { return None };
        match self.runtime.block_on(files.find(&file.path)) {
            Ok(entry) => entry,
            Err(error) => {
                tracing::warn!("the parent's file list does not read, and all that follows is stored anew: {error}");
                self.parent_files = None;
                None
            }
        }
    }

    fn send_batch(&mut self, work: &SyncSender<Work>) -> Result<(), CopyError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        self.send(Work::Files(batch), work)
    }

    fn send(&mut self, item: Work, work: &SyncSender<Work>) -> Result<(), CopyError> {
        if work.send(item).is_err() {
            // All threads are gone; one of them said why.
            while self.threads_left > 0 {
                self.collect(Wait::Yes)?;
            }
            return Err(CopyError::ThreadLost);
        }
        Ok(())
    }

    /// Takes in what threads have finished and passes on files that are complete, in order.
    fn collect(&mut self, wait: Wait) -> Result<(), CopyError> {
        let mut next = match wait {
            Wait::Yes => self.done.recv().ok(),
            Wait::No => self.done.try_recv().ok(),
        };
        if next.is_none() && wait == Wait::Yes {
            return Err(CopyError::ThreadLost);
        }
        while let Some(done) = next {
            self.take_in(done)?;
            next = self.done.try_recv().ok();
        }
        while self.under_way.front().is_some_and(UnderWay::is_done) {
            if let Some(file) = self.under_way.pop_front() {
                self.first += 1;
                self.pass_on(file)?;
            }
        }
        Ok(())
    }

    fn take_in(&mut self, done: Done) -> Result<(), CopyError> {
        let (number, result) = match done {
            Done::Stretch { number, result } | Done::File { number, result } => (number, Some(result)),
            Done::Vanished { number } => (number, None),
            Done::Ended => {
                self.threads_left -= 1;
                return Ok(());
            }
            Done::Failed(error) => {
                self.threads_left -= 1;
                self.failure.get_or_insert(error);
                return Err(CopyError::ThreadLost);
            }
        };
        let index = number.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        let Some(file) = index.and_then(|index| self.under_way.get_mut(index)) else {
            return Err(CopyError::ThreadLost);
        };
        match (&mut file.state, result) {
            (state @ FileState::Small(_), None) => *state = FileState::Vanished,
            (FileState::Small(slot), Some(result)) => *slot = Some(result),
            (FileState::Stretches { parts, missing, .. }, Some(result)) => {
                if let Some(part) = parts.get_mut(result.part) {
                    *part = Some(result);
                    *missing -= 1;
                }
            }
            _ => return Err(CopyError::ThreadLost),
        }
        Ok(())
    }

    fn pass_on(&mut self, done: UnderWay) -> Result<(), CopyError> {
        let UnderWay { file, state } = done;
        let kind = match state {
            FileState::Vanished => return Ok(()),
            FileState::Directory => PlacedKind::Directory,
            FileState::Small(result) => {
                let result = result.ok_or(CopyError::ThreadLost)?;
                self.report.damage.add(&file.path, &result.bad_pages);
                small_content(&file, &result)
            }
            FileState::Stretches { parts, parent, .. } => {
                let (mut slots, mut crc32c) = (Vec::new(), 0);
                for result in parts {
                    let result = result.ok_or(CopyError::ThreadLost)?;
                    self.report.damage.add(&file.path, &result.bad_pages);
                    crc32c = crc32c::crc32c_combine(crc32c, result.crc32c, result.bytes as usize);
                    slots.extend(result.slots);
                }
                let content = PlacedContent::Slots { slot_bytes: SLOT_BYTES, slots, overlays: Vec::new(), parent };
                PlacedKind::File { size: file.size, crc32c, content }
            }
        };
        if let PlacedKind::File { size, .. } = kind {
            self.report.cluster_bytes += size;
        }
        let placed = PlacedFile { path: Bytes::from(file.path), mode: file.mode, mtime_us: file.mtime_us, kind };
        Ok(self.list.push(placed)?)
    }

    /// Tells the first few; a folder full of links is one mistake.
    fn note_omitted(&mut self, omitted: &Omitted) {
        self.report.omitted += 1;
        if self.report.omitted > OMITTED_TOLD {
            return;
        }
        let path = String::from_utf8_lossy(&omitted.path);
        match &omitted.reason {
            OmittedReason::Link { target } => {
                tracing::warn!(%path, target = %target.display(), "a symbolic link is not in the backup, nor what it leads to");
            }
            OmittedReason::NotATablespace => tracing::warn!(%path, "not a tablespace, and not in the backup"),
            OmittedReason::SpecialFile => tracing::info!(%path, "a socket, pipe or device is not in the backup"),
            OmittedReason::LostAndFound => {}
        }
    }
}

/// A file of at most one slot.
pub(super) fn small_content(file: &ScannedFile, result: &StretchResult) -> PlacedKind {
    let content = match result.slots.first() {
        None => PlacedContent::Empty,
        Some(PlacedSlot::Zero) => PlacedContent::Zero,
        Some(PlacedSlot::Chunk(placed)) => PlacedContent::Chunk(*placed),
    };
    PlacedKind::File { size: file.size, crc32c: result.crc32c, content }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    Yes,
    No,
}
