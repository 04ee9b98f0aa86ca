//! What is proven and what is not, on archives made for it; and on WAL of real servers, as it lies there after a checkpoint.

use tempfile::TempDir;
use walfleet_repository::crypto::DomainKey;
use walfleet_repository::format::changed_blocks::ForkName;
use walfleet_repository::format::wal_segment::SegmentFacts;
use walfleet_repository::keyring::Keyring;
use walfleet_repository::limits::LimitsSpec;
use walfleet_repository::postgres::{Branch, SystemId};
use walfleet_repository::shipping::Compression;
use walfleet_repository::store::Store;
use walfleet_repository::wal_archive::OwnedSegment;

use super::*;
use crate::backup::test_manifest::test_manifest;
use crate::limits::HostLimits;
use crate::postgres::control::ControlFile;
use crate::postgres::test_server::{TestServer, oldest_and_newest};
use crate::postgres::wal_record::digest_segment;
use crate::wal::ship::{ShipOptions, ShipSource};

const SIZE: u64 = 1 << 20;
const SYSTEM: SystemId = SystemId(77);
const RELATION: ForkName = ForkName { tablespace: 1663, database: 5, relation: 16384, fork: 0 };
/// Of timeline 2: it left the first in the middle of segment 6.
const HISTORY: &str = "1\t0/680000\tno recovery target specified\n";

fn size() -> SegmentSize {
    SegmentSize::new(SIZE).unwrap()
}

fn first() -> WalBranch {
    WalBranch { system_id: SYSTEM, timeline: Timeline::FIRST, branch: Branch::ROOT }
}

fn second() -> WalBranch {
    WalBranch { timeline: Timeline(2), branch: Branch::of_history(HISTORY.as_bytes()), ..first() }
}

fn manifest(wal: WalBranch, start: u64, stop: u64) -> Manifest {
    Manifest { segment_size: size(), ..test_manifest(wal, Lsn(start), Lsn(stop)) }
}

/// A host with an archive; its `pg_wal` has what a test puts there.
struct Host {
    cluster: ClusterName,
    dir: TempDir,
    archive: WalArchive,
    shipper: Arc<Shipper>,
}

impl Host {
    fn new() -> Host {
        let dir = TempDir::new().unwrap();
        std::fs::create_dir(dir.path().join("pg_wal")).unwrap();
        let data_dir = dir.path().to_owned();
        Host::at(dir, data_dir, SYSTEM)
    }

    fn at(dir: TempDir, data_dir: PathBuf, system_id: SystemId) -> Host {
        let keys = Arc::new(Keyring::of(DomainKey::generate().unwrap()));
        let cluster: ClusterName = "orders".parse().unwrap();
        let archive = WalArchive::new(Store::in_memory(), cluster.clone(), keys, 3);
        let member = "db1".to_owned();
        let limits = HostLimits::new(LimitsSpec::NONE);
        let source = ShipSource {
            data_dir,
            system_id,
            segment_size: size(),
            archive: archive.clone(),
            member,
            limits,
            compression: Compression::Fixed,
        };
        let shipper = Shipper::new(source, ShipOptions { parallel: 1, read_ahead: 0 });
        Host { cluster, dir, archive, shipper }
    }

    async fn put(&self, wal: WalBranch, number: u64, content: Vec<u8>, changed_blocks: Option<ChangedBlocks>) {
        let upload = OwnedSegment {
            wal,
            segment: Segment { timeline: wal.timeline, number },
            segment_size: size(),
            content,
            facts: SegmentFacts { valid_bytes: SIZE as u32, changed_blocks, ..SegmentFacts::default() },
            predecessor: None,
            member: "db1".to_owned(),
            shipped_at_us: 0,
        };
        self.archive.put_segment(upload).await.unwrap();
    }

