//! Whole backups through an in-memory repository: what goes in comes out, a second one costs what changed, and damage
//! is found.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use tokio_util::sync::CancellationToken;

use super::commit::{BackupSession, SessionError, SessionSpec};
use super::fetch::{FetchError, FetchOptions, FetchReport, FileNumber, Found, PieceFile, PieceSink, fetch_all};
use super::file_list::{FileListWriter, ParentMap, PlacedContent, PlacedFile, PlacedKind};
use super::write::{PackSession, PlacedSlot};
use crate::checksum;
use crate::cluster::OpenCluster;
use crate::cluster_log::Author;
use crate::crypto::RecipientSecret;
use crate::format::file_map::{FileMap, SLOT_BYTES, Slot};
use crate::format::manifest::{Content, Counters, EntryKind, FileEntry, Manifest, path_order};
use crate::open::{CommittedBackup, Repository, RepositorySpec};
use crate::postgres::{Branch, Lsn, SystemId, Timeline, WalBranch};
use crate::signature::Signer;
use crate::store::{RetryPolicy, Store};
use crate::verify::{self, Depth, Seen, VerifySpec};

type Files = BTreeMap<String, Vec<u8>>;

struct Ground {
    cluster: OpenCluster,
    signer: Arc<Signer>,
    objects: Arc<InMemory>,
}

async fn ground() -> Ground {
    let (signer, _) = Signer::generate();
    let secret = RecipientSecret::generate().unwrap();
    let spec = RepositorySpec { root_public_key: signer.public_key(), recovery_recipient: secret.id() };
    let objects = Arc::new(InMemory::new());
    let store = Store::wrap(objects.clone(), "memory:///", RetryPolicy::default());
    let (repository, _) = Repository::init(store, spec).await.unwrap();
    let name = "orders".parse().unwrap();
    let cluster =
        OpenCluster::open_or_begin(repository, name, &secret, Author::host(&signer), ("x", None)).await.unwrap();
    Ground { cluster, signer: Arc::new(signer), objects }
}

fn wal() -> WalBranch {
    WalBranch { system_id: SystemId(1), timeline: Timeline(1), branch: Branch::ROOT }
}

/// Backs the files up; returns the backup and the bytes of packs it added.
async fn back_up(ground: &Ground, files: &Files, run: Option<&str>) -> Result<(CommittedBackup, u64), SessionError> {
    let spec = SessionSpec { run: run.map(str::to_owned), wal: wal(), wal_floor: Lsn(0x100) };
    let opened = BackupSession::open(ground.cluster.clone(), ground.signer.clone(), "pg1", spec).await?;
    let (mut session, parent) = opened;
    let packs = PackSession::begin(
        ground.cluster.repository().store().clone(),
        ground.cluster.name().clone(),
        session.id().clone(),
        ground.cluster.keys().newest().clone(),
        3,
        parent.iter().flat_map(|parent| parent.packs.clone()),
    );
    let known = match &parent {
        Some(parent) => entries(&parent.reader).await,
        None => BTreeMap::new(),
    };
    let (files, work) = (files.clone(), packs.clone());
    let parts = parent.as_ref().map_or_else(Vec::new, |parent| parent.reader.manifest.file_list.clone());
    let (file_list, file_count, control) = tokio::task::spawn_blocking(move || {
        let mut writer = work.writer();
        let mut list = FileListWriter::new(work.clone(), &parts);
        let mut paths: Vec<&String> = files.keys().collect();
        paths.sort_by(|a, b| path_order(a.as_bytes(), b.as_bytes()));
        for path in paths {
            let plain = &files[path];
            let parent = known.get(path);
            let mut slots = Vec::new();
            for (index, slot) in plain.chunks(SLOT_BYTES as usize).enumerate() {
                let before = match parent {
                    Some((FileEntry { kind: EntryKind::File { content: Content::Chunk(place), .. }, .. }, _)) => {
                        Some(*place)
                    }
                    Some((_, Some(map))) => match map.slots.get(index) {
                        Some(Slot::Chunk(place)) => Some(*place),
                        _ => None,
                    },
                    _ => None,
                };
                slots.push(writer.store_slot(slot, before.as_ref()).unwrap());
            }
            let content = match (slots.len(), slots.first()) {
                (0, _) => PlacedContent::Empty,
                (1, Some(PlacedSlot::Zero)) => PlacedContent::Zero,
                (1, Some(PlacedSlot::Chunk(placed))) => PlacedContent::Chunk(*placed),
                _ => {
                    let parent = match parent.map(|(entry, _)| &entry.kind) {
                        Some(EntryKind::File { content: Content::Map(place), .. }) => {
                            Some(ParentMap { place: *place, base: None })
                        }
                        _ => None,
                    };
                    PlacedContent::Slots { slot_bytes: SLOT_BYTES, slots, overlays: Vec::new(), parent }
                }
            };
            list.push(file(path, plain, content)).unwrap();
        }
        let control = writer.store(b"control", None).unwrap();
        writer.flush().unwrap();
        let control = super::file_list::resolve_entry(
            &work,
            &file("global/pg_control", b"control", PlacedContent::Chunk(control)),
        );
        let (parts, count) = list.finish().unwrap();
        (parts, count, control.unwrap())
    })
    .await
    .unwrap();
    let used = packs.finish().await.unwrap();
    let stored = packs.written().1;
    let manifest = Manifest {
        backup: session.id().clone(),
        cluster: ground.cluster.name().clone(),
        wal: wal(),
        start_lsn: Lsn(0x100),
        stop_lsn: Lsn(0x200),
        file_list,
        file_count,
        has_overlays: false,
        control_file: control,
        damaged_pages: Vec::new(),
        counters: Counters::default(),
        ..crate::format::manifest::tests::manifest()
    };
    Ok((session.commit(&manifest, used, 0).await?, stored))
}

