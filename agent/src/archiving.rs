//! Which shipper ships the WAL of which data directory: made when Postgres first asks, kept while nothing it depends on
//! changes. The shipping itself is `wal::ship`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::{Semaphore, watch};
use walfleet_repository::cluster::OpenCluster;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::kept::KeptCluster;
use walfleet_repository::postgres::{Lsn, SegmentSize, SystemId, Timeline};
use walfleet_repository::shipping::{ShippingSpec, Synchronous};

use crate::access::{Access, ClusterAccess};
use crate::limits::HostLimits;
use crate::postgres::control::ControlFile;
use crate::spool::files::Location;
use crate::tasks::on_disk;
use crate::wal::breaks::Breaks;
use crate::wal::fill::{Missing, fill};
use crate::wal::receive::StreamStatus;
use crate::wal::receive::known_place::{self, Kept};
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

/// What has been shipped of one cluster, both ways.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Shipping {
    pub archived: ShipStatus,
    pub streamed: StreamStatus,
    pub shipping: ShippingSpec,
    /// Whose WAL it is; `None`: nothing was made ready to ship it.
    pub system_id: Option<SystemId>,
    /// To the store, since the agent or its keys changed.
    pub requests: u64,
    /// How often a branch was left.
    pub partings: u64,
}

impl Shipping {
    /// Up to where WAL is surely stored, by each way it went. What a server wrote before it was restored or rolled back counts
    /// here, too.
    pub fn durable(&self) -> impl Iterator<Item = (Timeline, Lsn)> {
        let archived = self.archived.last_segment.map(|segment| (segment.timeline, self.archived.durable_lsn));
        let streamed = self.streamed.timeline.map(|timeline| (timeline, self.streamed.durable));
        archived.into_iter().chain(streamed)
    }

    pub fn stored_bytes(&self) -> u64 {
        self.archived.stored_bytes + self.streamed.stored_bytes
    }
}

pub struct Archiving {
    access: watch::Receiver<Option<Arc<Access>>>,
    options: ShipOptions,
    limits: Arc<HostLimits>,
    state_dir: PathBuf,
    /// One lock per data directory, so that one repository that hangs does not keep another instance waiting.
    slots: Mutex<HashMap<PathBuf, Arc<tokio::sync::Mutex<Option<Slot>>>>>,
    /// Made without asking the repository, of instances that have no slot meanwhile.
    bridges: Mutex<HashMap<PathBuf, Slot>>,
    /// Of clusters whose WAL is to be streamed and has no slot yet: why not.
    waiting: Mutex<HashMap<ClusterName, StreamStatus>>,
    /// One gap at a time: what is missing has waited already.
    filling: Arc<Semaphore>,
}

struct Slot {
    cluster: ClusterAccess,
    /// Of the key and its certificates: a renewed chain signs from then on.
    access: Arc<Access>,
    identity: ClusterIdentity,
    shipper: Arc<Shipper>,
    breaks: Arc<Breaks>,
    kept: Option<Arc<Kept>>,
}

/// What a receiver works with.
pub struct Receiving {
    pub shipper: Arc<Shipper>,
    pub breaks: Arc<Breaks>,
    pub kept: Option<Arc<Kept>>,
}

impl From<&Slot> for Receiving {
    fn from(slot: &Slot) -> Receiving {
        let Slot { shipper, breaks, kept, .. } = slot;
        Receiving { shipper: Arc::clone(shipper), breaks: Arc::clone(breaks), kept: kept.clone() }
    }
}

impl Archiving {
    pub fn new(
        access: watch::Receiver<Option<Arc<Access>>>,
        options: ShipOptions,
        limits: Arc<HostLimits>,
        state_dir: PathBuf,
    ) -> Archiving {
        let (slots, bridges, waiting) = (Mutex::default(), Mutex::default(), Mutex::default());
        let filling = Arc::new(Semaphore::new(1));
        Archiving { access, options, limits, state_dir, slots, bridges, waiting, filling }
    }

