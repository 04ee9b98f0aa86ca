//! Reasons, as people read them.

use std::fmt;

use jiff::Timestamp;

use super::calendar::Slot;
use crate::ids::{BackupId, HoldId};

/// Why a backup is kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Why {
    /// It was taken within the recovery window.
    InWindow,
    /// The window begins at `edge`: this is the newest from which that moment can be restored.
    WindowBase {
        edge: Timestamp,
    },
    /// WAL that makes it consistent is missing, and somebody may bring it.
    MayBecomeRestorable,
    /// One of so many restorable ones that are always kept.
    Minimum {
        of: usize,
    },
    /// The newest that was restored and examined.
    NewestProven,
    Calendar(Slot),
    Held {
        hold: HoldId,
        reason: String,
        owner: String,
    },
    /// A backup under way builds on it.
    ParentOfOpen {
        session: BackupId,
    },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::InWindow => f.write_str("taken within the recovery window"),
            Why::WindowBase { edge } => write!(f, "the recovery window from {} on begins with it", seconds(*edge)),
            Why::MayBecomeRestorable => f.write_str("not restorable, and the WAL that is missing may be brought"),
            Why::Minimum { of: 1 } => f.write_str("the newest that can be restored"),
            Why::Minimum { of } => write!(f, "one of the {of} newest that can be restored"),
            Why::NewestProven => f.write_str("the newest that was proven by a restore"),
            Why::Calendar(slot) => slot.fmt(f),
            Why::Held { hold, reason, owner } => write!(f, "held by {owner} ({hold}): {reason}"),
            Why::ParentOfOpen { session } => write!(f, "backup {session}, under way, builds on it"),
        }
    }
}

fn seconds(at: Timestamp) -> impl fmt::Display {
    at.strftime("%Y-%m-%d %H:%M:%S UTC")
}