fn file(path: &str, plain: &[u8], content: PlacedContent) -> PlacedFile {
    let kind = PlacedKind::File { size: plain.len() as u64, crc32c: Some(checksum::crc32c(plain)), content };
    PlacedFile { path: Bytes::copy_from_slice(path.as_bytes()), mode: 0o600, mtime_us: 0, kind }
}

async fn entries(reader: &super::read::BackupReader) -> BTreeMap<String, (FileEntry, Option<FileMap>)> {
    let mut found = BTreeMap::new();
    for part in &reader.manifest.file_list {
        for entry in reader.file_list_part(part).await.unwrap() {
            let map = match &entry.kind {
                EntryKind::File { content: Content::Map(place), .. } => Some(reader.file_map(place).await.unwrap()),
                _ => None,
            };
            found.insert(String::from_utf8(entry.path.to_vec()).unwrap(), (entry, map));
        }
    }
    found
}

#[derive(Default)]
struct MemorySink {
    /// What is there before.
    before: Files,
    files: Mutex<BTreeMap<FileNumber, (String, Vec<u8>)>>,
}

impl PieceSink for MemorySink {
    fn entry(&self, number: FileNumber, entry: &FileEntry) -> std::io::Result<Found> {
        let EntryKind::File { size, .. } = entry.kind else { return Ok(Found::Nothing) };
        let path = String::from_utf8(entry.path.to_vec()).unwrap();
        let mut content = self.before.get(&path).cloned().unwrap_or_default();
        let found = if content.is_empty() { Found::Nothing } else { Found::Content };
        content.resize(size as usize, 0);
        self.files.lock().unwrap().insert(number, (path, content));
        Ok(found)
    }

    fn read(&self, file: &PieceFile, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        let files = self.files.lock().unwrap();
        into.copy_from_slice(&files[&file.number].1[offset as usize..][..into.len()]);
        Ok(())
    }

    fn write(&self, file: &PieceFile, offset: u64, content: &[u8]) -> std::io::Result<()> {
        let mut files = self.files.lock().unwrap();
        assert_eq!(files[&file.number].0.as_bytes(), file.path);
        files.get_mut(&file.number).unwrap().1[offset as usize..][..content.len()].copy_from_slice(content);
        Ok(())
    }
}

/// A sink that something is wrong with as soon as something large comes.
struct BadSink {
    sink: MemorySink,
    large: fn() -> std::io::Result<()>,
}

impl PieceSink for BadSink {
    fn entry(&self, number: FileNumber, entry: &FileEntry) -> std::io::Result<Found> {
        self.sink.entry(number, entry)
    }

    fn write(&self, file: &PieceFile, offset: u64, content: &[u8]) -> std::io::Result<()> {
        if content.len() >= SLOT_BYTES as usize {
            (self.large)()?;
        }
        self.sink.write(file, offset, content)
    }
}

async fn bring_back(ground: &Ground, backup: &CommittedBackup) -> Result<Files, FetchError> {
    Ok(bring_back_over(ground, backup, Files::new()).await?.0)
}

