//! A base backup: always a full one in the repository, at the cost of what changed.
//!
//! [`run`] is the whole of it: start in Postgres, open a session in the cluster's log, copy, stop, wait until the archive
//! holds the WAL that makes it consistent, commit. [`scan`] lists what belongs into it, [`copy`] and [`stretch`] read and
//! pack, [`manifest_json`] writes PostgreSQL's own backup_manifest on restore.

pub mod changes;
pub mod compare;
pub mod copy;
pub mod damage;
mod loan;
pub mod manifest_json;
#[cfg(test)]
mod many_files_tests;
mod own_dead;
pub mod pages;
pub mod plan;
pub mod scan;
pub mod spare;
pub mod stretch;
#[cfg(test)]
mod test_manifest;
mod wal_wait;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use walfleet_repository::backup::commit::{BackupSession, Parent, SessionError, SessionSpec};
use walfleet_repository::backup::file_list::{PlacedFile, resolve_entry};
use walfleet_repository::backup::write::{PackSession, WriteError};
use walfleet_repository::checksum;
use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::format::manifest::{Counters, FileEntry, Manifest, ReadScope, Tablespace};
use walfleet_repository::ids::BackupId;
use walfleet_repository::lineage::Kin;
use walfleet_repository::postgres::{Lsn, Segment, SystemId, WalBranch};
use walfleet_repository::signature::Signer;

use crate::backup::changes::Reading;
use crate::backup::copy::{CopyError, CopyReport, CopySpec};
use crate::backup::scan::{Scan, ScanError, ScanSpec, ScannedFile};
use crate::backup::stretch::{PageCheck, StretchError};
use crate::backup::wal_wait::WalWaitError;
use crate::estimate::Past;
use crate::facts::repository::summary;
use crate::failure::{ExitCode, Failure, Remedy};
use crate::jobs::report::BackupReport;
use crate::limits::Allowance;
use crate::postgres::control::{ControlCopy, ControlError, ControlFile};
use crate::postgres::page::PageRules;
use crate::postgres::server::{BackupStop, CheckpointPace, Server, ServerError, ServerFacts, ServerRole};
use crate::progress::Progress;
use crate::wal::ship::{ShipError, Shipper};

/// A page that claims a change further than this behind the start of the backup is looked at again when its end is
/// known: few clusters write 16 GiB of WAL during a backup, and those that do only pay for the second look.
const PLAUSIBLE_WAL: u64 = 16 << 30;

/// What a backup is taken of, and how.
pub struct BackupRequest {
    pub cluster: OpenCluster,
    pub signer: Arc<Signer>,
    /// Whose copy the cluster may be; `None`: nobody's.
    pub kin: Option<Kin>,
    /// This agent's name.
    pub member: String,
    pub data_dir: PathBuf,
    /// As for libpq.
    pub connection: String,
    /// The scheduled run it serves.
    pub run: Option<String>,
    pub pace: CheckpointPace,
    /// Reads every file whole for proof that nothing changes past the WAL.
    pub read_all: bool,
    pub compression_level: i32,
    pub processes: u32,
    /// What of the host it may take.
    pub allowance: Allowance,
    /// Ships what the archive still lacks when the backup ends.
    pub shipper: Arc<Shipper>,
    /// How long to wait then for WAL that this host cannot ship itself.
    pub wal_wait: Duration,
    /// What jobs of this cluster took.
    pub past: Vec<Past>,
}

#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(
        "the server's data directory is {found}, and this instance's is {expected}\nHINT: check the instance's connection and data_dir in the agent's configuration."
    )]
    DataDirectory { found: PathBuf, expected: PathBuf },
    #[error(
        "{data_dir} holds system {here}, and the server at the connection is system {server}\nHINT: check the instance's connection and data_dir in the agent's configuration."
    )]
    OtherSystem { data_dir: PathBuf, here: SystemId, server: SystemId },
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    WalWait(#[from] WalWaitError),
    #[error("find the branch of timeline {timeline}: {source}")]
    Branch { timeline: walfleet_repository::postgres::Timeline, source: Arc<ShipError> },
    #[error("the server was promoted during the backup, from timeline {from} to {to}\nHINT: take the backup again.")]
    Promoted { from: u32, to: u32 },
    #[error("the copying thread ended without a result")]
    CopyLost,
    #[error("cancelled")]
    Cancelled,
}

