//! WAL as it comes, in order and without gaps, and what the server is told of where it went.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Buf, BufMut, Bytes};
use postgres_protocol::message::backend::{DataRowBody, Message};
use postgres_protocol::message::frontend;
use walfleet_repository::postgres::{Lsn, Timeline};

use super::connection::{Connection, Incoming};
use super::error::ReplicationError;
use super::refusal::StreamRequest;
use super::{Replication, field, timeline_of};
use crate::postgres::server::{CONNECT_TIMEOUT, Target};

const START: &str = "start streaming";
const STREAM: &str = "stream WAL";
const FINISH: &str = "end the stream";

/// Microseconds from 1970 to 2000, from where PostgreSQL counts (src/include/datatype/timestamp.h).
const EPOCH_US: i64 = 946_684_800_000_000;

/// One message of a stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StreamEvent {
    /// Never empty, and begins where the one before ended. It may end anywhere, also inside a record or a page, but not
    /// beyond a segment's end. A slice of the read buffer: to keep it is to keep up to 256 KiB.
    Wal {
        start: Lsn,
        bytes: Bytes,
        /// The end of the server's WAL when it sent this.
        server_end: Lsn,
        /// By the server's clock, microseconds since 1970.
        sent_at_us: i64,
    },
    KeepAlive {
        /// The server has sent everything before it.
        server_end: Lsn,
        /// By the server's clock, microseconds since 1970.
        sent_at_us: i64,
        /// The server ends the session if it hears nothing within the rest of wal_sender_timeout.
        is_reply_requested: bool,
    },
    /// All of the timeline was sent. [`WalStream::finish`] gives the connection back.
    TimelineEnded {
        next: Timeline,
        /// Where `next` branches off. What a standby streamed may go beyond it: the first half of a record that no
        /// timeline holds whole (XLogSendPhysical, walsender.c).
        switch_lsn: Lsn,
    },
}

/// The ends of what this side has, as `pg_stat_replication` shows them; [`Lsn::INVALID`] for unknown.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Positions {
    pub written_lsn: Lsn,
    /// Moves the slot on, and lets commits return that wait for this standby. A fast shutdown of the server waits for
    /// it to reach the end.
    pub flushed_lsn: Lsn,
    pub applied_lsn: Lsn,
}

/// Whether the server shall answer a report with a keepalive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reply {
    Requested,
    NotNeeded,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Streaming,
    /// The server has sent CopyDone, and its parting words come.
    Ending {
        switch: Option<(Timeline, Lsn)>,
    },
    /// The connection takes commands again.
    Ended {
        next: Timeline,
        switch_lsn: Lsn,
    },
}

/// A connection that streams. Dropped, it is closed.
#[derive(Debug)]
pub struct WalStream {
    connection: Connection,
    /// `at` is the end of what was received, from the first position on that was asked for.
    request: StreamRequest,
    phase: Phase,
}

impl WalStream {
    pub(super) async fn start(
        mut connection: Connection,
        sql: &str,
        request: StreamRequest,
    ) -> Result<WalStream, ReplicationError> {
        connection.send_command(START, sql).await?;
        let phase = match connection.receive(START).await? {
            Incoming::CopyBoth => Phase::Streaming,
            // An old timeline that has nothing from this position on.
            Incoming::Message(Message::RowDescription(_)) => Phase::Ending { switch: None },
            Incoming::Message(Message::ErrorResponse(body)) => {
                return Err(connection.complaint(START, &body)?.of_stream(&request));
            }
            Incoming::Message(_) => return Err(connection.unexpected(START)),
        };
        Ok(WalStream { connection, request, phase })
    }

    pub fn target(&self) -> &Target {
        self.connection.target()
    }

    pub fn timeline(&self) -> Timeline {
        self.request.timeline
    }

    /// The end of what [`WalStream::next`] gave.
    pub fn received_lsn(&self) -> Lsn {
        self.request.at
    }

    /// Safe to drop: nothing is lost, so it may stand in a `select!`. After an error the stream is of no more use;
    /// after [`StreamEvent::TimelineEnded`] it gives the same again.
    pub async fn next(&mut self) -> Result<StreamEvent, ReplicationError> {
        loop {
            if let Phase::Ended { next, switch_lsn } = self.phase {
                return Ok(StreamEvent::TimelineEnded { next, switch_lsn });
            }
            let incoming = self.connection.receive(STREAM).await?;
            if let Some(event) = self.take(incoming)? {
                return Ok(event);
            }
        }
    }

    fn take(&mut self, incoming: Incoming) -> Result<Option<StreamEvent>, ReplicationError> {
        let Incoming::Message(message) = incoming else { return Err(self.connection.unexpected(STREAM)) };
        match (self.phase, message) {
            (Phase::Streaming, Message::CopyData(body)) => return self.take_copy_data(body.into_bytes()),
            (Phase::Streaming, Message::CopyDone) => {
                frontend::copy_done(self.connection.outgoing());
                self.phase = Phase::Ending { switch: None };
            }
            // A server that shuts down ends the command while the copy goes on (WalSndDone).
            (Phase::Streaming, Message::CommandComplete(_)) => {
                let target = self.connection.target().clone();
                return Err(ReplicationError::ShutDown { target, at: self.request.at });
            }
            // Our last report asked for an answer and crossed the server's CopyDone (ProcessStandbyReplyMessage). libpq
            // drops it as well (pqParseInput3).
            (Phase::Ending { switch: None }, Message::CopyData(_)) => {}
            (Phase::Ending { .. }, Message::DataRow(body)) => {
                self.phase = Phase::Ending { switch: Some(self.switch(&body)?) };
            }
            (Phase::Ending { .. }, Message::RowDescription(_) | Message::CommandComplete(_)) => {}
            (Phase::Ending { switch: Some((next, switch_lsn)) }, Message::ReadyForQuery(_)) => {
                self.connection.end_command();
                self.phase = Phase::Ended { next, switch_lsn };
            }
            (_, Message::ErrorResponse(body)) => {
                return Err(self.connection.complaint(STREAM, &body)?.of_stream(&self.request));
            }
            _ => return Err(self.connection.unexpected(STREAM)),
        }
        Ok(None)
    }

