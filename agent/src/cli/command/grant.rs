//! `grant`: lets this host's own key open what lies in the fleet's repositories, with a key that opens it already.
//!
//! For the day on which no host is left that could grant it: hosts grant each other the clusters' keys by themselves
//! (`access/grant.rs`), and this one does so for all others as soon as it has them.

use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::ids::{ClusterName, RecipientId};
use walfleet_repository::key_file::KeyFile;

use crate::access::{AccessError, ClusterAccess, OWN_REPOSITORY};
use crate::cli::{GrantArgs, RepositoryArgs, usage};
use crate::failure::{ExitCode, Failure, Remedy};

pub fn grant(args: GrantArgs) -> Result<(), Failure> {
    let opened = super::open::open(&RepositoryArgs { config: args.config, ..RepositoryArgs::default() })?;
    let access = &opened.access;
    if access.repositories.contains_key(OWN_REPOSITORY) {
        return Err(usage(
            "this host has no controller, and its configuration names the key that opens its repository\n\
             HINT: grant is for hosts that joined a fleet.",
        ));
    }
    let clusters: Vec<&ClusterAccess> = match &args.cluster {
        Some(name) => vec![access.cluster(name)?],
        None => access.clusters.values().collect(),
    };
    if clusters.is_empty() {
        return Err(super::failed(
            "the controller has named no cluster to this host yet\nHINT: apply the fleet's documents, start the agent, and try again.",
        ));
    }
    let key = KeyFile::read(&args.key_file)
        .map_err(|error| Failure::new("key_file.unusable", ExitCode::Failed, Remedy::Operator, error))?;
    let (own, label) = (access.key.file.recipient.id(), access.member.clone());
    super::run_async(&super::quiet(), |cancel| async move {
        for cluster in clusters {
            let granting = grant_one(cluster, &key, own, &label);
            let granted = cancel.run_until_cancelled(granting).await;
            match granted.ok_or_else(|| super::failed("interrupted; what was granted stays so"))?? {
                Granted::Now => println!("{}: this host's key opens it now", cluster.name),
                Granted::NothingThere => println!("{}: nothing of it is stored yet", cluster.name),
            }
        }
        Ok(())
    })
}

enum Granted {
    Now,
    NothingThere,
}

async fn grant_one(cluster: &ClusterAccess, key: &KeyFile, own: RecipientId, label: &str) -> Result<Granted, Failure> {
    let name: &ClusterName = &cluster.name;
    let open = match OpenCluster::open(cluster.repository.open().await?, name.clone(), &key.recipient).await {
        Ok(open) => open,
        Err(ClusterError::Unknown(_)) => return Ok(Granted::NothingThere),
        Err(error) => return Err(AccessError::from(error).into()),
    };
    let granting = open.keys().grant(open.repository().store(), own, label).await;
    granting.map_err(|source| AccessError::from(ClusterError::Key { cluster: name.clone(), source }))?;
    Ok(Granted::Now)
}
