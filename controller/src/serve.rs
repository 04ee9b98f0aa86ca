//! The controller put together: opens what it stands on, starts its parts, answers calls, and ends in order. The door
//! is in `door` and `tls`; who may pass it is `identity::permission`'s decision.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use walfleet_proto::agent::v1::enrolment_server::EnrolmentServer;
use walfleet_proto::operator::v1::access_server::AccessServer;
use walfleet_proto::telemetry;

use crate::api::{Api, Ground};
use crate::audit::Audit;
use crate::config::Config;
use crate::fleet::Timing;
use crate::identity::api::IdentityApi;
use crate::identity::keeper_key::KeeperKeyError;
use crate::identity::permission::{Gate, GateLayer};
use crate::identity::server_certificate::ServerCertificate;
use crate::identity::{Authority, AuthorityError, Enrolment, KeeperKey, Roster};
use crate::metrics::{Metrics, Readiness};
use crate::state::{Op, RowError, State, StateError, Txn, embedded, transfer};

mod door;
mod measure;
mod tasks;
mod tls;

pub use door::{Connection, Door};
pub use tasks::Tasks;

/// Both ends notice a dead connection within half a minute, and no NAT forgets a quiet one.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Calls at once over one connection; a careful operator's command has a handful.
const STREAMS_PER_CONNECTION: u32 = 256;
/// How often the state is asked whether it still answers.
const STATE_CHECK: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{} holds no controller\nHINT: `walfleet-controller init --dir {}` makes one.", directory.display(), directory.display())]
    NotInitialised { directory: PathBuf },
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    KeeperKey(#[from] KeeperKeyError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Transfer(#[from] transfer::TransferError),
    #[error("read the fleet's state")]
    Row(#[from] RowError),
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    #[error("listen on {address} ({option})")]
    Listen {
        address: SocketAddr,
        option: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// What the parts of the controller share. Cheap to clone.
#[derive(Clone)]
pub struct Foundation {
    pub config: Arc<Config>,
    pub state: State,
    pub enrolment: Arc<Enrolment>,
    pub keeper_key: Arc<KeeperKey>,
    pub audit: Audit,
    pub metrics: Metrics,
    /// Cancelled when the controller is to stop: loops end, streams close.
    pub cancel: CancellationToken,
    /// Loops that end with `cancel`; the stop waits for them.
    pub tasks: Tasks,
}

impl Foundation {
    pub fn roster(&self) -> &Arc<Roster> {
        self.enrolment.roster()
    }

    /// Opens state and keys; starts nothing but the roster's watch.
    pub async fn open(config: Arc<Config>) -> Result<Self, StartError> {
        let directory = config.directory.clone();
        if !directory.join(crate::identity::authority::CERTIFICATE_FILE).exists() {
            return Err(StartError::NotInitialised { directory });
        }
        let authority = Arc::new(Authority::load(&directory)?);
        let keeper_key = Arc::new(KeeperKey::load(&directory)?);
        let options = state_options(&config);
        let path = config.state_path();
        // Reading a large file, or repairing one after a crash, takes its time.
        let state = tokio::task::spawn_blocking(move || State::open(&path, options))
            .await
            .map_err(|_| StateError::Closed)??;
        transfer::refuse_unfinished(&state).await?;
        let cancel = CancellationToken::new();
        let tasks = Tasks::default();
        let roster = Roster::open(state.clone()).await?;
        let (follower, stop) = (roster.clone(), cancel.clone());
        tasks.spawn("roster", async move {
            stop.run_until_cancelled(follower.follow()).await;
        });
        let lifetimes = config.certificates.lifetimes();
        let enrolment = Arc::new(Enrolment::new(state.clone(), authority, roster, lifetimes));
        let audit = Audit::new(state.clone());
        Ok(Self { config, state, enrolment, keeper_key, audit, metrics: Metrics::default(), cancel, tasks })
    }
}

/// The engine's options as configured.
#[allow(clippy::needless_update, reason = "the engine has one more under test")]
pub fn state_options(config: &Config) -> embedded::Options {
    let cache_bytes = usize::try_from(config.state.cache_mib << 20).unwrap_or(usize::MAX);
    embedded::Options { history_revisions: config.state.history_revisions, cache_bytes, ..embedded::Options::default() }
}

/// A controller that answers calls.
pub struct Running {
    /// Where agents and operators reach it.
    pub address: SocketAddr,
    pub metrics_address: Option<SocketAddr>,
    pub foundation: Foundation,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

/// Opens, starts every part, and listens.
pub async fn start(config: Config) -> Result<Running, StartError> {
    let foundation = Foundation::open(Arc::new(config)).await?;
    start_on(foundation).await
}

async fn start_on(foundation: Foundation) -> Result<Running, StartError> {
    let config = &foundation.config;
    let (enrolment, cancel) = (&foundation.enrolment, &foundation.cancel);
    let authority = enrolment.shared_authority();
    let names = config.certificate_names();
    let certificate = Arc::new(ServerCertificate::new(authority.clone(), names, config.certificates.server())?);
    let lifetimes = config.certificates.lifetimes();
    let tls = tls::server_config(&authority, certificate.clone(), lifetimes.renewal_grace)?;
    let handshake = Duration::from_secs(config.limits.handshake_seconds);
    let listen = |option, address| move |source| StartError::Listen { address, option, source };
    let metrics = foundation.metrics.clone();
    let door = Door::open(config.listen, tls, config.limits.connections, handshake, metrics.clone())
        .await
        .map_err(listen("listen", config.listen))?;
    let address = door.address().map_err(listen("listen", config.listen))?;

    // The loops begin only once the port is ours: a second controller on this host has decided nothing by then.
    let api = Api::open(ground(&foundation)).await?;
    api.start();
    let stop = cancel.clone();
    foundation.tasks.spawn("server certificate", async move { certificate.keep_fresh(&stop).await });
    foundation.tasks.spawn("state check", watch_state(foundation.clone()));
    let metrics_address = serve_metrics(&foundation).await?;

    let gate = GateLayer::new(Gate::new(foundation.roster().clone(), lifetimes.renewal_grace));
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(Some(STREAMS_PER_CONNECTION))
        .trace_fn(telemetry::server_span)
        .layer(measure::MeasureLayer { metrics: metrics.clone() })
        .layer(gate)
        .add_routes(routes(&foundation, &api));
    let incoming = door.connections(cancel.clone());
    let server = tokio::spawn(server.serve_with_incoming_shutdown(incoming, cancel.clone().cancelled_owned()));
    metrics.set_readiness("door", Readiness::Ready);
    Ok(Running { address, metrics_address, foundation, server })
}

/// What the fleet's half stands on.
fn ground(foundation: &Foundation) -> Ground {
    Ground {
        name: foundation.config.controller_name(),
        state: foundation.state.clone(),
        roster: foundation.roster().clone(),
        keeper_key: foundation.keeper_key.clone(),
        audit: foundation.audit.clone(),
        metrics: foundation.metrics.clone(),
        timing: Timing::of(&foundation.config),
        cancel: foundation.cancel.clone(),
        tasks: foundation.tasks.clone(),
    }
}

/// Every service the controller offers.
fn routes(foundation: &Foundation, api: &Api) -> Routes {
    let Foundation { state, enrolment, audit, .. } = foundation;
    let identity = IdentityApi::new(state.clone(), enrolment.clone(), audit.clone());
    api.add_to(Routes::new(EnrolmentServer::new(identity.clone())).add_service(AccessServer::new(identity)))
}

async fn serve_metrics(foundation: &Foundation) -> Result<Option<SocketAddr>, StartError> {
    let Some(address) = foundation.config.metrics.listen else { return Ok(None) };
    let listen = |source| StartError::Listen { address, option: "metrics.listen", source };
    let listener = Metrics::bind(address).await.map_err(listen)?;
    let bound = listener.local_addr().map_err(listen)?;
    let (metrics, cancel) = (foundation.metrics.clone(), foundation.cancel.clone());
    foundation.tasks.spawn("metrics", async move {
        if let Err(error) = metrics.serve(listener, cancel).await {
            tracing::error!(%error, "the metrics listener ended");
        }
    });
    Ok(Some(bound))
}

/// Readiness of the state: whether it takes a write, tried now and then. Deleting what is not there takes no revision,
/// but a commit all the same.
async fn watch_state(foundation: Foundation) {
    let Foundation { state, metrics, cancel, .. } = foundation;
    loop {
        let probe = Txn::new().then(Op::delete("controller/probe"));
        let answer = tokio::time::timeout(STATE_CHECK / 2, state.txn(probe)).await;
        let readiness = match answer {
            Ok(Ok(_)) => Readiness::Ready,
            Ok(Err(error)) => Readiness::NotReady { why: crate::with_causes(&error) },
            Err(_) => Readiness::NotReady { why: "it does not answer".to_owned() },
        };
        metrics.set_readiness("state", readiness);
        if cancel.run_until_cancelled(tokio::time::sleep(STATE_CHECK)).await.is_none() {
            return;
        }
    }
}

/// How a controller ended.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    #[error("the server ended by itself")]
    Server(#[source] tonic::transport::Error),
    #[error("the server broke down")]
    Panicked,
    #[error("still running {deadline:?} after the stop, and cut off: {}", stragglers.join(", "))]
    Deadline { deadline: Duration, stragglers: Vec<&'static str> },
}

impl Running {
    /// Waits for the server to end without being told to: always a fault.
    pub async fn ended(&mut self) -> StopError {
        match (&mut self.server).await {
            Ok(Err(error)) => StopError::Server(error),
            Ok(Ok(())) | Err(_) => StopError::Panicked,
        }
    }

    /// Stops in order: health first, so that nobody is sent here any more; then loops and streams; then calls in
    /// flight, for as long as configured. What was acknowledged is durable at any of these points.
    pub async fn stop(self) -> Result<(), StopError> {
        let Self { foundation, mut server, .. } = self;
        foundation.metrics.set_readiness("door", Readiness::NotReady { why: "stopping".to_owned() });
        foundation.cancel.cancel();
        let deadline = Duration::from_secs(foundation.config.shutdown_seconds);
        let tasks = &foundation.tasks;
        let in_order = async {
            let ended = (&mut server).await;
            tasks.ended().await;
            ended
        };
        match tokio::time::timeout(deadline, in_order).await {
            Ok(Ok(ended)) => ended.map_err(StopError::Server),
            Ok(Err(_)) => Err(StopError::Panicked),
            Err(_) => {
                let mut stragglers = tasks.stragglers();
                if !server.is_finished() {
                    stragglers.push("calls");
                }
                server.abort();
                Err(StopError::Deadline { deadline, stragglers })
            }
        }
    }
}

#[cfg(test)]
mod tests;
