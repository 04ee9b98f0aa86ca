//! Removes pieces of segments that nobody needs any more. For the keeper alone, and without any key.
//!
//! A piece is superseded once the whole segment lies in the archive and reads back undamaged, or once a larger and later piece of
//! the same member that takes it in does, unless another piece goes on from where it ends and would hang in the air. Whoever
//! reads it at that moment is given an hour: what supersedes it was there all the time, and everyone looks for that first.
//!
//! Names do not say whose WAL it is. Where several members have sent pieces of a segment, or a timeline has several branches,
//! two servers may have written it, and a whole segment takes the place of no piece.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use object_store::path::Path;

use crate::format::clear::ObjectKind;
use crate::format::wal_tail::reached;
use crate::ids::ClusterName;
use crate::layout::{self, TailName};
use crate::store::{Listed, Store, StoreError};
use crate::wal_archive::damage::reads_back;

/// How long what supersedes a piece must have been there.
const READERS: Duration = Duration::from_secs(3600);

/// Of one round; the next goes on.
const MOST: usize = 50_000;

/// What a round removed.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Removed {
    pub pieces: u64,
    pub bytes: u64,
}

/// Removes what is superseded of one cluster.
pub async fn remove(store: &Store, cluster: &ClusterName, now: Timestamp) -> Result<Removed, StoreError> {
    let mut removed = Removed::default();
    for system in store.list_level(&layout::cluster_tails(cluster)).await?.folders {
        let branches = store.list_level(&system).await?.folders;
        for branch in &branches {
            let is_only_one = branches.iter().filter(|other| timeline_of(other) == timeline_of(branch)).count() == 1;
            for segment in store.list_level(branch).await?.folders {
                let pieces = store.list(&segment).await?;
                let dead = dead(store, cluster, (&segment, is_only_one), pieces, now).await?;
                removed.pieces += dead.len() as u64;
                removed.bytes += dead.iter().map(|piece| piece.size).sum::<u64>();
                store.delete(dead.into_iter().map(|piece| piece.key).collect()).await?;
                if removed.pieces >= MOST as u64 {
                    return Ok(removed);
                }
            }
        }
    }
    Ok(removed)
}

/// Of "<timeline>-<branch>".
fn timeline_of(branch: &Path) -> Option<&str> {
    branch.filename()?.split_once('-').map(|(timeline, _)| timeline)
}

/// `is_only_one`: the timeline has no other branch.
async fn dead(
    store: &Store,
    cluster: &ClusterName,
    (folder, is_only_one): (&Path, bool),
    pieces: Vec<Listed>,
    now: Timestamp,
) -> Result<Vec<Listed>, StoreError> {
    let Some(whole) = layout::segment_of_tails(cluster, folder) else { return Ok(Vec::new()) };
    let named = |piece: Listed| Some((layout::tail_name(&piece.key)?, piece));
    let named: Vec<(TailName, Listed)> = pieces.into_iter().filter_map(named).collect();
    let members: BTreeSet<&str> = named.iter().map(|(name, _)| name.member.as_str()).collect();
    let is_one_servers = is_only_one && members.len() == 1;
    if is_one_servers && takes_their_place(store, &whole, &named, now).await? {
        return Ok(named.into_iter().map(|(_, piece)| piece).collect());
    }
    let names: Vec<&TailName> = named.iter().map(|(name, _)| name).collect();
    let attached = reached(names.iter().copied());
    let mut larger: Vec<(&TailName, i64)> = Vec::new();
    for (name, piece) in named.iter().filter(|(name, _)| goes_on(name, &attached)) {
        let takes_in = named.iter().any(|(other, _)| name.takes_in(other));
        if takes_in && is_old(piece.last_modified_us, now) && reads_back(store, &piece.key, ObjectKind::Tail).await? {
            larger.push((name, piece.last_modified_us));
        }
    }
    let is_taken_in = |(name, piece): &&(TailName, Listed)| {
        larger.iter().any(|(larger, sent_us)| larger.takes_in(name) && piece.last_modified_us <= *sent_us)
    };
    let doomed = named.iter().filter(is_taken_in).map(|(name, _)| name).collect();
    let dead = spare_joints(&names, doomed);
    Ok(named.iter().filter(|(name, _)| dead.contains(name)).map(|(_, piece)| piece.clone()).collect())
}

