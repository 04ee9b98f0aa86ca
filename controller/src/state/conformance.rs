//! What every engine must do, as scenarios over a fresh [`State`], and a model that random transactions are held
//! against. An engine's tests call [`scenarios`] and [`model`]; nothing here knows an engine.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::transaction::{MAX_KEY_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES};
use super::{Compare, Event, Op, OpResponse, State, StateError, Txn};

pub(super) async fn scenarios(state: State) {
    writes_carry_revisions(&state).await;
    compares_guard_writes(&state).await;
    prefixes_page_in_order(&state).await;
    limits_are_etcds(&state).await;
    watches_replay_and_follow(&state).await;
    leases_take_their_keys_along(&state).await;
    compaction_ends_watches_of_the_past(&state).await;
    racing_writers_lose_nothing(&state).await;
}

async fn writes_carry_revisions(state: &State) {
    let first = state.put("rev/a", "1").await.unwrap();
    let second = state.put("rev/a", "2").await.unwrap();
    assert_eq!(second, first + 1);
    let entry = state.get("rev/a").await.unwrap().unwrap();
    assert_eq!((entry.create_revision, entry.mod_revision, entry.version), (first, second, 2));
    assert_eq!(entry.value, "2");

    let gone = state.txn(Txn::new().then(Op::delete("rev/a"))).await.unwrap();
    assert_eq!(gone.responses, [OpResponse::Delete { existed: true }]);
    assert_eq!(gone.revision, second + 1);
    let again = state.txn(Txn::new().then(Op::delete("rev/a")).then(Op::get("rev/a"))).await.unwrap();
    assert_eq!(again.responses, [OpResponse::Delete { existed: false }, OpResponse::Get(None)]);
    assert_eq!(again.revision, gone.revision, "what changes nothing takes no revision");

    let both = state.txn(Txn::new().then(Op::put("rev/x", "1")).then(Op::put("rev/y", "1"))).await.unwrap();
    for key in ["rev/x", "rev/y"] {
        assert_eq!(state.get(key).await.unwrap().unwrap().create_revision, both.revision);
    }
    assert_eq!(state.revision().await.unwrap(), both.revision);
}

async fn compares_guard_writes(state: &State) {
    let create = Txn::new().when(Compare::absent("cas/a")).then(Op::put("cas/a", "mine"));
    let created = state.txn(create.clone()).await.unwrap();
    assert!(created.succeeded);
    let second = state.txn(create.or_else(Op::get("cas/a"))).await.unwrap();
    assert!(!second.succeeded);
    assert!(matches!(&second.responses[..], [OpResponse::Get(Some(found))] if found.value == "mine"));

    let guards = [
        (Compare::unchanged("cas/a", created.revision), true),
        (Compare::unchanged("cas/a", created.revision + 1), false),
        (Compare::unchanged("cas/a", 0), false),
        (Compare::unchanged("cas/none", 0), true),
        (Compare::unchanged("cas/none", 5), false),
        (Compare::exists("cas/a"), true),
        (Compare::exists("cas/none"), false),
        (Compare::value("cas/a", "mine"), true),
        (Compare::value("cas/a", "yours"), false),
        (Compare::value("cas/none", ""), false),
    ];
    for (guard, expected) in guards {
        let text = format!("{guard:?}");
        assert_eq!(state.txn(Txn::new().when(guard)).await.unwrap().succeeded, expected, "{text}");
    }
    let one_fails =
        Txn::new().when(Compare::exists("cas/a")).when(Compare::exists("cas/b")).then(Op::put("cas/c", "no"));
    assert!(!state.txn(one_fails).await.unwrap().succeeded);
    assert_eq!(state.get("cas/c").await.unwrap(), None);
}

