//! Which backup, and which WAL, reach a target; or why none does, and what can be reached instead.
//!
//! PostgreSQL ends recovery with an error when the WAL ends before the target (since 13: "recovery ended before configured
//! recovery target was reached"), after hours of replay perhaps. So it is refused here, before anything is read.

use super::lineage::{Lineage, Run, needed};
use super::{
    BackupFacts, BranchName, PrintedTime, RecoveryPoint, RecoveryRange, WalCatalog, WalGap, printed_branches,
    printed_ranges, recovery_windows,
};
use crate::ids::BackupId;
use crate::postgres::{Lsn, Timeline, WalBranch};

/// Where recovery is to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TargetPoint {
    /// Microseconds since the Unix epoch. Inclusive: commits at this very time are kept.
    Time {
        at_us: i64,
        inclusive: bool,
    },
    Lsn(Lsn),
    /// A transaction: nobody knows where in the WAL it ends.
    Somewhere,
    /// As soon as the backup is consistent.
    Immediate,
    /// The end of the WAL.
    Latest,
}

/// On which timeline.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum TimelineChoice {
    /// The newest that there is. Of several branches of one number those that diverged are left out, here and below, and those
    /// of which nobody knows where they come from; one of these without any WAL does not count at all.
    #[default]
    Latest,
    /// The backup's own.
    Current,
    Number(Timeline),
    /// One of several with the same number, as people name it.
    Named(BranchName),
    /// The same, once it is known which.
    Exactly(WalBranch),
}

/// What is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pick {
    pub target: TargetPoint,
    pub timeline: TimelineChoice,
    /// `None`: the newest backup that serves.
    pub backup: Option<BackupId>,
}

/// How a restore reaches its target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    pub backup: BackupId,
    /// The branch to recover to: `recovery_target_timeline` is its timeline.
    pub wal: WalBranch,
    /// From where the backup starts to where recovery stops at the latest: `[from, to)`.
    pub from: Lsn,
    pub to: Lsn,
    /// The same, by branch and whole segments.
    pub reads: Vec<WalRead>,
    pub stop: StopAt,
    /// WAL that lies behind `to` must not be replayed: recovery would fail of it, or lose what it does not tell.
    pub ends_there: bool,
    /// There is WAL behind a gap that this restore will not reach.
    pub ends_at_gap: Option<WalGap>,
    /// From the segment of this position on the branch to recover to is read, and no other of its timeline.
    pub tip_begins: Lsn,
}

/// WAL to be read: whole segments of one branch, `[from, to)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalRead {
    pub wal: WalBranch,
    pub from: Lsn,
    pub to: Lsn,
}

/// What PostgreSQL is to be told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopAt {
    /// The target as it was asked for.
    Target,
    /// The end of the WAL, without a target. For the very position at which it ends: PostgreSQL stops beside a record that
    /// begins there or later (recoveryStopsBefore, recoveryStopsAfter, xlogrecovery.c), and there is none. For a time at or after the newest commit's, up to which the server is known
    /// to have had no other: PostgreSQL stops at the first commit *later* than such a target, and there is none; the end
    /// of the WAL has the same commits.
    EndOfWal,
}

