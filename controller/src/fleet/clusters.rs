//! Clusters, made of what agents declare: who belongs, what binds them, what is wrong. Pure and made anew each time.
//!
//! An instance belongs to a cluster because its agent's configuration says so, never by guess, and
//! - if a Cluster document lists members, only those belong;
//! - the first declaration makes an unknown cluster and pins its system identifier; another one under the same name is
//!   refused and shown (after `pg_upgrade`, the Cluster document names the new one);
//! - two primaries of one system identifier are a split brain, and shown.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::ClusterName;

use super::observed::{AgentObserved, InstanceObserved, InstanceRole};
use crate::policy::{self, Binding};
use crate::resources::stored::Catalog;
use crate::resources::{ClusterSpec, Labels, PolicySpec};

/// An agent, as this controller sees it now.
#[derive(Clone, PartialEq, Debug)]
pub struct AgentSeen {
    pub observed: Arc<AgentObserved>,
    pub connected: bool,
    /// Its facts came over the stream that it has now. Those of before say nothing of what was written since.
    pub vouches: bool,
    pub last_seen: Option<Timestamp>,
    pub enrolled: Enrolled,
}

/// What its enrolment says of an agent.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Enrolled {
    /// As they were when it joined, the join token's over the host's. The only labels that rights may depend on: a host
    /// that is taken over cannot change them without a new token.
    pub labels: Labels,
    pub joined_at: Option<Timestamp>,
    pub certificate_not_after: Option<Timestamp>,
    pub revoked: bool,
}

impl AgentSeen {
    /// What it claims now, with what it was enrolled with over it.
    pub fn labels(&self) -> Labels {
        let mut labels = self.observed.hello.as_ref().map(|hello| hello.labels.clone()).unwrap_or_default();
        labels.extend(self.enrolled.labels.clone());
        labels
    }

    /// What rights may depend on: enrolled labels and the name, nothing the host claims since.
    pub fn enrolled_labels(&self, name: &str) -> Labels {
        policy::with_name(name, &self.enrolled.labels)
    }

    pub fn can(&self, capability: &str) -> bool {
        self.observed.hello.as_ref().is_some_and(|hello| hello.capabilities.iter().any(|has| has == capability))
    }
}

/// What the first declaration of a cluster fixed, and who belonged to it since. Persisted under `cluster/<name>`; the
/// identifier never changes by itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pin {
    pub system_identifier: u64,
    pub discovered_by: String,
    pub discovered_at: Timestamp,
    /// Agents that once showed the right system identifier: they stay members while their server is down and cannot
    /// show it.
    pub members: BTreeSet<String>,
    /// Where its WAL went last. It goes on going there if no policy binds it any more, or several do: an archive that
    /// stops fills the server's disk. Ends when another one is bound, or the repository is deleted.
    pub repository: Option<String>,
}

/// The fleet at one moment.
#[derive(Debug)]
pub struct Assembly<'a> {
    pub clusters: BTreeMap<ClusterName, ClusterSeen<'a>>,
    /// Of clusters seen for the first time, or with a new member: to be stored.
    pub new_pins: BTreeMap<ClusterName, Pin>,
    /// What concerns no cluster that exists.
    pub notices: Vec<String>,
}

#[derive(Debug)]
pub struct ClusterSeen<'a> {
    pub name: ClusterName,
    pub labels: Labels,
    /// Absent: declared in a document, but no instance was seen yet.
    pub system_identifier: Option<u64>,
    pub spec: Option<&'a ClusterSpec>,
    /// In order of their agents' names, one each.
    pub members: Vec<MemberSeen<'a>>,
    pub binding: Binding<'a>,
    pub policy: Option<&'a PolicySpec>,
    /// It is bound by labels that none of its hosts can change: its document's, and those that they were enrolled with. Nothing
    /// is removed for the sake of others.
    pub is_surely_bound: bool,
    /// The Cluster's own, or the policy's, or the one it had last.
    pub repository: Option<&'a str>,
    pub problems: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
pub struct MemberSeen<'a> {
    pub agent: &'a str,
    pub instance: &'a InstanceObserved,
    pub facts_at: Timestamp,
    pub received_at: Timestamp,
    pub connected: bool,
    /// See [`AgentSeen::vouches`].
    pub vouches: bool,
}

