//! What holds a stretch of time: the backups from which any second of it can be restored, each with the WAL behind it.
//!
//! Keyless, so nobody knows which second lies where in the WAL, only between which backups: rather more is held than less.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};

use super::{Candidate, Given, Standing};
use crate::format::log_entry::HeldStretch;
use crate::ids::BackupId;
use crate::postgres::{Lsn, SystemId};
use crate::recovery_window::lineage::Lineage;

/// How far the store's clock and a server's may differ for WAL to count as written before a moment.
const SLACK: SignedDuration = SignedDuration::from_hours(1);

/// The stretch begins before what is left.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub struct NothingLeft {
    /// The first moment that can be held.
    pub first: Option<Timestamp>,
}

impl std::fmt::Display for NothingLeft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.first {
            Some(first) => {
                write!(f, "the first moment that can be held is {}", first.strftime("%Y-%m-%d %H:%M:%S UTC"))
            }
            None => f.write_str("there is no backup from which any of it can be restored"),
        }
    }
}

/// One for every way of the WAL that has something of the stretch. `to`: `None`, without end.
pub fn stretches(given: &Given<'_>, from: Timestamp, to: Option<Timestamp>) -> Result<Vec<HeldStretch>, NothingLeft> {
    let standing = Standing::of(given, from);
    let (from_us, to_us) = (from.as_microsecond(), to.map(Timestamp::as_microsecond));
    let mut bases: BTreeMap<&BackupId, &Candidate> = BTreeMap::new();
    let (mut is_reached, mut first) = (false, None);
    let is_older = |lineage: &Lineage| given.last_stored.get(&lineage.tip()).is_some_and(|at| *at + SLACK < from);
    let mut lineages: Vec<Lineage> =
        given.catalog.branches.keys().filter_map(|tip| Lineage::to(*tip, given.catalog)).collect();
    // A server that was idle has written nothing of the stretch, and is restored as it was all the same.
    if !lineages.iter().all(is_older) {
        lineages.retain(|lineage| !is_older(lineage));
    }
    for lineage in lineages {
        let usable = standing.in_order.iter().copied().filter(|candidate| {
            let is_held =
                || is_held(given, candidate, to_us.and_then(|to| end(given, candidate.facts.wal.system_id, to)));
            lineage.holds(&candidate.facts)
                && standing.is_restorable(candidate)
                && (is_whole(given, &lineage, candidate) || is_held())
        });
        let by_stop = |candidate: &&Candidate| candidate.facts.stopped_at_us;
        let is_before = |candidate: &&Candidate| candidate.facts.stopped_at_us <= from_us && candidate.seen_at <= from;
        let base = usable.clone().filter(is_before).max_by_key(by_stop);
        is_reached |= base.is_some();
        let oldest = usable.min_by_key(by_stop);
        first = [first, oldest.map(|oldest| oldest.facts.stopped_at_us)].into_iter().flatten().min();
        let begun_within = oldest.filter(|oldest| to_us.is_none_or(|to| oldest.facts.stopped_at_us <= to));
        bases.extend(base.or(begun_within).map(|base| (&base.facts.id, base)));
    }
    if !is_reached {
        return Err(NothingLeft { first: first.and_then(|first| Timestamp::from_microsecond(first).ok()) });
    }
    let stretch = |base: &&Candidate| HeldStretch {
        base: base.facts.id.clone(),
        end: to_us.and_then(|to| end(given, base.facts.wal.system_id, to)),
        from_us,
        to_us,
    };
    Ok(bases.values().map(stretch).collect())
}

/// Whether no WAL behind a backup was let go of on a way.
fn is_whole(given: &Given<'_>, lineage: &Lineage, candidate: &Candidate) -> bool {
    let start = candidate.facts.start_lsn;
    given.trimmed.iter().all(|(wal, below)| match lineage.leaves(wal) {
        None => true,
        Some(end) => *below <= start || end.is_some_and(|end| end <= start),
    })
}

/// Whether the WAL behind a backup is kept by another hold, and as far.
fn is_held(given: &Given<'_>, candidate: &Candidate, end: Option<Lsn>) -> bool {
    let wanted = HeldStretch { base: candidate.facts.id.clone(), end, from_us: 0, to_us: None };
    given.holds.iter().any(|hold| hold.keeps_all_of(&wanted))
}

/// A position by which a moment is over: where the first backup after it stops. Only where there is but one way to go.
fn end(given: &Given<'_>, system_id: SystemId, to_us: i64) -> Option<Lsn> {
    let branches: BTreeSet<_> = given.catalog.branches.keys().filter(|wal| wal.system_id == system_id).collect();
    let later = |candidate: &&Candidate| {
        candidate.facts.wal.system_id == system_id
            && candidate.facts.stopped_at_us.min(candidate.seen_at.as_microsecond())
                > to_us.saturating_add(SLACK.as_micros() as i64)
    };
    let next = given.candidates.iter().filter(later).map(|candidate| candidate.facts.stop_lsn).min();
    next.filter(|_| branches.len() == 1)
}

#[cfg(test)]
mod tests {
    use super::super::tests::world::{World, begun};
    use super::*;

    #[test]
    fn a_stretch_is_held_from_the_backup_before_it_to_the_one_behind() {
        let mut world = World::daily(20);
        let noon = |day: i64| begun() + SignedDuration::from_hours(day * 24 + 13);
        let of = |world: &World, from: i64, to: Option<i64>| stretches(&world.given(), noon(from), to.map(noon));
        let held = of(&world, 5, Some(7)).unwrap();
        assert_eq!(held.len(), 1);
        assert_eq!(held[0].base.as_str(), "bk_005");
        let stop =
            |name: &str| world.candidates.iter().find(|one| one.facts.id.as_str() == name).unwrap().facts.stop_lsn;
        assert_eq!(held[0].end, Some(stop("bk_008")));
        let held = of(&world, 5, None).unwrap();
        assert_eq!((held[0].base.as_str(), held[0].end), ("bk_005", None));
        let first = of(&world, -1, Some(2)).unwrap_err().first.unwrap();
        assert!(first > noon(-1) && first < noon(2), "{first}");
        let wal = world.candidates[5].facts.wal;
        world.trimmed.insert(wal, stop("bk_005"));
        assert!(of(&world, 5, Some(7)).is_err(), "the WAL behind it may be gone");
        assert!(of(&world, 6, Some(7)).is_ok());
    }
}
