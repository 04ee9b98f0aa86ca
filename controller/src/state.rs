//! Everything durable of the controller: a small ordered key-value store with revisions, compare-and-swap transactions,
//! prefix watches and leases. The model is etcd's, so that one controller on a local file and several on etcd run the
//! same code above this line.
//!
//! Engines: `embedded` (one file, one controller). The etcd engine will stand beside it as `state/etcd.rs` behind the
//! same [`Engine`] trait and must pass `conformance` unchanged. Nothing above may assume more than the trait says:
//! in particular pages of one listing may show different revisions, and a watch may end as compacted at any time.
//!
//! Keys are UTF-8 paths; who owns which prefix:
//!
//! | prefix | owner | what |
//! |---|---|---|
//! | `identity/` | `identity` | tokens, members, revocations |
//! | `audit/` | `audit` | the hash chain of mutating calls |
//! | `resource/`, `resource_version` | `resources` | declared policies, repositories, clusters; rewritten with each change, so that applies compare |
//! | `job/`, `schedule/` | `jobs`, `reconcile` | jobs and their transitions; runs that schedules have started |
//! | `agent/`, `cluster/` | `fleet` | last-known facts; what a cluster's first declaration pinned |
//! | `desired/` | `reconcile` | what each agent was last told, with its generation |
//! | `repository/` | `keeper` | which repository was found or made where |
//! | `controller/` | `reconcile`, `serve`, `state` | markers of the controller itself |

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

#[cfg(test)]
mod conformance;
pub mod embedded;
pub mod rows;
pub mod transaction;
pub mod transfer;
pub mod watch;

pub use rows::{Row, RowError};
pub use transaction::{Compare, Op, OpResponse, Txn, TxnOutcome};
pub use watch::{Event, Watch};

/// One key as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    pub key: String,
    pub value: bytes::Bytes,
    /// Revision of the transaction that created it.
    pub create_revision: u64,
    /// Revision of the transaction that last wrote it; what compare-and-swap compares.
    pub mod_revision: u64,
    /// 1 when created, one more with each write.
    pub version: u64,
    /// The lease whose end deletes the key.
    pub lease: Option<LeaseId>,
}

