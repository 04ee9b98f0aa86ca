use std::sync::Arc;

use jiff::Timestamp;
use walfleet_repository::limits::{ByteRate, CpuShare};

use super::*;
use crate::fleet::clusters::{Enrolled, assemble};
use crate::fleet::observed::{AgentObserved, FactsObserved, HelloObserved, InstanceObserved};
use crate::fleet::samples;
use crate::jobs::work::{VerifyWork, Work};
use crate::resources::document::{self, Labels};

const DOCUMENTS: &str = "
apiVersion: walfleet/v1
kind: Repository
name: main
spec: {url: 'file:///r'}
---
apiVersion: walfleet/v1
kind: Repository
name: other
spec: {url: 'file:///o'}
---
apiVersion: walfleet/v1
kind: Policy
name: gold
spec:
  selector: name=orders
  repository: main
  limits: {cpu: 50%, read: 10MB/s}
  restore: {hosts: restores=yes}
---
apiVersion: walfleet/v1
kind: Policy
name: bulk
spec: {selector: name=billing, repository: other, limits: {read: 20MB/s, upload: 5MB/s}}
";

fn now() -> Timestamp {
    Timestamp::from_second(1_780_000_000).unwrap()
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// `claimed`: labels that the host says it has; `enrolled`: those that its join token gave it.
fn agent(key: u8, instances: Vec<InstanceObserved>, claimed: Labels, enrolled: Enrolled) -> AgentSeen {
    let hello = HelloObserved { labels: claimed, recipient: RecipientId([key; 32]), ..samples::hello() };
    let facts = FactsObserved { at: now(), received_at: now(), instances };
    let observed = AgentObserved { hello: Some(hello), facts: Some(facts), last_seen: Some(now()) };
    AgentSeen { observed: Arc::new(observed), connected: true, vouches: true, last_seen: Some(now()), enrolled }
}

fn fleet() -> BTreeMap<String, AgentSeen> {
    let enrolled = |revoked| Enrolled { labels: labels(&[("restores", "yes")]), revoked, ..Enrolled::default() };
    let (none, stranger) = (Labels::new, Enrolled::default);
    let agents = [
        ("db1", agent(1, vec![samples::instance("orders", 7), samples::instance("billing", 8)], none(), stranger())),
        ("lab", agent(2, vec![], none(), enrolled(false))),
        ("claims", agent(3, vec![], labels(&[("restores", "yes")]), stranger())),
        ("gone", agent(4, vec![], none(), enrolled(true))),
    ];
    agents.into_iter().map(|(name, seen)| (name.to_owned(), seen)).collect()
}

fn verification_on(agent: &str) -> Job {
    let work = Work::Verify(VerifyWork { repository: "other".to_owned(), backup: None, deep: false });
    let cluster = "billing".parse().unwrap();
    Job { cluster, on: Some(agent.to_owned()), ..crate::jobs::samples::queued(work, now()) }
}

fn planned(jobs: &[Job]) -> BTreeMap<String, DesiredContent> {
    let (agents, pins) = (fleet(), BTreeMap::new());
    let catalog: Catalog = document::parse(DOCUMENTS).unwrap().into_iter().collect();
    plan(&assemble(now(), &agents, &pins, &catalog), &agents, &catalog, jobs)
}

/// Each cluster that the agent gets, and who gets its key.
fn clusters(content: &DesiredContent) -> Vec<(&str, Standing, Vec<&str>)> {
    let found = content.clusters.iter().map(|cluster| {
        let holders = cluster.recipients.iter().map(|holder| &holder.label[..]);
        (cluster.name.as_str(), cluster.standing, holders.collect())
    });
    found.collect()
}

#[test]
fn keys_go_to_members_to_hosts_enrolled_for_restores_and_to_those_of_a_job_and_to_nobody_else() {
    let desired = planned(&[]);
    let orders = |standing| ("orders", standing, vec!["db1", "lab"]);
    let billing = ("billing", Standing::Member, vec!["db1"]);
    assert_eq!(clusters(&desired["db1"]), [billing, orders(Standing::Member)]);
    assert_eq!(clusters(&desired["lab"]), [orders(Standing::RestoreHost)]);
    assert_eq!(clusters(&desired["claims"]), [], "what a host says of itself gives no rights");
    assert!(!desired.contains_key("gone") || desired["gone"].clusters.is_empty());
    let repositories: Vec<_> = desired["lab"].repositories.iter().map(|repository| &repository.name[..]).collect();
    assert_eq!(repositories, ["main"], "an agent hears of no repository that it has no cluster in");

    let desired = planned(&[verification_on("claims")]);
    let billing = ("billing", Standing::RestoreHost, vec!["claims", "db1"]);
    assert_eq!(clusters(&desired["claims"]), [billing]);
}

#[test]
fn of_several_policies_limits_the_lowest_of_each_hold_and_only_on_members() {
    let desired = planned(&[verification_on("claims")]);
    let rate = |megabytes: u64| ByteRate::from_bytes_per_second(megabytes * 1_000_000);
    let expected = LimitsSpec { cpu: CpuShare::from_percent(50), read: rate(10), upload: rate(5), ..LimitsSpec::NONE };
    assert_eq!(desired["db1"].limits, expected);
    assert_eq!(desired["lab"].limits, LimitsSpec::NONE);
    assert_eq!(desired["claims"].limits, LimitsSpec::NONE);
}
