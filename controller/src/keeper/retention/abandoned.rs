//! Sessions that nobody ends: their host is gone, and no job of ours knows of them. While one is open, nothing that it may
//! refer to is let go of.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use walfleet_repository::cluster_log::{Author, ClusterLog, ClusterState};
use walfleet_repository::format::log_entry::Action;
use walfleet_repository::ids::BackupId;
use walfleet_repository::layout;
use walfleet_repository::open::Repository;
use walfleet_repository::retention::gather::GatherError;

use super::{Keeper, KeeperError};

/// By the store's clock. A backup that takes longer is begun anew: it costs a retry, and nothing else.
const ABANDONED: SignedDuration = SignedDuration::from_hours(14 * 24);

impl Keeper {
    /// Ends them; returns how many there were.
    pub(super) async fn end_abandoned(
        &self,
        repository: &Repository,
        log: &mut ClusterLog,
        now: Timestamp,
    ) -> Result<usize, KeeperError> {
        let served: BTreeSet<String> = self.reconciler.jobs.active().await?.iter().map(|job| job.run_name()).collect();
        let is_served = |run: &Option<String>| run.as_ref().is_some_and(|run| served.contains(run));
        let open = log.state().open_sessions().filter(|session| !is_served(&session.open.run));
        let open: Vec<(BackupId, u64)> = open.map(|session| (session.id().clone(), session.opened.sequence)).collect();
        let mut ended = 0;
        for (session, sequence) in open {
            let key = layout::log_entry(log.cluster(), sequence);
            let listed = repository.store().listed(&key).await.map_err(GatherError::from)?;
            let since = listed.and_then(|listed| Timestamp::from_microsecond(listed.last_modified_us).ok());
            if since.is_none_or(|since| now.duration_since(since) < ABANDONED) {
                continue;
            }
            let reason = format!("open for more than {} days, and no job of the controller", ABANDONED.as_hours() / 24);
            let author = Author::keeper(self.reconciler.keeper.signer(), self.reconciler.epoch);
            let abort = |state: &ClusterState| {
                let is_open = state.session(&session).is_some_and(|session| session.is_open());
                is_open.then(|| Action::Abort { session: session.clone(), reason: reason.clone() })
            };
            log.append_unless_done(author, abort).await?;
            tracing::warn!(cluster = %log.cluster(), %session, "ended a backup that nobody goes on with");
            ended += 1;
        }
        Ok(ended)
    }
}
