//! What was found, in words and numbers: the same for the host's own command and for a job of the controller.

use std::fmt;
use std::ops::Range;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::BackupId;
use walfleet_repository::postgres::{Lsn, Timeline, WalBranch};
use walfleet_repository::recovery_window::lineage::Lineage;

use super::select::Selection;
use super::{FindError, FindRequest};
use crate::postgres::wal_record::{FileChange, RelationName, RowCounts, Transaction};

/// Relations, files and tables listed of one transaction.
const MOST_OF_ONE: usize = 6;
/// And named in its line.
const MOST_NAMED: usize = 2;

/// DEFAULTTABLESPACE_OID (src/include/catalog/pg_tablespace.dat).
const DEFAULT_TABLESPACE: u32 = 1663;

/// What was committed around a moment.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FindReport {
    pub around: Timestamp,
    /// Both belong to the interval.
    pub from: Timestamp,
    pub to: Timestamp,
    /// In the interval, as far as it was read.
    pub commits: u64,
    /// Those listed, in the order of the log.
    pub transactions: Vec<FoundTransaction>,
    /// The newest before the interval, and the first behind it; `None`: none is stored, or none was found near.
    pub before: Option<CommitPoint>,
    pub after: Option<CommitPoint>,
    /// The WAL that was read, `[from, to)`; `None`: nothing.
    pub searched_from_lsn: Option<Lsn>,
    pub searched_to_lsn: Option<Lsn>,
    pub segments: u64,
    /// Things to know, one a line.
    pub notes: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CommitPoint {
    pub at: Timestamp,
    /// Where its record ends.
    pub lsn: Lsn,
    pub xid: u32,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FoundTransaction {
    pub committed_at: Timestamp,
    pub xid: u32,
    /// Where the record of its commit ends.
    pub lsn: Lsn,
    /// Whose segment the commit was read from.
    pub timeline: Timeline,
    pub kind: FoundKind,
    /// In a line, for people.
    pub what: String,
    /// Of all relations that are no catalogs.
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
    /// Those with most rows; at most [`MOST_OF_ONE`].
    pub relations: Vec<FoundRelation>,
    /// Files that the commit removed, by their lowest number; at most [`MOST_OF_ONE`].
    pub dropped: Vec<FoundFile>,
    pub dropped_files: u64,
    /// Tables that TRUNCATE named; at most [`MOST_OF_ONE`].
    pub truncated: Vec<FoundTable>,
    /// OIDs.
    pub dropped_databases: Vec<u32>,
    pub wal_bytes: u64,
    /// Everything that it wrote was read; else counts are at least.
    pub whole: bool,
    /// A restore that stops before this position has nothing of it.
    pub stop_lsn: Lsn,
    /// The arguments of `restore` that do; `None`: no backup reaches it.
    pub restore: Option<String>,
    /// Why there are none.
    pub not_restorable: Option<String>,
}

/// What it mainly did, the worst first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FoundKind {
    DropDatabase,
    Truncate,
    Drop,
    /// Files took the place of others: VACUUM FULL, CLUSTER, REINDEX, ALTER TABLE.
    Replace,
    Delete,
    Update,
    Insert,
    /// No rows of tables: catalogs, locks, sequences.
    Other,
}

impl FoundKind {
    pub fn name(self) -> &'static str {
        match self {
            FoundKind::DropDatabase => "drop_database",
            FoundKind::Truncate => "truncate",
            FoundKind::Drop => "drop",
            FoundKind::Replace => "replace",
            FoundKind::Delete => "delete",
            FoundKind::Update => "update",
            FoundKind::Insert => "insert",
            FoundKind::Other => "other",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FoundRelation {
    #[serde(flatten)]
    pub file: FoundFile,
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
}

/// By OID, OID and relfilenumber.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FoundFile {
    pub tablespace: u32,
    pub database: u32,
    pub relfilenode: u32,
}

/// By OIDs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FoundTable {
    pub database: u32,
    pub table: u32,
}

/// How a restore stops just before something.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Restore {
    pub stop: Lsn,
    /// `None`: there is no other.
    pub timeline: Option<String>,
    /// `None`: the one that is chosen anyway.
    pub backup: Option<BackupId>,
}

/// As they are typed.
impl fmt::Display for Restore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--to-lsn {} --exclusive", self.stop)?;
        if let Some(timeline) = &self.timeline {
            write!(f, " --timeline {timeline}")?;
        }
        if let Some(backup) = &self.backup {
            write!(f, " --backup {backup}")?;
        }
        Ok(())
    }
}

impl FindReport {
    pub(super) fn of(request: &FindRequest) -> Result<FindReport, FindError> {
        let bad = |_| FindError::Interval { around: request.around, within: request.within.as_secs() };
        Ok(FindReport {
            around: request.around,
            from: request.around.checked_sub(request.within).map_err(bad)?,
            to: request.around.checked_add(request.within).map_err(bad)?,
            commits: 0,
            transactions: Vec::new(),
            before: None,
            after: None,
            searched_from_lsn: None,
            searched_to_lsn: None,
            segments: 0,
            notes: Vec::new(),
        })
    }