/// One agent's claim that an instance belongs to a cluster.
struct Claim<'a> {
    agent: &'a str,
    seen: &'a AgentSeen,
    instance: &'a InstanceObserved,
    facts_at: Timestamp,
    received_at: Timestamp,
}

pub fn assemble<'a>(
    now: Timestamp,
    agents: &'a BTreeMap<String, AgentSeen>,
    pins: &BTreeMap<ClusterName, Pin>,
    catalog: &'a Catalog,
) -> Assembly<'a> {
    let (claims, notices) = claims(agents);
    let mut new_pins = BTreeMap::new();
    let names: BTreeSet<&ClusterName> = claims.keys().chain(pins.keys()).chain(catalog.clusters.keys()).collect();
    let clusters = names
        .into_iter()
        .filter_map(|name| {
            let claimed = claims.get(name).map(Vec::as_slice).unwrap_or_default();
            let known = pins.get(name).cloned();
            let mut pin = known.clone().or_else(|| first_pin(now, name, claimed, catalog));
            // What the document says of `pg_upgrade` stays true when the document goes.
            let declared = catalog.clusters.get(name).and_then(|declared| declared.spec.system_identifier());
            if let (Some(pin), Some(id)) = (&mut pin, declared) {
                pin.system_identifier = id.0;
            }
            // A claim that nobody admits makes no cluster.
            if pin.is_none() && !catalog.clusters.contains_key(name) {
                return None;
            }
            let cluster = cluster(name, claimed, pin.as_ref(), catalog);
            if let Some(mut pin) = pin {
                pin.members.extend(cluster.members.iter().map(|member| member.agent.to_owned()));
                pin.repository = cluster.repository.map(str::to_owned);
                if known.as_ref() != Some(&pin) {
                    new_pins.insert(name.clone(), pin);
                }
            }
            Some((name.clone(), cluster))
        })
        .collect();
    Assembly { clusters, new_pins, notices }
}

fn claims<'a>(agents: &'a BTreeMap<String, AgentSeen>) -> (BTreeMap<ClusterName, Vec<Claim<'a>>>, Vec<String>) {
    let mut claims: BTreeMap<ClusterName, Vec<Claim<'a>>> = BTreeMap::new();
    let mut notices = Vec::new();
    for (agent, seen) in agents.iter().filter(|(_, seen)| !seen.enrolled.revoked) {
        let Some(facts) = &seen.observed.facts else { continue };
        for instance in facts.instances.iter().filter(|instance| !instance.cluster.is_empty()) {
            match instance.cluster.parse::<ClusterName>() {
                Ok(name) => claims.entry(name).or_default().push(Claim {
                    agent,
                    seen,
                    instance,
                    facts_at: facts.at,
                    received_at: facts.received_at,
                }),
                Err(error) => notices.push(format!("agent {agent}: {}: {error}", instance.data_dir)),
            }
        }
    }
    (claims, notices)
}

