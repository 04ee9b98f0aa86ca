//! File maps: the slots of one file, the pages laid over them, and the packs they lie in. A map is itself a chunk.

use bytes::Bytes;
use prost::Message;
use roaring::RoaringBitmap;
use walfleet_proto::repository::v1 as wire;

use crate::format::overlay::{self, Overlay, OverlayPage, PAGE_BYTES};
use crate::format::sealed::FramePlace;
use crate::ids::{ChunkId, PackId};

/// Bytes of a slot: 16 pages. Measured (docs/format.md): zstd compresses 128 KiB as well as any larger unit.
pub const SLOT_BYTES: u32 = 128 << 10;

/// The first half of a chunk id: all that a comparison by position needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct ShortId(pub [u8; 16]);

impl From<&ChunkId> for ShortId {
    fn from(id: &ChunkId) -> ShortId {
        let mut short = [0; 16];
        short.copy_from_slice(&id.0[..16]);
        ShortId(short)
    }
}

/// A chunk's place: which pack, where in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkPlace {
    pub pack: PackId,
    pub frame: FramePlace,
    pub id: ShortId,
}

/// What one slot holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    /// All zero; not stored.
    Zero,
    Chunk(ChunkPlace),
}

/// The content of one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileMap {
    pub slot_bytes: u32,
    pub size: u64,
    pub slots: Vec<Slot>,
    /// In the order they came to be. No page is in two of them.
    pub overlays: Vec<Overlay>,
}

/// Bytes of a chunk that are bytes of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Where in the chunk.
    pub from: u32,
    pub len: u32,
    /// Where in the file.
    pub to: u64,
}