async fn prefixes_page_in_order(state: &State) {
    for i in 0..1203 {
        state.put(format!("page/{i:04}"), "").await.unwrap();
    }
    // Neighbours on both sides, among them one that only shares the text.
    for outside in ["page", "page.", "page0", "pagf/1"] {
        state.put(outside, "").await.unwrap();
    }
    let (all, revision) = state.list("page/").await.unwrap();
    assert_eq!(all.len(), 1203);
    assert!(all.iter().map(|entry| &entry.key).is_sorted());
    assert_eq!(revision, state.revision().await.unwrap());

    let page = state.range("page/", Some("page/1200"), 10).await.unwrap();
    assert_eq!(page.items.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["page/1201", "page/1202"]);
    assert!(!page.more);
    let exact = state.range("page/", Some("page/1199"), 3).await.unwrap();
    assert_eq!((exact.items.len(), exact.more), (3, false));
    assert!(state.range("page/", None, 3).await.unwrap().more);
    assert!(state.range("nothing/", None, 3).await.unwrap().items.is_empty());
}

async fn limits_are_etcds(state: &State) {
    let before = state.revision().await.unwrap();
    let big = vec![0u8; MAX_VALUE_BYTES + 1];
    assert!(matches!(state.put("limit/a", big).await, Err(StateError::ValueTooLarge { .. })));
    state.put("limit/a", vec![0u8; MAX_VALUE_BYTES]).await.unwrap();
    let half = || vec![0u8; 900_000];
    let two = Txn::new().then(Op::put("limit/b", half())).then(Op::put("limit/c", half()));
    assert!(matches!(state.txn(two).await, Err(StateError::TxnTooLarge { .. })));
    let mut many = Txn::new();
    for i in 0..MAX_TXN_OPS {
        many = many.then(Op::put(format!("limit/{i}"), ""));
    }
    state.txn(many.clone()).await.unwrap();
    let many = many.then(Op::put("limit/more", ""));
    assert!(matches!(state.txn(many).await, Err(StateError::TooManyOps { found: 129, .. })));
    let twice = Txn::new().then(Op::put("limit/t", "1")).then(Op::delete("limit/t"));
    assert!(matches!(state.txn(twice).await, Err(StateError::DuplicateKey { .. })));
    for key in [String::new(), "k".repeat(MAX_KEY_BYTES + 1)] {
        assert!(matches!(state.put(key, "").await, Err(StateError::BadKey { .. })));
    }
    state.put("k".repeat(MAX_KEY_BYTES), "").await.unwrap();
    assert_eq!(state.revision().await.unwrap(), before + 3, "a refusal takes no revision");
}

async fn next(watch: &mut super::Watch) -> Result<Event, StateError> {
    let event = tokio::time::timeout(Duration::from_secs(10), watch.next()).await;
    event.expect("the watch delivers in time").expect("the watch is open")
}

async fn watches_replay_and_follow(state: &State) {
    let first = state.put("watch/a", "1").await.unwrap();
    state.put("elsewhere", "1").await.unwrap();
    state.txn(Txn::new().then(Op::put("watch/b", "2")).then(Op::delete("watch/a"))).await.unwrap();
    let mut replay = state.watch("watch/", first).await.unwrap();
    let mut live = state.watch("watch/", 0).await.unwrap();
    let last = state.put("watch/c", "3").await.unwrap();

    let mut seen = Vec::new();
    for _ in 0..4 {
        let event = next(&mut replay).await.unwrap();
        seen.push((event.revision() - first, event.key().to_owned(), matches!(event, Event::Put { .. })));
    }
    let expected = [(0, "watch/a", true), (2, "watch/b", true), (2, "watch/a", false), (3, "watch/c", true)];
    assert_eq!(seen, expected.map(|(revision, key, put)| (revision, key.to_owned(), put)));
    let event = next(&mut live).await.unwrap();
    assert!(matches!(&event, Event::Put { entry, .. } if entry.value == "3" && entry.mod_revision == last));

    // A watch that nobody reads holds up nobody, and delivers all of it later, in order.
    for i in 0..1000 {
        state.put("watch/many", format!("{i}")).await.unwrap();
    }
    for i in 0..1000 {
        let Event::Put { entry, .. } = next(&mut live).await.unwrap() else { panic!("a delete") };
        assert_eq!(entry.value, format!("{i}"));
    }
}