/// Whether a whole segment has been there for long enough. A piece of all of it that came after it was stored beside it, since its
/// own member could not read what lies there: that takes no place.
async fn takes_their_place(
    store: &Store,
    whole: &Path,
    pieces: &[(TailName, Listed)],
    now: Timestamp,
) -> Result<bool, StoreError> {
    let newest = pieces.iter().map(|(_, piece)| piece.last_modified_us).max();
    if newest.is_none_or(|newest| !is_old(newest, now)) {
        return Ok(false);
    }
    let Some(there) = store.listed(whole).await? else { return Ok(false) };
    let end = pieces.iter().map(|(name, _)| name.to).max();
    // A store may tell time in seconds.
    let is_beside = |(name, piece): &(TailName, Listed)| {
        name.from == 0 && Some(name.to) == end && piece.last_modified_us >= there.last_modified_us
    };
    if !is_old(there.last_modified_us, now) || pieces.iter().any(is_beside) {
        return Ok(false);
    }
    reads_back(store, whole, ObjectKind::Segment).await
}

/// Whether a piece begins where one of those ends, or the segment does.
fn goes_on(name: &TailName, reached: &BTreeMap<(&str, u32), (usize, &TailName)>) -> bool {
    name.from == 0 || reached.contains_key(&(name.member.as_str(), name.from))
}

/// Of the pieces that something takes in, those that may go: what stays goes on from where something ends as it did before.
fn spare_joints<'a>(names: &[&'a TailName], mut doomed: BTreeSet<&'a TailName>) -> BTreeSet<&'a TailName> {
    let before = reached(names.iter().copied());
    loop {
        let after = reached(names.iter().copied().filter(|name| !doomed.contains(name)));
        let hangs = |name: &&TailName| !doomed.contains(name) && goes_on(name, &before) && !goes_on(name, &after);
        let joints: BTreeSet<_> =
            names.iter().filter(|name| hangs(name)).map(|name| (&name.member, name.from)).collect();
        let count = doomed.len();
        doomed.retain(|name| !joints.contains(&(&name.member, name.to)));
        if doomed.len() == count {
            return doomed;
        }
    }
}

