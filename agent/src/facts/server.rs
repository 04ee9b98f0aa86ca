//! One instance, looked at: the server by SQL, its WAL folder, and put together with what else is known of it.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::{Lsn, Segment, Timeline};

use super::repository::RepositoryView;
use super::{ArchiveFacts, InstanceFacts, InstanceRole, StreamFacts, TablespaceFacts, unstreamed};
use crate::access::InstanceAccess;
use crate::archiving::Shipping;
use crate::identity::connect::chain;
use crate::postgres::control::{ClusterState, ControlFile};
use crate::postgres::instance::{self, Instance, InstanceError, InstanceState};
use crate::postgres::server::{KeptWal, Server, ServerFacts, ServerRole};
use crate::postgres::wal_record::{MOST_QUIET_BYTES, changes_nothing};
use crate::tasks::on_disk;

/// For one server's answers.
const SERVER_DEADLINE: Duration = Duration::from_secs(15);

/// What one look at an instance saw.
pub(super) struct Look {
    pub server: Result<ServerFacts, String>,
    /// Of our replication slot, if there is one.
    pub kept: Option<KeptWal>,
    pub files: PgWal,
    /// From PG_VERSION.
    pub major: Option<u32>,
}

pub(super) async fn look(instance: InstanceAccess, slot: String) -> Look {
    let files = pg_wal(&instance.data_dir).await;
    let data_dir = instance.data_dir.clone();
    let major = tokio::task::spawn_blocking(move || instance::inspect(&data_dir).ok().map(|found| found.major));
    let major = major.await.ok().flatten();
    let late = |_| Err(format!("the server did not answer within {} s", SERVER_DEADLINE.as_secs()));
    let data_dir = instance.data_dir.clone();
    let asked = tokio::time::timeout(SERVER_DEADLINE, ask(instance, &slot)).await.unwrap_or_else(late);
    let (server, kept) = match asked {
        Ok((server, kept)) => (Ok(server), kept),
        Err(problem) => (Err(problem), None),
    };
    let quiet_from = match &server {
        Ok(server) if server.role == ServerRole::Primary => quiet_from(data_dir, server).await,
        _ => None,
    };
    Look { server, kept, files: PgWal { quiet_from, ..files }, major }
}

/// Where the segment begins that a primary writes, if it has written nothing there that changes anything.
async fn quiet_from(data_dir: PathBuf, server: &ServerFacts) -> Option<Lsn> {
    let (size, timeline, system_id) = (server.wal_segment_size, server.timeline, server.system_id);
    let end = server.current_lsn;
    let segment = Segment { timeline, number: end.segment_number(size) };
    let start = segment.start(size);
    if end.0 - start.0 > MOST_QUIET_BYTES as u64 {
        return None;
    }
    let path = data_dir.join("pg_wal").join(segment.file_name(size));
    let is_quiet = on_disk(move || {
        // A segment that is switched to may not be there yet.
        let mut bytes = Vec::new();
        if let Ok(file) = std::fs::File::open(path) {
            file.take(end.0 - start.0).read_to_end(&mut bytes).ok()?;
        }
        changes_nothing(&bytes, (start, end), size, timeline, system_id).then_some(start)
    });
    is_quiet.await
}

/// Over a connection of its own: one that stayed open would keep a smart shutdown waiting for ever.
async fn ask(instance: InstanceAccess, slot: &str) -> Result<(ServerFacts, Option<KeptWal>), String> {
    let connection = instance.reach().await.map_err(|error| chain(&error))?;
    let server = Server::connect(&connection).await.map_err(|error| chain(&error))?;
    let facts = server.facts().await.map_err(|error| chain(&error))?;
    // Worth a word where it can be told, and no more.
    Ok((facts, server.kept_wal(slot).await.ok().flatten()))
}

/// server_version_num of servers that were asked, by process id and start: asking one means starting its program.
pub(super) type Versions = BTreeMap<(u32, i64), Option<u32>>;

