//! A backup session in the cluster's log: opened before anything is written, committed after everything is durable.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;

use crate::backup::read::BackupReader;
use crate::backup::write::{PackHome, ParentPack, UsedPack};
use crate::cluster::{ClusterError, OpenCluster};
use crate::cluster_log::{AppendError, Author, Borrowed, ClusterLog, ClusterState, Decision, LogError, SessionState};
use crate::format::log_entry::{Action, Open};
use crate::format::manifest::Manifest;
use crate::format::reference::{PackUse, ReferencePart, SessionPacks};
use crate::format::sealed::{Compressor, SealedError};
use crate::ids::{BackupId, ClusterName, Digest, PackId};
use crate::layout;
use crate::open::CommittedBackup;
use crate::postgres::{Lsn, WalBranch};
use crate::signature::Signer;
use crate::store::StoreError;

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("run \"{run}\" is already served by backup {backup}, which {by} took")]
    RunServed { run: String, backup: BackupId, by: String },
    #[error("run \"{run}\" is being served by session {session} of {by}\nHINT: wait for it, or cancel its job.")]
    RunOpen { run: String, session: BackupId, by: String },
    #[error(
        "session {0} was aborted in the cluster's log; nothing of it counts\nHINT: the keeper took it for dead, or another attempt began; take the backup again."
    )]
    Aborted(BackupId),
    #[error("store {what} of {backup}: {source}")]
    Store { what: &'static str, backup: BackupId, source: StoreError },
    #[error("seal manifest of {backup}: {source}")]
    Seal { backup: BackupId, source: SealedError },
    #[error("the manifest that lies under {0} is another than the one just written")]
    Taken(BackupId),
}

impl SessionError {
    pub fn is_retryable(&self) -> bool {
        match self {
            SessionError::Cluster(error) => error.is_retryable(),
            SessionError::Log(error) => error.is_retryable(),
            SessionError::Store { source, .. } => source.is_retryable(),
            SessionError::Aborted(_) | SessionError::RunOpen { .. } => true,
            SessionError::RunServed { .. } | SessionError::Seal { .. } | SessionError::Taken(_) => false,
        }
    }
}

/// What a session is opened for.
#[derive(Clone, Debug)]
pub struct SessionSpec {
    /// The scheduled run it serves: no run is served twice.
    pub run: Option<String>,
    pub wal: WalBranch,
    /// No WAL from here on may be trimmed while the session is open.
    pub wal_floor: Lsn,
}

/// A backup that this session may refer to, opened.
pub struct Parent {
    pub backup: CommittedBackup,
    pub reader: Arc<BackupReader>,
    /// Its packs that are seen to lie there whole: only these may be referred to.
    pub packs: Vec<ParentPack>,
}

/// An open session.
pub struct BackupSession {
    cluster: OpenCluster,
    log: ClusterLog,
    signer: Arc<Signer>,
    id: BackupId,
    parents: Vec<BackupId>,
}

impl BackupSession {
    /// Opens a session whose parent is the newest live backup of the same system, or for want of one a borrowed backup,
    /// if there is one that reads.
    ///
    /// An open session of the same run and the same writer is a dead attempt of its own and is aborted first.
    pub async fn open(
        cluster: OpenCluster,
        signer: Arc<Signer>,
        member: &str,
        spec: SessionSpec,
    ) -> Result<(BackupSession, Option<Parent>), SessionError> {
        let mut log = cluster.log().await?;
        if let Some(run) = &spec.run {
            clear_run(&mut log, &signer, run, member).await?;
        }
        let parent = newest_parent(&cluster, &log, spec.wal).await;
        let id = BackupId::generate();
        let parents: Vec<BackupId> = parent.iter().map(|parent| parent.backup.reference.backup.clone()).collect();
        let open = |parents: &[BackupId]| {
            Action::Open(Open {
                session: id.clone(),
                parents: parents.to_vec(),
                run: spec.run.clone(),
                wal: spec.wal,
                wal_floor: spec.wal_floor,
            })
        };
        let mut named = parents.clone();
        let appended = log.append(Author::host(&signer), |state| {
            if let Some(error) = spec.run.as_ref().and_then(|run| served(state, run, None)) {
                return Decision::Refuse(error);
            }
            // A parent that expired meanwhile is left out; the backup is then whole by itself.
            named = parents.iter().filter(|id| may_be_parent(state, id)).cloned().collect();
            Decision::Append(open(&named))
        });
        appended.await.map_err(unwrap_append)?;
        let parent = parent.filter(|_| !named.is_empty());
        Ok((BackupSession { cluster, log, signer, id, parents: named }, parent))
    }

