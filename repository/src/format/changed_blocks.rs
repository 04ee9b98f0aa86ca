//! Which pages of which relations a stretch of WAL changes, as stored beside each segment and as summed up for a backup.
//!
//! A hint that spares reading, with one promise: a page that is not named here, of a fork that is not cut or made anew
//! here, is the same page before and after the stretch, but for hint bits. Free space maps and visibility maps are
//! never part of it, since they are not fully logged: whoever copies reads them.
//!
//! It never takes much memory: where single pages would be too many, whole forks and then whole databases stand for them.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
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

/// By which rules changes are gathered: raised when a fault in them is mended, so that what was stored before is not
/// believed any more.
const RULES: u32 = 1;

/// Memory that changes take at most, roughly.
const MOST_BYTES: usize = 64 << 20;

/// Bytes of all block numbers in a message at most. A segment of 16 MiB has a tenth of that; what a reader makes of it is four
/// times as much, for a moment.
const MOST_DELTA_BYTES: usize = 8 << 20;

/// Fields that are written without their message (ChangedBlocks.forks, ForkChanges.block_deltas; wal.proto).
const FORKS_FIELD: u32 = 1;
const DELTAS_FIELD: u32 = 6;

/// Memory of a fork's entry, of a bitmap that is not empty, and of each of its containers beside what is in them.
const FORK_BYTES: usize = 96;
const BITMAP_BYTES: usize = 96;
const CONTAINER_BYTES: usize = 96;

/// What one more page takes at most: a fork with a container of one array of four.
const MOST_PAGE_BYTES: usize = FORK_BYTES + BITMAP_BYTES + CONTAINER_BYTES + 16;

/// A fork whose pages take less is not worth giving up.
const MANY_PAGES_BYTES: usize = 4 << 10;

/// What happened to one fork.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct ForkChanges {
    /// The shortest the fork was, in blocks, if it was truncated or made anew: all from here on may have changed.
    pub cut_to: Option<u32>,
    /// Those before the cut that changed.
    pub blocks: RoaringBitmap,
}

impl ForkChanges {
    fn change(&mut self, block: u32) {
        if self.cut_to.is_none_or(|cut| block < cut) {
            self.blocks.insert(block);
        }
    }

    fn cut(&mut self, to: u32) {
        if self.cut_to.is_none_or(|former| to < former) {
            self.cut_to = Some(to);
            self.blocks.remove_range(to..);
        }
    }

    fn absorb(&mut self, other: &ForkChanges) {
        self.blocks |= &other.blocks;
        if let Some(cut) = other.cut_to.or(self.cut_to) {
            let cut = self.cut_to.map_or(cut, |own| own.min(cut));
            self.cut_to = Some(cut);
            self.blocks.remove_range(cut..);
        }
    }

    /// Has a cut stand for the single pages.
    fn coarsen(&mut self) {
        if let Some(first) = self.blocks.min() {
            self.cut_to = Some(first);
            self.blocks = RoaringBitmap::new();
        }
    }

    /// As the message has them: the first block, then how many lie between each and the one before it.
    fn deltas(&self) -> impl Iterator<Item = u64> {
        let mut next = 0u32;
        self.blocks.iter().map(move |block| {
            let delta = block - next;
            next = block + 1;
            u64::from(delta)
        })
    }

    fn deltas_len(&self) -> usize {
        self.deltas().map(encoded_len_varint).sum()
    }

    /// Appends the field that holds it. The blocks are written one by one: as a list they would take four times what they
    /// take here.
    fn encode(&self, name: &ForkName, into: &mut Vec<u8>) {
        let head = wire::ForkChanges {
            tablespace: name.tablespace,
            database: name.database,
            relation: name.relation,
            fork: u32::from(name.fork),
            cut_to_plus_one: self.cut_to.map_or(0, |cut| u64::from(cut) + 1),
            block_deltas: Vec::new(),
        };
        let deltas = self.deltas_len();
        let deltas_field =
            if deltas == 0 { 0 } else { key_len(DELTAS_FIELD) + encoded_len_varint(deltas as u64) + deltas };
        encode_key(FORKS_FIELD, WireType::LengthDelimited, into);
        encode_varint((head.encoded_len() + deltas_field) as u64, into);
        into.extend(head.encode_to_vec());
        if deltas > 0 {
            encode_key(DELTAS_FIELD, WireType::LengthDelimited, into);
            encode_varint(deltas as u64, into);
            self.deltas().for_each(|delta| encode_varint(delta, into));
        }
    }

