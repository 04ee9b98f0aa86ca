//! One cluster's place in a repository, opened with a key: its log, its WAL archive, its backups.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use crate::backup::read::{BackupReader, PackKeys};
use crate::cluster_log::{Author, ClusterLog, ClusterState, DomainKeys, LogError};
use crate::crypto::{CryptoError, DomainKey, RecipientSecret};
use crate::format::log_entry::Action;
use crate::format::manifest::{Manifest, ManifestError};
use crate::ids::{BackupId, ClusterName, Digest, DomainId};
use crate::keyring::{self, Keyring, KeyringError};
use crate::layout;
use crate::lineage::Kin;
use crate::open::{CommittedBackup, Repository, RepositoryError};
use crate::store::{Pace, StoreError};
use crate::wal_archive::WalArchive;

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error(
        "the repository knows no cluster {0}\nHINT: check the name; \"walfleet-agent list\" without a cluster shows those it knows."
    )]
    Unknown(ClusterName),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("cluster {cluster}: {source}")]
    Key { cluster: ClusterName, source: KeyringError },
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    #[error("read manifest of {backup}: {source}")]
    Store { backup: BackupId, source: StoreError },
    #[error("backup {backup}: {source}")]
    Manifest { backup: BackupId, source: ManifestError },
    #[error("backup {backup}: its manifest has the digest {found}, and the log's commit says {expected}")]
    Digest { backup: BackupId, expected: Digest, found: Digest },
}

impl ClusterError {
    /// Whether the same may succeed later without anyone changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            ClusterError::Repository(RepositoryError::Store { source, .. }) | ClusterError::Store { source, .. } => {
                source.is_retryable()
            }
            ClusterError::Log(error) => error.is_retryable(),
            ClusterError::Key { source: KeyringError::Store(error), .. } => error.is_retryable(),
            // Another host may grant the key in a moment.
            ClusterError::Key { source: KeyringError::NotGranted { .. }, .. } => true,
            _ => false,
        }
    }
}

/// A cluster in a repository and the keys to its content. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OpenCluster {
    repository: Repository,
    name: ClusterName,
    keys: Arc<Keyring>,
    domain: DomainKeys,
}

impl OpenCluster {
    /// Opens a cluster that the repository knows.
    pub async fn open(
        repository: Repository,
        name: ClusterName,
        recipient: &RecipientSecret,
    ) -> Result<OpenCluster, ClusterError> {
        let mut log = repository.cluster_log(&name);
        let domain = log.refresh().await?.keys().cloned().ok_or_else(|| ClusterError::Unknown(name.clone()))?;
        OpenCluster::with_domain(repository, name, recipient, domain).await
    }

    /// Opens a cluster, and begins its log first if nobody has.
    ///
    /// A copy of a cluster whose key opens for the recipient joins that one's domain. Otherwise a new key is made, wrapped
    /// for the recipient and for the recovery key before the log names it, so that there is no moment in which data could
    /// be sealed for nobody. `kin`: whose copy it may be; `None`: nobody's.
    pub async fn open_or_begin(
        repository: Repository,
        name: ClusterName,
        recipient: &RecipientSecret,
        author: Author<'_>,
        (label, kin): (&str, Option<&Kin>),
    ) -> Result<OpenCluster, ClusterError> {
        let mut log = repository.cluster_log(&name);
        let known = log.refresh().await?.keys().cloned();
        let domain = match known {
            Some(domain) => domain,
            None => {
                let shared = match kin {
                    Some(kin) => kin.domain(&repository, &name, recipient).await?,
                    None => None,
                };
                let fresh = match shared {
                    Some(domain) => Beginning::of(&domain).ok_or_else(|| ClusterError::Unknown(name.clone()))?,
                    None => make_key(&repository, &name, recipient, label).await?,
                };
                begin(&name, &mut log, author, fresh).await?
            }
        };
        OpenCluster::with_domain(repository, name, recipient, domain).await
    }

    async fn with_domain(
        repository: Repository,
        name: ClusterName,
        recipient: &RecipientSecret,
        domain: DomainKeys,
    ) -> Result<OpenCluster, ClusterError> {
        let keys = Keyring::open(repository.store(), &domain, recipient).await;
        let keys = keys.map_err(|source| ClusterError::Key { cluster: name.clone(), source })?;
        Ok(OpenCluster { repository, name, keys: Arc::new(keys), domain })
    }

    pub(crate) fn of(repository: Repository, name: ClusterName, keys: Arc<Keyring>, domain: DomainKeys) -> OpenCluster {
        OpenCluster { repository, name, keys, domain }
    }

    /// The same cluster for bulk work, which waits for `pace` ([`crate::store::Store::paced`]).
    #[must_use]
    pub fn paced(&self, pace: Arc<dyn Pace>) -> OpenCluster {
        OpenCluster { repository: self.repository.paced(pace), ..self.clone() }
    }

    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    pub fn name(&self) -> &ClusterName {
        &self.name
    }

