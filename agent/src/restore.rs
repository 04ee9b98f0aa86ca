//! Bringing a cluster back: to any point its archive covers, into an empty directory or over a copy of it, with one call.
//!
//! [`plan`] says from which backup, over which timelines, and what it takes; [`mod@write`] keeps the directory from being
//! taken for whole before it is; [`rest`] removes what the backup does not have; [`sink`] puts files down; [`recovery`] words what PostgreSQL needs to be told; [`start`]
//! starts it and waits until it stands at its target.

mod paced;
pub mod plan;
pub mod recovery;
pub mod rest;
pub mod sink;
pub mod start;
pub mod write;

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use walfleet_repository::backup::fetch::{FetchError, FetchOptions, fetch_all};
use walfleet_repository::backup::read::{BackupReader, ReadError};
use walfleet_repository::checksum;
use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::format::manifest::{Content, EntryKind};
use walfleet_repository::ids::BackupId;
use walfleet_repository::postgres::SystemId;
use walfleet_repository::recovery_window::KnownComplete;

use crate::backup::manifest_json::{self, ManifestWriter};
use crate::estimate::{self, Expected, Past, RestoreNeeds};
use crate::failure::{ExitCode, Failure, Remedy};
use crate::history;
use crate::jobs::order::RecoveryTarget;
use crate::jobs::report::{PLANNED, RestoreReport};
use crate::limits::Allowance;
use crate::postgres::instance::{self, BinariesError};
use crate::progress::Progress;
use crate::restore::paced::PacedSink;
use crate::restore::plan::{PlanEnd, PlanError, RestorePlan};
use crate::restore::recovery::RecoverySettings;
use crate::restore::sink::FileSink;
use crate::restore::start::{StartError, StartSpec};
use crate::restore::write::{Destination, DirectoryMode, WriteError, create_plain, write_plain};
use crate::tasks;
use crate::wal::fetch::{RestoreSource, SOURCE_FILE, SourceTimeline};

/// Segments that one `wal fetch` brings along: four times 16 MiB hides a store's latency behind replay.
const READ_AHEAD: u32 = 8;

/// And no more than this of them, since segments can have a gigabyte.
const READ_AHEAD_BYTES: u32 = 128 << 20;

/// Requests in flight while files are fetched.
const REQUESTS: usize = 4;

/// What is restored, and where.
pub struct RestoreRequest {
    pub cluster: OpenCluster,
    /// Where the restored server's `wal fetch` finds its key.
    pub key_file: PathBuf,
    /// How the repository is reached.
    pub url: String,
    pub options: BTreeMap<String, String>,
    pub target: RecoveryTarget,
    pub data_dir: PathBuf,
    /// Old location (or oid) to new location.
    pub tablespaces: BTreeMap<String, PathBuf>,
    /// Over a copy of the same cluster, whole or not: what is right is kept, the rest replaced or removed.
    pub delta: bool,
    /// A given backup instead of the best one for the target.
    pub backup: Option<BackupId>,
    /// What the cluster's servers were seen to have.
    pub complete: Vec<KnownComplete>,
    /// Start Postgres and wait until it stands at its target.
    pub start: bool,
    pub keep_archiving: bool,
    pub port: Option<u16>,
    pub plan_only: bool,
    pub processes: u32,
    /// What of the host it may take.
    pub allowance: Allowance,
    /// Where the restored server is started: it inherits the priority.
    pub normal: Handle,
    /// Folders with PostgreSQL's programs, tried first.
    pub bin_dirs: Vec<PathBuf>,
    /// This program, for restore_command.
    pub program: PathBuf,
    /// This agent's name.
    pub host: String,
    /// What jobs of this cluster took.
    pub past: Vec<Past>,
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("read the backup: {0}")]
    Read(#[from] ReadError),
    #[error("write backup_manifest: {0}")]
    Manifest(#[source] std::io::Error),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Programs(#[from] BinariesError),
    #[error("the backup's control file has {found} bytes, expected {expected}")]
    ControlSize { found: usize, expected: u64 },
    #[error(
        "a restore by root would belong to root, and PostgreSQL refuses to run as root\nHINT: run it as the server's own user: sudo -u postgres walfleet-agent restore …; nothing was changed."
    )]
    Root,
    #[error("a restoring thread ended without a result")]
    Lost,
}

