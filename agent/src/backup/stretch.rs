//! Reading a stretch of one file: large reads, page checksums, then slot by slot into packs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use roaring::RoaringBitmap;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use walfleet_repository::backup::write::{ChunkWriter, PackSession, PlacedSlot, WriteError};
use walfleet_repository::checksum;
use walfleet_repository::format::file_map::{ChunkPlace, SLOT_BYTES, Slot};
use walfleet_repository::format::overlay::PAGE_BYTES;

use crate::backup::compare::{self, Compared, Former, Worth};
use crate::backup::copy::CopySpec;
use crate::backup::damage::BadPages;
use crate::backup::scan::{ScannedFile, ScannedKind};
use crate::limits::Allowance;
use crate::postgres::page::{Damage, PageRules, SuspiciousPage, first_block_of_segment, is_spgist_metapage};
use crate::progress::Progress;

/// Bytes asked of the kernel at once: eight slots.
const READ_BYTES: usize = 8 * SLOT_BYTES as usize;

/// A page that does not fit its checksum may have been caught half written: it is read again, this often, with a pause
/// that lets the server's write end.
const REREADS: u32 = 3;
const REREAD_PAUSE: Duration = Duration::from_millis(10);

/// Reads that may end with damage after all that patience, in one backup: three seconds of pauses. Where so much is
/// damaged, the rest is read once more and at once, as PostgreSQL does (sendFile, src/backend/backup/basebackup.c).
pub const PATIENT_READS: u32 = 100;

#[derive(Debug, thiserror::Error)]
pub enum StretchError {
    #[error("open {path}: {source}")]
    Open { path: PathBuf, source: std::io::Error },
    #[error("read {path} at {offset}: {source}")]
    Read { path: PathBuf, offset: u64, source: std::io::Error },
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("cancelled")]
    Cancelled,
}

/// How pages are judged.
#[derive(Clone, Copy, Debug)]
pub struct PageCheck {
    pub rules: PageRules,
    /// Blocks of a full relation segment (RELSEG_SIZE, from pg_control).
    pub blocks_per_segment: u32,
}

/// Part of a file of several slots.
pub struct StretchJob {
    pub file: Arc<File>,
    pub path: PathBuf,
    pub kind: ScannedKind,
    /// Of the whole file, when it was listed: what was added since is left out, what was cut since reads as zero.
    pub size: u64,
    pub part: usize,
    pub first_slot: usize,
    pub slots: usize,
    /// The parent's slots at the same places, as far as it has them.
    pub parent: Vec<Slot>,
    /// Set: what differs from the parent's slots is compared with them by page.
    pub former: Option<Former>,
    /// Whether it is noted what WAL replay will bring about.
    pub proves: bool,
}

/// What a stretch became.
#[derive(Debug, Default)]
pub struct StretchResult {
    pub part: usize,
    pub slots: Vec<PlacedSlot>,
    /// Begins with the first page of an SP-GiST index.
    pub is_spgist: bool,
    /// Pages of 8 KiB, from the file's beginning, that WAL from the backup's start on changed or cut off; only if asked for.
    pub replayed: RoaringBitmap,
    /// Of a stretch that was compared.
    pub compared: Compared,
    pub bytes: u64,
    /// Of the stretch alone.
    pub crc32c: u32,
    pub bad_pages: BadPages,
}

/// One thread's reader.
pub struct Reader<'a> {
    pub(super) session: &'a Arc<PackSession>,
    pub(super) writer: ChunkWriter,
    pages: &'a PageCheck,
    allowance: &'a Allowance,
    progress: &'a Progress,
    pub(super) counters: &'a ReadCounters,
    pub(super) cancel: &'a CancellationToken,
    pub(super) buffer: Vec<u8>,
}

/// What all readers of a backup share.
pub struct ReadCounters {
    pub read_bytes: AtomicU64,
    /// Of [`PATIENT_READS`], those that are left.
    patience: AtomicU32,
    /// Bytes that a thread compares at once.
    batch_bytes: usize,
    /// Slots of the parent that all threads may have in memory.
    pub(super) parents: Semaphore,
}

