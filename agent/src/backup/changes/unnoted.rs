//! Segments whose changes nobody noted: the one being written, and those that were archived without what leads into them.
//! They are read and decoded here, from `pg_wal` or, a few, from the archive.

use std::path::PathBuf;
use std::sync::Arc;

use walfleet_repository::format::changed_blocks::ChangedBlocks;
use walfleet_repository::postgres::{Lsn, Segment, Timeline, WalBranch};

use super::{Beginning, Unproven, branch_at};
use crate::postgres::wal_record::{COMPLETION_SPACING, Carry, SegmentDigest, SegmentPlace, digest_segment};
use crate::wal::read::read_in_place;

/// Segments fetched whole for one backup. The one that leads into the first in `pg_wal` is the usual case: a checkpoint
/// recycles all before its own (RemoveOldXlogFiles, src/backend/access/transam/xlog.c). Where many more are unknown,
/// reading the files may cost less.
const FETCHES: u32 = 8;

/// Reads segments in order.
pub(super) struct Unnoted<'a> {
    now: &'a Beginning<'a>,
    lineage: &'a [(WalBranch, Lsn)],
    /// What leads out of the segment read last.
    last: Option<(Segment, Carry)>,
    fetches: u32,
}

impl<'a> Unnoted<'a> {
    pub fn new(now: &'a Beginning<'a>, lineage: &'a [(WalBranch, Lsn)]) -> Unnoted<'a> {
        Unnoted { now, lineage, last: None, fetches: 0 }
    }

    /// What the segment's records change, at least those that begin before the backup does.
    pub async fn changes(&mut self, wal: WalBranch, segment: Segment) -> Result<ChangedBlocks, Unproven> {
        let unknown = || Unproven::Segment(segment.file_name(self.now.segment_size));
        let bytes = match self.local(segment).await? {
            Some(bytes) => bytes,
            None => self.archived(wal, segment).await?.ok_or_else(unknown)?,
        };
        let known = self.last.take().filter(|(last, _)| last.number + 1 == segment.number).map(|(_, carry)| carry);
        let has_carry = known.is_some();
        let mut digest = self.digest(segment, known, &bytes).await?;
        if digest.headless
            && !has_carry
            && let Some(carry) = self.carry_into(segment).await?
        {
            digest = self.digest(segment, Some(carry), &bytes).await?;
        }
        let start = segment.start(self.now.segment_size);
        let valid_end = start.checked_add(u64::from(digest.valid_bytes)).unwrap_or(Lsn(0));
        let unknown = || Unproven::Segment(segment.file_name(self.now.segment_size));
        if !digest.end.is_complete() && valid_end < self.now.start_lsn {
            return Err(unknown());
        }
        let changes = digest.changed_blocks.ok_or_else(unknown)?;
        self.last = digest.carry.map(|carry| (segment, carry));
        Ok(changes)
    }

    /// What leads into the segment, from its predecessor. At a timeline's beginning that is of the timeline before.
    async fn carry_into(&mut self, segment: Segment) -> Result<Option<Carry>, Unproven> {
        let Some(number) = segment.number.checked_sub(1) else { return Ok(None) };
        for timeline in (Timeline::FIRST.0..=segment.timeline.0).rev() {
            let previous = Segment { timeline: Timeline(timeline), number };
            let Some(bytes) = self.local(previous).await? else { continue };
            if let Ok(SegmentDigest { carry: Some(carry), .. }) = self.digest(previous, None, &bytes).await {
                return Ok(Some(carry));
            }
        }
        let Some(wal) = branch_at(self.lineage, segment.start(self.now.segment_size)) else { return Ok(None) };
        let previous = Segment { timeline: wal.timeline, number };
        let Some(bytes) = self.archived(wal, previous).await? else { return Ok(None) };
        Ok(self.digest(previous, None, &bytes).await?.carry)
    }

    fn path(&self, segment: Segment) -> PathBuf {
        self.now.data_dir.join("pg_wal").join(segment.file_name(self.now.segment_size))
    }

    async fn local(&self, segment: Segment) -> Result<Option<Arc<Vec<u8>>>, Unproven> {
        let path = self.path(segment);
        let reading = path.clone();
        let read = tokio::task::spawn_blocking(move || read_in_place(&reading)).await;
        match read.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            Ok(bytes) => Ok(Some(Arc::new(bytes))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Unproven::Read { path, source }),
        }
    }

    async fn archived(&mut self, wal: WalBranch, segment: Segment) -> Result<Option<Arc<Vec<u8>>>, Unproven> {
        if self.fetches == FETCHES {
            return Ok(None);
        }
        self.fetches += 1;
        let found = self.now.archive.get_segment(wal, segment, self.now.segment_size).await?;
        Ok(found.map(|(_, bytes)| Arc::new(bytes)))
    }

    async fn digest(
        &self,
        segment: Segment,
        carry: Option<Carry>,
        bytes: &Arc<Vec<u8>>,
    ) -> Result<SegmentDigest, Unproven> {
        let place = SegmentPlace {
            start: segment.start(self.now.segment_size),
            size: self.now.segment_size,
            timeline: segment.timeline,
            system_id: Some(self.now.wal.system_id),
        };
        let bytes = Arc::clone(bytes);
        let digest =
            tokio::task::spawn_blocking(move || digest_segment(place, carry, COMPLETION_SPACING, &bytes)).await;
        let digest = digest.map_err(|_| Unproven::Segment(segment.file_name(self.now.segment_size)))?;
        digest.map_err(|source| Unproven::Wal { path: self.path(segment), source })
    }
}
