//! The link to the peer's spool: everything that the repository lacks, and piece by piece what comes. After a new connection it
//! goes on behind what the peer still holds.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tonic::Status;

use super::Spool;
use super::files::SpoolError;
use super::message::{Begin, ToKeeper, WriterId};
use super::outbox::Outbox;
use super::spooler::{Spooled, Spooling};
use super::trust::{self, TrustError};
use crate::access::SpoolPeer;
use crate::wire;

/// A peer that syncs nothing for so long is away.
const PATIENCE: Duration = Duration::from_secs(2);

/// What passes sooner is not told of: a peer may hear of this host a moment after this host of it.
const GRACE: Duration = Duration::from_secs(2);

/// Before it is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// Pieces on their way at once; the peer's answers have room for as many.
const WINDOW: usize = 32;

/// Of them in memory; one more always may be.
const WINDOW_BYTES: usize = 8 << 20;

/// Of messages that wait to be sent: the window, and what goes between.
const OUTBOUND: usize = 64;

pub struct Link {
    pub spool: Arc<Spool>,
    pub spooling: Spooling,
    pub outbox: Arc<Outbox>,
    /// Of the numbers in the outbox.
    pub writer: WriterId,
    pub state: watch::Sender<Spooled>,
}

#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("the controller names no agent that keeps it beside this one")]
    NoPeer,
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error("what it lacks cannot be read again: {0}")]
    Spool(#[from] SpoolError),
    #[error("{}", .0.message())]
    Status(#[from] Status),
    #[error("it closed the connection")]
    Closed,
    #[error("it has not answered for {} s", PATIENCE.as_secs())]
    Silent,
    #[error("another agent is named")]
    Changed,
}

/// What the log has of the peer's absence.
#[derive(Default)]
struct Told {
    away_since: Option<Instant>,
    problem: Option<String>,
}

/// Pieces that were sent and not answered.
#[derive(Default)]
struct Flight {
    pieces: VecDeque<(u64, usize)>,
    bytes: usize,
}

impl Flight {
    /// How many more may be sent.
    fn room(&self) -> usize {
        if self.bytes < WINDOW_BYTES { WINDOW.saturating_sub(self.pieces.len()) } else { 0 }
    }

    fn begin(&mut self, number: u64, bytes: usize) {
        self.pieces.push_back((number, bytes));
        self.bytes += bytes;
    }

    fn land(&mut self, kept: u64) {
        while let Some((_, bytes)) = self.pieces.pop_front_if(|(number, _)| *number <= kept) {
            self.bytes -= bytes;
        }
    }
}

impl Link {
    /// Tries for ever.
    pub async fn run(&self) {
        let mut access = self.spool.access.clone();
        let mut told = Told::default();
        loop {
            access.borrow_and_update();
            let peer = self.peer();
            let name = peer.as_ref().map(|peer| peer.agent.clone());
            self.state.send_modify(|state| state.peer.clone_from(&name));
            let ended = match &peer {
                Some(peer) => self.stream(peer, &mut told).await,
                None => Err(LinkError::NoPeer),
            };
            let Err(error) = ended;
            let is_changed = matches!(error, LinkError::Changed);
            let problem = error.to_string();
            let is_over = told.away_since.get_or_insert_with(Instant::now).elapsed() >= GRACE;
            if is_over && !is_changed && told.problem.as_ref() != Some(&problem) {
                tracing::warn!(cluster = %self.spooling.owner.cluster, peer = name.as_deref().unwrap_or("none"),
                    "commits do not wait for two spools for now: {problem}");
                told.problem = Some(problem.clone());
            }
            self.state.send_modify(|state| state.peer_problem = Some(problem));
            if !is_changed {
                tokio::select! {
                    () = tokio::time::sleep(AGAIN) => {}
                    // Whoever is named now is tried at once.
                    _ = access.changed() => {}
                }
            }
        }
    }

    fn peer(&self) -> Option<SpoolPeer> {
        let access = self.spool.access.borrow();
        access.as_ref()?.clusters.get(&self.spooling.owner.cluster)?.spool_peer.clone()
    }

    async fn stream(&self, peer: &SpoolPeer, told: &mut Told) -> Result<std::convert::Infallible, LinkError> {
        let identity = Arc::clone(&self.spool.identity.borrow());
        let channel = trust::connect(&identity, &peer.agent, &peer.address).await?;
        let (outbound, waiting) = mpsc::channel(OUTBOUND);
        let begin = Begin {
            cluster: self.spooling.owner.cluster.clone(),
            system_identifier: self.spooling.system_id.0,
            segment_bytes: self.spooling.segment_size.bytes(),
            writer: Some(self.writer),
        };
        send(&outbound, ToKeeper::Begin(begin)).await?;
        let late = |_| LinkError::Silent;
        let mut inbound = tokio::time::timeout(PATIENCE, wire::bring(channel, waiting)).await.map_err(late)??;
        let first = tokio::time::timeout(PATIENCE, inbound.next()).await.map_err(late)??;

        let (mut newest, mut released) = (self.outbox.newest(), self.outbox.released());
        let mut access = self.spool.access.clone();
        // What is to be there before it counts as caught up.
        let target = *newest.borrow();
        // More than there is nobody holds.
        let held = first.filter(|held| *held <= target).ok_or(LinkError::Closed)?;
        // It has not heard what was let go of while it was away.
        let let_go = *released.borrow_and_update();
        send(&outbound, ToKeeper::Release(let_go)).await?;
        let (mut sent, mut kept) = (held, held.max(let_go));
        let mut flight = Flight::default();
        let mut waits_since = Instant::now();
        self.note(kept, target, told);
        loop {
            if sent <= kept {
                waits_since = Instant::now();
            }
            flight.land(kept);
            let room = flight.room();
            for piece in self.outbox.behind(sent, room) {
                if flight.room() == 0 {
                    break;
                }
                let number = piece.number();
                match piece.read().await {
                    Ok(piece) => {
                        flight.begin(number, piece.sealed.len());
                        send(&outbound, ToKeeper::Piece(piece)).await?;
                    }
                    // It was let go of meanwhile.
                    Err(_) if number <= *released.borrow() => {}
                    Err(error) => return Err(error.into()),
                }
                sent = number;
            }
            tokio::select! {
                answer = inbound.next() => {
                    kept = answer?.ok_or(LinkError::Closed)?.max(kept);
                    waits_since = Instant::now();
                    self.note(kept, target, told);
                }
                _ = newest.changed(), if room > 0 => {}
                _ = released.changed() => {
                    let number = *released.borrow_and_update();
                    kept = number.max(kept);
                    send(&outbound, ToKeeper::Release(number)).await?;
                    self.note(kept, target, told);
                }
                _ = access.changed() => {
                    if self.peer().as_ref() != Some(peer) {
                        return Err(LinkError::Changed);
                    }
                }
                () = tokio::time::sleep_until(waits_since + PATIENCE), if sent > kept => return Err(LinkError::Silent),
            }
        }
    }

    /// Once it has all that there was when it was reached, it counts.
    fn note(&self, kept: u64, target: u64, told: &mut Told) {
        self.state.send_if_modified(|state| {
            let mut is_modified = kept > state.there;
            state.there = kept.max(state.there);
            if kept >= target && state.peer_problem.take().is_some() {
                is_modified = true;
                told.away_since = None;
                if told.problem.take().is_some() {
                    tracing::info!(cluster = %self.spooling.owner.cluster, peer = state.peer.as_deref().unwrap_or_default(),
                        "commits wait for two spools again");
                }
            }
            is_modified
        });
    }
}

async fn send(outbound: &mpsc::Sender<ToKeeper>, message: ToKeeper) -> Result<(), LinkError> {
    let sent = tokio::time::timeout(PATIENCE, outbound.send(message)).await.map_err(|_| LinkError::Silent)?;
    sent.map_err(|_| LinkError::Closed)
}
