//! From the archive to a recovering server: one call a file.
//!
//! A call finds everything it needs in one small file that the restore wrote: which repository, which key, which
//! timelines. The segments behind the one asked for are brought ahead ([`super::prefetch`]), so that most calls only rename
//! a file. A file is delivered whole and durable in name, or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use walfleet_repository::cluster_log::DomainKeys;
use walfleet_repository::format::wal_history::Divergence;
use walfleet_repository::ids::{ClusterName, DomainId};
use walfleet_repository::key_file::{KeyFile, KeyFileError};
use walfleet_repository::keyring::{Keyring, KeyringError};
use walfleet_repository::postgres::{Branch, Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};
use walfleet_repository::store::{Store, StoreError, StoreOptions};
use walfleet_repository::wal_archive::{ArchiveError, Strays, Unfinished, WalArchive};

use crate::wal::prefetch;
use crate::wal::read::{WalFile, WalReadError};

/// The file that a restore leaves in `pg_wal`, which no base backup copies.
pub const SOURCE_FILE: &str = "pg_wal/walfleet-restore.json";

/// Where segments wait that were brought along, relative to the data directory; on the file system of `pg_wal`, so that
/// delivering one is a rename.
pub const AHEAD_FOLDER: &str = "pg_wal/walfleet-ahead";

/// In the name of a file that is being written, before the number of the process that does.
pub(super) const PARTIAL: &str = ".walfleet-";

/// One call may take this long before recovery is stopped rather than left hanging.
const DEADLINE: Duration = Duration::from_secs(600);

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
    /// Set if another branch of this timeline leads to this one: from the segment that holds it on, this one is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begins_lsn: Option<Lsn>,
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
pub fn fetch(source_file: &Path, name: &str, destination: &Path) -> Result<FetchOutcome, FetchError> {
    let (source, plan) = RestoreSource::read(source_file)?;
    let file = WalFile::parse(name, plan.size)?;
    if let WalFile::Segment(segment) = file {
        if let Some(outcome) = deliver_waiting(&plan, segment, destination)? {
            return Ok(outcome);
        }
        if plan.is_on_the_way(segment) && source.read_ahead > 0 {
            if prefetch::wait_for(name)
                && let Some(outcome) = deliver_waiting(&plan, segment, destination)?
            {
                return Ok(outcome);
            }
            prefetch::start(source_file, name);
        }
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

impl RestoreSource {
    pub(super) fn read(path: &Path) -> Result<(RestoreSource, Plan), FetchError> {
        let text = std::fs::read(path).map_err(|e| FetchError::Source { path: path.to_owned(), source: e })?;
        let syntax = |problem: String| FetchError::Syntax { path: path.to_owned(), problem };
        let source: RestoreSource = serde_json::from_slice(&text).map_err(|e| syntax(e.to_string()))?;
        let plan = Plan::of(&source).map_err(syntax)?;
        Ok((source, plan))
    }
}

/// The branch that a restored server's recovery read a segment of its last timeline from, if the data directory is one that a
/// restore made.
pub fn restored_from(data_dir: &Path, system_id: SystemId, segment: Segment) -> Option<WalBranch> {
    let (source, plan) = RestoreSource::read(&data_dir.join(SOURCE_FILE)).ok()?;
    let is_last = source.timelines.last().is_some_and(|last| last.timeline == segment.timeline);
    plan.wal(segment).filter(|_| is_last && plan.system_id == system_id)
}

/// The source, checked.
#[derive(Clone)]
pub(super) struct Plan {
    system_id: SystemId,
    size: SegmentSize,
    domain: DomainKeys,
    /// By timeline and first segment.
    legs: BTreeMap<(Timeline, u64), PlanLeg>,
    /// WAL from here on is not part of the restore.
    end: Option<Lsn>,
    /// The end of what was planned.
    needed_to: Lsn,
    /// No segment behind the one that holds it is brought along.
    last: u64,
    /// Members that left branches, and what of theirs lies in those.
    divergences: Vec<(WalBranch, Divergence)>,
}

/// A branch that is read from, and which of it cannot be done without.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct PlanLeg {
    branch: Branch,
    needed: (Lsn, Lsn),
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
        let legs = source.timelines.iter().map(|entry| {
            let first = entry.begins_lsn.map_or(0, |begins| begins.segment_number(size));
            let needed = (entry.needed_from_lsn, entry.needed_to_lsn);
            Ok(((entry.timeline, first), PlanLeg { branch: entry.branch.parse::<Branch>()?, needed }))
        });
        let legs = legs.collect::<Result<_, walfleet_repository::postgres::ParseError>>();
        Ok(Plan {
            system_id: SystemId(source.system_identifier),
            size,
            domain: DomainKeys { domain, commitments },
            legs: legs.map_err(|e| e.to_string())?,
            divergences: Vec::new(),
            end: source.ends_there.then_some(source.needed_to_lsn),
            needed_to: source.needed_to_lsn,
            last: source.needed_to_lsn.segment_number(size),
        })
    }

    /// The branch that a timeline's history lies in.
    fn history(&self, timeline: Timeline) -> Option<WalBranch> {
        let (_, leg) = self.legs.range((timeline, 0)..=(timeline, u64::MAX)).next()?;
        Some(WalBranch { system_id: self.system_id, timeline, branch: leg.branch })
    }

    fn leg(&self, segment: Segment) -> Option<&PlanLeg> {
        let timeline = segment.timeline;
        self.legs.range((timeline, 0)..=(timeline, segment.number)).next_back().map(|(_, leg)| leg)
    }

    fn wal(&self, segment: Segment) -> Option<WalBranch> {
        let branch = self.leg(segment)?.branch;
        Some(WalBranch { system_id: self.system_id, timeline: segment.timeline, branch })
    }

    /// Reads which members left branches of the plan's timelines. Before that nothing is brought.
    pub async fn read_divergences(&mut self, archive: &WalArchive) -> Result<(), FetchError> {
        let timelines: BTreeSet<Timeline> = self.legs.keys().map(|(timeline, _)| *timeline).collect();
        for timeline in timelines {
            self.divergences.extend(archive.divergences(self.system_id, timeline).await?);
        }
        Ok(())
    }

    /// Whether a segment that lies in a branch is another's: its member stored it before it knew that its WAL differs.
    fn is_stray(&self, wal: WalBranch, segment: Segment) -> bool {
        let of_timeline = self.divergences.iter().filter(|(left, _)| left.timeline == wal.timeline);
        Strays::of(wal, of_timeline.map(|(_, divergence)| divergence)).holds(segment, self.size)
    }
}

