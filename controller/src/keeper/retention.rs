//! Keeps what policies promise, and lets go of the rest: plans, log entries, collection. Apart from the keeper's rounds, since
//! reading what a thousand clusters hold takes its time.
//!
//! A plan is made on a prefix of a cluster's log, and each of its entries is appended only right behind what it was made on: if
//! anybody else wrote in between, the next look makes another plan.

mod abandoned;
mod plan;
mod release;
mod standing;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;

use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;
use walfleet_repository::collect::{self, CollectReport, CollectSpec, Scope, Waiting};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::retention::{Plan, Refusal};

pub use self::plan::{Brought, Planned};
pub use self::release::digest;
use self::standing::Standing;
use super::replicas::Place;
use super::{Keeper, KeeperError};
use crate::fleet::{Assembly, ClusterSeen, RetentionTiming};
use crate::jobs::JobKind;
use crate::reconcile::{Picture, in_full};
use crate::resources::{RepositorySpec, RetentionSpec};

/// Between two looks at whether a cluster is due, at most.
const ROUND: SignedDuration = SignedDuration::from_mins(1);

/// Between two plans, where the last one failed or was refused, at most.
const SOON: SignedDuration = SignedDuration::from_mins(30);

/// Between two collections that list all that lies there.
const EVERYTHING: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Clusters at once.
const AT_ONCE: usize = 4;

/// What was last seen and done of a cluster.
#[derive(Clone, Debug)]
pub struct Kept {
    pub at: Timestamp,
    /// What its policy says, or of a replica its document.
    wanted: Option<RetentionSpec>,
    /// Or why nothing could be done.
    pub outcome: Result<Turn, String>,
    everything_at: Option<Timestamp>,
}

impl Kept {
    fn nothing(at: Timestamp) -> Kept {
        Kept { at, wanted: None, outcome: Ok(Turn::default()), everything_at: None }
    }
}

/// What a turn came to.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// Absent: everything is kept.
    pub plan: Option<Plan>,
    /// How many of the plan's entries were made.
    pub made: usize,
    /// It waits: somebody reads what might go, or a replica is not complete.
    pub waits: bool,
    pub collected: CollectReport,
}

/// A cluster in one of its places, with what is to be kept there; `None`: everything.
struct Due {
    cluster: ClusterName,
    repository: String,
    spec: RepositorySpec,
    wanted: Option<RetentionSpec>,
}

impl Due {
    fn place(&self) -> Place {
        (self.repository.clone(), self.cluster.clone())
    }
}

impl Keeper {
    /// Runs until cancelled.
    pub async fn keep(&self, cancel: &CancellationToken) {
        let round = self.timing().every.min(ROUND).unsigned_abs();
        loop {
            if cancel.run_until_cancelled(self.keep_round(Timestamp::now(), cancel)).await.is_none() {
                return;
            }
            if cancel.run_until_cancelled(tokio::time::sleep(round)).await.is_none() {
                return;
            }
        }
    }

    pub(super) fn timing(&self) -> RetentionTiming {
        self.reconciler.fleet.timing.retention
    }

    /// What was last seen and done.
    pub fn kept(&self) -> BTreeMap<Place, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One line for each cluster of which less is done than its policy says.
    pub(super) fn retention_notices(&self) -> Vec<String> {
        let kept = self.kept();
        let refused = kept.iter().filter_map(|((repository, cluster), kept)| {
            let why = match &kept.outcome {
                // Nothing is promised there, and nothing hangs on it.
                Err(_) if kept.wanted.is_none() => return None,
                Err(error) => error.clone(),
                Ok(turn) => turn.plan.as_ref()?.refused.first()?.to_string(),
            };
            Some(format!("cluster {cluster}: retention removes nothing in repository {repository}: {why}"))
        });
        let claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let by_claims = claimed.into_iter().map(|cluster| {
            format!(
                "cluster {cluster}: retention removes nothing: its policy binds it by labels that its hosts can change\nHINT: give the labels to its Cluster document, or to the token that the agents join with."
            )
        });
        refused.chain(by_claims).collect()
    }

    async fn keep_round(&self, now: Timestamp, cancel: &CancellationToken) {
        let due = match self.due(now).await {
            Ok(due) => due,
            Err(error) => return tracing::warn!(error = in_full(&error), "cannot see what is to be kept"),
        };
        let turns = due.into_iter().map(|due| async move {
            // Each its own: the last one's turn may come hours later.
            let now = Timestamp::now();
            let outcome = self.keep_cluster(&due, now, cancel).await;
            self.note_kept(due, now, outcome);
        });
        // Where much is removed at first, the others do not wait for it.
        futures::stream::iter(turns).for_each_concurrent(AT_ONCE, |turn| turn).await;
    }

