//! The pages that records change, gathered as WAL passes: what PostgreSQL 17's own summarizer gathers
//! (src/backend/postmaster/walsummarizer.c), from the WAL of every supported release.
//!
//! Left out, with reasons:
//! - free space and visibility maps: not fully logged, or only by implication; whoever copies reads them
//! - relations dropped at the end of a transaction (SummarizeXactRecord): a file that takes the name later begins with
//!   a record of its creation, which cuts the fork to nothing, as log_smgrcreate is called for each permanent fork and
//!   each init fork (src/backend/catalog/storage.c); until then there is no file, or an empty one (mdunlinkfork,
//!   src/backend/storage/smgr/md.c)
//! - pages of zeros that a file is extended by ahead of their use (RelationAddBlocks, src/backend/access/heap/hio.c)
//!   are logged by nobody: what lies behind the former end of a file is to be read
//!
//! Which pages of an SP-GiST index had room last is kept on its first page and logged by nobody (SpGistUpdateMetaPage,
//! src/backend/access/spgist/spgutils.c), so that page is named with any other of the index. A vacuum that finds nothing
//! may change it all the same: a hint that may be old, as after a crash.
//!
//! Replay with `wal_level = minimal` logs less than all changes; a change of the level is told apart ([`Changes::finish`]).

use walfleet_repository::format::changed_blocks::{ChangedBlocks, ForkName};

use super::meaning::Meaning;
use super::record::{MalformedRecord, Record, rmgr};
use crate::postgres::bytes;
use crate::postgres::relation::Fork;

/// Operations of the storage manager (src/include/catalog/storage_xlog.h).
mod smgr {
    pub const CREATE: u8 = 0x10;
    pub const TRUNCATE: u8 = 0x20;
    pub const TRUNCATE_HEAP: u32 = 0x01;
}

/// Operations on databases (src/include/commands/dbcommands_xlog.h). 15 put a second way to create before the drop.
mod dbase {
    pub const CREATE_FILE_COPY: u8 = 0x00;
    pub const CREATE_WAL_LOG: u8 = 0x10;
    pub const DROP_BEFORE_15: u8 = 0x10;
    pub const DROP: u8 = 0x20;
}

/// SPGIST_METAPAGE_BLKNO (src/include/access/spgist_private.h).
const SPGIST_METAPAGE: u32 = 0;

/// Gathers the changes of the records it is shown.
#[derive(Debug, Default)]
pub struct Changes {
    blocks: ChangedBlocks,
    recent: Recent,
    incomplete: bool,
}

/// Pages that were noted lately, each in the place that its name falls on. Most records change a page that another one
/// did shortly before; and what was noted once, a later cut covers.
#[derive(Debug)]
struct Recent(Vec<Option<(ForkName, u32)>>);

impl Recent {
    const BITS: u32 = 10;

    /// Whether the page is among them; it is from now on.
    fn knows(&mut self, name: ForkName, block: u32) -> bool {
        let mixed = name.relation.wrapping_mul(0x9E37_79B1).wrapping_add(block).wrapping_mul(0x85EB_CA6B);
        let Some(place) = self.0.get_mut((mixed >> (32 - Recent::BITS)) as usize) else { return false };
        place.replace((name, block)) == Some((name, block))
    }
}

impl Default for Recent {
    fn default() -> Recent {
        Recent(vec![None; 1 << Recent::BITS])
    }
}

impl Changes {
    /// Notes what `record` changes. `meaning` is the record's, which the caller has read already.
    pub fn note(&mut self, record: &Record<'_>, meaning: &Meaning) {
        if let Meaning::ParameterChange(change) = meaning
            && change.ends_archive_recovery()
        {
            self.incomplete = true;
        }
        if self.try_note(record).is_err() {
            self.incomplete = true;
        }
    }

    /// A record was met whose changes are unknown.
    pub fn give_up(&mut self) {
        self.incomplete = true;
    }

    /// `None` if a record was met whose changes are unknown.
    pub fn finish(self) -> Option<ChangedBlocks> {
        (!self.incomplete).then_some(self.blocks)
    }

    fn try_note(&mut self, record: &Record<'_>) -> Result<(), MalformedRecord> {
        match record.rmgr {
            rmgr::SMGR => self.note_storage(record)?,
            rmgr::DBASE => self.note_database(record)?,
            _ => {}
        }
        let is_spgist = record.rmgr == rmgr::SPGIST;
        record.for_each_block(|block| {
            if is_tracked(block.fork) {
                let name = ForkName {
                    tablespace: block.tablespace,
                    database: block.database,
                    relation: block.relation,
                    fork: block.fork,
                };
                if is_spgist && !self.recent.knows(name, SPGIST_METAPAGE) {
                    self.blocks.change(name, SPGIST_METAPAGE);
                }
                if !self.recent.knows(name, block.block) {
                    self.blocks.change(name, block.block);
                }
            }
        })
    }

    fn note_storage(&mut self, record: &Record<'_>) -> Result<(), MalformedRecord> {
        let data = record.main_data()?;
        let malformed = MalformedRecord(record.start);
        let word = |at| bytes::u32_at(data, at).ok_or(malformed);
        match record.operation() {
            // xl_smgr_create: the relation's three numbers, then the fork.
            smgr::CREATE => {
                let fork = u8::try_from(word(12)?).map_err(|_| malformed)?;
                if is_tracked(fork) {
                    let name = ForkName { tablespace: word(0)?, database: word(4)?, relation: word(8)?, fork };
                    self.blocks.cut(name, 0);
                }
            }
            // xl_smgr_truncate: the new length in blocks, the relation, flags.
            smgr::TRUNCATE => {
                let fork = Fork::Main.number();
                let name = ForkName { tablespace: word(4)?, database: word(8)?, relation: word(12)?, fork };
                if word(16)? & smgr::TRUNCATE_HEAP != 0 {
                    self.blocks.cut(name, word(0)?);
                }
            }
            // What a later release adds is not known here.
            _ => return Err(malformed),
        }
        Ok(())
    }

    fn note_database(&mut self, record: &Record<'_>) -> Result<(), MalformedRecord> {
        let data = record.main_data()?;
        let malformed = MalformedRecord(record.start);
        let word = |at| bytes::u32_at(data, at).ok_or(malformed);
        let drop = if record.version.major() < 15 { dbase::DROP_BEFORE_15 } else { dbase::DROP };
        match record.operation() {
            // xl_dbase_drop_rec: the database, how many tablespaces, the tablespaces.
            operation if operation == drop => {
                let (database, count) = (word(0)?, word(4)? as usize);
                for index in 0..count {
                    self.blocks.change_database(word(8 + 4 * index)?, database);
                }
            }
            // xl_dbase_create_file_copy_rec, xl_dbase_create_wal_log_rec: both begin with database and tablespace.
            dbase::CREATE_FILE_COPY | dbase::CREATE_WAL_LOG => self.blocks.change_database(word(4)?, word(0)?),
            _ => return Err(malformed),
        }
        Ok(())
    }
}

fn is_tracked(fork: u8) -> bool {
    Fork::from_number(fork).is_none_or(Fork::is_logged)
}
