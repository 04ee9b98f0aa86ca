//! What jobs cost, both ways: of this host's outward, of all of the cluster's inward.

use jiff::Timestamp;
use walfleet_proto::job::v1 as proto;

use crate::estimate::{Past, PastWork, Reads};
use crate::jobs::cost::{JobCost, PhaseCost};

/// Phases believed of one past job; none has so many.
const MOST_PHASES: usize = 16;

pub(super) fn cost(cost: &JobCost) -> proto::JobCost {
    let phase =
        |phase: &PhaseCost| proto::PhaseCost { phase: phase.phase.clone(), seconds: phase.seconds, bytes: phase.bytes };
    proto::JobCost {
        gets: cost.store.gets,
        heads: cost.store.heads,
        puts: cost.store.puts,
        lists: cost.store.lists,
        retries: cost.store.retries,
        received_bytes: cost.store.received_bytes,
        sent_bytes: cost.store.sent_bytes,
        phases: cost.phases.iter().map(phase).collect(),
    }
}

/// `None`: it says nothing that this agent understands. An estimate is worth no refusal.
pub(super) fn past(past: proto::PastJob) -> Option<Past> {
    let work = match past.kind.as_str() {
        "backup" => PastWork::Backup {
            backup: past.backup.parse().ok()?,
            read: match (past.read_all, past.first) {
                (false, _) => Reads::Changes,
                (true, false) => Reads::All,
                (true, true) => Reads::First,
            },
            read_bytes: past.read_bytes,
            stored_bytes: past.stored_bytes,
        },
        "restore" => PastWork::Restore { wal_bytes: past.wal_bytes, delta: past.delta },
        _ => return None,
    };
    let cost = past.cost?;
    let requests = [cost.gets, cost.heads, cost.puts, cost.lists].into_iter().fold(0, u64::saturating_add);
    let sane = |phase: &proto::PhaseCost| phase.seconds.is_finite() && phase.seconds >= 0.0;
    let phases: Vec<PhaseCost> = cost
        .phases
        .into_iter()
        .take(MOST_PHASES)
        .filter(sane)
        .map(|phase| PhaseCost { phase: phase.phase, seconds: phase.seconds, bytes: phase.bytes })
        .collect();
    Some(Past {
        host: past.agent,
        finished_at: Timestamp::from_microsecond(past.finished_at_us).ok()?,
        cluster_bytes: past.cluster_bytes,
        requests,
        seconds: phases.iter().map(|phase| phase.seconds).sum(),
        phases,
        work,
    })
}
