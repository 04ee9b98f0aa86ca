//! What this host may use: the clusters that live here or may be restored here, the repositories they lie in, and the
//! key that opens them. From the agent's configuration on a host without a controller, from the desired state else.
//!
//! Working it out is pure; opening a repository or a cluster is here too, so that everyone opens them alike: with the
//! root key that is expected, and with this host's own certificates.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::key_file::{KeyFile, KeyFileError};
use walfleet_repository::open::{Repository, RepositoryError};
use walfleet_repository::shipping::{ShippingSpec, Streaming};
use walfleet_repository::signature::{Certificate, PublicKey, SignatureError, Signer};
use walfleet_repository::store::{Store, StoreError, StoreOptions};

use crate::config::{Config, Lineage, RepositoryConfig};
use crate::desired::{Desired, DesiredCluster, Recipient};
use crate::failure::{ExitCode, Failure, Remedy};
use crate::identity::Identity;
use lineage::Relatives;

pub mod grant;
pub mod instance;
pub mod lineage;

/// How the repository of a host without a controller is called where orders name one.
pub const OWN_REPOSITORY: &str = "own";

/// The key that reads and signs, and the certificates that say what its signature is worth.
#[derive(Clone)]
pub struct HostKey {
    /// Where it lies: a restored server's `wal fetch` reads it there.
    pub path: PathBuf,
    pub file: KeyFile,
    /// Empty for a recovery key, which needs none.
    pub chain: Vec<Certificate>,
}

/// A repository as this host reaches it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RepositoryAccess {
    pub name: String,
    pub url: String,
    pub options: BTreeMap<String, String>,
    /// The root key that its root object must name; `None`: whoever made it is trusted, since a person named the URL.
    pub root: Option<PublicKey>,
}

/// An instance of this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InstanceAccess {
    pub data_dir: PathBuf,
    /// `None`: from postmaster.pid.
    pub connection: Option<String>,
}

/// A cluster that this host may work with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClusterAccess {
    pub name: ClusterName,
    pub repository: Arc<RepositoryAccess>,
    /// `None`: no instance of it lives here; it may be restored.
    pub instance: Option<InstanceAccess>,
    /// Whom its key must be wrapped for, beside the recovery key.
    pub recipients: Vec<Recipient>,
    pub compression_level: i32,
    pub processes: u32,
    pub shipping: ShippingSpec,
    /// Who keeps what the repository may lack beside this host, where commits wait for that.
    pub spool_peer: Option<SpoolPeer>,
    pub relatives: Relatives,
}

impl ClusterAccess {
    /// Unless the policy or this host's configuration says no: where it can be.
    pub fn is_to_be_streamed(&self) -> bool {
        self.shipping.streaming != Some(Streaming::Off)
    }
}

/// Another agent's spool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SpoolPeer {
    pub agent: String,
    /// "host:port"
    pub address: String,
}

/// What this host's spool keeps for others. No key comes with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SpoolGrant {
    pub cluster: ClusterName,
    pub system_identifier: u64,
    pub repository: Arc<RepositoryAccess>,
    /// That may bring some.
    pub agents: Vec<String>,
}

/// All of it, at one moment.
#[derive(Clone)]
pub struct Access {
    /// This host's name in the fleet: the member that backups and WAL come from.
    pub member: String,
    pub key: Arc<HostKey>,
    pub repositories: BTreeMap<String, Arc<RepositoryAccess>>,
    pub clusters: BTreeMap<ClusterName, ClusterAccess>,
    pub spools: Vec<SpoolGrant>,
    /// What does not fit together, for facts and doctor.
    pub problems: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
    #[error("this host's writer certificates: {0}")]
    Certificate(#[from] SignatureError),
    #[error("no cluster {cluster} is known to this host\nHINT: {hint}")]
    UnknownCluster { cluster: ClusterName, hint: &'static str },
    #[error(
        "no repository \"{name}\" is known to this host\nHINT: apply it at the controller, and let the cluster's policy name it."
    )]
    UnknownRepository { name: String },
    #[error("repository {name}: {source}")]
    Store { name: String, source: StoreError },
    #[error("whose copy cluster {cluster} may be is not known yet: {problem}")]
    Lineage { cluster: ClusterName, problem: String },
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

impl HostKey {
    pub fn read(path: &Path) -> Result<HostKey, KeyFileError> {
        Ok(HostKey { path: path.to_owned(), file: KeyFile::read(path)?, chain: Vec::new() })
    }

