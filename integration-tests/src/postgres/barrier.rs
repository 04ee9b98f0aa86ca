//! Moments of a server under load at which it is known exactly what every table held.
//!
//! Every transaction of the load ([`super::load`]) takes one advisory lock shared; a barrier takes it exclusively. Locks
//! are released after a commit is in the WAL and visible (CommitTransaction, access/transam/xact.c), so while the barrier
//! holds it, all of the load's commits lie before and none is under way. In that moment it notes a clock time, a WAL
//! position and its own transaction id, writes a restore point, and exports its snapshot. Then the load goes on, and a
//! second session takes the fingerprint of that snapshot at leisure: exact, and the load stands still for milliseconds.
//!
//! What recovery must reach, for each kind of target:
//! - time: no commit has a time from the last of the load's to the first after the barrier, 2 ms either side;
//! - LSN: recovery stops after the first record at or past it, which is a message that changes nothing;
//! - restore point: the record itself;
//! - xid: the barrier's own commit, so its row in `walfleet_test.barrier` is there if the target is inclusive.

use anyhow::Context;
use walfleet_repository::postgres::Lsn;

use super::fingerprint::Fingerprint;
use super::{PgServer, Session};

/// Arbitrary; the load's script uses the same.
pub const GATE: u32 = 7041;

pub struct Barriers {
    writer: Session,
    reader: Session,
    passed: u32,
}

pub struct Barrier {
    pub id: u32,
    /// The restore point, `barrier_<id>`.
    pub name: String,
    /// With microseconds and zone: "2026-06-04 14:31:59.123456+00".
    pub time: String,
    pub lsn: Lsn,
    pub xid: u32,
    pub fingerprint: Fingerprint,
}

/// Whether a restore to a barrier includes the barrier's own transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OwnRow {
    /// Targets by time, LSN and name, and by xid if exclusive.
    Absent,
    /// By xid, inclusive.
    Present,
}

impl Barriers {
    pub fn install(server: &PgServer) -> anyhow::Result<Barriers> {
        let writer = server.session()?;
        writer.execute(
            "CREATE SCHEMA walfleet_test; CREATE TABLE walfleet_test.barrier (id integer PRIMARY KEY, time timestamptz)",
        )?;
        Ok(Barriers { writer, reader: server.session()?, passed: 0 })
    }

    pub fn pass(&mut self) -> anyhow::Result<Barrier> {
        self.pass_and(|_| Ok(())).map(|(barrier, ())| barrier)
    }

    /// Asks something more of the same snapshot.
    pub fn pass_and<T>(&mut self, ask: impl FnOnce(&Session) -> anyhow::Result<T>) -> anyhow::Result<(Barrier, T)> {
        self.passed += 1;
        let (id, writer) = (self.passed, &self.writer);
        let name = format!("barrier_{id}");
        // REPEATABLE READ takes its snapshot with the first query after the lock, not before it is granted: locking by
        // a query would take the snapshot first, so the lock is a session lock taken before the transaction.
        writer.execute(&format!("SELECT pg_advisory_lock({GATE})"))?;
        writer.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")?;
        let snapshot = writer.value("SELECT pg_export_snapshot()")?;
        self.reader
            .execute(&format!("BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{snapshot}'"))?;
        writer.execute("SELECT pg_sleep(0.002)")?;
        let time = writer
            .value("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00'")?;
        writer.execute("SELECT pg_sleep(0.002)")?;
        let lsn = writer.value("SELECT pg_current_wal_insert_lsn()")?;
        writer.execute("SELECT pg_logical_emit_message(false, 'walfleet', 'the first record past the barrier')")?;
        writer.execute(&format!("SELECT pg_create_restore_point('{name}')"))?;
        writer.execute(&format!("INSERT INTO walfleet_test.barrier VALUES ({id}, '{time}')"))?;
        let xid = writer.value("SELECT txid_current() % (1::bigint << 32)")?;
        writer.execute("COMMIT")?;
        writer.execute(&format!("SELECT pg_advisory_unlock({GATE})"))?;
        let fingerprint = Fingerprint::take(&self.reader)?;
        let answer = ask(&self.reader)?;
        self.reader.execute("ROLLBACK")?;
        let lsn = lsn.parse().context("read a WAL position")?;
        let xid = xid.parse().context("read a transaction id")?;
        Ok((Barrier { id, name, time, lsn, xid, fingerprint }, answer))
    }

    /// Has everything up to now archived: a segment switch needs a record before it.
    pub fn switch_wal(&self) -> anyhow::Result<Lsn> {
        self.writer.execute("SELECT pg_create_restore_point('before a switch')")?;
        self.writer.value("SELECT pg_switch_wal()")?.parse().context("read a WAL position")
    }
}

impl Barrier {
    /// A restored server must hold exactly what the source held here, and of the barriers exactly those before.
    pub fn must_be_state_of(&self, restored: &Session, own: OwnRow) -> anyhow::Result<()> {
        let found = restored.column("SELECT id FROM walfleet_test.barrier ORDER BY id")?;
        let last = if own == OwnRow::Present { self.id } else { self.id - 1 };
        let expected: Vec<String> = (1..=last).map(|id| id.to_string()).collect();
        anyhow::ensure!(
            found == expected,
            "restored to barrier {}: barriers {found:?}, expected {expected:?}",
            self.id
        );
        Fingerprint::take(restored)?
            .must_equal(&self.fingerprint)
            .with_context(|| format!("restored to barrier {} ({} {})", self.id, self.time, self.lsn))
    }
}
