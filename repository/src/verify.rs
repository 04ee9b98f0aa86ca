//! Verification: every stored byte against its name's hash; deep, every chunk against its id.
//!
//! Looks at what live backups need and at the WAL behind them. A finding names the object and the backups it costs; one
//! bad object never hides the others. Repairs nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use tokio_util::sync::CancellationToken;

use crate::cluster::{ClusterError, OpenCluster};
use crate::cluster_log::ClusterLog;
use crate::format::clear::ObjectKind;
use crate::format::pack::PackReader;
use crate::format::sealed::{self, Header};
use crate::format::wal_segment;
use crate::ids::{BackupId, PackId};
use crate::keyring::Keyring;
use crate::layout;
use crate::open::CommittedBackup;
use crate::postgres::{Lsn, Segment, SegmentSize, WalBranch};
use crate::store::Store;
use crate::wal_archive::WalArchive;

/// Objects in flight: each costs up to 32 MiB of memory.
const IN_FLIGHT: usize = 3;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Depth {
    /// Stored bytes against hashes; needs no key.
    Stored,
    /// Opened, decompressed, every chunk against its id.
    Content,
}

/// One object that is not as it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    pub object: String,
    pub problem: String,
    /// Backups that cannot be restored whole because of it.
    pub backups: Vec<BackupId>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VerifyReport {
    pub packs: u64,
    pub segments: u64,
    pub bytes: u64,
    pub findings: Vec<Finding>,
}

/// What to look at: all live backups, or one.
pub struct VerifySpec {
    pub backup: Option<BackupId>,
    pub depth: Depth,
}

#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("the repository holds no backup {0} of this cluster")]
    NoSuchBackup(BackupId),
    #[error("cancelled")]
    Cancelled,
}

/// How far a verification is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// So many stored bytes are to be read, before the first of them is.
    Total(u64),
    /// Of one object.
    Read(u64),
}

struct Object {
    key: Path,
    what: What,
    backups: Vec<BackupId>,
}

#[derive(Clone, Copy)]
enum What {
    Pack(PackId),
    Segment(WalBranch, Segment),
}

/// Checks and reports; `seen` is told how far it is.
///
/// Boxed here, where the lifetimes have names: inside a larger future rustc 1.95 cannot prove that it may be sent to
/// another thread (rust-lang/rust#102211).
pub fn verify<'a>(
    cluster: &'a OpenCluster,
    spec: &'a VerifySpec,
    seen: impl Fn(Seen) + Send + 'a,
    cancel: &'a CancellationToken,
) -> BoxFuture<'a, Result<VerifyReport, VerifyError>> {
    check_all(cluster, spec, seen, cancel).boxed()
}

async fn check_all(
    cluster: &OpenCluster,
    spec: &VerifySpec,
    seen: impl Fn(Seen) + Send,
    cancel: &CancellationToken,
) -> Result<VerifyReport, VerifyError> {
    let log = cluster.log().await?;
    let mut report = VerifyReport::default();
    let committed = cluster.repository().backups(&log).await;
    for (backup, error) in committed.unreadable {
        let object = layout::reference(cluster.name(), &backup).to_string();
        report.findings.push(Finding { object, problem: error.to_string(), backups: vec![backup] });
    }
    let wanted = |backup: &CommittedBackup| spec.backup.as_ref().is_none_or(|id| *id == backup.reference.backup);
    let backups: Vec<CommittedBackup> = committed.readable.into_iter().filter(wanted).collect();
    if let (Some(id), true) = (&spec.backup, backups.is_empty() && report.findings.is_empty()) {
        return Err(VerifyError::NoSuchBackup(id.clone()));
    }
    for backup in &backups {
        check_lists(cluster, backup, &log, spec.depth, &mut report).await;
    }
    let mut objects = packs(cluster, &backups, &log).await?;
    let (segments, wal_bytes) = segments(cluster, &backups, &mut report).await;
    objects.extend(segments);
    seen(Seen::Total(pack_bytes(&backups) + wal_bytes));
    let keys = cluster.keys().clone();
    let store = cluster.repository().store().clone();
    let depth = spec.depth;
    let checks = objects.into_iter().map(|object| check(store.clone(), keys.clone(), object, depth));
    let mut checks = futures::stream::iter(checks).buffer_unordered(IN_FLIGHT);
    loop {
        let next = tokio::select! {
            // Checks only read: dropping them half-way loses nothing.
            () = cancel.cancelled() => return Err(VerifyError::Cancelled),
            next = checks.next() => next,
        };
        let Some((object, outcome)) = next else { break };
        match object.what {
            What::Pack(_) => report.packs += 1,
            What::Segment(..) => report.segments += 1,
        }
        match outcome {
            Ok(bytes) => {
                report.bytes += bytes;
                seen(Seen::Read(bytes));
            }
            Err(problem) => {
                report.findings.push(Finding { object: object.key.to_string(), problem, backups: object.backups });
            }
        }
    }
    report.findings.sort_by(|a, b| a.object.cmp(&b.object));
    Ok(report)
}

