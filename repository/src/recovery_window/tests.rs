mod reaches;
mod unknown_origin;
mod unlogged;

use proptest::prelude::*;

use super::*;
use crate::format::wal_history::Joint;
use crate::ids::ChunkId;
use crate::postgres::{Branch, Timeline};

/// Segments of 1 MiB: a position is a segment number and an offset.
fn lsn(segment: u64, offset: u64) -> Lsn {
    Lsn((segment << 20) + offset)
}

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn branch(timeline: u32) -> WalBranch {
    let branch = if timeline == 1 { Branch::ROOT } else { Branch([timeline as u8; 8]) };
    WalBranch { system_id: SystemId(7), timeline: Timeline(timeline), branch }
}

fn backup(id: &str, timeline: u32, start: Lsn, stop: Lsn) -> BackupFacts {
    // Time runs with the segments: one second each, a million microseconds.
    let stopped_at_us = time(stop);
    BackupFacts { id: id.parse().unwrap(), wal: branch(timeline), start_lsn: start, stop_lsn: stop, stopped_at_us }
}

fn time(lsn: Lsn) -> i64 {
    (lsn.0 as i64) * 1_000_000 / (1 << 20)
}

/// Segments with a commit in their middle and no padding.
fn wal(timeline: u32, segments: impl IntoIterator<Item = u64>, ancestors: &[(u32, Lsn)]) -> (WalBranch, BranchWal) {
    let facts = |number: u64| {
        let middle = time(lsn(number, 1 << 19));
        let commits = SegmentCommits::Between { first_us: middle, last_us: middle };
        (number, SegmentFacts { records_end: Some(lsn(number + 1, 0)), commits, ..SegmentFacts::default() })
    };
    let ancestors = ancestors.iter().map(|(timeline, end)| (Timeline(*timeline), *end)).collect();
    let history = (timeline > 1).then_some(TimelineHistory { timeline: Timeline(timeline), ancestors });
    let segments = segments.into_iter().map(facts).collect();
    (branch(timeline), BranchWal { segment_size: size(), segments, history, parent: None, divergence: None })
}

fn catalog(branches: impl IntoIterator<Item = (WalBranch, BranchWal)>) -> WalCatalog {
    WalCatalog { branches: branches.into_iter().collect(), ..WalCatalog::default() }
}

/// Ranges as (timeline, from, to, backups).
fn ranges(windows: &Windows) -> Vec<(u32, Lsn, Lsn, usize)> {
    let facts = |range: &RecoveryRange| (range.wal.timeline.0, range.from.lsn, range.to.lsn, range.backups.len());
    windows.ranges.iter().map(facts).collect()
}

fn pick(target: TargetPoint) -> Pick {
    Pick { target, timeline: TimelineChoice::Latest, backup: None }
}

fn at(at_us: i64) -> TargetPoint {
    TargetPoint::Time { at_us, inclusive: true }
}

#[test]
fn backups_in_contiguous_wal_make_one_range() {
    let backups = [backup("bk_2", 1, lsn(6, 40), lsn(6, 900)), backup("bk_1", 1, lsn(2, 40), lsn(3, 900))];
    let windows = recovery_windows(&backups, &catalog([wal(1, 1..=9, &[])]));
    assert_eq!(ranges(&windows), [(1, lsn(3, 900), lsn(10, 0), 2)]);
    assert_eq!(windows.ranges[0].backups[0].as_str(), "bk_1", "oldest first");
    assert_eq!(windows.ranges[0].from.at_us, time(lsn(3, 900)));
    assert_eq!(windows.ranges[0].to.at_us, time(lsn(9, 1 << 19)), "the newest commit");
    assert!(windows.gaps.is_empty() && windows.unrestorable.is_empty());
}

#[test]
fn a_missing_segment_parts_the_range_and_is_named() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9)), backup("bk_2", 1, lsn(8, 0), lsn(8, 9))];
    let windows = recovery_windows(&backups, &catalog([wal(1, [1, 2, 3, 4, 7, 8, 9], &[])]));
    assert_eq!(ranges(&windows), [(1, lsn(3, 9), lsn(5, 0), 1), (1, lsn(8, 9), lsn(10, 0), 1)]);
    assert_eq!(windows.gaps, [WalGap { wal: branch(1), from: lsn(5, 0), to: lsn(7, 0) }]);
}

/// Of segment `number` only the beginning is there, up to an offset, with a commit just before; complete a second later.
fn begin(wal: &mut (WalBranch, BranchWal), number: u64, offset: u64) {
    let end = lsn(number, offset);
    let commits = SegmentCommits::Between { first_us: time(end), last_us: time(end) };
    let complete_at_us = Some(time(end) + 1_000_000);
    let facts =
        SegmentFacts { records_end: Some(end), commits, is_begun: true, complete_at_us, ..SegmentFacts::default() };
    wal.1.segments.insert(number, facts);
}

