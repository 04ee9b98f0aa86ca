use super::*;
use crate::format::gap_note::{GapNote, GapNoteKind};
use crate::gap_notes::know;

fn unlogged(timeline: u32, from: Lsn, to: Option<Lsn>, newest_us: Option<i64>) -> Unlogged {
    let wal = branch(timeline);
    let (by, reason, at_us) = ("db1".to_owned(), "told".to_owned(), 1);
    let commits_before =
        newest_us.map_or(SegmentCommits::None, |newest| SegmentCommits::Between { first_us: newest, last_us: newest });
    let kind = GapNoteKind::Recorded;
    let cluster = "orders".parse().unwrap();
    let recorded = GapNote { cluster, wal, from, to: to.unwrap_or(from), kind, by, reason, at_us, since_us: at_us };
    Unlogged { wal, from, to, commits_before, recorded }
}

fn with(unlogged: Unlogged, branches: impl IntoIterator<Item = (WalBranch, BranchWal)>) -> WalCatalog {
    WalCatalog { unlogged: vec![unlogged], ..catalog(branches) }
}

#[test]
fn wal_of_level_minimal_parts_the_range_within_a_segment() {
    let (from, to) = (lsn(5, 1000), lsn(5, 5000));
    let newest = time(lsn(5, 900));
    // The second in the segment of the change, whose commit is behind it.
    for start in [lsn(6, 0), lsn(5, 6000)] {
        let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9)), backup("bk_2", 1, start, lsn(6, 9))];
        let catalog = with(unlogged(1, from, Some(to), Some(newest)), [wal(1, 1..=9, &[])]);
        let windows = recovery_windows(&backups, &catalog);
        assert_eq!(ranges(&windows), [(1, lsn(3, 9), from, 1), (1, lsn(6, 9), lsn(10, 0), 1)]);
        assert_eq!(windows.ranges[0].to.at_us, newest, "not the commit behind");
        let gap = WalGap { wal: branch(1), from, to };
        assert_eq!(windows.gaps, [gap]);
        let known = know(&windows, &backups, &catalog, &[]);
        assert_eq!(known.gaps[0].recorded.as_ref().unwrap().by, "db1");
        assert!(recovery_windows(&backups[1..], &catalog).gaps.is_empty(), "no backup needs it");

        let position = |lsn| choose_backup(&pick(TargetPoint::Lsn(lsn)), &backups, &catalog);
        let before = position(lsn(5, 999)).unwrap();
        assert_eq!((before.backup.as_str(), before.stop, before.ends_there), ("bk_1", StopAt::Target, false));
        let end = position(from).unwrap();
        assert_eq!((end.to, end.stop, end.ends_there), (from, StopAt::EndOfWal, true));
        for inside in [lsn(5, 1001), to, lsn(5, 5999), lsn(6, 8)] {
            assert!(matches!(position(inside), Err(NotRecoverable::InGap { .. })), "{inside}");
        }
        assert_eq!(position(lsn(6, 9)).unwrap().backup.as_str(), "bk_2");
        let last = choose_backup(&pick(at(newest)), &backups, &catalog).unwrap();
        assert_eq!((last.to, last.stop, last.ends_there), (from, StopAt::EndOfWal, true));
        let late = choose_backup(&pick(at(newest + 1)), &backups, &catalog);
        assert!(matches!(late, Err(NotRecoverable::InGap { .. })), "{late:?}");
        let latest = choose_backup(&pick(TargetPoint::Latest), &backups, &catalog).unwrap();
        assert_eq!((latest.backup.as_str(), latest.to, latest.ends_there), ("bk_2", lsn(10, 0), false));
        let old = Pick { backup: Some(backups[0].id.clone()), ..pick(TargetPoint::Latest) };
        let old = choose_backup(&old, &backups, &catalog).unwrap();
        assert_eq!((old.to, old.ends_there, old.ends_at_gap), (from, true, Some(gap)));
        let numbers = lineage::Lineage::to(branch(1), &catalog).unwrap().segments(&catalog, 4);
        assert_eq!(numbers.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [4, 5, 6, 7, 8, 9]);
    }
}

#[test]
fn wal_of_level_minimal_that_has_not_ended_counts_for_nothing_and_asks_for_no_backup() {
    let from = lsn(5, 1000);
    let mut one = wal(1, 1..=6, &[]);
    begin(&mut one, 7, 100);
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9))];
    let catalog = with(unlogged(1, from, None, None), [one]);
    let windows = recovery_windows(&backups, &catalog);
    assert_eq!(ranges(&windows), [(1, lsn(3, 9), from, 1)]);
    assert_eq!(windows.ranges[0].to.at_us, time(lsn(4, 1 << 19)), "neither a commit behind nor what was complete");
    assert_eq!(windows.gaps, [WalGap { wal: branch(1), from, to: lsn(7, 100) }]);
    assert!(know(&windows, &backups, &catalog, &[]).gaps[0].recorded.is_none());
}

#[test]
fn a_timeline_that_left_before_the_level_changed_is_whole() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9))];
    let two = || wal(2, 4..=8, &[(1, lsn(4, 500))]);
    let left_before = with(unlogged(1, lsn(4, 500), None, None), [wal(1, 1..=6, &[]), two()]);
    let windows = recovery_windows(&backups, &left_before);
    assert_eq!(ranges(&windows), [(1, lsn(3, 9), lsn(4, 500), 1), (2, lsn(3, 9), lsn(9, 0), 1)][1..]);
    // The new timeline's first segment has what was before, too, whoever told it of which of the two.
    for told in [1, 2] {
        let left_behind = with(unlogged(told, lsn(4, 400), Some(lsn(4, 450)), None), [wal(1, 1..=3, &[]), two()]);
        let windows = recovery_windows(&backups, &left_behind);
        assert_eq!(ranges(&windows), [(2, lsn(3, 9), lsn(4, 400), 1)], "told of {told}");
    }
}
