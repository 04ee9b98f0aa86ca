//! A repository, made or opened: its root object, its trust, and from there its clusters and backups.

use std::fmt;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};

use crate::cluster_log::{ClusterLog, Committed, LogError, LogMemory, SessionState};
use crate::format::reference::{ReferenceError, ReferencePart};
use crate::format::root::{AppendMode, RepositoryRoot, RootError};
use crate::ids::{BackupId, ClusterName, RecipientId, RepositoryId};
use crate::layout;
use crate::signature::{PublicKey, Role, TrustRoot, Writer};
use crate::store::probe::{ProbeReport, probe};
use crate::store::{Creation, Pace, Store, StoreError};

/// Reference parts read at once: small objects, so latency counts.
const REFERENCE_READS: usize = 16;

/// What a repository is to be made with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RepositorySpec {
    /// At the root of every signature: the recovery key's.
    pub root_public_key: PublicKey,
    /// For whom every domain key is wrapped.
    pub recovery_recipient: RecipientId,
}

/// A repository that could not be made, opened or read.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error("repository {store}: {source}")]
    Store { store: String, source: StoreError },
    #[error(
        "{store} holds no repository\nHINT: check the URL and its prefix, or make one with \"walfleet repository init\"."
    )]
    Absent { store: String, source: StoreError },
    #[error("repository {store}: its root object does not read: {source}")]
    Root { store: String, source: RootError },
    #[error(
        "{store} holds repository {found} already, which was made with another recovery key ({found_key}, not {wanted_key})\nHINT: use another folder or prefix, or the recovery key of that repository."
    )]
    Taken { store: String, found: RepositoryId, found_key: PublicKey, wanted_key: PublicKey },
    #[error(
        "repository {store}: its root key is {found}, and this host was told {expected}\nHINT: this is another repository, or a forged one; nothing was read from it."
    )]
    ForeignRoot { store: String, expected: PublicKey, found: PublicKey },
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Reference(#[from] ReferenceError),
}

/// What `init` did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Initialised {
    Made {
        probe: ProbeReport,
    },
    /// The same repository was there; nothing was changed.
    WasThere,
}

/// An open repository. Cloning is cheap.
#[derive(Clone)]
pub struct Repository {
    store: Store,
    root: Arc<RepositoryRoot>,
    /// Shared by all clones: one job asks for the same log several times.
    logs: LogMemory,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repository").field("store", &self.store).field("id", &self.root.repository_id).finish()
    }
}

/// A committed backup that is not purged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CommittedBackup {
    pub reference: ReferencePart,
    pub commit: Committed,
    pub life: BackupLife,
    /// Who signed the reference part.
    pub writer: Writer,
}

