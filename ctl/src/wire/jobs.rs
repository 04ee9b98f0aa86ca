//! Jobs: starting, following and cancelling them.

use std::collections::BTreeMap;
use std::time::Duration;

use tonic::{Response, Status, Streaming};
use walfleet_proto::job::v1 as job_proto;
use walfleet_proto::operator::v1 as proto;
use walfleet_proto::operator::v1::jobs_client::JobsClient;

use super::found::found;
use super::recovery::target_text;
use super::{insist, moment, number, text};
use crate::client::{CallError, Client, LARGEST_ANSWER, Transport};
use crate::exit::Exit;
use crate::target::Target;
use crate::view::backup::Backup;
use crate::view::cost::{BackupPlan, Cost, Phase};
use crate::view::job::{Expected, Job, JobError, JobState, Order, Progress};
use crate::view::restore::Restore;
use crate::view::verify::{Finding, Verification};

/// A restore as the operator asked for it.
#[derive(Debug, Clone)]
pub struct RestoreSpec {
    pub cluster: String,
    pub agent: String,
    pub target: Target,
    /// Absolute, on the agent's host.
    pub data_dir: String,
    /// Old location (or oid) to new location.
    pub tablespaces: BTreeMap<String, String>,
    /// Empty: the best one for the target.
    pub backup: String,
    /// A replica; empty: the cluster's own repository.
    pub from: String,
    pub start: bool,
    pub keep_archiving: bool,
    /// 0: as in its configuration.
    pub port: u16,
    pub delta: bool,
    pub standby: bool,
    pub apply_delay: Duration,
    pub plan_only: bool,
}

/// A search for a moment.
#[derive(Debug, Clone)]
pub struct FindSpec {
    pub cluster: String,
    /// Empty: the controller picks.
    pub agent: String,
    pub around: jiff::Timestamp,
    pub within: Duration,
    pub timeline: String,
    /// 0: the agent's default.
    pub limit: u32,
    pub all: bool,
}

impl Client {
    fn jobs(&self) -> JobsClient<Transport> {
        JobsClient::new(self.transport()).max_decoding_message_size(LARGEST_ANSWER)
    }

    pub async fn start_backup(
        &self,
        cluster: &str,
        agent: &str,
        spread: bool,
        read_all: bool,
    ) -> Result<Job, CallError> {
        let message = proto::StartBackupRequest {
            cluster: cluster.to_owned(),
            agent: agent.to_owned(),
            spread_checkpoint: spread,
            read_all,
            idempotency_key: fresh_key(),
        };
        let attempt = || async { self.jobs().start_backup(self.request(message.clone())).await };
        self.started(insist(attempt).await, "start backup")
    }

    pub async fn start_backup_plan(&self, cluster: &str, agent: &str, read_all: bool) -> Result<Job, CallError> {
        let message = proto::StartBackupPlanRequest {
            cluster: cluster.to_owned(),
            agent: agent.to_owned(),
            read_all,
            idempotency_key: fresh_key(),
        };
        let attempt = || async { self.jobs().start_backup_plan(self.request(message.clone())).await };
        self.started(insist(attempt).await, "plan backup")
    }

    pub async fn start_wal_find(&self, spec: &FindSpec) -> Result<Job, CallError> {
        let message = proto::StartWalFindRequest {
            cluster: spec.cluster.clone(),
            agent: spec.agent.clone(),
            order: Some(job_proto::WalFindOrder {
                repository: String::new(),
                around_us: spec.around.as_microsecond(),
                within_seconds: spec.within.as_secs(),
                timeline: spec.timeline.clone(),
                limit: spec.limit,
                all: spec.all,
            }),
            idempotency_key: fresh_key(),
        };
        let attempt = || async { self.jobs().start_wal_find(self.request(message.clone())).await };
        self.started(insist(attempt).await, "search WAL")
    }

    pub async fn start_restore(&self, spec: &RestoreSpec) -> Result<Job, CallError> {
        let message = proto::StartRestoreRequest {
            cluster: spec.cluster.clone(),
            agent: spec.agent.clone(),
            order: Some(job_proto::RestoreOrder::from(spec)),
            idempotency_key: fresh_key(),
        };
        let attempt = || async { self.jobs().start_restore(self.request(message.clone())).await };
        self.started(insist(attempt).await, if spec.plan_only { "plan restore" } else { "start restore" })
    }

    /// Not sent again when the answer is lost: the call has no key, and two verifications read everything twice.
    pub async fn start_verify(&self, cluster: &str, backup: &str, deep: bool, agent: &str) -> Result<Job, CallError> {
        let request = self.request(proto::StartVerifyRequest {
            cluster: cluster.to_owned(),
            backup: backup.to_owned(),
            deep,
            agent: agent.to_owned(),
        });
        self.started(self.jobs().start_verify(request).await, "start verification")
    }

    fn started(
        &self,
        reply: Result<Response<proto::StartJobReply>, Status>,
        operation: &'static str,
    ) -> Result<Job, CallError> {
        let reply = reply.map_err(self.failed(operation))?.into_inner();
        let missing = || Status::data_loss("the controller's answer names no job\nHINT: walfleet job list shows it.");
        Ok(Job::from(reply.job.ok_or_else(missing).map_err(self.failed(operation))?))
    }

