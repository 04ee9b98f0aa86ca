//! Physical streaming replication as a client: what a standby's WAL receiver speaks, for releases 13 to 18.
//!
//! A [`Replication`] is one connection in replication mode; [`Replication::start`] makes it a [`WalStream`], and
//! [`WalStream::finish`] gives it back. Nothing here reconnects, decides where to start or keeps what it received.
//!
//! The protocol is in PostgreSQL's documentation, "Streaming Replication Protocol"; its commands are parsed in
//! src/backend/replication/repl_gram.y and run in src/backend/replication/walsender.c.

mod connect;
mod connection;
mod error;
mod refusal;
mod stream;

use std::str::FromStr;

use bytes::Bytes;
use walfleet_repository::postgres::{Lsn, SegmentSize, SystemId, Timeline};

pub use error::ReplicationError;
pub use stream::{Positions, Reply, StreamEvent, WalStream};

use self::connection::{Connection, Rows};
use self::refusal::{Complaint, StreamRequest};
use super::server::Target;

const IDENTIFY: &str = "identify the system";
/// NAMEDATALEN - 1, src/include/pg_config_manual.h.
const LONGEST_SLOT_NAME: usize = 63;

/// What IDENTIFY_SYSTEM answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SystemIdentity {
    pub system_id: SystemId,
    /// The one that the server writes, or on a standby the one that it replays.
    pub timeline: Timeline,
    /// The end of the WAL that the server has flushed, and so the end of what it would stream now.
    pub flushed_lsn: Lsn,
}

/// A connection in replication mode that does not stream. SQL is not understood on it.
///
/// A call that is dropped before it returned leaves its answer unread: every later call then answers
/// [`ReplicationError::Abandoned`].
#[derive(Debug)]
pub struct Replication {
    connection: Connection,
    /// Releases 13 and 14 start no stream before IDENTIFY_SYSTEM.
    is_identified: bool,
}

impl Replication {
    /// `connection` is libpq's keyword form or a URL, as `Server::connect` takes it; the database and
    /// `target_session_attrs` mean nothing here. Several hosts are tried in turn, each for at most 10 s. What
    /// `synchronous_standby_names` and `pg_stat_replication` call this client is `application_name`.
    pub async fn connect(connection: &str, application_name: &str) -> Result<Replication, ReplicationError> {
        let connection = connect::connect(connection, application_name).await?;
        Ok(Replication { connection, is_identified: false })
    }

    pub fn target(&self) -> &Target {
        self.connection.target()
    }

    pub async fn identify_system(&mut self) -> Result<SystemIdentity, ReplicationError> {
        let rows = self.query(IDENTIFY, "IDENTIFY_SYSTEM", Complaint::into_error).await?;
        let identity = SystemIdentity {
            system_id: SystemId(field(IDENTIFY, &rows, 0, "a system identifier")?),
            timeline: timeline_of(IDENTIFY, &rows, 1)?,
            flushed_lsn: field(IDENTIFY, &rows, 2, "a WAL position")?,
        };
        self.is_identified = true;
        Ok(identity)
    }

    pub async fn wal_segment_size(&mut self) -> Result<SegmentSize, ReplicationError> {
        let operation = "read wal_segment_size";
        let rows = self.query(operation, "SHOW wal_segment_size", Complaint::into_error).await?;
        let text = text(operation, &rows, 0)?;
        let found = || ReplicationError::Answer { operation, found: text.clone(), expected: "a WAL segment size" };
        parse_segment_size(&text).ok_or_else(found)
    }

    /// The content of the timeline's history file, byte by byte. The first timeline has none.
    pub async fn timeline_history(&mut self, timeline: Timeline) -> Result<Bytes, ReplicationError> {
        let operation = "read the timeline's history";
        let sql = format!("TIMELINE_HISTORY {timeline}");
        let rows = self.query(operation, &sql, |complaint| complaint.of_history(timeline)).await?;
        let name = text(operation, &rows, 0)?;
        if name != timeline.history_name() {
            return Err(ReplicationError::Answer { operation, found: name, expected: "the history file asked for" });
        }
        column(operation, &rows, 1)
    }

