//! A controller that answers from canned data and remembers what it was asked.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Server, ServerTlsConfig};
use tonic::{Request, Response, Status};
use walfleet_proto::agent::v1 as agent;
use walfleet_proto::agent::v1::enrolment_server::{Enrolment, EnrolmentServer};
use walfleet_proto::operator::v1::access_server::{Access, AccessServer};
use walfleet_proto::operator::v1::audit_server::{Audit, AuditServer};
use walfleet_proto::operator::v1::fleet_server::{Fleet, FleetServer};
use walfleet_proto::operator::v1::jobs_server::{Jobs, JobsServer};
use walfleet_proto::operator::v1::replicas_server::{Replicas, ReplicasServer};
use walfleet_proto::operator::v1::resources_server::{Resources, ResourcesServer};
use walfleet_proto::operator::v1::retention_server::{Retention, RetentionServer};
use walfleet_proto::operator::v1::wal_server::{Wal, WalServer};
use walfleet_proto::operator::v1::*;
use walfleet_proto::recovery::v1::{BackupSummary, GapNote};

/// What a watch sends, step by step; a new watch goes on where the last one stopped.
#[derive(Clone)]
pub enum Step {
    Job(Box<JobView>),
    Pause(std::time::Duration),
    /// The stream ends with this status.
    Break(Status),
    /// The stream ends as if all were said.
    End,
}

#[derive(Default)]
pub struct Script {
    pub status: StatusReply,
    pub agents: Vec<AgentView>,
    pub backups: Vec<BackupSummary>,
    pub resources: Vec<Resource>,
    pub tokens: Vec<TokenView>,
    pub audit: Vec<AuditEntry>,
    pub jobs: Vec<JobView>,
    pub changes: Vec<Change>,
    pub retention: RetentionPlan,
    pub holds: Vec<HoldView>,
    pub replicas: Vec<ReplicaView>,
    pub watch: VecDeque<Step>,
    /// Answers of the next calls that start something, before the good one.
    pub refusals: VecDeque<Status>,
    pub asked: Vec<Asked>,
    pub admission: Option<Admit>,
    pub traceparents: Vec<String>,
}

pub type Admit = Box<dyn Fn(&agent::JoinRequest) -> Result<agent::JoinReply, Status> + Send>;

#[derive(Debug, Clone, PartialEq)]
pub enum Asked {
    Backup(StartBackupRequest),
    Restore(Box<StartRestoreRequest>),
    Verify(StartVerifyRequest),
    BackupPlan(StartBackupPlanRequest),
    WalFind(Box<StartWalFindRequest>),
    AcknowledgeGap(AcknowledgeGapRequest),
    Undelete(UndeleteBackupRequest),
    ReleaseRetention(ReleaseRetentionRequest),
    PlaceHold(PlaceHoldRequest),
    ReleaseHold(ReleaseHoldRequest),
    Apply(ApplyRequest),
    Delete(DeleteResourceRequest),
    Token(CreateTokenRequest),
    RevokeAgent(String),
    Watch(String),
    Audit(ListEntriesRequest),
}

#[derive(Clone)]
struct Desk(Arc<Mutex<Script>>);

impl Desk {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap()
    }

    fn started(&self, asked: Asked) -> Result<Response<StartJobReply>, Status> {
        let mut script = self.script();
        script.asked.push(asked);
        if let Some(refusal) = script.refusals.pop_front() {
            return Err(refusal);
        }
        Ok(Response::new(StartJobReply { job: script.jobs.first().cloned() }))
    }
}

pub struct Controller {
    pub address: SocketAddr,
    desk: Desk,
    server: tokio::task::JoinHandle<()>,
}

impl Controller {
    pub async fn with(script: Script) -> Controller {
        Controller::start(script, None).await
    }

    pub async fn start(script: Script, tls: Option<ServerTlsConfig>) -> Controller {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let desk = Desk(Arc::new(Mutex::new(script)));
        let mut builder = Server::builder();
        if let Some(tls) = tls {
            builder = builder.tls_config(tls).unwrap();
        }
        let router = builder
            .add_service(FleetServer::new(desk.clone()))
            .add_service(JobsServer::new(desk.clone()))
            .add_service(ResourcesServer::new(desk.clone()))
            .add_service(AccessServer::new(desk.clone()))
            .add_service(AuditServer::new(desk.clone()))
            .add_service(WalServer::new(desk.clone()))
            .add_service(ReplicasServer::new(desk.clone()))
            .add_service(RetentionServer::new(desk.clone()))
            .add_service(EnrolmentServer::new(desk.clone()));
        let server = tokio::spawn(async move {
            router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Controller { address, desk, server }
    }

    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.desk.script()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.server.abort();
    }
}

#[tonic::async_trait]
impl Fleet for Desk {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let mut script = self.script();
        let traceparent = request.metadata().get("traceparent").and_then(|value| value.to_str().ok());
        let traceparent = traceparent.unwrap_or_default().to_owned();
        script.traceparents.push(traceparent);
        Ok(Response::new(script.status.clone()))
    }

