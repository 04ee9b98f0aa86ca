//! On the WAL of two real servers that were one: a copy of a stopped server's directory, both started again.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Duration;

use walfleet_repository::crypto::DomainKey;
use walfleet_repository::keyring::Keyring;
use walfleet_repository::layout::TailName;
use walfleet_repository::limits::LimitsSpec;
use walfleet_repository::postgres::SegmentSize;
use walfleet_repository::recovery_window::lineage::Lineage;
use walfleet_repository::recovery_window::{SplitBrain, WalCatalog, split_brains};
use walfleet_repository::shipping::Compression;
use walfleet_repository::store::faulty::{Fault, FaultyStore, On};
use walfleet_repository::store::{RetryPolicy, Store};
use walfleet_repository::wal_archive::WalArchive;
use walfleet_repository::wal_catalog;

use super::*;
use crate::limits::HostLimits;
use crate::postgres::control::ControlFile;
use crate::postgres::test_server::{TestServer, installations};
use crate::wal::ship::{ShipOptions, Shipper, ready_segments};

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

/// A stopped server, and all that it finished.
struct Twin {
    server: TestServer,
    member: &'static str,
    ready: Vec<Segment>,
}

/// Both have the first segments in common.
struct Twins {
    one: Twin,
    other: Twin,
    /// The first in which they differ.
    parted: Segment,
}

/// `rows` apart, so that the two do not write to the same positions.
async fn write(server: &TestServer, name: &str, rounds: u32, rows: u32) {
    for round in 0..rounds {
        let table = format!("CREATE TABLE {name}_{round} AS SELECT generate_series(1, {rows}) i");
        server.sql(&[&table, "SELECT pg_switch_wal()"]).await;
    }
}

async fn twins() -> Option<Twins> {
    let installation = installations().pop()?;
    let settings = "archive_mode=on\narchive_command='false'\nautovacuum=off\nmin_wal_size=64MB";
    let one = TestServer::start(&installation, &["--wal-segsize=1"], settings);
    write(&one, "common", 3, 3000).await;
    one.stop("fast");
    let other = TestServer::create(&installation);
    let copied = Command::new("cp").arg("-a").args([&one.data_dir, &other.data_dir]).status();
    assert!(copied.unwrap().success());
    other.configure("");
    let parted = Segment { number: last_of(&one).number + 1, ..last_of(&one) };
    for (server, name, rounds, rows) in [(&one, "one", 6, 3000), (&other, "other", 7, 3500)] {
        server.launch();
        write(server, name, rounds, rows).await;
        server.stop("fast");
    }
    let twin = |server: TestServer, member| Twin { ready: ready_segments(&server.data_dir, size()), server, member };
    Some(Twins { one: twin(one, "db1"), other: twin(other, "db2"), parted })
}

fn last_of(server: &TestServer) -> Segment {
    *ready_segments(&server.data_dir, size()).last().expect("it switched")
}

fn archive(faulty: &Arc<FaultyStore>) -> WalArchive {
    let keys = Arc::new(Keyring::of(DomainKey::generate().unwrap()));
    let store = Store::wrap(faulty.clone(), "faulty:///", RetryPolicy::impatient());
    WalArchive::new(store, "orders".parse().unwrap(), keys, 3)
}

impl Twin {
    fn source(&self, member: &str, archive: &WalArchive) -> ShipSource {
        ShipSource {
            data_dir: self.server.data_dir.clone(),
            system_id: ControlFile::read(&self.server.data_dir).unwrap().system_id,
            segment_size: size(),
            archive: archive.clone(),
            member: member.to_owned(),
            compression: Compression::Adaptive,
            limits: HostLimits::new(LimitsSpec::NONE),
        }
    }

    fn shipper_as(&self, member: &str, archive: &WalArchive) -> Arc<Shipper> {
        Shipper::new(self.source(member, archive), ShipOptions { parallel: 4, read_ahead: 8 })
    }

    /// One that ships nothing but what it is asked for.
    fn slow_shipper(&self, archive: &WalArchive) -> Arc<Shipper> {
        Shipper::new(self.source(self.member, archive), ShipOptions { parallel: 1, read_ahead: 0 })
    }

    fn shipper(&self, archive: &WalArchive) -> Arc<Shipper> {
        self.shipper_as(self.member, archive)
    }

