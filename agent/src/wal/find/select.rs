//! Of any number of commits, those worth a line: what was destroyed first, then most rows overwritten, then the nearest in
//! time. Pure, and never holds more than it may show.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use walfleet_repository::postgres::Lsn;
use walfleet_repository::wal_catalog::around::Interval;

use crate::postgres::wal_record::Transaction;

/// Overwritten rows from which a transaction is worth reading back to its beginning.
const HEAVY_ROWS: u64 = 1000;

/// Which commits are shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Show {
    /// The destructive and the heavy ones, and some of the nearest beside them.
    Notable,
    /// All, as many as there is room for; the nearest.
    All,
}

/// A commit beside the interval.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Neighbour {
    pub at_us: i64,
    pub lsn: Lsn,
    pub xid: u32,
}

/// What comes last is let go first: whether it destroyed, rows overwritten, nearness.
type Weight = (bool, u64, Reverse<u64>);

/// Takes commits in any number, in the order of the log.
#[derive(Clone, Debug)]
pub struct Selection {
    interval: Interval,
    limit: usize,
    show: Show,
    notable: BTreeMap<(Weight, Lsn), Transaction>,
    nearest: BTreeMap<(Reverse<u64>, Lsn), Transaction>,
    /// Commits in the interval.
    pub commits: u64,
    /// The newest before the interval and the oldest behind it, as far as was read.
    pub before: Option<Neighbour>,
    pub after: Option<Neighbour>,
    pub has_overflowed: bool,
}

impl Selection {
    pub fn new(interval: Interval, limit: usize, show: Show) -> Selection {
        Selection {
            interval,
            limit,
            show,
            notable: BTreeMap::new(),
            nearest: BTreeMap::new(),
            commits: 0,
            before: None,
            after: None,
            has_overflowed: false,
        }
    }

    pub fn offer(&mut self, transaction: Transaction) {
        let at_us = transaction.at_us;
        if !(self.interval.from_us..=self.interval.to_us).contains(&at_us) {
            let beside = Neighbour { at_us, lsn: transaction.commit_end, xid: transaction.xid };
            return self.note_beside(beside);
        }
        self.commits += 1;
        let distance = Reverse(self.interval.moment_us.abs_diff(at_us));
        let place = transaction.commit_end;
        let rows = transaction.all_rows().overwritten();
        let is_destructive = transaction.is_destructive();
        if self.show == Show::Notable && (is_destructive || rows > 0) {
            // Of many that destroy, as loads empty their tables all day, the nearest.
            let weight = (is_destructive, if is_destructive { 0 } else { rows }, distance);
            keep(&mut self.notable, (weight, place), self.limit, || transaction.clone());
        }
        keep(&mut self.nearest, (distance, place), self.limit, || transaction);
    }

    /// What another selection found beside the interval, where this one found nothing.
    pub fn take_neighbours(&mut self, other: &Selection) {
        other.before.into_iter().chain(other.after).for_each(|beside| self.note_beside(beside));
    }

    fn note_beside(&mut self, beside: Neighbour) {
        if beside.at_us < self.interval.from_us {
            if self.before.is_none_or(|known| known.at_us <= beside.at_us) {
                self.before = Some(beside);
            }
        } else if self.after.is_none_or(|known| beside.at_us < known.at_us) {
            self.after = Some(beside);
        }
    }

    /// Whether something that matters began before what was read.
    pub fn misses_a_beginning(&self) -> bool {
        let matters = |one: &Transaction| one.is_destructive() || one.all_rows().overwritten() >= HEAVY_ROWS;
        self.notable.values().any(|one| !one.is_whole && matters(one))
    }

    /// In the order of the log. A fifth of the room is for the nearest, whatever they did.
    pub fn finish(self) -> Vec<Transaction> {
        let room_for_notable = self.limit - self.limit / 5;
        let notable = self.notable.into_iter().rev().take(room_for_notable);
        let mut chosen: BTreeMap<Lsn, Transaction> = notable.map(|((_, place), one)| (place, one)).collect();
        for ((_, place), one) in self.nearest.into_iter().rev() {
            if chosen.len() == self.limit {
                break;
            }
            chosen.insert(place, one);
        }
        chosen.into_values().collect()
    }
}