impl ReadCounters {
    pub fn new(threads: usize) -> ReadCounters {
        let patience = AtomicU32::new(PATIENT_READS);
        let batch_bytes = compare::batch_bytes(threads);
        ReadCounters {
            read_bytes: AtomicU64::new(0),
            patience,
            batch_bytes,
            parents: Semaphore::new(compare::SLOTS_HELD),
        }
    }
}

impl<'a> Reader<'a> {
    pub fn new(
        session: &'a Arc<PackSession>,
        writer: ChunkWriter,
        spec: &'a CopySpec,
        progress: &'a Progress,
        counters: &'a ReadCounters,
        cancel: &'a CancellationToken,
    ) -> Reader<'a> {
        let (pages, allowance) = (&spec.pages, &spec.allowance);
        Reader { session, writer, pages, allowance, progress, counters, cancel, buffer: vec![0; READ_BYTES] }
    }

    pub fn stretch(&mut self, job: &StretchJob) -> Result<StretchResult, StretchError> {
        let mut result =
            StretchResult { part: job.part, slots: Vec::with_capacity(job.slots), ..StretchResult::default() };
        let start = job.first_slot as u64 * u64::from(SLOT_BYTES);
        let end = (start + job.slots as u64 * u64::from(SLOT_BYTES)).min(job.size);
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut worth = Worth::default();
        let batch = if job.former.is_some() { self.counters.batch_bytes } else { READ_BYTES };
        buffer.resize(batch.max(READ_BYTES), 0);
        let mut offset = start;
        while offset < end {
            self.stop_if_cancelled()?;
            let len = (end - offset).min(batch as u64) as usize;
            let Some(content) = buffer.get_mut(..len) else { break };
            let filled = self.read(&job.file, &job.path, job.kind, offset, content, &mut result.bad_pages)?;
            if job.proves {
                self.note_replayed(offset, content, filled, &mut result.replayed);
            }
            result.crc32c = checksum::crc32c_append(result.crc32c, content);
            result.is_spgist |= offset == 0 && self.begins_spgist(job.kind, content);
            match &job.former {
                Some(former) => {
                    let first = (job.first_slot + result.slots.len()) as u32;
                    self.compare(job, former, first, content, (&mut worth, &mut result))?;
                }
                None => self.store_slots(job, content, &mut result)?,
            }
            result.bytes += len as u64;
            offset += len as u64;
        }
        self.buffer = buffer;
        Ok(result)
    }

    fn note_replayed(&self, offset: u64, content: &[u8], filled: usize, replayed: &mut RoaringBitmap) {
        let page = |at: u64| (at / u64::from(PAGE_BYTES)) as u32;
        let rules = &self.pages.rules;
        for (at, block) in (offset..).step_by(rules.block_bytes).zip(content.chunks(rules.block_bytes)) {
            if at + block.len() as u64 > offset + filled as u64 || rules.is_replayed(block) {
                replayed.insert_range(page(at)..=page(at + block.len() as u64 - 1));
            }
        }
    }

    fn begins_spgist(&self, kind: ScannedKind, content: &[u8]) -> bool {
        let is_first = matches!(kind, ScannedKind::Relation(relation) if relation.file.segment == 0);
        is_first && content.get(..self.pages.rules.block_bytes).is_some_and(is_spgist_metapage)
    }

    fn store_slots(
        &mut self,
        job: &StretchJob,
        content: &[u8],
        result: &mut StretchResult,
    ) -> Result<(), StretchError> {
        for slot in content.chunks(SLOT_BYTES as usize) {
            let parent = match job.parent.get(result.slots.len()) {
                Some(Slot::Chunk(place)) => Some(place),
                _ => None,
            };
            result.slots.push(self.writer.store_slot(slot, parent)?);
        }
        Ok(())
    }

    /// A file of at most one slot; `None` if it is gone.
    pub fn small_file(
        &mut self,
        file: &ScannedFile,
        parent: Option<&ChunkPlace>,
        proves: bool,
    ) -> Result<Option<StretchResult>, StretchError> {
        self.stop_if_cancelled()?;
        let mut result = StretchResult { bytes: file.size, ..StretchResult::default() };
        let open = match File::open(&file.absolute) {
            Ok(open) => open,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StretchError::Open { path: file.absolute.clone(), source }),
        };
        if file.size == 0 {
            return Ok(Some(result));
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        if let Some(content) = buffer.get_mut(..file.size as usize) {
            let filled = self.read(&open, &file.absolute, file.kind, 0, content, &mut result.bad_pages)?;
            if proves {
                self.note_replayed(0, content, filled, &mut result.replayed);
                result.is_spgist = self.begins_spgist(file.kind, content);
            }
            result.crc32c = checksum::crc32c(content);
            result.slots.push(self.writer.store_slot(content, parent)?);
        }
        self.buffer = buffer;
        Ok(Some(result))
    }

    pub(super) fn stop_if_cancelled(&self) -> Result<(), StretchError> {
        if self.cancel.is_cancelled() { Err(StretchError::Cancelled) } else { Ok(()) }
    }

    pub fn flush(&mut self) -> Result<(), StretchError> {
        Ok(self.writer.flush()?)
    }

    /// Fills the buffer from the file, judges its pages, reads suspicious ones again. How much of it the file had; the rest
    /// is zero.
    pub(super) fn read(
        &self,
        file: &File,
        path: &std::path::Path,
        kind: ScannedKind,
        offset: u64,
        content: &mut [u8],
        bad: &mut BadPages,
    ) -> Result<usize, StretchError> {
        let failed = |offset| move |source| StretchError::Read { path: path.to_owned(), offset, source };
        self.allowance.read(content.len() as u64);
        let filled = read_padded(file, offset, content).map_err(failed(offset))?;
        self.count(content.len());
        let ScannedKind::Relation(relation) = kind else { return Ok(filled) };
        let rules = self.pages.rules;
        let page_bytes = rules.block_bytes;
        let first = first_block_of_segment(relation.file.segment, self.pages.blocks_per_segment)
            + (offset / page_bytes as u64) as u32;
        let mut suspects = rules.suspicious(content, first);
        let is_patient = self.counters.patience.load(Ordering::Relaxed) > 0;
        let (rereads, pause) = if is_patient { (REREADS, REREAD_PAUSE) } else { (1, Duration::ZERO) };
        for _ in 0..rereads {
            if suspects.iter().all(is_future) {
                break;
            }
            std::thread::sleep(pause);
            let mut still = Vec::new();
            for suspect in suspects {
                let at = suspect.index * page_bytes;
                let Some(page) = content.get_mut(at..at + page_bytes) else { continue };
                let position = offset + at as u64;
                read_padded(file, position, page).map_err(failed(position))?;
                let again = rules.suspicious(page, suspect.block);
                still.extend(again.first().map(|page| SuspiciousPage { index: suspect.index, ..*page }));
            }
            suspects = still;
        }
        if is_patient && !suspects.iter().all(is_future) {
            let lose = |left: u32| left.checked_sub(1);
            let _ = self.counters.patience.fetch_update(Ordering::Relaxed, Ordering::Relaxed, lose);
        }
        suspects.iter().for_each(|page| bad.push(page));
        Ok(filled)
    }

    fn count(&self, bytes: usize) {
        self.counters.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.progress.add(bytes as u64);
    }
}

/// Reading it again changes nothing: the end of the backup decides.
fn is_future(page: &SuspiciousPage) -> bool {
    matches!(page.damage, Damage::Future { .. })
}

/// Reads exactly the buffer; behind the end of the file there are zeros, as PostgreSQL's own base backup has it
/// (sendFile, src/backend/backup/basebackup.c): WAL replay cuts or fills the file. How much the file had.
fn read_padded(file: &File, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = buffer.get_mut(filled..).unwrap_or_default();
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => {
                rest.fill(0);
                return Ok(filled);
            }
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