    /// Archives segments of which each changes the block of its own number, times 100 on the second timeline.
    async fn noted(&self, wal: WalBranch, numbers: std::ops::RangeInclusive<u64>) {
        for number in numbers {
            let mut changes = ChangedBlocks::default();
            changes.change(RELATION, (number * if wal == first() { 1 } else { 100 }) as u32);
            self.put(wal, number, vec![0; SIZE as usize], Some(changes)).await;
        }
    }

    fn beginning<'a>(&'a self, data_dir: &'a Path, wal: WalBranch, start: u64) -> Beginning<'a> {
        Beginning {
            shipper: &self.shipper,
            archive: &self.archive,
            data_dir,
            wal,
            segment_size: size(),
            start_lsn: Lsn(start),
            data_checksums: true,
            read_all: false,
            member: "db1",
            cluster: &self.cluster,
        }
    }

    async fn since(&self, parent: &Manifest, wal: WalBranch, start: u64) -> Result<Vec<u32>, Unproven> {
        let changed = since(parent, &self.beginning(self.dir.path(), wal, start)).await?;
        Ok(changed.fork(&RELATION).map_or_else(Vec::new, |fork| fork.blocks.iter().collect()))
    }
}

/// Redo begins behind the long header where a segment begins with it; a record that ends with a segment ends in it.
#[test]
fn the_segments_between_two_starts_hold_every_record_between() {
    let of = |start: u64, end: u64| segments(Lsn(start), Lsn(end), size());
    assert_eq!(of(3 * SIZE + 40, 5 * SIZE + 500), 3..=5);
    assert_eq!(of(3 * SIZE, 5 * SIZE + 41), 3..=5);
    assert_eq!(of(3 * SIZE + 40, 5 * SIZE + 40), 3..=4, "nothing begins before the first record's place");
    assert_eq!(of(3 * SIZE + 40, 5 * SIZE), 3..=4);
    assert_eq!(of(4 * SIZE - 8, 4 * SIZE + 40), 3..=3);
    assert!(of(4 * SIZE + 40, 4 * SIZE + 40).is_empty());
}

#[tokio::test]
async fn noted_changes_of_all_segments_between_are_summed_up() {
    let host = Host::new();
    host.noted(first(), 2..=6).await;
    let parent = manifest(first(), 3 * SIZE + 40, 3 * SIZE + 200);
    assert_eq!(host.since(&parent, first(), 5 * SIZE + 41).await.unwrap(), [3, 4, 5]);
    assert_eq!(host.since(&parent, first(), 5 * SIZE + 40).await.unwrap(), [3, 4]);
    let gap = host.since(&parent, first(), 8 * SIZE).await;
    assert!(matches!(&gap, Err(Unproven::Segment(name)) if name == "000000010000000000000007"), "{gap:?}");
}

#[tokio::test]
async fn a_segment_of_which_nothing_is_noted_and_nothing_can_be_read_proves_nothing() {
    let host = Host::new();
    host.noted(first(), 3..=3).await;
    // As an earlier release archived it; its content is no WAL.
    host.put(first(), 4, vec![0; SIZE as usize], None).await;
    host.noted(first(), 5..=5).await;
    let parent = manifest(first(), 3 * SIZE + 40, 3 * SIZE + 200);
    let unproven = host.since(&parent, first(), 5 * SIZE + 500).await;
    assert!(matches!(&unproven, Err(Unproven::Segment(name)) if name.ends_with('4')), "{unproven:?}");
}

#[tokio::test]
async fn nothing_is_proven_of_another_system_or_other_checksums() {
    let host = Host::new();
    host.noted(first(), 3..=5).await;
    let parent = manifest(first(), 3 * SIZE + 40, 4 * SIZE);
    assert_eq!(host.since(&parent, first(), 5 * SIZE).await.unwrap(), [3, 4]);
    let other = Manifest { wal: WalBranch { system_id: SystemId(78), ..first() }, ..parent.clone() };
    assert!(matches!(host.since(&other, first(), 5 * SIZE).await, Err(Unproven::OtherSystem)));
    let plain = Manifest { data_checksums: false, ..parent };
    assert!(matches!(host.since(&plain, first(), 5 * SIZE).await, Err(Unproven::Checksums)));
}

