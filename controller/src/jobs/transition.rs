//! What an event makes of a job: pure, total, and the same however often the event is delivered.

use jiff::{SignedDuration, Timestamp};

use super::outcome::{JobError, Outcome, Verdict};
use super::{CancelRequest, FencingToken, Job, JobState, Phase, is_transition_valid};

/// Something happened to a job.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// The dispatcher found nothing to do for it yet.
    Wait {
        reason: String,
    },
    /// The dispatcher picked an agent.
    Offer {
        agent: String,
        token: FencingToken,
    },
    /// The agent answered an offer, or shows by progress, heartbeat or journal that it runs.
    Accepted {
        token: FencingToken,
    },
    Declined {
        token: FencingToken,
        reason: String,
        busy: bool,
    },
    Ended {
        token: FencingToken,
        outcome: Outcome,
    },
    /// The agent's lease ran out, or the controller restarted and the agent did not come back in time.
    LeaseLost {
        reason: String,
    },
    /// The agent is back (or still there) and its journal has no such attempt.
    NotInJournal {
        token: FencingToken,
    },
    Cancel {
        by: String,
    },
    /// The keeper asked the repository. `outcome`: what its log proves. Without, the keeper's patience with the agent is
    /// over.
    GivenUp {
        outcome: Option<Outcome>,
        reason: String,
    },
}

/// What is to be stored.
#[derive(Clone, PartialEq, Debug)]
pub enum Step {
    To(Box<Job>),
    /// It is as the event says already: the message came again.
    Unchanged,
    /// The event has no standing; nothing changes.
    Refused(Refusal),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It belongs to an attempt that another one has replaced.
    Stale { token: FencingToken, newest: FencingToken },
    /// The job is over.
    Over(Phase),
    /// The event does not fit the state.
    OutOfPlace(Phase),
}

/// Growing pauses before further attempts: one minute, doubled each time, half an hour at most. A store or a server
/// that restarts is back within the first ones, and a lasting fault costs two attempts an hour.
const FIRST_PAUSE: SignedDuration = SignedDuration::from_secs(60);
const LONGEST_PAUSE: SignedDuration = SignedDuration::from_mins(30);
/// Before a busy agent is asked again.
const BUSY_PAUSE: SignedDuration = SignedDuration::from_secs(10);

fn pause_after(failures: u32) -> SignedDuration {
    let doublings = failures.saturating_sub(1).min(10);
    (FIRST_PAUSE * 2_i32.pow(doublings)).min(LONGEST_PAUSE)
}

impl Job {
    pub fn on_event(&self, event: Event, now: Timestamp) -> Step {
        if self.is_over() {
            return self.after_the_end(&event);
        }
        let step = match event {
            Event::Wait { reason } => self.wait(reason),
            Event::Offer { agent, token } => self.offer(agent, token, now),
            Event::Accepted { token } => self.of_newest(token, |job| job.accepted(now)),
            Event::Declined { token, reason, busy } => self.of_newest(token, |job| job.declined(&reason, busy, now)),
            Event::Ended { token, outcome } => self.of_newest(token, |job| job.ended(outcome, now)),
            Event::LeaseLost { reason } => self.lease_lost(reason, now),
            Event::NotInJournal { token } => self.of_newest(token, |job| job.not_in_journal(now)),
            Event::Cancel { by } => self.cancelled(by, now),
            Event::GivenUp { outcome, reason } => self.given_up(outcome, reason, now),
        };
        if let Step::To(next) = &step {
            debug_assert!(is_transition_valid(self.phase(), next.phase()), "{:?} to {:?}", self.phase(), next.phase());
        }
        step
    }

    fn after_the_end(&self, event: &Event) -> Step {
        match event {
            // The acknowledgement was lost and the outcome comes again.
            Event::Ended { token, .. } if *token == self.token && self.agent.is_some() => Step::Unchanged,
            _ => Step::Refused(Refusal::Over(self.phase())),
        }
    }