/// Running servers of this host that no cluster is bound to. Nobody entrusted them to us, so nothing connects to them:
/// what their files and their program say must do.
pub(super) async fn strangers(owned: Vec<PathBuf>, versions: &mut Versions) -> Vec<InstanceFacts> {
    let known = std::mem::take(versions);
    let found = tokio::task::spawn_blocking(move || {
        let owned: Vec<PathBuf> = owned.into_iter().map(|path| std::fs::canonicalize(&path).unwrap_or(path)).collect();
        let mut found = instance::discover(&[]);
        found.retain(|(path, _)| !owned.contains(path));
        let mut asked = Versions::new();
        let facts = found.into_iter().map(|(path, found)| stranger(path, found, &known, &mut asked)).collect();
        (facts, asked)
    });
    let (facts, asked) = found.await.unwrap_or_default();
    *versions = asked;
    facts
}

fn stranger(
    data_dir: PathBuf,
    found: Result<Instance, InstanceError>,
    known: &Versions,
    asked: &mut Versions,
) -> InstanceFacts {
    let mut facts = blank(data_dir);
    match found {
        Ok(Instance { data_dir, major, state, .. }) => {
            facts.server_version_num = without_minor(major);
            if let InstanceState::Running(postmaster) = state {
                facts.port = postmaster.port;
                let key = (postmaster.pid, postmaster.started_at);
                let version = known.get(&key).copied().unwrap_or_else(|| instance::running_version(postmaster.pid));
                asked.insert(key, version);
                // Another release's program would be another server's.
                let version = version.filter(|version| version / 10_000 == major);
                facts.server_version_num = version.unwrap_or(facts.server_version_num);
                fill_from_control(&mut facts, &data_dir);
            }
            facts.problems.push("no cluster of the fleet is bound to this instance".into());
        }
        Err(error) => facts.problems.push(chain(&error)),
    }
    facts
}

/// server_version_num as far as PG_VERSION says it.
fn without_minor(major: u32) -> u32 {
    major.saturating_mul(10_000)
}

/// Of a server that runs: who it is, and what it is doing.
fn fill_from_control(facts: &mut InstanceFacts, data_dir: &Path) {
    let control = match ControlFile::read(data_dir) {
        Ok(control) => control,
        Err(error) => return facts.problems.push(chain(&error)),
    };
    facts.system_identifier = control.system_id.0;
    facts.timeline = control.timeline.0;
    facts.data_checksums = control.data_checksums;
    facts.role = match control.state {
        ClusterState::InProduction => InstanceRole::Primary,
        ClusterState::InArchiveRecovery => InstanceRole::Standby,
        // It starts, or ends.
        ClusterState::StartingUp
        | ClusterState::InCrashRecovery
        | ClusterState::ShuttingDown
        | ClusterState::ShutDown
        | ClusterState::ShutDownInRecovery => InstanceRole::Down,
    };
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
    pub major: Option<u32>,
    pub shipping: Option<&'a Shipping>,
    pub view: Option<RepositoryView>,
}