impl BackupError {
    pub fn is_cancelled(&self) -> bool {
        matches!(
            self,
            BackupError::Cancelled
                | BackupError::Copy(
                    CopyError::Cancelled
                        | CopyError::Read(StretchError::Cancelled | StretchError::Write(WriteError::Stopped))
                        | CopyError::Write(WriteError::Stopped)
                )
                | BackupError::Write(WriteError::Stopped)
                | BackupError::WalWait(WalWaitError::Cancelled)
        )
    }
}

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Failure {
        use BackupError as E;
        if error.is_cancelled() {
            return Failure::cancelled();
        }
        let (code, exit, remedy) = match &error {
            E::Server(_) => ("backup.postgres", ExitCode::Failed, Remedy::Retry),
            E::DataDirectory { .. } | E::OtherSystem { .. } => {
                ("backup.data_directory", ExitCode::Refused, Remedy::Operator)
            }
            E::Control(_) => ("backup.pg_control", ExitCode::Failed, Remedy::Operator),
            E::Session(SessionError::RunServed { .. }) => ("backup.run_served", ExitCode::Refused, Remedy::Operator),
            E::Session(error) if error.is_retryable() => ("backup.repository", ExitCode::Failed, Remedy::Retry),
            E::Session(_) => ("backup.repository", ExitCode::Failed, Remedy::Operator),
            E::Cluster(error) if error.is_retryable() => ("backup.repository", ExitCode::Failed, Remedy::Retry),
            E::Cluster(_) => ("backup.repository", ExitCode::Failed, Remedy::Operator),
            E::Write(_) => ("backup.repository", ExitCode::Failed, Remedy::Retry),
            E::Copy(_) | E::CopyLost => ("backup.read", ExitCode::Failed, Remedy::Retry),
            E::Scan(_) => ("backup.read", ExitCode::Failed, Remedy::Operator),
            E::WalWait(WalWaitError::Parted { .. }) => ("backup.wal_parted", ExitCode::Failed, Remedy::Retry),
            E::WalWait(WalWaitError::Foreign { .. }) => ("backup.wal_foreign", ExitCode::Refused, Remedy::Operator),
            E::WalWait(_) => ("backup.wal_missing", ExitCode::Failed, Remedy::Retry),
            E::Branch { .. } => ("backup.wal_missing", ExitCode::Failed, Remedy::Retry),
            E::Promoted { .. } => ("backup.promoted", ExitCode::Failed, Remedy::Retry),
            E::Cancelled => ("cancelled", ExitCode::Failed, Remedy::Operator),
        };
        Failure::new(code, exit, remedy, error)
    }
}

