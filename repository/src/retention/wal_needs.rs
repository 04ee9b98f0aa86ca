//! Below what position WAL is not needed for the recovery window. What lies below is not gone with that: the stretches that
//! make kept backups consistent, and those that are held, stay ([`crate::collect`]).

use super::{Given, Standing};
use crate::postgres::{Lsn, WalBranch};

/// A branch's WAL that the window no longer needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trimmed {
    pub wal: WalBranch,
    pub below: Lsn,
    /// Stored segments that end below it, and were not trimmed before.
    pub segments: usize,
}

pub(super) fn trims(given: &Given<'_>, standing: &Standing<'_>) -> Vec<Trimmed> {
    let mut trims = Vec::new();
    for (wal, branch) in &given.catalog.branches {
        let size = u64::from(branch.segment_size.bytes());
        let Some(last) = branch.segments.last_key_value().map(|(number, _)| *number) else { continue };
        let end = Lsn(last.saturating_add(1).saturating_mul(size));
        let Some(needed) = needed(standing, wal, end) else { continue };
        let floors = given.open.iter().filter(|open| open.wal.system_id == wal.system_id).map(|open| open.wal_floor);
        let below = floors.chain([needed]).min().unwrap_or(Lsn::INVALID);
        let below = Lsn(below.0 / size * size);
        let before = given.trimmed.get(wal).copied().unwrap_or(Lsn::INVALID);
        let (from, to) = (before.0.div_ceil(size), below.0 / size);
        if below > before {
            trims.push(Trimmed { wal: *wal, below, segments: branch.segments.range(from..to.max(from)).count() });
        }
    }
    trims
}

/// From where on the window needs a branch, at most its `end`; `None`: nobody can say.
fn needed(standing: &Standing<'_>, wal: &WalBranch, end: Lsn) -> Option<Lsn> {
    let mut needed = end;
    for way in &standing.ways {
        let Some(leg_end) = way.lineage.leaves(wal) else { continue };
        // Without a backup from which its window begins, nothing tells where that is.
        let from = way.base?.facts.start_lsn;
        if leg_end.is_none_or(|leg_end| from < leg_end) {
            needed = needed.min(from);
        }
    }
    Some(needed)
}
