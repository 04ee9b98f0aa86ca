//! What the controller does in repositories with the keeper's key: makes those that are declared, ends what agents left
//! open, lends backups to copies, and asks the logs how attempts that nobody can tell of have ended.
//!
//! It is the only one that deletes: pieces of WAL segments that whole ones have taken the place of, and what retention lets go
//! of ([`retention`]). It is slow where a store is slow, so it runs apart from the reconciler and only hands it events.

pub mod gaps;
pub mod holds;
mod lending;
mod lost;
pub mod replicas;
pub mod retention;
mod superseded;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use walfleet_repository::ids::{ClusterName, JobId, RepositoryId};
use walfleet_repository::open::{Initialised, Repository, RepositoryError, RepositorySpec as Roots};
use walfleet_repository::store::{Folder, Store, StoreError, StoreOptions};

use self::superseded::Cleaned;
use crate::jobs::JobStoreError;
use crate::reconcile::{Reconciler, in_full};
use crate::resources::RepositorySpec;
use crate::resources::stored::Catalog;
use crate::state::RowError;

/// A repository that was made or found, so that an empty folder where it was is not taken for a fresh one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Made {
    url: String,
    id: String,
    at: Timestamp,
}

const PREFIX: &str = "repository/";
/// Between rounds without a signal: a store that was away is noticed.
const ROUND: Duration = Duration::from_secs(30);
/// How long a repository that was found well counts as such: looking costs a request, for money at most stores.
const SURE: SignedDuration = SignedDuration::from_hours(1);
/// Of one repository's turn in a round: a hanging store must not keep the others waiting.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("open {url}")]
    Store { url: String, source: StoreError },
    #[error(
        "{url} holds no repository any more, {id} was there\nHINT: mount it or bring it back; to begin anew on purpose, declare it under another name."
    )]
    Gone { url: String, id: String },
    #[error(
        "{url} holds repository {found}, {expected} was there\nHINT: check what is mounted; to use the other one on purpose, declare it under another name."
    )]
    Replaced { url: String, found: RepositoryId, expected: String },
    #[error("repository {name} did not answer within {}s", DEADLINE.as_secs())]
    Timeout { name: String },
    #[error(transparent)]
    Row(#[from] RowError),
    #[error(transparent)]
    Job(#[from] JobStoreError),
    #[error(transparent)]
    Log(#[from] walfleet_repository::cluster_log::LogError),
    #[error(transparent)]
    Gather(#[from] walfleet_repository::retention::gather::GatherError),
    #[error(transparent)]
    Collect(#[from] walfleet_repository::collect::CollectError),
    #[error(transparent)]
    Replicate(#[from] walfleet_repository::replicate::ReplicateError),
    #[error(transparent)]
    GapNotes(#[from] walfleet_repository::gap_notes::GapNotesError),
    #[error("on which branch of cluster {cluster} the gap is cannot be told: {branch:?}")]
    Gap { cluster: ClusterName, branch: String },
}

pub struct Keeper {
    reconciler: Arc<Reconciler>,
    /// What people should know, by repository.
    troubles: Mutex<BTreeMap<String, String>>,
    /// Attempts whose leftovers were looked for.
    tidied: Mutex<BTreeSet<(JobId, u32)>>,
    /// When superseded pieces of WAL were last removed, by repository.
    cleaned: Mutex<BTreeMap<String, Cleaned>>,
    /// Clusters bound by labels that their hosts can change.
    claimed: Mutex<BTreeSet<ClusterName>>,
    /// What retention last saw and did, by repository and cluster.
    kept: Mutex<BTreeMap<replicas::Place, retention::Kept>>,
    /// What came to replicas.
    replicated: Mutex<BTreeMap<replicas::Place, replicas::Replicated>>,
    /// Repositories that were found well, and when.
    found: Mutex<BTreeMap<String, (RepositorySpec, Repository, Timestamp)>>,
}

impl Keeper {
    pub fn new(reconciler: Arc<Reconciler>) -> Arc<Keeper> {
        Arc::new(Keeper {
            reconciler,
            troubles: Mutex::default(),
            tidied: Mutex::default(),
            cleaned: Mutex::default(),
            claimed: Mutex::default(),
            kept: Mutex::default(),
            replicated: Mutex::default(),
            found: Mutex::default(),
        })
    }

    /// Runs until cancelled. A round under way is dropped: every step is a creation that can be made again.
    pub async fn run(&self, cancel: &CancellationToken) {
        let mut documents = self.reconciler.subscribe_documents();
        loop {
            documents.borrow_and_update();
            if cancel.run_until_cancelled(self.round(Timestamp::now())).await.is_none() {
                return;
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(ROUND) => {}
                // Cannot fail: the sender is in the reconciler, which we hold.
                _ = documents.changed() => {}
            }
        }
    }

    /// One line for each repository that is not as it should be, and for each cluster whose retention is held back.
    pub fn notices(&self) -> Vec<String> {
        let troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let of_repositories = troubles.into_iter().map(|(name, trouble)| format!("repository {name}: {trouble}"));
        of_repositories.chain(self.retention_notices()).chain(self.replica_notices()).collect()
    }

    pub async fn round(&self, now: Timestamp) {
        let catalog = match Catalog::load(&self.reconciler.state).await {
            Ok(catalog) => catalog,
            Err(error) => return tracing::error!(error = in_full(&error), "the keeper cannot read what is declared"),
        };
        let names: BTreeSet<&String> = catalog.repositories.keys().collect();
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner).retain(|name, _| names.contains(name));
        let newcomers = self.newcomers(now).await;
        for (name, spec) in &catalog.repositories {
            let turn = async {
                let repository = self.find(name, spec, now).await?;
                self.lend(name, &repository, &newcomers).await;
                self.remove_superseded(name, &repository, now).await;
                Ok(())
            };
            let result = match tokio::time::timeout(DEADLINE, turn).await {
                Ok(result) => result,
                Err(_) => Err(KeeperError::Timeout { name: name.clone() }),
            };
            self.note(name, result.as_ref().err());
        }
        if let Err(error) = self.settle_lost(&catalog, now).await {
            tracing::warn!(error = in_full(&error), "cannot settle lost jobs; the next round tries again");
        }
    }

    /// Remembers a repository's trouble, and logs it when it begins and ends.
    fn note(&self, name: &str, error: Option<&KeeperError>) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            Some(error) => {
                let text = in_full(error);
                if troubles.insert(name.to_owned(), text.clone()).as_ref() != Some(&text) {
                    tracing::error!(repository = name, error = text, "a repository is not as it should be");
                }
            }
            None => {
                if troubles.remove(name).is_some() {
                    tracing::info!(repository = name, "the repository is as it should be again");
                }
            }
        }
    }

    /// A folder is looked at in each round: that costs nothing, and it may not be mounted any more.
    async fn find(&self, name: &str, spec: &RepositorySpec, now: Timestamp) -> Result<Repository, KeeperError> {
        let found = || self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let is_sure = |(known, _, at): &&(RepositorySpec, Repository, Timestamp)| {
            known == spec && now.duration_since(*at) < SURE && !spec.url.starts_with("file:")
        };
        if let Some((_, repository, _)) = found().get(name).filter(is_sure) {
            return Ok(repository.clone());
        }
        found().remove(name);
        let repository = self.open(name, spec, now).await?;
        found().insert(name.to_owned(), (spec.clone(), repository.clone(), now));
        Ok(repository)
    }

    /// Opens a declared repository; makes it if it never was.
    async fn open(&self, name: &str, spec: &RepositorySpec, now: Timestamp) -> Result<Repository, KeeperError> {
        let key = format!("{PREFIX}{name}");
        let made = self.reconciler.state.row::<Made>(&key).await?;
        let known = made.as_ref().filter(|row| row.value.url == spec.url).map(|row| &row.value);
        let options = StoreOptions {
            folder: if known.is_some() { Folder::MustExist } else { Folder::Create },
            settings: spec.options.clone(),
            ..StoreOptions::default()
        };
        let store =
            Store::open(&spec.url, &options).map_err(|source| KeeperError::Store { url: spec.url.clone(), source })?;
        let root = self.reconciler.keeper.root_public_key();
        if let Some(known) = known {
            return match Repository::open(store, Some(root)).await {
                Ok(repository) if repository.id().to_string() == known.id => Ok(repository),
                Ok(repository) => Err(KeeperError::Replaced {
                    url: spec.url.clone(),
                    found: repository.id(),
                    expected: known.id.clone(),
                }),
                Err(RepositoryError::Absent { .. }) => {
                    Err(KeeperError::Gone { url: spec.url.clone(), id: known.id.clone() })
                }
                Err(error) => Err(error.into()),
            };
        }
        let roots = Roots { root_public_key: root, recovery_recipient: self.reconciler.keeper.recovery_recipient() };
        let (repository, initialised) = Repository::init(store, roots).await?;
        let fresh = Made { url: spec.url.clone(), id: repository.id().to_string(), at: now };
        match self.reconciler.state.update_row(&key, made.map_or(0, |row| row.mod_revision), &fresh).await {
            // Somebody else noted it first; the next look compares with that.
            Ok(_) | Err(RowError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        match initialised {
            Initialised::Made { .. } => {
                tracing::info!(repository = name, url = spec.url, id = fresh.id, "made a repository")
            }
            Initialised::WasThere => {
                tracing::info!(repository = name, url = spec.url, id = fresh.id, "found a repository")
            }
        }
        Ok(repository)
    }
}

#[cfg(test)]
mod tests;