    /// Makes a persistent physical slot that keeps WAL from the last checkpoint's redo position on. Where that is, the
    /// command does not say: `pg_replication_slots.restart_lsn` does.
    pub async fn create_slot(&mut self, slot: &str) -> Result<(), ReplicationError> {
        // The grammar of 13 and 14; later ones still take it.
        let sql = format!("CREATE_REPLICATION_SLOT {} PHYSICAL RESERVE_WAL", quoted(slot)?);
        self.query("create the replication slot", &sql, |complaint| complaint.of_slot(slot)).await.map(drop)
    }

    /// Answers [`ReplicationError::SlotInUse`] while somebody streams from it; does not wait.
    pub async fn drop_slot(&mut self, slot: &str) -> Result<(), ReplicationError> {
        let sql = format!("DROP_REPLICATION_SLOT {}", quoted(slot)?);
        self.query("drop the replication slot", &sql, |complaint| complaint.of_slot(slot)).await.map(drop)
    }

    /// Streams from `at` on; give it a segment's start to fill whole segments. That WAL is gone, or that `at` is ahead
    /// of the server, is told only by the first [`WalStream::next`].
    pub async fn start(
        mut self,
        slot: Option<&str>,
        at: Lsn,
        timeline: Timeline,
    ) -> Result<WalStream, ReplicationError> {
        if !self.is_identified {
            self.identify_system().await?;
        }
        let from = slot.map(|slot| quoted(slot).map(|slot| format!("SLOT {slot} "))).transpose()?.unwrap_or_default();
        let sql = format!("START_REPLICATION {from}PHYSICAL {at} TIMELINE {timeline}");
        let request = StreamRequest { slot: slot.map(str::to_owned), at, timeline };
        WalStream::start(self.connection, &sql, request).await
    }

    async fn query(
        &mut self,
        operation: &'static str,
        sql: &str,
        told: impl FnOnce(Complaint) -> ReplicationError,
    ) -> Result<Rows, ReplicationError> {
        self.connection.query(operation, sql).await?.map_err(told)
    }
}

/// A slot's name as the replication grammar takes it. Checked here as the server would (ReplicationSlotValidateName,
/// slot.c), since releases differ in how a quoted name is read.
fn quoted(slot: &str) -> Result<String, ReplicationError> {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if (1..=LONGEST_SLOT_NAME).contains(&slot.len()) && slot.bytes().all(is_letter) {
        Ok(format!("\"{slot}\""))
    } else {
        Err(ReplicationError::SlotName { slot: slot.to_owned() })
    }
}

/// As SHOW prints a number of bytes: the largest unit that divides it (guc.c, convert_int_from_base_unit).
fn parse_segment_size(text: &str) -> Option<SegmentSize> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    let shift = match unit {
        "B" => 0,
        "kB" => 10,
        "MB" => 20,
        "GB" => 30,
        _ => return None,
    };
    SegmentSize::new(number.parse::<u64>().ok()?.checked_mul(1 << shift)?).ok()
}

/// A column of the only row.
fn column(operation: &'static str, rows: &Rows, index: usize) -> Result<Bytes, ReplicationError> {
    let wrong = |found: String| ReplicationError::Answer { operation, found, expected: "one row of values" };
    let [row] = rows.as_slice() else { return Err(wrong(format!("{} rows", rows.len()))) };
    row.get(index).cloned().flatten().ok_or_else(|| wrong(format!("no column {}", index + 1)))
}

fn text(operation: &'static str, rows: &Rows, index: usize) -> Result<String, ReplicationError> {
    column(operation, rows, index).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn field<T: FromStr>(
    operation: &'static str,
    rows: &Rows,
    index: usize,
    expected: &'static str,
) -> Result<T, ReplicationError> {
    let found = text(operation, rows, index)?;
    found.parse().map_err(|_| ReplicationError::Answer { operation, found, expected })
}

fn timeline_of(operation: &'static str, rows: &Rows, index: usize) -> Result<Timeline, ReplicationError> {
    let id: u32 = field(operation, rows, index, "a timeline")?;
    let wrong = |_| ReplicationError::Answer { operation, found: id.to_string(), expected: "a timeline" };
    Timeline::new(id).map_err(wrong)
}

#[cfg(test)]
mod scripted_tests;
#[cfg(test)]
mod tests;
