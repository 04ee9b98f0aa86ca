//! What each transaction did, gathered record by record: rows and files by relation, databases dropped, bytes of WAL.
//!
//! A record names the (sub)transaction that wrote it, and the record of a commit names the subtransactions that count with
//! it; so everything is summed by number until the end of the transaction is seen. Rows are those of heap records
//! (src/include/access/heapam_xlog.h, the same in 13 to 18 as far as it is read here). Files are told by their numbers:
//! WAL knows no names.
//!
//! Bounded: of more than [`MOST_ENTRIES`] things at once no more are noted, and what is not known to be whole says so.

mod ending;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};

use walfleet_repository::postgres::Lsn;

use super::record::{BlockReference, MalformedRecord, Record, rmgr};
use super::{Carry, Outcome, SegmentPlace, WalError};
use crate::postgres::bytes;
use crate::postgres::wal_record::decoder::Decoder;
use ending::Ending;

/// Operations of the heap's two managers (src/include/access/heapam_xlog.h); the eighth bit is XLOG_HEAP_INIT_PAGE.
mod heap {
    pub const MASK: u8 = 0x70;
    pub const INSERT: u8 = 0x00;
    pub const DELETE: u8 = 0x10;
    pub const UPDATE: u8 = 0x20;
    pub const TRUNCATE: u8 = 0x30;
    pub const HOT_UPDATE: u8 = 0x40;
    pub const INPLACE: u8 = 0x70;
    /// Of the second manager.
    pub const MULTI_INSERT: u8 = 0x50;

    /// Flags of xl_heap_delete: takes back a speculative insertion; moves a row to another partition.
    pub const DELETE_IS_SUPER: u8 = 1 << 3;
    pub const DELETE_IS_PARTITION_MOVE: u8 = 1 << 4;
}

/// XLOG_RUNNING_XACTS (src/include/storage/standbydefs.h).
const RUNNING_XACTS: u8 = 0x10;
/// XLOG_SMGR_CREATE (src/include/catalog/storage_xlog.h).
const SMGR_CREATE: u8 = 0x10;

/// FirstNormalObjectId (src/include/access/transam.h): what has a lower number is of a catalog. A catalog that was
/// rewritten has a higher one, and is taken for a table here.
const FIRST_NORMAL: u32 = 16384;
/// GLOBALTABLESPACE_OID (src/include/catalog/pg_tablespace.dat): shared catalogs.
const GLOBAL_TABLESPACE: u32 = 1664;

/// Open transactions, and relations and files noted of them, at once; some 20 MB.
pub const MOST_ENTRIES: usize = 1 << 18;
/// Relations told apart, and files remembered, of one transaction. The rows of others are summed.
const MOST_OF_ONE: usize = 64;
/// In-place updates of shared catalogs remembered: one stands just before a DROP DATABASE.
const IN_PLACE_KEPT: usize = 16;

/// A relation's files, by number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RelationName {
    pub tablespace: u32,
    /// 0 for a shared catalog.
    pub database: u32,
    /// The relfilenumber, which is the relation's OID until it is truncated or rewritten.
    pub number: u32,
}

impl RelationName {
    fn of(block: &BlockReference) -> RelationName {
        RelationName { tablespace: block.tablespace, database: block.database, number: block.relation }
    }

