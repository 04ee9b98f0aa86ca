//! Finding the moment: which transactions committed around a time, what each did, and how a restore stops just before it.
//!
//! Read from the archive alone. [`select`] keeps those worth showing of any number, [`read`] brings the segments, and
//! [`report`] words what is found. How much WAL is read is bounded, and what was not read is said.
//!
//! A restore stops before a transaction by position, not by number: `recovery_target_lsn` with
//! `recovery_target_inclusive = off` stops before the first record that begins there or later (recoveryStopsBefore,
//! src/backend/access/transam/xlogrecovery.c), while inclusive it would replay that record first (recoveryStopsAfter). A
//! number would stop at the same record, but nobody knows beforehand where a number ends, so the oldest backup would have to
//! be taken; and it would be too late for DROP DATABASE, which destroys before it commits.

mod read;
pub mod report;
pub mod select;

use std::ops::Range;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::postgres::{Lsn, Segment, WalBranch};
use walfleet_repository::recovery_window::lineage::Lineage;
use walfleet_repository::recovery_window::{
    BackupFacts, BranchName, NotRecoverable, Pick, TargetPoint, TimelineChoice, WalCatalog, WalGap, choose_backup, ways,
};
use walfleet_repository::wal_archive::{ArchiveError, WalArchive};
use walfleet_repository::wal_catalog;
use walfleet_repository::wal_catalog::around::{Around, Interval, around};

use crate::failure::{ExitCode, Failure, Remedy};
use crate::jobs::order::TargetTimeline;
use crate::postgres::wal_record::{Transaction, WalError};
use crate::progress::Progress;
use crate::restore::plan::timeline_choice;
use read::Reader;
use report::{CommitPoint, FindReport, FoundTransaction, Restore};
use select::{Selection, Show};

/// WAL read of the interval at most, nearest to the moment: a minute or two of reading from a store nearby.
const MOST_BYTES: u64 = 4 << 30;

/// Segments read before the interval, where transactions that commit in it began.
const LOOK_BACK: usize = 2;

/// And bytes of them where one that matters began earlier.
const FAR_LOOK_BACK_BYTES: u64 = 512 << 20;

/// Transactions listed at most: the report is kept in the controller's state, in values of some hundred KiB.
pub const MOST_LISTED: usize = 500;

/// And where nobody says how many: a page or two.
pub const FEW_LISTED: usize = 50;

pub struct FindRequest {
    pub cluster: OpenCluster,
    pub around: Timestamp,
    /// On either side.
    pub within: Duration,
    pub timeline: TargetTimeline,
    /// At most [`MOST_LISTED`].
    pub limit: usize,
    pub show: Show,
}

#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error(
        "no backup of this cluster is in the repository, so nothing can be restored\nHINT: take a backup; WAL from before it cannot be replayed."
    )]
    NoBackup,
    #[error("the backup's own timeline differs from backup to backup\nHINT: say latest, a number, or a branch.")]
    Current,
    #[error("{around} and {within} s on either side are no interval of time that can be searched")]
    Interval { around: Timestamp, within: u64 },
    #[error(transparent)]
    NotRecoverable(#[from] NotRecoverable),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("read {segment}: {source}")]
    Wal { segment: String, source: WalError },
    #[error("a reading thread ended without a result")]
    Lost,
    #[error("cancelled")]
    Cancelled,
}

impl From<FindError> for Failure {
    fn from(error: FindError) -> Failure {
        let (code, exit, remedy) = match &error {
            FindError::Cancelled => return Failure::cancelled(),
            FindError::Cluster(cluster) => return crate::access::cluster_failure(cluster),
            FindError::NoBackup | FindError::NotRecoverable(_) => {
                ("wal.not_recoverable", ExitCode::NotRecoverable, Remedy::Operator)
            }
            FindError::Current | FindError::Interval { .. } => ("wal.target", ExitCode::Usage, Remedy::Operator),
            FindError::Archive(archive) if archive.is_retryable() => {
                ("repository.store", ExitCode::Failed, Remedy::Retry)
            }
            FindError::Archive(_) | FindError::Wal { .. } => ("wal.unreadable", ExitCode::Failed, Remedy::Operator),
            FindError::Lost => ("wal.find", ExitCode::Failed, Remedy::Retry),
        };
        Failure::new(code, exit, remedy, error)
    }
}