    /// As Postgres asks: one after the other, until each is answered.
    async fn ship(&self, shipper: &Arc<Shipper>, segments: &[Segment]) {
        for segment in segments {
            for _ in 0.. {
                match shipper.ship(&segment.file_name(size())).await {
                    Ok(()) => break,
                    Err(error) if error.to_string().contains("injected") => {}
                    Err(error) => panic!("{}: {error}", segment.file_name(size())),
                }
            }
        }
    }

    fn behind(&self, segment: Segment) -> &[Segment] {
        &self.ready[self.ready.partition_point(|ready| *ready < segment)..]
    }

    fn before(&self, segment: Segment) -> &[Segment] {
        &self.ready[..self.ready.partition_point(|ready| *ready < segment)]
    }

    async fn upload(&self, shipper: &Arc<Shipper>, segment: Segment) -> Arc<OwnedSegment> {
        let source = shipper.source().clone();
        let path = source.data_dir.join("pg_wal").join(segment.file_name(size()));
        let content = read_segment(&path, segment, size(), source.system_id, None).unwrap();
        Arc::new(OwnedSegment {
            wal: base(shipper),
            segment,
            segment_size: size(),
            content: content.bytes,
            facts: content.facts,
            predecessor: None,
            member: self.member.to_owned(),
            shipped_at_us: 0,
        })
    }

    /// The piece of a segment up to a byte.
    async fn piece(&self, shipper: &Arc<Shipper>, segment: Segment, to: u32) -> OwnedTail {
        let whole = self.upload(shipper, segment).await;
        let archive = &shipper.source().archive;
        let bytes = whole.content[..to as usize].to_vec();
        OwnedTail {
            wal: whole.wal,
            segment,
            segment_size: size(),
            name: TailName { from: 0, to, member: self.member.to_owned() },
            before: archive.id_of(b""),
            after: archive.id_of(&bytes),
            bytes: bytes.into(),
            facts: walfleet_repository::format::wal_segment::SegmentFacts { valid_bytes: to, ..Default::default() },
            shipped_at_us: 0,
            complete_at_us: None,
        }
    }
}

fn base(shipper: &Arc<Shipper>) -> WalBranch {
    WalBranch { system_id: shipper.source().system_id, timeline: Timeline::FIRST, branch: Branch::ROOT }
}

async fn catalog(shipper: &Arc<Shipper>) -> WalCatalog {
    let source = shipper.source();
    wal_catalog::read(&source.archive, &BTreeMap::from([(source.system_id, size())])).await.unwrap()
}

/// The one branch besides the first.
fn diverged(catalog: &WalCatalog) -> (WalBranch, Divergence) {
    let found: Vec<_> = catalog.branches.iter().filter_map(|(wal, b)| Some((*wal, b.divergence.clone()?))).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found.into_iter().next().unwrap()
}

/// No way in the archive leads over two servers' WAL.
async fn must_not_be_mixed(catalog: &WalCatalog, shippers: &[&Arc<Shipper>]) {
    for tip in catalog.branches.keys() {
        let way = Lineage::to(*tip, catalog).unwrap();
        let mut whose: BTreeSet<usize> = BTreeSet::new();
        let mut next = 0;
        for (wal, number) in way.segments(catalog, 0) {
            if catalog.branches[&wal].segments[&number].is_begun {
                continue;
            }
            let segment = Segment { timeline: wal.timeline, number };
            let archived = shippers[0].source().archive.directory(wal, segment, size()).await.unwrap().content_id;
            let mut here = BTreeSet::new();
            for (index, shipper) in shippers.iter().enumerate() {
                if shipper.agrees(segment, archived).await.unwrap() == Some(true) {
                    here.insert(index);
                }
            }
            whose = if number == next { whose.intersection(&here).copied().collect() } else { here };
            assert!(!whose.is_empty(), "{} on the way to {tip:?} is another server's", segment.file_name(size()));
            next = number + 1;
        }
    }
}

