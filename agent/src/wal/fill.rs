//! WAL that the archive lacks and this host still has: what makes a gap, and what a server that stopped left behind.
//!
//! A gap is filled from whichever member has the segment, but only by one whose other WAL next to the gap is what the archive
//! holds: a segment of the right name from a twin would be worse than none.

use std::collections::{BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use walfleet_repository::layout::TailName;
use walfleet_repository::postgres::{Lsn, Segment, SegmentSize, Timeline, WalBranch};
use walfleet_repository::wal_archive::{ArchiveError, OwnedTail, WalArchive};

use super::read::{SegmentContent, WalReadError, read_segment};
use super::ship::{ShipError, Shipper, predecessor_carry};
use crate::tasks;

/// WAL that is missing in the archive: `[from, to)` of a branch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Missing {
    pub wal: WalBranch,
    pub from: Lsn,
    pub to: Lsn,
}

/// Stores the finished segments of a gap that lie in `pg_wal`; returns how many those were.
pub async fn fill(shipper: &Arc<Shipper>, missing: Missing) -> Result<usize, Arc<ShipError>> {
    let size = shipper.source().segment_size;
    let segment = |number| Segment { timeline: missing.wal.timeline, number };
    let numbers = missing.from.segment_number(size)..=Lsn(missing.to.0.saturating_sub(1)).segment_number(size);
    let here: Vec<Segment> = numbers.map(segment).filter(|segment| is_here(shipper, *segment)).collect();
    let Some(first) = here.first() else { return Ok(0) };
    if shipper.home(*first).await.ok() != Some(missing.wal) {
        return Ok(0);
    }
    if !is_same_history(shipper, missing).await? {
        tracing::warn!(from = %missing.from, to = %missing.to,
            "WAL that the repository lacks lies here, but nothing shows that it is of the same history; it is left");
        return Ok(0);
    }
    let mut filled = 0;
    for segment in here {
        match shipper.store(segment).await {
            Ok(()) => {
                tracing::info!(
                    segment = segment.file_name(size),
                    "a gap in the archive is filled from this host's pg_wal"
                );
                filled += 1;
            }
            // Being written, or recycled for later.
            Err(error) if matches!(*error, ShipError::Unfinished { .. }) => {
                tracing::info!("a gap in the archive is not filled with it: {error}")
            }
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn is_here(shipper: &Shipper, segment: Segment) -> bool {
    let source = shipper.source();
    source.data_dir.join("pg_wal").join(segment.file_name(source.segment_size)).exists()
}

/// Whether a segment next to the gap lies here with the archived content.
async fn is_same_history(shipper: &Arc<Shipper>, missing: Missing) -> Result<bool, Arc<ShipError>> {
    let size = shipper.source().segment_size;
    let before = missing.from.segment_number(size).checked_sub(1);
    let after = Some(Lsn(missing.to.0.saturating_sub(1)).segment_number(size) + 1);
    let mut same = false;
    for number in [before, after].into_iter().flatten() {
        let segment = Segment { timeline: missing.wal.timeline, number };
        let archive = &shipper.source().archive;
        let archived = archive.readable(archive.directory(missing.wal, segment, size).await);
        let Some(archived) = archived.map_err(|error| Arc::new(error.into()))? else { continue };
        match shipper.agrees(segment, archived.content_id).await? {
            Some(true) => same = true,
            Some(false) => return Ok(false),
            None => {}
        }
    }
    Ok(same)
}

/// What of a timeline in `pg_wal` is looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    Everything,
    /// The newest that is archived, and what lies behind it.
    Newest,
}

/// Stores what a server has in `pg_wal` and the archive lacks, up to the end of its last whole record; returns that position. Of one
/// that does not run nothing is lost then if it never starts again.
pub async fn leftover(shipper: &Arc<Shipper>, timeline: Timeline, scope: Scope) -> Result<Option<Lsn>, Arc<ShipError>> {
    let source = shipper.source();
    let size = source.segment_size;
    let base = shipper.branch(timeline).await?;
    let archive_error = |error: ArchiveError| Arc::new(ShipError::from(error));
    let listed = source.archive.list(source.system_id, size).await.map_err(archive_error)?;
    let data_dir = source.data_dir.clone();
    let mut found = tokio::task::spawn_blocking(move || segments(&data_dir, timeline, size)).await.unwrap_or_default();
    let is_listed = |wal: WalBranch, segment: Segment| {
        listed.get(&wal).is_some_and(|listing| listing.segments.binary_search(&segment).is_ok())
    };
    if scope == Scope::Newest {
        let mut newest = 0;
        for (place, segment) in found.iter().enumerate() {
            if is_listed(shipper.home(*segment).await?, *segment) {
                newest = place;
            }
        }
        found.drain(..newest);
    }
    let mut end = None;
    let mut storing = VecDeque::new();
    shipper.note_backlog(found.len());
    for segment in found {
        let wal = shipper.home(segment).await?;
        let compared = match is_listed(wal, segment) {
            true => compared(shipper, wal, segment).await?,
            false => Compared::Alone,
        };
        if compared == Compared::Same {
            continue;
        }
        // Another system's file may lie among them.
        let Some(content) = read(shipper, segment).await? else { continue };
        if content.suspicion.is_none() {
            // It was not finished when it was compared: the server has been started, and what is behind this may be finished,
            // too, before it is known whose branch it belongs to.
            if compared == Compared::Unfinished {
                break;
            }
            drop(content);
            storing.push_back(shipper.store(segment));
            // The first one tells whose branch it is: those behind it must not take another server's names before.
            if (end.is_none() || storing.len() == shipper.parallel())
                && let Some(first) = storing.pop_front()
            {
                first.await?;
            }
            end = Some(segment.end(size));
            continue;
        }
        end = store_beginning(shipper, base, segment, content).await?.or(end);
        // Behind it lie names of segments yet to be written.
        break;
    }
    for stored in storing {
        stored.await?;
    }
    shipper.note_backlog(0);
    Ok(end)
}

/// Stores the beginning of a segment that nobody has finished from `pg_wal`, up to the end of its last whole record, unless as
/// much of it is there; returns that position if it is stored now. Where the shipper runs: a backup that asks runs on threads
/// that may have to wait. Dropping it leaves it running.
pub async fn beginning(shipper: &Arc<Shipper>, segment: Segment) -> Result<Option<Lsn>, Arc<ShipError>> {
    let stores = Arc::clone(shipper);
    let stored = shipper.runtime().spawn(async move {
        let base = stores.branch(segment.timeline).await?;
        match read(&stores, segment).await? {
            Some(content) => store_beginning(&stores, base, segment, content).await,
            None => Ok(None),
        }
    });
    tasks::settled(stored).await
}

async fn store_beginning(
    shipper: &Arc<Shipper>,
    base: WalBranch,
    segment: Segment,
    content: SegmentContent,
) -> Result<Option<Lsn>, Arc<ShipError>> {
    let (archive, size) = (&shipper.source().archive, shipper.source().segment_size);
    let archive_error = |error: ArchiveError| Arc::new(ShipError::from(error));
    let valid = content.facts.valid_bytes;
    if valid == 0 {
        return Ok(None);
    }
    let wal = shipper.home(segment).await?;
    let begun = content.bytes.get(..valid as usize).unwrap_or_default();
    shipper.branches().apart_from_others(base, (wal, segment), begun).await?;
    let wal = shipper.home(segment).await?;
    let is_there = archive.has_segment(wal, segment, size).await.map_err(archive_error)?
        || in_pieces(archive, wal, (segment, size), begun).await.map_err(archive_error)? == InPieces::Same;
    if is_there {
        return Ok(None);
    }
    let tail = whole_beginning(shipper, wal, segment, content);
    shipper.branches().store_tail(base, &tail).await?;
    Ok(segment.start(size).checked_add(valid.into()))
}

/// What the pieces of a segment hold, beside what lies here of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum InPieces {
    /// They do not go so far, or do not read.
    Short,
    Same,
    /// Other bytes, of this member.
    Other(String),
}

/// Compares the pieces that are the branch's own with a beginning of the segment.
pub async fn in_pieces(
    archive: &WalArchive,
    wal: WalBranch,
    (segment, size): (Segment, SegmentSize),
    ours: &[u8],
) -> Result<InPieces, ArchiveError> {
    let strays = archive.strays(wal).await?;
    let facts = archive.beginning_facts_without(wal, segment, size, &strays).await?;
    let Some(facts) = facts.filter(|facts| facts.records_end as usize >= ours.len()) else {
        return Ok(InPieces::Short);
    };
    let begun = archive.beginning_of(wal, (segment, size), &facts.member).await?;
    Ok(match begun.as_ref().and_then(|begun| begun.bytes.get(..ours.len())) {
        Some(theirs) if theirs == ours => InPieces::Same,
        Some(_) => InPieces::Other(facts.member),
        None => InPieces::Short,
    })
}

/// What lies here of a segment, beside what the archive has of it whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Compared {
    /// Nobody has stored it.
    Alone,
    Same,
    /// Other WAL, another member's or this one's of before a rollback; or what the archive has does not read.
    Another,
    Unfinished,
}

