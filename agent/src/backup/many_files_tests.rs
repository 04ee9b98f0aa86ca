//! A made-up data directory, without a server: backed up whole, backed up again with little changed, and restored.
//!
//! Small, it shows that what goes in comes out. With half a million relation files it shows what that takes:
//! `TMPDIR=/dev/shm cargo test -p walfleet-agent --lib -- --ignored --nocapture half_a_million`

#[path = "many_processes_tests.rs"]
mod many_processes;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use walfleet_repository::backup::commit::{BackupSession, SessionSpec};
use walfleet_repository::backup::fetch::{FetchOptions, fetch_all};
use walfleet_repository::backup::write::PackSession;
use walfleet_repository::cluster::OpenCluster;
use walfleet_repository::cluster_log::Author;
use walfleet_repository::crypto::RecipientSecret;
use walfleet_repository::format::log_entry::Action;
use walfleet_repository::format::manifest::{Content, Counters, EntryKind, FileEntry, Manifest};
use walfleet_repository::lineage::Kin;
use walfleet_repository::open::{CommittedBackup, Repository, RepositorySpec};
use walfleet_repository::postgres::{Branch, Lsn, SystemId, Timeline, WalBranch};
use walfleet_repository::signature::Signer;
use walfleet_repository::store::{Store, StoreOptions};

use super::copy::{self, CopyReport, CopySpec};
use super::damage::NAMED;
use super::scan::{Scan, ScanSpec};
use super::stretch::PageCheck;
use super::test_manifest::test_manifest;
use crate::limits::Allowance;
use crate::postgres::page::PageRules;
use crate::progress::Progress;
use crate::restore::sink::FileSink;

struct Ground {
    folder: tempfile::TempDir,
    cluster: OpenCluster,
    secret: RecipientSecret,
    signer: Arc<Signer>,
    processes: usize,
}

async fn ground() -> Ground {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().join("repository").display());
    fs::create_dir(folder.path().join("repository")).unwrap();
    let (signer, _) = Signer::generate();
    let secret = RecipientSecret::generate().unwrap();
    let spec = RepositorySpec { root_public_key: signer.public_key(), recovery_recipient: secret.id() };
    let store = Store::open(&url, &StoreOptions::default()).unwrap();
    let (repository, _) = Repository::init(store, spec).await.unwrap();
    let name = "orders".parse().unwrap();
    let cluster =
        OpenCluster::open_or_begin(repository, name, &secret, Author::host(&signer), ("x", None)).await.unwrap();
    Ground { folder, cluster, secret, signer: Arc::new(signer), processes: 2 }
}

/// Bytes that do not compress, different for every seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(len).collect()
}

/// A data directory of `files` relation files of a kilobyte, in a few databases.
fn make_cluster(data_dir: &Path, files: usize) {
    for folder in ["global", "pg_tblspc", "pg_wal"] {
        fs::create_dir_all(data_dir.join(folder)).unwrap();
    }
    fs::write(data_dir.join("PG_VERSION"), "18\n").unwrap();
    for database in 1..=4 {
        fs::create_dir_all(data_dir.join(format!("base/{database}"))).unwrap();
    }
    for number in 0..files {
        let path = data_dir.join(format!("base/{}/{}", number % 4 + 1, 16_384 + number));
        fs::write(path, noise(number as u64 + 1, 1024)).unwrap();
    }
}

fn wal() -> WalBranch {
    WalBranch { system_id: SystemId(1), timeline: Timeline(1), branch: Branch::ROOT }
}