#[test]
fn a_begun_segment_extends_the_range_to_its_last_record() {
    let mut one = wal(1, 1..=4, &[]);
    begin(&mut one, 5, 1000);
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9)), backup("bk_2", 1, lsn(4, 0), lsn(5, 1000))];
    let late = backup("bk_3", 1, lsn(4, 0), lsn(5, 1001));
    let catalog = catalog([one]);
    let windows = recovery_windows(&backups, &catalog);
    assert_eq!(ranges(&windows), [(1, lsn(3, 9), lsn(5, 1000), 2)]);
    assert_eq!(windows.ranges[0].to.at_us, time(lsn(5, 1000)) + 1_000_000, "the server had no more by then");
    let lost = recovery_windows(&[late], &catalog).unrestorable;
    assert_eq!(lost[0].missing.from, lsn(5, 0), "its last record is not there yet");

    let idle = choose_backup(&pick(at(time(lsn(5, 1000)) + 500_000)), &backups, &catalog).unwrap();
    assert_eq!((idle.stop, idle.to), (StopAt::EndOfWal, lsn(5, 1000)), "no commit follows at which to stop");
    let position = |lsn| choose_backup(&pick(TargetPoint::Lsn(lsn)), &backups, &catalog).unwrap();
    assert_eq!((position(lsn(5, 999)).stop, position(lsn(5, 999)).to), (StopAt::Target, lsn(5, 999)));
    let end = position(lsn(5, 1000));
    assert_eq!((end.stop, end.to), (StopAt::EndOfWal, lsn(5, 1000)), "no record begins there, at which to stop");
    let late = choose_backup(&pick(at(time(lsn(5, 1000)) + 1_000_001)), &backups, &catalog);
    assert!(matches!(late, Err(NotRecoverable::TooLate { .. })), "{late:?}");
}

#[test]
fn an_idle_stretch_ends_when_the_server_was_last_seen_to_have_no_more() {
    let mut one = wal(1, 1..=4, &[]);
    begin(&mut one, 5, 1000);
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9))];
    let hour = time(lsn(5, 1000)) + 3_600_000_000;
    let known = |lsn| KnownComplete { system_id: SystemId(7), timeline: Timeline(1), lsn, at_us: hour };
    let reached = |known: KnownComplete, wal: Vec<(WalBranch, BranchWal)>| {
        let mut catalog = catalog(wal);
        catalog.note_complete(&known);
        choose_backup(&pick(at(hour)), &backups, &catalog).map(|choice| (choice.stop, choice.to))
    };
    assert_eq!(reached(known(lsn(5, 1000)), vec![one.clone()]), Ok((StopAt::EndOfWal, lsn(5, 1000))));
    assert!(reached(known(lsn(5, 1100)), vec![one.clone()]).is_err(), "some of what it had is not there");
    assert!(reached(known(lsn(6, 0)), vec![one.clone()]).is_err());
    assert!(reached(KnownComplete { timeline: Timeline(2), ..known(lsn(5, 0)) }, vec![one.clone()]).is_err());
    let mut twin = wal(1, 1..=4, &[]);
    twin.0.branch = Branch([9; 8]);
    assert!(reached(known(lsn(5, 1000)), vec![one, twin]).is_err(), "whose it is is not known");
    let finished = wal(1, 1..=5, &[]);
    assert_eq!(reached(known(lsn(6, 40)), vec![finished]), Ok((StopAt::EndOfWal, lsn(6, 0))), "behind a page header");
}

#[test]
fn what_a_begun_segment_lacks_is_a_gap_once_more_follows() {
    let mut one = wal(1, [1, 2, 3, 4, 6, 7], &[]);
    begin(&mut one, 5, 1000);
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9))];
    let windows = recovery_windows(&backups, &catalog([one.clone()]));
    assert_eq!(ranges(&windows), [(1, lsn(3, 9), lsn(5, 1000), 1)]);
    assert_eq!(windows.gaps, [WalGap { wal: branch(1), from: lsn(5, 1000), to: lsn(6, 0) }]);
    one.1.segments.remove(&6);
    let windows = recovery_windows(&backups, &catalog([one]));
    let gap = |from, to| WalGap { wal: branch(1), from, to };
    assert_eq!(windows.gaps, [gap(lsn(5, 1000), lsn(6, 0)), gap(lsn(6, 0), lsn(7, 0))]);
}

