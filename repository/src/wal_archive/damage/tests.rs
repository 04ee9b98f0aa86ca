use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use super::*;
use crate::crypto::DomainKey;
use crate::format::wal_segment::{CommitPoint, SegmentFacts, WalLevelChange};
use crate::ids::ClusterName;
use crate::keyring::Keyring;
use crate::layout::{self, WalLevelClass};
use crate::postgres::{Branch, Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};
use crate::recovery_window::{SegmentCommits, WalCatalog};
use crate::store::{Creation, StoreOptions};
use crate::wal_archive::OwnedSegment;
use crate::{superseded, wal_catalog};

const SYSTEM: SystemId = SystemId(5);
const WAL: WalBranch = WalBranch { system_id: SYSTEM, timeline: Timeline(1), branch: Branch::ROOT };
const SIZE: u32 = 1 << 20;

fn size() -> SegmentSize {
    SegmentSize::new(u64::from(SIZE)).unwrap()
}

fn segment(number: u64) -> Segment {
    Segment { timeline: Timeline(1), number }
}

fn cluster() -> ClusterName {
    "orders".parse().unwrap()
}

/// In memory, and in a folder: they refuse ranges of empty objects in other words.
fn archives(folder: &tempfile::TempDir) -> [WalArchive; 2] {
    let url = format!("file://{}", folder.path().display());
    let stores = [Store::in_memory(), Store::open(&url, &StoreOptions::default()).unwrap()];
    stores.map(|store| WalArchive::new(store, cluster(), keys(), 3))
}

fn keys() -> Arc<Keyring> {
    Arc::new(Keyring::of(DomainKey::generate().unwrap()))
}

/// What may lie there instead of an object.
fn damages(sound: &Bytes) -> Vec<Bytes> {
    let mut flipped = sound.to_vec();
    // Within the directory, which lies before the trailer.
    let at = flipped.len() - 40;
    flipped[at] ^= 0x10;
    vec![
        Bytes::new(),
        sound.slice(..sound.len() / 2),
        flipped.into(),
        Bytes::from_static(b"made by somebody without a key"),
    ]
}

async fn replace(archive: &WalArchive, key: &Path, bytes: Bytes) {
    archive.store().delete(vec![key.clone()]).await.unwrap();
    assert_eq!(archive.store().create(key, bytes).await.unwrap(), Creation::Created);
}

fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at % 251) as u8).collect()
}

async fn put(archive: &WalArchive, number: u64, from: u32, to: u32) {
    archive.put_tail(piece(archive, number, from, to)).await.unwrap();
}

fn piece(archive: &WalArchive, number: u64, from: u32, to: u32) -> OwnedTail {
    let content = content();
    let of = |end: u32| archive.id_of(&content[..end as usize]);
    OwnedTail {
        wal: WAL,
        segment: segment(number),
        segment_size: size(),
        name: name(from, to),
        before: of(from),
        after: of(to),
        bytes: Bytes::copy_from_slice(&content[from as usize..to as usize]),
        facts: SegmentFacts { valid_bytes: to, ..SegmentFacts::default() },
        shipped_at_us: 0,
        complete_at_us: None,
    }
}

fn name(from: u32, to: u32) -> TailName {
    TailName { from, to, member: "pg1".into() }
}

fn upload(number: u64) -> OwnedSegment {
    let at = CommitPoint { lsn: Lsn(segment(number).start(size()).0 + 100), at_us: number as i64 };
    OwnedSegment {
        wal: WAL,
        segment: segment(number),
        segment_size: size(),
        content: content(),
        facts: SegmentFacts { valid_bytes: SIZE - 100, commits: vec![at], ..SegmentFacts::default() },
        predecessor: None,
        member: "pg1".into(),
        shipped_at_us: 0,
    }
}

async fn catalog(archive: &WalArchive) -> WalCatalog {
    wal_catalog::read(archive, &BTreeMap::from([(SYSTEM, size())])).await.unwrap()
}

