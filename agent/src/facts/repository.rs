//! What a repository holds of a cluster, as facts and lists show it.
//!
//! A look costs what changed: the log is read on from where the last look ended, and reference parts, which never
//! change, are read once.

use std::collections::BTreeMap;

use futures::StreamExt;
use jiff::Timestamp;
use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::cluster_log::{ClusterLog, Committed, SessionState};
use walfleet_repository::format::reference::ReferencePart;
use walfleet_repository::gap_notes::{self, KnownGap, KnownGaps};
use walfleet_repository::ids::BackupId;
use walfleet_repository::open::{BackupLife, CommittedBackup, RepositoryError};
use walfleet_repository::recovery_window::{
    BackupFacts, Unrestorable, WalCatalog, Windows, recovery_windows, split_brains,
};
use walfleet_repository::wal_archive::WalArchive;
use walfleet_repository::wal_catalog;

use super::gaps::GapLooks;
use super::pace::Stored;
use super::{RecoveryRange, RecoveryWindow};
use crate::access::{Access, AccessError, ClusterAccess};
use crate::identity::connect::chain;
use crate::jobs::report::{BackupReport, BackupState};
use crate::wal::fill::Missing;

/// Reference parts read at once: small objects, so latency counts.
const READS: usize = 16;

/// Backups told to the controller: the newest, in one message of a few hundred KiB at most.
const NEWEST_BACKUPS: usize = 500;

#[derive(Clone, Default, Debug)]
pub struct RepositoryView {
    pub windows: Vec<RecoveryWindow>,
    /// Oldest first.
    pub backups: Vec<BackupReport>,
    /// Why it could not be read, or what in it does not read.
    pub problem: Option<String>,
    /// Requests that this look cost.
    pub requests: u64,
    /// And all looks so far.
    pub requests_ever: u64,
    /// WAL that should be there and is not.
    pub missing: Vec<Missing>,
    /// Of it, what this host had stored and lies behind all that is there: nobody will store it unasked.
    pub has_lost_end: bool,
}

/// A cluster's place in its repository, looked at again and again.
pub struct ClusterWatch {
    repository_name: String,
    cluster: OpenCluster,
    archive: WalArchive,
    log: ClusterLog,
    references: BTreeMap<BackupId, ReferencePart>,
    gaps: GapLooks,
}

impl ClusterWatch {
    /// `None`: nobody has written anything of this cluster yet.
    pub async fn open(access: &Access, cluster: &ClusterAccess) -> Result<Option<ClusterWatch>, AccessError> {
        let open = match access.open(&cluster.repository, cluster.name.clone()).await {
            Err(AccessError::Cluster(ClusterError::Unknown(_))) => return Ok(None),
            open => open?,
        };
        Ok(Some(ClusterWatch {
            repository_name: cluster.repository.name.clone(),
            archive: open.wal_archive(cluster.compression_level),
            log: open.log().await?,
            cluster: open,
            references: BTreeMap::new(),
            gaps: GapLooks::default(),
        }))
    }

    /// Reads what is new, and works out what can be recovered. One bad object does not hide the rest. `stored`: what this host had
    /// stored before.
    pub async fn look(&mut self, stored: &[Stored]) -> Result<RepositoryView, AccessError> {
        let requests_before = self.requests();
        self.log.refresh().await.map_err(RepositoryError::from)?;
        let mut problems = self.read_references().await;
        let mut view = RepositoryView::default();
        let mut facts = Vec::new();
        let mut sizes = Vec::new();
        for (session, _) in self.log.state().backups() {
            let Some(reference) = self.references.get(session.id()) else { continue };
            let expired = matches!(session.state, SessionState::Expired(..));
            view.backups
                .push(summary_of(reference, if expired { BackupState::Expired } else { BackupState::Committed }));
            if !expired {
                facts.push(BackupFacts::from(reference));
                sizes.push(reference.segment_size);
            }
        }
        view.backups.drain(..view.backups.len().saturating_sub(NEWEST_BACKUPS));
        let as_of = Timestamp::now();
        let systems = wal_catalog::systems(&facts, &sizes);
        match wal_catalog::read(&self.archive, &systems).await {
            Ok(catalog) => {
                let windows = recovery_windows(&facts, &catalog);
                let noted = self.know_gaps(&windows, &facts, &catalog, &mut problems).await;
                let known = noted.clone().above(self.log.state().trims());
                let split = split_brains(&catalog, as_of.as_microsecond());
                problems.splice(0..0, split.iter().map(ToString::to_string));
                problems.extend(catalog.damaged.iter().map(|damaged| format!("it counts as absent: {damaged}")));
                let alarms = |lost: &&Unrestorable| {
                    let gap = &lost.missing;
                    !noted.is_acknowledged(&gap.wal, gap.from, gap.to)
                };
                problems.extend(windows.unrestorable.iter().filter(alarms).map(|lost| {
                    let gap = &lost.missing;
                    format!("backup {} cannot be restored: WAL {} to {} is missing", lost.backup, gap.from, gap.to)
                }));
                let missing = |known: &KnownGap| Missing { wal: known.gap.wal, from: known.gap.from, to: known.gap.to };
                // What cannot be replayed is there.
                let lacking = known.gaps.iter().filter(|known| catalog.unlogged_at(&known.gap).is_none());
                view.missing = lacking.map(missing).collect();
                let lost = stored.iter().filter_map(|stored| lost_end(&catalog, stored));
                let is_promised = |lost: &Missing| lost.to > self.log.state().trimmed_below(&lost.wal);
                let lost: Vec<Missing> = lost.filter(is_promised).collect();
                problems.extend(lost.iter().map(|lost| {
                    let (timeline, from, to) = (lost.wal.timeline.0, lost.from, lost.to);
                    format!("WAL of timeline {timeline} was stored up to {to}, and what is left of it ends at {from}")
                }));
                view.has_lost_end = !lost.is_empty();
                view.missing.extend(lost);
                let (gaps, filled) = self.gaps.facts(&self.archive, &catalog, known).await;
                view.windows = vec![RecoveryWindow { gaps, filled, ..window(&self.repository_name, as_of, windows) }];
            }
            Err(error) => problems.push(format!("list the WAL archive: {}", chain(&error))),
        }
        view.problem = (!problems.is_empty()).then(|| problems.join("; "));
        view.requests = self.requests().saturating_sub(requests_before);
        Ok(view)
    }

