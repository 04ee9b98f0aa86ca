use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::crypto::DomainKey;
use crate::format::wal_segment::{CommitPoint, SegmentFacts};
use crate::keyring::Keyring;
use crate::postgres::{Branch, SystemId, Timeline};
use crate::store::Store;
use crate::wal_archive::OwnedSegment;

const SYSTEM: SystemId = SystemId(5);

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn lsn(segment: u64, offset: u64) -> Lsn {
    Lsn((segment << 20) + offset)
}

/// Stores one segment with restore points of the name "x" at these offsets, and one of another name.
async fn put(archive: &WalArchive, wal: WalBranch, number: u64, offsets: &[u64]) {
    let point = |name: &str, offset| RestorePoint {
        name: name.to_owned(),
        point: CommitPoint { lsn: lsn(number, offset), at_us: (number * 1000 + offset) as i64 },
    };
    let named = offsets.iter().map(|offset| point("x", *offset));
    let upload = OwnedSegment {
        wal,
        segment: Segment { timeline: wal.timeline, number },
        segment_size: size(),
        content: vec![number as u8; 1 << 20],
        facts: SegmentFacts {
            valid_bytes: 1 << 20,
            commits: Vec::new(),
            restore_points: named.chain([point("y", 999)]).collect(),
            changed_blocks: None,
            wal_levels: Vec::new(),
        },
        predecessor: None,
        member: "pg1".into(),
        shipped_at_us: 0,
    };
    archive.put_segment(upload).await.unwrap();
}

#[tokio::test]
async fn a_name_is_found_on_the_chosen_way_alone() {
    let keys = Keyring::of(DomainKey::generate().unwrap());
    let archive = WalArchive::new(Store::in_memory(), "orders".parse().unwrap(), Arc::new(keys), 3);
    let first = WalBranch { system_id: SYSTEM, timeline: Timeline(1), branch: Branch::ROOT };
    // The second timeline leaves the first in the middle of segment 4, and copies that segment's beginning.
    let history = b"1\t0/480000\tno recovery target specified\n";
    archive.put_history(SYSTEM, Timeline(2), history, None, "pg2", 0).await.unwrap();
    let second = WalBranch { timeline: Timeline(2), branch: Branch::of_history(history), ..first };
    for (number, offsets) in [(2, &[100, 200][..]), (3, &[]), (4, &[300, 0x90000]), (5, &[400])] {
        put(&archive, first, number, offsets).await;
    }
    put(&archive, second, 4, &[300]).await;
    put(&archive, second, 5, &[500]).await;
    let catalog = crate::wal_catalog::read(&archive, &BTreeMap::from([(SYSTEM, size())])).await.unwrap();
    let on = |tip| Lineage::to(tip, &catalog).unwrap();
    let (old, new) = (on(first), on(second));
    let search = |way, name| Search { archive: &archive, catalog: &catalog, way, name };
    let lsns = |points: Vec<RecoveryPoint>| points.into_iter().map(|point| point.lsn).collect::<Vec<_>>();

    let newest = search(&new, "x").newest(lsn(2, 0)).await.unwrap();
    assert_eq!(newest, Some(RecoveryPoint { lsn: lsn(5, 500), at_us: 5500 }));
    assert_eq!(search(&old, "x").newest(lsn(2, 0)).await.unwrap().unwrap().lsn, lsn(5, 400));
    // What the old primary wrote after the switch is not on the way to the new timeline.
    let before = search(&new, "x").between(lsn(2, 100), lsn(5, 500)).await.unwrap();
    assert_eq!(lsns(before), [lsn(2, 200), lsn(4, 300)], "replay begins behind the first");
    let before = search(&old, "x").between(lsn(3, 0), lsn(5, 400)).await.unwrap();
    assert_eq!(lsns(before), [lsn(4, 300), lsn(4, 0x90000)]);
    assert_eq!(search(&new, "x").first(lsn(2, 150)).await.unwrap().unwrap().lsn, lsn(2, 200));
    assert_eq!(search(&new, "x").first(lsn(5, 500)).await.unwrap(), None);
    assert_eq!(search(&new, "z").newest(lsn(2, 0)).await.unwrap(), None);
}
