//! Lending: a copy of a cluster that has no backup yet may refer to one of the cluster it is a copy of.
//!
//! Only within one domain, which the copy's agent has shown by beginning its log with that domain: whoever holds no key of
//! it gains nothing by a claimed system identifier.

use jiff::Timestamp;
use walfleet_repository::cluster_log::Author;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::lineage::{self, Kin};
use walfleet_repository::open::Repository;
use walfleet_repository::postgres::SystemId;

use super::{Keeper, KeeperError};
use crate::fleet::Assembly;
use crate::reconcile::desired::relatives;
use crate::reconcile::in_full;

/// A cluster that may want a loan.
pub(super) struct Newcomer {
    name: ClusterName,
    repository: String,
    kin: Kin,
}

/// Clusters without a backup that may be copies of others.
fn newcomers(assembly: &Assembly<'_>) -> Vec<Newcomer> {
    let clusters = assembly.clusters.values().filter_map(|cluster| {
        let has_backup = cluster.members.iter().any(|member| !member.instance.backups.is_empty());
        let names: Vec<ClusterName> = relatives(cluster, assembly).map(|relative| relative.name.clone()).collect();
        if has_backup || names.is_empty() {
            return None;
        }
        let kin = Kin { system_id: SystemId(cluster.system_identifier?), clusters: Some(names) };
        Some(Newcomer { name: cluster.name.clone(), repository: cluster.repository?.to_owned(), kin })
    });
    clusters.collect()
}

impl Keeper {
    pub(super) async fn newcomers(&self, now: Timestamp) -> Vec<Newcomer> {
        match self.reconciler.picture(now).await {
            Ok(picture) => newcomers(&picture.assemble()),
            Err(error) => {
                tracing::warn!(error = in_full(&error), "cannot see whether a new cluster is a copy of another");
                Vec::new()
            }
        }
    }

    /// Lends to those that lie in this repository. What fails for one is tried again in the next round.
    pub(super) async fn lend(&self, name: &str, repository: &Repository, newcomers: &[Newcomer]) {
        for newcomer in newcomers.iter().filter(|newcomer| newcomer.repository == name) {
            if let Err(error) = self.lend_to(repository, newcomer).await {
                let error = in_full(&error);
                tracing::warn!(cluster = %newcomer.name, error, "cannot lend to a copy of another cluster yet");
            }
        }
    }

    async fn lend_to(&self, repository: &Repository, newcomer: &Newcomer) -> Result<(), KeeperError> {
        let mut log = repository.cluster_log(&newcomer.name);
        let state = log.refresh().await?;
        let Some(domain) = state.keys().filter(|_| lineage::wants_loan(state, newcomer.kin.system_id)) else {
            return Ok(());
        };
        if let Some(lendable) = newcomer.kin.lendable(repository, &newcomer.name, domain).await? {
            let author = Author::keeper(self.reconciler.keeper.signer(), self.reconciler.epoch);
            lineage::lend(repository, author, &lendable, &newcomer.name).await?;
        }
        Ok(())
    }
}
