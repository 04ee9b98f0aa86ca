//! From the archive to a recovering server: one call a file, several segments a call.
//!
//! A call finds everything it needs in one small file that the restore wrote: which repository, which key, which
//! timelines. It brings the segments behind the one asked for along and leaves them beside `pg_wal`'s own files, so that
//! most calls only rename a file. A file is delivered whole and durable in name, or not at all.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use walfleet_repository::cluster_log::DomainKeys;
use walfleet_repository::ids::{ClusterName, DomainId};
use walfleet_repository::key_file::{KeyFile, KeyFileError};
use walfleet_repository::keyring::{Keyring, KeyringError};
use walfleet_repository::postgres::{Branch, Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};
use walfleet_repository::store::{Store, StoreError, StoreOptions};
use walfleet_repository::wal_archive::{ArchiveError, WalArchive};

use crate::wal::read::{WalFile, WalReadError};

/// The file that a restore leaves in `pg_wal`, which no base backup copies.
pub const SOURCE_FILE: &str = "pg_wal/walfleet-restore.json";

/// Where segments wait that were brought along, relative to the data directory; on the file system of `pg_wal`, so that
/// delivering one is a rename.
pub const AHEAD_FOLDER: &str = "pg_wal/walfleet-ahead";

/// One call may take this long before recovery is stopped rather than left hanging.
const DEADLINE: Duration = Duration::from_secs(600);

/// How long a delivered file waits for those brought along with it.
const AHEAD_DEADLINE: Duration = Duration::from_secs(20);

/// Everything a fetch needs, kept beside the restored server's WAL.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreSource {
    /// Of this file. Now 1.
    pub version: u32,
    pub url: String,
    pub options: BTreeMap<String, String>,
    pub key_file: PathBuf,
    pub cluster: ClusterName,
    pub system_identifier: u64,
    pub segment_bytes: u32,
    /// 32 hexadecimal digits.
    pub domain: String,
    /// What the cluster's log commits to, by key version: 64 hexadecimal digits.
    pub key_commitments: BTreeMap<u32, String>,
    /// The timelines that lead to the target, oldest first.
    pub timelines: Vec<SourceTimeline>,
    /// Segments brought along with the one asked for.
    pub read_ahead: u32,
    /// No segment behind the one that holds this position is brought along.
    pub needed_to_lsn: Lsn,
    /// That position stands for a time: no segment that begins there or later belongs to this restore.
    pub ends_there: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceTimeline {
    pub timeline: Timeline,
    /// 16 hexadecimal digits.
    pub branch: String,
    /// Segments that begin in `[from, to)` were there when the restore was planned: without one of them recovery must
    /// stop, and not end.
    pub needed_from_lsn: Lsn,
    pub needed_to_lsn: Lsn,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FetchOutcome {
    Delivered,
    /// The archive was asked and does not hold it.
    Absent,
}

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("read {path}: {source}\nHINT: this file belongs to the restore; without it run the restore again.")]
    Source { path: PathBuf, source: std::io::Error },
    #[error(
        "{path} does not read: {problem}\nHINT: this file belongs to the restore; without it run the restore again."
    )]
    Syntax { path: PathBuf, problem: String },
    #[error(transparent)]
    Key(#[from] KeyFileError),
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Name(#[from] WalReadError),
    #[error("write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error(
        "{name} was in the archive when the restore was planned and is gone\nHINT: recovery was stopped, since it would end too early; put the object back from a replica or an older version of it, and start the server again."
    )]
    Gone { name: String },
    #[error("no answer within {} seconds", DEADLINE.as_secs())]
    Deadline,
    #[error("{0}")]
    Internal(String),
}