    /// XLogData or a primary keepalive.
    fn take_copy_data(&mut self, mut data: Bytes) -> Result<Option<StreamEvent>, ReplicationError> {
        let short = |_| self.connection.malformed(STREAM, "a message that is too short".to_owned());
        match data.try_get_u8().map_err(short)? {
            b'w' => {
                let start = Lsn(data.try_get_u64().map_err(short)?);
                let server_end = Lsn(data.try_get_u64().map_err(short)?);
                let sent_at_us = data.try_get_i64().map_err(short)?.saturating_add(EPOCH_US);
                if start != self.request.at {
                    let (target, expected) = (self.connection.target().clone(), self.request.at);
                    return Err(ReplicationError::NotContiguous { target, found: start, expected });
                }
                let end = start.checked_add(data.len() as u64);
                let beyond = || self.connection.malformed(STREAM, "WAL beyond the last position".to_owned());
                self.request.at = end.ok_or_else(beyond)?;
                let event = StreamEvent::Wal { start, bytes: data, server_end, sent_at_us };
                Ok((self.request.at > start).then_some(event))
            }
            b'k' => {
                let server_end = Lsn(data.try_get_u64().map_err(short)?);
                let sent_at_us = data.try_get_i64().map_err(short)?.saturating_add(EPOCH_US);
                let is_reply_requested = data.try_get_u8().map_err(short)? != 0;
                Ok(Some(StreamEvent::KeepAlive { server_end, sent_at_us, is_reply_requested }))
            }
            kind => {
                let detail = format!("a streaming message of kind {}", kind.escape_ascii());
                Err(self.connection.malformed(STREAM, detail))
            }
        }
    }

    /// The row with the next timeline and where it begins.
    fn switch(&self, body: &DataRowBody) -> Result<(Timeline, Lsn), ReplicationError> {
        let rows = vec![self.connection.values(STREAM, body)?];
        let next = timeline_of(STREAM, &rows, 0)?;
        let switch_lsn: Lsn = field(STREAM, &rows, 1, "the position of the switch")?;
        if next <= self.request.timeline || switch_lsn > self.request.at {
            let detail = format!(
                "that timeline {next} follows {} at {switch_lsn}, after WAL up to {}",
                self.request.timeline, self.request.at
            );
            return Err(self.connection.malformed(STREAM, detail));
        }
        Ok((next, switch_lsn))
    }

    /// A standby status update. The server ends a session that reports nothing for wal_sender_timeout (60 s by
    /// default). Safe to drop: it is sent with the next call then. A connection that was lost meanwhile is told by
    /// [`WalStream::next`], after what the server still had to say; once the timeline has ended nothing is sent.
    pub async fn report(&mut self, positions: Positions, reply: Reply) {
        if !matches!(self.phase, Phase::Streaming) {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let mut update = Vec::with_capacity(34);
        update.put_u8(b'r');
        update.put_u64(positions.written_lsn.0);
        update.put_u64(positions.flushed_lsn.0);
        update.put_u64(positions.applied_lsn.0);
        update.put_i64(i64::try_from(now).unwrap_or(i64::MAX).saturating_sub(EPOCH_US));
        update.put_u8(u8::from(reply == Reply::Requested));
        let message = frontend::CopyData::new(update.as_slice()).expect("34 bytes are not too many");
        message.write(self.connection.outgoing());
        self.connection.flush().await;
    }

    /// Ends the stream and gives the connection back. WAL that is on its way is dropped: [`WalStream::received_lsn`]
    /// does not count it.
    pub async fn finish(mut self) -> Result<Replication, ReplicationError> {
        let seconds = CONNECT_TIMEOUT.as_secs();
        let target = self.connection.target().clone();
        let ended = tokio::time::timeout(CONNECT_TIMEOUT, self.end()).await;
        ended.unwrap_or(Err(ReplicationError::NoAnswer { operation: FINISH, target, seconds }))?;
        Ok(Replication { connection: self.connection, is_identified: true })
    }

    async fn end(&mut self) -> Result<(), ReplicationError> {
        match self.phase {
            Phase::Streaming => frontend::copy_done(self.connection.outgoing()),
            Phase::Ending { .. } => {}
            Phase::Ended { .. } => return Ok(()),
        }
        loop {
            let Incoming::Message(message) = self.connection.receive(FINISH).await? else {
                return Err(self.connection.unexpected(FINISH));
            };
            match message {
                Message::CopyData(_)
                | Message::CopyDone
                | Message::RowDescription(_)
                | Message::DataRow(_)
                | Message::CommandComplete(_) => {}
                Message::ReadyForQuery(_) => {
                    self.connection.end_command();
                    return Ok(());
                }
                Message::ErrorResponse(body) => {
                    return Err(self.connection.complaint(FINISH, &body)?.of_stream(&self.request));
                }
                _ => return Err(self.connection.unexpected(FINISH)),
            }
        }
    }
}