impl RestoreError {
    pub fn is_cancelled(&self) -> bool {
        matches!(self, RestoreError::Fetch(FetchError::Cancelled) | RestoreError::Start(StartError::Cancelled))
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Failure {
        use RestoreError as E;
        if error.is_cancelled() {
            return Failure::cancelled();
        }
        let (code, exit, remedy) = match &error {
            E::Plan(plan) => plan.classify(),
            E::Cluster(cluster) if cluster.is_retryable() => ("restore.repository", ExitCode::Failed, Remedy::Retry),
            E::Cluster(ClusterError::Unknown(_)) => ("restore.no_cluster", ExitCode::NotFound, Remedy::Operator),
            E::Cluster(_) => ("restore.repository", ExitCode::Failed, Remedy::Operator),
            E::Write(WriteError::Io { .. }) => ("restore.write", ExitCode::Failed, Remedy::Operator),
            E::Write(WriteError::Relative { .. } | WriteError::UnknownTablespace(_) | WriteError::SameLocation(_)) => {
                ("restore.destination", ExitCode::Usage, Remedy::Operator)
            }
            E::Write(_) => ("restore.destination", ExitCode::Refused, Remedy::Operator),
            E::Fetch(FetchError::Sink(_)) | E::Manifest(_) => ("restore.write", ExitCode::Failed, Remedy::Operator),
            E::Fetch(_) | E::Read(_) => ("restore.read", ExitCode::Failed, Remedy::Operator),
            E::Start(StartError::TargetNotReached { .. }) => {
                ("restore.target_not_reached", ExitCode::NotRecoverable, Remedy::Operator)
            }
            E::Start(_) | E::Programs(_) => ("restore.start", ExitCode::Failed, Remedy::Operator),
            E::ControlSize { .. } => ("restore.read", ExitCode::Failed, Remedy::Operator),
            E::Root => ("restore.root", ExitCode::Refused, Remedy::Operator),
            E::Lost => ("restore.write", ExitCode::Failed, Remedy::Operator),
        };
        Failure::new(code, exit, remedy, error)
    }
}

/// Restores. After an error or cancellation the directory, if anything was written, has the marker of an unfinished
/// restore and no pg_control.
pub async fn run(
    request: RestoreRequest,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<RestoreReport, RestoreError> {
    progress.enter("plan", 0);
    let plan = plan::plan(&request.cluster, &request.target, request.backup.as_ref(), &request.complete).await?;
    let log = request.cluster.log().await?;
    let reader = Arc::new(request.cluster.open_backup(&plan.backup, log.state()).await?);
    let destination = Destination::map(&request.data_dir, &reader.manifest.tablespaces, &request.tablespaces)?;
    let cluster_bytes = reader.manifest.counters.cluster_bytes;
    let needs = RestoreNeeds { cluster_bytes, wal_bytes: plan.wal_bytes() };
    let past = history::gather(&request.past, Vec::new(), plan.measured.clone());
    let expected = estimate::restore(&past, needs, &request.host);
    let mut report = planned(&request, &plan, &reader, expected.as_ref());
    let system_id = plan.backup.reference.wal.system_id;
    let check = || match request.delta {
        true => destination.check_copy(cluster_bytes, system_id),
        false => destination.check(cluster_bytes),
    };
    if request.plan_only {
        // A plan for a directory that could not be used is still a plan; it says so.
        if let Err(error) = check() {
            report.notes.push(error.to_string());
        }
        return Ok(report);
    }
    if rustix::process::geteuid().is_root() {
        return Err(RestoreError::Root);
    }
    check()?;
    let bin_dir = programs(&request, &reader)?;
    tracing::info!(backup = %plan.backup.reference.backup, data_dir = %request.data_dir.display(),
        target = recovery::describe(&plan.target, Some(plan.wal_to)), "restore started");
    if let Some(expected) = expected {
        progress.expect(expected);
    }
    let began = Instant::now();
    progress.enter("restore", cluster_bytes);
    let mode = if reader.manifest.group_access { DirectoryMode::Group } else { DirectoryMode::Owner };
    let description = format!("unfinished restore of {} from {}", request.cluster.name(), plan.backup.reference.backup);
    let file_systems = destination.begin(mode, &description, system_id)?;
    let sink = match request.delta {
        true => {
            remove_rest(&destination, &reader, cancel, &mut report.notes).await?;
            Arc::new(FileSink::over(&request.data_dir, progress.clone()))
        }
        false => Arc::new(FileSink::new(&request.data_dir, progress.clone())),
    };
    let options = FetchOptions { requests: REQUESTS, threads: request.processes.max(1) as usize };
    let paced = Arc::new(PacedSink { sink: sink.clone(), allowance: request.allowance.clone() });
    let fetched = fetch_all(reader.clone(), paced, options, cancel).await?;
    progress.enter("finish", 0);
    let (control_mode, control) = control_file(&reader).await?;
    let tablespace_map = tablespace_map(&reader, &destination);
    let path = request.data_dir.join("backup_manifest");
    write_backup_manifest(&reader, system_id, tablespace_map.as_deref(), &path, mode.file()).await?;
    let notes = write_recovery(&request, &plan, &reader, tablespace_map.as_deref(), mode, bin_dir.as_deref())?;
    report.notes.extend(notes);
    sink.settle()?;
    let finishing = destination.clone();
    let finished = tokio::task::spawn_blocking(move || {
        file_systems.sync()?;
        finishing.finish(control_mode, &control)
    });
    finished.await.map_err(|_| RestoreError::Lost)??;
    report.copy_seconds = began.elapsed().as_secs_f64();
    report.fetched_bytes = fetched.fetched_bytes;
    if request.delta {
        let kept = fetched.kept_bytes;
        report.notes.push(format!("{kept} of {cluster_bytes} bytes were right already and were kept"));
    }
    report.server_state = "prepared".to_owned();
    if let Some(bin_dir) = bin_dir.filter(|_| request.start) {
        let began = Instant::now();
        let spec = StartSpec {
            data_dir: request.data_dir.clone(),
            bin_dir,
            action: plan.target.action,
            point: plan.target.point.clone(),
            users: users(),
        };
        let (progress, cancel) = (progress.clone(), cancel.clone());
        let starting = async move { start::start(&spec, &progress, &cancel).await };
        let standing = tasks::settled(request.normal.spawn(starting.in_current_span())).await?;
        report.replay_seconds = began.elapsed().as_secs_f64();
        report.server_state = standing.state.name().to_owned();
        report.reached_lsn = standing.reached_lsn;
        report.reached_commit = standing.reached_commit;
        report.connection = standing.connection;
        report.notes.push(format!(
            "the server logs to {} until it is stopped and started (pg_ctl restart keeps to it)",
            start::LOG_FILE
        ));
    }
    report.store_requests = request.cluster.repository().store().counters().requests();
    report.at_most = false;
    tracing::info!(data_dir = %request.data_dir.display(), state = report.server_state, "restore finished");
    Ok(report)
}

async fn remove_rest(
    destination: &Destination,
    reader: &Arc<BackupReader>,
    cancel: &CancellationToken,
    notes: &mut Vec<String>,
) -> Result<(), RestoreError> {
    let (destination, reader, cancel) = (destination.clone(), reader.clone(), cancel.clone());
    let removing = tokio::task::spawn_blocking(move || rest::remove(&destination, reader, &cancel));
    let removed = removing.await.map_err(|_| RestoreError::Lost)??;
    if removed > 0 {
        notes.push(format!("{removed} files and directories that the backup does not have were removed"));
    }
    Ok(())
}

fn planned(
    request: &RestoreRequest,
    plan: &RestorePlan,
    reader: &BackupReader,
    expected: Option<&Expected>,
) -> RestoreReport {
    let asked_already = request.cluster.repository().store().counters().requests();
    let cluster_bytes = reader.manifest.counters.cluster_bytes;
    RestoreReport {
        data_dir: request.data_dir.clone(),
        backup: plan.backup.reference.backup.clone(),
        cluster_bytes,
        fetched_bytes: plan.stored_bytes(),
        // A restore plans as this plan did, and reads the file list twice.
        store_requests: asked_already + plan.fetch_requests() + 2 * reader.manifest.file_list.len() as u64,
        wal_from_lsn: plan.wal_from,
        wal_to_lsn: plan.wal_to,
        timeline: plan.timeline(),
        reached_lsn: None,
        reached_commit: None,
        server_state: PLANNED.to_owned(),
        connection: None,
        copy_seconds: 0.0,
        replay_seconds: 0.0,
        estimated_seconds: expected.map(|expected| expected.seconds),
        estimated_from: expected.map(|expected| expected.basis.clone()),
        at_most: request.delta,
        wal_bytes: plan.wal_bytes(),
        wal_segments: plan.wal_segments(),
        notes: plan.notes.clone(),
    }
}

/// The server's own programs, if it is to be started.
fn programs(request: &RestoreRequest, reader: &BackupReader) -> Result<Option<PathBuf>, RestoreError> {
    if !request.start {
        return Ok(None);
    }
    let major = reader.manifest.server_version_num / 10_000;
    Ok(Some(instance::find_bin_dir(major, &request.bin_dirs)?))
}

/// Whom the restored server may let in: who owned the source's agent, its superuser, whoever runs this.
fn users() -> Vec<String> {
    let mut users = vec!["postgres".to_owned()];
    let own = std::env::var("PGUSER").or_else(|_| std::env::var("USER")).ok();
    users.extend(own.filter(|own| own != "postgres"));
    users
}

async fn control_file(reader: &BackupReader) -> Result<(u32, Vec<u8>), RestoreError> {
    let entry = &reader.manifest.control_file;
    let EntryKind::File { size, content: Content::Chunk(place), .. } = &entry.kind else {
        return Err(RestoreError::ControlSize { found: 0, expected: 8192 });
    };
    let content = reader.metadata(place).await?;
    if content.len() as u64 != *size {
        return Err(RestoreError::ControlSize { found: content.len(), expected: *size });
    }
    Ok((entry.mode, content))
}

/// The backup's tablespace map with the locations of this restore.
fn tablespace_map(reader: &BackupReader, destination: &Destination) -> Option<String> {
    let map = &reader.manifest.tablespace_map;
    (!map.is_empty()).then(|| recovery::tablespace_map(&String::from_utf8_lossy(map), &destination.tablespaces))
}

/// PostgreSQL's own manifest of the backup, so that pg_verifybackup can judge what was restored. Goes to disk as it grows:
/// with half a million relations it has a hundred megabytes.
pub(crate) async fn write_backup_manifest(
    reader: &BackupReader,
    system_id: SystemId,
    tablespace_map: Option<&str>,
    path: &Path,
    mode: u32,
) -> Result<(), RestoreError> {
    let manifest = &reader.manifest;
    let range =
        manifest_json::WalRange { timeline: manifest.wal.timeline, start: manifest.start_lsn, end: manifest.stop_lsn };
    let mut text =
        ManifestWriter::new(BufWriter::new(create_plain(path, mode)?), manifest.server_version_num / 10_000, system_id)
            .map_err(RestoreError::Manifest)?;
    for part in &manifest.file_list {
        for entry in reader.file_list_part(part).await? {
            if let EntryKind::File { size, crc32c, .. } = entry.kind {
                text.file(&entry.path, size, entry.mtime_us, crc32c).map_err(RestoreError::Manifest)?;
            }
        }
    }
    let texts =
        [("backup_label", Some(&manifest.backup_label[..])), ("tablespace_map", tablespace_map.map(str::as_bytes))];
    for (name, content) in texts.into_iter().filter_map(|(name, content)| Some((name, content?))) {
        text.file(name.as_bytes(), content.len() as u64, manifest.stopped_at_us, Some(checksum::crc32c(content)))
            .map_err(RestoreError::Manifest)?;
    }
    let control = &manifest.control_file;
    if let EntryKind::File { size, crc32c, .. } = control.kind {
        text.file(&control.path, size, control.mtime_us, crc32c).map_err(RestoreError::Manifest)?;
    }
    text.finish(&[range]).and_then(|mut out| out.flush()).map_err(RestoreError::Manifest)
}

/// Label, tablespace map, settings, signal file, and where `wal fetch` finds the archive; returns what to tell.
fn write_recovery(
    request: &RestoreRequest,
    plan: &RestorePlan,
    reader: &BackupReader,
    tablespace_map: Option<&str>,
    mode: DirectoryMode,
    bin_dir: Option<&Path>,
) -> Result<Vec<String>, RestoreError> {
    let (manifest, data_dir) = (&reader.manifest, &request.data_dir);
    let mut notes = Vec::new();
    let put = |name: &str, content: &[u8]| write_plain(&data_dir.join(name), content, mode.file());
    let source = source(request, plan);
    let source = serde_json::to_vec_pretty(&source).map_err(|e| RestoreError::Manifest(e.into()))?;
    write_plain(&data_dir.join(SOURCE_FILE), &source, 0o600)?;
    put("backup_label", &manifest.backup_label)?;
    if let Some(map) = tablespace_map {
        put("tablespace_map", map.as_bytes())?;
    }
    let mut settings = RecoverySettings {
        target: &plan.target,
        timeline: plan.timeline(),
        major: manifest.server_version_num / 10_000,
        program: &request.program,
        keep_archiving: request.keep_archiving,
        port: request.port,
        minimums: &manifest.recovery_settings,
        socket_dir: None,
    };
    match read_if_there(&data_dir.join("postgresql.conf"))? {
        Some(conf) => {
            if let Some(own) = recovery::without_data_directory(&conf) {
                put("postgresql.conf", &own)?;
                notes.push("data_directory in postgresql.conf names the source's: it was commented out".to_owned());
            }
        }
        None => {
            put("postgresql.conf", settings.minimal_conf().as_bytes())?;
            notes.push(
                "the source's postgresql.conf lies outside its data directory: a minimal one was written".to_owned(),
            );
        }
    }
    if !data_dir.join("pg_hba.conf").exists() {
        put("pg_hba.conf", recovery::MINIMAL_HBA.as_bytes())?;
        put("pg_ident.conf", b"")?;
        notes.push(
            "the source's pg_hba.conf lies outside its data directory: one for local users was written".to_owned(),
        );
    }
    let before = read_if_there(&data_dir.join("postgresql.auto.conf"))?.unwrap_or_default();
    put("postgresql.auto.conf", &settings.auto_conf(&before))?;
    put("recovery.signal", b"")?;
    // A standby's own backup brings it along, and it would keep the copy a standby for ever.
    let standby = data_dir.join("standby.signal");
    match std::fs::remove_file(&standby) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(WriteError::Io { operation: "remove", path: standby, source }.into());
        }
        _ => {}
    }
    if let Some(missing) = bin_dir.and_then(|bin_dir| missing_socket_dir(bin_dir, data_dir)) {
        settings.socket_dir = Some(PathBuf::from("/tmp"));
        put("postgresql.auto.conf", &settings.auto_conf(&before))?;
        notes.push(format!("unix_socket_directories {missing} cannot be used on this host: set to /tmp"));
    }
    if !request.keep_archiving {
        notes.push("archive_mode is off: the copy does not write into the original's archive".to_owned());
    }
    Ok(notes)
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, WriteError> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(WriteError::Io { operation: "read", path: path.to_owned(), source }),
    }
}

