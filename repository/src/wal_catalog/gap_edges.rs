//! About when a gap was: the commits around it.

use super::{LOOK_BACK, facts_of};
use crate::postgres::Segment;
use crate::recovery_window::{SegmentCommits, WalCatalog, WalGap};
use crate::wal_archive::{ArchiveError, WalArchive};

/// Segments behind a gap whose commits are asked for: one request each.
const LOOK_AHEAD: usize = 4;

/// Times of the last commit before and the first behind a gap, microseconds since the Unix epoch, as far as the gap's own
/// branch tells.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Edges {
    pub before_us: Option<i64>,
    pub behind_us: Option<i64>,
}

/// The catalog must be one that [`super::read`] has read: what ends before the gap is known by it.
pub async fn read(archive: &WalArchive, catalog: &WalCatalog, gap: &WalGap) -> Result<Edges, ArchiveError> {
    let mut edges = Edges::default();
    let Some(branch) = catalog.branches.get(&gap.wal) else { return Ok(edges) };
    let size = branch.segment_size;
    // Of the segment in which it begins, pieces may be there.
    for (_, facts) in branch.segments.range(..=gap.from.segment_number(size)).rev().take(LOOK_BACK as usize) {
        match facts.commits {
            SegmentCommits::None => {}
            SegmentCommits::Between { last_us, .. } => {
                edges.before_us = Some(last_us);
                break;
            }
            SegmentCommits::Unknown => break,
        }
    }
    for (number, facts) in branch.segments.range(gap.to.segment_number(size)..).take(LOOK_AHEAD) {
        let commits = match facts.commits {
            SegmentCommits::Unknown => {
                let segment = Segment { timeline: gap.wal.timeline, number: *number };
                facts_of(&archive.directory(gap.wal, segment, size).await?).commits
            }
            known => known,
        };
        if let SegmentCommits::Between { first_us, .. } = commits {
            edges.behind_us = Some(first_us);
            break;
        }
    }
    Ok(edges)
}
