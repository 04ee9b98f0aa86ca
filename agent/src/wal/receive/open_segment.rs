//! The segment that is being received: its bytes, what they say, and how it is cut into pieces.
//!
//! Pieces are cut so that few are ever needed: each sixteenth takes in the fifteen before it, each 256th the 255 before, up to 64 MiB.
//! A segment that fills in a day then is 45 pieces to read instead of 86,400, and each byte is stored three times at most.

use jiff::Timestamp;
use walfleet_repository::crypto::ContentHasher;
use walfleet_repository::format::wal_segment::{CONTENT_FRAME_BYTES, CommitPoint, RestorePoint, SegmentFacts};
use walfleet_repository::ids::ChunkId;
use walfleet_repository::layout::TailName;
use walfleet_repository::postgres::{Lsn, Segment, SegmentSize, WalBranch};
use walfleet_repository::wal_archive::{
    ArchiveError, Beginning, ComingSegment, OwnedSegment, OwnedTail, SealedSegment, WalArchive,
};

use super::ReceiveError;
use super::spare::Spare;
use crate::postgres::wal_record::{COMPLETION_SPACING, Carry, SegmentPlace, SegmentScan, WalError};
use crate::wal::read::{facts_of, suspicion, wal_level_change};

/// Pieces that one of the next higher level takes in.
const FAN_IN: usize = 16;

/// Of a piece for spools that takes in those before it: many small ones become few to store and to read, large ones are not
/// written twice.
const MERGED_BYTES: u32 = 256 << 10;

/// Of a piece that takes in those before it: it is held twice until it is stored. A segment of the usual size is never more.
const MOST_TAKEN_IN: u32 = 64 << 20;

/// What is cut for spools before more is received.
pub const SPOOLED_BYTES: u32 = 4 << 20;

/// More in one piece spools do not take: it came when no commit waited for them.
const MOST_SPOOLED_BYTES: u32 = 6 << 20;

/// What is sealed at once.
const FRAME: usize = CONTENT_FRAME_BYTES as usize;

/// Segments up to this size get their memory at once instead of growing into it.
const MOST_AT_ONCE: u32 = 64 << 20;

/// Where a segment belongs and who receives it.
#[derive(Clone, Debug)]
pub struct Place {
    pub wal: WalBranch,
    pub segment: Segment,
    pub size: SegmentSize,
    pub member: String,
}

/// Up to where pieces were cut, and the id of all bytes up to there.
#[derive(Clone, Copy, Debug)]
struct Cut {
    end: u32,
    id: ChunkId,
}

pub struct OpenSegment {
    place: Place,
    bytes: Vec<u8>,
    /// Where memory comes from, and goes to.
    spare: Spare,
    scan: SegmentScan,
    /// Of the bytes up to the last cut of any kind.
    hasher: ContentHasher,
    /// Of no bytes.
    fresh: ContentHasher,
    /// Of pieces for the repository. The first is the segment's start.
    cuts: Vec<Cut>,
    /// Of pieces for spools. Where there are any, the repository's begin and end at some of these.
    spool_cuts: Vec<Cut>,
    /// Sealed while it comes, so that little is left to do at its end; `None`: sealed then, beside others.
    coming: Option<ComingSegment>,
    /// As long as what comes is the same.
    known: Option<Known>,
    /// So much of it was.
    compared: usize,
    /// The archive has other bytes from an earlier time: nothing is cut until that is settled.
    is_held: bool,
}

/// What the archive has of a segment from an earlier time: its beginning, and whose that is.
#[derive(Clone, Debug)]
pub struct Known {
    pub bytes: Vec<u8>,
    pub member: String,
}

impl From<Beginning> for Known {
    fn from(beginning: Beginning) -> Known {
        Known { bytes: beginning.bytes, member: beginning.member }
    }
}

/// How what was received relates to what the archive has of the segment from an earlier time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Compared {
    /// There is nothing, or no more.
    Nothing,
    /// Up to there it is the same.
    Same(Lsn),
    /// It is not what this member stored: this server was rolled back, or is another.
    Other(String),
}

