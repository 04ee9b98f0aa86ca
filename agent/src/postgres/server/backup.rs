//! A low-level backup: the session that holds it, and its end (backup.sgml, "Making a Base Backup Using the Low Level
//! API"). The server forgets the backup with the session, so one connection lives as long as the backup does.

use walfleet_repository::postgres::{Lsn, Timeline};

use super::{Server, ServerError, get, lsn};
use crate::postgres::backup_label::{BackupLabel, BackupLabelError};

/// How the starting checkpoint is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CheckpointPace {
    /// At once, at the cost of a burst of writes.
    Fast,
    /// Spread over checkpoint_completion_target of checkpoint_timeout: minutes, gently.
    Spread,
}

/// A backup that the server is in. Dropping it ends the session, and with it the backup.
#[derive(Debug)]
pub struct BackupSession {
    server: Server,
    /// Redo position of the starting checkpoint: the first WAL a restore needs.
    pub start_lsn: Lsn,
    /// The server's clock at the start, microseconds since the Unix epoch.
    pub started_at_us: i64,
}

/// What the server says at a backup's end. The two files belong into the backup byte for byte.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupStop {
    /// WAL up to here makes the backup consistent.
    pub stop_lsn: Lsn,
    pub stopped_at_us: i64,
    pub label_file: Vec<u8>,
    /// Empty if the cluster has no tablespaces outside its data directory.
    pub tablespace_map: Vec<u8>,
    pub label: BackupLabel,
    /// The server's at the end; on a standby the upstream may have been promoted meanwhile.
    pub timeline: Timeline,
}

const START: &str = "start the backup";
const STOP: &str = "stop the backup";
const NOW_US: &str = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

impl Server {
    /// Puts the server into backup mode, on a primary or a standby. Takes as long as its checkpoint.
    pub async fn start_backup(self, label: &str, pace: CheckpointPace) -> Result<BackupSession, ServerError> {
        let call = match self.major() {
            15.. => "pg_backup_start($1, $2)",
            // Exclusive backups are never wanted: a crash would leave the server unable to start.
            _ => "pg_start_backup($1, $2, false)",
        };
        let fast = pace == CheckpointPace::Fast;
        let sql = format!("SELECT {call}, {NOW_US}");
        let row = self.one(START, &sql, &[&label, &fast]).await;
        let row = row.map_err(|error| error.or_missing_right(|| self.backup_grants().join(" ")))?;
        let (start_lsn, started_at_us) = (lsn(&row, 0, START)?, get(&row, 1, START)?);
        Ok(BackupSession { server: self, start_lsn, started_at_us })
    }

    /// What lets an unprivileged role take backups.
    pub(super) fn backup_grants(&self) -> [String; 2] {
        let (start, stop) = self.backup_functions();
        [self.grant(&format!("EXECUTE ON FUNCTION {start}")), self.grant(&format!("EXECUTE ON FUNCTION {stop}"))]
    }

    pub(super) fn backup_functions(&self) -> (&'static str, &'static str) {
        match self.major() {
            15.. => ("pg_backup_start(text, boolean)", "pg_backup_stop(boolean)"),
            _ => ("pg_start_backup(text, boolean, boolean)", "pg_stop_backup(boolean, boolean)"),
        }
    }
}

impl BackupSession {
    /// For what else is to be asked of the server meanwhile.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Returns an error when the session is lost, and with it the backup; never otherwise. Watch it while copying.
    /// Safe to drop.
    pub async fn lost(&self) -> ServerError {
        self.server.ended().await;
        ServerError::Lost { operation: "hold the backup", target: self.server.target.clone(), source: None }
    }

    /// Ends backup mode. Does not wait for WAL to be archived: whether it is safe is for the repository to say. On a
    /// primary this also switches to a new segment, so that the last one needed can be archived.
    pub async fn stop(self) -> Result<BackupStop, ServerError> {
        let server = &self.server;
        let call = match server.major() {
            15.. => "pg_backup_stop(false)",
            _ => "pg_stop_backup(false, false)",
        };
        // The bytes of the database's encoding, that is those that the server would have written itself.
        let sql = format!(
            "SELECT lsn, convert_to(labelfile, getdatabaseencoding()), \
             convert_to(coalesce(spcmapfile, ''), getdatabaseencoding()), {NOW_US} FROM {call}"
        );
        let row = server.one(STOP, &sql, &[]).await;
        let row = row.map_err(|error| error.or_missing_right(|| server.backup_grants().join(" ")))?;
        let label_file: Vec<u8> = get(&row, 1, STOP)?;
        let label = BackupLabel::parse(&label_file).map_err(|error| unreadable(&label_file, &error))?;
        Ok(BackupStop {
            stop_lsn: lsn(&row, 0, STOP)?,
            stopped_at_us: get(&row, 3, STOP)?,
            tablespace_map: get(&row, 2, STOP)?,
            label_file,
            label,
            timeline: server.timeline().await?,
        })
    }
}

fn unreadable(label_file: &[u8], error: &BackupLabelError) -> ServerError {
    let found = format!("{error}: {}", String::from_utf8_lossy(label_file));
    ServerError::Answer { operation: STOP, found, expected: "a backup label" }
}
