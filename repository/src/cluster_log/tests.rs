use std::sync::Arc;

use object_store::ObjectStoreExt;

use super::model::{cluster, commit, open};
use super::*;
use crate::format::clear::{self, ObjectKind};
use crate::format::log_entry::Action;
use crate::ids::{BackupId, DomainId, RepositoryId};
use crate::layout;
use crate::signature::{CertifiedRole, Signer, WriterStatement};
use crate::store::RetryPolicy;
use crate::store::faulty::{Fault, FaultyStore, On};

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("refused")]
struct Refused;

fn root() -> Signer {
    Signer::from_seed(&[1; 32])
}

fn trust() -> TrustRoot {
    TrustRoot { repository_id: RepositoryId([7; 16]), root_public_key: root().public_key() }
}

fn agent(name: &str) -> Signer {
    let (key, _) = Signer::generate();
    let claims = WriterStatement {
        repository_id: None,
        public_key: key.public_key(),
        role: CertifiedRole::Agent { clusters: vec![cluster()] },
        name: name.to_owned(),
        not_before_us: 0,
        not_after_us: i64::MAX,
    };
    key.with_chain(root().chain_below(root().issue(claims))).unwrap()
}

fn handle(faulty: &Arc<FaultyStore>) -> ClusterLog {
    let store = Store::wrap(faulty.clone(), "faulty:///", RetryPolicy::impatient());
    ClusterLog::new(store, trust(), AppendMode::AtomicCreate, cluster(), LogMemory::default())
}

async fn begun(faulty: &Arc<FaultyStore>) -> ClusterLog {
    let mut log = handle(faulty);
    append(&mut log, &root(), Action::Begin { domain: DomainId([1; 16]), key_commitment: [1; 32] }).await.unwrap();
    log
}

async fn append(log: &mut ClusterLog, signer: &Signer, action: Action) -> Result<Outcome, AppendError<Refused>> {
    log.append(Author::host(signer), |_| Decision::Append(action.clone())).await
}

fn id(name: &str) -> BackupId {
    name.parse().unwrap()
}

#[tokio::test]
async fn many_append_at_once_through_every_fault_and_all_read_the_same() {
    for seed in 0..8 {
        let faulty = FaultyStore::in_memory(seed);
        begun(&faulty).await;
        for (fault, on, probability) in [
            (Fault::LoseReply, On::Put, 0.3),
            (Fault::Conflict, On::Put, 0.2),
            (Fault::Reject, On::Any, 0.1),
            (Fault::Truncate, On::Get, 0.1),
        ] {
            faulty.inject_randomly(fault, on, "log", probability);
        }
        let writers = (0..8).map(|n| {
            let mut log = handle(&faulty);
            async move {
                let (signer, name) = (agent(&format!("db{n}")), format!("bk_{n}"));
                for action in [open(&name, None, None, 1), commit(&name)] {
                    append(&mut log, &signer, action).await.unwrap();
                }
                log
            }
        });
        let mut logs = futures::future::join_all(writers).await;
        faulty.heal();
        for log in &mut logs {
            log.refresh().await.unwrap();
        }
        let state = logs[0].state();
        assert_eq!((state.next(), state.voids()), (17, 0), "seed {seed}");
        assert_eq!(state.backups().len(), 8, "seed {seed}");
        assert!(logs.iter().all(|log| log.state() == state), "seed {seed}");
    }
}

#[tokio::test]
async fn of_two_who_serve_one_run_the_second_sees_the_first() {
    let faulty = FaultyStore::in_memory(1);
    begun(&faulty).await;
    let race = ["bk_1", "bk_2"].map(|name| {
        let mut log = handle(&faulty);
        async move {
            let serve = |state: &ClusterState| match state.serving("nightly") {
                Some(_) => Decision::Refuse(Refused),
                None => Decision::Append(open(name, None, Some("nightly"), 1)),
            };
            log.append(Author::host(&root()), serve).await
        }
    });
    let outcomes = futures::future::join_all(race).await;
    assert_eq!(outcomes.iter().filter(|outcome| matches!(outcome, Ok(Outcome::Appended { sequence: 1 }))).count(), 1);
    assert_eq!(outcomes.iter().filter(|outcome| matches!(outcome, Err(AppendError::Refused(Refused)))).count(), 1);
}

