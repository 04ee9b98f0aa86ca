//! What is kept of a cluster, and why: a pure plan over its backups, its WAL, what holds them, and what its policy promises.
//!
//! What ought to be kept does not depend on what lies in the trash: a backup that a changed policy wants again is brought back.
//! Order in time is that in which the store saw the commits, not what hosts claim. Whatever is not known makes the plan keep
//! more, never less; where the clock, the catalog or the size of a removal is doubtful, [`guards`] refuse all of it.

pub mod calendar;
pub mod gather;
pub mod guards;
pub mod stretch;
pub mod wal_needs;
mod why;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};

pub use calendar::Calendar;
pub use guards::Refusal;
pub use wal_needs::Trimmed;
pub use why::Why;

use crate::format::log_entry::{Hold, Open};
use crate::ids::BackupId;
use crate::postgres::{Lsn, WalBranch};
use crate::recovery_window::lineage::Lineage;
use crate::recovery_window::{BackupFacts, WalCatalog, recovery_windows};

/// What a policy promises.
#[derive(Clone, PartialEq, Debug)]
pub struct Promise {
    /// Every second of this long before now.
    pub window: SignedDuration,
    pub calendar: Calendar,
    /// As many restorable backups, the newest, whatever else is promised. At least one.
    pub minimum: usize,
    /// How long what has expired can be brought back.
    pub trash: SignedDuration,
}

/// A committed backup that is not purged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    pub facts: BackupFacts,
    /// When its commit came into the log, by the store's clock.
    pub seen_at: Timestamp,
    /// Since when it lies in the trash, by the store's clock; `None`: it does not.
    pub expired_at: Option<Timestamp>,
    /// It was restored and examined, and all was well.
    pub is_proven: bool,
    /// Its content does not read, or is not what those before it led to expect. It serves where nothing else does.
    pub is_doubtful: bool,
}

/// All that a plan depends on.
#[derive(Clone, Debug)]
pub struct Given<'a> {
    pub now: Timestamp,
    pub promise: &'a Promise,
    pub candidates: &'a [Candidate],
    pub catalog: &'a WalCatalog,
    /// When the newest object of each branch was stored, by the store's clock. A branch without one may be written still.
    pub last_stored: &'a BTreeMap<WalBranch, Timestamp>,
    /// Below what WAL is trimmed already.
    pub trimmed: &'a BTreeMap<WalBranch, Lsn>,
    pub holds: &'a [Hold],
    /// Sessions under way.
    pub open: &'a [Open],
    /// What makes the plan doubtful beside what is seen here: clocks that differ, a store that failed its probe.
    pub doubts: &'a [String],
}

/// What to do about a backup, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decided {
    pub backup: BackupId,
    pub seen_at: Timestamp,
    pub is_restorable: bool,
    pub decision: Decision,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Never without a reason.
    Keep(Vec<Why>),
    /// It lies in the trash and is wanted.
    BringBack(Vec<Why>),
    /// Nothing wants it.
    Expire,
    /// It lies in the trash until then.
    Wait { until: Timestamp },
    /// It is removed for good.
    Purge,
}

/// What to do about a cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Any second since then is promised.
    pub edge: Timestamp,
    /// In the order in which they were seen.
    pub backups: Vec<Decided>,
    pub trims: Vec<Trimmed>,
    /// Why nothing of it is to be done now; empty: all of it is.
    pub refused: Vec<Refusal>,
}

impl Plan {
    pub fn kept(&self) -> impl Iterator<Item = &Decided> {
        self.backups.iter().filter(|decided| matches!(decided.decision, Decision::Keep(_) | Decision::BringBack(_)))
    }

    pub fn expiring(&self) -> impl Iterator<Item = &Decided> {
        self.backups.iter().filter(|decided| decided.decision == Decision::Expire)
    }
}

/// What is to be kept and removed now.
pub fn plan(given: &Given<'_>) -> Plan {
    let edge = given.now - given.promise.window;
    let standing = Standing::of(given, edge);
    let wanted = wanted(given, &standing, edge);
    let decide = |candidate: &&Candidate| {
        let whys = wanted.get(&candidate.facts.id).cloned().unwrap_or_default();
        Decided {
            backup: candidate.facts.id.clone(),
            seen_at: candidate.seen_at,
            is_restorable: standing.is_restorable(candidate),
            decision: decision(given, candidate, whys),
        }
    };
    let backups: Vec<Decided> = standing.in_order.iter().map(decide).collect();
    let trims = wal_needs::trims(given, &standing);
    let mut plan = Plan { edge, backups, trims, refused: Vec::new() };
    plan.refused = guards::refusals(given, &plan);
    plan
}

fn decision(given: &Given<'_>, candidate: &Candidate, whys: Vec<Why>) -> Decision {
    match (candidate.expired_at, whys.is_empty()) {
        (None, false) => Decision::Keep(whys),
        (None, true) => Decision::Expire,
        (Some(_), false) => Decision::BringBack(whys),
        (Some(at), true) => {
            let until = at + given.promise.trash;
            if until <= given.now { Decision::Purge } else { Decision::Wait { until } }
        }
    }
}

/// The backups in order, and the ways of the WAL that they lie on.
struct Standing<'g> {
    /// By when they were seen.
    in_order: Vec<&'g Candidate>,
    restorable: BTreeSet<&'g BackupId>,
    ways: Vec<Way<'g>>,
}

