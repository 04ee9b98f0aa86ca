//! Looking: at the servers of this host every few seconds, at what the repositories hold of them every minute or so and
//! after each job. The two do not wait for each other, and no instance waits for another.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use walfleet_repository::ids::ClusterName;

use super::repository::{ClusterWatch, RepositoryView};
use super::{ArchiveFacts, Facts, InstanceFacts, InstanceRole, TablespaceFacts};
use crate::access::{Access, AccessError, ClusterAccess, InstanceAccess};
use crate::archiving::Archiving;
use crate::config::Config;
use crate::identity::connect::chain;
use crate::jobs::Jobs;
use crate::postgres::instance::{self, Instance, InstanceError, InstanceState};
use crate::postgres::server::{Server, ServerFacts, ServerRole};
use crate::wal::ship::ShipStatus;

/// The controller's own interval is longer; this is how soon a change of role or a failing archiver is noticed.
const SERVERS: Duration = Duration::from_secs(10);

/// Between two looks at repositories: see [`pause`].
const REPOSITORIES: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(900);

/// For one server's answers, and for one repository's.
const SERVER_DEADLINE: Duration = Duration::from_secs(15);
const REPOSITORY_DEADLINE: Duration = Duration::from_secs(120);

/// Looks, and publishes what it saw.
pub struct Collector {
    pub config: Arc<Config>,
    pub access: watch::Receiver<Option<Arc<Access>>>,
    pub archiving: Arc<Archiving>,
    pub jobs: Arc<Jobs>,
    pub facts: watch::Sender<Arc<Facts>>,
}

type Views = Mutex<BTreeMap<ClusterName, RepositoryView>>;

/// Connections kept between looks.
type Servers = HashMap<ClusterName, (String, Server)>;

impl Collector {
    /// Looks until told to stop; nothing is unknown then, since it only reads.
    pub async fn run(&self, stop: CancellationToken) {
        let views = Views::default();
        let looking = async { tokio::join!(self.look_at_servers(&views), self.look_at_repositories(&views)) };
        tokio::select! {
            () = stop.cancelled() => {}
            _ = looking => {}
        }
    }

