//! Gathers what changed since the parent backup: from the archive, where each segment has its changed blocks beside it,
//! and for what is not archived yet from the WAL itself ([`unnoted`]).
//!
//! The answer covers all WAL between the two starts or is none at all. A page that it does not name is in the data
//! directory as the parent has it: at its own start the parent's server had every earlier change on disk (a backup
//! begins with a checkpoint), and a page that changed while the parent was being copied is named.

mod unnoted;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::stream::{self, StreamExt, TryStreamExt};
use walfleet_repository::backup::commit::Parent;
use walfleet_repository::format::changed_blocks::ChangedBlocks;
use walfleet_repository::format::manifest::{Manifest, ReadScope};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::{HistoryError, Lsn, Segment, SegmentSize, Timeline, TimelineHistory, WalBranch};
use walfleet_repository::wal_archive::{ArchiveError, WalArchive};

use crate::backup::spare::{Known, Proof, Since};
use crate::postgres::wal_record::{self, WalError};
use crate::wal::ship::{ShipError, Shipper};
use unnoted::Unnoted;

/// Sidecars asked for at once, and the WAL that they may be of: what a segment of a gigabyte changes takes tens of mebibytes.
const REQUESTS: usize = 16;
const REQUESTS_WAL_BYTES: u32 = 1 << 30;

/// A segment's header page begins with this much that is no record.
const LONG_PAGE_HEADER: u64 = wal_record::LONG_HEADER as u64;

/// Why everything has to be read.
#[derive(Debug, thiserror::Error)]
pub enum Unproven {
    #[error("the parent backup was taken of another system or another WAL segment size")]
    OtherSystem,
    #[error("data checksums were turned on or off since the parent backup")]
    Checksums,
    #[error("the parent backup ends at {stop}, and this one begins at {start}")]
    ParentAhead { stop: Lsn, start: Lsn },
    #[error("the parent backup's timeline {0} is not in this server's history, or was left before the backup's end")]
    OtherHistory(Timeline),
    #[error("WAL segment {segment} was archived by {member} with other records than this server's")]
    Foreign { segment: String, member: String },
    #[error("the changes of WAL segment {0} are not known")]
    Segment(String),
    #[error(transparent)]
    Branch(#[from] ShipError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("read {path}: {source}")]
    Wal { path: PathBuf, source: WalError },
    #[error("timeline {timeline}: {source}")]
    History { timeline: Timeline, source: HistoryError },
}

/// A backup that begins.
pub struct Beginning<'a> {
    pub shipper: &'a Arc<Shipper>,
    pub archive: &'a WalArchive,
    pub data_dir: &'a Path,
    pub wal: WalBranch,
    pub segment_size: SegmentSize,
    pub start_lsn: Lsn,
    pub data_checksums: bool,
    /// Every file is due for proof.
    pub read_all: bool,
    /// Who takes it, of which cluster.
    pub member: &'a str,
    pub cluster: &'a ClusterName,
}

impl Unproven {
    fn scope(&self) -> ReadScope {
        match self {
            Unproven::OtherSystem | Unproven::Checksums | Unproven::ParentAhead { .. } | Unproven::OtherHistory(_) => {
                ReadScope::AllOtherHistory
            }
            Unproven::Foreign { .. }
            | Unproven::Segment(_)
            | Unproven::Branch(_)
            | Unproven::Archive(_)
            | Unproven::Read { .. }
            | Unproven::Wal { .. }
            | Unproven::History { .. } => ReadScope::AllWalNotKnown,
        }
    }
}

/// What a backup takes from its parent unread, and why nothing, if nothing.
pub struct Reading {
    /// `None`: everything is read.
    pub known: Option<Known>,
    pub scope: ReadScope,
    /// Why everything is read, in words.
    pub because: Option<String>,
}

impl Reading {
    /// There is no parent.
    pub fn first() -> Reading {
        Reading::all(ReadScope::AllFirst, None)
    }

    fn all(scope: ReadScope, because: Option<String>) -> Reading {
        let because = because.or_else(|| scope.read_all_because().map(str::to_owned));
        Reading { known: None, scope, because }
    }
}

/// What a backup may take from its parent unread, or why that is nothing.
pub async fn reading(parent: &Parent, now: &Beginning<'_>, blocks_per_segment: u32) -> Reading {
    let (manifest, reference) = (&parent.reader.manifest, &parent.backup.reference);
    let named: usize = manifest.damaged_pages.iter().map(|damaged| damaged.blocks.len()).sum();
    let reading = if reference.cluster != *now.cluster {
        Reading::all(ReadScope::AllCopy, None)
    } else if reference.damaged_page_count > named as u64 {
        Reading::all(ReadScope::AllDamage, None)
    } else {
        match since(manifest, now).await {
            Ok(changed) => {
                tracing::info!(parent = %reference.backup, pages = changed.block_count(), "only what changed is read");
                let since = Since { changed: Arc::new(changed), block_bytes: manifest.block_bytes, blocks_per_segment };
                let distrusted = manifest.damaged_pages.iter();
                let proof = Proof {
                    since_us: if now.read_all { i64::MIN } else { manifest.started_at_us },
                    until_us: jiff::Timestamp::now().as_microsecond(),
                    compares: now.data_checksums && manifest.member == now.member,
                };
                let known = Known {
                    since,
                    distrusted: distrusted.map(|damaged| damaged.path.clone().into_bytes()).collect(),
                    proof,
                };
                let scope = if now.read_all { ReadScope::AllAsked } else { ReadScope::Changes };
                Reading { known: Some(known), ..Reading::all(scope, None) }
            }
            Err(reason) => Reading::all(reason.scope(), Some(reason.to_string())),
        }
    };
    if let (None, Some(because)) = (&reading.known, &reading.because) {
        tracing::info!(parent = %reference.backup, "everything is read: {because}");
    }
    reading
}

