//! Brings single chunks of a backup to whoever compares them with what is there now.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};

use super::openers::Openers;
use super::{COALESCE_GAP, RANGE_BYTES, Range};
use crate::backup::read::{BackupReader, ReadError};
use crate::crypto::DomainKey;
use crate::format::file_map::ChunkPlace;
use crate::format::sealed::{self, Decompressor, Opener};

/// Requests of one call in flight: chunks of neighbouring slots mostly lie side by side and take one.
const REQUESTS: usize = 4;

/// Cheap to share between threads.
pub struct ChunkReader {
    openers: Openers,
    domain: Arc<DomainKey>,
}

impl ChunkReader {
    pub fn new(reader: &BackupReader) -> ChunkReader {
        let openers = Openers::new(reader.store().clone(), reader.keys().clone(), reader.packs().clone());
        ChunkReader { openers, domain: reader.keys().newest().clone() }
    }

    /// The content of each chunk, in the order asked for and checked against its id. Holds all of it in memory.
    pub async fn chunks(&self, places: &[ChunkPlace]) -> Result<Vec<Vec<u8>>, ReadError> {
        let mut order: Vec<usize> = (0..places.len()).collect();
        let place = |index: usize| places.get(index).copied();
        order.sort_by_key(|index| place(*index).map(|place| (place.pack, place.frame.offset)));
        let mut groups: Vec<(Range, Vec<(usize, ChunkPlace)>)> = Vec::new();
        for (index, place) in order.into_iter().filter_map(|index| Some((index, place(index)?))) {
            let (start, end) = (u64::from(place.frame.offset), place.frame.end());
            match groups.last_mut() {
                Some((range, group))
                    if range.pack == place.pack
                        && start <= range.end.saturating_add(COALESCE_GAP)
                        && end.saturating_sub(range.start) <= RANGE_BYTES =>
                {
                    range.end = range.end.max(end);
                    group.push((index, place));
                }
                _ => groups.push((Range { pack: place.pack, start, end, pieces: Vec::new() }, vec![(index, place)])),
            }
        }
        let fetched = stream::iter(groups).map(|(mut range, group)| async move {
            let (opener, bytes) = self.openers.fetch(&mut range).await?;
            Ok::<_, ReadError>((range.start, opener, bytes, group))
        });
        let mut fetched = fetched.buffered(REQUESTS);
        let mut contents = vec![Vec::new(); places.len()];
        let mut decompressor = Decompressor::new();
        while let Some((start, opener, bytes, group)) = fetched.try_next().await? {
            for (index, place) in group {
                let content = self.open(&opener, &place, (start, &bytes), &mut decompressor)?;
                if let Some(slot) = contents.get_mut(index) {
                    *slot = content;
                }
            }
        }
        Ok(contents)
    }

    fn open(
        &self,
        opener: &Opener,
        place: &ChunkPlace,
        (start, bytes): (u64, &Bytes),
        decompressor: &mut Decompressor,
    ) -> Result<Vec<u8>, ReadError> {
        let object = || format!("pack {}", place.pack);
        let sealed = |source| ReadError::Sealed { object: object(), source };
        let frame = sealed::FramePlace { offset: (u64::from(place.frame.offset) - start) as u32, ..place.frame };
        let mut stored = sealed::slice(bytes, frame, "pack").map_err(sealed)?.to_vec();
        let mut plain = Vec::new();
        opener.open_into(place.frame, &mut stored, &mut plain, decompressor).map_err(sealed)?;
        if self.domain.chunk_id(&plain).0[..16] != place.id.0 {
            return Err(ReadError::Content { object: object() });
        }
        Ok(plain)
    }
}