    pub fn id(&self) -> &BackupId {
        &self.id
    }

    pub fn parents(&self) -> &[BackupId] {
        &self.parents
    }

    pub fn cluster(&self) -> &OpenCluster {
        &self.cluster
    }

    /// Publishes the backup. Every pack named must be durable, and WAL up to the stop position sealed.
    ///
    /// Bottom-up: manifest and reference part first, each under a name of its own, then the log entry that makes them
    /// count. A crash before it leaves objects that nothing refers to; a crash after it leaves a backup.
    ///
    /// After an error the session may still be open: abort it, which changes nothing if the commit did count.
    pub async fn commit(
        &mut self,
        manifest: &Manifest,
        packs: Vec<UsedPack>,
        damaged_page_count: u64,
    ) -> Result<CommittedBackup, SessionError> {
        let (name, id) = (self.cluster.name().clone(), self.id.clone());
        let key = layout::manifest(&name, &id);
        let domain = self.cluster.keys().newest().clone();
        let sealed = manifest
            .seal(&domain, key.as_ref(), &mut Compressor::new(3))
            .map_err(|source| SessionError::Seal { backup: id.clone(), source })?;
        let reference = ReferencePart {
            backup: id.clone(),
            cluster: name.clone(),
            domain: domain.domain,
            key_version: domain.version,
            server_version_num: manifest.server_version_num,
            wal: manifest.wal,
            start_lsn: manifest.start_lsn,
            stop_lsn: manifest.stop_lsn,
            started_at_us: manifest.started_at_us,
            stopped_at_us: manifest.stopped_at_us,
            member: manifest.member.clone(),
            parents: self.parents.clone(),
            counters: manifest.counters,
            damaged_page_count,
            segment_size: manifest.segment_size,
            seen_at_us: None,
            sessions: by_session(packs),
        };
        let refs = reference.seal(&self.signer, self.cluster.repository().id());
        let digest = |bytes: &Bytes| Digest(*blake3::hash(bytes).as_bytes());
        let (manifest_digest, reference_digest) = (digest(&sealed), digest(&refs));
        self.put("manifest", &key, sealed).await?;
        self.put("reference part", &layout::reference(&name, &id), refs).await?;
        let commit = Action::Commit { session: id.clone(), manifest_digest, reference_digest };
        let appended =
            self.log.append(Author::host(&self.signer), |state| match state.session(&id).map(|s| &s.state) {
                Some(SessionState::Open) => Decision::Append(commit.clone()),
                Some(_) if state.session(&id).and_then(|s| s.committed()).is_some() => Decision::Nothing,
                _ => Decision::Refuse(SessionError::Aborted(id.clone())),
            });
        appended.await.map_err(unwrap_append)?;
        let committed = self.log.state().session(&id).and_then(|session| session.committed().cloned());
        let committed = committed.ok_or_else(|| SessionError::Aborted(id.clone()))?;
        let found = self.cluster.repository().reference(&name, &id, &committed).await.map_err(ClusterError::from)?;
        let (reference, writer) = found;
        Ok(CommittedBackup { reference, commit: committed, life: crate::open::BackupLife::Live, writer })
    }

    /// Gives the session up. Its packs become garbage that no later session can refer to.
    pub async fn abort(mut self, reason: &str) -> Result<(), SessionError> {
        let id = self.id.clone();
        abort_session(&mut self.log, &self.signer, &id, reason).await
    }

    async fn put(&self, what: &'static str, key: &object_store::path::Path, bytes: Bytes) -> Result<(), SessionError> {
        let stored = self.cluster.repository().store().put_new(key, bytes).await;
        stored.map_err(|source| SessionError::Store { what, backup: self.id.clone(), source })
    }
}

/// Sessions whose packs are listed one by one.
const LISTED_ALONE: usize = 4;

