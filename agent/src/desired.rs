//! What the controller wants of this host, kept on disk so that the agent works on without it, through restarts too.
//!
//! Guarded twice: a controller whose epoch is older than one obeyed before is refused, and so is a desired state of an
//! older generation. Nothing here acts on the desired state.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::limits::LimitsSpec;
use walfleet_repository::shipping::ShippingSpec;

use crate::durable::{self, DurableError, FileKind};

const KIND: FileKind = FileKind { name: "desired", version: 1 };
const FILE: &str = "desired.json";

/// Everything the agent must know to work alone.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Desired {
    /// Grows with every change.
    pub generation: u64,
    pub repositories: Vec<DesiredRepository>,
    pub clusters: Vec<DesiredCluster>,
    /// Encoded writer certificates for this agent, leaf first, ending with the one that the root key signed.
    pub writer_chain: Vec<Vec<u8>>,
    /// Those of the policies that bind this host's own clusters, taken together. Absent in files of earlier agents.
    #[serde(default)]
    pub limits: LimitsSpec,
    /// What this host's spool keeps for others. Absent in files of earlier agents.
    #[serde(default)]
    pub spools: Vec<DesiredSpool>,
}

/// Pieces of a cluster's WAL that other hosts may bring.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DesiredSpool {
    pub cluster: ClusterName,
    /// A name in `repositories`.
    pub repository: String,
    pub system_identifier: u64,
    pub agents: Vec<String>,
}

/// The agent that keeps what the repository may lack beside this one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpoolPeer {
    pub agent: String,
    /// "host:port"
    pub address: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DesiredRepository {
    pub name: String,
    pub url: String,
    /// Never credentials.
    pub options: BTreeMap<String, String>,
    /// The root key that the repository's own root object must name.
    pub root_public_key: [u8; 32],
}

/// A cluster that this agent has an instance of, or may restore.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DesiredCluster {
    pub name: ClusterName,
    /// A name in `repositories`.
    pub repository: String,
    /// `None`: bound by the agent's own configuration only.
    pub data_dir: Option<PathBuf>,
    pub recipients: Vec<Recipient>,
    pub compression_level: Option<i32>,
    pub processes: Option<u32>,
    /// Whether an instance of this cluster lives here; else only the right to restore it.
    pub member: bool,
    /// As the policy has it.
    #[serde(default)]
    pub shipping: ShippingSpec,
    /// Other clusters of the repository with its system identifier; `None`: the controller does not know that yet.
    #[serde(default)]
    pub relatives: Option<Vec<ClusterName>>,
    /// Of members whose commits wait for spools.
    #[serde(default)]
    pub spool_peer: Option<SpoolPeer>,
}

/// Whom the cluster's domain key must be wrapped for, beside the recovery key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Recipient {
    pub label: String,
    pub public_key: [u8; 32],
}

/// What is on disk: the last state accepted, and the newest controller obeyed.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Kept {
    leader_epoch: u64,
    desired: Option<Desired>,
}

/// Why a message of the controller is not obeyed.
#[derive(Debug, thiserror::Error)]
pub enum RefusedDesired {
    #[error(
        "controller of epoch {found} is older than epoch {obeyed}, which this agent has obeyed\nHINT: a controller that lost its election, or was restored from an old copy, is running; stop it, or join again."
    )]
    OldEpoch { found: u64, obeyed: u64 },
    #[error("desired state of generation {found} is older than {held}, which this agent holds")]
    OldGeneration { found: u64, held: u64 },
    #[error(transparent)]
    Durable(#[from] DurableError),
}

/// The desired state of this host, on disk and in memory alike.
pub struct DesiredStore {
    path: PathBuf,
    kept: std::sync::Mutex<Kept>,
    current: watch::Sender<Option<Arc<Desired>>>,
}

impl DesiredStore {
    pub fn open(state_dir: &Path) -> Result<DesiredStore, DurableError> {
        let path = state_dir.join(FILE);
        let kept: Kept = durable::read(&path, KIND)?.unwrap_or_default();
        let current = watch::Sender::new(kept.desired.clone().map(Arc::new));
        Ok(DesiredStore { path, kept: std::sync::Mutex::new(kept), current })
    }

    /// Forgets everything: after a join, another fleet may count anew.
    pub fn clear(state_dir: &Path) -> Result<(), DurableError> {
        durable::remove(&state_dir.join(FILE))
    }

    /// The latest accepted; `None` before the first.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Desired>>> {
        self.current.subscribe()
    }

    /// Notes a controller's epoch, or refuses it. Syncs a file if it is new.
    pub fn obey_epoch(&self, epoch: u64) -> Result<(), RefusedDesired> {
        let mut kept = self.lock();
        if epoch < kept.leader_epoch {
            return Err(RefusedDesired::OldEpoch { found: epoch, obeyed: kept.leader_epoch });
        }
        if epoch > kept.leader_epoch {
            let next = Kept { leader_epoch: epoch, ..kept.clone() };
            durable::write(&self.path, KIND, &next)?;
            *kept = next;
        }
        Ok(())
    }

    /// Makes a desired state the current one once it is durable; the same again changes nothing. Syncs a file.
    pub fn accept(&self, desired: Desired) -> Result<(), RefusedDesired> {
        let mut kept = self.lock();
        if let Some(held) = &kept.desired {
            if desired.generation < held.generation {
                return Err(RefusedDesired::OldGeneration { found: desired.generation, held: held.generation });
            }
            if desired == *held {
                return Ok(());
            }
        }
        let next = Kept { desired: Some(desired.clone()), ..kept.clone() };
        durable::write(&self.path, KIND, &next)?;
        *kept = next;
        self.current.send_replace(Some(Arc::new(desired)));
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        // Replaced whole, so a panic elsewhere leaves it consistent.
        self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_generations_and_epochs_are_refused_after_a_restart_too() {
        let folder = tempfile::tempdir().unwrap();
        let store = DesiredStore::open(folder.path()).unwrap();
        store.obey_epoch(4).unwrap();
        store.accept(Desired { generation: 7, ..Desired::default() }).unwrap();
        drop(store);

        let store = DesiredStore::open(folder.path()).unwrap();
        assert_eq!(store.watch().borrow().as_ref().unwrap().generation, 7);
        assert!(matches!(store.obey_epoch(3), Err(RefusedDesired::OldEpoch { found: 3, obeyed: 4 })));
        let older = Desired { generation: 6, ..Desired::default() };
        assert!(matches!(store.accept(older), Err(RefusedDesired::OldGeneration { found: 6, held: 7 })));
        store.accept(Desired { generation: 7, ..Desired::default() }).unwrap();
        store.accept(Desired { generation: 8, ..Desired::default() }).unwrap();
        store.obey_epoch(4).unwrap();
    }
}