async fn back_up(ground: &Ground, data_dir: &Path) -> (CommittedBackup, CopyReport) {
    let spec = SessionSpec { run: None, wal: wal(), wal_floor: Lsn(0x100) };
    let opened = BackupSession::open(ground.cluster.clone(), ground.signer.clone(), "pg1", spec).await.unwrap();
    let (mut session, parent) = opened;
    let packs = PackSession::begin(
        ground.cluster.repository().store().clone(),
        ground.cluster.name().clone(),
        session.id().clone(),
        ground.cluster.keys().newest().clone(),
        3,
        parent.iter().flat_map(|parent| parent.packs.clone()),
    );
    let scan = ScanSpec { data_dir: data_dir.to_owned(), major: 18, catalog_version: 1, without_content: Vec::new() };
    let rules = PageRules { block_bytes: 8192, checksums: true, start_lsn: Lsn(1 << 40), end_lsn: Lsn(1 << 41) };
    let spec = CopySpec {
        known: None,
        threads: ground.processes,
        pages: PageCheck { rules, blocks_per_segment: 131_072 },
        parent: parent.map(|parent| parent.reader),
        allowance: Allowance::unlimited(),
    };
    let (work, runtime) = (packs.clone(), Handle::current());
    let (report, control) = tokio::task::spawn_blocking(move || {
        let (progress, cancel) = (Progress::new(), CancellationToken::new());
        let report = copy::copy(Scan::new(scan).unwrap(), &work, &spec, &runtime, &progress, &cancel).unwrap();
        let content = Content::Empty;
        let control = FileEntry {
            path: Bytes::from_static(b"global/pg_control"),
            kind: EntryKind::File { size: 0, crc32c: None, content },
            mode: 0o600,
            mtime_us: 0,
        };
        (report, control)
    })
    .await
    .unwrap();
    let used = packs.finish().await.unwrap();
    let manifest = Manifest {
        backup: session.id().clone(),
        cluster: ground.cluster.name().clone(),
        file_list: report.file_list.clone(),
        file_count: report.file_count,
        has_overlays: report.has_overlays,
        control_file: control,
        counters: Counters { new_bytes: packs.written().0, ..Counters::default() },
        ..test_manifest(wal(), Lsn(0x100), Lsn(0x200))
    };
    (session.commit(&manifest, used, 0).await.unwrap(), report)
}

