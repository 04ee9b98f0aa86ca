//! On a standby: nothing is stored twice. The slot here keeps what the archive lacks, and moves on with the archive; if that
//! falls behind what this standby has, its primary's agent is gone, and the standby's own streams instead.
//!
//! A look costs a request for each finished segment and two for the unfinished one, and none while the standby stands still.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use walfleet_repository::postgres::{Lsn, Segment, Timeline, WalBranch};
use walfleet_repository::wal_archive::Strays;

use super::timelines::{ancestors, branch, timeline_of};
use super::{APPLICATION_NAME, ReceiveError, ReceiveOptions, Receiver, StreamPhase, Synchronous, slot};
use crate::postgres::replication::Replication;
use crate::postgres::server::Server;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(10);

/// How long what was read of diverged branches counts.
const STRAYS: Duration = Duration::from_secs(60);

/// How long the archive may lack what is here, where pieces leave at once or every few seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why a standby's agent no longer only follows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Followed {
    Stopped,
    /// It is a primary now.
    Promoted,
    /// Nobody stores what is here.
    Behind,
    /// What another server stored is something else.
    Diverged {
        segment: String,
        stored_by: String,
    },
}

pub struct Follow<'a> {
    receiver: &'a Receiver,
    reach: &'a str,
    wal: WalBranch,
    /// The first segment that is not known to be archived whole.
    cursor: Segment,
    /// What the standby had at the last look.
    had: Lsn,
    /// What the archive had then.
    stored: Lsn,
    waits: Waits,
    /// Since when what the archive has of the next segment differs from what is here.
    differs: Option<Instant>,
    /// What in the branch is another's, when it was read.
    strays: Option<(WalBranch, Instant, Strays)>,
}

/// Two intervals between pieces: with one, what is here may be due next. Pieces that commits wait for leave at once.
fn patience(options: &ReceiveOptions) -> Duration {
    match options.synchronous {
        Synchronous::Repository => PATIENCE,
        Synchronous::Off | Synchronous::Spool(_) => PATIENCE.max(2 * options.interval + LOOK),
    }
}

/// What the archive is waited for to have.
#[derive(Default, Debug)]
struct Waits {
    mark: Option<(Lsn, Instant)>,
}

impl Waits {
    /// For how long the archive lacks something that the standby has had.
    fn look(&mut self, stored: Lsn, end: Lsn, now: Instant) -> Duration {
        let mark = self.mark.filter(|(mark, _)| stored < *mark).unwrap_or((end, now));
        self.mark = Some(mark);
        now.duration_since(mark.1)
    }
}