    fn is_catalog(&self) -> bool {
        self.number < FIRST_NORMAL || self.tablespace == GLOBAL_TABLESPACE
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct RowCounts {
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
}

impl RowCounts {
    fn add(&mut self, other: RowCounts) {
        self.inserted += other.inserted;
        self.updated += other.updated;
        self.deleted += other.deleted;
    }

    /// Rows that are not as they were.
    pub fn overwritten(&self) -> u64 {
        self.updated.saturating_add(self.deleted)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RelationRows {
    pub relation: RelationName,
    pub rows: RowCounts,
}

/// What became of the files that a commit removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileChange {
    Kept,
    /// Nothing took their place: a table or an index was dropped.
    Dropped,
    /// Empty ones took their place, or such that rows were put into afterwards.
    Truncated,
    /// Others took their place: VACUUM FULL, CLUSTER, REINDEX, ALTER TABLE; or something was dropped and another thing made.
    Replaced,
}

/// A transaction that committed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Transaction {
    /// As pg_xact_commit_timestamp() takes it: the low 32 bits.
    pub xid: u32,
    /// The server's clock at the commit, microseconds since the Unix epoch.
    pub at_us: i64,
    pub commit_start: Lsn,
    pub commit_end: Lsn,
    /// Replay that stops before the first record that begins here or later has nothing of it. Mostly the commit's record;
    /// of DROP DATABASE the first that destroys something, since replay removes the files before it comes to the commit.
    pub stop_before: Lsn,
    /// Of relations that are no catalogs: those with most rows first.
    pub rows: Vec<RelationRows>,
    /// Rows of relations beyond those.
    pub more_rows: RowCounts,
    /// Of catalogs: DDL.
    pub catalog_rows: u64,
    pub files: FileChange,
    /// Removed at the commit; the first of them.
    pub dropped: Vec<RelationName>,
    pub dropped_count: u64,
    /// Made in their place, or besides.
    pub created_count: u64,
    /// Of those, some were left without a page.
    pub left_empty: bool,
    /// Database and OID of tables that TRUNCATE named (wal_level = logical).
    pub truncated: Vec<(u32, u32)>,
    pub dropped_databases: Vec<u32>,
    /// Of its records, page images among them.
    pub wal_bytes: u64,
    /// Everything it wrote was seen; else all counts are at least.
    pub is_whole: bool,
}

impl Transaction {
    /// Rows of all relations that are no catalogs.
    pub fn all_rows(&self) -> RowCounts {
        let mut sum = self.more_rows;
        self.rows.iter().for_each(|of| sum.add(of.rows));
        sum
    }

    /// Whether it removed a table, its content or a database, as far as can be told.
    pub fn is_destructive(&self) -> bool {
        !self.dropped_databases.is_empty()
            || match self.files {
                FileChange::Dropped | FileChange::Truncated => true,
                FileChange::Replaced => self.left_empty,
                FileChange::Kept => false,
            }
    }
}

/// What is known so far of a transaction or a subtransaction.
#[derive(Clone, Default, Debug)]
struct Open {
    rows: Vec<RelationRows>,
    more_rows: RowCounts,
    catalog: RowCounts,
    created: Vec<Created>,
    created_count: u64,
    truncated: Vec<(u32, u32)>,
    dropped_databases: Vec<u32>,
    /// Where a row of a shared catalog that it deletes was updated in place shortly before.
    marked_at: Option<Lsn>,
    /// The first record that destroys something without waiting for the commit.
    destroys_at: Option<Lsn>,
    wal_bytes: u64,
    is_cut: bool,
}

#[derive(Clone, Copy, Debug)]
struct Created {
    relation: RelationName,
    has_pages: bool,
}

/// A row of a shared catalog that was updated in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct RowPlace {
    relation: RelationName,
    block: u32,
    offset: u16,
}

/// Gathers what transactions did, of the records it is shown in their order.
#[derive(Debug, Default)]
pub struct Transactions {
    open: HashMap<u32, Open>,
    /// Of `open` and in it.
    entries: usize,
    /// Numbers from this one on were given after the first record that was seen; `None`: not known yet.
    known_from: Option<u32>,
    /// There was a transaction that could not be noted.
    has_overflowed: bool,
    in_place: VecDeque<(RowPlace, Lsn)>,
}

impl Transactions {
    /// Reads a segment that follows the one read before, or stands for itself without a carry. Calls `each` for every
    /// commit. The carry for the next segment; `None` where valid WAL ends in this one.
    pub fn read_segment(
        &mut self,
        place: SegmentPlace,
        carry: Option<Carry>,
        bytes: &[u8],
        each: &mut impl FnMut(Transaction),
    ) -> Result<Option<Carry>, WalError> {
        if carry.is_none() {
            self.forget();
        }
        let mut decoder = Decoder::new(place.start, place.size, place.timeline, place.system_id, carry)?;
        decoder.feed(bytes, &mut |record| match self.note(record) {
            Ok(ended) => ended.into_iter().for_each(&mut *each),
            // Never seen in PostgreSQL's WAL. What it did is not known, but who did it.
            Err(_) => {
                self.open.entry(record.xid).or_default().is_cut = true;
                self.count_entries();
            }
        })?;
        Ok(decoder.into_carry())
    }

    /// Whether transactions were left out for their number.
    pub fn has_overflowed(&self) -> bool {
        self.has_overflowed
    }

    /// WAL is missing between what was seen and what comes.
    fn forget(&mut self) {
        *self = Transactions { has_overflowed: self.has_overflowed, ..Transactions::default() };
    }

