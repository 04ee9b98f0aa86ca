//! Copies between two stores, with kills at every request.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::path::Path;

use super::backups::Copied;
use super::wal::{Part, WalProgress};
use super::*;
use crate::cluster_log::SessionState;
use crate::crypto::DomainKey;
use crate::format::log_entry::{HeldStretch, Hold, HoldSubject, Open};
use crate::format::reference::tests::sample;
use crate::format::reference::{PackUse, SessionPacks};
use crate::format::sealed::{Compressor, SealedWriter};
use crate::ids::{Digest, PackId, RecipientId};
use crate::open::RepositorySpec;
use crate::postgres::{Lsn, Segment, SegmentSize, WalBranch};
use crate::retention::gather::{Gathered, Known};
use crate::signature::Signer;
use crate::store::RetryPolicy;
use crate::store::faulty::{Fault, FaultyStore};

fn orders() -> ClusterName {
    "orders".parse().unwrap()
}

fn id(name: &str) -> BackupId {
    name.parse().unwrap()
}

fn root() -> Signer {
    Signer::from_seed(&[1; 32])
}

fn key() -> DomainKey {
    DomainKey::from_parts(DomainId([1; 16]), 1, [1; 32], [2; 32]).unwrap()
}

fn wal() -> WalBranch {
    sample("orders", "bk_1").wal
}

/// The bytes of pack number so and so, and its name.
fn pack(number: u8) -> (PackId, Bytes) {
    let bytes = Bytes::from(vec![number; 100]);
    (PackId(*blake3::hash(&bytes).as_bytes()), bytes)
}

fn segment(number: u64) -> Path {
    let segment = Segment { timeline: wal().timeline, number };
    layout::wal_segment(&orders(), &wal(), segment, SegmentSize::DEFAULT)
}

fn sealed(kind: ObjectKind) -> Bytes {
    SealedWriter::new(&key(), kind, Some("name"), 0).unwrap().finish(b"", &mut Compressor::new(1)).unwrap()
}

/// One place. Its agents' part is played by the root key.
struct Place {
    repository: Repository,
}

impl Place {
    async fn made(store: Store) -> Place {
        let spec = RepositorySpec { root_public_key: root().public_key(), recovery_recipient: RecipientId([1; 32]) };
        Place { repository: Repository::init(store, spec).await.unwrap().0 }
    }

    async fn begun() -> Place {
        let place = Place::made(Store::in_memory()).await;
        let key_commitment = key().commitment();
        place.append(Action::Begin { domain: DomainId([1; 16]), key_commitment }).await;
        let wrapped = layout::domain_key(DomainId([1; 16]), 1, RecipientId([1; 32]));
        place.put(&wrapped, Bytes::from_static(b"a wrapped key")).await;
        place
    }

    async fn append(&self, action: Action) {
        let mut left = Some(action);
        let mut log = self.repository.cluster_log(&orders());
        log.append_unless_done(Author::host(&root()), |_| left.take()).await.unwrap();
    }

    async fn put(&self, key: &Path, bytes: Bytes) {
        self.repository.store().put_new(key, bytes).await.unwrap();
    }

    /// Of packs by the session under which they lie; its own are stored. Consistent in one segment.
    async fn back_up(&self, name: &str, packs: &[(&str, u8)], number: u64) {
        let parents: Vec<BackupId> =
            packs.iter().filter(|(session, _)| *session != name).map(|(session, _)| id(session)).collect();
        let wal_floor = Lsn(number << 24);
        self.append(Action::Open(Open { session: id(name), parents, run: None, wal: wal(), wal_floor })).await;
        let mut by_session: BTreeMap<&str, Vec<PackUse>> = BTreeMap::new();
        for (session, number) in packs {
            let (pack, bytes) = pack(*number);
            by_session.entry(session).or_default().push(PackUse { pack, stored_bytes: 100, used_bytes: 9 });
            if *session == name {
                self.put(&layout::pack(&orders(), &id(name), pack), bytes).await;
            }
        }
        let mut part = sample("orders", name);
        (part.start_lsn, part.stop_lsn) = (wal_floor, Lsn((number << 24) + 9));
        let own = |(session, packs): (&str, _)| SessionPacks { session: id(session), cluster: None, packs };
        part.sessions = by_session.into_iter().map(own).collect();
        self.ship(number).await;
        let manifest = Bytes::from(format!("manifest of {name}"));
        let manifest_digest = Digest(*blake3::hash(&manifest).as_bytes());
        self.put(&layout::manifest(&orders(), &id(name)), manifest).await;
        let object = part.seal(&root(), self.repository.id());
        let reference_digest = Digest(*blake3::hash(&object).as_bytes());
        self.put(&layout::reference(&orders(), &id(name)), object).await;
        self.append(Action::Commit { session: id(name), manifest_digest, reference_digest }).await;
    }

