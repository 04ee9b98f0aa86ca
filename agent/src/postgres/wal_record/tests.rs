//! The reader against WAL of real servers, against made-up logs for what servers rarely do, and against damage.
//!
//! `fixtures/<major>.wal` is the beginning of a 1 MiB segment that a server of that release wrote, up to its switch; the
//! times and positions expected of it are what that release's pg_waldump printed (13: its SQL functions).

use std::time::Duration;

use proptest::prelude::*;
use walfleet_repository::checksum;
use walfleet_repository::postgres::{Lsn, SegmentSize, SystemId, Timeline};

use super::decoder::Decoder;
use super::digest::SegmentScan;
use super::page_header::WalVersion;
use super::record::{BlockReference, rmgr};
use super::*;

/// Of all logs here.
const SEGMENT_BYTES: u32 = 1 << 20;

fn segment_size() -> SegmentSize {
    SegmentSize::new(u64::from(SEGMENT_BYTES)).expect("a valid size")
}

struct Fixture {
    major: u8,
    bytes: &'static [u8],
    start: u64,
    valid_bytes: u32,
    /// Offset of the end in the segment, microseconds, in the order of the log.
    completions: [(u64, i64); 8],
}

use Outcome::{Abort, Commit};
const OUTCOMES: [Outcome; 8] = [Commit, Commit, Abort, Abort, Abort, Commit, Commit, Commit];

const FIXTURES: [Fixture; 6] = [
    Fixture {
        major: 13,
        bytes: include_bytes!("fixtures/13.wal"),
        start: 0x70_0000,
        valid_bytes: 10576,
        completions: [
            (0x98, 1795240639517413),
            (0x338, 1795240639519174),
            (0x370, 1795240639519364),
            (0x3D8, 1795240639519587),
            (0x480, 1795240639519812),
            (0x4B0, 1795240639519854),
            (0x28C0, 1795240639520302),
            (0x2938, 1795240639520472),
        ],
    },
    Fixture {
        major: 14,
        bytes: include_bytes!("fixtures/14.wal"),
        start: 0x80_0000,
        valid_bytes: 10584,
        completions: [
            (0x98, 1795240593236618),
            (0x338, 1795240593237986),
            (0x370, 1795240593238164),
            (0x3D8, 1795240593238373),
            (0x488, 1795240593238581),
            (0x4B8, 1795240593238621),
            (0x28C8, 1795240593239017),
            (0x2940, 1795240593239231),
        ],
    },
    Fixture {
        major: 15,
        bytes: include_bytes!("fixtures/15.wal"),
        start: 0x70_0000,
        valid_bytes: 10600,
        completions: [
            (0x98, 1795240596339350),
            (0x348, 1795240596340777),
            (0x380, 1795240596340961),
            (0x3E8, 1795240596341184),
            (0x498, 1795240596341389),
            (0x4C8, 1795240596341428),
            (0x28D8, 1795240596341819),
            (0x2950, 1795240596341979),
        ],
    },
    Fixture {
        major: 16,
        bytes: include_bytes!("fixtures/16.wal"),
        start: 0x60_0000,
        valid_bytes: 10600,
        completions: [
            (0x98, 1795240594000014),
            (0x348, 1795240594001593),
            (0x380, 1795240594001768),
            (0x3E8, 1795240594001973),
            (0x498, 1795240594002194),
            (0x4C8, 1795240594002233),
            (0x28D8, 1795240594002634),
            (0x2950, 1795240594002798),
        ],
    },
    Fixture {
        major: 17,
        bytes: include_bytes!("fixtures/17.wal"),
        start: 0x60_0000,
        valid_bytes: 10600,
        completions: [
            (0x98, 1795240594754759),
            (0x348, 1795240594756376),
            (0x380, 1795240594756554),
            (0x3E8, 1795240594756770),
            (0x498, 1795240594756967),
            (0x4C8, 1795240594757005),
            (0x28D8, 1795240594757414),
            (0x2950, 1795240594757586),
        ],
    },
    Fixture {
        major: 18,
        bytes: include_bytes!("fixtures/18.wal"),
        start: 0x90_0000,
        valid_bytes: 20240,
        completions: [
            (0x2640, 1795240595524525),
            (0x28F0, 1795240595525948),
            (0x2928, 1795240595526124),
            (0x2990, 1795240595526339),
            (0x2A40, 1795240595526537),
            (0x2A70, 1795240595526576),
            (0x4E80, 1795240595526997),
            (0x4EF8, 1795240595527210),
        ],
    },
];

