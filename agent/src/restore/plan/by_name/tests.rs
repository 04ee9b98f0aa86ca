use std::collections::BTreeMap;
use std::sync::Arc;

use walfleet_repository::crypto::DomainKey;
use walfleet_repository::format::wal_segment::{CommitPoint, RestorePoint, SegmentFacts};
use walfleet_repository::keyring::Keyring;
use walfleet_repository::postgres::{Branch, Segment, SegmentSize, SystemId, Timeline, WalBranch};
use walfleet_repository::store::Store;
use walfleet_repository::wal_archive::OwnedSegment;
use walfleet_repository::wal_catalog;

use walfleet_repository::recovery_window::NotRecoverable;

use super::*;

const WAL: WalBranch = WalBranch { system_id: SystemId(7), timeline: Timeline(1), branch: Branch::ROOT };

fn lsn(segment: u64, offset: u64) -> Lsn {
    Lsn((segment << 20) + offset)
}

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

async fn put(archive: &WalArchive, wal: WalBranch, number: u64, points: &[(&str, u64)]) {
    let named = points.iter().map(|(name, offset)| RestorePoint {
        name: (*name).to_owned(),
        point: CommitPoint { lsn: lsn(number, *offset), at_us: number as i64 * 1_000_000 },
    });
    let facts = SegmentFacts {
        valid_bytes: 1 << 20,
        commits: Vec::new(),
        restore_points: named.collect(),
        changed_blocks: None,
        wal_levels: Vec::new(),
    };
    let upload = OwnedSegment {
        wal,
        segment: Segment { timeline: wal.timeline, number },
        segment_size: size(),
        content: vec![number as u8; 1 << 20],
        facts,
        predecessor: None,
        member: "db1".into(),
        shipped_at_us: 0,
    };
    archive.put_segment(upload).await.unwrap();
}

fn backup(id: &str, segment: u64) -> BackupFacts {
    let (start_lsn, stop_lsn) = (lsn(segment, 100), lsn(segment, 900));
    BackupFacts { id: id.parse().unwrap(), wal: WAL, start_lsn, stop_lsn, stopped_at_us: segment as i64 * 1_000_000 }
}

/// Segments 2 to 8 of the first timeline, and 6 to 7 of a second that left it at the beginning of 6. A point "nightly"
/// before, between and behind two backups; "gone" only on the first timeline after the switch.
async fn held() -> (WalArchive, WalCatalog, Vec<BackupFacts>) {
    let keys = Keyring::of(DomainKey::generate().unwrap());
    let archive = WalArchive::new(Store::in_memory(), "orders".parse().unwrap(), Arc::new(keys), 3);
    put(&archive, WAL, 2, &[("within", 500)]).await;
    put(&archive, WAL, 3, &[("nightly", 7), ("twice", 8)]).await;
    put(&archive, WAL, 4, &[("within", 500)]).await;
    put(&archive, WAL, 5, &[("nightly", 9), ("twice", 10), ("twice", 20)]).await;
    for number in 6..=8 {
        put(&archive, WAL, number, &[("gone", 5)]).await;
    }
    let history = b"1\t0/600000\tno recovery target specified\n";
    archive.put_history(WAL.system_id, Timeline(2), history, None, "db2", 0).await.unwrap();
    let second = WalBranch { timeline: Timeline(2), branch: Branch::of_history(history), ..WAL };
    put(&archive, second, 6, &[]).await;
    put(&archive, second, 7, &[]).await;
    let catalog = wal_catalog::read(&archive, &BTreeMap::from([(WAL.system_id, size())])).await.unwrap();
    (archive, catalog, vec![backup("bk_1", 2), backup("bk_2", 4)])
}

async fn chosen(
    name: &str,
    timeline: TimelineChoice,
    backup: Option<&str>,
) -> Result<(Choice, Vec<String>), PlanError> {
    let (archive, catalog, backups) = held().await;
    let pick = Pick { target: Point::Somewhere, timeline, backup: backup.map(|id| id.parse().unwrap()) };
    choose(name, &pick, &Held { backups: &backups, archive: &archive, catalog: &catalog }).await
}

#[tokio::test]
async fn the_newest_of_a_name_is_reached_from_a_backup_behind_the_older_ones() {
    let latest = TimelineChoice::Latest;
    let (choice, notes) = chosen("nightly", latest, None).await.unwrap();
    assert_eq!((choice.backup.as_str(), choice.to, choice.wal.timeline), ("bk_2", lsn(5, 9), Timeline(2)));
    assert!(notes[0].contains("0/500009"), "{notes:?}");
    // An older backup meets the older point, and says that there is a newer one.
    let (choice, notes) = chosen("nightly", latest, Some("bk_1")).await.unwrap();
    assert_eq!((choice.backup.as_str(), choice.to), ("bk_1", lsn(3, 7)));
    assert!(notes[1].contains("newest of that name is at") && notes[1].contains("0/500009"), "{notes:?}");
}

#[tokio::test]
async fn what_recovery_by_name_would_not_reach_is_refused_with_the_positions_that_do() {
    let latest = TimelineChoice::Latest;
    let hidden = chosen("twice", latest, None).await.unwrap_err();
    let says = hidden.to_string();
    assert!(matches!(hidden, PlanError::RestorePointHidden { .. }), "{says}");
    assert!(says.contains("--to-lsn 0/500014 --exclusive") && says.contains("0/50000A"), "{says}");
    // The first that recovery meets lies where the backup is not consistent yet.
    let within = chosen("within", latest, Some("bk_1")).await.unwrap_err();
    assert!(matches!(within, PlanError::RestorePointOutOfReach { .. }), "{within}");
    assert!(matches!(chosen("nobody's", latest, None).await, Err(PlanError::NoRestorePoint { .. })));
}

#[tokio::test]
async fn a_point_on_an_abandoned_timeline_is_found_only_if_that_is_asked_for() {
    assert!(matches!(chosen("gone", TimelineChoice::Latest, None).await, Err(PlanError::NoRestorePoint { .. })));
    // Three of the name lie there, and no backup between them.
    let on_first = chosen("gone", TimelineChoice::Number(Timeline(1)), None).await.unwrap_err();
    assert!(on_first.to_string().contains("--to-lsn 0/800005 --exclusive"), "{on_first}");
    let (choice, _) = chosen("gone", TimelineChoice::Number(Timeline(1)), Some("bk_2")).await.unwrap();
    assert_eq!((choice.to, choice.wal), (lsn(6, 5), WAL));
    // Both backups are of the first timeline, which is therefore their own.
    let (choice, _) = chosen("gone", TimelineChoice::Current, Some("bk_1")).await.unwrap();
    assert_eq!((choice.to, choice.wal), (lsn(6, 5), WAL));
    let unknown = chosen("gone", TimelineChoice::Named("2-0".parse().unwrap()), None).await.unwrap_err();
    assert!(matches!(unknown, PlanError::NotRecoverable(NotRecoverable::NoBranch { .. })), "{unknown}");
}