    async fn list_clusters(&self, _: Request<ListClustersRequest>) -> Result<Response<ListClustersReply>, Status> {
        Ok(Response::new(ListClustersReply { clusters: self.script().status.clusters.clone() }))
    }

    async fn get_cluster(&self, request: Request<GetClusterRequest>) -> Result<Response<ClusterView>, Status> {
        let name = request.into_inner().name;
        let found = self.script().status.clusters.iter().find(|cluster| cluster.name == name).cloned();
        let missing =
            || Status::not_found(format!("there is no cluster \"{name}\"\nHINT: walfleet cluster list shows them."));
        found.map(Response::new).ok_or_else(missing)
    }

    async fn list_agents(&self, _: Request<ListAgentsRequest>) -> Result<Response<ListAgentsReply>, Status> {
        Ok(Response::new(ListAgentsReply { agents: self.script().agents.clone() }))
    }

    async fn get_agent(&self, request: Request<GetAgentRequest>) -> Result<Response<AgentView>, Status> {
        let name = request.into_inner().name;
        let found = self.script().agents.iter().find(|agent| agent.name == name).cloned();
        found.map(Response::new).ok_or_else(|| Status::not_found(format!("there is no agent \"{name}\"")))
    }

    async fn list_backups(&self, _: Request<ListBackupsRequest>) -> Result<Response<ListBackupsReply>, Status> {
        Ok(Response::new(ListBackupsReply { backups: self.script().backups.clone() }))
    }

    async fn get_backup(&self, request: Request<GetBackupRequest>) -> Result<Response<BackupSummary>, Status> {
        let id = request.into_inner().id;
        let found = self.script().backups.iter().find(|backup| backup.id == id).cloned();
        found.map(Response::new).ok_or_else(|| Status::not_found(format!("there is no backup \"{id}\"")))
    }
}

#[tonic::async_trait]
impl Jobs for Desk {
    async fn start_backup(&self, request: Request<StartBackupRequest>) -> Result<Response<StartJobReply>, Status> {
        self.started(Asked::Backup(request.into_inner()))
    }

    async fn start_restore(&self, request: Request<StartRestoreRequest>) -> Result<Response<StartJobReply>, Status> {
        self.started(Asked::Restore(Box::new(request.into_inner())))
    }

    async fn start_verify(&self, request: Request<StartVerifyRequest>) -> Result<Response<StartJobReply>, Status> {
        self.started(Asked::Verify(request.into_inner()))
    }

    async fn start_backup_plan(
        &self,
        request: Request<StartBackupPlanRequest>,
    ) -> Result<Response<StartJobReply>, Status> {
        self.started(Asked::BackupPlan(request.into_inner()))
    }

    async fn start_wal_find(&self, request: Request<StartWalFindRequest>) -> Result<Response<StartJobReply>, Status> {
        self.started(Asked::WalFind(Box::new(request.into_inner())))
    }

    async fn get_job(&self, request: Request<GetJobRequest>) -> Result<Response<JobView>, Status> {
        let id = request.into_inner().id;
        let found = self.script().jobs.iter().find(|job| job.id == id).cloned();
        found.map(Response::new).ok_or_else(|| Status::not_found(format!("there is no job \"{id}\"")))
    }

    async fn list_jobs(&self, _: Request<ListJobsRequest>) -> Result<Response<ListJobsReply>, Status> {
        Ok(Response::new(ListJobsReply { jobs: self.script().jobs.clone() }))
    }

    type WatchJobStream = ReceiverStream<Result<JobView, Status>>;

