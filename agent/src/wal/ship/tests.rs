//! On WAL of a real server, into an archive that another one may have written to.

use std::fs;

use walfleet_repository::crypto::DomainKey;
use walfleet_repository::format::wal_segment::SegmentFacts;
use walfleet_repository::keyring::Keyring;
use walfleet_repository::limits::LimitsSpec;
use walfleet_repository::store::Store;
use walfleet_repository::wal_archive::OwnedSegment;

use super::*;
use crate::postgres::control::ControlFile;
use crate::postgres::test_server::{TestServer, oldest_and_newest};

const SIZE: u32 = 1 << 20;

fn segment_size() -> SegmentSize {
    SegmentSize::new(u64::from(SIZE)).unwrap()
}

/// A stopped server with finished segments, all marked ready, and a shipper for them.
async fn written() -> (TestServer, Arc<Shipper>, Vec<Segment>) {
    let installation = oldest_and_newest().pop().unwrap();
    let settings = "archive_mode=on\narchive_command='false'\nautovacuum=off\nmin_wal_size=32MB";
    let server = TestServer::start(&installation, &["--wal-segsize=1"], settings);
    for number in 0..6 {
        let table = format!("CREATE TABLE t{number} AS SELECT generate_series(1, 2000) i");
        server.sql(&[&table, "SELECT pg_switch_wal()"]).await;
    }
    server.stop("fast");
    let control = ControlFile::read(&server.data_dir).unwrap();
    let keys = Arc::new(Keyring::of(DomainKey::generate().unwrap()));
    let archive = WalArchive::new(Store::in_memory(), "orders".parse().unwrap(), keys, 3);
    let source = ShipSource {
        data_dir: server.data_dir.clone(),
        system_id: control.system_id,
        segment_size: segment_size(),
        archive,
        member: "db1".to_owned(),
        compression: Compression::Fixed,
        limits: HostLimits::new(LimitsSpec::NONE),
    };
    let ready = ready_segments(&server.data_dir, segment_size());
    assert!(ready.len() >= 6, "{ready:?}");
    (server, Shipper::new(source, ShipOptions { parallel: 4, read_ahead: 8 }), ready)
}

#[tokio::test(flavor = "multi_thread")]
async fn where_another_server_went_its_own_way_nothing_behind_is_stored_beside_it() {
    let (_server, shipper, ready) = written().await;
    let (archive, size) = (shipper.source.archive.clone(), segment_size());
    let name = |segment: Segment| segment.file_name(size);
    let wal = shipper.branch(Timeline::FIRST).await.unwrap();
    // The other one has stored two segments: the first as it lies here, too, the second with records of its own.
    let theirs = |segment: Segment, content: Vec<u8>, valid_bytes: u32| OwnedSegment {
        wal,
        segment,
        segment_size: size,
        content,
        facts: SegmentFacts { valid_bytes, ..SegmentFacts::default() },
        predecessor: None,
        member: "db2".to_owned(),
        shipped_at_us: 0,
    };
    let ours = shipper.decode(ready[0], SegmentForm::Whole).await.unwrap();
    archive.put_segment(theirs(ready[0], ours.bytes, ours.facts.valid_bytes)).await.unwrap();
    archive.put_segment(theirs(ready[1], vec![7; SIZE as usize], SIZE)).await.unwrap();

    shipper.ship(&name(ready[0])).await.expect("the same records are the same segment");
    for segment in &ready[1..] {
        shipper.ship(&name(*segment)).await.expect("it has a branch of its own");
    }
    shipper.drain(Duration::from_secs(10)).await;
    let own = shipper.newest_branch(ready[1]).await.unwrap();
    assert_ne!(own, wal);
    assert_eq!(archive.get_segment(own, ready[0], size).await.unwrap(), None, "what both have");
    assert!(archive.get_segment(own, ready[1], size).await.unwrap().is_some());
    assert_eq!(archive.directory(wal, ready[1], size).await.unwrap().member, "db2", "nothing is overwritten");
    for segment in &ready[2..] {
        assert_eq!(archive.get_segment(wal, *segment, size).await.unwrap(), None, "behind what was refused");
        assert!(archive.get_segment(own, *segment, size).await.unwrap().is_some());
    }
    assert_eq!(shipper.status().borrow().failures, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leads_ships_ahead_of_what_is_asked_for() {
    let (server, shipper, ready) = written().await;
    let name = |segment: Segment| segment.file_name(segment_size());
    shipper.ship(&name(ready[0])).await.unwrap();
    shipper.ship(&name(ready[1])).await.unwrap();
    // The first went alone, the second with all the others.
    let (mut status, all) = (shipper.status(), ready.len() as u64);
    let done = tokio::time::timeout(Duration::from_secs(30), status.wait_for(|status| status.shipped == all)).await;
    done.expect("all are shipped, asked for or not").unwrap();
    for segment in &ready[2..] {
        fs::remove_file(server.data_dir.join("pg_wal").join(name(*segment))).unwrap();
        shipper.ship(&name(*segment)).await.expect("it is known to be durable");
    }
}

/// A standby's `pg_wal` has names of segments that it is yet to receive, and one that it is receiving.
#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_filled_with_finished_segments_alone() {
    let (server, shipper, ready) = written().await;
    // Which takes none ahead.
    let shipper = Shipper::new(shipper.source.clone(), ShipOptions { parallel: 4, read_ahead: 0 });
    let (archive, size) = (shipper.source.archive.clone(), segment_size());
    let path = |segment: Segment| server.data_dir.join("pg_wal").join(segment.file_name(size));
    let [before, recycled, begun, whole, after] = ready[..5] else { panic!("{ready:?}") };
    for segment in [before, after] {
        shipper.ship(&segment.file_name(size)).await.unwrap();
    }
    shipper.drain(Duration::from_secs(10)).await;
    let (old, mut half) = (fs::read(path(before)).unwrap(), fs::read(path(begun)).unwrap());
    half[20_000..].copy_from_slice(&old[20_000..]);
    for (segment, content) in [(recycled, &old), (begun, &half)] {
        fs::write(path(segment), content).unwrap();
    }
    let wal = shipper.branch(Timeline::FIRST).await.unwrap();
    let missing = crate::wal::fill::Missing { wal, from: recycled.start(size), to: after.start(size) };
    let listed = archive.list(wal.system_id, size).await.unwrap();
    let had = |segment: Segment| listed[&wal].segments.contains(&segment);
    assert!(!had(recycled) && !had(begun) && !had(whole), "{listed:?}");
    assert_eq!(crate::wal::fill::fill(&shipper, missing).await.unwrap(), 1);
    for (segment, is_there) in [(recycled, false), (begun, false), (whole, true)] {
        assert_eq!(archive.get_segment(wal, segment, size).await.unwrap().is_some(), is_there, "{segment:?}");
    }
}