/// Never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// A stretch of a listing.
#[derive(Debug, Clone)]
pub struct Page {
    pub items: Vec<KeyValue>,
    /// The revision the page shows.
    pub revision: u64,
    /// Whether keys beyond the last item match too.
    pub more: bool,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum StateError {
    #[error(
        "state file {} is in use by another process\nHINT: one state file serves one controller; stop the other one, or give this one its own state.path.",
        path.display()
    )]
    Locked { path: PathBuf },
    #[error("{operation} of state {place}")]
    Storage {
        operation: &'static str,
        place: String,
        #[source]
        source: Arc<dyn Error + Send + Sync>,
    },
    #[error(
        "state {place} has format {found}, this program reads format {known}\nHINT: use the controller version that wrote it."
    )]
    Format { place: String, found: u64, known: u64 },
    #[error("state entry {key:?} is damaged: {what}\nHINT: import the last `state export` into a new state file.")]
    Damaged { key: String, what: &'static str },
    #[error("value of {key:?} has {bytes} bytes, at most {limit} are stored under one key")]
    ValueTooLarge { key: String, bytes: usize, limit: usize },
    #[error("transaction has {bytes} bytes of keys and values, at most {limit} are accepted")]
    TxnTooLarge { bytes: usize, limit: usize },
    #[error("transaction has {found} {what}, at most {limit} are accepted")]
    TooManyOps { what: &'static str, found: usize, limit: usize },
    #[error("key {key:?} is written twice in one transaction")]
    DuplicateKey { key: String },
    #[error("key {key:?} is refused: a key has 1 to {limit} bytes")]
    BadKey { key: String, limit: usize },
    #[error("lease {:016x} does not exist or has ended", lease.0)]
    LeaseNotFound { lease: LeaseId },
    #[error("revision {requested} is compacted, history begins after revision {compacted}")]
    Compacted { requested: u64, compacted: u64 },
    #[error("revision {requested} lies in the future, the newest is {newest}")]
    FutureRevision { requested: u64, newest: u64 },
    #[error("the state is closed")]
    Closed,
}

/// What an engine provides. Every method is safe to drop while waiting; a dropped `txn` may or may not have happened.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StateError>;
    async fn range(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<Page, StateError>;
    /// Durable when it returns. `txn` has passed [`Txn::validate`].
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StateError>;
    async fn revision(&self) -> Result<u64, StateError>;
    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Watch, StateError>;
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StateError>;
    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StateError>;
    async fn revoke(&self, lease: LeaseId) -> Result<(), StateError>;
    async fn compact(&self, revision: u64) -> Result<(), StateError>;
}

/// The state, cheap to clone.
#[derive(Clone)]
pub struct State {
    engine: Arc<dyn Engine>,
}

/// Keys per page of [`State::list`]: bounds memory and, on etcd, the size of one answer.
const LIST_PAGE: usize = 500;

impl State {
    /// Opens or creates the embedded engine's file.
    pub fn open(path: &Path, options: embedded::Options) -> Result<Self, StateError> {
        Ok(Self::new(Arc::new(embedded::Embedded::open(path, options)?)))
    }

    pub fn new(engine: Arc<dyn Engine>) -> Self {
        Self { engine }
    }

    pub async fn get(&self, key: &str) -> Result<Option<KeyValue>, StateError> {
        self.engine.get(key).await
    }

    /// Keys that begin with `prefix` and come after `start_after`, in byte order, at most `limit` (at least 1).
    pub async fn range(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Result<Page, StateError> {
        self.engine.range(prefix, start_after, limit.max(1)).await
    }

    /// All keys under `prefix`, with the revision of the first page. Later pages may be newer: a watch from that
    /// revision + 1 repeats what they already show, and ends in the same picture.
    pub async fn list(&self, prefix: &str) -> Result<(Vec<KeyValue>, u64), StateError> {
        let mut page = self.range(prefix, None, LIST_PAGE).await?;
        let revision = page.revision;
        let mut items = std::mem::take(&mut page.items);
        while page.more {
            let last = items.last().map(|item| item.key.clone());
            page = self.range(prefix, last.as_deref(), LIST_PAGE).await?;
            items.append(&mut page.items);
        }
        Ok((items, revision))
    }

    /// Applies `then` if every compare holds, else `or_else`; durable when it returns. What is applied gets one new
    /// revision, unless it changes nothing.
    pub async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StateError> {
        txn.validate()?;
        self.engine.txn(txn).await
    }

    /// One unconditional write.
    pub async fn put(&self, key: impl Into<String>, value: impl Into<bytes::Bytes>) -> Result<u64, StateError> {
        Ok(self.txn(Txn::new().then(Op::put(key, value))).await?.revision)
    }

    /// The newest revision.
    pub async fn revision(&self) -> Result<u64, StateError> {
        self.engine.revision().await
    }

    /// Every change under `prefix` from `from_revision` on, in order; 0 means from now. The watch answers
    /// [`StateError::Compacted`] once, and ends, if that history is gone: list again and watch from there.
    pub async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Watch, StateError> {
        self.engine.watch(prefix, from_revision).await
    }

    /// A lease that ends `ttl` after its last keep-alive. Ends are late rather than early: a restart of the engine
    /// grants every lease its full time again.
    pub async fn grant(&self, ttl: Duration) -> Result<LeaseId, StateError> {
        self.engine.grant(ttl).await
    }

    /// Starts the lease's time anew and tells how long that is.
    pub async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StateError> {
        self.engine.keep_alive(lease).await
    }

    /// Ends the lease now; its keys vanish in one revision.
    pub async fn revoke(&self, lease: LeaseId) -> Result<(), StateError> {
        self.engine.revoke(lease).await
    }

    /// Forgets the history up to and including `revision`; keys as they stand are untouched.
    pub async fn compact(&self, revision: u64) -> Result<(), StateError> {
        self.engine.compact(revision).await
    }
}
