//! A controller's fleet half on a socket of its own, with agents that tests play by hand.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::service::{InterceptorLayer, Routes};
use tonic::transport::{Channel, Server};
use tonic::{Request, Status};
use walfleet_proto::agent::v1 as agent;
use walfleet_proto::job::v1 as job;
use walfleet_proto::operator::v1 as operator;
use walfleet_proto::operator::v1::fleet_client::FleetClient;
use walfleet_proto::operator::v1::jobs_client::JobsClient;
use walfleet_proto::operator::v1::resources_client::ResourcesClient;
use walfleet_repository::key_file::{KeyFile, KeyKind};

use super::super::{Api, Ground};
use super::fake_agent::{FakeAgent, primary};
use crate::audit::Audit;
use crate::fleet::Timing;
use crate::identity::member::{self, Member};
use crate::identity::{KeeperKey, PeerIdentity, Role, Roster};
use crate::metrics::Metrics;
use crate::state::{State, StateError, embedded};

/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub type Door = InterceptedService<Channel, fn(Request<()>) -> Result<Request<()>, Status>>;

pub struct World {
    pub api: Api,
    pub audit: Audit,
    pub folder: Arc<tempfile::TempDir>,
    address: SocketAddr,
    cancel: CancellationToken,
    server: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
}

fn quick() -> Timing {
    Timing {
        heartbeat: Duration::from_secs(1),
        facts_interval: Duration::from_secs(10),
        lost_after: Duration::from_secs(3),
        lease: Duration::from_secs(2),
        offer: Duration::from_millis(300),
        hello: Duration::from_secs(2),
        store_interval: Duration::from_millis(100),
        patience: Duration::from_secs(3600),
        tick: Duration::from_millis(100),
        writer: Duration::from_secs(90 * 86_400),
        history: Duration::from_secs(30 * 86_400),
        retention: crate::fleet::RetentionTiming::of(&crate::config::RetentionConfig::default()),
    }
}

fn row(name: &str, role: Role, labels: &[(&str, &str)]) -> Member {
    Member {
        name: name.parse().expect("a name"),
        role,
        enrolment: "test".to_owned(),
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        hostname: name.to_owned(),
        key_fingerprint: String::new(),
        // Any point of the curve's encoding length will do: nobody verifies what these write.
        writer_public_key: Some("11".repeat(32)),
        recipient: Some("22".repeat(32)),
        joined_at_us: 1_780_000_000_000_000,
        certificate_serial: String::new(),
        certificate_not_after_us: 4_000_000_000_000_000,
        revoked_at_us: None,
        revoked_by: None,
    }
}

impl World {
    pub async fn new() -> World {
        let folder = Arc::new(tempfile::tempdir().expect("a folder"));
        let state = open(&folder.path().join("state")).await;
        let members = [
            row("ann", Role::Admin, &[]),
            row("olli", Role::Operator, &[]),
            row("vera", Role::Viewer, &[]),
            row("db1", Role::Agent, &[]),
            row("db2", Role::Agent, &[]),
            row("spare", Role::Agent, &[("purpose", "restore")]),
        ];
        for member in members {
            state.create_row(&member::key(&member.name), &member).await.expect("a fresh state");
        }
        KeeperKey::create(folder.path(), "test", &KeyFile::generate(KeyKind::Recovery).expect("a key"))
            .expect("a fresh folder");
        World::on(folder, state).await
    }

    /// The controller again, on what it left: as after a kill, since nothing is written at the end.
    pub async fn restart(self) -> World {
        let World { api, audit, folder, cancel, server, .. } = self;
        cancel.cancel();
        let _ = tokio::time::timeout(PATIENCE, server).await.expect("the server ends");
        tokio::time::timeout(PATIENCE, api.tasks.ended()).await.expect("loops and streams end");
        drop((api, audit));
        let state = open(&folder.path().join("state")).await;
        World::on(folder, state).await
    }