    /// Bytes of memory, roughly.
    fn weight(&self) -> usize {
        if self.blocks.is_empty() {
            return FORK_BYTES;
        }
        let held = self.blocks.statistics();
        // A vector's capacity is up to twice what it holds.
        let bytes =
            2 * held.n_bytes_array_containers + held.n_bytes_bitset_containers + 2 * held.n_bytes_run_containers;
        FORK_BYTES + BITMAP_BYTES + CONTAINER_BYTES * held.n_containers as usize + bytes as usize
    }
}

/// The pages that some WAL changes.
#[derive(Clone, Default, Debug)]
pub struct ChangedBlocks {
    /// None of a database that is changed as a whole.
    forks: BTreeMap<ForkName, ForkChanges>,
    /// (tablespace, database) of which all files count as changed: copied or dropped as whole folders, or with too many
    /// changes to name.
    databases: BTreeSet<(u32, u32)>,
    /// Bytes of memory when they were last counted, and pages and forks that may have come since.
    weighed: usize,
    unweighed: usize,
}

impl PartialEq for ChangedBlocks {
    fn eq(&self, other: &ChangedBlocks) -> bool {
        self.forks == other.forks && self.databases == other.databases
    }
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChangedBlocksError {
    #[error("changed blocks do not decode: {0}")]
    Decode(String),
    #[error("changed blocks name block {0}, which no relation has")]
    Block(u64),
    #[error("changed blocks name fork {0}, which no relation has")]
    Fork(u32),
    #[error("changed blocks were gathered by rules {0}, expected {RULES}")]
    Rules(u32),
}

/// InvalidBlockNumber (src/include/storage/block.h): one more than the last block a relation can have.
const INVALID_BLOCK: u32 = u32::MAX;

impl ChangedBlocks {
    pub fn change(&mut self, fork: ForkName, block: u32) {
        if !self.is_database_changed(fork.tablespace, fork.database) {
            self.forks.entry(fork).or_default().change(block);
            self.grow(1);
        }
    }

    /// The fork had no more than this many blocks at some moment.
    pub fn cut(&mut self, fork: ForkName, to: u32) {
        if !self.is_database_changed(fork.tablespace, fork.database) {
            self.forks.entry(fork).or_default().cut(to);
            self.grow(1);
        }
    }

    pub fn change_database(&mut self, tablespace: u32, database: u32) {
        if self.databases.insert((tablespace, database)) {
            let first = ForkName { tablespace, database, relation: 0, fork: 0 };
            let last = ForkName { relation: u32::MAX, fork: u8::MAX, ..first };
            let covered: Vec<ForkName> = self.forks.range(first..=last).map(|(name, _)| *name).collect();
            covered.iter().for_each(|name| drop(self.forks.remove(name)));
        }
    }

    pub fn absorb(&mut self, other: &ChangedBlocks) {
        for (tablespace, database) in &other.databases {
            self.change_database(*tablespace, *database);
        }
        for (fork, changes) in &other.forks {
            if !self.is_database_changed(fork.tablespace, fork.database) {
                self.forks.entry(*fork).or_default().absorb(changes);
                self.grow(1 + changes.blocks.len() as usize);
            }
        }
    }

    /// Takes note that so many pages may have come.
    fn grow(&mut self, pages: usize) {
        self.unweighed += pages;
        if self.weighed + self.unweighed.saturating_mul(MOST_PAGE_BYTES) > MOST_BYTES {
            self.bound(MOST_BYTES);
        }
    }

    fn weight(&self) -> usize {
        self.forks.values().map(ForkChanges::weight).sum()
    }

    /// Has forks and databases stand for their pages if all take more than three quarters of `most`. The rest is room
    /// for as many more pages that counting again is rare.
    fn bound(&mut self, most: usize) {
        let mut weight = self.weight();
        if weight > most / 4 * 3 {
            self.coarsen(&mut weight, most / 2);
        }
        (self.weighed, self.unweighed) = (weight, 0);
    }