fn keep<K: Ord>(kept: &mut BTreeMap<K, Transaction>, key: K, most: usize, transaction: impl FnOnce() -> Transaction) {
    if kept.len() >= most {
        if kept.first_key_value().is_none_or(|(least, _)| key < *least) {
            return;
        }
        kept.pop_first();
    }
    kept.insert(key, transaction());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::wal_record::{FileChange, RelationName, RelationRows, RowCounts};

    const INTERVAL: Interval = Interval { from_us: 1000, to_us: 3000, moment_us: 2000 };

    fn commit(at_us: i64, deleted: u64, files: FileChange) -> Transaction {
        let relation = RelationName { tablespace: 1663, database: 5, number: 16384 };
        let rows = RelationRows { relation, rows: RowCounts { deleted, ..RowCounts::default() } };
        Transaction {
            xid: at_us as u32,
            at_us,
            commit_start: Lsn(at_us as u64 * 100),
            commit_end: Lsn(at_us as u64 * 100 + 50),
            stop_before: Lsn(at_us as u64 * 100),
            rows: vec![rows],
            more_rows: RowCounts::default(),
            catalog_rows: 0,
            files,
            dropped: Vec::new(),
            dropped_count: 0,
            created_count: 0,
            left_empty: false,
            truncated: Vec::new(),
            dropped_databases: Vec::new(),
            wal_bytes: 1,
            is_whole: true,
        }
    }

    fn selected(limit: usize, show: Show, commits: impl IntoIterator<Item = Transaction>) -> (Vec<i64>, Selection) {
        let mut selection = Selection::new(INTERVAL, limit, show);
        commits.into_iter().for_each(|one| selection.offer(one));
        (selection.clone().finish().iter().map(|one| one.at_us).collect(), selection)
    }

    #[test]
    fn what_destroyed_is_shown_first_then_what_deleted_most_then_the_nearest() {
        let busy = (1000..=3000).map(|at_us| match at_us {
            1003 => commit(at_us, 0, FileChange::Dropped),
            1005 => commit(at_us, 5000, FileChange::Kept),
            1007 => commit(at_us, 70, FileChange::Kept),
            _ => commit(at_us, u64::from(at_us % 2 == 0), FileChange::Kept),
        });
        let (shown, selection) = selected(5, Show::Notable, busy.clone());
        assert_eq!(shown, [1003, 1005, 1007, 2000, 2001], "one by its nearness alone");
        assert_eq!(selection.commits, 2001);
        let (shown, _) = selected(5, Show::All, busy);
        assert_eq!(shown, [1998, 1999, 2000, 2001, 2002]);
        let quiet = [1500, 2500].map(|at_us| commit(at_us, 0, FileChange::Kept));
        assert_eq!(selected(5, Show::Notable, quiet).0, [1500, 2500], "all, where there is room");
    }

    #[test]
    fn of_many_that_destroy_the_nearest_are_shown() {
        let all = (1000..=3000).map(|at_us| commit(at_us, 0, FileChange::Truncated));
        assert_eq!(selected(5, Show::Notable, all).0, [1998, 1999, 2000, 2001, 2002]);
    }

    #[test]
    fn neighbours_are_the_nearest_on_either_side() {
        let commits = [100, 990, 980, 3500, 3001].map(|at_us| commit(at_us, 9, FileChange::Dropped));
        let (shown, mut selection) = selected(5, Show::Notable, commits);
        assert_eq!((shown.len(), selection.commits), (0, 0));
        let at = |beside: Option<Neighbour>| beside.map(|beside| beside.at_us);
        assert_eq!((at(selection.before), at(selection.after)), (Some(990), Some(3001)));
        let (_, other) = selected(5, Show::Notable, [commit(995, 0, FileChange::Kept)]);
        selection.take_neighbours(&other);
        assert_eq!(at(selection.before), Some(995));
    }

    #[test]
    fn a_beginning_is_looked_for_only_where_it_matters() {
        let cut = |deleted| Transaction { is_whole: false, ..commit(2000, deleted, FileChange::Kept) };
        assert!(!selected(5, Show::Notable, [cut(10)]).1.misses_a_beginning());
        assert!(selected(5, Show::Notable, [cut(1000)]).1.misses_a_beginning());
        assert!(!selected(5, Show::Notable, [commit(2000, 1000, FileChange::Kept)]).1.misses_a_beginning());
    }
}