    async fn ship(&self, number: u64) {
        self.put(&segment(number), sealed(ObjectKind::Segment)).await;
    }

    /// Live backups, each with the sessions of its packs. Every one of them lies there, under its name's hash.
    async fn live(&self) -> Vec<String> {
        let mut log = self.repository.cluster_log(&orders());
        log.refresh().await.unwrap();
        let backups = self.repository.backups(&log).await;
        assert!(backups.unreadable.is_empty(), "{:?}", backups.unreadable);
        let mut live = Vec::new();
        for backup in backups.readable {
            let part = backup.reference;
            let mut homes: Vec<&str> = Vec::new();
            for (cluster, session, used) in part.packs() {
                let bytes = self.repository.store().get(&layout::pack(cluster, session, used.pack)).await.unwrap();
                assert_eq!(PackId(*blake3::hash(&bytes).as_bytes()), used.pack);
                homes.push(session.as_str());
                let open = &log.state().session(&part.backup).unwrap().open;
                assert!(
                    *session == part.backup
                        || open.parents.iter().any(|parent| {
                            let needed = &log.state().session(parent).unwrap().state;
                            matches!(needed, SessionState::Live(_))
                        })
                );
            }
            let manifest = self.repository.store().get(&layout::manifest(&orders(), &part.backup)).await.unwrap();
            assert_eq!(Digest(*blake3::hash(&manifest).as_bytes()), backup.commit.manifest_digest);
            homes.sort_unstable();
            live.push(format!("{}: {}", part.backup, homes.join(" ")));
        }
        live
    }

    async fn count(&self, prefix: &Path) -> usize {
        self.repository.store().list(prefix).await.unwrap().len()
    }
}

fn copier<'a>(source: &'a Place, target: &'a Place, signer: &'a Signer) -> Copier<'a> {
    Copier { source: &source.repository, target: &target.repository, author: Author::host(signer) }
}

/// As a loop would: WAL first, then backups, then the rest of the WAL.
async fn round(copier: &Copier<'_>, progress: &mut WalProgress) -> Result<(), ReplicateError> {
    if !copier.begin(&orders()).await? {
        return Ok(());
    }
    copier.copy_wal(&orders(), Part::Newest, progress).await?;
    for backup in copier.lacking(&orders()).await?.backups {
        copier.copy_backup(&orders(), &backup).await?;
    }
    copier.copy_wal(&orders(), Part::All, progress).await.map(drop)
}

#[tokio::test]
async fn an_empty_replica_gets_the_newest_first_and_then_all_and_nothing_twice() {
    let (signer, source) = (root(), Place::begun().await);
    let target = Place::made(Store::in_memory()).await;
    source.back_up("bk_1", &[("bk_1", 1), ("bk_1", 2)], 1).await;
    source.ship(2).await;
    source.back_up("bk_2", &[("bk_1", 2), ("bk_2", 3)], 3).await;
    source.ship(4).await;
    let copier = copier(&source, &target, &signer);
    assert!(copier.begin(&orders()).await.unwrap());
    let mut progress = WalProgress::default();
    let copied = copier.copy_wal(&orders(), Part::Newest, &mut progress).await.unwrap();
    assert_eq!(copied.segments, 2, "those behind the newest backup");
    assert!(progress.complete_as_of.is_some());
    let lacking = copier.lacking(&orders()).await.unwrap().backups;
    let copied = copier.copy_backup(&orders(), &lacking[0]).await.unwrap();
    assert_eq!(copied, Copied::Brought { packs: 2, bytes: 200 });
    assert_eq!(target.live().await, ["bk_2: bk_2 bk_2"]);
    round(&copier, &mut progress).await.unwrap();
    assert_eq!(target.live().await, ["bk_2: bk_2 bk_2", "bk_1: bk_1 bk_2"], "the older one builds on the newer one");
    assert_eq!(target.count(&layout::packs(&orders())).await, 3);
    assert_eq!(target.count(&layout::wal(&orders())).await, 4);
    source.ship(5).await;
    let before = source.repository.store().counters();
    let copied = copier.copy_wal(&orders(), Part::Newest, &mut progress).await.unwrap();
    let requests = source.repository.store().counters().requests() - before.requests();
    assert_eq!((copied.segments, target.count(&layout::wal(&orders())).await), (1, 5));
    assert!(requests < 10, "{requests}");
    let (mut log, known) = (target.repository.cluster_log(&orders()), Known::default());
    let gathered = Gathered::read(&target.repository, &mut log, &known).await.unwrap();
    let seen = |name: &str| gathered.candidates.iter().find(|one| one.facts.id == id(name)).unwrap().seen_at;
    assert!(seen("bk_1") < seen("bk_2"), "the order is that of the first place");
}

