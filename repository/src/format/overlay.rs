//! Pages laid over a file's slots: what changed since the slots were stored, gathered densely into chunks of its own.
//!
//! A page is in one overlay at most, so that nothing depends on their order. A chunk may hold pages that are not laid
//! over anything any more; its entry then says which of its pages are meant.

use bytes::Bytes;
use walfleet_proto::repository::v1 as wire;

use crate::format::file_map::{ChunkPlace, MapError};

/// Bytes of a page as overlays count them, whatever the server's block size.
pub const PAGE_BYTES: u32 = 8192;

/// One chunk of gathered pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Overlay {
    pub chunk: ChunkPlace,
    /// Ascending by page, and by position.
    pub pages: Vec<OverlayPage>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OverlayPage {
    /// Which page of the file.
    pub page: u32,
    /// Which page of the chunk.
    pub position: u32,
}

impl Overlay {
    /// `pages` in the order in which the chunk holds them.
    pub fn of_chunk(chunk: ChunkPlace, pages: impl IntoIterator<Item = u32>) -> Overlay {
        let pages = pages.into_iter().zip(0..).map(|(page, position)| OverlayPage { page, position });
        Overlay { chunk, pages: pages.collect() }
    }

    pub(super) fn to_wire(&self, chunk: wire::ChunkPlace) -> wire::Overlay {
        let dense = self.pages.iter().zip(0..).all(|(page, expected)| page.position == expected);
        let positions = self.pages.iter().map(|page| page.position);
        wire::Overlay {
            chunk: Some(chunk),
            page_deltas: deltas(self.pages.iter().map(|page| page.page)),
            position_deltas: if dense { Vec::new() } else { deltas(positions) },
        }
    }

    /// Checks the pages against the chunk and the file, but not against other overlays.
    pub(super) fn from_wire(overlay: &wire::Overlay, chunk: ChunkPlace, size: u64) -> Result<Overlay, MapError> {
        let pages = sums(&overlay.page_deltas)?;
        let positions = match overlay.position_deltas.is_empty() {
            true => (0..pages.len() as u32).collect(),
            false => sums(&overlay.position_deltas)?,
        };
        if pages.is_empty() || pages.len() != positions.len() {
            return Err(MapError::Arrays);
        }
        let held = chunk.frame.raw_len / PAGE_BYTES;
        let in_file = size / u64::from(PAGE_BYTES);
        let last_page = pages.last().copied().unwrap_or_default();
        let last_position = positions.last().copied().unwrap_or_default();
        if u64::from(last_page) >= in_file || last_position >= held {
            return Err(MapError::OverlayPage { page: last_page, position: last_position });
        }
        let pages = pages.into_iter().zip(positions).map(|(page, position)| OverlayPage { page, position });
        Ok(Overlay { chunk, pages: pages.collect() })
    }
}

/// The chunk places of stored overlays.
pub(super) fn chunk_of(overlay: &wire::Overlay) -> wire::ChunkPlace {
    overlay.chunk.clone().unwrap_or_else(|| wire::ChunkPlace { id: Bytes::new(), ..Default::default() })
}

/// The first, then how many lie between each and the one before it; so no two can be equal or descend.
pub(super) fn deltas(ascending: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut next = 0u32;
    ascending
        .map(|value| {
            let delta = value.wrapping_sub(next);
            next = value.wrapping_add(1);
            delta
        })
        .collect()
}

pub(super) fn sums(deltas: &[u32]) -> Result<Vec<u32>, MapError> {
    let mut next = 0u32;
    deltas
        .iter()
        .map(|delta| {
            let value = next.checked_add(*delta).ok_or(MapError::Arrays)?;
            next = value.checked_add(1).ok_or(MapError::Arrays)?;
            Ok(value)
        })
        .collect()
}
