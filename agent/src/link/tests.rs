//! Joining, renewing and the stream, against a controller in this process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use walfleet_proto::agent::v1::{
    CancelJob, Desired, DesiredCluster, DesiredRepository, Limits, OutcomeReceived,
    agent_message::Message as FromAgent, controller_message::Message as ToAgent,
};
use walfleet_proto::job::v1 as job;
use walfleet_repository::limits::LimitsSpec;

use super::fake_controller::{FakeController, FakeStream, new_authority};
use super::{Link, LinkState};
use crate::desired::DesiredStore;
use crate::facts::Facts;
use crate::failure::Failure;
use crate::identity::connect::ConnectError;
use crate::identity::join::{JoinError, JoinRequest, join};
use crate::identity::{Identity, IdentityFolder, renew};
use crate::jobs::order::{JobOrder, WorkKind};
use crate::jobs::report::{Report, VerifyReport};
use crate::jobs::{JobObserver, Jobs, Work};
use crate::journal::{JobOutcome, Journal};
use crate::progress::Progress;

fn ask(controller: &FakeController) -> JoinRequest {
    JoinRequest {
        controller: controller.url(),
        token: controller.token().parse().unwrap(),
        name: "db1".into(),
        labels: BTreeMap::from([("env".into(), "test".into())]),
    }
}

#[tokio::test]
async fn a_host_joins_keeps_its_keys_and_renews() {
    let controller = FakeController::start().await;
    let state = tempfile::tempdir().unwrap();
    let folder = IdentityFolder::new(state.path());
    let identity = join(&folder, ask(&controller)).await.unwrap();
    {
        let joins = controller.joins.lock().unwrap();
        assert_eq!((joins[0].name.as_str(), joins[0].labels["env"].as_str()), ("db1", "test"));
        assert_eq!(joins[0].recipient[..], identity.recipient());
        assert_eq!(joins[0].writer_public_key[..], identity.writer_public_key());
    }
    assert!(matches!(join(&folder, ask(&controller)).await, Err(JoinError::AlreadyEnrolled { .. })));

    let loaded = folder.load().unwrap();
    let renewed = renew::renew(&folder, &loaded, &controller.url()).await.unwrap();
    assert_eq!(renewed.recipient(), identity.recipient(), "what backups are wrapped for stays");
    renew::renew(&folder, &folder.load().unwrap(), &controller.url()).await.unwrap();
}