#[test]
fn a_backup_without_its_own_wal_is_not_restorable() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(4, 9)), backup("bk_2", 1, lsn(6, 0), lsn(7, 0))];
    let windows = recovery_windows(&backups, &catalog([wal(1, [2, 4, 5, 6], &[])]));
    // The stop of the second is the end of segment 6: segment 7 is not needed.
    assert_eq!(ranges(&windows), [(1, lsn(7, 0), lsn(7, 0), 1)]);
    let missing = WalGap { wal: branch(1), from: lsn(3, 0), to: lsn(4, 0) };
    assert_eq!(windows.unrestorable, [Unrestorable { backup: "bk_1".parse().unwrap(), missing }]);
    assert_eq!(windows.gaps, [missing]);
    let nothing = recovery_windows(&backups, &WalCatalog::default());
    assert_eq!((nothing.ranges.len(), nothing.unrestorable.len()), (0, 2));
}

#[test]
fn a_backup_extends_into_the_timeline_that_continues_its_own() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9))];
    let switch = lsn(5, 700);
    // The old timeline's last segment was archived as .partial, the new one's first has its content.
    let whole = catalog([wal(1, 2..=4, &[]), wal(2, 5..=8, &[(1, switch)])]);
    assert_eq!(ranges(&recovery_windows(&backups, &whole)), [(2, lsn(3, 9), lsn(9, 0), 1)]);
    // Without the new timeline's first segment its later ones are out of reach.
    let torn = catalog([wal(1, 2..=4, &[]), wal(2, 6..=8, &[(1, switch)])]);
    let windows = recovery_windows(&backups, &torn);
    assert_eq!(ranges(&windows), [(1, lsn(3, 9), lsn(5, 0), 1)]);
    assert_eq!(windows.gaps, [WalGap { wal: branch(2), from: lsn(5, 0), to: lsn(6, 0) }]);
    // Without its history nobody knows that it continues the first.
    let mut orphan = whole.clone();
    orphan.branches.get_mut(&branch(2)).unwrap().history = None;
    assert_eq!(ranges(&recovery_windows(&backups, &orphan)), [(1, lsn(3, 9), lsn(5, 0), 1)]);
}

#[test]
fn what_an_old_primary_wrote_after_the_switch_stays_its_own() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9)), backup("bk_2", 1, lsn(6, 0), lsn(6, 9))];
    let split = catalog([wal(1, 2..=7, &[]), wal(2, 5..=8, &[(1, lsn(5, 700))])]);
    let windows = recovery_windows(&backups, &split);
    assert_eq!(ranges(&windows), [(1, lsn(3, 9), lsn(8, 0), 2), (2, lsn(3, 9), lsn(9, 0), 1)]);
    // On the newest timeline the backup of the abandoned one does not serve.
    let choice = choose_backup(&pick(TargetPoint::Latest), &backups, &split).unwrap();
    assert_eq!((choice.backup.as_str(), choice.wal), ("bk_1", branch(2)));
    let reads = [(branch(1), 2, 5), (branch(2), 5, 9)];
    assert_eq!(choice.reads, reads.map(|(wal, from, to)| choose::WalRead { wal, from: lsn(from, 0), to: lsn(to, 0) }));
    let on_first = Pick { timeline: TimelineChoice::Number(Timeline(1)), ..pick(TargetPoint::Latest) };
    assert_eq!(choose_backup(&on_first, &backups, &split).unwrap().backup.as_str(), "bk_2");
}

#[test]
fn two_promotions_to_one_number_are_not_mixed_up() {
    let other = WalBranch { branch: Branch([9; 8]), ..branch(2) };
    let (_, mut rival) = wal(2, 6..=9, &[(1, lsn(6, 0))]);
    rival.history.as_mut().unwrap().ancestors = vec![(Timeline(1), lsn(6, 0))];
    let third = wal(3, 8..=9, &[(1, lsn(6, 0)), (2, lsn(8, 100))]);
    let all = catalog([wal(1, 2..=5, &[]), wal(2, 5..=7, &[(1, lsn(5, 700))]), (other, rival), third]);
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9))];
    let windows = recovery_windows(&backups, &all);
    assert_eq!(
        ranges(&windows),
        [(2, lsn(3, 9), lsn(8, 0), 1), (2, lsn(3, 9), lsn(10, 0), 1), (3, lsn(3, 9), lsn(10, 0), 1)]
    );
    let choice = choose_backup(&pick(TargetPoint::Latest), &backups, &all).unwrap();
    assert_eq!(choice.reads[1].wal, other, "timeline 3 branched off from the rival");
    let two = Pick { timeline: TimelineChoice::Number(Timeline(2)), ..pick(TargetPoint::Latest) };
    let refused = choose_backup(&two, &backups, &all).unwrap_err();
    assert!(matches!(refused, NotRecoverable::Ambiguous { timeline: Timeline(2), count: 2, .. }));
    let says = refused.to_string();
    for part in [
        "2-0202020202020202 left timeline 1 at 0/5002BC, newest commit 1970-01-01 00:00:07.5 UTC",
        "2-0909090909090909 left timeline 1 at 0/600000, newest commit 1970-01-01 00:00:09.5 UTC",
        "--timeline 2-0202020202020202",
    ] {
        assert!(says.contains(part), "{part}: {says}");
    }
    let to = |timeline| choose_backup(&Pick { timeline, ..two.clone() }, &backups, &all).map(|choice| choice.to);
    let named = |name: &str| to(TimelineChoice::Named(name.parse().unwrap()));
    assert_eq!(to(TimelineChoice::Exactly(branch(2))), Ok(lsn(8, 0)));
    assert_eq!((named("2-02"), named("2-09")), (Ok(lsn(8, 0)), Ok(lsn(10, 0))));
    assert!(matches!(named("2-0"), Err(NotRecoverable::Ambiguous { count: 2, .. })), "not enough of it");
    assert!(named("2-1").unwrap_err().to_string().contains("2-0909090909090909 left"));
    assert!(matches!(named("4-02"), Err(NotRecoverable::NoTimeline { timeline: Timeline(4), .. })));
}