#[tokio::test]
async fn a_parent_that_ends_behind_this_start_is_no_base() {
    let host = Host::new();
    host.noted(first(), 3..=5).await;
    let parent = |stop| manifest(first(), 3 * SIZE + 40, stop);
    let ahead = host.since(&parent(4 * SIZE + 41), first(), 4 * SIZE + 40).await;
    assert!(matches!(ahead, Err(Unproven::ParentAhead { .. })), "{ahead:?}");
    assert_eq!(host.since(&parent(4 * SIZE + 40), first(), 4 * SIZE + 40).await.unwrap(), [3]);
}

#[tokio::test]
async fn a_parent_of_the_timeline_before_counts_up_to_where_it_was_left() {
    let host = Host::new();
    std::fs::write(host.dir.path().join("pg_wal/00000002.history"), HISTORY).unwrap();
    // The first timeline went on without this server.
    host.noted(first(), 3..=9).await;
    host.noted(second(), 6..=8).await;
    let switch = 6 * SIZE + SIZE / 2;
    let of = async |parent: Manifest| host.since(&parent, second(), 8 * SIZE + 500).await;
    assert_eq!(of(manifest(first(), 4 * SIZE + 40, 5 * SIZE)).await.unwrap(), [4, 5, 600, 700, 800]);
    assert_eq!(of(manifest(first(), 4 * SIZE + 40, switch)).await.unwrap(), [4, 5, 600, 700, 800]);
    let left = of(manifest(first(), 4 * SIZE + 40, switch + 8)).await;
    assert!(matches!(left, Err(Unproven::OtherHistory(Timeline(1)))), "{left:?}");
    // A backup of this timeline, and one of another that bears its number.
    assert_eq!(of(manifest(second(), 7 * SIZE + 40, 7 * SIZE + 200)).await.unwrap(), [700, 800]);
    let namesake = WalBranch { branch: Branch::of_history(b"1\t0/500000\t\n"), ..second() };
    let other = of(manifest(namesake, 7 * SIZE + 40, 7 * SIZE + 200)).await;
    assert!(matches!(other, Err(Unproven::OtherHistory(Timeline(2)))), "{other:?}");
    let back = host.since(&manifest(second(), 7 * SIZE + 40, 7 * SIZE + 200), first(), 8 * SIZE).await;
    assert!(matches!(back, Err(Unproven::OtherHistory(Timeline(2)))), "{back:?}");
}

#[test]
fn a_segment_is_of_the_timeline_that_wrote_its_end() {
    let lineage = [(first(), Lsn(0)), (second(), Lsn(6 * SIZE))];
    assert_eq!(branch_at(&lineage, Lsn(6 * SIZE)), Some(first()), "left with the segment's end");
    assert_eq!(branch_at(&lineage, Lsn(6 * SIZE + 1)), Some(second()));
    assert_eq!(branch_at(&lineage[1..], Lsn(SIZE)), Some(second()));
    assert_eq!(branch_at(&[], Lsn(SIZE)), None);
}