/// The configured socket directory, if no socket can be made there.
fn missing_socket_dir(bin_dir: &Path, data_dir: &Path) -> Option<String> {
    let output = std::process::Command::new(bin_dir.join("postgres"))
        .arg("-D")
        .arg(data_dir)
        .args(["-C", "unix_socket_directories"])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let first = text.split(',').next()?.trim().to_owned();
    if !output.status.success() || first.is_empty() || first.starts_with('@') {
        return None;
    }
    let writable = rustix::fs::access(&first, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK).is_ok();
    (!writable).then_some(first)
}

fn source(request: &RestoreRequest, plan: &RestorePlan) -> RestoreSource {
    let domain = request.cluster.domain();
    let hex = |bytes: &[u8; 32]| walfleet_repository::ids::Digest(*bytes).to_string();
    RestoreSource {
        version: 1,
        url: request.url.clone(),
        options: request.options.clone(),
        key_file: request.key_file.clone(),
        cluster: request.cluster.name().clone(),
        system_identifier: plan.backup.reference.wal.system_id.0,
        segment_bytes: plan.backup.reference.segment_size.bytes(),
        domain: domain.domain.to_string(),
        key_commitments: domain.commitments.iter().map(|(version, bytes)| (*version, hex(bytes))).collect(),
        timelines: plan
            .chain
            .iter()
            .map(|leg| SourceTimeline {
                timeline: leg.wal.timeline,
                branch: leg.wal.branch.to_string(),
                begins_lsn: leg.begins,
                needed_from_lsn: leg.from,
                needed_to_lsn: leg.to,
            })
            .collect(),
        read_ahead: READ_AHEAD.min(READ_AHEAD_BYTES / plan.backup.reference.segment_size.bytes()),
        needed_to_lsn: plan.wal_to,
        ends_there: plan.ends == PlanEnd::There,
    }
}
