//! The link to the controller: one stream, dialled out, made again whenever it ends.
//!
//! It carries; it does not decide. Orders go to `jobs`, the desired state to `desired`, and nothing on this host waits
//! for the link: without it the agent ships WAL, finishes its jobs and keeps their outcomes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::desired::{DesiredStore, RefusedDesired};
use crate::facts::Facts;
use crate::identity::connect::{self, ConnectError};
use crate::identity::{Identity, IdentityError};
use crate::jobs::Jobs;
use crate::wire::WireError;

pub(crate) mod backoff;
pub mod message;
mod session;

#[cfg(test)]
mod fake_controller;
#[cfg(test)]
mod tests;

use backoff::Backoff;

/// What the link needs of the agent.
#[derive(Clone)]
pub struct Link {
    pub controller: String,
    pub identity: watch::Receiver<Arc<Identity>>,
    pub jobs: Arc<Jobs>,
    pub facts: watch::Receiver<Arc<Facts>>,
    pub desired: Arc<DesiredStore>,
    pub labels: BTreeMap<String, String>,
    pub capabilities: Vec<&'static str>,
    pub spool_address: Option<String>,
    /// Random, new at every start of the agent.
    pub incarnation: String,
    pub state: watch::Sender<LinkState>,
}

/// Where the link stands, for doctor and metrics.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkState {
    Connecting,
    /// Since the controller's welcome.
    Connected {
        controller: String,
        since: Timestamp,
    },
    /// The last attempt failed, or the stream ended.
    Waiting {
        reason: String,
        since: Timestamp,
    },
}

/// Why a stream could not be had, or ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the controller refuses this agent: {reason}")]
    Refused { reason: String },
    #[error("the stream to the controller ended: {reason}")]
    Ended { reason: String },
    #[error("the controller has been silent for {seconds} s")]
    Silent { seconds: u64 },
    #[error("the controller takes no messages")]
    Stalled,
    #[error("the controller's first message is not a welcome")]
    NoWelcome,
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Desired(#[from] RefusedDesired),
}

/// Why a session ended without fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SessionEnd {
    Cancelled,
    /// The certificate was renewed: connect with the new one.
    Renewed,
}

impl Link {
    /// Runs until cancelled; what is unknown then is whether the controller saw the last messages, which the journal
    /// covers.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut backoff = Backoff::default();
        let mut complaint = Complaint::default();
        loop {
            self.state.send_replace(LinkState::Connecting);
            let begun = Instant::now();
            let ended = self.session(&cancel).await;
            // A session that held for a while shows that all is well; one that was thrown out at once does not.
            if begun.elapsed() >= backoff::CAP {
                backoff.reset();
            }
            match ended {
                Ok(SessionEnd::Cancelled) => return,
                Ok(SessionEnd::Renewed) => tracing::info!("connecting again with the renewed certificate"),
                Err(error) => {
                    if matches!(*self.state.borrow(), LinkState::Connected { .. }) {
                        complaint = Complaint::default();
                    }
                    complaint.hear(&error);
                    let since = Timestamp::now();
                    self.state.send_replace(LinkState::Waiting { reason: error.to_string(), since });
                    tokio::select! {
                        () = cancel.cancelled() => return,
                        () = tokio::time::sleep(backoff.next(rand::random())) => {}
                    }
                }
            }
        }
    }
}

/// Says a failure once, and again only when it changes or has lasted: a controller that is down for a day must not
/// fill the disk of a database host.
#[derive(Default)]
struct Complaint {
    last: Option<(String, Instant)>,
}

impl Complaint {
    const REPEAT: std::time::Duration = std::time::Duration::from_secs(600);

    fn hear(&mut self, error: &LinkError) {
        let text = error.to_string();
        let known = self.last.as_ref().is_some_and(|(last, at)| *last == text && at.elapsed() < Self::REPEAT);
        if known {
            tracing::debug!(%error, "no link to the controller");
            return;
        }
        match error {
            LinkError::Refused { .. } | LinkError::Desired(_) => {
                tracing::error!(%error, "no link to the controller; WAL archiving and running jobs go on");
            }
            _ => tracing::warn!(%error, "no link to the controller; WAL archiving and running jobs go on"),
        }
        self.last = Some((text, Instant::now()));
    }
}

fn refused(status: &tonic::Status) -> LinkError {
    let hint = match status.code() {
        tonic::Code::Unauthenticated => "this host's certificate is not accepted; join again with a new token.",
        tonic::Code::PermissionDenied => {
            "this agent was removed from the fleet; join again with a new token if it should be back."
        }
        tonic::Code::FailedPrecondition => "the versions of agent and controller do not fit; update the older one.",
        _ => return LinkError::Ended { reason: connect::chain(status) },
    };
    LinkError::Refused { reason: hinted(status.message(), hint) }
}

/// The controller's own hint, if it gave one; one is enough.
pub(crate) fn hinted(reason: &str, hint: &str) -> String {
    if reason.contains("\nHINT: ") { reason.to_owned() } else { format!("{reason}\nHINT: {hint}") }
}
