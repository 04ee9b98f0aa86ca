//! The record stream: bytes of consecutive WAL in any portions go in, whole and proven records come out.
//!
//! It decides where valid WAL ends as PostgreSQL's own reader does (XLogReadRecord and its validations,
//! src/backend/access/transam/xlogreader.c). It never allocates by a length that it read, and never panics.

use walfleet_repository::checksum;
use walfleet_repository::postgres::{Lsn, SegmentSize, SystemId, Timeline};

use super::page_header::{LONG_HEADER, LongHeader, PageHeader, PageStart, WalVersion};
use super::record::{HEADER, Record, RecordHeader, rmgr};
use super::{EndReason, KEPT_BODY, WalError};

/// XLOG_SWITCH (src/include/catalog/pg_control.h).
const SWITCH: u8 = 0x40;
const RECORD_ALIGNMENT: u64 = 8;

/// Where the decoder stands in the record stream.
#[derive(Clone, Debug)]
enum State {
    /// A record begins at the next aligned position.
    Between,
    /// In the rest of a record whose beginning was never seen; so many bytes are left.
    Headless(u32),
    Inside(Unfinished),
    /// Behind a switch: nothing more in this segment counts.
    Switched,
    Ended(EndReason),
}

/// A record that ran into the end of a page or of the bytes at hand.
#[derive(Clone, Debug)]
struct Unfinished {
    start: Lsn,
    /// Bytes received, the header's among them.
    received: u32,
    /// The header, and up to [`KEPT_BODY`] bytes after it.
    kept: Vec<u8>,
    /// Of the bytes after the header.
    body_crc: u32,
    /// Known once 4 bytes are there.
    total: u32,
}

impl Unfinished {
    fn at(start: Lsn) -> Unfinished {
        Unfinished { start, received: 0, kept: Vec::new(), body_crc: 0, total: 0 }
    }

    fn left(&self) -> u32 {
        self.total - self.received
    }
}

/// What leads from one segment into the next.
#[derive(Clone, Debug)]
pub struct Carry {
    position: Lsn,
    state: State,
    known: Option<Known>,
    previous: Option<Lsn>,
    timeline: Option<Timeline>,
}

impl Carry {
    /// The start of the segment that this carry leads into.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Whether a record whose beginning is known goes on in that segment.
    pub fn is_inside_record(&self) -> bool {
        matches!(self.state, State::Inside(_))
    }
}

/// What the first page header told of the whole log.
#[derive(Clone, Copy, Debug)]
struct Known {
    magic: u16,
    version: WalVersion,
    page_bytes: u32,
    system_id: SystemId,
}

/// Decodes from one segment's start on, within that segment.
#[derive(Debug)]
pub(super) struct Decoder {
    segment_start: Lsn,
    segment_end: Lsn,
    segment_size: SegmentSize,
    segment_timeline: Timeline,
    system_id: Option<SystemId>,
    position: Lsn,
    state: State,
    known: Option<Known>,
    /// Start of the last whole record; `None` until one was seen.
    previous: Option<Lsn>,
    page_timeline: Option<Timeline>,
    /// A page header of which not all bytes were there yet.
    split_header: Vec<u8>,
    /// End of the last valid record.
    valid_end: Lsn,
    began_headless: bool,
}

impl Decoder {
    pub fn new(
        segment_start: Lsn,
        segment_size: SegmentSize,
        segment_timeline: Timeline,
        system_id: Option<SystemId>,
        carry: Option<Carry>,
    ) -> Result<Decoder, WalError> {
        let segment_end = segment_start.checked_add(u64::from(segment_size.bytes()));
        let segment_end = segment_end.filter(|_| segment_start.segment_offset(segment_size) == 0);
        let segment_end = segment_end.ok_or(WalError::NotASegmentStart { position: segment_start })?;
        if let Some(carry) = &carry
            && carry.position != segment_start
        {
            return Err(WalError::CarryElsewhere { segment: segment_start, carry: carry.position });
        }
        let (state, known, previous, page_timeline) = match carry {
            None => (State::Headless(0), None, None, None),
            Some(carry) => (carry.state, carry.known, carry.previous, carry.timeline),
        };
        Ok(Decoder {
            segment_start,
            segment_end,
            segment_size,
            segment_timeline,
            system_id: system_id.or(known.map(|known| known.system_id)),
            position: segment_start,
            state,
            known,
            previous,
            page_timeline,
            split_header: Vec::new(),
            valid_end: segment_start,
            began_headless: false,
        })
    }

