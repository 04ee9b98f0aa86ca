//! Messages over a socket: framed, bounded, and neither torn nor lost when a call is dropped before it returned.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{DataRowBody, ErrorResponseBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::error::ReplicationError;
use super::refusal::Complaint;
use crate::postgres::server::Target;

/// Read at once, and what one slice of WAL that is kept keeps with it. Two messages of 128 KiB, the most that a server
/// of the usual page size sends at once (MAX_SEND_SIZE, 16 pages, walsender.c).
const READ_BUFFER_BYTES: usize = 256 << 10;
/// Room that is worth a read where the length of what comes is not known yet.
const LEAST_READ_BYTES: usize = 16 << 10;
/// 16 pages of 64 KiB, the largest page size, and their header. A longer message is no PostgreSQL's; of other answers,
/// a history file would need some ten thousand promotions.
const LONGEST_MESSAGE_BYTES: usize = (1 << 20) + 64;
/// A message's tag and length.
const HEADER_BYTES: usize = 5;

/// Of a command: a value of a column, absent if NULL.
pub(super) type Rows = Vec<Vec<Option<Bytes>>>;

#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// Safe to drop, as tokio's is.
    async fn read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => stream.read_buf(buffer).await,
            Socket::Tcp(stream) => stream.read_buf(buffer).await,
        }
    }

    /// Safe to drop: what was written is gone from `buffer`, the rest is there.
    async fn write(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => stream.write_buf(buffer).await,
            Socket::Tcp(stream) => stream.write_buf(buffer).await,
        }
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => stream.try_write(bytes),
            Socket::Tcp(stream) => stream.try_write(bytes),
        }
    }
}

/// What the server sent.
pub(super) enum Incoming {
    Message(Message),
    /// CopyBothResponse: the stream begins. Not known to postgres-protocol, as no query is answered by it.
    CopyBoth,
}

const COPY_BOTH_TAG: u8 = b'W';

#[derive(Debug)]
pub(super) struct Connection {
    socket: Socket,
    target: Target,
    incoming: BytesMut,
    outgoing: BytesMut,
    /// Why nothing can be written any more. Told only when all that the server still had to say has been read, since
    /// that says more.
    write_error: Option<io::Error>,
    /// From sending a command until ReadyForQuery.
    is_in_command: bool,
    /// Of the last message.
    tag: u8,
}

impl Connection {
    pub fn new(socket: Socket, target: Target) -> Connection {
        let (incoming, outgoing) = (BytesMut::with_capacity(READ_BUFFER_BYTES), BytesMut::new());
        Connection { socket, target, incoming, outgoing, write_error: None, is_in_command: false, tag: 0 }
    }

    pub fn target(&self) -> &Target {
        &self.target
    }

    /// What is written into it goes out with the next [`Connection::flush`] or [`Connection::receive`].
    pub fn outgoing(&mut self) -> &mut BytesMut {
        &mut self.outgoing
    }

    /// Safe to drop: what is left goes out with the next call. Fails never; [`Connection::receive`] tells why the
    /// connection ended.
    ///
    /// A WAL sender reads also while it waits to write (WalSndLoop), so that both never wait for each other.
    pub async fn flush(&mut self) {
        while !self.outgoing.is_empty() && self.write_error.is_none() {
            let error = match self.socket.write(&mut self.outgoing).await {
                Ok(0) => io::ErrorKind::WriteZero.into(),
                Ok(_) => continue,
                Err(error) => error,
            };
            self.write_error = Some(error);
        }
        if self.write_error.is_some() {
            self.outgoing.clear();
        }
    }

    /// The next message that is not merely a notice or a changed setting. Safe to drop: nothing is lost.
    pub async fn receive(&mut self, operation: &'static str) -> Result<Incoming, ReplicationError> {
        loop {
            self.flush().await;
            while let Some(incoming) = self.take(operation)? {
                match incoming {
                    Incoming::Message(
                        Message::NoticeResponse(_) | Message::ParameterStatus(_) | Message::NotificationResponse(_),
                    ) => {}
                    other => return Ok(other),
                }
            }
            self.make_room();
            let read = self.socket.read(&mut self.incoming).await;
            let source = match read {
                Ok(0) => self.write_error.take(),
                Ok(_) => continue,
                Err(error) => Some(error),
            };
            return Err(ReplicationError::Lost { operation, target: self.target.clone(), source });
        }
    }

    /// A whole message that has already arrived. Its bytes are a slice of what was read.
    fn take(&mut self, operation: &'static str) -> Result<Option<Incoming>, ReplicationError> {
        let Some(length) = self.announced() else { return Ok(None) };
        self.tag = self.incoming.first().copied().unwrap_or_default();
        if !(HEADER_BYTES..=LONGEST_MESSAGE_BYTES).contains(&length) {
            let length = length.saturating_sub(1);
            let detail = format!("a message {} of {length} bytes", self.tag.escape_ascii());
            return Err(self.malformed(operation, detail));
        }
        if self.incoming.len() < length {
            return Ok(None);
        }
        if self.tag == COPY_BOTH_TAG {
            self.incoming.advance(length);
            return Ok(Some(Incoming::CopyBoth));
        }
        match Message::parse(&mut self.incoming) {
            Ok(message) => Ok(message.map(Incoming::Message)),
            Err(error) => Err(self.malformed(operation, error.to_string())),
        }
    }

