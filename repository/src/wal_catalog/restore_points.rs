//! Where restore points lie on one way of the WAL.
//!
//! A name may be used again and again, and PostgreSQL stops at the first of it that replay meets
//! (recoveryStopsAfter, src/backend/access/transam/xlogrecovery.c). So three questions are asked here, each of which reads the
//! indexes of no more segments than it takes: the newest, the first from somewhere on, and those between.

use futures::{Stream, StreamExt};

use super::READS_IN_FLIGHT;
use crate::format::wal_segment::RestorePoint;
use crate::postgres::{Lsn, Segment, SegmentSize, WalBranch};
use crate::recovery_window::lineage::Lineage;
use crate::recovery_window::{RecoveryPoint, WalCatalog};
use crate::wal_archive::{ArchiveError, WalArchive};

/// A name to look for on the way to one branch.
pub struct Search<'a> {
    pub archive: &'a WalArchive,
    pub catalog: &'a WalCatalog,
    pub way: &'a Lineage,
    pub name: &'a str,
}

impl Search<'_> {
    /// The last one that replay from a position would pass.
    pub async fn newest(&self, from: Lsn) -> Result<Option<RecoveryPoint>, ArchiveError> {
        let mut segments = self.segments(from);
        segments.reverse();
        let mut found = std::pin::pin!(self.read(segments));
        while let Some(points) = found.next().await {
            if let Some(point) = self.of_name(points?).filter(|point| point.lsn > from).max_by_key(|point| point.lsn) {
                return Ok(Some(point));
            }
        }
        Ok(None)
    }

    /// The first one that replay from a position meets: there it would stop.
    pub async fn first(&self, from: Lsn) -> Result<Option<RecoveryPoint>, ArchiveError> {
        let mut found = std::pin::pin!(self.read(self.segments(from)));
        while let Some(points) = found.next().await {
            if let Some(point) = self.of_name(points?).filter(|point| point.lsn > from).min_by_key(|point| point.lsn) {
                return Ok(Some(point));
            }
        }
        Ok(None)
    }

    /// Those that replay from a position passes before it comes to another, ascending.
    pub async fn between(&self, from: Lsn, before: Lsn) -> Result<Vec<RecoveryPoint>, ArchiveError> {
        let mut segments = self.segments(from);
        let last = before.segment_number(self.way.size);
        segments.retain(|(_, number)| *number <= last);
        let mut found = std::pin::pin!(self.read(segments));
        let mut between = Vec::new();
        while let Some(points) = found.next().await {
            between.extend(self.of_name(points?).filter(|point| from < point.lsn && point.lsn < before));
        }
        between.sort_by_key(|point| point.lsn);
        Ok(between)
    }

    fn segments(&self, from: Lsn) -> Vec<(WalBranch, u64)> {
        self.way.segments(self.catalog, from.segment_number(self.way.size))
    }

    fn of_name(&self, points: Vec<RestorePoint>) -> impl Iterator<Item = RecoveryPoint> {
        let named = points.into_iter().filter(|point| point.name == self.name);
        named.map(|found| RecoveryPoint { lsn: found.point.lsn, at_us: found.point.at_us })
    }

    /// In the order of the segments.
    fn read(
        &self,
        segments: Vec<(WalBranch, u64)>,
    ) -> impl Stream<Item = Result<Vec<RestorePoint>, ArchiveError>> + use<> {
        // Owned, since a stream of futures over borrowed rows is not Send for the compiler.
        let (archive, size): (WalArchive, SegmentSize) = (self.archive.clone(), self.way.size);
        let reads = segments.into_iter().map(move |(wal, number)| {
            let archive = archive.clone();
            let segment = Segment { timeline: wal.timeline, number };
            // What does not read holds nothing that replay could come to.
            async move {
                let read = archive.readable(archive.commit_times(wal, segment, size).await)?;
                Ok(read.map(|(_, points)| points).unwrap_or_default())
            }
        });
        futures::stream::iter(reads).buffered(READS_IN_FLIGHT)
    }
}

#[cfg(test)]
mod tests;
