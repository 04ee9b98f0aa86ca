//! From placed content to file maps and the file list.
//!
//! Entries come in list order and leave in list order. An entry waits until the packs of its chunks have names; its map
//! is then a chunk in a pack of maps, and the parts of the list lie in packs of their own behind those, since nothing
//! can name a pack that is not finished.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::backup::write::{ChunkWriter, PackSession, Placed, PlacedSlot, WriteError};
use crate::format::file_map::{ChunkPlace, FileMap, ShortId, Slot};
use crate::format::manifest::{Content, EntryKind, FILES_PER_PART, FileEntry, encode_part};

/// Entries that may wait for the open pack of maps before it is finished early: bounds memory with 500,000 relations.
const MAX_WAITING: usize = 32_768;

/// A file or directory whose content has been placed.
pub struct PlacedFile {
    pub path: Bytes,
    pub mode: u32,
    pub mtime_us: i64,
    pub kind: PlacedKind,
}

pub enum PlacedKind {
    Directory,
    File { size: u64, crc32c: u32, content: PlacedContent },
}

pub enum PlacedContent {
    Empty,
    Zero,
    Chunk(Placed),
    Slots {
        slot_bytes: u32,
        slots: Vec<PlacedSlot>,
        /// The parent's map of this file.
        parent: Option<ChunkPlace>,
    },
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
            maps: session.writer(),
            lists: session.writer(),
            session,
            waiting: VecDeque::new(),
            mapped: 0,
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
        self.waiting.push_back(Waiting::Content(file));
        self.advance()?;
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
        let placed = self.maps.store(&map.encode(), parent.as_ref())?;
        self.session.count_use([&placed]);
        Ok(Waiting::Map { entry, map: placed })
    }

    fn append(&mut self, entry: FileEntry) -> Result<(), WriteError> {
        // Parts end where the path says, so that a file more or less changes one part and not all behind it.
        let hash = u32::from_le_bytes(blake3::hash(&entry.path).as_bytes()[..4].try_into().unwrap_or_default());
        self.part.push(entry);
        if hash as usize % FILES_PER_PART == 0 || self.part.len() >= 4 * FILES_PER_PART {
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
    map: Option<(FileMap, Option<ChunkPlace>)>,
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
        PlacedContent::Slots { slot_bytes, slots, parent } => {
            let resolved = slots.iter().map(|slot| match slot {
                PlacedSlot::Zero => Some(Slot::Zero),
                PlacedSlot::Chunk(placed) => session.resolve(placed).map(Slot::Chunk),
            });
            let map = FileMap { slot_bytes: *slot_bytes, size: *size, slots: resolved.collect::<Option<_>>()? };
            session.count_use(slots.iter().filter_map(|slot| match slot {
                PlacedSlot::Zero => None,
                PlacedSlot::Chunk(placed) => Some(placed),
            }));
            Some(Resolved { entry: whole(Content::Zero), map: Some((map, *parent)) })
        }
    }
}
