//! Which pages of which relations a stretch of WAL changes, as stored beside each segment and as summed up for a backup.
//!
//! A hint that spares reading, with one promise: a page that is not named here, of a fork that is not cut or made anew
//! here, is the same page before and after the stretch, but for hint bits. Free space maps and visibility maps are
//! never part of it, since they are not fully logged: whoever copies reads them.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;
use roaring::RoaringBitmap;
use walfleet_proto::repository::v1 as wire;

/// A relation's fork, as WAL names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ForkName {
    pub tablespace: u32,
    /// 0 for shared relations.
    pub database: u32,
    /// The file number, not the relation's OID.
    pub relation: u32,
    /// 0 main, 3 init (ForkNumber, src/include/common/relpath.h).
    pub fork: u8,
}

/// What happened to one fork.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct ForkChanges {
    /// The shortest the fork was, in blocks, if it was truncated or made anew: all from here on may have changed.
    pub cut_to: Option<u32>,
    pub blocks: RoaringBitmap,
}

impl ForkChanges {
    /// Whether any of the blocks `from..to` may have changed.
    pub fn touches(&self, from: u32, to: u32) -> bool {
        self.cut_to.is_some_and(|cut| cut < to) || from < to && self.blocks.range_cardinality(from..to) > 0
    }

    fn absorb(&mut self, other: &ForkChanges) {
        self.cut_to = match (self.cut_to, other.cut_to) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.blocks |= &other.blocks;
    }
}

/// The pages that some WAL changes.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct ChangedBlocks {
    forks: BTreeMap<ForkName, ForkChanges>,
    /// (tablespace, database) that were copied or dropped as whole folders: all their files count as changed.
    databases: BTreeSet<(u32, u32)>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChangedBlocksError {
    #[error("changed blocks do not decode: {0}")]
    Decode(String),
    #[error("changed blocks name block {0}, which no relation has")]
    Block(u64),
    #[error("changed blocks name fork {0}, which no relation has")]
    Fork(u32),
}

/// InvalidBlockNumber (src/include/storage/block.h): one more than the last block a relation can have.
const INVALID_BLOCK: u32 = u32::MAX;

impl ChangedBlocks {
    pub fn change(&mut self, fork: ForkName, block: u32) {
        self.forks.entry(fork).or_default().blocks.insert(block);
    }

    /// The fork had no more than this many blocks at some moment.
    pub fn cut(&mut self, fork: ForkName, to: u32) {
        let cut = &mut self.forks.entry(fork).or_default().cut_to;
        *cut = Some(cut.map_or(to, |former| former.min(to)));
    }

    pub fn change_database(&mut self, tablespace: u32, database: u32) {
        self.databases.insert((tablespace, database));
    }

    pub fn absorb(&mut self, other: &ChangedBlocks) {
        for (fork, changes) in &other.forks {
            self.forks.entry(*fork).or_default().absorb(changes);
        }
        self.databases.extend(&other.databases);
    }

    /// Whether everything in a database's folder in this tablespace may have changed.
    pub fn is_database_changed(&self, tablespace: u32, database: u32) -> bool {
        self.databases.contains(&(tablespace, database))
    }

    /// `None`: none of the fork's pages changed, unless its whole database did.
    pub fn fork(&self, name: &ForkName) -> Option<&ForkChanges> {
        self.forks.get(name)
    }

    pub fn is_empty(&self) -> bool {
        self.forks.is_empty() && self.databases.is_empty()
    }

    /// How many pages are named.
    pub fn block_count(&self) -> u64 {
        self.forks.values().map(|changes| changes.blocks.len()).sum()
    }