    async fn on(folder: Arc<tempfile::TempDir>, state: State) -> World {
        let cancel = CancellationToken::new();
        let roster = Roster::open(state.clone()).await.expect("members");
        let (follower, stop) = (roster.clone(), cancel.clone());
        tokio::spawn(async move { stop.run_until_cancelled(follower.follow()).await });
        let audit = Audit::new(state.clone());
        let ground = Ground {
            name: "test".to_owned(),
            state,
            roster,
            keeper_key: Arc::new(KeeperKey::load(folder.path()).expect("a key")),
            audit: audit.clone(),
            metrics: Metrics::default(),
            timing: quick(),
            cancel: cancel.clone(),
            tasks: crate::serve::Tasks::default(),
        };
        let api = Api::open(ground).await.expect("a state");
        api.start();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let router =
            Server::builder().layer(InterceptorLayer::new(introduce)).add_routes(api.add_to(Routes::default()));
        let stop = cancel.clone().cancelled_owned();
        let server = tokio::spawn(router.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop));
        World { api, audit, folder, address, cancel, server }
    }

    async fn door(&self, name: &'static str) -> Door {
        let channel = Channel::from_shared(format!("http://{}", self.address)).expect("a URL").connect().await;
        InterceptedService::new(channel.expect("the server listens"), caller(name))
    }

    pub async fn fleet(&self, name: &'static str) -> FleetClient<Door> {
        FleetClient::new(self.door(name).await)
    }

    pub async fn jobs(&self, name: &'static str) -> JobsClient<Door> {
        JobsClient::new(self.door(name).await)
    }

    pub async fn resources(&self, name: &'static str) -> ResourcesClient<Door> {
        ResourcesClient::new(self.door(name).await)
    }

    pub async fn apply(&self, yaml: &str) -> Result<operator::ApplyReply, Status> {
        let request = operator::ApplyRequest { yaml: yaml.to_owned(), dry_run: false };
        self.resources("ann").await.apply(request).await.map(|reply| reply.into_inner())
    }

    pub fn repository(&self) -> PathBuf {
        self.folder.path().join("repository")
    }

    /// A repository in the folder and a policy that binds everything; `extra` goes into the policy's spec.
    pub fn documents(&self, extra: &str) -> String {
        let url = self.repository();
        format!(
            "apiVersion: walfleet/v1\nkind: Repository\nname: main\nspec: {{url: 'file://{}'}}\n---\n\
             apiVersion: walfleet/v1\nkind: Policy\nname: gold\nspec: {{selector: '', repository: main{extra}}}\n",
            url.display()
        )
    }

    pub async fn agent(&self, name: &'static str) -> FakeAgent {
        self.agent_with(name, vec![]).await
    }

    /// Says hello with this journal, and is welcomed.
    pub async fn agent_with(&self, name: &'static str, journal: Vec<agent::JournalEntry>) -> FakeAgent {
        FakeAgent::attach(self.door(name).await, name, journal).await
    }

    pub async fn job(&self, id: &str) -> operator::JobView {
        let request = operator::GetJobRequest { id: id.to_owned() };
        self.jobs("vera").await.get_job(request).await.expect("the job is there").into_inner()
    }

    pub async fn until_state(&self, id: &str, state: job::JobState) -> operator::JobView {
        let begun = tokio::time::Instant::now();
        loop {
            let view = self.job(id).await;
            if view.state() == state {
                return view;
            }
            assert!(begun.elapsed() < PATIENCE, "not {state:?}: {view:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn cluster(&self, name: &str) -> Result<operator::ClusterView, Status> {
        let request = operator::GetClusterRequest { name: name.to_owned() };
        self.fleet("vera").await.get_cluster(request).await.map(|reply| reply.into_inner())
    }

    pub async fn start_backup(&self, key: &str) -> Result<operator::JobView, Status> {
        let request = operator::StartBackupRequest {
            cluster: "orders".to_owned(),
            idempotency_key: key.to_owned(),
            ..Default::default()
        };
        let reply = self.jobs("olli").await.start_backup(request).await?;
        Ok(reply.into_inner().job.expect("a job"))
    }

    /// A primary of `orders` at db1, bound by a policy without retries.
    pub async fn with_primary(&self) -> FakeAgent {
        self.apply(&self.documents(", backup: {retries: 0}")).await.expect("good documents");
        let db1 = self.agent("db1").await;
        db1.facts(primary()).await;
        self.until_known("orders").await;
        self.until_pinned("orders").await;
        db1
    }

    /// Views show a cluster at once; that it keeps its repository is the next pass's work.
    async fn until_pinned(&self, cluster: &str) {
        let cluster = cluster.parse().expect("a name");
        let begun = tokio::time::Instant::now();
        loop {
            let picture = self.api.reconciler.picture(jiff::Timestamp::now()).await.expect("the state reads");
            if picture.pins.contains_key(&cluster) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{cluster} is not pinned");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn until_known(&self, cluster: &str) {
        let begun = tokio::time::Instant::now();
        while self.cluster(cluster).await.map_or(true, |view| view.members.is_empty()) {
            assert!(begun.elapsed() < PATIENCE, "{cluster} is not seen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn open(path: &Path) -> State {
    let begun = tokio::time::Instant::now();
    loop {
        // Tasks of the controller before may hold it for a moment.
        match State::open(path, embedded::Options::default()) {
            Ok(state) => return state,
            Err(StateError::Locked { .. }) if begun.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// In place of the gate: believes the caller.
fn introduce(mut request: Request<()>) -> Result<Request<()>, Status> {
    let name = request.metadata().get("caller").and_then(|value| value.to_str().ok()).unwrap_or("vera");
    let role = match name {
        "ann" => Role::Admin,
        "olli" => Role::Operator,
        "vera" => Role::Viewer,
        _ => Role::Agent,
    };
    let peer = PeerIdentity {
        name: name.parse().map_err(|_| Status::unauthenticated("no name"))?,
        role,
        serial: String::new(),
        enrolment: "test".to_owned(),
        not_after_us: 4_000_000_000_000_000,
    };
    request.extensions_mut().insert(peer);
    Ok(request)
}

fn caller(name: &'static str) -> fn(Request<()>) -> Result<Request<()>, Status> {
    macro_rules! callers {
        ($($name:literal),*) => {
            match name {
                $($name => |mut request: Request<()>| {
                    request.metadata_mut().insert("caller", MetadataValue::from_static($name));
                    Ok(request)
                },)*
                other => panic!("{other} is nobody here"),
            }
        };
    }
    callers!("ann", "olli", "vera", "db1", "db2", "spare")
}

/// Names and values, for comparing label maps.
pub fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}