/// Why no restore reaches the target, and what can be reached.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotRecoverable {
    #[error("the cluster has no backup yet\nHINT: take one, with \"walfleet backup start\".")]
    NoneTaken,
    #[error(
        "no backup can be restored\nHINT: take a backup; what makes the present ones unusable is shown by \"walfleet cluster show\"."
    )]
    NoBackup,
    #[error("{target} is before the first backup was consistent, at {earliest}\nHINT: recoverable is {recoverable}.")]
    TooEarly { target: String, earliest: RecoveryPoint, recoverable: String },
    #[error(
        "{target} is after the newest WAL in the repository, which ends at {newest}\nHINT: recoverable is {recoverable}; the end of the WAL is reached by the target \"latest\"."
    )]
    TooLate { target: String, newest: RecoveryPoint, recoverable: String },
    #[error("{target} lies where WAL is missing\nHINT: recoverable is {recoverable}.")]
    InGap { target: String, recoverable: String },
    #[error("the repository knows no timeline {timeline} of this cluster\nHINT: recoverable is {recoverable}.")]
    NoTimeline { timeline: Timeline, recoverable: String },
    #[error(
        "\"{asked}\" may mean {count} branches of timeline {timeline}, as two servers took the same number: {branches}\nHINT: say which one, for example --timeline {example}; the digits that tell it from the others are enough."
    )]
    Ambiguous { asked: String, timeline: Timeline, count: usize, branches: String, example: BranchName },
    #[error("the repository knows no branch {asked} of this cluster\nHINT: branches of timeline {timeline}: {branches}.", timeline = asked.timeline())]
    NoBranch { asked: BranchName, branches: String },
    #[error("no backup lies on the way to timeline {timeline}\nHINT: recoverable is {recoverable}.")]
    NoBackupOnTimeline { timeline: Timeline, recoverable: String },
    #[error(
        "no backup lies on the way to timeline {timeline}: its history file is missing in the repository or does not read, so that nobody knows what it goes on from\nHINT: its server's agent stores the file again when it is started, once what does not read is removed; --timeline names another. Recoverable is {recoverable}."
    )]
    UnknownOrigin { timeline: Timeline, recoverable: String },
    #[error("backup {backup} is not one of this cluster that can be restored\nHINT: recoverable is {recoverable}.")]
    NoSuchBackup { backup: BackupId, recoverable: String },
    #[error(
        "backup {backup} does not reach {target}: it is consistent at {consistent}, and its WAL goes on to {newest}\nHINT: leave the backup out, and one that does is chosen."
    )]
    BackupDoesNotReach { backup: BackupId, target: String, consistent: RecoveryPoint, newest: RecoveryPoint },
}

/// A backup in a stretch of WAL that makes it consistent, on the way to a branch.
struct Start<'a> {
    backup: &'a BackupFacts,
    lineage: &'a Lineage,
    run: &'a Run,
    /// How far the stretch goes.
    newest: RecoveryPoint,
}

/// The newest backup that is consistent before the target, and the WAL that leads from it to there.
pub fn choose_backup(pick: &Pick, backups: &[BackupFacts], wal: &WalCatalog) -> Result<Choice, NotRecoverable> {
    if backups.is_empty() {
        return Err(NotRecoverable::NoneTaken);
    }
    let ranges = recovery_windows(backups, wal).ranges;
    if ranges.is_empty() {
        return Err(NotRecoverable::NoBackup);
    }
    let lineages = ways(pick.timeline, backups, wal)?;
    let stretches: Vec<(&Lineage, Vec<Run>)> = lineages.iter().map(|lineage| (lineage, lineage.runs(wal))).collect();
    let mut starts: Vec<Start<'_>> = Vec::new();
    for (lineage, runs) in &stretches {
        let allowed = |backup: &&BackupFacts| {
            lineage.holds(backup) && (pick.timeline != TimelineChoice::Current || backup.wal == lineage.tip())
        };
        for backup in backups.iter().filter(allowed) {
            if let Some(run) = runs.iter().find(|run| run.covers(lineage, backup)) {
                starts.push(Start { backup, lineage, run, newest: newest(lineage, run, backup) });
            }
        }
    }
    if let Some(wanted) = &pick.backup {
        starts.retain(|start| start.backup.id == *wanted);
        if starts.is_empty() {
            return Err(NotRecoverable::NoSuchBackup {
                backup: wanted.clone(),
                recoverable: printed_ranges(ranges.iter()),
            });
        }
    }
    // Newest first: by when it was consistent, since positions of different systems do not compare.
    starts.sort_by_key(|start| std::cmp::Reverse((start.backup.stopped_at_us, start.backup.stop_lsn)));
    match choose(pick.target, &starts) {
        Some(start) => Ok(start.choice(pick.target, wal)),
        None => Err(refusal(pick, &starts, &lineages, &ranges)),
    }
}

