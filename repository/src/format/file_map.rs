//! File maps: the slots of one file and the packs they lie in. A map is itself a chunk.

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as wire;

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
    #[error("it has page overlays, which this version does not read\nHINT: use a newer walfleet.")]
    Overlays,
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
        wire::FileMap {
            slot_bytes: self.slot_bytes,
            size: self.size,
            packs: packs.into_wire(),
            slots: Some(slots),
            overlays: Vec::new(),
        }
        .encode_to_vec()
    }

    pub fn decode(bytes: &[u8]) -> Result<FileMap, MapError> {
        let map = wire::FileMap::decode(bytes).map_err(|e| MapError::Decode(e.to_string()))?;
        if map.slot_bytes == 0 || map.slot_bytes % 8192 != 0 || map.slot_bytes > 16 << 20 {
            return Err(MapError::SlotSize(map.slot_bytes));
        }
        if !map.overlays.is_empty() {
            return Err(MapError::Overlays);
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
        let mut result = FileMap { slot_bytes: map.slot_bytes, size: map.size, slots: Vec::with_capacity(count) };
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
        let mut map = FileMap { slot_bytes, size, slots: Vec::new() };
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
        fn no_bytes_make_the_reader_panic(flip in 0usize..400, bit in 0u8..8, cut in 0usize..400) {
            let mut bytes = map(&[Some(1), None, Some(2)], 5).encode();
            let len = bytes.len();
            bytes[flip % len] ^= 1 << bit;
            bytes.truncate(cut.max(1));
            let _ = FileMap::decode(&bytes);
        }
    }
}
