//! What other hosts bring is kept: only of clusters and from agents that the controller names, under names that are made
//! here, so that nobody gets anything stored elsewhere.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use walfleet_repository::ids::ClusterName;

use super::files::{Owner, SpoolError, SpoolLog, Spools};
use super::message::{Begin, NumberedPiece, ToKeeper};
use super::seats::{Parked, Seats};
use super::{MOST_PIECE_BYTES, Spool, SpooledPiece};
use crate::access::RepositoryAccess;
use crate::durable::DurableError;
use crate::tasks::on_disk;
use crate::wire::Incoming;

/// Taken in together, under one sync, if they are there.
const MOST_AT_ONCE: usize = 64;

pub struct Keeper {
    spool: Arc<Spool>,
    seats: Seats,
    /// What the log has of why somebody's WAL is not kept.
    told: Mutex<BTreeMap<Owner, String>>,
}

/// What is kept of one writer.
struct Held {
    /// Always there between two steps.
    log: Option<SpoolLog>,
    /// Up to this piece; 0: nothing yet.
    last: u64,
}

/// What is to be done before the next answer.
#[derive(Default)]
struct Batch {
    pieces: Vec<(u64, Arc<SpooledPiece>)>,
    released: Option<u64>,
    is_over: bool,
}

impl Keeper {
    pub fn new(spool: Arc<Spool>) -> Keeper {
        Keeper { spool, seats: Seats::default(), told: Mutex::default() }
    }

    /// Keeps what one agent brings until it goes. What it has not let go of by then is left, and its own again if it is soon back.
    pub async fn keep(
        &self,
        agent: &str,
        mut incoming: Incoming,
        kept: &mpsc::Sender<Result<u64, Status>>,
    ) -> Result<(), Status> {
        let Some(ToKeeper::Begin(begin)) = incoming.next().await? else {
            return Err(Status::invalid_argument("a stream to a spool begins with its cluster"));
        };
        self.granted(agent, &begin)?;
        let owner = Owner { cluster: begin.cluster.clone(), member: agent.to_owned() };
        let mut seat = self.seats.take(&owner, begin.writer).await?;
        let repository = self.granted(agent, &begin)?;
        let (spools, parked) = (Arc::clone(&self.spool.spools), seat.parked());
        let whose = owner.clone();
        let begun = on_disk(move || begin_or_resume(&spools, &whose, &repository, parked)).await;
        let mut held = begun.map_err(|error| self.refusal(&owner, error))?;
        tracing::info!(cluster = %begin.cluster, agent, behind = held.last, "this host's spool keeps WAL of another");
        let leave = seat.leave.clone();
        let ended = self.take_in((&owner, &begin), incoming, kept, &mut held, &leave).await;
        let Held { log, last } = held;
        if let Some(log) = log {
            seat.park(Parked { log: on_disk(move || log.park()).await, last });
        }
        ended
    }

    /// Until the writer goes, or another connection of it is there.
    async fn take_in(
        &self,
        (owner, begin): (&Owner, &Begin),
        mut incoming: Incoming,
        kept: &mpsc::Sender<Result<u64, Status>>,
        held: &mut Held,
        leave: &CancellationToken,
    ) -> Result<(), Status> {
        let mut access = self.spool.access.clone();
        answer(kept, held.last, leave).await?;
        let mut last = held.last;
        loop {
            let first = tokio::select! {
                () = leave.cancelled() => return Err(taken_over()),
                first = incoming.next() => first?,
                changed = access.changed() => {
                    changed.map_err(|_| Status::unavailable("the agent stops"))?;
                    self.granted(&owner.member, begin)?;
                    continue;
                }
            };
            let mut batch = Batch::default();
            batch.take(first, begin, &mut last)?;
            while !batch.is_over && batch.pieces.len() < MOST_AT_ONCE {
                let Some(more) = incoming.at_hand() else { break };
                batch.take(more?, begin, &mut last)?;
            }
            let is_over = batch.is_over;
            let appended = held.append(batch).await;
            if let Some(number) = appended.map_err(|error| self.refusal(owner, error))? {
                self.told().remove(owner);
                answer(kept, number, leave).await?;
            }
            if is_over {
                return Ok(());
            }
        }
    }

