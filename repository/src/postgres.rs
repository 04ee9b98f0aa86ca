//! PostgreSQL's own coordinates: WAL positions, timelines, segments and system identifiers.
//!
//! Pure values with their textual forms; nothing here reads a server or a file.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A position in the WAL: bytes since the beginning of the cluster's log.
///
/// Printed as PostgreSQL does, two hexadecimal halves (`pg_lsn`, src/backend/utils/adt/pg_lsn.c).
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    pub const INVALID: Lsn = Lsn(0);

    /// The first position of the segment that contains this one.
    pub fn segment_start(self, size: SegmentSize) -> Lsn {
        Lsn(self.0 - self.0 % u64::from(size.bytes()))
    }

    /// The number of the segment that contains this position.
    pub fn segment_number(self, size: SegmentSize) -> u64 {
        self.0 / u64::from(size.bytes())
    }

    pub fn segment_offset(self, size: SegmentSize) -> u32 {
        (self.0 % u64::from(size.bytes())) as u32
    }

    pub fn checked_add(self, bytes: u64) -> Option<Lsn> {
        self.0.checked_add(bytes).map(Lsn)
    }

    pub fn saturating_sub(self, other: Lsn) -> u64 {
        self.0.saturating_sub(other.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A textual form that is not what it should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseError {
    #[error("\"{0}\" is not a WAL position\nHINT: write it as PostgreSQL does, for example 0/3000060.")]
    Lsn(String),
    #[error("\"{0}\" is not a WAL segment name\nHINT: a segment name has 24 hexadecimal digits.")]
    SegmentName(String),
    #[error("\"{0}\" is not a timeline history file name\nHINT: it has 8 hexadecimal digits and ends in .history.")]
    HistoryName(String),
    #[error("{0} bytes is not a WAL segment size\nHINT: it is a power of two from 1 MiB to 1 GiB.")]
    SegmentSize(u64),
    #[error("{0} is not a timeline\nHINT: timelines count from 1.")]
    Timeline(u32),
    #[error("\"{0}\" is not a branch\nHINT: a branch has 16 hexadecimal digits.")]
    Branch(String),
}

impl FromStr for Lsn {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parse = || {
            let (high, low) = text.split_once('/')?;
            let half = |part: &str| {
                let digits = (1..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
                if digits { u64::from_str_radix(part, 16).ok() } else { None }
            };
            Some(Lsn(half(high)? << 32 | half(low)?))
        };
        parse().ok_or_else(|| ParseError::Lsn(text.to_owned()))
    }
}

impl Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A timeline id, from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timeline(pub u32);

impl Timeline {
    pub const FIRST: Timeline = Timeline(1);

    pub fn new(id: u32) -> Result<Timeline, ParseError> {
        if id == 0 { Err(ParseError::Timeline(id)) } else { Ok(Timeline(id)) }
    }

    /// `0000000N.history` (TLHistoryFileName, src/include/access/xlog_internal.h).
    pub fn history_name(self) -> String {
        format!("{:08X}.history", self.0)
    }

    pub fn from_history_name(name: &str) -> Result<Timeline, ParseError> {
        let parse = || {
            let digits = name.strip_suffix(".history")?;
            if digits.len() != 8 || !digits.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)) {
                return None;
            }
            Timeline::new(u32::from_str_radix(digits, 16).ok()?).ok()
        };
        parse().ok_or_else(|| ParseError::HistoryName(name.to_owned()))
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The identity that initdb gives a cluster (`pg_control_system().system_identifier`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Bytes of a WAL segment: a power of two from 1 MiB to 1 GiB (IsValidWalSegSize, xlog_internal.h).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SegmentSize(u32);

impl SegmentSize {
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);

    pub fn new(bytes: u64) -> Result<SegmentSize, ParseError> {
        if bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes) {
            Ok(SegmentSize(bytes as u32))
        } else {
            Err(ParseError::SegmentSize(bytes))
        }
    }

    pub fn bytes(self) -> u32 {
        self.0
    }

    /// Segments in the 4 GiB that share the middle part of a name.
    fn per_xlog_id(self) -> u64 {
        0x1_0000_0000 / u64::from(self.0)
    }
}

/// A WAL segment by timeline and number, printed as its file name (XLogFileName, xlog_internal.h).
///
/// The name depends on the segment size, so both conversions take it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Segment {
    pub timeline: Timeline,
    pub number: u64,
}