#[tokio::test]
async fn a_piece_that_does_not_read_hides_none_of_the_others() {
    let folder = tempfile::tempdir().unwrap();
    for archive in archives(&folder) {
        archive.put_segment(upload(2)).await.unwrap();
        put(&archive, 3, 0, 300).await;
        put(&archive, 3, 300, 600).await;
        put(&archive, 3, 600, 900).await;
        // The longest by its name, from whoever may create there.
        let foreign = layout::tail(&cluster(), &WAL, (segment(3), size()), &name(0, SIZE));
        let key = layout::tail(&cluster(), &WAL, (segment(3), size()), &name(300, 600));
        let sound = archive.store().get(&key).await.unwrap();
        for damaged in damages(&sound) {
            // Zeros are what cost nothing to send.
            let huge = Bytes::from(vec![0; 20 << 20]);
            let foreign_bytes = if damaged.is_empty() { huge } else { damaged.clone() };
            replace(&archive, &foreign, foreign_bytes).await;
            replace(&archive, &key, sound.clone()).await;
            let all = WalArchive::new(archive.store().clone(), cluster(), archive.keys.clone(), 3);
            assert_eq!(all.beginning(WAL, segment(3), size()).await.unwrap().unwrap().bytes, &content()[..900]);
            assert_eq!(all.beginning_facts(WAL, segment(3), size()).await.unwrap().unwrap().end, 900);
            assert_eq!(all.get_unfinished(WAL, segment(3), size()).await.unwrap().unwrap().end, 900);

            replace(&archive, &key, damaged).await;
            let some = WalArchive::new(archive.store().clone(), cluster(), archive.keys.clone(), 3);
            assert_eq!(some.beginning_of(WAL, (segment(3), size()), "pg1").await.unwrap().unwrap().bytes.len(), 300);
            assert_eq!(some.beginning_facts(WAL, segment(3), size()).await.unwrap().unwrap().end, 300);
            let seen = catalog(&some).await;
            let facts = seen.branches.get(&WAL).unwrap().segments[&3];
            assert!(facts.is_begun && facts.records_end == Some(Lsn(segment(3).start(size()).0 + 300)), "{facts:?}");
        }
    }
}

#[tokio::test]
async fn of_segments_and_histories_that_do_not_read_nothing_is_promised_and_all_else_is() {
    let folder = tempfile::tempdir().unwrap();
    for archive in archives(&folder) {
        for number in 2..6 {
            archive.put_segment(upload(number)).await.unwrap();
        }
        let text = b"1\t0/300000\tno recovery target specified\n";
        archive.put_history(SYSTEM, Timeline(2), text, None, "pg1", 0).await.unwrap();
        let second = archive.branch_of(SYSTEM, Timeline(2)).await.unwrap().unwrap();
        assert!(catalog(&archive).await.damaged.is_empty());
        let newest = layout::wal_segment(&cluster(), &WAL, segment(5), size());
        let history = layout::wal_history(&cluster(), &second);
        let sound = archive.store().get(&newest).await.unwrap();
        for damaged in damages(&sound) {
            replace(&archive, &newest, damaged.clone()).await;
            replace(&archive, &history, damaged).await;
            // Who has read them sound believes what was in them.
            let archive = WalArchive::new(archive.store().clone(), cluster(), archive.keys.clone(), 3);
            let seen = catalog(&archive).await;
            let branch = seen.branches.get(&WAL).unwrap();
            assert_eq!(branch.segments.keys().copied().collect::<Vec<_>>(), [2, 3, 4]);
            assert_eq!(branch.segments[&4].commits, SegmentCommits::Between { first_us: 4, last_us: 4 });
            assert_eq!(seen.branches.get(&second).unwrap().history, None);
            for key in [&newest, &history] {
                assert!(seen.damaged.iter().any(|said| said.contains(key.as_ref())), "{:?}", seen.damaged);
            }
            // Whoever writes such a branch goes on.
            let again = archive.put_history(SYSTEM, Timeline(2), text, None, "pg1", 0).await.unwrap();
            assert_eq!(again, Archived::AlreadyThere);
            assert_eq!(archive.divergences(SYSTEM, Timeline(2)).await.unwrap(), []);
        }
    }
}

/// A segment in which `wal_level` changes, which is told before it is stored.
fn leaving_the_level(number: u64) -> OwnedSegment {
    let mut upload = upload(number);
    let at = |bytes: u64| Lsn(segment(number).start(size()).0 + bytes);
    let changes = [(500, WalLevelClass::Minimal), (900, WalLevelClass::Replica)];
    upload.facts.wal_levels = changes.map(|(bytes, level)| WalLevelChange { at: at(bytes), level }).to_vec();
    upload
}