/// Brings one file. `source` is the restore's file; `destination` is Postgres's `%p`.
pub fn fetch(source: &Path, name: &str, destination: &Path) -> Result<FetchOutcome, FetchError> {
    let text = std::fs::read(source).map_err(|e| FetchError::Source { path: source.to_owned(), source: e })?;
    let syntax = |problem: String| FetchError::Syntax { path: source.to_owned(), problem };
    let source: RestoreSource = serde_json::from_slice(&text).map_err(|e| syntax(e.to_string()))?;
    let plan = Plan::of(&source).map_err(syntax)?;
    let file = WalFile::parse(name, plan.size)?;
    if let WalFile::Segment(segment) = file
        && let Some(outcome) = deliver_waiting(&plan, segment, destination)?
    {
        return Ok(outcome);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| FetchError::Internal(format!("start the runtime: {e}")))?;
    let outcome = runtime
        .block_on(async { tokio::time::timeout(DEADLINE, bring(&plan, &source, file, destination)).await })
        .unwrap_or(Err(FetchError::Deadline));
    // A hanging request must not keep the answer back.
    runtime.shutdown_timeout(Duration::from_millis(100));
    outcome
}

/// The source, checked.
struct Plan {
    system_id: SystemId,
    size: SegmentSize,
    domain: DomainKeys,
    branches: BTreeMap<Timeline, Branch>,
    needed: BTreeMap<Timeline, (Lsn, Lsn)>,
    /// WAL from here on is not part of the restore.
    end: Option<Lsn>,
}

impl Plan {
    fn of(source: &RestoreSource) -> Result<Plan, String> {
        if source.version != 1 {
            return Err(format!("version {} of this file is not known", source.version));
        }
        let size = SegmentSize::new(u64::from(source.segment_bytes)).map_err(|e| e.to_string())?;
        let domain: DomainId = source.domain.parse().map_err(|e| format!("domain: {e}"))?;
        let mut commitments = BTreeMap::new();
        for (version, text) in &source.key_commitments {
            let digest: walfleet_repository::ids::Digest = text.parse().map_err(|e| format!("key_commitments: {e}"))?;
            commitments.insert(*version, digest.0);
        }
        let branches = source.timelines.iter().map(|entry| Ok((entry.timeline, entry.branch.parse::<Branch>()?)));
        let branches = branches.collect::<Result<_, walfleet_repository::postgres::ParseError>>();
        Ok(Plan {
            system_id: SystemId(source.system_identifier),
            size,
            domain: DomainKeys { domain, commitments },
            branches: branches.map_err(|e| e.to_string())?,
            needed: source
                .timelines
                .iter()
                .map(|entry| (entry.timeline, (entry.needed_from_lsn, entry.needed_to_lsn)))
                .collect(),
            end: source.ends_there.then_some(source.needed_to_lsn),
        })
    }

    fn wal(&self, timeline: Timeline) -> Option<WalBranch> {
        let branch = *self.branches.get(&timeline)?;
        Some(WalBranch { system_id: self.system_id, timeline, branch })
    }
}

impl Plan {
    fn needs(&self, segment: Segment) -> bool {
        let start = segment.start(self.size);
        self.needed.get(&segment.timeline).is_some_and(|(from, to)| {
            // The first needed position lies within its segment.
            segment.end(self.size) > *from && start < *to
        })
    }

    fn is_behind(&self, segment: Segment) -> bool {
        self.end.is_some_and(|end| segment.start(self.size) >= end)
    }
}

/// Delivers a segment that an earlier call brought along. Its name was only given once it was whole.
fn deliver_waiting(plan: &Plan, segment: Segment, destination: &Path) -> Result<Option<FetchOutcome>, FetchError> {
    let waiting = Path::new(AHEAD_FOLDER).join(segment.file_name(plan.size));
    let whole = std::fs::metadata(&waiting).is_ok_and(|meta| meta.len() == u64::from(plan.size.bytes()));
    if !whole {
        return Ok(None);
    }
    match std::fs::rename(&waiting, destination) {
        Ok(()) => Ok(Some(FetchOutcome::Delivered)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FetchError::Write { path: destination.to_owned(), source }),
    }
}

