//! Schedules become jobs: each due run once, in one transaction with the note that it was made.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_proto::telemetry;
use walfleet_repository::ids::ClusterName;

use super::{ReconcileError, Reconciler};
use crate::fleet::clusters::{Assembly, ClusterSeen};
use crate::jobs::work::{BackupWork, Work};
use crate::jobs::{Job, NewJob, dispatch};
use crate::schedule::{RunId, Schedule};
use crate::state::rows::put_row;
use crate::state::{Row, RowError, State, Txn};

const PREFIX: &str = "schedule/";
/// Of jobs that a schedule made.
pub const REQUESTED_BY: &str = "schedule";

/// How far a cluster's schedule was followed. One row per cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Followed {
    pub policy: String,
    /// The scheduled time of the newest run that became a job or was covered by one; at first, when the policy bound
    /// the cluster.
    pub handled: Timestamp,
}

pub async fn load(state: &State) -> Result<BTreeMap<String, Row<Followed>>, RowError> {
    let (rows, _) = state.rows::<Followed>(PREFIX).await?;
    Ok(rows.into_iter().map(|row| (row.key.trim_start_matches(PREFIX).to_owned(), row)).collect())
}

/// Says how many runs became jobs.
pub async fn make_runs(
    reconciler: &Reconciler,
    assembly: &Assembly<'_>,
    jobs: &[Job],
    now: Timestamp,
) -> Result<usize, ReconcileError> {
    let followed = load(&reconciler.state).await?;
    let mut compiled: BTreeMap<&str, Option<Schedule>> = BTreeMap::new();
    let mut made = 0;
    for cluster in assembly.clusters.values() {
        let (Some(policy), Some(spec)) = (cluster.binding.policy(), cluster.policy) else { continue };
        let key = format!("{PREFIX}{}", cluster.name);
        let row = followed.get(cluster.name.as_str());
        let Some(row) = row.filter(|row| row.value.policy == policy) else {
            // Bound just now: what its schedule would have done before is nobody's to catch up.
            let revision = row.map_or(0, |row| row.mod_revision);
            let fresh = Followed { policy: policy.to_owned(), handled: now };
            ignore_conflict(reconciler.state.update_row(&key, revision, &fresh).await)?;
            continue;
        };
        let Some(schedule) = compiled.entry(policy).or_insert_with(|| spec.schedule()) else { continue };
        let Some(run) = schedule.due(now, policy, &cluster.name, row.value.handled).run else { continue };
        let handled = Followed { policy: policy.to_owned(), handled: run.scheduled };
        if dispatch::is_covered(&cluster.name, jobs) {
            tracing::info!(cluster = %cluster.name, scheduled = %run.scheduled, "a run is covered by one that waits");
            ignore_conflict(reconciler.state.update_row(&key, row.mod_revision, &handled).await)?;
            continue;
        }
        let Some(work) = backup_work(cluster) else { continue };
        let also = Txn::new().when(row.unchanged()).then(put_row(key, &handled)?);
        let new = NewJob {
            cluster: cluster.name.clone(),
            work: Work::Backup(work),
            on: None,
            requested_by: REQUESTED_BY.to_owned(),
            run: Some(RunId::new(policy, &cluster.name, run.scheduled)),
            idempotency_key: None,
            traceparent: run_trace(&cluster.name),
            retries: spec.backup.retries,
        };
        if let Some(job) = reconciler.jobs.create(new, also, now).await? {
            made += 1;
            tracing::info!(job = %job.id, cluster = %cluster.name, scheduled = %run.scheduled, "a run is due");
        }
    }
    Ok(made)
}

/// A trace of its own, that the agent's work joins.
fn run_trace(cluster: &ClusterName) -> String {
    tracing::info_span!("scheduled run", %cluster).in_scope(telemetry::current_traceparent)
}

/// The backup that a cluster's policy describes; `None` if no repository is bound.
pub fn backup_work(cluster: &ClusterSeen<'_>) -> Option<BackupWork> {
    let backup = cluster.policy.map(|policy| &policy.backup);
    Some(BackupWork {
        repository: cluster.repository?.to_owned(),
        fast_checkpoint: backup.is_some_and(|backup| backup.fast_checkpoint),
        read_all: false,
        compression_level: backup.and_then(|backup| backup.compression_level),
        processes: backup.and_then(|backup| backup.processes),
    })
}

fn ignore_conflict(result: Result<u64, RowError>) -> Result<(), RowError> {
    match result {
        // Somebody else was first; the next pass sees what they wrote.
        Ok(_) | Err(RowError::Conflict { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