    fn of_newest(&self, token: FencingToken, then: impl FnOnce(&Job) -> Step) -> Step {
        // Before the first offer nothing can have been attempted: token 0 is never given out.
        if token == self.token && self.attempt > 0 {
            then(self)
        } else {
            Step::Refused(Refusal::Stale { token, newest: self.token })
        }
    }

    fn to(&self, state: JobState, change: impl FnOnce(&mut Job)) -> Step {
        let mut next = self.clone();
        next.state = state;
        change(&mut next);
        Step::To(Box::new(next))
    }

    fn out_of_place(&self) -> Step {
        Step::Refused(Refusal::OutOfPlace(self.phase()))
    }

    fn wait(&self, reason: String) -> Step {
        match &self.state {
            JobState::Queued { reason: known, .. } if *known == reason => Step::Unchanged,
            JobState::Queued { not_before, .. } => {
                self.to(JobState::Queued { reason, not_before: *not_before }, |_| {})
            }
            _ => self.out_of_place(),
        }
    }

    fn offer(&self, agent: String, token: FencingToken, now: Timestamp) -> Step {
        match &self.state {
            JobState::Queued { not_before, .. } if *not_before <= now && token > self.token => {
                self.to(JobState::Offered { since: now }, |job| {
                    job.attempt = job.attempt.saturating_add(1);
                    job.token = token;
                    job.agent = Some(agent);
                })
            }
            _ => self.out_of_place(),
        }
    }

    fn accepted(&self, now: Timestamp) -> Step {
        match &self.state {
            JobState::Running { .. } => Step::Unchanged,
            // Queued: the attempt was thought lost, and is not.
            JobState::Offered { .. } | JobState::Unknown { .. } | JobState::Queued { .. } => {
                self.to(JobState::Running { since: now }, |job| {
                    job.started_at.get_or_insert(now);
                })
            }
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => self.out_of_place(),
        }
    }

    fn declined(&self, reason: &str, busy: bool, now: Timestamp) -> Step {
        let agent = self.agent.as_deref().unwrap_or("unknown");
        match &self.state {
            JobState::Offered { .. } | JobState::Unknown { accepted: false, .. } => {}
            // It has turned it down before, or taken it on: the answer came again, or late.
            JobState::Queued { .. } | JobState::Running { .. } | JobState::Unknown { .. } => return Step::Unchanged,
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => return self.out_of_place(),
        }
        if let Some(cancel) = &self.cancel {
            let by = cancel.by.clone();
            return self.finish(Outcome::concluded(Verdict::Cancelled(JobError::cancelled(&by)), now), now);
        }
        if busy {
            let reason = format!("agent {agent} is busy: {reason}");
            return self.to(JobState::Queued { reason, not_before: now + BUSY_PAUSE }, |_| {});
        }
        self.finish(Outcome::concluded(Verdict::Failed(JobError::declined(agent, reason)), now), now)
    }

    fn ended(&self, outcome: Outcome, now: Timestamp) -> Step {
        match &outcome.verdict {
            // Only a success outdoes the decision to try again; a failure was counted when that was decided.
            Verdict::Failed(_) | Verdict::Cancelled(_) if self.phase() == Phase::Queued => Step::Unchanged,
            Verdict::Failed(error) if error.retryable && self.may_retry() => {
                let error = error.clone();
                self.retry(&error, Some(outcome), now)
            }
            _ => self.finish(outcome, now),
        }
    }

    fn may_retry(&self) -> bool {
        self.cancel.is_none() && self.failures < self.retries
    }

    fn retry(&self, error: &JobError, outcome: Option<Outcome>, now: Timestamp) -> Step {
        let failures = self.failures.saturating_add(1);
        let pause = pause_after(failures);
        let first_line = error.message.lines().next().unwrap_or_default();
        let reason = format!("attempt {} ended: {first_line}; {} of {} retries", self.attempt, failures, self.retries);
        self.to(JobState::Queued { reason, not_before: now + pause }, |job| {
            job.failures = failures;
            job.outcome = outcome;
        })
    }

