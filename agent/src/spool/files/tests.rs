use std::fs::{File, OpenOptions};
use std::io::Write;
use std::time::Duration;

use bytes::Bytes;
use walfleet_repository::postgres::{Branch, Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};
use walfleet_repository::wal_archive::TailPlace;

use super::frames::{HEADER, MAGIC};
use super::*;
use crate::spool::SpooledPiece;

fn owner() -> Owner {
    Owner { cluster: "orders".parse().unwrap(), member: "db1".into() }
}

fn repository() -> RepositoryAccess {
    RepositoryAccess { name: "main".into(), url: "file:///r".into(), options: BTreeMap::new(), root: None }
}

fn piece(from: u32, bytes: usize) -> Arc<SpooledPiece> {
    let wal = WalBranch { system_id: SystemId(5), timeline: Timeline(3), branch: Branch([7; 8]) };
    let segment = Segment { timeline: Timeline(3), number: 9 };
    let place = TailPlace { wal, segment, size: SegmentSize::DEFAULT };
    let sealed = Bytes::from(vec![from as u8; bytes]);
    Arc::new(SpooledPiece { place, from, to: from + 10, sealed })
}

fn files_of(spools: &Spools) -> Vec<PathBuf> {
    spools.left_for(Duration::ZERO).into_values().flatten().collect()
}

#[test]
fn what_a_writer_leaves_is_found_with_where_it_belongs_also_by_the_next_process() {
    let folder = tempfile::tempdir().unwrap();
    let spools = Spools::open(folder.path().join("spool"), 1 << 30).unwrap();
    let mut log = SpoolLog::begin(&spools, &owner(), &repository()).unwrap();
    let places = log.append(&[(1, piece(0, 100)), (2, piece(10, 50))]).unwrap();
    assert_eq!(places[1].read().unwrap(), piece(10, 50).sealed);
    log.append(&[(3, piece(20, 5))]).unwrap();
    log.release(2);
    assert!(files_of(&spools).is_empty(), "it has a writer");
    let held = spools.held_bytes();
    drop((log, spools));

    let spools = Spools::open(folder.path().join("spool"), 1 << 30).unwrap();
    assert_eq!(spools.held_bytes(), held);
    assert!(spools.left_for(Duration::from_secs(60)).is_empty(), "its writer may be back at once");
    let location = spools.location(&owner()).unwrap().unwrap();
    assert_eq!(location, Location::from(&repository()));
    let left = spools.left_for(Duration::ZERO);
    let found: Vec<Found> = left[&owner()].iter().flat_map(|path| read(path).unwrap().pieces).collect();
    let read: Vec<_> = found.iter().map(|piece| (piece.from, piece.to, piece.lies.read().unwrap())).collect();
    let expected = [piece(0, 100), piece(10, 50), piece(20, 5)];
    assert_eq!(read, expected.clone().map(|piece| (piece.from, piece.to, piece.sealed.clone())));
    assert_eq!(found[0].place, expected[0].place);
    left[&owner()].iter().for_each(|path| spools.forget(path).unwrap());
    assert_eq!((spools.held_bytes(), files_of(&spools).len()), (0, 0));
}

#[test]
fn a_torn_end_does_not_count_and_what_is_before_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let spools = Spools::open(folder.path().to_owned(), 1 << 30).unwrap();
    let mut log = SpoolLog::begin(&spools, &owner(), &repository()).unwrap();
    log.append(&[(1, piece(0, 100)), (2, piece(10, 50))]).unwrap();
    drop(log);
    let path = files_of(&spools).pop().unwrap();
    let whole = fs::read(&path).unwrap();
    let first = MAGIC.len() + HEADER + 100;
    for cut in [whole.len() - 1, first + HEADER - 1, first + 1] {
        fs::write(&path, &whole[..cut]).unwrap();
        assert_eq!(read(&path).unwrap().pieces.len(), 1, "cut to {cut}");
    }
    for at in first..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        fs::write(&path, flipped).unwrap();
        assert_eq!(read(&path).unwrap().pieces.len(), 1, "byte {at} flipped");
    }
    fs::write(&path, b"something else").unwrap();
    assert!(read(&path).unwrap().pieces.is_empty());
}

