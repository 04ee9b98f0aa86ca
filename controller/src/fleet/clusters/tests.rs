use super::super::observed::{FactsObserved, HelloObserved};
use super::super::samples;
use super::*;
use crate::resources::document;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_780_000_000 + seconds).expect("in range")
}

fn instance(cluster: &str, system_identifier: u64, role: InstanceRole) -> InstanceObserved {
    InstanceObserved { role, ..samples::instance(cluster, system_identifier) }
}

fn agent(labels: &[(&str, &str)], instances: Vec<InstanceObserved>) -> AgentSeen {
    let hello = HelloObserved {
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        ..samples::hello()
    };
    let facts = FactsObserved { at: at(0), received_at: at(0), instances };
    let observed = AgentObserved { hello: Some(hello), facts: Some(facts), last_seen: None };
    AgentSeen {
        observed: Arc::new(observed),
        connected: true,
        vouches: true,
        last_seen: None,
        enrolled: Enrolled::default(),
    }
}

fn fleet(agents: Vec<(&str, AgentSeen)>) -> BTreeMap<String, AgentSeen> {
    agents.into_iter().map(|(name, seen)| (name.to_owned(), seen)).collect()
}

fn cluster_document(spec: &str) -> Catalog {
    let text =
        format!("apiVersion: walfleet/v1\nkind: Cluster\nname: orders\nlabels: {{tier: gold}}\nspec: {{{spec}}}\n");
    document::parse(&text).expect(spec).into_iter().collect()
}

fn orders() -> ClusterName {
    "orders".parse().expect("a name")
}

fn pins(system_identifier: u64) -> BTreeMap<ClusterName, Pin> {
    let members = ["db1".to_owned()].into();
    [(
        orders(),
        Pin { system_identifier, discovered_by: "db1".to_owned(), discovered_at: at(0), members, repository: None },
    )]
    .into()
}

fn members(assembly: &Assembly<'_>) -> Vec<String> {
    assembly
        .clusters
        .get(&orders())
        .map_or(vec![], |cluster| cluster.members.iter().map(|member| member.agent.to_owned()).collect())
}

use InstanceRole::{Primary, Standby};

#[test]
fn the_first_declaration_makes_the_cluster_and_a_primarys_word_goes_first() {
    let agents = fleet(vec![
        ("db1", agent(&[], vec![instance("orders", 8, Standby)])),
        ("db2", agent(&[], vec![instance("orders", 7, Primary)])),
    ]);
    let catalog = Catalog::default();
    let assembly = assemble(at(0), &agents, &BTreeMap::new(), &catalog);
    assert_eq!(
        assembly.new_pins.get(&orders()).map(|pin| (pin.system_identifier, pin.discovered_by.as_str())),
        Some((7, "db2"))
    );
    assert_eq!(members(&assembly), ["db2"]);
}

#[test]
fn another_system_identifier_under_the_name_is_refused_and_shown_until_the_document_names_it() {
    let agents = fleet(vec![("db1", agent(&[], vec![instance("orders", 8, Primary)]))]);
    let none = Catalog::default();
    let assembly = assemble(at(0), &agents, &pins(7), &none);
    assert!(members(&assembly).is_empty() && assembly.new_pins.is_empty(), "nothing is changed by it");
    assert!(assembly.clusters[&orders()].problems[0].contains("system identifier 8, but the cluster's is 7"));
    let upgraded = cluster_document("system_identifier: '8'");
    assert_eq!(members(&assemble(at(0), &agents, &pins(7), &upgraded)), ["db1"]);
}

#[test]
fn a_document_that_lists_members_admits_no_others_and_pins_nothing_for_them() {
    let agents = fleet(vec![
        ("db1", agent(&[], vec![instance("orders", 7, Standby)])),
        ("thief", agent(&[], vec![instance("orders", 9, Primary)])),
    ]);
    let catalog = cluster_document("members: [{agent: db1}]");
    let assembly = assemble(at(0), &agents, &BTreeMap::new(), &catalog);
    assert_eq!(assembly.new_pins[&orders()].system_identifier, 7);
    assert_eq!(members(&assembly), ["db1"]);
    assert!(assembly.clusters[&orders()].problems[0].contains("thief"));
}

