//! A host, played by a test: speaks the agent's stream by hand.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use walfleet_proto::agent::v1 as agent;
use walfleet_proto::agent::v1::agent_link_client::AgentLinkClient;
use walfleet_proto::agent::v1::agent_message::Message as Say;
use walfleet_proto::agent::v1::controller_message::Message as Told;
use walfleet_proto::job::v1 as job;

use super::world::{Door, PATIENCE};

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
        spool_address: String::new(),
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

/// Says only what the test says, and heartbeats.
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
    /// Says hello with this journal, and is welcomed.
    pub async fn attach(door: Door, name: &'static str, journal: Vec<agent::JournalEntry>) -> FakeAgent {
        let (say, queue) = mpsc::channel(64);
        let mut client = AgentLinkClient::new(door);
        let stream = client.attach(ReceiverStream::new(queue)).await.expect("a stream").into_inner();
        let running: Arc<Mutex<Vec<agent::JournalEntry>>> = Arc::default();
        running.lock().expect("unpoisoned").extend(journal.iter().filter(|entry| entry.outcome.is_none()).cloned());
        let mut fake = FakeAgent { name, say, stream, running, beats: None };
        fake.say(Say::Hello(hello(journal))).await;
        fake.expect("welcome", |told| matches!(told, Told::Welcome(_)).then_some(())).await;
        fake.beat();
        fake
    }

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
            ..Default::default()
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
