//! Reads PostgreSQL's WAL, releases 13 to 18: where it is valid, when transactions ended, what changed the log.
//!
//! The format is documented in src/include/access/{xlog_internal,xlogrecord}.h. WAL is foreign here: any bytes give an
//! answer, never a panic, and lengths found in it are believed only once a checksum or the bytes themselves bear them
//! out. Nothing here reads files or knows a server.

mod changes;
#[cfg(test)]
mod changes_tests;
mod decoder;
mod digest;
mod meaning;
mod page_header;
mod quiet;
mod record;
#[cfg(test)]
mod tests;
mod transactions;
#[cfg(test)]
mod waldump_tests;

use std::time::Duration;

use walfleet_repository::postgres::{Lsn, SystemId, Timeline};

pub use decoder::Carry;
pub use digest::{SegmentDigest, SegmentEnd, SegmentPlace, SegmentScan, digest_segment};
pub use meaning::{Completion, Outcome, ParameterChange, RestorePoint, WalLevel};
pub use page_header::LONG_HEADER;
pub use quiet::{MOST_QUIET_BYTES, changes_nothing};
pub use transactions::{FileChange, RelationName, RelationRows, RowCounts, Transaction, Transactions};

/// How much of a long record's body is held: enough for all block headers (33 of at most 27 bytes) and the beginning of
/// what follows, while a record may have a gigabyte.
pub const KEPT_BODY: usize = 64 << 10;

/// How far apart the completions of a digest are kept: what the stored form of commit times has (wal.proto).
pub const COMPLETION_SPACING: Duration = Duration::from_millis(100);

/// Why valid WAL ends where more bytes follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndReason {
    /// Never written: the usual end of a preallocated segment.
    Zeroes,
    /// No page header or record header can read so.
    Garbage,
    /// A page of another place in the log: a recycled file, not yet written again.
    OtherPlace {
        found: Lsn,
    },
    /// A page of a timeline that does not belong here.
    OtherTimeline {
        found: Timeline,
    },
    /// A record that does not follow the one before: what a recycled file held earlier.
    BrokenLink {
        found: Lsn,
    },
    WrongChecksum,
    /// A page that does not continue the record that ran into it, or continues one where none did.
    BrokenContinuation,
}

/// WAL that is of another log than expected, or of an unknown form.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum WalError {
    #[error("a WAL segment cannot start at {position}")]
    NotASegmentStart { position: Lsn },
    #[error("the carry leads to {carry}, the segment starts at {segment}")]
    CarryElsewhere { segment: Lsn, carry: Lsn },
    #[error(
        "the WAL segment at {segment} has page magic {magic:04X}, which no known release writes\n\
         HINT: walfleet reads the WAL of PostgreSQL 13 to 18."
    )]
    UnknownMagic { segment: Lsn, magic: u16 },
    #[error(
        "the WAL segment at {segment} belongs to system {found}, expected {expected}\n\
         HINT: this is the WAL of another PostgreSQL cluster."
    )]
    OtherSystem { segment: Lsn, expected: SystemId, found: SystemId },
    #[error("the WAL segment at {segment} says that segments have {found} bytes, expected {expected}")]
    OtherSegmentSize { segment: Lsn, expected: u32, found: u32 },
    #[error("the WAL segment at {segment} says that pages have {found} bytes, which is impossible")]
    PageSize { segment: Lsn, found: u32 },
}
