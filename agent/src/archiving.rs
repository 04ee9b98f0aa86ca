//! Which shipper ships the WAL of which data directory: made when Postgres first asks, kept while nothing it depends on
//! changes. The shipping itself is `wal::ship`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::{SegmentSize, SystemId};

use crate::access::{Access, ClusterAccess};
use crate::limits::HostLimits;
use crate::postgres::control::ControlFile;
use crate::wal::ship::{ShipOptions, ShipSource, ShipStatus, Shipper};
use crate::wal::socket::Shippers;

/// What a data directory says of itself: its pg_control.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClusterIdentity {
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
}

impl ClusterIdentity {
    /// Reads pg_control; the error is for the person who reads Postgres's log.
    pub fn read(data_dir: &Path) -> Result<ClusterIdentity, String> {
        let control = ControlFile::read(data_dir).map_err(|error| error.to_string())?;
        Ok(ClusterIdentity { system_id: control.system_id, segment_size: control.wal_segment_size })
    }
}

pub struct Archiving {
    access: watch::Receiver<Option<Arc<Access>>>,
    options: ShipOptions,
    limits: Arc<HostLimits>,
    /// One lock per data directory, so that one repository that hangs does not keep another instance waiting.
    slots: Mutex<HashMap<PathBuf, Arc<tokio::sync::Mutex<Option<Slot>>>>>,
}

struct Slot {
    cluster: ClusterAccess,
    /// Of the key and its certificates: a renewed chain signs from then on.
    access: Arc<Access>,
    identity: ClusterIdentity,
    shipper: Arc<Shipper>,
}

impl Archiving {
    pub fn new(
        access: watch::Receiver<Option<Arc<Access>>>,
        options: ShipOptions,
        limits: Arc<HostLimits>,
    ) -> Archiving {
        Archiving { access, options, limits, slots: Mutex::default() }
    }

    /// What has been shipped of each cluster since the agent started; clusters that never asked are not in it.
    pub fn statuses(&self) -> Vec<(ClusterName, ShipStatus)> {
        let slots: Vec<_> = self.slots.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        // One that is being made just now has nothing to say yet.
        let view = |slot: &Slot| (slot.cluster.name.clone(), slot.shipper.status().borrow().clone());
        slots.iter().filter_map(|slot| slot.try_lock().ok()?.as_ref().map(view)).collect()
    }

    fn slot(&self, data_dir: &Path) -> Arc<tokio::sync::Mutex<Option<Slot>>> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(slots.entry(data_dir.to_owned()).or_default())
    }

    async fn make(
        &self,
        access: Arc<Access>,
        cluster: ClusterAccess,
        identity: ClusterIdentity,
        data_dir: &Path,
    ) -> Result<Slot, String> {
        let open = access.open_or_begin(&cluster).await;
        let archive = open.map_err(|error| error.to_string())?.wal_archive(cluster.compression_level);
        let source = ShipSource {
            data_dir: data_dir.to_owned(),
            system_id: identity.system_id,
            segment_size: identity.segment_size,
            archive,
            member: access.member.clone(),
            limits: Arc::clone(&self.limits),
        };
        tracing::info!(cluster = %cluster.name, data_dir = %data_dir.display(), repository = cluster.repository.name,
            "archiving WAL");
        let shipper = Shipper::new(source, self.options);
        Ok(Slot { cluster, access, identity, shipper })
    }
}

#[async_trait]
impl Shippers for Archiving {
    async fn shipper(&self, data_dir: &Path) -> Result<Arc<Shipper>, String> {
        let access = self.access.borrow().clone().ok_or(
            "this agent has not heard yet which clusters it is a member of\n\
             HINT: it must reach its controller once; Postgres keeps the WAL and tries again.",
        )?;
        let asked = real(data_dir);
        let cluster = owner(&access, &asked).ok_or_else(|| {
            format!(
                "{} belongs to no cluster of this agent\n\
                 HINT: name it in the agent's instances; at the controller, make this agent a member of its cluster.",
                asked.display()
            )
        })?;
        let folder = asked.clone();
        // 8 KiB a segment; notices a pg_upgrade or another initdb in the same place.
        let identity = tokio::task::spawn_blocking(move || ClusterIdentity::read(&folder));
        let identity = identity.await.map_err(|error| error.to_string())??;
        let slot = self.slot(&asked);
        let mut slot = slot.lock().await;
        if let Some(slot) = slot.as_ref().filter(|slot| slot.still_fits(&access, cluster, identity)) {
            return Ok(Arc::clone(&slot.shipper));
        }
        let made = self.make(Arc::clone(&access), cluster.clone(), identity, &asked).await?;
        Ok(Arc::clone(&slot.insert(made).shipper))
    }
}

impl Slot {
    fn still_fits(&self, access: &Arc<Access>, cluster: &ClusterAccess, identity: ClusterIdentity) -> bool {
        let same_key = Arc::ptr_eq(&self.access, access)
            || (self.access.key.path == access.key.path && self.access.key.chain == access.key.chain);
        same_key && self.cluster == *cluster && self.identity == identity
    }
}

/// The cluster whose instance lies in that data directory.
fn owner<'a>(access: &'a Access, data_dir: &Path) -> Option<&'a ClusterAccess> {
    access
        .clusters
        .values()
        .find(|cluster| cluster.instance.as_ref().is_some_and(|instance| real(&instance.data_dir) == *data_dir))
}

/// Through links, so that the configured path and Postgres's working directory are one.
fn real(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}