/// Appends a page laid over a file to the runs of its chunk, as part of the last one if it goes on from there.
pub(crate) fn push_page(runs: &mut Vec<Run>, page: OverlayPage) {
    let (from, to) = (page.position * PAGE_BYTES, u64::from(page.page) * u64::from(PAGE_BYTES));
    match runs.last_mut() {
        Some(last) if last.from + last.len == from && last.to + u64::from(last.len) == to => last.len += PAGE_BYTES,
        _ => runs.push(Run { from, len: PAGE_BYTES, to }),
    }
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MapError {
    #[error("it does not decode: {0}")]
    Decode(String),
    #[error("slot size {0} is not a multiple of 8192 up to 16 MiB")]
    SlotSize(u32),
    #[error("{slots} slots of {slot_bytes} bytes do not make a file of {size} bytes")]
    SlotCount { slots: usize, slot_bytes: u32, size: u64 },
    #[error("its slot arrays differ in length")]
    Arrays,
    #[error("it refers to pack {number} of {count}")]
    PackNumber { number: u32, count: usize },
    #[error("a pack id has {0} bytes, expected 32")]
    PackId(usize),
    #[error("page {position} of a chunk is laid over page {page}, and one of them does not exist")]
    OverlayPage { page: u32, position: u32 },
    #[error("page {0} is laid over twice")]
    OverlaidTwice(u32),
}

/// A table of packs in order of first use, as stored messages refer to them.
#[derive(Default)]
pub(crate) struct PackTable {
    packs: Vec<Bytes>,
    numbers: std::collections::HashMap<PackId, u32>,
}

impl PackTable {
    pub(crate) fn number(&mut self, pack: PackId) -> u32 {
        *self.numbers.entry(pack).or_insert_with(|| {
            self.packs.push(Bytes::copy_from_slice(&pack.0));
            (self.packs.len() - 1) as u32
        })
    }

    pub(crate) fn place(&mut self, place: &ChunkPlace) -> wire::ChunkPlace {
        wire::ChunkPlace {
            pack: self.number(place.pack),
            offset: place.frame.offset,
            stored_len: place.frame.stored_len,
            raw_len: place.frame.raw_len,
            id: Bytes::copy_from_slice(&place.id.0),
        }
    }

    pub(crate) fn into_wire(self) -> Vec<Bytes> {
        self.packs
    }
}

/// The pack table of a stored message, checked.
pub(crate) fn pack_ids(packs: &[Bytes]) -> Result<Vec<PackId>, MapError> {
    packs.iter().map(|pack| PackId::from_slice(pack).map_err(|_| MapError::PackId(pack.len()))).collect()
}

pub(crate) fn place_from_wire(place: &wire::ChunkPlace, packs: &[PackId]) -> Result<ChunkPlace, MapError> {
    let pack =
        *packs.get(place.pack as usize).ok_or(MapError::PackNumber { number: place.pack, count: packs.len() })?;
    let id = ShortId(place.id[..].try_into().map_err(|_| MapError::Decode("a chunk id is not 16 bytes".into()))?);
    let frame = FramePlace { offset: place.offset, stored_len: place.stored_len, raw_len: place.raw_len };
    Ok(ChunkPlace { pack, frame, id })
}

impl FileMap {
    /// Bytes of plain content in a slot: a whole slot, or what is left of the file.
    pub fn slot_len(&self, slot: usize) -> u32 {
        let start = slot as u64 * u64::from(self.slot_bytes);
        u64::from(self.slot_bytes).min(self.size.saturating_sub(start)) as u32
    }

    /// Equal content in equal places encodes to equal bytes, so that an unchanged file's map is found in its parent.
    pub fn encode(&self) -> Vec<u8> {
        let mut packs = PackTable::default();
        let count = self.slots.len();
        let mut slots = wire::Slots {
            pack_plus_one: Vec::with_capacity(count),
            offset: Vec::with_capacity(count),
            stored_len: Vec::with_capacity(count),
            ids: Bytes::new(),
        };
        let mut ids = Vec::with_capacity(16 * count);
        for slot in &self.slots {
            let (pack, offset, stored_len, id) = match slot {
                Slot::Zero => (0, 0, 0, ShortId::default()),
                Slot::Chunk(place) => {
                    (packs.number(place.pack) + 1, place.frame.offset, place.frame.stored_len, place.id)
                }
            };
            slots.pack_plus_one.push(pack);
            slots.offset.push(offset);
            slots.stored_len.push(stored_len);
            ids.extend_from_slice(&id.0);
        }
        slots.ids = ids.into();
        let overlays = self.overlays.iter().map(|overlay| overlay.to_wire(packs.place(&overlay.chunk))).collect();
        wire::FileMap {
            slot_bytes: self.slot_bytes,
            size: self.size,
            packs: packs.into_wire(),
            slots: Some(slots),
            overlays,
        }
        .encode_to_vec()
    }

    pub fn decode(bytes: &[u8]) -> Result<FileMap, MapError> {
        let map = wire::FileMap::decode(bytes).map_err(|e| MapError::Decode(e.to_string()))?;
        if map.slot_bytes == 0 || map.slot_bytes % 8192 != 0 || map.slot_bytes > 16 << 20 {
            return Err(MapError::SlotSize(map.slot_bytes));
        }
        let packs = pack_ids(&map.packs)?;
        let wire::Slots { pack_plus_one, offset, stored_len, ids } = map.slots.unwrap_or_default();
        let count = pack_plus_one.len();
        if offset.len() != count || stored_len.len() != count || ids.len() != 16 * count {
            return Err(MapError::Arrays);
        }
        if map.size.div_ceil(u64::from(map.slot_bytes)) != count as u64 {
            return Err(MapError::SlotCount { slots: count, slot_bytes: map.slot_bytes, size: map.size });
        }
        let mut result = FileMap {
            slot_bytes: map.slot_bytes,
            size: map.size,
            slots: Vec::with_capacity(count),
            overlays: Vec::new(),
        };
        let entries = pack_plus_one.iter().zip(offset.iter().zip(&stored_len)).zip(ids.chunks_exact(16));
        for (index, ((&pack_plus_one, (&offset, &stored_len)), id)) in entries.enumerate() {
            let Some(number) = pack_plus_one.checked_sub(1) else {
                result.slots.push(Slot::Zero);
                continue;
            };
            let pack = *packs.get(number as usize).ok_or(MapError::PackNumber { number, count: packs.len() })?;
            let frame = FramePlace { offset, stored_len, raw_len: result.slot_len(index) };
            let mut short = ShortId::default();
            short.0.copy_from_slice(id);
            result.slots.push(Slot::Chunk(ChunkPlace { pack, frame, id: short }));
        }
        for overlay in &map.overlays {
            let chunk = place_from_wire(&overlay::chunk_of(overlay), &packs)?;
            result.overlays.push(Overlay::from_wire(overlay, chunk, map.size)?);
        }
        result.overlaid()?;
        Ok(result)
    }

    /// Which pages are laid over; an error if one is twice.
    pub fn overlaid(&self) -> Result<RoaringBitmap, MapError> {
        let mut pages = RoaringBitmap::new();
        for page in self.overlays.iter().flat_map(|overlay| &overlay.pages) {
            if !pages.insert(page.page) {
                return Err(MapError::OverlaidTwice(page.page));
            }
        }
        Ok(pages)
    }

    /// Every chunk that the file needs, in file order, with what of it goes where: first the slots', then the pages laid
    /// over them. No byte of the file comes twice, so they may be written in any order; what is not among them is zero.
    pub fn for_each_chunk(&self, mut each: impl FnMut(&ChunkPlace, &[Run])) -> Result<(), MapError> {
        let overlaid = self.overlaid()?;
        let mut runs = Vec::new();
        for (index, slot) in self.slots.iter().enumerate() {
            let Slot::Chunk(place) = slot else { continue };
            runs.clear();
            self.bare_runs(index, &overlaid, &mut runs);
            if !runs.is_empty() {
                each(place, &runs);
            }
        }
        for overlay in &self.overlays {
            runs.clear();
            overlay.pages.iter().for_each(|page| push_page(&mut runs, *page));
            each(&overlay.chunk, &runs);
        }
        Ok(())
    }

    /// Every stretch of the file, by offset and length, that is zero since no chunk is there.
    pub fn for_each_zero(&self, mut each: impl FnMut(u64, u64)) -> Result<(), MapError> {
        let overlaid = self.overlaid()?;
        let mut runs = Vec::new();
        for (index, _) in self.slots.iter().enumerate().filter(|(_, slot)| matches!(slot, Slot::Zero)) {
            runs.clear();
            self.bare_runs(index, &overlaid, &mut runs);
            runs.iter().for_each(|run| each(run.to, u64::from(run.len)));
        }
        Ok(())
    }

    /// What of a slot's own chunk no page is laid over.
    fn bare_runs(&self, slot: usize, overlaid: &RoaringBitmap, runs: &mut Vec<Run>) {
        let (start, len) = (slot as u64 * u64::from(self.slot_bytes), self.slot_len(slot));
        let first = (start / u64::from(PAGE_BYTES)) as u32;
        let pages = len.div_ceil(PAGE_BYTES);
        let mut from = 0;
        for page in overlaid.range(first..first.saturating_add(pages)) {
            let at = (page - first) * PAGE_BYTES;
            if from < at {
                runs.push(Run { from, len: at - from, to: start + u64::from(from) });
            }
            from = at + PAGE_BYTES;
        }
        if from < len {
            runs.push(Run { from, len: len - from, to: start + u64::from(from) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(kinds: &[Option<u8>], tail: u32) -> FileMap {
        let slot_bytes = 16384;
        let size = (kinds.len() as u64 * u64::from(slot_bytes)).saturating_sub(u64::from(tail));
        let mut map = FileMap { slot_bytes, size, slots: Vec::new(), overlays: Vec::new() };
        for (i, kind) in kinds.iter().enumerate() {
            let raw_len = map.slot_len(i);
            map.slots.push(match kind {
                None => Slot::Zero,
                Some(pack) => Slot::Chunk(ChunkPlace {
                    pack: PackId([*pack; 32]),
                    frame: FramePlace { offset: i as u32 * 100, stored_len: 99, raw_len },
                    id: ShortId([i as u8; 16]),
                }),
            });
        }
        map
    }

    proptest! {
        #[test]
        fn a_map_reads_back_as_written(kinds in prop::collection::vec(prop::option::of(0u8..5), 1..200), tail in 0u32..16384) {
            let map = map(&kinds, tail);
            prop_assert_eq!(FileMap::decode(&map.encode()).unwrap(), map);
        }

        #[test]
        fn every_byte_comes_from_one_chunk(
            kinds in prop::collection::vec(prop::option::of(0u8..5), 1..60),
            tail in 0u32..16384,
            pages in prop::collection::btree_set((0u32..120, 0u8..4), 0..60),
        ) {
            let mut map = map(&kinds, tail);
            let whole = (map.size / u64::from(PAGE_BYTES)) as u32;
            let mut over: Vec<Vec<u32>> = vec![Vec::new(); 4];
            let mut taken = RoaringBitmap::new();
            for (page, chunk) in pages.iter().filter(|(page, _)| *page < whole) {
                if taken.insert(*page) {
                    over[usize::from(*chunk)].push(*page);
                }
            }
            for (number, pages) in over.iter().enumerate().filter(|(_, pages)| !pages.is_empty()) {
                let frame = FramePlace { offset: 9, stored_len: 9, raw_len: 200 * PAGE_BYTES };
                let chunk = ChunkPlace { pack: PackId([9; 32]), frame, id: ShortId([number as u8; 16]) };
                let mut overlay = Overlay::of_chunk(chunk, pages.iter().copied());
                if number == 2 {
                    overlay.pages.iter_mut().for_each(|page| page.position *= 3);
                }
                map.overlays.push(overlay);
            }
            prop_assert_eq!(&FileMap::decode(&map.encode()).unwrap(), &map);
            // For each byte range, who writes it: slots by index, overlays by 1000 + number and position.
            let mut bytes = vec![0u32; map.size as usize / 512 + 1];
            map.for_each_chunk(|place, runs| {
                for run in runs {
                    let from_overlay = place.pack == PackId([9; 32]);
                    for at in (0..run.len).step_by(512) {
                        let writer = match from_overlay {
                            true => 1000 + 1000 * u32::from(place.id.0[0]) + (run.from + at) / PAGE_BYTES,
                            false => 1 + u32::from(place.id.0[0]),
                        };
                        let cell = &mut bytes[((run.to + u64::from(at)) / 512) as usize];
                        assert_eq!(*cell, 0, "written twice");
                        *cell = writer;
                    }
                    assert!(from_overlay || u64::from(run.from) == run.to % u64::from(map.slot_bytes));
                }
            }).unwrap();
            let mut written = bytes.clone();
            map.for_each_zero(|offset, len| {
                for at in (offset..offset + len).step_by(512) {
                    assert_eq!(std::mem::replace(&mut written[(at / 512) as usize], 1), 0, "zero, and written");
                }
            }).unwrap();
            prop_assert!(written[..map.size as usize / 512].iter().all(|cell| *cell != 0), "neither zero nor written");
            for (index, writer) in bytes.iter().enumerate().take(map.size as usize / 512) {
                let page = (index * 512) as u32 / PAGE_BYTES;
                let overlay = map.overlays.iter().find_map(|overlay| {
                    let laid = overlay.pages.iter().find(|laid| laid.page == page)?;
                    Some(1000 + 1000 * u32::from(overlay.chunk.id.0[0]) + laid.position)
                });
                let slot = match map.slots[index * 512 / map.slot_bytes as usize] {
                    Slot::Zero => 0,
                    Slot::Chunk(place) => 1 + u32::from(place.id.0[0]),
                };
                prop_assert_eq!(*writer, overlay.unwrap_or(slot));
            }
        }

        #[test]
        fn no_bytes_make_the_reader_panic(flip in 0usize..400, bit in 0u8..8, cut in 0usize..400) {
            let mut bytes = map(&[Some(1), None, Some(2)], 5).encode();
            let len = bytes.len();
            bytes[flip % len] ^= 1 << bit;
            bytes.truncate(cut.max(1));
            let _ = FileMap::decode(&bytes);
        }
    }
}
