//! `Retention`: what is kept of a cluster, and why. Holds are in `holds`.

use std::time::Duration;

use futures::StreamExt;
use tonic::{Request, Response, Status};
use walfleet_proto::operator::v1 as pb;
use walfleet_proto::operator::v1::retention_server::Retention;
use walfleet_repository::ids::{BackupId, ClusterName};

use super::fleet::find;
use super::jobs::no_repository;
use super::{Api, now};
use crate::fleet::clusters::ClusterSeen;
use crate::identity::{PeerIdentity, peer};
use crate::keeper::KeeperError;
use crate::keeper::retention::{Brought, digest, policy_says};
use crate::reconcile::{Picture, in_full};
use crate::resources::RepositorySpec;
use crate::wire::retention::{garbage_out, plan_out};

/// Clusters looked at at once: small objects and listings, so latency counts.
pub(super) const READS: usize = 16;

/// For the repository's answer: less than callers wait for ours.
const STORE: Duration = Duration::from_secs(20);

impl Api {
    /// Of the cluster by that name: its repository and the plan; let pass if somebody wants it to be, who names the plan that he
    /// was shown.
    async fn plan(&self, wanted: &str, by: Option<(&str, &str)>) -> Result<pb::RetentionPlan, Status> {
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let cluster = find(&assembly, wanted)?;
        let (repository, spec) = place(&overview.picture, cluster)?;
        let name = &cluster.name;
        let says = policy_says(cluster).ok_or_else(|| {
            Status::failed_precondition(format!(
                "no policy says what is to be kept of {name}, so everything is\nHINT: declare it, for example `retention: {{window: 7d, daily: 14}}`."
            ))
        })?;
        let at = now();
        let planned = answer(repository, self.keeper.plan_retention(repository, spec, name, &says, at)).await?;
        if let Some((by, shown)) = by {
            if !cluster.is_surely_bound {
                return Err(Status::failed_precondition(format!(
                    "the policy binds {name} by labels that its hosts can change\nHINT: give the labels to its Cluster document, or to the token that the agents join with."
                )));
            }
            if !planned.can_be_released() {
                return Err(Status::failed_precondition(format!(
                    "the plan of {name} waits for no word\nHINT: `walfleet retention plan {name}` shows what becomes of it."
                )));
            }
            if digest(&says, &planned.plan) != shown {
                return Err(Status::aborted(
                    "the plan is no more the one that was shown\nHINT: repeat the command, and look at the new one.",
                ));
            }
            answer(repository, self.keeper.release(repository, name, (&says, &planned.plan), by, at)).await?;
        }
        Ok(plan_out((name.as_str(), repository), at, &planned, digest(&says, &planned.plan)))
    }

    async fn undelete(&self, wanted: &pb::UndeleteBackupRequest) -> Result<pb::UndeleteBackupReply, Status> {
        let backup: BackupId = wanted.backup.parse().map_err(|_| no_backup(&wanted.cluster, &wanted.backup))?;
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let cluster = find(&assembly, &wanted.cluster)?;
        let (repository, spec) = place(&overview.picture, cluster)?;
        match answer(repository, self.keeper.bring_back(repository, spec, &cluster.name, &backup, now())).await? {
            Brought::Back => Ok(pb::UndeleteBackupReply { repository: repository.to_owned() }),
            Brought::Unknown => Err(no_backup(&wanted.cluster, &wanted.backup)),
            Brought::Not { why } => Err(Status::failed_precondition(format!("backup {backup}: {why}"))),
        }
    }
}

impl Api {
    /// A cluster of which it cannot be told hides no other.
    async fn collect(&self, wanted: &pb::CollectRepositoryRequest) -> Result<pb::CollectRepositoryReply, Status> {
        let at = now();
        let overview = self.overview().await?;
        let name = wanted.repository.as_str();
        let spec = overview.picture.catalog.repositories.get(name).ok_or_else(|| no_such_repository(name))?;
        let assembly = overview.picture.assemble();
        let clusters = assembly.clusters.values().filter(|cluster| cluster.repository == Some(name));
        let clusters: Vec<ClusterName> = clusters.map(|cluster| cluster.name.clone()).collect();
        let reads = clusters.into_iter().map(|cluster| async move {
            let found = answer(name, self.keeper.garbage((name, spec), &cluster, at)).await;
            (cluster, found)
        });
        let found: Vec<_> = futures::stream::iter(reads).buffered(READS).collect().await;
        if !wanted.dry_run {
            found.iter().for_each(|(cluster, _)| self.keeper.look_again(cluster));
        }
        let clusters = found.into_iter().map(|(cluster, found)| garbage_out(cluster.as_str(), found)).collect();
        Ok(pb::CollectRepositoryReply { clusters })
    }
}

