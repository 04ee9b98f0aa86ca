//! Members that write other WAL than each other on one timeline, as the repository shows it.

use std::fmt;
use std::time::Duration;

use super::{BranchName, WalCatalog};
use crate::postgres::{Lsn, WalBranch};

/// How long a diverged branch alarms behind its newest WAL. A member that was stopped, rewound or promoted writes no more of
/// it; a day is enough for people to see that there was one.
const ALARM: Duration = Duration::from_secs(24 * 3600);

/// One member's WAL that differs from what another stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SplitBrain {
    /// Where it goes.
    pub wal: WalBranch,
    pub member: String,
    /// Whose WAL it differs from.
    pub other: String,
    /// Start of the first segment that differs.
    pub at: Lsn,
}

/// Those whose diverged branch got WAL within the last day. `now_us`: microseconds since the Unix epoch.
pub fn split_brains(catalog: &WalCatalog, now_us: i64) -> Vec<SplitBrain> {
    let since_us = now_us.saturating_sub(i64::try_from(ALARM.as_micros()).unwrap_or(i64::MAX));
    let diverged = catalog.branches.iter().filter_map(|(wal, branch)| {
        let left = branch.divergence.as_ref()?;
        let shipped = branch.segments.values().filter_map(|facts| facts.shipped_at_us);
        let newest_us = shipped.fold(left.found_at_us, i64::max);
        let (member, other, at) = (left.member.clone(), left.stored_by.clone(), left.at);
        (newest_us >= since_us).then_some(SplitBrain { wal: *wal, member, other, at })
    });
    diverged.collect()
}

impl fmt::Display for SplitBrain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SplitBrain { wal, member, other, at } = self;
        let (timeline, branch) = (wal.timeline, BranchName::from(wal));
        match member == other {
            false => write!(f, "split brain: {member} writes other WAL than {other} on timeline {timeline} from {at}"),
            true => write!(f, "{member} writes other WAL than it did before on timeline {timeline} from {at}"),
        }?;
        write!(f, ", which goes to branch {branch}")
    }
}
