//! Clusters of one lineage: copies of one server that go on under names of their own, such as clones and restored copies.
//!
//! They share a domain, so that equal content has equal names, and the first backup of a copy may refer to a backup of
//! another. A copy is known by its system identifier and admitted by its key: who begins a cluster's log names a relative's
//! domain only if it can open that domain's key, so a claimed identifier opens nothing.
//!
//! A backup is lent in two entries: a hold in the lender's log, then a borrowing in the borrower's. In that order, so that
//! nothing is ever borrowed that nobody keeps; a hold without a borrowing keeps a backup too long, nothing else.

use futures::StreamExt;

use crate::cluster_log::{Author, ClusterLog, ClusterState, DomainKeys, LogError};
use crate::crypto::RecipientSecret;
use crate::format::log_entry::{Action, Hold, HoldSubject};
use crate::ids::{BackupId, ClusterName, HoldId};
use crate::keyring::Keyring;
use crate::open::{Repository, RepositoryError};
use crate::postgres::SystemId;

/// Logs of relatives read at once: small objects, so latency counts.
const LOG_READS: usize = 16;

/// Of holds that keep a backup for a copy of its cluster.
pub const OWNER: &str = "lineage";

/// Whose copy a cluster may be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kin {
    pub system_id: SystemId,
    /// Clusters that may be relatives; `None`: any cluster of the repository.
    pub clusters: Option<Vec<ClusterName>>,
}

/// A backup that another cluster may refer to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lendable {
    pub cluster: ClusterName,
    pub backup: BackupId,
    /// The relative refers to no other cluster itself.
    is_origin: bool,
    /// The order of the commits' own times: a hint, nothing depends on it.
    at_us: i64,
}

impl Kin {
    /// The logs of those that have committed backups of the system, with what they say.
    async fn relatives(&self, repository: &Repository, own: &ClusterName) -> Result<Vec<ClusterLog>, RepositoryError> {
        let names = match &self.clusters {
            Some(names) => names.clone(),
            None => repository.list_clusters().await?,
        };
        let others = names.into_iter().filter(|name| name != own);
        let reads = others.map(|name| {
            let mut log = repository.cluster_log(&name);
            async move {
                match log.refresh().await {
                    Ok(_) => Some(log),
                    // Sharing is thrift: what cannot be read is not shared.
                    Err(error) => {
                        tracing::warn!(cluster = %name, "cannot be looked at as a relative: {error}");
                        None
                    }
                }
            }
        });
        let logs: Vec<Option<ClusterLog>> = futures::stream::iter(reads).buffered(LOG_READS).collect().await;
        let has_backup = |log: &ClusterLog| !log.state().live_parents_for(self.system_id).is_empty();
        Ok(logs.into_iter().flatten().filter(has_backup).collect())
    }

    /// The domain that a cluster of this name joins instead of making one: a relative's whose key opens for the
    /// recipient.
    ///
    /// Only of relatives whose domain has one key version: an agent may not name further ones, and what is sealed anew
    /// must not be sealed with an older one.
    pub async fn domain(
        &self,
        repository: &Repository,
        own: &ClusterName,
        recipient: &RecipientSecret,
    ) -> Result<Option<DomainKeys>, RepositoryError> {
        let mut relatives = self.relatives(repository, own).await?;
        relatives.sort_by_key(|log| !is_origin(log.state()));
        for log in &relatives {
            let Some(domain) = log.state().keys().filter(|domain| domain.newest_version() == 1) else { continue };
            match Keyring::open(repository.store(), domain, recipient).await {
                Ok(_) => {
                    tracing::info!(cluster = %own, relative = %log.cluster(), "a copy of a cluster that is known here: they share a key, and content");
                    return Ok(Some(domain.clone()));
                }
                Err(error) => {
                    tracing::info!(cluster = %own, relative = %log.cluster(), "a copy of a cluster that is known here, but its content cannot be shared: {error}");
                }
            }
        }
        Ok(None)
    }

    /// What a cluster of this name could borrow: the newest live backup of a relative in the same domain. Of several
    /// relatives the one that borrowed nothing itself, so that few hold on to one another.
    pub async fn lendable(
        &self,
        repository: &Repository,
        own: &ClusterName,
        domain: &DomainKeys,
    ) -> Result<Option<Lendable>, RepositoryError> {
        let relatives = self.relatives(repository, own).await?;
        let lendable = relatives.iter().filter(|log| log.state().keys() == Some(domain)).filter_map(|log| {
            let newest = log.state().live_parents_for(self.system_id).into_iter().next()?;
            Some(Lendable {
                cluster: log.cluster().clone(),
                backup: newest.id().clone(),
                is_origin: is_origin(log.state()),
                at_us: newest.committed()?.stamp.at_us,
            })
        });
        Ok(lendable.max_by_key(|lendable| (lendable.is_origin, lendable.at_us)))
    }
}

fn is_origin(state: &ClusterState) -> bool {
    state.borrowed().next().is_none()
}

/// Whether a cluster's next backup of the system has nothing to refer to.
pub fn wants_loan(state: &ClusterState, system_id: SystemId) -> bool {
    state.live_parents_for(system_id).is_empty() && state.borrowed().next().is_none()
}

/// Lends a backup. Doing it again changes nothing; `false`: the backup is not live any more.
pub async fn lend(
    repository: &Repository,
    author: Author<'_>,
    lendable: &Lendable,
    borrower: &ClusterName,
) -> Result<bool, LogError> {
    let Lendable { cluster: lender, backup, .. } = lendable;
    let hold = HoldId::lent(backup, borrower);
    let holding = Action::Hold(Hold {
        hold: hold.clone(),
        subject: HoldSubject::Backup(backup.clone()),
        reason: format!("backups of cluster {borrower} refer to its content"),
        owner: OWNER.to_owned(),
        until_us: None,
    });
    let mut log = repository.cluster_log(lender);
    log.append_unless_done(author, |state| {
        let is_live = state.session(backup).is_some_and(|session| session.is_live());
        (is_live && !state.holds().any(|held| held.hold == hold)).then(|| holding.clone())
    })
    .await?;
    if !log.state().holds().any(|held| held.hold == hold) {
        return Ok(false);
    }
    let borrowing = Action::Borrow { cluster: lender.clone(), backup: backup.clone(), hold: hold.clone() };
    let mut log = repository.cluster_log(borrower);
    let is_new = |state: &ClusterState| !state.borrowed().any(|(borrowed, _)| borrowed.backup == *backup);
    log.append_unless_done(author, |state| is_new(state).then(|| borrowing.clone())).await?;
    tracing::info!(cluster = %borrower, %lender, %backup, "a relative's backup was lent");
    Ok(true)
}
