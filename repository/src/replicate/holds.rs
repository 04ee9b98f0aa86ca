//! Holds: what is held in the first place is held in the replica too, as far as it is there, and no longer.

use jiff::Timestamp;

use super::{Copier, ReplicateError};
use crate::cluster_log::ClusterState;
use crate::format::log_entry::{Action, Hold, HoldSubject};
use crate::ids::ClusterName;
use crate::lineage;

impl Copier<'_> {
    /// Of backups that are still to be brought, their holds follow.
    pub async fn copy_holds(&self, cluster: &ClusterName) -> Result<(), ReplicateError> {
        let (from, mut to) = self.logs(cluster).await?;
        let now_us = Timestamp::now().as_microsecond();
        // One whose time is over is released where it was placed, in a while.
        let counts = |hold: &&Hold| hold.owner != lineage::OWNER && hold.until_us.is_none_or(|until| until > now_us);
        let held: Vec<Hold> = from.state().holds().filter(counts).cloned().collect();
        for hold in &held {
            let place = |state: &ClusterState| {
                let is_new = !state.holds().any(|known| known.hold == hold.hold);
                (is_new && can_hold(state, hold)).then(|| Action::Hold(hold.clone()))
            };
            to.append_unless_done(self.author, place).await?;
        }
        let is_released =
            |known: &&Hold| known.owner != lineage::OWNER && !from.state().holds().any(|hold| hold.hold == known.hold);
        let released: Vec<Hold> = to.state().holds().filter(is_released).cloned().collect();
        for hold in &released {
            let release = |state: &ClusterState| {
                let is_there = state.holds().any(|known| known.hold == hold.hold);
                is_there.then(|| Action::Release { hold: hold.hold.clone() })
            };
            to.append_unless_done(self.author, release).await?;
        }
        Ok(())
    }
}

/// Whether the replica has what is to be held.
fn can_hold(state: &ClusterState, hold: &Hold) -> bool {
    let is_there = |backup| state.session(backup).is_some_and(|session| session.committed().is_some());
    match &hold.subject {
        HoldSubject::Backup(backup) => is_there(backup),
        HoldSubject::Wal { branch, start, .. } => *start >= state.trimmed_below(branch),
        HoldSubject::Stretch(stretch) => {
            let base = state.session(&stretch.base).map(|base| &base.open);
            let is_held = state.holds().any(|known| known.keeps_all_of(stretch));
            let is_whole = base.is_some_and(|open| open.wal_floor >= state.trimmed_below(&open.wal));
            is_there(&stretch.base) && (is_whole || is_held)
        }
    }
}