impl Segment {
    pub fn containing(timeline: Timeline, lsn: Lsn, size: SegmentSize) -> Segment {
        Segment { timeline, number: lsn.segment_number(size) }
    }

    pub fn start(self, size: SegmentSize) -> Lsn {
        Lsn(self.number.saturating_mul(u64::from(size.bytes())))
    }

    pub fn end(self, size: SegmentSize) -> Lsn {
        Lsn(self.start(size).0.saturating_add(u64::from(size.bytes())))
    }

    /// So many bytes behind its start.
    pub fn at(self, size: SegmentSize, offset: u32) -> Lsn {
        Lsn(self.start(size).0.saturating_add(u64::from(offset)))
    }

    pub fn next(self) -> Segment {
        Segment { number: self.number + 1, ..self }
    }

    pub fn file_name(self, size: SegmentSize) -> String {
        let per_id = size.per_xlog_id();
        format!("{:08X}{:08X}{:08X}", self.timeline.0, self.number / per_id, self.number % per_id)
    }

    pub fn from_file_name(name: &str, size: SegmentSize) -> Result<Segment, ParseError> {
        let parse = || {
            if name.len() != 24 || !name.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)) {
                return None;
            }
            let part = |range: std::ops::Range<usize>| u32::from_str_radix(name.get(range)?, 16).ok();
            let low = u64::from(part(16..24)?);
            if low >= size.per_xlog_id() {
                return None;
            }
            let timeline = Timeline::new(part(0..8)?).ok()?;
            Some(Segment { timeline, number: u64::from(part(8..16)?) * size.per_xlog_id() + low })
        };
        parse().ok_or_else(|| ParseError::SegmentName(name.to_owned()))
    }
}

/// Which of several timelines with one number is meant: the first 8 bytes of BLAKE3 of the history file, zero for a
/// timeline without one. Two promotions to the same number share a name only if they left the same parent at the same
/// position for the same reason. Where two servers write one branch, the second to store a segment gets a branch of its own
/// ([`crate::format::wal_history::Divergence`]; `docs/format.md`, section 11).
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Branch(pub [u8; 8]);

impl Branch {
    /// The first timeline's, which has no history file.
    pub const ROOT: Branch = Branch([0; 8]);

    pub fn of_history(content: &[u8]) -> Branch {
        let digest = blake3::hash(content);
        let mut branch = [0; 8];
        branch.copy_from_slice(&digest.as_bytes()[..8]);
        Branch(branch)
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Branch {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let bad = || ParseError::Branch(text.to_owned());
        if text.len() != 16 || !text.is_ascii() {
            return Err(bad());
        }
        u64::from_str_radix(text, 16).map(|value| Branch(value.to_be_bytes())).map_err(|_| bad())
    }
}

/// One stretch of WAL's home: what stands between `wal/` and the segment in every key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WalBranch {
    pub system_id: SystemId,
    pub timeline: Timeline,
    pub branch: Branch,
}

impl WalBranch {
    /// Whether it is the one that initdb began: no history says where it comes from.
    pub fn is_first(&self) -> bool {
        self.timeline == Timeline::FIRST && self.branch == Branch::ROOT
    }
}

/// A parsed timeline history file: where each ancestor ended (readTimeLineHistory, src/backend/access/transam/timeline.c).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TimelineHistory {
    pub timeline: Timeline,
    /// Oldest first: the ancestor and the position at which its successor branched off.
    pub ancestors: Vec<(Timeline, Lsn)>,
}

