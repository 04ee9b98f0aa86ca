//! A controller's fleet half on a socket of its own, with agents that tests play by hand.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::service::{InterceptorLayer, Routes};
use tonic::transport::{Channel, Server};
use tonic::{Request, Status, Streaming};
use walfleet_proto::agent::v1 as agent;
use walfleet_proto::agent::v1::agent_link_client::AgentLinkClient;
use walfleet_proto::agent::v1::agent_message::Message as Say;
use walfleet_proto::agent::v1::controller_message::Message as Told;
use walfleet_proto::job::v1 as job;
use walfleet_proto::operator::v1 as operator;
use walfleet_proto::operator::v1::fleet_client::FleetClient;
use walfleet_proto::operator::v1::jobs_client::JobsClient;
use walfleet_proto::operator::v1::resources_client::ResourcesClient;
use walfleet_repository::key_file::{KeyFile, KeyKind};

use super::super::{Api, Ground};
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
        let (say, queue) = mpsc::channel(64);
        let mut client = AgentLinkClient::new(self.door(name).await);
        let stream = client.attach(ReceiverStream::new(queue)).await.expect("a stream").into_inner();
        let running: Arc<Mutex<Vec<agent::JournalEntry>>> = Arc::default();
        running.lock().expect("unpoisoned").extend(journal.iter().filter(|entry| entry.outcome.is_none()).cloned());
        let mut fake = FakeAgent { name, say, stream, running, beats: None };
        fake.say(Say::Hello(hello(journal))).await;
        fake.expect("welcome", |told| matches!(told, Told::Welcome(_)).then_some(())).await;
        fake.beat();
        fake
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
        db1
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

fn hello(journal: Vec<agent::JournalEntry>) -> agent::Hello {
    agent::Hello {
        protocol_version: 1,
        agent_version: "0.1.0".to_owned(),
        incarnation: "one".to_owned(),
        labels: [("env".to_owned(), "test".to_owned())].into(),
        hostname: "host".to_owned(),
        journal,
        recipient: vec![3; 32].into(),
        capabilities: ["backup", "restore", "verify"].map(str::to_owned).to_vec(),
    }
}

/// An instance of `orders` that nothing is wrong with.
pub fn primary() -> agent::InstanceFacts {
    agent::InstanceFacts {
        cluster: "orders".to_owned(),
        system_identifier: 7_412_345_678_901_234_567,
        server_version_num: 170_000,
        role: agent::InstanceRole::Primary.into(),
        data_dir: "/var/lib/postgresql/17/main".to_owned(),
        port: 5432,
        timeline: 1,
        current_lsn: "0/5000000".to_owned(),
        ..Default::default()
    }
}

/// A host, played by a test.
pub struct FakeAgent {
    pub name: &'static str,
    say: mpsc::Sender<agent::AgentMessage>,
    stream: Streaming<agent::ControllerMessage>,
    running: Arc<Mutex<Vec<agent::JournalEntry>>>,
    beats: Option<tokio::task::JoinHandle<()>>,
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        self.mute();
    }
}

impl FakeAgent {
    pub async fn say(&self, message: Say) {
        // A stream that ended is noticed where something is expected of it.
        let _ = self.say.send(agent::AgentMessage { message: Some(message) }).await;
    }

    pub async fn facts(&self, instance: agent::InstanceFacts) {
        let at_us = jiff::Timestamp::now().as_microsecond();
        self.say(Say::Facts(agent::Facts { at_us, instances: vec![instance] })).await;
    }

