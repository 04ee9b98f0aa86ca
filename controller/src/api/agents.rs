//! `AgentLink.Attach`: one stream per agent, from hello to its end.
//!
//! The agent is who its certificate says. A newer stream of the same agent ends the older one. Heartbeats and progress
//! stay in memory; answers and outcomes are durable before they are acknowledged. When anything goes wrong here, the
//! stream ends with a reason: the agent comes back, and its journal makes good what was lost.

use std::pin::Pin;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use walfleet_proto::agent::v1 as pb;
use walfleet_proto::agent::v1::agent_link_server::AgentLink;
use walfleet_repository::ids::JobId;

use super::status::of_job;
use super::{Api, now};
use crate::fleet::link::{self, LinkEnd};
use crate::fleet::{LinkId, ToAgent};
use crate::identity::{PeerIdentity, Role, peer};
use crate::jobs::store::HISTORY;
use crate::jobs::{Event, FencingToken, JobStoreError};
use crate::wire::agent::{self as wire, Answer, FromAgent, JournalEntry, PROTOCOL_VERSION, Welcome};
use crate::wire::desired::desired_out;

type ToStream = Result<pb::ControllerMessage, Status>;

/// Written to the transport as fast as the agent reads; what waits beyond is in the link's own queue.
const OUTBOUND_DEPTH: usize = 16;

#[tonic::async_trait]
impl AgentLink for Api {
    type AttachStream = Pin<Box<dyn futures::Stream<Item = ToStream> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<pb::AgentMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let peer = peer(&request)?;
        if peer.role != Role::Agent {
            return Err(Status::unauthenticated("only agents attach\nHINT: join with a token of role agent."));
        }
        let (out, messages) = mpsc::channel(OUTBOUND_DEPTH);
        let api = self.clone();
        let inbound = request.into_inner();
        // Answered at once: hello may come only after the headers. Ends with the stream.
        self.tasks.spawn("agent stream", async move {
            if let Err(status) = api.converse(&peer, inbound, &out).await {
                tracing::info!(agent = %peer.name, code = ?status.code(), reason = status.message(), "ended an agent's stream");
                // An agent that reads no more does not want to know either.
                let _ = out.try_send(Err(status));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

impl Api {
    /// Hello, then everything else until the end.
    async fn converse(
        &self,
        peer: &PeerIdentity,
        mut inbound: Streaming<pb::AgentMessage>,
        out: &mpsc::Sender<ToStream>,
    ) -> Result<(), Status> {
        let timing = &self.reconciler.fleet.timing;
        let agent = peer.name.as_str();
        let first = tokio::time::timeout(timing.hello, inbound.message()).await;
        let late = |_| Status::deadline_exceeded(format!("no hello came within {}s", timing.hello.as_secs()));
        let Some(first) = first.map_err(late)?? else { return Ok(()) };
        let Some(pb::agent_message::Message::Hello(hello)) = first.message else {
            return Err(Status::invalid_argument("the first message is not hello"));
        };
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "agent {agent} speaks protocol {}, this controller speaks {PROTOCOL_VERSION}\nHINT: bring both to the same version; the controller first.",
                hello.protocol_version
            )));
        }
        let (hello, journal) = wire::hello_in(hello).map_err(|error| error.within("hello"))?;
        let welcome = Welcome {
            controller: self.name.to_string(),
            heartbeat_seconds: u32::try_from(timing.heartbeat.as_secs()).unwrap_or(u32::MAX).max(1),
            facts_interval_seconds: u32::try_from(timing.facts_interval.as_secs()).unwrap_or(u32::MAX).max(1),
            leader_epoch: self.reconciler.epoch,
        };
        self.send(out, wire::welcome_out(welcome)).await?;
        // Before the agent can be offered anything: what it brings decides what it has.
        for said in self.settle_journal(agent, journal).await.map_err(of_job)? {
            self.say(out, said).await?;
        }
        let (link, end) = link::pair();
        tracing::info!(agent, version = hello.version, hostname = hello.hostname, "an agent attached");
        self.reconciler.fleet.attach(agent, hello, link, now());
        let id = end.id;
        let ended = self.exchange(peer, inbound, end, out).await;
        self.reconciler.fleet.detach(agent, id);
        ended
    }

    async fn exchange(
        &self,
        peer: &PeerIdentity,
        mut inbound: Streaming<pb::AgentMessage>,
        mut end: LinkEnd,
        out: &mpsc::Sender<ToStream>,
    ) -> Result<(), Status> {
        let agent = peer.name.as_str();
        let lost_after = self.reconciler.fleet.timing.lost_after;
        let refused = self.reconciler.roster.until_refused(peer);
        tokio::pin!(refused);
        let mut deadline = tokio::time::Instant::now() + lost_after;
        loop {
            // Every arm is a wait that loses nothing when dropped: the streams and channels keep what is not taken.
            tokio::select! {
                () = self.cancel.cancelled() => return Err(Status::unavailable("the controller is stopping")),
                refusal = &mut refused => return Err(refusal.into()),
                () = end.closed.cancelled() => {
                    return Err(Status::aborted(format!("agent {agent} has a newer stream, or does not read this one")));
                }
                () = tokio::time::sleep_until(deadline) => {
                    return Err(Status::deadline_exceeded(format!("nothing was heard for {}s", lost_after.as_secs())));
                }
                message = inbound.message() => {
                    let Some(message) = message? else { return Ok(()) };
                    deadline = tokio::time::Instant::now() + lost_after;
                    self.hear(agent, end.id, message, out).await?;
                }
                Some(said) = end.queue.recv() => self.say(out, said).await?,
                Ok(()) = end.desired.changed() => {
                    let spec = end.desired.borrow_and_update().clone();
                    if let Some(spec) = spec {
                        self.send(out, desired_out(&spec, self.reconciler.keeper.root_public_key().0)).await?;
                    }
                }
            }
        }
    }