/// A branch of a timeline that left `from` at a segment's start.
fn diverged(
    from: WalBranch,
    id: u8,
    segments: impl IntoIterator<Item = u64> + Clone,
    joint: Joint,
) -> (WalBranch, BranchWal) {
    let at = segments.clone().into_iter().min().unwrap();
    let (_, mut own) = wal(from.timeline.0, segments, &[]);
    own.divergence = Some(Divergence {
        member: format!("db{id}"),
        stored_by: "db1".to_owned(),
        from: from.branch,
        at: lsn(at, 0),
        content: ChunkId([id; 32]),
        joint,
        strays: Vec::new(),
        stray_tails: Vec::new(),
        found_at_us: time(lsn(at, 0)),
    });
    (WalBranch { branch: Branch([id; 8]), ..from }, own)
}

fn on(timeline: &str) -> Pick {
    Pick { timeline: TimelineChoice::Named(timeline.parse().unwrap()), ..pick(TargetPoint::Latest) }
}

#[test]
fn a_diverged_branch_goes_on_from_the_one_it_left_and_only_by_name() {
    let (twin, own) = diverged(branch(1), 8, 5..=9, Joint::Sound);
    let mut later = backup("bk_2", 1, lsn(6, 0), lsn(6, 9));
    later.wal = twin;
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9)), later, backup("bk_3", 1, lsn(6, 0), lsn(6, 9))];
    let all = catalog([wal(1, 2..=7, &[]), (twin, own)]);
    let windows = recovery_windows(&backups, &all);
    assert_eq!(ranges(&windows), [(1, lsn(3, 9), lsn(8, 0), 2), (1, lsn(3, 9), lsn(10, 0), 2)]);
    assert_eq!(windows.ranges.iter().map(|range| range.is_diverged).collect::<Vec<_>>(), [false, true]);
    assert_eq!(windows.newest().unwrap().wal, branch(1), "that the other goes on says nothing of this one");
    assert!(windows.gaps.is_empty() && windows.unrestorable.is_empty());

    let chosen = |pick: &Pick, backups: &[BackupFacts]| {
        choose_backup(pick, backups, &all).map(|choice| (choice.backup.to_string(), choice.wal, choice.to))
    };
    let number = Pick { timeline: TimelineChoice::Number(Timeline(1)), ..pick(TargetPoint::Latest) };
    for undiverged in [&pick(TargetPoint::Latest), &number, &on("1-00")] {
        assert_eq!(chosen(undiverged, &backups), Ok(("bk_3".to_owned(), branch(1), lsn(8, 0))));
    }
    assert_eq!(chosen(&on("1-08"), &backups), Ok(("bk_2".to_owned(), twin, lsn(10, 0))));
    // From a backup of what both have.
    let choice = choose_backup(&on("1-08"), &backups[..1], &all).unwrap();
    let reads = [(branch(1), 2, 5), (twin, 5, 10)];
    assert_eq!(choice.reads, reads.map(|(wal, from, to)| choose::WalRead { wal, from: lsn(from, 0), to: lsn(to, 0) }));
    assert_eq!(choice.tip_begins, lsn(5, 0));
    let says = choose_backup(&on("1-1"), &backups, &all).unwrap_err().to_string();
    assert!(says.contains("1-0808080808080808 is of db8, whose WAL differs from 0/500000"), "{says}");
}

#[test]
fn nothing_leads_to_a_branch_of_which_nobody_knows_what_was_before() {
    let (twin, own) = diverged(branch(1), 8, 5..=9, Joint::Open);
    let all = catalog([wal(1, 2..=7, &[]), (twin, own)]);
    let mut its = backup("bk_2", 1, lsn(6, 0), lsn(6, 9));
    its.wal = twin;
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9)), its];
    assert_eq!(
        ranges(&recovery_windows(&backups, &all)),
        [(1, lsn(3, 9), lsn(8, 0), 1), (1, lsn(6, 9), lsn(10, 0), 1)]
    );
    assert!(choose_backup(&on("1-08"), &backups[..1], &all).is_err());
    assert_eq!(choose_backup(&on("1-08"), &backups, &all).unwrap().backup.as_str(), "bk_2");
}

