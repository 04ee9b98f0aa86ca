//! The thread that walks: meets each file's entry in the parent, hands out what has to be read, and has what came of it
//! put together.

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use walfleet_repository::backup::fetch::chunks::ChunkReader;
use walfleet_repository::backup::file_list::{PlacedContent, PlacedKind};
use walfleet_repository::backup::read::{BackupReader, ParentFiles};
use walfleet_repository::backup::write::PackSession;
use walfleet_repository::format::file_map::{ChunkPlace, FileMap, SLOT_BYTES, Slot};
use walfleet_repository::format::manifest::{Content, EntryKind, FileEntry};

use super::assemble::{Assembly, FileState};
use super::compose::compose;
use super::proof::Expected;
use super::{CopyError, CopySpec, Done, FileJob, Work};
use crate::backup::compare::Former;
use crate::backup::pages::{PagesJob, PagesResult};
use crate::backup::scan::{Omitted, OmittedReason, Scan, Scanned, ScannedFile, ScannedKind};
use crate::backup::spare::{FileChanges, Known, ReadPlan};
use crate::backup::stretch::{StretchError, StretchJob};
use crate::progress::Progress;

/// Slots of one stretch: 32 MiB, the unit that threads share. Small enough that the last one does not leave a thread
/// alone for long, large enough that handing out costs nothing.
const STRETCH_SLOTS: usize = 256;

/// Small files are handed out together, up to this many bytes or files.
const BATCH_BYTES: u64 = 4 << 20;
const BATCH_FILES: usize = 256;

/// Entries left out that the log names.
const OMITTED_TOLD: u64 = 20;

/// What is known of a file that the parent has, too.
struct KnownFile {
    parent_size: u64,
    parent_crc32c: Option<u32>,
    content: Content,
    changes: FileChanges,
}