impl Fixture {
    fn place(&self) -> SegmentPlace {
        SegmentPlace { start: Lsn(self.start), size: segment_size(), timeline: Timeline(1), system_id: None }
    }

    fn digest(&self, bytes: &[u8]) -> SegmentDigest {
        digest_segment(self.place(), None, Duration::ZERO, bytes).expect("a fixture is of a known release")
    }
}

#[test]
fn real_wal_of_every_release_gives_its_completions() {
    for fixture in &FIXTURES {
        let digest = fixture.digest(fixture.bytes);
        let major = fixture.major;
        assert_eq!(digest.version.map(WalVersion::major), Some(major));
        assert_eq!((digest.valid_bytes, digest.end), (fixture.valid_bytes, SegmentEnd::Switch), "release {major}");
        assert_eq!((digest.malformed, digest.headless), (0, false), "release {major}");
        let expected: Vec<Completion> = (fixture.completions.iter().zip(OUTCOMES))
            .map(|(&(offset, at_us), outcome)| Completion { end: Lsn(fixture.start + offset), at_us, outcome })
            .collect();
        assert_eq!(digest.completions, expected, "release {major}");
        assert_eq!(digest.last_commit, expected.last().copied());
        let names: Vec<&str> = digest.restore_points.iter().map(|point| point.name.as_str()).collect();
        assert_eq!(names, ["before_the_flood"]);
    }
}

#[test]
fn real_wal_of_every_release_names_the_pages_it_changes() {
    for fixture in &FIXTURES {
        let mut table_blocks = 0;
        let place = fixture.place();
        let mut decoder = Decoder::new(place.start, place.size, place.timeline, None, None).unwrap();
        decoder
            .feed(fixture.bytes, &mut |record| {
                let table = |block: BlockReference| (block.tablespace, block.relation, block.block) == (1663, 16384, 0);
                record.for_each_block(|block| table_blocks += u32::from(table(block))).unwrap();
            })
            .unwrap();
        assert_eq!(table_blocks, 7, "seven rows were inserted into the first page, release {}", fixture.major);
    }
}

#[test]
fn thinning_keeps_the_ends_and_the_latest() {
    let fixture = &FIXTURES[3];
    let digest = digest_segment(fixture.place(), None, Duration::from_secs(1), fixture.bytes).unwrap();
    let ends: Vec<u64> = digest.completions.iter().map(|completion| completion.end.0 - fixture.start).collect();
    assert_eq!(ends, [0x98, 0x2950]);
}

#[test]
fn a_log_of_another_system_or_release_is_an_error_not_an_end() {
    let fixture = &FIXTURES[5];
    let strict = SegmentPlace { system_id: Some(SystemId(7)), ..fixture.place() };
    let error = digest_segment(strict, None, Duration::ZERO, fixture.bytes).unwrap_err();
    assert!(matches!(error, WalError::OtherSystem { expected: SystemId(7), .. }));
    let mut newer = fixture.bytes.to_vec();
    newer[0] = 0x99;
    let error = digest_segment(fixture.place(), None, Duration::ZERO, &newer).unwrap_err();
    assert!(matches!(error, WalError::UnknownMagic { magic: 0xD199, .. }));
    let other_size = SegmentPlace { size: SegmentSize::new(2 << 20).unwrap(), start: Lsn(0x80_0000), ..strict };
    let other_size = SegmentPlace { system_id: None, ..other_size };
    let error = digest_segment(other_size, None, Duration::ZERO, FIXTURES[1].bytes).unwrap_err();
    assert!(matches!(error, WalError::OtherSegmentSize { expected: 0x20_0000, found: 0x10_0000, .. }));
}

#[test]
fn a_recycled_file_is_no_wal_at_its_new_place() {
    let fixture = &FIXTURES[2];
    let elsewhere = SegmentPlace { start: Lsn(fixture.start + 0x40_0000), ..fixture.place() };
    let digest = digest_segment(elsewhere, None, Duration::ZERO, fixture.bytes).unwrap();
    let found = Lsn(fixture.start);
    assert_eq!((digest.valid_bytes, digest.end), (0, SegmentEnd::Broken(EndReason::OtherPlace { found })));
}

/// Writes logs as a server would, with what servers write only in bad moments.
struct LogWriter {
    bytes: Vec<u8>,
    start: u64,
    previous: u64,
}

const PAGE: usize = 8192;

impl LogWriter {
    fn new() -> LogWriter {
        LogWriter { bytes: Vec::new(), start: 0x500_0000, previous: 0x4FF_FF00 }
    }

