//! Puts a file together from what its parent has and what was read of it.

use walfleet_repository::backup::file_list::{ParentMap, PlacedContent, PlacedOverlay};
use walfleet_repository::backup::write::{PackSession, PlacedSlot, WriteError};
use walfleet_repository::format::file_map::{ChunkPlace, FileMap, Slot};
use walfleet_repository::format::overlay::Overlay;

use crate::backup::pages::PagesResult;
use crate::backup::spare::ReadPlan;

fn lost() -> WriteError {
    WriteError::Parent("a chunk that was at hand is not any more".to_owned())
}

/// The parent's overlays as this session refers to them.
pub(in crate::backup) fn adopt_overlays(
    session: &PackSession,
    kept: Vec<Overlay>,
) -> Result<Vec<PlacedOverlay>, WriteError> {
    let adopted = kept.into_iter().map(|overlay| {
        let chunk = session.adopt(&overlay.chunk).ok_or_else(lost)?;
        Ok(PlacedOverlay { chunk, pages: overlay.pages })
    });
    adopted.collect()
}

/// The content of a file of `size` bytes. `read` is all that `plan` asked for; the rest is the parent's, whose map lies at
/// the place given with it.
pub(super) fn compose(
    session: &PackSession,
    (parent, place): (&FileMap, ChunkPlace),
    plan: &ReadPlan,
    size: u64,
    read: PagesResult,
) -> Result<PlacedContent, WriteError> {
    let count = size.div_ceil(u64::from(parent.slot_bytes)) as usize;
    let mut anew = read.slots.into_iter().peekable();
    let mut slots = Vec::with_capacity(count);
    for number in 0..count {
        let slot = match (anew.next_if(|(slot, _)| *slot as usize == number), parent.slots.get(number)) {
            (Some((_, slot)), _) => slot,
            (None, Some(Slot::Chunk(chunk))) => PlacedSlot::Chunk(session.adopt(chunk).ok_or_else(lost)?),
            (None, Some(Slot::Zero)) => PlacedSlot::Zero,
            (None, None) => return Err(lost()),
        };
        slots.push(slot);
    }
    let mut overlays = adopt_overlays(session, plan.kept_overlays(parent, size))?;
    overlays.extend(read.overlays);
    Ok(PlacedContent::Slots {
        slot_bytes: parent.slot_bytes,
        slots,
        overlays,
        parent: Some(ParentMap { place, base: Some(parent.to_base(place)) }),
    })
}