impl Plan {
    fn needs(&self, segment: Segment) -> bool {
        let start = segment.start(self.size);
        self.leg(segment).is_some_and(|leg| {
            let (from, to) = leg.needed;
            // The first needed position lies within its segment.
            segment.end(self.size) > from && start < to
        })
    }

    /// How much of a needed segment recovery cannot do without.
    fn needed_of(&self, segment: Segment) -> u32 {
        let needed = self.needed_to.saturating_sub(segment.start(self.size));
        u32::try_from(needed).unwrap_or(u32::MAX).min(self.size.bytes())
    }

    fn is_behind(&self, segment: Segment) -> bool {
        self.end.is_some_and(|end| segment.start(self.size) >= end)
    }

    pub fn size(&self) -> SegmentSize {
        self.size
    }

    /// The segment of a file's name.
    pub fn segment(&self, name: &str) -> Result<Segment, FetchError> {
        match WalFile::parse(name, self.size)? {
            WalFile::Segment(segment) => Ok(segment),
            _ => Err(WalReadError::Name { name: name.to_owned() }.into()),
        }
    }

    /// The timeline from which recovery reads a segment: the newest that begins in or before it.
    fn timeline_of(&self, number: u64) -> Option<Timeline> {
        // Of a timeline that only leads to the target nothing is read.
        let begun = |(_, leg): &(&(Timeline, u64), &PlanLeg)| {
            let (from, to) = leg.needed;
            from < to && from.segment_number(self.size) <= number
        };
        self.legs.iter().rfind(begun).map(|((timeline, _), _)| *timeline)
    }

    /// Whether recovery to the target reads this very segment.
    fn is_on_the_way(&self, segment: Segment) -> bool {
        segment.number <= self.last && self.timeline_of(segment.number) == Some(segment.timeline)
    }

    /// The segment that recovery reads next; `None`: the target lies before.
    pub fn after(&self, segment: Segment) -> Option<Segment> {
        let number = segment.number.checked_add(1).filter(|number| *number <= self.last)?;
        let next = Segment { timeline: self.timeline_of(number)?, number };
        Some(next).filter(|next| !self.is_behind(*next))
    }

    /// Writes a whole segment as this restore needs it; `false`: the archive does not hold it. `opening`: so many are unpacked
    /// at once.
    pub async fn bring(
        &self,
        archive: &WalArchive,
        segment: Segment,
        destination: PathBuf,
        opening: &Semaphore,
    ) -> Result<bool, FetchError> {
        let Some(wal) = self.wal(segment).filter(|wal| !self.is_stray(*wal, segment)) else { return Ok(false) };
        let Some(found) = archive.fetch_segment(wal, segment, self.size).await? else { return Ok(false) };
        let _permit = opening.acquire().await;
        let plan = self.clone();
        let written = tokio::task::spawn_blocking(move || {
            let mut at = segment.start(plan.size);
            write_by(&destination, |file| {
                // Not needed, but on ext4 half the cost of writing is otherwise to put off where each block will lie.
                let _ = fallocate(&*file, FallocateFlags::empty(), 0, u64::from(plan.size.bytes()));
                found.unpack(|content| {
                    match plan.end.filter(|end| *end < Lsn(at.0 + content.len() as u64)) {
                        Some(_) => {
                            let mut content = content.to_vec();
                            plan.cut(at, &mut content);
                            file.write_all(&content)?;
                        }
                        None => file.write_all(content)?,
                    }
                    at = Lsn(at.0 + content.len() as u64);
                    Ok(())
                })?;
                Ok(())
            })
        });
        written.await.map_err(|bug| FetchError::Internal(bug.to_string()))?.map(|()| true)
    }

