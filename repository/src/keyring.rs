//! The domain keys of one cluster, opened for a recipient; and granting them to others.
//!
//! A wrapped key proves nothing by itself, since anybody can wrap anything for a public key. What makes it the domain's
//! is the commitment in the cluster's log; a key that does not fit it is refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::cluster_log::DomainKeys;
use crate::crypto::{CryptoError, DomainKey, RecipientSecret};
use crate::format::domain_key::{self, DomainKeyError};
use crate::ids::RecipientId;
use crate::layout;
use crate::store::{Store, StoreError};

#[derive(Debug, thiserror::Error)]
pub enum KeyringError {
    #[error("read domain key: {0}")]
    Store(#[from] StoreError),
    #[error(
        "the domain key of this cluster (version {version}) was never granted to recipient {recipient}\nHINT: a host that has it grants it (add the host to the policy's restore.hosts), or the recovery key does: walfleet-agent grant --key-file recovery.key."
    )]
    NotGranted { version: u32, recipient: RecipientId },
    #[error(transparent)]
    Key(#[from] DomainKeyError),
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    #[error("version {version} of the domain key is not the one that the cluster's log commits to")]
    Commitment { version: u32 },
    #[error("the cluster's log names no domain key")]
    Empty,
}

/// All versions of a domain's key.
#[derive(Clone, Debug)]
pub struct Keyring {
    versions: BTreeMap<u32, Arc<DomainKey>>,
    newest: Arc<DomainKey>,
}

impl Keyring {
    pub fn of(key: DomainKey) -> Keyring {
        let newest = Arc::new(key);
        Keyring { versions: BTreeMap::from([(newest.version, newest.clone())]), newest }
    }

    /// Seals what is new. Its id key is that of every version.
    pub fn newest(&self) -> &Arc<DomainKey> {
        &self.newest
    }

    pub fn version(&self, version: u32) -> Option<&DomainKey> {
        self.versions.get(&version).map(|key| &**key)
    }

    /// Opens every version that the log commits to.
    pub async fn open(
        store: &Store,
        domain: &DomainKeys,
        recipient: &RecipientSecret,
    ) -> Result<Keyring, KeyringError> {
        let mut versions = BTreeMap::new();
        for (version, commitment) in &domain.commitments {
            let object = match store.get(&layout::domain_key(domain.domain, *version, recipient.id())).await {
                Ok(object) => object,
                Err(error) if error.is_not_found() => {
                    return Err(KeyringError::NotGranted { version: *version, recipient: recipient.id() });
                }
                Err(error) => return Err(error.into()),
            };
            let key = domain_key::unwrap(&object, domain.domain, *version, recipient)?;
            if key.commitment() != *commitment {
                return Err(KeyringError::Commitment { version: *version });
            }
            versions.insert(*version, Arc::new(key));
        }
        let newest = versions.values().next_back().cloned().ok_or(KeyringError::Empty)?;
        Ok(Keyring { versions, newest })
    }

    /// Wraps every version for another recipient; what lies there already stays.
    pub async fn grant(&self, store: &Store, recipient: RecipientId, label: &str) -> Result<(), KeyringError> {
        for key in self.versions.values() {
            store_wrapped(store, key, recipient, label).await?;
        }
        Ok(())
    }
}

/// Stores a key wrapped for a recipient, unless one lies there: a wrap is never the same twice, and one is enough.
pub async fn store_wrapped(
    store: &Store,
    key: &DomainKey,
    recipient: RecipientId,
    label: &str,
) -> Result<(), KeyringError> {
    let name = layout::domain_key(key.domain, key.version, recipient);
    if store.exists(&name).await? {
        return Ok(());
    }
    let _either_way_one_lies_there = store.create(&name, domain_key::wrap(key, recipient, label)?).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_keyring_opens_for_those_it_was_granted_to_and_refuses_a_planted_key() {
        let store = Store::in_memory();
        let key = DomainKey::generate().unwrap();
        let (alice, bob) = (RecipientSecret::generate().unwrap(), RecipientSecret::generate().unwrap());
        let log = DomainKeys { domain: key.domain, commitments: BTreeMap::from([(1, key.commitment())]) };
        store_wrapped(&store, &key, alice.id(), "alice").await.unwrap();
        let ring = Keyring::open(&store, &log, &alice).await.unwrap();
        assert!(matches!(Keyring::open(&store, &log, &bob).await, Err(KeyringError::NotGranted { .. })));
        ring.grant(&store, bob.id(), "bob").await.unwrap();
        ring.grant(&store, bob.id(), "bob").await.unwrap();
        assert!(Keyring::open(&store, &log, &bob).await.is_ok());

        let mallory = RecipientSecret::generate().unwrap();
        let planted = DomainKey::from_parts(key.domain, 1, [1; 32], [2; 32]).unwrap();
        store_wrapped(&store, &planted, mallory.id(), "x").await.unwrap();
        let refused = Keyring::open(&store, &log, &mallory).await;
        assert!(matches!(refused, Err(KeyringError::Commitment { version: 1 })), "{refused:?}");
    }
}
