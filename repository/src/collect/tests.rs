//! Runs of the collector on a store, with kills and lost replies at every step.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use object_store::ObjectStore;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::cluster_log::Author;
use crate::format::log_entry::{Action, Open};
use crate::format::reference::tests::sample;
use crate::format::reference::{PackUse, SessionPacks};
use crate::ids::{Digest, DomainId, PackId, RecipientId};
use crate::open::RepositorySpec;
use crate::postgres::{Lsn, Segment, SegmentSize};
use crate::store::faulty::{Fault, FaultyStore};
use crate::store::{RetryPolicy, Store};

const GRACE: SignedDuration = SignedDuration::from_hours(24);

fn orders() -> ClusterName {
    "orders".parse().unwrap()
}

fn id(name: &str) -> BackupId {
    name.parse().unwrap()
}

fn root() -> Signer {
    Signer::from_seed(&[1; 32])
}

/// A repository with one cluster, whose objects are stand-ins: a collector opens none of them.
struct Place {
    repository: Repository,
}

impl Place {
    async fn made() -> Place {
        Place::on(Store::in_memory()).await
    }

    async fn on(store: Store) -> Place {
        let spec = RepositorySpec { root_public_key: root().public_key(), recovery_recipient: RecipientId([1; 32]) };
        let (repository, _) = Repository::init(store, spec).await.unwrap();
        let place = Place { repository };
        place.append(Action::Begin { domain: DomainId([1; 16]), key_commitment: [0; 32] }).await;
        place
    }

    async fn append(&self, action: Action) {
        let mut log = self.repository.cluster_log(&orders());
        let mut left = Some(action);
        log.append_unless_done(Author::host(&root()), |_| left.take()).await.unwrap();
    }

    async fn put(&self, key: object_store::path::Path) {
        self.repository.store().put_new(&key, Bytes::from_static(b"0123456789")).await.unwrap();
    }

    async fn open(&self, name: &str, parents: &[&str], floor: u64) {
        let wal = sample("orders", name).wal;
        let parents = parents.iter().map(|parent| id(parent)).collect();
        self.append(Action::Open(Open { session: id(name), parents, run: None, wal, wal_floor: Lsn(floor) })).await;
    }

    /// A backup that stores packs of its own, and needs further ones.
    async fn back_up(&self, name: &str, own: &[u8], others: &[(&str, u8)]) {
        let parents: BTreeSet<&str> = others.iter().map(|(session, _)| *session).collect();
        self.open(name, &Vec::from_iter(parents), 1 << 24).await;
        for pack in own {
            self.put(layout::pack(&orders(), &id(name), PackId([*pack; 32]))).await;
        }
        self.put(layout::manifest(&orders(), &id(name))).await;
        let mut part = sample("orders", name);
        let used = own.iter().map(|pack| (name, *pack)).chain(others.iter().copied());
        part.sessions = used
            .map(|(session, pack)| SessionPacks {
                session: id(session),
                cluster: None,
                packs: vec![PackUse { pack: PackId([pack; 32]), stored_bytes: 10, used_bytes: 5 }],
            })
            .collect();
        (part.start_lsn, part.stop_lsn) = (Lsn(1 << 24), Lsn(2 << 24));
        let object = part.seal(&root(), self.repository.id());
        let reference_digest = Digest(*blake3::hash(&object).as_bytes());
        self.repository.store().put_new(&layout::reference(&orders(), &id(name)), object).await.unwrap();
        self.append(Action::Commit { session: id(name), manifest_digest: Digest([1; 32]), reference_digest }).await;
    }

    async fn purge(&self, name: &str) {
        self.append(Action::Expire { backup: id(name), reason: String::new() }).await;
        self.append(Action::Purge { backup: id(name) }).await;
    }

    async fn run(&self, after: SignedDuration, scope: Scope) -> Result<CollectReport, CollectError> {
        let now = Timestamp::now() + after;
        let spec = CollectSpec { now, grace: GRACE, scope, dry_run: false, rate: 1_000_000 };
        collect(&self.repository, &orders(), &root(), &spec, &CancellationToken::new()).await
    }

    /// Until nothing is left to do.
    async fn run_all(&self, scope: Scope) -> u64 {
        let mut removed = 0;
        loop {
            let report = self.run(GRACE + SignedDuration::from_hours(1), scope).await.unwrap();
            removed += report.removed_objects;
            if report.waiting.is_none() && report.removed_objects == 0 {
                return removed;
            }
        }
    }

