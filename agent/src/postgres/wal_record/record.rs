//! One WAL record as it lies in the log: its header, its block references, its main data
//! (src/include/access/xlogrecord.h; DecodeXLogRecord, src/backend/access/transam/xlogreader.c).

use walfleet_repository::checksum;
use walfleet_repository::postgres::Lsn;

use super::page_header::WalVersion;
use crate::postgres::bytes;

/// SizeOfXLogRecord.
pub(super) const HEADER: usize = 24;
/// The checksum covers the body, then this much of the header: all before xl_crc.
const HEADER_BEFORE_CRC: usize = 20;
/// XLogRecordMaxSize of 16 and later; earlier releases stop at the allocator's 1 GiB, and no writer comes near either.
const MAX_TOTAL: u32 = 0x3FFF_FFFF;

/// Resource managers (src/include/access/rmgrlist.h; the order is the same in 13 to 18).
pub mod rmgr {
    pub const XLOG: u8 = 0;
    pub const XACT: u8 = 1;
    pub const SMGR: u8 = 2;
    pub const DBASE: u8 = 4;
    pub const STANDBY: u8 = 8;
    pub const HEAP2: u8 = 9;
    pub const HEAP: u8 = 10;
    pub const SPGIST: u8 = 16;
    /// RM_LOGICALMSG_ID, the last built-in one.
    pub const LAST_BUILTIN: u8 = 21;
    /// RM_MIN_CUSTOM_ID, since 15.
    pub const FIRST_CUSTOM: u8 = 128;
}

/// The fixed part of a record.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordHeader {
    pub total: u32,
    pub xid: u32,
    pub prev: Lsn,
    pub info: u8,
    pub rmgr: u8,
    pub crc: u32,
}

impl RecordHeader {
    pub fn parse(head: &[u8]) -> Option<RecordHeader> {
        Some(RecordHeader {
            total: bytes::u32_at(head, 0)?,
            xid: bytes::u32_at(head, 4)?,
            prev: Lsn(bytes::u64_at(head, 8)?),
            info: bytes::u8_at(head, 16)?,
            rmgr: bytes::u8_at(head, 17)?,
            crc: bytes::u32_at(head, 20)?,
        })
    }

    pub fn is_length_possible(total: u32) -> bool {
        total >= HEADER as u32 && total <= MAX_TOTAL
    }

    pub fn is_manager_possible(&self, version: WalVersion) -> bool {
        self.rmgr <= rmgr::LAST_BUILTIN || (self.rmgr >= rmgr::FIRST_CUSTOM && version.major() >= 15)
    }

    /// `body_crc` is the CRC-32C of everything after the header (ValidXLogRecord, xlogreader.c).
    pub fn is_crc_right(&self, head: &[u8], body_crc: u32) -> bool {
        head.get(..HEADER_BEFORE_CRC).is_some_and(|covered| checksum::crc32c_append(body_crc, covered) == self.crc)
    }
}

/// A record whose checksum was right.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    pub version: WalVersion,
    pub start: Lsn,
    /// Start of the record before.
    pub previous: Lsn,
    /// Where the next record begins, unless a page header stands there: the end, rounded up to 8 bytes.
    pub end: Lsn,
    /// The transaction that wrote it, a subtransaction under its own number; 0: none had a number yet.
    pub xid: u32,
    pub rmgr: u8,
    /// xl_info whole; the manager's own bits are the upper four.
    pub info: u8,
    /// What follows the header; cut at [`super::KEPT_BODY`] bytes.
    pub body: &'a [u8],
    /// Bytes that follow the header in the log.
    pub body_len: u32,
}

/// A page that a record changes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockReference {
    pub tablespace: u32,
    pub database: u32,
    pub relation: u32,
    /// 0 main, 1 free space map, 2 visibility map, 3 init (ForkNumber, src/include/common/relpath.h).
    pub fork: u8,
    pub block: u32,
    /// Replay needs nothing of the page's former content: it is initialised anew or an image replaces it.
    pub overwritten: bool,
}

/// A body that is not made as its own headers say, though the record's checksum is right.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the record at {0} does not read as its own headers say")]
pub struct MalformedRecord(pub Lsn);

impl<'a> Record<'a> {
    /// The resource manager's own operation code.
    pub fn operation(&self) -> u8 {
        self.info & 0xF0
    }

    /// Of header and body.
    pub fn total_len(&self) -> u64 {
        HEADER as u64 + u64::from(self.body_len)
    }

