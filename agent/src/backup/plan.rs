//! What a backup would cost, before it is taken: from what earlier ones took, and what can be seen without reading files.

use walfleet_repository::cluster::OpenCluster;
use walfleet_repository::format::manifest::ReadScope;
use walfleet_repository::format::overlay::PAGE_BYTES;
use walfleet_repository::format::reference::ReferencePart;
use walfleet_repository::open::RepositoryError;
use walfleet_repository::postgres::SystemId;

use super::BackupError;
use super::changes::Reading;
use crate::estimate::{self, Expected, Past, Reads};
use crate::history;
use crate::jobs::report::BackupPlanReport;
use crate::postgres::server::Server;

/// Backups asked of the repository: the newest, enough that some kind is known often.
const ASKED: usize = 8;

pub struct BackupPlanRequest {
    /// `None`: the repository has nothing of it yet.
    pub cluster: Option<OpenCluster>,
    /// As for libpq.
    pub connection: String,
    pub read_all: bool,
    /// This agent's name.
    pub host: String,
    /// What jobs of this cluster took.
    pub past: Vec<Past>,
}

pub async fn plan(request: BackupPlanRequest) -> Result<BackupPlanReport, BackupError> {
    let server = Server::connect(&request.connection).await?;
    let system_id = server.facts().await?.system_id;
    let cluster_bytes = server.cluster_bytes().await.ok().flatten().unwrap_or(0);
    let references = match &request.cluster {
        Some(cluster) => newest(cluster, system_id).await?,
        None => Vec::new(),
    };
    let stored = references.iter().filter_map(history::past_of_stored).collect();
    let past = history::gather(&request.past, Vec::new(), stored);
    let scope = match (references.is_empty(), request.read_all) {
        (true, _) => ReadScope::AllFirst,
        (false, true) => ReadScope::AllAsked,
        (false, false) => ReadScope::Changes,
    };
    let reads = reads(scope);
    let found = estimate::backup(&past, reads, cluster_bytes, &request.host);
    let mut notes = Vec::new();
    if reads == Reads::Changes {
        let proven = "whether what changed is known is seen when the backup begins; otherwise everything is read";
        notes.push(proven.to_owned());
    }
    if cluster_bytes == 0 {
        notes.push("the agent's role may not ask how large the cluster is".to_owned());
    }
    let everything = (reads != Reads::Changes && cluster_bytes > 0).then_some(cluster_bytes);
    Ok(BackupPlanReport {
        cluster_bytes,
        read_bytes: found.as_ref().map(|found| found.read_bytes).or(everything),
        stored_bytes: found.as_ref().and_then(|found| found.stored_bytes),
        store_requests: found.as_ref().and_then(|found| found.store_requests),
        estimated_seconds: found.as_ref().map(|found| found.expected.seconds),
        estimated_from: found.map(|found| found.expected.basis),
        read_all_because: scope.read_all_because().map(str::to_owned),
        notes,
    })
}

/// The newest live backups of the system. One that does not read is passed over, as by the backup itself.
async fn newest(cluster: &OpenCluster, system_id: SystemId) -> Result<Vec<ReferencePart>, BackupError> {
    let log = cluster.log().await?;
    let mut references = Vec::new();
    for session in log.state().live_parents_for(system_id).into_iter().take(ASKED) {
        let Some(committed) = session.committed() else { continue };
        match cluster.repository().reference(cluster.name(), session.id(), committed).await {
            Ok((reference, _)) => references.push(reference),
            Err(error @ RepositoryError::Store { .. }) => {
                return Err(walfleet_repository::cluster::ClusterError::from(error).into());
            }
            Err(error) => tracing::warn!(backup = %session.id(), %error, "a backup does not read, and tells nothing"),
        }
    }
    Ok(references)
}

/// What a backup that has begun is expected to take.
pub fn expected(past: &[Past], reading: &Reading, cluster_bytes: u64, host: &str) -> Option<Expected> {
    let found = estimate::backup(past, reads(reading.scope), cluster_bytes, host);
    let changed = reading.known.as_ref().filter(|_| reading.scope == ReadScope::Changes);
    let changed_bytes = changed.map(|known| known.since.changed.block_count() * u64::from(PAGE_BYTES));
    let mut expected = found?.expected;
    // What the WAL names is read at least; catalogs, maps and small files come on top, as before.
    expected.moved_bytes = match (expected.moved_bytes, changed_bytes) {
        (Some(before), Some(changed)) => Some(before.max(changed)),
        (before, changed) => before.or(changed),
    };
    Some(expected)
}

fn reads(scope: ReadScope) -> Reads {
    match scope {
        ReadScope::Changes => Reads::Changes,
        ReadScope::AllFirst => Reads::First,
        ReadScope::Unknown
        | ReadScope::AllAsked
        | ReadScope::AllOtherHistory
        | ReadScope::AllWalNotKnown
        | ReadScope::AllDamage
        | ReadScope::AllCopy => Reads::All,
    }
}
