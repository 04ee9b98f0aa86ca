//! Whether this server's WAL is what a branch holds: by its own files in `pg_wal`, and by whether records follow each other.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use walfleet_repository::format::wal_history::Joint;
use walfleet_repository::format::wal_tail;
use walfleet_repository::ids::ChunkId;
use walfleet_repository::postgres::{Lsn, Segment, Timeline, TimelineHistory, WalBranch};
use walfleet_repository::wal_archive::WalArchive;

use super::{Branches, Way};
use crate::postgres::wal_record::{Carry, EndReason, SegmentDigest, SegmentEnd, SegmentPlace, digest_segment};
use crate::wal::read::{WalReadError, read_in_place, read_segment, read_small};
use crate::wal::ship::{ShipError, ShipSource};

/// Directories read at once.
const READS: usize = 16;

/// How far behind the first difference strays are looked for: farther than anything is shipped ahead (at most
/// wal.read_ahead_segments, 1024).
const STRAYS_BEHIND: u64 = 1100;

/// Between two looks at a record that may be being written.
const SECOND_LOOK: Duration = Duration::from_millis(200);

/// How this server's WAL relates to what a branch holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Kin {
    Same,
    Other { whose: String, seen: Seen },
    Unknown,
}

/// By what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Seen {
    /// The file in `pg_wal` and the archived one.
    File,
    /// The records behind the archived ones.
    Records,
}

/// Whether what this member stored itself, and has no file of any more, is taken for this server's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum OwnWord {
    Taken,
    /// Unless the records behind it say that the server was rolled back.
    Doubted,
}

/// What this server stored in a branch that it left: where those segments start.
#[derive(Default)]
pub(super) struct Found {
    pub segments: Vec<Lsn>,
    pub tails: Vec<Lsn>,
}

impl Branches {
    /// Whether what this server has, or had, before a segment is what a branch has there.
    pub(super) async fn kin(&self, held: WalBranch, segment: Segment, own: OwnWord) -> Result<Kin, ShipError> {
        let Some(number) = segment.number.checked_sub(1) else { return Ok(Kin::Unknown) };
        let previous = Segment { number, ..segment };
        if self.newest_of().get(&held) == Some(&previous) {
            return Ok(Kin::Same);
        }
        let archived = self.source.archive.directory(held, previous, self.source.segment_size).await;
        let Some(archived) = self.source.archive.readable(archived)? else { return Ok(Kin::Unknown) };
        match self.agrees(previous, archived.content_id).await? {
            Some(true) => Ok(Kin::Same),
            Some(false) => Ok(Kin::Other { whose: archived.member, seen: Seen::File }),
            None if own == OwnWord::Taken && archived.member == self.source.member => Ok(Kin::Same),
            None => match self.follows(held, previous, segment).await? {
                Some(true) => Ok(Kin::Same),
                Some(false) => Ok(Kin::Other { whose: archived.member, seen: Seen::Records }),
                None if archived.member == self.source.member => Ok(Kin::Same),
                None => Ok(Kin::Unknown),
            },
        }
    }

    /// Whether a branch's WAL, from a segment on that Postgres has recycled here, goes on into what this server still has:
    /// no branch holds what does not follow from what it held. `last`: the number of the last segment that matters.
    pub async fn leads_here(&self, held: WalBranch, recycled: Segment, last: u64) -> Result<bool, ShipError> {
        for number in recycled.number + 1..=last.saturating_add(1) {
            match self.kin(held, Segment { number, ..recycled }, OwnWord::Doubted).await? {
                Kin::Same => return Ok(true),
                Kin::Other { .. } => return Ok(false),
                Kin::Unknown => {}
            }
        }
        Ok(false)
    }

    /// Compares a finished segment in `pg_wal` with an archived one; `None`: there is nothing to compare.
    pub async fn agrees(&self, segment: Segment, archived: ChunkId) -> Result<Option<bool>, ShipError> {
        Ok(self.content_of(segment).await?.map(|content| content == archived))
    }