async fn leases_take_their_keys_along(state: &State) {
    // etcd grants no lease below a second or so; what is asked here must hold on both.
    let lease = state.grant(Duration::from_secs(2)).await.unwrap();
    let keep = state.grant(Duration::from_secs(600)).await.unwrap();
    state.txn(Txn::new().then(Op::put_leased("lease/a", "", lease))).await.unwrap();
    state.txn(Txn::new().then(Op::put_leased("lease/b", "", lease))).await.unwrap();
    state.txn(Txn::new().then(Op::put_leased("lease/moved", "", lease))).await.unwrap();
    state.txn(Txn::new().then(Op::put_leased("lease/moved", "", keep))).await.unwrap();
    state.txn(Txn::new().then(Op::put_leased("lease/freed", "", lease))).await.unwrap();
    state.put("lease/freed", "").await.unwrap();
    assert_eq!(state.get("lease/a").await.unwrap().unwrap().lease, Some(lease));

    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        state.keep_alive(lease).await.unwrap();
    }
    assert!(state.get("lease/a").await.unwrap().is_some(), "a lease that is kept alive stays");

    let mut watch = state.watch("lease/", 0).await.unwrap();
    let ends = [next(&mut watch).await.unwrap(), next(&mut watch).await.unwrap()];
    assert_eq!(ends[0].revision(), ends[1].revision());
    assert!(ends.iter().all(|end| matches!(end, Event::Delete { .. })));
    assert!(matches!(state.keep_alive(lease).await, Err(StateError::LeaseNotFound { .. })));
    assert!(matches!(state.revoke(lease).await, Err(StateError::LeaseNotFound { .. })));
    let late = Txn::new().then(Op::put("lease/x", "")).then(Op::put_leased("lease/y", "", lease));
    assert!(matches!(state.txn(late).await, Err(StateError::LeaseNotFound { .. })));
    let (left, _) = state.list("lease/").await.unwrap();
    assert_eq!(left.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["lease/freed", "lease/moved"]);

    state.revoke(keep).await.unwrap();
    assert_eq!(state.get("lease/moved").await.unwrap(), None);
}

async fn compaction_ends_watches_of_the_past(state: &State) {
    let old = state.put("compact/a", "1").await.unwrap();
    state.put("compact/a", "2").await.unwrap();
    let now = state.put("compact/a", "3").await.unwrap();
    state.compact(now - 1).await.unwrap();
    let mut late = state.watch("compact/", old).await.unwrap();
    assert!(matches!(next(&mut late).await, Err(StateError::Compacted { .. })));
    assert!(late.next().await.is_none(), "it ends");
    let mut good = state.watch("compact/", now).await.unwrap();
    assert_eq!(next(&mut good).await.unwrap().revision(), now);
    assert_eq!(state.get("compact/a").await.unwrap().unwrap().version, 3);
    assert!(matches!(state.compact(now + 1000).await, Err(StateError::FutureRevision { .. })));
}

async fn racing_writers_lose_nothing(state: &State) {
    state.put("race", "0").await.unwrap();
    let writers = (0..8).map(|_| {
        let state = state.clone();
        tokio::spawn(async move {
            for _ in 0..25 {
                loop {
                    let found = state.get("race").await.unwrap().unwrap();
                    let count: u64 = std::str::from_utf8(&found.value).unwrap().parse().unwrap();
                    let guard = Compare::unchanged("race", found.mod_revision);
                    let txn = Txn::new().when(guard).then(Op::put("race", (count + 1).to_string()));
                    if state.txn(txn).await.unwrap().succeeded {
                        break;
                    }
                }
            }
        })
    });
    futures::future::try_join_all(writers).await.unwrap();
    assert_eq!(state.get("race").await.unwrap().unwrap().value, "200");
}

