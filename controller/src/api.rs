//! What agents and operators call. Each file is one service; none of them decides anything: they check what is asked,
//! hand it to `jobs`, `resources` and `fleet`, and say what came of it.
//!
//! Codes are a contract (`walfleet` maps them to exit codes): NOT_FOUND 3 · PERMISSION_DENIED and FAILED_PRECONDITION 4 ·
//! INVALID_ARGUMENT 2 · UNAVAILABLE 5 · DEADLINE_EXCEEDED 6 · OUT_OF_RANGE 7 (not recoverable as asked). Roles are the
//! gate's business (`identity::permission`), and once more checked where a call's need depends on its content.

mod agents;
mod apply;
mod audit;
mod fleet;
mod holds;
mod jobs;
mod replicas;
mod resources;
mod restore;
mod retention;
mod retention_diff;
mod status;
mod wal;
mod watch;

use std::sync::Arc;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::service::Routes;
use walfleet_proto::agent::v1::agent_link_server::AgentLinkServer;
use walfleet_proto::operator::v1::audit_server::AuditServer;
use walfleet_proto::operator::v1::fleet_server::FleetServer;
use walfleet_proto::operator::v1::jobs_server::JobsServer;
use walfleet_proto::operator::v1::replicas_server::ReplicasServer;
use walfleet_proto::operator::v1::resources_server::ResourcesServer;
use walfleet_proto::operator::v1::retention_server::RetentionServer;
use walfleet_proto::operator::v1::wal_server::WalServer;

use crate::audit::{Actor, Audit};
use crate::fleet::{Fleet, Timing, store};
use crate::identity::{KeeperKey, PeerIdentity, Roster};
use crate::jobs::Jobs;
use crate::keeper::Keeper;
use crate::metrics::Metrics;
use crate::reconcile::measure::FleetMetrics;
use crate::reconcile::{Reconciler, next_epoch};
use crate::resources::ResourceError;
use crate::serve::Tasks;
use crate::state::{RowError, State};
use crate::wire::WireError;
use status::{of_resource, of_wire};

/// What the fleet's half of the controller stands on.
pub struct Ground {
    /// The controller's name, as agents and operators see it.
    pub name: String,
    pub state: State,
    pub roster: Arc<Roster>,
    pub keeper_key: Arc<KeeperKey>,
    pub audit: Audit,
    pub metrics: Metrics,
    pub timing: Timing,
    /// Ends loops and streams.
    pub cancel: CancellationToken,
    /// Runs loops and streams; the stop waits for them.
    pub tasks: Tasks,
}

/// All its services, and the loops behind them. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    name: Arc<str>,
    reconciler: Arc<Reconciler>,
    keeper: Arc<Keeper>,
    audit: Audit,
    metrics: FleetMetrics,
    cancel: CancellationToken,
    tasks: Tasks,
}

impl Api {
    /// Reads what is stored of the fleet. Nothing runs yet.
    pub async fn open(ground: Ground) -> Result<Api, RowError> {
        let epoch = next_epoch(&ground.state).await?;
        let fleet = Fleet::new(ground.timing, store::load_agents(&ground.state).await?);
        let jobs = Jobs::open(ground.state.clone()).await?;
        let reconciler = Reconciler::new(ground.state, fleet, jobs, ground.roster, ground.keeper_key, epoch);
        Ok(Api {
            name: ground.name.into(),
            keeper: Keeper::new(reconciler.clone()),
            reconciler,
            audit: ground.audit,
            metrics: FleetMetrics::register(&ground.metrics),
            cancel: ground.cancel,
            tasks: ground.tasks,
        })
    }

    /// Starts the loops. They end when cancelled; none of them ends by itself.
    pub fn start(&self) {
        let api = self.clone();
        self.tasks.spawn("reconciler", async move { api.reconciler.run(&api.cancel).await });
        let api = self.clone();
        self.tasks.spawn("keeper", async move { api.keeper.run(&api.cancel).await });
        let api = self.clone();
        self.tasks.spawn("retention", async move { api.keeper.keep(&api.cancel).await });
        let api = self.clone();
        self.tasks.spawn("replicas", async move { api.keeper.replicate(&api.cancel).await });
        let api = self.clone();
        self.tasks.spawn("fleet metrics", async move { api.metrics.run(&api.reconciler, &api.cancel).await });
    }

    pub fn add_to(&self, routes: Routes) -> Routes {
        routes
            .add_service(AgentLinkServer::new(self.clone()).max_decoding_message_size(MAX_AGENT_MESSAGE))
            .add_service(FleetServer::new(self.clone()))
            .add_service(JobsServer::new(self.clone()))
            .add_service(ResourcesServer::new(self.clone()))
            .add_service(AuditServer::new(self.clone()))
            .add_service(WalServer::new(self.clone()))
            .add_service(ReplicasServer::new(self.clone()))
            .add_service(RetentionServer::new(self.clone()))
    }

    async fn audited<T>(
        &self,
        peer: &PeerIdentity,
        call: &str,
        object: &str,
        result: Result<T, Status>,
    ) -> Result<T, Status> {
        self.audit.record(&Actor::from(peer), call, object, &result).await;
        result
    }
}

/// Facts of a host with many instances and a long history; beyond it something is wrong with the host.
const MAX_AGENT_MESSAGE: usize = 8 * 1024 * 1024;

fn now() -> Timestamp {
    Timestamp::now()
}

/// More is no reason but a report.
const LONGEST_REASON: usize = 1000;

/// What an operator gives as one.
fn reason<'t>(text: &'t str, hint: &str) -> Result<&'t str, Status> {
    let reason = text.trim();
    let length = reason.len();
    if (1..=LONGEST_REASON).contains(&length) {
        return Ok(reason);
    }
    Err(Status::invalid_argument(format!(
        "reason: it has {length} bytes, and 1 to {LONGEST_REASON} are accepted\nHINT: {hint}"
    )))
}

impl From<WireError> for Status {
    fn from(error: WireError) -> Status {
        of_wire(&error)
    }
}

impl From<ResourceError> for Status {
    fn from(error: ResourceError) -> Status {
        of_resource(&error)
    }
}

#[cfg(test)]
mod tests;