async fn bring_back_over(
    ground: &Ground,
    backup: &CommittedBackup,
    before: Files,
) -> Result<(Files, FetchReport), FetchError> {
    let log = ground.cluster.log().await.unwrap();
    let reader = Arc::new(ground.cluster.open_backup(backup, log.state()).await.unwrap());
    let sink = Arc::new(MemorySink { before, files: Mutex::default() });
    let options = FetchOptions { requests: 3, threads: 2 };
    let report = fetch_all(reader, sink.clone(), options, &CancellationToken::new()).await?;
    let files = std::mem::take(&mut *sink.files.lock().unwrap());
    Ok((files.into_values().collect(), report))
}

/// Content that does not compress to nothing, different for every seed.
fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new_derive_key("noise").update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

fn cluster_files() -> Files {
    let mut files = Files::from([
        ("PG_VERSION".to_owned(), b"18\n".to_vec()),
        ("base/1/empty".to_owned(), Vec::new()),
        ("base/1/zero".to_owned(), vec![0; 8192]),
        ("base/1/large".to_owned(), noise(1, 5 * SLOT_BYTES as usize + 777)),
        ("base/1.x".to_owned(), noise(2, 9000)),
    ]);
    let mut sparse = noise(3, 4 * SLOT_BYTES as usize);
    sparse[SLOT_BYTES as usize..3 * SLOT_BYTES as usize].fill(0);
    files.insert("base/1/sparse".to_owned(), sparse);
    for i in 0..3000u32 {
        files.insert(format!("base/2/{i}"), noise((i % 251) as u8, (i % 700) as usize));
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_in_comes_out_and_a_second_backup_costs_what_changed() {
    let ground = ground().await;
    let mut files = cluster_files();
    let (first, stored) = back_up(&ground, &files, Some("run 1")).await.unwrap();
    assert!(stored > 1_000_000);
    assert_eq!(bring_back(&ground, &first).await.unwrap(), files);

    let (second, unchanged) = back_up(&ground, &files, None).await.unwrap();
    assert_eq!(second.reference.parents, std::slice::from_ref(&first.reference.backup));
    assert!(unchanged < 2000, "nothing changed and {unchanged} bytes were stored");
    assert_eq!(bring_back(&ground, &second).await.unwrap(), files);

    files.get_mut("base/1/large").unwrap()[SLOT_BYTES as usize + 5] ^= 1;
    files.remove("base/2/17");
    files.insert("base/2/new".to_owned(), noise(9, 100));
    let (third, changed) = back_up(&ground, &files, None).await.unwrap();
    assert!((100_000..400_000).contains(&changed), "one slot and two list parts changed, {changed} bytes were stored");
    assert_eq!(bring_back(&ground, &third).await.unwrap(), files);
    assert_eq!(bring_back(&ground, &first).await.unwrap().len(), cluster_files().len(), "the first is still whole");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_already_is_kept_and_only_the_rest_is_brought() {
    let ground = ground().await;
    let files = cluster_files();
    let (backup, stored) = back_up(&ground, &files, None).await.unwrap();
    let (whole, report) = bring_back_over(&ground, &backup, files.clone()).await.unwrap();
    assert_eq!((whole == files, report.fetched_bytes), (true, 0));
    let plain: usize = files.values().map(Vec::len).sum();
    let zero = 8192 + 2 * SLOT_BYTES as usize;
    assert_eq!(report.kept_bytes, (plain - zero) as u64);

    let mut damaged = files.clone();
    damaged.get_mut("base/1/large").unwrap()[3 * SLOT_BYTES as usize] ^= 1;
    damaged.get_mut("base/1/sparse").unwrap()[2 * SLOT_BYTES as usize + 9] = 1;
    damaged.get_mut("base/1/zero").unwrap()[8191] = 1;
    damaged.get_mut("base/1/empty").unwrap().push(7);
    damaged.get_mut("base/2/690").unwrap().truncate(5);
    damaged.get_mut("base/2/691").unwrap().push(5);
    damaged.remove("base/2/692");
    let (whole, report) = bring_back_over(&ground, &backup, damaged).await.unwrap();
    assert!(whole == files);
    assert!((1..stored / 2).contains(&report.fetched_bytes), "{} of {stored} bytes were fetched", report.fetched_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_written_ends_a_restore_with_its_reason_and_so_does_a_lost_thread() {
    let ground = ground().await;
    let files: Files = (0..40).map(|i| (format!("base/1/{i}"), noise(i, 3 << 20))).collect();
    let (backup, _) = back_up(&ground, &files, None).await.unwrap();
    let log = ground.cluster.log().await.unwrap();
    let reader = Arc::new(ground.cluster.open_backup(&backup, log.state()).await.unwrap());
    let options = FetchOptions { requests: 3, threads: 2 };
    let fetched = |large| {
        let sink = Arc::new(BadSink { sink: MemorySink::default(), large });
        let reader = reader.clone();
        async move { fetch_all(reader, sink, options, &CancellationToken::new()).await }
    };
    let full = fetched(|| Err(std::io::ErrorKind::StorageFull.into())).await;
    assert!(matches!(full, Err(FetchError::Sink(error)) if error.kind() == std::io::ErrorKind::StorageFull));
    assert!(matches!(fetched(|| panic!("a fault in the sink")).await, Err(FetchError::Lost)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_served_once_and_a_dead_attempt_gives_way() {
    let ground = ground().await;
    let files = Files::from([("PG_VERSION".to_owned(), b"18\n".to_vec())]);
    let spec = SessionSpec { run: Some("nightly".into()), wal: wal(), wal_floor: Lsn(0x100) };
    let (dead, _) = BackupSession::open(ground.cluster.clone(), ground.signer.clone(), "pg1", spec).await.unwrap();
    back_up(&ground, &files, Some("nightly")).await.unwrap();
    let again = back_up(&ground, &files, Some("nightly")).await;
    assert!(matches!(again, Err(SessionError::RunServed { .. })));
    let log = ground.cluster.log().await.unwrap();
    assert!(!log.state().session(dead.id()).unwrap().is_open(), "the dead attempt was aborted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parents_pack_that_is_gone_is_not_referred_to_and_its_content_is_stored_anew() {
    let ground = ground().await;
    let (first, stored) = back_up(&ground, &cluster_files(), None).await.unwrap();
    let log = ground.cluster.log().await.unwrap();
    // The largest pack holds the data.
    let packs = first.reference.sessions.iter().flat_map(|session| &session.packs);
    let largest = packs.max_by_key(|used| used.stored_bytes).unwrap().pack;
    let key = ground.cluster.pack_keys(&first, log.state()).await.unwrap()[&largest].clone();
    ground.objects.delete(&key).await.unwrap();
    assert!(bring_back(&ground, &first).await.is_err());
    let (second, again) = back_up(&ground, &cluster_files(), None).await.unwrap();
    assert!(again > stored / 2, "{again} of {stored} bytes were stored anew");
    assert_eq!(bring_back(&ground, &second).await.unwrap(), cluster_files());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_pack_is_named_with_the_backups_it_costs_and_never_restored_from() {
    let ground = ground().await;
    let (backup, _) = back_up(&ground, &cluster_files(), None).await.unwrap();
    let log = ground.cluster.log().await.unwrap();
    let (_, key) = ground
        .cluster
        .pack_keys(&backup, log.state())
        .await
        .unwrap()
        .into_iter()
        .max_by_key(|(_, key)| key.to_string())
        .unwrap();
    let store = ground.cluster.repository().store();
    let mut bytes = store.get(&key).await.unwrap().to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    let bytes_len = bytes.len() as u64;
    ground.objects.put(&key, bytes.into()).await.unwrap();
    let damaged = bring_back(&ground, &backup).await;
    let spec = VerifySpec { backup: None, depth: Depth::Content };
    let (total, read) = (AtomicU64::new(0), AtomicU64::new(0));
    let seen = |seen: Seen| {
        let (counter, bytes) = match seen {
            Seen::Total(bytes) => (&total, bytes),
            Seen::Read(bytes) => (&read, bytes),
        };
        counter.fetch_add(bytes, Ordering::Relaxed);
    };
    let report = verify::verify(&ground.cluster, &spec, seen, &CancellationToken::new()).await.unwrap();
    let (total, read) = (total.into_inner(), read.into_inner());
    assert!(read == report.bytes && total == read + bytes_len, "{read} of {total} bytes: all but the damaged pack");
    let finding = report.findings.iter().find(|finding| finding.object == key.to_string()).unwrap();
    assert_eq!(finding.backups, std::slice::from_ref(&backup.reference.backup));
    // The flipped byte may lie in a pack's own directory, which a restore does not read.
    if let Ok(files) = damaged {
        assert_eq!(files, cluster_files());
    }
}
