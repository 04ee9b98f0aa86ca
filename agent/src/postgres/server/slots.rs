//! Replication slots, as the server sees them.

use tokio_postgres::types::PgLsn;
use walfleet_repository::postgres::Lsn;

use super::{Server, ServerError, get};

/// Whether a slot still keeps what its client has not confirmed (pg_replication_slots.wal_status).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WalStatus {
    /// Within max_wal_size.
    Reserved,
    /// Beyond it, but kept.
    Extended,
    /// No longer kept, but still there until the next checkpoint.
    Unreserved,
    Lost,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotState {
    /// `None`: it reserves nothing.
    pub restart_lsn: Option<Lsn>,
    pub wal_status: WalStatus,
    /// Bytes that may be written before it is in danger of being lost; `None`: no limit is set.
    pub safe_wal_size: Option<i64>,
    pub is_active: bool,
    /// As the server names it (invalidation_reason, from 17 on).
    pub lost_because: Option<String>,
}

impl SlotState {
    /// From where on it keeps WAL; `None`: it reserves nothing, or the server let go of what it kept.
    pub fn kept_from(&self) -> Option<Lsn> {
        self.restart_lsn.filter(|_| self.wal_status != WalStatus::Lost)
    }
}

/// What a slot keeps from being removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeptWal {
    pub from: Lsn,
    /// Up to what the server has.
    pub bytes: u64,
    pub segment_bytes: u64,
    /// The server keeps it for archive_command, too.
    pub is_archived: bool,
}

impl Server {
    pub async fn is_standby(&self) -> Result<bool, ServerError> {
        let operation = "ask whether the server is a standby";
        get(&self.one(operation, "SELECT pg_is_in_recovery()", &[]).await?, 0, operation)
    }

    /// A physical slot; `None`: there is none of that name.
    pub async fn slot(&self, name: &str) -> Result<Option<SlotState>, ServerError> {
        const OPERATION: &str = "look at the replication slot";
        const SQL: &str = "SELECT restart_lsn, wal_status, safe_wal_size, active, \
             to_jsonb(slot)->>'invalidation_reason' FROM pg_replication_slots slot \
             WHERE slot_name = $1 AND slot_type = 'physical'";
        let rows = self.client.query(SQL, &[&name]).await;
        let rows = rows.map_err(|source| ServerError::of_query(OPERATION, &self.target, source))?;
        let Some(row) = rows.first() else { return Ok(None) };
        let restart_lsn = get::<Option<PgLsn>>(row, 0, OPERATION)?.map(|lsn| Lsn(lsn.into()));
        let wal_status = match get::<Option<&str>>(row, 1, OPERATION)? {
            Some("lost") => WalStatus::Lost,
            Some("unreserved") => WalStatus::Unreserved,
            Some("extended") => WalStatus::Extended,
            _ => WalStatus::Reserved,
        };
        let (safe_wal_size, is_active) = (get(row, 2, OPERATION)?, get(row, 3, OPERATION)?);
        let lost_because = get(row, 4, OPERATION)?;
        Ok(Some(SlotState { restart_lsn, wal_status, safe_wal_size, is_active, lost_because }))
    }

    /// Whether a slot of that name is there, and is one for logical decoding.
    pub async fn has_logical_slot(&self, name: &str) -> Result<bool, ServerError> {
        const OPERATION: &str = "look at the replication slot";
        const SQL: &str = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1 AND slot_type = 'logical'";
        let row = self.client.query_one(SQL, &[&name]).await;
        let row = row.map_err(|source| ServerError::of_query(OPERATION, &self.target, source))?;
        Ok(get::<i64>(&row, 0, OPERATION)? > 0)
    }

    /// What a physical slot keeps; `None`: there is none of that name, or it keeps nothing.
    pub async fn kept_wal(&self, name: &str) -> Result<Option<KeptWal>, ServerError> {
        const OPERATION: &str = "ask what the replication slot keeps";
        // A standby archives only if archive_mode is always.
        const SQL: &str = "SELECT restart_lsn, greatest(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() \
             THEN greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) ELSE pg_current_wal_lsn() END, \
             restart_lsn), 0)::bigint, pg_size_bytes(current_setting('wal_segment_size')), \
             CASE WHEN pg_is_in_recovery() THEN current_setting('archive_mode') = 'always' \
             ELSE current_setting('archive_mode') <> 'off' END \
             FROM pg_replication_slots WHERE slot_name = $1 AND slot_type = 'physical' AND restart_lsn IS NOT NULL";
        let rows = self.client.query(SQL, &[&name]).await;
        let rows = rows.map_err(|source| ServerError::of_query(OPERATION, &self.target, source))?;
        let Some(row) = rows.first() else { return Ok(None) };
        Ok(Some(KeptWal {
            from: Lsn(get::<PgLsn>(row, 0, OPERATION)?.into()),
            bytes: get::<Option<i64>>(row, 1, OPERATION)?.unwrap_or_default().unsigned_abs(),
            segment_bytes: get::<i64>(row, 2, OPERATION)?.unsigned_abs(),
            is_archived: get(row, 3, OPERATION)?,
        }))
    }

    /// Nothing to do if there is none of that name; an error while somebody uses it.
    pub async fn drop_slot(&self, name: &str) -> Result<(), ServerError> {
        const SQL: &str = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1";
        let dropped = self.client.query(SQL, &[&name]).await;
        dropped.map(drop).map_err(|source| ServerError::of_query("drop the replication slot", &self.target, source))
    }

    /// A superuser's, or from 15 on pg_checkpoint's right.
    pub async fn checkpoint(&self) -> Result<(), ServerError> {
        let done = self.client.batch_execute("CHECKPOINT").await;
        done.map_err(|source| ServerError::of_query("make a checkpoint", &self.target, source))
    }

    /// Lets go of what a slot keeps before a position, also on a standby: there no farther than that has replayed
    /// (pg_replication_slot_advance, slotfuncs.c), and not at all where the slot is past that already.
    pub async fn advance_slot(&self, name: &str, to: Lsn) -> Result<(), ServerError> {
        const SQL: &str = "SELECT pg_replication_slot_advance(slot_name, $2) FROM pg_replication_slots WHERE slot_name = $1 \
             AND restart_lsn < least($2, CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
             ELSE pg_current_wal_flush_lsn() END)";
        let advanced = self.client.query(SQL, &[&name, &PgLsn::from(to.0)]).await;
        advanced.map(drop).map_err(|source| ServerError::of_query("advance the replication slot", &self.target, source))
    }
}