    fn position(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn page_header(&mut self, flags: u16, rem_len: u32) {
        let position = self.position();
        let long = position.is_multiple_of(u64::from(SEGMENT_BYTES));
        self.bytes.extend(0xD118u16.to_le_bytes());
        self.bytes.extend((flags | if long { 2 } else { 0 }).to_le_bytes());
        self.bytes.extend(1u32.to_le_bytes());
        self.bytes.extend(position.to_le_bytes());
        self.bytes.extend(rem_len.to_le_bytes());
        self.bytes.extend([0; 4]);
        if long {
            self.bytes.extend(42u64.to_le_bytes());
            self.bytes.extend(SEGMENT_BYTES.to_le_bytes());
            self.bytes.extend((PAGE as u32).to_le_bytes());
        }
    }

    fn pad(&mut self) {
        let length = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(length, 0);
    }

    /// A transaction's end, made long by an invented trailer, cut short after `limit` bytes. Returns its start.
    fn commit(&mut self, at_us: i64, trailer: usize, limit: usize) -> u64 {
        self.pad();
        if self.bytes.len().is_multiple_of(PAGE) {
            self.page_header(0, 0);
        }
        let mut data = at_us.to_le_bytes().to_vec();
        data.resize(8 + trailer, 0xAB);
        let mut body = vec![254];
        body.extend((data.len() as u32).to_le_bytes());
        body.extend(data);
        self.record(rmgr::XACT, 0, &body, limit)
    }

    fn record(&mut self, manager: u8, info: u8, body: &[u8], limit: usize) -> u64 {
        let start = self.position();
        let total = 24 + body.len() as u32;
        let mut head = total.to_le_bytes().to_vec();
        head.extend(9u32.to_le_bytes());
        head.extend(self.previous.to_le_bytes());
        head.extend([info, manager, 0, 0]);
        let crc = checksum::crc32c_append(checksum::crc32c(body), &head);
        head.extend(crc.to_le_bytes());
        head.extend(body);
        let mut left = &head[..limit.min(head.len())];
        while !left.is_empty() {
            if self.bytes.len().is_multiple_of(PAGE) {
                self.page_header(1, total - (head.len().min(limit) - left.len()) as u32);
            }
            let room = (PAGE - self.bytes.len() % PAGE).min(left.len());
            self.bytes.extend(&left[..room]);
            left = &left[room..];
        }
        if limit >= head.len() {
            self.previous = start;
        }
        start
    }

    fn place(&self, segment: u64) -> SegmentPlace {
        let start = Lsn(self.start + segment * u64::from(SEGMENT_BYTES));
        SegmentPlace { start, size: segment_size(), timeline: Timeline(1), system_id: Some(SystemId(42)) }
    }

    fn segment(&self, number: usize) -> &[u8] {
        let size = SEGMENT_BYTES as usize;
        &self.bytes[number * size..self.bytes.len().min((number + 1) * size)]
    }
}

#[test]
fn a_record_across_segments_is_reported_where_it_ends_and_only_with_its_beginning() {
    let mut log = LogWriter::new();
    log.commit(1, 0, usize::MAX);
    log.commit(2, (2 << 20) + 5, usize::MAX);
    log.commit(3, 0, usize::MAX);
    let first = digest_segment(log.place(0), None, Duration::ZERO, log.segment(0)).unwrap();
    assert_eq!((first.end, first.valid_bytes, first.completions.len()), (SegmentEnd::Continues, 1 << 20, 1));
    let second = digest_segment(log.place(1), first.carry.clone(), Duration::ZERO, log.segment(1)).unwrap();
    assert_eq!((second.end, second.records), (SegmentEnd::Continues, 0));
    let third = digest_segment(log.place(2), second.carry, Duration::ZERO, log.segment(2)).unwrap();
    assert_eq!((third.headless, third.completions.len(), third.end), (false, 2, SegmentEnd::MoreToCome));

    let headless = digest_segment(log.place(1), None, Duration::ZERO, log.segment(1)).unwrap();
    assert!(headless.headless && headless.end == SegmentEnd::Continues);
    let headless = digest_segment(log.place(2), headless.carry, Duration::ZERO, log.segment(2)).unwrap();
    assert_eq!((headless.headless, headless.completions.len()), (true, 1));
    assert_eq!(headless.valid_bytes, third.valid_bytes);
    assert!(digest_segment(log.place(1), first.carry, Duration::ZERO, log.segment(2)).unwrap().valid_bytes == 0);
}

#[test]
fn a_continuation_that_a_crash_lost_is_overwritten_and_the_log_goes_on() {
    let mut log = LogWriter::new();
    log.commit(1, 0, usize::MAX);
    log.pad();
    let room = PAGE - log.bytes.len() % PAGE;
    log.commit(2, 20_000, room);
    assert_eq!(log.bytes.len() % PAGE, 0);
    log.page_header(8, 0);
    log.commit(3, 0, usize::MAX);
    let digest = digest_segment(log.place(0), None, Duration::ZERO, &log.bytes).unwrap();
    let times: Vec<i64> = digest.completions.iter().map(|completion| completion.at_us - 946_684_800_000_000).collect();
    assert_eq!((times, digest.end), (vec![1, 3], SegmentEnd::MoreToCome));
}

#[test]
fn a_stale_record_behind_the_last_one_is_not_taken_for_wal() {
    let mut log = LogWriter::new();
    log.commit(1, 0, usize::MAX);
    log.pad();
    let valid = log.bytes.len() as u32;
    log.previous -= 0x100_0000;
    log.commit(2, 0, usize::MAX);
    let digest = digest_segment(log.place(0), None, Duration::ZERO, &log.bytes).unwrap();
    assert_eq!((digest.valid_bytes, digest.completions.len()), (valid, 1));
    assert!(matches!(digest.end, SegmentEnd::Broken(EndReason::BrokenLink { .. })));
}

#[test]
fn a_page_of_a_later_timeline_ends_the_segment() {
    let mut log = LogWriter::new();
    log.commit(1, 3 * PAGE, usize::MAX);
    log.bytes[PAGE + 4] = 2;
    let digest = digest_segment(log.place(0), None, Duration::ZERO, &log.bytes).unwrap();
    assert_eq!(digest.end, SegmentEnd::Broken(EndReason::OtherTimeline { found: Timeline(2) }));
    assert_eq!(digest.valid_bytes, 0);
}

proptest! {
    #[test]
    fn any_portions_give_the_same_digest(which in 0..FIXTURES.len(), cuts in prop::collection::vec(1usize..9000, 1..40)) {
        let fixture = &FIXTURES[which];
        let whole = fixture.digest(fixture.bytes);
        let mut scan = SegmentScan::new(fixture.place(), None, Duration::ZERO).unwrap();
        let mut rest = fixture.bytes;
        for cut in cuts.iter().cycle() {
            let (portion, left) = rest.split_at((*cut).min(rest.len()));
            scan.feed(portion).unwrap();
            rest = left;
            if rest.is_empty() { break; }
        }
        let parts = scan.finish();
        prop_assert_eq!((parts.valid_bytes, parts.end, parts.records), (whole.valid_bytes, whole.end, whole.records));
        prop_assert_eq!(parts.completions, whole.completions);
    }

    #[test]
    fn damage_never_panics_and_never_hides_what_stood_before_it(
        which in 0..FIXTURES.len(),
        damage in prop::collection::vec((0usize..24_000, any::<u8>()), 1..6),
        length in 0usize..24_577,
    ) {
        let fixture = &FIXTURES[which];
        let mut bytes = fixture.bytes.to_vec();
        for (at, value) in &damage {
            if let Some(byte) = bytes.get_mut(*at) { *byte = *value; }
        }
        bytes.truncate(length);
        let first = damage.iter().map(|(at, _)| *at).chain([bytes.len()]).min().unwrap_or(0) as u64;
        // The first page's header may make the whole segment an error.
        if let Ok(digest) = digest_segment(fixture.place(), None, Duration::ZERO, &bytes) {
            prop_assert!(digest.valid_bytes as usize <= bytes.len());
            let ends: Vec<u64> = digest.completions.iter().map(|completion| completion.end.0 - fixture.start).collect();
            for (end, _) in fixture.completions.iter().filter(|(end, _)| *end <= first && first >= 40) {
                prop_assert!(ends.contains(end), "{end:x} of {ends:x?}");
            }
        }
    }

    #[test]
    fn noise_in_any_form_never_panics(
        magic in prop::sample::select(vec![0xD106u16, 0xD10D, 0xD110, 0xD113, 0xD116, 0xD118]),
        noise in prop::collection::vec(any::<u8>(), 40..20_000),
        body in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut log = LogWriter::new();
        log.commit(1, 0, usize::MAX);
        log.pad();
        // Bodies of nonsense under a right checksum reach the parsers of bodies.
        log.record(rmgr::XLOG, body.first().copied().unwrap_or(0x70), &body, usize::MAX);
        log.pad();
        log.bytes.extend(noise);
        log.bytes[..2].copy_from_slice(&magic.to_le_bytes());
        let digest = digest_segment(log.place(0), None, Duration::ZERO, &log.bytes).unwrap();
        prop_assert!(digest.records >= 2);
    }
}