#[test]
fn a_member_whose_server_is_down_stays_one_and_a_stranger_cannot_become_one_so() {
    let down = || instance("orders", 0, InstanceRole::Down);
    let agents = fleet(vec![("db1", agent(&[], vec![down()])), ("thief", agent(&[], vec![down()]))]);
    let catalog = Catalog::default();
    let assembly = assemble(at(0), &agents, &pins(7), &catalog);
    assert_eq!(members(&assembly), ["db1"]);
    assert!(assembly.clusters[&orders()].problems[0].contains("agent thief cannot tell yet"));
    assert!(assembly.new_pins.is_empty());
    assert!(assemble(at(0), &agents, &BTreeMap::new(), &catalog).clusters.is_empty());
}

#[test]
fn two_primaries_are_a_split_brain_and_a_revoked_agent_is_no_member() {
    let mut agents = fleet(vec![
        ("db1", agent(&[], vec![instance("orders", 7, Primary)])),
        ("db2", agent(&[], vec![instance("orders", 7, Primary)])),
    ]);
    let catalog = Catalog::default();
    let problems = |agents: &BTreeMap<String, AgentSeen>| {
        assemble(at(0), agents, &pins(7), &catalog).clusters[&orders()].problems.clone()
    };
    assert!(problems(&agents)[0].contains("split brain: db1, db2"));
    agents.get_mut("db2").expect("it is there").enrolled.revoked = true;
    assert!(problems(&agents).is_empty());
}

#[test]
fn a_cluster_has_the_labels_its_members_agree_on_under_those_declared() {
    let agents = fleet(vec![
        ("db1", agent(&[("env", "prod"), ("rack", "1"), ("tier", "bronze")], vec![instance("orders", 7, Primary)])),
        ("db2", agent(&[("env", "prod"), ("rack", "2"), ("tier", "bronze")], vec![instance("orders", 7, Standby)])),
    ]);
    let catalog = cluster_document("");
    let assembly = assemble(at(0), &agents, &pins(7), &catalog);
    let labels: Vec<String> = assembly.clusters[&orders()].labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(labels, ["env=prod", "name=orders", "tier=gold"]);
}

#[test]
fn wal_goes_on_to_the_last_repository_when_no_policy_binds_the_cluster_any_more() {
    let agents = fleet(vec![("db1", agent(&[], vec![instance("orders", 7, Primary)]))]);
    let text = "apiVersion: walfleet/v1\nkind: Repository\nname: main\nspec: {url: 'file:///r'}\n";
    let policy =
        "---\napiVersion: walfleet/v1\nkind: Policy\nname: gold\nspec: {selector: name=orders, repository: main}\n";
    let with = |text: &str| -> Catalog { document::parse(text).expect(text).into_iter().collect() };
    let bound = with(&format!("{text}{policy}"));
    let pins = assemble(at(0), &agents, &pins(7), &bound).new_pins;
    let unbound = with(text);
    let after = assemble(at(0), &agents, &pins, &unbound);
    assert_eq!(after.clusters[&orders()].binding, Binding::Unbound);
    assert_eq!(after.clusters[&orders()].repository, Some("main"));
    assert_eq!(assemble(at(0), &agents, &pins, &Catalog::default()).clusters[&orders()].repository, None);
}

#[test]
fn a_name_that_no_cluster_can_have_is_a_notice_and_nothing_else() {
    let agents = fleet(vec![("db1", agent(&[], vec![instance("../orders", 7, Primary)]))]);
    let catalog = Catalog::default();
    let assembly = assemble(at(0), &agents, &BTreeMap::new(), &catalog);
    assert!(assembly.clusters.is_empty() && assembly.notices.len() == 1);
}
