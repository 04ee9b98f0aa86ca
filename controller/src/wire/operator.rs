//! `walfleet.operator.v1`: views, outward.

use jiff::Timestamp;
use walfleet_proto::operator::v1 as pb;

use super::{agent, job, recovery, time_out};
use crate::fleet::Progress;
use crate::fleet::clusters::{AgentSeen, ClusterSeen, MemberSeen};
use crate::fleet::protection::{Assessment, Protection, windows};
use crate::jobs::{Job, Work};
use crate::resources::diff::{ChangeKind, FieldChange};
use crate::resources::stored::{PlannedChange, StoredDocument};

/// A cluster with what is to be said of it.
pub struct ClusterPage<'s, 'a> {
    pub cluster: &'s ClusterSeen<'a>,
    pub assessment: Assessment,
    pub next_backup: Option<Timestamp>,
}

fn protection_out(state: Protection) -> pb::ProtectionState {
    match state {
        Protection::Protected => pb::ProtectionState::Protected,
        Protection::AtRisk => pb::ProtectionState::AtRisk,
        Protection::Unprotected => pb::ProtectionState::Unprotected,
        Protection::Unknown => pb::ProtectionState::Unknown,
    }
}

pub fn cluster_out(page: &ClusterPage<'_, '_>) -> pb::ClusterView {
    let ClusterPage { cluster, assessment, next_backup } = page;
    let server = cluster.members.iter().map(|member| member.instance.server_version_num).max();
    let bytes = cluster.members.iter().map(|member| member.instance.cluster_bytes).max();
    pb::ClusterView {
        name: cluster.name.to_string(),
        labels: cluster.labels.clone().into_iter().collect(),
        state: protection_out(assessment.state).into(),
        reason: assessment.reason.clone(),
        system_identifier: cluster.system_identifier.unwrap_or_default(),
        server_version_num: server.unwrap_or_default(),
        members: cluster.members.iter().map(member_out).collect(),
        windows: windows(cluster).into_iter().map(recovery::window_out).collect(),
        last_backup: assessment.last_backup.as_ref().map(recovery::backup_out),
        policy: cluster.binding.policy().unwrap_or_default().to_owned(),
        repository: cluster.repository.unwrap_or_default().to_owned(),
        next_backup_us: time_out(*next_backup),
        cluster_bytes: bytes.unwrap_or_default(),
        lag_seconds: assessment.lag.map_or(-1.0, |lag| lag.as_secs_f64()),
    }
}

fn member_out(member: &MemberSeen<'_>) -> pb::Member {
    pb::Member {
        agent: member.agent.to_owned(),
        facts: Some(agent::instance_out(member.instance)),
        facts_at_us: member.received_at.as_microsecond(),
        connected: member.connected,
    }
}

pub fn agent_out(name: &str, seen: &AgentSeen, running_jobs: Vec<String>) -> pb::AgentView {
    let hello = seen.observed.hello.as_ref();
    let instances = seen.observed.facts.as_ref().map(|facts| facts.instances.as_slice()).unwrap_or_default();
    pb::AgentView {
        name: name.to_owned(),
        hostname: hello.map(|hello| hello.hostname.clone()).unwrap_or_default(),
        labels: seen.labels().into_iter().collect(),
        version: hello.map(|hello| hello.version.clone()).unwrap_or_default(),
        connected: seen.connected,
        last_seen_us: time_out(seen.last_seen),
        joined_at_us: time_out(seen.enrolled.joined_at),
        certificate_not_after_us: time_out(seen.enrolled.certificate_not_after),
        instances: instances.iter().map(agent::instance_out).collect(),
        running_jobs,
    }
}

pub fn job_out(row: &Job, progress: Option<&Progress>) -> pb::JobView {
    let kind = match &row.work {
        Work::Backup(_) => "backup",
        Work::Restore(_) => "restore",
        Work::Verify(_) => "verify",
        Work::BackupPlan(_) => "backup_plan",
        Work::WalFind(_) => "wal_find",
    };
    // Of an earlier attempt it says nothing about this one.
    let progress = progress.filter(|progress| progress.token == row.token);
    pb::JobView {
        id: row.id.to_string(),
        kind: kind.to_owned(),
        cluster: row.cluster.to_string(),
        agent: row.agent.clone().or_else(|| row.on.clone()).unwrap_or_default(),
        state: job::phase_out(row.phase()).into(),
        attempt: row.attempt,
        created_at_us: row.created_at.as_microsecond(),
        started_at_us: time_out(row.started_at),
        finished_at_us: time_out(row.finished_at),
        requested_by: row.requested_by.clone(),
        progress: progress.map(|progress| job::progress_out(row, progress)),
        // An attempt that is followed by another one speaks through the reason.
        outcome: row.outcome.as_ref().filter(|_| row.is_over()).map(|outcome| job::outcome_out(row, outcome)),
        reason: row.reason().to_owned(),
        order: Some(job::order_out(row)),
    }
}

pub fn change_out(change: &PlannedChange, consequences: Vec<String>) -> pb::Change {
    let kind = match change.kind {
        ChangeKind::Created => pb::ChangeKind::Created,
        ChangeKind::Updated => pb::ChangeKind::Updated,
        ChangeKind::Unchanged => pb::ChangeKind::Unchanged,
    };
    pb::Change {
        kind: change.document.kind().to_string(),
        name: change.document.name().to_owned(),
        change: kind.into(),
        fields: change.fields.iter().map(field_out).collect(),
        consequences,
    }
}

fn field_out(field: &FieldChange) -> pb::FieldChange {
    pb::FieldChange { path: field.path.clone(), before: field.before.clone(), after: field.after.clone() }
}

pub fn resource_out(stored: &StoredDocument, bound_clusters: Vec<String>) -> pb::Resource {
    pb::Resource {
        kind: stored.document.kind().to_string(),
        name: stored.document.name().to_owned(),
        yaml: stored.document.to_yaml(),
        generation: stored.generation,
        applied_at_us: stored.applied_at.as_microsecond(),
        applied_by: stored.applied_by.clone(),
        bound_clusters,
    }
}