/// The ways that may be taken, one of which some backup serves. Each system identifier has its own.
pub fn ways(
    timeline: TimelineChoice,
    backups: &[BackupFacts],
    wal: &WalCatalog,
) -> Result<Vec<Lineage>, NotRecoverable> {
    let recoverable = || printed_ranges(recovery_windows(backups, wal).ranges.iter());
    let tips = tips(timeline, backups, wal)?;
    let found: Vec<Lineage> = tips.into_iter().filter_map(|tip| Lineage::to(tip, wal)).collect();
    let asked = match timeline {
        TimelineChoice::Number(timeline) => Some(timeline),
        TimelineChoice::Exactly(tip) => Some(tip.timeline),
        TimelineChoice::Named(name) => Some(name.timeline()),
        TimelineChoice::Latest | TimelineChoice::Current => None,
    };
    if let Some(timeline) = asked.filter(|_| found.is_empty()) {
        return Err(NotRecoverable::NoTimeline { timeline, recoverable: recoverable() });
    }
    let served = |lineage: &Lineage| backups.iter().any(|backup| lineage.holds(backup));
    match found.iter().map(|lineage| lineage.tip().timeline).max() {
        Some(timeline) if !found.iter().any(served) => {
            let newest = found.iter().map(Lineage::tip).filter(|tip| tip.timeline == timeline);
            if newest.clone().any(|tip| wal.is_of_unknown_origin(&tip)) {
                return Err(NotRecoverable::UnknownOrigin { timeline, recoverable: recoverable() });
            }
            Err(NotRecoverable::NoBackupOnTimeline { timeline, recoverable: recoverable() })
        }
        _ => Ok(found),
    }
}

/// The branches that a choice means: one for each system identifier, or all for [`TimelineChoice::Current`].
fn tips(choice: TimelineChoice, backups: &[BackupFacts], wal: &WalCatalog) -> Result<Vec<WalBranch>, NotRecoverable> {
    let of_timeline = |timeline| wal.branches.keys().filter(move |branch| branch.timeline == timeline);
    let one_of = |asked: &str, timeline: Timeline, found: Vec<&WalBranch>| match found[..] {
        [] => Ok(None),
        [one] => Ok(Some(*one)),
        [first, ..] => Err(NotRecoverable::Ambiguous {
            asked: asked.to_owned(),
            timeline,
            count: found.len(),
            branches: printed_branches(wal, found.iter().copied()),
            example: BranchName::from(first),
        }),
    };
    let mut tips = Vec::new();
    match choice {
        TimelineChoice::Current => tips.extend(wal.branches.keys()),
        TimelineChoice::Exactly(tip) => tips.push(tip),
        TimelineChoice::Named(name) => {
            for system_id in super::systems(backups) {
                let of_system = of_timeline(name.timeline()).filter(|tip| tip.system_id == system_id);
                let named = of_system.filter(|tip| name.names(tip)).collect();
                tips.extend(one_of(&name.to_string(), name.timeline(), named)?);
            }
            if tips.is_empty() && of_timeline(name.timeline()).next().is_some() {
                let branches = printed_branches(wal, of_timeline(name.timeline()));
                return Err(NotRecoverable::NoBranch { asked: name, branches });
            }
        }
        TimelineChoice::Number(timeline) => {
            for system_id in super::systems(backups) {
                let of_system = of_timeline(timeline).filter(|tip| tip.system_id == system_id).collect();
                tips.extend(one_of(&timeline.to_string(), timeline, undiverged(of_system, wal))?);
            }
        }
        TimelineChoice::Latest => {
            for system_id in super::systems(backups) {
                // Nothing lies on such a branch, so nothing is lost without it.
                let is_bare = |tip: &WalBranch| {
                    wal.is_of_unknown_origin(tip)
                        && wal.branches.get(tip).is_some_and(|known| known.segments.is_empty())
                };
                let of_system = || wal.branches.keys().filter(|tip| tip.system_id == system_id && !is_bare(tip));
                if let Some(newest) = of_system().map(|branch| branch.timeline).max() {
                    let newest_ones = of_system().filter(|tip| tip.timeline == newest).collect();
                    tips.extend(one_of("latest", newest, undiverged(newest_ones, wal))?);
                }
            }
        }
    }
    Ok(tips)
}

