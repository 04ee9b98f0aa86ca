//! What can be restored: computed from what lies in the repository, not from what a process believes it sent.
//!
//! Pure. [`recovery_windows`] answers for a whole cluster, [`choose::choose_backup`] for one target. Both follow timelines as
//! PostgreSQL does ([`lineage`]). Where something is unknown, less is promised: a segment whose commits were not read
//! extends a range by its positions, not by a time.

pub mod branch_name;
pub mod choose;
pub mod complete;
pub mod lineage;
pub mod split_brain;
pub mod unlogged;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::format::reference::ReferencePart;
use crate::format::wal_history::Divergence;
use crate::ids::BackupId;
use crate::layout::GapNoteName;
use crate::postgres::{Branch, Lsn, Segment, SegmentSize, SystemId, Timeline, TimelineHistory, WalBranch};

pub use branch_name::{BranchName, BranchNameError};
pub use choose::{Choice, NotRecoverable, Pick, StopAt, TargetPoint, TimelineChoice, choose_backup, ways};
pub use complete::KnownComplete;
use lineage::{Lineage, Run};
pub use split_brain::{SplitBrain, split_brains};
pub use unlogged::Unlogged;

/// A committed backup, as far as windows depend on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupFacts {
    pub id: BackupId,
    pub wal: WalBranch,
    /// Redo position of the starting checkpoint: the first WAL a restore needs.
    pub start_lsn: Lsn,
    /// Restoring up to here makes the backup consistent.
    pub stop_lsn: Lsn,
    /// The source server's clock at the stop, microseconds since the Unix epoch.
    pub stopped_at_us: i64,
}

impl From<&ReferencePart> for BackupFacts {
    fn from(part: &ReferencePart) -> BackupFacts {
        BackupFacts {
            id: part.backup.clone(),
            wal: part.wal,
            start_lsn: part.start_lsn,
            stop_lsn: part.stop_lsn,
            stopped_at_us: part.stopped_at_us,
        }
    }
}

/// The WAL that the repository holds of one cluster.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct WalCatalog {
    pub branches: BTreeMap<WalBranch, BranchWal>,
    /// Of gaps that somebody has noted.
    pub notes: Vec<GapNoteName>,
    pub unlogged: Vec<Unlogged>,
    /// What does not read, and counts as absent.
    pub damaged: Vec<String>,
}

/// The WAL of one branch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BranchWal {
    pub segment_size: SegmentSize,
    /// By segment number.
    pub segments: BTreeMap<u64, SegmentFacts>,
    /// Of a timeline that has ancestors; `None`: not known, so they are not followed.
    pub history: Option<TimelineHistory>,
    /// Which branch of the last ancestor it goes on from; `None`: not known.
    pub parent: Option<Branch>,
    /// Set if it left another branch of the same timeline.
    pub divergence: Option<Divergence>,
}

/// What is known of a stored segment.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct SegmentFacts {
    /// Where its last record ends, if that was read; the rest is padding.
    pub records_end: Option<Lsn>,
    pub commits: SegmentCommits,
    /// Not finished when its newest piece was stored: no WAL behind it can be reached.
    pub is_begun: bool,
    /// Where its newest piece ends, where there are only pieces.
    pub pieces_end: Option<Lsn>,
    /// The server's clock when it had no more WAL than this, microseconds since the Unix epoch.
    pub complete_at_us: Option<i64>,
    /// Its writer's clock, if that was read.
    pub shipped_at_us: Option<i64>,
}

/// The commits that end in a segment.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum SegmentCommits {
    /// Nobody looked.
    #[default]
    Unknown,
    None,
    /// Times of the first and the last, microseconds since the Unix epoch.
    Between {
        first_us: i64,
        last_us: i64,
    },
}

/// A moment in WAL and in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecoveryPoint {
    pub lsn: Lsn,
    /// Microseconds since the Unix epoch.
    pub at_us: i64,
}

impl fmt::Display for RecoveryPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", PrintedTime(self.at_us), self.lsn)
    }
}

/// Any second and any position between the two can be restored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecoveryRange {
    /// The branch on which it ends; what lies before may be on its ancestors.
    pub wal: WalBranch,
    /// Where and when the first backup is consistent.
    pub from: RecoveryPoint,
    /// Where the contiguous WAL ends, and the newest commit known in it, or when the server had no more than this WAL;
    /// without either, the stop of the last backup.
    pub to: RecoveryPoint,
    /// The backups it builds on, oldest first.
    pub backups: Vec<BackupId>,
    /// It ends on a branch that left another one of the same timeline.
    pub is_diverged: bool,
}

/// WAL that should be there and is not, or that cannot be replayed: `[from, to)`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct WalGap {
    pub wal: WalBranch,
    pub from: Lsn,
    pub to: Lsn,
}