    fn told(&self) -> std::sync::MutexGuard<'_, BTreeMap<Owner, String>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The other agent comes again every second, and tells of it, too.
    fn refusal(&self, owner: &Owner, error: SpoolError) -> Status {
        let is_full = match &error {
            SpoolError::Io { source, .. } | SpoolError::Durable(DurableError::Io { source, .. }) => {
                source.kind() == io::ErrorKind::StorageFull
            }
            _ => false,
        };
        let problem = match error {
            // How much moves, and so do the names of files.
            SpoolError::Full { most, .. } => format!("its spool is full: it holds {most} bytes at most"),
            _ if is_full => "no space left on the disk of its spool".to_owned(),
            _ => error.to_string(),
        };
        if self.told().insert(owner.clone(), problem.clone()).as_ref() != Some(&problem) {
            let Owner { cluster, member } = owner;
            tracing::warn!(%cluster, agent = member, "another host's WAL is not kept: {error}");
        }
        if is_full || matches!(error, SpoolError::Full { .. }) {
            Status::resource_exhausted(problem)
        } else {
            Status::internal(problem)
        }
    }

    /// Where pieces of a cluster belong, if this agent may bring some.
    fn granted(&self, agent: &str, begin: &Begin) -> Result<Arc<RepositoryAccess>, Status> {
        let access = self.spool.access.borrow();
        let grants = access.iter().flat_map(|access| &access.spools);
        let granted = grants
            .filter(|grant| grant.cluster == begin.cluster && grant.system_identifier == begin.system_identifier)
            .find(|grant| grant.agents.iter().any(|named| named == agent));
        granted.map(|grant| Arc::clone(&grant.repository)).ok_or_else(|| not_named(agent, &begin.cluster))
    }
}

fn not_named(agent: &str, cluster: &ClusterName) -> Status {
    Status::permission_denied(format!("the controller has not named {agent} as one that keeps WAL of {cluster} here"))
}

impl Held {
    /// Syncs a batch to disk, and removes what is let go of; the last piece of it, if there was one.
    async fn append(&mut self, Batch { pieces, released, .. }: Batch) -> Result<Option<u64>, SpoolError> {
        let Some(mut log) = self.log.take() else { return Ok(None) };
        let newest = pieces.last().map(|(number, _)| *number);
        let done = on_disk(move || {
            let appended = if pieces.is_empty() { Ok(()) } else { log.append(&pieces).map(drop) };
            if let Some(number) = released {
                log.release(number);
            }
            (log, appended)
        });
        let (log, appended) = done.await;
        self.log = Some(log);
        appended?;
        self.last = newest.unwrap_or(self.last);
        Ok(newest)
    }
}

fn begin_or_resume(
    spools: &Arc<Spools>,
    owner: &Owner,
    repository: &RepositoryAccess,
    parked: Option<Parked>,
) -> Result<Held, SpoolError> {
    if let Some(Parked { log, last }) = parked
        && let Some(log) = log.resume(repository)?
    {
        return Ok(Held { log: Some(log), last });
    }
    Ok(Held { log: Some(SpoolLog::begin(spools, owner, repository)?), last: 0 })
}

impl Batch {
    fn take(&mut self, message: Option<ToKeeper>, begin: &Begin, last: &mut u64) -> Result<(), Status> {
        match message {
            None => self.is_over = true,
            Some(ToKeeper::Begin(_)) => return Err(Status::invalid_argument("a stream begins once")),
            Some(ToKeeper::Release(number)) => self.released = self.released.max(Some(number.min(*last))),
            Some(ToKeeper::Piece(NumberedPiece { number, numbers, sealed })) => {
                let place = numbers.place().filter(|_| number > *last && sealed.len() <= MOST_PIECE_BYTES);
                let place = place.ok_or_else(|| {
                    Status::invalid_argument(format!("piece {number} of {} is none: {numbers:?}", begin.cluster))
                })?;
                *last = number;
                let piece = SpooledPiece { place, from: numbers.from, to: numbers.to, sealed };
                self.pieces.push((number, Arc::new(piece)));
            }
        }
        Ok(())
    }
}

async fn answer(
    kept: &mpsc::Sender<Result<u64, Status>>,
    number: u64,
    leave: &CancellationToken,
) -> Result<(), Status> {
    // A connection that is dead takes no more, and does not say so.
    let sent = leave.run_until_cancelled(kept.send(Ok(number))).await.ok_or_else(taken_over)?;
    sent.map_err(|_| Status::cancelled("the other end is gone"))
}

fn taken_over() -> Status {
    Status::aborted("another connection of the same writer has taken over")
}
