//! What was found around a moment, outward.

use walfleet_proto::job::v1 as proto;

use super::text_of;
use crate::wal::find::report::{CommitPoint, FindReport, FoundFile, FoundTransaction};

pub(super) fn report(found: &FindReport) -> proto::WalFindReport {
    proto::WalFindReport {
        around_us: found.around.as_microsecond(),
        from_us: found.from.as_microsecond(),
        to_us: found.to.as_microsecond(),
        commits: found.commits,
        transactions: found.transactions.iter().map(transaction).collect(),
        before: found.before.as_ref().map(commit),
        after: found.after.as_ref().map(commit),
        searched_from_lsn: text_of(&found.searched_from_lsn),
        searched_to_lsn: text_of(&found.searched_to_lsn),
        segments: found.segments,
        notes: found.notes.clone(),
    }
}

fn commit(point: &CommitPoint) -> proto::FoundCommit {
    proto::FoundCommit { at_us: point.at.as_microsecond(), lsn: point.lsn.to_string(), xid: point.xid }
}

fn transaction(found: &FoundTransaction) -> proto::FoundTransaction {
    let relations = found.relations.iter().map(|of| proto::FoundRelation {
        file: Some(file(&of.file)),
        inserted: of.inserted,
        updated: of.updated,
        deleted: of.deleted,
    });
    let truncated = found.truncated.iter().map(|of| proto::FoundTable { database: of.database, table: of.table });
    proto::FoundTransaction {
        committed_at_us: found.committed_at.as_microsecond(),
        xid: found.xid,
        lsn: found.lsn.to_string(),
        timeline: found.timeline.0,
        kind: found.kind.name().to_owned(),
        what: found.what.clone(),
        inserted: found.inserted,
        updated: found.updated,
        deleted: found.deleted,
        relations: relations.collect(),
        dropped: found.dropped.iter().map(file).collect(),
        dropped_files: found.dropped_files,
        truncated: truncated.collect(),
        dropped_databases: found.dropped_databases.clone(),
        wal_bytes: found.wal_bytes,
        whole: found.whole,
        stop_lsn: found.stop_lsn.to_string(),
        restore: found.restore.clone().unwrap_or_default(),
        not_restorable: found.not_restorable.clone().unwrap_or_default(),
    }
}

fn file(of: &FoundFile) -> proto::FoundFile {
    proto::FoundFile { tablespace: of.tablespace, database: of.database, relfilenode: of.relfilenode }
}
