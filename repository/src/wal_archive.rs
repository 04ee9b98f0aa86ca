//! The WAL archive of one cluster: segments and histories in, whole segments and what is known of them out.
//!
//! A segment is created once. Whoever finds it there already compares by content: the same records are the same segment,
//! however its stale tail differs; other records under the same name are never taken for it and never overwritten.

pub(crate) mod damage;
mod divergence;
mod histories;
mod keyless;
mod known;
mod levels;
mod reseal;
mod segments;
mod sidecars;
mod tails;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use object_store::path::Path;

use crate::crypto::ContentHasher;
use crate::format::clear::ObjectKind;
use crate::format::sealed::{Compressor, Effort, Header, SMALLEST, SealedError};
use crate::format::wal_segment::{self, SegmentDirectory, SegmentError, SegmentSealer};
use crate::format::wal_tail::TailDirectory;
use crate::ids::{ChunkId, ClusterName};
use crate::keyring::Keyring;
use crate::layout::{self, GapNoteName, WalLevelName, WalObject};
use crate::postgres::{Branch, HistoryError, Segment, SegmentSize, SystemId, Timeline, WalBranch};
use crate::store::{Creation, Store, StoreError, StoreErrorKind};

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("wal archive: {0}")]
    Store(#[from] StoreError),
    #[error("{key}: {source}")]
    Segment { key: String, source: SegmentError },
    #[error(
        "{name} is already in the repository with other content: {stored_by} shipped records that differ from these\nHINT: two servers write the same timeline of one cluster; find out which is the primary before you go on. Nothing was overwritten."
    )]
    Diverged {
        name: String,
        stored_by: String,
        /// Of what was to be stored.
        content: ChunkId,
    },
    #[error("unpack {key}: {source}")]
    Unpack { key: String, source: std::io::Error },
    #[error("history of timeline {timeline}: {source}")]
    History { timeline: Timeline, source: HistoryError },
    #[error(
        "timeline {timeline} has {count} branches in the repository\nHINT: two promotions took the same number; say which one by its branch."
    )]
    Ambiguous { timeline: Timeline, count: usize },
}

impl ArchiveError {
    pub fn is_not_found(&self) -> bool {
        matches!(self, ArchiveError::Store(error) if error.is_not_found())
    }

    pub fn is_retryable(&self) -> bool {
        matches!(self, ArchiveError::Store(error) if error.is_retryable())
    }

    /// Whether the store gave an object that is not what its name says: damaged, cut short, or somebody else's making.
    pub fn is_damage(&self) -> bool {
        matches!(self, ArchiveError::Segment { .. } | ArchiveError::History { .. })
    }
}

pub use divergence::Strays;
pub use keyless::{Continuity, KeylessTails, TailPlace};
pub use levels::{LevelNote, ended_by};
pub use segments::{ComingSegment, FetchedSegment, OwnedSegment, SealedSegment};
pub use tails::{Beginning, BeginningFacts, Mark, OwnedTail, Unfinished};

/// How a segment came to lie in the archive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Archived {
    Stored {
        stored_bytes: u64,
    },
    /// The same records were there already.
    AlreadyThere,
}

/// What is stored beside a segment's content has less, and a history file too.
const NOTES_BYTES: u64 = 16 << 20;

/// Buffers of sealed segments that are kept.
const BUFFERS: usize = 4;

/// One timeline branch's segments.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BranchListing {
    /// Ascending.
    pub segments: Vec<Segment>,
    pub has_history: bool,
    pub stored_bytes: u64,
    /// Of those, the segments'.
    pub segment_bytes: u64,
    /// What is known of gaps in it.
    pub notes: Vec<GapNoteName>,
    pub levels: Vec<WalLevelName>,
    /// Objects under a segment's name that are too small to be one: it is not among them.
    pub cut_short: Vec<Path>,
}

/// The archive of one cluster. Cheap to clone.
#[derive(Clone)]
pub struct WalArchive {
    store: Store,
    cluster: ClusterName,
    keys: Arc<Keyring>,
    effort: Effort,
    /// Compressors that are not in use, kept since making one costs more than using it.
    compressors: Arc<Mutex<Vec<Compressor>>>,
    /// What sealed segments were in.
    buffers: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Of pieces.
    directories: Arc<Mutex<HashMap<Path, Arc<TailDirectory>>>>,
    level_notes: Arc<Mutex<HashMap<WalLevelName, LevelNote>>>,
    known: Arc<known::Known>,
    /// What was said to be damaged.
    damaged: Arc<Mutex<BTreeSet<String>>>,
}