/// The manifest, and deep, every part of the file list and every map.
async fn check_lists(
    cluster: &OpenCluster,
    backup: &CommittedBackup,
    log: &ClusterLog,
    depth: Depth,
    report: &mut VerifyReport,
) {
    let id = backup.reference.backup.clone();
    let mut finding = |object: Path, problem: String| {
        report.findings.push(Finding { object: object.to_string(), problem, backups: vec![id.clone()] });
    };
    let reader = match cluster.open_backup(backup, log.state()).await {
        Ok(reader) => reader,
        Err(error) => return finding(layout::manifest(cluster.name(), &id), error.to_string()),
    };
    if depth == Depth::Stored {
        return;
    }
    for part in &reader.manifest.file_list {
        let files = match reader.file_list_part(part).await {
            Ok(files) => files,
            Err(error) => {
                finding(layout::manifest(cluster.name(), &id), format!("file list: {error}"));
                continue;
            }
        };
        for file in files {
            use crate::format::manifest::{Content, EntryKind};
            let EntryKind::File { content: Content::Map(place), .. } = &file.kind else { continue };
            if let Err(error) = reader.file_map(place).await {
                let path = String::from_utf8_lossy(&file.path).into_owned();
                finding(layout::manifest(cluster.name(), &id), format!("map of {path}: {error}"));
            }
        }
    }
}

/// Every pack that the backups need, once.
async fn packs(
    cluster: &OpenCluster,
    backups: &[CommittedBackup],
    log: &ClusterLog,
) -> Result<Vec<Object>, ClusterError> {
    let mut needed: BTreeMap<PackId, (Path, Vec<BackupId>)> = BTreeMap::new();
    for backup in backups {
        for (pack, key) in cluster.pack_keys(backup, log.state()).await? {
            needed.entry(pack).or_insert_with(|| (key, Vec::new())).1.push(backup.reference.backup.clone());
        }
    }
    Ok(needed.into_iter().map(|(pack, (key, backups))| Object { key, what: What::Pack(pack), backups }).collect())
}

/// Of the packs that the backups need, stored.
fn pack_bytes(backups: &[CommittedBackup]) -> u64 {
    let uses = backups.iter().flat_map(|backup| backup.reference.packs());
    uses.map(|(_, _, used)| (used.pack, used.stored_bytes)).collect::<BTreeMap<_, _>>().values().sum()
}

