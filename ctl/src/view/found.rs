//! Transactions that committed around a moment.

use jiff::Timestamp;
use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, Table, View, faint};
use crate::quantity::size;
use crate::when;

#[derive(Clone, Debug, Serialize)]
pub struct Found {
    pub around: Option<Timestamp>,
    /// Both belong to the interval.
    pub from: Option<Timestamp>,
    pub to: Option<Timestamp>,
    /// In the interval, as far as it was read; `omitted` of them are not listed.
    pub commits: u64,
    pub omitted: u64,
    /// In the order of the log.
    pub transactions: Vec<FoundTransaction>,
    /// The newest commit before the interval and the first behind it. Null: none is stored, or none was found near.
    pub before: Option<FoundCommit>,
    pub after: Option<FoundCommit>,
    /// The WAL that was read. Null: none.
    pub searched_from_lsn: Option<String>,
    pub searched_to_lsn: Option<String>,
    pub segments: u64,
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct FoundCommit {
    pub at: Option<Timestamp>,
    pub lsn: String,
    pub xid: u32,
}

#[derive(Clone, Debug, Serialize)]
pub struct FoundTransaction {
    pub committed_at: Option<Timestamp>,
    pub xid: u32,
    /// Where the record of its commit ends.
    pub lsn: String,
    pub timeline: u32,
    /// The worst that it did: "drop_database", "truncate", "drop", "replace", "delete", "update", "insert", "other".
    pub kind: String,
    pub what: String,
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
    pub relations: Vec<FoundRelation>,
    pub dropped: Vec<FoundFile>,
    pub dropped_files: u64,
    pub truncated: Vec<FoundTable>,
    pub dropped_databases: Vec<u32>,
    pub wal_bytes: u64,
    /// False: it began before what was read, and its counts are at least.
    pub whole: bool,
    pub stop_lsn: String,
    /// The arguments of a restore to just before it. Null: no backup reaches it, and `not_restorable` says why.
    pub restore: Option<String>,
    pub not_restorable: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct FoundRelation {
    #[serde(flatten)]
    pub file: FoundFile,
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct FoundFile {
    pub tablespace: u32,
    pub database: u32,
    pub relfilenode: u32,
}

#[derive(Clone, Debug, Serialize)]
pub struct FoundTable {
    pub database: u32,
    pub table: u32,
}

impl FoundTransaction {
    fn is_destructive(&self) -> bool {
        matches!(self.kind.as_str(), "drop_database" | "truncate" | "drop")
    }

    fn shown(&self) -> String {
        if self.is_destructive() { Ink::Bad.on(&self.what) } else { self.what.clone() }
    }
}

/// Beside a commit a second is too coarse.
fn precise(at: Option<Timestamp>) -> String {
    at.map(when::precise).unwrap_or_default()
}

impl FoundCommit {
    fn shown(commit: &Option<FoundCommit>) -> String {
        match commit {
            Some(commit) => format!("{} (xid {}, ending at {})", precise(commit.at), commit.xid, commit.lsn),
            None => "none is known".to_owned(),
        }
    }
}

impl Found {
    pub fn draw(&self, cluster: &str, page: &mut Page) {
        let interval = format!("between {} and {}", precise(self.from), precise(self.to));
        if self.transactions.is_empty() {
            page.line(format!("No commit of {cluster} is stored {interval}."));
        } else {
            let mut table = Table::new(&[
                "COMMITTED",
                ">XID",
                "+LSN",
                "+>TIMELINE",
                "+>WAL",
                "WHAT IT DID",
                "RESTORE TO JUST BEFORE",
            ]);
            for one in &self.transactions {
                let why_not = one.not_restorable.as_deref().unwrap_or_default();
                table.row([
                    precise(one.committed_at),
                    one.xid.to_string(),
                    one.lsn.clone(),
                    one.timeline.to_string(),
                    size(one.wal_bytes),
                    one.shown(),
                    one.restore.clone().unwrap_or_else(|| why_not.to_owned()),
                ]);
            }
            page.table(table);
        }
        page.gap();
        let omitted =
            if self.omitted > 0 { format!("{} more commits {interval}", self.omitted) } else { String::new() };
        let read = match (&self.searched_from_lsn, &self.searched_to_lsn) {
            (Some(from), Some(to)) => format!("WAL from {from} to {to}, {} segments", self.segments),
            _ => "no WAL".to_owned(),
        };
        page.pairs(&[
            ("not listed", omitted),
            ("commit before", FoundCommit::shown(&self.before)),
            ("commit after", FoundCommit::shown(&self.after)),
            ("read", read),
            ("notes", self.notes.join("\n")),
        ]);
        if self.transactions.iter().any(|one| one.restore.is_some()) {
            page.gap();
            page.line(faint(format!(
                "walfleet restore start {cluster} <RESTORE TO> --on AGENT --data-dir DIR --start"
            )));
        }
    }
}

/// The answer of `wal find`.
#[derive(Debug, Serialize)]
pub struct Search {
    pub cluster: String,
    pub agent: String,
    #[serde(flatten)]
    pub found: Found,
}

impl View for Search {
    fn draw(&self, page: &mut Page) {
        self.found.draw(&self.cluster, page);
    }
}
