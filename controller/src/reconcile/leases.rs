//! Whose lease is over: agents not heard for too long, and attempts that a connected agent does not answer for.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio::time::Instant;
use walfleet_repository::ids::JobId;

use super::{ReconcileError, Reconciler};
use crate::jobs::{Event, FencingToken, Job, Phase};

/// Since when an attempt that was offered, or should run, is missing from its connected agent's heartbeats.
pub type Missing = BTreeMap<(JobId, FencingToken, Phase), Instant>;

/// Ends what is lost. Says how many leases it ended.
pub async fn end_lost(
    reconciler: &Reconciler,
    jobs: &[Job],
    missing: &mut Missing,
    now: Timestamp,
) -> Result<usize, ReconcileError> {
    missing.retain(|(id, token, phase), _| {
        jobs.iter().any(|job| job.id == *id && job.token == *token && job.phase() == *phase)
    });
    let mut ended = 0;
    for job in jobs {
        let Some(agent) = job.held_by() else { continue };
        let Some(event) = judge(reconciler, job, agent, missing) else { continue };
        let applied = reconciler.jobs.apply(&job.id, event, now).await?;
        if applied.changed && applied.job.phase() != Phase::Running {
            ended += 1;
            let (state, reason) = (applied.job.phase().as_str(), applied.job.reason());
            tracing::warn!(job = %job.id, agent, state, reason, "lost sight of a job");
        }
    }
    Ok(ended)
}

fn judge(reconciler: &Reconciler, job: &Job, agent: &str, missing: &mut Missing) -> Option<Event> {
    let fleet = &reconciler.fleet;
    let phase = job.phase();
    if let (Phase::Offered | Phase::Running, Some(reason)) = (phase, fleet.lease_lost(agent)) {
        return Some(Event::LeaseLost { reason });
    }
    let key = (job.id.clone(), job.token, phase);
    match fleet.says_it_runs(agent, &job.id, job.token) {
        None => {
            missing.remove(&key);
            None
        }
        // Its answer, or the sign of life that would have brought it back, was lost on the way.
        Some(true) => {
            missing.remove(&key);
            (phase != Phase::Running).then_some(Event::Accepted { token: job.token })
        }
        Some(false) => {
            let since = *missing.entry(key).or_insert_with(Instant::now);
            if since.elapsed() <= fleet.timing.lease {
                return None;
            }
            match phase {
                // It is heard, and has been told again and again.
                Phase::Offered => Some(Event::LeaseLost { reason: format!("agent {agent} does not answer the offer") }),
                // Its runner died without a word. (An outcome may be on the way for a moment; that is not as long.)
                Phase::Running => Some(Event::NotInJournal { token: job.token }),
                _ => None,
            }
        }
    }
}
