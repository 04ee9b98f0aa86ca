//! From placed content to file maps and the file list.
//!
//! Entries come in list order and leave in list order. An entry waits until the packs of its chunks have names; its map
//! is then a chunk in a pack of maps, and the parts of the list lie in packs of their own behind those, since nothing
//! can name a pack that is not finished.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::backup::write::{ChunkWriter, PackSession, Placed, PlacedSlot, WriteError};
use crate::format::file_map::{ChunkPlace, FileMap, MapBase, ShortId, Slot};
use crate::format::manifest::{Content, EntryKind, FILES_PER_PART, FileEntry, encode_part};
use crate::format::overlay::{Overlay, OverlayPage};

/// Entries that may wait for the open pack of maps before it is finished early: bounds memory with 500,000 relations.
const MAX_WAITING: usize = 32_768;

/// What may wait for packs of content, which stay open for as long as little changes: the slots of some 40 GB, or the
/// entries of 80,000 small files. Beyond it the writers are asked to finish their packs early.
const MAX_WAITING_BYTES: usize = 16 << 20;

/// A file or directory whose content has been placed.
pub struct PlacedFile {
    pub path: Bytes,
    pub mode: u32,
    pub mtime_us: i64,
    pub kind: PlacedKind,
}

pub enum PlacedKind {
    Directory,
    /// `crc32c`: `None` if the file was not read whole.
    File {
        size: u64,
        crc32c: Option<u32>,
        content: PlacedContent,
    },
}

pub enum PlacedContent {
    Empty,
    Zero,
    Chunk(Placed),
    Slots {
        slot_bytes: u32,
        slots: Vec<PlacedSlot>,
        /// Pages laid over the slots.
        overlays: Vec<PlacedOverlay>,
        parent: Option<ParentMap>,
    },
}

/// The parent's map of a file.
#[derive(Clone, Debug)]
pub struct ParentMap {
    pub place: ChunkPlace,
    /// What the new map may be stored over; `None`: it was not read.
    pub base: Option<Arc<MapBase>>,
}

/// A chunk of gathered pages and where they belong.
#[derive(Clone, Debug)]
pub struct PlacedOverlay {
    pub chunk: Placed,
    pub pages: Vec<OverlayPage>,
}

impl PlacedFile {
    /// Memory that it takes while it waits, about.
    fn held_bytes(&self) -> usize {
        let slots = match &self.kind {
            PlacedKind::File { content: PlacedContent::Slots { slots, overlays, parent, .. }, .. } => {
                let pages: usize = overlays.iter().map(|overlay| overlay.pages.len()).sum();
                let base = parent.as_ref().and_then(|parent| parent.base.as_ref()).map_or(0, |base| base.slots.len());
                slots.len() * size_of::<PlacedSlot>() + base * size_of::<Slot>() + pages * size_of::<OverlayPage>()
            }
            _ => 0,
        };
        size_of::<Waiting>() + self.path.len() + slots
    }
}

enum Waiting {
    /// Its chunks' packs are not all finished.
    Content(PlacedFile),
    /// Its map's pack is not finished.
    Map {
        entry: FileEntry,
        map: Placed,
    },
    Ready(FileEntry),
}

/// Builds the file list of one backup.
pub struct FileListWriter {
    session: Arc<PackSession>,
    maps: ChunkWriter,
    lists: ChunkWriter,
    /// In list order: `Map` and `Ready` entries, then `Content` ones.
    waiting: VecDeque<Waiting>,
    /// How many at the front are past `Content`.
    mapped: usize,
    /// What the others hold in memory, about.
    waiting_bytes: usize,
    /// What came since packs were last asked for.
    unasked_bytes: usize,
    /// How many packs were finished when an entry last had to wait for one: trying again before is in vain.
    blocked_at: Option<u64>,
    part: Vec<FileEntry>,
    parts: Vec<Placed>,
    parent_parts: HashMap<ShortId, ChunkPlace>,
    file_count: u64,
}

impl FileListWriter {
    /// `parent_parts`: the parts of the parent's list, reused where they are the same.
    pub fn new(session: Arc<PackSession>, parent_parts: &[ChunkPlace]) -> FileListWriter {
        FileListWriter {
            maps: session.metadata_writer(),
            lists: session.metadata_writer(),
            session,
            waiting: VecDeque::new(),
            mapped: 0,
            waiting_bytes: 0,
            unasked_bytes: 0,
            blocked_at: None,
            part: Vec::new(),
            parts: Vec::new(),
            parent_parts: parent_parts.iter().map(|place| (place.id, *place)).collect(),
            file_count: 0,
        }
    }

