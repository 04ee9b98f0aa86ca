//! While the repository does not answer and no session can begin: what comes goes to the two spools alone, so that commits
//! return. It ends when the repository is back; then a session begins as ever, and what the spools were left with is held against the
//! repository.
//!
//! Nothing is told as flushed here, so the slot keeps everything from its position on, and that is where it begins: what is before
//! the repository has. What is spooled makes a way of its own from there, whatever was spooled before. It is only begun
//! where this host knows under which names ([`super::known_place`]), and nothing speaks against the server being
//! the one that it was then: it is a primary with the same slot, on the same timeline, and has gone on since. Whatever else it
//! may be, a session finds out.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use walfleet_repository::postgres::{Lsn, Segment, Timeline};

use super::give_way::Stopping;
use super::known_place::{self, KnownPlace};
use super::open_segment::{OpenSegment, Place, SPOOLED_BYTES};
use super::spooling::SpoolWaiting;
use super::{APPLICATION_NAME, ReceiveError, Receiver, StreamPhase, Synchronous};
use crate::postgres::control::ControlFile;
use crate::postgres::replication::{Positions, Replication, Reply, StreamEvent, SystemIdentity, WalStream};
use crate::postgres::server::Server;
use crate::spool::files::{self, Spools};
use crate::tasks::on_disk;
use crate::wal::ship::{ShipSource, predecessor_carry};

/// Between two looks whether the repository answers.
const LOOK: Duration = Duration::from_secs(2);

/// Between two reports at the most, as a session's.
const REPORT: Duration = Duration::from_secs(5);

pub(super) struct Bridge<'a> {
    receiver: &'a Receiver,
    source: ShipSource,
    /// Where the slot stands: the repository has what is before.
    floor: Lsn,
    open: OpenSegment,
    spooled: SpoolWaiting,
    server_end: Lsn,
}

/// Ready to stream.
pub(super) struct Ready<'a> {
    bridge: Bridge<'a>,
    connection: Replication,
    timeline: Timeline,
}

impl Ready<'_> {
    /// Until the repository answers, or told to stop.
    pub async fn run(mut self, stop: &CancellationToken) -> Result<(), ReceiveError> {
        let from = self.bridge.open.position();
        let slot = &self.bridge.receiver.options.slot;
        let stream = self.connection.start(Some(slot), from, self.timeline).await?;
        self.bridge.begun();
        tracing::warn!(timeline = self.timeline.0, %from,
            "the repository does not answer: WAL is streamed to the spools alone until it does");
        let source = self.bridge.source.clone();
        let answered = async {
            tokio::time::sleep(LOOK).await;
            answers(&source, LOOK).await;
        };
        tokio::select! {
            () = stop.cancelled() => Ok(()),
            () = answered => {
                tracing::info!("the repository answers: WAL is streamed there again");
                Ok(())
            }
            ended = self.bridge.stream(stream) => ended,
        }
    }
}