async fn restore(ground: &Ground, backup: &CommittedBackup, to: &Path) {
    let log = ground.cluster.log().await.unwrap();
    let reader = Arc::new(ground.cluster.open_backup(backup, log.state()).await.unwrap());
    fs::create_dir(to).unwrap();
    let sink = Arc::new(FileSink::new(to, Progress::new()));
    let options = FetchOptions { requests: 4, threads: ground.processes };
    fetch_all(reader.clone(), sink, options, &CancellationToken::new()).await.unwrap();
    crate::restore::write_backup_manifest(&reader, SystemId(1), None, &to.join("backup_manifest"), 0o600)
        .await
        .unwrap();
}

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => drop(found.insert(path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap())),
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_among_many_costs_itself_and_all_come_back() {
    let ground = ground().await;
    let data_dir = ground.folder.path().join("data");
    make_cluster(&data_dir, 3000);
    // Of several slots, a hole in the middle, and a last one that is not whole.
    let large = [noise(1, 300 << 10), vec![0; 512 << 10], noise(2, 70_000)].concat();
    fs::write(data_dir.join("base/1/large"), &large).unwrap();
    back_up(&ground, &data_dir).await;
    fs::write(data_dir.join("base/1/16384"), noise(7, 2000)).unwrap();
    fs::write(data_dir.join("base/4/99999"), noise(8, 1000)).unwrap();
    fs::remove_file(data_dir.join("base/2/16385")).unwrap();
    let (second, _) = back_up(&ground, &data_dir).await;
    let new_bytes = second.reference.counters.new_bytes;
    assert!((3000..500_000).contains(&new_bytes), "the two files and what lists them, of 4 MB: {new_bytes}");
    let to = ground.folder.path().join("restored");
    restore(&ground, &second, &to).await;
    let (mut restored, source) = (files(&to), files(&data_dir));
    let manifest = restored.remove(Path::new("backup_manifest")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(manifest["Files"].as_array().unwrap().len(), source.len() + 2, "and backup_label and pg_control");
    assert!(restored == source, "the restored files are not the source's");
}

/// Changes, cuts and extends a relation's file at random, some pages to zeros.
fn change(pages: &mut Vec<u8>, random: &mut impl rand::RngExt) -> usize {
    let mut changed = 0;
    match random.random_range(0..4) {
        0 => pages.truncate(pages.len() - random.random_range(0..40) * 8192),
        1 => pages.extend(noise(random.random(), random.random_range(0..40) * 8192)),
        _ => {}
    }
    let count = pages.len() / 8192;
    for _ in 0..random.random_range(0..40) {
        let page = random.random_range(0..count);
        let content = if random.random_bool(0.1) { vec![0; 8192] } else { noise(random.random(), 8192) };
        pages[page * 8192..][..8192].copy_from_slice(&content);
        changed += 1;
    }
    if random.random_bool(0.2) {
        let from = random.random_range(0..count - 32) * 8192;
        pages[from..][..32 * 8192].fill(0);
    }
    changed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_any_wal_a_file_is_compared_with_its_parent_by_page_and_comes_back() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed);
    let ground = ground().await;
    let data_dir = ground.folder.path().join("data");
    make_cluster(&data_dir, 4);
    let path = data_dir.join("base/1/20001");
    let mut pages = noise(seed, 16 << 20);
    fs::write(&path, &pages).unwrap();
    let (first, _) = back_up(&ground, &data_dir).await;
    assert!(first.reference.counters.new_bytes > 16 << 20);
    for page in [3, 700, 701, 1500] {
        pages[page * 8192] ^= 1;
    }
    fs::write(&path, &pages).unwrap();
    let (second, report) = back_up(&ground, &data_dir).await;
    assert!(report.has_overlays);
    let new_bytes = second.reference.counters.new_bytes;
    assert!((4 * 8192..4 * 8192 + 40_000).contains(&new_bytes), "four pages, a map and a list: {new_bytes}");
    for round in 0..12 {
        let changed = change(&mut pages, &mut random);
        fs::write(&path, &pages).unwrap();
        let (backup, _) = back_up(&ground, &data_dir).await;
        println!("round {round}: {changed} pages, {} new bytes", backup.reference.counters.new_bytes);
        let to = ground.folder.path().join(format!("restored{round}"));
        restore(&ground, &backup, &to).await;
        assert!(fs::read(to.join("base/1/20001")).unwrap() == pages, "seed {seed}, round {round}");
    }
}

/// A copy under a name of its own shares the original's key and content, if its host holds the key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_backup_of_a_copy_stores_what_differs_and_is_whole_by_itself() {
    let ground = ground().await;
    let data_dir = ground.folder.path().join("data");
    make_cluster(&data_dir, 100);
    let path = data_dir.join("base/1/20001");
    let mut pages = noise(1, 4 << 20);
    fs::write(&path, &pages).unwrap();
    let (original, _) = back_up(&ground, &data_dir).await;
    let repository = ground.cluster.repository().clone();
    let kin = Kin { system_id: SystemId(1), clusters: None };
    let begin = async |name: &str, secret: &RecipientSecret, kin| {
        let (repository, name) = (repository.clone(), name.parse().unwrap());
        let opened = OpenCluster::open_or_begin(repository, name, secret, Author::host(&ground.signer), ("x", kin));
        opened.await.unwrap()
    };
    let stranger = begin("stranger", &RecipientSecret::generate().unwrap(), Some(&kin)).await;
    assert_ne!(stranger.domain(), ground.cluster.domain(), "whoever does not hold the key gets one of his own");
    let apart = begin("apart", &ground.secret, None).await;
    assert_ne!(apart.domain(), ground.cluster.domain());
    let clone = begin("clone", &ground.secret, Some(&kin)).await;
    assert_eq!(clone.domain(), ground.cluster.domain());

    pages[8192 * 100] ^= 1;
    fs::write(&path, &pages).unwrap();
    let copy = Ground { cluster: clone, signer: ground.signer.clone(), ..self::ground().await };
    super::loan::arrange(&copy.cluster, &copy.signer, Some(&kin), &CancellationToken::new()).await;
    let (first, _) = back_up(&copy, &data_dir).await;
    assert_eq!(first.reference.parents, std::slice::from_ref(&original.reference.backup));
    let new_bytes = first.reference.counters.new_bytes;
    assert!((8192..60_000).contains(&new_bytes), "a page, a map and a list: {new_bytes}");
    // Its parent is its own now, and what was borrowed stays where it is.
    super::loan::arrange(&copy.cluster, &copy.signer, Some(&kin), &CancellationToken::new()).await;
    let (second, _) = back_up(&copy, &data_dir).await;
    assert_eq!(second.reference.parents, std::slice::from_ref(&first.reference.backup));
    assert!(second.reference.counters.new_bytes < 60_000);
    let lender = Some(ground.cluster.name().clone());
    assert!(second.reference.sessions.iter().any(|session| session.cluster == lender));
    let to = ground.folder.path().join("restored");
    restore(&copy, &second, &to).await;
    assert!(fs::read(to.join("base/1/20001")).unwrap() == pages);

    let mut log = ground.cluster.log().await.unwrap();
    assert!(log.state().is_held(&original.reference.backup));
    let expire = Action::Expire { backup: original.reference.backup.clone(), reason: String::new() };
    let expired = log.append::<std::convert::Infallible>(Author::host(&ground.signer), |_| {
        walfleet_repository::cluster_log::Decision::Append(expire.clone())
    });
    assert!(expired.await.unwrap_err().to_string().contains("is held"));
}