/// Searches the WAL that leads to the chosen timeline; of a cluster with several system identifiers, of each.
pub async fn find(
    request: FindRequest,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<FindReport, FindError> {
    let interval = interval(&request)?;
    if request.timeline == TargetTimeline::Current {
        return Err(FindError::Current);
    }
    progress.enter("plan", 0);
    let log = request.cluster.log().await?;
    let backups = request.cluster.repository().backups(&log).await.readable;
    let facts: Vec<BackupFacts> = backups.iter().map(|backup| BackupFacts::from(&backup.reference)).collect();
    let sizes: Vec<_> = backups.iter().map(|backup| backup.reference.segment_size).collect();
    let archive = request.cluster.wal_archive(3);
    let mut catalog = wal_catalog::read(&archive, &wal_catalog::systems(&facts, &sizes)).await?;
    let ways = ways(timeline_choice(request.timeline), &facts, &catalog)?;
    if ways.is_empty() {
        return Err(FindError::NoBackup);
    }
    let mut report = FindReport::of(&request)?;
    for way in &ways {
        let segments = way.segments(&catalog, 0);
        let found = around(&archive, &mut catalog, &segments, interval).await?;
        let search = Search {
            archive: &archive,
            way,
            catalog: &catalog,
            segments: &segments,
            found: &found,
            interval,
            progress,
            cancel,
        };
        let (selection, read) = search.run(&request, &mut report.notes).await?;
        report.add_searched(way, &segments, read);
        let held = Held { way, facts: &facts, catalog: &catalog };
        report.add(selection, |transaction| held.describe(transaction));
    }
    report.close();
    Ok(report)
}

fn interval(request: &FindRequest) -> Result<Interval, FindError> {
    let moment_us = request.around.as_microsecond();
    let within = i64::try_from(request.within.as_micros()).ok();
    let ends = within.and_then(|within| Some((moment_us.checked_sub(within)?, moment_us.checked_add(within)?)));
    let bad = || FindError::Interval { around: request.around, within: request.within.as_secs() };
    let (from_us, to_us) = ends.ok_or_else(bad)?;
    Ok(Interval { from_us, to_us, moment_us })
}

/// One way of the WAL, and where on it the interval lies.
struct Search<'a> {
    archive: &'a WalArchive,
    way: &'a Lineage,
    catalog: &'a WalCatalog,
    segments: &'a [(WalBranch, u64)],
    found: &'a Around,
    interval: Interval,
    progress: &'a Progress,
    cancel: &'a CancellationToken,
}

