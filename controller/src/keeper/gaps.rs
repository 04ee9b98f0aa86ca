//! Gaps that somebody knows of, said in the repository: so that it can be read there after a loss of the controller, too.

use walfleet_repository::format::gap_note::{GapNote, GapNoteKind};
use walfleet_repository::gap_notes;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::{Branch, SystemId, Timeline, WalBranch};

use super::{Keeper, KeeperError};
use crate::fleet::recovery::{self, WalGap};
use crate::resources::RepositorySpec;

/// An operator knows of a gap.
pub struct Acknowledgement<'a> {
    pub cluster: &'a ClusterName,
    pub gap: &'a WalGap,
    pub system_identifier: Option<u64>,
    pub note: &'a recovery::GapNote,
}

impl Keeper {
    /// Returns once it is durable; cancelled, it may be there or not, and can be said again.
    pub async fn acknowledge(
        &self,
        name: &str,
        spec: &RepositorySpec,
        said: &Acknowledgement<'_>,
    ) -> Result<(), KeeperError> {
        let at_us = said.note.at.as_microsecond();
        let note = GapNote {
            cluster: said.cluster.clone(),
            wal: branch(said)?,
            from: said.gap.from_lsn,
            to: said.gap.to_lsn,
            kind: GapNoteKind::Acknowledged,
            by: said.note.by.clone(),
            reason: said.note.reason.clone(),
            at_us,
            since_us: at_us,
        };
        let repository = self.open(name, spec, said.note.at).await?;
        Ok(gap_notes::store(&repository, self.reconciler.keeper.signer(), &note).await?)
    }
}

/// As the agent told it.
fn branch(said: &Acknowledgement<'_>) -> Result<WalBranch, KeeperError> {
    let unclear = || KeeperError::Gap { cluster: said.cluster.clone(), branch: said.gap.branch.clone() };
    let system_id = SystemId(said.system_identifier.ok_or_else(unclear)?);
    let timeline = Timeline::new(said.gap.timeline).map_err(|_| unclear())?;
    let branch: Branch = said.gap.branch.parse().map_err(|_| unclear())?;
    Ok(WalBranch { system_id, timeline, branch })
}
