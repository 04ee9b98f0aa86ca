//! Where a server's WAL lies, or will. Looked up where the shipper runs: a backup that asks runs on threads that may have to wait.

use std::sync::Arc;

use walfleet_repository::postgres::{Branch, Segment, Timeline, WalBranch};

use super::{ShipError, Shipper};
use crate::tasks;
use crate::wal::read::read_small;

impl Shipper {
    /// Where a segment of this server's lies, or will.
    pub async fn home(self: &Arc<Self>, segment: Segment) -> Result<WalBranch, ShipError> {
        let shipper = Arc::clone(self);
        tasks::settled(self.runtime.spawn(async move { shipper.find_home(segment).await })).await
    }

    /// Where this server's newest WAL of a segment's timeline goes.
    pub async fn newest_branch(self: &Arc<Self>, segment: Segment) -> Result<WalBranch, ShipError> {
        let shipper = Arc::clone(self);
        tasks::settled(self.runtime.spawn(async move {
            let base = shipper.find_branch(segment.timeline).await?;
            shipper.branches.newest(base, segment).await
        }))
        .await
    }

    pub(super) async fn find_home(&self, segment: Segment) -> Result<WalBranch, ShipError> {
        let base = self.find_branch(segment.timeline).await?;
        self.branches.home(base, segment).await
    }

    /// A timeline's own branch, where its WAL lies unless another member stored other records there: said by the history file
    /// that lies in `pg_wal` at this moment, since a host can be rewound and promoted to the same number again. It is archived
    /// before any of the timeline's segments.
    pub async fn branch(self: &Arc<Self>, timeline: Timeline) -> Result<WalBranch, ShipError> {
        let shipper = Arc::clone(self);
        tasks::settled(self.runtime.spawn(async move { shipper.find_branch(timeline).await })).await
    }

    pub(super) async fn find_branch(&self, timeline: Timeline) -> Result<WalBranch, ShipError> {
        let system_id = self.source.system_id;
        if timeline == Timeline::FIRST {
            return Ok(WalBranch { system_id, timeline, branch: Branch::ROOT });
        }
        let content = read_small(&self.source.data_dir, &timeline.history_name()).await?;
        let content = content.ok_or(ShipError::NoHistory(timeline))?;
        let (wal, _) = self.branches.store_history(timeline, &content).await?;
        Ok(wal)
    }
}