impl Search<'_> {
    async fn run(
        &self,
        request: &FindRequest,
        notes: &mut Vec<String>,
    ) -> Result<(Selection, Range<usize>), FindError> {
        let segment_bytes = u64::from(self.way.size.bytes());
        let most = usize::try_from(MOST_BYTES / segment_bytes).unwrap_or(1).max(1);
        let all = self.wanted();
        let wanted = nearest(&all, self.found.moment, most);
        if wanted != all {
            notes.push(format!(
                "only {} of {} segments were read, those nearest to the moment: narrow it with --within",
                wanted.len(),
                all.len()
            ));
        }
        let fresh = || Selection::new(self.interval, request.limit, request.show);
        let (mut selection, mut read, mut unread) = self.read_from(fresh(), &wanted, LOOK_BACK).await?;
        let far = usize::try_from(FAR_LOOK_BACK_BYTES / segment_bytes).unwrap_or(0).max(LOOK_BACK);
        if selection.misses_a_beginning() && self.back(wanted.start, far) < read.start {
            (selection, read, unread) = self.read_from(fresh(), &wanted, far).await?;
        }
        let searched = self.searched(&read);
        notes.extend(unknown(self.way, self.catalog, &searched, &unread));
        // The neighbours of an idle stretch lie apart, and only their commits are wanted.
        for (beside, is_known) in
            [(self.found.before, selection.before.is_some()), (self.found.after, selection.after.is_some())]
        {
            if let Some(place) = beside.filter(|_| !is_known) {
                let (neighbour, ..) = self.read_from(fresh(), &(place..place + 1), 0).await?;
                selection.take_neighbours(&neighbour);
            }
        }
        if selection.has_overflowed {
            notes.push("more transactions were open at once than are counted: some counts are at least".to_owned());
        }
        Ok((selection, read))
    }

    /// The segments of the interval, and the next one: commits may be out of order at the edge.
    fn wanted(&self) -> Range<usize> {
        let within = &self.found.within;
        let is_next = self.found.after == Some(within.end) && self.follows(within.end);
        within.start..if is_next || within.is_empty() { (within.end + 1).min(self.segments.len()) } else { within.end }
    }

    /// Whether a segment continues the one listed before it.
    fn follows(&self, place: usize) -> bool {
        let before = place.checked_sub(1).and_then(|before| self.segments.get(before));
        match (before, self.segments.get(place)) {
            (Some((_, before)), Some((_, number))) => before.checked_add(1) == Some(*number),
            _ => false,
        }
    }

    /// As many places back, as far as no WAL is missing.
    fn back(&self, from: usize, count: usize) -> usize {
        let steps = (1..=from).rev().take(count).take_while(|place| self.follows(*place)).count();
        from - steps
    }

    async fn read_from(
        &self,
        selection: Selection,
        wanted: &Range<usize>,
        look_back: usize,
    ) -> Result<(Selection, Range<usize>, Vec<Segment>), FindError> {
        let read = self.back(wanted.start, look_back)..wanted.end;
        let segments = self.segments.get(read.clone()).unwrap_or_default();
        let reader = Reader { archive: self.archive, size: self.way.size, progress: self.progress };
        tokio::select! {
            // It only reads.
            () = self.cancel.cancelled() => Err(FindError::Cancelled),
            found = reader.read(segments, selection) => {
                let (selection, unread) = found?;
                Ok((selection, read, unread))
            }
        }
    }

    /// What the answer speaks of: what was read, and what lies between it and the commits on either side.
    fn searched(&self, read: &Range<usize>) -> Range<Lsn> {
        let first = self.found.before.unwrap_or(read.start).min(read.start);
        let last = self.found.after.unwrap_or(read.end).max(read.end.saturating_sub(1));
        let number = |place: usize| self.segments.get(place).map(|(_, number)| *number);
        let start = number(first).map_or(Lsn::INVALID, |number| self.way.start(number));
        let end = number(last).or(self.segments.last().map(|(_, number)| *number));
        start..end.map_or(Lsn::INVALID, |number| self.way.start(number.saturating_add(1)))
    }
}

/// What may have committed there and cannot be known, in words.
fn unknown(way: &Lineage, catalog: &WalCatalog, searched: &Range<Lsn>, unread: &[Segment]) -> Vec<String> {
    let gaps = way.gaps(&way.runs(catalog), searched.start.segment_number(way.size));
    // What only cannot be replayed was read.
    let is_missing =
        |gap: &&WalGap| catalog.unlogged_at(gap).is_none() && gap.to > searched.start && gap.from < searched.end;
    let missing: Vec<&WalGap> = gaps.iter().filter(is_missing).collect();
    let is_named = |segment: &Segment| {
        let start = segment.start(way.size);
        missing.iter().any(|gap| gap.from <= start && start < gap.to)
    };
    let unread = unread.iter().filter(|segment| !is_named(segment)).map(|segment| {
        format!("segment {} does not read: what committed in it is not known", segment.file_name(way.size))
    });
    let missing = missing
        .iter()
        .map(|gap| format!("WAL from {} to {} is missing: what committed there is not known", gap.from, gap.to));
    missing.chain(unread).collect()
}

/// At most so many places of a range, around one in it.
fn nearest(all: &Range<usize>, moment: usize, most: usize) -> Range<usize> {
    if all.len() <= most {
        return all.clone();
    }
    let end = moment.saturating_add(most.div_ceil(2)).clamp(all.start + most, all.end);
    end - most..end
}