/// Those that left no other, if there are any: what did, or may have, is only meant by its name.
fn undiverged<'a>(mut found: Vec<&'a WalBranch>, wal: &WalCatalog) -> Vec<&'a WalBranch> {
    let is_own = |tip: &WalBranch| !wal.is_diverged(tip) && !wal.is_of_unknown_origin(tip);
    if found.iter().any(|tip| is_own(tip)) {
        found.retain(|tip| is_own(tip));
    }
    found
}

/// How far a backup's stretch goes: its last position, and the newest moment at or after the stop of which all is there.
fn newest(lineage: &Lineage, run: &Run, backup: &BackupFacts) -> RecoveryPoint {
    let newest = run.newest_us(lineage, backup.stop_lsn);
    RecoveryPoint {
        lsn: run.end(lineage).max(backup.stop_lsn),
        at_us: newest.map_or(backup.stopped_at_us, |newest| newest.max(backup.stopped_at_us)),
    }
}

/// The newest of `starts` (newest first) from which the target is reached.
fn choose<'a, 'b>(target: TargetPoint, starts: &'b [Start<'a>]) -> Option<&'b Start<'a>> {
    match target {
        TargetPoint::Time { .. } | TargetPoint::Lsn(_) => starts.iter().find(|start| start.reaches(target)),
        // Nobody knows where it is, so as much WAL as possible must lie behind the backup: the oldest from which the
        // newest stretch can be replayed without a gap.
        TargetPoint::Somewhere => {
            let newest = starts.first()?;
            let same = |start: &&Start<'_>| start.lineage == newest.lineage && start.run == newest.run;
            starts.iter().rfind(same)
        }
        TargetPoint::Immediate => starts.first(),
        TargetPoint::Latest => {
            let far = |start: &&Start<'_>| (start.run.newest_commit_us(start.lineage, Lsn::INVALID), start.newest.lsn);
            starts.iter().max_by_key(|start| (far(start), start.backup.stop_lsn))
        }
    }
}