#[tokio::test]
async fn what_can_go_wrong_at_joining_is_told_apart() {
    let controller = FakeController::start().await;
    let state = tempfile::tempdir().unwrap();
    let folder = IdentityFolder::new(state.path());
    let expect = async |request: JoinRequest| join(&folder, request).await.map(|_| ()).unwrap_err();

    let stale = controller.token().replace("good", "old");
    let error = expect(JoinRequest { token: stale.parse().unwrap(), ..ask(&controller) }).await;
    assert!(matches!(&error, JoinError::Token { reason } if reason.contains("expired")), "{error}");

    let foreign = "wft_1.good.0123456789abcdef".parse().unwrap();
    let error = expect(JoinRequest { token: foreign, ..ask(&controller) }).await;
    assert!(matches!(error, JoinError::Connect(ConnectError::Authority { .. })), "{error}");
    assert!(controller.joins.lock().unwrap().is_empty(), "the secret was not sent to a stranger");

    let error = expect(JoinRequest { name: "taken".into(), ..ask(&controller) }).await;
    assert!(matches!(error, JoinError::NameTaken { .. }), "{error}");

    let error = expect(JoinRequest { controller: "https://localhost:1".into(), ..ask(&controller) }).await;
    assert!(matches!(error, JoinError::Connect(ConnectError::Dial { .. })), "{error}");

    let error =
        expect(JoinRequest { controller: format!("https://127.0.0.1:{}", controller.port), ..ask(&controller) }).await;
    assert!(matches!(error, JoinError::Connect(ConnectError::Name { .. })), "{error}");

    let expired = FakeController::start_with(new_authority(), "localhost", -time::Duration::HOUR).await;
    let error = expect(ask(&expired)).await;
    assert!(matches!(error, JoinError::Connect(ConnectError::Clock { what: "no longer valid", .. })), "{error}");

    *controller.validity.lock().unwrap() = (time::Duration::HOUR, time::Duration::DAY);
    let error = expect(ask(&controller)).await;
    assert!(matches!(error, JoinError::ClockBehind { .. }), "{error}");
    assert!(folder.is_enrolled(), "the token is spent: the certificate is kept for when the clock is right");
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_with_the_same_keys() {
    let controller = FakeController::start().await;
    let state = tempfile::tempdir().unwrap();
    let folder = IdentityFolder::new(state.path());
    let refused = JoinRequest { name: "taken".into(), ..ask(&controller) };
    join(&folder, refused).await.unwrap_err();
    let first = std::fs::read(state.path().join("identity/pending.json")).unwrap();
    let key = std::fs::read(folder.host_key_path()).unwrap();
    join(&folder, JoinRequest { name: "taken".into(), ..ask(&controller) }).await.unwrap_err();
    assert_eq!(std::fs::read(state.path().join("identity/pending.json")).unwrap(), first);
    join(&folder, ask(&controller)).await.unwrap();
    assert_eq!(std::fs::read(folder.host_key_path()).unwrap(), key);
    assert!(!state.path().join("identity/pending.json").exists());
}

#[tokio::test]
async fn a_short_certificate_is_renewed_by_itself_and_announced() {
    let controller = FakeController::start().await;
    *controller.validity.lock().unwrap() = (-time::Duration::HOUR, time::Duration::minutes(1));
    let state = tempfile::tempdir().unwrap();
    let folder = IdentityFolder::new(state.path());
    let identity = join(&folder, ask(&controller)).await.unwrap();
    *controller.validity.lock().unwrap() = (-time::Duration::HOUR, time::Duration::DAY);
    let (sender, mut receiver) = watch::channel(Arc::new(identity));
    let cancel = CancellationToken::new();
    let task = tokio::spawn(renew::keep_renewed(folder.clone(), sender, controller.url(), cancel.clone()));
    tokio::time::timeout(Duration::from_secs(20), receiver.changed()).await.unwrap().unwrap();
    assert_eq!(folder.load().unwrap().not_after(), receiver.borrow().not_after());
    cancel.cancel();
    task.await.unwrap();
}

/// Succeeds at once, but for cluster "long", which runs until cancelled.
#[derive(Default)]
struct Simple {
    starts: AtomicU32,
}

#[async_trait]
impl Work for Simple {
    async fn run(&self, order: JobOrder, progress: Progress, cancel: CancellationToken) -> Result<Report, Failure> {
        self.starts.fetch_add(1, Ordering::SeqCst);
        progress.enter("copy", 10);
        progress.add(4);
        if order.cluster.as_str() == "long" {
            cancel.cancelled().await;
            return Err(Failure::cancelled());
        }
        Ok(Report::Verify(VerifyReport { packs: 3, segments: 0, bytes: 9, findings: Vec::new() }))
    }
}

struct Unheard;

impl JobObserver for Unheard {
    fn ended(&self, _: WorkKind, _: &JobOutcome) {}
}

/// An agent reduced to its link.
struct Agent {
    state: tempfile::TempDir,
    identity: watch::Sender<Arc<Identity>>,
    jobs: Arc<Jobs>,
    work: Arc<Simple>,
    desired: Arc<DesiredStore>,
    link: watch::Receiver<LinkState>,
    facts: watch::Sender<Arc<Facts>>,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Agent {
    async fn join(controller: &FakeController) -> Agent {
        let state = tempfile::tempdir().unwrap();
        join(&IdentityFolder::new(state.path()), ask(controller)).await.unwrap();
        Agent::start(state, controller.url())
    }

    fn start(state: tempfile::TempDir, controller: String) -> Agent {
        let identity = IdentityFolder::new(state.path()).load().unwrap();
        let (identity, identity_seen) = watch::channel(Arc::new(identity));
        let journal = Journal::open(&state.path().join("jobs"), Timestamp::now()).unwrap();
        let work = Arc::new(Simple::default());
        let jobs = Jobs::new(journal, Arc::clone(&work) as Arc<dyn Work>, Arc::new(Unheard));
        let desired = Arc::new(DesiredStore::open(state.path()).unwrap());
        let (link_state, link) = watch::channel(LinkState::Connecting);
        let (facts, facts_seen) = watch::channel(Arc::new(Facts { at: Timestamp::now(), instances: Vec::new() }));
        let cancel = CancellationToken::new();
        let running = Link {
            controller,
            identity: identity_seen,
            jobs: Arc::clone(&jobs),
            facts: facts_seen,
            desired: Arc::clone(&desired),
            labels: BTreeMap::from([("env".into(), "test".into())]),
            capabilities: vec!["verify"],
            spool_address: None,
            incarnation: "inc".into(),
            state: link_state,
        };
        let task = tokio::spawn(running.run(cancel.clone()));
        Agent { state, identity, jobs, work, desired, link, facts, cancel, task }
    }

    /// Ends the process, as far as a test can: nothing of it runs on.
    async fn stop(self) -> tempfile::TempDir {
        self.cancel.cancel();
        self.task.await.unwrap();
        self.state
    }
}

fn offer(job: &str, cluster: &str, fencing_token: u64) -> ToAgent {
    ToAgent::Offer(job::JobOrder {
        job: job.into(),
        attempt: 1,
        fencing_token,
        cluster: cluster.into(),
        traceparent: String::new(),
        past: Vec::new(),
        work: Some(job::job_order::Work::Verify(job::VerifyOrder {
            repository: "main".into(),
            backup: String::new(),
            deep: false,
        })),
    })
}

fn hello(message: FromAgent) -> Option<walfleet_proto::agent::v1::Hello> {
    if let FromAgent::Hello(hello) = message { Some(hello) } else { None }
}

fn answer(message: FromAgent) -> Option<walfleet_proto::agent::v1::JobAnswer> {
    if let FromAgent::JobAnswer(answer) = message { Some(answer) } else { None }
}

fn outcome(message: FromAgent) -> Option<job::JobOutcome> {
    if let FromAgent::Outcome(outcome) = message { Some(outcome) } else { None }
}

async fn greet(controller: &mut FakeController, epoch: u64) -> (FakeStream, walfleet_proto::agent::v1::Hello) {
    let mut stream = controller.next_stream().await;
    let hello = stream.expect("hello", hello).await;
    stream.welcome(epoch).await;
    (stream, hello)
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{what} did not come about");
}

#[tokio::test]
async fn a_job_is_answered_reported_and_forgotten_once_acknowledged() {
    let mut controller = FakeController::start().await;
    let agent = Agent::join(&controller).await;
    let (mut stream, hello) = greet(&mut controller, 1).await;
    assert_eq!((hello.incarnation.as_str(), hello.labels["env"].as_str()), ("inc", "test"));
    assert!(hello.journal.is_empty());
    stream.expect("heartbeat", |message| matches!(message, FromAgent::Heartbeat(_)).then_some(())).await;

    stream.send(offer("job_a", "orders", 5)).await;
    assert!(stream.expect("answer", answer).await.accepted);
    let first = stream.expect("outcome", outcome).await;
    assert_eq!(first.state(), job::JobState::Succeeded);

    stream.send(offer("job_a", "orders", 5)).await;
    assert!(stream.expect("the same answer", answer).await.accepted);
    assert_eq!(stream.expect("the same outcome", outcome).await, first);
    assert_eq!(agent.work.starts.load(Ordering::SeqCst), 1);

    stream.send(ToAgent::OutcomeReceived(OutcomeReceived { job: "job_a".into(), fencing_token: 5 })).await;
    until("forgetting", || agent.jobs.unsettled().is_empty()).await;
    agent.stop().await;
    stream.ended().await;
}

#[tokio::test]
async fn outcomes_survive_a_lost_connection_and_a_restart_of_the_agent() {
    let mut controller = FakeController::start().await;
    let agent = Agent::join(&controller).await;
    let (mut stream, _) = greet(&mut controller, 1).await;
    stream.send(offer("job_a", "orders", 5)).await;
    stream.expect("outcome", outcome).await;
    drop(stream);
    let (mut stream, hello) = greet(&mut controller, 1).await;
    assert!(hello.journal[0].outcome.is_some(), "told again after a reconnect");
    stream.expect("outcome", outcome).await;

    stream.send(offer("job_b", "long", 6)).await;
    stream.expect("answer", answer).await;
    until("job_b running", || agent.jobs.now_running().len() == 1).await;
    let state = agent.stop().await;
    stream.ended().await;

    let agent = Agent::start(state, controller.url());
    let (mut stream, hello) = greet(&mut controller, 1).await;
    let ended: BTreeMap<_, _> =
        hello.journal.iter().map(|entry| (entry.job.as_str(), entry.outcome.clone().unwrap())).collect();
    assert_eq!(ended["job_a"].state(), job::JobState::Succeeded);
    assert_eq!((ended["job_b"].error_code.as_str(), ended["job_b"].retryable), ("agent.restarted", true));
    stream.expect("outcome", outcome).await;
    agent.stop().await;
}

#[tokio::test]
async fn orders_can_be_cancelled_refused_and_unreadable() {
    let mut controller = FakeController::start().await;
    let agent = Agent::join(&controller).await;
    let (mut stream, _) = greet(&mut controller, 1).await;
    stream.send(offer("job_a", "long", 5)).await;
    assert!(stream.expect("answer", answer).await.accepted);
    let progress = stream
        .expect("progress", |message| if let FromAgent::Progress(progress) = message { Some(progress) } else { None })
        .await;
    assert_eq!((progress.phase.as_str(), progress.done_bytes, progress.total_bytes), ("copy", 4, 10));

    stream.send(offer("job_b", "long", 6)).await;
    let busy = stream.expect("answer", answer).await;
    assert!(!busy.accepted && busy.busy && busy.reason.contains("job_a"), "{}", busy.reason);

    stream.send(offer("job_c", "No Such Name", 7)).await;
    let unreadable = stream.expect("answer", answer).await;
    assert!(!unreadable.accepted && !unreadable.busy && unreadable.reason.contains("cluster"), "{}", unreadable.reason);

    stream.send(ToAgent::Cancel(CancelJob { job: "job_a".into(), fencing_token: 5 })).await;
    assert_eq!(stream.expect("outcome", outcome).await.state(), job::JobState::Cancelled);
    agent.stop().await;
}

fn desired(generation: u64) -> ToAgent {
    ToAgent::Desired(Desired {
        generation,
        repositories: vec![DesiredRepository {
            name: "main".into(),
            url: "file:///srv".into(),
            options: Default::default(),
            root_public_key: vec![7; 32].into(),
        }],
        clusters: vec![DesiredCluster { name: "orders".into(), repository: "main".into(), ..Default::default() }],
        writer_chain: Vec::new(),
        limits: Some(Limits { cpu_percent: 25, upload_bytes_per_second: 5_000_000, ..Default::default() }),
        spools: Vec::new(),
    })
}

#[tokio::test]
async fn the_desired_state_outlives_the_controller_and_an_older_one_is_refused() {
    let mut controller = FakeController::start().await;
    let agent = Agent::join(&controller).await;
    let (stream, _) = greet(&mut controller, 3).await;
    stream.send(desired(9)).await;
    let mut seen = agent.desired.watch();
    tokio::time::timeout(Duration::from_secs(20), seen.wait_for(Option::is_some)).await.unwrap().unwrap();

    // A generation older than the one held: the stream is given up, and the state stays.
    stream.send(desired(8)).await;
    let (stream, _) = {
        stream.ended().await;
        greet(&mut controller, 3).await
    };
    drop(stream);

    // A controller of an older epoch: its stream is given up before anything is taken from it.
    let (stream, _) = greet(&mut controller, 2).await;
    stream.ended().await;
    let waiting = agent.link.borrow().clone();
    assert!(matches!(&waiting, LinkState::Waiting { reason, .. } if reason.contains("epoch 2")), "{waiting:?}");

    let state = agent.stop().await;
    drop(controller);
    let agent = Agent::start(state, "https://localhost:1".into());
    let desired = agent.desired.watch().borrow().clone().unwrap();
    assert_eq!(desired.generation, 9);
    let (cpu, upload) = ("25%".parse().ok(), "5MB/s".parse().ok());
    assert_eq!(desired.limits, LimitsSpec { cpu, upload, ..LimitsSpec::NONE });
    agent.stop().await;
}

#[tokio::test]
async fn a_renewed_certificate_and_new_facts_reach_the_controller() {
    let mut controller = FakeController::start().await;
    let agent = Agent::join(&controller).await;
    let (mut stream, _) = greet(&mut controller, 1).await;
    stream.expect("facts", |message| matches!(message, FromAgent::Facts(_)).then_some(())).await;

    // As after minutes in which this process stood still.
    let empty = |at| Arc::new(Facts { at, instances: Vec::new() });
    agent.facts.send_replace(empty(Timestamp::now() - SignedDuration::from_mins(2)));
    let folder = IdentityFolder::new(agent.state.path());
    let renewed = renew::renew(&folder, &folder.load().unwrap(), &controller.url()).await.unwrap();
    agent.identity.send_replace(Arc::new(renewed));
    stream.ended().await;
    let (mut stream, _) = greet(&mut controller, 1).await;
    let no_facts = |message| match message {
        FromAgent::Facts(facts) => panic!("facts that are two minutes old: {facts:?}"),
        message => matches!(message, FromAgent::Heartbeat(_)).then_some(()),
    };
    stream.expect("a heartbeat", no_facts).await;
    let at = Timestamp::now();
    agent.facts.send_replace(empty(at));
    let told = |message| match message {
        FromAgent::Facts(facts) => Some(facts.at_us),
        _ => None,
    };
    assert_eq!(stream.expect("facts of now, though they say the same", told).await, at.as_microsecond());
    agent.facts.send_replace(Arc::new(Facts { at, instances: vec![crate::facts::tests::down("orders")] }));
    stream
        .expect("changed facts", |message| match message {
            FromAgent::Facts(facts) => {
                facts.instances.iter().any(|instance| instance.cluster == "orders").then_some(())
            }
            _ => None,
        })
        .await;
    agent.stop().await;
}
