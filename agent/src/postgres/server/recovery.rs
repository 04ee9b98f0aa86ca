//! Where a recovering server stands.

use walfleet_repository::postgres::Lsn;

use super::{Server, ServerError, get, lsn};

/// One look at recovery. After a promotion the position and the time stay what they were at its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecoveryStanding {
    pub in_recovery: bool,
    /// Replay has stopped and waits.
    pub paused: bool,
    /// End of the last record replayed.
    pub lsn: Lsn,
    /// Of the last commit or abort replayed.
    pub last_commit_us: Option<i64>,
}

impl Server {
    pub async fn recovery(&self) -> Result<RecoveryStanding, ServerError> {
        const OPERATION: &str = "ask where recovery stands";
        // "Pause requested" is not yet a pause (pg_get_wal_replay_pause_state, 14 and later).
        let paused = match self.major() {
            14.. => "pg_get_wal_replay_pause_state() = 'paused'",
            _ => "pg_is_wal_replay_paused()",
        };
        let sql = format!(
            "SELECT pg_is_in_recovery(), CASE WHEN pg_is_in_recovery() THEN {paused} ELSE false END, \
             coalesce(pg_last_wal_replay_lsn(), '0/0'), \
             (extract(epoch FROM pg_last_xact_replay_timestamp()) * 1000000)::bigint"
        );
        let row = self.one(OPERATION, &sql, &[]).await?;
        Ok(RecoveryStanding {
            in_recovery: get(&row, 0, OPERATION)?,
            paused: get(&row, 1, OPERATION)?,
            lsn: lsn(&row, 2, OPERATION)?,
            last_commit_us: get(&row, 3, OPERATION)?,
        })
    }
}
