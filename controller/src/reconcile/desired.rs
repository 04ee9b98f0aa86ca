//! What each agent must know to work alone: its repositories, its clusters, whom keys are wrapped for. Pure.
//!
//! The right to a cluster's key comes from three places only: membership, the policy's `restore.hosts` over the labels
//! an agent was enrolled with, and a restore job that an operator started.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use walfleet_repository::ids::{ClusterName, RecipientId};
use walfleet_repository::limits::LimitsSpec;
use walfleet_repository::shipping::ShippingSpec;

use super::spools::{DesiredSpool, SpoolPeer};
use crate::fleet::{AgentSeen, Assembly, ClusterSeen};
use crate::jobs::{Job, JobKind};
use crate::resources::RepositorySpec;
use crate::resources::stored::Catalog;

/// Whole; sent on connect and on every change.
#[derive(Clone, PartialEq, Debug)]
pub struct DesiredSpec {
    pub generation: u64,
    pub content: DesiredContent,
    /// Encoded certificates, leaf first.
    pub writer_chain: Vec<Vec<u8>>,
}

/// What a generation stands for, beside the writer's certificate.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct DesiredContent {
    pub repositories: Vec<DesiredRepository>,
    pub clusters: Vec<DesiredCluster>,
    /// Of the policies that bind the clusters it is a member of. Absent in states of earlier controllers.
    #[serde(default)]
    pub limits: LimitsSpec,
    /// What its spool keeps for others.
    #[serde(default)]
    pub spools: Vec<DesiredSpool>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DesiredRepository {
    pub name: String,
    pub url: String,
    pub options: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DesiredCluster {
    pub name: ClusterName,
    pub repository: String,
    pub data_dir: Option<String>,
    pub recipients: Vec<Recipient>,
    pub compression_level: Option<i32>,
    pub processes: Option<u32>,
    pub standing: Standing,
    #[serde(default)]
    pub shipping: ShippingSpec,
    /// Absent: no instance was seen yet.
    #[serde(default)]
    pub system_identifier: Option<u64>,
    /// What it may be a copy of.
    #[serde(default)]
    pub relatives: Vec<ClusterName>,
    /// Of members whose commits wait for spools.
    #[serde(default)]
    pub spool_peer: Option<SpoolPeer>,
}

/// What the cluster is to the agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// An instance lives there.
    Member,
    /// It may only be restored there.
    RestoreHost,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Recipient {
    pub label: String,
    #[serde(with = "crate::fleet::observed::as_text")]
    pub key: RecipientId,
}

impl DesiredContent {
    /// Clusters the agent may write to.
    pub fn member_of(&self) -> Vec<ClusterName> {
        let members = self.clusters.iter().filter(|cluster| cluster.standing == Standing::Member);
        members.map(|cluster| cluster.name.clone()).collect()
    }
}

/// Who may restore a cluster, beside its members.
pub fn restore_hosts(cluster: &ClusterSeen<'_>, agents: &BTreeMap<String, AgentSeen>) -> BTreeSet<String> {
    let Some(hosts) = cluster.policy.and_then(|policy| policy.restore.hosts.as_ref()) else { return BTreeSet::new() };
    agents
        .iter()
        .filter(|(name, seen)| !seen.enrolled.revoked && hosts.matches(&seen.enrolled_labels(name)))
        .map(|(name, _)| name.clone())
        .collect()
}

/// Who belongs to a cluster: those admitted, and those a Cluster document lists but who have not declared it yet.
pub fn members(cluster: &ClusterSeen<'_>) -> BTreeMap<String, Option<String>> {
    let listed = cluster.spec.and_then(|spec| spec.members.as_ref()).into_iter().flatten();
    let mut members: BTreeMap<String, Option<String>> =
        listed.map(|member| (member.agent.clone(), member.data_dir.clone())).collect();
    for member in &cluster.members {
        members.entry(member.agent.to_owned()).or_default();
    }
    members
}

/// Every agent's share. `jobs`: those that are not over.
pub fn plan(
    assembly: &Assembly<'_>,
    agents: &BTreeMap<String, AgentSeen>,
    catalog: &Catalog,
    jobs: &[Job],
) -> BTreeMap<String, DesiredContent> {
    let mut desired: BTreeMap<String, DesiredContent> =
        agents.keys().map(|name| (name.clone(), DesiredContent::default())).collect();
    for cluster in assembly.clusters.values() {
        let Some(repository) = cluster.repository.filter(|name| catalog.repositories.contains_key(*name)) else {
            continue;
        };
        let members = members(cluster);
        let mut holders = restore_hosts(cluster, agents);
        holders.extend(restoring(cluster, jobs));
        holders.extend(members.keys().cloned());
        let recipients: Vec<Recipient> = holders
            .iter()
            .filter_map(|name| {
                let seen = agents.get(name).filter(|seen| !seen.enrolled.revoked)?;
                Some(Recipient { label: name.clone(), key: seen.observed.hello.as_ref()?.recipient })
            })
            .collect();
        let relatives: Vec<ClusterName> = relatives(cluster, assembly).map(|relative| relative.name.clone()).collect();
        for name in &holders {
            // Listed in a document, but never joined.
            let Some(content) = desired.get_mut(name) else { continue };
            if let (Some(policy), true) = (cluster.policy, members.contains_key(name)) {
                content.limits = content.limits.and(policy.limits);
            }
            content.clusters.push(DesiredCluster {
                name: cluster.name.clone(),
                repository: repository.to_owned(),
                data_dir: members.get(name).cloned().flatten(),
                recipients: recipients.clone(),
                compression_level: cluster.policy.and_then(|policy| policy.backup.compression_level),
                processes: cluster.policy.and_then(|policy| policy.backup.processes),
                standing: if members.contains_key(name) { Standing::Member } else { Standing::RestoreHost },
                shipping: cluster.policy.map(|policy| policy.wal).unwrap_or_default(),
                system_identifier: cluster.system_identifier,
                relatives: relatives.clone(),
                spool_peer: None,
            });
        }
    }
    for content in desired.values_mut() {
        content.repositories = repositories(content, catalog);
    }
    desired
}

/// The other clusters with the same system identifier in the same repository.
pub fn relatives<'a>(
    cluster: &'a ClusterSeen<'_>,
    assembly: &'a Assembly<'_>,
) -> impl Iterator<Item = &'a ClusterSeen<'a>> {
    assembly.clusters.values().filter(|other| {
        other.name != cluster.name
            && other.system_identifier.is_some()
            && other.system_identifier == cluster.system_identifier
            && other.repository == cluster.repository
    })
}

fn restoring(cluster: &ClusterSeen<'_>, jobs: &[Job]) -> BTreeSet<String> {
    jobs.iter()
        .filter(|job| {
            let kinds = [JobKind::Restore, JobKind::Verify, JobKind::WalFind];
            job.cluster == cluster.name && kinds.contains(&job.work.kind())
        })
        .filter_map(|job| job.on.clone())
        .collect()
}

/// Those that the agent's clusters lie in and their replicas, no others.
fn repositories(content: &DesiredContent, catalog: &Catalog) -> Vec<DesiredRepository> {
    let mut names: BTreeSet<&String> = content.clusters.iter().map(|cluster| &cluster.repository).collect();
    let is_needed = |spec: &RepositorySpec| spec.replica_of.as_ref().is_some_and(|of| names.contains(of));
    let replicas: Vec<&String> =
        catalog.repositories.iter().filter(|(_, spec)| is_needed(spec)).map(|(name, _)| name).collect();
    names.extend(replicas);
    names
        .into_iter()
        .filter_map(|name| {
            let spec = catalog.repositories.get(name)?;
            Some(DesiredRepository { name: name.clone(), url: spec.url.clone(), options: spec.options.clone() })
        })
        .collect()
}

#[cfg(test)]
mod tests;
