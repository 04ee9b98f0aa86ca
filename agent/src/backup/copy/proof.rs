//! Holds a file that was read for proof against what its parent has: nothing may have changed past the WAL.

use std::collections::BTreeSet;
use std::sync::Arc;

use walfleet_repository::backup::write::{PackSession, PlacedSlot};
use walfleet_repository::format::file_map::{FileMap, SLOT_BYTES, Slot};
use walfleet_repository::format::overlay::PAGE_BYTES;

use crate::backup::compare::Compared;
use crate::backup::spare::FileChanges;

/// What the file was, and what changed since.
pub(super) struct Expected {
    pub map: Arc<FileMap>,
    pub changes: FileChanges,
}

impl Expected {
    /// The slots that are other than the parent's though no WAL says so. One that was stored whole though the parent has
    /// pages laid over it has no id to compare.
    pub fn strayed(
        &self,
        size: u64,
        (slots, compared): (&[PlacedSlot], &Compared),
        session: &PackSession,
    ) -> Vec<usize> {
        let overlaid = self.map.overlaid().unwrap_or_default();
        let whole: BTreeSet<u32> = compared.whole.iter().copied().collect();
        let slot_bytes = u64::from(self.map.slot_bytes);
        let pages_per_slot = self.map.slot_bytes / PAGE_BYTES;
        let laid: BTreeSet<u32> = compared.pages.iter().map(|page| page / pages_per_slot).collect();
        let mut strayed = Vec::new();
        for (number, (slot, former)) in slots.iter().zip(&self.map.slots).enumerate() {
            let from = number as u64 * slot_bytes;
            let to = from + slot_bytes;
            let first = number as u32 * pages_per_slot;
            let is_overlaid = overlaid.range_cardinality(first..first + pages_per_slot) > 0;
            let is_known = to <= self.map.size.min(size)
                && self.changes.spares(from, to)
                && !(is_overlaid && whole.contains(&(number as u32)));
            let is_same = !laid.contains(&(number as u32))
                && match (slot, former) {
                    (PlacedSlot::Zero, Slot::Zero) => true,
                    (PlacedSlot::Chunk(placed), Slot::Chunk(place)) => session.adopt(place).as_ref() == Some(placed),
                    _ => false,
                };
            if is_known && !is_same {
                strayed.push(number);
            }
        }
        strayed
    }
}

/// Whether all that strayed of a slot of an SP-GiST index may be its first page, on which a vacuum that finds nothing leaves
/// a hint past the WAL (SpGistUpdateMetaPage, src/backend/access/spgist/spgutils.c). Of a slot that was stored whole nobody
/// knows which pages strayed.
pub(super) fn may_be_spgist_hint(slot: usize, compared: &Compared) -> bool {
    let mut pages = compared.pages.iter().filter(|page| **page < SLOT_BYTES / PAGE_BYTES);
    slot == 0 && pages.all(|page| *page == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_page_of_an_spgist_index_may_change_past_the_wal() {
        let differs = |pages: &[u32]| Compared { pages: pages.to_vec(), ..Compared::default() };
        assert!(may_be_spgist_hint(0, &differs(&[0])) && may_be_spgist_hint(0, &differs(&[0, 16, 40])));
        assert!(may_be_spgist_hint(0, &differs(&[])), "stored whole");
        assert!(!may_be_spgist_hint(0, &differs(&[0, 3])) && !may_be_spgist_hint(1, &differs(&[0])));
    }
}
