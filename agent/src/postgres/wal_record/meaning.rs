//! What the few records mean that the rest of the program asks about: completions of transactions, restore points, and
//! what changes the log itself.

use walfleet_repository::postgres::{Lsn, Timeline};

use super::record::{MalformedRecord, Record, rmgr};
use crate::postgres::bytes;

/// Operations of the XLOG manager (src/include/catalog/pg_control.h).
mod xlog {
    pub const CHECKPOINT_SHUTDOWN: u8 = 0x00;
    pub const CHECKPOINT_ONLINE: u8 = 0x10;
    pub const SWITCH: u8 = 0x40;
    pub const BACKUP_END: u8 = 0x50;
    pub const PARAMETER_CHANGE: u8 = 0x60;
    pub const RESTORE_POINT: u8 = 0x70;
    pub const FPW_CHANGE: u8 = 0x80;
    pub const END_OF_RECOVERY: u8 = 0x90;
}

/// Operations of the transaction manager (src/include/access/xact.h).
mod xact {
    pub const MASK: u8 = 0x70;
    pub const COMMIT: u8 = 0x00;
    pub const ABORT: u8 = 0x20;
    pub const COMMIT_PREPARED: u8 = 0x30;
    pub const ABORT_PREPARED: u8 = 0x40;
}

/// PostgreSQL counts microseconds from 2000-01-01, 10957 days after 1970-01-01 (src/include/datatype/timestamp.h).
const POSTGRES_EPOCH_US: i64 = 10_957 * 86_400 * 1_000_000;

/// How a transaction ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    Commit,
    Abort,
}

/// The record that ended a transaction. Recovery compares just these with a target time or transaction
/// (recoveryStopsBefore, recoveryStopsAfter, src/backend/access/transam/xlogrecovery.c), aborts included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    pub end: Lsn,
    /// The server's clock at the decision, microseconds since the Unix epoch. Not monotonic: it is taken before the
    /// record's place in the log is.
    pub at_us: i64,
    pub outcome: Outcome,
}

/// pg_create_restore_point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RestorePoint {
    pub end: Lsn,
    pub at_us: i64,
    /// As given, in the encoding of the database that it was made from; undecodable bytes are replaced.
    pub name: String,
}

/// wal_level (WalLevel, src/include/access/xlog.h).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum WalLevel {
    Minimal,
    Replica,
    Logical,
}

impl WalLevel {
    pub fn from_code(code: u32) -> Option<WalLevel> {
        match code {
            0 => Some(WalLevel::Minimal),
            1 => Some(WalLevel::Replica),
            2 => Some(WalLevel::Logical),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checkpoint {
    pub start: Lsn,
    pub redo: Lsn,
    pub timeline: Timeline,
    pub previous_timeline: Timeline,
    pub shutdown: bool,
}

/// Settings that recovery depends on, as the server that writes began with them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ParameterChange {
    /// Start of the record before.
    pub previous: Lsn,
    pub end: Lsn,
    /// `None`: one that is not known.
    pub wal_level: Option<WalLevel>,
}

impl ParameterChange {
    /// Whether recovery from a backup refuses to go on behind it (CheckRequiredParameterValues,
    /// src/backend/access/transam/xlogrecovery.c); before PostgreSQL 14 it may go on, with data missing.
    pub fn ends_archive_recovery(&self) -> bool {
        self.wal_level.is_none_or(|level| level < WalLevel::Replica)
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Meaning {
    Completed(Completion),
    RestorePoint(RestorePoint),
    Checkpoint(Checkpoint),
    /// The server left recovery, on a new timeline unless it only crashed.
    EndOfRecovery {
        end: Lsn,
        timeline: Timeline,
        previous_timeline: Timeline,
    },
    /// A base backup that began at `backup_start` was ended here on a primary.
    BackupEnd {
        end: Lsn,
        backup_start: Lsn,
    },
    Switch,
    ParameterChange(ParameterChange),
    FullPageWrites {
        end: Lsn,
        on: bool,
    },
    /// Nothing that is asked about.
    Other,
}

/// Whether `record` can mean anything but [`Meaning::Other`], before its body is looked at.
fn is_of_interest(record: &Record<'_>) -> bool {
    matches!(record.rmgr, rmgr::XLOG | rmgr::XACT)
}

pub fn meaning(record: &Record<'_>) -> Result<Meaning, MalformedRecord> {
    if !is_of_interest(record) {
        return Ok(Meaning::Other);
    }
    let read = if record.rmgr == rmgr::XACT { transaction } else { log_event };
    read(record, record.main_data()?).ok_or(MalformedRecord(record.start))
}

fn transaction(record: &Record<'_>, data: &[u8]) -> Option<Meaning> {
    let outcome = match record.info & xact::MASK {
        xact::COMMIT | xact::COMMIT_PREPARED => Outcome::Commit,
        xact::ABORT | xact::ABORT_PREPARED => Outcome::Abort,
        _ => return Some(Meaning::Other),
    };
    // xl_xact_commit and xl_xact_abort both begin with xact_time.
    Some(Meaning::Completed(Completion { end: record.end, at_us: unix_us(bytes::i64_at(data, 0)?), outcome }))
}

fn log_event(record: &Record<'_>, data: &[u8]) -> Option<Meaning> {
    let end = record.end;
    let timeline_at = |at| bytes::u32_at(data, at).map(Timeline);
    let meaning = match record.operation() {
        // CheckPoint (src/include/catalog/pg_control.h): redo, ThisTimeLineID, PrevTimeLineID.
        operation @ (xlog::CHECKPOINT_SHUTDOWN | xlog::CHECKPOINT_ONLINE) => Meaning::Checkpoint(Checkpoint {
            start: record.start,
            redo: Lsn(bytes::u64_at(data, 0)?),
            timeline: timeline_at(8)?,
            previous_timeline: timeline_at(12)?,
            shutdown: operation == xlog::CHECKPOINT_SHUTDOWN,
        }),
        xlog::SWITCH => Meaning::Switch,
        xlog::BACKUP_END => Meaning::BackupEnd { end, backup_start: Lsn(bytes::u64_at(data, 0)?) },
        // xl_parameter_change: wal_level is the sixth int.
        xlog::PARAMETER_CHANGE => Meaning::ParameterChange(ParameterChange {
            previous: record.previous,
            end,
            wal_level: WalLevel::from_code(bytes::u32_at(data, 20)?),
        }),
        xlog::RESTORE_POINT => {
            let name = data.get(8..)?;
            let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            let name = String::from_utf8_lossy(name.get(..length)?).into_owned();
            Meaning::RestorePoint(RestorePoint { end, at_us: unix_us(bytes::i64_at(data, 0)?), name })
        }
        xlog::FPW_CHANGE => Meaning::FullPageWrites { end, on: bytes::u8_at(data, 0)? != 0 },
        // xl_end_of_recovery: end_time, ThisTimeLineID, PrevTimeLineID.
        xlog::END_OF_RECOVERY => {
            Meaning::EndOfRecovery { end, timeline: timeline_at(8)?, previous_timeline: timeline_at(12)? }
        }
        _ => Meaning::Other,
    };
    Some(meaning)
}

fn unix_us(postgres_us: i64) -> i64 {
    postgres_us.saturating_add(POSTGRES_EPOCH_US)
}