/// A checkpoint recycles all segments before its own, and its own begins, as most do, within a record.
#[tokio::test(flavor = "multi_thread")]
async fn what_leads_into_the_present_segment_is_read_from_the_archive() {
    for installation in oldest_and_newest() {
        let settings = "archive_mode=on\narchive_command='false'\nautovacuum=off";
        let server = TestServer::start(&installation, &["--wal-segsize=1"], settings);
        server.sql(&["CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 60000) i"]).await;
        server.stop("immediate");
        let system_id = ControlFile::read(&server.data_dir).unwrap().system_id;
        let wal = WalBranch { system_id, ..first() };
        let pg_wal = server.data_dir.join("pg_wal");
        let read = |number| {
            let segment = Segment { timeline: Timeline::FIRST, number };
            let bytes = std::fs::read(pg_wal.join(segment.file_name(size()))).ok()?;
            let (start, timeline) = (segment.start(size()), Timeline::FIRST);
            let place = crate::postgres::wal_record::SegmentPlace { start, size: size(), timeline, system_id: None };
            let digest = digest_segment(place, None, std::time::Duration::ZERO, &bytes).ok()?;
            Some((segment, bytes, digest))
        };
        let mut headless = (2..40).filter_map(read).filter(|(.., digest)| digest.headless && digest.end.is_complete());
        let (segment, _, digest) = headless.next_back().expect("a segment that begins within a record");
        let start = segment.start(size());
        let host = Host::at(TempDir::new().unwrap(), server.data_dir.clone(), system_id);
        let begun = Lsn(start.0 + u64::from(digest.valid_bytes) / 2);
        let parent = manifest(wal, start.0 + 40, start.0 + 48);
        let now = host.beginning(&server.data_dir, wal, begun.0);
        let whole = since(&parent, &now).await.expect("its predecessor lies there");

        let (previous, bytes, _) = read(segment.number - 1).unwrap();
        std::fs::remove_file(pg_wal.join(previous.file_name(size()))).unwrap();
        assert!(matches!(since(&parent, &now).await, Err(Unproven::Segment(_))), "its first record is not known");
        host.put(wal, previous.number, bytes, None).await;
        assert_eq!(since(&parent, &now).await.unwrap(), whole);
        // And where it was archived itself without knowing, and recycled.
        let (_, bytes, _) = read(segment.number).unwrap();
        host.put(wal, segment.number, bytes, None).await;
        std::fs::remove_file(pg_wal.join(segment.file_name(size()))).unwrap();
        assert_eq!(since(&parent, &now).await.unwrap(), whole);
        assert!(whole.block_count() > 10, "{}", whole.block_count());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_twin_archived_under_the_same_names_is_no_proof() {
    let installation = oldest_and_newest().pop().unwrap();
    let settings = "archive_mode=on\narchive_command='false'\nautovacuum=off\nmin_wal_size=32MB";
    let server = TestServer::start(&installation, &["--wal-segsize=1"], settings);
    for number in 0..4 {
        server.sql(&[&format!("CREATE TABLE t{number} AS SELECT 1"), "SELECT pg_switch_wal()"]).await;
    }
    server.stop("fast");
    let system_id = ControlFile::read(&server.data_dir).unwrap().system_id;
    let wal = WalBranch { system_id, ..first() };
    let ready = crate::wal::ship::ready_segments(&server.data_dir, size());
    // The first may begin within a record that a checkpoint's end left behind.
    let (from, to) = (ready[1].number, ready[2].number);
    assert_eq!(to, from + 1);
    let parent = manifest(wal, from * SIZE + 40, from * SIZE + 200);
    let beginning = (to + 1) * SIZE + 40;
    let noted = Some(ChangedBlocks::default());

    let twin = Host::at(TempDir::new().unwrap(), server.data_dir.clone(), system_id);
    let own = Host::at(TempDir::new().unwrap(), server.data_dir.clone(), system_id);
    for number in from..=to {
        twin.put(wal, number, vec![7; SIZE as usize], noted.clone()).await;
    }
    for segment in &ready[..3] {
        own.shipper.ship(&segment.file_name(size())).await.unwrap();
    }
    let known = since(&parent, &own.beginning(&server.data_dir, wal, beginning)).await;
    assert!(known.is_ok(), "{known:?}");
    let foreign = since(&parent, &twin.beginning(&server.data_dir, wal, beginning)).await;
    assert!(matches!(&foreign, Err(Unproven::Foreign { member, .. }) if member == "db1"), "{foreign:?}");
}
