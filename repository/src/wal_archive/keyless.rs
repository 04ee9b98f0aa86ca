//! Pieces of WAL in the hands of somebody who holds no key: a spool keeps them sealed, and stores those that the archive
//! lacks if the host that received them is gone. Listing and creating below a cluster's tails is all that is done here.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::damage::reads_back;
use crate::format::clear::ObjectKind;
use crate::format::wal_tail;
use crate::ids::ClusterName;
use crate::layout::{self, TailName};
use crate::postgres::{Segment, SegmentSize, WalBranch};
use crate::store::{Creation, Store, StoreError};

/// The pieces of one cluster.
#[derive(Clone)]
pub struct KeylessTails {
    store: Store,
    cluster: ClusterName,
}

/// A segment that pieces are there of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TailPlace {
    pub wal: WalBranch,
    pub segment: Segment,
    pub size: SegmentSize,
}

/// How a spool's pieces of one member hang together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Continuity {
    /// Each goes on from one before, unless the archive has what is before.
    Unbroken,
    /// Some are lost: what is behind them goes on from what only another may have.
    Holed,
}

impl KeylessTails {
    pub fn new(store: Store, cluster: ClusterName) -> KeylessTails {
        KeylessTails { store, cluster }
    }

    /// Those of one member's pieces without which the archive would have less of the segment, in the order in which they
    /// follow each other. What lies there counts if it is undamaged, as far as can be told without its key: the pieces that are
    /// there are read, or the whole segment.
    pub async fn missing(
        &self,
        place: TailPlace,
        pieces: &[TailName],
        continuity: Continuity,
    ) -> Result<Vec<TailName>, StoreError> {
        let TailPlace { wal, segment, size } = place;
        let Some(member) = pieces.first().map(|piece| piece.member.as_str()) else { return Ok(Vec::new()) };
        let whole = layout::wal_segment(&self.cluster, &wal, segment, size);
        if reads_back(&self.store, &whole, ObjectKind::Segment).await? {
            return Ok(Vec::new());
        }
        let listed = self.store.list(&layout::segment_tails(&self.cluster, &wal, segment, size)).await?;
        let name = |key| layout::parse_tail(&self.cluster, &wal, (segment, size), key);
        let mut stored: Vec<TailName> = listed.iter().filter_map(|object| name(&object.key)).collect();
        let mut sound = BTreeSet::new();
        loop {
            let led_to = wal_tail::chain(&stored, member).into_iter();
            let apart = pieces.iter().filter(|name| continuity == Continuity::Holed && stored.contains(name));
            let doubted = led_to.chain(apart).find(|name| !sound.contains(*name)).cloned();
            let Some(doubted) = doubted else { break };
            if self.reads_back(place, &doubted).await? {
                sound.insert(doubted);
            } else {
                stored.retain(|name| *name != doubted);
            }
        }
        let mut missing = lacking(&stored, pieces);
        if continuity == Continuity::Holed {
            missing.extend(behind_holes(&stored, &missing, pieces));
        }
        Ok(missing)
    }

    /// Stores a piece under its own name; `None`: what lies there already is damaged. One that is there and is not counts, from
    /// whoever.
    pub async fn create(
        &self,
        place: TailPlace,
        name: &TailName,
        sealed: Bytes,
    ) -> Result<Option<Creation>, StoreError> {
        let key = layout::tail(&self.cluster, &place.wal, (place.segment, place.size), name);
        match self.store.create(&key, sealed).await? {
            Creation::AlreadyThere if !self.reads_back(place, name).await? => Ok(None),
            creation => Ok(Some(creation)),
        }
    }

    async fn reads_back(&self, place: TailPlace, name: &TailName) -> Result<bool, StoreError> {
        let key = layout::tail(&self.cluster, &place.wal, (place.segment, place.size), name);
        reads_back(&self.store, &key, ObjectKind::Tail).await
    }
}

/// What of `pieces` makes the way through them and the stored ones longer than the stored ones alone.
fn lacking(stored: &[TailName], pieces: &[TailName]) -> Vec<TailName> {
    let Some(member) = pieces.first().map(|piece| piece.member.as_str()) else { return Vec::new() };
    let end = |names: &[TailName]| wal_tail::chain(names, member).last().map_or(0, |last| last.to);
    let all: Vec<TailName> = stored.iter().chain(pieces).cloned().collect();
    let reached = end(stored);
    if end(&all) <= reached {
        return Vec::new();
    }
    // Behind what is stored, if it goes on from there: the fewest requests, and the fewest pieces to read.
    let behind: Vec<TailName> = pieces.iter().filter(|piece| piece.from >= reached).cloned().collect();
    let with_behind: Vec<TailName> = stored.iter().chain(&behind).cloned().collect();
    let names = if end(&with_behind) == end(&all) { with_behind } else { all };
    let way = wal_tail::chain(&names, member);
    way.into_iter().filter(|name| !stored.contains(name)).cloned().collect()
}