/// What a plain map would hold: value, create revision, modification revision, version.
type Model = BTreeMap<String, (String, u64, u64, u64)>;

/// Random transactions leave the engine and a plain map with the same keys, values and revisions, and a watch from
/// the beginning leads to the same picture.
pub(super) fn model(new: impl Fn() -> State) {
    let key = prop::sample::select(vec!["m/a", "m/b", "m/b/c", "m/d"]);
    let op = prop_oneof![
        3 => (key.clone(), "[a-c]{0,2}").prop_map(|(key, value)| Op::put(key, value)),
        1 => key.clone().prop_map(Op::delete),
        1 => key.clone().prop_map(Op::get),
    ];
    let compare = prop_oneof![
        key.clone().prop_map(Compare::absent),
        key.clone().prop_map(Compare::exists),
        (key.clone(), 0..12u64).prop_map(|(key, revision)| Compare::unchanged(key, revision)),
        (key, "[a-c]{0,2}").prop_map(|(key, value)| Compare::value(key, value)),
    ];
    let txn = (
        prop::collection::vec(compare, 0..2),
        prop::collection::vec(op.clone(), 0..4),
        prop::collection::vec(op, 0..3),
    )
        .prop_map(|(compares, then, or_else)| Txn { compares, then, or_else });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(txns in prop::collection::vec(txn, 1..30))| {
        runtime.block_on(against_map(new(), txns))?;
    });
}

async fn against_map(state: State, txns: Vec<Txn>) -> Result<(), TestCaseError> {
    let mut model = Model::new();
    let mut revision = state.revision().await.unwrap();
    let begin = revision;
    for txn in txns {
        if txn.validate().is_err() {
            prop_assert!(state.txn(txn).await.is_err());
            continue;
        }
        let outcome = state.txn(txn.clone()).await.unwrap();
        let expected = apply(&mut model, &mut revision, txn);
        prop_assert_eq!((outcome.succeeded, outcome.revision), expected);
    }
    let (entries, at) = state.list("m/").await.unwrap();
    prop_assert_eq!(at, revision);
    let found: Model = entries.into_iter().map(flat).collect();
    prop_assert_eq!(&found, &model);

    let mut watch = state.watch("m/", begin + 1).await.unwrap();
    let mark = state.put("m/z", "end").await.unwrap();
    let mut replayed = Model::new();
    loop {
        match next(&mut watch).await.unwrap() {
            event if event.revision() == mark => break,
            Event::Put { entry, .. } => replayed.extend([flat(entry)]),
            Event::Delete { key, .. } => drop(replayed.remove(&key)),
        }
    }
    prop_assert_eq!(replayed, model);
    Ok(())
}

fn flat(entry: super::KeyValue) -> (String, (String, u64, u64, u64)) {
    let value = String::from_utf8(entry.value.to_vec()).unwrap();
    (entry.key, (value, entry.create_revision, entry.mod_revision, entry.version))
}

fn apply(model: &mut Model, revision: &mut u64, txn: Txn) -> (bool, u64) {
    let holds = txn.compares.iter().all(|compare| match compare {
        Compare::Absent { key } => !model.contains_key(key),
        Compare::Exists { key } => model.contains_key(key),
        Compare::ModRevision { key, revision } => model.get(key).is_some_and(|entry| entry.2 == *revision),
        Compare::Value { key, value } => model.get(key).is_some_and(|entry| entry.0.as_bytes() == value),
    });
    let mut changed = false;
    let next = *revision + 1;
    for op in if holds { txn.then } else { txn.or_else } {
        match op {
            Op::Get { .. } => {}
            Op::Put { key, value, .. } => {
                let entry = model.entry(key).or_insert((String::new(), next, next, 0));
                *entry = (String::from_utf8(value.to_vec()).unwrap(), entry.1, next, entry.3 + 1);
                changed = true;
            }
            Op::Delete { key } => changed |= model.remove(&key).is_some(),
        }
    }
    *revision += u64::from(changed);
    (holds, *revision)
}
