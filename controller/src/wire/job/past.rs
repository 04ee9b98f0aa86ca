//! What jobs cost: kept as it came, and told to the agents of later ones, so that they can estimate.

use prost::Message;
use walfleet_proto::job::v1 as pb;

use super::unhex;
use crate::jobs::{Job, Outcome, Report, Verdict, Work};

/// Told with one order.
pub const MOST: usize = 32;

pub fn cost_of(outcome: &Outcome) -> Option<pb::JobCost> {
    pb::JobCost::decode(unhex(outcome.cost.as_ref()?)?.as_slice()).ok()
}

/// `None`: it says nothing of what later ones will take.
pub fn past_out(job: &Job) -> Option<pb::PastJob> {
    let outcome = job.outcome.as_ref().filter(|outcome| outcome.verdict == Verdict::Succeeded)?;
    let told = pb::PastJob {
        agent: job.agent.clone()?,
        finished_at_us: job.finished_at?.as_microsecond(),
        cost: Some(cost_of(outcome)?),
        ..Default::default()
    };
    match (&job.work, outcome.report.as_ref()?) {
        (Work::Backup(_), Report::Backup(backup)) => Some(pb::PastJob {
            kind: "backup".to_owned(),
            backup: backup.id.to_string(),
            read_all: !backup.read_all_because.is_empty(),
            first: !backup.read_all_because.is_empty() && backup.parents.is_empty(),
            cluster_bytes: backup.cluster_bytes,
            read_bytes: backup.read_bytes,
            stored_bytes: backup.stored_bytes,
            ..told
        }),
        (Work::Restore(work), Report::Restore(encoded)) if !work.plan_only => {
            let report = pb::RestoreReport::decode(unhex(encoded)?.as_slice()).ok()?;
            // Without a server nothing was replayed.
            let replayed = replayed(&report.wal_from_lsn, &report.reached_lsn);
            Some(pb::PastJob {
                kind: "restore".to_owned(),
                cluster_bytes: report.cluster_bytes,
                wal_bytes: replayed.unwrap_or_default(),
                delta: work.delta,
                ..told
            })
        }
        _ => None,
    }
}

fn replayed(from: &str, reached: &str) -> Option<u64> {
    let lsn = |text: &str| text.parse::<walfleet_repository::postgres::Lsn>().ok();
    Some(lsn(reached)?.saturating_sub(lsn(from)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replay_counts_only_where_a_server_says_how_far_it_came() {
        assert_eq!(replayed("0/3000000", "0/3000100"), Some(0x100));
        assert_eq!(replayed("0/3000000", ""), None);
        assert_eq!(replayed("0/3000000", "0/2000000"), Some(0));
    }
}