/// What a restore can be made of.
struct Held<'a> {
    way: &'a Lineage,
    facts: &'a [BackupFacts],
    catalog: &'a WalCatalog,
}

impl Held<'_> {
    fn describe(&self, transaction: &Transaction) -> FoundTransaction {
        let wal = self.way.branch_of(transaction.commit_start.segment_number(self.way.size));
        FoundTransaction::of(transaction, wal.timeline, self.restore(transaction.stop_before))
    }

    /// The arguments that restore to just before a position; the first line of why not.
    fn restore(&self, stop: Lsn) -> Result<Restore, String> {
        let timeline = self.timeline();
        let tip = self.way.tip();
        let choose = |timeline| {
            let pick = Pick { target: TargetPoint::Lsn(stop), timeline, backup: None };
            choose_backup(&pick, self.facts, self.catalog)
        };
        let typed = timeline.unwrap_or(TimelineChoice::Latest);
        let choice = choose(typed).ok().filter(|choice| choice.wal == tip);
        let backup = match choice {
            Some(_) => None,
            // Positions of another system compare, and mean nothing here: the backup says which is meant.
            None => {
                let exact = choose(TimelineChoice::Exactly(tip));
                let first_line =
                    |error: NotRecoverable| error.to_string().lines().next().unwrap_or_default().to_owned();
                Some(exact.map_err(first_line)?.backup)
            }
        };
        let timeline = match timeline {
            Some(TimelineChoice::Number(number)) => Some(number.to_string()),
            Some(_) => Some(BranchName::from(&tip).to_string()),
            None => None,
        };
        Ok(Restore { stop, timeline, backup })
    }

    /// Named wherever there is another: "latest" may mean that one. By its number, if that tells.
    fn timeline(&self) -> Option<TimelineChoice> {
        let tip = self.way.tip();
        let others = || self.catalog.branches.keys().filter(|other| **other != tip);
        if others().any(|other| other.timeline == tip.timeline && other.system_id == tip.system_id) {
            Some(TimelineChoice::Named(BranchName::from(&tip)))
        } else {
            others().any(|other| other.system_id == tip.system_id).then_some(TimelineChoice::Number(tip.timeline))
        }
    }
}