    pub(super) fn add_searched(&mut self, way: &Lineage, segments: &[(WalBranch, u64)], read: Range<usize>) {
        let read = segments.get(read).unwrap_or_default();
        let (Some((_, first)), Some((_, last))) = (read.first(), read.last()) else { return };
        self.segments += read.len() as u64;
        self.searched_from_lsn = Some(way.start(*first));
        self.searched_to_lsn = Some(way.start(last.saturating_add(1)));
    }

    pub(super) fn add(&mut self, selection: Selection, describe: impl Fn(&Transaction) -> FoundTransaction) {
        self.commits += selection.commits;
        let newer = |known: &CommitPoint, found: &CommitPoint| known.at < found.at;
        if let Some(found) = selection.before.map(CommitPoint::from)
            && self.before.as_ref().is_none_or(|known| newer(known, &found))
        {
            self.before = Some(found);
        }
        if let Some(found) = selection.after.map(CommitPoint::from)
            && self.after.as_ref().is_none_or(|known| newer(&found, known))
        {
            self.after = Some(found);
        }
        self.transactions.extend(selection.finish().iter().map(describe));
    }

    pub(super) fn close(&mut self) {
        // Of several system identifiers each has as many.
        self.transactions.truncate(super::MOST_LISTED);
        if self.after.is_none() {
            self.notes.push(
                "no later commit is stored: what the server wrote since its last segment was archived is not there yet"
                    .to_owned(),
            );
        }
    }

    /// Commits of the interval that are not listed.
    pub fn omitted(&self) -> u64 {
        self.commits.saturating_sub(self.transactions.len() as u64)
    }
}

impl FoundTransaction {
    pub(super) fn of(
        transaction: &Transaction,
        timeline: Timeline,
        restore: Result<Restore, String>,
    ) -> FoundTransaction {
        let rows = transaction.all_rows();
        let relations = transaction.rows.iter().take(MOST_OF_ONE).map(|of| FoundRelation {
            file: of.relation.into(),
            inserted: of.rows.inserted,
            updated: of.rows.updated,
            deleted: of.rows.deleted,
        });
        let truncated = transaction.truncated.iter().take(MOST_OF_ONE);
        let (restore, not_restorable) = match restore {
            Ok(restore) => (Some(restore.to_string()), None),
            Err(reason) => (None, Some(reason)),
        };
        FoundTransaction {
            committed_at: timestamp(transaction.at_us),
            xid: transaction.xid,
            lsn: transaction.commit_end,
            timeline,
            kind: kind(transaction, rows),
            what: what(transaction),
            inserted: rows.inserted,
            updated: rows.updated,
            deleted: rows.deleted,
            relations: relations.collect(),
            dropped: dropped(transaction).take(MOST_OF_ONE).map(FoundFile::from).collect(),
            dropped_files: transaction.dropped_count,
            truncated: truncated.map(|(database, table)| FoundTable { database: *database, table: *table }).collect(),
            dropped_databases: transaction.dropped_databases.iter().take(MOST_OF_ONE).copied().collect(),
            wal_bytes: transaction.wal_bytes,
            whole: transaction.is_whole,
            stop_lsn: transaction.stop_before,
            restore,
            not_restorable,
        }
    }
}

impl From<RelationName> for FoundFile {
    fn from(name: RelationName) -> FoundFile {
        FoundFile { tablespace: name.tablespace, database: name.database, relfilenode: name.number }
    }
}

/// `5/16384`: database and relfilenumber; in another tablespace than the default one that before them.
impl fmt::Display for FoundFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.tablespace != DEFAULT_TABLESPACE {
            write!(f, "{}/", self.tablespace)?;
        }
        write!(f, "{}/{}", self.database, self.relfilenode)
    }
}

/// A table has a lower number than what was made for it.
fn dropped(transaction: &Transaction) -> impl Iterator<Item = RelationName> {
    let mut dropped = transaction.dropped.clone();
    dropped.sort_by_key(|relation| relation.number);
    dropped.into_iter()
}

fn kind(transaction: &Transaction, rows: RowCounts) -> FoundKind {
    match transaction.files {
        _ if !transaction.dropped_databases.is_empty() => FoundKind::DropDatabase,
        FileChange::Truncated => FoundKind::Truncate,
        FileChange::Dropped => FoundKind::Drop,
        _ if rows.deleted > 0 && rows.deleted >= rows.updated => FoundKind::Delete,
        FileChange::Replaced => FoundKind::Replace,
        FileChange::Kept if rows.updated > 0 => FoundKind::Update,
        FileChange::Kept if rows.inserted > 0 => FoundKind::Insert,
        FileChange::Kept => FoundKind::Other,
    }
}

