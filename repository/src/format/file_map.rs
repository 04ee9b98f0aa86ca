//! File maps: the slots of one file, the pages laid over them, and the packs they lie in. A map is itself a chunk.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use roaring::RoaringBitmap;
use walfleet_proto::repository::v1 as wire;

use crate::format::overlay::{self, Overlay, OverlayPage, PAGE_BYTES};
use crate::format::sealed::FramePlace;
use crate::ids::{ChunkId, PackId};

/// Bytes of a slot: 16 pages. Measured (docs/format.md): zstd compresses 128 KiB as well as any larger unit.
pub const SLOT_BYTES: u32 = 128 << 10;

/// Where more than one slot in so many differs from its base, a map is stored whole: nothing is left to gain.
const MOST_DIFFERING: usize = 8;

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
    /// The map that this one is stored over.
    pub base: Option<Arc<MapBase>>,
}

/// A map that is stored whole, and that later maps of the file may be stored over: they name only the slots that differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MapBase {
    pub place: ChunkPlace,
    pub slots: Vec<Slot>,
}

/// A stored map, before the one it may lie over is at hand.
pub struct StoredMap {
    map: wire::FileMap,
    packs: Vec<PackId>,
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
    #[error("the map that it is stored over does not fit, or is not stored whole")]
    Base,
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

    /// What a later map of the file may be stored over, if this one lies at `place`.
    pub fn to_base(&self, place: ChunkPlace) -> Arc<MapBase> {
        match &self.base {
            Some(base) => Arc::clone(base),
            None => Arc::new(MapBase { place, slots: self.slots.clone() }),
        }
    }

    /// Has the map stored over a base if that is smaller by far; one without overlays is stored whole, so that readers of
    /// nothing else need not know of bases.
    #[must_use]
    pub fn over(mut self, base: Option<Arc<MapBase>>) -> FileMap {
        let is_near = |base: &Arc<MapBase>| self.differing(base).count() * MOST_DIFFERING <= self.slots.len();
        self.base = base.filter(|base| !self.overlays.is_empty() && is_near(base));
        self
    }