    /// Takes the next entry, in list order.
    pub fn push(&mut self, file: PlacedFile) -> Result<(), WriteError> {
        self.file_count += 1;
        let bytes = file.held_bytes();
        self.waiting_bytes += bytes;
        self.unasked_bytes += bytes;
        self.waiting.push_back(Waiting::Content(file));
        self.advance()?;
        // Half the limit apart: an answer takes as long as a thread's next chunk.
        if self.waiting_bytes > MAX_WAITING_BYTES && self.unasked_bytes > MAX_WAITING_BYTES / 2 {
            self.unasked_bytes = 0;
            self.session.ask_for_names();
        }
        if self.mapped > MAX_WAITING {
            self.maps.flush()?;
            self.advance()?;
        }
        Ok(())
    }

    /// Finishes the list. Every data writer must have been flushed before.
    pub fn finish(mut self) -> Result<(Vec<ChunkPlace>, u64), WriteError> {
        self.advance()?;
        if self.mapped != self.waiting.len() {
            return Err(WriteError::UnfinishedPack);
        }
        self.maps.flush()?;
        self.advance()?;
        self.close_part()?;
        self.lists.flush()?;
        let session = &self.session;
        let parts = self.parts.iter().map(|part| session.resolve(part).ok_or(WriteError::UnfinishedPack));
        Ok((parts.collect::<Result<_, _>>()?, self.file_count))
    }

    fn advance(&mut self) -> Result<(), WriteError> {
        let finished = self.session.finished_packs();
        while let Some(Waiting::Content(file)) = self.waiting.get(self.mapped) {
            if self.blocked_at == Some(finished) {
                break;
            }
            let Some(resolved) = resolve(&self.session, file) else {
                self.blocked_at = Some(finished);
                break;
            };
            self.waiting_bytes = self.waiting_bytes.saturating_sub(file.held_bytes());
            let next = self.place_map(resolved)?;
            if let Some(slot) = self.waiting.get_mut(self.mapped) {
                *slot = next;
            }
            self.mapped += 1;
        }
        while self.mapped > 0 {
            let entry = match self.waiting.front() {
                Some(Waiting::Ready(_)) => None,
                Some(Waiting::Map { map, .. }) => match self.session.resolve(map) {
                    Some(place) => Some(place),
                    None => break,
                },
                _ => break,
            };
            let finished = match (self.waiting.pop_front(), entry) {
                (Some(Waiting::Ready(entry)), _) => entry,
                (Some(Waiting::Map { mut entry, .. }), Some(place)) => {
                    if let EntryKind::File { content, .. } = &mut entry.kind {
                        *content = Content::Map(place);
                    }
                    entry
                }
                _ => break,
            };
            self.mapped -= 1;
            self.append(finished)?;
        }
        Ok(())
    }

    fn place_map(&mut self, resolved: Resolved) -> Result<Waiting, WriteError> {
        let Resolved { entry, map } = resolved;
        let Some((map, parent)) = map else { return Ok(Waiting::Ready(entry)) };
        let place = parent.as_ref().map(|parent| parent.place);
        let base = parent.and_then(|parent| parent.base).filter(|base| self.session.adopt(&base.place).is_some());
        let map = map.over(base);
        let placed = self.maps.store(&map.encode(), place.as_ref())?;
        let base = map.base.as_ref().and_then(|base| self.session.adopt(&base.place));
        self.session.count_use(base.iter().chain([&placed]));
        Ok(Waiting::Map { entry, map: placed })
    }

    fn append(&mut self, entry: FileEntry) -> Result<(), WriteError> {
        // Parts end where the path says, so that a file more or less changes one part and not all behind it.
        let hash = u32::from_le_bytes(blake3::hash(&entry.path).as_bytes()[..4].try_into().unwrap_or_default());
        self.part.push(entry);
        if (hash as usize).is_multiple_of(FILES_PER_PART) || self.part.len() >= 4 * FILES_PER_PART {
            self.close_part()?;
        }
        Ok(())
    }

    fn close_part(&mut self) -> Result<(), WriteError> {
        if self.part.is_empty() {
            return Ok(());
        }
        let bytes = encode_part(&std::mem::take(&mut self.part));
        let id = ShortId::from(&self.session.domain().chunk_id(&bytes));
        let placed = self.lists.store(&bytes, self.parent_parts.get(&id))?;
        self.session.count_use([&placed]);
        self.parts.push(placed);
        Ok(())
    }
}

