//! WAL that was written with `wal_level = minimal`: it is there, and replay from a backup must not pass it. What a server
//! writes then is enough for its own crash recovery alone: changes of whole relations may be in no record.

use super::lineage::{Lineage, Run};
use super::{SegmentCommits, SegmentFacts, WalCatalog, WalGap};
use crate::format::gap_note::GapNote;
use crate::postgres::{Lsn, WalBranch};

/// A stretch of it. Recovery from a backup before ends at its beginning; every backup behind begins behind its end, since none
/// can be taken meanwhile.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unlogged {
    pub wal: WalBranch,
    pub from: Lsn,
    /// `None`: not known to have ended.
    pub to: Option<Lsn>,
    /// Of the segment in which it begins, those before.
    pub commits_before: SegmentCommits,
    /// Who told it.
    pub recorded: GapNote,
}

/// Parts runs where recovery cannot go on.
pub(super) fn part(lineage: &Lineage, mut runs: Vec<Run>, unlogged: &[Unlogged]) -> Vec<Run> {
    let mut on_way: Vec<&Unlogged> = unlogged.iter().filter(|found| lineage.reads_at(&found.wal, found.from)).collect();
    on_way.sort_by_key(|found| found.from);
    for found in on_way {
        let number = found.from.segment_number(lineage.size);
        let holds = |run: &Run| {
            let segments = run.first..run.next();
            segments.contains(&number) && run.begins < found.from && found.from < run.end(lineage)
        };
        let Some(at) = runs.iter().position(holds) else { continue };
        let Some(before) = runs.get_mut(at) else { continue };
        let kept = usize::try_from(number.saturating_sub(before.first)).unwrap_or(usize::MAX);
        let (segments, parted) = (before.segments.get(kept..).unwrap_or_default().to_vec(), before.parted);
        let behind = Run { first: number, segments, begins: found.from, parted };
        let to = found.to.unwrap_or_else(|| behind.end(lineage)).max(Lsn(found.from.0.saturating_add(1)));
        before.segments.truncate(kept.saturating_add(1));
        if let Some(last) = before.segments.last_mut() {
            *last = SegmentFacts {
                records_end: Some(found.from),
                commits: found.commits_before,
                is_begun: true,
                complete_at_us: None,
                ..*last
            };
        }
        before.parted = Some(WalGap { wal: found.wal, from: found.from, to });
        runs.insert(at + 1, behind);
    }
    runs
}

impl WalCatalog {
    /// The stretch that makes a gap, if what is missing there is not WAL.
    pub fn unlogged_at(&self, gap: &WalGap) -> Option<&Unlogged> {
        self.unlogged.iter().find(|found| found.wal == gap.wal && gap.from <= found.from && found.from < gap.to)
    }
}
