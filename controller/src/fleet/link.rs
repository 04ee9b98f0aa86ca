//! The controller's end of one agent's stream: how the rest of the controller speaks to the agent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use walfleet_repository::ids::JobId;

use crate::jobs::{FencingToken, Job};
use crate::reconcile::desired::DesiredSpec;

/// Tells streams of the same agent apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LinkId(u64);

/// What is said to an agent, beside the desired state.
#[derive(Clone, PartialEq, Debug)]
pub enum ToAgent {
    Offer(Box<Job>),
    Cancel { job: JobId, token: FencingToken },
    OutcomeReceived { job: JobId, token: FencingToken },
    HeartbeatSeen { at_us: i64 },
}

#[derive(Clone)]
pub struct Link {
    id: LinkId,
    queue: mpsc::Sender<ToAgent>,
    desired: Arc<watch::Sender<Option<Arc<DesiredSpec>>>>,
    closed: CancellationToken,
}

/// The stream task's side.
pub struct LinkEnd {
    pub id: LinkId,
    pub queue: mpsc::Receiver<ToAgent>,
    /// Only the newest counts, so that a slow agent gets no backlog of states that are history.
    pub desired: watch::Receiver<Option<Arc<DesiredSpec>>>,
    pub closed: CancellationToken,
}

/// Offers, cancels and acknowledgements of one host: a handful. A full queue means an agent that does not read.
const QUEUE_DEPTH: usize = 64;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

pub fn pair() -> (Link, LinkEnd) {
    let id = LinkId(NEXT_ID.fetch_add(1, Ordering::Relaxed));
    let (queue, queued) = mpsc::channel(QUEUE_DEPTH);
    let (desired, desires) = watch::channel(None);
    let closed = CancellationToken::new();
    (
        Link { id, queue, desired: Arc::new(desired), closed: closed.clone() },
        LinkEnd { id, queue: queued, desired: desires, closed },
    )
}

impl Link {
    pub fn id(&self) -> LinkId {
        self.id
    }

    /// Never waits. If the agent does not read its stream, the stream is closed; everything said is said again on the
    /// next one.
    pub fn send(&self, message: ToAgent) {
        if self.queue.try_send(message).is_err() {
            self.closed.cancel();
        }
    }

    /// Sends the desired state unless the agent was sent the same before on this stream.
    pub fn desire(&self, spec: Arc<DesiredSpec>) {
        self.desired.send_if_modified(|held| {
            let news = held.as_ref().is_none_or(|held| held.generation != spec.generation);
            if news {
                *held = Some(spec);
            }
            news
        });
    }

    pub fn close(&self) {
        self.closed.cancel();
    }
}