struct Resolved {
    entry: FileEntry,
    /// The file's map and the parent's, if it has one.
    map: Option<(FileMap, Option<ParentMap>)>,
}

/// The entry with final places; `None` while a pack it needs is open. Counts its chunks as used once it succeeds.
pub fn resolve_entry(session: &PackSession, file: &PlacedFile) -> Option<FileEntry> {
    resolve(session, file).map(|resolved| resolved.entry)
}

fn resolve(session: &PackSession, file: &PlacedFile) -> Option<Resolved> {
    let entry = |kind| FileEntry { path: file.path.clone(), kind, mode: file.mode, mtime_us: file.mtime_us };
    let PlacedKind::File { size, crc32c, content } = &file.kind else {
        return Some(Resolved { entry: entry(EntryKind::Directory), map: None });
    };
    let whole = |content| entry(EntryKind::File { size: *size, crc32c: *crc32c, content });
    match content {
        PlacedContent::Empty => Some(Resolved { entry: whole(Content::Empty), map: None }),
        PlacedContent::Zero => Some(Resolved { entry: whole(Content::Zero), map: None }),
        PlacedContent::Chunk(placed) => {
            let place = session.resolve(placed)?;
            session.count_use([placed]);
            Some(Resolved { entry: whole(Content::Chunk(place)), map: None })
        }
        PlacedContent::Slots { slot_bytes, slots: placed_slots, overlays: placed_overlays, parent } => {
            let resolved = placed_slots.iter().map(|slot| match slot {
                PlacedSlot::Zero => Some(Slot::Zero),
                PlacedSlot::Chunk(placed) => session.resolve(placed).map(Slot::Chunk),
            });
            let laid = placed_overlays.iter().map(|overlay| {
                let chunk = session.resolve(&overlay.chunk)?;
                Some(Overlay { chunk, pages: overlay.pages.clone() })
            });
            let (slots, overlays) = (resolved.collect::<Option<_>>()?, laid.collect::<Option<_>>()?);
            let map = FileMap { slot_bytes: *slot_bytes, size: *size, slots, overlays, base: None };
            let chunks = placed_slots.iter().filter_map(|slot| match slot {
                PlacedSlot::Zero => None,
                PlacedSlot::Chunk(placed) => Some(placed),
            });
            session.count_use(chunks.chain(placed_overlays.iter().map(|overlay| &overlay.chunk)));
            Some(Resolved { entry: whole(Content::Zero), map: Some((map, parent.clone())) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::DomainKey;
    use crate::ids::BackupId;
    use crate::store::Store;

    fn gigabyte(number: usize, content: PlacedContent) -> PlacedFile {
        let path = Bytes::from(format!("base/1/{number:04}"));
        PlacedFile { path, mode: 0o600, mtime_us: 0, kind: PlacedKind::File { size: 1 << 30, crc32c: None, content } }
    }

    /// A terabyte of which little changed early on would otherwise wait, slot by slot, for the one pack that is open.
    #[tokio::test(flavor = "multi_thread")]
    async fn files_behind_an_open_pack_do_not_wait_for_the_end_of_the_backup() {
        let key = Arc::new(DomainKey::generate().unwrap());
        let cluster = "orders".parse().unwrap();
        let session = PackSession::begin(Store::in_memory(), cluster, BackupId::generate(), key, 3, []);
        let packs = session.clone();
        let (most, count) = tokio::task::spawn_blocking(move || {
            let mut writer = session.writer();
            let mut list = FileListWriter::new(session.clone(), &[]);
            let changed = writer.store(b"changed", None).unwrap();
            list.push(gigabyte(0, PlacedContent::Chunk(changed))).unwrap();
            let mut most = 0;
            for number in 1..=500 {
                writer.store_slot(&[0; 8192], None).unwrap();
                let (slots, overlays) = (vec![PlacedSlot::Zero; 8192], Vec::new());
                let content = PlacedContent::Slots { slot_bytes: 128 << 10, slots, overlays, parent: None };
                list.push(gigabyte(number, content)).unwrap();
                most = most.max(list.waiting_bytes);
            }
            writer.flush().unwrap();
            (most, list.finish().unwrap().1)
        })
        .await
        .unwrap();
        assert_eq!((count, packs.finish().await.unwrap().len()), (501, 3), "packs of content, maps and lists");
        assert!(most > MAX_WAITING_BYTES && most < MAX_WAITING_BYTES * 3 / 2, "{most}");
    }
}