/// One wrong byte, a whole bad disk, and a page from a future that is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_a_file_that_is_damaged_throughout_are_counted_and_the_backup_goes_on() {
    let ground = ground().await;
    let data_dir = ground.folder.path().join("data");
    make_cluster(&data_dir, 10);
    let mut pages = noise(1, 4000 * 8192);
    for (block, page) in pages.chunks_exact_mut(8192).enumerate() {
        // Changed before the backup; the last one at a moment that is still to come.
        page[..8].fill(0);
        page[3] = if block == 3999 { 1 } else { 0 };
    }
    fs::write(data_dir.join("base/1/20000.1"), &pages).unwrap();
    let (backup, report) = back_up(&ground, &data_dir).await;
    let damage = report.damage.judge(Lsn(0x200));
    assert_eq!((damage.count, damage.named.len(), damage.is_exact), (4000, NAMED, true));
    assert_eq!(damage.named[0].page.block, 131_072, "of the second segment");
    let to = ground.folder.path().join("restored");
    restore(&ground, &backup, &to).await;
    assert!(fs::read(to.join("base/1/20000.1")).unwrap() == pages, "as it was");
}

/// Of this process: its highest memory since the last call, in MiB.
fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    fs::write("/proc/self/clear_refs", "5").unwrap();
    kib >> 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "makes half a million files and takes minutes"]
async fn half_a_million_relations_fit_into_256_mib() {
    crate::memory::give_back_large_buffers();
    let ground = ground().await;
    let data_dir = ground.folder.path().join("data");
    let count = std::env::var("WALFLEET_FILES").ok().and_then(|count| count.parse().ok()).unwrap_or(500_000);
    make_cluster(&data_dir, count);
    let mut peaks = vec![("before", peak_mib())];
    let (_, first) = back_up(&ground, &data_dir).await;
    assert!(first.file_count > count as u64);
    peaks.push(("first backup", peak_mib()));
    // Early in the list, and nothing after it: the pack it lies in stays open for long.
    fs::write(data_dir.join("base/1/16384"), noise(7, 1000)).unwrap();
    let (second, _) = back_up(&ground, &data_dir).await;
    peaks.push(("second backup", peak_mib()));
    restore(&ground, &second, &ground.folder.path().join("restored")).await;
    peaks.push(("restore", peak_mib()));
    println!("peak resident memory in MiB: {peaks:?}");
    assert!(peaks.iter().all(|(_, mib)| *mib < 256), "{peaks:?}");
}