impl<'a> Bridge<'a> {
    /// An error says why commits have to wait for the repository.
    pub async fn prepare(receiver: &'a Receiver, reach: &str) -> Result<Ready<'a>, ReceiveError> {
        let server = Server::connect(reach).await?;
        let mut connection = Replication::connect(reach, APPLICATION_NAME).await?;
        let identity = connection.identify_system().await?;
        let (place, floor) = known(receiver, &server, identity).await?;
        let bridge = Bridge::begin(receiver, &place, floor).await?;
        Ok(Ready { bridge, connection, timeline: identity.timeline })
    }

    async fn begin(receiver: &'a Receiver, place: &KnownPlace, floor: Lsn) -> Result<Bridge<'a>, ReceiveError> {
        let source = receiver.shipper.source().clone();
        let size = source.segment_size;
        let (Synchronous::Spool(without_peer), Some(spool)) = (receiver.options.synchronous, &receiver.spool) else {
            return Err(unknown("no commit waits for spools"));
        };
        let wal = place.wal().ok_or_else(|| unknown("what this host had noted does not read"))?;
        let segment = Segment { timeline: wal.timeline, number: floor.segment_number(size) };
        let from = segment.start(size);
        let carried = source.clone();
        let carry = tokio::task::spawn_blocking(move || predecessor_carry(&carried, segment)).await;
        let begun = Place { wal, segment, size, member: source.member.clone() };
        let open = OpenSegment::begin(begun, &source.archive, carry.ok().flatten(), None)?;
        let pieces = source.archive_of_pieces();
        // It is behind with nothing: all goes to the spools.
        let spooled = SpoolWaiting::begin(spool, receiver.spooling(), pieces, without_peer, (from, from));
        Ok(Bridge { receiver, source, floor, open, spooled, server_end: Lsn::INVALID })
    }

    fn begun(&self) {
        let from = self.open.position();
        self.receiver.status().send_modify(|status| {
            status.begin(self.open.place().segment.timeline, from, from);
            status.phase = StreamPhase::Streaming;
            status.last_error = Some("the repository does not answer; WAL goes to the spools alone".to_owned());
        });
    }

    async fn stream(&mut self, mut stream: WalStream) -> Result<(), ReceiveError> {
        let mut report_at = Instant::now();
        let mut stopping = Stopping::default();
        loop {
            if self.spooled.is_ready() {
                self.spool();
            }
            let room = self.spooled.has_room();
            tokio::select! {
                () = self.spooled.changed() => {
                    if self.spooled.take_in() {
                        report_at = Instant::now();
                    }
                    self.note();
                }
                event = stream.next(), if room => {
                    if self.take(event?)? {
                        report_at = Instant::now();
                    }
                }
                () = tokio::time::sleep_until(report_at) => {
                    let written_lsn = self.spooled.written().max(self.floor);
                    let positions = Positions { written_lsn, flushed_lsn: self.floor, applied_lsn: Lsn::INVALID };
                    stream.report(positions, Reply::Requested).await;
                    stopping.look(&self.receiver.instance.data_dir).await?;
                    report_at = Instant::now() + REPORT;
                }
            }
        }
    }

    fn spool(&mut self) {
        if let Some(tail) = self.open.spool() {
            self.spooled.put(tail);
        }
    }

    /// Takes in what the server sent; whether it asks for an answer.
    fn take(&mut self, event: StreamEvent) -> Result<bool, ReceiveError> {
        let is_asked = match event {
            StreamEvent::Wal { bytes, server_end, .. } => {
                self.server_end = self.server_end.max(server_end);
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (taken, _) = self.open.take(rest)?;
                    rest = rest.get(taken..).unwrap_or_default();
                    if self.open.unspooled() >= SPOOLED_BYTES || self.open.is_full() {
                        self.spool();
                    }
                    if self.open.is_full() {
                        self.next_segment()?;
                    }
                }
                false
            }
            StreamEvent::KeepAlive { server_end, is_reply_requested, .. } => {
                self.server_end = self.server_end.max(server_end);
                is_reply_requested
            }
            StreamEvent::TimelineEnded { .. } => return Err(unknown("the server's timeline ended")),
        };
        self.note();
        Ok(is_asked)
    }

    /// The finished one lies in `pg_wal`, where a session reads it again.
    fn next_segment(&mut self) -> Result<(), ReceiveError> {
        let mut place = self.open.place().clone();
        place.segment = place.segment.next();
        let next = OpenSegment::begin(place.clone(), &self.source.archive, None, None)?;
        let carry = std::mem::replace(&mut self.open, next).finish()?.carry;
        self.open = OpenSegment::begin(place, &self.source.archive, carry, None)?;
        Ok(())
    }

    fn note(&self) {
        let (received, server_end, spool) = (self.open.position(), self.server_end, self.spooled.status());
        self.receiver.status().send_modify(|status| {
            (status.received, status.server_end, status.spool) = (received, server_end, Some(spool));
        });
    }
}

/// Where the server's WAL goes and where its slot stands, if that is known without the repository.
async fn known(
    receiver: &Receiver,
    server: &Server,
    identity: SystemIdentity,
) -> Result<(KnownPlace, Lsn), ReceiveError> {
    let source = receiver.shipper.source();
    receiver.must_be_ours(&identity)?;
    let (state_dir, cluster) = (receiver.breaks.state_dir.clone(), receiver.cluster.clone());
    let read = on_disk(move || known_place::read(&state_dir, &cluster)).await?;
    let place = read.ok_or_else(|| unknown("it has not taken any of this server's WAL that this agent knows of"))?;
    if server.is_standby().await? {
        return Err(unknown("the server is a standby"));
    }
    if receiver.breaks.current()?.is_some() {
        return Err(unknown("what the repository lacks behind a slot that was made anew is not known"));
    }
    let held = server.slot(&receiver.options.slot).await?.and_then(|slot| slot.kept_from());
    let held = held.ok_or_else(|| unknown("no slot has kept what it lacks"))?;
    let segment = Segment { timeline: identity.timeline, number: held.segment_number(source.segment_size) };
    let is_same = place.system_id == source.system_id.0 && place.slot == receiver.options.slot;
    if !is_same || !place.has(segment) {
        return Err(unknown("this server's WAL went elsewhere when it last answered"));
    }
    let (data_dir, spool, owner) =
        (receiver.instance.data_dir.clone(), receiver.spool.clone(), receiver.spooling().owner);
    let (control, spooled) = on_disk(move || {
        let spooled = spool.map(|spool| newest(&spool.spools, &owner, identity.timeline.0));
        (ControlFile::read(&data_dir), spooled.flatten())
    })
    .await;
    let has_checkpoint = control.is_ok_and(|control| control.checkpoint_lsn >= place.checkpoint_lsn);
    if !has_checkpoint || spooled.is_some_and(|end| end > identity.flushed_lsn) {
        return Err(unknown("the server has less WAL than it had: it was rolled back"));
    }
    Ok((place, held))
}

/// The end of what an earlier process of this host has left in its own spool. Blocking.
fn newest(spools: &Spools, owner: &files::Owner, timeline: u32) -> Option<Lsn> {
    // By name, which begins with the time.
    let newest = spools.left_for(Duration::ZERO).remove(owner)?.pop()?;
    let pieces = files::read(&newest).ok()?.pieces;
    let of_timeline = pieces.iter().filter(|piece| piece.place.wal.timeline.0 == timeline);
    of_timeline.map(|piece| piece.lsn(piece.to)).max()
}

/// Returns once the repository answers. Safe to drop.
pub(super) async fn answers(source: &ShipSource, between: Duration) {
    while source.archive.branches(source.system_id).await.is_err() {
        tokio::time::sleep(between).await;
    }
}

fn unknown(why: &'static str) -> ReceiveError {
    ReceiveError::Unknown { why }
}
