//! Puts together what threads have made of files: stretches back into files, and files into list order.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use roaring::RoaringBitmap;
use walfleet_repository::backup::file_list::{FileListWriter, ParentMap, PlacedContent, PlacedFile, PlacedKind};
use walfleet_repository::backup::write::{PackSession, PlacedSlot};
use walfleet_repository::checksum;
use walfleet_repository::format::file_map::{ChunkPlace, FileMap, SLOT_BYTES};

use super::compose::compose;
use super::proof::{Expected, SPGIST_HINTS, has_strayed};
use super::{CopyError, CopyReport};
use crate::backup::compare::Compared;
use crate::backup::pages::{PagesJob, PagesResult};
use crate::backup::scan::ScannedFile;
use crate::backup::stretch::StretchResult;

/// Files that may be under way: what the assembler has to hold back while a large file is being read.
const FILES_UNDER_WAY: usize = 16_384;

/// A file under way, in list order.
struct UnderWay {
    file: ScannedFile,
    state: FileState,
}

pub(super) enum FileState {
    Directory,
    /// A file of at most one slot.
    Small {
        /// What it was, if it is read for proof and no WAL says that it changed.
        untouched: Option<ChunkPlace>,
        result: Option<StretchResult>,
    },
    Stretches {
        parts: Vec<Option<StretchResult>>,
        missing: usize,
        parent: Option<ChunkPlace>,
        /// Set if it is compared with its parent by page.
        former: Option<Arc<FileMap>>,
        proof: Option<Expected>,
    },
    /// The parent has most of it, in the map that lies at this place.
    Pages {
        job: Arc<PagesJob>,
        map: ChunkPlace,
        result: Option<PagesResult>,
    },
    /// The parent has all of it.
    Known(PlacedKind),
    Vanished,
}

impl UnderWay {
    fn is_done(&self) -> bool {
        match &self.state {
            FileState::Directory | FileState::Known(_) | FileState::Vanished => true,
            FileState::Small { result, .. } => result.is_some(),
            FileState::Stretches { missing, .. } => *missing == 0,
            FileState::Pages { result, .. } => result.is_some(),
        }
    }
}

/// The files under way, and the list that they end in.
pub(super) struct Assembly<'a> {
    session: &'a Arc<PackSession>,
    list: FileListWriter,
    under_way: VecDeque<UnderWay>,
    /// The number of the first file under way.
    first: u64,
    pub report: CopyReport,
}

