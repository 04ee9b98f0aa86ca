//! One connection to the server: from the slot's position to whatever ends it.

mod begin;

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use walfleet_repository::postgres::{Lsn, Segment, Timeline, WalBranch};
use walfleet_repository::wal_archive::{Mark, OwnedTail};

use super::clock::ServerClock;
use super::frontier::Frontier;
use super::give_way::Stopping;
use super::open_segment::{Compared, Finished, OpenSegment, SPOOLED_BYTES};
use super::spare::Spare;
use super::spooling::{SpoolWaiting, WaitsFor};
use super::timelines::{branch, timeline_of};
use super::uploads::{Stored, Uploads};
use super::{APPLICATION_NAME, ReceiveError, Receiver, StreamPhase, Synchronous, rescue, slot};
use crate::postgres::replication::{Positions, Replication, Reply, StreamEvent, WalStream};
use crate::postgres::server::Server;
use crate::wal::ship::ShipSource;

/// Pieces on their way at once: a slow answer of the store must not keep the next piece waiting.
const PIECES: usize = 4;

/// While fewer segments than this wait.
const SEALED_AS_IT_COMES: usize = 4;

/// What others have of the open segment is looked at once in so many pieces.
const LOOK_EVERY: u32 = 15;

/// Between two reports at the most. The server ends the session after wal_sender_timeout, 60 s unless set.
const REPORT: Duration = Duration::from_secs(5);

/// What is left when the agent stops may take this long.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Of the server, when the session begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    Primary,
    /// What it has not received yet may be committed long since.
    Standby,
}

/// What ended a stream without an error.
enum End {
    Stopped,
    Timeline { connection: Box<Replication>, next: Timeline, switch: Lsn },
}

pub(super) struct Session<'a> {
    receiver: &'a Receiver,
    source: ShipSource,
    /// The timeline's own branch.
    base: WalBranch,
    uploads: Uploads,
    durable: Frontier,
    sealed: Frontier,
    /// Where commits wait for spools.
    spooled: Option<SpoolWaiting>,
    /// What the slot holds already: never reported less.
    floor: Lsn,
    open: OpenSegment,
    spare: Spare,
    /// How often a branch had been left when the open segment was begun to be cut.
    partings: u64,
    server_end: Lsn,
    clock: ServerClock,
    /// The server's clock when it had no more than was received.
    complete_at: Option<Timestamp>,
    /// When the server sent its last message, by its clock.
    heard_at: Option<Timestamp>,
    role: Role,
    next_cut: Instant,
    /// When it is next looked what other members have of the open segment.
    next_look: Instant,
    /// The server asks for an answer, and not all of its WAL is durable: since when.
    asked: Option<Instant>,
    stopping: Stopping,
    /// From which segment on all goes where the open one goes; `None`: that is noted on this host.
    to_note: Option<Segment>,
}

impl<'a> Session<'a> {
    pub async fn run(
        receiver: &'a Receiver,
        reach: &str,
        role: Role,
        stop: &CancellationToken,
    ) -> Result<(), ReceiveError> {
        let server = Server::connect(reach).await?;
        let mut connection = Replication::connect(reach, APPLICATION_NAME).await?;
        let identity = connection.identify_system().await?;
        receiver.must_be_ours(&identity)?;
        let source = receiver.shipper.source().clone();
        receiver.shipper.branches().forget().await;
        let slot = &receiver.options.slot;
        let held = slot::hold(receiver, &server, &mut connection).await?;
        // One that stayed open would keep a smart shutdown waiting.
        drop(server);
        let mut timeline = timeline_of(&mut connection, &identity, held).await?;
        rescue::rescue(receiver, &mut connection, (timeline, held)).await?;
        let mut at = held;
        loop {
            let wal = branch(&mut connection, receiver, timeline).await?;
            let end = identity.flushed_lsn;
            let mut session = Session::begin(receiver, source.clone(), role, wal, (at, end), held).await?;
            let from = session.open.position();
            let stream = connection.start(Some(slot), from, timeline).await?;
            tracing::info!(timeline = timeline.0, %from, "streaming WAL");
            match session.stream(stream, stop).await? {
                End::Stopped => return Ok(()),
                End::Timeline { connection: again, next, switch } => {
                    tracing::info!(timeline = timeline.0, next = next.0, at = %switch, "the timeline ended");
                    (connection, timeline, at) = (*again, next, switch);
                }
            }
        }
    }