    fn finish(&self, outcome: Outcome, now: Timestamp) -> Step {
        let state = match &outcome.verdict {
            Verdict::Succeeded => JobState::Succeeded,
            Verdict::Failed(_) => JobState::Failed,
            Verdict::Cancelled(_) => JobState::Cancelled,
        };
        self.to(state, |job| {
            if job.started_at.is_none() {
                job.started_at = outcome.started_at;
            }
            // The controller's clock, so that a job never ends before it began, whatever the host's clock says.
            job.finished_at = Some(now);
            job.outcome = Some(outcome);
        })
    }

    fn lease_lost(&self, reason: String, now: Timestamp) -> Step {
        match &self.state {
            JobState::Offered { .. } => self.to(JobState::Unknown { since: now, reason, accepted: false }, |_| {}),
            JobState::Running { .. } => self.to(JobState::Unknown { since: now, reason, accepted: true }, |_| {}),
            JobState::Unknown { .. } | JobState::Queued { .. } => Step::Unchanged,
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => self.out_of_place(),
        }
    }

    fn not_in_journal(&self, now: Timestamp) -> Step {
        match &self.state {
            JobState::Queued { .. } => Step::Unchanged,
            JobState::Offered { .. } | JobState::Unknown { accepted: false, .. } => match &self.cancel {
                Some(cancel) => {
                    let error = JobError::cancelled(&cancel.by);
                    self.finish(Outcome::concluded(Verdict::Cancelled(error), now), now)
                }
                // The offer never arrived: it is delivered again, as the same attempt.
                None if self.phase() == Phase::Offered => Step::Unchanged,
                None => self.to(JobState::Offered { since: now }, |_| {}),
            },
            JobState::Running { .. } | JobState::Unknown { .. } => {
                let agent = self.agent.as_deref().unwrap_or("unknown");
                self.lost(format!("agent {agent} was interrupted and knows nothing of it"), now)
            }
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => self.out_of_place(),
        }
    }

    fn lost(&self, message: String, now: Timestamp) -> Step {
        if let Some(cancel) = &self.cancel {
            let error = JobError::cancelled(&cancel.by);
            return self.finish(Outcome::concluded(Verdict::Cancelled(error), now), now);
        }
        let error = JobError::lost(message);
        if self.may_retry() {
            self.retry(&error, None, now)
        } else {
            self.finish(Outcome::concluded(Verdict::Failed(error), now), now)
        }
    }

    fn cancelled(&self, by: String, now: Timestamp) -> Step {
        match &self.state {
            // Nothing runs, or nobody can be asked: it is over now. An agent that returns with it is told to stop, and
            // a backup it may have finished stays what the repository's log says it is.
            JobState::Queued { .. } | JobState::Unknown { .. } => {
                let outcome = Outcome::concluded(Verdict::Cancelled(JobError::cancelled(&by)), now);
                let step = self.finish(outcome, now);
                match step {
                    Step::To(mut job) => {
                        job.cancel = Some(CancelRequest { by, at: now });
                        Step::To(job)
                    }
                    other => other,
                }
            }
            JobState::Offered { .. } | JobState::Running { .. } if self.cancel.is_some() => Step::Unchanged,
            JobState::Offered { .. } | JobState::Running { .. } => {
                self.to(self.state.clone(), |job| job.cancel = Some(CancelRequest { by, at: now }))
            }
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => self.out_of_place(),
        }
    }

    fn given_up(&self, outcome: Option<Outcome>, reason: String, now: Timestamp) -> Step {
        match (&self.state, outcome) {
            // Queued: the attempt was thought lost, and the log proves that it had ended well.
            (JobState::Unknown { .. }, Some(outcome)) => self.finish(outcome, now),
            (JobState::Queued { .. }, Some(outcome)) if self.attempt > 0 => self.finish(outcome, now),
            (JobState::Unknown { .. }, None) => self.lost(reason, now),
            _ => self.out_of_place(),
        }
    }
}

#[cfg(test)]
mod tests;