/// The WAL that makes each backup consistent must be there; all other WAL that is there must be good. With its bytes.
async fn segments(cluster: &OpenCluster, backups: &[CommittedBackup], report: &mut VerifyReport) -> (Vec<Object>, u64) {
    let archive = cluster.wal_archive(3);
    let mut systems: BTreeMap<_, SegmentSize> = BTreeMap::new();
    for backup in backups {
        systems.insert(backup.reference.wal.system_id, backup.reference.segment_size);
    }
    let (mut objects, mut bytes) = (Vec::new(), 0);
    for (system_id, size) in systems {
        let listing = match archive.list(system_id, size).await {
            Ok(listing) => listing,
            Err(error) => {
                let object = layout::wal_system(cluster.name(), system_id).to_string();
                report.findings.push(Finding { object, problem: error.to_string(), backups: Vec::new() });
                continue;
            }
        };
        bytes += listing.values().map(|found| found.segment_bytes).sum::<u64>();
        let present: BTreeSet<(WalBranch, Segment)> = listing
            .iter()
            .flat_map(|(wal, found)| found.segments.iter().map(move |segment| (*wal, *segment)))
            .collect();
        for backup in backups.iter().filter(|backup| backup.reference.wal.system_id == system_id) {
            let reference = &backup.reference;
            let last = Lsn(reference.stop_lsn.0.saturating_sub(1)).segment_number(size);
            for number in reference.start_lsn.segment_number(size)..=last {
                let segment = Segment { timeline: reference.wal.timeline, number };
                let needed = (reference.stop_lsn, size);
                if !present.contains(&(reference.wal, segment))
                    && !lies_in_pieces(&archive, reference.wal, segment, needed).await
                {
                    let object = layout::wal_segment(cluster.name(), &reference.wal, segment, size).to_string();
                    let problem = "the segment is missing, and the backup is not consistent without it".to_owned();
                    report.findings.push(Finding { object, problem, backups: vec![reference.backup.clone()] });
                }
            }
        }
        for (wal, segment) in present {
            let covers = |backup: &&CommittedBackup| {
                let r = &backup.reference;
                r.wal == wal && segment.end(size) > r.start_lsn && segment.start(size) < r.stop_lsn
            };
            let needed_by = backups.iter().filter(covers).map(|backup| backup.reference.backup.clone()).collect();
            let key = layout::wal_segment(cluster.name(), &wal, segment, size);
            objects.push(Object { key, what: What::Segment(wal, segment), backups: needed_by });
        }
    }
    (objects, bytes)
}

/// Whether pieces make up as much of a segment as a backup that stopped at `stop` needs: each is opened.
async fn lies_in_pieces(
    archive: &WalArchive,
    wal: WalBranch,
    segment: Segment,
    (stop, size): (Lsn, SegmentSize),
) -> bool {
    let needed = stop.saturating_sub(segment.start(size)).min(u64::from(size.bytes()));
    let found = archive.get_unfinished(wal, segment, size).await;
    found.is_ok_and(|found| found.is_some_and(|found| u64::from(found.end) >= needed))
}

/// The object and the bytes read, or what is wrong with it.
async fn check(store: Store, keys: Arc<Keyring>, object: Object, depth: Depth) -> (Object, Result<u64, String>) {
    let bytes = match store.get(&object.key).await {
        Ok(bytes) => bytes,
        Err(error) => return (object, Err(error.to_string())),
    };
    let (key, what) = (object.key.to_string(), object.what);
    let checked = tokio::task::spawn_blocking(move || {
        let len = bytes.len() as u64;
        match what {
            What::Pack(id) => check_pack(bytes, id, &keys, depth),
            What::Segment(wal, segment) => check_segment(bytes, &key, (wal, segment), &keys, depth),
        }
        .map(|()| len)
    });
    let outcome = checked.await.unwrap_or_else(|_| Err("the check itself broke down".to_owned()));
    (object, outcome)
}

fn check_pack(bytes: Bytes, id: PackId, keys: &Keyring, depth: Depth) -> Result<(), String> {
    let found = PackId(*blake3::hash(&bytes).as_bytes());
    if found != id {
        return Err(format!("its bytes have the hash {found}, and its name says {id}"));
    }
    if depth == Depth::Stored {
        return Ok(());
    }
    let header = Header::parse(&bytes, ObjectKind::Pack).map_err(|e| e.to_string())?;
    let domain = keys.version(header.key_version).ok_or("it is sealed with a key that is not at hand")?;
    let pack = PackReader::open(bytes, domain).map_err(|e| e.to_string())?;
    for entry in pack.entries() {
        let plain = pack.chunk(entry.place).map_err(|e| e.to_string())?;
        if domain.chunk_id(&plain) != entry.chunk {
            return Err(format!("the chunk at {} is not {}", entry.place.offset, entry.chunk));
        }
    }
    Ok(())
}

fn check_segment(
    bytes: Bytes,
    key: &str,
    (wal, segment): (WalBranch, Segment),
    keys: &Keyring,
    depth: Depth,
) -> Result<(), String> {
    let (header, _) = sealed::check(&bytes, ObjectKind::Segment).map_err(|e| e.to_string())?;
    if depth == Depth::Stored {
        return Ok(());
    }
    let domain = keys.version(header.key_version).ok_or("it is sealed with a key that is not at hand")?;
    wal_segment::open_segment(bytes, domain, key, wal, segment).map(|_| ()).map_err(|e| e.to_string())
}
