//! What of a relation's file need not be read, since the parent backup has it and no WAL has changed it since. Pure.
//!
//! Only what is proven is spared. Free space maps and visibility maps are not fully logged, and a folder that was copied
//! as a whole is not logged by page: they are read.

use std::collections::BTreeSet;
use std::sync::Arc;

use roaring::RoaringBitmap;
use walfleet_repository::format::changed_blocks::{ChangedBlocks, ForkName};
use walfleet_repository::format::file_map::{ChunkPlace, FileMap, Slot};
use walfleet_repository::format::overlay::{Overlay, OverlayPage, PAGE_BYTES};

use crate::backup::scan::RelationSegment;
use crate::postgres::page::first_block_of_segment;

/// A slot of which more than three pages in four would be laid over is stored whole again: a base chunk is never quite
/// dead, and a restore reads less than twice what the cluster has. Measured over a
/// fortnight of 3 % random changes a day, this and the large gathered chunks ([`pages`](super::pages)) store a tenth less
/// than a limit of one in two and chunks of a slot's size.
const MOST_OVERLAID: (u32, u32) = (3, 4);

/// Whether a slot stays with so many of its pages laid over.
pub(super) fn may_be_laid_over(pages: u32, pages_per_slot: u32) -> bool {
    pages * MOST_OVERLAID.1 <= pages_per_slot * MOST_OVERLAID.0
}

/// Everything that changed between the parent's start and this backup's.
#[derive(Clone, Debug)]
pub struct Since {
    pub changed: Arc<ChangedBlocks>,
    pub block_bytes: u32,
    /// RELSEG_SIZE.
    pub blocks_per_segment: u32,
}

/// What a backup may take from its parent, and what it reads all the same.
#[derive(Clone, Debug)]
pub struct Known {
    pub since: Since,
    /// Files in which the parent found damage: a page may be in order now, and no WAL would tell.
    pub distrusted: BTreeSet<Vec<u8>>,
    pub proof: Proof,
}

/// Which files are read whole for proof that nothing changes past the WAL: each once in a period, at a moment of its own,
/// so that no backup has many to read and nothing has to be remembered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Proof {
    /// When the parent began and when this backup did, microseconds since the Unix epoch.
    pub since_us: i64,
    pub until_us: i64,
    /// Whether content can be held against the parent's. Hint bits are set past the WAL without page checksums, and with
    /// them on one server and not on its standby: only a server with checksums can be compared, with itself.
    pub compares: bool,
}

/// What may have changed in one file.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct FileChanges {
    /// Everything from this byte on: the file was that short at some moment.
    pub cut_to: Option<u64>,
    /// Pages of 8 KiB, from the file's beginning.
    pub pages: RoaringBitmap,
}

/// What of a file is read, beside what its parent has.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReadPlan {
    /// Slots that are read and stored whole, ascending.
    pub slots: Vec<u32>,
    /// Pages that are read and laid over the parent's slots, ascending.
    pub pages: Vec<u32>,
}

impl Proof {
    const PERIOD_US: i64 = 30 * 86_400 * 1_000_000;

    pub fn is_due(&self, path: &[u8]) -> bool {
        let hash = u64::from_le_bytes(blake3::hash(path).as_bytes()[..8].try_into().unwrap_or_default());
        let phase = (hash % Self::PERIOD_US.unsigned_abs()).cast_signed();
        let round = |at_us: i64| at_us.saturating_sub(phase).div_euclid(Self::PERIOD_US);
        round(self.until_us) > round(self.since_us)
    }
}

impl Since {
    /// `None` if the file has to be read whole.
    pub fn changes_of(&self, relation: &RelationSegment) -> Option<FileChanges> {
        let RelationSegment { tablespace, database, file } = *relation;
        if !file.fork.is_logged() || self.changed.is_database_changed(tablespace, database) {
            return None;
        }
        let name = ForkName { tablespace, database, relation: file.number, fork: file.fork.number() };
        let Some(changes) = self.changed.fork(&name) else { return Some(FileChanges::default()) };
        let first = first_block_of_segment(file.segment, self.blocks_per_segment);
        let block_bytes = u64::from(self.block_bytes);
        let cut_to = changes.cut_to.map(|cut| u64::from(cut.saturating_sub(first)) * block_bytes);
        let cut_to = cut_to.filter(|cut| *cut < u64::from(self.blocks_per_segment) * block_bytes);
        let mut pages = RoaringBitmap::new();
        for block in changes.blocks.range(first..first.saturating_add(self.blocks_per_segment)) {
            let from = u64::from(block - first) * block_bytes;
            let to = (from + block_bytes).div_ceil(u64::from(PAGE_BYTES));
            pages.insert_range((from / u64::from(PAGE_BYTES)) as u32..to as u32);
        }
        Some(FileChanges { cut_to, pages })
    }
}