    async fn watch_job(&self, request: Request<GetJobRequest>) -> Result<Response<Self::WatchJobStream>, Status> {
        self.script().asked.push(Asked::Watch(request.into_inner().id));
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let desk = self.clone();
        tokio::spawn(async move {
            loop {
                let step = desk.script().watch.pop_front();
                match step {
                    Some(Step::Job(job)) => {
                        if sender.send(Ok(*job)).await.is_err() {
                            return;
                        }
                    }
                    Some(Step::Pause(time)) => tokio::time::sleep(time).await,
                    Some(Step::Break(status)) => {
                        let _ = sender.send(Err(status)).await;
                        return;
                    }
                    Some(Step::End) => return,
                    None => sender.closed().await,
                }
                if sender.is_closed() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn cancel_job(&self, request: Request<GetJobRequest>) -> Result<Response<JobView>, Status> {
        self.get_job(request).await
    }
}

#[tonic::async_trait]
impl Resources for Desk {
    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyReply>, Status> {
        let mut script = self.script();
        script.asked.push(Asked::Apply(request.into_inner()));
        if let Some(refusal) = script.refusals.pop_front() {
            return Err(refusal);
        }
        Ok(Response::new(ApplyReply { changes: script.changes.clone() }))
    }

    async fn list_resources(
        &self,
        request: Request<ListResourcesRequest>,
    ) -> Result<Response<ListResourcesReply>, Status> {
        let wanted = request.into_inner();
        let fits = |resource: &&Resource| {
            resource.kind == wanted.kind && (wanted.name.is_empty() || resource.name == wanted.name)
        };
        Ok(Response::new(ListResourcesReply {
            resources: self.script().resources.iter().filter(fits).cloned().collect(),
        }))
    }

    async fn delete_resource(
        &self,
        request: Request<DeleteResourceRequest>,
    ) -> Result<Response<DeleteResourceReply>, Status> {
        self.script().asked.push(Asked::Delete(request.into_inner()));
        Ok(Response::new(DeleteResourceReply {}))
    }
}

#[tonic::async_trait]
impl Access for Desk {
    async fn create_token(&self, request: Request<CreateTokenRequest>) -> Result<Response<CreateTokenReply>, Status> {
        self.script().asked.push(Asked::Token(request.into_inner()));
        Ok(Response::new(CreateTokenReply {
            token: "wft_7x2k.q9v5c2m8t4r6w1z3.0f3a9c44d2b17e60".to_owned(),
            id: "7x2k".to_owned(),
            expires_at_us: crate::canned::at("2026-06-04T15:41:59Z"),
        }))
    }

    async fn list_tokens(&self, _: Request<ListTokensRequest>) -> Result<Response<ListTokensReply>, Status> {
        Ok(Response::new(ListTokensReply { tokens: self.script().tokens.clone() }))
    }

    async fn revoke_token(&self, _: Request<RevokeTokenRequest>) -> Result<Response<RevokeTokenReply>, Status> {
        Ok(Response::new(RevokeTokenReply {}))
    }

    async fn revoke_agent(&self, request: Request<RevokeAgentRequest>) -> Result<Response<RevokeAgentReply>, Status> {
        self.script().asked.push(Asked::RevokeAgent(request.into_inner().name));
        Ok(Response::new(RevokeAgentReply {}))
    }

    async fn who_am_i(&self, request: Request<WhoAmIRequest>) -> Result<Response<WhoAmIReply>, Status> {
        let shown = request.peer_certs().is_some_and(|certificates| !certificates.is_empty());
        let name = if shown { "ann" } else { "nobody" }.to_owned();
        Ok(Response::new(WhoAmIReply { name, role: "operator".to_owned(), certificate_not_after_us: 0 }))
    }
}

#[tonic::async_trait]
impl Audit for Desk {
    async fn list_entries(&self, request: Request<ListEntriesRequest>) -> Result<Response<ListEntriesReply>, Status> {
        let wanted = request.into_inner();
        let mut script = self.script();
        script.asked.push(Asked::Audit(wanted));
        let entries: Vec<_> = script.audit.iter().filter(|entry| entry.at_us >= wanted.since_us).cloned().collect();
        let skipped = entries.len().saturating_sub(wanted.limit as usize);
        let last = script.audit.len() as u64;
        Ok(Response::new(ListEntriesReply { entries: entries[skipped..].to_vec(), first: u64::from(last > 0), last }))
    }

    async fn verify_log(&self, _: Request<VerifyLogRequest>) -> Result<Response<VerifyLogReply>, Status> {
        let mut script = self.script();
        if let Some(refusal) = script.refusals.pop_front() {
            return Err(refusal);
        }
        let head_hash = script.audit.last().map(|entry| entry.hash.clone()).unwrap_or_default();
        Ok(Response::new(VerifyLogReply { first: 1, last: script.audit.len() as u64, head_hash }))
    }
}

#[tonic::async_trait]
impl Enrolment for Desk {
    async fn join(&self, request: Request<agent::JoinRequest>) -> Result<Response<agent::JoinReply>, Status> {
        let script = self.script();
        let admit = script.admission.as_ref().ok_or_else(|| Status::unauthenticated("the token is used"))?;
        admit(&request.into_inner()).map(Response::new)
    }

    async fn renew(&self, request: Request<agent::RenewRequest>) -> Result<Response<agent::RenewReply>, Status> {
        let script = self.script();
        let admit = script.admission.as_ref().ok_or_else(|| Status::internal("the authority is asleep"))?;
        let csr_pem = request.into_inner().csr_pem;
        let reply = admit(&agent::JoinRequest { csr_pem, token: ".secret.".to_owned(), ..Default::default() })?;
        Ok(Response::new(agent::RenewReply {
            certificate_pem: reply.certificate_pem,
            authorities_pem: reply.authorities_pem,
            not_after_us: 0,
        }))
    }
}

#[tonic::async_trait]
impl Wal for Desk {
    async fn acknowledge_gap(
        &self,
        request: Request<AcknowledgeGapRequest>,
    ) -> Result<Response<AcknowledgeGapReply>, Status> {
        let mut script = self.script();
        let wanted = request.into_inner();
        script.asked.push(Asked::AcknowledgeGap(wanted.clone()));
        let windows = script.status.clusters.iter().filter(|cluster| cluster.name == wanted.cluster);
        let gaps = windows.flat_map(|cluster| &cluster.windows).flat_map(|window| &window.gaps);
        let found = gaps.into_iter().find(|gap| gap.from_lsn == wanted.from_lsn).cloned();
        let missing = || Status::not_found(format!("no gap of {} begins at {}", wanted.cluster, wanted.from_lsn));
        let mut gap = found.ok_or_else(missing)?;
        if gap.to_lsn != wanted.to_lsn {
            return Err(Status::failed_precondition(format!("the gap ends at {}", gap.to_lsn)));
        }
        let at_us = script.status.as_of_us;
        gap.acknowledged = true;
        gap.acknowledgement = Some(GapNote { by: "anna".to_owned(), at_us, reason: wanted.reason });
        Ok(Response::new(AcknowledgeGapReply { repository: "main".to_owned(), gap: Some(gap) }))
    }
}

#[tonic::async_trait]
impl Retention for Desk {
    async fn plan_retention(&self, request: Request<PlanRetentionRequest>) -> Result<Response<RetentionPlan>, Status> {
        let plan = self.script().retention.clone();
        match plan.cluster == request.into_inner().cluster {
            true => Ok(Response::new(plan)),
            false => Err(Status::failed_precondition("no policy says what is to be kept")),
        }
    }

    async fn release_retention(
        &self,
        request: Request<ReleaseRetentionRequest>,
    ) -> Result<Response<RetentionPlan>, Status> {
        let mut script = self.script();
        script.asked.push(Asked::ReleaseRetention(request.into_inner()));
        Ok(Response::new(script.retention.clone()))
    }

    async fn place_hold(&self, request: Request<PlaceHoldRequest>) -> Result<Response<PlaceHoldReply>, Status> {
        let mut script = self.script();
        let wanted = request.into_inner();
        let is_asked = |hold: &&HoldView| hold.is_stretch == wanted.backup.is_empty();
        let holds = script.holds.iter().filter(is_asked).cloned().collect();
        script.asked.push(Asked::PlaceHold(wanted));
        match script.refusals.pop_front() {
            Some(refusal) => Err(refusal),
            None => Ok(Response::new(PlaceHoldReply { holds })),
        }
    }

    async fn collect_repository(
        &self,
        _: Request<CollectRepositoryRequest>,
    ) -> Result<Response<CollectRepositoryReply>, Status> {
        Ok(Response::new(CollectRepositoryReply { clusters: crate::canned::garbage() }))
    }

    async fn list_holds(&self, _: Request<ListHoldsRequest>) -> Result<Response<ListHoldsReply>, Status> {
        Ok(Response::new(ListHoldsReply { holds: self.script().holds.clone(), unknown: Vec::new() }))
    }

    async fn release_hold(&self, request: Request<ReleaseHoldRequest>) -> Result<Response<ReleaseHoldReply>, Status> {
        let mut script = self.script();
        script.asked.push(Asked::ReleaseHold(request.into_inner()));
        Ok(Response::new(ReleaseHoldReply { hold: None }))
    }

    async fn undelete_backup(
        &self,
        request: Request<UndeleteBackupRequest>,
    ) -> Result<Response<UndeleteBackupReply>, Status> {
        let mut script = self.script();
        script.asked.push(Asked::Undelete(request.into_inner()));
        match script.refusals.pop_front() {
            Some(refusal) => Err(refusal),
            None => Ok(Response::new(UndeleteBackupReply { repository: "main".to_owned() })),
        }
    }
}

#[tonic::async_trait]
impl Replicas for Desk {
    async fn list_replicas(&self, _: Request<ListReplicasRequest>) -> Result<Response<ListReplicasReply>, Status> {
        Ok(Response::new(ListReplicasReply { replicas: self.script().replicas.clone() }))
    }
}
