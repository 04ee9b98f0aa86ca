//! What agent and controller say to each other, typed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use walfleet_repository::ids::JobId;

use crate::desired::Desired;
use crate::facts::Facts;
use crate::jobs::RunningJob;
use crate::jobs::order::JobOrder;
use crate::journal::{JobOutcome, JobRecord};

#[derive(Clone, Debug)]
pub enum ToController {
    Hello(Hello),
    Heartbeat { at: Timestamp, running: Vec<RunningJob> },
    Facts(Arc<Facts>),
    JobAnswer { job: JobId, attempt: u32, fencing_token: u64, refusal: Option<Refusal> },
    Progress { at: Timestamp, running: RunningJob },
    Outcome(Box<JobOutcome>),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    pub reason: String,
    /// Another time may do.
    pub busy: bool,
}

#[derive(Clone, Debug)]
pub struct Hello {
    /// Random, new at every start of the agent.
    pub incarnation: String,
    pub labels: BTreeMap<String, String>,
    pub hostname: String,
    /// Jobs that run, or ended without the controller having acknowledged it.
    pub journal: Vec<JobRecord>,
    /// X25519 public key that domain keys are wrapped for.
    pub recipient: [u8; 32],
    pub capabilities: Vec<&'static str>,
    /// Where other agents reach this one's spool.
    pub spool_address: Option<String>,
}

#[derive(Clone, Debug)]
pub enum FromController {
    Welcome(Welcome),
    Desired(Box<Desired>),
    Offer(Box<JobOrder>),
    /// An offer that this agent cannot read: refused, with the reason.
    Unreadable {
        job: JobId,
        attempt: u32,
        fencing_token: u64,
        reason: String,
    },
    Cancel {
        job: JobId,
        fencing_token: u64,
    },
    OutcomeReceived {
        job: JobId,
        fencing_token: u64,
    },
    HeartbeatSeen,
}

#[derive(Clone, Debug)]
pub struct Welcome {
    pub controller: String,
    pub heartbeat: Duration,
    pub facts_interval: Duration,
    /// Grows with every election.
    pub leader_epoch: u64,
}
