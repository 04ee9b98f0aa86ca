//! The one thread that writes: it gathers what waits, applies it in order, commits once, and answers.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use redb::Durability;
use tokio::sync::oneshot;

use super::Shared;
use super::apply::Tables;
use crate::state::{LeaseId, StateError, Txn, TxnOutcome};

/// Requests in one commit: enough that a sync costs little per transaction, few enough that none waits for long.
const GROUP: usize = 128;
/// How long the thread sleeps when no lease is near its end.
const IDLE: Duration = Duration::from_secs(3600);
/// Etcd's shortest lease is longer; tests use short ones.
const SHORTEST_LEASE: Duration = Duration::from_millis(10);

type Reply<T> = oneshot::Sender<Result<T, StateError>>;

pub(super) enum Request {
    Txn { txn: Txn, reply: Reply<TxnOutcome> },
    Grant { ttl: Duration, reply: Reply<LeaseId> },
    Revoke { lease: LeaseId, reply: Reply<()> },
    Compact { revision: u64, reply: Reply<()> },
}

/// A request that was applied, with the answer that may be given once the commit is durable.
enum Answered {
    Txn(Reply<TxnOutcome>, Result<TxnOutcome, StateError>),
    Grant(Reply<LeaseId>, LeaseId, Duration),
    Done(Reply<()>, Result<(), StateError>),
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    requests: Receiver<Request>,
    /// Of the last commit.
    revision: u64,
    history: u64,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, requests: Receiver<Request>, revision: u64, history: u64) -> Self {
        Self { shared, requests, revision, history }
    }

    /// Until every sender is gone.
    pub(super) fn run(mut self) {
        loop {
            let sleep = self.shared.leases().next_deadline();
            let sleep = sleep.map_or(IDLE, |deadline| deadline.saturating_duration_since(Instant::now()));
            let mut group = Vec::new();
            match self.requests.recv_timeout(sleep) {
                Ok(first) => group.push(first),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            group.extend(self.requests.try_iter().take(GROUP - group.len()));
            let ended = self.shared.leases().take_ended(Instant::now());
            if !group.is_empty() || !ended.is_empty() {
                self.commit(group, ended);
            }
        }
    }

    fn commit(&mut self, group: Vec<Request>, ended: Vec<LeaseId>) {
        if self.shared.file.is_closed() {
            self.reopen();
        }
        let mut answers = Vec::with_capacity(group.len());
        match self.write(group, &ended, &mut answers) {
            Ok(revision) => {
                self.revision = revision;
                self.shared.committed.send_if_modified(|newest| std::mem::replace(newest, revision) != revision);
                answers.into_iter().for_each(|answer| self.answer(answer));
            }
            Err(source) => {
                let error = self.shared.file.error("write", source);
                let source = std::error::Error::source(&error).map(tracing::field::display);
                tracing::error!(%error, source, "the state cannot be written");
                self.reopen();
                for answer in answers {
                    match answer {
                        Answered::Txn(reply, _) => drop(reply.send(Err(error.clone()))),
                        Answered::Grant(reply, ..) => drop(reply.send(Err(error.clone()))),
                        Answered::Done(reply, _) => drop(reply.send(Err(error.clone()))),
                    }
                }
            }
        }
    }

    /// After a failed write: what is durable is what the file says.
    fn reopen(&mut self) {
        match self.shared.file.reopen() {
            Ok(contents) => {
                self.revision = contents.revision;
                self.shared
                    .committed
                    .send_if_modified(|newest| std::mem::replace(newest, contents.revision) != contents.revision);
                self.shared.leases().adopt(contents.leases);
                tracing::warn!(revision = self.revision, "opened the state anew after a failed write");
            }
            Err(error) => {
                let source = std::error::Error::source(&error).map(tracing::field::display);
                tracing::error!(%error, source, "the state cannot be opened again");
            }
        }
    }

    /// Callers that went away are no concern: what they asked for has happened.
    fn answer(&self, answer: Answered) {
        match answer {
            Answered::Txn(reply, outcome) => drop(reply.send(outcome)),
            Answered::Grant(reply, lease, length) => {
                self.shared.leases().begin(lease, length);
                drop(reply.send(Ok(lease)));
            }
            Answered::Done(reply, outcome) => drop(reply.send(outcome)),
        }
    }

    /// One redb transaction: all requests in order, each change with its own revision.
    fn write(&self, group: Vec<Request>, ended: &[LeaseId], answers: &mut Vec<Answered>) -> Result<u64, redb::Error> {
        let mut group = group.into_iter();
        let result = self.apply_all(&mut group, ended, answers);
        // Requests the failure kept us from still want their answer.
        for request in group {
            answers.push(match request {
                Request::Txn { reply, .. } => Answered::Txn(reply, Err(StateError::Closed)),
                Request::Grant { reply, ttl } => Answered::Grant(reply, LeaseId(0), ttl),
                Request::Revoke { reply, .. } | Request::Compact { reply, .. } => Answered::Done(reply, Ok(())),
            });
        }
        result
    }

    fn apply_all(
        &self,
        group: &mut impl Iterator<Item = Request>,
        ended: &[LeaseId],
        answers: &mut Vec<Answered>,
    ) -> Result<u64, redb::Error> {
        self.shared.file.with(|database| {
            let mut write = database.begin_write()?;
            write.set_durability(Durability::Immediate)?;
            let revision = {
                let mut tables = Tables::open(&write, self.revision)?;
                for lease in ended {
                    tables.end_lease(*lease)?;
                }
                for request in group {
                    self.apply(&mut tables, request, answers)?;
                }
                let compacted = tables.compacted()?;
                if tables.revision > compacted + 2 * self.history.max(1) {
                    tables.compact(tables.revision - self.history.max(1))?;
                }
                tables.meta.insert("revision", tables.revision)?;
                tables.revision
            };
            write.commit()?;
            Ok(revision)
        })
    }

    fn apply(&self, tables: &mut Tables<'_>, request: Request, answers: &mut Vec<Answered>) -> Result<(), redb::Error> {
        // The reply goes into `answers` whatever happens, so that a storage error reaches its caller too.
        match request {
            Request::Txn { txn, reply } => {
                let outcome = tables.txn(txn, |lease| self.shared.leases().contains(lease));
                let (outcome, failure) = split(outcome);
                answers.push(Answered::Txn(reply, outcome));
                failure
            }
            Request::Grant { ttl, reply } => {
                let length = ttl.max(SHORTEST_LEASE);
                let lease = LeaseId(rand::random::<u64>() >> 1 | 1);
                answers.push(Answered::Grant(reply, lease, length));
                let millis = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
                tables.lease.insert(lease.0, millis)?;
                Ok(())
            }
            Request::Revoke { lease, reply } => {
                if !self.shared.leases().end(lease) {
                    answers.push(Answered::Done(reply, Err(StateError::LeaseNotFound { lease })));
                    return Ok(());
                }
                answers.push(Answered::Done(reply, Ok(())));
                tables.end_lease(lease)
            }
            Request::Compact { revision, reply } => {
                let newest = tables.revision;
                if revision > newest {
                    let error = StateError::FutureRevision { requested: revision, newest };
                    answers.push(Answered::Done(reply, Err(error)));
                    return Ok(());
                }
                answers.push(Answered::Done(reply, Ok(())));
                tables.compact(revision)
            }
        }
    }
}

/// Parts a storage failure, which aborts the whole group, from an answer to the caller alone.
fn split(
    outcome: Result<Result<TxnOutcome, StateError>, redb::Error>,
) -> (Result<TxnOutcome, StateError>, Result<(), redb::Error>) {
    match outcome {
        Ok(outcome) => (outcome, Ok(())),
        Err(failure) => (Err(StateError::Closed), Err(failure)),
    }
}
