//! What came to replicas.

use jiff::Timestamp;
use walfleet_proto::operator::v1 as pb;

use super::time_out;
use crate::keeper::replicas::Replicated;
use crate::resources::RepositorySpec;

pub fn replica_out(
    (name, spec): (&str, &RepositorySpec),
    cluster: &str,
    seen: Option<&Replicated>,
    at: Timestamp,
) -> pb::ReplicaView {
    let unseen = Replicated::default();
    let seen = seen.unwrap_or(&unseen);
    pb::ReplicaView {
        repository: name.to_owned(),
        replica_of: spec.replica_of.clone().unwrap_or_default(),
        cluster: cluster.to_owned(),
        complete_as_of_us: time_out(seen.complete_as_of()),
        rpo_seconds: spec.rpo.map_or(0, |rpo| rpo.as_seconds()),
        is_late: spec.rpo.is_some_and(|rpo| seen.is_late(rpo, at)),
        lacking_backups: seen.lacking.unwrap_or_default() as u64,
        is_counted: seen.lacking.is_some(),
        damaged: seen.unreadable.iter().chain(&seen.damaged).cloned().collect(),
        problem: seen.problem.clone().unwrap_or_default(),
    }
}
