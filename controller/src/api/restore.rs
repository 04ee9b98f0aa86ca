//! What is checked before a restore becomes a job: who may get the cluster's key, and whether the target lies before all
//! that is known. The rest is the agent's plan, which sees the repository.

use jiff::Timestamp;
use tonic::Status;
use walfleet_proto::job::v1::RestoreOrder;

use super::Api;
use super::fleet::no_agent;
use super::jobs::no_repository;
use crate::fleet::clusters::{ClusterSeen, MemberSeen};
use crate::fleet::protection::windows;
use crate::jobs::target::Stop;
use crate::jobs::work::{CompleteWork, RestoreWork};
use crate::reconcile::{Picture, desired};
use crate::wire::job::restore_in;

impl Api {
    /// Whether the cluster's key may be wrapped for the agent: for its members, and for those that the policy names.
    pub(super) fn may_hold(&self, picture: &Picture, cluster: &ClusterSeen<'_>, agent: &str) -> Result<(), Status> {
        if !picture.agents.contains_key(agent) {
            return Err(no_agent(agent));
        }
        let member = desired::members(cluster).contains_key(agent);
        if member || desired::restore_hosts(cluster, &picture.agents).contains(agent) {
            return Ok(());
        }
        let name = &cluster.name;
        let hint = match cluster.binding.policy() {
            Some(policy) => format!("select it with spec.restore.hosts of Policy {policy}, for example name={agent}."),
            None => format!("bind {name} by a Policy whose spec.restore.hosts selects the agent."),
        };
        Err(Status::failed_precondition(format!("agent {agent} may not restore {name}\nHINT: {hint}")))
    }

    pub(super) fn restore_work(
        &self,
        picture: &Picture,
        cluster: &ClusterSeen<'_>,
        agent: &str,
        order: RestoreOrder,
    ) -> Result<RestoreWork, Status> {
        if agent.is_empty() {
            return Err(Status::invalid_argument("agent: it is empty\nHINT: name the host to restore on with --on."));
        }
        let repository = cluster.repository.ok_or_else(|| no_repository(cluster))?;
        let mut work = restore_in(order, repository).map_err(|error| error.within("order"))?;
        let Some(place) = picture.catalog.repositories.get(&work.repository) else {
            return Err(Status::not_found(format!(
                "repository {:?} is not declared\nHINT: `walfleet repository list` shows those there are.",
                work.repository
            )));
        };
        if work.repository == repository {
            // A replica may trail what the members have brought.
            work.complete = complete(cluster);
        } else if place.replica_of.as_deref() != Some(repository) {
            return Err(Status::failed_precondition(format!(
                "{} is no replica of {repository}, where {} lies\nHINT: `walfleet replica status` shows those there are.",
                work.repository, cluster.name
            )));
        }
        self.may_hold(picture, cluster, agent)?;
        refuse_running_here(picture, agent, &work)?;
        refuse_too_early(cluster, &work)?;
        Ok(work)
    }
}

/// What the members' streams were seen to have brought.
fn complete(cluster: &ClusterSeen<'_>) -> Vec<CompleteWork> {
    let of_member = |member: &MemberSeen<'_>| {
        let archive = member.instance.archive.as_ref()?;
        Some(CompleteWork {
            system_identifier: member.instance.system_identifier,
            timeline: archive.durable_timeline.unwrap_or(member.instance.timeline),
            lsn: archive.durable_lsn?,
            at: archive.stream.as_ref()?.complete_until?,
        })
    };
    cluster.members.iter().filter_map(of_member).collect()
}

/// The data directory of a server that runs there is never a place to restore to; the agent checks again. Whoever restores over
/// a copy has just stopped its server, which is not known here yet: that is left to the agent.
fn refuse_running_here(picture: &Picture, agent: &str, work: &RestoreWork) -> Result<(), Status> {
    let facts = picture.agents.get(agent).and_then(|seen| seen.observed.facts.as_ref());
    let here = facts.into_iter().flat_map(|facts| &facts.instances).find(|instance| {
        instance.data_dir.trim_end_matches('/') == work.data_dir.trim_end_matches('/')
            && instance.role != crate::fleet::InstanceRole::Down
    });
    match here.filter(|_| !work.plan_only && !work.delta) {
        Some(instance) => Err(Status::failed_precondition(format!(
            "a server runs in {} on {agent} (port {})\nHINT: restore into another directory, or stop the server first.",
            work.data_dir, instance.port
        ))),
        None => Ok(()),
    }
}

/// The first recoverable point only ever moves forward, so that old facts cannot refuse what is possible. The last one
/// moves too, and is left to the agent.
fn refuse_too_early(cluster: &ClusterSeen<'_>, work: &RestoreWork) -> Result<(), Status> {
    let ranges: Vec<_> = windows(cluster)
        .into_iter()
        .filter(|window| window.repository == work.repository)
        .flat_map(|window| &window.ranges)
        .collect();
    // A range that does not tell its time may reach back to anywhere.
    let times: Option<Vec<Timestamp>> = ranges.iter().map(|range| range.from).collect();
    let first = times.and_then(|times| times.into_iter().min());
    let first_lsn = ranges.iter().map(|range| range.from_lsn).min();
    let too_early = match (&work.target.stop, first, first_lsn) {
        (Stop::Time { at, .. }, Some(first), _) if *at < first => Some((at.to_string(), first.to_string())),
        (Stop::Lsn { at, .. }, _, Some(first)) if *at < first => Some((at.to_string(), first.to_string())),
        _ => None,
    };
    match too_early {
        Some((target, first)) => Err(Status::out_of_range(format!(
            "{target} lies before the first point that can be recovered, {first}\nHINT: `walfleet cluster show {}` lists what can be.",
            cluster.name
        ))),
        None => Ok(()),
    }
}
