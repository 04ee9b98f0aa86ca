//! A backup counts only once the archive holds the WAL that makes it consistent.
//!
//! On a primary the end of the backup has closed its last segment, so whatever the archiver has not brought yet is
//! shipped from here. On a standby the last segment is closed by the primary, in its own time: where its pieces reach the end
//! of the backup, they do, and where nobody brings any, what the standby itself has of it is stored as one.
//!
//! That an object has the right name proves nothing: a server that was rolled back, or its twin, may have written it. So
//! the segment is compared with what lies in this server's own `pg_wal`. Where Postgres has recycled it since, the next
//! segment that still lies there tells: the archive's records go on into it, or they do not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use walfleet_repository::format::wal_segment::SegmentDirectory;
use walfleet_repository::postgres::{Lsn, Segment, SegmentSize, WalBranch};
use walfleet_repository::wal_archive::{ArchiveError, WalArchive};

use crate::tasks::on_disk;
use crate::wal::fill::{self, InPieces};
use crate::wal::read::read_in_place;
use crate::wal::ship::{ShipError, Shipper};

/// How long Postgres's own archiver is given before its work is done for it.
const GRACE: Duration = Duration::from_secs(2);

/// How long whoever streams is given to bring an unfinished segment's beginning before a standby's own is stored.
const BROUGHT_WITHIN: Duration = Duration::from_secs(10);

/// Between two looks: as long as has been waited for, since the archiver mostly takes some ten milliseconds.
const FIRST_POLL: Duration = Duration::from_millis(10);
const LAST_POLL: Duration = Duration::from_millis(200);
/// A segment that the primary finishes may take its time.
const POLLS: u32 = 20;
const SLOWEST_POLL: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum WalWaitError {
    #[error("look for {segment} in the archive: {source}")]
    Archive { segment: String, source: ArchiveError },
    #[error(
        "the archive does not hold {segment}, which the backup needs (WAL from {start} to {stop}): {source}\nHINT: is archiving on? \"walfleet-agent doctor\" says what to set."
    )]
    Missing { segment: String, start: Lsn, stop: Lsn, source: Arc<ShipError> },
    #[error(
        "the primary has not finished {segment} within {} seconds, and the backup of its standby needs it\nHINT: run SELECT pg_switch_wal() on the primary, or set its archive_timeout.", waited.as_secs()
    )]
    NotFinished { segment: String, waited: Duration },
    #[error("compare {segment} with the archived one: {source}")]
    Compare { segment: String, source: Arc<ShipError> },
    #[error(
        "{segment} in the repository, shipped by {stored_by}, is not this server's WAL\nHINT: two servers write the same timeline of one cluster, or this one was rolled back to an older state; find out which is the primary. The backup would not restore and was given up."
    )]
    Foreign { segment: String, stored_by: String },
    #[error(
        "from {segment} on this server's WAL differs from what another member stored, and goes to a branch of its own since\nHINT: take the backup again: it is made for that branch."
    )]
    Parted { segment: String },
    #[error("cancelled")]
    Cancelled,
}

pub struct WalWait<'a> {
    pub shipper: &'a Arc<Shipper>,
    pub archive: WalArchive,
    pub wal: WalBranch,
    pub segment_size: SegmentSize,
    pub deadline: Duration,
    /// This host's clock before Postgres was asked to begin the backup, microseconds since the Unix epoch: on a primary no
    /// segment of the backup was finished by then.
    pub began_at_us: i64,
}