/// A finished segment, and what leads into the next.
pub struct Finished {
    pub segment: Segment,
    pub content: FinishedContent,
    pub carry: Option<Carry>,
}

pub enum FinishedContent {
    Sealed(Box<SealedSegment>),
    /// Yet to be sealed.
    Plain(Box<OwnedSegment>),
}

impl OpenSegment {
    pub fn begin(
        place: Place,
        archive: &WalArchive,
        carry: Option<Carry>,
        known: Option<Known>,
    ) -> Result<OpenSegment, WalError> {
        let hasher = archive.content_hasher();
        let start = place.segment.start(place.size);
        let system_id = Some(place.wal.system_id);
        let scanned = SegmentPlace { start, size: place.size, timeline: place.segment.timeline, system_id };
        Ok(OpenSegment {
            scan: SegmentScan::new(scanned, carry, COMPLETION_SPACING)?,
            cuts: vec![Cut { end: 0, id: hasher.id() }],
            spool_cuts: vec![Cut { end: 0, id: hasher.id() }],
            fresh: hasher.clone(),
            hasher,
            bytes: Vec::new(),
            spare: Spare::default(),
            coming: None,
            known: known.filter(|known| !known.bytes.is_empty()),
            compared: 0,
            is_held: false,
            place,
        })
    }

    /// In memory that was used before, and will be again.
    pub fn in_memory_of(mut self, spare: &Spare) -> OpenSegment {
        self.spare = spare.clone();
        self
    }

    /// Has the segment sealed while it comes, by this archive.
    pub fn seal_as_it_comes(mut self, archive: &WalArchive) -> Result<OpenSegment, ArchiveError> {
        self.coming = Some(archive.begin_segment(self.place.wal, self.place.segment, self.place.size)?);
        Ok(self)
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Up to where it was received.
    pub fn position(&self) -> Lsn {
        Lsn(self.start().0 + self.bytes.len() as u64)
    }

    fn start(&self) -> Lsn {
        self.place.segment.start(self.place.size)
    }

    pub fn is_full(&self) -> bool {
        self.bytes.len() == self.place.size.bytes() as usize
    }

    /// Whether pieces of it were cut.
    pub fn is_cut(&self) -> bool {
        self.cuts.len() > 1
    }

    /// Bytes that no piece holds yet. None while the archive is seen to have what comes: a piece cut then would end where no
    /// other begins, and be stored for nothing.
    pub fn uncut(&self) -> u32 {
        if self.known.is_some() || self.is_held { 0 } else { self.received() - self.last_cut().end }
    }

    /// Bytes that no piece for spools holds yet.
    pub fn unspooled(&self) -> u32 {
        if self.known.is_some() || self.is_held { 0 } else { self.received() - self.last_of_all().end }
    }

    /// The next piece takes in everything from the segment's start on, and nothing that is stored already counts.
    /// `home`: where it belongs now.
    pub fn begin_anew(&mut self, home: WalBranch) {
        if std::mem::replace(&mut self.place.wal, home) != home {
            // Sealed for where it belonged, under that name.
            self.coming = None;
        }
        self.cuts.truncate(1);
        self.spool_cuts.truncate(1);
        self.hasher = self.fresh.clone();
        (self.known, self.is_held) = (None, false);
    }

    /// The id of its first bytes, if so many were received.
    pub fn id_up_to(&self, end: u32) -> Option<ChunkId> {
        let mut hasher = self.fresh.clone();
        hasher.update(self.bytes.get(..end as usize)?);
        Some(hasher.id())
    }

    pub fn received(&self) -> u32 {
        // A segment has at most 1 GiB.
        self.bytes.len() as u32
    }

    fn last_cut(&self) -> Cut {
        *self.cuts.last().expect("the segment's start is a cut")
    }

    /// Up to which the bytes are hashed.
    fn last_of_all(&self) -> Cut {
        let spooled = *self.spool_cuts.last().expect("the segment's start is a cut");
        if spooled.end > self.last_cut().end { spooled } else { self.last_cut() }
    }

    /// Hashes what came since the last cut.
    fn cut_here(&mut self) -> Cut {
        let last = self.last_of_all();
        if last.end == self.received() {
            return last;
        }
        self.hasher.update(self.bytes.get(last.end as usize..).unwrap_or_default());
        Cut { end: self.received(), id: self.hasher.id() }
    }

    /// Takes in the next bytes, as many as belong to this segment; returns how many those were, and whether what was received
    /// turned out to be in the archive already.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(usize, Compared), ReceiveError> {
        let room = self.place.size.bytes() as usize - self.bytes.len();
        let taken = bytes.get(..room).unwrap_or(bytes);
        self.scan.feed(taken)?;
        if self.bytes.capacity() == 0 {
            self.bytes = self.spare.take(self.place.size.bytes().min(MOST_AT_ONCE) as usize);
        }
        self.bytes.extend_from_slice(taken);
        // A whole frame is valid if records go on behind it: whatever comes, the segment's end is not before.
        if let Some(coming) = &mut self.coming
            && self.bytes.len() - coming.sealed() >= FRAME
            && self.scan.goes_on()
        {
            coming.push(&self.bytes)?;
        }
        Ok((taken.len(), self.compare_known()))
    }