    /// The length of the next message, header and all, once its header is there.
    fn announced(&self) -> Option<usize> {
        let (_, rest) = self.incoming.split_first()?;
        // The length counts itself, not the tag.
        rest.first_chunk().map(|length| (u32::from_be_bytes(*length) as usize).saturating_add(1))
    }

    /// Moves a message's beginning only where its end finds no room: there, or in a new buffer if slices of this one
    /// are still in use.
    fn make_room(&mut self) {
        let length = self.announced().unwrap_or(0);
        let spare = self.incoming.capacity() - self.incoming.len();
        let missing = length.saturating_sub(self.incoming.len());
        let is_enough = if missing == 0 { spare >= LEAST_READ_BYTES } else { spare >= missing };
        let capacity = READ_BUFFER_BYTES.max(length);
        if !is_enough && !self.incoming.try_reclaim(capacity - self.incoming.len()) {
            let mut fresh = BytesMut::with_capacity(capacity);
            fresh.extend_from_slice(&self.incoming);
            self.incoming = fresh;
        }
    }

    /// Sends a command whose answer is still to be received, up to ReadyForQuery.
    pub async fn send_command(&mut self, operation: &'static str, sql: &str) -> Result<(), ReplicationError> {
        if self.is_in_command {
            return Err(ReplicationError::Abandoned { operation, target: self.target.clone() });
        }
        // Fails for a NUL inside, before anything is written that matters: the buffer was empty.
        if let Err(error) = frontend::query(sql, &mut self.outgoing) {
            self.outgoing.clear();
            return Err(ReplicationError::Unsendable { operation, source: error });
        }
        self.is_in_command = true;
        self.flush().await;
        Ok(())
    }

    /// ReadyForQuery has come.
    pub fn end_command(&mut self) {
        self.is_in_command = false;
    }

    /// The rows of a command, or what the server had against it; the connection is usable after both.
    pub async fn query(
        &mut self,
        operation: &'static str,
        sql: &str,
    ) -> Result<Result<Rows, Complaint>, ReplicationError> {
        self.send_command(operation, sql).await?;
        let mut rows = Rows::new();
        let mut complaint = None;
        loop {
            let message = match self.receive(operation).await {
                Ok(Incoming::Message(message)) => message,
                Ok(Incoming::CopyBoth) => return Err(self.unexpected(operation)),
                // After a FATAL the server says no more.
                Err(error) => return complaint.map(Err).map(Ok).unwrap_or(Err(error)),
            };
            match message {
                Message::DataRow(body) => rows.push(self.values(operation, &body)?),
                Message::RowDescription(_) | Message::CommandComplete(_) => {}
                Message::ErrorResponse(body) => complaint = Some(self.complaint(operation, &body)?),
                Message::ReadyForQuery(_) => {
                    self.end_command();
                    return Ok(complaint.map_or(Ok(rows), Err));
                }
                _ => return Err(self.unexpected(operation)),
            }
        }
    }

    pub fn values(&self, operation: &'static str, body: &DataRowBody) -> Result<Vec<Option<Bytes>>, ReplicationError> {
        let buffer = body.buffer();
        let ranges: Vec<_> = body.ranges().collect().map_err(|error| self.malformed(operation, error.to_string()))?;
        // The ranges were checked against this very buffer. A copy: rows are small, and their buffer is not.
        let copy = |range: std::ops::Range<usize>| buffer.get(range).map(Bytes::copy_from_slice);
        Ok(ranges.into_iter().map(|range| range.and_then(copy)).collect())
    }

    pub fn complaint(&self, operation: &'static str, body: &ErrorResponseBody) -> Result<Complaint, ReplicationError> {
        let parsed = Complaint::parse(operation, &self.target, body);
        parsed.map_err(|error| self.malformed(operation, error.to_string()))
    }

    /// A message that has no place here.
    pub fn unexpected(&self, operation: &'static str) -> ReplicationError {
        self.malformed(operation, format!("a message {} out of turn", self.tag.escape_ascii()))
    }

    pub fn malformed(&self, operation: &'static str, detail: String) -> ReplicationError {
        ReplicationError::Malformed { operation, target: self.target.clone(), detail }
    }
}

/// A server that is told goodbye notes no lost connection in its log.
impl Drop for Connection {
    fn drop(&mut self) {
        if self.outgoing.is_empty() && self.write_error.is_none() {
            frontend::terminate(&mut self.outgoing);
            // Without room for it the connection simply ends.
            let _ = self.socket.try_write(&self.outgoing);
        }
    }
}