    async fn due(&self, now: Timestamp) -> Result<Vec<Due>, KeeperError> {
        let picture = self.reconciler.picture(now).await?;
        let assembly = picture.assemble();
        let claimed = assembly.clusters.values().filter(|cluster| policy_says(cluster).is_some());
        let claimed: BTreeSet<ClusterName> =
            claimed.filter(|cluster| !cluster.is_surely_bound).map(|cluster| cluster.name.clone()).collect();
        *self.claimed.lock().unwrap_or_else(PoisonError::into_inner) = claimed;
        let all = all(&picture, &assembly);
        self.forget_standing(&all).await?;
        let places: BTreeSet<Place> = all.iter().map(Due::place).collect();
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.retain(|place, _| places.contains(place));
            // Where everything is kept, what failed backups left can wait.
            for due in all.iter().filter(|due| due.wanted.is_none()) {
                kept.entry(due.place()).or_insert_with(|| Kept::nothing(now));
            }
        }
        let (kept, every) = (self.kept(), self.timing().every);
        let is_fresh = |due: &Due| {
            kept.get(&due.place()).is_some_and(|kept| {
                let is_same = kept.wanted == due.wanted;
                let is_well = kept.outcome.as_ref().is_ok_and(Turn::is_whole);
                is_same && now.duration_since(kept.at) < if is_well { every } else { every.min(SOON) }
            })
        };
        Ok(all.into_iter().filter(|due| !is_fresh(due)).collect())
    }

    /// Where a policy says no more what is to be kept, everything is; what it says later begins its day anew.
    async fn forget_standing(&self, all: &[Due]) -> Result<(), KeeperError> {
        let state = &self.reconciler.state;
        let wanted = all.iter().filter(|due| due.wanted.is_some());
        let wanted: BTreeSet<String> = wanted.map(|due| standing::key(&due.repository, &due.cluster)).collect();
        let (rows, _) = state.rows::<Standing>(standing::PREFIX).await?;
        for row in rows.iter().filter(|row| !wanted.contains(&row.key)) {
            state.delete_row(row).await?;
        }
        Ok(())
    }

    async fn keep_cluster(&self, due: &Due, now: Timestamp, cancel: &CancellationToken) -> Result<Turn, KeeperError> {
        let repository = self.find(&due.repository, &due.spec, now).await?;
        let mut log = repository.cluster_log(&due.cluster);
        log.refresh().await?;
        if log.state().next() == 0 {
            return Ok(Turn::default());
        }
        if self.must_wait(due).await? {
            return Ok(Turn { waits: true, ..Turn::default() });
        }
        let doubts = plan::doubts(&repository).await?;
        if doubts.is_empty() {
            // Those of a replica are the copier's, and may take their time.
            if due.spec.replica_of.is_none() {
                self.end_abandoned(&repository, &mut log, now).await?;
            }
            self.release_over(&mut log, now).await?;
        }
        let mut turn = Turn::default();
        if let Some(in_force) = self.in_force(due, now).await? {
            (turn.plan, turn.made) = self.keep_promise(&repository, &mut log, due, (&in_force, &doubts), now).await?;
        }
        let refused = turn.plan.iter().flat_map(|plan| &plan.refused);
        if !doubts.is_empty() || !refused.clone().all(Refusal::is_brake) {
            return Ok(turn);
        }
        let everything_at = self.kept().get(&due.place()).and_then(|kept| kept.everything_at);
        let is_due = everything_at.is_none_or(|at| now.duration_since(at) >= EVERYTHING);
        let scope = if is_due { Scope::Everything } else { Scope::Ended };
        let RetentionTiming { grace, removals: rate, .. } = self.timing();
        let spec = CollectSpec { now, grace, scope, dry_run: false, rate };
        let signer = self.reconciler.keeper.signer();
        turn.collected = collect::collect(&repository, &due.cluster, signer, &spec, cancel).await?;
        Ok(turn)
    }

    /// While a restore may read what would go; and in a replica until all of it was brought, since what retention lets go of there
    /// can be brought no more.
    async fn must_wait(&self, due: &Due) -> Result<bool, KeeperError> {
        let jobs = self.reconciler.jobs.active().await?;
        let readers = [JobKind::Restore, JobKind::Verify, JobKind::WalFind];
        let is_read = jobs.iter().any(|job| job.cluster == due.cluster && readers.contains(&job.work.kind()));
        Ok(is_read || (due.spec.replica_of.is_some() && !self.is_whole_replica(&due.place())))
    }

    /// What is in force of what the policy says.
    async fn in_force(&self, due: &Due, now: Timestamp) -> Result<Option<RetentionSpec>, KeeperError> {
        let Some(wanted) = &due.wanted else { return Ok(None) };
        let (state, key) = (&self.reconciler.state, standing::key(&due.repository, &due.cluster));
        let row = state.row::<Standing>(&key).await?;
        let before = row.as_ref().map(|row| row.value.clone()).unwrap_or_default();
        let after = before.after(wanted, self.timing().notice, now);
        if row.is_none() || before != after {
            state.update_row(&key, row.map_or(0, |row| row.mod_revision), &after).await?;
        }
        Ok(after.in_force)
    }

    /// What nothing needs any more, or is about to be removed. Nothing is written.
    pub async fn garbage(
        &self,
        (name, spec): (&str, &RepositorySpec),
        cluster: &ClusterName,
        now: Timestamp,
    ) -> Result<Option<Waiting>, KeeperError> {
        let repository = self.find(name, spec, now).await?;
        let RetentionTiming { grace, removals: rate, .. } = self.timing();
        let spec = CollectSpec { now, grace, scope: Scope::Everything, dry_run: true, rate };
        let (signer, cancel) = (self.reconciler.keeper.signer(), CancellationToken::new());
        Ok(collect::collect(&repository, cluster, signer, &spec, &cancel).await?.waiting)
    }

    fn note_kept(&self, due: Due, now: Timestamp, outcome: Result<Turn, KeeperError>) {
        let mut all = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.get(&due.place()).and_then(|kept| kept.everything_at);
        let was_due = before.is_none_or(|at| now.duration_since(at) >= EVERYTHING);
        let has_searched = outcome.as_ref().is_ok_and(|turn| turn.collected.searched);
        let everything_at = if was_due && has_searched { Some(now) } else { before };
        if let Err(error) = &outcome {
            tracing::error!(cluster = %due.cluster, error = in_full(error), "cannot keep what is promised");
        }
        let outcome = outcome.map_err(|error| in_full(&error));
        let place = due.place();
        all.insert(place, Kept { at: now, wanted: due.wanted, outcome, everything_at });
    }

    /// The next round looks at it again.
    pub fn look_again(&self, cluster: &ClusterName) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter_mut().filter(|((_, of), _)| of == cluster).for_each(|(_, kept)| kept.at = Timestamp::UNIX_EPOCH);
    }
}