#[tokio::test]
async fn an_entry_that_would_be_void_is_not_written() {
    let faulty = FaultyStore::in_memory(1);
    let mut log = begun(&faulty).await;
    let stranger = Signer::from_seed(&[9; 32]);
    for (signer, action, expected) in [
        (&root(), commit("bk_1"), "session bk_1 is not open"),
        (&agent("db1"), Action::Purge { backup: id("bk_1") }, "\"db1\" may not write this entry"),
        (&stranger, open("bk_1", None, None, 1), "neither the root key"),
    ] {
        let error = append(&mut log, signer, action).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert_eq!(handle(&faulty).refresh().await.unwrap().next(), 1);
}

#[tokio::test]
async fn forged_and_foreign_entries_are_passed_over() {
    let faulty = FaultyStore::in_memory(1);
    let mut log = begun(&faulty).await;
    let forged = clear::encode(ObjectKind::LogEntry, b"\x0a\x03abc");
    faulty.put(&layout::log_entry(&cluster(), 1), forged.into()).await.unwrap();
    let first = faulty.get(&layout::log_entry(&cluster(), 0)).await.unwrap().bytes().await.unwrap();
    faulty.put(&layout::log_entry(&cluster(), 2), first.into()).await.unwrap();
    let outcome = append(&mut log, &agent("db1"), open("bk_1", None, None, 1)).await.unwrap();
    assert_eq!(outcome, Outcome::Appended { sequence: 3 });
    assert_eq!(log.state().voids(), 2);
    assert_eq!(log.state().keys().unwrap().newest_version(), 1);
}

#[tokio::test]
async fn a_damaged_or_missing_entry_stops_readers_and_writers() {
    let faulty = FaultyStore::in_memory(1);
    let mut log = begun(&faulty).await;
    for name in ["bk_1", "bk_2", "bk_3"] {
        append(&mut log, &root(), open(name, None, None, 1)).await.unwrap();
    }
    let key = layout::log_entry(&cluster(), 2);
    let entry = faulty.get(&key).await.unwrap().bytes().await.unwrap();
    faulty.put(&key, entry.slice(..entry.len() - 1).into()).await.unwrap();
    let error = handle(&faulty).refresh().await.unwrap_err();
    assert!(matches!(error, LogError::Unreadable { sequence: 2, .. }), "{error}");
    faulty.delete(&key).await.unwrap();
    let error = append(&mut handle(&faulty), &root(), open("bk_4", None, None, 1)).await.unwrap_err();
    assert!(matches!(error, AppendError::Log(LogError::Hole { missing: 2, present: 3, .. })), "{error}");
    faulty.put(&key, entry.into()).await.unwrap();
    assert_eq!(handle(&faulty).refresh().await.unwrap().next(), 4);
}

#[tokio::test]
async fn an_append_of_unknown_outcome_is_found_by_the_next_one() {
    let faulty = FaultyStore::in_memory(1);
    let mut log = begun(&faulty).await;
    log.refresh().await.unwrap();
    let once = |state: &ClusterState| match state.session(&id("bk_1")) {
        Some(_) => Decision::<Refused>::Nothing,
        None => Decision::Append(open("bk_1", None, None, 1)),
    };
    // The entry is written, its reply is lost, and the store answers no more.
    let (reading, breaking) = (On::Get, "log/00000000000000000001");
    faulty.inject(Fault::Slow(std::time::Duration::ZERO), reading, breaking, 1);
    faulty.inject(Fault::Reject, reading, breaking, u64::MAX);
    faulty.inject(Fault::LoseReply, On::Put, breaking, u64::MAX);
    log.store = Store::wrap(faulty.clone(), "faulty:///", RetryPolicy::never());
    let outcome = log.append(Author::host(&root()), once).await;
    assert!(matches!(&outcome, Err(AppendError::Log(error)) if error.is_retryable()), "{outcome:?}");
    faulty.heal();
    let outcome = handle(&faulty).append(Author::host(&root()), once).await.unwrap();
    assert_eq!(outcome, Outcome::Nothing);
}

#[tokio::test]
async fn an_idle_log_costs_one_request() {
    let faulty = FaultyStore::in_memory(1);
    let mut log = begun(&faulty).await;
    for n in 0..40 {
        append(&mut log, &root(), open(&format!("bk_{n}"), None, None, 1)).await.unwrap();
    }
    let before = log.store.counters();
    log.refresh().await.unwrap();
    assert_eq!(log.store.counters().since(&before).requests(), 1);
    let mut fresh = handle(&faulty);
    fresh.refresh().await.unwrap();
    assert!(fresh.store.counters().requests() < 41 + 17, "{:?}", fresh.store.counters());
    assert_eq!(fresh.state(), log.state());
}

#[tokio::test]
async fn a_store_without_atomic_creates_is_not_appended_to() {
    let faulty = FaultyStore::in_memory(1);
    let mut log = handle(&faulty);
    log.append_mode = AppendMode::Sequenced;
    let begin = Action::Begin { domain: DomainId([1; 16]), key_commitment: [1; 32] };
    let error = append(&mut log, &root(), begin).await.unwrap_err();
    assert!(matches!(error, AppendError::Log(LogError::Sequenced { .. })));
}