    /// Takes in a record; the transaction that it commits, if it does.
    fn note(&mut self, record: &Record<'_>) -> Result<Option<Transaction>, MalformedRecord> {
        match record.rmgr {
            rmgr::XACT => {
                if let Some(ending) = Ending::read(record)? {
                    return Ok(self.end(record, ending));
                }
            }
            rmgr::STANDBY if record.operation() == RUNNING_XACTS => self.note_running(record)?,
            rmgr::HEAP if record.info & heap::MASK == heap::INPLACE => self.note_in_place(record)?,
            _ => {}
        }
        if record.xid == 0 {
            return Ok(None);
        }
        let marked_at = self.marked_before(record)?;
        let has_room = self.entries < MOST_ENTRIES;
        let open = match self.open.get_mut(&record.xid) {
            Some(open) => open,
            None if has_room => {
                self.entries += 1;
                self.open.entry(record.xid).or_default()
            }
            None => {
                self.has_overflowed = true;
                return Ok(None);
            }
        };
        let before = open.entries();
        open.marked_at = marked_at.or(open.marked_at);
        open.note(record, has_room)?;
        self.entries += open.entries() - before;
        Ok(None)
    }

    /// xl_running_xacts: counts, whether subtransactions are missing, then nextXid and oldestRunningXid. The record is
    /// written before any later number is given (LogStandbySnapshot, src/backend/storage/ipc/standby.c).
    fn note_running(&mut self, record: &Record<'_>) -> Result<(), MalformedRecord> {
        let data = record.main_data()?;
        let malformed = MalformedRecord(record.start);
        let next = bytes::u32_at(data, 12).ok_or(malformed)?;
        let oldest = bytes::u32_at(data, 16).ok_or(malformed)?;
        self.known_from.get_or_insert(next);
        // What is left of older ones ended in a crash.
        self.open.retain(|xid, _| !precedes(*xid, oldest));
        self.count_entries();
        Ok(())
    }

    fn count_entries(&mut self) {
        self.entries = self.open.values().map(|open| 1 + open.entries()).sum();
    }

    /// xl_heap_inplace begins with the row's offset in all releases.
    fn note_in_place(&mut self, record: &Record<'_>) -> Result<(), MalformedRecord> {
        let offset = bytes::u16_at(record.main_data()?, 0).ok_or(MalformedRecord(record.start))?;
        if let Some(block) = first_block(record)?.filter(|block| block.tablespace == GLOBAL_TABLESPACE) {
            self.in_place.truncate(IN_PLACE_KEPT - 1);
            let place = RowPlace { relation: RelationName::of(&block), block: block.block, offset };
            self.in_place.push_front((place, record.start));
        }
        Ok(())
    }

    /// Where the row that a record deletes was last updated in place. DROP DATABASE marks the database as invalid so, without
    /// a transaction, before it deletes its row (dropdb, src/backend/commands/dbcommands.c; 16, and minor releases of its
    /// time).
    fn marked_before(&self, record: &Record<'_>) -> Result<Option<Lsn>, MalformedRecord> {
        if record.rmgr != rmgr::HEAP || record.info & heap::MASK != heap::DELETE || self.in_place.is_empty() {
            return Ok(None);
        }
        let Some(block) = first_block(record)?.filter(|block| block.tablespace == GLOBAL_TABLESPACE) else {
            return Ok(None);
        };
        let offset = bytes::u16_at(record.main_data()?, 4).ok_or(MalformedRecord(record.start))?;
        let deleted = RowPlace { relation: RelationName::of(&block), block: block.block, offset };
        Ok(self.in_place.iter().find(|(place, _)| *place == deleted).map(|(_, at)| *at))
    }

    fn end(&mut self, record: &Record<'_>, ending: Ending) -> Option<Transaction> {
        let known = self.take(ending.xid);
        // One that was never noted wrote nothing, unless it could not be.
        let mut is_whole = (known.is_some() || !self.has_overflowed) && !ending.is_cut;
        is_whole &= self.known_from.is_some_and(|from| !precedes(ending.xid, from));
        let mut sum = known.unwrap_or_default();
        for sub in &ending.subtransactions {
            if let Some(part) = self.take(*sub) {
                sum.absorb(part);
            }
        }
        if ending.outcome == Outcome::Abort {
            return None;
        }
        is_whole &= !sum.is_cut;
        Some(sum.committed(record, ending, is_whole))
    }

    fn take(&mut self, xid: u32) -> Option<Open> {
        let taken = self.open.remove(&xid)?;
        self.entries -= 1 + taken.entries();
        Some(taken)
    }
}

impl Open {
    /// Of [`MOST_ENTRIES`].
    fn entries(&self) -> usize {
        self.rows.len() + self.created.len()
    }