#[tokio::test]
async fn what_is_removed_in_one_place_stays_in_the_other() {
    let (signer, source) = (root(), Place::begun().await);
    let target = Place::made(Store::in_memory()).await;
    let (copier, mut progress) = (copier(&source, &target, &signer), WalProgress::default());
    source.back_up("bk_1", &[("bk_1", 1)], 1).await;
    round(&copier, &mut progress).await.unwrap();
    source.back_up("bk_2", &[("bk_1", 1), ("bk_2", 2)], 2).await;
    source.append(Action::Expire { backup: id("bk_1"), reason: String::new() }).await;
    source.append(Action::Purge { backup: id("bk_1") }).await;
    source.append(Action::Trim { branch: wal(), lsn: Lsn(2 << 24) }).await;
    round(&copier, &mut progress).await.unwrap();
    assert_eq!(target.live().await, ["bk_1: bk_1", "bk_2: bk_1 bk_2"]);
    // And what the replica has let go of does not come back.
    target.append(Action::Expire { backup: id("bk_2"), reason: String::new() }).await;
    target.append(Action::Purge { backup: id("bk_2") }).await;
    target.append(Action::Trim { branch: wal(), lsn: Lsn(3 << 24) }).await;
    round(&copier, &mut progress).await.unwrap();
    assert_eq!(target.live().await, ["bk_1: bk_1"]);
    source.back_up("bk_3", &[("bk_2", 2)], 2 + 1).await;
    round(&copier, &mut progress).await.unwrap();
    assert_eq!(target.live().await, ["bk_1: bk_1", "bk_3: bk_3"], "its pack was brought again");
}

#[tokio::test]
async fn what_is_held_in_one_place_is_held_in_the_other_as_long() {
    let (signer, source) = (root(), Place::begun().await);
    let target = Place::made(Store::in_memory()).await;
    source.back_up("bk_1", &[("bk_1", 1)], 1).await;
    source.back_up("bk_2", &[("bk_2", 2)], 2).await;
    let hold = |name: &str, subject| {
        let (reason, owner) = (String::new(), "ann".to_owned());
        Action::Hold(Hold { hold: name.parse().unwrap(), subject, reason, owner, until_us: None })
    };
    source.append(hold("hold_1", HoldSubject::Backup(id("bk_1")))).await;
    let stretch = HeldStretch { base: id("bk_2"), end: None, from_us: 1, to_us: None };
    source.append(hold("hold_2", HoldSubject::Stretch(stretch))).await;
    let copier = copier(&source, &target, &signer);
    copier.begin(&orders()).await.unwrap();
    let held = async || -> Vec<String> {
        copier.copy_holds(&orders()).await.unwrap();
        let (_, to) = copier.logs(&orders()).await.unwrap();
        to.state().holds().map(|hold| hold.hold.to_string()).collect()
    };
    assert_eq!(held().await, Vec::<String>::new(), "nothing of it is there yet");
    round(&copier, &mut WalProgress::default()).await.unwrap();
    assert_eq!(held().await, ["hold_1", "hold_2"]);
    assert_eq!(held().await, ["hold_1", "hold_2"]);
    source.append(Action::Release { hold: "hold_1".parse().unwrap() }).await;
    assert_eq!(held().await, ["hold_2"]);
}

/// Agents send several segments at once, and try those again that failed.
#[tokio::test]
async fn a_segment_that_is_stored_after_those_behind_it_is_brought() {
    let (signer, source) = (root(), Place::begun().await);
    let target = Place::made(Store::in_memory()).await;
    source.back_up("bk_1", &[("bk_1", 1)], 1).await;
    source.ship(3).await;
    let (copier, mut progress) = (copier(&source, &target, &signer), WalProgress::default());
    round(&copier, &mut progress).await.unwrap();
    for (number, copied) in [(5, 1), (2, 1), (4, 1), (7, 1), (6, 1), (8, 1)] {
        source.ship(number).await;
        let found = copier.copy_wal(&orders(), Part::Newest, &mut progress).await.unwrap();
        assert_eq!(found.segments, copied, "segment {number}");
    }
    assert_eq!(target.count(&layout::wal(&orders())).await, 8);
}

