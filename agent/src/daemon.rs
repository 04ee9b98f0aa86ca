//! The agent as a process: what runs, what is restarted, and in which order it ends.
//!
//! | task | does | if it fails | at the end |
//! |---|---|---|---|
//! | `socket` | answers `wal push` | restarted; Postgres keeps the WAL and asks again | 2nd: answers given are durable, the rest is asked again |
//! | `streaming` | receives WAL over the replication protocol | restarted; the slot keeps the WAL | with the rest: what was received is stored first |
//! | `spool` | keeps other hosts' WAL | restarted; theirs is on disk, and they wait for the repository meanwhile | with the rest |
//! | `left` | stores what a host that is gone left in the spool | restarted | with the rest |
//! | `jobs` | runs offers | a job's failure is its outcome | 1st: no more offers, what runs is cancelled and journalled |
//! | `link` | the controller's stream | dials again by itself | 3rd: says the last outcomes |
//! | `renewal` | keeps the certificate | restarted | with the rest |
//! | `bindings` | works out what the host may use | restarted | with the rest |
//! | `grants` | wraps clusters' keys for other hosts | restarted | with the rest |
//! | `facts` | looks at instances and repositories | restarted | with the rest |
//! | `metrics` | serves Prometheus | restarted | with the rest |
//!
//! None waits for another: archiving goes on without controller, facts without repository, jobs without link.

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
use crate::identity::{Identity, IdentityError, IdentityFolder, renew};
use crate::jobs::Jobs;
use crate::jobs::order::WorkKind;
use crate::jobs::work::HostWork;
use crate::journal::Journal;
use crate::limits::HostLimits;
use crate::link::{Link, LinkState};
use crate::metrics::{Metrics, Scrape};
use crate::spool::files::Spools;
use crate::spool::{self, Spool};
use crate::streaming::Streaming;
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
    /// That the desired state tells of, too.
    limits: Arc<HostLimits>,
    spool: Arc<Spool>,
}

type AccessSender = watch::Sender<Option<Arc<Access>>>;

/// The agent's parts, for the time it runs.
struct Agent {
    config: Arc<Config>,
    access: Arc<AccessSender>,
    jobs: Arc<Jobs>,
    archiving: Arc<Archiving>,
    facts: watch::Sender<Arc<Facts>>,
    link: watch::Sender<LinkState>,
    tasks: Tasks,
    socket_stop: CancellationToken,
    link_stop: CancellationToken,
    rest_stop: CancellationToken,
}

/// Runs until told to stop by a signal.
pub async fn run(config: Config) -> Result<(), Failure> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    durable::make_folder(&config.state_dir).map_err(local)?;
    let _lock = state_lock::take(&config.state_dir).map_err(local)?;
    let config = Arc::new(config);
    let limits = HostLimits::new(config.limits);
    let (access, membership) = prepare(&config, &limits)?;
    let signals = Signals::new().map_err(local)?;

    let metrics = Metrics::new();
    let state_dir = config.state_dir.clone();
    let archiving = Archiving::new(access.subscribe(), ship_options(&config), Arc::clone(&limits), state_dir);
    let archiving = Arc::new(archiving);
    let work = HostWork::new(Arc::clone(&config), access.subscribe(), Arc::clone(&archiving), limits);
    let work = work.map_err(|error| local(format!("start the threads of jobs: {error}")))?;
    let journal = Journal::open(&config.state_dir.join("jobs"), Timestamp::now()).map_err(local)?;
    let jobs = Jobs::new(journal, Arc::new(work), Arc::clone(&metrics) as _);
    let agent = Agent {
        config,
        access: Arc::new(access),
        jobs,
        archiving,
        facts: watch::Sender::new(Arc::new(Facts::none())),
        link: watch::Sender::new(LinkState::Connecting),
        tasks: Tasks::new(),
        socket_stop: CancellationToken::new(),
        link_stop: CancellationToken::new(),
        rest_stop: CancellationToken::new(),
    };
    agent.spawn_socket();
    agent.spawn_streaming(membership.as_ref());
    agent.spawn_facts();
    agent.spawn_grants();
    agent.spawn_metrics(metrics, membership.as_ref());
    if let Some(membership) = membership {
        agent.spawn_membership(membership);
    }
    let (version, config) = (env!("CARGO_PKG_VERSION"), &agent.config);
    let (state_dir, socket) = (config.state_dir.display(), config.socket_path());
    tracing::info!(version, %state_dir, socket = %socket.display(), "the agent runs");
    service_manager::notify("READY=1");

    let reason = signals.wait().await;
    tracing::info!(reason, "stopping");
    service_manager::notify("STOPPING=1");
    agent.stop().await;
    Ok(())
}

