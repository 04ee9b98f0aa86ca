//! The embedded engine: one redb file, one process, one writer thread.
//!
//! A transaction is acknowledged after redb's commit returned with `Durability::Immediate` (file synced). Transactions
//! that wait at the same time share one commit: each keeps its own revision, all become durable together. Reads see the
//! last commit and never wait for the writer. Watches read the log of changes, so that a slow one costs no memory.
//!
//! A write that fails, as on a full disk, is answered as failed and the file is opened anew, so that the next one can
//! succeed without a restart. Whether the failed one happened is then as unknown as after a lost connection.
//!
//! Lease deadlines live in memory; what is durable is a lease's length. After a restart every lease starts anew.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use redb::{Database, ReadableDatabase, TableDefinition};
use tokio::sync::{oneshot, watch};

use super::{Engine, KeyValue, LeaseId, Page, StateError, Txn, TxnOutcome, Watch};

mod apply;
mod file;
mod follow;
mod leases;
mod record;
mod writer;

pub use file::Options;
use file::{Contents, StateFile};
use leases::Leases;
use writer::{Request, Writer};

/// key -> record (see `record`).
const KV: TableDefinition<&str, &[u8]> = TableDefinition::new("kv");
/// (revision, number within the transaction) -> change.
const LOG: TableDefinition<(u64, u32), &[u8]> = TableDefinition::new("log");
/// lease -> its length in milliseconds.
const LEASE: TableDefinition<u64, u64> = TableDefinition::new("lease");
/// (lease, key) -> nothing: the keys that go when the lease ends.
const LEASE_KEY: TableDefinition<(u64, &str), ()> = TableDefinition::new("lease_key");
/// "format", "revision", "compacted".
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

/// etcd's first revision: an empty store has it, the first write gets 2.
const FIRST_REVISION: u64 = 1;

/// What readers, the writer and watches share.
struct Shared {
    file: StateFile,
    leases: Mutex<Leases>,
    /// The newest durable revision.
    committed: watch::Sender<u64>,
}

impl Shared {
    /// Runs a read on the open file; must be off the async threads.
    fn read<T>(
        &self,
        operation: &'static str,
        read: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StateError> {
        self.file.with(read).map_err(|source| self.file.error(operation, source))
    }

    fn leases(&self) -> MutexGuard<'_, Leases> {
        // The map is valid between any two statements that change it.
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine. Dropping the last handle ends the writer after what it has accepted, and frees the file's lock.
pub struct Embedded {
    shared: Arc<Shared>,
    /// Unbounded by type; bounded by the callers, each of which waits for its answer.
    requests: Option<mpsc::Sender<Request>>,
    writer: Option<JoinHandle<()>>,
}

impl Embedded {
    pub fn open(path: &Path, options: Options) -> Result<Self, StateError> {
        let history = options.history_revisions;
        let (file, Contents { revision, leases: lengths }) = StateFile::open(path, options)?;
        let leases = Mutex::new(Leases::restored(lengths));
        let committed = watch::Sender::new(revision);
        let shared = Arc::new(Shared { file, leases, committed });
        let (requests, incoming) = mpsc::channel();
        let writer = Writer::new(shared.clone(), incoming, revision, history);
        let writer = std::thread::Builder::new()
            .name("state-writer".to_owned())
            .spawn(move || writer.run())
            .map_err(|source| shared.file.error("start the writer of", redb::Error::Io(source)))?;
        Ok(Self { shared, requests: Some(requests), writer: Some(writer) })
    }

    /// Hands a request to the writer and waits for its answer.
    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, StateError>>) -> Request,
    ) -> Result<T, StateError> {
        let (reply, answer) = oneshot::channel();
        let requests = self.requests.as_ref().ok_or(StateError::Closed)?;
        requests.send(request(reply)).map_err(|_| StateError::Closed)?;
        answer.await.map_err(|_| StateError::Closed)?
    }

    /// Runs a read off the async threads.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Shared) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, StateError> {
        let shared = self.shared.clone();
        tokio::task::spawn_blocking(move || read(&shared)).await.map_err(|_| StateError::Closed)?
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.requests.take();
        if let Some(writer) = self.writer.take() {
            // Waits for one commit at most. A panic of the writer was reported by the panic hook.
            let _ = writer.join();
        }
    }
}

#[async_trait]
impl Engine for Embedded {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StateError> {
        let key = key.to_owned();
        self.read(move |shared| {
            let found = shared.read("read", |database| {
                let table = database.begin_read()?.open_table(KV)?;
                Ok(table.get(key.as_str())?.map(|found| record::decode(&key, found.value())))
            })?;
            found.transpose()
        })
        .await
    }

    async fn range(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<Page, StateError> {
        let (prefix, start_after) = (prefix.to_owned(), start_after.map(str::to_owned));
        self.read(move |shared| {
            let mut items = Vec::new();
            let mut more = false;
            let (revision, decoded) = shared.read("list", |database| {
                let read = database.begin_read()?;
                let revision = read.open_table(META)?.get("revision")?.map_or(FIRST_REVISION, |found| found.value());
                let from = start_after.as_deref().filter(|after| *after > prefix.as_str()).unwrap_or(&prefix);
                for entry in read.open_table(KV)?.range(from..)? {
                    let (key, value) = entry?;
                    let key = key.value();
                    if !key.starts_with(prefix.as_str()) {
                        break;
                    }
                    if start_after.as_deref() == Some(key) {
                        continue;
                    }
                    if items.len() == limit {
                        more = true;
                        break;
                    }
                    match record::decode(key, value.value()) {
                        Ok(item) => items.push(item),
                        Err(error) => return Ok((revision, Err(error))),
                    }
                }
                Ok((revision, Ok(())))
            })?;
            decoded?;
            Ok(Page { items, revision, more })
        })
        .await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StateError> {
        self.ask(|reply| Request::Txn { txn, reply }).await
    }

    async fn revision(&self) -> Result<u64, StateError> {
        Ok(*self.shared.committed.borrow())
    }

    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Watch, StateError> {
        Ok(follow::start(&self.shared, prefix.to_owned(), from_revision))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StateError> {
        self.ask(|reply| Request::Grant { ttl, reply }).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StateError> {
        self.shared.leases().keep_alive(lease).ok_or(StateError::LeaseNotFound { lease })
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StateError> {
        self.ask(|reply| Request::Revoke { lease, reply }).await
    }

    async fn compact(&self, revision: u64) -> Result<(), StateError> {
        self.ask(|reply| Request::Compact { revision, reply }).await
    }
}

#[cfg(test)]
mod tests;