async fn bring(
    plan: &Plan,
    source: &RestoreSource,
    file: WalFile,
    destination: &Path,
) -> Result<FetchOutcome, FetchError> {
    let key = KeyFile::read(&source.key_file)?;
    let options = StoreOptions { settings: source.options.clone(), ..StoreOptions::default() };
    let store = Store::open(&source.url, &options)?;
    let keys = Keyring::open(&store, &plan.domain, &key.recipient).await?;
    let archive = WalArchive::new(store, source.cluster.clone(), Arc::new(keys), 3);
    match file {
        WalFile::Segment(segment) => bring_segments(plan, source, &archive, segment, destination).await,
        WalFile::History(timeline) => bring_history(plan, &archive, timeline, destination).await,
        // Recovery never asks for these by name.
        WalFile::Partial(_) | WalFile::BackupHistory(..) => Ok(FetchOutcome::Absent),
    }
}

/// The timelines of the plan, and any other that the archive knows: Postgres asks for numbers above its target's to
/// find one that is free, and must not take one that exists.
async fn bring_history(
    plan: &Plan,
    archive: &WalArchive,
    timeline: Timeline,
    destination: &Path,
) -> Result<FetchOutcome, FetchError> {
    let wal = match plan.wal(timeline) {
        Some(wal) => Some(wal),
        None => {
            let branches = archive.branches(plan.system_id).await?;
            branches.into_iter().find(|wal| wal.timeline == timeline)
        }
    };
    let Some(wal) = wal else { return Ok(FetchOutcome::Absent) };
    let Some(content) = archive.history(wal).await? else { return Ok(FetchOutcome::Absent) };
    write_whole(destination, &content)?;
    Ok(FetchOutcome::Delivered)
}

async fn bring_segments(
    plan: &Plan,
    source: &RestoreSource,
    archive: &WalArchive,
    segment: Segment,
    destination: &Path,
) -> Result<FetchOutcome, FetchError> {
    // A timeline that does not lead to the target: its WAL is not part of this restore.
    let Some(wal) = plan.wal(segment.timeline).filter(|_| !plan.is_behind(segment)) else {
        return Ok(FetchOutcome::Absent);
    };
    let last = source.needed_to_lsn.segment_number(plan.size);
    let ahead: Vec<Segment> = (1..=u64::from(source.read_ahead))
        .map(|n| Segment { number: segment.number.saturating_add(n), ..segment })
        .take_while(|next| next.number <= last)
        .filter(|next| !Path::new(AHEAD_FOLDER).join(next.file_name(plan.size)).exists())
        .collect();
    let mut tasks = tokio::task::JoinSet::new();
    for next in ahead {
        let (archive, size) = (archive.clone(), plan.size);
        tasks.spawn(async move {
            // What does not come now is asked for by name later; then its failure counts.
            if let Ok(Some((_, content))) = archive.get_segment(wal, next, size).await {
                let _ = write_ahead(&next.file_name(size), &content);
            }
        });
    }
    let mut found = archive.get_segment(wal, segment, plan.size).await?;
    if found.is_none() {
        found = archive.get_partial(wal, segment, plan.size).await?;
    }
    let Some((_, content)) = found else {
        if plan.needs(segment) {
            return Err(FetchError::Gone { name: segment.file_name(plan.size) });
        }
        return Ok(FetchOutcome::Absent);
    };
    write_whole(destination, &content)?;
    // The file is delivered; what was to come along may hang without spoiling that.
    let all = async { while tasks.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(AHEAD_DEADLINE, all).await;
    Ok(FetchOutcome::Delivered)
}

fn write_ahead(name: &str, content: &[u8]) -> Result<(), FetchError> {
    let folder = Path::new(AHEAD_FOLDER);
    std::fs::create_dir_all(folder).map_err(|source| FetchError::Write { path: folder.to_owned(), source })?;
    write_whole(&folder.join(name), content)
}

/// Writes beside the destination and renames, so that its name never stands for half a file. Not synced: recovery reads
/// it at once and asks again after a crash.
fn write_whole(destination: &Path, content: &[u8]) -> Result<(), FetchError> {
    let mut partial = destination.as_os_str().to_owned();
    partial.push(format!(".walfleet-{}", std::process::id()));
    let partial = PathBuf::from(partial);
    let written = std::fs::File::create(&partial)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| std::fs::rename(&partial, destination));
    written.map_err(|source| {
        let _ = std::fs::remove_file(&partial);
        FetchError::Write { path: destination.to_owned(), source }
    })
}