    async fn stream(&mut self, mut stream: WalStream, stop: &CancellationToken) -> Result<End, ReceiveError> {
        self.receiver.status().send_modify(|status| status.phase = StreamPhase::Streaming);
        let mut report_at = Instant::now();
        loop {
            if self.may_spool() {
                self.spool();
            }
            let cut_at = self.cut_at();
            self.uploads.catch_up(self.parallel());
            let room = self.has_room();
            tokio::select! {
                () = stop.cancelled() => {
                    self.cut();
                    let _ = tokio::time::timeout(LAST_WORDS, self.until_stored(&mut stream)).await;
                    return Ok(End::Stopped);
                }
                () = self.receiver.shipper.asked_to_begin_anew() => {
                    tracing::warn!("what was stored of this server's WAL is not in the repository any more; it is looked anew what is there");
                    return Ok(End::Stopped);
                }
                stored = self.uploads.next() => {
                    if self.confirm(&stored.map_err(ReceiveError::Part)?) {
                        report_at = Instant::now();
                    }
                }
                () = spools_moved(&mut self.spooled) => {
                    if self.spooled.as_mut().is_some_and(SpoolWaiting::take_in) {
                        report_at = Instant::now();
                    }
                    self.note();
                }
                event = stream.next(), if room => {
                    if let Some((next, switch)) = self.take(event?)? {
                        tokio::select! {
                            () = stop.cancelled() => {
                                let _ = tokio::time::timeout(LAST_WORDS, self.until_stored(&mut stream)).await;
                                return Ok(End::Stopped);
                            }
                            stored = self.until_stored(&mut stream) => stored?,
                        }
                        let connection = Box::new(stream.finish().await?);
                        return Ok(End::Timeline { connection, next, switch });
                    }
                    if self.asked.is_some() {
                        report_at = Instant::now();
                        self.asked = self.asked.filter(|_| self.durable.at() < self.server_end);
                    }
                }
                () = tokio::time::sleep_until(cut_at.unwrap_or(report_at)), if cut_at.is_some() => self.cut(),
                () = tokio::time::sleep_until(report_at) => {
                    // Its answer tells how far the server is, also while it has nothing to send.
                    stream.report(self.positions(), Reply::Requested).await;
                    self.give_way().await?;
                    if self.spare.tidy() {
                        self.source.archive.reuse_nothing();
                    }
                    report_at = Instant::now() + if self.asked.is_some() { REPORT / 5 } else { REPORT };
                }
            }
        }
    }

    /// As many finished segments at once as the backlog calls for.
    fn parallel(&self) -> usize {
        (self.backlog() + 2).min(self.receiver.options.parallel)
    }

    /// Segments that the server has and the repository lacks.
    fn backlog(&self) -> usize {
        let backlog = self.server_end.saturating_sub(self.durable.at()) / u64::from(self.source.segment_size.bytes());
        usize::try_from(backlog).unwrap_or(usize::MAX)
    }

    /// When the next piece is to leave; `None`: nothing is there to be cut, or enough is on its way.
    fn cut_at(&self) -> Option<Instant> {
        let (at_once, at) = match self.receiver.options.synchronous {
            Synchronous::Off => (PIECES, self.next_cut),
            Synchronous::Repository => (1, Instant::now()),
            Synchronous::Spool(_) => match self.spooled.as_ref().map(SpoolWaiting::waits_for) {
                Some(WaitsFor::Spools | WaitsFor::Alone | WaitsFor::Peer) => (PIECES, self.next_cut),
                Some(WaitsFor::Repository) | None => (1, Instant::now()),
            },
        };
        (self.open.uncut() > 0 && self.uploads.pieces() < at_once).then_some(at)
    }

