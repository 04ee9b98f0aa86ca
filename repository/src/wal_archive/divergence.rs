//! Members of one timeline whose WAL differs: each branch that one of them left for its own, and what it had stored in the
//! other's before it knew.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};

use super::{ArchiveError, WalArchive};
use crate::format::wal_history::{Divergence, StoredHistory};
use crate::layout::TailName;
use crate::postgres::{Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};

/// Small objects, read at once.
const READS: usize = 8;

/// What lies under a branch's name and is another branch's WAL.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Strays {
    segments: BTreeSet<Lsn>,
    /// Of which segments which member's pieces.
    tails: BTreeSet<(Lsn, String)>,
}

impl Strays {
    /// Of one branch, by all divergences of its timeline.
    pub fn of<'a>(wal: WalBranch, divergences: impl IntoIterator<Item = &'a Divergence>) -> Strays {
        let mut strays = Strays::default();
        for left in divergences.into_iter().filter(|left| left.from == wal.branch) {
            strays.segments.extend(&left.strays);
            strays.tails.extend(left.stray_tails.iter().map(|start| (*start, left.member.clone())));
        }
        strays
    }

    pub fn holds(&self, segment: Segment, size: SegmentSize) -> bool {
        self.segments.contains(&segment.start(size))
    }

    /// Whether a segment, or the pieces of a member of it, are not the branch's.
    pub fn has(&self, segment: Segment, size: SegmentSize, member: &str) -> bool {
        self.holds(segment, size) || self.tails.contains(&(segment.start(size), member.to_owned()))
    }

    /// Without the pieces that are not the branch's.
    pub fn sift(&self, segment: Segment, size: SegmentSize, names: &mut Vec<TailName>) {
        let start = segment.start(size);
        names.retain(|name| !self.tails.contains(&(start, name.member.clone())));
    }
}

impl WalArchive {
    /// Makes the branch that a member's WAL goes to from its first difference on; returns once that is durable. Nothing of
    /// the branch is stored before. Made again with the same difference it is the same branch.
    pub async fn diverge(&self, from: WalBranch, divergence: &Divergence) -> Result<WalBranch, ArchiveError> {
        let wal = WalBranch { branch: divergence.branch(), ..from };
        let left = self.readable(self.stored_history(from).await)?.flatten();
        let history = StoredHistory {
            content: left.as_ref().map(|left| left.content.clone()).unwrap_or_else(Bytes::new),
            parent: left.and_then(|left| left.parent),
            member: divergence.member.clone(),
            shipped_at_us: divergence.found_at_us,
            divergence: Some(divergence.clone()),
        };
        self.create_history(wal, &history).await?;
        Ok(wal)
    }

    /// The branches of a timeline that others were left for. Costs a request, and one for each branch with a history.
    pub async fn divergences(
        &self,
        system_id: SystemId,
        timeline: Timeline,
    ) -> Result<Vec<(WalBranch, Divergence)>, ArchiveError> {
        let branches = self.branches(system_id).await?;
        let namesakes = branches.into_iter().filter(|wal| wal.timeline == timeline && !wal.is_first());
        let reads: Vec<_> = namesakes.map(|wal| self.clone().divergence_of(wal)).collect();
        let found: Vec<_> = futures::stream::iter(reads).buffered(READS).try_collect().await?;
        Ok(found.into_iter().flatten().collect())
    }

    async fn divergence_of(self, wal: WalBranch) -> Result<Option<(WalBranch, Divergence)>, ArchiveError> {
        let stored = self.readable(self.stored_history(wal).await)?.flatten();
        Ok(stored.and_then(|stored| stored.divergence).map(|divergence| (wal, divergence)))
    }

    /// What lies in a branch and is not its own.
    pub async fn strays(&self, wal: WalBranch) -> Result<Strays, ArchiveError> {
        let divergences = self.divergences(wal.system_id, wal.timeline).await?;
        Ok(Strays::of(wal, divergences.iter().map(|(_, divergence)| divergence)))
    }
}