/// All of it lies on one way.
async fn must_be_whole(catalog: &WalCatalog, twin: &Twin, shipper: &Arc<Shipper>) -> WalBranch {
    let archive = &shipper.source().archive;
    'tips: for tip in catalog.branches.keys() {
        let way = Lineage::to(*tip, catalog).unwrap();
        for segment in &twin.ready {
            let wal = way.branch_of(segment.number);
            let known = catalog.branches.get(&wal).is_some_and(|wal| wal.segments.contains_key(&segment.number));
            let Ok(archived) = archive.directory(wal, *segment, size()).await else { continue 'tips };
            if !known || shipper.agrees(*segment, archived.content_id).await.unwrap() != Some(true) {
                continue 'tips;
            }
        }
        return *tip;
    }
    panic!("the WAL of {} is on no way as a whole", twin.member);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_twin_has_a_branch_of_its_own_and_finds_it_again() {
    let Some(twins) = twins().await else { return };
    let archive = archive(&FaultyStore::in_memory(1));
    let (one, other) = (twins.one.shipper(&archive), twins.other.shipper(&archive));
    twins.one.ship(&one, &twins.one.ready[..twins.one.ready.len() - 2]).await;
    let (early, late) = twins.other.ready.split_at(twins.other.before(twins.parted).len() + 2);
    twins.other.ship(&other, early).await;
    let (wal, left) = diverged(&catalog(&one).await);
    assert_eq!((left.member.as_str(), left.stored_by.as_str(), left.joint), ("db2", "db1", Joint::Sound));
    assert_eq!(left.at, twins.parted.start(size()));
    assert_eq!(other.newest_branch(late[0]).await.unwrap(), wal);

    // The agent is started again; then the other server goes on, into segments that only one of them has so far.
    let again = twins.other.shipper(&archive);
    twins.other.ship(&again, late).await;
    twins.one.ship(&twins.one.shipper(&archive), &twins.one.ready).await;
    let catalog = catalog(&one).await;
    must_not_be_mixed(&catalog, &[&one, &other]).await;
    assert_eq!(must_be_whole(&catalog, &twins.one, &one).await, base(&one));
    assert_eq!(must_be_whole(&catalog, &twins.other, &other).await, wal);
    assert_eq!(diverged(&catalog).0, wal, "and no third");

    let says: Vec<String> = split_brains(&catalog, left.found_at_us).iter().map(SplitBrain::to_string).collect();
    assert!(says[0].starts_with("split brain: db2 writes other WAL than db1 on timeline 1 from 0/"), "{says:?}");
    let day_later = Timestamp::now().as_microsecond() + 25 * 3600 * 1_000_000;
    assert_eq!(split_brains(&catalog, day_later), [], "nothing of it came for a day");

    // Who is promoted from either goes on from its branch: told by the copy of its last segment, or by the one before.
    for has_copy in [true, false] {
        for (twin, shipper, parent) in [(&twins.one, &one, Branch::ROOT), (&twins.other, &other, wal.branch)] {
            let last = twins.parted.next().next();
            let pg_wal = twin.server.data_dir.join("pg_wal");
            let copy = pg_wal.join(Segment { timeline: Timeline(2), ..last }.file_name(size()));
            match has_copy {
                true => drop(std::fs::copy(pg_wal.join(last.file_name(size())), copy).unwrap()),
                false => std::fs::remove_file(copy).unwrap(),
            }
            let at = last.start(size()).checked_add(40_000).unwrap();
            let history = format!("1\t{at}\tno recovery target specified\n");
            let found = shipper.branches().parent_of(Timeline(2), history.as_bytes()).await.unwrap();
            assert_eq!(found, Some(parent), "{}, {has_copy}", twin.member);
        }
    }

    // Re-initialised from the first, the second's host writes what the first does.
    let cured = twins.one.shipper_as("db2", &archive);
    let last = *twins.one.ready.last().unwrap();
    assert_eq!(cured.home(last).await.unwrap(), base(&one));
    // Whoever takes over from the twin itself, under another name, goes on with its branch.
    let heir = twins.other.shipper_as("db3", &archive);
    assert_eq!(heir.home(*late.last().unwrap()).await.unwrap(), wal);
}

/// What was looked for first lies before the branch, which was left for when its first segment was not finished.
#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_is_there_is_found_by_who_begins_before_it() {
    let Some(twins) = twins().await else { return };
    let archive = archive(&FaultyStore::in_memory(1));
    let (one, other) = (twins.one.shipper(&archive), twins.other.shipper(&archive));
    twins.one.ship(&one, &twins.one.ready).await;
    let begun = twins.other.piece(&other, twins.parted, 50_000).await;
    let left = other.branches().home(base(&other), twins.parted).await.unwrap();
    let (place, whose) = ((left, twins.parted), "db1".to_owned());
    other.branches().leave(base(&other), place, begun.after, whose).await.unwrap();
    twins.other.ship(&other, twins.other.behind(twins.parted)).await;
    let (wal, _) = diverged(&catalog(&one).await);

    // The agent is started again, and the agent of a standby of it stores, too.
    for member in ["db2", "db3"] {
        let again = twins.other.shipper_as(member, &archive);
        twins.other.ship(&again, &twins.other.ready).await;
        assert_eq!(diverged(&catalog(&one).await).0, wal, "and no third, by {member}");
        assert_eq!(again.newest_branch(*twins.other.ready.last().unwrap()).await.unwrap(), wal);
    }
    let catalog = catalog(&one).await;
    must_not_be_mixed(&catalog, &[&one, &other]).await;
    assert_eq!(must_be_whole(&catalog, &twins.other, &other).await, wal);
}

