//! Granting: every host that the desired state names gets the clusters' keys wrapped for it, by a host that has them.
//!
//! The controller cannot do it, since it holds no data key. Granting again changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use walfleet_repository::cluster::ClusterError;
use walfleet_repository::ids::{ClusterName, RecipientId};
use walfleet_repository::keyring::KeyringError;

use super::{Access, AccessError, ClusterAccess};

/// How soon a new key version is noticed.
const AGAIN: Duration = Duration::from_secs(60);

/// How soon a grant that failed is tried again: the repository may just be being made, and other hosts wait for their keys.
const AGAIN_IF_FAILED: Duration = Duration::from_secs(10);

/// For how long a new host may be without a key of its own before that is worth a warning: the host that has the key
/// hears of the new one and grants it within [`AGAIN`].
const UNGRANTED: Duration = Duration::from_secs(150);

type Granted = BTreeSet<(ClusterName, [u8; 32])>;

/// What this run of the agent did.
#[derive(Default)]
struct Grants {
    granted: Granted,
    /// Clusters of which this host has no key itself, and since when that is known.
    ungranted: BTreeMap<ClusterName, Instant>,
}

/// Grants whatever is wanted and missing, for as long as the agent runs.
pub async fn keep_granted(mut access: watch::Receiver<Option<Arc<Access>>>, cancel: CancellationToken) {
    let mut grants = Grants::default();
    loop {
        let present = access.borrow_and_update().clone();
        let mut is_done = true;
        if let Some(present) = present {
            tokio::select! {
                // Between two objects; each is written whole or not at all.
                () = cancel.cancelled() => return,
                granted = grant_all(&present, &mut grants) => is_done = granted,
            }
        }
        let wait = if is_done { AGAIN } else { AGAIN_IF_FAILED };
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = access.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Whether nothing is left to be granted.
async fn grant_all(access: &Access, grants: &mut Grants) -> bool {
    let mut is_done = true;
    for cluster in access.clusters.values() {
        let missing = missing(cluster, access.key.file.recipient.id(), &grants.granted);
        if cluster.instance.is_none() || missing.is_empty() {
            continue;
        }
        let granted = grant(access, cluster, &missing).await;
        is_done &= granted.is_ok();
        match granted {
            Ok(()) => {
                grants.ungranted.remove(&cluster.name);
                grants.granted.extend(missing.into_iter().map(|(recipient, _)| (cluster.name.clone(), recipient)));
            }
            Err(error) if waits_for_own_key(&error) && grants.has_just_learned_of(&cluster.name) => {
                tracing::info!(cluster = %cluster.name, "the cluster's key is not granted to this host yet, which can grant it to no other")
            }
            Err(error) => {
                tracing::warn!(cluster = %cluster.name, %error, "the cluster's key is not granted yet to every host that may restore it")
            }
        }
    }
    is_done
}

impl Grants {
    fn has_just_learned_of(&mut self, ungranted: &ClusterName) -> bool {
        self.ungranted.entry(ungranted.clone()).or_insert_with(Instant::now).elapsed() < UNGRANTED
    }
}

fn waits_for_own_key(error: &AccessError) -> bool {
    matches!(error, AccessError::Cluster(ClusterError::Key { source: KeyringError::NotGranted { .. }, .. }))
}

/// Recipients that this run of the agent has not granted yet, itself aside.
fn missing(cluster: &ClusterAccess, own: RecipientId, granted: &Granted) -> Vec<([u8; 32], String)> {
    cluster
        .recipients
        .iter()
        .filter(|recipient| recipient.public_key != own.0)
        .filter(|recipient| !granted.contains(&(cluster.name.clone(), recipient.public_key)))
        .map(|recipient| (recipient.public_key, recipient.label.clone()))
        .collect()
}

async fn grant(access: &Access, cluster: &ClusterAccess, missing: &[([u8; 32], String)]) -> Result<(), AccessError> {
    let open = access.open_or_begin(cluster).await?;
    for (recipient, label) in missing {
        let granting = open.keys().grant(open.repository().store(), RecipientId(*recipient), label).await;
        granting.map_err(|source| ClusterError::Key { cluster: cluster.name.clone(), source })?;
        tracing::info!(cluster = %cluster.name, to = label, "the cluster's key is granted");
    }
    Ok(())
}