#[test]
fn what_is_damaged_does_not_count_and_what_is_behind_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let spools = Spools::open(folder.path().to_owned(), 1 << 30).unwrap();
    let mut log = SpoolLog::begin(&spools, &owner(), &repository()).unwrap();
    log.append(&[(1, piece(0, 100)), (2, piece(10, 50)), (3, piece(20, 70)), (4, piece(30, 20))]).unwrap();
    drop(log);
    let path = files_of(&spools).pop().unwrap();
    let whole = fs::read(&path).unwrap();
    let froms = |contents: &Contents| contents.pieces.iter().map(|found| found.from).collect::<Vec<_>>();
    assert_eq!(froms(&read(&path).unwrap()), [0, 10, 20, 30]);
    let (second, third) = (MAGIC.len() + HEADER + 100, MAGIC.len() + 2 * HEADER + 150);
    let start = piece(0, 1).place.segment.start(SegmentSize::DEFAULT).0;
    let expected =
        Damaged { bytes: second as u64..third as u64, behind: Some(Lsn(start + 10)), before: Some(Lsn(start + 20)) };
    // Wherever it is hit: its numbers, its length, its checksum, itself.
    for at in second..third {
        for with in [1, 0x80, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] ^= with;
            fs::write(&path, damaged).unwrap();
            let found = read(&path).unwrap();
            assert_eq!((froms(&found), &found.damaged[..]), (vec![0, 20, 30], &[expected.clone()][..]), "byte {at}");
        }
    }
    let zeroed = |from: usize, to: usize| {
        let mut damaged = whole.clone();
        damaged[from..to].fill(0);
        fs::write(&path, damaged).unwrap();
        read(&path).unwrap()
    };
    let found = zeroed(0, second + 1);
    assert_eq!((froms(&found), found.damaged.len()), (vec![20, 30], 1), "also the file's beginning");
    let found = zeroed(third, whole.len());
    assert_eq!((froms(&found), found.damaged[0].before), (vec![0, 10], None));
    for two in [second, third + HEADER + 70] {
        assert_eq!(zeroed(two, two + 1).damaged.len(), 1);
    }
}

#[test]
fn files_go_once_all_in_them_is_let_go_of_and_the_bound_holds_for_all_together() {
    let folder = tempfile::tempdir().unwrap();
    let spools = Spools::open(folder.path().to_owned(), 20 << 20).unwrap();
    let mut log = SpoolLog::begin(&spools, &owner(), &repository()).unwrap();
    for number in 1..=9 {
        log.append(&[(number, piece(0, 2 << 20))]).unwrap();
    }
    let full = log.append(&[(10, piece(0, 2 << 20))]);
    assert!(matches!(full, Err(SpoolError::Full { .. })), "{full:?}");
    let other = Owner { member: "db2".into(), ..owner() };
    let mut another = SpoolLog::begin(&spools, &other, &repository()).unwrap();
    assert!(another.append(&[(1, piece(0, 2 << 20))]).is_err());
    log.release(4);
    assert!(spools.held_bytes() < 12 << 20, "the first file is gone: {}", spools.held_bytes());
    another.append(&[(1, piece(0, 2 << 20))]).unwrap();
    log.append(&[(10, piece(0, 1 << 20))]).unwrap();
    log.release(10);
    drop(log);
    another.release(1);
    drop(another);
    assert_eq!((spools.held_bytes(), files_of(&spools).len()), (0, 0));
}

#[test]
fn what_a_failed_append_left_does_not_count_and_later_pieces_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let spools = Spools::open(folder.path().to_owned(), 1 << 30).unwrap();
    let mut log = SpoolLog::begin(&spools, &owner(), &repository()).unwrap();
    log.append(&[(1, piece(0, 100))]).unwrap();
    let held = spools.held_bytes();
    let first = log.files[0].path.clone();
    // Nothing can be written by it, as to a full disk.
    log.open = Some(File::open(&first).unwrap());
    assert!(log.append(&[(2, piece(10, 100))]).is_err());
    assert_eq!((spools.held_bytes(), log.files.len()), (held, 1));
    log.append(&[(3, piece(20, 100))]).unwrap();
    assert_eq!(log.files.len(), 2);
    let second = log.files[1].path.clone();
    log.open = Some(File::open(&second).unwrap());
    // So much of it had got there.
    OpenOptions::new().append(true).open(&second).unwrap().write_all(&[7; 5000]).unwrap();
    assert!(log.append(&[(4, piece(30, 5000))]).is_err());
    drop(log);
    let found: Vec<u32> =
        files_of(&spools).iter().flat_map(|path| read(path).unwrap().pieces).map(|found| found.from).collect();
    assert_eq!(found, [0, 20]);
    files_of(&spools).iter().for_each(|path| spools.forget(path).unwrap());
    spools.forget(&first).expect("somebody may be quicker");
    assert_eq!(spools.held_bytes(), 0);
}
