//! What is known of an archived segment without its content: the directory at its end, and the frames beside the content.

use bytes::Bytes;
use object_store::path::Path;

use super::{ArchiveError, NOTES_BYTES, WalArchive};
use crate::format::changed_blocks::{ChangedBlocks, ChangedBlocksError};
use crate::format::clear::ObjectKind;
use crate::format::sealed::{FramePlace, HEADER_LEN, Header, Opener, SealedError, TRAILER_LEN, Trailer};
use crate::format::wal_segment::{self, CommitPoint, RestorePoint, SegmentDirectory, SegmentError};
use crate::layout;
use crate::postgres::{Segment, SegmentSize, WalBranch};
use crate::store::StoreError;

/// Read from the end of a segment object in one request: trailer, directory and nearly always the commit times.
const TAIL_READ_BYTES: u64 = 16 << 10;

/// What lies at the two ends of a sealed object.
pub(super) struct Ends {
    pub directory: Vec<u8>,
    opener: Opener,
    /// The object's last bytes, and where they begin.
    tail: Bytes,
    tail_start: u64,
}

impl Ends {
    fn segment(&self, wal: WalBranch, segment: Segment, key: &Path) -> Result<SegmentDirectory, ArchiveError> {
        SegmentDirectory::decode(&self.directory, wal, segment)
            .map_err(|source| ArchiveError::Segment { key: key.to_string(), source })
    }
}

impl WalArchive {
    /// What is known of a segment without reading its content.
    pub async fn directory(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<SegmentDirectory, ArchiveError> {
        let key = layout::wal_segment(&self.cluster, &wal, segment, size);
        let ends = self.ends(&key, ObjectKind::Segment).await?;
        ends.segment(wal, segment, &key)
    }

    /// The commits and restore points that end in a segment.
    pub async fn commit_times(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<(Vec<CommitPoint>, Vec<RestorePoint>), ArchiveError> {
        match self.commit_times_of_whole(wal, segment, size).await {
            // Not finished yet, or what lies there does not read; but perhaps there are pieces.
            Err(error) if error.is_not_found() || error.is_damage() => {
                match self.beginning_without(wal, segment, size, &self.strays(wal).await?).await? {
                    Some(beginning) => Ok((beginning.commits, beginning.restore_points)),
                    None => Err(error),
                }
            }
            read => read,
        }
    }

    async fn commit_times_of_whole(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<(Vec<CommitPoint>, Vec<RestorePoint>), ArchiveError> {
        let key = layout::wal_segment(&self.cluster, &wal, segment, size);
        let ends = self.ends(&key, ObjectKind::Segment).await?;
        let Some(frame) = ends.segment(wal, segment, &key)?.commit_times else { return Ok((Vec::new(), Vec::new())) };
        let plain = self.sidecar(&key, frame, &ends).await?;
        wal_segment::decode_commit_times(segment.start(size), &plain)
            .map_err(|source| ArchiveError::Segment { key: key.to_string(), source })
    }

    /// The pages that a segment changes; `None`: its writer did not know, or told by other rules.
    pub async fn changed_blocks(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<Option<ChangedBlocks>, ArchiveError> {
        let key = layout::wal_segment(&self.cluster, &wal, segment, size);
        let ends = self.ends(&key, ObjectKind::Segment).await?;
        let Some(frame) = ends.segment(wal, segment, &key)?.changed_blocks else { return Ok(None) };
        let plain = self.sidecar(&key, frame, &ends).await?;
        match ChangedBlocks::decode(&plain) {
            Ok(changes) => Ok(Some(changes)),
            Err(ChangedBlocksError::Rules(_)) => Ok(None),
            Err(error) => Err(ArchiveError::Segment { key: key.to_string(), source: error.into() }),
        }
    }

    /// A frame behind the content: from the object's end, which was read already, or by a request of its own.
    async fn sidecar(&self, key: &Path, frame: FramePlace, ends: &Ends) -> Result<Vec<u8>, ArchiveError> {
        let start = u64::from(frame.offset).checked_sub(ends.tail_start);
        let cached = start.and_then(|start| ends.tail.get(start as usize..start as usize + frame.stored_len as usize));
        let mut stored = match cached {
            Some(bytes) => bytes.to_vec(),
            None => self.store.get_range(key, u64::from(frame.offset)..frame.end()).await?.to_vec(),
        };
        let opened = ends.opener.open(frame, &mut stored);
        opened.map_err(|source| ArchiveError::Segment { key: key.to_string(), source: source.into() })
    }

    /// Header and directory by two small reads.
    pub(super) async fn ends(&self, key: &Path, kind: ObjectKind) -> Result<Ends, ArchiveError> {
        let named = |source: SegmentError| ArchiveError::Segment { key: key.to_string(), source };
        let (tail, total) = self.store.get_suffix(key, TAIL_READ_BYTES).await?;
        let header = if tail.len() as u64 == total {
            tail.clone()
        } else {
            self.store.get_range(key, 0..HEADER_LEN as u64).await?
        };
        let header = Header::parse(&header, kind).map_err(|source| named(source.into()))?;
        let domain = self.keys.version(header.key_version);
        let missing = SealedError::KeyVersion { what: kind.name(), found: header.key_version };
        let domain = domain.ok_or_else(|| named(missing.into()))?;
        let opener = Opener::new(&header, domain, kind, Some(key.as_ref())).map_err(|source| named(source.into()))?;
        let trailer = Trailer::parse(&tail, total, kind).map_err(|source| named(source.into()))?;
        let directory_at = u64::from(trailer.directory.offset);
        if total.saturating_sub(directory_at) > NOTES_BYTES {
            let problem = format!("its directory is said to begin {} bytes before its end", total - directory_at);
            return Err(named(SegmentError::Directory(problem)));
        }
        let (tail, start) = self.widen(key, tail, total, directory_at).await?;
        let from = (u64::from(trailer.directory.offset) - start) as usize;
        let to = tail.len().saturating_sub(TRAILER_LEN);
        let mut stored = tail.get(from..to).unwrap_or_default().to_vec();
        let plain = opener.open(trailer.directory, &mut stored).map_err(|source| named(source.into()))?;
        Ok(Ends { directory: plain, opener, tail, tail_start: start })
    }

    /// The object's end from `offset` at the latest, and where it begins.
    async fn widen(&self, key: &Path, tail: Bytes, total: u64, offset: u64) -> Result<(Bytes, u64), StoreError> {
        let start = total - tail.len() as u64;
        if offset >= start {
            return Ok((tail, start));
        }
        let (tail, total) = self.store.get_suffix(key, total - offset).await?;
        Ok((tail.clone(), total - tail.len() as u64))
    }
}