/// Of the segment in which they differ the one that lives has stored pieces alone.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_stopped_twin_left_takes_no_name_of_the_one_that_lives() {
    let Some(twins) = twins().await else { return };
    let archive = archive(&FaultyStore::in_memory(1));
    let (one, other) = (twins.one.shipper(&archive), twins.other.shipper(&archive));
    twins.one.ship(&one, twins.one.before(twins.parted)).await;
    let begun = twins.one.piece(&one, twins.parted, 50_000).await;
    one.branches().store_tail(base(&one), &begun).await.unwrap();
    crate::wal::fill::leftover(&other, Timeline::FIRST, crate::wal::fill::Scope::Everything).await.unwrap();
    twins.one.ship(&one, twins.one.behind(twins.parted)).await;
    let catalog = catalog(&one).await;
    must_not_be_mixed(&catalog, &[&one, &other]).await;
    assert_eq!(must_be_whole(&catalog, &twins.one, &one).await, base(&one));
    assert_eq!(must_be_whole(&catalog, &twins.other, &other).await, diverged(&catalog).0);
}

/// A segment whose file was recycled here is told by what lies behind it.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_recycled_is_ours_if_it_leads_to_what_was_not() {
    let Some(twins) = twins().await else { return };
    let archive = archive(&FaultyStore::in_memory(1));
    twins.one.ship(&twins.one.shipper(&archive), &twins.one.ready).await;
    let (recycled, last) = (twins.parted.next(), twins.parted.number + 3);
    for (twin, is_ours) in [(&twins.one, true), (&twins.other, false)] {
        let pg_wal = twin.server.data_dir.join("pg_wal");
        for gone in [recycled, recycled.next()] {
            std::fs::rename(pg_wal.join(gone.file_name(size())), pg_wal.join(format!("{}.x", gone.number))).unwrap();
        }
        // Under another name: one that stored nothing has nothing to believe itself.
        let shipper = twin.shipper_as("db3", &archive);
        let found = shipper.branches().leads_here(base(&shipper), recycled, last).await.unwrap();
        assert_eq!(found, is_ours, "{}", twin.member);
    }
}

/// Begun when the other had stored that far, and nothing of this one's: as by a replication slot that is made late.
#[tokio::test(flavor = "multi_thread")]
async fn who_begins_behind_the_difference_does_not_go_on_from_the_others_wal() {
    let Some(twins) = twins().await else { return };
    for local in [true, false] {
        let archive = archive(&FaultyStore::in_memory(1));
        let (one, other) = (twins.one.slow_shipper(&archive), twins.other.shipper(&archive));
        let late = twins.other.behind(twins.parted.next().next())[0];
        twins.one.ship(&one, twins.one.before(late)).await;
        let gone: Vec<_> = twins.other.before(late).iter().map(|segment| segment.file_name(size())).collect();
        let pg_wal = twins.other.server.data_dir.join("pg_wal");
        if !local {
            gone.iter().for_each(|name| std::fs::rename(pg_wal.join(name), pg_wal.join(name.clone() + ".x")).unwrap());
        }
        // What comes first may be a piece.
        other.branches().store_tail(base(&other), &twins.other.piece(&other, late, 70_000).await).await.unwrap();
        twins.other.ship(&other, twins.other.behind(late)).await;
        if !local {
            gone.iter().for_each(|name| std::fs::rename(pg_wal.join(name.clone() + ".x"), pg_wal.join(name)).unwrap());
        }
        let catalog = catalog(&one).await;
        must_not_be_mixed(&catalog, &[&one, &other]).await;
        let (wal, left) = diverged(&catalog);
        let way = Lineage::to(wal, &catalog).unwrap();
        match local {
            true => {
                assert_eq!((left.at, left.joint), (twins.parted.start(size()), Joint::Sound), "found by its files");
                assert_eq!(
                    must_be_whole(&catalog, &twins.other, &other).await,
                    wal,
                    "what was before is brought along"
                );
            }
            false => {
                assert_eq!((left.at, left.joint), (late.start(size()), Joint::Open), "found by its records");
                assert_eq!(way.segments(&catalog, 0)[0], (wal, late.number), "nothing leads to it");
            }
        }
    }
}

