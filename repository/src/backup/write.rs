//! The write side of a session: chunks in, uploaded packs out.
//!
//! Many threads write at once into a few packs, which are locked to append a chunk and not to compress it. A full pack goes
//! to the uploader; where the store is slow, the threads wait for it, and memory stays bounded ([`memory`]).

mod memory;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use object_store::path::Path;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tracing::Instrument;

use self::memory::{FULL_PACKS, Gate, Inside, OPEN_PACKS, WritePlan};
use crate::crypto::DomainKey;
use crate::format::file_map::{ChunkPlace, ShortId};
use crate::format::pack::{FinishedPack, METADATA_PACK_TARGET_BYTES, PACK_TARGET_BYTES, PackWriter};
use crate::format::sealed::{Compressor, FramePlace, SealedError};
use crate::ids::{BackupId, ClusterName, PackId};
use crate::layout;
use crate::store::{Stopped, Store, StoreError};

/// Packs being uploaded at once: enough to keep a store with latency busy, each costs 32 MiB of memory.
const UPLOADS_IN_FLIGHT: usize = 2;

#[derive(Debug, Clone, thiserror::Error)]
pub enum WriteError {
    #[error("store pack: {0}")]
    Store(Arc<StoreError>),
    #[error("seal pack: {0}")]
    Seal(#[from] SealedError),
    #[error("the uploads of this backup have ended")]
    Closed,
    #[error("chunk refers to a pack that was never finished")]
    UnfinishedPack,
    #[error("a parent's file does not read: {0}")]
    Parent(String),
    #[error("cancelled")]
    Stopped,
}

/// A pack by its number in this session, since a pack has no id before it is finished.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PackNumber(u32);

/// A chunk that has its place, though its pack may not have its name yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placed {
    pub pack: PackNumber,
    pub frame: FramePlace,
    pub id: ShortId,
}

/// What became of a slot's content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlacedSlot {
    /// All zero; nothing was stored.
    Zero,
    Chunk(Placed),
}

/// The session that a pack lies under.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PackHome {
    /// `None`: a session of the backup's own cluster. Otherwise of the one it was borrowed from.
    pub cluster: Option<ClusterName>,
    pub session: BackupId,
}

/// A pack that a parent brings along.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParentPack {
    pub pack: PackId,
    /// Where it lies.
    pub home: PackHome,
    pub stored_bytes: u64,
}

/// One pack that the finished backup needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UsedPack {
    pub pack: PackId,
    /// Where it lies.
    pub home: PackHome,
    pub stored_bytes: u64,
    pub used_bytes: u64,
}

struct PackRow {
    id: Option<PackId>,
    home: PackHome,
    stored_bytes: u64,
    used_bytes: u64,
}

#[derive(Default)]
struct PackRows {
    rows: Vec<PackRow>,
    parents: HashMap<PackId, PackNumber>,
}

/// What all writing threads of a session share.
pub struct PackSession {
    domain: Arc<DomainKey>,
    home: PackHome,
    level: i32,
    packs: Mutex<PackRows>,
    parent_packs: HashMap<PackId, (PackHome, u64)>,
    uploads: Mutex<Option<mpsc::Sender<FullPack>>>,
    /// Packs that are full and not stored yet are inside.
    full: Arc<Gate>,
    uploader: Mutex<Option<JoinHandle<()>>>,
    failure: Arc<OnceLock<WriteError>>,
    new_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    new_packs: AtomicU64,
    /// How often open packs were asked to be finished early.
    asked: AtomicU64,
}

/// On its way to the store, and counted until it is there.
struct FullPack {
    pack: FinishedPack,
    _counted: Inside,
}

