//! One receiver's pieces on their way into two spools: sealed, appended to this host's, and brought to the peer's.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::{SegmentSize, SystemId};
use walfleet_repository::wal_archive::{OwnedTail, TailPlace, WalArchive};

use super::files::{Lies, Owner, SpoolError, SpoolLog};
use super::link::Link;
use super::message::WriterId;
use super::outbox::Outbox;
use super::{Spool, SpooledPiece};
use crate::tasks::on_disk;

/// Appended under one sync, if they are there.
const MOST_AT_ONCE: usize = 64;

/// Where pieces are by now. Pieces are numbered from 1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spooled {
    /// Everything up to this piece is synced to this host's disk.
    pub here: u64,
    /// Everything up to this piece is synced to the peer's disk.
    pub there: u64,
    /// Who keeps them there.
    pub peer: Option<String>,
    /// Why not all of it gets there: the peer is away, or has to catch up.
    pub peer_problem: Option<String>,
    /// Why not all of it gets to this host's disk.
    pub own_problem: Option<String>,
}

/// Of one cluster, for one stretch of receiving.
#[derive(Clone, Debug)]
pub struct Spooling {
    pub owner: Owner,
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
}

enum Order {
    Piece { number: u64, tail: Box<OwnedTail> },
    Release { number: u64 },
}

/// Ends with what it is part of; what was not let go of is left in both spools.
pub struct Spooler {
    orders: mpsc::UnboundedSender<Order>,
    state: watch::Receiver<Spooled>,
    next: u64,
    _stop: DropGuard,
}

impl Spooler {
    pub fn start(spool: &Arc<Spool>, spooling: Spooling, archive: WalArchive) -> Spooler {
        let not_yet = Some("the peer's spool is not reached yet".to_owned());
        let state =
            watch::Sender::new(Spooled { here: 0, there: 0, peer: None, peer_problem: not_yet, own_problem: None });
        let stop = CancellationToken::new();
        // Bounded by whoever cuts pieces: few are ever waiting.
        let (orders, waiting) = mpsc::unbounded_channel();
        let outbox = Arc::new(Outbox::default());
        let link = Link {
            spool: Arc::clone(spool),
            spooling: spooling.clone(),
            outbox: Arc::clone(&outbox),
            writer: WriterId::random(),
            state: state.clone(),
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move { link.run().await }));
        let subscribed = state.subscribe();
        let writer =
            Writer { spool: Arc::clone(spool), spooling, archive, outbox, state, log: None, hole: 0, newest: 0 };
        tokio::spawn(writer.run(waiting));
        Spooler { orders, state: subscribed, next: 1, _stop: stop.drop_guard() }
    }

    /// Takes on a piece; its number.
    pub fn put(&mut self, tail: OwnedTail) -> u64 {
        let number = self.next;
        self.next += 1;
        // It ends only after this.
        let _ = self.orders.send(Order::Piece { number, tail: Box::new(tail) });
        number
    }

    /// The repository has everything up to this piece.
    pub fn release(&self, number: u64) {
        let _ = self.orders.send(Order::Release { number });
    }

    /// Of the newest piece.
    pub fn newest(&self) -> u64 {
        self.next - 1
    }

    pub fn state(&self) -> Spooled {
        self.state.borrow().clone()
    }

    /// Until something moved. Safe to drop.
    pub async fn changed(&mut self) {
        if self.state.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

struct Writer {
    spool: Arc<Spool>,
    spooling: Spooling,
    archive: WalArchive,
    outbox: Arc<Outbox>,
    state: watch::Sender<Spooled>,
    log: Option<SpoolLog>,
    /// The last piece that is not on this disk: nothing behind it counts before it was let go of.
    hole: u64,
    /// The last piece that is.
    newest: u64,
}

impl Writer {
    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let mut waiting = Vec::with_capacity(MOST_AT_ONCE);
        let mut released = 0;
        while orders.recv_many(&mut waiting, MOST_AT_ONCE).await > 0 {
            let mut pieces = Vec::new();
            for order in waiting.drain(..) {
                match order {
                    Order::Release { number } => released = number.max(released),
                    Order::Piece { number, tail } => match self.seal(*tail).await {
                        Ok(piece) => {
                            self.outbox.put(number, piece.numbers(), piece.sealed.clone());
                            pieces.push((number, Arc::new(piece)));
                        }
                        Err(problem) => self.failed(number, problem),
                    },
                }
            }
            self.outbox.release(released);
            let newest = pieces.last().map(|(number, _)| *number);
            let numbers: Vec<u64> = pieces.iter().map(|(number, _)| *number).collect();
            match self.append(pieces, released).await {
                Ok(places) => {
                    self.newest = newest.unwrap_or(self.newest);
                    numbers.into_iter().zip(places).for_each(|(number, lies)| self.outbox.lies(number, lies));
                }
                Err(error) => self.failed(newest.unwrap_or(0), error.to_string()),
            }
            let is_whole = self.hole <= released;
            self.state.send_if_modified(|state| {
                let before = (state.here, state.own_problem.is_some());
                state.here = state.here.max(released).max(if is_whole { self.newest } else { 0 });
                if is_whole && state.own_problem.take().is_some() {
                    tracing::info!("this host's spool keeps WAL again");
                }
                (state.here, state.own_problem.is_some()) != before
            });
        }
    }

    async fn seal(&self, tail: OwnedTail) -> Result<SpooledPiece, String> {
        let place = TailPlace { wal: tail.wal, segment: tail.segment, size: tail.segment_size };
        let (from, to) = (tail.name.from, tail.name.to);
        let (_, sealed) = self.archive.seal_tail(tail).await.map_err(|error| error.to_string())?;
        Ok(SpooledPiece { place, from, to, sealed })
    }

    async fn append(&mut self, pieces: Vec<(u64, Arc<SpooledPiece>)>, released: u64) -> Result<Vec<Lies>, SpoolError> {
        if self.log.is_none() && pieces.is_empty() {
            return Ok(Vec::new());
        }
        let (log, spool, owner) = (self.log.take(), Arc::clone(&self.spool), self.spooling.owner.clone());
        let repository = self.repository(&owner.cluster);
        let done = on_disk(move || -> Result<_, SpoolError> {
            let mut log = match (log, repository) {
                (Some(log), _) => log,
                (None, Some(repository)) => SpoolLog::begin(&spool.spools, &owner, &repository)?,
                (None, None) => return Err(SpoolError::NoRepository(owner.cluster)),
            };
            let appended = if pieces.is_empty() { Ok(Vec::new()) } else { log.append(&pieces) };
            log.release(released);
            Ok((Some(log), appended))
        });
        let (log, appended) = done.await?;
        self.log = log;
        appended
    }

    fn repository(&self, cluster: &ClusterName) -> Option<Arc<crate::access::RepositoryAccess>> {
        let access = self.spool.access.borrow();
        let cluster = access.as_ref()?.clusters.get(cluster)?;
        Some(Arc::clone(&cluster.repository))
    }

    fn failed(&mut self, number: u64, problem: String) {
        self.hole = self.hole.max(number);
        self.state.send_modify(|state| {
            if state.own_problem.is_none() {
                tracing::warn!(cluster = %self.spooling.owner.cluster, "this host's spool does not keep WAL: {problem}");
            }
            state.own_problem = Some(problem);
        });
    }
}