impl FileChanges {
    /// Whether no byte of `from..to` changed.
    pub fn spares(&self, from: u64, to: u64) -> bool {
        let page = |at: u64| (at / u64::from(PAGE_BYTES)) as u32;
        self.cut_to.is_none_or(|cut| cut >= to)
            && self.pages.range_cardinality(page(from)..page(to.next_multiple_of(u64::from(PAGE_BYTES)))) == 0
    }

    /// Whether a file of `size` bytes is as it was.
    pub fn is_untouched(&self, size: u64) -> bool {
        self.cut_to.is_none_or(|cut| cut >= size)
            && self.pages.min().is_none_or(|page| u64::from(page) * u64::from(PAGE_BYTES) >= size)
    }
}

impl ReadPlan {
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.pages.is_empty()
    }

    /// What to read of a file that now has `size` bytes. `is_at_hand` says whether a chunk of the parent may be referred
    /// to.
    pub fn new(
        parent: &FileMap,
        size: u64,
        changes: &FileChanges,
        is_at_hand: impl Fn(&ChunkPlace) -> bool,
    ) -> ReadPlan {
        let pages_per_slot = parent.slot_bytes / PAGE_BYTES;
        let mut overlaid = RoaringBitmap::new();
        let mut lost = RoaringBitmap::new();
        for overlay in &parent.overlays {
            let pages = if is_at_hand(&overlay.chunk) { &mut overlaid } else { &mut lost };
            pages.extend(overlay.pages.iter().map(|page| page.page));
        }
        let mut plan = ReadPlan::default();
        let count = size.div_ceil(u64::from(parent.slot_bytes)) as u32;
        let now = FileMap { slot_bytes: parent.slot_bytes, size, slots: Vec::new(), overlays: Vec::new(), base: None };
        for slot in 0..count {
            let first = slot * pages_per_slot;
            let range = first..first + pages_per_slot;
            let len = now.slot_len(slot as usize);
            let end = u64::from(slot) * u64::from(parent.slot_bytes) + u64::from(len);
            let has = match parent.slots.get(slot as usize) {
                Some(Slot::Chunk(place)) => is_at_hand(place),
                Some(Slot::Zero) => true,
                None => false,
            };
            let is_cut = changes.cut_to.is_some_and(|cut| cut < end);
            if !has || is_cut || parent.slot_len(slot as usize) != len || lost.range_cardinality(range.clone()) > 0 {
                plan.slots.push(slot);
                continue;
            }
            let changed = changes.pages.range_cardinality(range.clone()) as u32;
            if changed == 0 {
                continue;
            }
            let kept = overlaid.range(range.clone()).filter(|page| !changes.pages.contains(*page)).count() as u32;
            // A page that the file's end cuts cannot be laid over.
            let ends_within =
                changes.pages.range(range.clone()).any(|page| end < u64::from(page + 1) * u64::from(PAGE_BYTES));
            if ends_within || !may_be_laid_over(changed + kept, pages_per_slot) {
                plan.slots.push(slot);
            } else {
                plan.pages.extend(changes.pages.range(range));
            }
        }
        plan
    }

    /// Bytes that are read.
    pub fn bytes(&self, slot_bytes: u32) -> u64 {
        self.slots.len() as u64 * u64::from(slot_bytes) + self.pages.len() as u64 * u64::from(PAGE_BYTES)
    }

    /// What stays of the parent's overlays: not what is laid over anew, nor what lies on slots stored whole, nor what
    /// is behind the end.
    pub fn kept_overlays(&self, parent: &FileMap, size: u64) -> Vec<Overlay> {
        let pages_per_slot = parent.slot_bytes / PAGE_BYTES;
        let mut replaced: RoaringBitmap = self.pages.iter().copied().collect();
        for slot in &self.slots {
            replaced.insert_range(slot * pages_per_slot..(slot + 1) * pages_per_slot);
        }
        let whole_pages = (size / u64::from(PAGE_BYTES)) as u32;
        let stays = |page: &&OverlayPage| page.page < whole_pages && !replaced.contains(page.page);
        let kept = parent.overlays.iter().map(|overlay| Overlay {
            chunk: overlay.chunk,
            pages: overlay.pages.iter().filter(stays).copied().collect(),
        });
        kept.filter(|overlay| !overlay.pages.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests;