impl PackSession {
    /// Starts the session's uploader; must be called within a tokio runtime.
    pub fn begin(
        store: Store,
        cluster: ClusterName,
        session: BackupId,
        domain: Arc<DomainKey>,
        level: i32,
        parents: impl IntoIterator<Item = ParentPack>,
    ) -> Arc<PackSession> {
        // Never full: packs are counted before they are sent.
        let (sender, receiver) = mpsc::channel(FULL_PACKS);
        let failure = Arc::new(OnceLock::new());
        let upload = upload_all(store, cluster, session.clone(), receiver, failure.clone());
        let uploader = tokio::spawn(upload.in_current_span());
        Arc::new(PackSession {
            domain,
            home: PackHome { cluster: None, session },
            level,
            packs: Mutex::default(),
            parent_packs: parents.into_iter().map(|p| (p.pack, (p.home, p.stored_bytes))).collect(),
            uploads: Mutex::new(Some(sender)),
            full: Gate::new(FULL_PACKS),
            uploader: Mutex::new(Some(uploader)),
            failure,
            new_bytes: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
            new_packs: AtomicU64::new(0),
            asked: AtomicU64::new(0),
        })
    }

    /// Writers for so many threads, or for as many as there is memory for.
    pub fn writers(self: &Arc<Self>, threads: usize) -> Vec<ChunkWriter> {
        let plan = WritePlan::new(threads, self.level);
        let open: Vec<Arc<Mutex<OpenPack>>> = (0..plan.threads.min(OPEN_PACKS)).map(|_| Arc::default()).collect();
        let shared = open.iter().cycle().take(plan.threads).cloned();
        shared.map(|open| self.writer_into(open, plan.pack_bytes, Kind::Content)).collect()
    }

    /// A writer with a pack of its own.
    pub fn writer(self: &Arc<Self>) -> ChunkWriter {
        self.writer_into(Arc::default(), PACK_TARGET_BYTES, Kind::Content)
    }

    /// A writer for maps or lists, into packs of their own.
    pub(crate) fn metadata_writer(self: &Arc<Self>) -> ChunkWriter {
        self.writer_into(Arc::default(), METADATA_PACK_TARGET_BYTES, Kind::Metadata)
    }

    fn writer_into(self: &Arc<Self>, open: Arc<Mutex<OpenPack>>, target: usize, kind: Kind) -> ChunkWriter {
        let answered = self.asked.load(Ordering::Relaxed);
        let mut pack = open.lock().unwrap_or_else(PoisonError::into_inner);
        (pack.writers, pack.answered) = (pack.writers + 1, answered);
        drop(pack);
        let zstd = Compressor::new(self.level);
        ChunkWriter { session: self.clone(), zstd, open, target, kind, answered, is_flushed: false }
    }

    /// Lets every writer of content finish its open pack before its next chunk, because too much waits for its name.
    pub(crate) fn ask_for_names(&self) {
        self.asked.fetch_add(1, Ordering::Relaxed);
    }

    pub fn domain(&self) -> &DomainKey {
        &self.domain
    }

