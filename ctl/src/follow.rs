//! Following a job to its end: `--wait` and `job watch`.
//!
//! The job lives in the controller and the agent; following it never changes it. Losing the controller, the terminal
//! or the patience leaves the job as it is.

mod bars;
mod lines;

use std::time::Duration;

use clap::Args;
use tokio::time::Instant;

use crate::client::{CallError, Client};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::print::count;
use crate::quantity::{parse_duration, seconds};
use crate::session::Session;
use crate::view::job::{Job, JobState, Started};
use crate::wire::JobWatch;
use bars::Bars;
use lines::Lines;

/// Between attempts to find the controller again; doubles up to the second.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(8));

/// A running job's agent says something every ten seconds at least. What it said last is no estimate any more after this.
const SILENCE: Duration = Duration::from_secs(30);

#[derive(Args, Debug, Clone, Default)]
pub struct WaitArgs {
    /// Wait until it is over, showing progress; its outcome becomes the exit code
    #[arg(long)]
    pub wait: bool,
    /// Stop waiting after this long (exit code 6); the job goes on
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, requires = "wait")]
    pub timeout: Option<Duration>,
}

/// Shows a job that was just started, or, if asked to, waits for it and shows what came of it.
pub async fn started(session: &mut Session<'_>, client: &Client, job: Job, wait: &WaitArgs) -> Result<(), Failure> {
    if wait.wait {
        let job = to_the_end(session, client, job, wait.timeout).await?;
        return conclude(session, &job);
    }
    session.show(&Started(&job))?;
    if session.is_for_people() {
        session.note(&format!("follow it with: walfleet job watch {}", job.id));
    }
    Ok(())
}

/// Shows what came of a job that is over. For machines that is the job itself, whatever its end.
pub fn conclude(session: &mut Session<'_>, job: &Job) -> Result<(), Failure> {
    if job.state == JobState::Succeeded || !session.is_for_people() {
        session.show(&Started(job))?;
    }
    succeeded(job)?;
    match &job.verification {
        Some(found) if !found.findings.is_empty() => {
            Err(Failure::Damaged { title: job.title(), found: count(found.findings.len(), "stored object") })
        }
        _ => Ok(()),
    }
}

/// The failure that a job's outcome is, if it is one.
pub fn succeeded(job: &Job) -> Result<(), Failure> {
    let Some(error) = &job.error else { return Ok(()) };
    let (title, exit) = (job.title(), Exit::of_failed_job(i64::from(error.exit_code)));
    Err(match job.state {
        JobState::Cancelled => {
            let said = error.message.as_str();
            let detail = if said.is_empty() { String::new() } else { format!(": {said}") };
            Failure::JobCancelled { title, detail, exit }
        }
        _ => Failure::Job { title, code: error.code.clone(), message: error.message.clone(), exit },
    })
}

/// Waits for the end of a job and returns it as it ended. `limit` is counted from now.
pub async fn to_the_end(
    session: &mut Session<'_>,
    client: &Client,
    job: Job,
    limit: Option<Duration>,
) -> Result<Job, Failure> {
    let began = Instant::now();
    let deadline = limit.and_then(|limit| began.checked_add(limit));
    let mut reporter = Reporter::new(session);
    let mut updates = Updates { client, id: job.id.clone(), watch: None, pause: RECONNECT.0, lost: false };
    let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
    let mut job = job;
    let mut heard = Instant::now();
    reporter.job(session, &job);
    while !job.state.is_over() {
        // Dropping `updates.next` loses at most an update, which the next one replaces.
        tokio::select! {
            update = updates.next() => match update? {
                Update::Job(now) => {
                    job = *now;
                    heard = Instant::now();
                    reporter.job(session, &job);
                }
                Update::Lost(error) => reporter.note(session, &lost(&error)),
                Update::Found => reporter.note(session, "the controller is back"),
            },
            () = tokio::time::sleep_until(heard + SILENCE) => {
                // An agent tells of a job that stands still; one that says nothing is out of reach.
                heard = Instant::now();
                reporter.silence(session, &job);
            }
            () = past(deadline) => {
                let why = format!("is not over after {}", seconds(began.elapsed().as_secs_f64()));
                reporter.finish();
                return Err(Failure::JobGoesOn { id: job.id.clone(), title: job.title(), why });
            }
            _ = &mut interrupt => {
                reporter.finish();
                return Err(Failure::JobGoesOn { id: job.id.clone(), title: job.title(), why: "is no longer waited for".to_owned() });
            }
        }
    }
    reporter.finish();
    Ok(job)
}

