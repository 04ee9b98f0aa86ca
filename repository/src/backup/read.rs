//! A committed backup, opened for reading: its manifest, its file list, its maps.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use object_store::path::Path;

use crate::crypto::DomainKey;
use crate::format::clear::ObjectKind;
use crate::format::file_map::{ChunkPlace, FileMap, MapError, StoredMap};
use crate::format::manifest::{self, FileEntry, Manifest, ManifestError};
use crate::format::sealed::{self, Header, Opener, SealedError};
use crate::ids::PackId;
use crate::keyring::Keyring;
use crate::store::{Store, StoreError};

/// Packs of metadata kept in memory: maps and lists are read in the order they were written, so two suffice; the others
/// serve maps that are stored over older ones.
const CACHED_PACKS: usize = 5;

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("read {what}: {source}")]
    Store { what: &'static str, source: StoreError },
    #[error("{object}: {source}")]
    Sealed { object: String, source: SealedError },
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("file map: {0}")]
    Map(#[from] MapError),
    #[error("the backup's reference part does not name pack {0}, which its files need")]
    UnknownPack(PackId),
    #[error(
        "{object}: the content is not what its id says\nHINT: the pack is damaged or was sealed on a host with faulty memory; verify the backup."
    )]
    Content { object: String },
}

/// Where the packs of a backup lie.
pub type PackKeys = HashMap<PackId, Path>;

/// Opens packs of one backup as they are needed.
pub struct BackupReader {
    pub manifest: Manifest,
    store: Store,
    keys: Arc<Keyring>,
    packs: Arc<PackKeys>,
    cache: Mutex<VecDeque<Arc<CachedPack>>>,
}

struct CachedPack {
    id: PackId,
    bytes: Bytes,
    opener: Opener,
}

impl BackupReader {
    pub fn new(manifest: Manifest, store: Store, keys: Arc<Keyring>, packs: PackKeys) -> BackupReader {
        BackupReader { manifest, store, keys, packs: Arc::new(packs), cache: Mutex::default() }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn keys(&self) -> &Arc<Keyring> {
        &self.keys
    }

    pub fn packs(&self) -> &Arc<PackKeys> {
        &self.packs
    }

    /// One part of the file list, in order.
    pub async fn file_list_part(&self, place: &ChunkPlace) -> Result<Vec<FileEntry>, ReadError> {
        Ok(manifest::decode_part(&self.metadata(place).await?)?)
    }

    /// A file's map, with what it takes from the one it is stored over.
    pub async fn file_map(&self, place: &ChunkPlace) -> Result<FileMap, ReadError> {
        let stored = StoredMap::decode(&self.metadata(place).await?)?;
        let base = match stored.base()? {
            Some(place) => Some(FileMap::decode(&self.metadata(&place).await?)?),
            None => None,
        };
        Ok(stored.read(base.as_ref())?)
    }

    /// A chunk of metadata, through a small cache of whole packs.
    pub async fn metadata(&self, place: &ChunkPlace) -> Result<Vec<u8>, ReadError> {
        let pack = self.whole_pack(&place.pack).await?;
        let object = || format!("pack {}", place.pack);
        let sealed = |source| ReadError::Sealed { object: object(), source };
        let mut stored = sealed::slice(&pack.bytes, place.frame, ObjectKind::Pack.name()).map_err(sealed)?.to_vec();
        let plain = pack.opener.open(place.frame, &mut stored).map_err(sealed)?;
        if self.keys.newest().chunk_id(&plain).0[..16] != place.id.0 {
            return Err(ReadError::Content { object: object() });
        }
        Ok(plain)
    }

    async fn whole_pack(&self, id: &PackId) -> Result<Arc<CachedPack>, ReadError> {
        let lock = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = lock().iter().find(|pack| pack.id == *id) {
            return Ok(found.clone());
        }
        let key = self.packs.get(id).ok_or(ReadError::UnknownPack(*id))?;
        let bytes = self.store.get(key).await.map_err(|source| ReadError::Store { what: "pack", source })?;
        let opener =
            opener(&bytes, &self.keys).map_err(|source| ReadError::Sealed { object: key.to_string(), source })?;
        let pack = Arc::new(CachedPack { id: *id, bytes, opener });
        let mut cache = lock();
        cache.push_front(pack.clone());
        cache.truncate(CACHED_PACKS);
        Ok(pack)
    }
}

/// What opens the frames of a pack, from its first bytes.
pub(crate) fn opener(header: &[u8], keys: &Keyring) -> Result<Opener, SealedError> {
    let header = Header::parse(header, ObjectKind::Pack)?;
    let domain: &DomainKey = keys
        .version(header.key_version)
        .ok_or(SealedError::KeyVersion { what: ObjectKind::Pack.name(), found: header.key_version })?;
    Opener::new(&header, domain, ObjectKind::Pack, None)
}

/// Walks a parent's file list alongside a scan in the same order.
pub struct ParentFiles {
    reader: Arc<BackupReader>,
    next_part: usize,
    entries: std::vec::IntoIter<FileEntry>,
    peeked: Option<FileEntry>,
}

impl ParentFiles {
    pub fn new(reader: Arc<BackupReader>) -> ParentFiles {
        ParentFiles { reader, next_part: 0, entries: Vec::new().into_iter(), peeked: None }
    }

    /// The parent's entry of this path, if it has one. Paths must be asked for in list order.
    pub async fn find(&mut self, path: &[u8]) -> Result<Option<FileEntry>, ReadError> {
        loop {
            let Some(entry) = self.advance().await? else { return Ok(None) };
            match manifest::path_order(&entry.path, path) {
                std::cmp::Ordering::Less => {}
                std::cmp::Ordering::Equal => return Ok(Some(entry)),
                std::cmp::Ordering::Greater => {
                    self.peeked = Some(entry);
                    return Ok(None);
                }
            }
        }
    }

    async fn advance(&mut self) -> Result<Option<FileEntry>, ReadError> {
        if let Some(entry) = self.peeked.take() {
            return Ok(Some(entry));
        }
        loop {
            if let Some(entry) = self.entries.next() {
                return Ok(Some(entry));
            }
            let Some(place) = self.reader.manifest.file_list.get(self.next_part).copied() else { return Ok(None) };
            self.next_part += 1;
            self.entries = self.reader.file_list_part(&place).await?.into_iter();
        }
    }
}
