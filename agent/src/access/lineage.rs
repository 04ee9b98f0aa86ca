//! Whose copy a cluster of this host may be, and opening it for writing: the first to do so begins the cluster's log, and
//! with that decides for good whether it shares a relative's key.

use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::cluster_log::Author;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::lineage::Kin;

use super::{Access, AccessError, ClusterAccess};
use crate::postgres::control::ControlFile;

/// Clusters that one of this host may be a copy of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Relatives {
    /// Any of the repository; its key has to open for this host.
    Any,
    /// Those that the controller names.
    Named(Vec<ClusterName>),
    /// The controller has not seen the cluster's system identifier yet.
    NotKnownYet,
    /// The configuration keeps the cluster apart.
    None,
}

impl ClusterAccess {
    /// Whose copy it may be, by the system identifier in its data directory.
    pub fn kin(&self) -> Result<Option<Kin>, AccessError> {
        let unknown = |problem: String| AccessError::Lineage { cluster: self.name.clone(), problem };
        let clusters = match &self.relatives {
            Relatives::None => return Ok(None),
            Relatives::Any => None,
            Relatives::Named(names) => Some(names.clone()),
            Relatives::NotKnownYet => return Err(unknown("the controller has not told it yet".to_owned())),
        };
        let Some(instance) = &self.instance else { return Err(unknown("no instance of it lives here".to_owned())) };
        let control = ControlFile::read(&instance.data_dir).map_err(|error| unknown(error.to_string()))?;
        Ok(Some(Kin { system_id: control.system_id, clusters }))
    }
}

impl Access {
    /// Opens a cluster for writing; the first to do so decides on its keys.
    pub async fn open_or_begin(&self, cluster: &ClusterAccess) -> Result<OpenCluster, AccessError> {
        let repository = cluster.repository.open().await?;
        let recipient = &self.key.file.recipient;
        match OpenCluster::open(repository.clone(), cluster.name.clone(), recipient).await {
            Err(ClusterError::Unknown(_)) => {}
            opened => return Ok(opened?),
        }
        let (kin, signer) = (cluster.kin()?, self.key.signer()?);
        let (name, author) = (cluster.name.clone(), Author::host(&signer));
        Ok(OpenCluster::open_or_begin(repository, name, recipient, author, (&self.member, kin.as_ref())).await?)
    }
}
