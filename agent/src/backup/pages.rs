//! Reading only what changed of one file: some slots whole, and single pages, gathered densely into chunks of their own.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use walfleet_repository::backup::file_list::PlacedOverlay;
use walfleet_repository::backup::write::PlacedSlot;
use walfleet_repository::format::file_map::{FileMap, SLOT_BYTES, Slot};
use walfleet_repository::format::overlay::{OverlayPage, PAGE_BYTES};

use crate::backup::damage::BadPages;
use crate::backup::scan::ScannedKind;
use crate::backup::spare::ReadPlan;
use crate::backup::stretch::{Reader, StretchError};

/// Pages of one gathered chunk, half a megabyte: measured, a twentieth smaller than chunks of a slot's size, and four times
/// as much gives no more than that again.
pub(super) const GATHERED: usize = 64;

/// How many bytes of what is read next the kernel is told of: scattered pages come from a disk many at a time then.
const AHEAD_BYTES: u64 = 4 << 20;

/// One file of which the parent has most.
pub struct PagesJob {
    pub file: Arc<File>,
    pub path: PathBuf,
    pub kind: ScannedKind,
    /// When it was listed.
    pub size: u64,
    pub parent: Arc<FileMap>,
    pub plan: ReadPlan,
}

/// What was read of it.
#[derive(Debug, Default)]
pub struct PagesResult {
    /// By number, as planned.
    pub slots: Vec<(u32, PlacedSlot)>,
    pub overlays: Vec<PlacedOverlay>,
    pub bad_pages: BadPages,
}

impl Reader<'_> {
    pub fn pages(&mut self, job: &PagesJob) -> Result<PagesResult, StretchError> {
        let mut result = PagesResult::default();
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut ahead = Ahead::default();
        let slot_bytes = u64::from(job.parent.slot_bytes);
        let slots = job.plan.slots.iter().map(|slot| (u64::from(*slot) * slot_bytes, slot_bytes));
        let slots: Vec<_> = slots.collect();
        for (index, slot) in job.plan.slots.iter().enumerate() {
            self.stop_if_cancelled()?;
            ahead.tell(&job.file, index, &slots);
            let offset = u64::from(*slot) * slot_bytes;
            let len = slot_bytes.min(job.size.saturating_sub(offset)) as usize;
            let Some(content) = buffer.get_mut(..len) else { break };
            self.read(&job.file, &job.path, job.kind, offset, content, &mut result.bad_pages)?;
            let parent = match job.parent.slots.get(*slot as usize) {
                Some(Slot::Chunk(place)) => Some(place),
                _ => None,
            };
            result.slots.push((*slot, self.writer.store_slot(content, parent)?));
        }
        let runs = runs(&job.plan.pages);
        let mut ahead = Ahead::default();
        let mut gathered: Vec<OverlayPage> = Vec::with_capacity(GATHERED);
        for (index, (offset, len)) in runs.iter().enumerate() {
            self.stop_if_cancelled()?;
            ahead.tell(&job.file, index, &runs);
            let pages = (*len / u64::from(PAGE_BYTES)) as usize;
            if gathered.len() + pages > GATHERED {
                self.lay(&buffer, &mut gathered, &mut result)?;
            }
            let from = gathered.len() * PAGE_BYTES as usize;
            let Some(content) = buffer.get_mut(from..from + *len as usize) else { break };
            self.read(&job.file, &job.path, job.kind, *offset, content, &mut result.bad_pages)?;
            let first = (*offset / u64::from(PAGE_BYTES)) as u32;
            let places = (first..first + pages as u32).zip(gathered.len() as u32..);
            gathered.extend(places.map(|(page, position)| OverlayPage { page, position }));
        }
        self.lay(&buffer, &mut gathered, &mut result)?;
        self.buffer = buffer;
        Ok(result)
    }

    /// Stores what was gathered as one chunk.
    fn lay(
        &mut self,
        buffer: &[u8],
        gathered: &mut Vec<OverlayPage>,
        result: &mut PagesResult,
    ) -> Result<(), StretchError> {
        let content = buffer.get(..gathered.len() * PAGE_BYTES as usize).unwrap_or_default();
        if !content.is_empty() {
            let chunk = self.writer.store(content, None)?;
            result.overlays.push(PlacedOverlay { chunk, pages: std::mem::take(gathered) });
        }
        Ok(())
    }
}

/// Neighbouring pages are read at once: offsets and lengths in bytes.
fn runs(pages: &[u32]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        let offset = u64::from(*page) * u64::from(PAGE_BYTES);
        match runs.last_mut() {
            Some((start, len)) if *start + *len == offset && *len < u64::from(SLOT_BYTES) => {
                *len += u64::from(PAGE_BYTES);
            }
            _ => runs.push((offset, u64::from(PAGE_BYTES))),
        }
    }
    runs
}

/// Tells the kernel what will be read next.
#[derive(Default)]
struct Ahead {
    /// Ranges it was told of.
    told: usize,
    /// Bytes of those that have not been read.
    bytes: u64,
}

impl Ahead {
    fn tell(&mut self, file: &File, reading: usize, ranges: &[(u64, u64)]) {
        if let Some((_, len)) = ranges.get(reading) {
            self.bytes = self.bytes.saturating_sub(*len);
        }
        self.told = self.told.max(reading + 1);
        while let Some((offset, len)) = ranges.get(self.told).filter(|_| self.bytes < AHEAD_BYTES) {
            // Only advice: where it is not taken, the read waits longer.
            let len = std::num::NonZeroU64::new(*len);
            let _ = rustix::fs::fadvise(file, *offset, len, rustix::fs::Advice::WillNeed);
            self.bytes += len.map_or(0, std::num::NonZeroU64::get);
            self.told += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_read_at_once_up_to_a_slot() {
        let page = u64::from(PAGE_BYTES);
        assert_eq!(runs(&[3, 4, 7]), [(3 * page, 2 * page), (7 * page, page)]);
        let many: Vec<u32> = (0..40).collect();
        let lengths: Vec<u64> = runs(&many).iter().map(|(_, len)| len / page).collect();
        assert_eq!(lengths, [16, 16, 8]);
        assert_eq!(runs(&[]), []);
    }
}