    /// What has been shipped of each cluster since the agent started; clusters whose WAL nobody asked for are not in it.
    pub fn statuses(&self) -> Vec<(ClusterName, Shipping)> {
        let slots: Vec<_> = self.slots.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        // One that is being made just now has nothing to say yet.
        let view = |slot: &Slot| {
            let shipping = Shipping {
                archived: slot.shipper.status().borrow().clone(),
                streamed: slot.shipper.stream().borrow().clone(),
                shipping: slot.cluster.shipping,
                system_id: Some(slot.identity.system_id),
                requests: slot.shipper.source().archive.store().counters().requests(),
                partings: slot.shipper.branches().partings(),
            };
            (slot.cluster.name.clone(), shipping)
        };
        let mut statuses: Vec<_> = slots.iter().filter_map(|slot| slot.try_lock().ok()?.as_ref().map(view)).collect();
        statuses.extend(self.bridges().values().map(view));
        let waiting = self.waiting().clone().into_iter();
        let waiting: Vec<_> =
            waiting.filter(|(cluster, _)| statuses.iter().all(|(known, _)| known != cluster)).collect();
        statuses.extend(waiting.into_iter().map(|(cluster, streamed)| {
            let shipping = self.spec_of(&cluster);
            (cluster, Shipping { streamed, shipping, ..Shipping::default() })
        }));
        statuses
    }

    /// No policy, or this host's configuration, has WAL of a cluster streamed; before that is known, it may.
    pub fn streams_nothing(&self, cluster: &ClusterName) -> bool {
        let access = self.access.borrow();
        let clusters = access.as_ref().map(|access| &access.clusters);
        clusters.is_some_and(|clusters| !clusters.get(cluster).is_some_and(ClusterAccess::is_to_be_streamed))
    }

    fn spec_of(&self, cluster: &ClusterName) -> ShippingSpec {
        let access = self.access.borrow();
        access
            .as_ref()
            .and_then(|access| access.clusters.get(cluster))
            .map(|cluster| cluster.shipping)
            .unwrap_or_default()
    }

    /// WAL of a cluster is to be streamed, and nothing can be made ready for that: this is why.
    pub fn wait_with(&self, cluster: &ClusterName, problem: String) {
        self.waiting().entry(cluster.clone()).or_default().wait(problem);
    }

