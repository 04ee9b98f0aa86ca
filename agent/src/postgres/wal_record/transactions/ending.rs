//! The record that ends a transaction, whole: its subtransactions and the files it removes
//! (xl_xact_commit, xl_xact_abort in src/include/access/xact.h; ParseCommitRecord and ParseAbortRecord in
//! src/backend/access/rmgrdesc/xactdesc.c, 13 to 18).

use crate::postgres::bytes;
use crate::postgres::wal_record::meaning::{Meaning, meaning};
use crate::postgres::wal_record::record::{MalformedRecord, Record};
use crate::postgres::wal_record::{Completion, Outcome};

use super::RelationName;

/// XLOG_XACT_HAS_INFO, in xl_info.
const HAS_INFO: u8 = 0x80;

/// Bits of xl_xact_xinfo. The parts stand in this order.
mod part {
    pub const DATABASE: u32 = 1 << 0;
    pub const SUBTRANSACTIONS: u32 = 1 << 1;
    pub const RELATIONS: u32 = 1 << 2;
    /// Since 15.
    pub const DROPPED_STATISTICS: u32 = 1 << 8;
    pub const INVALIDATIONS: u32 = 1 << 3;
    pub const TWO_PHASE: u32 = 1 << 4;
}

/// sizeof(SharedInvalidationMessage) (src/include/storage/sinval.h).
const INVALIDATION: usize = 16;

pub(super) struct Ending {
    pub outcome: Outcome,
    pub at_us: i64,
    /// Of the transaction that ends, which a prepared one's record names in its body.
    pub xid: u32,
    pub subtransactions: Vec<u32>,
    /// Files that go with it, all forks of each.
    pub dropped: Vec<RelationName>,
    /// The record is longer than what is kept of one; some of the above may be missing.
    pub is_cut: bool,
}

impl Ending {
    /// `None`: the record ends nothing.
    pub fn read(record: &Record<'_>) -> Result<Option<Ending>, MalformedRecord> {
        let Meaning::Completed(Completion { at_us, outcome, .. }) = meaning(record)? else { return Ok(None) };
        let mut ending =
            Ending { outcome, at_us, xid: record.xid, subtransactions: Vec::new(), dropped: Vec::new(), is_cut: false };
        let data = record.main_data()?;
        if record.info & HAS_INFO != 0 && ending.read_parts(record.version.major(), data).is_none() {
            // All of it is there: then it is not made as it says.
            if record.body.len() == record.body_len as usize {
                return Err(MalformedRecord(record.start));
            }
            ending.is_cut = true;
        }
        Ok(Some(ending))
    }

    /// `None` if the data ends before its parts do.
    fn read_parts(&mut self, major: u8, data: &[u8]) -> Option<()> {
        let mut rest = Rest { data, at: 8 };
        let parts = rest.u32()?;
        if parts & part::DATABASE != 0 {
            rest.skip(8)?;
        }
        if parts & part::SUBTRANSACTIONS != 0 {
            for _ in 0..rest.u32()? {
                self.subtransactions.push(rest.u32()?);
            }
        }
        if parts & part::RELATIONS != 0 {
            for _ in 0..rest.u32()? {
                let (tablespace, database) = (rest.u32()?, rest.u32()?);
                self.dropped.push(RelationName { tablespace, database, number: rest.u32()? });
            }
        }
        if parts & part::DROPPED_STATISTICS != 0 {
            // xl_xact_stats_item: 18 made the object's number one of 64 bits.
            let item = if major >= 18 { 16 } else { 12 };
            let count = rest.u32()? as usize;
            rest.skip(count.checked_mul(item)?)?;
        }
        if parts & part::INVALIDATIONS != 0 {
            let count = rest.u32()? as usize;
            rest.skip(count.checked_mul(INVALIDATION)?)?;
        }
        if parts & part::TWO_PHASE != 0 {
            self.xid = rest.u32()?;
        }
        Some(())
    }
}

struct Rest<'a> {
    data: &'a [u8],
    at: usize,
}

impl Rest<'_> {
    fn u32(&mut self) -> Option<u32> {
        let value = bytes::u32_at(self.data, self.at)?;
        self.at += 4;
        Some(value)
    }

    fn skip(&mut self, count: usize) -> Option<()> {
        self.at = self.at.checked_add(count).filter(|at| *at <= self.data.len())?;
        Some(())
    }
}