    /// Gives up single pages where they are most, then forks where they are most, until all take no more than `enough`.
    fn coarsen(&mut self, weight: &mut usize, enough: usize) {
        let heavy = self.forks.iter().map(|(name, changes)| (changes.weight(), *name));
        let mut heavy: Vec<_> = heavy.filter(|(bytes, _)| *bytes > MANY_PAGES_BYTES).collect();
        heavy.sort_unstable_by(|a, b| b.cmp(a));
        for (bytes, name) in heavy {
            if *weight <= enough {
                return;
            }
            self.forks.entry(name).or_default().coarsen();
            *weight = weight.saturating_sub(bytes - FORK_BYTES);
        }
        let mut databases: BTreeMap<(u32, u32), usize> = BTreeMap::new();
        for (name, changes) in &self.forks {
            *databases.entry((name.tablespace, name.database)).or_default() += changes.weight();
        }
        let mut databases: Vec<_> = databases.into_iter().map(|(database, bytes)| (bytes, database)).collect();
        databases.sort_unstable_by(|a, b| b.cmp(a));
        for (bytes, (tablespace, database)) in databases {
            if *weight <= enough {
                return;
            }
            self.change_database(tablespace, database);
            *weight = weight.saturating_sub(bytes);
        }
    }

    /// Whether everything in a database's folder in this tablespace may have changed.
    pub fn is_database_changed(&self, tablespace: u32, database: u32) -> bool {
        !self.databases.is_empty() && self.databases.contains(&(tablespace, database))
    }

    /// `None`: none of the fork's pages changed, unless its whole database did.
    pub fn fork(&self, name: &ForkName) -> Option<&ForkChanges> {
        self.forks.get(name)
    }

    /// How many pages are named.
    pub fn block_count(&self) -> u64 {
        self.forks.values().map(|changes| changes.blocks.len()).sum()
    }