    /// What has come to a segment since the restore was planned, behind its end, is not part of it. `content` is WAL from
    /// `at` on.
    fn cut(&self, at: Lsn, content: &mut [u8]) {
        if let Some(end) = self.end {
            let kept = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
            content.get_mut(kept..).unwrap_or_default().fill(0);
        }
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

pub(super) async fn open_archive(plan: &Plan, source: &RestoreSource) -> Result<WalArchive, FetchError> {
    let key = KeyFile::read(&source.key_file)?;
    let options = StoreOptions { settings: source.options.clone(), ..StoreOptions::default() };
    let store = Store::open(&source.url, &options)?;
    let keys = Keyring::open(&store, &plan.domain, &key.recipient).await?;
    Ok(WalArchive::new(store, source.cluster.clone(), Arc::new(keys), 3))
}

async fn bring(
    plan: &Plan,
    source: &RestoreSource,
    file: WalFile,
    destination: &Path,
) -> Result<FetchOutcome, FetchError> {
    let archive = open_archive(plan, source).await?;
    match file {
        WalFile::Segment(segment) => {
            let mut plan = plan.clone();
            plan.read_divergences(&archive).await?;
            bring_segment(&plan, &archive, segment, destination).await
        }
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
    let content = match plan.history(timeline) {
        Some(wal) => archive.history(wal).await?,
        None => {
            let branches = archive.branches(plan.system_id).await?;
            let mut content = None;
            // One that does not read must not end a restore that does not need it: at worst its number is taken twice.
            for wal in branches.into_iter().filter(|wal| wal.timeline == timeline) {
                content = content.or(archive.readable(archive.history(wal).await)?.flatten());
            }
            content
        }
    };
    let Some(content) = content else { return Ok(FetchOutcome::Absent) };
    write_whole(destination, &content)?;
    Ok(FetchOutcome::Delivered)
}

async fn bring_segment(
    plan: &Plan,
    archive: &WalArchive,
    segment: Segment,
    destination: &Path,
) -> Result<FetchOutcome, FetchError> {
    // A timeline that does not lead to the target: its WAL is not part of this restore.
    let Some(wal) = plan.wal(segment).filter(|_| !plan.is_behind(segment)) else {
        return Ok(FetchOutcome::Absent);
    };
    // What does not read counts as absent, and may lie beside in pieces.
    let damage = match plan.bring(archive, segment, destination.to_owned(), &Semaphore::new(1)).await {
        Ok(true) => return Ok(FetchOutcome::Delivered),
        Ok(false) => None,
        Err(FetchError::Archive(error)) if error.is_damage() => Some(error),
        Err(error) => return Err(error),
    };
    let unfinished = archive.get_unfinished(wal, segment, plan.size).await?;
    if plan.needs(segment) && unfinished.as_ref().is_none_or(|found| found.end < plan.needed_of(segment)) {
        let gone = || FetchError::Gone { name: segment.file_name(plan.size) };
        return Err(damage.map_or_else(gone, FetchError::Archive));
    }
    let Some(Unfinished { mut content, .. }) = unfinished else { return Ok(FetchOutcome::Absent) };
    plan.cut(segment.start(plan.size), &mut content);
    write_whole(destination, &content)?;
    Ok(FetchOutcome::Delivered)
}

/// Writes beside the destination and renames, so that its name never stands for half a file. Not synced: recovery reads
/// it at once and asks again after a crash.
fn write_whole(destination: &Path, content: &[u8]) -> Result<(), FetchError> {
    write_by(destination, |file| {
        file.write_all(content).map_err(|source| FetchError::Write { path: destination.to_owned(), source })
    })
}

fn write_by(destination: &Path, write: impl FnOnce(&mut File) -> Result<(), FetchError>) -> Result<(), FetchError> {
    let mut partial = destination.as_os_str().to_owned();
    partial.push(format!("{PARTIAL}{}", std::process::id()));
    let partial = PathBuf::from(partial);
    let fail = |source| FetchError::Write { path: destination.to_owned(), source };
    let written = File::create(&partial)
        .map_err(fail)
        .and_then(|mut file| write(&mut file))
        .and_then(|()| std::fs::rename(&partial, destination).map_err(fail));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
mod tests;
