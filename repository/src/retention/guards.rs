//! What keeps a plan from being carried out: where what it rests on is doubtful, nothing at all is removed.

use std::fmt;

use jiff::{SignedDuration, Timestamp};

use super::{Decision, Given, Plan};

/// How far the controller's clock and the store's may differ.
pub const SKEW: SignedDuration = SignedDuration::from_mins(10);

/// So many backups may expire in one go, however few there are.
const FEW: usize = 3;

/// The same, in segments, of the trimmed WAL.
const FEW_SEGMENTS: usize = 256;

/// Why nothing is removed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The store has seen a commit later than now.
    ClockBehind { now: Timestamp, seen_at: Timestamp },
    /// See [`Given::doubts`].
    Doubtful { what: String },
    /// The catalog tells of objects that do not read.
    CatalogDoubtful { damaged: Vec<String> },
    /// Fewer restorable backups would be left than are promised at least, and fewer than there are.
    BelowMinimum { left: usize, minimum: usize },
    /// Far more backups than usual.
    TooManyBackups { would: usize, of: usize },
    /// Far more WAL than usual.
    TooMuchWal { would: usize, of: usize },
}

impl Refusal {
    /// Whether an operator's word releases it.
    pub fn is_brake(&self) -> bool {
        matches!(self, Refusal::TooManyBackups { .. } | Refusal::TooMuchWal { .. })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::ClockBehind { now, seen_at } => write!(
                f,
                "the store has seen a backup at {seen_at}, and here it is {now}\nHINT: set the controller's clock, or wait until that moment has passed."
            ),
            Refusal::Doubtful { what } => f.write_str(what),
            Refusal::CatalogDoubtful { damaged } => write!(
                f,
                "{} objects of the WAL archive do not read, the first: {}\nHINT: `walfleet repository verify` tells of them all.",
                damaged.len(),
                damaged.first().map_or("?", String::as_str)
            ),
            Refusal::BelowMinimum { left, minimum } => {
                write!(f, "{left} restorable backups would be left, and {minimum} are promised at least")
            }
            Refusal::TooManyBackups { would, of } => write!(
                f,
                "{would} of {of} backups would expire at once\nHINT: look at the plan; `walfleet retention release NAME` lets it pass once."
            ),
            Refusal::TooMuchWal { would, of } => write!(
                f,
                "{would} of {of} segments of WAL would be removed at once\nHINT: look at the plan; `walfleet retention release NAME` lets it pass once."
            ),
        }
    }
}

pub(super) fn refusals(given: &Given<'_>, plan: &Plan) -> Vec<Refusal> {
    let doubts = given.doubts.iter().map(|what| Refusal::Doubtful { what: what.clone() });
    let mut refusals: Vec<Refusal> = doubts.collect();
    let expired = given.candidates.iter().filter_map(|candidate| candidate.expired_at);
    let stored = given.last_stored.values().copied();
    let newest = given.candidates.iter().map(|candidate| candidate.seen_at).chain(expired).chain(stored).max();
    if let Some(seen_at) = newest.filter(|seen_at| seen_at.duration_since(given.now) > SKEW) {
        refusals.push(Refusal::ClockBehind { now: given.now, seen_at });
    }
    if !given.catalog.damaged.is_empty() {
        refusals.push(Refusal::CatalogDoubtful { damaged: given.catalog.damaged.clone() });
    }
    let restorable = plan.backups.iter().filter(|decided| decided.is_restorable);
    let live = restorable.clone().filter(|decided| is_live(&decided.decision)).count();
    let left = plan.kept().filter(|decided| decided.is_restorable).count();
    let minimum = given.promise.minimum.max(1);
    if left < minimum.min(live) {
        refusals.push(Refusal::BelowMinimum { left, minimum });
    }
    let of = plan.backups.iter().filter(|decided| is_live(&decided.decision)).count();
    let would = plan.expiring().count();
    if would > FEW.max(of / 3) {
        refusals.push(Refusal::TooManyBackups { would, of });
    }
    let of: usize = given.catalog.branches.values().map(|branch| branch.segments.len()).sum();
    let would: usize = plan.trims.iter().map(|trim| trim.segments).sum();
    if would > FEW_SEGMENTS.max(of / 3 * 2) {
        refusals.push(Refusal::TooMuchWal { would, of });
    }
    refusals
}

fn is_live(decision: &Decision) -> bool {
    matches!(decision, Decision::Keep(_) | Decision::Expire)
}
