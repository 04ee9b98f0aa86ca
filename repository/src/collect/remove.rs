//! Carrying a plan out.

use std::time::Duration;

use object_store::path::Path;
use tokio_util::sync::CancellationToken;

use super::needs::Needs;
use super::{CollectError, CollectSpec};
use crate::format::collect_plan::{CollectPlan, GarbageWal};
use crate::ids::ClusterName;
use crate::layout::{self, WalObject};
use crate::open::Repository;
use crate::postgres::{Segment, WalBranch};

/// Objects in one go.
const BATCH: usize = 100;

/// Removes all that a plan names. Nothing of it, if a pack or manifest of it is needed: what was garbage once always is, so that
/// something is wrong with the log, the plan or this program. WAL may have come to be needed, of a branch that another one left: a
/// session counts on every branch of its system. That stays.
pub(super) async fn carry_out(
    repository: &Repository,
    plan: &CollectPlan,
    needs: &Needs,
    spec: &CollectSpec,
    cancel: &CancellationToken,
) -> Result<(), CollectError> {
    if let Some(object) = first_needed(plan, needs) {
        return Err(CollectError::Needed { sequence: plan.sequence, object });
    }
    let cluster = &plan.cluster;
    let packs = plan.packs.iter().flat_map(|(session, packs)| packs.iter().map(move |pack| (session, pack)));
    let mut keys: Vec<Path> = packs.map(|(session, pack)| layout::pack(cluster, session, *pack)).collect();
    keys.extend(plan.backups.iter().map(|backup| layout::manifest(cluster, backup)));
    for (wal, garbage) in &plan.wal {
        let is_dead = |number: &u64| {
            let segment = Segment { timeline: wal.timeline, number: *number };
            needs.is_dead_wal(wal, segment.start(garbage.size), segment.end(garbage.size))
        };
        let segments = garbage.segments.iter().copied().filter(is_dead).collect();
        keys.extend(of_branch(repository, cluster, wal, &GarbageWal { size: garbage.size, segments }).await?);
    }
    for batch in keys.chunks(BATCH) {
        if cancel.is_cancelled() {
            return Err(CollectError::Cancelled);
        }
        repository.store().delete(batch.to_vec()).await?;
        let pause = Duration::from_secs_f64(batch.len() as f64 / f64::from(spec.rate.max(1)));
        if cancel.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return Err(CollectError::Cancelled);
        }
    }
    Ok(())
}

fn first_needed(plan: &CollectPlan, needs: &Needs) -> Option<String> {
    let cluster = &plan.cluster;
    let mut packs = plan.packs.iter().flat_map(|(session, packs)| packs.iter().map(move |pack| (session, *pack)));
    let pack = packs.find(|(session, pack)| !needs.is_dead_pack(session, *pack));
    let backup = || plan.backups.iter().find(|backup| !needs.is_dead_backup(backup));
    pack.map(|(session, pack)| layout::pack(cluster, session, pack).to_string())
        .or_else(|| backup().map(|backup| layout::manifest(cluster, backup).to_string()))
}

/// The segments, and what lies beside them under their names: pieces, unfinished ends, backup history files.
async fn of_branch(
    repository: &Repository,
    cluster: &ClusterName,
    wal: &WalBranch,
    garbage: &GarbageWal,
) -> Result<Vec<Path>, CollectError> {
    let size = garbage.size;
    let named = garbage.segments.iter().map(|number| Segment { timeline: wal.timeline, number: *number });
    let mut keys: Vec<Path> = named.map(|segment| layout::wal_segment(cluster, wal, segment, size)).collect();
    for object in repository.store().list(&layout::wal_branch(cluster, wal)).await? {
        let beside = layout::parse_wal_partial(cluster, wal, &object.key, size)
            .or_else(|| layout::parse_wal_backup_history(cluster, wal, &object.key, size));
        let is_segment =
            matches!(layout::parse_wal_object(cluster, &object.key, size), Some((_, WalObject::Segment(_))));
        if !is_segment && beside.is_some_and(|segment| garbage.segments.contains(&segment.number)) {
            keys.push(object.key);
        }
    }
    for folder in repository.store().list_level(&layout::tails(cluster, wal)).await?.folders {
        let segment = layout::parse_tail_segment(cluster, wal, &folder, size);
        if segment.is_some_and(|segment| garbage.segments.contains(&segment.number)) {
            keys.extend(repository.store().list(&folder).await?.into_iter().map(|object| object.key));
        }
    }
    Ok(keys)
}