/// A history file that does not read as one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HistoryError {
    #[error("line {line} of {name} is not a timeline, a position and a reason: \"{text}\"")]
    Syntax { name: String, line: usize, text: String },
    #[error("line {line} of {name}: timelines and positions must ascend")]
    Order { name: String, line: usize },
}

impl TimelineHistory {
    pub fn parse(timeline: Timeline, content: &[u8]) -> Result<TimelineHistory, HistoryError> {
        let name = timeline.history_name();
        let mut ancestors: Vec<(Timeline, Lsn)> = Vec::new();
        for (index, text) in String::from_utf8_lossy(content).lines().enumerate() {
            let line = index + 1;
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let mut fields = text.split_whitespace();
            let parsed = (|| {
                let ancestor = Timeline::new(fields.next()?.parse().ok()?).ok()?;
                let lsn: Lsn = fields.next()?.parse().ok()?;
                Some((ancestor, lsn))
            })();
            let Some(entry) = parsed else {
                return Err(HistoryError::Syntax { name, line, text: text.to_owned() });
            };
            let ascends = ancestors.last().is_none_or(|last| last.0 < entry.0 && last.1 <= entry.1);
            if !ascends || entry.0 >= timeline {
                return Err(HistoryError::Order { name, line });
            }
            ancestors.push(entry);
        }
        Ok(TimelineHistory { timeline, ancestors })
    }

    /// The timeline whose WAL holds `lsn` on the way to this timeline.
    pub fn timeline_at(&self, lsn: Lsn) -> Timeline {
        self.ancestors.iter().find(|(_, end)| lsn < *end).map_or(self.timeline, |(ancestor, _)| *ancestor)
    }

    /// Where `timeline` ends on the way to this one; `None` for this one itself and for strangers.
    pub fn switch_point(&self, timeline: Timeline) -> Option<Lsn> {
        self.ancestors.iter().find(|(ancestor, _)| *ancestor == timeline).map(|(_, end)| *end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_print_and_parse_as_postgres_does() {
        assert_eq!("0/3000060".parse::<Lsn>().unwrap(), Lsn(0x300_0060));
        assert_eq!(Lsn(0x1_0000_00A0).to_string(), "1/A0");
        for bad in ["", "0", "0/", "/0", "0/123456789", "g/1", "+1/0", "0/0/0", "1/ 2"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }

    #[test]
    fn segment_names_follow_the_segment_size() {
        let sixteen = SegmentSize::DEFAULT;
        let segment = Segment { timeline: Timeline(1), number: 257 };
        assert_eq!(segment.file_name(sixteen), "000000010000000100000001");
        assert_eq!(Segment::from_file_name("000000010000000100000001", sixteen), Ok(segment));
        let big = SegmentSize::new(1 << 30).unwrap();
        assert_eq!(Segment { timeline: Timeline(2), number: 5 }.file_name(big), "000000020000000100000001");
        assert!(Segment::from_file_name("000000010000000000000004", big).is_err(), "1 GiB segments count to 3");
        assert!(Segment::from_file_name("00000000000000000000000A", sixteen).is_err(), "no timeline 0");
        assert!(Segment::from_file_name("000000010000000100000001.partial", sixteen).is_err());
        assert!(SegmentSize::new(3 << 20).is_err());
    }

    #[test]
    fn a_history_leads_from_any_position_to_its_timeline() {
        let text = b"1\t0/3000000\tno recovery target specified\n\n2\t0/5000000\tbefore 2026\n";
        let history = TimelineHistory::parse(Timeline(3), text).unwrap();
        assert_eq!(history.timeline_at(Lsn(0x2FF_FFFF)), Timeline(1));
        assert_eq!(history.timeline_at(Lsn(0x300_0000)), Timeline(2));
        assert_eq!(history.timeline_at(Lsn(0x600_0000)), Timeline(3));
        assert!(TimelineHistory::parse(Timeline(3), b"2\t0/5\tx\n1\t0/6\tx\n").is_err());
        assert!(TimelineHistory::parse(Timeline(3), b"nonsense").is_err());
    }
}