fn no_such_repository(name: &str) -> Status {
    Status::not_found(format!(
        "repository {name:?} is not declared\nHINT: `walfleet repository list` shows those there are."
    ))
}

pub(super) fn no_backup(cluster: &str, backup: &str) -> Status {
    Status::not_found(format!(
        "there is no backup {backup:?} of {cluster}\nHINT: `walfleet backup list {cluster}` shows those there are."
    ))
}

pub(super) fn place<'p>(
    picture: &'p Picture,
    cluster: &ClusterSeen<'p>,
) -> Result<(&'p str, &'p RepositorySpec), Status> {
    let repository = cluster.repository.ok_or_else(|| no_repository(cluster))?;
    let spec = picture.catalog.repositories.get(repository).ok_or_else(|| no_such_repository(repository))?;
    Ok((repository, spec))
}

pub(super) async fn answer<T>(
    repository: &str,
    asked: impl Future<Output = Result<T, KeeperError>>,
) -> Result<T, Status> {
    match tokio::time::timeout(STORE, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => {
            Err(Status::unavailable(format!("repository {repository}: {}\nHINT: try again.", in_full(&error))))
        }
        Err(_) => Err(Status::deadline_exceeded(format!(
            "repository {repository} did not answer within {} s\nHINT: try again.",
            STORE.as_secs()
        ))),
    }
}

#[tonic::async_trait]
impl Retention for Api {
    async fn plan_retention(
        &self,
        request: Request<pb::PlanRetentionRequest>,
    ) -> Result<Response<pb::RetentionPlan>, Status> {
        self.plan(&request.into_inner().cluster, None).await.map(Response::new)
    }

    async fn release_retention(
        &self,
        request: Request<pb::ReleaseRetentionRequest>,
    ) -> Result<Response<pb::RetentionPlan>, Status> {
        let peer: PeerIdentity = peer(&request)?;
        let wanted = request.into_inner();
        let result = self.plan(&wanted.cluster, Some((&peer.name.to_string(), &wanted.digest))).await;
        let object = format!("cluster {}", wanted.cluster);
        self.audited(&peer, "Retention.ReleaseRetention", &object, result).await.map(Response::new)
    }

    async fn undelete_backup(
        &self,
        request: Request<pb::UndeleteBackupRequest>,
    ) -> Result<Response<pb::UndeleteBackupReply>, Status> {
        let peer: PeerIdentity = peer(&request)?;
        let wanted = request.into_inner();
        let result = self.undelete(&wanted).await;
        let object = format!("cluster {}, backup {}", wanted.cluster, wanted.backup);
        self.audited(&peer, "Retention.UndeleteBackup", &object, result).await.map(Response::new)
    }

    async fn place_hold(&self, request: Request<pb::PlaceHoldRequest>) -> Result<Response<pb::PlaceHoldReply>, Status> {
        let peer: PeerIdentity = peer(&request)?;
        let wanted = request.into_inner();
        let result = self.hold(&peer, &wanted).await;
        let object = format!("cluster {}", wanted.cluster);
        self.audited(&peer, "Retention.PlaceHold", &object, result).await.map(Response::new)
    }

    async fn list_holds(&self, request: Request<pb::ListHoldsRequest>) -> Result<Response<pb::ListHoldsReply>, Status> {
        self.holds(&request.into_inner().cluster).await.map(Response::new)
    }

    async fn release_hold(
        &self,
        request: Request<pb::ReleaseHoldRequest>,
    ) -> Result<Response<pb::ReleaseHoldReply>, Status> {
        let peer: PeerIdentity = peer(&request)?;
        let wanted = request.into_inner();
        let result = self.release(&wanted).await;
        let object = format!("cluster {}, {}", wanted.cluster, wanted.hold);
        self.audited(&peer, "Retention.ReleaseHold", &object, result).await.map(Response::new)
    }

    async fn collect_repository(
        &self,
        request: Request<pb::CollectRepositoryRequest>,
    ) -> Result<Response<pb::CollectRepositoryReply>, Status> {
        let peer: PeerIdentity = peer(&request)?;
        let wanted = request.into_inner();
        let result = self.collect(&wanted).await;
        if wanted.dry_run {
            return result.map(Response::new);
        }
        let object = format!("repository {}", wanted.repository);
        self.audited(&peer, "Retention.CollectRepository", &object, result).await.map(Response::new)
    }
}