    /// What lies there of packs, manifests and WAL.
    async fn left(&self) -> Vec<String> {
        let listed = self.repository.store().list(&layout::cluster(&orders())).await.unwrap();
        let below = |key: String| key.strip_prefix("clusters/orders/").map(str::to_owned);
        let mut left: Vec<String> = listed.into_iter().filter_map(|object| below(object.key.to_string())).collect();
        left.retain(|key| !key.starts_with("log/") && !key.ends_with(".refs"));
        left.sort();
        left
    }

    async fn packs(&self) -> Vec<String> {
        let short = |key: &String| Some(format!("{}/{}", key.split('/').nth(1)?, &key.split('/').nth(2)?[..2]));
        self.left().await.iter().filter(|key| key.starts_with("packs/")).filter_map(short).collect()
    }
}

#[tokio::test]
async fn what_a_purged_backup_alone_needed_goes_after_readers_had_their_time() {
    let place = Place::made().await;
    place.back_up("bk_1", &[1, 2], &[]).await;
    place.back_up("bk_2", &[3], &[("bk_1", 2)]).await;
    let nothing = CollectReport::default();
    assert_eq!(place.run(SignedDuration::ZERO, Scope::Ended).await.unwrap(), nothing, "nothing has ended");
    place.purge("bk_1").await;
    let planned = place.run(SignedDuration::ZERO, Scope::Ended).await.unwrap().waiting.expect("a plan");
    assert_eq!((planned.objects, planned.bytes), (2, 10), "a pack and a manifest");
    place.run(SignedDuration::from_hours(23), Scope::Ended).await.unwrap();
    assert_eq!(place.packs().await, ["bk_1/01", "bk_1/02", "bk_2/03"]);
    let done = place.run(SignedDuration::from_hours(25), Scope::Ended).await.unwrap();
    assert_eq!((done.removed_objects, done.waiting), (2, None));
    assert_eq!(place.packs().await, ["bk_1/02", "bk_2/03"]);
    place.purge("bk_2").await;
    place.run_all(Scope::Ended).await;
    assert!(place.packs().await.is_empty(), "and the last one takes with it what the first had left");
    let left = place.left().await;
    assert!(matches!(&left[..], [report] if report.ends_with(".done")), "{left:?}");
    let before = place.repository.store().counters();
    assert_eq!(place.run(SignedDuration::ZERO, Scope::Ended).await.unwrap(), nothing);
    let after = place.repository.store().counters();
    assert!(after.requests() - before.requests() <= 6, "an idle cluster costs next to nothing");
}

#[tokio::test]
async fn an_aborted_sessions_packs_go_and_a_running_ones_and_a_strangers_stay() {
    let place = Place::made().await;
    for name in ["bk_1", "bk_2"] {
        place.open(name, &[], 1 << 24).await;
        place.put(layout::pack(&orders(), &id(name), PackId([7; 32]))).await;
    }
    place.put(layout::pack(&orders(), &id("bk_9"), PackId([7; 32]))).await;
    place.append(Action::Abort { session: id("bk_1"), reason: String::new() }).await;
    place.run_all(Scope::Ended).await;
    place.run_all(Scope::Everything).await;
    assert_eq!(place.packs().await, ["bk_2/07", "bk_9/07"]);
}

#[tokio::test]
async fn a_pack_that_was_sent_and_named_by_nobody_is_found_by_looking_everywhere() {
    let place = Place::made().await;
    place.back_up("bk_1", &[1], &[]).await;
    place.put(layout::pack(&orders(), &id("bk_1"), PackId([8; 32]))).await;
    assert_eq!(place.run_all(Scope::Ended).await, 0);
    assert_eq!(place.run_all(Scope::Everything).await, 1);
    assert_eq!(place.packs().await, ["bk_1/01"]);
}

