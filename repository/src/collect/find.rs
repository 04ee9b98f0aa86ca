//! What lies there and is needed by nobody.

use std::collections::{BTreeMap, BTreeSet};

use futures::stream::{StreamExt, TryStreamExt};

use super::needs::Needs;
use super::{CollectError, CollectSpec, Scope};
use crate::cluster_log::{ClusterLog, Session, SessionState};
use crate::format::collect_plan::{CollectPlan, GarbageWal};
use crate::format::reference::ReferencePart;
use crate::ids::{BackupId, ClusterName, Digest, PackId};
use crate::layout::{self, WalObject};
use crate::open::Repository;
use crate::postgres::{Segment, SegmentSize, SystemId, WalBranch};

/// Folders and reference parts read at once.
const READS: usize = 8;

/// A pack that may be garbage.
struct Found {
    session: BackupId,
    pack: PackId,
    bytes: u64,
}

/// `seen`: sessions that were looked at when they had ended.
pub(super) async fn garbage(
    repository: &Repository,
    log: &ClusterLog,
    needs: &Needs,
    (spec, seen): (&CollectSpec, &BTreeSet<BackupId>),
) -> Result<CollectPlan, CollectError> {
    let cluster = log.cluster();
    let mut plan = CollectPlan {
        cluster: cluster.clone(),
        sequence: needs.sequence,
        at_us: spec.now.as_microsecond(),
        packs: BTreeMap::new(),
        backups: Vec::new(),
        wal: BTreeMap::new(),
        trims: needs.trims().map(|(wal, below)| (*wal, below)).collect(),
        bytes: 0,
    };
    let ended: Vec<BackupId> = needs.closed().filter(|(_, is_there)| !is_there).map(|(id, _)| id.clone()).collect();
    let found = match spec.scope {
        Scope::Ended => {
            plan.backups = ended.into_iter().filter(|id| !seen.contains(id)).collect();
            of_ended(repository, cluster, log, &plan.backups).await?
        }
        Scope::Everything => {
            let there = repository.store().list_level(&layout::backups(cluster)).await?.objects;
            let is_there = |id: &BackupId| there.iter().any(|object| object.key == layout::manifest(cluster, id));
            plan.backups = ended.into_iter().filter(is_there).collect();
            in_all_sessions(repository, cluster).await?
        }
    };
    let mut counted = BTreeSet::new();
    for Found { session, pack, bytes } in found {
        if needs.is_dead_pack(&session, pack) && counted.insert((session.clone(), pack)) {
            plan.packs.entry(session).or_default().push(pack);
            plan.bytes += bytes;
        }
    }
    for (wal, _) in needs.trims() {
        let Some(size) = segment_size(repository, cluster, log, wal.system_id).await? else {
            tracing::warn!(%cluster, system = %wal.system_id, "no reference part tells the size of its WAL segments");
            continue;
        };
        if let Some((garbage, bytes)) = in_branch(repository, cluster, needs, (wal, size)).await? {
            plan.wal.insert(*wal, garbage);
            plan.bytes += bytes;
        }
    }
    Ok(plan)
}

async fn in_all_sessions(repository: &Repository, cluster: &ClusterName) -> Result<Vec<Found>, CollectError> {
    let folders = repository.store().list_level(&layout::packs(cluster)).await?.folders;
    let sessions = folders.iter().filter_map(|folder| layout::parse_session(cluster, folder)).collect();
    in_sessions(repository, cluster, sessions).await
}