/// The first place burns down, the replica is written to, and the first place comes back.
#[tokio::test]
async fn copying_goes_the_other_way_when_places_change_their_parts() {
    let (signer, first) = (root(), Place::begun().await);
    let second = Place::made(Store::in_memory()).await;
    first.back_up("bk_1", &[("bk_1", 1)], 1).await;
    round(&copier(&first, &second, &signer), &mut WalProgress::default()).await.unwrap();
    second.back_up("bk_2", &[("bk_1", 1), ("bk_2", 2)], 2).await;
    second.ship(3).await;
    round(&copier(&second, &first, &signer), &mut WalProgress::default()).await.unwrap();
    assert_eq!(first.live().await, second.live().await);
    assert_eq!(first.count(&layout::wal(&orders())).await, 3);
    first.back_up("bk_3", &[("bk_2", 2), ("bk_3", 3)], 4).await;
    round(&copier(&first, &second, &signer), &mut WalProgress::default()).await.unwrap();
    assert_eq!(first.live().await, second.live().await);
    assert_eq!(first.live().await.len(), 3);
}

#[tokio::test]
async fn damage_is_named_and_not_brought() {
    let (signer, source) = (root(), Place::begun().await);
    let target = Place::made(Store::in_memory()).await;
    source.back_up("bk_1", &[("bk_1", 1)], 1).await;
    source.ship(2).await;
    let store = source.repository.store();
    let (name, whole) = pack(1);
    let at = layout::pack(&orders(), &id("bk_1"), name);
    for (key, bytes) in [(&at, Bytes::from(vec![9; 100])), (&segment(2), Bytes::from_static(b"nothing of the kind"))] {
        store.delete(vec![key.clone()]).await.unwrap();
        source.put(key, bytes).await;
    }
    let (copier, mut progress) = (copier(&source, &target, &signer), WalProgress::default());
    assert!(copier.begin(&orders()).await.unwrap());
    let copied = copier.copy_wal(&orders(), Part::All, &mut progress).await.unwrap();
    assert_eq!(copied.damaged.len(), 1, "{copied:?}");
    let lacking = copier.lacking(&orders()).await.unwrap().backups;
    let error = copier.copy_backup(&orders(), &lacking[0]).await.unwrap_err();
    assert!(matches!(&error, ReplicateError::Damaged { key, .. } if *key == at.to_string()), "{error}");
    assert_eq!(target.live().await, Vec::<String>::new());
    store.delete(vec![at.clone()]).await.unwrap();
    source.put(&at, whole).await;
    round(&copier, &mut progress).await.unwrap();
    assert_eq!(target.live().await, ["bk_1: bk_1"]);
}

#[tokio::test]
async fn what_was_begun_of_a_backup_that_is_gone_by_now_is_given_up() {
    let (signer, source) = (root(), Place::begun().await);
    let target = Place::made(Store::in_memory()).await;
    source.back_up("bk_1", &[("bk_1", 1)], 1).await;
    let copier = copier(&source, &target, &signer);
    copier.begin(&orders()).await.unwrap();
    let open = Open { session: id("bk_1"), parents: vec![], run: None, wal: wal(), wal_floor: Lsn(1 << 24) };
    target.append(Action::Open(open)).await;
    copier.give_up(&orders()).await.unwrap();
    let (_, to) = copier.logs(&orders()).await.unwrap();
    assert!(to.state().session(&id("bk_1")).unwrap().is_open());
    source.append(Action::Expire { backup: id("bk_1"), reason: String::new() }).await;
    source.append(Action::Purge { backup: id("bk_1") }).await;
    copier.give_up(&orders()).await.unwrap();
    let (_, to) = copier.logs(&orders()).await.unwrap();
    assert!(matches!(to.state().session(&id("bk_1")).unwrap().state, SessionState::Aborted { .. }));
}

/// A request that fails ends the copier as a kill would: with each of them in turn, the next one does the rest.
#[tokio::test]
async fn a_copier_that_is_killed_at_any_request_is_gone_on_with() {
    let (signer, source) = (root(), Place::begun().await);
    source.back_up("bk_1", &[("bk_1", 1), ("bk_1", 2)], 1).await;
    source.back_up("bk_2", &[("bk_1", 2), ("bk_2", 3)], 2).await;
    let mut requests = 0;
    loop {
        let faulty = FaultyStore::in_memory(1);
        let inner: Arc<dyn ObjectStore> = faulty.clone();
        let target = Place::made(Store::wrap(inner, "faulty:///", RetryPolicy::impatient())).await;
        faulty.inject_after(requests, Fault::Deny);
        let failed = round(&copier(&source, &target, &signer), &mut WalProgress::default()).await.is_err();
        faulty.heal();
        round(&copier(&source, &target, &signer), &mut WalProgress::default()).await.unwrap();
        assert_eq!(target.live().await, ["bk_2: bk_2 bk_2", "bk_1: bk_1 bk_2"], "at request {requests}");
        assert_eq!(target.count(&layout::packs(&orders())).await, 3, "at request {requests}");
        assert_eq!(target.count(&layout::wal(&orders())).await, 2, "at request {requests}");
        if !failed {
            break;
        }
        requests += 1;
    }
    assert!(requests > 15, "{requests}");
}
