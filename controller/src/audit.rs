//! The audit log: every mutating call, who made it, on what, and how it ended; append-only and chained by hashes, so
//! that an entry cannot be changed, dropped or slipped in unnoticed. Never records secrets or whole requests.
//!
//! Rows: `audit/entry/<sequence>`, `audit/head` (the newest sequence and hash) and `audit/anchor` (where the chain
//! begins, once the oldest entries were dropped for age). The head and its entry are written by one transaction.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tonic::Status;

use crate::identity::{PeerIdentity, now_us};
use crate::state::{Compare, Op, Row, RowError, State, Txn, rows};

const ENTRIES: &str = "audit/entry/";
const HEAD: &str = "audit/head";
const ANCHOR: &str = "audit/anchor";
/// Longer texts are cut: an entry is for reading, and the state is small.
const MAX_TEXT_BYTES: usize = 400;
/// At about 500 bytes each, 50 MiB of state: years of a busy fleet's changes.
pub const KEPT_ENTRIES: u64 = 100_000;
/// Dropped at a time; below the operations of one transaction.
const DROP_BATCH: u64 = 100;
/// Entries read at a time: bounds memory.
const PAGE: usize = 500;
/// Attempts when another controller appends at the same time.
const ATTEMPTS: usize = 8;

/// Who acts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    pub name: String,
    /// A role, or "controller" for what it does by itself.
    pub role: String,
}

impl From<&PeerIdentity> for Actor {
    fn from(peer: &PeerIdentity) -> Self {
        Self { name: peer.name.to_string(), role: peer.role.to_string() }
    }
}

/// One recorded call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// From 1, without holes.
    pub sequence: u64,
    pub at_us: i64,
    pub actor: String,
    pub role: String,
    /// "Jobs.StartBackup".
    pub call: String,
    /// What it was about: "cluster orders".
    pub object: String,
    /// "done", or the status and its first line.
    pub outcome: String,
    /// The hash of the entry before, in hexadecimal; of the first: 64 zeros.
    pub previous: String,
    pub hash: String,
}