#[tokio::test]
async fn trimmed_wal_goes_with_all_that_lies_beside_it_but_for_what_makes_a_backup_consistent() {
    let place = Place::made().await;
    // Consistent in segment 1.
    place.back_up("bk_1", &[], &[]).await;
    let (wal, size) = (sample("orders", "bk_1").wal, SegmentSize::DEFAULT);
    let segment = |number| Segment { timeline: wal.timeline, number };
    for number in 0..6 {
        place.put(layout::wal_segment(&orders(), &wal, segment(number), size)).await;
    }
    place.put(layout::wal_partial(&orders(), &wal, segment(3), size, crate::ids::ChunkId([3; 32]))).await;
    place.put(layout::wal_backup_history(&orders(), &wal, segment(3), size, 40)).await;
    let piece = layout::TailName { from: 0, to: 9, member: "db1".to_owned() };
    place.put(layout::tail(&orders(), &wal, (segment(2), size), &piece)).await;
    place.put(layout::tail(&orders(), &wal, (segment(5), size), &piece)).await;
    place.append(Action::Trim { branch: wal, lsn: Lsn(4 << 24) }).await;
    place.run_all(Scope::Ended).await;
    let numbers = async || -> Vec<u64> {
        let listed = place.repository.store().list(&layout::wal(&orders())).await.unwrap();
        let number = |key| layout::parse_wal_object(&orders(), key, size);
        let numbers: BTreeSet<u64> = listed
            .iter()
            .filter_map(|object| match number(&object.key)? {
                (_, layout::WalObject::Segment(segment)) => Some(segment.number),
                _ => None,
            })
            .collect();
        assert_eq!(numbers.len(), listed.len(), "nothing else is left: {listed:?}");
        numbers.into_iter().collect()
    };
    assert_eq!(numbers().await, [1, 4, 5]);
    let tails = place.repository.store().list(&layout::cluster_tails(&orders())).await.unwrap();
    assert_eq!(tails.len(), 1, "that of segment 5");
    place.purge("bk_1").await;
    place.run_all(Scope::Ended).await;
    assert_eq!(numbers().await, [4, 5]);
}

#[tokio::test]
async fn a_plan_that_names_what_is_needed_removes_nothing() {
    let place = Place::made().await;
    place.back_up("bk_1", &[1], &[]).await;
    let plan = CollectPlan {
        cluster: orders(),
        sequence: 1,
        at_us: 0,
        packs: [(id("bk_1"), vec![PackId([1; 32])])].into(),
        backups: vec![],
        wal: BTreeMap::new(),
        trims: BTreeMap::new(),
        bytes: 0,
    };
    let write = async |signer: &Signer, sequence| {
        let plan = CollectPlan { sequence, ..plan.clone() };
        let object = plan.seal(signer, place.repository.id());
        place.repository.store().put_new(&layout::collect_plan(&orders(), sequence), object).await.unwrap();
    };
    write(&Signer::from_seed(&[9; 32]), 0).await;
    let later = GRACE + SignedDuration::from_hours(1);
    assert_eq!(
        place.run(later, Scope::Ended).await.unwrap(),
        CollectReport::default(),
        "a stranger's counts for nothing"
    );
    write(&root(), 1).await;
    let error = place.run(later, Scope::Ended).await.unwrap_err();
    assert!(matches!(error, CollectError::Needed { sequence: 1, .. }), "{error}");
    assert_eq!(place.packs().await, ["bk_1/01"]);
}

#[tokio::test]
async fn a_reference_part_that_does_not_read_stops_collection() {
    let place = Place::made().await;
    place.back_up("bk_1", &[1], &[]).await;
    place.back_up("bk_2", &[2], &[]).await;
    place.purge("bk_1").await;
    place.repository.store().delete(vec![layout::reference(&orders(), &id("bk_2"))]).await.unwrap();
    let error = place.run(SignedDuration::ZERO, Scope::Ended).await.unwrap_err();
    assert!(matches!(&error, CollectError::Needs(UnknownNeeds(backup)) if backup.as_str() == "bk_2"), "{error}");
}

/// A request that fails ends the run as a kill would: with each of them in turn, the next runs do the rest.
#[tokio::test]
async fn a_run_that_is_killed_at_any_request_is_gone_on_with() {
    let mut requests = 0;
    loop {
        let faulty = FaultyStore::in_memory(1);
        let inner: Arc<dyn ObjectStore> = faulty.clone();
        let place = Place::on(Store::wrap(inner, "faulty:///", RetryPolicy::impatient())).await;
        place.back_up("bk_1", &[1, 2], &[]).await;
        place.back_up("bk_2", &[3], &[("bk_1", 2)]).await;
        place.purge("bk_1").await;
        faulty.inject_after(requests, Fault::Deny);
        let mut failures = 0;
        for _ in 0..3 {
            failures += u32::from(place.run(GRACE + SignedDuration::from_hours(1), Scope::Ended).await.is_err());
        }
        faulty.heal();
        place.run_all(Scope::Ended).await;
        assert_eq!(place.packs().await, ["bk_1/02", "bk_2/03"], "killed at request {requests}");
        if failures == 0 {
            break;
        }
        requests += 1;
    }
    assert!(requests > 8, "{requests}");
}
