//! `Jobs`: what operators start, follow and cancel.

use std::pin::Pin;

use tonic::{Request, Response, Status};
use walfleet_proto::operator::v1 as pb;
use walfleet_proto::operator::v1::jobs_server::Jobs;
use walfleet_proto::telemetry;
use walfleet_repository::ids::JobId;

use super::fleet::{find, no_agent};
use super::status::of_job;
use super::{Api, now, watch};
use crate::fleet::clusters::ClusterSeen;
use crate::fleet::{Fleet, InstanceRole};
use crate::identity::{PeerIdentity, peer};
use crate::jobs::work::{BackupPlanWork, BackupWork, VerifyWork, Work};
use crate::jobs::{Event, Job, JobKind, NewJob, Refusal, dispatch};
use crate::reconcile::Picture;
use crate::reconcile::schedules::backup_work;
use crate::state::Txn;
use crate::wire::job::{backup_id, wal_find_in};
use crate::wire::operator::job_out;

impl Api {
    pub(super) fn job_view(&self, job: &Job) -> pb::JobView {
        job_out(job, self.reconciler.fleet.progress_of(&job.id).as_ref())
    }

    pub(super) async fn create(&self, new: NewJob) -> Result<Job, Status> {
        let created = self.reconciler.jobs.create(new, Txn::new(), now()).await.map_err(of_job)?;
        created.ok_or_else(|| Status::aborted("others are making jobs without end\nHINT: try again."))
    }

    async fn picture(&self) -> Result<Picture, Status> {
        self.reconciler.picture(now()).await.map_err(super::status::of_row)
    }

    async fn start_backup_job(&self, peer: &PeerIdentity, wanted: pb::StartBackupRequest) -> Result<Job, Status> {
        let picture = self.picture().await?;
        let assembly = picture.assemble();
        let cluster = find(&assembly, &wanted.cluster)?;
        let work = backup_work(cluster).ok_or_else(|| no_repository(cluster))?;
        let on = self.member(&picture, cluster, &wanted.agent, JobKind::Backup)?;
        let work = BackupWork { fast_checkpoint: !wanted.spread_checkpoint, read_all: wanted.read_all, ..work };
        self.create(NewJob {
            idempotency_key: key_of(wanted.idempotency_key),
            retries: cluster.policy.map_or(0, |policy| policy.backup.retries),
            ..asked(peer, cluster, Work::Backup(work), on)
        })
        .await
    }

    /// The member that is to do what needs a server; `None`: any.
    fn member(
        &self,
        picture: &Picture,
        cluster: &ClusterSeen<'_>,
        agent: &str,
        kind: JobKind,
    ) -> Result<Option<String>, Status> {
        if agent.is_empty() {
            any_ready(&self.reconciler.fleet, picture, cluster, kind)?;
            return Ok(None);
        }
        let member = cluster.members.iter().find(|member| member.agent == agent);
        let member = member.ok_or_else(|| not_a_member(agent, cluster))?;
        if member.instance.role == InstanceRole::Down {
            return Err(Status::failed_precondition(format!(
                "the server of {agent} does not answer\nHINT: `walfleet agent show {agent}` says what is wrong."
            )));
        }
        ready(&self.reconciler.fleet, picture, agent, kind)?;
        Ok(Some(agent.to_owned()))
    }

    async fn start_backup_plan_job(
        &self,
        peer: &PeerIdentity,
        wanted: pb::StartBackupPlanRequest,
    ) -> Result<Job, Status> {
        let picture = self.picture().await?;
        let assembly = picture.assemble();
        let cluster = find(&assembly, &wanted.cluster)?;
        let repository = cluster.repository.ok_or_else(|| no_repository(cluster))?.to_owned();
        let on = self.member(&picture, cluster, &wanted.agent, JobKind::BackupPlan)?;
        let work = Work::BackupPlan(BackupPlanWork { repository, read_all: wanted.read_all });
        self.create(NewJob { idempotency_key: key_of(wanted.idempotency_key), ..asked(peer, cluster, work, on) }).await
    }