    /// Whether more may be received. What spools keep does not wait for the repository.
    fn has_room(&self) -> bool {
        match &self.spooled {
            Some(spooled) if spooled.has_begun() => spooled.has_room(),
            _ => self.uploads.takes_more(self.parallel()),
        }
    }

    /// Whether less than a segment is to be received before the server's end.
    fn is_near(&self) -> bool {
        self.server_end.saturating_sub(self.open.position()) < u64::from(self.source.segment_size.bytes())
    }

    fn may_spool(&self) -> bool {
        let is_ready = self.spooled.as_ref().is_some_and(SpoolWaiting::is_ready);
        is_ready && self.open.unspooled() > 0
    }

    /// What came since the last piece of any kind goes to the spools.
    fn spool(&mut self) {
        if !self.spooled.as_ref().is_some_and(SpoolWaiting::has_begun) {
            return;
        }
        self.heed_partings();
        let home = self.likely_home(self.open.place().segment);
        let Some(spooled) = &mut self.spooled else { return };
        if let Some(tail) = self.open.spool() {
            spooled.put(OwnedTail { wal: home, ..tail });
        }
    }

    /// The repository has `[from, to)`; whether the end of what is durable moved.
    fn note_durable(&mut self, from: Lsn, to: Lsn) -> bool {
        let has_moved = self.durable.confirm(from, to);
        if has_moved
            && self.partings == self.receiver.shipper.branches().partings()
            && let Some(first) = self.to_note.take()
        {
            self.receiver.note_place(self.likely_home(self.open.place().segment), first);
        }
        if let Some(spooled) = &mut self.spooled {
            spooled.stored(from, to, self.durable.at());
        }
        has_moved
    }

    fn cut(&mut self) {
        // A piece for the repository ends where one for the spools does: so what the spools have goes on from it.
        self.spool();
        self.heed_partings();
        if let Some(tail) = self.open.cut(self.complete_at) {
            self.uploads.piece(tail, self.partings);
            self.look();
        }
        self.next_cut = Instant::now() + self.receiver.options.interval;
    }

    /// Now and then while pieces leave: another server that writes the same segment would otherwise be found when one of the two
    /// has filled it.
    fn look(&mut self) {
        if self.next_look <= Instant::now() && self.is_near() {
            self.next_look = Instant::now() + LOOK_EVERY * self.receiver.options.interval;
            let (place, upto) = (self.open.place().clone(), self.open.received());
            self.uploads.look(place, upto, self.source.archive.clone());
        }
    }

    fn compare(&mut self, wal: WalBranch, segment: Segment, marks: &[Mark]) {
        if segment != self.open.place().segment {
            return;
        }
        let differs = |mark: &&Mark| self.open.id_up_to(mark.end).is_some_and(|ours| ours != mark.content);
        let (differ, same): (Vec<&Mark>, Vec<&Mark>) = marks.iter().partition(differs);
        if let Some(other) = differ.first()
            && let Some(ours) = self.open.id_up_to(self.open.received())
        {
            let same = same.into_iter().cloned().collect();
            self.uploads.differ((wal, segment), ours, (other.member.clone(), same));
        }
    }

    /// Without waiting; where it cannot be told at once, where the open segment goes.
    fn likely_home(&self, segment: Segment) -> WalBranch {
        let home = self.receiver.shipper.branches().likely_home(self.base, segment);
        home.unwrap_or(self.open.place().wal)
    }

    /// Pieces that lie in a branch which was left are nobody's: the segment's beginning goes to the new one at once.
    fn heed_partings(&mut self) {
        let partings = self.receiver.shipper.branches().partings();
        if std::mem::replace(&mut self.partings, partings) != partings {
            self.receiver.forget_place();
            self.to_note = None;
            self.open.begin_anew(self.likely_home(self.open.place().segment));
            self.next_cut = Instant::now();
        }
    }

