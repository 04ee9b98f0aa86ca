//! The agent as a process: what runs, what is restarted, and in which order it ends.
//!
//! | task | does | if it fails | at the end |
//! |---|---|---|---|
//! | `socket` | answers `wal push` | restarted; Postgres keeps the WAL and asks again | 2nd: answers given are durable, the rest is asked again |
//! | `jobs` | runs offers | a job's failure is its outcome | 1st: no more offers, what runs is cancelled and journalled |
//! | `link` | the controller's stream | dials again by itself | 3rd: says the last outcomes |
//! | `renewal` | keeps the certificate | restarted | with the rest |
//! | `grants` | wraps clusters' keys for other hosts | restarted | with the rest |
//! | `facts` | looks at instances and repositories | restarted | with the rest |
//! | `metrics` | serves Prometheus | restarted | with the rest |
//!
//! None waits for another: archiving goes on without controller, facts without repository, jobs without link.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::access::{Access, HostKey};
use crate::archiving::Archiving;
use crate::config::Config;
use crate::desired::DesiredStore;
use crate::durable;
use crate::facts::{Facts, collect};
use crate::failure::{ExitCode, Failure, Remedy};
use crate::identity::{Identity, IdentityFolder, renew};
use crate::jobs::Jobs;
use crate::jobs::order::WorkKind;
use crate::jobs::work::HostWork;
use crate::journal::Journal;
use crate::link::{Link, LinkState};
use crate::metrics::{Metrics, Scrape};
use crate::wal;
use crate::wal::ship::ShipOptions;

mod bound;
mod service_manager;
mod state_lock;
mod supervise;

use supervise::Tasks;

/// How long a cancelled job may take to abort its session; what takes longer is reported as interrupted at the next
/// start. With the two below it stays under the unit's TimeoutStopSec.
const JOBS_DEADLINE: Duration = Duration::from_secs(20);
const SOCKET_DEADLINE: Duration = Duration::from_secs(12);
const REST_DEADLINE: Duration = Duration::from_secs(5);

/// Who this host is in a fleet; absent on a host without a controller.
struct Membership {
    controller: String,
    folder: IdentityFolder,
    identity: watch::Sender<Arc<Identity>>,
    desired: Arc<DesiredStore>,
}

/// Runs until told to stop by a signal.
pub async fn run(config: Config) -> Result<(), Failure> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    durable::make_folder(&config.state_dir).map_err(local)?;
    let _lock = state_lock::take(&config.state_dir).map_err(local)?;
    let config = Arc::new(config);
    let (access, membership) = prepare(&config)?;
    let signals = Signals::new().map_err(local)?;

    let metrics = Metrics::new();
    let archiving = Arc::new(Archiving::new(access.subscribe(), ship_options(&config)));
    let work = HostWork::new(Arc::clone(&config), access.subscribe(), Arc::clone(&archiving));
    let journal = Journal::open(&config.state_dir.join("jobs"), Timestamp::now()).map_err(local)?;
    let jobs = Jobs::new(journal, Arc::new(work), Arc::clone(&metrics) as _);

    let tasks = Tasks::new();
    let (socket_stop, link_stop, rest_stop) =
        (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
    spawn_socket(&tasks, &socket_stop, &config, &archiving);
    let facts = spawn_facts(&tasks, &rest_stop, &config, &access, &archiving, &jobs);
    let link = watch::Sender::new(LinkState::Connecting);
    let expiry: Box<dyn Fn() -> Option<Timestamp> + Send + Sync> = match &membership {
        Some(membership) => {
            let identity = membership.identity.subscribe();
            Box::new(move || Some(identity.borrow().not_after()))
        }
        None => Box::new(|| None),
    };
    let scrape = Arc::new(Scrape {
        metrics,
        jobs: Arc::clone(&jobs),
        link: link.subscribe(),
        certificate_expiry: expiry,
        shipping: Box::new(move || archiving.statuses()),
        facts: facts.clone(),
    });
    spawn_metrics(&tasks, &rest_stop, &config, scrape);
    let grants = access.subscribe();
    tasks.spawn("grants", &rest_stop, move |stop| {
        let access = grants.clone();
        async move {
            crate::access::grant::keep_granted(access, stop).await;
            Ok(())
        }
    });
    if let Some(membership) = membership {
        spawn_membership(&tasks, (&link_stop, &rest_stop), &config, membership, access, &jobs, facts, link);
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), state_dir = %config.state_dir.display(),
        socket = %config.socket_path().display(), "the agent runs");
    service_manager::notify("READY=1");

    let reason = signals.wait().await;
    tracing::info!(reason, "stopping");
    service_manager::notify("STOPPING=1");
    // Jobs first, while the link still stands to say how they ended.
    let stragglers = jobs.stop(JOBS_DEADLINE).await;
    if !stragglers.is_empty() {
        tracing::warn!(?stragglers, "jobs did not stop in time; the next start reports them as interrupted");
    }
    socket_stop.cancel();
    tasks.wait(&["socket"], SOCKET_DEADLINE).await;
    link_stop.cancel();
    rest_stop.cancel();
    tasks.wait(&[], REST_DEADLINE).await;
    tracing::info!("stopped");
    Ok(())
}