    /// The payload that belongs to no block; its beginning, if the body was cut.
    pub fn main_data(&self) -> Result<&'a [u8], MalformedRecord> {
        let mut fragments = Fragments::of(self);
        while fragments.next_block().map_err(|()| self.malformed())?.is_some() {}
        let length = fragments.main_len;
        let start = (self.body_len as usize).checked_sub(length).ok_or(self.malformed())?;
        if start < fragments.at {
            return Err(self.malformed());
        }
        let end = self.body.len().min(start.saturating_add(length));
        Ok(self.body.get(start..end).unwrap_or_default())
    }

    /// Calls `each` for every page the record refers to.
    pub fn for_each_block(&self, mut each: impl FnMut(BlockReference)) -> Result<(), MalformedRecord> {
        let mut fragments = Fragments::of(self);
        while let Some(block) = fragments.next_block().map_err(|()| self.malformed())? {
            each(block);
        }
        Ok(())
    }

    fn malformed(&self) -> MalformedRecord {
        MalformedRecord(self.start)
    }
}

/// XLR_MAX_BLOCK_ID.
const LAST_BLOCK_ID: u8 = 32;
const TOPLEVEL_XID: u8 = 252;
const ORIGIN: u8 = 253;
const DATA_LONG: u8 = 254;
const DATA_SHORT: u8 = 255;

const FORK_MASK: u8 = 0x0F;
const HAS_IMAGE: u8 = 0x10;
const WILL_INIT: u8 = 0x40;
const SAME_RELATION: u8 = 0x80;
const IMAGE_HAS_HOLE: u8 = 0x01;

/// Walks the fragment headers at a body's beginning. It stops where they have accounted for all that follows them.
struct Fragments<'a> {
    version: WalVersion,
    body: &'a [u8],
    body_len: usize,
    at: usize,
    /// Bytes of images, block data and main data announced so far.
    announced: usize,
    main_len: usize,
    relation: Option<(u32, u32, u32)>,
}

impl<'a> Fragments<'a> {
    fn of(record: &Record<'a>) -> Fragments<'a> {
        let body_len = record.body_len as usize;
        Fragments {
            version: record.version,
            body: record.body,
            body_len,
            at: 0,
            announced: 0,
            main_len: 0,
            relation: None,
        }
    }

    fn next_block(&mut self) -> Result<Option<BlockReference>, ()> {
        while self.body_len.saturating_sub(self.at) > self.announced {
            match self.u8()? {
                DATA_SHORT => {
                    let length = usize::from(self.u8()?);
                    self.announce_main(length)?;
                }
                DATA_LONG => {
                    let length = self.u32()? as usize;
                    self.announce_main(length)?;
                }
                ORIGIN => self.skip(2)?,
                TOPLEVEL_XID => self.skip(4)?,
                id if id <= LAST_BLOCK_ID => return self.block().map(Some),
                _ => return Err(()),
            }
        }
        Ok(None)
    }

    fn block(&mut self) -> Result<BlockReference, ()> {
        let flags = self.u8()?;
        let data_len = self.u16()?;
        self.announce(usize::from(data_len))?;
        let mut applied = false;
        if flags & HAS_IMAGE != 0 {
            let image_len = self.u16()?;
            self.skip(2)?;
            let image = self.u8()?;
            // The flags moved with 15, when compression methods were added.
            let (apply, compressed) = if self.version.major() >= 15 { (0x02, 0x1C) } else { (0x04, 0x02) };
            applied = image & apply != 0;
            if image & compressed != 0 && image & IMAGE_HAS_HOLE != 0 {
                self.skip(2)?;
            }
            self.announce(usize::from(image_len))?;
        }
        if flags & SAME_RELATION == 0 {
            self.relation = Some((self.u32()?, self.u32()?, self.u32()?));
        }
        let (tablespace, database, relation) = self.relation.ok_or(())?;
        Ok(BlockReference {
            tablespace,
            database,
            relation,
            fork: flags & FORK_MASK,
            block: self.u32()?,
            overwritten: applied || flags & WILL_INIT != 0,
        })
    }

    fn announce_main(&mut self, length: usize) -> Result<(), ()> {
        self.main_len = length;
        self.announce(length)
    }

    fn announce(&mut self, length: usize) -> Result<(), ()> {
        self.announced += length;
        if self.announced > self.body_len { Err(()) } else { Ok(()) }
    }

    fn skip(&mut self, count: usize) -> Result<(), ()> {
        self.at += count;
        if self.at > self.body.len() { Err(()) } else { Ok(()) }
    }

    fn u8(&mut self) -> Result<u8, ()> {
        let value = bytes::u8_at(self.body, self.at).ok_or(())?;
        self.at += 1;
        Ok(value)
    }

    fn u16(&mut self) -> Result<u16, ()> {
        let value = bytes::u16_at(self.body, self.at).ok_or(())?;
        self.at += 2;
        Ok(value)
    }

    fn u32(&mut self) -> Result<u32, ()> {
        let value = bytes::u32_at(self.body, self.at).ok_or(())?;
        self.at += 4;
        Ok(value)
    }
}
