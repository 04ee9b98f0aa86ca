//! One stream, from Hello to its end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;
use walfleet_repository::ids::JobId;

use super::message::{FromController, Hello, Refusal, ToController, Welcome};
use super::{Link, LinkError, LinkState, SessionEnd, refused};
use crate::config::hostname;
use crate::facts::Facts;
use crate::identity::connect;
use crate::jobs::Answer;
use crate::jobs::order::JobOrder;
use crate::journal::JobOutcome;
use crate::progress::ProgressReading;
use crate::tasks::on_disk;
use crate::wire::{self, Attached};

/// Messages waiting for the network. Deep enough that a burst of outcomes after a reconnect does not wait for one
/// round trip each; shallow enough that a dead peer is noticed.
const OUTBOUND_DEPTH: usize = 32;

/// For the controller's welcome, and for room in the outbound queue.
const PATIENCE: Duration = Duration::from_secs(30);

/// An unacknowledged outcome is sent again after this.
const RESEND: Duration = Duration::from_secs(30);

/// At most one report of progress per job in this time (the contract's pace).
const PROGRESS: Duration = Duration::from_secs(1);

/// How long a stopping agent waits for the controller to acknowledge its last outcomes.
const FAREWELL: Duration = Duration::from_secs(2);

/// Facts are looked for anew every ten seconds. Older ones were taken before this process stood still, or a look hangs: what
/// they say of now is not known, and silence says so.
const OLDEST_FACTS: SignedDuration = SignedDuration::from_secs(30);

/// How often the agent looks whether the controller is still there.
const SILENCE_CHECK: Duration = Duration::from_secs(5);

struct Session<'a> {
    link: &'a mut Link,
    outbound: mpsc::Sender<ToController>,
    welcome: Welcome,
    /// Tokens of outcomes sent in this session.
    sent_outcomes: BTreeMap<JobId, u64>,
    sent_progress: BTreeMap<JobId, ProgressReading>,
    sent_facts: Arc<Facts>,
    /// They were due when only old ones were there.
    owes_facts: bool,
    heard: Instant,
    /// Only a controller that answers heartbeats can be judged by its silence.
    answers_heartbeats: bool,
}

impl Link {
    /// Connects, introduces itself, and serves the stream until it ends.
    pub(super) async fn session(&mut self, cancel: &CancellationToken) -> Result<SessionEnd, LinkError> {
        let opened = tokio::select! {
            () = cancel.cancelled() => return Ok(SessionEnd::Cancelled),
            opened = self.open() => opened?,
        };
        let (outbound, mut inbound, welcome) = opened;
        let since = Timestamp::now();
        tracing::info!(controller = welcome.controller, epoch = welcome.leader_epoch, "linked to the controller");
        self.state.send_replace(LinkState::Connected { controller: welcome.controller.clone(), since });
        let facts = Arc::clone(&self.facts.borrow_and_update());
        let mut session = Session {
            link: self,
            outbound,
            welcome,
            sent_outcomes: BTreeMap::new(),
            sent_progress: BTreeMap::new(),
            sent_facts: Arc::clone(&facts),
            owes_facts: false,
            heard: Instant::now(),
            answers_heartbeats: false,
        };
        session.send_facts(facts).await?;
        session.serve(&mut inbound, cancel).await
    }

    async fn open(&mut self) -> Result<(mpsc::Sender<ToController>, Attached, Welcome), LinkError> {
        let identity = Arc::clone(&self.identity.borrow_and_update());
        let channel = connect::connect(&self.controller, &identity.trust()?).await?;
        let (outbound, waiting) = mpsc::channel(OUTBOUND_DEPTH);
        let hello = Hello {
            incarnation: self.incarnation.clone(),
            labels: self.labels.clone(),
            hostname: hostname(),
            journal: self.jobs.unsettled(),
            recipient: identity.recipient(),
            capabilities: self.capabilities.clone(),
            spool_address: self.spool_address.clone(),
        };
        outbound.send(ToController::Hello(hello)).await.map_err(|_| LinkError::Stalled)?;
        let late = |_| LinkError::Silent { seconds: PATIENCE.as_secs() };
        let mut inbound = timeout(PATIENCE, wire::attach(channel, waiting))
            .await
            .map_err(late)?
            .map_err(|status| refused(&status))?;
        let first = timeout(PATIENCE, inbound.next()).await.map_err(late)?.map_err(|status| refused(&status))?;
        let Some(FromController::Welcome(welcome)) = first.transpose()? else {
            return Err(LinkError::NoWelcome);
        };
        let (store, epoch) = (Arc::clone(&self.desired), welcome.leader_epoch);
        on_disk(move || store.obey_epoch(epoch)).await?;
        Ok((outbound, inbound, welcome))
    }
}

