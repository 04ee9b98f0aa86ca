//! Headers of WAL pages (src/include/access/xlog_internal.h) and the server versions their magic names.

use walfleet_repository::postgres::{Lsn, SystemId, Timeline};

use crate::postgres::bytes;

/// Every page but a segment's first (SizeOfXLogShortPHD).
pub(super) const SHORT_HEADER: usize = 24;
/// A segment's first page (SizeOfXLogLongPHD).
pub const LONG_HEADER: usize = 40;

const FIRST_IS_CONTRECORD: u16 = 0x1;
const LONG: u16 = 0x2;
/// The page takes the place of a continuation that a crash lost (CreateOverwriteContrecordRecord, xlog.c; 14 and the
/// minor releases of its time).
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x8;
const ALL_FLAGS: u16 = 0xF;

/// The release that wrote a WAL page, by XLOG_PAGE_MAGIC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WalVersion(u8);

impl WalVersion {
    /// `None` for a release that this program does not know. Read from live clusters of each release.
    pub fn from_magic(magic: u16) -> Option<WalVersion> {
        let major = match magic {
            0xD106 => 13,
            0xD10D => 14,
            0xD110 => 15,
            0xD113 => 16,
            0xD116 => 17,
            0xD118 => 18,
            _ => return None,
        };
        Some(WalVersion(major))
    }

    pub fn major(self) -> u8 {
        self.0
    }
}

/// How the first record of a page stands to the page before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PageStart {
    Record,
    /// So many bytes of the preceding page's record are still to come, this page's share included.
    Continuation(u32),
    /// The preceding page's record was never finished and is to be forgotten.
    Overwrite,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct PageHeader {
    pub magic: u16,
    pub timeline: Timeline,
    pub address: Lsn,
    pub start: PageStart,
    pub long: Option<LongHeader>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct LongHeader {
    pub system_id: SystemId,
    pub segment_bytes: u32,
    pub page_bytes: u32,
}

impl PageHeader {
    /// Bytes the header takes, from its first four; `None` if they are no header of any release.
    pub fn len(head: &[u8; 4]) -> Option<usize> {
        let [magic_low, magic_high, info_low, info_high] = *head;
        let info = u16::from_le_bytes([info_low, info_high]);
        // Every release since 9.3 has 0xD0.. or 0xD1..; the rest is zeroes or garbage.
        let plausible = matches!(magic_high, 0xD0 | 0xD1) && magic_low != 0 && info & !ALL_FLAGS == 0;
        plausible.then_some(if info & LONG != 0 { LONG_HEADER } else { SHORT_HEADER })
    }

    /// From exactly the bytes that [`PageHeader::len`] asked for.
    pub fn parse(head: &[u8]) -> Option<PageHeader> {
        let info = bytes::u16_at(head, 2)?;
        let rem_len = bytes::u32_at(head, 16)?;
        let start = if info & FIRST_IS_OVERWRITE_CONTRECORD != 0 {
            PageStart::Overwrite
        } else if info & FIRST_IS_CONTRECORD != 0 {
            PageStart::Continuation(rem_len)
        } else {
            PageStart::Record
        };
        let long = if info & LONG == 0 {
            None
        } else {
            Some(LongHeader {
                system_id: SystemId(bytes::u64_at(head, 24)?),
                segment_bytes: bytes::u32_at(head, 32)?,
                page_bytes: bytes::u32_at(head, 36)?,
            })
        };
        Some(PageHeader {
            magic: bytes::u16_at(head, 0)?,
            timeline: Timeline(bytes::u32_at(head, 4)?),
            address: Lsn(bytes::u64_at(head, 8)?),
            start,
            long,
        })
    }
}