    /// Plain bytes no parent had, bytes of new packs, and how many packs.
    pub fn written(&self) -> (u64, u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.new_bytes), read(&self.stored_bytes), read(&self.new_packs))
    }

    /// Grows whenever a pack gets its name.
    pub(crate) fn finished_packs(&self) -> u64 {
        self.new_packs.load(Ordering::Relaxed)
    }

    /// The first failure of an upload, if there was one.
    pub fn failure(&self) -> Option<WriteError> {
        self.failure.get().cloned()
    }

    fn rows(&self) -> std::sync::MutexGuard<'_, PackRows> {
        self.packs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_pack(&self) -> PackNumber {
        let mut packs = self.rows();
        packs.rows.push(PackRow { id: None, home: self.home.clone(), stored_bytes: 0, used_bytes: 0 });
        PackNumber((packs.rows.len() - 1) as u32)
    }

    /// The number of a parent's pack; `None` if no parent has it, so that it may not be referred to.
    fn parent_pack(&self, pack: &PackId) -> Option<PackNumber> {
        let mut packs = self.rows();
        if let Some(number) = packs.parents.get(pack) {
            return Some(*number);
        }
        let (home, stored_bytes) = self.parent_packs.get(pack)?.clone();
        packs.rows.push(PackRow { id: Some(*pack), home, stored_bytes, used_bytes: 0 });
        let number = PackNumber((packs.rows.len() - 1) as u32);
        packs.parents.insert(*pack, number);
        Some(number)
    }

    /// A parent's chunk as this session refers to it; `None` if its pack is not a parent's.
    pub fn adopt(&self, place: &ChunkPlace) -> Option<Placed> {
        self.parent_pack(&place.pack).map(|pack| Placed { pack, frame: place.frame, id: place.id })
    }

    /// Whether this is the content of the chunk that lies there.
    pub fn is_content_of(&self, place: &ChunkPlace, plain: &[u8]) -> bool {
        place.id == ShortId::from(&self.domain.chunk_id(plain))
    }

    /// The chunk's final place; `None` while its pack is still open.
    pub fn resolve(&self, placed: &Placed) -> Option<ChunkPlace> {
        let pack = self.rows().rows.get(placed.pack.0 as usize)?.id?;
        Some(ChunkPlace { pack, frame: placed.frame, id: placed.id })
    }

    /// Notes that the backup needs these frames.
    pub fn count_use<'a>(&self, placed: impl IntoIterator<Item = &'a Placed>) {
        let mut packs = self.rows();
        for chunk in placed {
            if let Some(row) = packs.rows.get_mut(chunk.pack.0 as usize) {
                row.used_bytes += u64::from(chunk.frame.stored_len);
            }
        }
    }

    fn upload(&self, number: PackNumber, pack: FinishedPack, counted: Inside) -> Result<(), WriteError> {
        let bytes = pack.bytes.len() as u64;
        if let Some(row) = self.rows().rows.get_mut(number.0 as usize) {
            row.id = Some(pack.id);
            row.stored_bytes = bytes;
        }
        self.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.new_packs.fetch_add(1, Ordering::Relaxed);
        let sender = self.uploads.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let full = FullPack { pack, _counted: counted };
        let sent = sender.ok_or(WriteError::Closed).and_then(|s| s.blocking_send(full).map_err(|_| WriteError::Closed));
        sent.map_err(|closed| self.failure().unwrap_or(closed))
    }

    /// Waits until every pack is durable. All writers must have been flushed.
    pub async fn finish(&self) -> Result<Vec<UsedPack>, WriteError> {
        drop(self.uploads.lock().unwrap_or_else(PoisonError::into_inner).take());
        let uploader = self.uploader.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(uploader) = uploader {
            uploader.await.map_err(|_| self.failure().unwrap_or(WriteError::Closed))?;
        }
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let packs = self.rows();
        let used = packs.rows.iter().filter(|row| row.used_bytes > 0);
        used.map(|row| {
            Ok(UsedPack {
                pack: row.id.ok_or(WriteError::UnfinishedPack)?,
                home: row.home.clone(),
                stored_bytes: row.stored_bytes,
                used_bytes: row.used_bytes,
            })
        })
        .collect()
    }
}

/// Uploads packs as they come, a few at once, until the channel closes or one fails.
async fn upload_all(
    store: Store,
    cluster: ClusterName,
    session: BackupId,
    mut packs: mpsc::Receiver<FullPack>,
    failure: Arc<OnceLock<WriteError>>,
) {
    let slots = Arc::new(Semaphore::new(UPLOADS_IN_FLIGHT));
    let mut uploads = tokio::task::JoinSet::new();
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { break };
        if failure.get().is_some() {
            break;
        }
        let Some(full) = packs.recv().await else { break };
        let (store, failure) = (store.clone(), failure.clone());
        let key = layout::pack(&cluster, &session, full.pack.id);
        let upload = async move {
            let FullPack { pack, _counted } = full;
            if let Err(error) = upload_one(&store, &key, pack.bytes).await {
                let _ = failure.set(error);
            }
            drop(slot);
        };
        uploads.spawn(upload.in_current_span());
    }
    while uploads.join_next().await.is_some() {}
}

async fn upload_one(store: &Store, key: &Path, bytes: Bytes) -> Result<(), WriteError> {
    if let Some(pace) = store.pace() {
        pace.upload(bytes.len() as u64).await.map_err(|Stopped| WriteError::Stopped)?;
    }
    store.put_new(key, bytes).await.map_err(|error| WriteError::Store(Arc::new(error)))
}

/// A pack that is being filled.
#[derive(Default)]
struct OpenPack {
    pack: Option<(PackNumber, PackWriter)>,
    /// Those who share it and have not flushed what they wrote.
    writers: usize,
    /// The last [`PackSession::ask_for_names`] that was answered.
    answered: u64,
}

