//! The job runner: takes offers, runs them, and journals every step, so that re-delivery of anything changes nothing.
//!
//! What to answer is decided by [`decide`], a pure function of the journal and what runs. The work itself is behind
//! [`Work`]; the runner never looks inside it, and knows nothing of the link: that asks for answers, progress and
//! outcomes when it has a connection.
//!
//! ```text
//! offer ──► Running (journalled, then answered, then started) ──► Ended (journalled, then sent) ──► Acknowledged
//!                └── the agent stops: next start journals Ended "agent.restarted" ──────┘
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use walfleet_repository::ids::JobId;

use crate::durable::DurableError;
use crate::estimate::Expected;
use crate::failure::{Failure, Remedy};
use crate::journal::{Ending, JobOutcome, JobRecord, JobState, Journal};
use crate::progress::{Progress, ProgressReading};
use crate::tasks::on_disk;

pub mod cost;
mod decide;
pub mod order;
pub mod report;
pub mod work;

use cost::JobCost;
pub use decide::{Answer, Claim, decide};
use order::{JobOrder, WorkKind};
use report::Report;

/// Does what an order says.
#[async_trait]
pub trait Work: Send + Sync + 'static {
    /// Runs until done, failed, or cancelled; after cancellation it returns soon, with [`Failure::cancelled`], and what
    /// it had begun is undone or left unmistakably unfinished. Called once per attempt.
    async fn run(&self, order: JobOrder, progress: Progress, cancel: CancellationToken) -> Result<Report, Failure>;
}

/// Hears of every job's end, for metrics.
pub trait JobObserver: Send + Sync + 'static {
    fn ended(&self, kind: WorkKind, outcome: &JobOutcome);
}

/// A job that runs now.
#[derive(Clone, Debug)]
pub struct RunningJob {
    pub job: JobId,
    pub attempt: u32,
    pub fencing_token: u64,
    pub kind: WorkKind,
    pub progress: ProgressReading,
    /// What it was expected to take when it began.
    pub expected: Option<Arc<Expected>>,
}

struct Running {
    record: JobRecord,
    progress: Progress,
    cancel: CancellationToken,
}

/// The runner. Cheap to share; lives as long as the agent.
pub struct Jobs {
    journal: Arc<Journal>,
    work: Arc<dyn Work>,
    observer: Arc<dyn JobObserver>,
    running: Mutex<BTreeMap<JobId, Running>>,
    tasks: TaskTracker,
    /// Counts ends; the link waits on it to send outcomes at once.
    ends: watch::Sender<u64>,
    /// Offers are taken one at a time: each is decided on what the one before it left.
    offers: tokio::sync::Mutex<Gate>,
    stopping: CancellationToken,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    Open,
    Closed,
}

impl Jobs {
    pub fn new(journal: Journal, work: Arc<dyn Work>, observer: Arc<dyn JobObserver>) -> Arc<Jobs> {
        Arc::new(Jobs {
            journal: Arc::new(journal),
            work,
            observer,
            running: Mutex::default(),
            tasks: TaskTracker::new(),
            ends: watch::Sender::new(0),
            offers: tokio::sync::Mutex::new(Gate::Open),
            stopping: CancellationToken::new(),
        })
    }

    /// Takes an offer or says why not. The answer is given after the journal holds it. Not safe to drop half-way: the
    /// caller lets it finish.
    pub async fn offer(self: &Arc<Jobs>, order: JobOrder) -> Answer {
        let gate = self.offers.lock().await;
        if *gate == Gate::Closed {
            return Answer::Refused { reason: "the agent is stopping".into(), busy: true };
        }
        let claim = Claim::of(&order);
        let (answer, supersede) = {
            let running = self.running();
            let record = self.journal.get(&order.job);
            let claims: Vec<(&JobId, &str)> =
                running.values().map(|running| (&running.record.job, running.record.subject.as_str())).collect();
            let answer = decide(record.as_ref(), &claims, &order, &claim);
            (answer, running.get(&order.job).map(|running| running.cancel.clone()))
        };
        match &answer {
            Answer::Start => {}
            Answer::Superseding => {
                // The controller gave the earlier attempt up; it must end here before another may begin.
                if let Some(cancel) = supersede {
                    cancel.cancel();
                }
                return answer;
            }
            Answer::AlreadyTaken | Answer::Refused { .. } => return answer,
        }
        let record = JobRecord::begin(&order, claim.into_subject(), Timestamp::now());
        let stored = record.clone();
        if let Err(error) = self.in_journal(move |journal| journal.put(stored)).await {
            tracing::error!(job = %order.job, %error, "a job cannot be journalled and is refused");
            return Answer::Refused { reason: format!("the agent cannot journal the job: {error}"), busy: true };
        }
        self.start(record, order);
        answer
    }

    /// Asks a job to stop. Its outcome follows as for any job.
    pub fn cancel(&self, job: &JobId, fencing_token: u64) {
        match self.running().get(job) {
            Some(running) if running.record.fencing_token <= fencing_token => {
                tracing::info!(%job, "job is being cancelled");
                running.cancel.cancel();
            }
            Some(_) => tracing::warn!(%job, fencing_token, "order to cancel an older attempt ignored"),
            None => tracing::debug!(%job, "order to cancel a job that does not run here"),
        }
    }

