//! What opens a cluster again while the store does not answer: its root object and its wrapped keys, as they were read. They open
//! for the same host's key alone, as they do in the repository; who keeps them keeps no more than that lets anybody see.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cluster::{ClusterError, OpenCluster};
use crate::cluster_log::DomainKeys;
use crate::crypto::RecipientSecret;
use crate::format::root::RepositoryRoot;
use crate::ids::{ClusterName, DomainId, RecipientId};
use crate::keyring::{Keyring, KeyringError};
use crate::layout;
use crate::open::{Repository, RepositoryError};
use crate::signature::PublicKey;
use crate::store::Store;

/// Of one cluster, for one recipient.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptCluster {
    root: Vec<u8>,
    domain: Vec<u8>,
    keys: BTreeMap<u32, KeptKey>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct KeptKey {
    commitment: [u8; 32],
    wrapped: Vec<u8>,
}

impl KeptCluster {
    /// Reads a cluster's wrapped keys once more; one request for each.
    pub async fn of(cluster: &OpenCluster, recipient: RecipientId) -> Result<KeptCluster, ClusterError> {
        let domain = cluster.domain();
        let mut keys = BTreeMap::new();
        for (version, commitment) in &domain.commitments {
            let name = layout::domain_key(domain.domain, *version, recipient);
            let wrapped = cluster.repository().store().get(&name).await;
            let wrapped = wrapped.map_err(|error| key_error(cluster.name(), error.into()))?.to_vec();
            keys.insert(*version, KeptKey { commitment: *commitment, wrapped });
        }
        let root = cluster.repository().root().encode().to_vec();
        Ok(KeptCluster { root, domain: domain.domain.0.to_vec(), keys })
    }

    /// Opens the cluster without a request. Whatever is asked of the store afterwards waits for it as ever.
    pub async fn open(
        &self,
        (store, expected_root): (Store, Option<PublicKey>),
        name: ClusterName,
        recipient: &RecipientSecret,
    ) -> Result<OpenCluster, ClusterError> {
        let root = RepositoryRoot::decode(&self.root)
            .map_err(|source| RepositoryError::Root { store: store.to_string(), source })?;
        if let Some(expected) = expected_root.filter(|expected| *expected != root.root_public_key) {
            let (store, found) = (store.to_string(), root.root_public_key);
            return Err(RepositoryError::ForeignRoot { store, expected, found }.into());
        }
        let domain = DomainId::from_slice(&self.domain).map_err(|_| ClusterError::Unknown(name.clone()))?;
        let commitments = self.keys.iter().map(|(version, key)| (*version, key.commitment)).collect();
        let domain = DomainKeys { domain, commitments };
        let memory = Store::in_memory();
        for (version, key) in &self.keys {
            let object = layout::domain_key(domain.domain, *version, recipient.id());
            let created = memory.create(&object, key.wrapped.clone().into()).await;
            let _new_there = created.map_err(|error| key_error(&name, error.into()))?;
        }
        let keys = Keyring::open(&memory, &domain, recipient).await.map_err(|error| key_error(&name, error))?;
        Ok(OpenCluster::of(Repository::of(store, root), name, Arc::new(keys), domain))
    }
}

fn key_error(cluster: &ClusterName, source: KeyringError) -> ClusterError {
    ClusterError::Key { cluster: cluster.clone(), source }
}