    pub fn signer(&self) -> Result<Signer, SignatureError> {
        Signer::from_seed(&self.file.signing_seed).with_chain(self.chain.clone())
    }
}

impl Access {
    /// On a host without a controller: one repository, opened with one key file.
    pub fn standalone(config: &Config, member: String, repository: &RepositoryConfig, key: HostKey) -> Access {
        let access = Arc::new(RepositoryAccess {
            name: OWN_REPOSITORY.into(),
            url: repository.url.clone(),
            options: repository.options.clone(),
            root: None,
        });
        let clusters = config.instances.iter().map(|instance| {
            let cluster = ClusterAccess {
                name: instance.cluster.clone(),
                repository: Arc::clone(&access),
                instance: Some(InstanceAccess {
                    data_dir: instance.data_dir.clone(),
                    connection: instance.connection.clone(),
                }),
                recipients: Vec::new(),
                compression_level: config.backup.compression_level,
                processes: config.backup.processes,
                shipping: config.wal.shipping(),
                spool_peer: None,
                relatives: match instance.lineage {
                    Lineage::Shared => Relatives::Any,
                    Lineage::Separate => Relatives::None,
                },
            };
            (cluster.name.clone(), cluster)
        });
        Access {
            member,
            key: Arc::new(key),
            clusters: clusters.collect(),
            repositories: BTreeMap::from([(access.name.clone(), access)]),
            spools: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// A member of a fleet: what the controller wants, bound to what the configuration says of this host.
    pub fn member(
        config: &Config,
        identity: &Identity,
        key_path: PathBuf,
        desired: &Desired,
    ) -> Result<Access, AccessError> {
        let chain = desired.writer_chain.iter().map(|bytes| Certificate::decode(bytes)).collect::<Result<_, _>>()?;
        let key = HostKey { path: key_path, file: identity.host_key().clone(), chain };
        let repositories: BTreeMap<String, Arc<RepositoryAccess>> = desired
            .repositories
            .iter()
            .map(|repository| {
                let access = RepositoryAccess {
                    name: repository.name.clone(),
                    url: repository.url.clone(),
                    options: repository.options.clone(),
                    root: Some(PublicKey(repository.root_public_key)),
                };
                (access.name.clone(), Arc::new(access))
            })
            .collect();
        let mut problems = Vec::new();
        let mut clusters = BTreeMap::new();
        for cluster in &desired.clusters {
            match repositories.get(&cluster.repository) {
                Some(repository) => {
                    clusters.insert(cluster.name.clone(), bind(config, cluster, Arc::clone(repository)));
                }
                None => problems.push(format!(
                    "cluster {} lies in repository \"{}\", which the controller did not name",
                    cluster.name, cluster.repository
                )),
            }
        }
        for instance in &config.instances {
            if !desired.clusters.iter().any(|cluster| cluster.name == instance.cluster && cluster.member) {
                problems.push(format!(
                    "{} is configured as a member of cluster {}, and the controller does not know this host as one\n\
                     HINT: name this agent in the cluster's members and apply it.",
                    instance.data_dir.display(),
                    instance.cluster
                ));
            }
        }
        let spools = desired.spools.iter().filter_map(|spool| {
            let repository = Arc::clone(repositories.get(&spool.repository)?);
            let (cluster, agents) = (spool.cluster.clone(), spool.agents.clone());
            Some(SpoolGrant { cluster, system_identifier: spool.system_identifier, repository, agents })
        });
        let spools = spools.collect();
        Ok(Access { member: identity.name().to_owned(), key: Arc::new(key), repositories, clusters, spools, problems })
    }

    pub fn cluster(&self, name: &ClusterName) -> Result<&ClusterAccess, AccessError> {
        self.clusters.get(name).ok_or_else(|| AccessError::UnknownCluster {
            cluster: name.clone(),
            hint: "name it in the agent's instances, or apply it at the controller with this host as a member.",
        })
    }

    pub fn repository(&self, name: &str) -> Result<&Arc<RepositoryAccess>, AccessError> {
        self.repositories.get(name).ok_or_else(|| AccessError::UnknownRepository { name: name.to_owned() })
    }

    /// Opens a cluster for reading.
    pub async fn open(&self, repository: &RepositoryAccess, cluster: ClusterName) -> Result<OpenCluster, AccessError> {
        let repository = repository.open().await?;
        Ok(OpenCluster::open(repository, cluster, &self.key.file.recipient).await?)
    }
}

/// A cluster of the desired state and the instance of it on this host. The configuration's word on where it lies and how
/// it is reached goes before the controller's: it was written by someone who sees the host.
fn bind(config: &Config, cluster: &DesiredCluster, repository: Arc<RepositoryAccess>) -> ClusterAccess {
    let configured = config.instances.iter().find(|instance| instance.cluster == cluster.name);
    let instance = match (configured, &cluster.data_dir) {
        _ if !cluster.member => None,
        (Some(instance), _) => {
            Some(InstanceAccess { data_dir: instance.data_dir.clone(), connection: instance.connection.clone() })
        }
        (None, Some(data_dir)) => Some(InstanceAccess { data_dir: data_dir.clone(), connection: None }),
        (None, None) => None,
    };
    ClusterAccess {
        name: cluster.name.clone(),
        repository,
        instance,
        recipients: cluster.recipients.clone(),
        compression_level: cluster.compression_level.unwrap_or(config.backup.compression_level),
        processes: cluster.processes.unwrap_or(config.backup.processes),
        shipping: cluster.shipping.or(config.wal.shipping()),
        spool_peer: cluster.spool_peer.clone().map(|peer| SpoolPeer { agent: peer.agent, address: peer.address }),
        relatives: match (configured.map(|instance| instance.lineage), &cluster.relatives) {
            (Some(Lineage::Separate), _) => Relatives::None,
            (_, Some(names)) => Relatives::Named(names.clone()),
            (_, None) => Relatives::NotKnownYet,
        },
    }
}

impl RepositoryAccess {
    pub async fn open(&self) -> Result<Repository, AccessError> {
        Ok(Repository::open(self.store()?, self.root).await?)
    }

    pub fn store(&self) -> Result<Store, AccessError> {
        let options = StoreOptions { settings: self.options.clone(), ..StoreOptions::default() };
        Store::open(&self.url, &options).map_err(|source| AccessError::Store { name: self.name.clone(), source })
    }
}

impl From<AccessError> for Failure {
    fn from(error: AccessError) -> Failure {
        let (code, exit, retry) = match &error {
            AccessError::KeyFile(_) => ("key_file.unusable", ExitCode::Failed, false),
            AccessError::Certificate(_) => ("identity.certificates", ExitCode::Failed, false),
            AccessError::UnknownCluster { .. } => ("cluster.unknown", ExitCode::NotFound, false),
            AccessError::UnknownRepository { .. } => ("repository.unknown", ExitCode::NotFound, false),
            AccessError::Lineage { .. } => ("cluster.lineage", ExitCode::Failed, true),
            AccessError::Store { source, .. } => ("repository.store", ExitCode::Failed, source.is_retryable()),
            AccessError::Repository(error) => return repository_failure(error),
            AccessError::Cluster(error) => return cluster_failure(error),
        };
        Failure::new(code, exit, remedy(retry), error)
    }
}

fn remedy(retry: bool) -> Remedy {
    if retry { Remedy::Retry } else { Remedy::Operator }
}

pub fn repository_failure(error: &RepositoryError) -> Failure {
    let (code, exit, retry) = match error {
        RepositoryError::Store { source, .. } => ("repository.store", ExitCode::Failed, source.is_retryable()),
        RepositoryError::Absent { .. } => ("repository.absent", ExitCode::NotFound, false),
        RepositoryError::Root { .. } => ("repository.root", ExitCode::Failed, false),
        RepositoryError::Taken { .. } => ("repository.taken", ExitCode::Refused, false),
        RepositoryError::ForeignRoot { .. } => ("repository.foreign", ExitCode::Refused, false),
        RepositoryError::Log(error) => ("repository.log", ExitCode::Failed, error.is_retryable()),
        RepositoryError::Reference(_) => ("backup.reference", ExitCode::Failed, false),
    };
    Failure::new(code, exit, remedy(retry), error)
}

pub fn cluster_failure(error: &ClusterError) -> Failure {
    let (code, exit) = match error {
        ClusterError::Unknown(_) => ("cluster.unknown", ExitCode::NotFound),
        ClusterError::Repository(error) => return repository_failure(error),
        ClusterError::Key { .. } => ("cluster.key", ExitCode::Refused),
        ClusterError::Log(_) => ("repository.log", ExitCode::Failed),
        ClusterError::Crypto(_) => ("cluster.crypto", ExitCode::Failed),
        ClusterError::Store { .. } => ("repository.store", ExitCode::Failed),
        ClusterError::Manifest { .. } | ClusterError::Digest { .. } => ("backup.manifest", ExitCode::Failed),
    };
    Failure::new(code, exit, remedy(error.is_retryable()), error)
}

#[cfg(test)]
mod tests;
