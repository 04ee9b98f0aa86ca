//! Segments on their way from the archive into a selection: brought some at a time, decoded in their order.

use futures::StreamExt;
use walfleet_repository::postgres::{Segment, SegmentSize, WalBranch};
use walfleet_repository::wal_archive::WalArchive;

use super::FindError;
use super::select::Selection;
use crate::postgres::wal_record::{Carry, SegmentPlace, Transactions};
use crate::progress::Progress;

/// Segments held at once, in bytes; of the largest size (1 GiB) there is one all the same.
const HELD_BYTES: usize = 64 << 20;

pub(super) struct Reader<'a> {
    pub archive: &'a WalArchive,
    pub size: SegmentSize,
    pub progress: &'a Progress,
}

/// What goes from one segment to the next, whole: decoding runs on other threads.
struct State {
    transactions: Transactions,
    selection: Selection,
    carry: Option<Carry>,
}

/// The commits, and the segments that do not read or are gone.
type Read = (Selection, Vec<Segment>);

impl Reader<'_> {
    /// Offers every commit of the segments. One that is listed and gone is passed over, as missing WAL is.
    pub async fn read(&self, segments: &[(WalBranch, u64)], selection: Selection) -> Result<Read, FindError> {
        let (archive, size) = (self.archive.clone(), self.size);
        let segment_bytes = size.bytes() as usize;
        self.progress.enter("read", (segments.len() as u64).saturating_mul(segment_bytes as u64));
        // Owned, since a stream of futures over borrowed rows is not Send for the compiler.
        let segments = segments.to_vec();
        let reads = segments.into_iter().map(move |(wal, number)| {
            let archive = archive.clone();
            let segment = Segment { timeline: wal.timeline, number };
            async move { (wal, segment, archive.get_content(wal, segment, size).await) }
        });
        // One is being decoded beside those that come.
        let mut brought = futures::stream::iter(reads).buffered((HELD_BYTES / segment_bytes).clamp(1, 4));
        let mut state = State { transactions: Transactions::default(), selection, carry: None };
        let mut unread = Vec::new();
        while let Some((wal, segment, content)) = brought.next().await {
            let Some(bytes) = content? else {
                unread.push(segment);
                continue;
            };
            let place = SegmentPlace {
                start: segment.start(size),
                size,
                timeline: segment.timeline,
                system_id: Some(wal.system_id),
            };
            let decoded = tokio::task::spawn_blocking(move || state.decode(place, &bytes)).await;
            let named = |source| FindError::Wal { segment: segment.file_name(size), source };
            state = decoded.map_err(|_| FindError::Lost)?.map_err(named)?;
            self.progress.add(segment_bytes as u64);
        }
        state.selection.has_overflowed |= state.transactions.has_overflowed();
        Ok((state.selection, unread))
    }
}

impl State {
    fn decode(mut self, place: SegmentPlace, bytes: &[u8]) -> Result<State, crate::postgres::wal_record::WalError> {
        let carry = self.carry.take().filter(|carry| carry.position() == place.start);
        let selection = &mut self.selection;
        self.carry = self.transactions.read_segment(place, carry, bytes, &mut |ended| selection.offer(ended))?;
        Ok(self)
    }
}