    /// It was made ready, or is not wanted any more.
    pub fn wait_no_more(&self, cluster: &ClusterName) {
        self.waiting().remove(cluster);
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<ClusterName, StreamStatus>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bridges(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, Slot>> {
        self.bridges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores what of this the host still has, in the background; at once if it is not already at it.
    pub fn fill(&self, cluster: &ClusterName, missing: Vec<Missing>) {
        for shipper in self.shippers(cluster) {
            let (permit, missing) = (Arc::clone(&self.filling), missing.clone());
            tokio::spawn(async move {
                let Ok(_permit) = permit.try_acquire() else { return };
                for gap in missing {
                    if let Err(error) = fill(&shipper, gap).await {
                        tracing::warn!(from = %gap.from, to = %gap.to, "a gap in the archive is not filled: {error}");
                    }
                }
            });
        }
    }

    /// What was stored of a cluster's WAL is not in the repository any more: whoever receives it looks what is there, and goes on
    /// from that.
    pub fn begin_anew(&self, cluster: &ClusterName) {
        self.shippers(cluster).iter().for_each(|shipper| shipper.ask_to_begin_anew());
    }

    /// Those that are ready.
    fn shippers(&self, cluster: &ClusterName) -> Vec<Arc<Shipper>> {
        let slots: Vec<_> = self.slots.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let of_cluster = |slot: &Slot| (slot.cluster.name == *cluster).then(|| Arc::clone(&slot.shipper));
        slots.iter().filter_map(|slot| slot.try_lock().ok()?.as_ref().and_then(of_cluster)).collect()
    }

    /// With what an instance's WAL is received. An error: the repository does not answer, or something else is in the way.
    pub async fn receiving(&self, data_dir: &Path) -> Result<Receiving, String> {
        self.shipper(data_dir).await?;
        let slot = self.slot(&real(data_dir));
        let slot = slot.lock().await;
        self.bridges().remove(&real(data_dir));
        slot.as_ref().map(Receiving::from).ok_or_else(|| "it is being made".to_owned())
    }

    /// The same without asking the repository, for what can be done until it answers: by what this host has noted.
    pub async fn bridging(&self, data_dir: &Path) -> Result<Receiving, String> {
        let (access, cluster, identity, asked) = self.found(data_dir).await?;
        if let Some(bridge) = self.bridges().get(&asked).filter(|slot| slot.still_fits(&access, &cluster, identity)) {
            return Ok(bridge.into());
        }
        let (state_dir, name) = (self.state_dir.clone(), cluster.name.clone());
        let read = on_disk(move || known_place::read(&state_dir, &name)).await.map_err(|error| error.to_string())?;
        let repository = &cluster.repository;
        let place = read.filter(|place| place.repository == Location::from(&**repository));
        let place = place.ok_or("it has not taken any of this server's WAL that this agent knows of")?;
        let store = repository.store().map_err(|error| error.to_string())?;
        let open = place.cluster.open((store, repository.root), cluster.name.clone(), &access.key.file.recipient);
        let open = open.await.map_err(|error| error.to_string())?;
        let kept = Kept { repository: place.repository, cluster: place.cluster };
        let made = self.slot_of(open, (access, cluster), identity, (&asked, Some(Arc::new(kept))))?;
        let receiving = Receiving::from(&made);
        self.bridges().insert(asked, made);
        Ok(receiving)
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
        let open = open.map_err(|error| error.to_string())?;
        let kept = match cluster.shipping.synchronous {
            Some(Synchronous::Spool) => {
                let kept = KeptCluster::of(&open, access.key.file.recipient.id()).await;
                let cluster_kept = kept.map_err(|error| error.to_string())?;
                Some(Arc::new(Kept { repository: Location::from(&*cluster.repository), cluster: cluster_kept }))
            }
            _ => None,
        };
        tracing::info!(cluster = %cluster.name, data_dir = %data_dir.display(), repository = cluster.repository.name,
            "archiving WAL");
        self.slot_of(open, (access, cluster), identity, (data_dir, kept))
    }

    fn slot_of(
        &self,
        open: OpenCluster,
        (access, cluster): (Arc<Access>, ClusterAccess),
        identity: ClusterIdentity,
        (data_dir, kept): (&Path, Option<Arc<Kept>>),
    ) -> Result<Slot, String> {
        let archive = open.wal_archive(cluster.compression_level);
        let breaks = Breaks {
            state_dir: self.state_dir.clone(),
            signer: access.key.signer().map_err(|error| error.to_string())?,
            cluster: open,
            member: access.member.clone(),
        };
        let source = ShipSource {
            data_dir: data_dir.to_owned(),
            system_id: identity.system_id,
            segment_size: identity.segment_size,
            archive,
            member: access.member.clone(),
            compression: cluster.shipping.compression.unwrap_or_default(),
            limits: Arc::clone(&self.limits),
        };
        let shipper = Shipper::new(source, self.options);
        Ok(Slot { cluster, access, identity, shipper, breaks: Arc::new(breaks), kept })
    }

    /// Whose a data directory is, and its path through links.
    async fn found(&self, data_dir: &Path) -> Result<(Arc<Access>, ClusterAccess, ClusterIdentity, PathBuf), String> {
        let access = self.access.borrow().clone().ok_or(
            "this agent has not heard yet which clusters it is a member of\n\
             HINT: it must reach its controller once; Postgres keeps the WAL and tries again.",
        )?;
        let asked = real(data_dir);
        let cluster = owner(&access, &asked).cloned().ok_or_else(|| {
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
        Ok((access, cluster, identity, asked))
    }
}

#[async_trait]
impl Shippers for Archiving {
    async fn shipper(&self, data_dir: &Path) -> Result<Arc<Shipper>, String> {
        let (access, cluster, identity, asked) = self.found(data_dir).await?;
        let slot = self.slot(&asked);
        let mut slot = slot.lock().await;
        if let Some(slot) = slot.as_ref().filter(|slot| slot.still_fits(&access, &cluster, identity)) {
            return Ok(Arc::clone(&slot.shipper));
        }
        let made = self.make(access, cluster, identity, &asked).await?;
        Ok(Arc::clone(&slot.insert(made).shipper))
    }
}

impl Slot {
    /// A receiver is made anew for the same reasons (`streaming::Terms`), or it would go on with another shipper than the
    /// others use.
    fn still_fits(&self, access: &Arc<Access>, cluster: &ClusterAccess, identity: ClusterIdentity) -> bool {
        let same_key = Arc::ptr_eq(&self.access, access)
            || (self.access.key.path == access.key.path && self.access.key.chain == access.key.chain);
        let known = &self.cluster;
        let same_cluster = known.name == cluster.name
            && known.repository == cluster.repository
            && known.compression_level == cluster.compression_level
            && known.shipping == cluster.shipping;
        same_key && same_cluster && self.identity == identity
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