impl<'a> Assembly<'a> {
    /// `parent_parts`: the parts of the parent's list.
    pub(super) fn new(session: &'a Arc<PackSession>, parent_parts: &[ChunkPlace]) -> Assembly<'a> {
        Assembly {
            session,
            list: FileListWriter::new(session.clone(), parent_parts),
            under_way: VecDeque::new(),
            first: 0,
            report: CopyReport::default(),
        }
    }

    /// The number that the next file gets.
    pub(super) fn next_number(&self) -> u64 {
        self.first + self.under_way.len() as u64
    }

    pub(super) fn is_full(&self) -> bool {
        self.under_way.len() >= FILES_UNDER_WAY
    }

    pub(super) fn push(&mut self, file: ScannedFile, state: FileState) {
        self.under_way.push_back(UnderWay { file, state });
    }

    pub(super) fn finish(self, read_bytes: u64) -> Result<CopyReport, CopyError> {
        if !self.under_way.is_empty() {
            return Err(CopyError::ThreadLost);
        }
        let (file_list, file_count) = self.list.finish()?;
        Ok(CopyReport { file_list, file_count, read_bytes, ..self.report })
    }

    /// A file whose content was composed of what its parent has.
    pub(super) fn of_parent(&mut self, size: u64, crc32c: Option<u32>, content: PlacedContent) -> PlacedKind {
        self.report.has_overlays |= matches!(&content, PlacedContent::Slots { overlays, .. } if !overlays.is_empty());
        PlacedKind::File { size, crc32c, content }
    }

    /// What a thread made of a file or a part of it; nothing: the file is gone.
    pub(super) fn take_in(&mut self, number: u64, result: Option<StretchResult>) -> Result<(), CopyError> {
        let Some(state) = self.under_way_at(number) else { return Err(CopyError::ThreadLost) };
        match (state, result) {
            (state @ FileState::Small { .. }, None) => *state = FileState::Vanished,
            (FileState::Small { result: slot, .. }, Some(result)) => *slot = Some(result),
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

    pub(super) fn take_in_pages(&mut self, number: u64, read: PagesResult) -> Result<(), CopyError> {
        match self.under_way_at(number) {
            Some(FileState::Pages { result, .. }) => *result = Some(read),
            _ => return Err(CopyError::ThreadLost),
        }
        Ok(())
    }

    /// Passes on files that are complete, in order.
    pub(super) fn pass_on_complete(&mut self) -> Result<(), CopyError> {
        while self.under_way.front().is_some_and(UnderWay::is_done) {
            if let Some(file) = self.under_way.pop_front() {
                self.first += 1;
                self.pass_on(file)?;
            }
        }
        Ok(())
    }

    fn under_way_at(&mut self, number: u64) -> Option<&mut FileState> {
        let index = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.under_way.get_mut(index).map(|file| &mut file.state)
    }

    fn pass_on(&mut self, done: UnderWay) -> Result<(), CopyError> {
        let UnderWay { file, state } = done;
        let kind = match state {
            FileState::Vanished => return Ok(()),
            FileState::Directory => PlacedKind::Directory,
            FileState::Known(kind) => kind,
            FileState::Pages { job, map, result } => {
                let result = result.ok_or(CopyError::ThreadLost)?;
                self.report.damage.add(&file.path, &result.bad_pages);
                let content = compose(self.session, (&job.parent, map), &job.plan, job.size, result)?;
                self.of_parent(job.size, None, content)
            }
            FileState::Small { untouched, result } => {
                let result = result.ok_or(CopyError::ThreadLost)?;
                self.report.damage.add(&file.path, &result.bad_pages);
                if untouched.is_some_and(|former| has_strayed(&former, &result)) {
                    self.note_strayed(&file, &[0]);
                }
                small_content(&file, &result)
            }
            FileState::Stretches { parts, parent, former, proof, .. } => {
                let (mut slots, mut crc32c, mut compared) = (Vec::new(), 0, Compared::default());
                let (mut is_spgist, mut replayed) = (false, RoaringBitmap::new());
                for result in parts {
                    let result = result.ok_or(CopyError::ThreadLost)?;
                    self.report.damage.add(&file.path, &result.bad_pages);
                    crc32c = checksum::crc32c_combine(crc32c, result.crc32c, result.bytes);
                    slots.extend(result.slots);
                    is_spgist |= result.is_spgist;
                    replayed |= result.replayed;
                    compared.absorb(result.compared);
                }
                if let Some(expected) = proof {
                    if is_spgist {
                        replayed.insert(SPGIST_HINTS);
                    }
                    let strayed = expected.strayed(file.size, (&slots, &compared), &replayed, self.session);
                    self.note_strayed(&file, &strayed);
                }
                let parent =
                    parent.map(|place| ParentMap { place, base: former.as_ref().map(|map| map.to_base(place)) });
                let overlays = match former {
                    Some(map) => compared.into_overlays(self.session, &map, file.size)?,
                    None => Vec::new(),
                };
                let content = PlacedContent::Slots { slot_bytes: SLOT_BYTES, slots, overlays, parent };
                self.of_parent(file.size, Some(crc32c), content)
            }
        };
        if let PlacedKind::File { size, .. } = kind {
            self.report.cluster_bytes += size;
        }
        let placed = PlacedFile { path: Bytes::from(file.path), mode: file.mode, mtime_us: file.mtime_us, kind };
        Ok(self.list.push(placed)?)
    }

    fn note_strayed(&mut self, file: &ScannedFile, slots: &[usize]) {
        let Some(first) = slots.first() else { return };
        self.report.unexplained_slots += slots.len() as u64;
        tracing::error!(path = %file.absolute.display(), slots = slots.len(), at = *first as u64 * u64::from(SLOT_BYTES),
            "content changed since the parent backup though no WAL says so; it is stored as it is now");
    }
}

/// A file of at most one slot.
fn small_content(file: &ScannedFile, result: &StretchResult) -> PlacedKind {
    let content = match result.slots.first() {
        None => PlacedContent::Empty,
        Some(PlacedSlot::Zero) => PlacedContent::Zero,
        Some(PlacedSlot::Chunk(placed)) => PlacedContent::Chunk(*placed),
    };
    PlacedKind::File { size: file.size, crc32c: Some(result.crc32c), content }
}