/// The pin that a new cluster gets. A primary's word goes before a standby's, so that the pin does not depend on who
/// was quicker.
fn first_pin(now: Timestamp, name: &ClusterName, claimed: &[Claim<'_>], catalog: &Catalog) -> Option<Pin> {
    let spec = catalog.clusters.get(name).map(|declared| &declared.spec);
    let declared = spec.and_then(ClusterSpec::system_identifier).map(|id| id.0);
    let first = claimed
        .iter()
        .filter(|claim| claim.instance.system_identifier != 0)
        .filter(|claim| declared.is_none_or(|id| id == claim.instance.system_identifier))
        .filter(|claim| spec.and_then(|spec| spec.admits(claim.agent)).unwrap_or(true))
        .min_by_key(|claim| claim.instance.role)?;
    Some(Pin {
        system_identifier: first.instance.system_identifier,
        discovered_by: first.agent.to_owned(),
        discovered_at: now,
        members: BTreeSet::new(),
        repository: None,
    })
}

fn cluster<'a>(name: &ClusterName, claimed: &[Claim<'a>], pin: Option<&Pin>, catalog: &'a Catalog) -> ClusterSeen<'a> {
    let declared = catalog.clusters.get(name);
    let spec = declared.map(|declared| &declared.spec);
    let expected = pin.map(|pin| pin.system_identifier);
    let known = pin.map(|pin| &pin.members);
    let (admitted, mut problems) = admit(name, claimed, spec, expected, known);
    problems.extend(split_brain(&admitted));
    let with_declared = |mut labels: Labels| {
        labels.extend(declared.map(|declared| declared.labels.clone()).unwrap_or_default());
        policy::with_name(name.as_str(), &labels)
    };
    let labels = with_declared(common_labels(&admitted, AgentSeen::labels));
    let binding = policy::bind(&labels, &catalog.policies);
    let enrolled = with_declared(common_labels(&admitted, |seen| seen.enrolled.labels.clone()));
    // Where nobody is left whose labels could be known, the document alone tells.
    let is_surely_bound = policy::bind(&enrolled, &catalog.policies) == binding && !admitted.is_empty()
        || policy::bind(&with_declared(Labels::new()), &catalog.policies) == binding && declared.is_some();
    if let Binding::Tied(policies) = &binding {
        problems.push(format!(
            "policies {} all select it, so none applies\nHINT: narrow the selectors until one is left.",
            policies.join(", ")
        ));
    }
    let policy = binding.policy().and_then(|policy| catalog.policies.get(policy));
    let own = spec.and_then(|spec| spec.repository.as_deref());
    let kept = pin.and_then(|pin| catalog.repositories.get_key_value(pin.repository.as_ref()?));
    let kept = kept.map(|(name, _)| name.as_str());
    ClusterSeen {
        name: name.clone(),
        labels,
        system_identifier: expected,
        spec,
        members: admitted
            .iter()
            .map(|claim| MemberSeen {
                agent: claim.agent,
                instance: claim.instance,
                facts_at: claim.facts_at,
                received_at: claim.received_at,
                connected: claim.seen.connected,
                vouches: claim.seen.vouches,
            })
            .collect(),
        policy,
        is_surely_bound,
        binding,
        repository: own.or(policy.map(|policy| policy.repository.as_str())).or(kept),
        problems,
    }
}

fn admit<'c, 'a>(
    name: &ClusterName,
    claimed: &'c [Claim<'a>],
    spec: Option<&ClusterSpec>,
    expected: Option<u64>,
    known: Option<&BTreeSet<String>>,
) -> (Vec<&'c Claim<'a>>, Vec<String>) {
    let mut admitted: Vec<&Claim<'a>> = Vec::new();
    let mut problems = Vec::new();
    for claim in claimed {
        let (agent, instance) = (claim.agent, claim.instance);
        let listed = spec.and_then(|spec| spec.admits(agent));
        // A server that is down shows no identifier; its agent is still who it was.
        let trusted = listed == Some(true) || known.is_some_and(|known| known.contains(agent));
        if listed == Some(false) {
            problems.push(format!(
                "agent {agent} declares {} a member, which the Cluster document does not list\nHINT: add it to spec.members of Cluster {name}, or take it out of the agent's configuration.",
                instance.data_dir
            ));
        } else if instance.system_identifier == 0 && !trusted {
            problems.push(format!("agent {agent} cannot tell yet to which system {} belongs", instance.data_dir));
        } else if instance.system_identifier != 0 && expected != Some(instance.system_identifier) {
            problems.push(format!(
                "agent {agent} declares {} a member with system identifier {}, but the cluster's is {}\nHINT: after pg_upgrade, set spec.system_identifier of Cluster {name}; otherwise give the instance another cluster name.",
                instance.data_dir,
                instance.system_identifier,
                expected.unwrap_or_default()
            ));
        } else if admitted.last().is_some_and(|other| other.agent == agent) {
            problems.push(format!(
                "agent {agent} declares more than one instance of it, {} is left out",
                instance.data_dir
            ));
        } else {
            admitted.push(claim);
        }
    }
    (admitted, problems)
}

fn split_brain(members: &[&Claim<'_>]) -> Option<String> {
    let primaries: Vec<&str> =
        members.iter().filter(|claim| claim.instance.role == InstanceRole::Primary).map(|claim| claim.agent).collect();
    (primaries.len() > 1).then(|| {
        format!(
            "split brain: {} are all primaries of the same system\nHINT: stop all but the right one; each one's WAL is kept on a branch of its own.",
            primaries.join(", ")
        )
    })
}

/// What all members agree on.
fn common_labels(members: &[&Claim<'_>], of: impl Fn(&AgentSeen) -> Labels) -> Labels {
    let mut labels = members.iter().map(|claim| of(claim.seen));
    let first = labels.next().unwrap_or_default();
    labels.fold(first, |mut common, other| {
        common.retain(|key, value| other.get(key) == Some(value));
        common
    })
}

#[cfg(test)]
mod tests;