#[test]
fn branches_leave_diverged_ones_and_each_other_in_a_timelines_first_segment() {
    // Timeline 2 begins within segment 5, its twin in that segment, and the twin's twin in 7.
    let second = wal(2, 5..=8, &[(1, lsn(5, 700))]);
    let history = second.1.history.clone();
    let (twin, mut own) = diverged(branch(2), 8, 5..=9, Joint::Sound);
    let (third, mut its) = diverged(twin, 9, 7..=9, Joint::Sound);
    (own.history, its.history) = (history.clone(), history);
    let all = catalog([wal(1, 2..=4, &[]), second, (twin, own), (third, its)]);
    let of = |tip| Lineage::to(tip, &all).unwrap();
    let way = |tip: WalBranch| (2..=9).map(|number| of(tip).branch_of(number)).collect::<Vec<_>>();
    let (one, two) = (branch(1), branch(2));
    assert_eq!(way(two), [one, one, one, two, two, two, two, two]);
    assert_eq!(way(twin), [one, one, one, twin, twin, twin, twin, twin]);
    assert_eq!(way(third), [one, one, one, twin, twin, third, third, third]);
    let at_switch = backup("bk_1", 1, lsn(4, 0), lsn(5, 700));
    let behind = backup("bk_2", 1, lsn(4, 0), lsn(5, 701));
    for tip in [two, twin, third] {
        assert!(of(tip).holds(&at_switch) && !of(tip).holds(&behind));
    }
    assert!(!of(twin).holds(&backup("bk_3", 2, lsn(5, 800), lsn(5, 900))), "the same number, other WAL");
}

#[test]
fn a_timeline_leaves_the_branch_that_its_history_was_stored_with_and_none_is_guessed() {
    let (twin, own) = diverged(branch(1), 8, 5..=9, Joint::Sound);
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9))];
    let reads = |left_at: Lsn, parent: Option<Branch>| {
        let mut second = wal(2, left_at.segment_number(size())..=12, &[(1, left_at)]);
        second.1.parent = parent;
        let all = catalog([wal(1, 2..=9, &[]), (twin, own.clone()), second]);
        let choice = choose_backup(&pick(TargetPoint::Latest), &backups, &all).ok();
        choice.map(|choice| choice.reads.into_iter().map(|read| read.wal).collect::<Vec<_>>())
    };
    let (one, two) = (branch(1), branch(2));
    assert_eq!(reads(lsn(7, 9), Some(Branch::ROOT)), Some(vec![one, two]));
    assert_eq!(reads(lsn(7, 9), Some(twin.branch)), Some(vec![one, twin, two]));
    assert_eq!(reads(lsn(7, 9), None), None, "either may be meant");
    assert_eq!(reads(lsn(7, 9), Some(Branch([1; 8]))), None, "that one is not known");
    // Before the two parted they are one.
    assert_eq!(reads(lsn(4, 9), None), Some(vec![one, two]));
    assert_eq!(reads(lsn(5, 0), None), Some(vec![one, two]));
    assert_eq!(reads(lsn(4, 9), Some(twin.branch)), Some(vec![one, two]));
}

#[test]
fn a_split_brain_alarms_until_a_day_after_the_last_of_it() {
    const DAY: i64 = 24 * 3600 * 1_000_000;
    let (twin, mut own) = diverged(branch(1), 8, 5..=9, Joint::Sound);
    own.segments.get_mut(&9).unwrap().shipped_at_us = Some(2 * DAY);
    let all = catalog([wal(1, 2..=7, &[]), (twin, own)]);
    let printed: Vec<String> = split_brains(&all, 3 * DAY).iter().map(SplitBrain::to_string).collect();
    let text = "split brain: db8 writes other WAL than db1 on timeline 1 from 0/500000, which goes to branch 1-0808080808080808";
    assert_eq!(printed, [text]);
    assert!(split_brains(&all, 3 * DAY + 1).is_empty());
}