    pub async fn job(&self, id: &str) -> Result<Job, CallError> {
        let reply = self.jobs().get_job(self.request(by_id(id))).await.map_err(self.failed("show job"))?;
        Ok(Job::from(reply.into_inner()))
    }

    pub async fn list_jobs(&self, cluster: &str, active: bool, limit: u32) -> Result<Vec<Job>, CallError> {
        let request = self.request(proto::ListJobsRequest { cluster: cluster.to_owned(), active, limit });
        let reply = self.jobs().list_jobs(request).await.map_err(self.failed("list jobs"))?;
        Ok(reply.into_inner().jobs.into_iter().map(Job::from).collect())
    }

    pub async fn cancel_job(&self, id: &str) -> Result<Job, CallError> {
        let reply = self.jobs().cancel_job(self.request(by_id(id))).await.map_err(self.failed("cancel job"))?;
        Ok(Job::from(reply.into_inner()))
    }

    /// The job as it is now, then at every change. The deadline of calls bounds the first answer only.
    pub async fn watch_job(&self, id: &str) -> Result<JobWatch, CallError> {
        let reply = self.jobs().watch_job(self.request(by_id(id))).await.map_err(self.failed("watch job"))?;
        Ok(JobWatch { stream: reply.into_inner(), client: self.clone() })
    }
}

pub struct JobWatch {
    stream: Streaming<proto::JobView>,
    client: Client,
}

impl JobWatch {
    /// `None`: the controller ended the stream. Dropping the future loses nothing but an update.
    pub async fn next(&mut self) -> Result<Option<Job>, CallError> {
        Ok(self.stream.message().await.map_err(self.client.failed("watch job"))?.map(Job::from))
    }
}

fn by_id(id: &str) -> proto::GetJobRequest {
    proto::GetJobRequest { id: id.to_owned() }
}

fn fresh_key() -> String {
    format!("{:032x}", rand::random::<u128>())
}

impl From<&RestoreSpec> for job_proto::RestoreOrder {
    fn from(spec: &RestoreSpec) -> job_proto::RestoreOrder {
        job_proto::RestoreOrder {
            repository: spec.from.clone(),
            target: Some((&spec.target).into()),
            data_dir: spec.data_dir.clone(),
            tablespaces: spec.tablespaces.clone().into_iter().collect(),
            backup: spec.backup.clone(),
            start: spec.start,
            keep_archiving: spec.keep_archiving,
            port: u32::from(spec.port),
            delta: spec.delta,
            standby: spec.standby,
            apply_delay_seconds: spec.apply_delay.as_secs(),
            plan_only: spec.plan_only,
            complete: Vec::new(),
        }
    }
}

impl From<job_proto::JobState> for JobState {
    fn from(wire: job_proto::JobState) -> JobState {
        match wire {
            job_proto::JobState::Queued => JobState::Queued,
            job_proto::JobState::Offered => JobState::Offered,
            job_proto::JobState::Running => JobState::Running,
            job_proto::JobState::Succeeded => JobState::Succeeded,
            job_proto::JobState::Failed => JobState::Failed,
            job_proto::JobState::Cancelled => JobState::Cancelled,
            job_proto::JobState::Unknown | job_proto::JobState::Unspecified => JobState::Unknown,
        }
    }
}

impl From<proto::JobView> for Job {
    fn from(wire: proto::JobView) -> Job {
        use job_proto::job_outcome::Report;
        let state = JobState::from(wire.state());
        let outcome = wire.outcome.unwrap_or_default();
        let failed = matches!(state, JobState::Failed | JobState::Cancelled);
        let error = if failed { Some(error_of(state, &outcome)) } else { None };
        let (mut backup, mut restore, mut verification, mut backup_plan) = (None, None, None, None);
        let mut search = None;
        match outcome.report {
            Some(Report::Backup(report)) => backup = Some(Backup::from(report)),
            Some(Report::Restore(report)) => restore = Some(Restore::from(report)),
            Some(Report::Verify(report)) => verification = Some(Verification::from(report)),
            Some(Report::BackupPlan(report)) => backup_plan = Some(BackupPlan::from(report)),
            Some(Report::WalFind(report)) => search = Some(found(report)),
            None => {}
        }
        Job {
            id: wire.id,
            kind: wire.kind,
            cluster: wire.cluster,
            agent: text(wire.agent),
            state,
            reason: text(wire.reason),
            attempt: wire.attempt,
            created_at: moment(wire.created_at_us),
            started_at: moment(wire.started_at_us),
            finished_at: moment(wire.finished_at_us),
            requested_by: wire.requested_by,
            progress: wire.progress.map(Progress::from),
            order: wire.order.and_then(|order| order.work).map(Order::from),
            error,
            backup,
            restore,
            verification,
            backup_plan,
            found: search,
            cost: outcome.cost.map(Cost::from),
        }
    }
}