impl WalWait<'_> {
    /// Returns once every segment of `[start, stop)` is in the archive.
    pub async fn until_archived(
        &self,
        start: Lsn,
        stop: Lsn,
        is_primary: bool,
        cancel: &CancellationToken,
    ) -> Result<(), WalWaitError> {
        let size = self.segment_size;
        let last = Lsn(stop.0.saturating_sub(1)).segment_number(size).max(start.segment_number(size));
        let began = Instant::now();
        for number in start.segment_number(size)..=last {
            let segment = Segment { timeline: self.wal.timeline, number };
            self.wait_for(segment, (start, stop, last), is_primary, began, cancel).await?;
        }
        let last = Segment { timeline: self.wal.timeline, number: last };
        let compare = |source| WalWaitError::Compare { segment: last.file_name(size), source: Arc::new(source) };
        let home = self.shipper.home(last).await.map_err(compare)?;
        // What was worked out from the other branch's WAL at the beginning does not hold.
        match home == self.wal || self.shipper.newest_branch(last).await.map_err(compare)? == self.wal {
            true => Ok(()),
            false => Err(WalWaitError::Parted { segment: last.file_name(size) }),
        }
    }

    async fn wait_for(
        &self,
        segment: Segment,
        (start, stop, last): (Lsn, Lsn, u64),
        is_primary: bool,
        began: Instant,
        cancel: &CancellationToken,
    ) -> Result<(), WalWaitError> {
        let name = segment.file_name(self.segment_size);
        let (mut foreign, mut store_own_at) = (None, began + BROUGHT_WITHIN);
        loop {
            let waited = began.elapsed();
            let compare = |source| WalWaitError::Compare { segment: name.clone(), source: Arc::new(source) };
            let home = self.shipper.home(segment).await.map_err(compare)?;
            match self.archive.directory(home, segment, self.segment_size).await {
                Ok(directory) => match self.must_be_ours(home, (segment, last), &directory).await {
                    // Nobody has seen yet that this server's differs: that it does is found out by shipping it.
                    Err(error @ WalWaitError::Foreign { .. }) if is_primary && waited < 2 * GRACE => {
                        foreign = Some(error)
                    }
                    settled => return settled,
                },
                Err(error) if error.is_not_found() => {
                    let ends_here = !is_primary && segment.number == last;
                    if ends_here && self.lies_in_pieces(home, segment, stop).await? {
                        return Ok(());
                    }
                    if ends_here && Instant::now() >= store_own_at {
                        tokio::select! {
                            () = cancel.cancelled() => return Err(WalWaitError::Cancelled),
                            () = tokio::time::sleep(self.deadline.saturating_sub(waited)) => {}
                            () = self.store_own_beginning(segment) => {}
                        }
                        store_own_at = Instant::now() + BROUGHT_WITHIN;
                    }
                }
                Err(source) => return Err(WalWaitError::Archive { segment: name, source }),
            }
            if waited >= GRACE && is_primary {
                let shipped = tokio::select! {
                    // The upload goes on by itself; the archiver will find it done.
                    () = cancel.cancelled() => return Err(WalWaitError::Cancelled),
                    shipped = self.shipper.ship(&name) => shipped,
                };
                match shipped {
                    Ok(()) => return Ok(()),
                    // The archiver may have brought it and Postgres recycled it in between: look once more.
                    Err(source) if waited >= 2 * GRACE => {
                        if let Some(foreign) = foreign {
                            return Err(foreign);
                        }
                        return Err(WalWaitError::Missing { segment: name.clone(), start, stop, source });
                    }
                    Err(_) => {}
                }
            }
            if waited >= self.deadline {
                return Err(WalWaitError::NotFinished { segment: name, waited });
            }
            tokio::select! {
                () = cancel.cancelled() => return Err(WalWaitError::Cancelled),
                () = tokio::time::sleep(between_polls(waited)) => {}
            }
        }
    }

    /// Of a standby, whose last segment's end is the primary's to write. What fails is tried again.
    async fn store_own_beginning(&self, segment: Segment) {
        let name = segment.file_name(self.segment_size);
        match fill::beginning(self.shipper, segment).await {
            Ok(Some(to)) => {
                tracing::info!(segment = name, %to, "the segment is not finished; what this standby has of it is stored")
            }
            Ok(None) => {}
            Err(error) => tracing::info!(segment = name, "what this standby has of it is not stored: {error}"),
        }
    }

    /// Whether the pieces of a segment that nobody has finished reach a position, and are of this server's WAL.
    async fn lies_in_pieces(&self, home: WalBranch, segment: Segment, to: Lsn) -> Result<bool, WalWaitError> {
        let size = self.segment_size;
        let name = segment.file_name(size);
        let reach = to.0.saturating_sub(segment.start(size).0);
        let path = self.shipper.source().data_dir.join("pg_wal").join(&name);
        let Ok(ours) = on_disk(move || read_in_place(&path)).await else { return Ok(false) };
        let Some(ours) = ours.get(..reach as usize) else { return Ok(false) };
        match fill::in_pieces(&self.archive, home, (segment, size), ours).await {
            Ok(InPieces::Same) => Ok(true),
            Ok(InPieces::Short) => Ok(false),
            Ok(InPieces::Other(stored_by)) => Err(WalWaitError::Foreign { segment: name, stored_by }),
            Err(source) => Err(WalWaitError::Archive { segment: name, source }),
        }
    }

    /// An archived segment counts if this server's own file says the same; or, where Postgres has recycled the file, if the
    /// segment was shipped since the backup began, or leads into those that this server still has.
    async fn must_be_ours(
        &self,
        home: WalBranch,
        (segment, last): (Segment, u64),
        directory: &SegmentDirectory,
    ) -> Result<(), WalWaitError> {
        if self.shipper.has_confirmed(segment) {
            return Ok(());
        }
        let name = segment.file_name(self.segment_size);
        let compare = |source| WalWaitError::Compare { segment: name.clone(), source: Arc::new(source) };
        let is_ours = match self.shipper.agrees(segment, directory.content_id).await.map_err(compare)? {
            Some(agrees) => agrees,
            None if directory.shipped_at_us >= self.began_at_us => true,
            None => self.shipper.branches().leads_here(home, segment, last).await.map_err(compare)?,
        };
        match is_ours {
            true => Ok(()),
            false => Err(WalWaitError::Foreign { segment: name, stored_by: directory.member.clone() }),
        }
    }
}

fn between_polls(waited: Duration) -> Duration {
    waited.clamp(FIRST_POLL, LAST_POLL).max((waited / POLLS).min(SLOWEST_POLL))
}
