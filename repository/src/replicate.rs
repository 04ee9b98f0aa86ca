//! Copies clusters from one place to another, without any data key. For the keeper alone.
//!
//! A replica is a repository of its own: its logs, what it keeps and who may write there are its own, and nothing that is removed
//! in the first place is removed here for that. The copier is a writer like any other: for each backup it opens a session in
//! the replica's log under the backup's own id, names as parents what is live *there*, brings the packs that are lacking under that
//! session, and commits last. So a pack may lie under another session than in the first place; the reference part, which the
//! keeper signs for the replica, says where. Sealed bytes are the same in both.
//!
//! Everything is checked on arrival: packs by their names, manifests by the commit's digest, WAL by its checksum; what is damaged
//! is named and not brought. Whatever was done stays: a copier that was killed goes on where it was.

pub mod backups;
pub mod holds;
pub mod wal;

#[cfg(test)]
mod tests;

use object_store::path::Path;

use crate::cluster_log::{Author, ClusterLog, ClusterState, LogError};
use crate::format::clear::ObjectKind;
use crate::format::log_entry::Action;
use crate::format::sealed;
use crate::ids::{BackupId, ClusterName, DomainId};
use crate::layout;
use crate::open::{Repository, RepositoryError};
use crate::store::{Creation, Store, StoreError};

/// From where to where, and in whose name.
#[derive(Clone, Copy, Debug)]
pub struct Copier<'a> {
    pub source: &'a Repository,
    pub target: &'a Repository,
    /// The keeper, in the target.
    pub author: Author<'a>,
}

#[derive(Debug, thiserror::Error)]
pub enum ReplicateError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("copy to {place}: {source}")]
    Store { place: String, source: StoreError },
    #[error(
        "cluster {cluster} has other keys in {place} than where it is copied from ({found}, not {expected})\nHINT: another cluster of that name lies there; give the replica a place of its own."
    )]
    Foreign { cluster: ClusterName, place: String, found: DomainId, expected: DomainId },
    #[error(
        "{key} lies in {place} with other content\nHINT: it was damaged there, or written by somebody else; `walfleet repository repair` tells."
    )]
    Taken { key: String, place: String },
    /// Names what does not read in the first place.
    #[error("{key} is damaged in {place}: {what}")]
    Damaged { key: String, place: String, what: String },
    #[error("backup {backup} does not read in {place}: {source}")]
    Backup { backup: BackupId, place: String, source: Box<RepositoryError> },
}

impl Copier<'_> {
    /// Whether the replica knows the keys that the cluster is sealed with now. Cheap: two logs are read on.
    pub async fn is_begun(&self, cluster: &ClusterName) -> Result<bool, ReplicateError> {
        let (from, to) = self.logs(cluster).await?;
        Ok(to.state().keys().is_some() && to.state().keys() == from.state().keys())
    }

    /// The cluster's keys, and the beginning of its log. `false`: nobody has written anything of it in the first place.
    pub async fn begin(&self, cluster: &ClusterName) -> Result<bool, ReplicateError> {
        let mut from = self.source.cluster_log(cluster);
        let Some(keys) = from.refresh().await?.keys().cloned() else { return Ok(false) };
        self.copy_keys(keys.domain).await?;
        let mut to = self.target.cluster_log(cluster);
        let next = |state: &ClusterState| {
            let known = state.keys().map(|keys| keys.newest_version());
            let (version, key_commitment) = keys.commitments.range(known.map_or(0, |known| known + 1)..).next()?;
            Some(match known {
                None => Action::Begin { domain: keys.domain, key_commitment: *key_commitment },
                Some(_) => Action::KeyVersion { version: *version, key_commitment: *key_commitment },
            })
        };
        to.refresh().await?;
        for _ in 0..=keys.commitments.len() {
            to.append_unless_done(self.author, next).await?;
        }
        match to.state().keys() {
            Some(found) if found.domain != keys.domain => Err(ReplicateError::Foreign {
                cluster: cluster.clone(),
                place: self.target.store().to_string(),
                found: found.domain,
                expected: keys.domain,
            }),
            _ => Ok(true),
        }
    }

    /// Wrapped keys are never changed, only added.
    async fn copy_keys(&self, domain: DomainId) -> Result<(), ReplicateError> {
        let folder = layout::domain_keys(domain);
        let there = self.at_target(self.target.store().list(&folder).await)?;
        for object in self.at_source(self.source.store().list(&folder).await)? {
            if !there.iter().any(|known| known.key == object.key) {
                let bytes = self.at_source(self.source.store().get(&object.key).await)?;
                // Another wrap of the same key for the same recipient is as good.
                let _either_way = self.at_target(self.target.store().create(&object.key, bytes).await)?;
            }
        }
        Ok(())
    }

    /// A sealed object, as it is; `Ok(None)`: it is gone.
    async fn copy_sealed(&self, key: &Path, kind: ObjectKind) -> Result<Option<u64>, ReplicateError> {
        let bytes = match self.source.store().get(key).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(failed(self.source.store(), error)),
        };
        sealed::check(&bytes, kind).map_err(|error| self.damaged(key, &error))?;
        let size = bytes.len() as u64;
        match self.at_target(self.target.store().create(key, bytes).await)? {
            Creation::Created => Ok(Some(size)),
            Creation::AlreadyThere => Err(self.taken(key)),
        }
    }

    /// Reference parts that are damaged are passed over; that some did not come now is an error.
    fn all_came(&self, unreadable: Vec<(BackupId, RepositoryError)>, of: &Repository) -> Result<(), ReplicateError> {
        match unreadable.into_iter().find(|(_, error)| !matches!(error, RepositoryError::Reference(_))) {
            Some((backup, source)) => {
                Err(ReplicateError::Backup { backup, place: of.store().to_string(), source: Box::new(source) })
            }
            None => Ok(()),
        }
    }

    fn damaged(&self, key: &Path, what: &dyn std::fmt::Display) -> ReplicateError {
        let place = self.source.store().to_string();
        ReplicateError::Damaged { key: key.to_string(), place, what: what.to_string() }
    }

    fn taken(&self, key: &Path) -> ReplicateError {
        ReplicateError::Taken { key: key.to_string(), place: self.target.store().to_string() }
    }

    fn at_source<T>(&self, done: Result<T, StoreError>) -> Result<T, ReplicateError> {
        done.map_err(|error| failed(self.source.store(), error))
    }

    fn at_target<T>(&self, done: Result<T, StoreError>) -> Result<T, ReplicateError> {
        done.map_err(|error| failed(self.target.store(), error))
    }

    async fn logs(&self, cluster: &ClusterName) -> Result<(ClusterLog, ClusterLog), ReplicateError> {
        let (mut from, mut to) = (self.source.cluster_log(cluster), self.target.cluster_log(cluster));
        from.refresh().await?;
        to.refresh().await?;
        Ok((from, to))
    }
}

fn failed(store: &Store, source: StoreError) -> ReplicateError {
    ReplicateError::Store { place: store.to_string(), source }
}