/// What went ahead of the first difference lies in the other's branch and is nobody's there.
#[tokio::test(flavor = "multi_thread")]
async fn what_went_ahead_of_the_difference_is_no_part_of_the_others_branch() {
    let Some(twins) = twins().await else { return };
    let archive = archive(&FaultyStore::in_memory(1));
    let (one, other) = (twins.one.slow_shipper(&archive), twins.other.shipper(&archive));
    twins.one.ship(&one, twins.one.before(twins.parted)).await;
    let (second, third) = (twins.parted.next(), twins.parted.next().next());
    // The agent was killed after it had sent the second, which outran the first, and began the third.
    let outran = twins.other.upload(&other, second).await;
    archive.put_segment(Arc::clone(&outran)).await.unwrap();
    for (segment, to) in [(second, 60_000), (third, 50_000)] {
        archive.put_tail(twins.other.piece(&other, segment, to).await).await.unwrap();
    }
    // The first's own piece of the same segment is shorter.
    archive.put_tail(twins.one.piece(&one, third, 30_000).await).await.unwrap();
    twins.one.ship(&one, &[twins.parted]).await;
    twins.other.ship(&other, &twins.other.ready).await;

    let strays = archive.strays(base(&one)).await.unwrap();
    assert!(strays.holds(second, size()) && !strays.holds(twins.parted, size()));
    let begun = archive.beginning_without(base(&one), third, size(), &strays).await.unwrap().unwrap();
    assert_eq!((begun.member.as_str(), begun.bytes.len()), ("db1", 30_000));
    twins.one.ship(&one, &twins.one.ready).await;
    let catalog = catalog(&one).await;
    must_not_be_mixed(&catalog, &[&one, &other]).await;
    must_be_whole(&catalog, &twins.one, &one).await;
    must_be_whole(&catalog, &twins.other, &other).await;
}

/// Segments of both on their way at once, ahead of what is asked for, on a slow store that sometimes fails, with agents
/// that start anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_servers_wal_is_never_mixed() {
    let Some(twins) = twins().await else { return };
    for seed in 0..12 {
        let faulty = FaultyStore::in_memory(seed);
        let archive = archive(&faulty);
        let slow = Duration::from_millis(5 + seed % 4 * 10);
        faulty.inject_randomly(Fault::Slow(slow), On::Put, "00000001-0", 0.5);
        if seed % 3 == 0 {
            faulty.inject_randomly(Fault::LoseReply, On::Put, "00000001-", 0.2);
        }
        let ship = async |twin: &Twin, first_run: usize| {
            let (early, late) = twin.ready.split_at(first_run.min(twin.ready.len()));
            let shipper = twin.shipper(&archive);
            twin.ship(&shipper, early).await;
            let shipper = if seed % 2 == 0 { shipper } else { twin.shipper(&archive) };
            twin.ship(&shipper, late).await;
        };
        let common = twins.one.before(twins.parted).len();
        tokio::join!(ship(&twins.one, common + 1 + seed as usize % 4), ship(&twins.other, common + 2));
        faulty.heal();
        let (one, other) = (twins.one.shipper(&archive), twins.other.shipper(&archive));
        let catalog = catalog(&one).await;
        must_not_be_mixed(&catalog, &[&one, &other]).await;
        let ways =
            (must_be_whole(&catalog, &twins.one, &one).await, must_be_whole(&catalog, &twins.other, &other).await);
        assert_ne!(ways.0, ways.1, "seed {seed}");
    }
}

#[test]
fn a_way_leads_each_segment_to_the_branch_that_begins_last_before_it() {
    let wal = |branch: u8| WalBranch {
        system_id: walfleet_repository::postgres::SystemId(1),
        timeline: Timeline::FIRST,
        branch: Branch([branch; 8]),
    };
    let way = Way { steps: vec![(0, wal(0)), (5, wal(5)), (9, wal(9))], standing: Standing::There };
    let homes: Vec<u8> = [0, 4, 5, 8, 9, 10, u64::MAX].map(|number| way.home(number).branch.0[0]).into();
    assert_eq!(homes, [0, 0, 5, 5, 9, 9, 9]);
}