fn lost(error: &CallError) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    format!("{first}; the job goes on, and this is tried again")
}

async fn past(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

enum Update {
    Job(Box<Job>),
    /// Told once for each time the controller goes away.
    Lost(CallError),
    Found,
}

/// The job's changes, across restarts of the controller.
struct Updates<'a> {
    client: &'a Client,
    id: String,
    watch: Option<JobWatch>,
    pause: Duration,
    lost: bool,
}

impl Updates<'_> {
    async fn next(&mut self) -> Result<Update, CallError> {
        loop {
            let Some(watch) = &mut self.watch else {
                match self.client.watch_job(&self.id).await {
                    Ok(watch) => self.watch = Some(watch),
                    Err(error) => {
                        if let Some(update) = self.broken(error).await? {
                            return Ok(update);
                        }
                    }
                }
                continue;
            };
            match watch.next().await {
                Ok(Some(job)) => {
                    self.pause = RECONNECT.0;
                    if std::mem::take(&mut self.lost) {
                        // The job itself comes with the next call: the stream begins with it again.
                        self.watch = None;
                        return Ok(Update::Found);
                    }
                    return Ok(Update::Job(Box::new(job)));
                }
                // A controller that shuts down ends its streams first.
                Ok(None) => {
                    self.watch = None;
                    self.rest().await;
                }
                Err(error) => {
                    self.watch = None;
                    if let Some(update) = self.broken(error).await? {
                        return Ok(update);
                    }
                }
            }
        }
    }

    /// Passes on what will not pass; else rests, and tells of it the first time.
    async fn broken(&mut self, error: CallError) -> Result<Option<Update>, CallError> {
        if !error.may_pass() {
            return Err(error);
        }
        if !std::mem::replace(&mut self.lost, true) {
            return Ok(Some(Update::Lost(error)));
        }
        self.rest().await;
        Ok(None)
    }

    async fn rest(&mut self) {
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(RECONNECT.1);
    }
}

/// Bars on a terminal, lines elsewhere; always on stderr.
enum Reporter {
    Bars(Bars),
    Lines(Lines),
}

impl Reporter {
    fn new(session: &Session<'_>) -> Reporter {
        if session.surroundings.stderr_is_terminal && session.surroundings.variable("TERM") != Some("dumb") {
            Reporter::Bars(Bars::new(session.surroundings.colour_on_stderr()))
        } else {
            Reporter::Lines(Lines::default())
        }
    }

    fn job(&mut self, session: &mut Session<'_>, job: &Job) {
        match self {
            Reporter::Bars(bars) => bars.update(job),
            Reporter::Lines(lines) => {
                if let Some(line) = lines.line(job, Instant::now()) {
                    session.note(&line);
                }
            }
        }
    }

    /// Nothing was heard of the job for a while.
    fn silence(&mut self, session: &mut Session<'_>, job: &Job) {
        if job.state != JobState::Running {
            return;
        }
        let mut silent = job.clone();
        if let Some(progress) = &mut silent.progress {
            (progress.bytes_per_second, progress.left_seconds, progress.still_seconds) = (None, None, None);
        }
        silent.reason = Some("its agent has not said for a while how far it is".to_owned());
        self.job(session, &silent);
    }

    fn note(&mut self, session: &mut Session<'_>, text: &str) {
        match self {
            Reporter::Bars(bars) => bars.note(text),
            Reporter::Lines(_) => session.note(text),
        }
    }

    fn finish(&mut self) {
        match self {
            Reporter::Bars(bars) => bars.finish(),
            Reporter::Lines(_) => {}
        }
    }
}
