//! A segment on its way into the archive, and out of it.

use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;

use super::{ArchiveError, WalArchive, domain_for};
use crate::format::clear::ObjectKind;
use crate::format::wal_segment::{
    self, SegmentDirectory, SegmentError, SegmentFacts, SegmentSealer, SegmentUpload, UnpackError, WalLevelChange,
};
use crate::ids::ChunkId;
use crate::keyring::Keyring;
use crate::postgres::{Segment, SegmentSize, WalBranch};

/// A segment that is sealed while it comes.
pub struct ComingSegment {
    pub(super) archive: WalArchive,
    /// Where it was begun for.
    pub(super) wal: WalBranch,
    pub(super) key: Path,
    pub(super) sealer: SegmentSealer,
}

impl ComingSegment {
    /// Up to where content was sealed.
    pub fn sealed(&self) -> usize {
        self.sealer.sealed()
    }

    /// Seals what is whole of this beginning of the segment, which is all valid.
    pub fn push(&mut self, valid: &[u8]) -> Result<(), ArchiveError> {
        let sealed = self.archive.with_compressor(|zstd| self.sealer.push(valid, zstd));
        sealed.map_err(|source| ArchiveError::Segment { key: self.key.to_string(), source })
    }

    /// Seals the rest. The upload is for the branch that it was begun for.
    pub fn finish(self, upload: &OwnedSegment) -> Result<SealedSegment, ArchiveError> {
        let ComingSegment { archive, wal, key, sealer } = self;
        if upload.wal != wal {
            return Err(ArchiveError::Segment { key: key.to_string(), source: SegmentError::Content });
        }
        let finished = archive.with_compressor(|zstd| sealer.finish(&upload.borrow(), archive.keys.newest(), zstd));
        match finished {
            Ok((bytes, directory)) => {
                Ok(SealedSegment { key, bytes, directory, levels: upload.facts.wal_levels.clone() })
            }
            Err(source) => Err(ArchiveError::Segment { key: key.to_string(), source }),
        }
    }
}

/// A segment as it lies in the archive.
pub struct FetchedSegment {
    pub(super) bytes: Bytes,
    pub(super) key: Path,
    pub(super) keys: Arc<Keyring>,
    pub(super) wal: WalBranch,
    pub(super) segment: Segment,
}

impl FetchedSegment {
    /// Unpacks it piece by piece, padded with zeros to its size. What was sunk counts only if this succeeds.
    pub fn unpack(&self, sink: impl FnMut(&[u8]) -> std::io::Result<()>) -> Result<SegmentDirectory, ArchiveError> {
        let domain = domain_for(&self.bytes, &self.keys, ObjectKind::Segment);
        let unpacked = domain.map_err(UnpackError::from).and_then(|domain| {
            wal_segment::unpack_segment(&self.bytes, domain, self.key.as_ref(), (self.wal, self.segment), sink)
        });
        unpacked.map_err(|error| match error {
            UnpackError::Segment(source) => ArchiveError::Segment { key: self.key.to_string(), source },
            UnpackError::Sink(source) => ArchiveError::Unpack { key: self.key.to_string(), source },
        })
    }
}

/// A segment as it is to lie in the archive.
pub struct SealedSegment {
    pub(super) key: Path,
    pub(super) bytes: Bytes,
    pub(super) directory: SegmentDirectory,
    pub(super) levels: Vec<WalLevelChange>,
}

impl SealedSegment {
    pub fn segment(&self) -> Segment {
        self.directory.segment
    }

    /// Of its valid bytes.
    pub fn content_id(&self) -> ChunkId {
        self.directory.content_id
    }

    /// Whether what lies there under its name is this segment.
    pub(super) fn agrees_with(&self, existing: SegmentDirectory) -> Result<(), ArchiveError> {
        let directory = &self.directory;
        if existing.content_id == directory.content_id && existing.valid_bytes == directory.valid_bytes {
            return Ok(());
        }
        let name = directory.segment.file_name(directory.segment_size);
        Err(ArchiveError::Diverged { name, stored_by: existing.member, content: directory.content_id })
    }

    /// Bytes that it takes in the store.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// A segment on its way into the archive, owning its content.
pub struct OwnedSegment {
    pub wal: WalBranch,
    pub segment: Segment,
    pub segment_size: SegmentSize,
    pub content: Vec<u8>,
    pub facts: SegmentFacts,
    pub predecessor: Option<ChunkId>,
    pub member: String,
    pub shipped_at_us: i64,
}

impl OwnedSegment {
    pub(super) fn borrow(&self) -> SegmentUpload<'_> {
        SegmentUpload {
            wal: self.wal,
            segment: self.segment,
            segment_size: self.segment_size,
            content: &self.content,
            facts: &self.facts,
            predecessor: self.predecessor,
            member: &self.member,
            shipped_at_us: self.shipped_at_us,
        }
    }
}