/// A backup that cannot be restored, since WAL between its start and its stop is missing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unrestorable {
    pub backup: BackupId,
    pub missing: WalGap,
}

/// What one repository can give back of one cluster.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Windows {
    /// By system, branch and position. Ranges that a later timeline continues are not listed again for the earlier one.
    pub ranges: Vec<RecoveryRange>,
    pub gaps: Vec<WalGap>,
    pub unrestorable: Vec<Unrestorable>,
}

impl Windows {
    /// The range that reaches farthest in time. One of a diverged branch counts only where there is no other: it says
    /// nothing of the server that it left.
    pub fn newest(&self) -> Option<&RecoveryRange> {
        let far = |range: &&RecoveryRange| (!range.is_diverged, range.to.at_us, range.wal.timeline, range.to.lsn);
        self.ranges.iter().max_by_key(far)
    }
}

/// What can be restored from these backups with this WAL.
pub fn recovery_windows(backups: &[BackupFacts], wal: &WalCatalog) -> Windows {
    let lineages = lineage::all(backups, wal);
    let mut ranges: Vec<(&Lineage, RecoveryRange)> = Vec::new();
    let (mut gaps, mut restorable) = (BTreeSet::new(), BTreeSet::new());
    for lineage in &lineages {
        let on_it: Vec<_> = backups.iter().filter(|backup| lineage.holds(backup)).collect();
        let runs = lineage.runs(wal);
        for run in &runs {
            let within: Vec<_> = on_it.iter().copied().filter(|backup| run.covers(lineage, backup)).collect();
            restorable.extend(within.iter().map(|backup| backup.id.clone()));
            if let Some(mut range) = range_of(lineage, run, within) {
                range.is_diverged = wal.is_diverged(&range.wal);
                ranges.push((lineage, range));
            }
        }
        if let Some(needed_from) = on_it.iter().map(|backup| backup.start_lsn).min() {
            let found = lineage.gaps(&runs, needed_from.segment_number(lineage.size));
            gaps.extend(found.into_iter().filter(|gap| gap.to > needed_from));
        }
    }
    let kept = ranges.iter().enumerate().filter(|(at, range)| {
        let better = |(other_at, other): (usize, &(&Lineage, RecoveryRange))| {
            // Of two that give back the same, the first is kept.
            dominates(other, range) && (!dominates(range, other) || other_at < *at)
        };
        !ranges.iter().enumerate().any(better)
    });
    let lost = backups.iter().filter(|backup| !restorable.contains(&backup.id));
    let mut windows = Windows {
        ranges: kept.map(|(_, (_, range))| range.clone()).collect(),
        gaps: gaps.into_iter().collect(),
        unrestorable: lost.map(|backup| unrestorable(backup, &lineages, wal)).collect(),
    };
    windows.ranges.sort_by_key(|range| (range.wal.system_id, range.from.lsn, range.wal));
    windows
}

/// The range that a run of WAL and the backups in it make; `None` without a backup.
fn range_of(lineage: &Lineage, run: &Run, mut backups: Vec<&BackupFacts>) -> Option<RecoveryRange> {
    backups.sort_by_key(|backup| (backup.stop_lsn, backup.stopped_at_us));
    let (first, last) = (*backups.first()?, *backups.last()?);
    let to_us =
        run.newest_us(lineage, first.stop_lsn).map_or(last.stopped_at_us, |newest| newest.max(last.stopped_at_us));
    Some(RecoveryRange {
        wal: run.ends_on(lineage),
        from: RecoveryPoint { lsn: first.stop_lsn, at_us: first.stopped_at_us },
        to: RecoveryPoint { lsn: run.end(lineage).max(last.stop_lsn), at_us: to_us },
        backups: backups.into_iter().map(|backup| backup.id.clone()).collect(),
        is_diverged: false,
    })
}

/// Says which of the WAL that a backup needs is missing.
fn unrestorable(backup: &BackupFacts, lineages: &[Lineage], wal: &WalCatalog) -> Unrestorable {
    let (from, to) = (backup.start_lsn, backup.stop_lsn);
    let missing = WalGap { wal: backup.wal, from, to };
    let own = lineages.iter().find(|lineage| lineage.tip() == backup.wal && lineage.holds(backup));
    let missing = own.and_then(|lineage| lineage.first_missing(wal, backup)).unwrap_or(missing);
    Unrestorable { backup: backup.id.clone(), missing }
}

/// Whether a range gives back all that another one does, on the way that the other one takes.
fn dominates((way, range): &(&Lineage, RecoveryRange), (_, other): &(&Lineage, RecoveryRange)) -> bool {
    way.passes(&other.wal, other.to.lsn)
        && range.from.lsn <= other.from.lsn
        && other.to.lsn <= range.to.lsn
        && other.backups.iter().all(|backup| range.backups.contains(backup))
}