    /// Takes the next bytes of the segment and calls `each` for every record that ends in them. Bytes behind the end of
    /// valid WAL or of the segment are passed over.
    pub fn feed(&mut self, mut bytes: &[u8], each: &mut impl FnMut(&Record<'_>)) -> Result<(), WalError> {
        while !bytes.is_empty() && self.position < self.segment_end {
            if matches!(self.state, State::Ended(_) | State::Switched) {
                let rest = (self.segment_end.0 - self.position.0).min(bytes.len() as u64);
                self.advance(rest as usize);
                return Ok(());
            }
            bytes = if self.at_page_start() { self.take_page_header(bytes)? } else { self.take_content(bytes, each) };
        }
        Ok(())
    }

    pub fn valid_end(&self) -> Lsn {
        self.valid_end
    }

    pub fn version(&self) -> Option<WalVersion> {
        self.known.map(|known| known.version)
    }

    pub fn system_id(&self) -> Option<SystemId> {
        self.known.map(|known| known.system_id)
    }

    pub fn has_switched(&self) -> bool {
        matches!(self.state, State::Switched)
    }

    /// Whether the segment begins within a record whose beginning is unknown.
    pub fn began_headless(&self) -> bool {
        self.began_headless
    }

    /// Why decoding stopped before the bytes did.
    pub fn ended(&self) -> Option<EndReason> {
        if let State::Ended(reason) = self.state { Some(reason) } else { None }
    }

    /// Whether a record has begun whose end is not there yet, its beginning known or not.
    pub fn is_inside_record(&self) -> bool {
        matches!(self.state, State::Inside(_)) || matches!(self.state, State::Headless(left) if left > 0)
    }

    /// `None` unless the whole segment was fed and its WAL is valid to the end.
    pub fn into_carry(self) -> Option<Carry> {
        let state = match self.state {
            State::Ended(_) => return None,
            State::Switched => State::Between,
            other => other,
        };
        let whole = self.position == self.segment_end && self.known.is_some();
        whole.then_some(Carry {
            position: self.segment_end,
            state,
            known: self.known,
            previous: self.previous,
            timeline: self.page_timeline,
        })
    }

    fn page_bytes(&self) -> u64 {
        // The first page header is read before any content, so the default only places that header.
        self.known.map_or(8192, |known| u64::from(known.page_bytes))
    }

    fn at_page_start(&self) -> bool {
        !self.split_header.is_empty() || self.position.0.is_multiple_of(self.page_bytes())
    }

    fn page_left(&self) -> usize {
        (self.page_bytes() - self.position.0 % self.page_bytes()) as usize
    }

    fn advance(&mut self, count: usize) {
        self.position = Lsn(self.position.0 + count as u64);
    }

    fn end(&mut self, reason: EndReason) {
        self.state = State::Ended(reason);
    }

    /// Collects a page header, over several portions if need be, and takes it in.
    fn take_page_header<'b>(&mut self, bytes: &'b [u8]) -> Result<&'b [u8], WalError> {
        let mut rest = bytes;
        let mut wanted: usize = 4;
        loop {
            let missing = wanted.saturating_sub(self.split_header.len());
            let (taken, left) = rest.split_at(missing.min(rest.len()));
            self.split_header.extend_from_slice(taken);
            rest = left;
            if self.split_header.len() < wanted {
                return Ok(rest);
            }
            if wanted > 4 {
                break;
            }
            let Some(length) = self.split_header.first_chunk().and_then(PageHeader::len) else { break };
            wanted = length;
        }
        let head = std::mem::take(&mut self.split_header);
        self.advance(head.len());
        let header = if wanted > 4 { PageHeader::parse(&head) } else { None };
        match header {
            None if head.iter().all(|byte| *byte == 0) => self.end(EndReason::Zeroes),
            None => self.end(EndReason::Garbage),
            Some(header) => self.enter_page(&header, wanted)?,
        }
        Ok(rest)
    }

    /// XLogReaderValidatePageHeader, and the handing over of a record that crosses into this page.
    fn enter_page(&mut self, header: &PageHeader, header_len: usize) -> Result<(), WalError> {
        let page_start = Lsn(self.position.0 - header_len as u64);
        let first = page_start == self.segment_start;
        if first != (header_len == LONG_HEADER) {
            self.end(EndReason::Garbage);
            return Ok(());
        }
        if header.address != page_start {
            self.end(EndReason::OtherPlace { found: header.address });
            return Ok(());
        }
        if let Some(long) = &header.long {
            self.check_identity(header, long)?;
        }
        let Some(known) = self.known else {
            self.end(EndReason::Garbage);
            return Ok(());
        };
        // Stale pages of a former life of the file bear another address; one of another release cannot follow.
        if header.magic != known.magic {
            self.end(EndReason::Garbage);
            return Ok(());
        }
        let fits = header.timeline.0 != 0
            && header.timeline <= self.segment_timeline
            && self.page_timeline.is_none_or(|before| before <= header.timeline);
        if !fits {
            self.end(EndReason::OtherTimeline { found: header.timeline });
            return Ok(());
        }
        self.page_timeline = Some(header.timeline);
        self.join(header.start);
        self.began_headless |= first && matches!(self.state, State::Headless(left) if left > 0);
        Ok(())
    }

    /// Whether the log is the one expected and of a form known here. A deviation is no end of WAL but an error.
    fn check_identity(&mut self, header: &PageHeader, long: &LongHeader) -> Result<(), WalError> {
        let segment = self.segment_start;
        let Some(version) = WalVersion::from_magic(header.magic) else {
            return Err(WalError::UnknownMagic { segment, magic: header.magic });
        };
        if let Some(expected) = self.system_id
            && expected != long.system_id
        {
            return Err(WalError::OtherSystem { segment, expected, found: long.system_id });
        }
        if long.segment_bytes != self.segment_size.bytes() {
            let expected = self.segment_size.bytes();
            return Err(WalError::OtherSegmentSize { segment, expected, found: long.segment_bytes });
        }
        // XLOG_BLCKSZ may be 1 to 64 KiB (configure --with-wal-blocksize).
        if !long.page_bytes.is_power_of_two() || !(1 << 10..=1 << 16).contains(&long.page_bytes) {
            return Err(WalError::PageSize { segment, found: long.page_bytes });
        }
        if self.known.is_none() {
            let (magic, page_bytes, system_id) = (header.magic, long.page_bytes, long.system_id);
            self.known = Some(Known { magic, version, page_bytes, system_id });
        }
        Ok(())
    }

    fn join(&mut self, start: PageStart) {
        let state = std::mem::replace(&mut self.state, State::Between);
        self.state = match (state, start) {
            (State::Inside(_) | State::Headless(_) | State::Between, PageStart::Overwrite) => State::Between,
            (State::Between | State::Headless(0), PageStart::Record) => State::Between,
            // Decoding begins here: what the record was, only the segment before can tell.
            (State::Headless(0), PageStart::Continuation(rem_len))
                if self.position.0 < self.segment_start.0 + self.page_bytes() =>
            {
                State::Headless(rem_len)
            }
            (State::Headless(left), PageStart::Continuation(rem_len)) if left == rem_len => State::Headless(left),
            (State::Inside(record), PageStart::Continuation(rem_len)) if record.left() == rem_len => {
                State::Inside(record)
            }
            (ended @ State::Ended(_), _) => ended,
            _ => State::Ended(EndReason::BrokenContinuation),
        };
    }

    fn take_content<'b>(&mut self, bytes: &'b [u8], each: &mut impl FnMut(&Record<'_>)) -> &'b [u8] {
        let in_page = bytes.len().min(self.page_left());
        let (here, _) = bytes.split_at(in_page);
        let used = match std::mem::replace(&mut self.state, State::Between) {
            State::Headless(0) | State::Between => self.begin_record(here, each),
            State::Headless(left) => self.pass_headless(here, left),
            State::Inside(record) => self.continue_record(here, record, each),
            state @ (State::Switched | State::Ended(_)) => {
                self.state = state;
                self.advance(here.len());
                here.len()
            }
        };
        bytes.get(used..).unwrap_or_default()
    }

    fn pass_headless(&mut self, here: &[u8], left: u32) -> usize {
        let used = here.len().min(left as usize);
        self.advance(used);
        let left = left - used as u32;
        self.state = if left == 0 { State::Between } else { State::Headless(left) };
        if left == 0 {
            self.valid_end = aligned(self.position);
        }
        used
    }

    /// At the place of a record, or in the padding before it.
    fn begin_record(&mut self, here: &[u8], each: &mut impl FnMut(&Record<'_>)) -> usize {
        let padding = (aligned(self.position).0 - self.position.0) as usize;
        if padding > 0 {
            let used = padding.min(here.len());
            self.advance(used);
            return used;
        }
        if let Some(length) = self.take_whole_record(here, each) {
            return length;
        }
        let start = self.position;
        self.continue_record(here, Unfinished::at(start), each)
    }

    /// The usual case, without a copy: all of the record lies in this page and these bytes.
    fn take_whole_record(&mut self, here: &[u8], each: &mut impl FnMut(&Record<'_>)) -> Option<usize> {
        let header = RecordHeader::parse(here)?;
        let length = header.total as usize;
        let (head, body) = here.get(..length)?.split_at_checked(HEADER)?;
        let start = self.position;
        if let Some(reason) = self.objection(&header, start) {
            self.end(reason);
            return Some(0);
        }
        if !header.is_crc_right(head, checksum::crc32c(body)) {
            self.end(EndReason::WrongChecksum);
            return Some(0);
        }
        self.advance(length);
        let kept = body.get(..KEPT_BODY).unwrap_or(body);
        self.finish_record(start, &header, kept, each);
        Some(length)
    }

    /// ValidXLogRecordHeader.
    fn objection(&self, header: &RecordHeader, start: Lsn) -> Option<EndReason> {
        let version = self.known?.version;
        if !header.is_manager_possible(version) {
            return Some(EndReason::Garbage);
        }
        // A record's back link is what tells a stale record, left in a recycled file, from the next one.
        let linked = match self.previous {
            Some(previous) => header.prev == previous,
            None => header.prev < start,
        };
        if linked { None } else { Some(EndReason::BrokenLink { found: header.prev }) }
    }

    /// Adds what is here to a record that lies in several pieces.
    fn continue_record(&mut self, here: &[u8], mut record: Unfinished, each: &mut impl FnMut(&Record<'_>)) -> usize {
        let mut used = 0;
        while used < here.len() {
            let upto = match record.received {
                0..4 => 4,
                4..24 => HEADER as u32,
                _ => record.total,
            };
            let piece = here.get(used..).unwrap_or_default();
            let piece = piece.get(..(upto - record.received) as usize).unwrap_or(piece);
            if record.received >= HEADER as u32 {
                record.body_crc = checksum::crc32c_append(record.body_crc, piece);
            }
            let room = (HEADER + KEPT_BODY).saturating_sub(record.kept.len());
            record.kept.extend_from_slice(piece.get(..room).unwrap_or(piece));
            record.received += piece.len() as u32;
            used += piece.len();
            self.advance(piece.len());
            if record.received == 4 {
                let Some(total) = RecordLength::read(&record.kept) else {
                    let zero = record.kept.iter().all(|byte| *byte == 0);
                    self.end(if zero { EndReason::Zeroes } else { EndReason::Garbage });
                    return used;
                };
                record.total = total.0;
            }
            if record.received < HEADER as u32 {
                continue;
            }
            let Some(header) = RecordHeader::parse(&record.kept) else { return used };
            if record.received == HEADER as u32
                && let Some(reason) = self.objection(&header, record.start)
            {
                self.end(reason);
                return used;
            }
            if record.received == record.total {
                if header.is_crc_right(&record.kept, record.body_crc) {
                    let body = record.kept.get(HEADER..).unwrap_or_default();
                    self.finish_record(record.start, &header, body, each);
                } else {
                    self.end(EndReason::WrongChecksum);
                }
                return used;
            }
        }
        self.state = State::Inside(record);
        used
    }

    fn finish_record(&mut self, start: Lsn, header: &RecordHeader, body: &[u8], each: &mut impl FnMut(&Record<'_>)) {
        let Some(known) = self.known else { return };
        self.previous = Some(start);
        self.valid_end = aligned(self.position);
        let record = Record {
            version: known.version,
            start,
            previous: header.prev,
            end: self.valid_end,
            xid: header.xid,
            rmgr: header.rmgr,
            info: header.info,
            body,
            body_len: header.total - HEADER as u32,
        };
        each(&record);
        let switch = record.rmgr == rmgr::XLOG && record.operation() == SWITCH;
        self.state = if switch { State::Switched } else { State::Between };
    }
}

/// A record's total length, if it is a possible one.
struct RecordLength(u32);

impl RecordLength {
    fn read(head: &[u8]) -> Option<RecordLength> {
        let total = crate::postgres::bytes::u32_at(head, 0)?;
        RecordHeader::is_length_possible(total).then_some(RecordLength(total))
    }
}

fn aligned(position: Lsn) -> Lsn {
    Lsn(position.0.next_multiple_of(RECORD_ALIGNMENT))
}
