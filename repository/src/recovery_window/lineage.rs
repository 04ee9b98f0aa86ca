//! Timelines followed as PostgreSQL follows them.
//!
//! Recovery to a timeline reads each segment from the newest ancestor that begins in or before it
//! (XLogFileReadAnyTLI, src/backend/access/transam/xlogrecovery.c): the segment in which a timeline branched off is read from the
//! new timeline, which has a copy of the old one's records up to the switch. PostgreSQL would fall back to an older
//! timeline's file where the newer one's is absent; past the switch that file tells another story, so here it is a gap.
//!
//! A diverged branch goes on from the one that it left, at the start of its own first segment.

use std::collections::BTreeMap;

use super::{BackupFacts, BranchWal, SegmentCommits, SegmentFacts, WalCatalog, WalGap, unlogged};
use crate::format::wal_history::Joint;
use crate::postgres::{Lsn, SegmentSize, Timeline, WalBranch};

/// The way of the WAL from the first known ancestor to one branch, its tip.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lineage {
    pub size: SegmentSize,
    /// Oldest first, never empty; the last is the tip.
    legs: Vec<Leg>,
}

/// One branch's part of the way: `[begin, end)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Leg {
    wal: WalBranch,
    begin: Lsn,
    /// `None`: the tip.
    end: Option<Lsn>,
}

/// Segments without a gap, by number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Run {
    pub(super) first: u64,
    pub(super) segments: Vec<SegmentFacts>,
    /// No recovery that begins before it reads on here.
    pub(super) begins: Lsn,
    /// Set if it ends where WAL cannot be replayed, and not where there is none.
    pub(super) parted: Option<WalGap>,
}

/// One lineage for every branch that has WAL or a backup.
pub fn all(backups: &[BackupFacts], wal: &WalCatalog) -> Vec<Lineage> {
    wal.branches.keys().filter_map(|tip| Lineage::to(*tip, wal)).filter(|lineage| lineage.serves(backups)).collect()
}

impl Lineage {
    /// The way to a branch; `None` if the catalog does not know it.
    pub fn to(tip: WalBranch, catalog: &WalCatalog) -> Option<Lineage> {
        let size = catalog.branches.get(&tip)?.segment_size;
        Some(Lineage { size, legs: way(tip, size, catalog, catalog.branches.len()) })
    }

    /// Where the tip's own part begins.
    pub(super) fn tip_begins(&self) -> Lsn {
        self.legs.last().map_or(Lsn::INVALID, |leg| leg.begin)
    }

    pub fn tip(&self) -> WalBranch {
        self.legs.last().map(|leg| leg.wal).expect("a lineage has a tip")
    }

    fn serves(&self, backups: &[BackupFacts]) -> bool {
        backups.iter().any(|backup| self.holds(backup))
    }

    /// Whether a backup lies on the way: on one of its branches, and consistent before the way leaves it.
    pub fn holds(&self, backup: &BackupFacts) -> bool {
        self.passes(&backup.wal, backup.stop_lsn)
    }

    /// Whether this way goes through a branch at least up to a position.
    pub(super) fn passes(&self, wal: &WalBranch, lsn: Lsn) -> bool {
        let leg = self.legs.iter().find(|leg| leg.wal == *wal);
        leg.is_some_and(|leg| leg.end.is_none_or(|end| lsn <= end))
    }

    /// Where the way leaves a branch, `None` in there if it ends on it; `None` if it does not go through it.
    pub fn leaves(&self, wal: &WalBranch) -> Option<Option<Lsn>> {
        self.legs.iter().find(|leg| leg.wal == *wal).map(|leg| leg.end)
    }

    /// The branch from which recovery reads a segment.
    pub fn branch_of(&self, number: u64) -> WalBranch {
        let begun = |leg: &&Leg| leg.begin.segment_number(self.size) <= number;
        self.legs.iter().rev().find(begun).map_or_else(|| self.legs[0].wal, |leg| leg.wal)
    }

    /// Its segments from one number on, ascending, each under the branch from which recovery reads it.
    pub fn segments(&self, catalog: &WalCatalog, from: u64) -> Vec<(WalBranch, u64)> {
        let mut numbers: Vec<u64> = self.runs(catalog).into_iter().flat_map(|run| run.first..run.next()).collect();
        // Runs may part within a segment.
        numbers.dedup();
        let numbers = numbers.into_iter().filter(|number| *number >= from);
        numbers.map(|number| (self.branch_of(number), number)).collect()
    }