impl From<select::Neighbour> for CommitPoint {
    fn from(neighbour: select::Neighbour) -> CommitPoint {
        CommitPoint { at: report::timestamp(neighbour.at_us), lsn: neighbour.lsn, xid: neighbour.xid }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use walfleet_repository::postgres::{Branch, SegmentSize, SystemId, Timeline, TimelineHistory};
    use walfleet_repository::recovery_window::{BranchWal, SegmentFacts};

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn wal(system: u64, timeline: u32, branch: u8) -> WalBranch {
        WalBranch { system_id: SystemId(system), timeline: Timeline(timeline), branch: Branch([branch; 8]) }
    }

    fn root(system: u64) -> WalBranch {
        WalBranch { branch: Branch::ROOT, ..wal(system, 1, 0) }
    }

    /// A backup in the first segment of each.
    fn backups(of: &[WalBranch]) -> Vec<BackupFacts> {
        let ids = ["bk_a", "bk_b"].iter().map(|id| id.parse().expect("an id"));
        let backup = |(wal, (number, id)): (&WalBranch, (i64, _))| BackupFacts {
            id,
            wal: *wal,
            start_lsn: Lsn(0x100_0028),
            stop_lsn: Lsn(0x100_0100),
            stopped_at_us: number,
        };
        of.iter().zip((1..).zip(ids)).map(backup).collect()
    }

    /// Segments 1 to 4 of each; the second of one system left the first at the beginning of segment 3.
    fn catalog(of: &[WalBranch]) -> WalCatalog {
        let branch = |wal: &WalBranch| {
            let left = Lsn(3 * u64::from(SIZE.bytes()));
            let ancestors = if wal.timeline == Timeline(1) { vec![] } else { vec![(Timeline(1), left)] };
            let segments = (1..5).map(|number| Segment { timeline: wal.timeline, number });
            (*wal, BranchWal::listed(SIZE, segments, Some(TimelineHistory { timeline: wal.timeline, ancestors })))
        };
        WalCatalog { branches: of.iter().map(branch).collect(), ..WalCatalog::default() }
    }

    fn restore(tip: WalBranch, stop: u64, backups: &[BackupFacts], catalog: &WalCatalog) -> Result<String, String> {
        let way = Lineage::to(tip, catalog).expect("a way");
        let held = Held { way: &way, facts: backups, catalog };
        held.restore(Lsn(stop)).map(|restore| restore.to_string())
    }

    #[test]
    fn a_target_says_no_more_than_it_takes_to_be_the_right_one() {
        let (one, two, twin, other) = (root(1), wal(1, 2, 0xab), wal(1, 2, 0xcd), root(9));
        let alone = catalog(&[one]);
        assert_eq!(restore(one, 0x200_0028, &backups(&[one]), &alone).unwrap(), "--to-lsn 0/2000028 --exclusive");
        let early = restore(one, 0x100_0080, &backups(&[one]), &alone).unwrap_err();
        assert!(early.contains("before the first backup") && !early.contains('\n'), "{early}");

        // A later promotion would turn "latest" aside.
        let both = catalog(&[one, two]);
        let on_two = restore(two, 0x400_0028, &backups(&[one]), &both).unwrap();
        assert_eq!(on_two, "--to-lsn 0/4000028 --exclusive --timeline 2");
        let on_one = restore(one, 0x400_0028, &backups(&[one]), &both).unwrap();
        assert_eq!(on_one, "--to-lsn 0/4000028 --exclusive --timeline 1");
        let twins = catalog(&[one, two, twin]);
        let on_two = restore(two, 0x400_0028, &backups(&[one]), &twins).unwrap();
        assert_eq!(on_two, "--to-lsn 0/4000028 --exclusive --timeline 2-abababababababab");

        // The newest backup that reaches the position is of the other system.
        let apart = catalog(&[one, other]);
        let older = restore(one, 0x200_0028, &backups(&[one, other]), &apart).unwrap();
        assert_eq!(older, "--to-lsn 0/2000028 --exclusive --backup bk_a");
        let newer = restore(other, 0x200_0028, &backups(&[one, other]), &apart).unwrap();
        assert_eq!(newer, "--to-lsn 0/2000028 --exclusive");
    }

    #[test]
    fn wal_that_is_missing_where_was_looked_is_told_of() {
        let one = root(1);
        let mut holed = catalog(&[one]);
        let branch = holed.branches.get_mut(&one).expect("the branch");
        let last = branch.segments.remove(&4).expect("a segment");
        branch.segments.insert(8, last);
        let begun = SegmentFacts { records_end: Some(Lsn(0x380_0000)), is_begun: true, ..SegmentFacts::default() };
        branch.segments.insert(3, begun);
        let way = Lineage::to(one, &holed).expect("a way");
        let told = |from: u64, to: u64, unread: &[u64]| {
            let segment = |number: &u64| Segment { timeline: one.timeline, number: *number };
            let unread: Vec<Segment> = unread.iter().map(segment).collect();
            unknown(&way, &holed, &(way.start(from)..way.start(to)), &unread).join("; ")
        };
        assert_eq!(told(1, 3, &[]), "");
        let rest = "WAL from 0/3800000 to 0/4000000 is missing: what committed there is not known";
        let hole = "WAL from 0/4000000 to 0/8000000 is missing: what committed there is not known";
        assert_eq!(told(1, 4, &[]), rest, "of the segment that was begun");
        assert_eq!(told(3, 9, &[5]), format!("{rest}; {hole}"));
        let unread = "segment 000000010000000000000002 does not read: what committed in it is not known";
        assert_eq!(told(1, 3, &[2]), unread);
    }

    #[test]
    fn what_is_read_of_too_much_lies_around_the_moment() {
        assert_eq!(nearest(&(3..9), 5, 10), 3..9);
        assert_eq!(nearest(&(0..100), 50, 10), 45..55);
        assert_eq!(nearest(&(0..100), 2, 10), 0..10);
        assert_eq!(nearest(&(0..100), 99, 10), 90..100);
        assert_eq!(nearest(&(20..100), 20, 1), 20..21);
    }
}
