//! Whose lease is over: agents not heard for too long, and attempts that a connected agent no longer names.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio::time::Instant;
use walfleet_repository::ids::JobId;

use super::{ReconcileError, Reconciler};
use crate::jobs::{Event, FencingToken, Job, Phase};

/// Since when an attempt that should run is missing from its agent's heartbeats.
pub type Missing = BTreeMap<(JobId, FencingToken), Instant>;

/// Ends what is lost. Says how many leases it ended.
pub async fn end_lost(
    reconciler: &Reconciler,
    jobs: &[Job],
    missing: &mut Missing,
    now: Timestamp,
) -> Result<usize, ReconcileError> {
    missing.retain(|(id, token), _| {
        jobs.iter().any(|job| job.id == *id && job.token == *token && job.phase() == Phase::Running)
    });
    let mut ended = 0;
    for job in jobs {
        let Some(agent) = job.held_by() else { continue };
        let event = match job.phase() {
            Phase::Offered | Phase::Running if let Some(reason) = reconciler.fleet.lease_lost(agent) => {
                Some(Event::LeaseLost { reason })
            }
            Phase::Running => vanished(reconciler, job, agent, missing),
            // Its answer, or the sign of life that would have brought it back, was lost on the way.
            Phase::Offered | Phase::Unknown
                if reconciler.fleet.says_it_runs(agent, &job.id, job.token) == Some(true) =>
            {
                Some(Event::Accepted { token: job.token })
            }
            _ => None,
        };
        if let Some(event) = event {
            let applied = reconciler.jobs.apply(&job.id, event, now).await?;
            if applied.changed && applied.job.phase() != Phase::Running {
                ended += 1;
                tracing::warn!(job = %job.id, agent, state = applied.job.phase().as_str(), reason = applied.job.reason(), "lost sight of a job");
            }
        }
    }
    Ok(ended)
}

/// A connected agent whose heartbeats do not name the attempt for as long as a lease lasts does not run it: its runner
/// died without a word. (Its outcome may be on the way for a moment; that is not as long.)
fn vanished(reconciler: &Reconciler, job: &Job, agent: &str, missing: &mut Missing) -> Option<Event> {
    let key = (job.id.clone(), job.token);
    match reconciler.fleet.says_it_runs(agent, &job.id, job.token) {
        Some(false) => {
            let since = *missing.entry(key).or_insert_with(Instant::now);
            (since.elapsed() > reconciler.fleet.timing.lease).then_some(Event::NotInJournal { token: job.token })
        }
        Some(true) | None => {
            missing.remove(&key);
            None
        }
    }
}
