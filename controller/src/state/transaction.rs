//! Transactions: what is compared, what is written, what comes back, and the limits that etcd sets on them. The
//! embedded engine enforces the same limits, so that nothing works on a laptop and fails in production.

use std::collections::HashSet;

use bytes::Bytes;

use super::{KeyValue, LeaseId, StateError};

/// etcd refuses requests above 1.5 MiB (`--max-request-bytes`); one value stays well below it.
pub const MAX_VALUE_BYTES: usize = 1024 * 1024;
/// All keys and values of one transaction: etcd's 1.5 MiB less room for its framing.
pub const MAX_TXN_BYTES: usize = 1400 * 1024;
/// etcd's `--max-txn-ops`, for compares and for each branch.
pub const MAX_TXN_OPS: usize = 128;
/// Ours: long enough for every name, short enough for a log line.
pub const MAX_KEY_BYTES: usize = 1024;

/// A condition on one key as it stands when the transaction is applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    Absent { key: String },
    Exists { key: String },
    ModRevision { key: String, revision: u64 },
    Value { key: String, value: Bytes },
}

impl Compare {
    pub fn absent(key: impl Into<String>) -> Self {
        Self::Absent { key: key.into() }
    }

    pub fn exists(key: impl Into<String>) -> Self {
        Self::Exists { key: key.into() }
    }

    /// Nobody wrote the key since it was read at `mod_revision`; 0 means absent, as in etcd.
    pub fn unchanged(key: impl Into<String>, mod_revision: u64) -> Self {
        let key = key.into();
        if mod_revision == 0 { Self::Absent { key } } else { Self::ModRevision { key, revision: mod_revision } }
    }

    pub fn value(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Self::Value { key: key.into(), value: value.into() }
    }

    pub fn key(&self) -> &str {
        match self {
            Self::Absent { key } | Self::Exists { key } | Self::ModRevision { key, .. } | Self::Value { key, .. } => {
                key
            }
        }
    }

    /// Whether it holds for what stands under its key.
    pub fn holds(&self, found: Option<&KeyValue>) -> bool {
        match (self, found) {
            (Self::Absent { .. }, found) => found.is_none(),
            (Self::Exists { .. }, found) => found.is_some(),
            (Self::ModRevision { revision, .. }, Some(found)) => found.mod_revision == *revision,
            (Self::Value { value, .. }, Some(found)) => found.value == *value,
            (Self::ModRevision { .. } | Self::Value { .. }, None) => false,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Reads within the transaction, as all operations before it in the list left the key.
    Get { key: String },
    /// Writes; without a lease, a lease the key had no longer holds it.
    Put { key: String, value: Bytes, lease: Option<LeaseId> },
    /// Deletes; an absent key is no error.
    Delete { key: String },
}

impl Op {
    pub fn get(key: impl Into<String>) -> Self {
        Self::Get { key: key.into() }
    }

    pub fn put(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    pub fn put_leased(key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: Some(lease) }
    }

    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }

    pub fn key(&self) -> &str {
        match self {
            Self::Get { key } | Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// One answer per operation, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpResponse {
    Get(Option<KeyValue>),
    Put,
    Delete { existed: bool },
}

#[derive(Debug, Clone, Default)]
pub struct Txn {
    pub compares: Vec<Compare>,
    pub then: Vec<Op>,
    pub or_else: Vec<Op>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnOutcome {
    /// Whether every compare held, so that `then` was applied.
    pub succeeded: bool,
    /// The revision after the transaction: its own, if it changed anything.
    pub revision: u64,
    pub responses: Vec<OpResponse>,
}

impl Txn {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    pub fn then(mut self, op: Op) -> Self {
        self.then.push(op);
        self
    }

    pub fn or_else(mut self, op: Op) -> Self {
        self.or_else.push(op);
        self
    }

    /// Checks the limits.
    pub fn validate(&self) -> Result<(), StateError> {
        let counts =
            [("compares", self.compares.len()), ("operations", self.then.len()), ("operations", self.or_else.len())];
        for (what, found) in counts {
            if found > MAX_TXN_OPS {
                return Err(StateError::TooManyOps { what, found, limit: MAX_TXN_OPS });
            }
        }
        for key in self.compares.iter().map(Compare::key).chain(self.then.iter().chain(&self.or_else).map(Op::key)) {
            if key.is_empty() || key.len() > MAX_KEY_BYTES {
                let key = key.chars().take(100).collect();
                return Err(StateError::BadKey { key, limit: MAX_KEY_BYTES });
            }
        }
        let bytes = self.compares.iter().map(compare_bytes).sum::<usize>()
            + branch_bytes(&self.then)?
            + branch_bytes(&self.or_else)?;
        if bytes > MAX_TXN_BYTES {
            return Err(StateError::TxnTooLarge { bytes, limit: MAX_TXN_BYTES });
        }
        Ok(())
    }
}

fn compare_bytes(compare: &Compare) -> usize {
    compare.key().len() + if let Compare::Value { value, .. } = compare { value.len() } else { 0 }
}

/// The size of one branch, whose keys are written at most once each.
fn branch_bytes(ops: &[Op]) -> Result<usize, StateError> {
    let mut written = HashSet::new();
    let mut bytes = 0;
    for op in ops {
        if !matches!(op, Op::Get { .. }) && !written.insert(op.key()) {
            return Err(StateError::DuplicateKey { key: op.key().to_owned() });
        }
        bytes += op.key().len();
        if let Op::Put { key, value, .. } = op {
            if value.len() > MAX_VALUE_BYTES {
                let (bytes, limit) = (value.len(), MAX_VALUE_BYTES);
                return Err(StateError::ValueTooLarge { key: key.clone(), bytes, limit });
            }
            bytes += value.len();
        }
    }
    Ok(bytes)
}
