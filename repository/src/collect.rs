//! Collection: removes what nothing needs any more. For the keeper alone, and without any data key.
//!
//! A run looks for garbage at one prefix of the log and writes a **plan**. A later one, once readers have had their time,
//! decides anew on the log as it is then ([`needs`]), removes what is garbage still, and writes a **report** in the plan's
//! place. Both are small objects in the repository, so that whoever is the keeper next goes on where the last one was killed.
//! Removing an object twice is no error, and what was garbage once always is: two collectors do each other's work, no harm.
//!
//! What to look at follows from the log: the packs that purged backups needed are named in their reference parts, which stay;
//! only the folders of aborted sessions are listed. So a run costs as many requests as there are sessions that ended since the
//! last, and an idle cluster's costs one. [`Scope::Everything`] lists all sessions, for packs that were sent and named by nobody.

mod find;
pub mod needs;
mod records;
mod remove;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use self::needs::{Needs, UnknownNeeds};
use self::records::Records;
use crate::cluster_log::{ClusterLog, LogError};
use crate::format::collect_plan::CollectPlan;
use crate::format::reference::ReferencePart;
use crate::ids::{BackupId, ClusterName};
use crate::layout;
use crate::open::{Repository, RepositoryError};
use crate::signature::Signer;
use crate::store::{Creation, StoreError};

/// How to collect.
#[derive(Clone, Copy, Debug)]
pub struct CollectSpec {
    pub now: Timestamp,
    /// How long whoever reads what a plan names may go on.
    pub grace: SignedDuration,
    pub scope: Scope,
    /// Nothing is written or removed.
    pub dry_run: bool,
    /// Objects removed per second at most.
    pub rate: u32,
}

/// Where garbage is looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Where the log says that some may be.
    Ended,
    /// In all sessions' folders.
    Everything,
}

/// What a run came to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CollectReport {
    /// A plan that waits, and from when on it may be carried out.
    pub waiting: Option<Waiting>,
    pub removed_objects: u64,
    pub removed_bytes: u64,
    /// Garbage was looked for where the scope says, and no plan stood in the way.
    pub searched: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Waiting {
    pub until: Timestamp,
    pub objects: u64,
    pub bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("collect: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Needs(#[from] UnknownNeeds),
    #[error(
        "plan {sequence} names {object}, which is needed\nHINT: nothing was removed; this should not be possible: please report it with the cluster's log."
    )]
    Needed { sequence: u64, object: String },
    #[error("cancelled")]
    Cancelled,
}

/// Goes on with the plan that there is, or makes one.
pub async fn collect(
    repository: &Repository,
    cluster: &ClusterName,
    signer: &Signer,
    spec: &CollectSpec,
    cancel: &CancellationToken,
) -> Result<CollectReport, CollectError> {
    let mut log = repository.cluster_log(cluster);
    log.refresh().await?;
    let records = Records::read(repository, cluster).await?;
    if let Some((plan, written_at)) = records.plan(repository, cluster).await? {
        let until = written_at + spec.grace;
        if spec.now < until || spec.dry_run {
            return Ok(CollectReport::waiting(until, &plan));
        }
        let needs = needs(repository, cluster, &log).await?;
        remove::carry_out(repository, &plan, &needs, spec, cancel).await?;
        records.finish(repository, signer, &records.report(&plan, spec)).await?;
        let (removed_objects, removed_bytes) = (plan.objects(), plan.bytes);
        return Ok(CollectReport { removed_objects, removed_bytes, ..CollectReport::default() });
    }
    if records.is_idle(log.state()) && spec.scope == Scope::Ended {
        return Ok(CollectReport::default());
    }
    let needs = needs(repository, cluster, &log).await?;
    let plan = find::garbage(repository, &log, &needs, (spec, &records.seen().0)).await?;
    if plan.is_empty() {
        if !spec.dry_run && !records.is_idle(log.state()) {
            records.finish(repository, signer, &records.report(&plan, spec)).await?;
        }
        return Ok(CollectReport { searched: true, ..CollectReport::default() });
    }
    if !spec.dry_run {
        let object = plan.seal(signer, repository.id());
        match repository.store().create(&layout::collect_plan(cluster, plan.sequence), object).await? {
            // Another keeper's says the same; one that is nobody's is passed over, and waits for the log to go on.
            Creation::Created | Creation::AlreadyThere => {}
        }
    }
    Ok(CollectReport { searched: true, ..CollectReport::waiting(spec.now + spec.grace, &plan) })
}

impl CollectReport {
    fn waiting(until: Timestamp, plan: &CollectPlan) -> CollectReport {
        let waiting = Waiting { until, objects: plan.objects(), bytes: plan.bytes };
        CollectReport { waiting: Some(waiting), ..CollectReport::default() }
    }
}

async fn needs(repository: &Repository, cluster: &ClusterName, log: &ClusterLog) -> Result<Needs, CollectError> {
    let backups = repository.backups(log).await;
    for (backup, error) in &backups.unreadable {
        tracing::error!(%cluster, %backup, %error, "a reference part does not read: nothing is collected");
    }
    let references: BTreeMap<BackupId, ReferencePart> =
        backups.readable.into_iter().map(|backup| (backup.reference.backup.clone(), backup.reference)).collect();
    Ok(Needs::of(cluster, log.state(), &references)?)
}
