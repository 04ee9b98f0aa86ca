//! What a prefix of a cluster's log amounts to: sessions and backups, keys, holds, trims and borrowings.
//!
//! Only [`super::fold`] changes it. Questions are answered from the prefix alone: no clock, no listing.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::log_entry::{Hold, Open};
use crate::ids::{BackupId, ClusterName, Digest, DomainId, HoldId, PackId};
use crate::postgres::{Lsn, SystemId, WalBranch};

/// The fold of the first `next()` entries.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug)]
pub struct ClusterState {
    pub(super) next: u64,
    pub(super) keys: Option<DomainKeys>,
    pub(super) keeper_epoch: u64,
    pub(super) sessions: BTreeMap<BackupId, Session>,
    pub(super) holds: BTreeMap<HoldId, Hold>,
    pub(super) trims: BTreeMap<WalBranch, Lsn>,
    pub(super) borrowed: BTreeMap<Borrowed, HoldId>,
    pub(super) moved: BTreeMap<PackId, BackupId>,
    pub(super) voids: u64,
    /// The rule that this fold leaves out, so that tests can show what it is good for.
    #[cfg(test)]
    pub(super) dropped: Option<super::fold::Rule>,
}

/// The domain that all of the cluster's data is sealed in.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct DomainKeys {
    pub domain: DomainId,
    /// What each version of the domain key must answer to; the newest seals.
    pub commitments: BTreeMap<u32, [u8; 32]>,
}

impl DomainKeys {
    pub fn newest_version(&self) -> u32 {
        self.commitments.last_key_value().map_or(0, |(version, _)| *version)
    }
}

/// When and by whom an accepted entry was written.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Stamp {
    /// The order in which things happened.
    pub sequence: u64,
    /// The writer's claim, microseconds since the Unix epoch.
    pub at_us: i64,
    pub by: String,
}

/// A session and, once committed, its backup: they share one id.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Session {
    pub open: Open,
    pub opened: Stamp,
    pub state: SessionState,
    /// Backups of other clusters that this one may refer to, by itself or through its parents.
    pub borrowed: BTreeSet<Borrowed>,
}

/// Where a session stands. All of it is in the log.
///
/// ```text
/// Open ──commit──▶ Live ──expire──▶ Expired ──purge──▶ Purged
///   └───abort───▶ Aborted   ◀─undelete──┘
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum SessionState {
    /// Its agent writes. Ended by its agent's commit, or by an abort of the agent or the keeper.
    Open,
    /// Nothing of it is ever needed.
    Aborted { reason: String },
    /// A backup that can be restored, and be a parent.
    Live(Committed),
    /// In the trash: still restorable and still counted, but no longer a parent.
    Expired(Committed, Expiry),
    /// Its packs may go.
    Purged,
}

/// What a commit fixed.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Committed {
    pub manifest_digest: Digest,
    pub reference_digest: Digest,
    pub stamp: Stamp,
}

/// Why a backup lies in the trash, and since when.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Expiry {
    pub reason: String,
    pub stamp: Stamp,
}

/// A backup of another cluster.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Borrowed {
    pub cluster: ClusterName,
    pub backup: BackupId,
}

impl Session {
    pub fn id(&self) -> &BackupId {
        &self.open.session
    }

    /// The commit of a backup that is not purged.
    pub fn committed(&self) -> Option<&Committed> {
        match &self.state {
            SessionState::Live(committed) | SessionState::Expired(committed, _) => Some(committed),
            SessionState::Open | SessionState::Aborted { .. } | SessionState::Purged => None,
        }
    }

    pub fn is_open(&self) -> bool {
        self.state == SessionState::Open
    }

    pub fn is_live(&self) -> bool {
        matches!(self.state, SessionState::Live(_))
    }

    /// Whether anything may still be read for its sake: it is open, or its backup is not purged.
    pub fn needs_content(&self) -> bool {
        self.is_open() || self.committed().is_some()
    }
}

impl ClusterState {
    /// The number of the next entry: how many were folded.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The domain and its key versions; `None` before the log was begun.
    pub fn keys(&self) -> Option<&DomainKeys> {
        self.keys.as_ref()
    }

    /// The newest keeper's election revision seen.
    pub fn keeper_epoch(&self) -> u64 {
        self.keeper_epoch
    }

    /// Entries that were void.
    pub fn voids(&self) -> u64 {
        self.voids
    }

    pub fn session(&self, id: &BackupId) -> Option<&Session> {
        self.sessions.get(id)
    }

    pub fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.sessions.values()
    }

    pub fn open_sessions(&self) -> impl Iterator<Item = &Session> {
        self.sessions.values().filter(|session| session.is_open())
    }

    /// Committed and not purged, in the order in which the log saw the commits: not what a host's clock claims.
    pub fn backups(&self) -> Vec<(&Session, &Committed)> {
        let mut backups: Vec<_> =
            self.sessions.values().filter_map(|session| Some((session, session.committed()?))).collect();
        backups.sort_by_key(|(_, committed)| committed.stamp.sequence);
        backups
    }

    /// Backups of this cluster that a session may name as parents now, newest first.
    pub fn live_parents_for(&self, system_id: SystemId) -> Vec<&Session> {
        let live = self.backups().into_iter().rev().map(|(session, _)| session);
        live.filter(|session| session.is_live() && session.open.wal.system_id == system_id).collect()
    }

    /// Whether a session or its backup serves the scheduled run already.
    pub fn serving(&self, run: &str) -> Option<&Session> {
        let serves = |session: &&Session| {
            session.open.run.as_deref() == Some(run) && !matches!(session.state, SessionState::Aborted { .. })
        };
        self.sessions.values().find(serves)
    }

    pub fn holds(&self) -> impl Iterator<Item = &Hold> {
        self.holds.values()
    }

    pub fn is_held(&self, backup: &BackupId) -> bool {
        self.holds.values().any(|hold| hold.backup() == Some(backup))
    }

    /// Below it, WAL of the branch may be gone, but for the stretches that unpurged backups, open sessions and holds need.
    pub fn trimmed_below(&self, branch: &WalBranch) -> Lsn {
        self.trims.get(branch).copied().unwrap_or(Lsn::INVALID)
    }

    /// Every trimmed branch, and below what.
    pub fn trims(&self) -> &BTreeMap<WalBranch, Lsn> {
        &self.trims
    }

    /// Backups of other clusters that may be named as parents now, each with the hold that keeps it there.
    pub fn borrowed(&self) -> impl Iterator<Item = (&Borrowed, &HoldId)> {
        self.borrowed.iter()
    }

    /// Where a repaired pack lies, if it was moved.
    pub fn moved(&self, pack: &PackId) -> Option<&BackupId> {
        self.moved.get(pack)
    }

    /// Every borrowed backup that a parent stands for.
    pub(super) fn borrowed_through(&self, parents: &[BackupId]) -> BTreeSet<Borrowed> {
        let through = |parent: &BackupId| match self.sessions.get(parent) {
            Some(session) => session.borrowed.clone(),
            None => self.borrowed.keys().filter(|borrowed| borrowed.backup == *parent).cloned().collect(),
        };
        parents.iter().flat_map(through).collect()
    }
}