    pub fn encode(&self) -> Vec<u8> {
        let forks = self.forks.iter().map(|(name, changes)| {
            let mut next = 0u32;
            let block_deltas = changes.blocks.iter().map(|block| {
                let delta = block - next;
                next = block + 1;
                delta
            });
            wire::ForkChanges {
                tablespace: name.tablespace,
                database: name.database,
                relation: name.relation,
                fork: u32::from(name.fork),
                cut_to_plus_one: changes.cut_to.map_or(0, |cut| u64::from(cut) + 1),
                block_deltas: block_deltas.collect(),
            }
        });
        let databases = self
            .databases
            .iter()
            .map(|(tablespace, database)| wire::ChangedDatabase { tablespace: *tablespace, database: *database });
        wire::ChangedBlocks { forks: forks.collect(), databases: databases.collect() }.encode_to_vec()
    }

    pub fn decode(bytes: &[u8]) -> Result<ChangedBlocks, ChangedBlocksError> {
        let message =
            wire::ChangedBlocks::decode(bytes).map_err(|error| ChangedBlocksError::Decode(error.to_string()))?;
        let mut result = ChangedBlocks::default();
        for fork in &message.forks {
            let number = u8::try_from(fork.fork).map_err(|_| ChangedBlocksError::Fork(fork.fork))?;
            let name = ForkName {
                tablespace: fork.tablespace,
                database: fork.database,
                relation: fork.relation,
                fork: number,
            };
            let changes = result.forks.entry(name).or_default();
            changes.cut_to = match fork.cut_to_plus_one.checked_sub(1) {
                Some(cut) => Some(u32::try_from(cut).map_err(|_| ChangedBlocksError::Block(cut))?),
                None => None,
            };
            let mut next = 0u64;
            for delta in &fork.block_deltas {
                let block = next + u64::from(*delta);
                let valid = u32::try_from(block).ok().filter(|block| *block != INVALID_BLOCK);
                changes.blocks.insert(valid.ok_or(ChangedBlocksError::Block(block))?);
                next = block + 1;
            }
        }
        result.databases = message.databases.iter().map(|folder| (folder.tablespace, folder.database)).collect();
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fork(relation: u32) -> ForkName {
        ForkName { tablespace: 1663, database: 5, relation, fork: 0 }
    }

    proptest! {
        #[test]
        fn changes_read_back_as_written(
            blocks in prop::collection::vec((0u32..4, prop_oneof![0u32..300, any::<u32>().prop_map(|b| b.min(u32::MAX - 1))]), 0..400),
            cuts in prop::collection::vec((0u32..4, any::<u32>()), 0..4),
            databases in prop::collection::vec(any::<(u32, u32)>(), 0..3),
        ) {
            let mut changes = ChangedBlocks::default();
            blocks.iter().for_each(|(relation, block)| changes.change(fork(*relation), *block));
            cuts.iter().for_each(|(relation, to)| changes.cut(fork(*relation), *to));
            databases.iter().for_each(|(tablespace, database)| changes.change_database(*tablespace, *database));
            prop_assert_eq!(ChangedBlocks::decode(&changes.encode()).unwrap(), changes);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = ChangedBlocks::decode(&bytes);
        }
    }

    #[test]
    fn sums_keep_every_page_and_the_deepest_cut() {
        let (mut early, mut late) = (ChangedBlocks::default(), ChangedBlocks::default());
        early.change(fork(1), 7);
        early.cut(fork(2), 100);
        late.change(fork(1), 8);
        late.cut(fork(2), 40);
        late.cut(fork(2), 60);
        late.change_database(1663, 9);
        early.absorb(&late);
        let one = early.fork(&fork(1)).unwrap();
        assert!(one.touches(7, 8) && one.touches(0, 16) && !one.touches(9, 16) && !one.touches(0, 7));
        let two = early.fork(&fork(2)).unwrap();
        assert_eq!(two.cut_to, Some(40));
        assert!(two.touches(32, 48) && two.touches(1000, 1001) && !two.touches(0, 40));
        assert!(early.is_database_changed(1663, 9) && !early.is_database_changed(1663, 5));
        assert_eq!(early.block_count(), 2);
    }
}