    /// The stretches without a gap, ascending.
    pub fn runs(&self, catalog: &WalCatalog) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (leg, next) in self.legs.iter().zip(self.legs.iter().skip(1).map(Some).chain([None])) {
            let Some(branch) = catalog.branches.get(&leg.wal) else { continue };
            let first = leg.begin.segment_number(self.size);
            let end = next.map_or(u64::MAX, |next| next.begin.segment_number(self.size));
            for (number, facts) in between(&branch.segments, first, end) {
                match runs.last_mut().filter(|run| run.next() == *number && run.is_whole()) {
                    Some(run) => run.segments.push(*facts),
                    None => {
                        runs.push(Run { first: *number, segments: vec![*facts], begins: Lsn::INVALID, parted: None })
                    }
                }
            }
        }
        unlogged::part(self, runs, &catalog.unlogged)
    }

    /// Whether recovery on this way reads a position from a branch.
    pub(super) fn reads_at(&self, wal: &WalBranch, lsn: Lsn) -> bool {
        let size = self.size;
        // Of the segment in which a branch begins it has what is before, too.
        let within = |leg: &Leg| {
            leg.begin.segment_number(size) <= lsn.segment_number(size) && leg.end.is_none_or(|end| lsn < end)
        };
        self.legs.iter().any(|leg| leg.wal == *wal && within(leg))
    }

    /// What is missing between segment `needed` and the last one there is.
    pub fn gaps(&self, runs: &[Run], needed: u64) -> Vec<WalGap> {
        let mut gaps: Vec<WalGap> = Vec::new();
        let mut expected = needed;
        let mut begun: Option<&Run> = None;
        for run in runs.iter().filter(|run| run.next() > needed) {
            let missing = self.missing(expected, run.first);
            if let Some(begun) = begun {
                gaps.push(self.rest(begun));
            }
            gaps.extend(missing);
            expected = run.next();
            begun = Some(run).filter(|run| !run.is_whole());
        }
        gaps
    }

    /// What is missing of the last segment of a run, which was only begun.
    fn rest(&self, begun: &Run) -> WalGap {
        if let Some(parted) = begun.parted {
            return parted;
        }
        let number = begun.next().saturating_sub(1);
        WalGap { wal: self.branch_of(number), from: begun.end(self), to: self.start(begun.next()) }
    }

    /// Segments `[from, to)`, each under the branch from which it would be read.
    fn missing(&self, from: u64, to: u64) -> Vec<WalGap> {
        let mut gaps = Vec::new();
        let mut at = from;
        while at < to {
            let wal = self.branch_of(at);
            // Where the next leg begins, the branch changes.
            let begins = self.legs.iter().map(|leg| leg.begin.segment_number(self.size));
            let until = begins.filter(|begin| *begin > at).min().unwrap_or(u64::MAX).min(to);
            gaps.push(WalGap { wal, from: self.start(at), to: self.start(until) });
            at = until;
        }
        gaps
    }

    /// The first stretch of a backup's own WAL that is missing.
    pub(super) fn first_missing(&self, catalog: &WalCatalog, backup: &BackupFacts) -> Option<WalGap> {
        let (first, end) = needed(self, backup);
        let there = |number: u64| {
            let facts = catalog.branches.get(&self.branch_of(number)).and_then(|wal| wal.segments.get(&number));
            facts.is_some_and(|facts| !facts.is_begun || facts.records_end >= Some(backup.stop_lsn))
        };
        let from = (first..end).find(|number| !there(*number))?;
        let to = (from..end).find(|number| there(*number)).unwrap_or(end);
        self.missing(from, to).into_iter().next()
    }

    pub fn start(&self, number: u64) -> Lsn {
        Lsn(number.saturating_mul(self.size.bytes().into()))
    }
}

/// Segments that make a backup consistent: `[first, end)`. The stop position is where its last record ends.
pub(super) fn needed(lineage: &Lineage, backup: &BackupFacts) -> (u64, u64) {
    let first = backup.start_lsn.segment_number(lineage.size);
    let last = Lsn(backup.stop_lsn.0.saturating_sub(1)).segment_number(lineage.size);
    (first, last.max(first).saturating_add(1))
}