    /// The content id of a finished segment in `pg_wal`.
    pub(super) async fn content_of(&self, segment: Segment) -> Result<Option<ChunkId>, ShipError> {
        let (source, size) = (self.source.clone(), self.source.segment_size);
        let read = tokio::task::spawn_blocking(move || {
            let path = source.data_dir.join("pg_wal").join(segment.file_name(size));
            match read_segment(&path, segment, size, source.system_id, None) {
                Ok(content) if content.suspicion.is_none() => Ok(Some(content)),
                // Another system's file lies there.
                Ok(_) | Err(WalReadError::Foreign { .. }) => Ok(None),
                Err(WalReadError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            }
        });
        let Some(content) = read.await.map_err(|_| ShipError::Stopping)?? else { return Ok(None) };
        let valid = content.bytes.get(..content.facts.valid_bytes as usize).unwrap_or_default();
        Ok(Some(self.source.archive.id_of(valid)))
    }

    /// Whether the first record of a segment in `pg_wal` is the next behind an archived one; `None` if that cannot be told.
    async fn follows(&self, held: WalBranch, previous: Segment, segment: Segment) -> Result<Option<bool>, ShipError> {
        let size = self.source.segment_size;
        let archived = self.source.archive.get_segment(held, previous, size).await;
        let Some((_, bytes)) = self.source.archive.readable(archived)?.flatten() else { return Ok(None) };
        let source = self.source.clone();
        let carry = tokio::task::spawn_blocking(move || digest(&source, previous, None, &bytes)?.carry);
        let Some(carry) = carry.await.map_err(|_| ShipError::Stopping)? else { return Ok(None) };
        let look = || {
            let (source, carry) = (self.source.clone(), carry.clone());
            tokio::task::spawn_blocking(move || first_record_follows(&source, segment, carry))
        };
        let first = look().await.map_err(|_| ShipError::Stopping)?;
        if first != Some(false) {
            return Ok(first);
        }
        // One of several backends may not have finished writing its record.
        tokio::time::sleep(SECOND_LOOK).await;
        look().await.map_err(|_| ShipError::Stopping)
    }

    /// The first segment of this server's that the last branch of its way has other records for, and whether all before it
    /// are the same; going back from one that is known to differ.
    /// `whose`: who stored that.
    pub(super) async fn where_it_left(
        &self,
        way: &Way,
        known: Segment,
        whose: &str,
    ) -> Result<(Segment, Joint), ShipError> {
        let (left_first, _) = way.steps.last().copied().unwrap_or((0, way.home(known.number)));
        let mut first = known;
        loop {
            if first.number <= left_first || self.begins_timeline(first).await? {
                return Ok((first, Joint::Sound));
            }
            match self.kin(way.home(first.number - 1), first, OwnWord::Doubted).await? {
                Kin::Same => return Ok((first, Joint::Sound)),
                Kin::Other { seen: Seen::File, .. } => first = Segment { number: first.number - 1, ..first },
                Kin::Unknown if self.shares_beginning(way.home(first.number), first, whose).await? => {
                    return Ok((first, Joint::Sound));
                }
                Kin::Other { seen: Seen::Records, .. } | Kin::Unknown => return Ok((first, Joint::Open)),
            }
        }
    }

    /// Whether a segment in `pg_wal` begins like what the archive has of it, which differs, up to a record with a time in it: then
    /// they were one server's until there.
    async fn shares_beginning(&self, held: WalBranch, segment: Segment, whose: &str) -> Result<bool, ShipError> {
        let (archive, size) = (&self.source.archive, self.source.segment_size);
        let theirs = match archive.readable(archive.get_segment(held, segment, size).await)?.flatten() {
            Some((_, content)) => content,
            None => match archive.beginning_of(held, (segment, size), whose).await? {
                Some(beginning) => beginning.bytes,
                None => return Ok(false),
            },
        };
        let source = self.source.clone();
        let compared = tokio::task::spawn_blocking(move || {
            let path = source.data_dir.join("pg_wal").join(segment.file_name(source.segment_size));
            let ours = read_in_place(&path).ok()?;
            let common = ours.iter().zip(&theirs).take_while(|(ours, theirs)| ours == theirs).count();
            digest(&source, segment, None, ours.get(..common)?)
        });
        let shared = compared.await.map_err(|_| ShipError::Stopping)?;
        Ok(shared.is_some_and(|shared| {
            shared.last_checkpoint.is_some() || !shared.completions.is_empty() || !shared.restore_points.is_empty()
        }))
    }

    /// Whether a segment is the first of its timeline: up to the switch in it, history says that it is the same.
    async fn begins_timeline(&self, segment: Segment) -> Result<bool, ShipError> {
        let timeline = segment.timeline;
        if timeline == Timeline::FIRST {
            // The first that initdb leaves (BootStrapXLOG, src/backend/access/transam/xlog.c).
            return Ok(segment.number <= 1);
        }
        let Some(content) = read_small(&self.source.data_dir, &timeline.history_name()).await? else {
            return Ok(false);
        };
        let switch =
            TimelineHistory::parse(timeline, &content).ok().and_then(|history| history.ancestors.last().copied());
        Ok(switch.is_some_and(|(_, at)| segment.number <= at.segment_number(self.source.segment_size)))
    }

    /// What this server has in place of a branch's segment, and who stored that.
    pub(super) async fn first_difference(
        &self,
        left: WalBranch,
        first: Segment,
    ) -> Result<(ChunkId, String), ShipError> {
        let archived = self.source.archive.directory(left, first, self.source.segment_size).await?;
        let content = self.content_of(first).await?.unwrap_or(archived.content_id);
        Ok((content, archived.member))
    }

    /// What of this server's own lies in a branch behind the first segment that differs: it went ahead of that one. Told by
    /// content, since this member may have stored some before it was rolled back.
    pub(super) async fn strays(&self, left: WalBranch, first: Segment) -> Result<Found, ShipError> {
        let (source, size) = (self.source.clone(), self.source.segment_size);
        let local = tokio::task::spawn_blocking(move || local_segments(&source, first));
        let local = local.await.map_err(|_| ShipError::Stopping)?;
        let archive = &self.source.archive;
        let behind = local.iter().copied().filter(|segment| *segment > first);
        let looks: Vec<_> = behind.map(|segment| self.is_stray(archive.clone(), left, segment)).collect();
        let looked: Vec<Option<Segment>> = futures::stream::iter(looks).buffered(READS).try_collect().await?;
        let mut found = Found::default();
        found.segments.extend(looked.into_iter().flatten().map(|segment| segment.start(size)));
        for segment in archive.begun_segments(left, size).await? {
            if local.contains(&segment) && self.is_begun_by_this(left, segment).await? {
                found.tails.push(segment.start(size));
            }
        }
        Ok(found)
    }

    async fn is_stray(
        &self,
        archive: WalArchive,
        left: WalBranch,
        segment: Segment,
    ) -> Result<Option<Segment>, ShipError> {
        let archived = archive.readable(archive.directory(left, segment, self.source.segment_size).await)?;
        let Some(directory) = archived.filter(|archived| archived.member == self.source.member) else {
            return Ok(None);
        };
        Ok(self.agrees(segment, directory.content_id).await?.filter(|same| *same).map(|_| segment))
    }

    /// Whether the newest pieces that this member stored of a segment are of what lies in `pg_wal`.
    async fn is_begun_by_this(&self, left: WalBranch, segment: Segment) -> Result<bool, ShipError> {
        let (archive, size) = (&self.source.archive, self.source.segment_size);
        let names = archive.tails(left, segment, size).await?;
        let Some(last) = wal_tail::chain(&names, &self.source.member).last().copied() else { return Ok(false) };
        let stored = archive.readable(archive.tail_directory(left, (segment, size), last).await)?;
        let Some(stored) = stored else { return Ok(false) };
        let (path, to) = (self.source.data_dir.join("pg_wal").join(segment.file_name(size)), last.to as usize);
        let read = tokio::task::spawn_blocking(move || read_in_place(&path)).await.map_err(|_| ShipError::Stopping)?;
        Ok(read.is_ok_and(|bytes| bytes.get(..to).is_some_and(|begun| archive.id_of(begun) == stored.after)))
    }
}

/// The segments in `pg_wal` from one on, as far as strays may lie.
fn local_segments(source: &ShipSource, first: Segment) -> Vec<Segment> {
    let Ok(entries) = std::fs::read_dir(source.data_dir.join("pg_wal")) else { return Vec::new() };
    let parsed = entries.filter_map(|entry| {
        let name = entry.ok()?.file_name();
        Segment::from_file_name(name.to_str()?, source.segment_size).ok()
    });
    let near = |found: &Segment| {
        found.timeline == first.timeline
            && (first.number..first.number.saturating_add(STRAYS_BEHIND)).contains(&found.number)
    };
    let mut found: Vec<Segment> = parsed.filter(near).collect();
    found.sort_unstable();
    found
}

pub(super) fn digest(
    source: &ShipSource,
    segment: Segment,
    carry: Option<Carry>,
    bytes: &[u8],
) -> Option<SegmentDigest> {
    let (start, size) = (segment.start(source.segment_size), source.segment_size);
    let place = SegmentPlace { start, size, timeline: segment.timeline, system_id: Some(source.system_id) };
    digest_segment(place, carry, Duration::ZERO, bytes).ok()
}

/// Only a first record whose checksum is right says anything; what is not all there yet, or left from another time of the
/// file, does not. That it is linked to the right place says little: servers that do the same write to the same places. A
/// record that lies in both segments, and whose checksum is right, says that it is.
fn first_record_follows(source: &ShipSource, segment: Segment, carry: Carry) -> Option<bool> {
    let path = source.data_dir.join("pg_wal").join(segment.file_name(source.segment_size));
    let bytes = read_in_place(&path).ok()?;
    if digest(source, segment, Some(carry.clone()), &bytes)?.records > 0 {
        return carry.is_inside_record().then_some(true);
    }
    let alone = digest(source, segment, None, &bytes)?;
    let behind = digest(source, segment, Some(carry), &bytes)?;
    let parted = matches!(
        behind.end,
        SegmentEnd::Broken(EndReason::BrokenLink { .. } | EndReason::BrokenContinuation | EndReason::WrongChecksum)
    );
    (alone.records > 0 && parted).then_some(false)
}