    /// Forks whose pages would make it too long to write and to read are named from their first page on.
    pub fn encode(&self) -> Vec<u8> {
        let mut lengths: Vec<(usize, ForkName)> =
            self.forks.iter().map(|(name, fork)| (fork.deltas_len(), *name)).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let mut sum: usize = lengths.iter().map(|(len, _)| len).sum();
        let mut coarse = BTreeSet::new();
        for (len, name) in lengths {
            if sum <= MOST_DELTA_BYTES {
                break;
            }
            coarse.insert(name);
            sum -= len;
        }
        let mut bytes = Vec::new();
        for (name, fork) in &self.forks {
            match coarse.contains(name) {
                true => {
                    let mut fork = fork.clone();
                    fork.coarsen();
                    fork.encode(name, &mut bytes);
                }
                false => fork.encode(name, &mut bytes),
            }
        }
        let databases = self
            .databases
            .iter()
            .map(|(tablespace, database)| wire::ChangedDatabase { tablespace: *tablespace, database: *database });
        bytes.extend(
            wire::ChangedBlocks { forks: Vec::new(), databases: databases.collect(), rules: RULES }.encode_to_vec(),
        );
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<ChangedBlocks, ChangedBlocksError> {
        let message =
            wire::ChangedBlocks::decode(bytes).map_err(|error| ChangedBlocksError::Decode(error.to_string()))?;
        if message.rules != RULES {
            return Err(ChangedBlocksError::Rules(message.rules));
        }
        let mut result = ChangedBlocks::default();
        for folder in &message.databases {
            result.change_database(folder.tablespace, folder.database);
        }
        for fork in &message.forks {
            let number = u8::try_from(fork.fork).map_err(|_| ChangedBlocksError::Fork(fork.fork))?;
            let name = ForkName {
                tablespace: fork.tablespace,
                database: fork.database,
                relation: fork.relation,
                fork: number,
            };
            let mut changes = ForkChanges::default();
            if let Some(cut) = fork.cut_to_plus_one.checked_sub(1) {
                changes.cut(u32::try_from(cut).map_err(|_| ChangedBlocksError::Block(cut))?);
            }
            let mut next = 0u64;
            for delta in &fork.block_deltas {
                let block = next + u64::from(*delta);
                let valid = u32::try_from(block).ok().filter(|block| *block != INVALID_BLOCK);
                changes.change(valid.ok_or(ChangedBlocksError::Block(block))?);
                next = block + 1;
            }
            if !result.is_database_changed(name.tablespace, name.database) {
                result.forks.entry(name).or_default().absorb(&changes);
                result.grow(1 + changes.blocks.len() as usize);
            }
        }
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

    /// Whether the block may have changed.
    fn names(changes: &ForkChanges, block: u32) -> bool {
        changes.cut_to.is_some_and(|cut| cut <= block) || changes.blocks.contains(block)
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
        assert!((0..16).all(|block| names(one, block) == [7, 8].contains(&block)));
        let two = early.fork(&fork(2)).unwrap();
        assert_eq!(two.cut_to, Some(40));
        assert!((0..1001).all(|block| names(two, block) == (block >= 40)));
        assert!(early.is_database_changed(1663, 9) && !early.is_database_changed(1663, 5));
        assert_eq!(early.block_count(), 2);
    }

    #[test]
    fn a_cut_or_a_whole_database_stands_for_the_pages_it_covers() {
        let mut changes = ChangedBlocks::default();
        [3, 50, 99].into_iter().for_each(|block| changes.change(fork(1), block));
        changes.cut(fork(1), 50);
        changes.change(fork(1), 60);
        let one = changes.fork(&fork(1)).unwrap();
        assert_eq!((one.cut_to, one.blocks.iter().collect::<Vec<_>>()), (Some(50), vec![3]));
        assert!((0..100).all(|block| names(one, block) == (block == 3 || block >= 50)));
        changes.change_database(1663, 5);
        changes.change(fork(2), 1);
        assert_eq!((changes.fork(&fork(1)), changes.fork(&fork(2))), (None, None));
        assert!(changes.is_database_changed(1663, 5));
    }

    #[test]
    fn what_was_gathered_by_other_rules_is_not_believed() {
        let other = wire::ChangedBlocks { rules: RULES + 1, ..Default::default() }.encode_to_vec();
        assert_eq!(ChangedBlocks::decode(&other), Err(ChangedBlocksError::Rules(RULES + 1)));
        assert_eq!(ChangedBlocks::decode(b""), Err(ChangedBlocksError::Rules(0)));
    }

    #[test]
    fn changes_of_half_a_million_relations_take_bounded_memory_and_cover_all() {
        let mut changes = ChangedBlocks::default();
        let name = |relation: u32| ForkName { tablespace: 1663, database: 5 + relation % 3, relation, fork: 0 };
        for relation in 0..500_000 {
            changes.change(name(relation), relation % 1000);
        }
        assert!(changes.weight() <= MOST_BYTES, "{}", changes.weight());
        let is_named = |relation: &u32| {
            let name = name(*relation);
            let block = relation % 1000;
            changes.is_database_changed(name.tablespace, name.database)
                || changes.fork(&name).is_some_and(|changes| names(changes, block))
        };
        assert!((0..500_000).all(|relation| is_named(&relation)));
        assert!(!changes.is_database_changed(1663, 9));
    }

    #[test]
    fn pages_scattered_over_huge_relations_take_bounded_memory_and_cover_all() {
        let mut changes = ChangedBlocks::default();
        changes.change(fork(1), 7);
        for block in 0..1_000_000u32 {
            // Each page in a container of its own, and later each container full.
            changes.change(fork(2), 90 + block.wrapping_mul(65_537) / 2);
            changes.change(fork(3), 20 + block * 2);
        }
        assert!(changes.weight() <= MOST_BYTES, "{}", changes.weight());
        let named = |relation, block| changes.fork(&fork(relation)).is_some_and(|changes| names(changes, block));
        assert!(
            (0..1_000_000u32).all(|block| named(2, 90 + block.wrapping_mul(65_537) / 2) && named(3, 20 + block * 2))
        );
        assert!(named(1, 7) && !named(1, 8), "what is small stays exact");
        assert!(!named(3, 19), "nothing before the first page that changed");
    }

    /// What a segment of a gigabyte may change, and what no reader should have to hold.
    #[test]
    fn the_longest_messages_are_bounded_and_cover_all() {
        let mut changes = ChangedBlocks::default();
        for block in 0..6_000_000u32 {
            changes.change(fork(1), block * 3);
            changes.change(fork(2), block * 2);
        }
        changes.change(fork(3), 7);
        assert_eq!(changes.block_count(), 12_000_001, "they fit into memory");
        let bytes = changes.encode();
        assert!(bytes.len() <= MOST_DELTA_BYTES + 100, "{}", bytes.len());
        let read = ChangedBlocks::decode(&bytes).unwrap();
        let (one, two, three) = (fork(1), fork(2), fork(3));
        assert_eq!(read.fork(&three), changes.fork(&three));
        for (name, step) in [(one, 3), (two, 2)] {
            let read = read.fork(&name).unwrap();
            assert!((0..6_000_000).all(|block| names(read, block * step)), "{name:?}");
        }
        assert!([one, two].iter().any(|name| read.fork(name) == changes.fork(name)), "no more than needed");
    }

    #[test]
    fn what_fits_is_never_coarsened() {
        let mut changes = ChangedBlocks::default();
        // All of 8 GiB, and every other page of twice as much.
        for block in 0..1 << 20 {
            changes.change(fork(1), block);
            changes.change(fork(2), block * 2);
        }
        assert_eq!((changes.block_count(), changes.fork(&fork(2)).unwrap().cut_to), (2 << 20, None));
    }
}