/// Takes a backup. After cancellation or an error the session is aborted in the log where that is still possible, and
/// the server is out of backup mode; packs already stored are garbage that nothing refers to.
pub async fn run(
    request: BackupRequest,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<BackupReport, BackupError> {
    progress.enter("checkpoint", 0);
    let server = Server::connect(&request.connection).await?;
    let facts = server.facts().await?;
    check_data_directory(&request, &facts)?;
    let mut run = request.run.clone();
    if let Some((own, named)) = run.as_ref().and_then(|run| own_dead::name_run(&request.cluster, &request.signer, run))
    {
        own_dead::tidy(&request.cluster, &request.signer, &own).await;
        run = Some(named);
    }
    loan::arrange(&request.cluster, &request.signer, request.kin.as_ref(), cancel).await;
    let cluster_bytes = server.cluster_bytes().await.ok().flatten().unwrap_or(0);
    let label = format!("walfleet {}", request.cluster.name());
    let began_at_us = jiff::Timestamp::now().as_microsecond();
    let starting = tokio::select! {
        // Dropping the connection ends backup mode by itself.
        () = cancel.cancelled() => return Err(BackupError::Cancelled),
        started = server.start_backup(&label, request.pace) => started?,
    };
    let wal = branch(&request, &facts, starting.start_lsn).await?;
    let spec = SessionSpec { run, wal, wal_floor: starting.start_lsn };
    let opened = BackupSession::open(request.cluster.clone(), request.signer.clone(), &request.member, spec).await;
    let (mut session, parent) = match opened {
        Ok(opened) => opened,
        // The reply of an earlier attempt's commit was lost: its backup stands, and that is what was asked for.
        Err(SessionError::RunServed { backup, by, .. }) if by == request.member => {
            tracing::info!(%backup, "an earlier attempt of this run was committed");
            return standing(&request.cluster, &backup).await;
        }
        Err(error) => return Err(error.into()),
    };
    tracing::info!(backup = %session.id(), start_lsn = %starting.start_lsn, parents = ?session.parents(), "backup started");

    let starting = (starting, began_at_us);
    let taken = take(&request, &session, parent, starting, &facts, wal, cluster_bytes, (progress, cancel)).await;
    let Taken { mut manifest, packs, damaged, because } = match taken {
        Ok(taken) => taken,
        Err(error) => {
            abort(session, &error).await;
            return Err(error);
        }
    };
    progress.enter("commit", 0);
    manifest.counters.store_requests = request.cluster.repository().store().counters().requests();
    let committing = session.commit(&manifest, packs, damaged);
    let committed = match committing.instrument(tracing::info_span!("commit")).await {
        Ok(committed) => committed,
        Err(error) => {
            abort(session, &error).await;
            return Err(error.into());
        }
    };
    tracing::info!(backup = %committed.reference.backup, stop_lsn = %committed.reference.stop_lsn,
        read_bytes = manifest.counters.read_bytes, stored_bytes = manifest.counters.stored_bytes, "backup committed");
    let report = summary(&committed);
    // The reason in full: what lies in the repository is a kind of reason only.
    Ok(BackupReport { read_all_because: because.or(report.read_all_because.clone()), ..report })
}

async fn abort(session: BackupSession, error: &(dyn std::error::Error + Sync)) {
    let id = session.id().clone();
    if let Err(abort) = session.abort(&error.to_string()).await {
        tracing::warn!(backup = %id, "the session could not be aborted and stays open: {abort}");
    }
}

/// A backup that is committed already.
async fn standing(cluster: &OpenCluster, backup: &BackupId) -> Result<BackupReport, BackupError> {
    let log = cluster.log().await?;
    let found = cluster.repository().backups(&log).await.readable;
    let found = found.iter().find(|committed| committed.reference.backup == *backup).map(summary);
    found.ok_or_else(|| SessionError::Aborted(backup.clone()).into())
}

/// A backup that is ready to be committed.
struct Taken {
    manifest: Manifest,
    packs: Vec<walfleet_repository::backup::write::UsedPack>,
    /// Pages.
    damaged: u64,
    /// Why everything was read.
    because: Option<String>,
}

/// Everything between the session's opening and its commit.
#[allow(clippy::too_many_arguments, reason = "one caller, which owns them all for the time of the backup")]
async fn take(
    request: &BackupRequest,
    session: &BackupSession,
    parent: Option<Parent>,
    (starting, began_at_us): (crate::postgres::server::BackupSession, i64),
    facts: &ServerFacts,
    wal: WalBranch,
    cluster_bytes: u64,
    (progress, cancel): (&Progress, &CancellationToken),
) -> Result<Taken, BackupError> {
    let start_lsn = starting.start_lsn;
    let started_at_us = starting.started_at_us;
    progress.enter("copy", cluster_bytes);
    let packs = PackSession::begin(
        request.cluster.repository().store().clone(),
        request.cluster.name().clone(),
        session.id().clone(),
        request.cluster.keys().newest().clone(),
        request.compression_level,
        parent.iter().flat_map(|parent| parent.packs.clone()),
    );
    // A lost connection ends the backup at once: Postgres has left backup mode.
    let stop_copy = cancel.child_token();
    let copying = copy_files(request, facts, (wal, start_lsn), parent, &packs, progress, &stop_copy);
    let copying = copying.instrument(tracing::info_span!("copy"));
    tokio::pin!(copying);
    let copied = tokio::select! {
        copied = &mut copying => copied?,
        lost = starting.lost() => {
            stop_copy.cancel();
            // The threads end at their next read; what they hand back no longer matters.
            let _ = copying.await;
            return Err(lost.into());
        }
    };
    let Copied { mut copied, control, entry: control_entry, scope, because } = copied;
    progress.enter("stop", 0);
    let stop = starting.stop().await?;
    if stop.timeline != facts.timeline {
        return Err(BackupError::Promoted { from: facts.timeline.0, to: stop.timeline.0 });
    }
    let used = packs.finish().await?;
    progress.enter("wait for wal", 0);
    let wait = wal_wait::WalWait {
        shipper: &request.shipper,
        archive: request.cluster.wal_archive(request.compression_level),
        wal,
        segment_size: facts.wal_segment_size,
        deadline: request.wal_wait,
        began_at_us,
    };
    let waiting = wait.until_archived(start_lsn, stop.stop_lsn, facts.role == ServerRole::Primary, cancel);
    waiting.instrument(tracing::info_span!("wait for wal")).await?;
    let (new_bytes, stored_bytes, new_packs) = packs.written();
    let counters = Counters {
        cluster_bytes: copied.cluster_bytes,
        files: copied.file_count,
        read_bytes: copied.read_bytes,
        new_bytes,
        stored_bytes,
        new_packs,
        store_requests: 0,
        unexplained_slots: copied.unexplained_slots,
        read_scope: scope,
    };
    let damage = std::mem::take(&mut copied.damage).judge(stop.stop_lsn);
    damage.tell();
    let times = (started_at_us, start_lsn);
    let mut manifest = manifest(request, session, facts, wal, times, stop, copied, &control, control_entry, counters);
    manifest.damaged_pages = damage.for_manifest();
    Ok(Taken { manifest, packs: used, damaged: damage.count, because })
}

/// What came of copying.
struct Copied {
    copied: CopyReport,
    control: ControlFile,
    entry: FileEntry,
    scope: ReadScope,
    /// Why everything was read.
    because: Option<String>,
}

/// Copies all files, pg_control last, on a thread of its own.
async fn copy_files(
    request: &BackupRequest,
    facts: &ServerFacts,
    (wal, start_lsn): (WalBranch, Lsn),
    parent: Option<Parent>,
    packs: &Arc<PackSession>,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<Copied, BackupError> {
    let scan_spec = ScanSpec {
        data_dir: request.data_dir.clone(),
        major: facts.version_num / 10_000,
        catalog_version: facts.catalog_version,
        without_content: facts.log_directory.iter().cloned().collect(),
    };
    let blocks_per_segment = ControlFile::read(&request.data_dir)?.blocks_per_segment;
    let reading = match &parent {
        Some(parent) => {
            let beginning = changes::Beginning {
                shipper: &request.shipper,
                archive: &request.cluster.wal_archive(request.compression_level),
                data_dir: &request.data_dir,
                wal,
                segment_size: facts.wal_segment_size,
                start_lsn,
                data_checksums: facts.data_checksums,
                read_all: request.read_all,
                member: &request.member,
                cluster: request.cluster.name(),
            };
            changes::reading(parent, &beginning, blocks_per_segment).await
        }
        None => Reading::first(),
    };
    let cluster_bytes = progress.read().total_bytes;
    if let Some(expected) = plan::expected(&request.past, &reading, cluster_bytes, &request.member) {
        progress.expect(expected);
    }
    let spec = CopySpec {
        known: reading.known,
        threads: request.processes.max(1) as usize,
        pages: PageCheck {
            rules: PageRules {
                block_bytes: facts.block_bytes as usize,
                checksums: facts.data_checksums,
                start_lsn,
                end_lsn: Lsn(start_lsn.0.saturating_add(PLAUSIBLE_WAL)),
            },
            blocks_per_segment,
        },
        parent: parent.map(|parent| parent.reader),
        allowance: request.allowance.until(cancel),
    };
    let (packs, progress, cancel) = (packs.clone(), progress.clone(), cancel.clone());
    let runtime = Handle::current();
    let data_dir = request.data_dir.clone();
    let span = tracing::Span::current();
    let copied = tokio::task::spawn_blocking(move || {
        let _entered = span.enter();
        let scan = Scan::new(scan_spec)?;
        let control_file = scan.pg_control()?;
        let report = copy::copy(scan, &packs, &spec, &runtime, &progress, &cancel)?;
        let (control, entry) = copy_control(&data_dir, &control_file, &packs)?;
        Ok::<_, BackupError>((report, control, entry))
    });
    let (copied, control, entry) = copied.await.map_err(|_| BackupError::CopyLost)??;
    Ok(Copied { copied, control, entry, scope: reading.scope, because: reading.because })
}

/// pg_control is read last, whole and by its own checksum: it can be caught half written, and on a standby its
/// minimum recovery point is the end of the backup (do_pg_backup_stop, src/backend/access/transam/xlog.c).
fn copy_control(
    data_dir: &Path,
    file: &ScannedFile,
    packs: &Arc<PackSession>,
) -> Result<(ControlFile, FileEntry), BackupError> {
    let ControlCopy { file: control, bytes: content } = ControlCopy::read(data_dir)?;
    let mut writer = packs.writer();
    let chunk = writer.store(&content, None)?;
    writer.flush()?;
    let placed = PlacedFile {
        path: Bytes::copy_from_slice(&file.path),
        mode: file.mode,
        mtime_us: file.mtime_us,
        kind: walfleet_repository::backup::file_list::PlacedKind::File {
            size: content.len() as u64,
            crc32c: Some(checksum::crc32c(&content)),
            content: walfleet_repository::backup::file_list::PlacedContent::Chunk(chunk),
        },
    };
    let entry = resolve_entry(packs, &placed).ok_or(WriteError::UnfinishedPack)?;
    Ok((control, entry))
}

/// The data directory that the server names must be the one that is copied.
fn check_data_directory(request: &BackupRequest, facts: &ServerFacts) -> Result<(), BackupError> {
    let here = ControlFile::read(&request.data_dir)?.system_id;
    if here != facts.system_id {
        return Err(BackupError::OtherSystem { data_dir: request.data_dir.clone(), here, server: facts.system_id });
    }
    // Only a role that may read all settings is told; the system identifier then has to do.
    let Some(found) = &facts.data_directory else { return Ok(()) };
    let real = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
    if real(found) == real(&request.data_dir) {
        return Ok(());
    }
    Err(BackupError::DataDirectory { found: found.clone(), expected: request.data_dir.clone() })
}

/// The branch that the server's WAL goes to.
async fn branch(request: &BackupRequest, facts: &ServerFacts, start: Lsn) -> Result<WalBranch, BackupError> {
    let timeline = facts.timeline;
    let branch = request.shipper.newest_branch(Segment::containing(timeline, start, facts.wal_segment_size)).await;
    branch.map_err(|source| BackupError::Branch { timeline, source: Arc::new(source) })
}

#[allow(clippy::too_many_arguments, reason = "puts together what the steps of one backup found")]
fn manifest(
    request: &BackupRequest,
    session: &BackupSession,
    facts: &ServerFacts,
    wal: WalBranch,
    (started_at_us, start_lsn): (i64, Lsn),
    stop: BackupStop,
    copied: CopyReport,
    control: &ControlFile,
    control_file: FileEntry,
    counters: Counters,
) -> Manifest {
    Manifest {
        backup: session.id().clone(),
        cluster: request.cluster.name().clone(),
        server_version_num: facts.version_num,
        wal,
        start_lsn,
        stop_lsn: stop.stop_lsn,
        started_at_us,
        stopped_at_us: stop.stopped_at_us,
        segment_size: facts.wal_segment_size,
        block_bytes: facts.block_bytes,
        catalog_version: facts.catalog_version,
        control_version: facts.control_version,
        data_checksums: facts.data_checksums,
        group_access: control_file.mode & 0o040 != 0,
        member: request.member.clone(),
        member_role: match facts.role {
            ServerRole::Primary => "primary".to_owned(),
            ServerRole::Standby => "standby".to_owned(),
        },
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        backup_label: stop.label_file.into(),
        tablespace_map: stop.tablespace_map.into(),
        tablespaces: facts
            .tablespaces
            .iter()
            .map(|t| {
                let location = t.location.to_string_lossy().into_owned();
                // An in-place tablespace is named relative to the data directory.
                let location = if t.location.is_absolute() { location } else { String::new() };
                Tablespace { oid: t.oid, location }
            })
            .collect(),
        recovery_settings: control
            .recovery_settings
            .named()
            .iter()
            .map(|(name, value)| ((*name).to_owned(), *value))
            .collect(),
        file_list: copied.file_list,
        file_count: copied.file_count,
        has_overlays: copied.has_overlays,
        control_file,
        damaged_pages: Vec::new(),
        counters,
    }
}
