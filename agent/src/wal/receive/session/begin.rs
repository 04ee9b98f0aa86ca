//! Where a session begins, and what is known of the segment that it begins with.

use tokio::time::Instant;
use walfleet_repository::postgres::{Lsn, Segment, WalBranch};

use super::super::clock::ServerClock;
use super::super::frontier::Frontier;
use super::super::give_way::Stopping;
use super::super::open_segment::{Known, OpenSegment, Place};
use super::super::spare::Spare;
use super::super::spooling::SpoolWaiting;
use super::super::uploads::Uploads;
use super::super::{ReceiveError, Receiver, Synchronous, complete};
use super::{Role, Session};
use crate::wal::ship::{ShipSource, predecessor_carry};

impl<'a> Session<'a> {
    /// Ready to receive from the first segment that the archive lacks.
    pub(super) async fn begin(
        receiver: &'a Receiver,
        source: ShipSource,
        role: Role,
        wal: WalBranch,
        (at, end): (Lsn, Lsn),
        floor: Lsn,
    ) -> Result<Session<'a>, ReceiveError> {
        let size = source.segment_size;
        let first = Segment { timeline: wal.timeline, number: at.segment_number(size) };
        let mut segment = first;
        while segment.end(size) <= end && is_archived(receiver, wal, segment).await? {
            segment = segment.next();
        }
        complete::complete(&receiver.shipper, wal, first).await?;
        let partings = receiver.shipper.branches().partings();
        let home = receiver.shipper.branches().home(wal, segment).await?;
        let is_one = receiver.shipper.branches().home(wal, first).await? == home;
        let to_note = Some(if is_one { first } else { segment });
        let place = Place { wal: home, segment, size, member: source.member.clone() };
        let carried = source.clone();
        let carry = tokio::task::spawn_blocking(move || predecessor_carry(&carried, segment)).await;
        let known = known(&source, home, segment).await?;
        let from = segment.start(size);
        let status = receiver.status();
        status.send_modify(|status| status.begin(wal.timeline, first.start(size), from));
        let complete_until = status.borrow().complete_until;
        let spare = Spare::default();
        Ok(Session {
            receiver,
            uploads: Uploads::new(&receiver.shipper, wal),
            durable: Frontier::new(from),
            spooled: Self::spools(receiver, &source, (from, end)),
            sealed: Frontier::new(from),
            floor,
            open: OpenSegment::begin(place, &source.archive, carry.ok().flatten(), known)?
                .in_memory_of(&spare)
                .seal_as_it_comes(&source.archive)?,
            spare,
            source,
            base: wal,
            partings,
            server_end: Lsn::INVALID,
            clock: ServerClock::from(complete_until),
            complete_at: None,
            heard_at: None,
            role,
            next_cut: Instant::now() + receiver.options.interval,
            next_look: Instant::now(),
            asked: None,
            stopping: Stopping::default(),
            to_note,
        })
    }

    fn spools(receiver: &Receiver, source: &ShipSource, way: (Lsn, Lsn)) -> Option<SpoolWaiting> {
        let (Synchronous::Spool(without_peer), Some(spool)) = (receiver.options.synchronous, &receiver.spool) else {
            return None;
        };
        Some(SpoolWaiting::begin(spool, receiver.spooling(), source.archive_of_pieces(), without_peer, way))
    }
}

/// What a branch has of a segment: this member's pieces, or a whole one that is not what lies in `pg_wal` as yet.
async fn known(source: &ShipSource, home: WalBranch, segment: Segment) -> Result<Option<Known>, ReceiveError> {
    let (archive, size) = (&source.archive, source.segment_size);
    let Some((directory, mut bytes)) = archive.readable(archive.get_segment(home, segment, size).await)?.flatten()
    else {
        return Ok(archive.beginning_of(home, (segment, size), &source.member).await?.map(Known::from));
    };
    bytes.truncate(directory.valid_bytes as usize);
    // The server forgets it by this.
    archive.make_durable(home, segment, size).await?;
    Ok(Some(Known { bytes, member: directory.member }))
}

/// Whether the archive has a finished segment, with the content that lies in this server's `pg_wal`.
async fn is_archived(receiver: &Receiver, wal: WalBranch, segment: Segment) -> Result<bool, ReceiveError> {
    let source = receiver.shipper.source();
    let home = receiver.shipper.branches().home(wal, segment).await?;
    let directory = source.archive.directory(home, segment, source.segment_size).await;
    match source.archive.readable(directory)? {
        Some(directory) if receiver.shipper.agrees(segment, directory.content_id).await? == Some(true) => {
            // The server forgets it by this.
            source.archive.make_durable(home, segment, source.segment_size).await?;
            Ok(true)
        }
        _ => Ok(false),
    }
}