    async fn start_restore_job(&self, peer: &PeerIdentity, wanted: pb::StartRestoreRequest) -> Result<Job, Status> {
        let picture = self.picture().await?;
        let assembly = picture.assemble();
        let cluster = find(&assembly, &wanted.cluster)?;
        let work = self.restore_work(&picture, cluster, &wanted.agent, wanted.order.unwrap_or_default())?;
        ready(&self.reconciler.fleet, &picture, &wanted.agent, JobKind::Restore)?;
        // Not retried: what a failed restore left behind is for people to look at.
        self.create(NewJob {
            idempotency_key: key_of(wanted.idempotency_key),
            ..asked(peer, cluster, Work::Restore(work), Some(wanted.agent))
        })
        .await
    }

    async fn start_verify_job(&self, peer: &PeerIdentity, wanted: pb::StartVerifyRequest) -> Result<Job, Status> {
        let picture = self.picture().await?;
        let assembly = picture.assemble();
        let cluster = find(&assembly, &wanted.cluster)?;
        let repository = cluster.repository.ok_or_else(|| no_repository(cluster))?.to_owned();
        let backup = backup_id("backup", &wanted.backup)?;
        let on = self.reader(&picture, cluster, &wanted.agent, JobKind::Verify)?;
        let work = Work::Verify(VerifyWork { repository, backup, deep: wanted.deep });
        self.create(asked(peer, cluster, work, on)).await
    }

    async fn start_wal_find_job(&self, peer: &PeerIdentity, wanted: pb::StartWalFindRequest) -> Result<Job, Status> {
        let picture = self.picture().await?;
        let assembly = picture.assemble();
        let cluster = find(&assembly, &wanted.cluster)?;
        let repository = cluster.repository.ok_or_else(|| no_repository(cluster))?;
        let work = wal_find_in(wanted.order.unwrap_or_default(), repository).map_err(|error| error.within("order"))?;
        let on = self.reader(&picture, cluster, &wanted.agent, JobKind::WalFind)?;
        self.create(NewJob {
            idempotency_key: key_of(wanted.idempotency_key),
            ..asked(peer, cluster, Work::WalFind(work), on)
        })
        .await
    }

    /// Who is to do what needs no server, only the cluster's key; `None`: any member.
    fn reader(
        &self,
        picture: &Picture,
        cluster: &ClusterSeen<'_>,
        agent: &str,
        kind: JobKind,
    ) -> Result<Option<String>, Status> {
        if agent.is_empty() {
            any_ready(&self.reconciler.fleet, picture, cluster, kind)?;
            return Ok(None);
        }
        self.may_hold(picture, cluster, agent)?;
        ready(&self.reconciler.fleet, picture, agent, kind)?;
        Ok(Some(agent.to_owned()))
    }

    async fn find_job(&self, id: &str) -> Result<Job, Status> {
        let id: JobId = id.parse().map_err(|error| Status::invalid_argument(format!("id: {error}")))?;
        self.reconciler.jobs.get(&id).await.map_err(of_job)
    }

    async fn cancel(&self, peer: &PeerIdentity, id: &str) -> Result<pb::JobView, Status> {
        let job = self.find_job(id).await?;
        let event = Event::Cancel { by: peer.name.to_string() };
        let applied = self.reconciler.jobs.apply(&job.id, event, now()).await.map_err(of_job)?;
        match applied.refused {
            None => Ok(self.job_view(&applied.job)),
            Some(Refusal::Over(phase) | Refusal::OutOfPlace(phase)) => {
                Err(Status::failed_precondition(format!("job {id} is over: it {}", phase_in_past(phase))))
            }
            Some(Refusal::Stale { .. }) => Err(Status::aborted("the job changed meanwhile\nHINT: try again.")),
        }
    }
}

fn phase_in_past(phase: crate::jobs::Phase) -> &'static str {
    match phase {
        crate::jobs::Phase::Cancelled => "was cancelled",
        other => other.as_str(),
    }
}

pub(super) fn no_repository(cluster: &ClusterSeen<'_>) -> Status {
    let name = &cluster.name;
    Status::failed_precondition(match &cluster.binding {
        crate::policy::Binding::Tied(policies) => format!(
            "policies {} all select {name}, so none applies\nHINT: narrow the selectors until one is left.",
            policies.join(", ")
        ),
        _ => {
            format!("no policy binds {name}, so it has no repository\nHINT: `walfleet apply` a Policy that selects it.")
        }
    })
}

