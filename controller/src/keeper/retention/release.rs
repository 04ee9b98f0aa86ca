//! An operator's word that a removal is meant, though it is far larger than usual: for what the plan would remove when it was
//! given, and no more.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::WalBranch;
use walfleet_repository::retention::{Plan, Refusal};

use crate::resources::RetentionSpec;

/// How long it counts.
const VALID: SignedDuration = SignedDuration::from_hours(24);

const PREFIX: &str = "retention/released/";

pub(super) fn key(repository: &str, cluster: &ClusterName) -> String {
    format!("{PREFIX}{repository}/{cluster}")
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Released {
    by: String,
    at: Timestamp,
    /// That may expire.
    backups: BTreeSet<String>,
    /// Below what position each branch may be trimmed.
    wal: BTreeMap<String, u64>,
}

impl Released {
    pub(super) fn now(plan: &Plan, by: &str, at: Timestamp) -> Released {
        let wal = plan.trims.iter().map(|trim| (branch(&trim.wal), trim.below.0));
        let backups = plan.expiring().map(|decided| decided.backup.to_string());
        Released { by: by.to_owned(), at, backups: backups.collect(), wal: wal.collect() }
    }

    /// Whether a plan that only the brake holds back removes no more than was seen.
    pub(super) fn lets_pass(&self, plan: &Plan, now: Timestamp) -> bool {
        let is_valid = now.duration_since(self.at) <= VALID && now >= self.at;
        let mut expiring = plan.expiring();
        let mut trims = plan.trims.iter();
        is_valid
            && plan.refused.iter().all(Refusal::is_brake)
            && expiring.all(|decided| self.backups.contains(decided.backup.as_str()))
            && trims.all(|trim| self.wal.get(&branch(&trim.wal)).is_some_and(|below| trim.below.0 <= *below))
    }
}

/// Names what a plan removes, and the policy that it follows from.
pub fn digest(wanted: &RetentionSpec, plan: &Plan) -> String {
    let released = Released::now(plan, "", Timestamp::UNIX_EPOCH);
    let text = serde_json::to_string(&(wanted, &released.backups, &released.wal)).unwrap_or_default();
    blake3::hash(text.as_bytes()).to_hex().chars().take(16).collect()
}

fn branch(wal: &WalBranch) -> String {
    format!("{}/{}-{}", wal.system_id, wal.timeline, wal.branch)
}
