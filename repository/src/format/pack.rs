//! Packs: about 32 MiB of chunks, named by the hash of their stored bytes.
//!
//! A pack is a sealed object whose directory lists its chunks, so that every index can be rebuilt from packs alone.

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as wire;

use crate::crypto::DomainKey;
use crate::format::clear::ObjectKind;
use crate::format::sealed::{Compressor, FramePlace, Packed, SealedError, SealedObject, SealedWriter};
use crate::ids::{ChunkId, PackId};

/// A pack is closed once it is at least this large: few enough objects that the request bill of a terabyte stays small,
/// small enough that a few in flight fit an agent's memory.
pub const PACK_TARGET_BYTES: usize = 32 << 20;

/// Packs of maps and file lists are smaller: whoever walks a list keeps a few of them whole, and a browser reads little.
pub const METADATA_PACK_TARGET_BYTES: usize = 8 << 20;

/// One chunk of a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackEntry {
    pub chunk: ChunkId,
    pub place: FramePlace,
}

/// Gathers chunks until the pack is full.
pub struct PackWriter {
    sealed: SealedWriter,
    entries: Vec<wire::PackEntry>,
}

/// A pack that will not change any more: ready to be stored under its name.
#[derive(Clone, Debug)]
pub struct FinishedPack {
    pub id: PackId,
    pub bytes: Bytes,
}

impl PackWriter {
    /// `target`: the stored bytes at which it will be finished.
    pub fn new(domain: &DomainKey, target: usize) -> Result<PackWriter, SealedError> {
        let capacity = target + (1 << 20);
        Ok(PackWriter { sealed: SealedWriter::new(domain, ObjectKind::Pack, None, capacity)?, entries: Vec::new() })
    }

    pub fn add(&mut self, chunk: &ChunkId, packed: Packed<'_>) -> Result<FramePlace, SealedError> {
        let place = self.sealed.push_packed(packed)?;
        self.entries.push(wire::PackEntry {
            chunk_id: Bytes::copy_from_slice(&chunk.0),
            offset: place.offset,
            stored_len: place.stored_len,
            raw_len: place.raw_len,
        });
        Ok(place)
    }

    pub fn stored_bytes(&self) -> usize {
        self.sealed.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn finish(self, zstd: &mut Compressor) -> Result<FinishedPack, SealedError> {
        let directory = wire::PackDirectory { entries: self.entries }.encode_to_vec();
        let bytes = self.sealed.finish(&directory, zstd)?;
        Ok(FinishedPack { id: PackId(*blake3::hash(&bytes).as_bytes()), bytes })
    }
}

/// A whole pack in memory.
pub struct PackReader {
    object: SealedObject,
    entries: Vec<PackEntry>,
}

impl PackReader {
    pub fn open(bytes: Bytes, domain: &DomainKey) -> Result<PackReader, SealedError> {
        let object = SealedObject::open(bytes, domain, ObjectKind::Pack, None)?;
        let directory = |reason: String| SealedError::Directory { what: ObjectKind::Pack.name(), reason };
        let decoded = wire::PackDirectory::decode(&object.directory[..]).map_err(|e| directory(e.to_string()))?;
        let entries = decoded
            .entries
            .into_iter()
            .map(|entry| {
                let chunk = ChunkId::from_slice(&entry.chunk_id).map_err(|e| directory(e.to_string()))?;
                let place = FramePlace { offset: entry.offset, stored_len: entry.stored_len, raw_len: entry.raw_len };
                Ok(PackEntry { chunk, place })
            })
            .collect::<Result<_, SealedError>>()?;
        Ok(PackReader { object, entries })
    }

    pub fn entries(&self) -> &[PackEntry] {
        &self.entries
    }

    pub fn chunk(&self, place: FramePlace) -> Result<Vec<u8>, SealedError> {
        self.object.frame(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_describes_itself_and_is_named_by_its_bytes() {
        let key = DomainKey::generate().unwrap();
        let mut zstd = Compressor::new(3);
        let mut writer = PackWriter::new(&key, PACK_TARGET_BYTES).unwrap();
        let plains: Vec<Vec<u8>> = (0..50u8).map(|i| vec![i; 1000 + usize::from(i)]).collect();
        let places: Vec<FramePlace> =
            plains.iter().map(|plain| writer.add(&key.chunk_id(plain), zstd.pack(plain)).unwrap()).collect();
        let pack = writer.finish(&mut zstd).unwrap();
        assert_eq!(pack.id.0, *blake3::hash(&pack.bytes).as_bytes());
        let reader = PackReader::open(pack.bytes, &key).unwrap();
        assert_eq!(reader.entries().len(), plains.len());
        for ((entry, place), plain) in reader.entries().iter().zip(places).zip(&plains) {
            assert_eq!(entry.place, place);
            assert_eq!(entry.chunk, key.chunk_id(plain));
            assert_eq!(&reader.chunk(place).unwrap(), plain);
        }
    }
}