pub(super) fn assemble(cluster: &ClusterName, instance: &InstanceAccess, seen: Seen<'_>) -> InstanceFacts {
    let Seen { server, files, major, shipping, view } = seen;
    let view = view.unwrap_or_default();
    let durable = shipping.and_then(|shipping| durable(shipping, server.as_ref().ok().map(present)));
    let mut facts =
        InstanceFacts { cluster: Some(cluster.clone()), port: instance.port(), ..blank(instance.data_dir.clone()) };
    facts.archive = ArchiveFacts {
        quiet_from: files.quiet_from,
        ready_segments: files.ready_segments,
        pg_wal_bytes: files.bytes,
        pg_wal_free_bytes: files.free_bytes,
        last_error: shipping.and_then(|shipping| shipping.archived.last_error.clone()),
        durable_lsn: durable.map(|(_, lsn)| lsn),
        durable_timeline: durable.map(|(timeline, _)| timeline),
        durable_at: shipping.and_then(|shipping| shipping.archived.durable_at.max(shipping.streamed.durable_at)),
        stream: shipping.map(stream).unwrap_or_default(),
        ..ArchiveFacts::default()
    };
    facts.problems.extend(files.problem);
    match server {
        Ok(server) => fill(&mut facts, server, shipping),
        Err(problem) => {
            facts.server_version_num = major.map_or(0, without_minor);
            facts.problems.insert(0, problem);
        }
    }
    facts.problems.extend(view.problem);
    facts.cluster_bytes = view.backups.last().map_or(0, |backup| backup.cluster_bytes);
    facts.backups = view.backups;
    facts.windows = view.windows;
    facts
}

/// Up to where the WAL is stored that the server writes or replays now: of its own timeline, and not beyond its end, where only
/// what it wrote before it was rolled back can lie. Of one that does not answer, the newest timeline's.
fn durable(shipping: &Shipping, present: Option<(Timeline, Option<Lsn>)>) -> Option<(Timeline, Lsn)> {
    let is_its_own = |&(timeline, lsn): &(Timeline, Lsn)| {
        present.is_none_or(|(of, end)| timeline == of && end.is_none_or(|end| lsn <= end))
    };
    shipping.durable().filter(is_its_own).max()
}

/// Its timeline and the end of what it wrote; of a standby, which may have replayed less than is stored, only the first.
fn present(server: &ServerFacts) -> (Timeline, Option<Lsn>) {
    (server.timeline, (server.role == ServerRole::Primary).then_some(server.current_lsn))
}

fn stream(shipping: &Shipping) -> StreamFacts {
    let status = &shipping.streamed;
    StreamFacts {
        phase: status.phase.clone(),
        store_error: status.last_error.clone(),
        received_lsn: status.timeline.map(|_| status.received),
        complete_until: status.complete_until,
        pieces: status.pieces,
        segments: status.segments,
        piece_interval_ms: shipping.shipping.piece_interval.unwrap_or_default().as_millis(),
        synchronous: shipping.shipping.synchronous.unwrap_or_default(),
        spool: status.spool.clone(),
    }
}