impl Start<'_> {
    fn reaches(&self, target: TargetPoint) -> bool {
        match target {
            TargetPoint::Time { at_us, .. } => (self.backup.stopped_at_us..=self.newest.at_us).contains(&at_us),
            TargetPoint::Lsn(lsn) => (self.backup.stop_lsn..=self.newest.lsn).contains(&lsn),
            TargetPoint::Somewhere | TargetPoint::Immediate | TargetPoint::Latest => true,
        }
    }

    /// PostgreSQL stops before the first commit not earlier than an exclusive time, and after the last before the first
    /// that is later than an inclusive one. Where there is no such commit, it must not be told the time.
    fn stop_at_time(&self, at_us: i64, inclusive: bool) -> (Lsn, StopAt) {
        let stop = self.backup.stop_lsn;
        let later = self.run.end_of_reading(self.lineage, stop, at_us);
        let met = match inclusive {
            true => later.is_some(),
            false => self.run.newest_commit_us(self.lineage, stop).is_some_and(|newest| newest >= at_us),
        };
        // Behind the last known commit there may be later ones, at which Postgres would stop rightly.
        let unread = self.run.unread_end(self.lineage, stop).is_some();
        let to = later.map_or(self.newest.lsn, |end| end.min(self.newest.lsn));
        (to, if met || unread { StopAt::Target } else { StopAt::EndOfWal })
    }

    fn choice(&self, target: TargetPoint, wal: &WalCatalog) -> Choice {
        let end = self.newest.lsn;
        let (to, stop) = match target {
            TargetPoint::Time { at_us, inclusive } => self.stop_at_time(at_us, inclusive),
            TargetPoint::Lsn(lsn) if lsn >= end => (end, StopAt::EndOfWal),
            TargetPoint::Lsn(lsn) => (lsn.max(self.backup.stop_lsn), StopAt::Target),
            TargetPoint::Immediate => (self.backup.stop_lsn, StopAt::Target),
            TargetPoint::Somewhere => (end, StopAt::Target),
            TargetPoint::Latest => (end, StopAt::EndOfWal),
        };
        let (first, _) = needed(self.lineage, self.backup);
        let gaps = self.lineage.gaps(&self.lineage.runs(wal), first);
        let open_ended = matches!(target, TargetPoint::Latest | TargetPoint::Somewhere);
        Choice {
            backup: self.backup.id.clone(),
            wal: self.lineage.tip(),
            from: self.backup.start_lsn,
            to,
            reads: self.run.reads(self.lineage, self.backup.start_lsn, to),
            stop,
            ends_there: self.run.parted.is_some() && to >= end,
            tip_begins: self.lineage.tip_begins(),
            ends_at_gap: gaps.into_iter().find(|gap| open_ended && gap.from >= self.backup.stop_lsn),
        }
    }
}

fn printed(target: TargetPoint) -> String {
    match target {
        TargetPoint::Time { at_us, .. } => PrintedTime(at_us).to_string(),
        TargetPoint::Lsn(lsn) => lsn.to_string(),
        TargetPoint::Somewhere => "the target".to_owned(),
        TargetPoint::Immediate => "the first consistent point".to_owned(),
        TargetPoint::Latest => "the end of the WAL".to_owned(),
    }
}

/// Says on which side of what can be reached the target lies.
fn refusal(pick: &Pick, starts: &[Start<'_>], lineages: &[Lineage], ranges: &[RecoveryRange]) -> NotRecoverable {
    let target = printed(pick.target);
    let consistent =
        |start: &Start<'_>| RecoveryPoint { lsn: start.backup.stop_lsn, at_us: start.backup.stopped_at_us };
    if let (Some(backup), Some(start)) = (&pick.backup, starts.first()) {
        let (consistent, newest) = (consistent(start), start.newest);
        return NotRecoverable::BackupDoesNotReach { backup: backup.clone(), target, consistent, newest };
    }
    let on_way = |range: &&RecoveryRange| lineages.iter().any(|lineage| lineage.tip() == range.wal);
    let recoverable = match ranges.iter().filter(on_way).count() {
        0 => printed_ranges(ranges.iter()),
        _ => printed_ranges(ranges.iter().filter(on_way)),
    };
    let by_target = |point: &RecoveryPoint| match pick.target {
        TargetPoint::Lsn(_) => point.lsn.0 as i128,
        _ => i128::from(point.at_us),
    };
    let wanted = match pick.target {
        TargetPoint::Lsn(lsn) => lsn.0 as i128,
        TargetPoint::Time { at_us, .. } => i128::from(at_us),
        TargetPoint::Somewhere | TargetPoint::Immediate | TargetPoint::Latest => return NotRecoverable::NoBackup,
    };
    let earliest = starts.iter().map(consistent).min_by_key(by_target);
    let newest = starts.iter().map(|start| start.newest).max_by_key(by_target);
    match (earliest, newest) {
        (Some(earliest), _) if wanted < by_target(&earliest) => {
            NotRecoverable::TooEarly { target, earliest, recoverable }
        }
        (_, Some(newest)) if wanted > by_target(&newest) => NotRecoverable::TooLate { target, newest, recoverable },
        (None, None) => NotRecoverable::NoBackup,
        _ => NotRecoverable::InGap { target, recoverable },
    }
}