fn between(
    segments: &BTreeMap<u64, SegmentFacts>,
    first: u64,
    end: u64,
) -> impl Iterator<Item = (&u64, &SegmentFacts)> {
    segments.range(first..end.max(first))
}

/// The legs of the way to a branch, oldest first. `depth`: how many branches may lie behind it; no sound catalog needs more.
fn way(tip: WalBranch, size: SegmentSize, catalog: &WalCatalog, depth: usize) -> Vec<Leg> {
    let of_tip = |begin| Leg { wal: tip, begin, end: None };
    let Some(known) = catalog.branches.get(&tip) else { return vec![of_tip(Lsn::INVALID)] };
    let (from, at) =
        match (&known.divergence, known.history.as_ref().and_then(|history| history.ancestors.split_last())) {
            (Some(left), _) => {
                let from = WalBranch { branch: left.from, ..tip };
                (Some(from).filter(|_| left.joint == Joint::Sound), left.at)
            }
            (None, Some(((timeline, at), before))) => (ancestor((tip, known), (*timeline, *at), before, catalog), *at),
            (None, None) => (None, Lsn::INVALID),
        };
    let same_size = |wal: &WalBranch| catalog.branches.get(wal).is_some_and(|branch| branch.segment_size == size);
    // What lies before is not known, or not surely of this way.
    let Some(from) = from.filter(|from| depth > 0 && same_size(from)) else { return vec![of_tip(at)] };
    let mut legs = way(from, size, catalog, depth - 1);
    let begin = match known.divergence {
        None => cut(&mut legs, at),
        Some(_) => cut_before_segment(&mut legs, at, size),
    };
    legs.push(of_tip(begin));
    legs
}

/// Ends a way at a position where a timeline leaves it.
fn cut(legs: &mut Vec<Leg>, at: Lsn) -> Lsn {
    legs.retain(|leg| leg.begin <= at);
    if let Some(last) = legs.last_mut() {
        last.end = Some(at);
    }
    at
}

/// Ends a way before the first segment that a diverged branch has instead; returns where that one's part begins. In the
/// segment in which a timeline begins it takes the place of the branch that it left.
fn cut_before_segment(legs: &mut Vec<Leg>, at: Lsn, size: SegmentSize) -> Lsn {
    let number = at.segment_number(size);
    match legs.pop_if(|leg| leg.begin.segment_number(size) >= number) {
        Some(replaced) => replaced.begin,
        None => cut(legs, at),
    }
}

/// The branch that the last ancestor's number means on the way to `tip`, where `before` are the ancestors of that one.
///
/// A history names its ancestors by number alone. Whoever stored it may have known which branch that was. If not, of several
/// branches of that number the right one has the same way behind it; if that does not tell, none is taken, since a wrong
/// one would be worse than none.
fn ancestor(
    (tip, known): (WalBranch, &BranchWal),
    (timeline, at): (Timeline, Lsn),
    before: &[(Timeline, Lsn)],
    catalog: &WalCatalog,
) -> Option<WalBranch> {
    let same_way = |branch: &BranchWal| {
        let ancestors = branch.history.as_ref().map(|history| &history.ancestors[..]);
        ancestors.or((timeline == Timeline::FIRST).then_some(&[][..])) == Some(before)
    };
    let namesakes = catalog.branches.iter().filter(|(wal, branch)| {
        wal.system_id == tip.system_id && wal.timeline == timeline && wal.timeline < tip.timeline && same_way(branch)
    });
    if let Some(parent) = known.parent {
        return namesakes.map(|(wal, _)| *wal).find(|wal| wal.branch == parent);
    }
    // Up to where it left, a diverged one is the branch that it left.
    let may_be = |(_, branch): &(&WalBranch, &BranchWal)| branch.divergence.as_ref().is_none_or(|left| left.at < at);
    let named: Vec<(&WalBranch, &BranchWal)> = namesakes.filter(may_be).collect();
    match named[..] {
        [(one, branch)] if branch.divergence.is_none() => Some(*one),
        _ => None,
    }
}

