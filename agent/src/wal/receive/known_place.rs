//! Where a server's WAL went when the repository last took some of it, noted on this host: what lets its pieces go on under the
//! right names while the repository does not answer ([`super::bridge`]).

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::kept::KeptCluster;
use walfleet_repository::postgres::{Branch, Lsn, Segment, SystemId, Timeline, WalBranch};

use crate::durable::{self, DurableError, FileKind};
use crate::spool::files::Location;

const KIND: FileKind = FileKind { name: "wal-place", version: 1 };

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KnownPlace {
    pub repository: Location,
    pub system_id: u64,
    pub timeline: u32,
    /// To which everything from `first` on goes.
    pub branch: [u8; 8],
    /// Number of a segment.
    pub first: u64,
    pub slot: String,
    /// Of the server, when this was noted: one whose last checkpoint is older was rolled back since.
    pub checkpoint_lsn: Lsn,
    /// The keys.
    pub cluster: KeptCluster,
}

/// What of it does not depend on the server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kept {
    pub repository: Location,
    pub cluster: KeptCluster,
}

impl KnownPlace {
    pub fn wal(&self) -> Option<WalBranch> {
        let timeline = Timeline::new(self.timeline).ok()?;
        Some(WalBranch { system_id: SystemId(self.system_id), timeline, branch: Branch(self.branch) })
    }

    fn is_same_way(&self, other: &KnownPlace) -> bool {
        *self
            == KnownPlace {
                first: self.first,
                checkpoint_lsn: self.checkpoint_lsn,
                cluster: self.cluster.clone(),
                ..other.clone()
            }
    }

    /// Whether a segment goes there.
    pub fn has(&self, segment: Segment) -> bool {
        segment.timeline.0 == self.timeline && segment.number >= self.first
    }
}

fn file(state_dir: &Path, cluster: &ClusterName) -> PathBuf {
    state_dir.join("wal-places").join(cluster.as_str())
}

/// `None`: not known.
pub fn read(state_dir: &Path, cluster: &ClusterName) -> Result<Option<KnownPlace>, DurableError> {
    durable::read(&file(state_dir, cluster), KIND)
}

/// Blocking. What was noted of the same way from an earlier segment on still holds: a slot stands further back after a crash of its
/// server, which saves it at checkpoints (src/backend/replication/slot.c).
pub fn write(state_dir: &Path, cluster: &ClusterName, mut place: KnownPlace) -> Result<(), DurableError> {
    let path = file(state_dir, cluster);
    let known: Option<KnownPlace> = durable::read(&path, KIND).ok().flatten();
    if let Some(known) = known.as_ref().filter(|known| known.is_same_way(&place)) {
        place.first = place.first.min(known.first);
    }
    if known.as_ref() == Some(&place) {
        return Ok(());
    }
    durable::make_folder(&state_dir.join("wal-places"))?;
    durable::write(&path, KIND, &place)
}

/// It is not known any more. Blocking.
pub fn forget(state_dir: &Path, cluster: &ClusterName) {
    // One that is damaged counts as little as none.
    let _ = std::fs::remove_file(file(state_dir, cluster));
}