/// Segments whose commits should be read before windows are computed, since the ends of ranges are not known in time.
///
/// Read them, fill them into the catalog and ask again, until none is left: mostly one segment for every range, more where
/// the newest segments have no commits.
pub fn ends_to_read(backups: &[BackupFacts], wal: &WalCatalog) -> BTreeSet<(WalBranch, u64)> {
    let mut ends = BTreeSet::new();
    for lineage in lineage::all(backups, wal) {
        for run in lineage.runs(wal) {
            let covered = backups.iter().filter(|backup| lineage.holds(backup) && run.covers(&lineage, backup));
            if let Some(stop) = covered.map(|backup| backup.stop_lsn).max() {
                ends.extend(run.unread_end(&lineage, stop).map(|number| (lineage.branch_of(number), number)));
            }
        }
    }
    ends
}

impl BranchWal {
    /// From a listing: nothing is known of the segments but that they are there.
    pub fn listed(
        segment_size: SegmentSize,
        segments: impl IntoIterator<Item = Segment>,
        history: Option<TimelineHistory>,
    ) -> BranchWal {
        let segments = segments.into_iter().map(|segment| (segment.number, SegmentFacts::default())).collect();
        BranchWal { segment_size, segments, history, parent: None, divergence: None }
    }
}

impl WalCatalog {
    pub fn is_diverged(&self, wal: &WalBranch) -> bool {
        self.branches.get(wal).is_some_and(|branch| branch.divergence.is_some())
    }

    /// Where the WAL of a timeline ends, of whichever of its branches goes farthest, and which that is; `None`: it has none, or
    /// nobody looked at its system.
    pub fn reaches(&self, system_id: SystemId, timeline: Timeline) -> Option<(Lsn, WalBranch)> {
        let of_timeline =
            self.branches.iter().filter(|(wal, _)| wal.system_id == system_id && wal.timeline == timeline);
        let ends = of_timeline.filter_map(|(wal, branch)| {
            let (number, last) = branch.segments.last_key_value()?;
            let whole = Segment { timeline, number: *number }.end(branch.segment_size);
            Some((last.pieces_end.unwrap_or(whole), *wal))
        });
        ends.max()
    }

    /// Whether nobody knows from where a branch goes on: what says so is missing, or does not read.
    pub fn is_of_unknown_origin(&self, wal: &WalBranch) -> bool {
        let unknown = |branch: &BranchWal| branch.history.is_none() && branch.divergence.is_none();
        !wal.is_first() && self.branches.get(wal).is_some_and(unknown)
    }
}

/// The ranges of one system, for messages.
pub(crate) fn printed_ranges<'a>(ranges: impl Iterator<Item = &'a RecoveryRange>) -> String {
    let printed: Vec<String> =
        ranges.map(|range| format!("{} to {} on timeline {}", range.from, range.to, range.wal.timeline)).collect();
    if printed.is_empty() { "nothing".to_owned() } else { printed.join("; ") }
}

/// As people type and read it: `2026-06-04 14:31:59 UTC`, with a fraction only where there is one.
pub(crate) struct PrintedTime(pub i64);

impl fmt::Display for PrintedTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(time) => write!(f, "{}", time.strftime("%Y-%m-%d %H:%M:%S%.f UTC")),
            Err(_) => write!(f, "{} us", self.0),
        }
    }
}

/// The branches that a number may mean, for messages: where each left its parent, and what it has.
pub(crate) fn printed_branches<'a>(wal: &WalCatalog, branches: impl Iterator<Item = &'a WalBranch>) -> String {
    let printed: Vec<String> = branches.map(|branch| printed_branch(wal, branch)).collect();
    if printed.is_empty() { "none".to_owned() } else { printed.join("; ") }
}

fn printed_branch(wal: &WalCatalog, branch: &WalBranch) -> String {
    let known = wal.branches.get(branch);
    let parent = known.and_then(|known| known.history.as_ref()?.ancestors.last());
    let begin = parent.map(|(parent, at)| format!(" left timeline {parent} at {at}"));
    let diverged = known.and_then(|known| known.divergence.as_ref());
    let begin = match diverged {
        Some(left) => Some(format!(" is of {}, whose WAL differs from {}", left.member, left.at)),
        None => begin,
    };
    let commits = known.into_iter().flat_map(|known| known.segments.values()).map(|facts| facts.commits);
    let newest = commits.filter_map(SegmentCommits::newest_us).max();
    let newest = newest.map(|at_us| format!("newest commit {}", PrintedTime(at_us)));
    let (begin, newest) = (begin.unwrap_or_default(), newest.unwrap_or_else(|| "no commit known".to_owned()));
    format!("{}{begin}, {newest}", BranchName::from(branch))
}

/// The systems that have backups.
pub(crate) fn systems(backups: &[BackupFacts]) -> BTreeSet<SystemId> {
    backups.iter().map(|backup| backup.wal.system_id).collect()
}