    fn compare_known(&mut self) -> Compared {
        let Some(known) = &self.known else { return Compared::Nothing };
        let until = known.bytes.len().min(self.bytes.len());
        if self.bytes.get(self.compared..until) != known.bytes.get(self.compared..until) {
            self.is_held = true;
            return self.known.take().map_or(Compared::Nothing, |known| Compared::Other(known.member));
        }
        self.compared = until;
        if until == known.bytes.len() {
            self.hasher.update(&known.bytes);
            let cut = Cut { end: until as u32, id: self.hasher.id() };
            self.cuts.push(cut);
            self.spool_cuts.push(cut);
            self.known = None;
        }
        Compared::Same(Lsn(self.start().0 + until as u64))
    }

    /// What is to be stored now: everything since the last cut, and now and then what was cut before once more. `None` if
    /// there is nothing new. `complete_at`: the server's clock if it said that it has no more than this.
    pub fn cut(&mut self, complete_at: Option<Timestamp>) -> Option<OwnedTail> {
        if self.uncut() == 0 {
            return None;
        }
        let after = self.cut_here();
        self.cuts.push(after);
        Some(self.piece(first_to_take_in(&self.cuts), after, complete_at))
    }

    /// What spools are to keep now: everything since the last cut, and now and then what was cut before once more, as long as
    /// that is little.
    pub fn spool(&mut self) -> Option<OwnedTail> {
        let before = self.last_of_all();
        if self.unspooled() == 0 {
            return None;
        }
        let after = self.cut_here();
        if self.spool_cuts.last().is_none_or(|last| last.end < before.end) {
            self.spool_cuts.push(before);
        }
        self.spool_cuts.push(after);
        if after.end - before.end > MOST_SPOOLED_BYTES {
            return None;
        }
        // Never across a cut for the repository: once that has what is before it, what the spools still keep goes on from there.
        let merged = first_to_take_in(&self.spool_cuts);
        let merged = if merged.end < self.last_cut().end { self.last_cut() } else { merged };
        let first = if after.end - merged.end <= MERGED_BYTES { merged } else { before };
        Some(self.piece(first, after, None))
    }

    fn piece(&self, first: Cut, after: Cut, complete_at: Option<Timestamp>) -> OwnedTail {
        let to = after.end;
        let lsn = |offset| self.place.segment.at(self.place.size, offset);
        let bytes = self.bytes.get(first.end as usize..).unwrap_or_default();
        let completions = self.scan.completions_between(lsn(first.end), lsn(to));
        let points = self.scan.restore_points_between(lsn(first.end), lsn(to));
        let facts = SegmentFacts {
            valid_bytes: self.scan.records_end(),
            commits: completions.iter().map(|done| CommitPoint { lsn: done.end, at_us: done.at_us }).collect(),
            restore_points: points
                .map(|p| RestorePoint { name: p.name.clone(), point: CommitPoint { lsn: p.end, at_us: p.at_us } })
                .collect(),
            changed_blocks: None,
            wal_levels: self.scan.parameter_changes_between(lsn(first.end), lsn(to)).map(wal_level_change).collect(),
        };
        OwnedTail {
            wal: self.place.wal,
            segment: self.place.segment,
            segment_size: self.place.size,
            name: TailName { from: first.end, to, member: self.place.member.clone() },
            before: first.id,
            after: after.id,
            bytes: self.spare.copy(bytes),
            facts,
            shipped_at_us: Timestamp::now().as_microsecond(),
            complete_at_us: complete_at.map(Timestamp::as_microsecond),
        }
    }