pub(super) struct Walk<'a> {
    session: &'a Arc<PackSession>,
    known: Option<&'a Known>,
    progress: &'a Progress,
    parent_files: Option<ParentFiles>,
    parent: Option<Arc<BackupReader>>,
    /// Brings the parent's content where it has to be compared.
    chunks: Option<Arc<ChunkReader>>,
    runtime: &'a Handle,
    done: Receiver<Done>,
    pub(super) assembly: Assembly<'a>,
    batch: Vec<(u64, FileJob)>,
    batch_bytes: u64,
    threads_left: usize,
    pub(super) failure: Option<CopyError>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        session: &'a Arc<PackSession>,
        spec: &'a CopySpec,
        threads: usize,
        runtime: &'a Handle,
        progress: &'a Progress,
        done: Receiver<Done>,
    ) -> Walk<'a> {
        let parent_parts = spec.parent.as_ref().map_or(&[][..], |parent| &parent.manifest.file_list);
        Walk {
            session,
            known: spec.known.as_ref(),
            progress,
            parent_files: spec.parent.clone().map(ParentFiles::new),
            parent: spec.parent.clone(),
            chunks: spec.parent.as_ref().map(|parent| Arc::new(ChunkReader::new(parent))),
            runtime,
            done,
            assembly: Assembly::new(session, parent_parts),
            batch: Vec::new(),
            batch_bytes: 0,
            threads_left: threads,
            failure: None,
        }
    }

    pub(super) fn run(
        &mut self,
        scan: Scan,
        work: SyncSender<Work>,
        cancel: &CancellationToken,
    ) -> Result<(), CopyError> {
        for scanned in scan {
            if cancel.is_cancelled() {
                return Err(CopyError::Cancelled);
            }
            match scanned? {
                Scanned::File(file) => self.hand_out(file, &work)?,
                Scanned::Omitted(omitted) => self.note_omitted(&omitted),
            }
            self.collect(Wait::No)?;
            while self.assembly.is_full() {
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

    fn hand_out(&mut self, file: ScannedFile, work: &SyncSender<Work>) -> Result<(), CopyError> {
        let number = self.assembly.next_number();
        if file.kind == ScannedKind::Directory {
            self.assembly.push(file, FileState::Directory);
            return Ok(());
        }
        let parent = self.parent_entry(&file);
        let known = parent.as_ref().and_then(|parent| self.changes(&file, parent));
        let proof = self.known.map(|known| known.proof).filter(|proof| proof.is_due(&file.path));
        // Where the WAL names what changed, and that is most of it, a comparison would be in vain.
        let is_relation = matches!(&file.kind, ScannedKind::Relation(relation) if relation.file.fork.is_logged());
        let is_unknown = is_relation && (known.is_none() || proof.is_some());
        let (file, changes) = match (known, proof) {
            (Some(known), Some(proof)) => (file, proof.compares.then_some(known.changes)),
            (Some(known), None) => match self.hand_out_changes(number, file, known, work)? {
                None => return Ok(()),
                Some(file) => (file, None),
            },
            (None, _) => (file, None),
        };
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
            let untouched = changes.filter(|changes| changes.is_untouched(file.size)).and(parent);
            let untouched = untouched.filter(|place| u64::from(place.frame.raw_len) == file.size);
            self.batch.push((number, FileJob { file: file.clone(), parent, proves: untouched.is_some() }));
            self.assembly.push(file, FileState::Small { untouched, result: None });
            if self.batch_bytes >= BATCH_BYTES || self.batch.len() >= BATCH_FILES {
                self.send_batch(work)?;
            }
            return Ok(());
        }
        let parent = match parent_content {
            Some(Content::Map(place)) => Some(place),
            _ => None,
        };
        self.hand_out_stretches(number, file, (parent, changes, is_unknown), work)
    }

    fn hand_out_stretches(
        &mut self,
        number: u64,
        file: ScannedFile,
        (parent, changes, is_unknown): (Option<ChunkPlace>, Option<FileChanges>, bool),
        work: &SyncSender<Work>,
    ) -> Result<(), CopyError> {
        let Some(open) = self.open(&file)? else {
            self.assembly.push(file, FileState::Vanished);
            return Ok(());
        };
        let map = parent.as_ref().and_then(|place| self.parent_map(&file, place));
        let slots = file.size.div_ceil(u64::from(SLOT_BYTES)) as usize;
        let count = slots.div_ceil(STRETCH_SLOTS);
        let map = map.map(Arc::new);
        let former = map.clone().filter(|_| is_unknown).zip(self.chunks.clone());
        let former = former.map(|(map, chunks)| Former { map, chunks, runtime: self.runtime.clone() });
        let proves = changes.is_some() && map.is_some();
        let state = FileState::Stretches {
            parts: (0..count).map(|_| None).collect(),
            missing: count,
            parent,
            former: former.as_ref().map(|former| former.map.clone()),
            proof: map.clone().zip(changes).map(|(map, changes)| Expected { map, changes }),
        };
        self.assembly.push(file.clone(), state);
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
                former: former.clone(),
                proves,
            };
            self.send(Work::Stretch { number, job }, work)?;
        }
        Ok(())
    }

    /// What changed in a file since the parent; `None`: it is not known, or nothing is there to compare with.
    fn changes(&self, file: &ScannedFile, parent: &FileEntry) -> Option<KnownFile> {
        let ScannedKind::Relation(relation) = &file.kind else { return None };
        let EntryKind::File { size, crc32c, content } = parent.kind else { return None };
        let known = self.known.filter(|known| !known.distrusted.contains(&file.path))?;
        let changes = known.since.changes_of(relation)?;
        Some(KnownFile { parent_size: size, parent_crc32c: crc32c, content, changes })
    }

    /// Takes from the parent what did not change. The file comes back if it has to be read whole.
    fn hand_out_changes(
        &mut self,
        number: u64,
        file: ScannedFile,
        known: KnownFile,
        work: &SyncSender<Work>,
    ) -> Result<Option<ScannedFile>, CopyError> {
        let is_untouched = known.parent_size == file.size && known.changes.is_untouched(file.size);
        let content = match known.content {
            Content::Empty if is_untouched => Some(PlacedContent::Empty),
            Content::Zero if is_untouched => Some(PlacedContent::Zero),
            Content::Chunk(place) if is_untouched => self.session.adopt(&place).map(PlacedContent::Chunk),
            Content::Map(place) => return self.hand_out_pages(number, file, (place, known), work),
            _ => None,
        };
        let Some(content) = content else { return Ok(Some(file)) };
        self.progress.spare(file.size);
        let kind = PlacedKind::File { size: file.size, crc32c: known.parent_crc32c, content };
        self.assembly.push(file, FileState::Known(kind));
        Ok(None)
    }

    fn hand_out_pages(
        &mut self,
        number: u64,
        file: ScannedFile,
        (place, known): (ChunkPlace, KnownFile),
        work: &SyncSender<Work>,
    ) -> Result<Option<ScannedFile>, CopyError> {
        let Some(parent) = self.parent_map(&file, &place) else { return Ok(Some(file)) };
        let plan = ReadPlan::new(&parent, file.size, &known.changes, |chunk| self.session.adopt(chunk).is_some());
        if plan.bytes(SLOT_BYTES) >= file.size / 2 {
            return Ok(Some(file));
        }
        if plan.is_empty() && known.parent_size == file.size {
            self.progress.spare(file.size);
            let crc32c = known.parent_crc32c;
            let content = compose(self.session, (&parent, place), &plan, file.size, PagesResult::default())?;
            let kind = self.assembly.of_parent(file.size, crc32c, content);
            self.assembly.push(file, FileState::Known(kind));
            return Ok(None);
        }
        let Some(open) = self.open(&file)? else {
            self.assembly.push(file, FileState::Vanished);
            return Ok(None);
        };
        self.progress.spare(file.size.saturating_sub(plan.bytes(SLOT_BYTES)));
        let job = Arc::new(PagesJob {
            file: open,
            path: file.absolute.clone(),
            kind: file.kind,
            size: file.size,
            parent: Arc::new(parent),
            plan,
        });
        self.assembly.push(file, FileState::Pages { job: job.clone(), map: place, result: None });
        self.send(Work::Pages { number, job }, work)?;
        Ok(None)
    }

    /// `None` if it is gone: dropped while the backup runs, as WAL replay drops it, too.
    fn open(&self, file: &ScannedFile) -> Result<Option<Arc<File>>, StretchError> {
        match File::open(&file.absolute) {
            Ok(open) => Ok(Some(Arc::new(open))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StretchError::Open { path: file.absolute.clone(), source }),
        }
    }

    /// The parent's map of a file. Without it, or with another slot size, nothing is compared and everything is stored.
    fn parent_map(&self, file: &ScannedFile, place: &ChunkPlace) -> Option<FileMap> {
        let map = self.runtime.block_on(self.parent.as_ref()?.file_map(place));
        let readable = map.map_err(|error| {
            tracing::warn!(path = %file.absolute.display(), "the parent's map of this file does not read: {error}");
        });
        readable.ok().filter(|map| map.slot_bytes == SLOT_BYTES)
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
        self.assembly.pass_on_complete()
    }

    fn take_in(&mut self, done: Done) -> Result<(), CopyError> {
        match done {
            Done::Stretch { number, result } | Done::File { number, result } => {
                self.assembly.take_in(number, Some(result))
            }
            Done::Vanished { number } => self.assembly.take_in(number, None),
            Done::Pages { number, result } => self.assembly.take_in_pages(number, result),
            Done::Ended => {
                self.threads_left -= 1;
                Ok(())
            }
            Done::Failed(error) => {
                self.threads_left -= 1;
                self.failure.get_or_insert(error);
                Err(CopyError::ThreadLost)
            }
        }
    }

    /// Tells the first few; a folder full of links is one mistake.
    fn note_omitted(&mut self, omitted: &Omitted) {
        self.assembly.report.omitted += 1;
        if self.assembly.report.omitted > OMITTED_TOLD {
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    Yes,
    No,
}
