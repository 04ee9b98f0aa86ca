//! Which agent's spool keeps the newest WAL of which member, where a policy lets commits wait for two spools. Pure.
//!
//! A member's peer stays the same as long as it is well: each change is a moment in which commits wait longer.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::shipping::Synchronous;

use super::desired::{self, DesiredContent, DesiredRepository, Standing};
use crate::fleet::AgentSeen;
use crate::fleet::clusters::{Assembly, ClusterSeen};
use crate::resources::stored::Catalog;

/// An agent that was connected so lately is as good as connected: it may only be dialling again.
const LATELY: SignedDuration = SignedDuration::from_secs(60);

/// Who keeps what the repository may lack beside a member's own host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpoolPeer {
    pub agent: String,
    /// "host:port"
    pub address: String,
}

/// What an agent's spool keeps for others.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DesiredSpool {
    pub cluster: ClusterName,
    pub repository: String,
    pub system_identifier: u64,
    /// That may bring some, in order.
    pub agents: Vec<String>,
}

/// The peer that each member of a cluster was told last.
pub type Former = BTreeMap<(ClusterName, String), String>;

/// Members whose commits wait for spools.
pub fn members<'a>(assembly: &'a Assembly<'_>) -> impl Iterator<Item = (&'a ClusterSeen<'a>, String)> {
    let waits = |cluster: &&ClusterSeen<'_>| {
        cluster.policy.is_some_and(|policy| policy.wal.synchronous == Some(Synchronous::Spool))
    };
    let clusters = assembly.clusters.values().filter(waits);
    clusters.flat_map(|cluster| desired::members(cluster).into_keys().map(move |member| (cluster, member)))
}

/// Names each member's peer to it, and to the peer what it is to keep.
pub fn name_peers(
    now: Timestamp,
    assembly: &Assembly<'_>,
    agents: &BTreeMap<String, AgentSeen>,
    catalog: &Catalog,
    former: &Former,
    desired: &mut BTreeMap<String, DesiredContent>,
) {
    let mut load = BTreeMap::<String, usize>::new();
    for (cluster, member) in members(assembly) {
        let (Some(repository), Some(system_identifier)) = (cluster.repository, cluster.system_identifier) else {
            continue;
        };
        let Some(repository) = catalog.repositories.get_key_value(repository) else { continue };
        let told = former.get(&(cluster.name.clone(), member.clone())).map(String::as_str);
        let Some(peer) = choose(now, cluster, &member, agents, told, &load) else { continue };
        *load.entry(peer.agent.clone()).or_default() += 1;
        let own = desired.get_mut(&member).map(|content| &mut content.clusters).into_iter().flatten();
        for named in own.filter(|named| named.name == cluster.name && named.standing == Standing::Member) {
            named.spool_peer = Some(peer.clone());
        }
        let Some(content) = desired.get_mut(&peer.agent) else { continue };
        let (name, spec) = repository;
        if !content.repositories.iter().any(|known| known.name == *name) {
            let (url, options) = (spec.url.clone(), spec.options.clone());
            content.repositories.push(DesiredRepository { name: name.clone(), url, options });
            content.repositories.sort_by(|one, other| one.name.cmp(&other.name));
        }
        match content.spools.iter_mut().find(|spool| spool.cluster == cluster.name) {
            Some(spool) => spool.agents.push(member),
            None => content.spools.push(DesiredSpool {
                cluster: cluster.name.clone(),
                repository: name.clone(),
                system_identifier,
                agents: vec![member],
            }),
        }
    }
}

fn choose(
    now: Timestamp,
    cluster: &ClusterSeen<'_>,
    member: &str,
    agents: &BTreeMap<String, AgentSeen>,
    former: Option<&str>,
    load: &BTreeMap<String, usize>,
) -> Option<SpoolPeer> {
    let peer = |name: &str| {
        let seen = agents.get(name).filter(|seen| name != member && !seen.enrolled.revoked)?;
        let address = seen.observed.hello.as_ref()?.spool_address.clone()?;
        Some((seen, SpoolPeer { agent: name.to_owned(), address }))
    };
    let named = cluster.policy.and_then(|policy| policy.wal.spool_peer);
    // The named one's own WAL goes to another.
    if let Some(named) = named.filter(|named| named.as_str() != member) {
        return peer(named.as_str()).map(|(_, peer)| peer);
    }
    let is_well = |seen: &AgentSeen| {
        seen.connected || seen.last_seen.is_some_and(|last_seen| now.duration_since(last_seen) < LATELY)
    };
    let former = former.and_then(peer);
    if let Some((_, former)) = former.as_ref().filter(|(seen, _)| is_well(seen)) {
        return Some(former.clone());
    }
    let belongs = |name: &str| cluster.members.iter().any(|member| member.agent == name);
    let candidates = agents.keys().filter_map(|name| peer(name)).filter(|(seen, _)| seen.connected);
    let best = candidates.min_by_key(|(_, peer)| {
        (!belongs(&peer.agent), load.get(&peer.agent).copied().unwrap_or(0), peer.agent.clone())
    });
    best.or(former).map(|(_, peer)| peer)
}

#[cfg(test)]
mod tests;