/// Whether the log lets a session name it now.
fn may_be_parent(state: &ClusterState, id: &BackupId) -> bool {
    match state.session(id) {
        Some(session) => session.is_live(),
        None => state.borrowed().any(|(borrowed, _)| borrowed.backup == *id),
    }
}

/// The packs of a parent that lies in `home`'s log, as far as a listing shows them with the size they should have.
///
/// A pack that is missing there, or cut short, is left out, and what lies in it is stored anew: a listing that shows too
/// little costs space, never correctness.
async fn present_packs(
    own: &OpenCluster,
    home: &ClusterLog,
    backup: &CommittedBackup,
) -> Result<Vec<ParentPack>, StoreError> {
    let mut wanted: BTreeMap<&ClusterName, BTreeMap<&BackupId, Vec<PackUse>>> = BTreeMap::new();
    for (cluster, session, used) in backup.reference.packs() {
        // Where a lender's own lender repaired a pack is not looked up: what is not found is stored anew.
        let moved = home.state().moved(&used.pack).filter(|_| cluster == home.cluster());
        wanted.entry(cluster).or_default().entry(moved.unwrap_or(session)).or_default().push(*used);
    }
    let mut present = Vec::new();
    for (cluster, sessions) in wanted {
        let sizes = pack_sizes(own, cluster, sessions.keys().copied()).await?;
        let lender = (cluster != own.name()).then(|| cluster.clone());
        for (session, used) in
            sessions.into_iter().flat_map(|(session, packs)| packs.into_iter().map(move |p| (session, p)))
        {
            let (pack, stored_bytes) = (used.pack, used.stored_bytes);
            if sizes.get(&(session.clone(), pack)) == Some(&stored_bytes) {
                let home = PackHome { cluster: lender.clone(), session: session.clone() };
                present.push(ParentPack { pack, home, stored_bytes });
            } else {
                let parent = &backup.reference.backup;
                tracing::error!(pack = %used.pack, backup = %parent, "a pack that a committed backup needs is missing or damaged; what lies in it is stored anew");
            }
        }
    }
    Ok(present)
}

/// What listings say of the packs of these sessions. A few sessions are listed one by one; many as all of the cluster's
/// packs at once, of which a store tells a thousand a request.
async fn pack_sizes(
    own: &OpenCluster,
    cluster: &ClusterName,
    sessions: impl ExactSizeIterator<Item = &BackupId>,
) -> Result<HashMap<(BackupId, PackId), u64>, StoreError> {
    let folders: Vec<_> = match sessions.len() <= LISTED_ALONE {
        true => sessions.map(|session| layout::session_packs(cluster, session)).collect(),
        false => vec![layout::packs(cluster)],
    };
    let store = own.repository().store();
    let mut sizes = HashMap::new();
    for folder in folders {
        let listed = store.list(&folder).await?;
        sizes.extend(listed.iter().filter_map(|object| Some((layout::parse_pack(cluster, &object.key)?, object.size))));
    }
    Ok(sizes)
}

fn by_session(packs: Vec<UsedPack>) -> Vec<SessionPacks> {
    let mut sessions: BTreeMap<PackHome, Vec<PackUse>> = BTreeMap::new();
    for pack in packs {
        let used = PackUse { pack: pack.pack, stored_bytes: pack.stored_bytes, used_bytes: pack.used_bytes };
        sessions.entry(pack.home).or_default().push(used);
    }
    sessions
        .into_iter()
        .map(|(home, mut packs)| {
            packs.sort_by_key(|used| used.pack);
            SessionPacks { session: home.session, cluster: home.cluster, packs }
        })
        .collect()
}

/// The newest live backup of the system that can be opened, or else a borrowed one. One that cannot is passed over: the
/// next one, or none, costs space, never correctness.
async fn newest_parent(cluster: &OpenCluster, log: &ClusterLog, wal: WalBranch) -> Option<Parent> {
    for session in log.state().live_parents_for(wal.system_id) {
        match open_parent(cluster, cluster, log, session.id()).await {
            Ok(Some(parent)) => return Some(parent),
            Ok(None) => {}
            Err(error) => tracing::warn!(backup = %session.id(), "cannot serve as a parent: {error}"),
        }
    }
    let borrowed: Vec<Borrowed> = log.state().borrowed().map(|(borrowed, _)| borrowed.clone()).collect();
    for Borrowed { cluster: lender, backup } in borrowed {
        match open_borrowed(cluster, &lender, &backup).await {
            Ok(Some(parent)) if parent.backup.reference.wal.system_id == wal.system_id => return Some(parent),
            Ok(_) => {}
            Err(error) => tracing::warn!(%backup, %lender, "cannot serve as a parent: {error}"),
        }
    }
    None
}