impl WalArchive {
    pub fn new(store: Store, cluster: ClusterName, keys: Arc<Keyring>, level: i32) -> WalArchive {
        let effort = Effort::Level(level);
        WalArchive {
            store,
            cluster,
            keys,
            effort,
            compressors: Arc::default(),
            buffers: Arc::default(),
            directories: Arc::default(),
            level_notes: Arc::default(),
            known: Arc::default(),
            damaged: Arc::default(),
        }
    }

    /// The same archive, compressing with another effort, if that is less.
    pub fn with_less(&self, effort: Effort) -> WalArchive {
        let is_less = effort.level() < self.effort.level() || effort == Effort::Least && self.effort.level() == 1;
        match is_less {
            true => WalArchive { effort, compressors: Arc::default(), ..self.clone() },
            false => self.clone(),
        }
    }

    /// The same archive for pieces, after so many times in vain: see [`Store::hurried`].
    #[must_use]
    pub fn hurried(&self, tries: u32) -> WalArchive {
        WalArchive { store: self.store.hurried(tries), ..self.clone() }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// The id of a segment's valid bytes, by which two writers of the same segment compare.
    pub fn id_of(&self, valid: &[u8]) -> ChunkId {
        self.keys.newest().chunk_id(valid)
    }

    /// The same id of bytes that come in portions.
    pub fn content_hasher(&self) -> ContentHasher {
        self.keys.newest().content_hasher()
    }

    /// Seals and stores a segment; returns once it is durable. Sealing runs on the calling task's blocking pool.
    pub async fn put_segment(&self, upload: impl Into<Arc<OwnedSegment>>) -> Result<Archived, ArchiveError> {
        let sealed = self.seal_segment(upload).await?;
        self.store_segment(&sealed).await
    }

    /// What is to be stored of a segment: its content need not be kept for it.
    pub async fn seal_segment(&self, upload: impl Into<Arc<OwnedSegment>>) -> Result<SealedSegment, ArchiveError> {
        let upload = upload.into();
        let key = layout::wal_segment(&self.cluster, &upload.wal, upload.segment, upload.segment_size);
        let levels = upload.facts.wal_levels.clone();
        let (bytes, directory) = self.sealed(upload, &key).await?;
        Ok(SealedSegment { key, bytes, directory, levels })
    }

    /// Seals a segment while it comes; [`ComingSegment::finish`] ends it. Work of some milliseconds a call.
    pub fn begin_segment(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<ComingSegment, ArchiveError> {
        let key = layout::wal_segment(&self.cluster, &wal, segment, size);
        let buffer = self.buffers().pop().unwrap_or_else(|| Vec::with_capacity(size.bytes() as usize / 4));
        let sealer = SegmentSealer::begin(self.keys.newest(), key.as_ref(), buffer);
        match sealer {
            Ok(sealer) => Ok(ComingSegment { archive: self.clone(), wal, key, sealer }),
            Err(source) => Err(ArchiveError::Segment { key: key.to_string(), source }),
        }
    }

    /// Takes the memory of a segment that is stored, for the next that is sealed: fresh memory costs as much as what is
    /// written into it.
    pub fn reuse(&self, sealed: SealedSegment) {
        // While a request that was given up has part of it, it is not free.
        if sealed.bytes.is_unique() {
            let mut buffers = self.buffers();
            if buffers.len() < BUFFERS {
                buffers.push(Vec::from(sealed.bytes));
            }
        }
    }

    /// Gives back what was kept by [`WalArchive::reuse`].
    pub fn reuse_nothing(&self) {
        self.buffers().clear();
    }

    fn buffers(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores it; returns once it is durable.
    pub async fn store_segment(&self, sealed: &SealedSegment) -> Result<Archived, ArchiveError> {
        let directory = &sealed.directory;
        self.note_levels_of(sealed).await?;
        if self.store.create(&sealed.key, sealed.bytes.clone()).await? == Creation::Created {
            return Ok(Archived::Stored { stored_bytes: sealed.len() });
        }
        let existing = self.directory(directory.wal, directory.segment, directory.segment_size).await;
        let existing = match existing {
            Err(error) if error.is_damage() => {
                self.readable::<()>(Err(error))?;
                return self.store_beside(sealed).await;
            }
            existing => existing?,
        };
        sealed.agrees_with(existing)?;
        Ok(Archived::AlreadyThere)
    }

    /// Stores the unfinished last segment of a timeline (`.partial`). Each promotion off the timeline may leave another,
    /// so they are told apart by content and never stand in each other's way.
    pub async fn put_partial(&self, upload: OwnedSegment) -> Result<Archived, ArchiveError> {
        let valid = upload.content.get(..upload.facts.valid_bytes as usize).unwrap_or_default();
        let content = self.id_of(valid);
        let key = layout::wal_partial(&self.cluster, &upload.wal, upload.segment, upload.segment_size, content);
        let (bytes, _) = self.sealed(Arc::new(upload), &key).await?;
        let stored_bytes = bytes.len() as u64;
        Ok(match self.store.create(&key, bytes).await? {
            Creation::Created => Archived::Stored { stored_bytes },
            Creation::AlreadyThere => Archived::AlreadyThere,
        })
    }

    async fn sealed(&self, upload: Arc<OwnedSegment>, key: &Path) -> Result<(Bytes, SegmentDirectory), ArchiveError> {
        let (archive, name) = (self.clone(), key.to_string());
        let sealed = tokio::task::spawn_blocking(move || archive.seal(&upload, &name)).await;
        let sealed = sealed.unwrap_or(Err(SegmentError::Content));
        sealed.map_err(|source| ArchiveError::Segment { key: key.to_string(), source })
    }

    fn seal(&self, upload: &OwnedSegment, key: &str) -> Result<(Bytes, SegmentDirectory), SegmentError> {
        let buffer = self.buffers().pop().unwrap_or_default();
        self.with_compressor(|zstd| upload.borrow().seal(self.keys.newest(), key, zstd, buffer))
    }

    fn with_compressor<T>(&self, act: impl FnOnce(&mut Compressor) -> T) -> T {
        let pool = || self.compressors.lock().unwrap_or_else(PoisonError::into_inner);
        let reused = pool().pop();
        let mut zstd = reused.unwrap_or_else(|| Compressor::of(self.effort));
        let done = act(&mut zstd);
        pool().push(zstd);
        done
    }

    /// The whole segment, padded with zeros to its size; `None` if the archive does not hold it.
    pub async fn get_segment(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<Option<(SegmentDirectory, Vec<u8>)>, ArchiveError> {
        self.read_segment(&layout::wal_segment(&self.cluster, &wal, segment, size), wal, (segment, size)).await
    }

    /// Whether an object lies under a whole segment's name.
    pub async fn has_segment(&self, wal: WalBranch, segment: Segment, size: SegmentSize) -> Result<bool, ArchiveError> {
        Ok(self.store.exists(&layout::wal_segment(&self.cluster, &wal, segment, size)).await?)
    }

    /// What was seen of a segment is there for good from now on: in a folder, its writer may have died before that was so.
    pub async fn make_durable(&self, wal: WalBranch, segment: Segment, size: SegmentSize) -> Result<(), ArchiveError> {
        Ok(self.store.make_durable(&layout::wal_segment(&self.cluster, &wal, segment, size)).await?)
    }

    /// A segment as it lies in the archive, to be unpacked; `None` if the archive does not hold it.
    pub async fn fetch_segment(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<Option<FetchedSegment>, ArchiveError> {
        let key = layout::wal_segment(&self.cluster, &wal, segment, size);
        match self.object(&key, size).await {
            Ok(bytes) => Ok(Some(FetchedSegment { bytes, key, keys: self.keys.clone(), wal, segment })),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The bytes of an object that has a segment's content at most.
    async fn object(&self, key: &Path, size: SegmentSize) -> Result<Bytes, ArchiveError> {
        // What does not compress, and what is noted beside it.
        let most = u64::from(size.bytes()) / 8 * 9 + NOTES_BYTES;
        self.object_at_most(key, most).await
    }

    async fn object_at_most(&self, key: &Path, most: u64) -> Result<Bytes, ArchiveError> {
        self.store.get_at_most(key, most).await.map_err(|error| match error.kind() {
            StoreErrorKind::TooLarge { .. } => ArchiveError::Segment {
                key: key.to_string(),
                source: SegmentError::Directory(error.kind().to_string()),
            },
            _ => error.into(),
        })
    }

    /// The longest of the unfinished copies of a timeline's last segment, padded with zeros; `None` if there is none.
    pub async fn get_partial(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<Option<(SegmentDirectory, Vec<u8>)>, ArchiveError> {
        let mut longest: Option<(SegmentDirectory, Vec<u8>)> = None;
        let listed = self.store.list(&layout::wal_partials(&self.cluster, &wal)).await?;
        for object in listed {
            if layout::parse_wal_partial(&self.cluster, &wal, &object.key, size) != Some(segment) {
                continue;
            }
            let found = self.readable(self.read_segment(&object.key, wal, (segment, size)).await)?.flatten();
            let length = |(directory, _): &(SegmentDirectory, Vec<u8>)| directory.valid_bytes;
            if found.as_ref().map(length) > longest.as_ref().map(length) {
                longest = found;
            }
        }
        Ok(longest)
    }

    async fn read_segment(
        &self,
        key: &Path,
        wal: WalBranch,
        (segment, size): (Segment, SegmentSize),
    ) -> Result<Option<(SegmentDirectory, Vec<u8>)>, ArchiveError> {
        let bytes = match self.object(key, size).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let (keys, name) = (self.keys.clone(), key.to_string());
        let opened = tokio::task::spawn_blocking(move || {
            let domain = domain_for(&bytes, &keys, ObjectKind::Segment)?;
            wal_segment::open_segment(bytes, domain, &name, wal, segment)
        });
        let opened = opened.await.unwrap_or(Err(SegmentError::Content));
        opened.map(Some).map_err(|source| ArchiveError::Segment { key: key.to_string(), source })
    }

    /// Everything the archive holds of one system. What a listing does not show is not proven absent.
    pub async fn list(
        &self,
        system_id: SystemId,
        size: SegmentSize,
    ) -> Result<BTreeMap<WalBranch, BranchListing>, ArchiveError> {
        let mut branches: BTreeMap<WalBranch, BranchListing> = BTreeMap::new();
        for object in self.store.list(&layout::wal_system(&self.cluster, system_id)).await? {
            let Some((wal, found)) = layout::parse_wal_object(&self.cluster, &object.key, size) else {
                if let Some(note) = layout::parse_gap_note(&self.cluster, &object.key) {
                    branches.entry(note.wal).or_default().notes.push(note);
                } else if let Some(level) = layout::parse_wal_level(&self.cluster, &object.key) {
                    branches.entry(level.wal).or_default().levels.push(level);
                }
                continue;
            };
            let listing = branches.entry(wal).or_default();
            listing.stored_bytes += object.size;
            match found {
                WalObject::Segment(_) if object.size < SMALLEST => listing.cut_short.push(object.key),
                WalObject::Segment(segment) => {
                    listing.segments.push(segment);
                    listing.segment_bytes += object.size;
                }
                WalObject::History => listing.has_history = true,
            }
        }
        branches.values_mut().for_each(|listing| listing.segments.sort_unstable());
        Ok(branches)
    }

    /// The branches of a system, without their segments.
    pub async fn branches(&self, system_id: SystemId) -> Result<Vec<WalBranch>, ArchiveError> {
        let level = self.store.list_level(&layout::wal_system(&self.cluster, system_id)).await?;
        Ok(level.folders.iter().filter_map(|folder| layout::parse_wal_branch(&self.cluster, folder)).collect())
    }

    /// The one branch of a timeline; `None` if the archive knows none.
    pub async fn branch_of(&self, system_id: SystemId, timeline: Timeline) -> Result<Option<WalBranch>, ArchiveError> {
        if timeline == Timeline::FIRST {
            return Ok(Some(WalBranch { system_id, timeline, branch: Branch::ROOT }));
        }
        let branches = self.branches(system_id).await?;
        let mut found: Vec<_> = branches.into_iter().filter(|wal| wal.timeline == timeline).collect();
        match found.len() {
            0 | 1 => Ok(found.pop()),
            count => Err(ArchiveError::Ambiguous { timeline, count }),
        }
    }
}

/// The version of the domain key that an object was sealed with.
fn domain_for<'a>(
    bytes: &[u8],
    keys: &'a Keyring,
    kind: ObjectKind,
) -> Result<&'a crate::crypto::DomainKey, SegmentError> {
    let header = Header::parse(bytes, kind)?;
    let missing = SealedError::KeyVersion { what: kind.name(), found: header.key_version };
    keys.version(header.key_version).ok_or(missing.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::DomainKey;
    use crate::format::wal_segment::{CommitPoint, SegmentFacts};
    use crate::postgres::Lsn;

    fn archive(store: &Store) -> WalArchive {
        let keys = Keyring::of(DomainKey::generate().unwrap());
        WalArchive::new(store.clone(), "orders".parse().unwrap(), Arc::new(keys), 3)
    }

    fn segment(fill: u8, stale: u8) -> OwnedSegment {
        let size = SegmentSize::new(1 << 20).unwrap();
        let mut content = vec![fill; 1 << 20];
        content[900_000..].fill(stale);
        let commits =
            (0..5).map(|i| CommitPoint { lsn: Lsn((2 << 20) + i * 100), at_us: i as i64 * 1_000_000 }).collect();
        OwnedSegment {
            wal: WalBranch { system_id: SystemId(5), timeline: Timeline(1), branch: Branch::ROOT },
            segment: Segment { timeline: Timeline(1), number: 2 },
            segment_size: size,
            content,
            facts: SegmentFacts { valid_bytes: 900_000, commits, ..SegmentFacts::default() },
            predecessor: None,
            member: "pg1".into(),
            shipped_at_us: 0,
        }
    }

    #[tokio::test]
    async fn a_segment_is_stored_once_and_another_never_takes_its_name() {
        let archive = archive(&Store::in_memory());
        let (wal, number, size) = (segment(1, 0).wal, segment(1, 0).segment, segment(1, 0).segment_size);
        assert!(matches!(archive.put_segment(segment(1, 7)).await, Ok(Archived::Stored { .. })));
        assert!(matches!(archive.put_segment(segment(1, 9)).await, Ok(Archived::AlreadyThere)), "stale tails differ");
        let diverged = archive.put_segment(segment(2, 7)).await;
        assert!(
            matches!(diverged, Err(ArchiveError::Diverged { ref stored_by, .. }) if stored_by == "pg1"),
            "{diverged:?}"
        );
        let (directory, content) = archive.get_segment(wal, number, size).await.unwrap().unwrap();
        assert_eq!(directory.last_commit.unwrap().at_us, 4_000_000);
        assert!(content[..900_000].iter().all(|b| *b == 1) && content[900_000..].iter().all(|b| *b == 0));
        assert_eq!(archive.get_segment(wal, number.next(), size).await.unwrap(), None);
        assert_eq!(archive.commit_times(wal, number, size).await.unwrap().0.len(), 5);
        let listed = archive.list(SystemId(5), size).await.unwrap();
        assert_eq!(listed[&wal].segments, [number]);
    }

    #[tokio::test]
    async fn unfinished_last_segments_of_two_promotions_lie_side_by_side() {
        let archive = archive(&Store::in_memory());
        let (wal, number, size) = (segment(1, 0).wal, segment(1, 0).segment, segment(1, 0).segment_size);
        let mut shorter = segment(1, 7);
        shorter.facts.valid_bytes = 500_000;
        assert!(matches!(archive.put_partial(shorter).await, Ok(Archived::Stored { .. })));
        assert!(matches!(archive.put_partial(segment(2, 7)).await, Ok(Archived::Stored { .. })));
        assert!(matches!(archive.put_partial(segment(2, 9)).await, Ok(Archived::AlreadyThere)));
        let (directory, content) = archive.get_partial(wal, number, size).await.unwrap().unwrap();
        assert_eq!((directory.valid_bytes, content[0]), (900_000, 2), "the longest");
        assert_eq!(archive.get_partial(wal, number.next(), size).await.unwrap(), None);
        assert_eq!(archive.get_segment(wal, number, size).await.unwrap(), None);
        assert_eq!(archive.list(SystemId(5), size).await.unwrap().len(), 0, "they make no window");
    }

    #[tokio::test]
    async fn a_history_lies_under_the_branch_its_content_makes() {
        let archive = archive(&Store::in_memory());
        let text = b"1\t0/3000000\tno recovery target specified\n";
        let stored = archive.put_history(SystemId(5), Timeline(2), text, None, "pg1", 0).await.unwrap();
        assert!(matches!(stored, Archived::Stored { .. }));
        assert_eq!(
            archive.put_history(SystemId(5), Timeline(2), text, None, "pg2", 1).await.unwrap(),
            Archived::AlreadyThere
        );
        let wal = archive.branch_of(SystemId(5), Timeline(2)).await.unwrap().unwrap();
        assert_eq!(wal.branch, Branch::of_history(text));
        assert_eq!(archive.history(wal).await.unwrap().unwrap(), &text[..]);
        let other = b"1\t0/4000000\tno recovery target specified\n";
        archive.put_history(SystemId(5), Timeline(2), other, None, "pg2", 1).await.unwrap();
        assert!(matches!(archive.branch_of(SystemId(5), Timeline(2)).await, Err(ArchiveError::Ambiguous { .. })));
        assert!(archive.put_history(SystemId(5), Timeline(3), b"rubbish", None, "pg1", 0).await.is_err());
    }
}
