//! What a repository holds of a cluster, as facts and lists show it.

use futures::future::BoxFuture;
use jiff::Timestamp;
use walfleet_repository::cluster_log::ClusterLog;
use walfleet_repository::open::{BackupLife, CommittedBackup, CommittedBackups, Repository};

use super::RecoveryWindow;
use crate::access::{AccessError, ClusterAccess};
use crate::jobs::report::{BackupReport, BackupState};

/// Backups told to the controller: the newest, in one message of a few hundred KiB at most.
const NEWEST_BACKUPS: usize = 500;

#[derive(Clone, Default, Debug)]
pub struct RepositoryView {
    pub windows: Vec<RecoveryWindow>,
    /// Oldest first.
    pub backups: Vec<BackupReport>,
    /// Why it could not be read, or what in it does not read.
    pub problem: Option<String>,
}

/// Reads a cluster's log, its backups and its archive. A cluster that nobody wrote anything of yet is empty.
pub async fn view(cluster: &ClusterAccess) -> Result<RepositoryView, AccessError> {
    let repository = cluster.repository.open().await?;
    let mut log = repository.cluster_log(&cluster.name);
    log.refresh().await.map_err(walfleet_repository::open::RepositoryError::from)?;
    let committed = committed(&repository, &log).await;
    let mut view = RepositoryView::default();
    let skipped = committed.readable.len().saturating_sub(NEWEST_BACKUPS);
    view.backups = committed.readable.iter().skip(skipped).map(summary).collect();
    if let Some((id, error)) = committed.unreadable.first() {
        let others = committed.unreadable.len() - 1;
        let more = if others == 0 { String::new() } else { format!(" (and {others} more)") };
        view.problem = Some(format!("backup {id}{more} does not read: {error}"));
    }
    Ok(view)
}

/// Boxed here, where the lifetimes have names: inside a larger future rustc 1.95 cannot prove that it may be sent
/// (rust-lang/rust#102211).
fn committed<'a>(repository: &'a Repository, log: &'a ClusterLog) -> BoxFuture<'a, CommittedBackups> {
    Box::pin(repository.backups(log))
}

/// As lists show it.
pub fn summary(backup: &CommittedBackup) -> BackupReport {
    let reference = &backup.reference;
    // Times outside of jiff's range come from nonsense in the store, which shows as the epoch.
    let time = |us| Timestamp::from_microsecond(us).unwrap_or(Timestamp::UNIX_EPOCH);
    BackupReport {
        id: reference.backup.clone(),
        cluster: reference.cluster.clone(),
        system_identifier: reference.wal.system_id.0,
        server_version_num: reference.server_version_num,
        timeline: reference.wal.timeline,
        start_lsn: reference.start_lsn,
        stop_lsn: reference.stop_lsn,
        started_at: time(reference.started_at_us),
        finished_at: time(reference.stopped_at_us),
        member: reference.member.clone(),
        parents: reference.parents.clone(),
        cluster_bytes: reference.counters.cluster_bytes,
        read_bytes: reference.counters.read_bytes,
        new_bytes: reference.counters.new_bytes,
        stored_bytes: reference.counters.stored_bytes,
        damaged_pages: reference.damaged_page_count,
        state: match backup.life {
            BackupLife::Live => BackupState::Committed,
            BackupLife::Expired { .. } => BackupState::Expired,
        },
        store_requests: reference.counters.store_requests,
    }
}
