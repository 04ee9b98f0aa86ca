//! One instance, looked at: the server by SQL, its WAL folder, and put together with what else is known of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use walfleet_repository::ids::ClusterName;

use super::repository::RepositoryView;
use super::{ArchiveFacts, InstanceFacts, InstanceRole, TablespaceFacts};
use crate::access::InstanceAccess;
use crate::identity::connect::chain;
use crate::postgres::instance::{self, Instance, InstanceError, InstanceState};
use crate::postgres::server::{Server, ServerFacts, ServerRole};
use crate::wal::ship::ShipStatus;

/// For one server's answers.
const SERVER_DEADLINE: Duration = Duration::from_secs(15);

/// What one look at an instance saw.
pub(super) struct Look {
    pub server: Result<ServerFacts, String>,
    pub files: PgWal,
}

pub(super) async fn look(instance: InstanceAccess) -> Look {
    let files = pg_wal(&instance.data_dir).await;
    let late = |_| Err(format!("the server did not answer within {} s", SERVER_DEADLINE.as_secs()));
    let server = tokio::time::timeout(SERVER_DEADLINE, ask(instance)).await.unwrap_or_else(late);
    Look { server, files }
}

/// Over a connection of its own: one that stayed open would keep a smart shutdown waiting for ever.
async fn ask(instance: InstanceAccess) -> Result<ServerFacts, String> {
    let found = tokio::task::spawn_blocking(move || instance.connection_string()).await;
    let connection = found.map_err(|error| error.to_string())?.map_err(|error| chain(&error))?;
    let server = Server::connect(&connection).await.map_err(|error| chain(&error))?;
    server.facts().await.map_err(|error| chain(&error))
}

/// Running servers of this host that no cluster is bound to.
pub(super) async fn strangers(owned: Vec<PathBuf>) -> Vec<InstanceFacts> {
    let found = tokio::task::spawn_blocking(move || {
        let owned: Vec<PathBuf> = owned.into_iter().map(|path| std::fs::canonicalize(&path).unwrap_or(path)).collect();
        let mut found = instance::discover(&[]);
        found.retain(|(path, _)| !owned.contains(path));
        found
    });
    let found = found.await.unwrap_or_default();
    found.into_iter().map(|(path, found)| stranger(path, found)).collect()
}

fn stranger(data_dir: PathBuf, found: Result<Instance, InstanceError>) -> InstanceFacts {
    let mut facts = blank(data_dir);
    match found {
        Ok(Instance { major, state, .. }) => {
            // server_version_num without its minor part, which PG_VERSION does not say.
            facts.server_version_num = major.saturating_mul(10_000);
            if let InstanceState::Running(postmaster) = state {
                facts.port = postmaster.port;
            }
            facts.problems.push("no cluster of the fleet is bound to this instance".into());
        }
        Err(error) => facts.problems.push(chain(&error)),
    }
    facts
}

fn blank(data_dir: PathBuf) -> InstanceFacts {
    InstanceFacts {
        cluster: None,
        system_identifier: 0,
        server_version_num: 0,
        role: InstanceRole::Down,
        data_dir,
        port: 0,
        timeline: 0,
        current_lsn: None,
        cluster_bytes: 0,
        data_checksums: false,
        archive: ArchiveFacts::default(),
        windows: Vec::new(),
        backups: Vec::new(),
        problems: Vec::new(),
        tablespaces: Vec::new(),
    }
}

/// Everything that is known of an instance.
pub(super) struct Seen<'a> {
    pub server: Result<ServerFacts, String>,
    pub files: PgWal,
    pub shipping: Option<&'a ShipStatus>,
    pub view: Option<RepositoryView>,
}