/// What an operator asks for, tried once.
fn asked(peer: &PeerIdentity, cluster: &ClusterSeen<'_>, work: Work, on: Option<String>) -> NewJob {
    NewJob {
        cluster: cluster.name.clone(),
        work,
        on,
        requested_by: peer.name.to_string(),
        run: None,
        idempotency_key: None,
        traceparent: telemetry::current_traceparent(),
        retries: 0,
    }
}

fn key_of(given: String) -> Option<String> {
    Some(given).filter(|key| !key.is_empty())
}

fn not_a_member(agent: &str, cluster: &ClusterSeen<'_>) -> Status {
    let members: Vec<&str> = cluster.members.iter().map(|member| member.agent).collect();
    Status::failed_precondition(format!(
        "agent {agent} has no instance of {}\nHINT: its members are {}.",
        cluster.name,
        if members.is_empty() { "none".to_owned() } else { members.join(", ") }
    ))
}

/// Whether the agent could begin such a job soon. One that is busy has it queued, and so has one that lost its stream a
/// moment ago, or has not come back yet after the controller's start.
fn ready(fleet: &Fleet, picture: &Picture, agent: &str, kind: JobKind) -> Result<(), Status> {
    let seen = picture.agents.get(agent).ok_or_else(|| no_agent(agent))?;
    if seen.enrolled.revoked {
        Err(Status::failed_precondition(format!("agent {agent} is revoked\nHINT: let it join again with a new token.")))
    } else if !seen.connected && fleet.lease_lost(agent).is_some() {
        Err(Status::failed_precondition(format!(
            "agent {agent} is not connected\nHINT: start it, or look into its log why it cannot reach the controller."
        )))
    } else if !seen.can(kind.as_str()) {
        Err(Status::failed_precondition(format!(
            "agent {agent} does not offer {}\nHINT: its version or its configuration may not allow it.",
            kind.as_str()
        )))
    } else {
        Ok(())
    }
}

/// Whether any member could. Otherwise the reason is each one's.
fn any_ready(fleet: &Fleet, picture: &Picture, cluster: &ClusterSeen<'_>, kind: JobKind) -> Result<(), Status> {
    let candidates = match kind {
        JobKind::Backup | JobKind::BackupPlan => {
            dispatch::backup_order(cluster).map_err(Status::failed_precondition)?
        }
        JobKind::Restore | JobKind::Verify | JobKind::WalFind => {
            cluster.members.iter().map(|member| member.agent).collect()
        }
    };
    if candidates.is_empty() {
        return Err(Status::failed_precondition(format!("no agent declares an instance of {}", cluster.name)));
    }
    let mut reasons = Vec::new();
    for agent in candidates {
        match ready(fleet, picture, agent, kind) {
            Ok(()) => return Ok(()),
            Err(status) => reasons.push(status.message().lines().next().unwrap_or_default().to_owned()),
        }
    }
    Err(Status::failed_precondition(format!(
        "no member of {} can do it: {}\nHINT: `walfleet cluster show {}` says how each one stands.",
        cluster.name,
        reasons.join("; "),
        cluster.name
    )))
}

#[tonic::async_trait]
impl Jobs for Api {
    async fn start_backup(
        &self,
        request: Request<pb::StartBackupRequest>,
    ) -> Result<Response<pb::StartJobReply>, Status> {
        let peer = peer(&request)?;
        let wanted = request.into_inner();
        let object = format!("cluster {}", wanted.cluster);
        let started = self.start_backup_job(&peer, wanted).await;
        let job = self.audited(&peer, "Jobs.StartBackup", &object, started).await?;
        Ok(Response::new(pb::StartJobReply { job: Some(self.job_view(&job)) }))
    }

    async fn start_restore(
        &self,
        request: Request<pb::StartRestoreRequest>,
    ) -> Result<Response<pb::StartJobReply>, Status> {
        let peer = peer(&request)?;
        let wanted = request.into_inner();
        let data_dir = wanted.order.as_ref().map(|order| order.data_dir.as_str()).unwrap_or_default();
        let object = format!("cluster {} on {} into {data_dir}", wanted.cluster, wanted.agent);
        let started = self.start_restore_job(&peer, wanted).await;
        let job = self.audited(&peer, "Jobs.StartRestore", &object, started).await?;
        Ok(Response::new(pb::StartJobReply { job: Some(self.job_view(&job)) }))
    }