async fn compared(shipper: &Arc<Shipper>, wal: WalBranch, segment: Segment) -> Result<Compared, Arc<ShipError>> {
    let source = shipper.source();
    if shipper.has_confirmed(segment) {
        return Ok(Compared::Same);
    }
    let archived = source.archive.readable(source.archive.directory(wal, segment, source.segment_size).await);
    let Some(archived) = archived.map_err(|error| Arc::new(ShipError::from(error)))? else {
        return Ok(Compared::Another);
    };
    Ok(match shipper.agrees(segment, archived.content_id).await? {
        Some(true) => Compared::Same,
        Some(false) => Compared::Another,
        // Its own that was finished, with the name of a segment yet to be written in its place.
        None if archived.member == source.member => Compared::Same,
        None => Compared::Unfinished,
    })
}

async fn read(shipper: &Shipper, segment: Segment) -> Result<Option<SegmentContent>, Arc<ShipError>> {
    let source = shipper.source().clone();
    let read = tokio::task::spawn_blocking(move || {
        let carry = predecessor_carry(&source, segment);
        let path = source.data_dir.join("pg_wal").join(segment.file_name(source.segment_size));
        read_segment(&path, segment, source.segment_size, source.system_id, carry)
    });
    match read.await.map_err(|_| Arc::new(ShipError::Stopping))? {
        Ok(content) => Ok(Some(content)),
        // Renamed for later use, and never written since.
        Err(WalReadError::Foreign { .. }) => Ok(None),
        Err(error) => Err(Arc::new(error.into())),
    }
}