async fn open_borrowed(
    own: &OpenCluster,
    lender: &ClusterName,
    backup: &BackupId,
) -> Result<Option<Parent>, ClusterError> {
    let mut log = own.repository().cluster_log(lender);
    log.refresh().await?;
    match own.relative(&log) {
        Some(lender) => open_parent(own, &lender, &log, backup).await,
        None => Ok(None),
    }
}

/// A backup of `home`, whose log is `log`, as a parent for one of `own`; `None`: it is no backup any more.
async fn open_parent(
    own: &OpenCluster,
    home: &OpenCluster,
    log: &ClusterLog,
    id: &BackupId,
) -> Result<Option<Parent>, ClusterError> {
    let Some(committed) = log.state().session(id).and_then(|session| session.committed()) else { return Ok(None) };
    let (reference, writer) = home.repository().reference(home.name(), id, committed).await?;
    let life = crate::open::BackupLife::Live;
    let backup = CommittedBackup { reference, commit: committed.clone(), life, writer };
    let reader = Arc::new(home.open_backup(&backup, log.state()).await?);
    let packs = present_packs(own, log, &backup).await;
    let packs = packs.map_err(|source| ClusterError::Store { backup: id.clone(), source })?;
    Ok(Some(Parent { backup, reader, packs }))
}

/// Who serves the run in this state. With `own`, that writer's open session does not count.
fn served(state: &crate::cluster_log::ClusterState, run: &str, own: Option<&str>) -> Option<SessionError> {
    let session = state.serving(run)?;
    let (run, by) = (run.to_owned(), session.opened.by.clone());
    if session.is_open() {
        let id = session.id().clone();
        return (own != Some(&by)).then_some(SessionError::RunOpen { run, session: id, by });
    }
    Some(SessionError::RunServed { run, backup: session.id().clone(), by })
}

async fn clear_run(log: &mut ClusterLog, signer: &Signer, run: &str, member: &str) -> Result<(), SessionError> {
    let own = log.state().serving(run).map(|session| session.opened.by.clone());
    if let Some(error) = served(log.state(), run, own.as_deref().filter(|by| *by == member || *by == "recovery key")) {
        return Err(error);
    }
    let dead = log.state().serving(run).filter(|session| session.is_open()).map(|session| session.id().clone());
    match dead {
        Some(session) => abort_session(log, signer, &session, "a new attempt of the same run began").await,
        None => Ok(()),
    }
}

/// Aborts the open sessions whose run's process is known to be gone; returns them.
///
/// Only the run's writer can know. If it is wrong, that session's commit is refused: it costs a retry, nothing else.
pub async fn abort_dead(
    cluster: &OpenCluster,
    signer: &Signer,
    is_gone: impl Fn(&str) -> bool,
    reason: &str,
) -> Result<Vec<BackupId>, SessionError> {
    let mut log = cluster.log().await?;
    let gone = |session: &&crate::cluster_log::Session| session.open.run.as_deref().is_some_and(&is_gone);
    let dead: Vec<BackupId> = log.state().open_sessions().filter(gone).map(|session| session.id().clone()).collect();
    for session in &dead {
        abort_session(&mut log, signer, session, reason).await?;
    }
    Ok(dead)
}

async fn abort_session(
    log: &mut ClusterLog,
    signer: &Signer,
    session: &BackupId,
    reason: &str,
) -> Result<(), SessionError> {
    let abort = Action::Abort { session: session.clone(), reason: reason.to_owned() };
    let appended = log.append::<SessionError>(Author::host(signer), |state| {
        match state.session(session).is_some_and(|session| session.is_open()) {
            true => Decision::Append(abort.clone()),
            false => Decision::Nothing,
        }
    });
    appended.await.map(|_| ()).map_err(unwrap_append)
}

fn unwrap_append(error: AppendError<SessionError>) -> SessionError {
    match error {
        AppendError::Log(error) => error.into(),
        AppendError::Refused(error) => error,
    }
}