impl CommittedBackup {
    /// When the place it was copied from saw its commit, microseconds since the Unix epoch.
    pub fn seen_before_us(&self) -> Option<i64> {
        self.reference.seen_at_us.filter(|_| !matches!(self.writer.role, Role::Agent { .. }))
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BackupLife {
    Live,
    /// In the trash, and why.
    Expired {
        reason: String,
    },
}

/// A cluster's backups as one prefix of its log has them.
#[derive(Debug, Default)]
pub struct CommittedBackups {
    /// In the order of their commits.
    pub readable: Vec<CommittedBackup>,
    /// Committed, but their reference part is damaged, missing or not believed.
    pub unreadable: Vec<(BackupId, RepositoryError)>,
}

impl Repository {
    /// Makes a repository, after proving what the store promises. Doing it again with the same keys changes nothing.
    pub async fn init(store: Store, spec: RepositorySpec) -> Result<(Repository, Initialised), RepositoryError> {
        if let Some(there) = Repository::find(&store).await? {
            return Ok((there.made_with(spec)?, Initialised::WasThere));
        }
        let report = probe(&store).await.map_err(|source| store_error(&store, source))?;
        let root = RepositoryRoot {
            repository_id: RepositoryId(rand::random()),
            root_public_key: spec.root_public_key,
            recovery_recipient: spec.recovery_recipient,
            append_mode: if report.is_atomic() { AppendMode::AtomicCreate } else { AppendMode::Sequenced },
            created_at_us: now_us(),
            probe_creates: report.creates,
            probe_winners: report.winners,
        };
        // A random repository id is the nonce that tells our object from one that another init made at the same time.
        match store.create(&layout::root(), root.encode()).await.map_err(|source| store_error(&store, source))? {
            Creation::Created => {
                tracing::info!(%store, repository = %root.repository_id, "repository made");
                Ok((Repository::of(store, root), Initialised::Made { probe: report }))
            }
            Creation::AlreadyThere => {
                let there = Repository::open(store, None).await?;
                Ok((there.made_with(spec)?, Initialised::WasThere))
            }
        }
    }

    /// Opens a repository. With `expected_root`, any other's is refused: whoever can write to the store can put a
    /// repository of his own there.
    pub async fn open(store: Store, expected_root: Option<PublicKey>) -> Result<Repository, RepositoryError> {
        let bytes = match store.get(&layout::root()).await {
            Ok(bytes) => bytes,
            Err(source) if source.is_not_found() => {
                return Err(RepositoryError::Absent { store: store.to_string(), source });
            }
            Err(source) => return Err(store_error(&store, source)),
        };
        let root = RepositoryRoot::decode(&bytes)
            .map_err(|source| RepositoryError::Root { store: store.to_string(), source })?;
        if let Some(expected) = expected_root.filter(|expected| *expected != root.root_public_key) {
            let (store, found) = (store.to_string(), root.root_public_key);
            return Err(RepositoryError::ForeignRoot { store, expected, found });
        }
        Ok(Repository::of(store, root))
    }

    pub(crate) fn of(store: Store, root: RepositoryRoot) -> Repository {
        Repository { store, root: Arc::new(root), logs: LogMemory::default() }
    }

    async fn find(store: &Store) -> Result<Option<Repository>, RepositoryError> {
        match Repository::open(store.clone(), None).await {
            Ok(repository) => Ok(Some(repository)),
            Err(RepositoryError::Absent { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn made_with(self, spec: RepositorySpec) -> Result<Repository, RepositoryError> {
        let root = &self.root;
        if root.root_public_key == spec.root_public_key && root.recovery_recipient == spec.recovery_recipient {
            return Ok(self);
        }
        Err(RepositoryError::Taken {
            store: self.store.to_string(),
            found: root.repository_id,
            found_key: root.root_public_key,
            wanted_key: spec.root_public_key,
        })
    }

    /// The same repository for bulk work, which waits for `pace` ([`Store::paced`]).
    #[must_use]
    pub fn paced(&self, pace: Arc<dyn Pace>) -> Repository {
        Repository { store: self.store.paced(pace), ..self.clone() }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn root(&self) -> &RepositoryRoot {
        &self.root
    }

    pub fn id(&self) -> RepositoryId {
        self.root.repository_id
    }

    pub fn trust(&self) -> TrustRoot {
        self.root.trust()
    }

    /// A handle on a cluster's log, as far as it was read through this repository already.
    pub fn cluster_log(&self, cluster: &ClusterName) -> ClusterLog {
        ClusterLog::new(self.store.clone(), self.trust(), self.root.append_mode, cluster.clone(), self.logs.clone())
    }

    /// Clusters that have something in the repository, by name.
    pub async fn list_clusters(&self) -> Result<Vec<ClusterName>, RepositoryError> {
        let level = self.store.list_level(&layout::clusters()).await;
        let level = level.map_err(|source| store_error(&self.store, source))?;
        let mut clusters: Vec<_> = level.folders.iter().filter_map(layout::parse_cluster).collect();
        clusters.sort();
        Ok(clusters)
    }

    /// Every committed backup of a cluster that is not purged, with its reference part checked against the log's digest
    /// and its signature. A bad one does not hide the others.
    ///
    /// Boxed here, where the lifetimes have names: inside a larger future rustc 1.95 cannot prove that it may be sent
    /// to another thread (rust-lang/rust#102211).
    pub fn backups<'a>(&'a self, log: &'a ClusterLog) -> BoxFuture<'a, CommittedBackups> {
        self.read_backups(log).boxed()
    }

    async fn read_backups(&self, log: &ClusterLog) -> CommittedBackups {
        // Owned, since a stream of futures over borrowed rows is not Send for the compiler.
        let committed: Vec<(BackupId, Committed, BackupLife)> = log
            .state()
            .backups()
            .into_iter()
            .map(|(session, committed)| {
                let life = match &session.state {
                    SessionState::Expired(_, expiry) => BackupLife::Expired { reason: expiry.reason.clone() },
                    _ => BackupLife::Live,
                };
                (session.id().clone(), committed.clone(), life)
            })
            .collect();
        let reads = committed.into_iter().map(|(id, commit, life)| async move {
            let read = self.reference(log.cluster(), &id, &commit).await;
            let read = read.map(|(reference, writer)| CommittedBackup { reference, commit, life, writer });
            (id, read)
        });
        let read: Vec<_> = futures::stream::iter(reads).buffered(REFERENCE_READS).collect().await;
        let mut backups = CommittedBackups::default();
        for (id, read) in read {
            match read {
                Ok(backup) => backups.readable.push(backup),
                Err(error) => backups.unreadable.push((id, error)),
            }
        }
        backups
    }

    /// The reference part of one committed backup. Boxed for the same reason as [`Repository::backups`].
    pub fn reference<'a>(
        &'a self,
        cluster: &'a ClusterName,
        backup: &'a BackupId,
        committed: &'a Committed,
    ) -> BoxFuture<'a, Result<(ReferencePart, Writer), RepositoryError>> {
        let read = async move {
            let object = self.store.get(&layout::reference(cluster, backup)).await;
            let object = object.map_err(|source| store_error(&self.store, source))?;
            Ok(ReferencePart::open(&self.trust(), cluster, backup, committed.reference_digest, &object)?)
        };
        read.boxed()
    }
}

fn store_error(store: &Store, source: StoreError) -> RepositoryError {
    RepositoryError::Store { store: store.to_string(), source }
}

fn now_us() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;

    use super::*;
    use crate::cluster_log::{Author, Decision};
    use crate::format::log_entry::{Action, Open};
    use crate::format::reference::tests::sample;
    use crate::ids::{Digest, DomainId};
    use crate::signature::Signer;
    use crate::store::RetryPolicy;
    use crate::store::faulty::FaultyStore;

    fn signer() -> Signer {
        Signer::from_seed(&[1; 32])
    }

    fn spec(seed: u8) -> RepositorySpec {
        let root_public_key = Signer::from_seed(&[seed; 32]).public_key();
        RepositorySpec { root_public_key, recovery_recipient: RecipientId([seed; 32]) }
    }

    #[tokio::test]
    async fn a_repository_is_made_once_and_opened_by_those_who_know_it() {
        let store = Store::in_memory();
        let absent = Repository::open(store.clone(), None).await.unwrap_err();
        assert!(matches!(absent, RepositoryError::Absent { .. }), "{absent}");
        let (made, first) = Repository::init(store.clone(), spec(1)).await.unwrap();
        assert!(matches!(first, Initialised::Made { probe } if probe.is_atomic()));
        assert_eq!(made.root().append_mode, AppendMode::AtomicCreate);
        let (again, second) = Repository::init(store.clone(), spec(1)).await.unwrap();
        assert_eq!((again.id(), second), (made.id(), Initialised::WasThere));
        let taken = Repository::init(store.clone(), spec(2)).await.unwrap_err();
        assert!(matches!(taken, RepositoryError::Taken { .. }), "{taken}");
        assert!(Repository::open(store.clone(), Some(spec(1).root_public_key)).await.is_ok());
        let foreign = Repository::open(store, Some(spec(2).root_public_key)).await.unwrap_err();
        assert!(matches!(foreign, RepositoryError::ForeignRoot { .. }), "{foreign}");
    }

    #[tokio::test]
    async fn of_many_who_make_a_repository_at_once_all_get_the_same() {
        let store = Store::in_memory();
        let inits = (0..4).map(|_| Repository::init(store.clone(), spec(1)));
        let made: Vec<_> = futures::future::join_all(inits).await.into_iter().map(|made| made.unwrap()).collect();
        assert!(made.iter().all(|(repository, _)| repository.id() == made[0].0.id()));
        assert_eq!(made.iter().filter(|(_, what)| matches!(what, Initialised::Made { .. })).count(), 1);
    }

    async fn back_up(repository: &Repository, cluster: &ClusterName, backup: &str) {
        let reference = sample(cluster.as_str(), backup);
        let object = reference.seal(&signer(), repository.id());
        let reference_digest = Digest(*blake3::hash(&object).as_bytes());
        repository.store().put_new(&layout::reference(cluster, &reference.backup), object).await.unwrap();
        let open = Open {
            session: reference.backup.clone(),
            parents: Vec::new(),
            run: None,
            wal: reference.wal,
            wal_floor: reference.start_lsn,
        };
        let commit = Action::Commit { session: reference.backup, manifest_digest: Digest([0; 32]), reference_digest };
        let mut log = repository.cluster_log(cluster);
        let begin = Action::Begin { domain: DomainId([1; 16]), key_commitment: [0; 32] };
        let begin = if log.refresh().await.unwrap().next() == 0 { Some(begin) } else { None };
        for action in begin.into_iter().chain([Action::Open(open), commit]) {
            let decide = |_: &_| Decision::<LogError>::Append(action.clone());
            log.append(Author::host(&signer()), decide).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_bad_reference_part_does_not_hide_the_other_backups() {
        let faulty = FaultyStore::in_memory(1);
        let store = Store::wrap(faulty.clone(), "faulty:///", RetryPolicy::impatient());
        let (repository, _) = Repository::init(store, spec(1)).await.unwrap();
        let cluster: ClusterName = "orders".parse().unwrap();
        for backup in ["bk_3", "bk_1", "bk_2"] {
            back_up(&repository, &cluster, backup).await;
        }
        assert_eq!(repository.list_clusters().await.unwrap(), std::slice::from_ref(&cluster));
        let mut log = repository.cluster_log(&cluster);
        log.refresh().await.unwrap();
        let ids = |backups: &CommittedBackups| -> Vec<String> {
            backups.readable.iter().map(|backup| backup.reference.backup.to_string()).collect()
        };
        assert_eq!(ids(&repository.backups(&log).await), ["bk_3", "bk_1", "bk_2"], "in the order of their commits");
        let key = layout::reference(&cluster, &"bk_1".parse().unwrap());
        faulty.put(&key, sample("orders", "bk_1").seal(&signer(), RepositoryId([0; 16])).into()).await.unwrap();
        let backups = repository.backups(&log).await;
        assert_eq!(ids(&backups), ["bk_3", "bk_2"]);
        assert!(matches!(
            backups.unreadable.as_slice(),
            [(id, RepositoryError::Reference(ReferenceError::Digest { .. }))] if id.as_str() == "bk_1"
        ));
    }
}
