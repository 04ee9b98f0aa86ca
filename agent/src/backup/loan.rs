//! A parent for the first backup of a copy: a backup of the cluster it is a copy of, lent in both clusters' logs.
//!
//! A host with the repository's own key writes the entries itself; elsewhere the controller does, within its next round,
//! and is waited for. Without a loan the backup stores everything itself: that costs space, nothing else.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::cluster_log::Author;
use walfleet_repository::lineage::{self, Kin};
use walfleet_repository::signature::{Role, Signer};

/// Two rounds of a controller's keeper, and a little.
const PATIENCE: Duration = Duration::from_secs(75);
const LOOK: Duration = Duration::from_secs(1);

/// Has a relative's backup lent if the next one would have no parent.
pub(super) async fn arrange(cluster: &OpenCluster, signer: &Signer, kin: Option<&Kin>, cancel: &CancellationToken) {
    let Some(kin) = kin else { return };
    let lent = tokio::select! {
        () = cancel.cancelled() => return,
        lent = borrow(cluster, signer, kin) => lent,
    };
    if let Err(error) = lent {
        tracing::warn!(cluster = %cluster.name(), "no relative's backup can be referred to, and all content is stored anew: {error}");
    }
}

async fn borrow(cluster: &OpenCluster, signer: &Signer, kin: &Kin) -> Result<(), ClusterError> {
    let mut log = cluster.log().await?;
    if !lineage::wants_loan(log.state(), kin.system_id) {
        return Ok(());
    }
    let repository = cluster.repository();
    let Some(lendable) = kin.lendable(repository, cluster.name(), cluster.domain()).await? else { return Ok(()) };
    let writer = repository.trust().verify_chain(signer.public_key(), signer.chain());
    if writer.is_ok_and(|writer| matches!(writer.role, Role::Root)) {
        lineage::lend(repository, Author::host(signer), &lendable, cluster.name()).await?;
        return Ok(());
    }
    tracing::info!(cluster = %cluster.name(), lender = %lendable.cluster, "waiting for the controller to lend a backup of the cluster this one is a copy of");
    let patience = Instant::now() + PATIENCE;
    while Instant::now() < patience {
        tokio::time::sleep(LOOK).await;
        log.refresh().await?;
        if !lineage::wants_loan(log.state(), kin.system_id) {
            return Ok(());
        }
    }
    tracing::warn!(cluster = %cluster.name(), lender = %lendable.cluster, "the controller has not lent a backup in time, and all content is stored anew");
    Ok(())
}