    async fn know_gaps(
        &mut self,
        windows: &Windows,
        backups: &[BackupFacts],
        catalog: &WalCatalog,
        problems: &mut Vec<String>,
    ) -> KnownGaps {
        problems.extend(self.gaps.read_notes(&self.cluster, &catalog.notes).await);
        gap_notes::know(windows, backups, catalog, &self.gaps.notes())
    }

    fn requests(&self) -> u64 {
        self.cluster.repository().store().counters().requests()
    }

    /// Reads the reference parts that are not known yet; returns what does not read.
    async fn read_references(&mut self) -> Vec<String> {
        let backups = self.log.state().backups();
        let present: Vec<BackupId> = backups.iter().map(|(session, _)| session.id().clone()).collect();
        let missing: Vec<(BackupId, Committed)> = backups
            .into_iter()
            .filter(|(session, _)| !self.references.contains_key(session.id()))
            .map(|(session, committed)| (session.id().clone(), committed.clone()))
            .collect();
        self.references.retain(|id, _| present.contains(id));
        let cluster = &self.cluster;
        let reads = missing.into_iter().map(|(id, committed)| async move {
            let read = cluster.repository().reference(cluster.name(), &id, &committed).await;
            (id, read.map(|(reference, _)| reference))
        });
        let read: Vec<_> = futures::stream::iter(reads).buffer_unordered(READS).collect().await;
        let mut problems = Vec::new();
        for (id, reference) in read {
            match reference {
                Ok(reference) => drop(self.references.insert(id, reference)),
                Err(error) => problems.push(format!("backup {id} does not read: {}", chain(&error))),
            }
        }
        problems
    }
}

/// What was stored and is behind all that is there now.
fn lost_end(catalog: &WalCatalog, stored: &Stored) -> Option<Missing> {
    let (from, wal) = catalog.reaches(stored.system_id, stored.timeline)?;
    (from < stored.end).then_some(Missing { wal, from, to: stored.end })
}

/// What lies there of a cluster, at once.
pub async fn view(access: &Access, cluster: &ClusterAccess) -> Result<RepositoryView, AccessError> {
    match ClusterWatch::open(access, cluster).await? {
        Some(mut watch) => watch.look(&[]).await,
        None => Ok(nothing(cluster)),
    }
}

/// Of a cluster that nobody wrote anything of: known to be empty, which is not the same as unknown.
pub fn nothing(cluster: &ClusterAccess) -> RepositoryView {
    let window = window(&cluster.repository.name, Timestamp::now(), Windows::default());
    RepositoryView { windows: vec![window], ..RepositoryView::default() }
}

/// Microseconds outside of jiff's range come from nonsense in the store, which shows as the epoch.
pub(super) fn time(us: i64) -> Timestamp {
    Timestamp::from_microsecond(us).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn window(repository: &str, as_of: Timestamp, windows: Windows) -> RecoveryWindow {
    let newest = windows.newest().cloned();
    RecoveryWindow {
        repository: repository.to_owned(),
        as_of,
        newest_commit: newest.as_ref().map(|range| time(range.to.at_us)),
        newest_lsn: newest.as_ref().map(|range| range.to.lsn),
        newest_timeline: newest.as_ref().map(|range| range.wal.timeline),
        ranges: windows
            .ranges
            .iter()
            .map(|range| RecoveryRange {
                from: Some(time(range.from.at_us)),
                to: Some(time(range.to.at_us)),
                from_lsn: range.from.lsn,
                to_lsn: range.to.lsn,
                timeline: range.wal.timeline,
                branch: range.wal.branch,
            })
            .collect(),
        gaps: Vec::new(),
        filled: Vec::new(),
    }
}

/// As lists show it.
pub fn summary(backup: &CommittedBackup) -> BackupReport {
    let state = match backup.life {
        BackupLife::Live => BackupState::Committed,
        BackupLife::Expired { .. } => BackupState::Expired,
    };
    summary_of(&backup.reference, state)
}

fn summary_of(reference: &ReferencePart, state: BackupState) -> BackupReport {
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
        state,
        store_requests: reference.counters.store_requests,
        unexplained_slots: reference.counters.unexplained_slots,
        read_all_because: reference.counters.read_scope.read_all_because().map(str::to_owned),
    }
}