    fn differing<'a>(&'a self, base: &'a MapBase) -> impl Iterator<Item = (u32, &'a Slot)> {
        (0..).zip(&self.slots).filter(|(number, slot)| base.slots.get(*number as usize) != Some(slot))
    }

    /// Equal content in equal places, over an equal base, encodes to equal bytes, so that an unchanged file's map is found
    /// in its parent.
    pub fn encode(&self) -> Vec<u8> {
        let mut packs = PackTable::default();
        let base = self.base.as_ref().map(|base| packs.place(&base.place));
        let (slots, slot_deltas) = match &self.base {
            None => (slots_to_wire(self.slots.iter(), &mut packs), Vec::new()),
            Some(base) => {
                let slots = slots_to_wire(self.differing(base).map(|(_, slot)| slot), &mut packs);
                (slots, overlay::deltas(self.differing(base).map(|(number, _)| number)))
            }
        };
        let overlays = self.overlays.iter().map(|overlay| overlay.to_wire(packs.place(&overlay.chunk))).collect();
        let packs = packs.into_wire();
        let slots = Some(slots);
        wire::FileMap { slot_bytes: self.slot_bytes, size: self.size, packs, slots, overlays, base, slot_deltas }
            .encode_to_vec()
    }

    /// A map that is stored whole.
    pub fn decode(bytes: &[u8]) -> Result<FileMap, MapError> {
        StoredMap::decode(bytes)?.read(None)
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

    /// Every stretch of slots that are not zero, by offset and length.
    pub fn for_each_filled(&self, mut each: impl FnMut(u64, u64)) {
        let is_filled = |slot: &Slot| matches!(slot, Slot::Chunk(_));
        let mut start = 0;
        for stretch in self.slots.chunk_by(|a, b| is_filled(a) == is_filled(b)) {
            let end = start + stretch.len() as u64 * u64::from(self.slot_bytes);
            if stretch.first().is_some_and(is_filled) {
                each(start, end.min(self.size) - start);
            }
            start = end;
        }
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

fn slots_to_wire<'a>(slots: impl Iterator<Item = &'a Slot>, packs: &mut PackTable) -> wire::Slots {
    let mut stored = wire::Slots::default();
    let mut ids = Vec::new();
    for slot in slots {
        let (pack, offset, stored_len, id) = match slot {
            Slot::Zero => (0, 0, 0, ShortId::default()),
            Slot::Chunk(place) => (packs.number(place.pack) + 1, place.frame.offset, place.frame.stored_len, place.id),
        };
        stored.pack_plus_one.push(pack);
        stored.offset.push(offset);
        stored.stored_len.push(stored_len);
        ids.extend_from_slice(&id.0);
    }
    stored.ids = ids.into();
    stored
}

impl StoredMap {
    pub fn decode(bytes: &[u8]) -> Result<StoredMap, MapError> {
        let map = wire::FileMap::decode(bytes).map_err(|e| MapError::Decode(e.to_string()))?;
        if map.slot_bytes == 0 || map.slot_bytes % 8192 != 0 || map.slot_bytes > 16 << 20 {
            return Err(MapError::SlotSize(map.slot_bytes));
        }
        let packs = pack_ids(&map.packs)?;
        Ok(StoredMap { map, packs })
    }

    /// Where the map lies that this one is stored over.
    pub fn base(&self) -> Result<Option<ChunkPlace>, MapError> {
        self.map.base.as_ref().map(|place| place_from_wire(place, &self.packs)).transpose()
    }

    /// The map. `base`: what lies at [`base`](Self::base), stored whole.
    pub fn read(self, base: Option<&FileMap>) -> Result<FileMap, MapError> {
        let place = self.base()?;
        let base = match (place, base) {
            (Some(place), Some(base)) if base.base.is_none() && base.slot_bytes == self.map.slot_bytes => {
                Some(base.to_base(place))
            }
            (None, None) => None,
            _ => return Err(MapError::Base),
        };
        let StoredMap { map, packs } = self;
        let count = map.size.div_ceil(u64::from(map.slot_bytes));
        let mut result = FileMap {
            slot_bytes: map.slot_bytes,
            size: map.size,
            slots: Vec::new(),
            overlays: Vec::new(),
            base: base.clone(),
        };
        let wire::Slots { pack_plus_one, offset, stored_len, ids } = map.slots.unwrap_or_default();
        let stored = pack_plus_one.len();
        if offset.len() != stored || stored_len.len() != stored || ids.len() != 16 * stored {
            return Err(MapError::Arrays);
        }
        let numbers = match &base {
            None => (0..stored as u32).collect(),
            Some(_) => overlay::sums(&map.slot_deltas)?,
        };
        if numbers.len() != stored || numbers.last().is_some_and(|last| u64::from(*last) >= count) {
            return Err(MapError::Arrays);
        }
        let entries = pack_plus_one.iter().zip(offset.iter().zip(&stored_len)).zip(ids.chunks_exact(16));
        let mut own = numbers.into_iter().zip(entries).peekable();
        let mut former = base.iter().flat_map(|base| &base.slots);
        // As many as there are slots for: a foreign size alone makes no memory.
        for number in 0..count {
            let inherited = former.next();
            let slot = match own.next_if(|(at, _)| u64::from(*at) == number) {
                Some((number, ((&pack_plus_one, (&offset, &stored_len)), id))) => match pack_plus_one.checked_sub(1) {
                    None => Slot::Zero,
                    Some(table) => {
                        let unknown = MapError::PackNumber { number: table, count: packs.len() };
                        let pack = *packs.get(table as usize).ok_or(unknown)?;
                        let frame = FramePlace { offset, stored_len, raw_len: result.slot_len(number as usize) };
                        let mut short = ShortId::default();
                        short.0.copy_from_slice(id);
                        Slot::Chunk(ChunkPlace { pack, frame, id: short })
                    }
                },
                None => *inherited.ok_or(MapError::SlotCount {
                    slots: stored,
                    slot_bytes: map.slot_bytes,
                    size: map.size,
                })?,
            };
            if matches!(slot, Slot::Chunk(place) if place.frame.raw_len != result.slot_len(number as usize)) {
                return Err(MapError::Base);
            }
            result.slots.push(slot);
        }
        for overlay in &map.overlays {
            let chunk = place_from_wire(&overlay::chunk_of(overlay), &packs)?;
            result.overlays.push(Overlay::from_wire(overlay, chunk, map.size)?);
        }
        result.overlaid()?;
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(kinds: &[Option<u8>], tail: u32) -> FileMap {
        let slot_bytes = 16384;
        let size = (kinds.len() as u64 * u64::from(slot_bytes)).saturating_sub(u64::from(tail));
        let mut map = FileMap { slot_bytes, size, slots: Vec::new(), overlays: Vec::new(), base: None };
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

    fn chunk(number: u8) -> ChunkPlace {
        let frame = FramePlace { offset: 9, stored_len: 9, raw_len: PAGE_BYTES };
        ChunkPlace { pack: PackId([number; 32]), frame, id: ShortId([number; 16]) }
    }

    /// The file's first page.
    fn one_overlay() -> Overlay {
        Overlay::of_chunk(chunk(9), [0])
    }

    proptest! {
        #[test]
        fn a_map_reads_back_as_written(kinds in prop::collection::vec(prop::option::of(0u8..5), 1..200), tail in 0u32..16384) {
            let map = map(&kinds, tail);
            prop_assert_eq!(FileMap::decode(&map.encode()).unwrap(), map);
        }

        #[test]
        fn what_is_filled_is_what_slots_hold(kinds in prop::collection::vec(prop::option::of(0u8..5), 1..200), tail in 0u32..16384) {
            let map = map(&kinds, tail);
            let mut filled = vec![false; map.size as usize];
            map.for_each_filled(|offset, len| filled[offset as usize..][..len as usize].fill(true));
            for (slot, kind) in kinds.iter().enumerate() {
                let (start, len) = (slot * map.slot_bytes as usize, map.slot_len(slot) as usize);
                prop_assert!(filled[start..][..len].iter().all(|byte| *byte == kind.is_some()));
            }
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

        /// Whatever the file became: longer, shorter, other slots.
        #[test]
        fn a_map_over_another_reads_back_as_written_and_names_only_what_differs(
            before in prop::collection::vec(prop::option::of(0u8..3), 1..100),
            tails in (0u32..16384, 0u32..16384),
            changes in prop::collection::btree_map(0usize..140, prop::option::of(7u8..9), 0..6),
            len in 1usize..140,
        ) {
            let base = map(&before, tails.0);
            let mut kinds = before.clone();
            kinds.resize(len, Some(5));
            changes.iter().filter(|(at, _)| **at < len).for_each(|(at, kind)| kinds[*at] = *kind);
            // What is laid over has a page at least.
            let mut now = map(&kinds, if len == 1 { tails.1.min(PAGE_BYTES) } else { tails.1 });
            now.overlays = vec![one_overlay()];
            let place = chunk(3);
            let over = now.over(Some(base.to_base(place)));
            let stored = StoredMap::decode(&over.encode()).unwrap();
            prop_assert_eq!(stored.base().unwrap(), over.base.as_ref().map(|_| place));
            let differing = kinds.len() - (0..len).filter(|at| base.slots.get(*at) == over.slots.get(*at)).count();
            prop_assert_eq!(over.base.is_some(), differing * MOST_DIFFERING <= len);
            let at_hand = stored.base().unwrap().map(|_| &base);
            if over.base.is_some() {
                prop_assert_eq!(StoredMap::decode(&over.encode()).unwrap().read(None), Err(MapError::Base));
                // Five packs at most, of 34 bytes each; the base and the overlay; the slots that differ.
                prop_assert!(over.encode().len() < 5 * 34 + 100 + 40 * differing);
            }
            prop_assert_eq!(stored.read(at_hand).unwrap(), over);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(flip in 0usize..400, bit in 0u8..8, cut in 0usize..400, based in any::<bool>()) {
            let base = map(&[Some(1), None, Some(2)], 5);
            let map = FileMap { overlays: vec![one_overlay()], ..base.clone() };
            let mut bytes = if based { map.over(Some(base.to_base(chunk(3)))).encode() } else { map.encode() };
            let len = bytes.len();
            bytes[flip % len] ^= 1 << bit;
            bytes.truncate(cut.max(1));
            let _ = FileMap::decode(&bytes);
            if let Ok(stored) = StoredMap::decode(&bytes) {
                let _ = stored.read(Some(&base));
            }
        }

        /// What lies where the base should be is another file's map, or one that is itself over another.
        #[test]
        fn a_base_that_does_not_fit_is_refused(len in 9usize..20, other in 0usize..9) {
            let base = map(&vec![Some(1); len], 0);
            let over = FileMap { overlays: vec![one_overlay()], ..base.clone() }.over(Some(base.to_base(chunk(3))));
            let bytes = over.encode();
            let read = |base: &FileMap| StoredMap::decode(&bytes).unwrap().read(Some(base));
            prop_assert_eq!(read(&over), Err(MapError::Base));
            prop_assert!(read(&map(&vec![Some(1); other], 0)).is_err());
            let wrong = FileMap { slot_bytes: 8192, ..base };
            prop_assert_eq!(read(&wrong), Err(MapError::Base));
        }
    }
}
