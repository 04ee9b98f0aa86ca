//! What the archive holds, read from the repository as far as windows and plans need it: a listing, the histories, and
//! of a few segments their commits.
//!
//! A listing only finds things. A segment it does not show makes a gap here, which promises less, never more.

pub mod restore_points;

use std::collections::BTreeMap;

use futures::FutureExt;
use futures::future::BoxFuture;

use crate::format::wal_segment::SegmentDirectory;
use crate::postgres::{Lsn, Segment, SegmentSize, SystemId, TimelineHistory, WalBranch};
use crate::recovery_window::{BackupFacts, BranchWal, SegmentCommits, SegmentFacts, WalCatalog};
use crate::wal_archive::{ArchiveError, WalArchive};

/// Directories read at once.
const READS_IN_FLIGHT: usize = 8;

/// How many segments back from the end of a stretch a commit is looked for: an idle cluster archives empty segments.
const LOOK_BACK: u64 = 256;

/// The systems of the backups, with their segment sizes.
pub fn systems(backups: &[BackupFacts], sizes: &[SegmentSize]) -> BTreeMap<SystemId, SegmentSize> {
    backups.iter().zip(sizes).map(|(backup, size)| (backup.wal.system_id, *size)).collect()
}

/// Lists the archive and reads the commits at the end of every stretch without a gap: what windows need.
///
/// Boxed here, where the lifetimes have names: inside a larger future rustc 1.95 cannot prove that it may be sent to
/// another thread (rust-lang/rust#102211).
pub fn read<'a>(
    archive: &'a WalArchive,
    systems: &'a BTreeMap<SystemId, SegmentSize>,
) -> BoxFuture<'a, Result<WalCatalog, ArchiveError>> {
    read_systems(archive, systems).boxed()
}

async fn read_systems(
    archive: &WalArchive,
    systems: &BTreeMap<SystemId, SegmentSize>,
) -> Result<WalCatalog, ArchiveError> {
    let mut catalog = WalCatalog::default();
    for (system_id, size) in systems {
        for (wal, listing) in archive.list(*system_id, *size).await? {
            let history = match archive.history(wal).await? {
                Some(content) => Some(
                    TimelineHistory::parse(wal.timeline, &content)
                        .map_err(|source| ArchiveError::History { timeline: wal.timeline, source })?,
                ),
                None => None,
            };
            let segments = listing.segments.iter().map(|segment| (segment.number, SegmentFacts::default())).collect();
            catalog.branches.insert(wal, BranchWal { segment_size: *size, segments, history });
        }
    }
    for wal in catalog.branches.keys().copied().collect::<Vec<_>>() {
        for end in stretch_ends(&catalog, wal) {
            note_newest_commit(archive, &mut catalog, wal, end).await?;
        }
    }
    Ok(catalog)
}

/// The last segment of every stretch without a gap.
fn stretch_ends(catalog: &WalCatalog, wal: WalBranch) -> Vec<u64> {
    let Some(branch) = catalog.branches.get(&wal) else { return Vec::new() };
    let ends = |number: &&u64| number.checked_add(1).is_none_or(|next| !branch.segments.contains_key(&next));
    branch.segments.keys().filter(ends).copied().collect()
}

/// Goes back from a stretch's end to the newest segment with a commit.
async fn note_newest_commit(
    archive: &WalArchive,
    catalog: &mut WalCatalog,
    wal: WalBranch,
    end: u64,
) -> Result<(), ArchiveError> {
    for number in (end.saturating_sub(LOOK_BACK)..=end).rev() {
        match note(archive, catalog, wal, number).await? {
            Some(SegmentCommits::Between { .. }) | None => break,
            Some(SegmentCommits::None | SegmentCommits::Unknown) => {}
        }
    }
    Ok(())
}

/// Reads one segment's directory into the catalog; `None` if the catalog has no such segment.
async fn note(
    archive: &WalArchive,
    catalog: &mut WalCatalog,
    wal: WalBranch,
    number: u64,
) -> Result<Option<SegmentCommits>, ArchiveError> {
    let Some(branch) = catalog.branches.get_mut(&wal) else { return Ok(None) };
    let Some(facts) = branch.segments.get_mut(&number) else { return Ok(None) };
    if facts.commits == SegmentCommits::Unknown {
        let segment = Segment { timeline: wal.timeline, number };
        let directory = archive.directory(wal, segment, branch.segment_size).await?;
        *facts = facts_of(&directory);
    }
    Ok(Some(facts.commits))
}

/// What a segment's directory tells.
pub fn facts_of(directory: &SegmentDirectory) -> SegmentFacts {
    let start = directory.segment.start(directory.segment_size);
    let commits = match (directory.first_commit, directory.last_commit) {
        (Some(first), Some(last)) => SegmentCommits::Between { first_us: first.at_us, last_us: last.at_us },
        _ => SegmentCommits::None,
    };
    SegmentFacts { records_end: start.checked_add(u64::from(directory.valid_bytes)), commits }
}

/// Reads, by bisection, the segments around a moment, so that a plan knows where recovery to it ends. Commits may be
/// slightly out of order in WAL; that moves the answer by a segment, never past what is there.
pub async fn read_around(
    archive: &WalArchive,
    catalog: &mut WalCatalog,
    wal: WalBranch,
    from: Lsn,
    at_us: i64,
) -> Result<(), ArchiveError> {
    let Some(branch) = catalog.branches.get(&wal) else { return Ok(()) };
    let first = from.segment_number(branch.segment_size);
    let numbers: Vec<u64> = branch.segments.range(first..).map(|(number, _)| *number).collect();
    let (mut low, mut high) = (0, numbers.len());
    while low < high {
        let middle = low + (high - low) / 2;
        // A segment without commits says nothing: look on to the next that has some.
        let mut later = None;
        for number in numbers.get(middle..high).unwrap_or_default() {
            if let Some(SegmentCommits::Between { last_us, .. }) = note(archive, catalog, wal, *number).await? {
                later = Some(last_us > at_us);
                break;
            }
        }
        match later {
            Some(false) => low = middle + 1,
            Some(true) | None => high = middle,
        }
    }
    Ok(())
}