impl Entry {
    /// BLAKE3 over all fields but the hash, each with its length, so that no text can pass for another's end.
    fn computed_hash(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("walfleet audit entry v1");
        hasher.update(&self.sequence.to_be_bytes());
        hasher.update(&self.at_us.to_be_bytes());
        for text in [&self.actor, &self.role, &self.call, &self.object, &self.outcome, &self.previous] {
            hasher.update(&(text.len() as u64).to_be_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// A place in the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Link {
    sequence: u64,
    hash: String,
}

impl Default for Link {
    fn default() -> Self {
        Self { sequence: 0, hash: "0".repeat(64) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error(transparent)]
    Row(#[from] RowError),
    #[error(
        "audit log is broken at entry {sequence}: {problem}\nHINT: somebody changed the state by other means than the controller; compare with your last `state export`."
    )]
    Broken { sequence: u64, problem: &'static str },
}

/// What [`Audit::verify`] found whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedLog {
    /// The oldest entry kept; 0: the log is empty.
    pub first: u64,
    pub last: u64,
    /// To be compared with a note kept elsewhere: a chain that was rewritten as a whole has another.
    pub head_hash: String,
}

/// The end of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newest {
    /// Oldest first.
    pub entries: Vec<Entry>,
    /// The oldest entry kept and the newest there is; 0: the log is empty.
    pub first: u64,
    pub last: u64,
}

/// The log; cheap to clone.
#[derive(Clone)]
pub struct Audit {
    state: State,
    /// One append at a time: the chain has one end.
    appending: Arc<Mutex<()>>,
    kept: u64,
}

impl Audit {
    pub fn new(state: State) -> Self {
        Self { state, appending: Arc::default(), kept: KEPT_ENTRIES }
    }

    /// Records a call that was made, done or refused. The call's own answer does not depend on it: a log that cannot be
    /// written is an error for people to look at.
    pub async fn record<T>(&self, actor: &Actor, call: &str, object: &str, outcome: &Result<T, Status>) {
        let outcome = match outcome {
            Ok(_) => "done".to_owned(),
            Err(status) => {
                format!("{:?}: {}", status.code(), status.message().lines().next().unwrap_or_default())
            }
        };
        if let Err(error) = self.append(actor, call, object, &outcome).await {
            tracing::error!(%error, actor = actor.name, call, object, outcome, "cannot write the audit log");
        }
    }

    /// Appends an entry, durably.
    pub async fn append(&self, actor: &Actor, call: &str, object: &str, outcome: &str) -> Result<Entry, AuditError> {
        let _one_at_a_time = self.appending.lock().await;
        for _ in 0..ATTEMPTS {
            let head: Option<Row<Link>> = self.state.row(HEAD).await?;
            let unchanged = head.as_ref().map_or_else(|| Compare::absent(HEAD), Row::unchanged);
            let before = head.map(|row| row.value).unwrap_or_default();
            let mut entry = Entry {
                sequence: before.sequence + 1,
                at_us: now_us(),
                actor: cut(&actor.name),
                role: cut(&actor.role),
                call: cut(call),
                object: cut(object),
                outcome: cut(outcome),
                previous: before.hash,
                hash: String::new(),
            };
            entry.hash = entry.computed_hash();
            let link = Link { sequence: entry.sequence, hash: entry.hash.clone() };
            let txn = Txn::new()
                .when(unchanged)
                .then(rows::put_row(key(entry.sequence), &entry)?)
                .then(rows::put_row(HEAD, &link)?);
            if self.state.txn(txn).await.map_err(RowError::from)?.succeeded {
                if entry.sequence.is_multiple_of(DROP_BATCH) {
                    self.drop_oldest(entry.sequence).await?;
                }
                return Ok(entry);
            }
        }
        Err(RowError::Conflict { key: HEAD.to_owned() }.into())
    }

    /// Drops a batch of entries that are beyond the number kept; the anchor takes over where they ended.
    async fn drop_oldest(&self, newest: u64) -> Result<(), AuditError> {
        let anchor: Option<Row<Link>> = self.state.row(ANCHOR).await?;
        let unchanged = anchor.as_ref().map_or_else(|| Compare::absent(ANCHOR), Row::unchanged);
        let first = anchor.map_or(0, |row| row.value.sequence) + 1;
        let last = newest.saturating_sub(self.kept).min(first + DROP_BATCH - 1);
        if last < first {
            return Ok(());
        }
        let entry: Option<Row<Entry>> = self.state.row(&key(last)).await?;
        let missing = AuditError::Broken { sequence: last, problem: "it is missing" };
        let entry = entry.ok_or(missing)?.value;
        let link = Link { sequence: last, hash: entry.hash };
        let mut txn = Txn::new().when(unchanged).then(rows::put_row(ANCHOR, &link)?);
        txn.then.extend((first..=last).map(|sequence| Op::delete(key(sequence))));
        self.state.txn(txn).await.map_err(RowError::from)?;
        Ok(())
    }

    /// Entries after `after`, oldest first, at most `limit`.
    pub async fn entries(&self, after: u64, limit: usize) -> Result<Vec<Entry>, AuditError> {
        let page = self.state.range(ENTRIES, Some(&key(after)), limit).await.map_err(RowError::from)?;
        Ok(page.items.iter().map(|item| rows::decode(item).map(|row| row.value)).collect::<Result<_, _>>()?)
    }

    /// The newest entries that are not older than `since_us`, at most `limit`.
    pub async fn newest(&self, limit: u64, since_us: i64) -> Result<Newest, AuditError> {
        let last = self.state.row::<Link>(HEAD).await?.map_or(0, |row| row.value.sequence);
        let dropped = self.state.row::<Link>(ANCHOR).await?.map_or(0, |row| row.value.sequence);
        let mut after = last.saturating_sub(limit).max(dropped);
        let mut entries = Vec::new();
        while after < last {
            let page = self.entries(after, PAGE).await?;
            let Some(reached) = page.last().map(|entry| entry.sequence) else { break };
            after = reached;
            // Entries appended meanwhile lie beyond the head that was read.
            entries.extend(page.into_iter().filter(|entry| entry.sequence <= last && entry.at_us >= since_us));
        }
        let first = if last == 0 { 0 } else { dropped + 1 };
        Ok(Newest { entries, first, last })
    }

    /// Walks the whole chain.
    pub async fn verify(&self) -> Result<VerifiedLog, AuditError> {
        // The head first: entries appended meanwhile lie beyond it.
        let head = self.state.row::<Link>(HEAD).await?.map(|row| row.value).unwrap_or_default();
        let mut at = self.state.row::<Link>(ANCHOR).await?.map(|row| row.value).unwrap_or_default();
        let first = if head.sequence == 0 { 0 } else { at.sequence + 1 };
        while at.sequence < head.sequence {
            let page = self.entries(at.sequence, PAGE).await?;
            let broken = |sequence, problem| Err(AuditError::Broken { sequence, problem });
            if page.is_empty() {
                return broken(at.sequence + 1, "it is missing");
            }
            for entry in page.into_iter().take_while(|entry| entry.sequence <= head.sequence) {
                if entry.sequence != at.sequence + 1 {
                    return broken(at.sequence + 1, "it is missing");
                }
                if entry.previous != at.hash {
                    return broken(entry.sequence, "it does not follow the entry before it");
                }
                if entry.hash != entry.computed_hash() {
                    return broken(entry.sequence, "its content is not what was recorded");
                }
                at = Link { sequence: entry.sequence, hash: entry.hash };
            }
        }
        if at != head {
            return Err(AuditError::Broken { sequence: head.sequence, problem: "the head does not match the entries" });
        }
        Ok(VerifiedLog { first, last: head.sequence, head_hash: head.hash })
    }
}

fn key(sequence: u64) -> String {
    format!("{ENTRIES}{sequence:016x}")
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT_BYTES)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::embedded::Options;

    fn log(folder: &tempfile::TempDir, kept: u64) -> Audit {
        let state = State::open(&folder.path().join("state"), Options::default()).unwrap();
        Audit { kept, ..Audit::new(state) }
    }

    fn ann() -> Actor {
        Actor { name: "ann".to_owned(), role: "admin".to_owned() }
    }

    #[tokio::test]
    async fn any_change_to_the_past_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let log = log(&folder, 1000);
        assert_eq!(log.verify().await.unwrap().last, 0);
        let appends = (0..20).map(|i| {
            let log = log.clone();
            async move { log.append(&ann(), "Jobs.StartBackup", &format!("cluster {i}"), "done").await }
        });
        futures::future::try_join_all(appends).await.unwrap();
        let whole = log.verify().await.unwrap();
        assert_eq!((whole.first, whole.last), (1, 20));

        let row: Row<Entry> = log.state.row(&key(7)).await.unwrap().unwrap();
        let mut changed = row.value.clone();
        changed.actor = "bob".to_owned();
        log.state.txn(Txn::new().then(rows::put_row(key(7), &changed).unwrap())).await.unwrap();
        assert!(matches!(log.verify().await, Err(AuditError::Broken { sequence: 7, .. })));
        changed.hash = changed.computed_hash();
        log.state.txn(Txn::new().then(rows::put_row(key(7), &changed).unwrap())).await.unwrap();
        assert!(matches!(log.verify().await, Err(AuditError::Broken { sequence: 8, .. })));
        log.state.txn(Txn::new().then(Op::delete(key(7)))).await.unwrap();
        assert!(matches!(log.verify().await, Err(AuditError::Broken { sequence: 7, .. })));
        log.state.txn(Txn::new().then(rows::put_row(key(7), &row.value).unwrap())).await.unwrap();
        log.state.txn(Txn::new().then(Op::delete(key(20)))).await.unwrap();
        assert!(matches!(log.verify().await, Err(AuditError::Broken { sequence: 20, .. })));
    }

    #[tokio::test]
    async fn old_entries_go_and_the_chain_still_verifies() {
        let folder = tempfile::tempdir().unwrap();
        let log = log(&folder, 50);
        for _ in 0..300 {
            log.append(&ann(), "call", &"ü".repeat(1000), "done").await.unwrap();
        }
        let whole = log.verify().await.unwrap();
        assert_eq!((whole.first, whole.last), (251, 300));
        let numbers = |entries: &[Entry]| entries.iter().map(|entry| entry.sequence).collect::<Vec<_>>();
        assert_eq!(numbers(&log.entries(298, 10).await.unwrap()), [299, 300]);
        let newest = log.newest(2, 0).await.unwrap();
        assert_eq!((newest.first, newest.last, numbers(&newest.entries)), (251, 300, vec![299, 300]));
        assert_eq!(log.newest(10_000, 0).await.unwrap().entries.len(), 50, "what is left");
        let since = newest.entries[1].at_us;
        assert!(log.newest(10, since).await.unwrap().entries.iter().all(|entry| entry.at_us >= since));
        assert!(log.newest(10, since + 1).await.unwrap().entries.is_empty());
    }
}