/// What a writer's chunks are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Content,
    /// Nobody waits for the names of its packs.
    Metadata,
}

/// Writes chunks into packs; one per thread. Dropping it unflushed loses its open pack, which nothing refers to then.
pub struct ChunkWriter {
    session: Arc<PackSession>,
    zstd: Compressor,
    open: Arc<Mutex<OpenPack>>,
    /// Stored bytes at which a pack is full.
    target: usize,
    kind: Kind,
    answered: u64,
    is_flushed: bool,
}

impl ChunkWriter {
    /// Places a slot: as zero, as the parent's chunk if that is the same, or as a new chunk. Blocks while the store is
    /// behind.
    pub fn store_slot(&mut self, plain: &[u8], parent: Option<&ChunkPlace>) -> Result<PlacedSlot, WriteError> {
        if is_zero(plain) {
            self.answer()?;
            return Ok(PlacedSlot::Zero);
        }
        self.store(plain, parent).map(PlacedSlot::Chunk)
    }

    fn answer(&mut self) -> Result<(), WriteError> {
        let asked = self.session.asked.load(Ordering::Relaxed);
        if self.kind == Kind::Metadata || self.answered == asked {
            return Ok(());
        }
        self.answered = asked;
        let mut open = lock(&self.open);
        // One answers for all who share the pack.
        if std::mem::replace(&mut open.answered, asked) == asked {
            return Ok(());
        }
        finish(&self.session, &mut self.zstd, open)
    }

    /// Places content that is kept even if it is all zero.
    pub fn store(&mut self, plain: &[u8], parent: Option<&ChunkPlace>) -> Result<Placed, WriteError> {
        self.answer()?;
        let chunk = self.session.domain.chunk_id(plain);
        let id = ShortId::from(&chunk);
        let same = parent.filter(|place| place.id == id && place.frame.raw_len as usize == plain.len());
        if let Some(placed) = same.and_then(|place| self.session.adopt(place)) {
            return Ok(placed);
        }
        let packed = self.zstd.pack(plain);
        let mut open = lock(&self.open);
        if std::mem::take(&mut self.is_flushed) {
            open.writers += 1;
        }
        let (number, writer) = match &mut open.pack {
            Some(open) => open,
            None => {
                let writer = PackWriter::new(&self.session.domain, self.target)?;
                open.pack.insert((self.session.open_pack(), writer))
            }
        };
        let placed = Placed { pack: *number, frame: writer.add(&chunk, packed)?, id };
        self.session.new_bytes.fetch_add(plain.len() as u64, Ordering::Relaxed);
        if writer.stored_bytes() >= self.target {
            finish(&self.session, &mut self.zstd, open)?;
        }
        Ok(placed)
    }

    /// The last of those who share the open pack finishes it, so that all chunks placed so far have their names.
    pub fn flush(&mut self) -> Result<(), WriteError> {
        let mut open = lock(&self.open);
        if !std::mem::replace(&mut self.is_flushed, true) {
            open.writers = open.writers.saturating_sub(1);
        }
        if open.writers > 0 {
            return Ok(());
        }
        finish(&self.session, &mut self.zstd, open)
    }
}

fn lock(open: &Mutex<OpenPack>) -> MutexGuard<'_, OpenPack> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Finishes the open pack and sends it on. Whoever shares it waits for room among the full ones, too, and for no more:
/// hashing goes on beside.
fn finish(session: &PackSession, zstd: &mut Compressor, mut open: MutexGuard<'_, OpenPack>) -> Result<(), WriteError> {
    if open.pack.as_ref().is_none_or(|(_, writer)| writer.is_empty()) {
        return Ok(());
    }
    let counted = session.full.enter();
    let Some((number, writer)) = open.pack.take() else { return Ok(()) };
    drop(open);
    let pack = writer.finish(zstd)?;
    session.upload(number, pack, counted)
}

/// Whether all bytes are zero; compares 64 bytes at a time, which the compiler vectorises.
pub fn is_zero(bytes: &[u8]) -> bool {
    let blocks = bytes.chunks_exact(64);
    blocks.remainder().iter().all(|b| *b == 0)
        && bytes.chunks_exact(64).all(|block| block.iter().fold(0, |acc, b| acc | b) == 0)
}