#[tokio::test]
async fn a_segment_whose_name_is_taken_by_what_does_not_read_is_stored_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let stranger = WalArchive::new(Store::in_memory(), cluster(), keys(), 3);
    let sound_but_for_its_key = stranger.seal_segment(upload(2)).await.unwrap().bytes;
    for archive in archives(&folder) {
        archive.put_segment(upload(1)).await.unwrap();
        let sealed = archive.seal_segment(leaving_the_level(2)).await.unwrap();
        let key = layout::wal_segment(&cluster(), &WAL, segment(2), size());
        assert_eq!(archive.store().create(&key, Bytes::new()).await.unwrap(), Creation::Created);
        for taken in [Bytes::new(), sound_but_for_its_key.clone()] {
            replace(&archive, &key, taken).await;
            let piece = layout::tail(&cluster(), &WAL, (segment(2), size()), &name(0, SIZE));
            archive.store().delete(vec![piece]).await.unwrap();
            assert!(matches!(archive.store_segment(&sealed).await.unwrap(), Archived::Stored { .. }));
            assert_eq!(archive.store_segment(&sealed).await.unwrap(), Archived::AlreadyThere);
            let beside = archive.get_content(WAL, segment(2), size()).await.unwrap().unwrap();
            let valid = SIZE as usize - 100;
            assert!(beside[..valid] == content()[..valid]);
            assert_eq!(archive.commit_times(WAL, segment(2), size()).await.unwrap().0.len(), 1);
            let seen = catalog(&archive).await;
            assert!(!seen.branches[&WAL].segments[&2].is_begun && !seen.damaged.is_empty(), "{seen:?}");
            let [unlogged] = &seen.unlogged[..] else { panic!("{seen:?}") };
            assert_eq!(unlogged.commits_before, SegmentCommits::Between { first_us: 2, last_us: 2 });
            // Whoever has no key cannot tell the two apart, and removes neither.
            let later = Timestamp::now() + SignedDuration::from_hours(2);
            let removed = superseded::remove(archive.store(), &cluster(), later).await.unwrap();
            assert_eq!(removed, superseded::Removed::default());
        }
        // Once the object is removed, the segment is whole.
        archive.store().delete(vec![key]).await.unwrap();
        assert!(!catalog(&archive).await.branches[&WAL].segments[&2].is_begun);
    }
}

#[tokio::test]
async fn a_change_of_level_in_a_segment_that_nobody_can_read_takes_nothing_else_away() {
    let folder = tempfile::tempdir().unwrap();
    for archive in archives(&folder) {
        archive.put_segment(upload(1)).await.unwrap();
        archive.put_segment(leaving_the_level(2)).await.unwrap();
        let key = layout::wal_segment(&cluster(), &WAL, segment(2), size());
        let sound = archive.store().get(&key).await.unwrap();
        for damaged in damages(&sound) {
            replace(&archive, &key, damaged).await;
            let archive = WalArchive::new(archive.store().clone(), cluster(), archive.keys.clone(), 3);
            let seen = catalog(&archive).await;
            assert_eq!(seen.branches[&WAL].segments.keys().copied().collect::<Vec<_>>(), [1]);
            assert_eq!(seen.unlogged.len(), 1, "nothing is promised beyond it");
        }
    }
}

/// Whoever has a piece before the repository has it may store a part of it under its name.
#[tokio::test]
async fn a_piece_of_which_only_the_directory_reads_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    for archive in archives(&folder) {
        put(&archive, 3, 0, 300).await;
        let key = layout::tail(&cluster(), &WAL, (segment(3), size()), &name(0, 300));
        let mut spoiled = archive.store().get(&key).await.unwrap().to_vec();
        // Within the content, which follows the header.
        spoiled[crate::format::sealed::HEADER_LEN + 10] ^= 1;
        replace(&archive, &key, spoiled.into()).await;
        let again = archive.put_tail(piece(&archive, 3, 0, 300)).await;
        assert!(again.as_ref().is_err_and(ArchiveError::is_damage), "{again:?}");
    }
}