/// What the agent may use from the start: fixed on a host of its own, kept up to date in a fleet.
fn prepare(config: &Config, limits: &Arc<HostLimits>) -> Result<(AccessSender, Option<Membership>), Failure> {
    let usage = |error| Failure::new("configuration", ExitCode::Usage, Remedy::Operator, error);
    if let Some(repository) = &config.repository {
        let key = HostKey::read(&repository.key_file)
            .map_err(|error| Failure::new("key_file.unusable", ExitCode::Usage, Remedy::Operator, error))?;
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
    let identity = folder.load().map_err(not_a_member)?;
    tracing::info!(name = identity.name(), until = %identity.not_after(), "enrolled");
    let desired = Arc::new(DesiredStore::open(&config.state_dir).map_err(local)?);
    let (access, identity) = (watch::Sender::new(None), watch::Sender::new(Arc::new(identity)));
    let most_bytes = u64::from(config.spool.size_mib) << 20;
    let spools = Spools::open(config.state_dir.join("spool"), most_bytes).map_err(local)?;
    let membership = Membership {
        controller: controller.url.clone(),
        folder,
        desired,
        limits: Arc::clone(limits),
        spool: Arc::new(Spool { spools, access: access.subscribe(), identity: identity.subscribe() }),
        identity,
    };
    bound::bind_once(config, &membership, &access);
    Ok((access, Some(membership)))
}

/// A host that did not join, or whose keys do not read, will be no member in two seconds either: the unit does not
/// restart after a usage error.
fn not_a_member(error: IdentityError) -> Failure {
    let exit = match &error {
        IdentityError::NotEnrolled { .. } | IdentityError::KeyFile(_) | IdentityError::Certificate { .. } => {
            ExitCode::Usage
        }
        IdentityError::Durable(_) | IdentityError::Connect(_) | IdentityError::Key { .. } => ExitCode::Failed,
    };
    Failure::new("identity", exit, Remedy::Operator, error)
}

/// As the configuration has it.
pub fn ship_options(config: &Config) -> ShipOptions {
    ShipOptions { parallel: config.wal.parallel_uploads as usize, read_ahead: config.wal.read_ahead_segments as usize }
}

impl Agent {
    fn spawn_socket(&self) {
        let (path, archiving) = (self.config.socket_path(), Arc::clone(&self.archiving));
        self.tasks.spawn("socket", &self.socket_stop, move |stop| {
            let (path, archiving) = (path.clone(), Arc::clone(&archiving));
            async move {
                wal::serve(&path, archiving, stop).await.map_err(|error| format!("{}: {error}", path.display()))
            }
        });
    }

    fn spawn_streaming(&self, membership: Option<&Membership>) {
        let streaming = Arc::new(Streaming {
            spool: membership.map(|membership| Arc::clone(&membership.spool)),
            config: Arc::clone(&self.config),
            access: self.access.subscribe(),
            archiving: Arc::clone(&self.archiving),
        });
        self.tasks.spawn("streaming", &self.rest_stop, move |stop| {
            let streaming = Arc::clone(&streaming);
            async move {
                streaming.run(stop).await;
                Ok(())
            }
        });
    }

    fn spawn_facts(&self) {
        let collector = Arc::new(collect::Collector {
            config: Arc::clone(&self.config),
            access: self.access.subscribe(),
            archiving: Arc::clone(&self.archiving),
            jobs: Arc::clone(&self.jobs),
            facts: self.facts.clone(),
        });
        self.tasks.spawn("facts", &self.rest_stop, move |stop| {
            let collector = Arc::clone(&collector);
            async move {
                collector.run(stop).await;
                Ok(())
            }
        });
    }

    fn spawn_grants(&self) {
        let access = self.access.subscribe();
        self.tasks.spawn("grants", &self.rest_stop, move |stop| {
            let access = access.clone();
            async move {
                crate::access::grant::keep_granted(access, stop).await;
                Ok(())
            }
        });
    }

    fn spawn_metrics(&self, metrics: Arc<Metrics>, membership: Option<&Membership>) {
        let Some(listen) = self.config.metrics.listen else { return };
        let identity = membership.map(|membership| membership.identity.subscribe());
        let archiving = Arc::clone(&self.archiving);
        let scrape = Arc::new(Scrape {
            metrics,
            jobs: Arc::clone(&self.jobs),
            link: self.link.subscribe(),
            certificate_expiry: Box::new(move || identity.as_ref().map(|identity| identity.borrow().not_after())),
            shipping: Box::new(move || archiving.statuses()),
            facts: self.facts.subscribe(),
        });
        self.tasks.spawn("metrics", &self.rest_stop, move |stop| {
            let scrape = Arc::clone(&scrape);
            async move {
                let served = crate::metrics::serve(listen, scrape, stop).await;
                served.map_err(|error| format!("listen on {listen}: {error}"))
            }
        });
    }

    fn spawn_spool(&self, spool: &Arc<Spool>) {
        if let Some(listen) = self.config.spool.listen {
            let spool = Arc::clone(spool);
            self.tasks
                .spawn("spool", &self.rest_stop, move |stop| spool::door::serve(Arc::clone(&spool), listen, stop));
        }
        let spool = Arc::clone(spool);
        self.tasks.spawn("left", &self.rest_stop, move |stop| {
            let spool = Arc::clone(&spool);
            async move {
                spool::left::store_left(spool, stop).await;
                Ok(())
            }
        });
    }

    fn spawn_membership(&self, membership: Membership) {
        self.spawn_spool(&membership.spool);
        let link = Link {
            controller: membership.controller.clone(),
            identity: membership.identity.subscribe(),
            jobs: Arc::clone(&self.jobs),
            facts: self.facts.subscribe(),
            desired: Arc::clone(&membership.desired),
            labels: self.config.labels.clone(),
            capabilities: WorkKind::ALL.iter().map(|kind| kind.name()).collect(),
            spool_address: self.config.spool.address(),
            incarnation: format!("{:016x}", rand::random::<u64>()),
            state: self.link.clone(),
        };
        self.tasks.spawn("link", &self.link_stop, move |stop| {
            let link = link.clone();
            async move {
                link.run(stop).await;
                Ok(())
            }
        });
        let (folder, identity) = (membership.folder.clone(), membership.identity.clone());
        let controller = membership.controller.clone();
        self.tasks.spawn("renewal", &self.rest_stop, move |stop| {
            let (folder, identity, controller) = (folder.clone(), identity.clone(), controller.clone());
            async move {
                renew::keep_renewed(folder, identity, controller, stop).await;
                Ok(())
            }
        });
        let (config, membership, access) = (Arc::clone(&self.config), Arc::new(membership), Arc::clone(&self.access));
        self.tasks.spawn("bindings", &self.rest_stop, move |stop| {
            let (config, membership, access) = (Arc::clone(&config), Arc::clone(&membership), Arc::clone(&access));
            async move {
                bound::keep_bound(&config, &membership, &access, stop).await;
                Ok(())
            }
        });
    }

    async fn stop(&self) {
        // Jobs first, while the link still stands to say how they ended.
        let stragglers = self.jobs.stop(JOBS_DEADLINE).await;
        if !stragglers.is_empty() {
            tracing::warn!(?stragglers, "jobs did not stop in time; the next start reports them as interrupted");
        }
        self.socket_stop.cancel();
        self.tasks.wait(&["socket"], SOCKET_DEADLINE).await;
        self.link_stop.cancel();
        self.rest_stop.cancel();
        self.tasks.wait(&[], REST_DEADLINE).await;
        tracing::info!("stopped");
    }
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