async fn in_sessions(
    repository: &Repository,
    cluster: &ClusterName,
    sessions: Vec<BackupId>,
) -> Result<Vec<Found>, CollectError> {
    let reads = sessions.into_iter().map(|session| async move {
        let listed = repository.store().list(&layout::session_packs(cluster, &session)).await?;
        let packs = listed.into_iter().filter_map(|object| {
            let (session, pack) = layout::parse_pack(cluster, &object.key)?;
            Some(Found { session, pack, bytes: object.size })
        });
        Ok::<Vec<Found>, CollectError>(packs.collect())
    });
    let found: Vec<Vec<Found>> = futures::stream::iter(reads).buffer_unordered(READS).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

/// What sessions that are over needed, as their reference parts say, or, without one that reads, what lies in their folders.
async fn of_ended(
    repository: &Repository,
    cluster: &ClusterName,
    log: &ClusterLog,
    ended: &[BackupId],
) -> Result<Vec<Found>, CollectError> {
    let (mut found, mut unnamed) = (Vec::new(), Vec::new());
    for session in ended {
        let is_purged = log.state().session(session).is_some_and(|session| session.state == SessionState::Purged);
        let part = if is_purged { reference(repository, cluster, session).await? } else { None };
        match part {
            Some(part) => {
                let own = part.packs().filter(|(of, ..)| *of == cluster);
                found.extend(own.map(|(_, session, pack)| Found {
                    session: session.clone(),
                    pack: pack.pack,
                    bytes: pack.stored_bytes,
                }));
            }
            None => unnamed.push(session.clone()),
        }
    }
    found.extend(in_sessions(repository, cluster, unnamed).await?);
    Ok(found)
}

/// The reference part of a purged backup: the log no longer names its digest, and nothing is believed of it but what to look
/// at.
async fn reference(
    repository: &Repository,
    cluster: &ClusterName,
    backup: &BackupId,
) -> Result<Option<ReferencePart>, CollectError> {
    let object = match repository.store().get(&layout::reference(cluster, backup)).await {
        Ok(object) => object,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let digest = Digest(*blake3::hash(&object).as_bytes());
    Ok(ReferencePart::open(&repository.trust(), cluster, backup, digest, &object).map(|(part, _)| part).ok())
}

/// As the newest backup of the system says that has a reference part.
async fn segment_size(
    repository: &Repository,
    cluster: &ClusterName,
    log: &ClusterLog,
    system_id: SystemId,
) -> Result<Option<SegmentSize>, CollectError> {
    let of_system = |session: &&Session| {
        session.open.wal.system_id == system_id
            && !matches!(session.state, SessionState::Open | SessionState::Aborted { .. })
    };
    let sessions: Vec<BackupId> =
        log.state().sessions().filter(of_system).map(|session| session.id().clone()).collect();
    for session in sessions.into_iter().rev() {
        if let Some(part) = reference(repository, cluster, &session).await? {
            return Ok(Some(part.segment_size));
        }
    }
    Ok(None)
}

async fn in_branch(
    repository: &Repository,
    cluster: &ClusterName,
    needs: &Needs,
    (wal, size): (&WalBranch, SegmentSize),
) -> Result<Option<(GarbageWal, u64)>, CollectError> {
    let (mut segments, mut bytes) = (BTreeSet::new(), 0);
    let mut note = |segment: Segment, size_of_it: u64| {
        if needs.is_dead_wal(wal, segment.start(size), segment.end(size)) {
            segments.insert(segment.number);
            bytes += size_of_it;
        }
    };
    for object in repository.store().list(&layout::wal_branch(cluster, wal)).await? {
        let whole = match layout::parse_wal_object(cluster, &object.key, size) {
            Some((_, WalObject::Segment(segment))) => Some(segment),
            _ => None,
        };
        let beside = || {
            layout::parse_wal_partial(cluster, wal, &object.key, size)
                .or_else(|| layout::parse_wal_backup_history(cluster, wal, &object.key, size))
        };
        if let Some(segment) = whole.or_else(beside) {
            note(segment, object.size);
        }
    }
    // Of a segment that was never finished there are pieces alone.
    for folder in repository.store().list_level(&layout::tails(cluster, wal)).await?.folders {
        if let Some(segment) = layout::parse_tail_segment(cluster, wal, &folder, size) {
            note(segment, 0);
        }
    }
    Ok((!segments.is_empty()).then_some((GarbageWal { size, segments }, bytes)))
}
