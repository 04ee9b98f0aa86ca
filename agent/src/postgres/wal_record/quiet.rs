//! Whether anything is lost with the newest WAL.
//!
//! An idle server goes on writing: what transactions run, a checkpoint. For that alone no segment is finished
//! (XLOG_MARK_UNIMPORTANT and CheckArchiveTimeout, src/backend/postmaster/checkpointer.c), so it stays behind what is archived
//! until somebody changes something.

use walfleet_repository::postgres::{Lsn, SegmentSize, SystemId, Timeline};

use super::decoder::Decoder;
use super::page_header::LONG_HEADER;
use super::record::{Record, rmgr};

/// So much of a segment is looked at: an idle server's beginnings of one have a few hundred bytes.
pub const MOST_QUIET_BYTES: usize = 64 << 10;

/// Operations of the XLOG manager (src/include/catalog/pg_control.h) and of the standby manager (src/include/storage/standbydefs.h).
const CHECKPOINT_SHUTDOWN: u8 = 0x00;
const CHECKPOINT_ONLINE: u8 = 0x10;
const NOOP: u8 = 0x20;
/// Since 17.
const CHECKPOINT_REDO: u8 = 0xE0;
const RUNNING_XACTS: u8 = 0x10;

/// Whether a segment's first bytes, which are all that the server has written of it up to `end`, change nothing.
pub fn changes_nothing(
    bytes: &[u8],
    (start, end): (Lsn, Lsn),
    size: SegmentSize,
    timeline: Timeline,
    system_id: SystemId,
) -> bool {
    let Some(written) = end.0.checked_sub(start.0) else { return false };
    // Where the next record will begin; a header alone may not be written yet.
    if written <= LONG_HEADER as u64 {
        return true;
    }
    let bytes = usize::try_from(written).ok().and_then(|written| bytes.get(..written));
    let decoder = Decoder::new(start, size, timeline, Some(system_id), None);
    let (Some(bytes), Ok(mut decoder)) = (bytes, decoder) else { return false };
    let mut is_quiet = true;
    let fed = decoder.feed(bytes, &mut |record| is_quiet &= is_nothing(record));
    // What is not on disk yet, or runs over from the segment before, is not known to be nothing.
    fed.is_ok() && is_quiet && decoder.valid_end() == end && !decoder.began_headless()
}

fn is_nothing(record: &Record<'_>) -> bool {
    match record.rmgr {
        rmgr::XLOG => matches!(record.operation(), CHECKPOINT_SHUTDOWN | CHECKPOINT_ONLINE | NOOP | CHECKPOINT_REDO),
        rmgr::STANDBY => record.operation() == RUNNING_XACTS,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::postgres::control::ControlFile;
    use crate::postgres::server::{Server, ServerFacts};
    use crate::postgres::test_server::{TestServer, oldest_and_newest};

    async fn facts(server: &TestServer) -> ServerFacts {
        Server::connect(&server.connection_string()).await.unwrap().facts().await.unwrap()
    }

    fn is_quiet(server: &TestServer, facts: &ServerFacts) -> bool {
        let (size, timeline) = (facts.wal_segment_size, facts.timeline);
        let number = facts.current_lsn.segment_number(size);
        let segment = walfleet_repository::postgres::Segment { timeline, number };
        let bytes = std::fs::read(server.data_dir.join("pg_wal").join(segment.file_name(size))).unwrap_or_default();
        let system_id = ControlFile::read(&server.data_dir).unwrap().system_id;
        changes_nothing(&bytes, (segment.start(size), facts.current_lsn), size, timeline, system_id)
    }

    /// Its own records are on disk a moment later.
    async fn becomes_quiet(server: &TestServer, what: &str) -> ServerFacts {
        for _ in 0..50 {
            let facts = facts(server).await;
            if is_quiet(server, &facts) {
                return facts;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{what} is more than nothing");
    }

    #[tokio::test]
    async fn what_an_idle_server_writes_by_itself_is_nothing_and_a_commit_is_not() {
        for installation in oldest_and_newest() {
            let server = TestServer::start(&installation, &["--wal-segsize=1"], "wal_level=replica\nautovacuum=off");
            server.sql(&["CREATE TABLE t (i int)", "SELECT pg_switch_wal()"]).await;
            becomes_quiet(&server, "nothing is written behind a switch").await;
            // A checkpoint makes a record of what runs before its own, which leaves them alone in a segment.
            server.sql(&["INSERT INTO t VALUES (1)", "SELECT pg_switch_wal()", "CHECKPOINT"]).await;
            let idle = becomes_quiet(&server, "a checkpoint").await;
            assert!(idle.current_lsn.0 % (1 << 20) > 100, "{idle:?}");
            server.sql(&["INSERT INTO t VALUES (2)"]).await;
            assert!(!is_quiet(&server, &facts(&server).await), "a row");
            server.sql(&["SELECT pg_switch_wal()", "SELECT txid_current()"]).await;
            assert!(!is_quiet(&server, &facts(&server).await), "a transaction of which nothing else is seen");
        }
    }
}