    pub fn keys(&self) -> &Arc<Keyring> {
        &self.keys
    }

    /// What the log says of the cluster's keys.
    pub fn domain(&self) -> &DomainKeys {
        &self.domain
    }

    /// `level`: zstd's, for what is shipped through it.
    pub fn wal_archive(&self, level: i32) -> WalArchive {
        WalArchive::new(self.repository.store().clone(), self.name.clone(), self.keys.clone(), level)
    }

    /// The cluster's log, read to its end.
    pub async fn log(&self) -> Result<ClusterLog, ClusterError> {
        let mut log = self.repository.cluster_log(&self.name);
        log.refresh().await?;
        Ok(log)
    }

    /// Opens a committed backup for reading.
    pub async fn open_backup(
        &self,
        backup: &CommittedBackup,
        state: &ClusterState,
    ) -> Result<BackupReader, ClusterError> {
        let reference = &backup.reference;
        let id = reference.backup.clone();
        let key = layout::manifest(&self.name, &id);
        let store = self.repository.store();
        let bytes = store.get(&key).await.map_err(|source| ClusterError::Store { backup: id.clone(), source })?;
        let (found, expected) = (Digest(*blake3::hash(&bytes).as_bytes()), backup.commit.manifest_digest);
        if found != expected {
            return Err(ClusterError::Digest { backup: id, expected, found });
        }
        let named = |source| ClusterError::Manifest { backup: id.clone(), source };
        let header = crate::format::sealed::Header::parse(&bytes, crate::format::clear::ObjectKind::Manifest)
            .map_err(|source| named(source.into()))?;
        let domain = self.keys.version(header.key_version).unwrap_or(self.keys.newest());
        let manifest = Manifest::open(bytes, domain, key.as_ref()).map_err(named)?;
        let packs = self.pack_keys(backup, state).await?;
        Ok(BackupReader::new(manifest, store.clone(), self.keys.clone(), packs))
    }

    /// Where each pack of the backup lies now. What was borrowed is where the lender's log says.
    pub async fn pack_keys(&self, backup: &CommittedBackup, state: &ClusterState) -> Result<PackKeys, ClusterError> {
        let mut lenders: HashMap<&ClusterName, ClusterLog> = HashMap::new();
        for lender in backup.reference.sessions.iter().filter_map(|session| session.cluster.as_ref()) {
            if let Entry::Vacant(entry) = lenders.entry(lender) {
                let mut log = self.repository.cluster_log(lender);
                log.refresh().await?;
                entry.insert(log);
            }
        }
        let mut keys = PackKeys::new();
        for (cluster, session, used) in backup.reference.packs() {
            let state = lenders.get(cluster).map_or(state, ClusterLog::state);
            let home = state.moved(&used.pack).unwrap_or(session);
            keys.insert(used.pack, layout::pack(cluster, home, used.pack));
        }
        Ok(keys)
    }

    /// Another cluster of the same domain; `None`: it is of another, and its content does not open with these keys.
    pub fn relative(&self, log: &ClusterLog) -> Option<OpenCluster> {
        let shares = log.state().keys() == Some(&self.domain);
        shares.then(|| OpenCluster { name: log.cluster().clone(), ..self.clone() })
    }
}

/// What a log begins with.
struct Beginning {
    domain: DomainId,
    key_commitment: [u8; 32],
}

impl Beginning {
    /// Of a domain that is there.
    fn of(domain: &DomainKeys) -> Option<Beginning> {
        Some(Beginning { domain: domain.domain, key_commitment: *domain.commitments.get(&1)? })
    }
}

/// Makes a key that nothing is sealed with yet, for the recipient and the recovery key.
async fn make_key(
    repository: &Repository,
    name: &ClusterName,
    recipient: &RecipientSecret,
    label: &str,
) -> Result<Beginning, ClusterError> {
    let key = DomainKey::generate()?;
    let named = |source| ClusterError::Key { cluster: name.clone(), source };
    let recovery = repository.root().recovery_recipient;
    keyring::store_wrapped(repository.store(), &key, recovery, "recovery").await.map_err(named)?;
    if recipient.id() != recovery {
        keyring::store_wrapped(repository.store(), &key, recipient.id(), label).await.map_err(named)?;
    }
    Ok(Beginning { domain: key.domain, key_commitment: key.commitment() })
}

/// Begins the cluster's log, unless someone else does so at the same time: then their domain is the cluster's.
async fn begin(
    name: &ClusterName,
    log: &mut ClusterLog,
    author: Author<'_>,
    fresh: Beginning,
) -> Result<DomainKeys, ClusterError> {
    let begin = Action::Begin { domain: fresh.domain, key_commitment: fresh.key_commitment };
    log.append_unless_done(author, |state| state.keys().is_none().then(|| begin.clone())).await?;
    log.state().keys().cloned().ok_or_else(|| ClusterError::Unknown(name.clone()))
}