fn is_old(modified_us: i64, now: Timestamp) -> bool {
    let readers = i64::try_from(READERS.as_micros()).unwrap_or(i64::MAX);
    now.as_microsecond().saturating_sub(modified_us) > readers
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use jiff::SignedDuration;

    use super::*;
    use crate::crypto::DomainKey;
    use crate::format::wal_segment::SegmentFacts;
    use crate::format::wal_tail::longest_chain;
    use crate::keyring::Keyring;
    use crate::postgres::{Branch, Segment, SegmentSize, SystemId, Timeline, WalBranch};
    use crate::wal_archive::{OwnedSegment, OwnedTail, WalArchive};

    const WAL: WalBranch = WalBranch { system_id: SystemId(5), timeline: Timeline(1), branch: Branch::ROOT };

    fn size() -> SegmentSize {
        SegmentSize::new(1 << 20).unwrap()
    }

    fn segment(number: u64) -> Segment {
        Segment { timeline: Timeline(1), number }
    }

    async fn put(archive: &WalArchive, number: u64, from: u32, to: u32) {
        put_of(archive, (WAL, "pg1"), number, from, to).await;
    }

    async fn put_of(archive: &WalArchive, (wal, member): (WalBranch, &str), number: u64, from: u32, to: u32) {
        let id = archive.content_hasher().id();
        let tail = OwnedTail {
            wal,
            segment: segment(number),
            segment_size: size(),
            name: TailName { from, to, member: member.into() },
            before: id,
            after: id,
            bytes: Bytes::from(vec![0; (to - from) as usize]),
            facts: SegmentFacts::default(),
            shipped_at_us: 0,
            complete_at_us: None,
        };
        archive.put_tail(tail).await.unwrap();
    }

    async fn whole(archive: &WalArchive, number: u64) {
        let facts = SegmentFacts { valid_bytes: 1 << 20, ..SegmentFacts::default() };
        let upload = OwnedSegment {
            wal: WAL,
            segment: segment(number),
            segment_size: size(),
            content: vec![1; 1 << 20],
            facts,
            predecessor: None,
            member: "pg1".into(),
            shipped_at_us: 0,
        };
        archive.put_segment(upload).await.unwrap();
    }

    /// Received twice and cut otherwise, as after a restart of the agent.
    #[test]
    fn what_another_piece_goes_on_from_is_kept() {
        let name = |(from, to): (u32, u32)| TailName { from, to, member: "pg1".into() };
        let left = |pieces: &[(u32, u32)], doomed: &[(u32, u32)]| {
            let (names, doomed): (Vec<_>, Vec<_>) =
                (pieces.iter().copied().map(name).collect(), doomed.iter().copied().map(name).collect());
            let dead = spare_joints(&names.iter().collect::<Vec<_>>(), doomed.iter().collect());
            names.iter().filter(|name| !dead.contains(name)).map(|name| (name.from, name.to)).collect::<Vec<_>>()
        };
        let all = [(0, 300), (300, 310), (0, 131), (131, 312), (312, 320)];
        assert_eq!(left(&all, &[(0, 131), (300, 310)]), [(0, 300), (0, 131), (131, 312), (312, 320)]);
        assert_eq!(left(&[(0, 10), (10, 20), (20, 30), (0, 20)], &[(0, 10), (10, 20)]), [(20, 30), (0, 20)]);
        let two_deep = [(0, 5), (5, 10), (10, 30), (0, 20), (20, 22)];
        assert_eq!(left(&two_deep, &[(0, 5), (5, 10)]), two_deep);
    }

    proptest::proptest! {
        #[test]
        fn nothing_that_could_be_read_is_lost(cuts in proptest::collection::vec((0..12u32, 1..6u32), 1..14)) {
            let names: Vec<TailName> = cuts.iter().map(|(from, length)| TailName { from: *from, to: from + length, member: "pg1".into() }).collect();
            let all: Vec<&TailName> = names.iter().collect();
            let attached = reached(all.iter().copied());
            let larger: Vec<_> = all.iter().filter(|name| goes_on(name, &attached)).collect();
            let doomed = all.iter().copied().filter(|name| larger.iter().any(|larger| larger.takes_in(name))).collect();
            let dead = spare_joints(&all, doomed);
            let left: Vec<TailName> = names.iter().filter(|name| !dead.contains(name)).cloned().collect();
            let end = |names: &[TailName]| longest_chain(names).last().map(|last| last.to);
            proptest::prop_assert_eq!(end(&left), end(&names));
        }
    }

    #[tokio::test]
    async fn pieces_of_two_servers_stay_beside_a_whole_segment() {
        let (store, cluster) = (Store::in_memory(), "orders".parse::<ClusterName>().unwrap());
        let keys = Arc::new(Keyring::of(DomainKey::generate().unwrap()));
        let archive = WalArchive::new(store.clone(), cluster.clone(), keys, 3);
        let twin = WalBranch { branch: Branch([7; 8]), ..WAL };
        for (number, wal, member) in [(1, WAL, "pg1"), (1, WAL, "pg2"), (2, WAL, "pg1"), (9, twin, "pg2")] {
            put_of(&archive, (wal, member), number, 0, 10).await;
        }
        whole(&archive, 1).await;
        whole(&archive, 2).await;
        let later = Timestamp::now() + SignedDuration::from_hours(2);
        assert_eq!(remove(&store, &cluster, later).await.unwrap(), Removed::default());
    }

    #[tokio::test]
    async fn only_what_something_else_holds_is_removed_and_readers_are_given_time() {
        let (store, cluster) = (Store::in_memory(), "orders".parse::<ClusterName>().unwrap());
        let keys = Arc::new(Keyring::of(DomainKey::generate().unwrap()));
        let archive = WalArchive::new(store.clone(), cluster.clone(), keys, 3);
        for number in [1, 2, 3] {
            for (from, to) in [(0, 10), (10, 20), (20, 30)] {
                put(&archive, number, from, to).await;
            }
        }
        whole(&archive, 1).await;
        put(&archive, 2, 0, 20).await;
        let left = async |number| archive.tails(WAL, segment(number), size()).await.unwrap().len();
        let now = Timestamp::now();
        assert_eq!(remove(&store, &cluster, now).await.unwrap(), Removed::default(), "readers are given an hour");
        let later = now + SignedDuration::from_hours(2);
        let damaged = layout::wal_segment(&cluster, &WAL, segment(3), size());
        store.put_new(&damaged, Bytes::from_static(b"WALFSEAL and no more")).await.unwrap();
        assert_eq!(remove(&store, &cluster, later).await.unwrap().pieces, 3 + 2);
        assert_eq!((left(1).await, left(2).await, left(3).await), (0, 2, 3), "a damaged segment takes no one's place");
        assert_eq!(remove(&store, &cluster, later).await.unwrap(), Removed::default());
    }
}