    fn beat(&mut self) {
        let (say, running) = (self.say.clone(), self.running.clone());
        self.beats = Some(tokio::spawn(async move {
            loop {
                let running = running.lock().expect("unpoisoned").clone();
                let beat = agent::Heartbeat { at_us: 1, running };
                if say.send(agent::AgentMessage { message: Some(Say::Heartbeat(beat)) }).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }));
    }

    /// No more heartbeats.
    pub fn mute(&mut self) {
        if let Some(beats) = self.beats.take() {
            beats.abort();
        }
    }

    /// The next message that `pick` wants; others are passed over.
    pub async fn expect<T>(&mut self, what: &str, pick: impl Fn(Told) -> Option<T>) -> T {
        let search = async {
            loop {
                let message = self.stream.message().await.expect("the stream is well").expect("the stream is open");
                if let Some(found) = message.message.and_then(&pick) {
                    return found;
                }
            }
        };
        tokio::time::timeout(PATIENCE, search).await.unwrap_or_else(|_| panic!("no {what} for {}", self.name))
    }

    /// How the controller ends the stream.
    pub async fn ended(&mut self) -> Status {
        let drain = async {
            loop {
                match self.stream.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return Status::ok(""),
                    Err(status) => return status,
                }
            }
        };
        tokio::time::timeout(PATIENCE, drain).await.expect("the controller ends the stream")
    }

    pub async fn offer(&mut self) -> job::JobOrder {
        self.expect("offer", |told| match told {
            Told::Offer(order) => Some(order),
            _ => None,
        })
        .await
    }

    pub async fn desired(&mut self, fits: impl Fn(&agent::Desired) -> bool) -> agent::Desired {
        self.expect("desired state", |told| match told {
            Told::Desired(desired) if fits(&desired) => Some(desired),
            _ => None,
        })
        .await
    }

    pub async fn acknowledged(&mut self, token: u64) {
        self.expect("acknowledgement", |told| match told {
            Told::OutcomeReceived(received) if received.fencing_token == token => Some(()),
            _ => None,
        })
        .await
    }

    pub async fn accept(&self, order: &job::JobOrder) {
        self.running.lock().expect("unpoisoned").push(entry(order, None));
        self.answer(order, true, false).await;
    }

    pub async fn answer(&self, order: &job::JobOrder, accepted: bool, busy: bool) {
        self.say(Say::JobAnswer(agent::JobAnswer {
            job: order.job.clone(),
            attempt: order.attempt,
            fencing_token: order.fencing_token,
            accepted,
            reason: "so".to_owned(),
            busy,
        }))
        .await;
    }

    pub async fn progress(&self, order: &job::JobOrder, done_bytes: u64) {
        self.say(Say::Progress(job::JobProgress {
            job: order.job.clone(),
            attempt: order.attempt,
            fencing_token: order.fencing_token,
            phase: "copy".to_owned(),
            done_bytes,
            total_bytes: 100,
            at_us: 1,
        }))
        .await;
    }

    pub async fn end(&self, outcome: job::JobOutcome) {
        self.running.lock().expect("unpoisoned").retain(|entry| entry.job != outcome.job);
        self.say(Say::Outcome(outcome)).await;
    }
}

pub fn entry(order: &job::JobOrder, outcome: Option<job::JobOutcome>) -> agent::JournalEntry {
    agent::JournalEntry { job: order.job.clone(), attempt: order.attempt, fencing_token: order.fencing_token, outcome }
}

pub fn succeeded(order: &job::JobOrder) -> job::JobOutcome {
    job::JobOutcome {
        job: order.job.clone(),
        attempt: order.attempt,
        fencing_token: order.fencing_token,
        state: job::JobState::Succeeded.into(),
        report: Some(job::job_outcome::Report::Backup(walfleet_proto::recovery::v1::BackupSummary {
            id: "bk_1".to_owned(),
            cluster: "orders".to_owned(),
            finished_at_us: jiff::Timestamp::now().as_microsecond(),
            state: "committed".to_owned(),
            ..Default::default()
        })),
        ..Default::default()
    }
}

pub fn failed(order: &job::JobOrder, retryable: bool) -> job::JobOutcome {
    job::JobOutcome {
        state: job::JobState::Failed.into(),
        error_code: "store.away".to_owned(),
        error_message: "the store does not answer\nHINT: look at it.".to_owned(),
        exit_code: 5,
        retryable,
        report: None,
        ..succeeded(order)
    }
}

/// Names and values, for comparing label maps.
pub fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}