/// A way of the WAL to a branch that may be restored within the window.
struct Way<'g> {
    lineage: Lineage,
    /// From where all of the window can be restored; `None`: from nowhere.
    base: Option<&'g Candidate>,
}

impl<'g> Standing<'g> {
    fn of(given: &Given<'g>, edge: Timestamp) -> Standing<'g> {
        let mut in_order: Vec<&Candidate> = given.candidates.iter().collect();
        in_order.sort_by_key(|candidate| (candidate.seen_at, &candidate.facts.id));
        let facts: Vec<BackupFacts> = in_order.iter().map(|candidate| candidate.facts.clone()).collect();
        let lost: BTreeSet<BackupId> =
            recovery_windows(&facts, given.catalog).unrestorable.into_iter().map(|lost| lost.backup).collect();
        let restorable =
            in_order.iter().map(|candidate| &candidate.facts.id).filter(|id| !lost.contains(*id)).collect();
        let mut standing = Standing { in_order, restorable, ways: Vec::new() };
        let lineages = given.catalog.branches.keys().filter_map(|tip| Lineage::to(*tip, given.catalog));
        let ways: Vec<Way<'_>> = lineages
            .filter(|lineage| !standing.is_over(given, lineage, edge))
            .map(|lineage| Way { base: standing.base(&lineage, edge), lineage })
            .collect();
        standing.ways = ways;
        standing
    }

    fn is_restorable(&self, candidate: &Candidate) -> bool {
        self.restorable.contains(&candidate.facts.id)
    }

    /// Of the restorable backups of a way that were there before a moment, the one farthest along it: of two that were taken at once
    /// the one that began later may have been seen first. The host's claim cannot make one older than its commit, only newer.
    fn base(&self, lineage: &Lineage, edge: Timestamp) -> Option<&'g Candidate> {
        let before = self.in_order.iter().copied().filter(|candidate| {
            candidate.seen_at <= edge
                && candidate.facts.stopped_at_us <= edge.as_microsecond()
                && lineage.holds(&candidate.facts)
                && self.is_restorable(candidate)
        });
        before.max_by_key(|candidate| (candidate.facts.stop_lsn, candidate.seen_at))
    }

    /// Whether nothing within the window can be on a way: nothing of its last branch was stored since, and before that
    /// already another way had gone on.
    fn is_over(&self, given: &Given<'_>, lineage: &Lineage, edge: Timestamp) -> bool {
        let is_quiet = given.last_stored.get(&lineage.tip()).is_some_and(|at| *at <= edge);
        let newest = self.in_order.iter().rev().find(|candidate| lineage.holds(&candidate.facts));
        let after = |candidate: &&&Candidate| newest.is_none_or(|newest| candidate.seen_at > newest.seen_at);
        let mut others = self.in_order.iter().filter(|candidate| !lineage.holds(&candidate.facts)).filter(after);
        is_quiet && others.any(|other| other.seen_at <= edge && self.is_restorable(other))
    }
}

/// Why each is wanted, by backup; one that is not in it is not.
fn wanted(given: &Given<'_>, standing: &Standing<'_>, edge: Timestamp) -> BTreeMap<BackupId, Vec<Why>> {
    let promise = given.promise;
    let mut wanted: BTreeMap<BackupId, Vec<Why>> = BTreeMap::new();
    let mut want = |candidate: &Candidate, why: Why| {
        let whys = wanted.entry(candidate.facts.id.clone()).or_default();
        if !whys.contains(&why) {
            whys.push(why);
        }
    };
    for candidate in standing.in_order.iter().filter(|candidate| candidate.seen_at > edge) {
        let why = if standing.is_restorable(candidate) { Why::InWindow } else { Why::MayBecomeRestorable };
        want(candidate, why);
    }
    for way in &standing.ways {
        match way.base {
            Some(base) => want(base, Why::WindowBase { edge }),
            // A gap may yet be filled.
            None => {
                let mut older = standing.in_order.iter().rev().filter(|candidate| candidate.seen_at <= edge);
                if let Some(newest) = older.find(|candidate| way.lineage.holds(&candidate.facts)) {
                    want(newest, Why::MayBecomeRestorable);
                }
            }
        }
    }
    let restorable: Vec<&Candidate> =
        standing.in_order.iter().copied().filter(|candidate| standing.is_restorable(candidate)).collect();
    // The newest last; doubtful ones only where there are no others.
    let mut by_worth = restorable.clone();
    by_worth.sort_by_key(|candidate| !candidate.is_doubtful);
    let minimum = promise.minimum.max(1);
    for candidate in by_worth.iter().rev().take(minimum) {
        want(candidate, Why::Minimum { of: minimum });
    }
    if let Some(newest) = restorable.iter().rev().find(|candidate| candidate.is_proven) {
        want(newest, Why::NewestProven);
    }
    for (candidate, slot) in promise.calendar.chosen(&restorable) {
        want(candidate, Why::Calendar(slot));
    }
    for candidate in &standing.in_order {
        let id = &candidate.facts.id;
        for hold in given.holds {
            if hold.backup() == Some(id) {
                want(
                    candidate,
                    Why::Held { hold: hold.hold.clone(), reason: hold.reason.clone(), owner: hold.owner.clone() },
                );
            }
        }
        for open in given.open.iter().filter(|open| open.parents.contains(id)) {
            want(candidate, Why::ParentOfOpen { session: open.session.clone() });
        }
    }
    wanted
}