impl<'a> Follow<'a> {
    pub async fn run(
        receiver: &'a Receiver,
        reach: &'a str,
        stop: &CancellationToken,
    ) -> Result<Followed, ReceiveError> {
        let server = Server::connect(reach).await?;
        let mut connection = Replication::connect(reach, APPLICATION_NAME).await?;
        let identity = connection.identify_system().await?;
        receiver.must_be_ours(&identity)?;
        let held = slot::hold(receiver, &server, &mut connection).await?;
        let timeline = timeline_of(&mut connection, &identity, held).await?;
        let source = receiver.shipper.source();
        let wal = branch(&mut connection, receiver, timeline).await?;
        drop((server, connection));
        let cursor = Segment { timeline, number: held.segment_number(source.segment_size) };
        let start = cursor.start(source.segment_size);
        let mut follow = Follow {
            receiver,
            reach,
            wal,
            cursor,
            had: Lsn::INVALID,
            stored: start,
            waits: Waits::default(),
            differs: None,
            strays: None,
        };
        tracing::info!(timeline = timeline.0, from = %start, "a standby: its WAL is followed in the archive");
        loop {
            if let Some(end) = follow.look().await? {
                return Ok(end);
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(Followed::Stopped),
                () = receiver.shipper.promoted() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    async fn look(&mut self) -> Result<Option<Followed>, ReceiveError> {
        let server = Server::connect(self.reach).await?;
        if !server.is_standby().await? {
            return Ok(Some(Followed::Promoted));
        }
        let mut connection = Replication::connect(self.reach, APPLICATION_NAME).await?;
        let identity = connection.identify_system().await?;
        if identity.timeline != self.wal.timeline {
            self.change_timeline(&mut connection, identity.timeline).await?;
        }
        let end = identity.flushed_lsn;
        let size = self.receiver.shipper.source().segment_size;
        let before = self.cursor;
        if end > self.stored {
            self.stored = match self.what_is_stored(end).await? {
                Ok(stored) => {
                    self.differs = None;
                    stored
                }
                // Its primary's agent may be about to make a branch for both.
                Err(_) if self.differs.get_or_insert_with(Instant::now).elapsed() < PATIENCE => self.stored,
                Err(diverged) => return Ok(Some(diverged)),
            };
        }
        let slot = &self.receiver.options.slot;
        if server.slot(slot).await?.is_none_or(|slot| slot.kept_from().is_none()) {
            return Err(ReceiveError::SlotGone { slot: slot.clone() });
        }
        if self.cursor != before {
            server.advance_slot(slot, self.cursor.start(size)).await?;
            // Whoever stores this tells of what is missing before, too.
            self.receiver.breaks.end()?;
        }
        let lacks_for = self.waits.look(self.stored, end, Instant::now());
        self.had = end;
        self.note();
        Ok((lacks_for >= patience(&self.receiver.options)).then_some(Followed::Behind))
    }

    /// The primary that it follows was promoted. What its former timeline still lacks, others have.
    async fn change_timeline(&mut self, connection: &mut Replication, timeline: Timeline) -> Result<(), ReceiveError> {
        self.wal = branch(connection, self.receiver, timeline).await?;
        let ancestors = ancestors(connection, timeline).await?;
        // Nothing before the switch was ever written on it.
        let size = self.receiver.shipper.source().segment_size;
        let first = ancestors.last().map_or(0, |(_, at)| at.segment_number(size));
        self.cursor = Segment { timeline, number: self.cursor.number.max(first) };
        tracing::info!(timeline = timeline.0, "the standby follows a new timeline");
        Ok(())
    }

    /// How far the archive has what is here without a hole, unless it has something else.
    async fn what_is_stored(&mut self, end: Lsn) -> Result<Result<Lsn, Followed>, ReceiveError> {
        let (source, branches) = (self.receiver.shipper.source(), self.receiver.shipper.branches());
        let size = source.segment_size;
        while self.cursor.end(size) <= end {
            // Its primary may have left the timeline's own branch.
            let home = branches.home(self.wal, self.cursor).await?;
            match source.archive.readable(source.archive.directory(home, self.cursor, size).await)? {
                Some(directory) => {
                    if self.receiver.shipper.agrees(self.cursor, directory.content_id).await? == Some(false) {
                        // What was worked out for an earlier segment knows nothing of a branch that begins here.
                        branches.forget().await;
                        if branches.home(self.wal, self.cursor).await? != home {
                            continue;
                        }
                        let segment = self.cursor.file_name(size);
                        return Ok(Err(Followed::Diverged { segment, stored_by: directory.member }));
                    }
                    source.archive.make_durable(home, self.cursor, size).await?;
                    self.cursor = self.cursor.next();
                }
                None if self.lies_beside(home).await? => self.cursor = self.cursor.next(),
                None => break,
            }
        }
        let home = branches.home(self.wal, self.cursor).await?;
        if self.strays.as_ref().is_none_or(|(wal, read, _)| *wal != home || read.elapsed() > STRAYS) {
            self.strays = Some((home, Instant::now(), source.archive.strays(home).await?));
        }
        let none = Strays::default();
        let strays = self.strays.as_ref().map_or(&none, |(.., strays)| strays);
        let begun = source.archive.beginning_facts_without(home, self.cursor, size, strays).await?;
        Ok(Ok(self.cursor.at(size, begun.map_or(0, |begun| begun.end))))
    }

    /// Whether what lies under the next segment's name does not read, and all of it lies beside in pieces.
    async fn lies_beside(&self, home: WalBranch) -> Result<bool, ReceiveError> {
        let source = self.receiver.shipper.source();
        let (archive, size) = (&source.archive, source.segment_size);
        if !archive.has_segment(home, self.cursor, size).await? {
            return Ok(false);
        }
        let begun = archive.beginning_facts(home, self.cursor, size).await?;
        Ok(begun.is_some_and(|begun| begun.end == size.bytes()))
    }

    fn note(&self) {
        let sealed = self.cursor.start(self.receiver.shipper.source().segment_size);
        self.receiver.status().send_modify(|status| {
            status.phase = StreamPhase::Following;
            status.timeline = Some(self.wal.timeline);
            (status.sealed, status.durable) = (sealed, self.stored);
            (status.received, status.server_end) = (self.had, self.had);
            // Whoever only follows stores nothing, and has not heard the primary's clock.
            (status.last_error, status.complete_until) = (None, None);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a standby breaks in within ten minutes, if the archive gets everything every so many seconds. 100 bytes a second.
    fn breaks_in(interval: u64, stored_every: Option<u64>) -> bool {
        let options = ReceiveOptions {
            slot: "walfleet".to_owned(),
            interval: Duration::from_secs(interval),
            synchronous: Synchronous::Off,
            parallel: 1,
        };
        let (begun, mut waits) = (Instant::now(), Waits::default());
        (1..60).any(|look: u64| {
            let second = look * 10;
            let stored = stored_every.map_or(0, |every| second / every * every * 100);
            let now = begun + Duration::from_secs(second);
            waits.look(Lsn(stored), Lsn(second * 100), now) >= patience(&options)
        })
    }

    #[test]
    fn a_standby_waits_for_the_next_piece_and_not_much_longer() {
        assert!(!breaks_in(1, Some(1)));
        for interval in [25, 60, 180] {
            assert!(!breaks_in(interval, Some(interval)), "{interval} s");
        }
        assert!(breaks_in(1, None), "its primary's agent is gone");
        assert!(breaks_in(1, Some(40)), "it does not keep up");
        assert!(breaks_in(60, None));
        assert!(breaks_in(60, Some(200)));
    }
}