pub(super) fn assemble(cluster: &ClusterName, instance: &InstanceAccess, seen: Seen<'_>) -> InstanceFacts {
    let Seen { server, files, shipping, view } = seen;
    let view = view.unwrap_or_default();
    let mut facts =
        InstanceFacts { cluster: Some(cluster.clone()), port: instance.port(), ..blank(instance.data_dir.clone()) };
    facts.archive = ArchiveFacts {
        ready_segments: files.ready_segments,
        pg_wal_bytes: files.bytes,
        pg_wal_free_bytes: files.free_bytes,
        last_error: shipping.and_then(|status| status.last_error.clone()),
        durable_lsn: shipping.filter(|status| status.durable_at.is_some()).map(|status| status.durable_lsn),
        durable_at: shipping.and_then(|status| status.durable_at),
        ..ArchiveFacts::default()
    };
    facts.problems.extend(files.problem);
    match server {
        Ok(server) => fill(&mut facts, server, shipping),
        Err(problem) => facts.problems.insert(0, problem),
    }
    facts.problems.extend(view.problem);
    facts.cluster_bytes = view.backups.last().map_or(0, |backup| backup.cluster_bytes);
    facts.backups = view.backups;
    facts.windows = view.windows;
    facts
}

fn fill(facts: &mut InstanceFacts, server: ServerFacts, shipping: Option<&ShipStatus>) {
    facts.system_identifier = server.system_id.0;
    facts.server_version_num = server.version_num;
    facts.role = match server.role {
        ServerRole::Primary => InstanceRole::Primary,
        ServerRole::Standby => InstanceRole::Standby,
    };
    facts.timeline = server.timeline.0;
    facts.current_lsn = Some(server.current_lsn);
    facts.data_checksums = server.data_checksums;
    let size = server.wal_segment_size;
    facts.archive.last_segment = shipping.and_then(|status| status.last_segment).map(|segment| segment.file_name(size));
    facts.archive.archive_command_set = server.archive.mode != "off" && server.archive.command.is_some();
    if let Some(archiver) = &server.archiver {
        facts.archive.failed_count = archiver.failed_count;
        if archiver.is_failing() && facts.archive.last_error.is_none() {
            let segment = archiver.last_failed.as_ref().map_or("a segment", |(name, _)| name.as_str());
            facts.archive.last_error = Some(format!("archive_command failed for {segment}; the server's log says why"));
        }
    }
    facts.problems.extend(crate::doctor::server_problems(&server));
    facts.tablespaces = server
        .tablespaces
        .into_iter()
        .filter(|tablespace| !tablespace.location.as_os_str().is_empty())
        .map(|tablespace| TablespaceFacts { oid: tablespace.oid, name: tablespace.name, location: tablespace.location })
        .collect();
}

/// What the file system says of pg_wal.
#[derive(Default)]
pub(super) struct PgWal {
    ready_segments: u64,
    bytes: u64,
    free_bytes: u64,
    problem: Option<String>,
}

async fn pg_wal(data_dir: &Path) -> PgWal {
    let folder = data_dir.join("pg_wal");
    let counted = tokio::task::spawn_blocking(move || count(&folder)).await;
    match counted {
        Ok(Ok(files)) => files,
        Ok(Err(problem)) => PgWal { problem: Some(problem), ..PgWal::default() },
        Err(panic) => PgWal { problem: Some(panic.to_string()), ..PgWal::default() },
    }
}

fn count(folder: &Path) -> Result<PgWal, String> {
    let fail = |path: &Path, error: std::io::Error| format!("read {}: {error}", path.display());
    let mut files = PgWal::default();
    for entry in std::fs::read_dir(folder).map_err(|error| fail(folder, error))? {
        // Recycled and removed under our eyes: what is gone does not count.
        let Ok(meta) = entry.map_err(|error| fail(folder, error))?.metadata() else { continue };
        if meta.is_file() {
            files.bytes += meta.len();
        }
    }
    let status = folder.join("archive_status");
    for entry in std::fs::read_dir(&status).map_err(|error| fail(&status, error))? {
        let name = entry.map_err(|error| fail(&status, error))?.file_name();
        files.ready_segments += u64::from(name.to_string_lossy().ends_with(".ready"));
    }
    let space = rustix::fs::statvfs(folder).map_err(|error| fail(folder, error.into()))?;
    files.free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
    Ok(files)
}