    fn note(&mut self, record: &Record<'_>, has_room: bool) -> Result<(), MalformedRecord> {
        self.wal_bytes += record.total_len();
        let malformed = MalformedRecord(record.start);
        match record.rmgr {
            rmgr::HEAP => self.note_heap(record, has_room)?,
            rmgr::HEAP2 if record.info & heap::MASK == heap::MULTI_INSERT => {
                // xl_heap_multi_insert: flags, padding, ntuples.
                let inserted = bytes::u16_at(record.main_data()?, 2).ok_or(malformed)?.into();
                self.count(record, RowCounts { inserted, ..RowCounts::default() }, has_room)?;
            }
            rmgr::SMGR if record.operation() == SMGR_CREATE => {
                let data = record.main_data()?;
                let word = |at| bytes::u32_at(data, at).ok_or(malformed);
                let relation = RelationName { tablespace: word(0)?, database: word(4)?, number: word(8)? };
                self.create(relation, has_room);
            }
            rmgr::DBASE => {
                if let Some(database) = dropped_database(record)? {
                    self.destroys_at.get_or_insert(self.marked_at.unwrap_or(record.start).min(record.start));
                    push_bounded(&mut self.dropped_databases, database);
                }
            }
            _ => {}
        }
        if !self.created.is_empty() {
            record.for_each_block(|block| self.fill(RelationName::of(&block)))?;
        }
        Ok(())
    }

    fn note_heap(&mut self, record: &Record<'_>, has_room: bool) -> Result<(), MalformedRecord> {
        let (inserted, updated, deleted) = match record.info & heap::MASK {
            heap::INSERT => (1, 0, 0),
            heap::UPDATE | heap::HOT_UPDATE => (0, 1, 0),
            // xl_heap_delete: xmax, offnum, infobits_set, flags.
            heap::DELETE => {
                match bytes::u8_at(record.main_data()?, 7).ok_or(MalformedRecord(record.start))? {
                    flags if flags & heap::DELETE_IS_SUPER != 0 => return Ok(()),
                    // The row is inserted elsewhere by a record of its own.
                    flags if flags & heap::DELETE_IS_PARTITION_MOVE != 0 => (0, 1, 0),
                    _ => (0, 0, 1),
                }
            }
            heap::TRUNCATE => return self.note_truncate(record),
            _ => return Ok(()),
        };
        self.count(record, RowCounts { inserted, updated, deleted }, has_room)
    }

    /// xl_heap_truncate: the database, how many tables and sequences, flags, their OIDs.
    fn note_truncate(&mut self, record: &Record<'_>) -> Result<(), MalformedRecord> {
        let data = record.main_data()?;
        let word = |at| bytes::u32_at(data, at).ok_or(MalformedRecord(record.start));
        let (database, count) = (word(0)?, word(4)? as usize);
        for index in 0..count.min(MOST_OF_ONE) {
            push_bounded(&mut self.truncated, (database, word(12 + 4 * index)?));
        }
        Ok(())
    }

    /// Rows of the relation whose page the record names first: of an update the new row's.
    fn count(&mut self, record: &Record<'_>, rows: RowCounts, has_room: bool) -> Result<(), MalformedRecord> {
        let block = first_block(record)?.ok_or(MalformedRecord(record.start))?;
        let relation = RelationName::of(&block);
        if relation.is_catalog() {
            self.catalog.add(rows);
        } else {
            self.add_rows(relation, rows, has_room);
        }
        Ok(())
    }

    fn add_rows(&mut self, relation: RelationName, rows: RowCounts, has_room: bool) {
        if let Some(known) = self.rows.iter_mut().rev().find(|known| known.relation == relation) {
            known.rows.add(rows);
        } else if has_room && self.rows.len() < MOST_OF_ONE {
            self.rows.push(RelationRows { relation, rows });
        } else {
            self.more_rows.add(rows);
        }
    }

    fn create(&mut self, relation: RelationName, has_room: bool) {
        if self.created.iter().any(|created| created.relation == relation) {
            // Another fork of it.
        } else if has_room && self.created.len() < MOST_OF_ONE {
            self.created.push(Created { relation, has_pages: false });
            self.created_count += 1;
        } else {
            self.created_count += 1;
            self.is_cut |= !has_room;
        }
    }