#[test]
fn the_newest_backup_before_the_target_is_chosen() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 0)), backup("bk_2", 1, lsn(6, 0), lsn(7, 0))];
    let all = catalog([wal(1, 1..=9, &[])]);
    let chosen =
        |target| choose_backup(&pick(target), &backups, &all).map(|choice| (choice.backup.to_string(), choice.to));
    let is = |id: &str, to| Ok((id.to_owned(), to));
    assert_eq!(chosen(at(time(lsn(6, 900)))), is("bk_1", lsn(7, 0)), "no WAL behind the first later commit is read");
    assert_eq!(chosen(at(time(lsn(7, 0)))), is("bk_2", lsn(8, 0)));
    assert_eq!(chosen(TargetPoint::Lsn(lsn(6, 900))), is("bk_1", lsn(6, 900)));
    assert_eq!(chosen(TargetPoint::Lsn(lsn(7, 0))), is("bk_2", lsn(7, 0)));
    assert_eq!(chosen(TargetPoint::Immediate), is("bk_2", lsn(7, 0)));
    assert_eq!(chosen(TargetPoint::Latest), is("bk_2", lsn(10, 0)));
    assert_eq!(chosen(TargetPoint::Somewhere), is("bk_1", lsn(10, 0)));
    let first = Pick { backup: Some("bk_1".parse().unwrap()), ..pick(TargetPoint::Latest) };
    assert_eq!(choose_backup(&first, &backups, &all).unwrap().from, lsn(2, 0));
}

#[test]
fn a_target_that_no_restore_reaches_is_refused_with_what_one_does() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 0)), backup("bk_2", 1, lsn(8, 0), lsn(9, 0))];
    let all = catalog([wal(1, [1, 2, 3, 4, 7, 8, 9], &[])]);
    let refused = |target| choose_backup(&pick(target), &backups, &all).unwrap_err();
    let newest = time(lsn(9, 1 << 19));
    assert!(matches!(refused(at(time(lsn(3, 0)) - 1)), NotRecoverable::TooEarly { .. }));
    assert!(matches!(refused(at(time(lsn(5, 0)))), NotRecoverable::InGap { .. }));
    let late = refused(at(newest + 1));
    assert!(matches!(late, NotRecoverable::TooLate { newest: point, .. } if point.at_us == newest));
    assert!(late.to_string().contains("1970-01-01 00:00:09.5 UTC"), "{late}");
    assert!(matches!(refused(TargetPoint::Lsn(lsn(10, 1))), NotRecoverable::TooLate { .. }));
    assert!(matches!(refused(TargetPoint::Lsn(lsn(2, 900))), NotRecoverable::TooEarly { .. }));
    let with = |backup: &str, timeline| Pick { backup: Some(backup.parse().unwrap()), timeline, ..pick(at(newest)) };
    let refused = |pick: Pick| choose_backup(&pick, &backups, &all).unwrap_err();
    let latest = TimelineChoice::Latest;
    assert!(matches!(refused(with("bk_1", latest)), NotRecoverable::BackupDoesNotReach { .. }));
    assert!(matches!(refused(with("bk_9", latest)), NotRecoverable::NoSuchBackup { .. }));
    let unknown = TimelineChoice::Number(Timeline(4));
    assert!(matches!(refused(with("bk_1", unknown)), NotRecoverable::NoTimeline { timeline: Timeline(4), .. }));
    assert_eq!(choose_backup(&pick(at(0)), &[], &all).unwrap_err(), NotRecoverable::NoneTaken);
}

#[test]
fn postgres_is_told_a_time_only_if_it_meets_a_commit_there() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 0))];
    let mut all = catalog([wal(1, 1..=5, &[])]);
    let stop = |at_us, inclusive, all: &WalCatalog| {
        choose_backup(&pick(TargetPoint::Time { at_us, inclusive }), &backups, all).unwrap().stop
    };
    let newest = time(lsn(5, 1 << 19));
    assert_eq!(stop(newest - 1, true, &all), StopAt::Target);
    assert_eq!(stop(newest, true, &all), StopAt::EndOfWal, "no later commit would stop it");
    assert_eq!(stop(newest, false, &all), StopAt::Target, "it stops before this one");
    // A segment behind the newest known commit that nobody read may have a later one.
    let (_, unread) = all.branches.iter_mut().next().unwrap();
    unread.segments.insert(6, SegmentFacts::default());
    assert_eq!(stop(newest, true, &all), StopAt::Target);
    assert_eq!(ends_to_read(&backups, &all), [(branch(1), 6)].into());
}

#[test]
fn the_ends_are_read_until_a_commit_is_found() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 0))];
    let listed = (2..=9).map(|number| Segment { timeline: Timeline(1), number });
    let mut all = catalog([(branch(1), BranchWal::listed(size(), listed, None))]);
    let mut read = Vec::new();
    while let Some((wal, number)) = ends_to_read(&backups, &all).into_iter().next() {
        read.push(number);
        let commits = match number {
            8.. => SegmentCommits::None,
            _ => SegmentCommits::Between { first_us: 70, last_us: 77_000_000 },
        };
        let facts = SegmentFacts { records_end: Some(lsn(number, 500)), commits, ..SegmentFacts::default() };
        all.branches.get_mut(&wal).unwrap().segments.insert(number, facts);
    }
    assert_eq!(read, [9, 8, 7]);
    let windows = recovery_windows(&backups, &all);
    assert_eq!(windows.ranges[0].to, RecoveryPoint { lsn: lsn(9, 500), at_us: 77_000_000 });
}

