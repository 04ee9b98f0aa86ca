//! What a search for a moment found.

use walfleet_proto::job::v1 as proto;

use super::{moment, text};
use crate::view::found::{Found, FoundCommit, FoundFile, FoundRelation, FoundTable, FoundTransaction};

pub(super) fn found(wire: proto::WalFindReport) -> Found {
    Found {
        around: moment(wire.around_us),
        from: moment(wire.from_us),
        to: moment(wire.to_us),
        commits: wire.commits,
        omitted: wire.commits.saturating_sub(wire.transactions.len() as u64),
        transactions: wire.transactions.into_iter().map(transaction).collect(),
        before: wire.before.map(commit),
        after: wire.after.map(commit),
        searched_from_lsn: text(wire.searched_from_lsn),
        searched_to_lsn: text(wire.searched_to_lsn),
        segments: wire.segments,
        notes: wire.notes,
    }
}

fn commit(wire: proto::FoundCommit) -> FoundCommit {
    FoundCommit { at: moment(wire.at_us), lsn: wire.lsn, xid: wire.xid }
}

fn transaction(wire: proto::FoundTransaction) -> FoundTransaction {
    let relation = |of: proto::FoundRelation| FoundRelation {
        file: file(of.file.unwrap_or_default()),
        inserted: of.inserted,
        updated: of.updated,
        deleted: of.deleted,
    };
    let table = |of: proto::FoundTable| FoundTable { database: of.database, table: of.table };
    FoundTransaction {
        committed_at: moment(wire.committed_at_us),
        xid: wire.xid,
        lsn: wire.lsn,
        timeline: wire.timeline,
        kind: wire.kind,
        what: wire.what,
        inserted: wire.inserted,
        updated: wire.updated,
        deleted: wire.deleted,
        relations: wire.relations.into_iter().map(relation).collect(),
        dropped: wire.dropped.into_iter().map(file).collect(),
        dropped_files: wire.dropped_files,
        truncated: wire.truncated.into_iter().map(table).collect(),
        dropped_databases: wire.dropped_databases,
        wal_bytes: wire.wal_bytes,
        whole: wire.whole,
        stop_lsn: wire.stop_lsn,
        restore: text(wire.restore),
        not_restorable: text(wire.not_restorable),
    }
}

fn file(wire: proto::FoundFile) -> FoundFile {
    FoundFile { tablespace: wire.tablespace, database: wire.database, relfilenode: wire.relfilenode }
}
