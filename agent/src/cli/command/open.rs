//! From flags or configuration to what a command may use.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::limits::LimitsSpec;
use walfleet_repository::shipping::ShippingSpec;

use crate::access::lineage::Relatives;
use crate::access::{Access, ClusterAccess, HostKey, InstanceAccess, OWN_REPOSITORY};
use crate::archiving::Archiving;
use crate::cli::{RepositoryArgs, usage};
use crate::config::{self, Config, RepositoryConfig};
use crate::daemon;
use crate::desired::DesiredStore;
use crate::failure::{ExitCode, Failure, Remedy};
use crate::identity::IdentityFolder;
use crate::jobs::work::HostWork;
use crate::limits::HostLimits;

/// What a command works with.
pub struct Opened {
    pub config: Config,
    pub access: Access,
    pub limits: LimitsSpec,
}

/// The repository that the flags name, else the configuration's, else what the controller last said.
pub fn open(args: &RepositoryArgs) -> Result<Opened, Failure> {
    if let (Some(url), Some(key_file)) = (&args.repository, &args.key_file) {
        let mut config = match &args.config {
            Some(path) => Config::load(path).map_err(usage)?,
            None => Config::default(),
        };
        let options = args.options.iter().cloned().collect();
        let repository = RepositoryConfig { url: url.clone(), options, key_file: key_file.clone() };
        repository.validate("--repository").map_err(usage)?;
        config.controller = None;
        return standalone(config, repository);
    }
    let path = args.config.as_deref().unwrap_or(Path::new(config::DEFAULT_PATH));
    if args.config.is_none() && !path.exists() {
        return Err(usage(format!(
            "no repository is named, and there is no {}\nHINT: give --repository URL --key-file FILE, or --config FILE.",
            path.display()
        )));
    }
    let config = Config::load(path).map_err(usage)?;
    match config.repository.clone() {
        Some(repository) => standalone(config, repository),
        None => member(config),
    }
}

fn standalone(config: Config, repository: RepositoryConfig) -> Result<Opened, Failure> {
    let key = HostKey::read(&repository.key_file)
        .map_err(|error| Failure::new("key_file.unusable", ExitCode::Failed, Remedy::Operator, error))?;
    // Only a name in lists: a host's odd name must not keep anyone from a backup.
    let name = config.agent_name().unwrap_or_else(|_| "host".into());
    let access = Access::standalone(&config, name, &repository, key);
    Ok(Opened { limits: config.limits, config, access })
}

fn member(config: Config) -> Result<Opened, Failure> {
    let folder = IdentityFolder::new(&config.state_dir);
    let identity =
        folder.load().map_err(|error| Failure::new("identity", ExitCode::Failed, Remedy::Operator, error))?;
    let desired = DesiredStore::open(&config.state_dir).map_err(super::failed)?.watch().borrow().clone();
    let desired = desired.ok_or_else(|| {
        super::failed(
            "the controller has not said yet what this host may use\n\
             HINT: start the agent once, or give --repository URL --key-file FILE.",
        )
    })?;
    let access = Access::member(&config, &identity, folder.host_key_path(), &desired)?;
    Ok(Opened { limits: config.limits.and(desired.limits), config, access })
}

impl Opened {
    /// The cluster by name; on a host of its own, also one that has no instance here.
    pub fn cluster(&mut self, name: &ClusterName) -> Result<&mut ClusterAccess, Failure> {
        if let Some(repository) = self.access.repositories.get(OWN_REPOSITORY) {
            let fresh = ClusterAccess {
                name: name.clone(),
                repository: Arc::clone(repository),
                instance: None,
                recipients: Vec::new(),
                compression_level: self.config.backup.compression_level,
                processes: self.config.backup.processes,
                shipping: ShippingSpec::NONE,
                spool_peer: None,
                relatives: Relatives::Any,
            };
            return Ok(self.access.clusters.entry(name.clone()).or_insert(fresh));
        }
        self.access.cluster(name)?;
        self.access.clusters.get_mut(name).ok_or_else(|| super::failed("the cluster is gone"))
    }

    /// Binds the cluster to an instance that the flags name.
    pub fn set_instance(
        &mut self,
        name: &ClusterName,
        data_dir: Option<&Path>,
        connection: Option<String>,
    ) -> Result<(), Failure> {
        let cluster = self.cluster(name)?;
        match (data_dir, &mut cluster.instance) {
            (Some(data_dir), _) => {
                let data_dir = std::path::absolute(data_dir).map_err(super::failed)?;
                cluster.instance = Some(InstanceAccess { data_dir, connection });
            }
            (None, Some(instance)) => instance.connection = connection.or_else(|| instance.connection.clone()),
            (None, None) => {
                return Err(usage(format!(
                    "no instance of cluster {name} is known on this host\n\
                     HINT: give --data-dir FOLDER, or name it in the configuration's instances."
                )));
            }
        }
        Ok(())
    }

    /// The same work that jobs of a controller are done by.
    pub fn work(self) -> Result<HostWork, Failure> {
        let (_, access) = watch::channel(Some(Arc::new(self.access)));
        let limits = HostLimits::new(self.limits);
        let state_dir = self.config.state_dir.clone();
        let options = daemon::ship_options(&self.config);
        let archiving = Archiving::new(access.clone(), options, Arc::clone(&limits), state_dir);
        HostWork::new(Arc::new(self.config), access, Arc::new(archiving), limits).map_err(super::failed)
    }
}
