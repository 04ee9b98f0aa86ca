//! `Fleet`: what the fleet looks like. Reading only.

use tonic::{Request, Response, Status};
use walfleet_proto::operator::v1 as pb;
use walfleet_proto::operator::v1::fleet_server::Fleet;
use walfleet_proto::recovery::v1::BackupSummary;

use super::status::{of_job, of_reconcile};
use super::{Api, now};
use crate::fleet::AgentSeen;
use crate::fleet::clusters::{Assembly, ClusterSeen};
use crate::fleet::protection::{self, Protection};
use crate::jobs::Job;
use crate::policy;
use crate::reconcile::report::Overview;
use crate::resources::Selector;
use crate::wire::operator::{self as wire, ClusterPage};
use crate::wire::recovery;

impl Api {
    pub(super) async fn overview(&self) -> Result<Overview, Status> {
        self.reconciler.overview(now()).await.map_err(of_reconcile)
    }
}

/// By its text; empty: everything.
fn selector(text: &str) -> Result<Selector, Status> {
    text.parse().map_err(|error| Status::invalid_argument(format!("selector: {error}")))
}

pub(super) fn no_cluster(name: &str) -> Status {
    Status::not_found(format!("there is no cluster {name:?}\nHINT: `walfleet cluster list` shows those there are."))
}

pub(super) fn find<'s, 'a>(assembly: &'s Assembly<'a>, name: &str) -> Result<&'s ClusterSeen<'a>, Status> {
    name.parse().ok().and_then(|name| assembly.clusters.get(&name)).ok_or_else(|| no_cluster(name))
}

/// Worst first.
fn cluster_views(overview: &Overview, assembly: &Assembly<'_>, selector: &Selector) -> Vec<pb::ClusterView> {
    let clusters = assembly.clusters.values().filter(|cluster| selector.matches(&cluster.labels));
    let mut views: Vec<(Protection, pb::ClusterView)> = clusters
        .map(|cluster| {
            let page = page(overview, cluster);
            (page.assessment.state, wire::cluster_out(&page))
        })
        .collect();
    views.sort_by(|(a, left), (b, right)| a.cmp(b).then_with(|| left.name.cmp(&right.name)));
    views.into_iter().map(|(_, view)| view).collect()
}

fn page<'s, 'a>(overview: &Overview, cluster: &'s ClusterSeen<'a>) -> ClusterPage<'s, 'a> {
    ClusterPage { cluster, assessment: overview.assess(cluster), next_backup: overview.next_backup(cluster) }
}

fn agent_view(overview: &Overview, name: &str, seen: &AgentSeen) -> pb::AgentView {
    let jobs = overview.jobs.iter().filter(|job| job.held_by() == Some(name)).map(|job| job.id.to_string()).collect();
    wire::agent_out(name, seen, jobs)
}

fn agent_views(overview: &Overview, selector: &Selector) -> Vec<pb::AgentView> {
    let agents = overview.picture.agents.iter().filter(|(_, seen)| !seen.enrolled.revoked);
    agents
        .filter(|(name, seen)| selector.matches(&policy::with_name(name, &seen.labels())))
        .map(|(name, seen)| agent_view(overview, name, seen))
        .collect()
}

#[tonic::async_trait]
impl Fleet for Api {
    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusReply>, Status> {
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let everything = Selector::default();
        let mut notices = self.keeper.notices();
        notices.extend(assembly.notices.iter().cloned());
        Ok(Response::new(pb::StatusReply {
            controller: self.name.to_string(),
            controller_version: env!("CARGO_PKG_VERSION").to_owned(),
            as_of_us: overview.picture.now.as_microsecond(),
            clusters: cluster_views(&overview, &assembly, &everything),
            agents: agent_views(&overview, &everything),
            notices,
        }))
    }

    async fn list_clusters(
        &self,
        request: Request<pb::ListClustersRequest>,
    ) -> Result<Response<pb::ListClustersReply>, Status> {
        let selector = selector(&request.into_inner().selector)?;
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let clusters = cluster_views(&overview, &assembly, &selector);
        Ok(Response::new(pb::ListClustersReply { clusters }))
    }

    async fn get_cluster(&self, request: Request<pb::GetClusterRequest>) -> Result<Response<pb::ClusterView>, Status> {
        let name = request.into_inner().name;
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let cluster = find(&assembly, &name)?;
        Ok(Response::new(wire::cluster_out(&page(&overview, cluster))))
    }

    async fn list_agents(
        &self,
        request: Request<pb::ListAgentsRequest>,
    ) -> Result<Response<pb::ListAgentsReply>, Status> {
        let selector = selector(&request.into_inner().selector)?;
        let overview = self.overview().await?;
        Ok(Response::new(pb::ListAgentsReply { agents: agent_views(&overview, &selector) }))
    }

    async fn get_agent(&self, request: Request<pb::GetAgentRequest>) -> Result<Response<pb::AgentView>, Status> {
        let name = request.into_inner().name;
        let overview = self.overview().await?;
        let seen = overview.picture.agents.get(&name).ok_or_else(|| no_agent(&name))?;
        Ok(Response::new(agent_view(&overview, &name, seen)))
    }

    async fn list_backups(
        &self,
        request: Request<pb::ListBackupsRequest>,
    ) -> Result<Response<pb::ListBackupsReply>, Status> {
        let name = request.into_inner().cluster;
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let backups = self.backups(find(&assembly, &name)?).await?;
        Ok(Response::new(pb::ListBackupsReply { backups }))
    }

    async fn get_backup(&self, request: Request<pb::GetBackupRequest>) -> Result<Response<BackupSummary>, Status> {
        let id = request.into_inner().id;
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let seen = assembly.clusters.values().flat_map(protection::backups);
        let reported = overview.reported.values().map(|reported| reported.backup.clone());
        let found = seen.chain(reported).find(|backup| backup.id.as_str() == id);
        found.map(|backup| Response::new(recovery::backup_out(&backup))).ok_or_else(|| {
            Status::not_found(format!(
                "no agent knows of backup {id:?}\nHINT: `walfleet backup list CLUSTER` shows those there are."
            ))
        })
    }
}

impl Api {
    /// Newest first; with those that jobs reported and agents cannot have seen yet.
    async fn backups(&self, cluster: &ClusterSeen<'_>) -> Result<Vec<BackupSummary>, Status> {
        let mut known = protection::backups(cluster);
        let jobs = self.reconciler.jobs.done(Some(&cluster.name), usize::MAX).await.map_err(of_job)?;
        for reported in jobs.iter().filter_map(Job::reported_backup) {
            let seen = known.iter().any(|backup| backup.id == reported.backup.id);
            if !seen && protection::is_news(cluster, &reported) {
                known.push(reported.backup);
            }
        }
        known.sort_by(|a, b| b.id.cmp(&a.id));
        Ok(known.iter().map(recovery::backup_out).collect())
    }
}

pub(super) fn no_agent(name: &str) -> Status {
    Status::not_found(format!("there is no agent {name:?}\nHINT: `walfleet agent list` shows those there are."))
}