    async fn look_at_servers(&self, views: &Views) {
        let mut access = self.access.clone();
        let mut servers = Servers::new();
        loop {
            let present = access.borrow_and_update().clone();
            if let Some(present) = present {
                let instances = self.instances(&present, &mut servers, views).await;
                self.facts.send_replace(Arc::new(Facts { at: Timestamp::now(), instances }));
            }
            tokio::select! {
                () = tokio::time::sleep(SERVERS) => {}
                changed = access.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn look_at_repositories(&self, views: &Views) {
        let (mut access, mut ends) = (self.access.clone(), self.jobs.ends());
        let mut watches = Watches::new();
        loop {
            let present = access.borrow_and_update().clone();
            let mut requests = 0;
            if let Some(present) = present {
                requests = look_at_clusters(present, &mut watches, views).await;
            }
            tokio::select! {
                () = tokio::time::sleep(pause(requests)) => {}
                changed = access.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // Keys, certificates or places may have changed.
                    watches.clear();
                }
                _ = ends.changed() => {}
            }
        }
    }

    async fn instances(&self, access: &Access, servers: &mut Servers, views: &Views) -> Vec<InstanceFacts> {
        let shipping: BTreeMap<_, _> = self.archiving.statuses().into_iter().collect();
        servers.retain(|cluster, _| access.clusters.contains_key(cluster));
        let members: Vec<(ClusterAccess, InstanceAccess)> =
            access.clusters.values().filter_map(|cluster| Some((cluster.clone(), cluster.instance.clone()?))).collect();
        let looks: Vec<_> = members
            .iter()
            .map(|(cluster, instance)| look_at_instance(instance.clone(), servers.remove(&cluster.name)))
            .collect();
        let mut instances = Vec::new();
        for ((cluster, instance), look) in members.iter().zip(join_all(looks).await) {
            if let Some(connected) = look.connected {
                servers.insert(cluster.name.clone(), connected);
            }
            let view = views.lock().unwrap_or_else(PoisonError::into_inner).get(&cluster.name).cloned();
            instances.push(assemble(cluster, instance, look.server, look.files, shipping.get(&cluster.name), view));
        }
        let owned = members.into_iter().map(|(_, instance)| instance.data_dir).collect();
        instances.extend(strangers(Arc::clone(&self.config), owned).await);
        instances
    }
}

/// Clusters opened before, by name.
type Watches = HashMap<ClusterName, ClusterWatch>;

/// Looks at every cluster that lives here, all at once; returns what it cost.
async fn look_at_clusters(access: Arc<Access>, watches: &mut Watches, views: &Views) -> u64 {
    let members: Vec<ClusterAccess> =
        access.clusters.values().filter(|cluster| cluster.instance.is_some()).cloned().collect();
    let looks: Vec<_> = members
        .into_iter()
        .map(|cluster| {
            let watch = watches.remove(&cluster.name);
            look_at_cluster(Arc::clone(&access), cluster, watch)
        })
        .collect();
    let mut requests: u64 = 0;
    for (cluster, watch, looked) in join_all(looks).await {
        if let Some(watch) = watch {
            watches.insert(cluster.clone(), watch);
        }
        let mut views = views.lock().unwrap_or_else(PoisonError::into_inner);
        let former = views.entry(cluster).or_default();
        match looked {
            Ok(view) => {
                requests = requests.saturating_add(view.requests);
                *former = view;
            }
            // What was last seen stays, with its own time beside it.
            Err(problem) => former.problem = Some(problem),
        }
    }
    requests
}

type ClusterLook = (ClusterName, Option<ClusterWatch>, Result<RepositoryView, String>);

async fn look_at_cluster(access: Arc<Access>, cluster: ClusterAccess, watch: Option<ClusterWatch>) -> ClusterLook {
    let looking = async {
        let watch = match watch {
            Some(watch) => Some(watch),
            None => ClusterWatch::open(&access, &cluster).await?,
        };
        let Some(mut watch) = watch else { return Ok((None, RepositoryView::default())) };
        let view = watch.look().await?;
        Ok::<_, AccessError>((Some(watch), view))
    };
    let name = cluster.name.clone();
    match tokio::time::timeout(REPOSITORY_DEADLINE, looking).await {
        Ok(Ok((watch, view))) => (name, watch, Ok(view)),
        Ok(Err(error)) => (name, None, Err(chain(&error))),
        Err(_) => {
            let seconds = REPOSITORY_DEADLINE.as_secs();
            (name, None, Err(format!("repository {}: no answer within {seconds} s", cluster.repository.name)))
        }
    }
}

/// Until the next look: the more requests one takes, the more seldom. A cluster with a hundred thousand segments costs
/// some hundred requests a look, and so at most 1200 an hour; requests are money at most stores.
fn pause(requests: u64) -> Duration {
    Duration::from_secs(requests.saturating_mul(3)).clamp(REPOSITORIES, LONGEST_PAUSE)
}

/// What one look at an instance saw.
struct Look {
    server: Result<ServerFacts, String>,
    /// For the next look.
    connected: Option<(String, Server)>,
    files: PgWal,
}

async fn look_at_instance(instance: InstanceAccess, known: Option<(String, Server)>) -> Look {
    let files = pg_wal(&instance.data_dir).await;
    let asked = tokio::time::timeout(SERVER_DEADLINE, ask(instance, known)).await;
    // A connection that did not answer is dropped.
    let late = || Err(format!("the server did not answer within {} s", SERVER_DEADLINE.as_secs()));
    match asked.unwrap_or_else(|_| late()) {
        Ok((connection, server, facts)) => Look { server: Ok(facts), connected: Some((connection, server)), files },
        Err(problem) => Look { server: Err(problem), connected: None, files },
    }
}

async fn ask(
    instance: InstanceAccess,
    known: Option<(String, Server)>,
) -> Result<(String, Server, ServerFacts), String> {
    let found = tokio::task::spawn_blocking(move || instance.connection_string()).await;
    let connection = found.map_err(|error| error.to_string())?.map_err(|error| chain(&error))?;
    let server = match known {
        Some((former, server)) if former == connection && server.is_connected() => server,
        _ => Server::connect(&connection).await.map_err(|error| chain(&error))?,
    };
    let facts = server.facts().await.map_err(|error| chain(&error))?;
    Ok((connection, server, facts))
}

/// Instances of this host that no cluster of the access owns: configured, or found running.
async fn strangers(config: Arc<Config>, owned: Vec<PathBuf>) -> Vec<InstanceFacts> {
    let configured: Vec<PathBuf> = config.instances.iter().map(|instance| instance.data_dir.clone()).collect();
    let found = tokio::task::spawn_blocking(move || {
        let owned: Vec<PathBuf> = owned.into_iter().map(|path| std::fs::canonicalize(&path).unwrap_or(path)).collect();
        let mut found = instance::discover(&configured);
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

fn assemble(
    cluster: &ClusterAccess,
    instance: &InstanceAccess,
    seen: Result<ServerFacts, String>,
    files: PgWal,
    shipping: Option<&ShipStatus>,
    view: Option<RepositoryView>,
) -> InstanceFacts {
    let view = view.unwrap_or_default();
    let mut facts = InstanceFacts {
        cluster: Some(cluster.name.clone()),
        port: instance.port(),
        ..blank(instance.data_dir.clone())
    };
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
    match seen {
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
struct PgWal {
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