    /// All of it; to be called once it is full.
    pub fn finish(self) -> Result<Finished, ArchiveError> {
        let mut digest = self.scan.finish();
        let odd = suspicion(&digest);
        let mut facts = facts_of(&mut digest);
        if let Some(odd) = odd {
            let segment = self.place.segment.file_name(self.place.size);
            tracing::warn!(segment, "a finished segment does not read to its end and is archived as it is: {odd}");
            facts.valid_bytes = self.place.size.bytes();
        }
        let upload = OwnedSegment {
            wal: self.place.wal,
            segment: self.place.segment,
            segment_size: self.place.size,
            content: self.bytes,
            facts,
            predecessor: None,
            member: self.place.member,
            shipped_at_us: Timestamp::now().as_microsecond(),
        };
        let content = match self.coming {
            Some(coming) => {
                let sealed = coming.finish(&upload)?;
                self.spare.give(upload.content);
                FinishedContent::Sealed(Box::new(sealed))
            }
            None => FinishedContent::Plain(Box::new(upload)),
        };
        Ok(Finished { segment: self.place.segment, content, carry: digest.carry })
    }
}

/// The cut from which the newest piece begins, which ends at the last.
fn first_to_take_in(cuts: &[Cut]) -> Cut {
    let count = cuts.len() - 1;
    let bytes = |reach: usize| cuts[count].end - cuts[count - reach].end;
    let mut reach = 1;
    while count.is_multiple_of(reach * FAN_IN) && bytes(reach * FAN_IN) <= MOST_TAKEN_IN {
        reach *= FAN_IN;
    }
    cuts[count - reach]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use walfleet_repository::crypto::DomainKey;
    use walfleet_repository::format::wal_tail;
    use walfleet_repository::keyring::Keyring;
    use walfleet_repository::postgres::{Branch, SystemId, Timeline};
    use walfleet_repository::store::Store;

    use super::*;

    fn place() -> Place {
        let wal = WalBranch { system_id: SystemId(5), timeline: Timeline(1), branch: Branch::ROOT };
        let segment = Segment { timeline: Timeline(1), number: 2 };
        Place { wal, segment, size: SegmentSize::new(1 << 20).unwrap(), member: "pg1".into() }
    }

    fn archive() -> WalArchive {
        let keys = Keyring::of(DomainKey::generate().unwrap());
        WalArchive::new(Store::in_memory(), "orders".parse().unwrap(), Arc::new(keys), 3)
    }

    #[tokio::test]
    async fn pieces_take_in_those_before_and_always_make_all_that_was_received() {
        let archive = archive();
        let mut open = OpenSegment::begin(place(), &archive, None, None).unwrap();
        let mut received = Vec::new();
        let mut widths = Vec::new();
        for at in 0..300u32 {
            let bytes: Vec<u8> = at.to_le_bytes().repeat(5);
            received.extend_from_slice(&bytes);
            assert_eq!(open.take(&bytes).unwrap(), (20, Compared::Nothing));
            let tail = open.cut(None).unwrap();
            widths.push((tail.name.to - tail.name.from) / 20);
            archive.put_tail(tail).await.unwrap();
            assert!(open.cut(None).is_none(), "nothing new");
        }
        assert_eq!(widths[..17], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 16, 1]);
        assert_eq!(widths[255], 256);
        let p = place();
        let begun = archive.beginning(p.wal, p.segment, p.size).await.unwrap().unwrap();
        assert_eq!(begun.bytes, received);
        // 256, then two of 16, then 12.
        assert_eq!(begun.pieces, 1 + 2 + 12);

        // Received again from the segment's start, as after a restart: what is there is not stored again.
        let mut again = OpenSegment::begin(place(), &archive, None, Some(begun.clone().into())).unwrap();
        let seen = Lsn(p.segment.start(p.size).0 + 5000);
        assert_eq!(again.take(&received[..5000]).unwrap(), (5000, Compared::Same(seen)));
        assert!(again.cut(None).is_none(), "it is there, and what follows goes on from where that ends");
        let end = Lsn(p.segment.start(p.size).0 + received.len() as u64);
        assert_eq!(again.take(&received[5000..]).unwrap(), (1000, Compared::Same(end)));
        assert!(again.cut(None).is_none());
        again.take(b"more").unwrap();
        let tail = again.cut(None).unwrap();
        assert_eq!((tail.name.from, tail.name.to), (6000, 6004));
        archive.put_tail(tail).await.unwrap();
        assert_eq!(archive.beginning(p.wal, p.segment, p.size).await.unwrap().unwrap().bytes.len(), 6004);

        let mut another = OpenSegment::begin(place(), &archive, None, Some(begun.into())).unwrap();
        assert_eq!(another.take(&vec![9; 6000]).unwrap(), (6000, Compared::Other("pg1".into())));
        assert!(
            another.cut(None).is_none() && another.spool().is_none(),
            "nothing of it counts beside the other bytes"
        );
        another.take(b"more").unwrap();
        another.begin_anew(place().wal);
        let tail = another.cut(None).unwrap();
        assert_eq!((tail.name.from, tail.name.to), (0, 6004), "all of it goes elsewhere");
        let fresh = archive.content_hasher().id();
        assert_eq!(tail.before, fresh);
    }

    #[test]
    fn no_piece_takes_in_more_than_memory_is_to_hold() {
        let id = archive().content_hasher().id();
        // A segment of 1 GiB that fills in 256 pieces.
        let cuts: Vec<Cut> = (0..=256).map(|at| Cut { end: at * (4 << 20), id }).collect();
        let widths: Vec<u32> = (1..=256).map(|count| cuts[count].end - first_to_take_in(&cuts[..=count]).end).collect();
        assert_eq!(widths.iter().max(), Some(&MOST_TAKEN_IN));
        assert_eq!(widths.iter().filter(|width| **width == MOST_TAKEN_IN).count(), 16, "each sixteenth does");
    }

    #[tokio::test]
    async fn what_spools_have_goes_on_from_whatever_the_archive_has() {
        let archive = archive();
        let mut open = OpenSegment::begin(place(), &archive, None, None).unwrap();
        let (mut received, mut spooled, mut stored) = (Vec::new(), Vec::new(), Vec::new());
        for at in 0..300u32 {
            let bytes: Vec<u8> = at.to_le_bytes().repeat(5);
            received.extend_from_slice(&bytes);
            open.take(&bytes).unwrap();
            // For a while there are none.
            if !(100..120).contains(&at) {
                spooled.extend(open.spool());
                assert!(open.spool().is_none(), "nothing new");
            }
            if at % 40 == 39 {
                stored.extend(open.cut(None));
            }
        }
        assert!(spooled.iter().any(|tail| tail.name.to - tail.name.from >= 16 * 20), "small ones are taken in");
        for archived in 0..=stored.len() {
            let archived = &stored[..archived];
            let durable = archived.last().map_or(0, |tail| tail.name.to);
            // The spools let go of what the archive has.
            let kept = spooled.iter().filter(|tail| tail.name.to > durable);
            let names: Vec<TailName> = archived.iter().chain(kept).map(|tail| tail.name.clone()).collect();
            let end = wal_tail::chain(&names, "pg1").last().map_or(0, |last| last.to);
            let least = if durable < 120 * 20 { durable.max(100 * 20) } else { 300 * 20 };
            assert!(end >= least, "{end} from {durable}");
        }
        for tail in stored.into_iter().take(5).chain(spooled) {
            archive.put_tail(tail).await.unwrap();
        }
        let p = place();
        assert_eq!(archive.beginning(p.wal, p.segment, p.size).await.unwrap().unwrap().bytes, received);
    }
}