impl Turn {
    fn is_whole(&self) -> bool {
        !self.waits && self.plan.as_ref().is_none_or(|plan| plan.refused.is_empty())
    }
}

/// What its policy says is to be kept of a cluster; `None`: everything.
pub fn policy_says(cluster: &ClusterSeen<'_>) -> Option<RetentionSpec> {
    let policy = cluster.policy?;
    Some(policy.retention.as_ref()?.in_zone(&policy.backup.time_zone))
}

/// Every cluster that lies in a repository, and in its replicas. What those keep, their own documents say.
fn all(picture: &Picture, assembly: &Assembly<'_>) -> Vec<Due> {
    let repositories = &picture.catalog.repositories;
    let mut all = Vec::new();
    for cluster in assembly.clusters.values() {
        let Some((name, spec)) = cluster.repository.and_then(|name| repositories.get_key_value(name)) else { continue };
        let due = |repository: &String, spec: &RepositorySpec, wanted| Due {
            cluster: cluster.name.clone(),
            repository: repository.clone(),
            spec: spec.clone(),
            wanted,
        };
        all.push(due(name, spec, policy_says(cluster).filter(|_| cluster.is_surely_bound)));
        let zone = cluster.policy.map_or("UTC", |policy| &policy.backup.time_zone);
        let replicas = repositories.iter().filter(|(_, replica)| replica.replica_of.as_ref() == Some(name));
        all.extend(replicas.map(|(replica, spec)| {
            due(replica, spec, spec.retention.as_ref().map(|retention| retention.in_zone(zone)))
        }));
    }
    all
}

#[cfg(test)]
mod tests;
