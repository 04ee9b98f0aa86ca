use std::sync::Arc;

use super::*;
use crate::fleet::clusters::{Enrolled, assemble};
use crate::fleet::observed::{AgentObserved, FactsObserved, HelloObserved};
use crate::fleet::samples;
use crate::resources::document;

fn now() -> Timestamp {
    Timestamp::from_second(1_780_000_000).unwrap()
}

/// `seen`: seconds ago; `None`: it is connected.
fn agent(cluster: Option<&str>, spool: bool, seen: Option<i64>) -> AgentSeen {
    let address = spool.then(|| "h:7433".to_owned());
    let hello = HelloObserved { spool_address: address, ..samples::hello() };
    let instances = cluster.map(|cluster| samples::instance(cluster, 7)).into_iter().collect();
    let facts = FactsObserved { at: now(), received_at: now(), instances };
    let observed = AgentObserved { hello: Some(hello), facts: Some(facts), last_seen: Some(now()) };
    let last_seen = now() - SignedDuration::from_secs(seen.unwrap_or(0));
    let enrolled = Enrolled::default();
    let connected = seen.is_none();
    AgentSeen { observed: Arc::new(observed), connected, vouches: connected, last_seen: Some(last_seen), enrolled }
}

fn named(wal: &str, agents: &BTreeMap<String, AgentSeen>, former: &Former) -> BTreeMap<String, DesiredContent> {
    let documents = format!(
        "apiVersion: walfleet/v1\nkind: Repository\nname: main\nspec: {{url: 'file:///r'}}\n---\n\
         apiVersion: walfleet/v1\nkind: Policy\nname: p\nspec: {{selector: '', repository: main, wal: {{{wal}}}}}\n"
    );
    let catalog: Catalog = document::parse(&documents).unwrap().into_iter().collect();
    let pins = BTreeMap::new();
    let assembly = assemble(now(), agents, &pins, &catalog);
    let mut desired = desired::plan(&assembly, agents, &catalog, &[]);
    name_peers(now(), &assembly, agents, &catalog, former, &mut desired);
    desired
}

fn fleet(agents: &[(&str, AgentSeen)]) -> BTreeMap<String, AgentSeen> {
    agents.iter().map(|(name, seen)| ((*name).to_owned(), seen.clone())).collect()
}

fn peer_of<'a>(desired: &'a BTreeMap<String, DesiredContent>, member: &str) -> Option<&'a str> {
    desired[member].clusters.iter().find_map(|cluster| cluster.spool_peer.as_ref()).map(|peer| &peer.agent[..])
}

#[test]
fn another_members_host_comes_first_and_is_told_for_whom_it_keeps_what() {
    let agents = fleet(&[
        ("a", agent(None, true, None)),
        ("db1", agent(Some("orders"), false, None)),
        ("db2", agent(Some("orders"), true, None)),
        ("deaf", agent(None, false, None)),
    ]);
    let desired = named("synchronous: spool", &agents, &Former::new());
    assert_eq!((peer_of(&desired, "db1"), peer_of(&desired, "db2")), (Some("db2"), Some("a")));
    let spool = |agents: &[&str]| DesiredSpool {
        cluster: "orders".parse().unwrap(),
        repository: "main".to_owned(),
        system_identifier: 7,
        agents: agents.iter().map(|agent| (*agent).to_owned()).collect(),
    };
    assert_eq!((&desired["db2"].spools, &desired["a"].spools), (&vec![spool(&["db1"])], &vec![spool(&["db2"])]));
    assert_eq!(desired["a"].repositories[0].name, "main", "where to store it if they are gone");
    assert!(desired["a"].clusters.is_empty(), "and no right to the cluster");
    let off = named("synchronous: repository", &agents, &Former::new());
    assert!(peer_of(&off, "db1").is_none() && off["db2"].spools.is_empty());
}

#[test]
fn a_peer_stays_while_it_is_well_and_the_policys_word_goes_before_that() {
    let former = Former::from([(("orders".parse().unwrap(), "db1".to_owned()), "b".to_owned())]);
    let with = |b: AgentSeen, a: AgentSeen| fleet(&[("a", a), ("b", b), ("db1", agent(Some("orders"), true, None))]);
    let well = || agent(None, true, None);
    for (b, a, peer) in [
        (well(), well(), Some("b")),
        (agent(None, true, Some(30)), well(), Some("b")),
        (agent(None, true, Some(90)), well(), Some("a")),
        (agent(None, true, Some(90)), agent(None, true, Some(90)), Some("b")),
        (agent(None, false, None), well(), Some("a")),
        (agent(None, false, None), agent(None, false, None), None),
    ] {
        assert_eq!(peer_of(&named("synchronous: spool", &with(b, a), &former), "db1"), peer);
    }
    let agents = with(well(), well());
    let word = |name: &str| named(&format!("synchronous: spool, spool_peer: {name}"), &agents, &former);
    assert_eq!(peer_of(&word("a"), "db1"), Some("a"));
    assert_eq!(peer_of(&word("nobody"), "db1"), None, "nobody else in its place");
    assert_eq!(peer_of(&word("db1"), "db1"), Some("b"), "its own goes to another");
}