/// What is valid of a segment, as one piece.
fn whole_beginning(shipper: &Shipper, wal: WalBranch, segment: Segment, content: SegmentContent) -> OwnedTail {
    let source = shipper.source();
    let hasher = source.archive.content_hasher();
    let (before, to) = (hasher.id(), content.facts.valid_bytes);
    let mut bytes = content.bytes;
    bytes.truncate(to as usize);
    OwnedTail {
        wal,
        segment,
        segment_size: source.segment_size,
        name: TailName { from: 0, to, member: source.member.clone() },
        before,
        after: source.archive.id_of(&bytes),
        bytes: Bytes::from(bytes),
        facts: content.facts,
        shipped_at_us: Timestamp::now().as_microsecond(),
        complete_at_us: None,
    }
}

/// The timelines of the segments in `pg_wal`.
pub fn timelines(data_dir: &Path, size: SegmentSize) -> BTreeSet<Timeline> {
    let Ok(entries) = std::fs::read_dir(data_dir.join("pg_wal")) else { return BTreeSet::new() };
    let timeline = |entry: std::io::Result<std::fs::DirEntry>| {
        Some(Segment::from_file_name(entry.ok()?.file_name().to_str()?, size).ok()?.timeline)
    };
    entries.filter_map(timeline).collect()
}

/// The segments of a timeline in `pg_wal`, ascending; some of the last are names of segments yet to be written.
fn segments(data_dir: &Path, timeline: Timeline, size: SegmentSize) -> Vec<Segment> {
    let Ok(entries) = std::fs::read_dir(data_dir.join("pg_wal")) else { return Vec::new() };
    let segment = |entry: std::io::Result<std::fs::DirEntry>| {
        Segment::from_file_name(entry.ok()?.file_name().to_str()?, size).ok().filter(|found| found.timeline == timeline)
    };
    let mut found: Vec<Segment> = entries.filter_map(segment).collect();
    found.sort_unstable();
    found
}
