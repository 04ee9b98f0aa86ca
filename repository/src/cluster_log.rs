//! One log per cluster: the only thing that changes, and it changes by creating the next number.
//!
//! **Append**: read on to the first missing number, decide on exactly that prefix, create that number; if someone else was
//! first, read it and decide again. So every entry acts on the very state it was decided on, without clocks, leases, locks
//! or listings. State is a pure fold over the entries ([`fold`]); what it amounts to is [`state::ClusterState`].

mod append;
pub mod fold;
mod read;
pub mod state;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

pub use append::{AppendError, Author, Decision, Outcome};
pub use fold::{Rule, Verdict, Void};
pub use state::{Borrowed, ClusterState, Committed, DomainKeys, Expiry, Session, SessionState, Stamp};

use crate::format::clear::ClearError;
use crate::format::root::AppendMode;
use crate::ids::ClusterName;
use crate::signature::{SignatureError, TrustRoot};
use crate::store::{Store, StoreError};

/// A cluster's log, read as far as this handle knows.
///
/// Several handles, in any number of processes, may read and append at the same time. One handle is one position: it is
/// used by one task at a time, and the borrow checker sees to it.
pub struct ClusterLog {
    store: Store,
    trust: TrustRoot,
    append_mode: AppendMode,
    cluster: ClusterName,
    state: ClusterState,
    /// Where the end was last seen with nothing behind it.
    confirmed_end: Option<u64>,
    memory: LogMemory,
}

/// How far logs were read already. Entries never change, so what was folded once need not be read again.
#[derive(Clone, Default)]
pub struct LogMemory(Arc<Mutex<HashMap<ClusterName, ClusterState>>>);

impl LogMemory {
    fn recall(&self, cluster: &ClusterName) -> ClusterState {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(cluster).cloned().unwrap_or_default()
    }

    fn keep(&self, cluster: &ClusterName, state: &ClusterState) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.get(cluster).is_none_or(|known| known.next() < state.next()) {
            known.insert(cluster.clone(), state.clone());
        }
    }
}

impl fmt::Debug for ClusterLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterLog")
            .field("cluster", &self.cluster)
            .field("next", &self.state.next())
            .finish_non_exhaustive()
    }
}

/// A log that could not be read or appended to.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("log of {cluster}: {source}")]
    Store { cluster: ClusterName, source: StoreError },
    #[error(
        "log of {cluster}: entry {sequence} does not read, and nothing can be decided on what follows it: {source}"
    )]
    Unreadable { cluster: ClusterName, sequence: u64, source: ClearError },
    #[error(
        "log of {cluster}: entry {missing} is missing, and entry {present} is there\nHINT: an entry was removed from the store; put it back from a replica or an older version of it."
    )]
    Hole { cluster: ClusterName, missing: u64, present: u64 },
    #[error("log of {cluster}: this writer may not append: {source}")]
    Writer { cluster: ClusterName, source: SignatureError },
    #[error("log of {cluster}: the entry would not count: {source}")]
    Void { cluster: ClusterName, source: Void },
    #[error(
        "log of {cluster}: its store does not create atomically, so a host alone cannot append\nHINT: back up through the controller, or use a store that honours If-None-Match."
    )]
    Sequenced { cluster: ClusterName },
    #[error("log of {cluster}: others were first {rounds} times in a row\nHINT: try again.")]
    Busy { cluster: ClusterName, rounds: u32 },
}

impl LogError {
    /// Whether the same may succeed later without anyone changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            LogError::Store { source, .. } => source.is_retryable(),
            LogError::Busy { .. } => true,
            LogError::Unreadable { .. }
            | LogError::Hole { .. }
            | LogError::Writer { .. }
            | LogError::Void { .. }
            | LogError::Sequenced { .. } => false,
        }
    }
}

impl ClusterLog {
    /// A handle that stands where the memory does; at first, at the beginning.
    pub fn new(
        store: Store,
        trust: TrustRoot,
        append_mode: AppendMode,
        cluster: ClusterName,
        memory: LogMemory,
    ) -> ClusterLog {
        let state = memory.recall(&cluster);
        ClusterLog { store, trust, append_mode, cluster, state, confirmed_end: None, memory }
    }

    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// The state as of the last refresh or append of this handle.
    pub fn state(&self) -> &ClusterState {
        &self.state
    }

    /// Reads on to the first missing number.
    pub async fn refresh(&mut self) -> Result<&ClusterState, LogError> {
        self.read_on().await?;
        self.memory.keep(&self.cluster, &self.state);
        Ok(&self.state)
    }
}