/// Those that nothing leads to, and that hold more than is led to.
fn behind_holes(stored: &[TailName], missing: &[TailName], pieces: &[TailName]) -> Vec<TailName> {
    let Some(member) = pieces.first().map(|piece| piece.member.as_str()) else { return Vec::new() };
    let names: Vec<TailName> = stored.iter().chain(missing).cloned().collect();
    let reached = wal_tail::chain(&names, member).last().map_or(0, |last| last.to);
    pieces.iter().filter(|piece| piece.to > reached && !names.contains(piece)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::DomainKey;
    use crate::format::wal_segment::SegmentFacts;
    use crate::keyring::Keyring;
    use crate::postgres::{Branch, SystemId, Timeline};
    use crate::wal_archive::{OwnedSegment, OwnedTail, WalArchive};

    fn name(from: u32, to: u32) -> TailName {
        TailName { from, to, member: "pg1".into() }
    }

    #[test]
    fn only_what_makes_the_stored_way_longer_is_missing() {
        let spooled = [name(0, 10), name(10, 30), name(30, 40), name(10, 40), name(40, 50)];
        assert_eq!(lacking(&[], &spooled), [name(0, 10), name(10, 40), name(40, 50)]);
        assert_eq!(lacking(&[name(0, 30)], &spooled), [name(30, 40), name(40, 50)]);
        assert_eq!(lacking(&[name(0, 50)], &spooled), []);
        assert_eq!(lacking(&[name(0, 60)], &spooled), []);
        // One of two on their way to the store has arrived: the hole before it is filled.
        assert_eq!(lacking(&[name(0, 10), name(30, 50)], &spooled), [name(10, 30)]);
        assert_eq!(lacking(&[name(0, 20)], &spooled[2..]), [], "they follow from nothing that is there");
        let other = TailName { member: "pg2".into(), ..name(0, 60) };
        assert_eq!(lacking(&[other], &spooled[..1]), [name(0, 10)], "another member's do not count");
    }

    #[test]
    fn what_is_behind_a_hole_is_stored_for_whoever_fills_it() {
        let whole = [name(0, 10), name(10, 30), name(30, 40), name(40, 50)];
        let (first, second) = (vec![name(0, 10), name(30, 40), name(40, 50)], vec![name(10, 30), name(40, 50)]);
        let mut stored = Vec::new();
        for spool in [first, second] {
            let missing = lacking(&stored, &spool);
            let more = behind_holes(&stored, &missing, &spool);
            stored.extend(missing.into_iter().chain(more));
        }
        stored.sort();
        stored.dedup();
        assert_eq!(stored, whole, "two spools with different holes make the whole");
        assert_eq!(behind_holes(&whole, &[], &whole[1..]), []);
    }

    #[tokio::test]
    async fn a_piece_is_created_once_and_what_is_damaged_does_not_count() {
        let (store, cluster) = (Store::in_memory(), "orders".parse::<ClusterName>().unwrap());
        let archive =
            WalArchive::new(store.clone(), cluster.clone(), Keyring::of(DomainKey::generate().unwrap()).into(), 3);
        let wal = WalBranch { system_id: SystemId(5), timeline: Timeline(1), branch: Branch::ROOT };
        let (segment, size) = (Segment { timeline: Timeline(1), number: 2 }, SegmentSize::new(1 << 20).unwrap());
        let (place, tails) = (TailPlace { wal, segment, size }, KeylessTails::new(store.clone(), cluster.clone()));
        let (content, wanted) = (vec![7; 10], [name(0, 10)]);
        assert_eq!(tails.missing(place, &wanted, Continuity::Unbroken).await.unwrap(), wanted);
        let piece = || OwnedTail {
            wal,
            segment,
            segment_size: size,
            name: name(0, 10),
            before: archive.content_hasher().id(),
            after: archive.id_of(&content),
            bytes: content.clone().into(),
            facts: SegmentFacts::default(),
            shipped_at_us: 0,
            complete_at_us: None,
        };
        let (key, sealed) = archive.seal_tail(piece()).await.unwrap();
        let (_, again) = archive.seal_tail(piece()).await.unwrap();
        let create = |bytes| tails.create(place, &wanted[0], bytes);
        assert_eq!(create(sealed.clone()).await.unwrap(), Some(Creation::Created));
        assert_eq!(create(again).await.unwrap(), Some(Creation::AlreadyThere));
        assert_eq!(store.get(&key).await.unwrap(), sealed);
        assert_eq!(tails.missing(place, &wanted, Continuity::Unbroken).await.unwrap(), []);
        for damaged in [Bytes::new(), sealed.slice(..sealed.len() / 2), Bytes::from_static(b"rubbish")] {
            store.delete(vec![key.clone()]).await.unwrap();
            let _ = store.create(&key, damaged).await.unwrap();
            assert_eq!(tails.missing(place, &wanted, Continuity::Unbroken).await.unwrap(), wanted);
            assert_eq!(create(sealed.clone()).await.unwrap(), None, "nothing is overwritten, and nothing is believed");
        }
        let whole = layout::wal_segment(&cluster, &wal, segment, size);
        let _ = store.create(&whole, Bytes::from_static(b"whole")).await.unwrap();
        assert_eq!(tails.missing(place, &wanted, Continuity::Unbroken).await.unwrap(), wanted);
        store.delete(vec![whole]).await.unwrap();
        let content = vec![7; 1 << 20];
        let facts = SegmentFacts { valid_bytes: 1 << 20, ..SegmentFacts::default() };
        let (predecessor, member) = (None, "pg1".to_owned());
        let upload =
            OwnedSegment { wal, segment, segment_size: size, content, facts, predecessor, member, shipped_at_us: 0 };
        archive.put_segment(upload).await.unwrap();
        assert_eq!(tails.missing(place, &wanted, Continuity::Unbroken).await.unwrap(), []);
    }
}