    /// The controller has the outcome.
    pub async fn acknowledge(&self, job: JobId, fencing_token: u64) {
        let named = job.clone();
        let done = self.in_journal(move |journal| journal.acknowledge(&job, fencing_token, Timestamp::now())).await;
        if let Err(error) = done {
            // It will be sent again at the next connection, and acknowledged again.
            tracing::warn!(job = %named, %error, "an acknowledged outcome stays in the journal");
        }
    }

    /// Running, or ended and not yet acknowledged.
    pub fn unsettled(&self) -> Vec<JobRecord> {
        self.journal.unsettled()
    }

    /// How the latest attempt of a job ended, acknowledged or not.
    pub fn outcome(&self, job: &JobId) -> Option<JobOutcome> {
        self.journal.get(job).and_then(|record| record.outcome())
    }

    pub fn now_running(&self) -> Vec<RunningJob> {
        let view = |running: &Running| RunningJob {
            job: running.record.job.clone(),
            attempt: running.record.attempt,
            fencing_token: running.record.fencing_token,
            kind: running.record.work,
            progress: running.progress.read(),
            expected: running.progress.expected(),
        };
        self.running().values().map(view).collect()
    }

    /// Changes whenever a job ends.
    pub fn ends(&self) -> watch::Receiver<u64> {
        self.ends.subscribe()
    }

    /// Takes no more offers, cancels what runs, waits for it. Jobs that do not end by then are named; the next start
    /// reports them as interrupted.
    pub async fn stop(&self, deadline: Duration) -> Vec<JobId> {
        *self.offers.lock().await = Gate::Closed;
        self.stopping.cancel();
        for running in self.running().values() {
            running.cancel.cancel();
        }
        self.tasks.close();
        let _ = tokio::time::timeout(deadline, self.tasks.wait()).await;
        self.running().keys().cloned().collect()
    }

    fn start(self: &Arc<Jobs>, record: JobRecord, order: JobOrder) {
        let progress = Progress::new();
        let cancel = CancellationToken::new();
        let span = tracing::info_span!("job", job = %order.job, attempt = order.attempt, kind = order.work.kind().name(),
            cluster = %order.cluster);
        if let Some(traceparent) = &order.traceparent {
            walfleet_proto::telemetry::set_parent(&span, traceparent);
        }
        let running = Running { record: record.clone(), progress: progress.clone(), cancel: cancel.clone() };
        self.running().insert(order.job.clone(), running);
        let jobs = Arc::clone(self);
        self.tasks.spawn(
            async move {
                tracing::info!("job started");
                // A task of its own, so that a panic in the work is an outcome and not the end of the runner.
                let work = Arc::clone(&jobs.work);
                let its_own = progress.clone();
                let inner = tokio::spawn(async move { work.run(order, its_own, cancel).await }.in_current_span());
                let result = inner.await.unwrap_or_else(|error| Err(panicked(&error)));
                jobs.finish(record, result, progress.cost()).await;
            }
            .instrument(span),
        );
    }

    async fn finish(&self, record: JobRecord, result: Result<Report, Failure>, cost: JobCost) {
        let ending = ending(result, self.stopping.is_cancelled());
        match &ending {
            Ending::Succeeded(_) => tracing::info!("job succeeded"),
            Ending::Failed { code, message, .. } => tracing::error!(code, "job failed: {message}"),
            Ending::Cancelled => tracing::info!("job cancelled"),
        }
        let now = Timestamp::now();
        let (job, token) = (record.job.clone(), record.fencing_token);
        let state = JobState::Ended { ending: ending.clone(), at: now };
        let ended = JobRecord { state, cost: Some(cost.clone()), ..record };
        let stored = self.in_journal(move |journal| journal.end(&job, token, ending, Some(cost), now)).await;
        if let Err(error) = stored {
            // Until it can be written the job counts as running here: after a restart it is reported as interrupted,
            // and the controller asks the repository's log.
            tracing::error!(%error, "a job's end cannot be journalled");
        }
        if let Some(outcome) = ended.outcome() {
            self.observer.ended(ended.work, &outcome);
        }
        self.running().remove(&ended.job);
        self.ends.send_modify(|count| *count += 1);
    }

    async fn in_journal<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Journal) -> Result<T, DurableError> + Send + 'static,
    ) -> Result<T, DurableError> {
        let journal = Arc::clone(&self.journal);
        on_disk(move || act(&journal)).await
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<JobId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ending(result: Result<Report, Failure>, stopping: bool) -> Ending {
    match result {
        Ok(report) => Ending::Succeeded(Box::new(report)),
        // The agent's own end is not the operator's wish: the job may run again.
        Err(failure) if failure.is_cancelled() && stopping => Ending::restarted(),
        Err(failure) if failure.is_cancelled() => Ending::Cancelled,
        Err(failure) => Ending::Failed {
            code: failure.code.to_owned(),
            exit_code: failure.exit as i32,
            retryable: failure.remedy == Remedy::Retry,
            message: failure.message,
        },
    }
}

fn panicked(error: &tokio::task::JoinError) -> Failure {
    let message =
        format!("the agent met a bug and gave the job up: {error}\nHINT: please report it with the agent's log.");
    Failure::new("agent.panicked", crate::failure::ExitCode::Failed, Remedy::Retry, message)
}

#[cfg(test)]
mod tests;