#[test]
fn a_second_system_under_one_name_has_ranges_of_its_own() {
    let upgraded = SystemId(8);
    let mut later = backup("bk_2", 1, lsn(1, 0), lsn(2, 0));
    later.wal.system_id = upgraded;
    later.stopped_at_us = time(lsn(20, 0));
    let (mut wal_branch, mut new) = wal(1, 1..=3, &[]);
    wal_branch.system_id = upgraded;
    new.segments.values_mut().for_each(|facts| facts.commits = SegmentCommits::None);
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 0)), later];
    let all = catalog([wal(1, 1..=9, &[]), (wal_branch, new)]);
    assert_eq!(recovery_windows(&backups, &all).ranges.len(), 2);
    let chosen = |target| choose_backup(&pick(target), &backups, &all).unwrap().backup.to_string();
    assert_eq!(chosen(at(time(lsn(8, 0)))), "bk_1");
    assert_eq!(chosen(at(time(lsn(20, 0)))), "bk_2");
    assert_eq!(chosen(TargetPoint::Immediate), "bk_2");
}

/// A world: timelines that branch off one another, segments present or lost, backups here and there.
#[derive(Clone, Debug)]
struct World {
    backups: Vec<BackupFacts>,
    wal: WalCatalog,
}

const SEGMENTS: u64 = 12;

fn worlds() -> impl Strategy<Value = World> {
    let lost = proptest::collection::vec(proptest::bool::weighted(0.15), 3 * SEGMENTS as usize);
    let backups = proptest::collection::vec((1u32..=3, 0..SEGMENTS << 20, 1u64..3 << 20), 0..4);
    let third_from = 1u32..=2;
    (1..SEGMENTS << 20, 1..SEGMENTS << 20, third_from, lost, backups).prop_map(
        |(second, third, parent, lost, backups)| {
            let second = Lsn(second);
            // The third timeline branches off from the first before the second did, or from the second after it.
            let (third, ancestors) = match parent {
                1 => (Lsn(third), vec![(1, Lsn(third))]),
                _ => (Lsn(second.0.max(third)), vec![(1, second), (2, Lsn(second.0.max(third)))]),
            };
            let from = [0, second.segment_number(size()), third.segment_number(size())];
            let there = |timeline: usize| {
                let lost = &lost[(timeline - 1) * SEGMENTS as usize..];
                (from[timeline - 1]..SEGMENTS).filter(|number| !lost[*number as usize]).collect::<Vec<_>>()
            };
            let wal = catalog([wal(1, there(1), &[]), wal(2, there(2), &[(1, second)]), wal(3, there(3), &ancestors)]);
            let begin = [Lsn(0), second, third];
            let facts = |(n, (timeline, start, length)): (usize, (u32, u64, u64))| {
                let start = Lsn(start).max(begin[timeline as usize - 1]);
                backup(&format!("bk_{n}"), timeline, start, Lsn(start.0 + length))
            };
            World { backups: backups.into_iter().enumerate().map(facts).collect(), wal }
        },
    )
}

