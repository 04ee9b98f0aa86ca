//! Where a timeline's WAL ends.

use super::*;

#[test]
fn a_timeline_ends_where_its_newest_piece_does_on_whichever_branch_goes_farthest() {
    let (root, mut first) = wal(1, 3..6, &[]);
    let twin = WalBranch { branch: Branch([9; 8]), ..root };
    let (_, mut diverged) = wal(1, 5..8, &[]);
    let reaches = |first: &BranchWal, diverged: &BranchWal| {
        let catalog = catalog([(root, first.clone()), (twin, diverged.clone())]);
        assert_eq!(catalog.reaches(SystemId(8), Timeline(1)), None, "another system");
        assert_eq!(catalog.reaches(SystemId(7), Timeline(2)), None, "another timeline");
        catalog.reaches(SystemId(7), Timeline(1))
    };
    assert_eq!(reaches(&first, &diverged), Some((lsn(8, 0), twin)));
    let begun = |end| SegmentFacts { is_begun: true, pieces_end: Some(end), ..SegmentFacts::default() };
    diverged.segments.insert(8, begun(lsn(8, 100)));
    assert_eq!(reaches(&first, &diverged), Some((lsn(8, 100), twin)));
    first.segments.insert(8, begun(lsn(8, 101)));
    assert_eq!(reaches(&first, &diverged), Some((lsn(8, 101), root)), "behind a hole, too: that is a gap");
}