    /// An offer goes out with what jobs of its cluster took; without, if that cannot be read: an estimate is worth no
    /// delay.
    async fn say(&self, out: &mpsc::Sender<ToStream>, said: ToAgent) -> Result<(), Status> {
        let past = match &said {
            ToAgent::Offer(job) => self.reconciler.jobs.done(Some(&job.cluster), HISTORY).await.unwrap_or_default(),
            _ => Vec::new(),
        };
        self.send(out, wire::to_agent(said, &past)).await
    }

    /// Waits for the agent to read, but not for ever.
    async fn send(&self, out: &mpsc::Sender<ToStream>, message: pb::ControllerMessage) -> Result<(), Status> {
        match tokio::time::timeout(self.reconciler.fleet.timing.lost_after, out.send(Ok(message))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::cancelled("the agent closed the stream")),
            Err(_) => Err(Status::deadline_exceeded("the agent does not read its stream")),
        }
    }

    async fn hear(
        &self,
        agent: &str,
        link: LinkId,
        message: pb::AgentMessage,
        out: &mpsc::Sender<ToStream>,
    ) -> Result<(), Status> {
        let fleet = &self.reconciler.fleet;
        fleet.heard(agent, link, now());
        let message = match wire::message_in(message, now()) {
            Ok(message) => message,
            Err(error) => {
                // The stream is worth more than one message: jobs hang on it.
                tracing::warn!(agent, %error, "an agent sent what does not read");
                return Ok(());
            }
        };
        match message {
            FromAgent::Heartbeat { at_us, running } => {
                fleet.running(agent, running);
                self.say(out, ToAgent::HeartbeatSeen { at_us }).await
            }
            FromAgent::Facts(facts) => {
                fleet.observe(agent, facts);
                Ok(())
            }
            FromAgent::Progress { job, progress } => {
                fleet.progress(&job, progress);
                Ok(())
            }
            FromAgent::Answer { job, token, answer } => {
                let event = match answer {
                    Answer::Accepted => Event::Accepted { token },
                    Answer::Declined { reason, busy } => Event::Declined { token, reason, busy },
                };
                self.apply(agent, &job, token, event).await.map_err(of_job)?;
                Ok(())
            }
            FromAgent::Outcome { job, token, outcome } => {
                self.apply(agent, &job, token, Event::Ended { token, outcome: *outcome }).await.map_err(of_job)?;
                // Durable, or of no standing: the agent may forget it either way.
                self.say(out, ToAgent::OutcomeReceived { job, token }).await
            }
        }
    }

    /// Carries an agent's word about an attempt out. Whether the attempt is one to go on with.
    async fn apply(&self, agent: &str, job: &JobId, token: FencingToken, event: Event) -> Result<bool, JobStoreError> {
        let jobs = &self.reconciler.jobs;
        let held = match jobs.get(job).await {
            Ok(job) => job,
            Err(JobStoreError::NotFound { .. }) => {
                tracing::warn!(agent, %job, "an agent speaks of a job that is not known here");
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        // An agent speaks for its own attempts only.
        if held.token == token && held.agent.as_deref() != Some(agent) {
            tracing::warn!(agent, %job, of = held.agent, "an agent speaks of another one's attempt");
            return Ok(false);
        }
        let applied = jobs.apply(job, event, now()).await?;
        match &applied.refused {
            None if applied.changed => {
                tracing::info!(agent, %job, state = applied.job.phase().as_str(), "a job moved");
            }
            None => {}
            Some(refusal) => tracing::warn!(agent, %job, ?refusal, "an agent's word came too late"),
        }
        Ok(applied.refused.is_none())
    }

    /// What the journal holds is adopted or refused; what it does not hold is lost. Answers what to tell the agent.
    async fn settle_journal(&self, agent: &str, journal: Vec<JournalEntry>) -> Result<Vec<ToAgent>, JobStoreError> {
        let mut answers = Vec::new();
        for entry in &journal {
            let (job, token) = (entry.job.clone(), entry.token);
            match entry.outcome.clone() {
                Some(outcome) => {
                    self.apply(agent, &job, token, Event::Ended { token, outcome }).await?;
                    answers.push(ToAgent::OutcomeReceived { job, token });
                }
                None => {
                    if !self.apply(agent, &job, token, Event::Accepted { token }).await? {
                        answers.push(ToAgent::Cancel { job, token });
                    }
                }
            }
        }
        for job in self.reconciler.jobs.active().await? {
            let known = journal.iter().any(|entry| entry.job == job.id && entry.token == job.token);
            if job.held_by() == Some(agent) && !known {
                self.apply(agent, &job.id, job.token, Event::NotInJournal { token: job.token }).await?;
            }
        }
        Ok(answers)
    }
}
