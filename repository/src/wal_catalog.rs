//! What the archive holds, read from the repository as far as windows and plans need it: a listing, the histories, the
//! pieces of segments that are not finished, and of a few segments their commits.
//!
//! A listing only finds things. A segment it does not show makes a gap here, which promises less, never more.

pub mod around;
pub mod gap_edges;
pub mod restore_points;
mod unlogged;

use std::collections::BTreeMap;

use futures::FutureExt;
use futures::future::BoxFuture;

use crate::format::wal_history::Divergence;
use crate::format::wal_segment::SegmentDirectory;
use crate::postgres::{Lsn, Segment, SegmentSize, SystemId, TimelineHistory, WalBranch};
use crate::recovery_window::{BackupFacts, BranchWal, SegmentCommits, SegmentFacts, WalCatalog};
use crate::wal_archive::{ArchiveError, BeginningFacts, BranchListing, Strays, WalArchive};

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
    let (mut catalog, mut levels) = (WalCatalog::default(), Vec::new());
    for (system_id, size) in systems {
        for (wal, mut listing) in archive.list(*system_id, *size).await? {
            catalog.notes.append(&mut listing.notes);
            levels.append(&mut listing.levels);
            let cut_short = listing.cut_short.iter().map(|key| format!("{key} is too small to be a segment"));
            catalog.damaged.extend(cut_short);
            let branch = read_branch(archive, &mut catalog.damaged, (wal, listing), *size).await?;
            catalog.branches.insert(wal, branch);
        }
    }
    let divergences: Vec<(WalBranch, Divergence)> = divergences(&catalog);
    for wal in catalog.branches.keys().copied().collect::<Vec<_>>() {
        let of_timeline = divergences.iter().filter(|(left, _)| same_timeline(left, &wal));
        let strays = Strays::of(wal, of_timeline.map(|(_, divergence)| divergence));
        if let Some(branch) = catalog.branches.get_mut(&wal) {
            let (timeline, size) = (wal.timeline, branch.segment_size);
            branch.segments.retain(|number, _| !strays.holds(Segment { timeline, number: *number }, size));
        }
        note_begun(archive, &mut catalog, wal, &strays).await?;
        unlogged::note(archive, &mut catalog, wal, (&levels, &strays)).await?;
    }
    for wal in catalog.branches.keys().copied().collect::<Vec<_>>() {
        // One that does not read is left out, and what is before it ends the stretch.
        let mut counted = None;
        while counted != segment_count(&catalog, wal) {
            counted = segment_count(&catalog, wal);
            for end in stretch_ends(&catalog, wal) {
                note_newest_commit(archive, &mut catalog, wal, end).await?;
            }
        }
    }
    Ok(catalog)
}

/// A history that does not read is one that is not known: its ancestors are not followed.
async fn read_branch(
    archive: &WalArchive,
    damaged: &mut Vec<String>,
    (wal, listing): (WalBranch, BranchListing),
    segment_size: SegmentSize,
) -> Result<BranchWal, ArchiveError> {
    let stored = if wal.is_first() { Ok(None) } else { archive.known_history(wal).await };
    let stored = unless_damaged(archive, damaged, stored)?.flatten();
    let mut branch = BranchWal::listed(segment_size, listing.segments, None);
    if let Some(stored) = stored {
        let parsed = TimelineHistory::parse(wal.timeline, &stored.content);
        let parsed = parsed.map_err(|source| ArchiveError::History { timeline: wal.timeline, source });
        branch.history = unless_damaged(archive, damaged, parsed)?;
        (branch.parent, branch.divergence) = (stored.parent, stored.divergence);
    }
    Ok(branch)
}

fn unless_damaged<T>(
    archive: &WalArchive,
    damaged: &mut Vec<String>,
    read: Result<T, ArchiveError>,
) -> Result<Option<T>, ArchiveError> {
    if let Err(error) = &read
        && error.is_damage()
    {
        damaged.push(error.to_string());
    }
    archive.readable(read)
}

fn divergences(catalog: &WalCatalog) -> Vec<(WalBranch, Divergence)> {
    let found = catalog.branches.iter().filter_map(|(wal, branch)| Some((*wal, branch.divergence.clone()?)));
    found.collect()
}

fn same_timeline(one: &WalBranch, other: &WalBranch) -> bool {
    (one.system_id, one.timeline) == (other.system_id, other.timeline)
}

/// Takes in the segments of which only pieces are there.
async fn note_begun(
    archive: &WalArchive,
    catalog: &mut WalCatalog,
    wal: WalBranch,
    strays: &Strays,
) -> Result<(), ArchiveError> {
    let Some(branch) = catalog.branches.get_mut(&wal) else { return Ok(()) };
    let size = branch.segment_size;
    for segment in archive.begun_segments(wal, size).await? {
        if branch.segments.contains_key(&segment.number) {
            continue;
        }
        if let Some(begun) = archive.beginning_facts_without(wal, segment, size, strays).await? {
            branch.segments.insert(segment.number, facts_of_begun(segment, size, &begun));
        }
    }
    Ok(())
}

fn facts_of_begun(segment: Segment, size: SegmentSize, begun: &BeginningFacts) -> SegmentFacts {
    let commits = begun.first_commit.zip(begun.last_commit);
    SegmentFacts {
        records_end: segment.start(size).checked_add(u64::from(begun.records_end)),
        commits: commits.map_or(SegmentCommits::None, |(first, last)| SegmentCommits::Between {
            first_us: first.at_us,
            last_us: last.at_us,
        }),
        is_begun: begun.end < size.bytes(),
        pieces_end: segment.start(size).checked_add(u64::from(begun.end)),
        complete_at_us: begun.complete_at_us,
        shipped_at_us: Some(begun.shipped_at_us),
    }
}

fn segment_count(catalog: &WalCatalog, wal: WalBranch) -> Option<usize> {
    catalog.branches.get(&wal).map(|branch| branch.segments.len())
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

/// Reads one segment's directory into the catalog; `None` if the catalog has no such segment, or it does not read: then it is
/// taken out, unless pieces of it lie beside.
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
        let known = archive.known_facts(wal, segment, branch.segment_size).await;
        let Some(known) = unless_damaged(archive, &mut catalog.damaged, known)? else {
            let size = branch.segment_size;
            let beside = archive.beginning_facts_without(wal, segment, size, &archive.strays(wal).await?).await?;
            let Some(beside) = beside else {
                branch.segments.remove(&number);
                return Ok(None);
            };
            *facts = facts_of_begun(segment, size, &beside);
            return Ok(Some(facts.commits));
        };
        *facts = known;
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
    let records_end = start.checked_add(u64::from(directory.valid_bytes));
    SegmentFacts { records_end, commits, shipped_at_us: Some(directory.shipped_at_us), ..SegmentFacts::default() }
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
