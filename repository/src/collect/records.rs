//! What collectors left in the repository: at most one plan that is not carried out, and a report of the last that was.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use super::{CollectError, CollectSpec};
use crate::cluster_log::{ClusterState, SessionState};
use crate::format::collect_plan::{CollectPlan, Collected};
use crate::ids::{BackupId, ClusterName};
use crate::layout::{self, CollectObject};
use crate::open::Repository;
use crate::postgres::{Lsn, WalBranch};
use crate::signature::Signer;
use crate::store::Creation;

/// All of a cluster's, from one listing.
pub(super) struct Records {
    /// With when they were written, by the store's clock.
    plans: BTreeMap<u64, Timestamp>,
    reports: BTreeSet<u64>,
    /// The newest report.
    pub last: Option<Collected>,
}

impl Records {
    pub(super) async fn read(repository: &Repository, cluster: &ClusterName) -> Result<Records, CollectError> {
        let mut records = Records { plans: BTreeMap::new(), reports: BTreeSet::new(), last: None };
        for object in repository.store().list(&layout::collect(cluster)).await? {
            match layout::parse_collect(cluster, &object.key) {
                Some(CollectObject::Plan(sequence)) => {
                    let at = Timestamp::from_microsecond(object.last_modified_us).unwrap_or(Timestamp::MAX);
                    records.plans.insert(sequence, at);
                }
                Some(CollectObject::Collected(sequence)) => {
                    records.reports.insert(sequence);
                }
                None => {}
            }
        }
        for sequence in records.reports.iter().rev() {
            let object = repository.store().get(&layout::collected(cluster, *sequence)).await?;
            match Collected::open(&repository.trust(), cluster, *sequence, &object) {
                Ok(last) => {
                    records.last = Some(last);
                    break;
                }
                Err(error) => tracing::warn!(%cluster, sequence, %error, "a report of a collection is not believed"),
            }
        }
        Ok(records)
    }

    /// The oldest plan that is not carried out, and when it was written.
    pub(super) async fn plan(
        &self,
        repository: &Repository,
        cluster: &ClusterName,
    ) -> Result<Option<(CollectPlan, Timestamp)>, CollectError> {
        for (sequence, at) in &self.plans {
            let object = repository.store().get(&layout::collect_plan(cluster, *sequence)).await?;
            match CollectPlan::open(&repository.trust(), cluster, *sequence, &object) {
                Ok(plan) => return Ok(Some((plan, *at))),
                Err(error) => tracing::warn!(%cluster, sequence, %error, "a collection plan is not believed"),
            }
        }
        Ok(None)
    }

    /// Whether no session has ended, and no trim has moved, since the last look.
    pub(super) fn is_idle(&self, state: &ClusterState) -> bool {
        let (sessions, trims) = self.seen();
        let is_over = |session: &SessionState| matches!(session, SessionState::Aborted { .. } | SessionState::Purged);
        let mut ended = state.sessions().filter(|session| is_over(&session.state));
        ended.all(|session| sessions.contains(session.id())) && *state.trims() == trims
    }

    /// The sessions and trims that were looked at.
    pub(super) fn seen(&self) -> (BTreeSet<BackupId>, BTreeMap<WalBranch, Lsn>) {
        self.last.as_ref().map(|last| (last.sessions.clone(), last.trims.clone())).unwrap_or_default()
    }

    /// Leaves the report, and takes away what it takes the place of. Killed between any two steps, the next run does the rest.
    pub(super) async fn finish(
        &self,
        repository: &Repository,
        signer: &Signer,
        report: &Collected,
    ) -> Result<(), CollectError> {
        let (store, cluster) = (repository.store(), &report.cluster);
        let object = report.seal(signer, repository.id());
        match store.create(&layout::collected(cluster, report.sequence), object).await? {
            // One that is there already says as much; if it is nobody's, all is looked at again.
            Creation::Created | Creation::AlreadyThere => {}
        }
        let plans = self.plans.keys().filter(|plan| **plan <= report.sequence);
        let plans = plans.map(|plan| layout::collect_plan(cluster, *plan));
        let older = self.reports.iter().filter(|older| **older < report.sequence);
        let older = older.map(|older| layout::collected(cluster, *older));
        Ok(store.delete(plans.chain(older).collect()).await?)
    }

    /// What is to be reported once a plan was carried out.
    pub(super) fn report(&self, plan: &CollectPlan, spec: &CollectSpec) -> Collected {
        let (mut sessions, mut trims) = self.seen();
        sessions.extend(plan.backups.iter().cloned());
        trims.extend(plan.trims.iter().map(|(wal, below)| (*wal, *below)));
        Collected {
            cluster: plan.cluster.clone(),
            sequence: plan.sequence,
            at_us: spec.now.as_microsecond(),
            sessions,
            trims,
            objects: plan.objects(),
            bytes: plan.bytes,
        }
    }
}