fn fill(facts: &mut InstanceFacts, server: ServerFacts, shipping: Option<&Shipping>) {
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
    let last_segment = shipping.and_then(|shipping| shipping.archived.last_segment);
    facts.archive.last_segment = last_segment.map(|segment| segment.file_name(size));
    facts.archive.archive_command_set = server.archive.mode != "off" && server.archive.command.is_some();
    if let Some(archiver) = &server.archiver {
        facts.archive.failed_count = archiver.failed_count;
        if archiver.is_failing() && facts.archive.last_error.is_none() {
            let segment = archiver.last_failed.as_ref().map_or("a segment", |(name, _)| name.as_str());
            facts.archive.last_error = Some(format!("archive_command failed for {segment}; the server's log says why"));
        }
    }
    let streams = shipping.is_some_and(|shipping| shipping.streamed.phase.is_well());
    facts.problems.extend(crate::doctor::server_problems(
        &server,
        streams,
        shipping.map(|shipping| shipping.shipping).unwrap_or_default(),
    ));
    facts.problems.extend(shipping.and_then(|shipping| unstreamed::problem(&server, shipping, Instant::now())));
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
    /// Of those: a segment's, which of all files there is the largest, for each.
    pub ready_bytes: u64,
    bytes: u64,
    free_bytes: u64,
    quiet_from: Option<Lsn>,
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
    let (mut files, mut largest) = (PgWal::default(), 0);
    for entry in std::fs::read_dir(folder).map_err(|error| fail(folder, error))? {
        // Recycled and removed under our eyes: what is gone does not count.
        let Ok(meta) = entry.map_err(|error| fail(folder, error))?.metadata() else { continue };
        if meta.is_file() {
            files.bytes += meta.len();
            largest = meta.len().max(largest);
        }
    }
    let status = folder.join("archive_status");
    for entry in std::fs::read_dir(&status).map_err(|error| fail(&status, error))? {
        let name = entry.map_err(|error| fail(&status, error))?.file_name();
        files.ready_segments += u64::from(name.to_string_lossy().ends_with(".ready"));
    }
    files.ready_bytes = files.ready_segments.saturating_mul(largest);
    let space = rustix::fs::statvfs(folder).map_err(|error| fail(folder, error.into()))?;
    files.free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::test_server::{TestServer, oldest_and_newest};

    #[tokio::test]
    async fn a_running_server_of_no_cluster_shows_what_it_is_though_nothing_connects_to_it() {
        for installation in oldest_and_newest() {
            let server = TestServer::start(&installation, &[], "");
            let mut versions = Versions::new();
            let found = strangers(Vec::new(), &mut versions).await;
            let facts = found.iter().find(|facts| facts.data_dir == server.data_dir).expect("it runs");
            assert_eq!((facts.role, facts.port, facts.timeline), (InstanceRole::Primary, server.port, 1), "{facts:?}");
            assert_eq!(facts.system_identifier, ControlFile::read(&server.data_dir).unwrap().system_id.0);
            let version = facts.server_version_num;
            assert_eq!(version / 10_000, installation.major);
            assert!(version % 10_000 > 0 || installation.major > 18, "{version} has no minor number");
            assert!(versions.values().any(|asked| *asked == Some(version)), "it is not asked again");
            let owned = strangers(vec![server.data_dir.clone()], &mut versions).await;
            assert!(owned.iter().all(|facts| facts.data_dir != server.data_dir));
        }
    }

    #[test]
    fn what_is_stored_of_what_a_server_was_before_is_not_stored_of_what_it_is() {
        let mut shipping = Shipping::default();
        assert_eq!(durable(&shipping, None), None);
        shipping.archived.last_segment = Some(Segment { timeline: Timeline(1), number: 8 });
        shipping.archived.durable_lsn = Lsn(900);
        let present = |timeline, end| Some((Timeline(timeline), end));
        assert_eq!(durable(&shipping, None), Some((Timeline(1), Lsn(900))), "it is down");
        assert_eq!(durable(&shipping, present(2, Some(Lsn(500)))), None, "restored in place");
        assert_eq!(durable(&shipping, present(1, Some(Lsn(500)))), None, "rolled back");
        assert_eq!(durable(&shipping, present(1, None)), Some((Timeline(1), Lsn(900))), "a standby that replays");
        (shipping.streamed.timeline, shipping.streamed.durable) = (Some(Timeline(2)), Lsn(480));
        assert_eq!(durable(&shipping, present(2, Some(Lsn(500)))), Some((Timeline(2), Lsn(480))));
        (shipping.streamed.timeline, shipping.streamed.durable) = (Some(Timeline(1)), Lsn(480));
        assert_eq!(durable(&shipping, present(1, Some(Lsn(500)))), Some((Timeline(1), Lsn(480))));
        assert_eq!(durable(&shipping, present(1, Some(Lsn(900)))), Some((Timeline(1), Lsn(900))), "the farther one");
    }

    #[test]
    fn a_member_that_does_not_answer_has_the_version_of_its_files() {
        let instance = InstanceAccess { data_dir: "/data".into(), connection: None };
        let seen = |major| Seen {
            server: Err("it does not answer".into()),
            files: PgWal::default(),
            major,
            shipping: None,
            view: None,
        };
        let cluster = "orders".parse().unwrap();
        assert_eq!(assemble(&cluster, &instance, seen(Some(15))).server_version_num, 150_000);
        assert_eq!(assemble(&cluster, &instance, seen(None)).server_version_num, 0);
    }
}