/// What the agent may use from the start: fixed on a host of its own, kept up to date in a fleet.
fn prepare(config: &Config) -> Result<(watch::Sender<Option<Arc<Access>>>, Option<Membership>), Failure> {
    let usage = |error| Failure::new("configuration", ExitCode::Usage, Remedy::Operator, error);
    if let Some(repository) = &config.repository {
        let key = HostKey::read(&repository.key_file)
            .map_err(|error| Failure::new("key_file.unusable", ExitCode::Failed, Remedy::Operator, error))?;
        let member = config.agent_name().map_err(|error| usage(error.to_string()))?;
        let access = Access::standalone(config, member, repository, key);
        return Ok((watch::Sender::new(Some(Arc::new(access))), None));
    }
    let Some(controller) = &config.controller else {
        return Err(usage(
            "the configuration names neither a controller nor a repository\nHINT: deploy/agent.yaml shows both.".into(),
        ));
    };
    let folder = IdentityFolder::new(&config.state_dir);
    let identity =
        folder.load().map_err(|error| Failure::new("identity", ExitCode::Failed, Remedy::Operator, error))?;
    tracing::info!(name = identity.name(), until = %identity.not_after(), "enrolled");
    let desired = Arc::new(DesiredStore::open(&config.state_dir).map_err(local)?);
    let membership = Membership {
        controller: controller.url.clone(),
        folder,
        identity: watch::Sender::new(Arc::new(identity)),
        desired,
    };
    let access = watch::Sender::new(None);
    bound::bind_once(config, &membership, &access);
    Ok((access, Some(membership)))
}

/// As the configuration has it.
pub fn ship_options(config: &Config) -> ShipOptions {
    ShipOptions { parallel: config.wal.parallel_uploads as usize, read_ahead: config.wal.read_ahead_segments as usize }
}

fn spawn_socket(tasks: &Tasks, stop: &CancellationToken, config: &Config, archiving: &Arc<Archiving>) {
    let (path, archiving) = (config.socket_path(), Arc::clone(archiving));
    tasks.spawn("socket", stop, move |stop| {
        let (path, archiving) = (path.clone(), Arc::clone(&archiving));
        async move { wal::serve(&path, archiving, stop).await.map_err(|error| format!("{}: {error}", path.display())) }
    });
}

fn spawn_facts(
    tasks: &Tasks,
    stop: &CancellationToken,
    config: &Arc<Config>,
    access: &watch::Sender<Option<Arc<Access>>>,
    archiving: &Arc<Archiving>,
    jobs: &Arc<Jobs>,
) -> watch::Receiver<Arc<Facts>> {
    let (sender, receiver) = watch::channel(Arc::new(Facts::none()));
    let collector = Arc::new(collect::Collector {
        config: Arc::clone(config),
        access: access.subscribe(),
        archiving: Arc::clone(archiving),
        jobs: Arc::clone(jobs),
        facts: sender,
    });
    tasks.spawn("facts", stop, move |stop| {
        let collector = Arc::clone(&collector);
        async move {
            collector.run(stop).await;
            Ok(())
        }
    });
    receiver
}

fn spawn_metrics(tasks: &Tasks, stop: &CancellationToken, config: &Config, scrape: Arc<Scrape>) {
    let Some(listen) = config.metrics.listen else { return };
    tasks.spawn("metrics", stop, move |stop| {
        let scrape = Arc::clone(&scrape);
        async move {
            crate::metrics::serve(listen, scrape, stop).await.map_err(|error| format!("listen on {listen}: {error}"))
        }
    });
}

#[expect(clippy::too_many_arguments, reason = "each is another part of the agent that the link joins")]
fn spawn_membership(
    tasks: &Tasks,
    (link_stop, rest_stop): (&CancellationToken, &CancellationToken),
    config: &Arc<Config>,
    membership: Membership,
    access: watch::Sender<Option<Arc<Access>>>,
    jobs: &Arc<Jobs>,
    facts: watch::Receiver<Arc<Facts>>,
    state: watch::Sender<LinkState>,
) {
    let incarnation = format!("{:016x}", rand::random::<u64>());
    let link = Link {
        controller: membership.controller.clone(),
        identity: membership.identity.subscribe(),
        jobs: Arc::clone(jobs),
        facts,
        desired: Arc::clone(&membership.desired),
        labels: config.labels.clone(),
        capabilities: WorkKind::ALL.iter().map(|kind| kind.name()).collect(),
        incarnation,
        state,
    };
    tasks.spawn("link", link_stop, move |stop| {
        let link = link.clone();
        async move {
            link.run(stop).await;
            Ok(())
        }
    });
    let (folder, identity, controller) =
        (membership.folder.clone(), membership.identity.clone(), membership.controller.clone());
    tasks.spawn("renewal", rest_stop, move |stop| {
        let (folder, identity, controller) = (folder.clone(), identity.clone(), controller.clone());
        async move {
            renew::keep_renewed(folder, identity, controller, stop).await;
            Ok(())
        }
    });
    let (config, membership, access) = (Arc::clone(config), Arc::new(membership), Arc::new(access));
    tasks.spawn("bindings", rest_stop, move |stop| {
        let (config, membership, access) = (Arc::clone(&config), Arc::clone(&membership), Arc::clone(&access));
        async move {
            bound::keep_bound(&config, &membership, &access, stop).await;
            Ok(())
        }
    });
}

/// SIGTERM from the service manager, SIGINT from a terminal.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

fn local(error: impl std::fmt::Display) -> Failure {
    Failure::new("agent.state", ExitCode::Failed, Remedy::Operator, error)
}

/// For doctor: whether an agent holds the state folder.
pub fn is_running(state_dir: &Path) -> bool {
    state_lock::is_held(state_dir)
}
