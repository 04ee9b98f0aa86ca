//! Finished segments that lie in the archive in pieces alone: each is made whole.
//!
//! Where commits wait for the repository the slot follows the pieces, so that of a session which ends while a finished segment
//! is on its way nobody receives that segment again: the next begins behind it, and its file may be gone. Its pieces are what
//! the server was told is flushed, and all of it.

use std::sync::Arc;

use futures::StreamExt;
use walfleet_repository::postgres::{Segment, WalBranch};
use walfleet_repository::wal_archive::{ArchiveError, Beginning, Strays};

use super::ReceiveError;
use super::open_segment::{FinishedContent, OpenSegment, Place};
use crate::postgres::wal_record::Carry;
use crate::wal::read::read_carry;
use crate::wal::ship::{ShipError, ShipSource, Shipper, predecessor_carry};

/// So many segments with pieces are looked at, the newest: those of an hour lie there though they are whole.
const MOST: usize = 256;

/// Looked at at once.
const LOOKS: usize = 16;

/// Stores whole what lies in pieces alone of the segments before `first`. `base`: the timeline's own branch.
///
/// What cannot be made whole for its content's sake is said and left. Errors: the store's.
pub async fn complete(shipper: &Arc<Shipper>, base: WalBranch, first: Segment) -> Result<(), ReceiveError> {
    let source = shipper.source();
    let (archive, size) = (&source.archive, source.segment_size);
    let home = shipper.branches().home(base, first).await?;
    let brought = shipper.stream().borrow().clone();
    let begun = archive.begun_segments(home, size).await?;
    let before = begun.into_iter().rev().filter(|begun| *begun < first && !brought.has_brought(*begun, size));
    let looks: Vec<_> = before
        .take(MOST)
        .map(|segment| {
            let archive = archive.clone();
            async move { Ok::<_, ArchiveError>((segment, archive.has_segment(home, segment, size).await?)) }
        })
        .collect();
    let mut lacking = Vec::new();
    let mut looks = futures::stream::iter(looks).buffered(LOOKS);
    while let Some(looked) = looks.next().await {
        let (segment, is_whole) = looked?;
        if !is_whole {
            lacking.push(segment);
        }
    }
    if lacking.is_empty() {
        return Ok(());
    }
    let strays = archive.strays(home).await?;
    // The oldest first, so that each finds its predecessor.
    for segment in lacking.into_iter().rev() {
        let name = segment.file_name(size);
        match make_whole(source, home, segment, &strays).await {
            Ok(true) => {
                tracing::info!(segment = name, "a segment that lay in the repository in pieces is stored whole")
            }
            Ok(false) => {}
            Err(ReceiveError::Archive(ArchiveError::Store(error))) => return Err(ArchiveError::Store(error).into()),
            Err(error) => tracing::warn!(segment = name, "a segment stays in pieces in the repository: {error}"),
        }
    }
    Ok(())
}

/// Whether its pieces make a whole segment, which is stored then.
async fn make_whole(
    source: &ShipSource,
    wal: WalBranch,
    segment: Segment,
    strays: &Strays,
) -> Result<bool, ReceiveError> {
    let (archive, size) = (&source.archive, source.segment_size);
    let facts = archive.beginning_facts_without(wal, segment, size, strays).await?;
    if facts.is_none_or(|facts| facts.end < size.bytes()) {
        return Ok(false);
    }
    let begun = archive.beginning_without(wal, segment, size, strays).await?;
    let Some(begun) = begun.filter(|begun| begun.bytes.len() == size.bytes() as usize) else { return Ok(false) };
    let carry = carry_into(source, wal, segment).await?;
    let (archive, scanning) = (archive.clone(), source.archive.clone());
    let content = tokio::task::spawn_blocking(move || {
        let Beginning { bytes, member, .. } = begun;
        let mut open = OpenSegment::begin(Place { wal, segment, size, member }, &scanning, carry, None)?;
        open.take(&bytes)?;
        Ok::<_, ReceiveError>(open.finish()?.content)
    });
    match content.await.map_err(|_| ShipError::Stopping)?? {
        FinishedContent::Plain(upload) => archive.put_segment(*upload).await?,
        FinishedContent::Sealed(sealed) => archive.store_segment(&sealed).await?,
    };
    Ok(true)
}

/// What leads into a segment, from `pg_wal` or from the archive; `None`: from neither, and a little less is known of it.
async fn carry_into(source: &ShipSource, wal: WalBranch, segment: Segment) -> Result<Option<Carry>, ReceiveError> {
    let here = source.clone();
    let carry = tokio::task::spawn_blocking(move || predecessor_carry(&here, segment)).await.ok().flatten();
    let Some(number) = segment.number.checked_sub(1).filter(|_| carry.is_none()) else { return Ok(carry) };
    let (before, size, system_id) = (Segment { number, ..segment }, source.segment_size, source.system_id);
    let archived = source.archive.get_segment(wal, before, size).await;
    let Some((_, content)) = source.archive.readable(archived)?.flatten() else { return Ok(None) };
    let carry = tokio::task::spawn_blocking(move || read_carry(&content, before, size, system_id)).await;
    Ok(carry.ok().flatten())
}