/// The pages that any WAL between the parent's start and this backup's changes.
pub async fn since(parent: &Manifest, now: &Beginning<'_>) -> Result<ChangedBlocks, Unproven> {
    if parent.wal.system_id != now.wal.system_id || parent.segment_size != now.segment_size {
        return Err(Unproven::OtherSystem);
    }
    // pg_checksums changes every page and logs none (src/bin/pg_checksums/pg_checksums.c).
    if parent.data_checksums != now.data_checksums {
        return Err(Unproven::Checksums);
    }
    // Otherwise a page of the parent's could be from after this backup's end.
    if parent.stop_lsn > now.start_lsn {
        return Err(Unproven::ParentAhead { stop: parent.stop_lsn, start: now.start_lsn });
    }
    let lineage = lineage(parent, now).await?;
    let mut total = ChangedBlocks::default();
    let mut unnoted = Vec::new();
    let wanted = segments(parent.start_lsn, now.start_lsn, now.segment_size).map(|number| {
        let end = Segment { timeline: Timeline::FIRST, number }.end(now.segment_size).min(now.start_lsn);
        let of = branch_at(&lineage, end).unwrap_or(parent.wal);
        (of, Segment { timeline: of.timeline, number })
    });
    let answers = stream::iter(wanted).map(|(wal, segment)| async move {
        match now.archive.changed_blocks(wal, segment, now.segment_size).await {
            Ok(changes) => Ok((wal, segment, changes)),
            Err(error) if error.is_not_found() => Ok((wal, segment, None)),
            Err(error) => Err(Unproven::from(error)),
        }
    });
    let abreast = REQUESTS.min((REQUESTS_WAL_BYTES / now.segment_size.bytes()).max(1) as usize);
    let mut answers = answers.buffered(abreast);
    let mut newest = None;
    while let Some((wal, segment, changes)) = answers.try_next().await? {
        match changes {
            Some(changes) => {
                total.absorb(&changes);
                newest = Some((wal, segment));
            }
            None => unnoted.push((wal, segment)),
        }
    }
    drop(answers);
    refuse_foreign(newest, now).await?;
    let mut reader = Unnoted::new(now, &lineage);
    for (wal, segment) in unnoted {
        total.absorb(&reader.changes(wal, segment).await?);
    }
    Ok(total)
}

/// What a twin of this server archived under the same timeline says nothing of this one's pages. From where they parted on
/// every segment differs, so the newest tells; of a server whose own WAL is refused it still lies in `pg_wal`.
async fn refuse_foreign(newest: Option<(WalBranch, Segment)>, now: &Beginning<'_>) -> Result<(), Unproven> {
    let Some((wal, segment)) = newest.filter(|(wal, _)| *wal == now.wal) else { return Ok(()) };
    let archived = now.archive.directory(wal, segment, now.segment_size).await?;
    match now.shipper.agrees(segment, archived.content_id).await? {
        Some(false) => Err(Unproven::Foreign { segment: segment.file_name(now.segment_size), member: archived.member }),
        Some(true) | None => Ok(()),
    }
}

/// The timelines from the parent's to the present one, each with where it begins.
async fn lineage(parent: &Manifest, now: &Beginning<'_>) -> Result<Vec<(WalBranch, Lsn)>, Unproven> {
    let other = || Unproven::OtherHistory(parent.wal.timeline);
    if parent.wal == now.wal {
        return Ok(vec![(now.wal, Lsn(0))]);
    }
    let timeline = now.wal.timeline;
    if parent.wal.timeline >= timeline {
        return Err(other());
    }
    let path = now.data_dir.join("pg_wal").join(timeline.history_name());
    let content = tokio::fs::read(&path).await.map_err(|source| Unproven::Read { path, source })?;
    let history =
        TimelineHistory::parse(timeline, &content).map_err(|source| Unproven::History { timeline, source })?;
    let mut result = Vec::new();
    let mut begin = Lsn(0);
    for (ancestor, left_at) in history.ancestors {
        if ancestor >= parent.wal.timeline {
            // The one that its last WAL went to: what is before may lie elsewhere, and then it is unknown.
            let last = Segment::containing(ancestor, Lsn(left_at.0.saturating_sub(1)), now.segment_size);
            result.push((now.shipper.home(last).await?, begin));
        }
        // Left before the backup's end: the backup may have pages that this server never had.
        if ancestor == parent.wal.timeline && left_at < parent.stop_lsn {
            return Err(other());
        }
        begin = left_at;
    }
    result.push((now.wal, begin));
    match result.first() {
        Some((first, _)) if *first == parent.wal => Ok(result),
        _ => Err(other()),
    }
}

/// The timeline that wrote what ends at `end`. A timeline's first segment begins with its parent's records up to the
/// switch, and is wanted with them.
fn branch_at(lineage: &[(WalBranch, Lsn)], end: Lsn) -> Option<WalBranch> {
    lineage.iter().rev().find(|(_, begin)| *begin < end).or(lineage.first()).map(|(wal, _)| *wal)
}

/// Numbers of the segments with records that begin before `end`, from the one that holds `start`.
fn segments(start: Lsn, end: Lsn, size: SegmentSize) -> RangeInclusive<u64> {
    let bytes = u64::from(size.bytes());
    let last = end.0.saturating_sub(LONG_PAGE_HEADER + 1) / bytes;
    start.0 / bytes..=last
}

#[cfg(test)]
mod tests;
