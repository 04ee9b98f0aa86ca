//! Holds a file that was read for proof against what its parent has: nothing may have changed past the WAL.

use std::collections::BTreeSet;
use std::sync::Arc;

use roaring::RoaringBitmap;
use walfleet_repository::backup::write::{PackSession, PlacedSlot};
use walfleet_repository::format::file_map::{ChunkPlace, FileMap, Slot};
use walfleet_repository::format::overlay::PAGE_BYTES;

use crate::backup::compare::Compared;
use crate::backup::spare::FileChanges;
use crate::backup::stretch::StretchResult;

/// What the file was, and what changed since.
pub(super) struct Expected {
    pub map: Arc<FileMap>,
    pub changes: FileChanges,
}

/// The page of an SP-GiST index on which a vacuum that finds nothing leaves a hint past the WAL (SpGistUpdateMetaPage,
/// src/backend/access/spgist/spgutils.c).
pub(super) const SPGIST_HINTS: u32 = 0;

impl Expected {
    /// The slots that are other than the parent's though neither WAL before the backup nor WAL since its start (`explained`)
    /// says so: by page where it is known which pages differ, otherwise if none of the slot's is explained.
    pub fn strayed(
        &self,
        size: u64,
        (slots, compared): (&[PlacedSlot], &Compared),
        explained: &RoaringBitmap,
        session: &PackSession,
    ) -> Vec<usize> {
        let is_parents = |slot: &PlacedSlot, former: &Slot| match (slot, former) {
            (PlacedSlot::Zero, Slot::Zero) => true,
            (PlacedSlot::Chunk(placed), Slot::Chunk(place)) => session.adopt(place).as_ref() == Some(placed),
            _ => false,
        };
        let differs = |(slot, former)| !is_parents(slot, former);
        let differing: Vec<bool> = slots.iter().zip(&self.map.slots).map(differs).collect();
        self.unexplained(size, &differing, compared, explained)
    }

    /// `differing`: by slot, whether another chunk than the parent's is there.
    fn unexplained(&self, size: u64, differing: &[bool], compared: &Compared, explained: &RoaringBitmap) -> Vec<usize> {
        let overlaid = self.map.overlaid().unwrap_or_default();
        let whole: BTreeSet<u32> = compared.whole.iter().copied().collect();
        let slot_bytes = u64::from(self.map.slot_bytes);
        let pages_per_slot = self.map.slot_bytes / PAGE_BYTES;
        let mut strayed = Vec::new();
        for (number, differs) in differing.iter().enumerate() {
            let (from, first) = (number as u64 * slot_bytes, number as u32 * pages_per_slot);
            let (to, pages) = (from + slot_bytes, first..first + pages_per_slot);
            if to > self.map.size.min(size) || self.changes.cut_to.is_some_and(|cut| cut < to) {
                continue;
            }
            let known: Vec<u32> = compared.differing.range(pages.clone()).collect();
            let is_explained = |page: &u32| self.changes.pages.contains(*page) || explained.contains(*page);
            let has_strayed = match known.is_empty() {
                false => !known.iter().all(is_explained),
                // Pages were laid over it, and now it is stored whole: there is no id of what it was.
                true if whole.contains(&(number as u32)) && overlaid.range_cardinality(pages.clone()) > 0 => false,
                true => *differs && !pages.into_iter().any(|page| is_explained(&page)),
            };
            if has_strayed {
                strayed.push(number);
            }
        }
        strayed
    }
}

/// Whether a file of one slot, of which no WAL before the backup says that it changed, is another and no WAL since says so.
pub(super) fn has_strayed(former: &ChunkPlace, now: &StretchResult) -> bool {
    let is_same = matches!(now.slots.first(), Some(PlacedSlot::Chunk(placed)) if placed.id == former.id);
    !is_same && now.replayed.is_empty() && !now.is_spgist
}

#[cfg(test)]
mod tests {
    use walfleet_repository::format::file_map::SLOT_BYTES;

    use super::*;

    const PAGES_PER_SLOT: u32 = SLOT_BYTES / PAGE_BYTES;

    /// Of a file of four slots of zeros: the slots that strayed where these differ, of which pages that are known to differ.
    fn strayed(slots: &[usize], differing: &[u32], named: &[u32], since: &[u32], cut_to: Option<u64>) -> Vec<usize> {
        let size = 4 * u64::from(SLOT_BYTES);
        let map =
            FileMap { slot_bytes: SLOT_BYTES, size, slots: vec![Slot::Zero; 4], overlays: Vec::new(), base: None };
        let changes = FileChanges { cut_to, pages: named.iter().collect() };
        let expected = Expected { map: Arc::new(map), changes };
        let compared = Compared { differing: differing.iter().collect(), ..Compared::default() };
        let differs: Vec<bool> = (0..4).map(|slot| slots.contains(&slot)).collect();
        expected.unexplained(size, &differs, &compared, &since.iter().collect())
    }

    #[test]
    fn a_page_that_differs_is_explained_by_wal_before_or_since_and_by_that_of_no_other_page() {
        let page = 2 * PAGES_PER_SLOT + 3;
        assert_eq!(strayed(&[2], &[page], &[], &[], None), [2]);
        assert_eq!(strayed(&[2], &[page], &[page + 1], &[page + 2], None), [2], "its neighbours' WAL");
        assert_eq!(strayed(&[2], &[page, page + 1], &[page], &[page + 1], None), [0; 0]);
        assert_eq!(strayed(&[2, 3], &[page, 3 * PAGES_PER_SLOT], &[page], &[], None), [3]);
        assert_eq!(
            strayed(&[2], &[page], &[], &[], Some(u64::from(page * PAGE_BYTES))),
            [0; 0],
            "it was cut off meanwhile"
        );
        assert_eq!(strayed(&[], &[], &[], &[], None), [0; 0]);
    }

    #[test]
    fn a_slot_of_which_nobody_knows_the_pages_is_explained_by_any_of_them() {
        assert_eq!(strayed(&[1, 2], &[], &[], &[], None), [1, 2]);
        assert_eq!(strayed(&[1, 2], &[], &[PAGES_PER_SLOT + 7], &[3 * PAGES_PER_SLOT - 1], None), [0; 0]);
    }
}
