//! Branches of which nobody knows what they go on from: what says so is missing, or does not read.

use super::*;

fn unknown(mut found: (WalBranch, BranchWal)) -> (WalBranch, BranchWal) {
    (found.1.history, found.1.divergence) = (None, None);
    found
}

#[test]
fn a_name_without_wal_hides_no_restore() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9))];
    let all = catalog([wal(1, 2..=7, &[]), unknown(wal(2, [], &[]))]);
    for target in [TargetPoint::Latest, TargetPoint::Lsn(lsn(5, 0)), at(time(lsn(5, 0))), TargetPoint::Immediate] {
        let choice = choose_backup(&pick(target), &backups, &all).unwrap();
        assert_eq!((choice.backup.as_str(), choice.wal), ("bk_1", branch(1)), "{target:?}");
    }
}

#[test]
fn wal_that_may_be_newer_is_not_passed_over_in_silence() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9))];
    let all = catalog([wal(1, 2..=7, &[]), unknown(wal(2, 5..=9, &[]))]);
    let refused = choose_backup(&pick(TargetPoint::Latest), &backups, &all).unwrap_err();
    assert!(matches!(refused, NotRecoverable::UnknownOrigin { timeline: Timeline(2), .. }), "{refused}");
    assert!(refused.to_string().contains("on timeline 1"), "it says what can be had: {refused}");
    let first = Pick { timeline: TimelineChoice::Number(Timeline(1)), ..pick(TargetPoint::Latest) };
    assert_eq!(choose_backup(&first, &backups, &all).unwrap().to, lsn(8, 0));
}

#[test]
fn a_branch_whose_origin_does_not_read_does_not_pass_for_its_timelines_own() {
    let backups = [backup("bk_1", 1, lsn(2, 0), lsn(3, 9))];
    let (twin, own) = diverged(branch(1), 8, 5..=9, Joint::Sound);
    let all = catalog([wal(1, 2..=7, &[]), unknown((twin, own))]);
    let number = TimelineChoice::Number(Timeline(1));
    for timeline in [TimelineChoice::Latest, number] {
        let choice = choose_backup(&Pick { timeline, ..pick(TargetPoint::Latest) }, &backups, &all).unwrap();
        assert_eq!((choice.wal, choice.to), (branch(1), lsn(8, 0)), "{timeline:?}");
    }
    assert!(choose_backup(&on("1-08"), &backups, &all).is_err());
}
