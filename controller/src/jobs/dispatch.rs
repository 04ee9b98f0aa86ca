//! Which queued job is offered to which agent now, and why each of the others waits. Pure.
//!
//! Oldest first. One backup of a cluster at a time; on one agent one job of a kind; retries keep their pause. The member
//! for a backup is picked by the policy's preference among those that are fit.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use walfleet_repository::ids::{ClusterName, JobId};

use super::{Job, JobKind, JobState, Phase};
use crate::fleet::clusters::{AgentSeen, Assembly, ClusterSeen, MemberSeen};
use crate::fleet::observed::InstanceRole;
use crate::resources::policy_spec::Prefer;

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    Offer { agent: String },
    Wait { reason: String },
}

/// What is taken, counting jobs that are unknown: their attempts may run.
#[derive(Default)]
struct Taken<'a> {
    /// Job that backs the cluster up.
    backups: BTreeMap<&'a ClusterName, &'a JobId>,
    /// Job of a kind at an agent.
    agents: BTreeMap<(String, JobKind), &'a JobId>,
}

/// Decides for every queued job whose pause is over. `jobs`: all that are not over, oldest first.
pub fn plan(
    now: Timestamp,
    jobs: &[Job],
    agents: &BTreeMap<String, AgentSeen>,
    assembly: &Assembly<'_>,
) -> Vec<(JobId, Decision)> {
    let mut taken = Taken::default();
    for job in jobs {
        if let Some(agent) = job.held_by() {
            taken.take(job, agent);
        }
    }
    let mut decisions = Vec::new();
    for job in jobs {
        let JobState::Queued { not_before, .. } = &job.state else { continue };
        if *not_before > now {
            continue;
        }
        let decision = match place(job, agents, assembly, &taken) {
            Ok(agent) => {
                taken.take(job, &agent);
                Decision::Offer { agent }
            }
            Err(reason) => Decision::Wait { reason },
        };
        decisions.push((job.id.clone(), decision));
    }
    decisions
}

impl<'a> Taken<'a> {
    fn take(&mut self, job: &'a Job, agent: &str) {
        if job.work.kind() == JobKind::Backup {
            self.backups.insert(&job.cluster, &job.id);
        }
        // A plan only looks, and keeps nobody waiting.
        if job.work.kind() != JobKind::BackupPlan {
            self.agents.insert((agent.to_owned(), job.work.kind()), &job.id);
        }
    }
}

fn place(
    job: &Job,
    agents: &BTreeMap<String, AgentSeen>,
    assembly: &Assembly<'_>,
    taken: &Taken<'_>,
) -> Result<String, String> {
    let kind = job.work.kind();
    if kind == JobKind::Backup
        && let Some(other) = taken.backups.get(&job.cluster)
    {
        return Err(format!("{other} backs {} up now", job.cluster));
    }
    let candidates = match &job.on {
        Some(agent) => vec![agent.as_str()],
        None => members_for(job, assembly)?,
    };
    let mut reasons = BTreeSet::new();
    for agent in candidates {
        match fit(agent, kind, agents, taken) {
            Ok(()) => return Ok(agent.to_owned()),
            Err(reason) => drop(reasons.insert(reason)),
        }
    }
    Err(reasons.into_iter().collect::<Vec<_>>().join("; "))
}

/// Members that may do it, the best one first.
fn members_for<'s>(job: &Job, assembly: &'s Assembly<'_>) -> Result<Vec<&'s str>, String> {
    let cluster = assembly.clusters.get(&job.cluster).filter(|cluster| !cluster.members.is_empty());
    let cluster = cluster.ok_or_else(|| format!("no agent declares an instance of {}", job.cluster))?;
    match job.work.kind() {
        JobKind::Backup | JobKind::BackupPlan => backup_order(cluster),
        JobKind::Verify | JobKind::Restore | JobKind::WalFind => {
            Ok(cluster.members.iter().map(|member| member.agent).collect())
        }
    }
}

/// Members a backup can be read from, the best one first.
pub fn backup_order<'s>(cluster: &'s ClusterSeen<'_>) -> Result<Vec<&'s str>, String> {
    let prefer = cluster.policy.map_or(Prefer::Standby, |policy| policy.backup.prefer);
    let mut fit: Vec<&MemberSeen<'_>> =
        cluster.members.iter().filter(|member| member.instance.role != InstanceRole::Down).collect();
    if fit.is_empty() {
        let down: Vec<&str> = cluster.members.iter().map(|member| member.agent).collect();
        return Err(format!("no server of {} answers (asked: {})", cluster.name, down.join(", ")));
    }
    fit.sort_by_key(|member| {
        let preferred = match prefer {
            Prefer::Standby => member.instance.role == InstanceRole::Standby,
            Prefer::Primary => member.instance.role == InstanceRole::Primary,
        };
        // Connected first; then the preferred kind; among equals the one that replayed furthest, then by name.
        (!member.connected, !preferred, std::cmp::Reverse(member.instance.current_lsn), member.agent)
    });
    Ok(fit.into_iter().map(|member| member.agent).collect())
}

fn fit(agent: &str, kind: JobKind, agents: &BTreeMap<String, AgentSeen>, taken: &Taken<'_>) -> Result<(), String> {
    let seen = agents.get(agent).ok_or_else(|| format!("agent {agent} never connected"))?;
    if seen.enrolled.revoked {
        Err(format!("agent {agent} is revoked"))
    } else if !seen.connected {
        Err(format!("agent {agent} is not connected"))
    } else if !seen.can(kind.as_str()) {
        Err(format!("agent {agent} does not offer {}", kind.as_str()))
    } else if let Some(other) = taken.agents.get(&(agent.to_owned(), kind)) {
        Err(format!("agent {agent} is busy with {other}"))
    } else {
        Ok(())
    }
}

/// Whether a cluster's scheduled run needs no job of its own: one that has not begun to read yet serves as well.
pub fn is_covered(cluster: &ClusterName, jobs: &[Job]) -> bool {
    jobs.iter().any(|job| {
        job.cluster == *cluster
            && job.work.kind() == JobKind::Backup
            && job.run.is_some()
            && job.phase() == Phase::Queued
    })
}

#[cfg(test)]
mod tests;
