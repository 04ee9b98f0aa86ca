//! After a slot was made anew: what lies between the archive's end and the slot's beginning is stored from `pg_wal`, as far as
//! it is still there, and what is not is noted in the repository. Other members may have that; they fill it as any gap.

use std::collections::BTreeMap;

use futures::StreamExt;
use walfleet_repository::postgres::{Lsn, Segment, Timeline, WalBranch};
use walfleet_repository::wal_archive::BranchListing;

use super::timelines::{ancestors, branch};
use super::{ReceiveError, Receiver};
use crate::postgres::replication::Replication;
use crate::wal::ship::ShipError;

/// Segments behind the newest archived one among which some may be missing: so many are on their way at once at most.
const LOOK_BACK: u64 = 64;

/// A segment that the archive lacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Lacking {
    home: WalBranch,
    segment: Segment,
}

/// One timeline's part of the way to the slot: segments `[first, end)`.
struct Leg {
    timeline: Timeline,
    first: u64,
    end: u64,
}

/// Ends a break, if there is one. `held`: where the slot begins, on `timeline`. An error leaves the break noted.
pub async fn rescue(
    receiver: &Receiver,
    connection: &mut Replication,
    (timeline, held): (Timeline, Lsn),
) -> Result<(), ReceiveError> {
    let Some(found) = receiver.breaks.current()? else { return Ok(()) };
    let source = receiver.shipper.source();
    let listed = source.archive.list(source.system_id, source.segment_size).await?;
    let lacking = lacking(receiver, connection, &listed, (timeline, held)).await?;
    let count = lacking.len();
    let stores = lacking.into_iter().map(|lacking| async move { (lacking, store(receiver, lacking).await) });
    let stored: Vec<_> = futures::stream::iter(stores).buffered(receiver.options.parallel.max(1)).collect().await;
    let mut gone = Vec::new();
    for (lacking, stored) in stored {
        if !stored? {
            gone.push(lacking);
        }
    }
    if count > gone.len() {
        tracing::info!(segments = count - gone.len(), "stored from pg_wal what the slot had kept no longer");
    }
    for (wal, from, to) in gaps(&gone, receiver) {
        if let Some(from) = unnoted(receiver, &listed, wal, (from, to)).await? {
            receiver.breaks.record(wal, (from, to), &found).await?;
            tracing::warn!(timeline = wal.timeline.0, %from, %to,
                "WAL is missing in the repository, and this host has it no more: {}", found.why);
        }
    }
    Ok(receiver.breaks.end()?)
}

/// Segments between what is archived and the slot; none if nothing of this server was ever archived.
async fn lacking(
    receiver: &Receiver,
    connection: &mut Replication,
    listed: &BTreeMap<WalBranch, BranchListing>,
    (timeline, held): (Timeline, Lsn),
) -> Result<Vec<Lacking>, ReceiveError> {
    let mut lacking = Vec::new();
    for leg in legs(receiver, connection, (timeline, held)).await? {
        if leg.first >= leg.end {
            continue;
        }
        let segment = |number| Segment { timeline: leg.timeline, number };
        let base = branch(connection, receiver, leg.timeline).await?;
        let home = receiver.shipper.branches().home(base, segment(leg.end - 1)).await?;
        let numbers = listed.get(&home).into_iter().flat_map(|listing| &listing.segments).map(|found| found.number);
        let is_here = |number: &u64| (leg.first..leg.end).contains(number);
        let archived: Vec<u64> = numbers.filter(is_here).collect();
        let mut begun = Vec::new();
        if archived.is_empty() {
            let source = receiver.shipper.source();
            let pieces = source.archive.begun_segments(home, source.segment_size).await?;
            begun.extend(pieces.into_iter().map(|segment| segment.number).filter(is_here));
        }
        let from = match (archived.first(), archived.last()) {
            (Some(first), Some(last)) => last.saturating_sub(LOOK_BACK).max(*first),
            // A young cluster, of which only pieces are there.
            _ => begun.first().copied().unwrap_or(leg.first),
        };
        let missing = (from..leg.end).filter(|number| archived.binary_search(number).is_err());
        lacking.splice(0..0, missing.map(|number| Lacking { home, segment: segment(number) }));
        if !archived.is_empty() || !begun.is_empty() {
            return Ok(lacking);
        }
    }
    Ok(Vec::new())
}

/// The way to the slot, the newest timeline first.
async fn legs(
    receiver: &Receiver,
    connection: &mut Replication,
    (timeline, held): (Timeline, Lsn),
) -> Result<Vec<Leg>, ReceiveError> {
    let size = receiver.shipper.source().segment_size;
    let ancestors = ancestors(connection, timeline).await?;
    // The segment in which a timeline ends is read from the next one.
    let begins = std::iter::once(0).chain(ancestors.iter().map(|(_, end)| end.segment_number(size)));
    let timelines = ancestors.iter().map(|(ancestor, _)| *ancestor).chain([timeline]);
    let mut legs: Vec<Leg> = timelines
        .zip(begins)
        .map(|(timeline, first)| Leg { timeline, first, end: held.segment_number(size) })
        .collect();
    for at in 1..legs.len() {
        legs[at - 1].end = legs[at - 1].end.min(legs[at].first);
    }
    legs.reverse();
    Ok(legs)
}

/// Whether it was here.
async fn store(receiver: &Receiver, Lacking { segment, .. }: Lacking) -> Result<bool, ReceiveError> {
    let source = receiver.shipper.source();
    let path = source.data_dir.join("pg_wal").join(segment.file_name(source.segment_size));
    if !tokio::fs::try_exists(&path).await.unwrap_or(false) {
        return Ok(false);
    }
    match receiver.shipper.store(segment).await {
        Ok(()) => Ok(true),
        Err(error) => match &*error {
            // Removed or recycled under our eyes.
            problem @ (ShipError::Read(_) | ShipError::Unfinished { .. }) => {
                tracing::info!(path = %path.display(), "a segment is gone: {problem}");
                Ok(false)
            }
            _ => Err(ReceiveError::Rescue(error)),
        },
    }
}

/// What is gone, in stretches `[from, to)`.
fn gaps(gone: &[Lacking], receiver: &Receiver) -> Vec<(WalBranch, Lsn, Lsn)> {
    let size = receiver.shipper.source().segment_size;
    let mut gaps: Vec<(WalBranch, Lsn, Lsn)> = Vec::new();
    for Lacking { home, segment } in gone {
        match gaps.last_mut() {
            Some((wal, _, to)) if wal == home && *to == segment.start(size) => *to = segment.end(size),
            _ => gaps.push((*home, segment.start(size), segment.end(size))),
        }
    }
    gaps
}

/// Where a stretch begins of which pieces may be there; `None`: it was noted before.
async fn unnoted(
    receiver: &Receiver,
    listed: &BTreeMap<WalBranch, BranchListing>,
    wal: WalBranch,
    (from, to): (Lsn, Lsn),
) -> Result<Option<Lsn>, ReceiveError> {
    let source = receiver.shipper.source();
    let segment = Segment { timeline: wal.timeline, number: from.segment_number(source.segment_size) };
    let begun = source.archive.beginning_facts(wal, segment, source.segment_size).await?;
    let from = begun.map_or(from, |begun| Lsn(from.0 + u64::from(begun.end)));
    let notes = listed.get(&wal).into_iter().flat_map(|listing| &listing.notes);
    let is_noted = notes.into_iter().any(|note| note.from <= from && to <= note.to);
    Ok((!is_noted && from < to).then_some(from))
}