    /// Takes in what the server sent; the next timeline, if this one ended.
    ///
    /// A message says how far the server's WAL went when it was made up, which is after the one before was sent; its own time is
    /// that of its sending, and more may have been committed meanwhile (XLogSendPhysical, walsender.c). So its end counts as
    /// of the time of the message before. And a keepalive tells only what was sent: it counts if that is all that was told of.
    fn take(&mut self, event: StreamEvent) -> Result<Option<(Timeline, Lsn)>, ReceiveError> {
        match event {
            StreamEvent::Wal { bytes, server_end, sent_at_us, .. } => {
                let as_of = self.hear(sent_at_us).filter(|_| self.role == Role::Primary);
                self.server_end = self.server_end.max(server_end);
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (taken, compared) = self.open.take(rest)?;
                    rest = rest.get(taken..).unwrap_or_default();
                    self.heed(compared);
                    if self.open.unspooled() >= SPOOLED_BYTES {
                        self.spool();
                    }
                    let received = self.open.position();
                    self.complete_at = as_of.filter(|_| received >= self.server_end && rest.is_empty());
                    if self.open.is_full() {
                        self.finish_segment()?;
                    }
                }
                self.note_server(as_of);
                Ok(None)
            }
            StreamEvent::KeepAlive { server_end, sent_at_us, is_reply_requested } => {
                let as_of =
                    self.hear(sent_at_us).filter(|_| self.role == Role::Primary && server_end >= self.server_end);
                self.server_end = self.server_end.max(server_end);
                if as_of.is_some() && self.open.position() >= self.server_end {
                    self.complete_at = as_of;
                }
                self.note_server(as_of);
                if is_reply_requested {
                    // At its end the server waits for the last of its WAL to be flushed here.
                    self.cut();
                    self.asked.get_or_insert_with(Instant::now);
                }
                Ok(None)
            }
            StreamEvent::TimelineEnded { next, switch_lsn } => {
                self.cut();
                Ok(Some((next, switch_lsn)))
            }
        }
    }

    fn heed(&mut self, compared: Compared) {
        let segment = self.open.place().segment;
        match compared {
            Compared::Nothing => {}
            Compared::Same(end) => {
                self.note_durable(segment.start(self.source.segment_size), end);
            }
            Compared::Other(whose) => {
                let home = self.open.place().wal;
                if let Some(ours) = self.open.id_up_to(self.open.received()) {
                    self.uploads.leave((home, segment), ours, whose);
                }
            }
        }
    }

    fn note_server(&mut self, as_of: Option<Timestamp>) {
        if self.is_near() {
            self.spooled.iter_mut().for_each(SpoolWaiting::note_near);
        }
        if let Some(at) = as_of {
            self.clock.note(self.server_end, at);
        }
        self.note();
    }

    fn note(&mut self) {
        let (received, server_end) = (self.open.position(), self.server_end);
        let (durable, sealed) = (self.durable.at(), self.sealed.at());
        self.clock.reach(durable);
        let complete_until = self.clock.complete_until();
        let spool = self.spooled.as_ref().map(SpoolWaiting::status);
        self.receiver.status().send_modify(|status| {
            (status.received, status.server_end) = (received, server_end);
            (status.durable, status.sealed) = (durable, sealed);
            status.complete_until = complete_until;
            status.spool = spool;
        });
    }

    /// When the message before was sent; `None` where the server's clock has gone back since.
    fn hear(&mut self, sent_at_us: i64) -> Option<Timestamp> {
        let sent_at = Timestamp::from_microsecond(sent_at_us).ok();
        let before = std::mem::replace(&mut self.heard_at, sent_at);
        if sent_at < before {
            self.clock.went_back();
            self.complete_at = None;
            return None;
        }
        before
    }

    /// What was begun in pieces is ended by one, since the whole segment takes longer; then it goes up whole. Of the next one
    /// nothing is older than the interval before that has passed: where segments fill faster, there are no pieces.
    fn finish_segment(&mut self) -> Result<(), ReceiveError> {
        self.spool();
        if self.open.is_cut() {
            self.cut();
        }
        self.next_cut = Instant::now() + self.receiver.options.interval;
        let mut place = self.open.place().clone();
        place.segment = place.segment.next();
        place.wal = self.likely_home(place.segment);
        let next = OpenSegment::begin(place.clone(), &self.source.archive, None, None)?;
        let Finished { segment, content, carry } = std::mem::replace(&mut self.open, next).finish()?;
        if self.uploads.takes_more(self.parallel()) {
            self.uploads.segment(segment, content, self.receiver.shipper.archive_for(self.backlog()));
        } else {
            self.uploads.later(segment);
        }
        let open = OpenSegment::begin(place, &self.source.archive, carry, None)?.in_memory_of(&self.spare);
        // A backlog is sealed beside what comes, on all the cores.
        let backlog = self.backlog();
        let archive = self.receiver.shipper.archive_for(backlog);
        self.open = if backlog < SEALED_AS_IT_COMES { open.seal_as_it_comes(archive)? } else { open };
        Ok(())
    }

    /// Whether the end of what is durable moved.
    fn confirm(&mut self, stored: &Stored) -> bool {
        self.heed_partings();
        let moved = match stored {
            // What goes before it may lie in a branch that was left since.
            &Stored::Piece { partings, .. } if partings != self.partings => false,
            &Stored::Piece { from, to, .. } => self.note_durable(from, to),
            Stored::Marks { wal, segment, marks } => {
                self.compare(*wal, *segment, marks);
                false
            }
            Stored::Nothing => false,
            // A piece that takes in all from the segment's start has another name.
            Stored::Spoiled(segment) if *segment == self.open.place().segment => {
                self.open.begin_anew(self.likely_home(*segment));
                self.next_cut = Instant::now();
                false
            }
            Stored::Spoiled(_) => false,
            Stored::Segment(segment) => {
                let (start, end) = (segment.start(self.source.segment_size), segment.end(self.source.segment_size));
                let sealed = self.sealed.confirm(start, end);
                self.note_durable(start, end) || sealed
            }
        };
        if self.durable.at() >= self.server_end {
            self.asked = None;
        }
        self.note();
        moved
    }

    /// Nothing is said to be written that is only in this process: a commit may wait for either.
    fn positions(&self) -> Positions {
        let durable = self.durable.at();
        let open = self.open.place().segment.start(self.source.segment_size);
        let synchronous = self.receiver.options.synchronous;
        let flushed = match synchronous {
            // The slot goes on once a segment is there whole, so that after a restart it is received and stored whole again. Only
            // commits that wait for the repository cannot wait for that; see `complete`.
            Synchronous::Off | Synchronous::Spool(_) if self.sealed.at() < open => durable.min(self.sealed.at()),
            _ => durable,
        };
        let flushed = flushed.max(self.floor);
        // The slot keeps what only spools have.
        let written = match (&self.spooled, synchronous) {
            (Some(spooled), _) => flushed.max(spooled.written()),
            (None, Synchronous::Spool(_)) => flushed.max(durable),
            (None, _) => flushed,
        };
        Positions { written_lsn: written, flushed_lsn: flushed, applied_lsn: Lsn::INVALID }
    }

    /// Until everything that was taken on is stored.
    async fn until_stored(&mut self, stream: &mut WalStream) -> Result<(), ReceiveError> {
        let mut look_at = Instant::now() + REPORT;
        while !self.uploads.is_empty() {
            self.uploads.catch_up(self.parallel());
            tokio::select! {
                () = tokio::time::sleep_until(look_at) => {
                    self.give_way().await?;
                    look_at = Instant::now() + REPORT;
                }
                stored = self.uploads.next() => drop(self.confirm(&stored.map_err(ReceiveError::Part)?)),
                () = spools_moved(&mut self.spooled) => drop(self.spooled.as_mut().map(SpoolWaiting::take_in)),
            }
            stream.report(self.positions(), Reply::NotNeeded).await;
        }
        Ok(())
    }

    /// To a server that shuts down.
    async fn give_way(&mut self) -> Result<(), ReceiveError> {
        if self.positions().flushed_lsn >= self.server_end {
            self.stopping = Stopping::default();
            return Ok(());
        }
        self.stopping.look(&self.receiver.instance.data_dir).await
    }
}

/// Safe to drop.
async fn spools_moved(spooled: &mut Option<SpoolWaiting>) {
    match spooled {
        Some(spooled) => spooled.changed().await,
        None => std::future::pending().await,
    }
}
