//! Which segments of one way of the WAL hold the commits of an interval of time, found by bisection over their directories.
//!
//! Commits may be slightly out of order in WAL, and clocks go back at a failover: what is found then begins or ends a
//! segment off, or, behind a clock that went back, where the bisection met it.

use std::ops::Range;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::note;
use crate::postgres::WalBranch;
use crate::recovery_window::{SegmentCommits, WalCatalog};
use crate::wal_archive::{ArchiveError, WalArchive};

/// Places in the list of segments that was searched.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Around {
    /// From the first segment with an end of a transaction not before the interval to the last with one not behind it.
    pub within: Range<usize>,
    /// The nearest with ends of transactions on either side.
    pub before: Option<usize>,
    pub after: Option<usize>,
    /// In or at the end of `within`: where what is not before the moment begins.
    pub moment: usize,
}

/// An interval and a moment in it, microseconds since the Unix epoch; both ends belong to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Interval {
    pub from_us: i64,
    pub to_us: i64,
    pub moment_us: i64,
}

/// Searches segments in the order in which recovery reads them (`Lineage::segments`).
///
/// Boxed for the reason that [`super::read`] is.
pub fn around<'a>(
    archive: &'a WalArchive,
    catalog: &'a mut WalCatalog,
    segments: &'a [(WalBranch, u64)],
    interval: Interval,
) -> BoxFuture<'a, Result<Around, ArchiveError>> {
    let mut search = Search { archive, catalog, segments };
    async move {
        let start = search.first_not(|_, newest| newest < interval.from_us).await?;
        let end = search.first_not(|oldest, _| oldest <= interval.to_us).await?.max(start);
        let moment = search.first_not(|_, newest| newest < interval.moment_us).await?.clamp(start, end);
        let before = search.bearing((0..start).rev()).await?;
        let after = search.bearing(end..segments.len()).await?;
        Ok(Around { within: start..end, before: before.map(|(at, ..)| at), after: after.map(|(at, ..)| at), moment })
    }
    .boxed()
}

struct Search<'a> {
    archive: &'a WalArchive,
    catalog: &'a mut WalCatalog,
    segments: &'a [(WalBranch, u64)],
}

impl Search<'_> {
    /// The place behind the last segment of which the test, of the oldest and the newest end of a transaction, holds.
    async fn first_not(&mut self, holds: impl Fn(i64, i64) -> bool + Send) -> Result<usize, ArchiveError> {
        let (mut low, mut high) = (0, self.segments.len());
        while low < high {
            let middle = low + (high - low) / 2;
            // A segment without commits says nothing: look on to the next that has some.
            match self.bearing(middle..high).await? {
                Some((at, oldest, newest)) if holds(oldest, newest) => low = at + 1,
                _ => high = middle,
            }
        }
        Ok(low)
    }

    /// The first of some places with ends of transactions, and the oldest and the newest of them.
    async fn bearing(
        &mut self,
        places: impl Iterator<Item = usize> + Send,
    ) -> Result<Option<(usize, i64, i64)>, ArchiveError> {
        for at in places {
            let Some((wal, number)) = self.segments.get(at) else { break };
            let commits = note(self.archive, self.catalog, *wal, *number).await?;
            if let Some(SegmentCommits::Between { first_us, last_us }) = commits {
                return Ok(Some((at, first_us.min(last_us), first_us.max(last_us))));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{Branch, SegmentSize, SystemId, Timeline};
    use crate::recovery_window::{BranchWal, SegmentFacts};
    use crate::store::{Store, StoreOptions};
    use std::sync::Arc;

    const WAL: WalBranch = WalBranch { system_id: SystemId(1), timeline: Timeline(1), branch: Branch::ROOT };

    /// Segments by the times of their commits, all known already.
    async fn found(commits: &[Option<(i64, i64)>], interval: (i64, i64, i64)) -> Around {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("file://{}", folder.path().display());
        let store = Store::open(&url, &StoreOptions::default()).unwrap();
        let keys = crate::keyring::Keyring::of(crate::crypto::DomainKey::generate().unwrap());
        let archive = WalArchive::new(store, "orders".parse().unwrap(), Arc::new(keys), 3);
        let facts = |of: &Option<(i64, i64)>| SegmentFacts {
            records_end: None,
            commits: match of {
                Some((first_us, last_us)) => SegmentCommits::Between { first_us: *first_us, last_us: *last_us },
                None => SegmentCommits::None,
            },
            ..SegmentFacts::default()
        };
        let segments = (0..).zip(commits.iter().map(facts)).collect();
        let branch =
            BranchWal { segment_size: SegmentSize::DEFAULT, segments, history: None, parent: None, divergence: None };
        let mut catalog = WalCatalog { branches: [(WAL, branch)].into(), ..WalCatalog::default() };
        let segments: Vec<_> = (0..commits.len() as u64).map(|number| (WAL, number)).collect();
        let (from_us, moment_us, to_us) = interval;
        around(&archive, &mut catalog, &segments, Interval { from_us, to_us, moment_us }).await.unwrap()
    }

    #[tokio::test]
    async fn the_segments_of_an_interval_are_found_and_its_neighbours() {
        let commits = [Some((0, 9)), Some((10, 19)), None, Some((20, 29)), None, None, Some((50, 59)), None];
        type Row = ((i64, i64, i64), Range<usize>, Option<usize>, Option<usize>);
        let table: [Row; 7] = [
            ((12, 13, 14), 1..2, Some(0), Some(3)),
            ((5, 15, 25), 0..4, None, Some(6)),
            // Nothing between: only what lies beside.
            ((35, 40, 45), 4..4, Some(3), Some(6)),
            ((-9, -8, -7), 0..0, None, Some(0)),
            ((70, 80, 90), 7..7, Some(6), None),
            ((29, 40, 50), 2..7, Some(1), None),
            ((-100, 0, 100), 0..7, None, None),
        ];
        for (interval, within, before, after) in table {
            let found = found(&commits, interval).await;
            assert_eq!((found.within.clone(), found.before, found.after), (within, before, after), "{interval:?}");
            assert!(found.within.start <= found.moment && found.moment <= found.within.end, "{interval:?}: {found:?}");
        }
        assert_eq!(found(&commits, (0, 20, 60)).await.moment, 2, "idle segments before it may be read for nothing");
        assert_eq!(found(&[], (0, 1, 2)).await.within, 0..0);
    }
}
