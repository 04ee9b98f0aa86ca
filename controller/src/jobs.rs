//! Jobs: what agents are asked to do, from the asking to the true end.
//!
//! ```text
//!             offer               accepted                     outcome
//!   Queued ──────────▶ Offered ──────────────▶ Running ─────────────────▶ Succeeded
//!     ▲  ▲               │ │                   │  ▲  │                ╭──▶ Failed
//!     │  ╰── busy ───────╯ ╰── lease lost ─╮   │  │  ╰────────────────┼──▶ Cancelled
//!     │                                    ▼   ▼  │                   │
//!     ╰── retry: failed, or lost ──────── Unknown ╯ ── outcome, or given up
//! ```
//!
//! `transition` decides (pure), `dispatch` picks who is offered what (pure), `store` keeps rows with compare-and-swap.
//! Nothing here knows a stream or a clock: leases are counted in the memory of the controller that holds the agent's
//! stream, and only their loss is written.
//!
//! **Once.** A run is created once: its key stands in the same transaction as the job. A job is offered under a fencing
//! token that grows with every attempt of any job; the agent refuses an older one, the controller refuses an older
//! one's results, and the repository's log refuses a second `Open` of the same run. Every message may come twice.

pub mod dispatch;
pub mod outcome;
#[cfg(test)]
pub mod samples;
pub mod store;
pub mod target;
pub mod transition;
pub mod work;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::{ClusterName, JobId};

pub use outcome::{JobError, Outcome, Report, Verdict};
pub use store::{JobStoreError, Jobs, NewJob, ReportedBackup};
pub use transition::{Event, Refusal, Step};
pub use work::{JobKind, Work};

use crate::schedule::RunId;

/// Grows with every attempt of any job. 0 is never given out.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FencingToken(pub u64);

/// A job as the state holds it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Job {
    pub id: JobId,
    pub cluster: ClusterName,
    pub work: Work,
    /// Must run there. Absent: `dispatch` picks a member.
    pub on: Option<String>,
    /// An operator's name, or "schedule".
    pub requested_by: String,
    /// The scheduled run this serves.
    pub run: Option<RunId>,
    /// The state's key that makes a repeated request find this job; goes when the job's history goes.
    pub request_key: Option<String>,
    /// W3C trace context of the operator's call, empty if none.
    pub traceparent: String,
    pub created_at: Timestamp,
    /// When an attempt first began to run.
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    /// How many failed attempts are followed by another one.
    pub retries: u32,
    /// Attempts that ended badly. An offer that a busy agent turned down is none.
    pub failures: u32,
    /// Attempts offered; the newest one's number.
    pub attempt: u32,
    /// The newest attempt's token, agent: kept while the job waits for its next attempt, so that a result thought lost
    /// is still known for what it is.
    pub token: FencingToken,
    pub agent: Option<String>,
    pub cancel: Option<CancelRequest>,
    pub state: JobState,
    /// How the last attempt ended, or, of a job that is over, the job.
    pub outcome: Option<Outcome>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CancelRequest {
    pub by: String,
    pub at: Timestamp,
}

/// All of it is persisted. Each variant says who sets it and what ends it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Set on creation and for every further attempt. Ended by the dispatcher's offer, once `not_before` has come and
    /// nothing named in `reason` stands against it; by a cancel; by the late result of an attempt thought lost.
    Queued { reason: String, not_before: Timestamp },
    /// Set by the dispatcher before the order is sent, so that an order without a row cannot exist. The order is sent
    /// again on every reconnect and pass until the agent answers. Ended by the answer, by any sign of the attempt, by
    /// the loss of the agent's lease.
    Offered { since: Timestamp },
    /// Set by the agent's acceptance or any sign that it works. Ended by its outcome, by the loss of its lease, by a
    /// journal that knows nothing of it.
    Running { since: Timestamp },
    /// Set when the agent's lease ran out. Not final. `accepted`: whether the agent had been seen to take it on. Ended
    /// by the returning agent's journal (it runs, it ended, or it is lost), by a cancel, or, after long patience, by
    /// the keeper with the repository's log.
    Unknown { since: Timestamp, reason: String, accepted: bool },
    /// Final, as are the next two. Set by an outcome.
    Succeeded,
    /// Set by an outcome that is not to be retried, or in place of one ("job.lost").
    Failed,
    /// Set by a cancel of a job that no agent can be running, or by an outcome.
    Cancelled,
}

/// A state without its data, for tables and metrics.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Phase {
    Queued,
    Offered,
    Running,
    Unknown,
    Succeeded,
    Failed,
    Cancelled,
}

impl Phase {
    pub const ALL: [Phase; 7] = [
        Phase::Queued,
        Phase::Offered,
        Phase::Running,
        Phase::Unknown,
        Phase::Succeeded,
        Phase::Failed,
        Phase::Cancelled,
    ];

    pub fn is_over(self) -> bool {
        matches!(self, Phase::Succeeded | Phase::Failed | Phase::Cancelled)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Queued => "queued",
            Phase::Offered => "offered",
            Phase::Running => "running",
            Phase::Unknown => "unknown",
            Phase::Succeeded => "succeeded",
            Phase::Failed => "failed",
            Phase::Cancelled => "cancelled",
        }
    }
}

/// The diagram above, as a table. Staying (new data in the same state) is valid until the job is over.
pub fn is_transition_valid(from: Phase, to: Phase) -> bool {
    use Phase::*;
    match from {
        // Running and the ends: a late sign of an attempt that was thought lost.
        Queued => matches!(to, Queued | Offered | Running | Succeeded | Failed | Cancelled),
        Offered => true,
        // Never back to Offered: what was taken on is not offered again under the same token.
        Running => to != Offered,
        // Offered: the agent returns and never got it; the same attempt is delivered again.
        Unknown => true,
        Succeeded | Failed | Cancelled => false,
    }
}

impl JobState {
    pub fn phase(&self) -> Phase {
        match self {
            JobState::Queued { .. } => Phase::Queued,
            JobState::Offered { .. } => Phase::Offered,
            JobState::Running { .. } => Phase::Running,
            JobState::Unknown { .. } => Phase::Unknown,
            JobState::Succeeded => Phase::Succeeded,
            JobState::Failed => Phase::Failed,
            JobState::Cancelled => Phase::Cancelled,
        }
    }
}

impl Job {
    /// As logs know the run that it serves.
    pub fn run_name(&self) -> String {
        self.run.as_ref().map_or_else(|| self.id.to_string(), |run| run.to_string())
    }

    pub fn phase(&self) -> Phase {
        self.state.phase()
    }

    pub fn is_over(&self) -> bool {
        self.phase().is_over()
    }

    /// The agent that has an attempt of it in hand, or may have.
    pub fn held_by(&self) -> Option<&str> {
        match self.phase() {
            Phase::Offered | Phase::Running | Phase::Unknown => self.agent.as_deref(),
            Phase::Queued | Phase::Succeeded | Phase::Failed | Phase::Cancelled => None,
        }
    }

    /// Why it waits or is unknown; empty otherwise.
    pub fn reason(&self) -> &str {
        match &self.state {
            JobState::Queued { reason, .. } | JobState::Unknown { reason, .. } => reason,
            JobState::Offered { .. } | JobState::Running { .. } if self.cancel.is_some() => {
                "it is being cancelled at the agent's next safe point"
            }
            _ => "",
        }
    }
}