impl SegmentCommits {
    /// By time, whatever their order.
    pub(super) fn newest_us(self) -> Option<i64> {
        match self {
            SegmentCommits::Between { first_us, last_us } => Some(first_us.max(last_us)),
            SegmentCommits::Unknown | SegmentCommits::None => None,
        }
    }
}

impl Run {
    pub(super) fn next(&self) -> u64 {
        self.first.saturating_add(self.segments.len() as u64)
    }

    /// Whether it has all the WAL that makes a backup consistent.
    pub(super) fn covers(&self, lineage: &Lineage, backup: &BackupFacts) -> bool {
        let (first, end) = needed(lineage, backup);
        let reaches = self.is_whole() || end < self.next() || self.end(lineage) >= backup.stop_lsn;
        self.begins <= backup.start_lsn && self.first <= first && end <= self.next() && reaches
    }

    /// Whether its last segment is finished.
    fn is_whole(&self) -> bool {
        self.segments.last().is_none_or(|last| !last.is_begun)
    }

    /// Where its last record ends; where that was not read, its last segment.
    pub(super) fn end(&self, lineage: &Lineage) -> Lsn {
        let whole = lineage.start(self.next());
        self.segments.last().and_then(|last| last.records_end).map_or(whole, |end| end.min(whole))
    }

    /// The branch of its last segment.
    pub(super) fn ends_on(&self, lineage: &Lineage) -> WalBranch {
        lineage.branch_of(self.next().saturating_sub(1))
    }

    /// The newest commit known in it from the segment of a position on.
    ///
    /// The newest by time, not the last: clocks go back at a failover, and recovery stops at the first commit later than
    /// its target, wherever that is.
    pub(super) fn newest_commit_us(&self, lineage: &Lineage, from: Lsn) -> Option<i64> {
        self.from(lineage, from).filter_map(|(_, facts)| facts.commits.newest_us()).max()
    }

    /// The newest moment, from the segment of a position on, of which all is there: that of a commit, or one at which the
    /// server had no more WAL than this.
    pub(super) fn newest_us(&self, lineage: &Lineage, from: Lsn) -> Option<i64> {
        let complete = self.segments.last().and_then(|last| last.complete_at_us);
        self.newest_commit_us(lineage, from).max(complete)
    }

    /// The end of the first segment with a commit later than `after_us`, from the segment of a position on: no recovery to
    /// that time reads farther.
    pub(super) fn end_of_reading(&self, lineage: &Lineage, from: Lsn, after_us: i64) -> Option<Lsn> {
        let later = |facts: &SegmentFacts| facts.commits.newest_us().is_some_and(|newest| newest > after_us);
        self.from(lineage, from)
            .find(|(_, facts)| later(facts))
            .map(|(number, _)| lineage.start(number.saturating_add(1)))
    }

    /// The last segment from the one of a position on that may have commits nobody read.
    pub(super) fn unread_end(&self, lineage: &Lineage, from: Lsn) -> Option<u64> {
        let first = from.segment_number(lineage.size);
        let last = self.next().saturating_sub(1);
        let backwards = (first..=last).rev().zip(self.segments.iter().rev());
        backwards
            .take_while(|(_, facts)| facts.commits.newest_us().is_none())
            .find_map(|(number, facts)| (facts.commits == SegmentCommits::Unknown).then_some(number))
    }

    fn from(&self, lineage: &Lineage, from: Lsn) -> impl Iterator<Item = (u64, &SegmentFacts)> {
        let skip = from.segment_number(lineage.size).saturating_sub(self.first);
        (self.first..).zip(&self.segments).skip(usize::try_from(skip).unwrap_or(usize::MAX))
    }

    /// The branches and segments `[first, end)` from which recovery reads between two positions.
    pub(super) fn reads(&self, lineage: &Lineage, from: Lsn, to: Lsn) -> Vec<super::choose::WalRead> {
        let first = from.segment_number(lineage.size);
        let end = Lsn(to.0.saturating_sub(1)).segment_number(lineage.size).saturating_add(1).min(self.next());
        let reads = lineage.missing(first, end);
        reads.into_iter().map(|read| super::choose::WalRead { wal: read.wal, from: read.from, to: read.to }).collect()
    }
}