    async fn start_verify(
        &self,
        request: Request<pb::StartVerifyRequest>,
    ) -> Result<Response<pb::StartJobReply>, Status> {
        let peer = peer(&request)?;
        let wanted = request.into_inner();
        let object = format!("cluster {}", wanted.cluster);
        let started = self.start_verify_job(&peer, wanted).await;
        let job = self.audited(&peer, "Jobs.StartVerify", &object, started).await?;
        Ok(Response::new(pb::StartJobReply { job: Some(self.job_view(&job)) }))
    }

    async fn start_backup_plan(
        &self,
        request: Request<pb::StartBackupPlanRequest>,
    ) -> Result<Response<pb::StartJobReply>, Status> {
        let peer = peer(&request)?;
        let wanted = request.into_inner();
        let object = format!("cluster {}", wanted.cluster);
        let started = self.start_backup_plan_job(&peer, wanted).await;
        let job = self.audited(&peer, "Jobs.StartBackupPlan", &object, started).await?;
        Ok(Response::new(pb::StartJobReply { job: Some(self.job_view(&job)) }))
    }

    async fn start_wal_find(
        &self,
        request: Request<pb::StartWalFindRequest>,
    ) -> Result<Response<pb::StartJobReply>, Status> {
        let peer = peer(&request)?;
        let wanted = request.into_inner();
        let object = format!("cluster {}", wanted.cluster);
        let started = self.start_wal_find_job(&peer, wanted).await;
        let job = self.audited(&peer, "Jobs.StartWalFind", &object, started).await?;
        Ok(Response::new(pb::StartJobReply { job: Some(self.job_view(&job)) }))
    }

    async fn get_job(&self, request: Request<pb::GetJobRequest>) -> Result<Response<pb::JobView>, Status> {
        let job = self.find_job(&request.into_inner().id).await?;
        Ok(Response::new(self.job_view(&job)))
    }

    async fn list_jobs(&self, request: Request<pb::ListJobsRequest>) -> Result<Response<pb::ListJobsReply>, Status> {
        let wanted = request.into_inner();
        let limit = if wanted.limit == 0 { 100 } else { usize::try_from(wanted.limit).unwrap_or(usize::MAX).min(1000) };
        let cluster = match wanted.cluster.as_str() {
            "" => None,
            name => Some(name.parse().map_err(|error| Status::invalid_argument(format!("cluster: {error}")))?),
        };
        let mut jobs = self.reconciler.jobs.active().await.map_err(of_job)?;
        jobs.retain(|job| cluster.as_ref().is_none_or(|cluster| job.cluster == *cluster));
        // Newest first, as the history comes.
        jobs.reverse();
        if !wanted.active && jobs.len() < limit {
            jobs.extend(self.reconciler.jobs.done(cluster.as_ref(), limit - jobs.len()).await.map_err(of_job)?);
        }
        jobs.truncate(limit);
        Ok(Response::new(pb::ListJobsReply { jobs: jobs.iter().map(|job| self.job_view(job)).collect() }))
    }

    type WatchJobStream = Pin<Box<dyn futures::Stream<Item = Result<pb::JobView, Status>> + Send>>;

    async fn watch_job(&self, request: Request<pb::GetJobRequest>) -> Result<Response<Self::WatchJobStream>, Status> {
        let peer = peer(&request)?;
        let job = self.find_job(&request.into_inner().id).await?;
        Ok(Response::new(Box::pin(watch::follow(self.clone(), peer, job.id))))
    }

    async fn cancel_job(&self, request: Request<pb::GetJobRequest>) -> Result<Response<pb::JobView>, Status> {
        let peer = peer(&request)?;
        let id = request.into_inner().id;
        let cancelled = self.cancel(&peer, &id).await;
        self.audited(&peer, "Jobs.CancelJob", &format!("job {id}"), cancelled).await.map(Response::new)
    }
}