fn what(transaction: &Transaction) -> String {
    let mut parts = Vec::new();
    if !transaction.dropped_databases.is_empty() {
        parts.push(format!("drops database {}", listed(transaction.dropped_databases.iter(), 0)));
    }
    let files = listed(dropped(transaction).map(FoundFile::from), transaction.dropped_count);
    match transaction.files {
        FileChange::Truncated if !transaction.truncated.is_empty() => {
            let tables = transaction.truncated.iter().map(|(database, table)| format!("{database}/{table}"));
            parts.push(format!("truncates table {}", listed(tables, 0)));
        }
        FileChange::Truncated => parts.push(format!("truncates {files}")),
        FileChange::Dropped => parts.push(format!("drops {files}")),
        FileChange::Replaced => parts.push(format!("replaces {files}")),
        FileChange::Kept => {}
    }
    let least = if transaction.is_whole { "" } else { "at least " };
    let count = |verb: &str, of: fn(RowCounts) -> u64, preposition: &str| {
        let rows = of(transaction.all_rows());
        let touched = transaction.rows.iter().filter(|relation| of(relation.rows) > 0);
        let names = listed(touched.map(|relation| FoundFile::from(relation.relation)), 0);
        let noun = if rows == 1 { "row" } else { "rows" };
        (rows > 0).then(|| format!("{verb} {least}{rows} {noun} {preposition} {names}"))
    };
    parts.extend(count("deletes", |rows| rows.deleted, "of"));
    parts.extend(count("updates", |rows| rows.updated, "of"));
    parts.extend(count("inserts", |rows| rows.inserted, "into"));
    if parts.is_empty() {
        parts.push(if transaction.catalog_rows > 0 { "changes catalogs" } else { "changes no rows" }.to_owned());
    }
    parts.join("; ")
}

/// The first of some, and how many there are beside; `count`: of all, where not all are given.
fn listed(items: impl Iterator<Item = impl fmt::Display>, count: u64) -> String {
    let items: Vec<String> = items.map(|item| item.to_string()).collect();
    let count = usize::try_from(count).unwrap_or(usize::MAX).max(items.len());
    let named = items.get(..MOST_NAMED).unwrap_or(&items).join(", ");
    match count.saturating_sub(MOST_NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// Of a record's clock, which holds centuries more than a timestamp does.
pub(super) fn timestamp(at_us: i64) -> Timestamp {
    Timestamp::from_microsecond(at_us).unwrap_or(if at_us < 0 { Timestamp::MIN } else { Timestamp::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::wal_record::RelationRows;

    fn relation(number: u32) -> RelationName {
        RelationName { tablespace: DEFAULT_TABLESPACE, database: 5, number }
    }

    fn rows(number: u32, inserted: u64, updated: u64, deleted: u64) -> RelationRows {
        RelationRows { relation: relation(number), rows: RowCounts { inserted, updated, deleted } }
    }

    fn transaction(rows: Vec<RelationRows>, files: FileChange, dropped: &[u32]) -> Transaction {
        Transaction {
            xid: 742,
            at_us: 0,
            commit_start: Lsn(1),
            commit_end: Lsn(2),
            stop_before: Lsn(1),
            rows,
            more_rows: RowCounts::default(),
            catalog_rows: 1,
            files,
            dropped: dropped.iter().map(|number| relation(*number)).collect(),
            dropped_count: dropped.len() as u64,
            created_count: 0,
            left_empty: false,
            truncated: Vec::new(),
            dropped_databases: Vec::new(),
            wal_bytes: 1,
            is_whole: true,
        }
    }

    #[test]
    fn a_line_says_the_worst_first() {
        let said = |one: &Transaction| {
            let found = FoundTransaction::of(one, Timeline(1), Err("too early".to_owned()));
            (found.kind.name(), found.what)
        };
        let table = [
            (transaction(vec![], FileChange::Kept, &[]), "other", "changes catalogs"),
            (transaction(vec![rows(7, 0, 0, 1)], FileChange::Kept, &[]), "delete", "deletes 1 row of 5/7"),
            (
                transaction(vec![rows(7, 1, 30, 20), rows(8, 2, 0, 0)], FileChange::Kept, &[]),
                "update",
                "deletes 20 rows of 5/7; updates 30 rows of 5/7; inserts 3 rows into 5/7, 5/8",
            ),
            (transaction(vec![], FileChange::Dropped, &[9, 8, 7]), "drop", "drops 5/7, 5/8 and 1 more"),
            (
                transaction(vec![rows(10, 4, 0, 0)], FileChange::Truncated, &[8]),
                "truncate",
                "truncates 5/8; inserts 4 rows into 5/10",
            ),
            (transaction(vec![], FileChange::Replaced, &[8]), "replace", "replaces 5/8"),
            (
                Transaction { dropped_databases: vec![16400], ..transaction(vec![], FileChange::Kept, &[]) },
                "drop_database",
                "drops database 16400",
            ),
            (
                Transaction { truncated: vec![(5, 7)], ..transaction(vec![], FileChange::Truncated, &[8]) },
                "truncate",
                "truncates table 5/7",
            ),
            (
                Transaction { is_whole: false, ..transaction(vec![rows(7, 0, 0, 9)], FileChange::Kept, &[]) },
                "delete",
                "deletes at least 9 rows of 5/7",
            ),
        ];
        for (one, kind, what) in table {
            assert_eq!(said(&one), (kind, what.to_owned()));
        }
        let elsewhere = FoundFile { tablespace: 16385, database: 5, relfilenode: 7 };
        assert_eq!(elsewhere.to_string(), "16385/5/7");
    }
}