/// Whether a restore of one backup to a position on one timeline works, by what PostgreSQL does segment by segment.
fn replays(world: &World, backup: &BackupFacts, tip: u32, to: Lsn) -> bool {
    let mut way = vec![(Timeline(tip), None)];
    if let Some(history) = &world.wal.branches[&branch(tip)].history {
        way.extend(history.ancestors.iter().rev().map(|(timeline, end)| (*timeline, Some(*end))));
    }
    let own = way.iter().find(|(timeline, _)| *timeline == backup.wal.timeline);
    if !own.is_some_and(|(_, end)| end.is_none_or(|end| backup.stop_lsn <= end)) || to < backup.stop_lsn {
        return false;
    }
    let begin = |index: usize| way.get(index + 1).and_then(|(_, end)| *end).unwrap_or(Lsn(0));
    (backup.start_lsn.0 >> 20..=(to.0 - 1) >> 20).all(|number| {
        let reader = (0..way.len()).find(|index| begin(*index).0 >> 20 <= number).unwrap();
        world.wal.branches[&branch(way[reader].0.0)].segments.contains_key(&number)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn ranges_are_exactly_what_replays(world in worlds()) {
        let windows = recovery_windows(&world.backups, &world.wal);
        let points = || (1..=SEGMENTS * 2).map(|half| Lsn(half << 19));
        for range in &windows.ranges {
            let promised = points().chain([range.from.lsn, range.to.lsn]);
            for to in promised.filter(|to| range.from.lsn <= *to && *to <= range.to.lsn) {
                let works = world.backups.iter().any(|backup| replays(&world, backup, range.wal.timeline.0, to));
                prop_assert!(works, "{to} is promised and does not replay: {range:?}");
            }
        }
        let way = |timeline| Lineage::to(timeline, &world.wal).unwrap();
        for (timeline, to) in (1..=3).flat_map(|timeline| points().map(move |to| (timeline, to))) {
            let works = world.backups.iter().any(|backup| replays(&world, backup, timeline, to));
            // Up to a switch, all timelines that come after it give back the same.
            let shared = |range: &RecoveryRange, on: u32| {
                way(range.wal).passes(&branch(on), to) && way(branch(timeline)).passes(&branch(on), to)
            };
            let same_way = |range: &RecoveryRange| (1..=3).any(|on| shared(range, on));
            let promised = windows.ranges.iter().any(|r| r.from.lsn <= to && to <= r.to.lsn && same_way(r));
            prop_assert!(!works || promised, "{to} on {timeline} replays and is not promised: {windows:?}");
        }
        let restorable = |backup: &&BackupFacts| (1..=3).any(|tip| replays(&world, backup, tip, backup.stop_lsn));
        prop_assert_eq!(
            world.backups.len() - windows.unrestorable.len(),
            world.backups.iter().filter(restorable).count()
        );
    }

    #[test]
    fn every_choice_replays_and_every_refusal_is_right(world in worlds(), segment in 0..SEGMENTS, timeline in 1u32..=3) {
        let to = lsn(segment, 1 << 18);
        let number = TimelineChoice::Number(Timeline(timeline));
        let by_lsn = Pick { target: TargetPoint::Lsn(to), timeline: number, backup: None };
        let works = world.backups.iter().filter(|backup| replays(&world, backup, timeline, to)).map(|backup| backup.stop_lsn);
        match choose_backup(&by_lsn, &world.backups, &world.wal) {
            Ok(choice) => {
                let chosen = world.backups.iter().find(|backup| backup.id == choice.backup).unwrap();
                prop_assert!(replays(&world, chosen, timeline, to));
                prop_assert_eq!(Some(chosen.stop_lsn), works.max(), "the newest");
                for read in &choice.reads {
                    for number in read.from.0 >> 20..read.to.0 >> 20 {
                        prop_assert!(world.wal.branches[&read.wal].segments.contains_key(&number));
                    }
                }
            }
            Err(_) => prop_assert_eq!(works.count(), 0),
        }
        // By time: commits are in the middle of segments, one second each.
        let at_us = time(lsn(segment, 1 << 18));
        let by_time = Pick { target: at(at_us), timeline: number, backup: None };
        if let Ok(choice) = choose_backup(&by_time, &world.backups, &world.wal) {
            let chosen = world.backups.iter().find(|backup| backup.id == choice.backup).unwrap();
            prop_assert!(chosen.stopped_at_us <= at_us);
            prop_assert!(choice.to > chosen.stop_lsn && replays(&world, chosen, timeline, choice.to));
        }
    }

    /// Any tree of diverged branches: each way takes a segment from the deepest branch that begins at or before it, and never
    /// one that lies behind where a branch was left.
    #[test]
    fn a_way_never_goes_on_in_a_branch_that_it_left(
        begins in proptest::collection::vec((2u64..SEGMENTS, 0usize..6), 1..6),
        lost in proptest::collection::vec(proptest::bool::weighted(0.1), 7 * SEGMENTS as usize),
    ) {
        // The branch that each one left, and where; the first is the timeline's own.
        let mut tree: Vec<(WalBranch, Option<usize>, u64)> = vec![(branch(1), None, 0)];
        let there = |index: usize, first: u64| {
            (first..SEGMENTS).filter(|number| *number == first || !lost[index * SEGMENTS as usize + *number as usize]).collect::<Vec<_>>()
        };
        let mut branches = vec![wal(1, there(0, 0), &[])];
        for (index, (first, from)) in begins.into_iter().enumerate() {
            let from = from % tree.len();
            let first = first.max(tree[from].2);
            let (left, own) = diverged(tree[from].0, 10 + index as u8, there(index + 1, first), Joint::Sound);
            tree.push((left, Some(from), first));
            branches.push((left, own));
        }
        let all = catalog(branches);
        for (tip, from, first) in &tree {
            let way = Lineage::to(*tip, &all).unwrap();
            for number in 0..SEGMENTS {
                let (mut expected, mut parent, mut begin) = (*tip, *from, *first);
                while number < begin {
                    let (next, from, first) = tree[parent.unwrap()];
                    (expected, parent, begin) = (next, from, first);
                }
                prop_assert_eq!(way.branch_of(number), expected);
            }
            for (wal, number) in way.segments(&all, 0) {
                prop_assert_eq!(wal, way.branch_of(number));
                prop_assert!(all.branches[&wal].segments.contains_key(&number));
            }
        }
    }
}
