//! The one thread that writes: it gathers what waits, applies it in order, commits once, and answers.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use redb::{Durability, ReadableTable, Table, WriteTransaction};
use tokio::sync::oneshot;

use super::{KV, LEASE, LEASE_KEY, LOG, META, Shared, record};
use crate::state::{Compare, KeyValue, LeaseId, Op, OpResponse, StateError, Txn, TxnOutcome};

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
        let mut answers = Vec::with_capacity(group.len());
        match self.write(group, &ended, &mut answers) {
            Ok(revision) => {
                self.revision = revision;
                self.shared.committed.send_if_modified(|newest| std::mem::replace(newest, revision) != revision);
                answers.into_iter().for_each(|answer| self.answer(answer));
            }
            Err(source) => {
                // Nothing of the group is durable. Leases that ended stay ended in memory, and are tried again at the
                // next start.
                let error = self.shared.storage("write", source);
                tracing::error!(error = %error, source = ?std::error::Error::source(&error), "the state cannot be written");
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
        let mut write = self.shared.database.begin_write()?;
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

/// The open tables of one redb transaction.
struct Tables<'t> {
    kv: Table<'t, &'static str, &'static [u8]>,
    log: Table<'t, (u64, u32), &'static [u8]>,
    lease: Table<'t, u64, u64>,
    lease_key: Table<'t, (u64, &'static str), ()>,
    meta: Table<'t, &'static str, u64>,
    revision: u64,
}

impl<'t> Tables<'t> {
    fn open(write: &'t WriteTransaction, revision: u64) -> Result<Self, redb::Error> {
        Ok(Self {
            kv: write.open_table(KV)?,
            log: write.open_table(LOG)?,
            lease: write.open_table(LEASE)?,
            lease_key: write.open_table(LEASE_KEY)?,
            meta: write.open_table(META)?,
            revision,
        })
    }

    fn find(&self, key: &str) -> Result<Result<Option<KeyValue>, StateError>, redb::Error> {
        Ok(self.kv.get(key)?.map(|found| record::decode(key, found.value())).transpose())
    }

    /// Decides before it writes: an answer with an error has changed nothing.
    fn txn(
        &mut self,
        txn: Txn,
        lease_lives: impl Fn(LeaseId) -> bool,
    ) -> Result<Result<TxnOutcome, StateError>, redb::Error> {
        let mut succeeded = true;
        for compare in &txn.compares {
            match self.find(Compare::key(compare))? {
                Ok(found) => succeeded &= compare.holds(found.as_ref()),
                Err(damaged) => return Ok(Err(damaged)),
            }
        }
        let ops = if succeeded { txn.then } else { txn.or_else };
        for op in &ops {
            // A damaged entry is found here, before the first write.
            if let Err(damaged) = self.find(op.key())? {
                return Ok(Err(damaged));
            }
            if let Op::Put { lease: Some(lease), .. } = op {
                if !lease_lives(*lease) {
                    return Ok(Err(StateError::LeaseNotFound { lease: *lease }));
                }
            }
        }
        let revision = self.revision + 1;
        let mut changes = 0;
        let mut responses = Vec::with_capacity(ops.len());
        for op in ops {
            let before = match self.find(op.key())? {
                Ok(before) => before,
                Err(damaged) => return Ok(Err(damaged)),
            };
            responses.push(match op {
                Op::Get { .. } => OpResponse::Get(before),
                Op::Put { key, value, lease } => {
                    let create_revision = before.as_ref().map_or(revision, |before| before.create_revision);
                    let version = before.as_ref().map_or(1, |before| before.version + 1);
                    let entry = KeyValue { key, value, create_revision, mod_revision: revision, version, lease };
                    self.put(before.and_then(|before| before.lease), entry, &mut changes)?;
                    OpResponse::Put
                }
                Op::Delete { key } => {
                    if let Some(before) = &before {
                        self.delete(&key, before.lease, revision, &mut changes)?;
                    }
                    OpResponse::Delete { existed: before.is_some() }
                }
            });
        }
        if changes > 0 {
            self.revision = revision;
        }
        Ok(Ok(TxnOutcome { succeeded, revision: self.revision, responses }))
    }

    fn put(&mut self, old_lease: Option<LeaseId>, entry: KeyValue, changes: &mut u32) -> Result<(), redb::Error> {
        if let Some(old) = old_lease.filter(|old| Some(*old) != entry.lease) {
            self.lease_key.remove((old.0, entry.key.as_str()))?;
        }
        if let Some(lease) = entry.lease {
            self.lease_key.insert((lease.0, entry.key.as_str()), ())?;
        }
        self.kv.insert(entry.key.as_str(), record::encode(&entry).as_slice())?;
        self.log.insert((entry.mod_revision, *changes), record::encode_put(&entry).as_slice())?;
        *changes += 1;
        Ok(())
    }

    fn delete(
        &mut self,
        key: &str,
        lease: Option<LeaseId>,
        revision: u64,
        changes: &mut u32,
    ) -> Result<(), redb::Error> {
        if let Some(lease) = lease {
            self.lease_key.remove((lease.0, key))?;
        }
        self.kv.remove(key)?;
        self.log.insert((revision, *changes), record::encode_delete(key).as_slice())?;
        *changes += 1;
        Ok(())
    }

    /// Deletes the lease and its keys, in one revision.
    fn end_lease(&mut self, lease: LeaseId) -> Result<(), redb::Error> {
        let mut keys = Vec::new();
        for entry in self.lease_key.range((lease.0, "")..)? {
            let (key, _) = entry?;
            let (of, key) = key.value();
            if of != lease.0 {
                break;
            }
            keys.push(key.to_owned());
        }
        let revision = self.revision + 1;
        let mut changes = 0;
        for key in keys {
            self.delete(&key, Some(lease), revision, &mut changes)?;
        }
        if changes > 0 {
            self.revision = revision;
        }
        self.lease.remove(lease.0)?;
        Ok(())
    }

    fn compacted(&self) -> Result<u64, redb::Error> {
        Ok(self.meta.get("compacted")?.map_or(0, |found| found.value()))
    }

    /// Forgets changes up to and including `revision`; going back is no error and does nothing.
    fn compact(&mut self, revision: u64) -> Result<(), redb::Error> {
        if revision <= self.compacted()? {
            return Ok(());
        }
        self.log.retain_in(..=(revision, u32::MAX), |_, _| false)?;
        self.meta.insert("compacted", revision)?;
        Ok(())
    }
}