    fn fill(&mut self, relation: RelationName) {
        if let Some(created) = self.created.iter_mut().find(|created| created.relation == relation) {
            created.has_pages = true;
        }
    }

    fn absorb(&mut self, part: Open) {
        part.rows.iter().for_each(|of| self.add_rows(of.relation, of.rows, true));
        self.more_rows.add(part.more_rows);
        self.catalog.add(part.catalog);
        for created in &part.created {
            self.create(created.relation, true);
            if created.has_pages {
                self.fill(created.relation);
            }
        }
        self.created_count += part.created_count - part.created.len() as u64;
        part.truncated.into_iter().for_each(|table| push_bounded(&mut self.truncated, table));
        part.dropped_databases.into_iter().for_each(|database| push_bounded(&mut self.dropped_databases, database));
        self.destroys_at = [self.destroys_at, part.destroys_at].into_iter().flatten().min();
        self.wal_bytes += part.wal_bytes;
        self.is_cut |= part.is_cut;
    }

    fn committed(mut self, record: &Record<'_>, ending: Ending, is_whole: bool) -> Transaction {
        // What it made itself and removed again was nobody's.
        let own: Vec<RelationName> = self.created.iter().map(|created| created.relation).collect();
        let mut dropped = ending.dropped;
        dropped.retain(|relation| !own.contains(relation));
        self.rows.retain(|of| of.rows != RowCounts::default());
        self.rows.sort_by_key(|of| {
            (std::cmp::Reverse(of.rows.overwritten()), std::cmp::Reverse(of.rows.inserted), of.relation)
        });
        let (files, left_empty) = self.file_change(!dropped.is_empty());
        let dropped_count = dropped.len() as u64;
        dropped.truncate(MOST_OF_ONE);
        Transaction {
            xid: ending.xid,
            at_us: ending.at_us,
            commit_start: record.start,
            commit_end: record.end,
            stop_before: self.destroys_at.unwrap_or(record.start),
            rows: self.rows,
            more_rows: self.more_rows,
            catalog_rows: self.catalog.inserted + self.catalog.overwritten(),
            files,
            dropped,
            dropped_count,
            created_count: self.created_count,
            left_empty,
            truncated: self.truncated,
            dropped_databases: self.dropped_databases,
            wal_bytes: self.wal_bytes + record.total_len(),
            is_whole,
        }
    }

    /// TRUNCATE gives each file a successor and changes rows of pg_class, but inserts none; the table's own successor stays
    /// without a page unless rows are inserted (ExecuteTruncateGuts, src/backend/commands/tablecmds.c). An index's gets its
    /// first pages at once, and REINDEX makes nothing but those. All that rewrites tables makes a transient one, which is
    /// entered into pg_class (make_new_heap, src/backend/commands/cluster.c).
    fn file_change(&self, is_any_dropped: bool) -> (FileChange, bool) {
        let has_rows = |created: &Created| self.rows.iter().any(|of| of.relation == created.relation);
        let left_empty = self.created.iter().any(|created| !created.has_pages && !has_rows(created));
        let change = if !self.truncated.is_empty() {
            FileChange::Truncated
        } else if !is_any_dropped {
            FileChange::Kept
        } else if self.created_count == 0 {
            FileChange::Dropped
        } else if self.catalog.inserted == 0 && (left_empty || self.created.iter().any(has_rows)) {
            FileChange::Truncated
        } else {
            FileChange::Replaced
        };
        (change, left_empty)
    }
}

/// xl_dbase_drop_rec begins with the database; 15 put a second way to create before the drop
/// (src/include/commands/dbcommands_xlog.h).
fn dropped_database(record: &Record<'_>) -> Result<Option<u32>, MalformedRecord> {
    let drop = if record.version.major() < 15 { 0x10 } else { 0x20 };
    if record.operation() != drop {
        return Ok(None);
    }
    bytes::u32_at(record.main_data()?, 0).map(Some).ok_or(MalformedRecord(record.start))
}

fn first_block(record: &Record<'_>) -> Result<Option<BlockReference>, MalformedRecord> {
    let mut first = None;
    record.for_each_block(|block| {
        first.get_or_insert(block);
    })?;
    Ok(first)
}

fn push_bounded<T>(list: &mut Vec<T>, item: T) {
    if list.len() < MOST_OF_ONE {
        list.push(item);
    }
}

/// TransactionIdPrecedes (src/backend/access/transam/transam.c): numbers go round.
fn precedes(one: u32, other: u32) -> bool {
    (one.wrapping_sub(other) as i32) < 0
}