impl Session<'_> {
    async fn serve(&mut self, inbound: &mut Attached, cancel: &CancellationToken) -> Result<SessionEnd, LinkError> {
        let mut heartbeat = every(self.welcome.heartbeat);
        let mut facts_due = every(self.welcome.facts_interval);
        let mut progress = every(PROGRESS);
        let mut resend = every(RESEND);
        let mut silence = every(SILENCE_CHECK);
        let mut ends = self.link.jobs.ends();
        self.send_heartbeat().await?;
        self.send_outcomes(Resend::All).await?;
        loop {
            // Every arm only waits, on something that keeps its place when dropped; the work is done after the choice.
            tokio::select! {
                () = cancel.cancelled() => {
                    self.farewell(inbound).await;
                    return Ok(SessionEnd::Cancelled);
                }
                Ok(()) = self.link.identity.changed() => return Ok(SessionEnd::Renewed),
                message = inbound.next() => {
                    let message = message.map_err(|status| refused(&status))?;
                    let Some(message) = message else {
                        return Err(LinkError::Ended { reason: "the controller closed it".into() });
                    };
                    self.heard = Instant::now();
                    match message {
                        Ok(message) => self.handle(message).await?,
                        Err(error) => tracing::error!(%error, "a message of the controller does not read; ignored"),
                    }
                }
                Ok(()) = ends.changed() => self.send_outcomes(Resend::Unsent).await?,
                Ok(()) = self.link.facts.changed() => {
                    let facts = Arc::clone(&self.link.facts.borrow_and_update());
                    if self.owes_facts || facts.differs_materially(&self.sent_facts) {
                        self.send_facts(facts).await?;
                    }
                }
                _ = heartbeat.tick() => self.send_heartbeat().await?,
                _ = facts_due.tick() => {
                    let facts = Arc::clone(&self.link.facts.borrow());
                    self.send_facts(facts).await?;
                }
                _ = progress.tick() => self.send_progress().await?,
                _ = resend.tick() => self.send_outcomes(Resend::All).await?,
                _ = silence.tick() => self.check_silence()?,
            }
        }
    }

    async fn handle(&mut self, message: FromController) -> Result<(), LinkError> {
        match message {
            FromController::Offer(order) => self.offer(*order).await,
            FromController::Unreadable { job, attempt, fencing_token, reason } => {
                tracing::error!(%job, reason, "an order cannot be read and is refused");
                let refusal = Some(Refusal { reason, busy: false });
                self.send(ToController::JobAnswer { job, attempt, fencing_token, refusal }).await
            }
            FromController::Cancel { job, fencing_token } => {
                self.link.jobs.cancel(&job, fencing_token);
                Ok(())
            }
            FromController::OutcomeReceived { job, fencing_token } => {
                self.sent_outcomes.remove(&job);
                self.link.jobs.acknowledge(job, fencing_token).await;
                Ok(())
            }
            FromController::Desired(desired) => {
                let (store, generation) = (Arc::clone(&self.link.desired), desired.generation);
                on_disk(move || store.accept(*desired)).await?;
                tracing::info!(generation, "desired state accepted");
                Ok(())
            }
            FromController::HeartbeatSeen => {
                self.answers_heartbeats = true;
                Ok(())
            }
            FromController::Welcome(welcome) => {
                // A new leader behind the same stream: its epoch counts, its pace at the next connection.
                let (store, epoch) = (Arc::clone(&self.link.desired), welcome.leader_epoch);
                Ok(on_disk(move || store.obey_epoch(epoch)).await?)
            }
        }
    }

    async fn offer(&mut self, order: JobOrder) -> Result<(), LinkError> {
        let (job, attempt, fencing_token) = (order.job.clone(), order.attempt, order.fencing_token);
        let refusal = match self.link.jobs.offer(order).await {
            Answer::Start => None,
            Answer::AlreadyTaken => {
                // If it has ended, the controller missed the outcome: send it again with the answer.
                self.sent_outcomes.remove(&job);
                None
            }
            Answer::Superseding => Some(Refusal { reason: "an earlier attempt is being stopped".into(), busy: true }),
            Answer::Refused { reason, busy } => {
                tracing::info!(%job, attempt, reason, busy, "job refused");
                Some(Refusal { reason, busy })
            }
        };
        let accepted = refusal.is_none();
        self.send(ToController::JobAnswer { job: job.clone(), attempt, fencing_token, refusal }).await?;
        if accepted
            && let Some(outcome) = self.link.jobs.outcome(&job)
            && !self.sent_outcomes.contains_key(&job)
        {
            self.send_outcome(outcome).await?;
        }
        Ok(())
    }

    async fn send_heartbeat(&mut self) -> Result<(), LinkError> {
        let running = self.link.jobs.now_running();
        self.send(ToController::Heartbeat { at: Timestamp::now(), running }).await
    }

    async fn send_facts(&mut self, facts: Arc<Facts>) -> Result<(), LinkError> {
        // Nothing collected yet is as old as can be.
        self.owes_facts = Timestamp::now().duration_since(facts.at) > OLDEST_FACTS;
        if self.owes_facts {
            return Ok(());
        }
        self.sent_facts = Arc::clone(&facts);
        self.send(ToController::Facts(facts)).await
    }

    async fn send_progress(&mut self) -> Result<(), LinkError> {
        let running = self.link.jobs.now_running();
        self.sent_progress.retain(|job, _| running.iter().any(|running| running.job == *job));
        for running in running {
            if self.sent_progress.get(&running.job) != Some(&running.progress) {
                self.sent_progress.insert(running.job.clone(), running.progress);
                self.send(ToController::Progress { at: Timestamp::now(), running }).await?;
            }
        }
        Ok(())
    }

    async fn send_outcomes(&mut self, which: Resend) -> Result<(), LinkError> {
        let outcomes: Vec<JobOutcome> =
            self.link.jobs.unsettled().iter().filter_map(crate::journal::JobRecord::outcome).collect();
        for outcome in outcomes {
            let sent = self.sent_outcomes.get(&outcome.job) == Some(&outcome.fencing_token);
            if which == Resend::All || !sent {
                self.send_outcome(outcome).await?;
            }
        }
        Ok(())
    }

    async fn send_outcome(&mut self, outcome: JobOutcome) -> Result<(), LinkError> {
        self.sent_outcomes.insert(outcome.job.clone(), outcome.fencing_token);
        self.send(ToController::Outcome(Box::new(outcome))).await
    }

    fn check_silence(&self) -> Result<(), LinkError> {
        let limit = (self.welcome.heartbeat * 3).max(PATIENCE);
        if self.answers_heartbeats && self.heard.elapsed() > limit {
            return Err(LinkError::Silent { seconds: self.heard.elapsed().as_secs() });
        }
        Ok(())
    }

    /// Jobs have been stopped before: their outcomes go out, and are waited for a little.
    async fn farewell(&mut self, inbound: &mut Attached) {
        let last_words = async {
            self.send_outcomes(Resend::Unsent).await?;
            while !self.sent_outcomes.is_empty() {
                match inbound.next().await {
                    Ok(Some(Ok(message @ FromController::OutcomeReceived { .. }))) => self.handle(message).await?,
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => break,
                }
            }
            Ok::<(), LinkError>(())
        };
        // What is not acknowledged now is in the journal and sent at the next start.
        let _ = timeout(FAREWELL, last_words).await;
    }

    async fn send(&self, message: ToController) -> Result<(), LinkError> {
        match timeout(PATIENCE, self.outbound.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(LinkError::Ended { reason: "the connection is gone".into() }),
            Err(_) => Err(LinkError::Stalled),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Resend {
    All,
    Unsent,
}

fn every(period: Duration) -> Interval {
    let mut interval = interval_at(Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