impl From<job_proto::JobCost> for Cost {
    fn from(wire: job_proto::JobCost) -> Cost {
        let requests = [wire.gets, wire.puts, wire.heads, wire.lists].into_iter().fold(0, u64::saturating_add);
        let phase = |phase: job_proto::PhaseCost| Phase {
            phase: phase.phase,
            seconds: phase.seconds,
            bytes: number(phase.bytes),
        };
        Cost {
            store_requests: requests,
            gets: wire.gets,
            puts: wire.puts,
            heads: wire.heads,
            lists: wire.lists,
            retries: wire.retries,
            received_bytes: wire.received_bytes,
            sent_bytes: wire.sent_bytes,
            phases: wire.phases.into_iter().map(phase).collect(),
        }
    }
}

impl From<job_proto::BackupPlanReport> for BackupPlan {
    fn from(wire: job_proto::BackupPlanReport) -> BackupPlan {
        BackupPlan {
            cluster_bytes: wire.cluster_bytes,
            read_bytes: wire.read_bytes,
            stored_bytes: wire.stored_bytes,
            store_requests: wire.store_requests,
            estimated_seconds: wire.seconds,
            estimated_from: text(wire.basis),
            read_all_because: text(wire.read_all_because),
            notes: wire.notes,
        }
    }
}

fn error_of(state: JobState, outcome: &job_proto::JobOutcome) -> JobError {
    let cancelled = state == JobState::Cancelled;
    // That it was cancelled says enough.
    let unsaid = if cancelled { "" } else { "no reason was given" };
    JobError {
        code: text(outcome.error_code.clone())
            .unwrap_or_else(|| if cancelled { "job.cancelled" } else { "unknown" }.to_owned()),
        message: text(outcome.error_message.clone()).unwrap_or_else(|| unsaid.to_owned()),
        exit_code: Exit::of_failed_job(i64::from(outcome.exit_code)).code(),
        retryable: outcome.retryable,
    }
}

impl From<job_proto::JobProgress> for Progress {
    fn from(wire: job_proto::JobProgress) -> Progress {
        Progress {
            phase: wire.phase,
            done_bytes: wire.done_bytes,
            total_bytes: number(wire.total_bytes),
            at: moment(wire.at_us),
            spared_bytes: wire.spared_bytes,
            bytes_per_second: wire.bytes_per_second,
            left_seconds: wire.left_seconds,
            still_seconds: number(wire.still_seconds),
            store_requests: wire.store_requests,
            expected: wire.expected.map(|expected| Expected { seconds: expected.seconds, basis: expected.basis }),
        }
    }
}

impl From<job_proto::job_order::Work> for Order {
    fn from(wire: job_proto::job_order::Work) -> Order {
        use job_proto::job_order::Work;
        match wire {
            Work::Backup(order) => Order { repository: text(order.repository), ..Order::default() },
            Work::BackupPlan(order) => Order { repository: text(order.repository), ..Order::default() },
            Work::WalFind(order) => Order { repository: text(order.repository), ..Order::default() },
            Work::Verify(order) => Order {
                repository: text(order.repository),
                backup: text(order.backup),
                deep: Some(order.deep),
                ..Order::default()
            },
            Work::Restore(order) => Order {
                repository: text(order.repository),
                backup: text(order.backup),
                target: order.target.as_ref().map(target_text),
                data_dir: text(order.data_dir),
                tablespaces: order.tablespaces.into_iter().collect(),
                deep: None,
                start: Some(order.start),
                plan_only: Some(order.plan_only),
            },
        }
    }
}

impl From<job_proto::RestoreReport> for Restore {
    fn from(wire: job_proto::RestoreReport) -> Restore {
        Restore {
            data_dir: wire.data_dir,
            backup: wire.backup,
            cluster_bytes: wire.cluster_bytes,
            fetched_bytes: wire.fetched_bytes,
            store_requests: wire.store_requests,
            wal_from_lsn: text(wire.wal_from_lsn),
            wal_to_lsn: text(wire.wal_to_lsn),
            timeline: wire.timeline,
            reached_lsn: text(wire.reached_lsn),
            reached_commit_at: moment(wire.reached_commit_us),
            server_state: wire.server_state,
            connection: text(wire.connection),
            copy_seconds: wire.copy_seconds,
            replay_seconds: wire.replay_seconds,
            estimated_seconds: number(wire.estimated_seconds),
            notes: wire.notes,
            wal_bytes: wire.wal_bytes,
            wal_segments: wire.wal_segments,
            estimated_from: text(wire.estimated_from),
            at_most: wire.at_most,
        }
    }
}

impl From<job_proto::VerifyReport> for Verification {
    fn from(wire: job_proto::VerifyReport) -> Verification {
        let finding = |finding: job_proto::VerifyFinding| Finding {
            object: finding.object,
            problem: finding.problem,
            backups: finding.backups,
        };
        Verification {
            packs: wire.packs,
            segments: wire.segments,
            bytes: wire.bytes,
            findings: wire.findings.into_iter().map(finding).collect(),
        }
    }
}
