//! Orders carried out on this host: finds the cluster, the repository and the key that an order is about, and hands over
//! to `backup`, `restore` and `walfleet_repository::verify`. Used by the job runner and by the host's own commands alike.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use walfleet_repository::cluster::ClusterError;
use walfleet_repository::verify::{Depth, Seen, VerifyError, VerifySpec, verify};

use super::Work;
use super::order::{
    BackupOrder, BackupPlanOrder, Checkpoint, JobOrder, RestoreOrder, VerifyOrder, WalFindOrder, WorkOrder,
};
use super::report::{Report, VerifyFinding, VerifyReport};
use crate::access::{Access, AccessError, ClusterAccess, InstanceAccess, RepositoryAccess, cluster_failure};
use crate::archiving::Archiving;
use crate::backup::plan::BackupPlanRequest;
use crate::backup::{self, BackupRequest};
use crate::config::Config;
use crate::estimate::Past;
use crate::failure::{ExitCode, Failure, Remedy};
use crate::history::{self, History};
use crate::limits::HostLimits;
use crate::limits::threads::BulkThreads;
use crate::limits::yielding;
use crate::postgres::server::CheckpointPace;
use crate::progress::Progress;
use crate::restore::{self, RestoreRequest};
use crate::tasks;
use crate::wal::find::{self, FindRequest};
use crate::wal::socket::Shippers;

/// At the end of a backup: for WAL that another host ships, or that archive_command has yet to bring. Longer than any
/// archive_timeout in use, shorter than the patience of a schedule.
const WAL_WAIT: Duration = Duration::from_secs(3600);

/// How long after an order the desired state that explains it may come: both are on their way at the same time.
const HEARD_WITHIN: Duration = Duration::from_secs(10);

/// The real [`Work`].
#[derive(Clone)]
pub struct HostWork {
    config: Arc<Config>,
    access: watch::Receiver<Option<Arc<Access>>>,
    archiving: Arc<Archiving>,
    limits: Arc<HostLimits>,
    threads: Arc<BulkThreads>,
    /// As it was started: a package upgrade replaces the file under the running agent.
    program: PathBuf,
    history: History,
}

impl HostWork {
    /// To be made on the runtime that ships WAL.
    pub fn new(
        config: Arc<Config>,
        access: watch::Receiver<Option<Arc<Access>>>,
        archiving: Arc<Archiving>,
        limits: Arc<HostLimits>,
    ) -> std::io::Result<HostWork> {
        let threads = Arc::new(BulkThreads::new(&limits)?);
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("walfleet-agent"));
        let history = History::new(&config.state_dir);
        Ok(HostWork { config, access, archiving, limits, threads, program, history })
    }

    /// What this host may use, once it knows the order's cluster: an order may be faster than what explains it.
    async fn access(
        &self,
        job: &JobOrder,
        repository: &str,
        cancel: &CancellationToken,
    ) -> Result<Arc<Access>, Failure> {
        let mut heard = self.access.clone();
        let deadline = tokio::time::Instant::now() + HEARD_WITHIN;
        loop {
            let access = heard.borrow_and_update().clone().ok_or_else(not_ready);
            let refused = match access.and_then(|access| readable(&access, job, repository).map(|_| access.clone())) {
                Ok(access) => return Ok(access),
                Err(failure) => failure,
            };
            // Without a controller nothing is to be heard.
            if self.config.controller.is_none() {
                return Err(refused);
            }
            let changed = tokio::select! {
                () = cancel.cancelled() => return Err(Failure::cancelled()),
                changed = tokio::time::timeout_at(deadline, heard.changed()) => changed,
            };
            if !matches!(changed, Ok(Ok(()))) {
                return Err(refused);
            }
        }
    }

    /// Where this host's own servers live.
    fn servers(&self) -> Vec<PathBuf> {
        let access = self.access.borrow();
        let clusters = access.iter().flat_map(|access| access.clusters.values());
        clusters.filter_map(|cluster| Some(cluster.instance.as_ref()?.data_dir.clone())).collect()
    }

    /// What jobs of the cluster took, as the controller says and as this host remembers.
    async fn past(&self, job: &JobOrder) -> Vec<Past> {
        let (history, cluster) = (self.history.clone(), job.cluster.clone());
        let kept = tokio::task::spawn_blocking(move || history.of(&cluster)).await.unwrap_or_default();
        history::gather(&job.past, kept, Vec::new())
    }

    async fn remember(&self, job: &JobOrder, report: &Report, progress: &Progress) {
        let Some(access) = self.access.borrow().clone() else { return };
        let delta = matches!(&job.work, WorkOrder::Restore(restore) if restore.delta);
        let Some(past) = history::past_of(report, &progress.cost(), &access.member, delta) else { return };
        let (history, cluster) = (self.history.clone(), job.cluster.clone());
        // Lost with the process at worst, as any history of this host.
        let _ = tokio::task::spawn_blocking(move || history.add(&cluster, past)).await;
    }

    async fn backup_plan(
        &self,
        job: &JobOrder,
        order: &BackupPlanOrder,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Report, Failure> {
        let access = self.access(job, &order.repository, cancel).await?;
        let cluster = known(&access, job, &order.repository)?;
        let instance = cluster.instance.as_ref().ok_or_else(|| no_instance(cluster))?;
        progress.enter("plan", 0);
        let opened = match access.open(&cluster.repository, cluster.name.clone()).await {
            Err(AccessError::Cluster(ClusterError::Unknown(_))) => None,
            opened => Some(opened?),
        };
        if let Some(open) = &opened {
            progress.count(open.repository().store());
        }
        let request = BackupPlanRequest {
            cluster: opened,
            connection: connection(instance.clone()).await?,
            read_all: order.read_all,
            host: access.member.clone(),
            past: self.past(job).await,
        };
        let planned = tokio::select! {
            // It only reads.
            () = cancel.cancelled() => return Err(Failure::cancelled()),
            planned = backup::plan::plan(request) => planned?,
        };
        Ok(Report::BackupPlan(planned))
    }

    async fn backup(
        &self,
        job: &JobOrder,
        order: &BackupOrder,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Report, Failure> {
        let access = self.access(job, &order.repository, cancel).await?;
        let cluster = known(&access, job, &order.repository)?;
        let instance = cluster.instance.as_ref().ok_or_else(|| no_instance(cluster))?;
        let connection = connection(instance.clone()).await?;
        let (archiving, data_dir) = (Arc::clone(&self.archiving), instance.data_dir.clone());
        let shipper = self.threads.normal().spawn(async move { archiving.shipper(&data_dir).await });
        let shipper = tasks::settled(shipper).await;
        let allowance = self.limits.allowance(cancel);
        let open = access.open_or_begin(cluster).await?;
        let archiving = |message| Failure::new("backup.archiving", ExitCode::Failed, Remedy::Retry, message);
        let request = BackupRequest {
            cluster: open.paced(Arc::new(allowance.clone())),
            kin: cluster.kin()?,
            signer: Arc::new(access.key.signer().map_err(AccessError::from)?),
            member: access.member.clone(),
            data_dir: instance.data_dir.clone(),
            connection,
            run: Some(order.run.clone()),
            pace: match order.checkpoint {
                Checkpoint::Fast => CheckpointPace::Fast,
                Checkpoint::Spread => CheckpointPace::Spread,
            },
            read_all: order.read_all,
            compression_level: order.compression_level.unwrap_or(cluster.compression_level),
            processes: order.processes.unwrap_or(cluster.processes),
            allowance,
            shipper: shipper.map_err(archiving)?,
            wal_wait: WAL_WAIT,
            past: self.past(job).await,
        };
        progress.count(request.cluster.repository().store());
        Ok(Report::Backup(backup::run(request, progress, cancel).await?))
    }

    async fn restore(
        &self,
        job: &JobOrder,
        order: &RestoreOrder,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Report, Failure> {
        if order.standby {
            let message = "this agent restores to a primary only";
            return Err(Failure::new("restore.unsupported", ExitCode::Refused, Remedy::Operator, message));
        }
        let access = self.access(job, &order.repository, cancel).await?;
        let (cluster, repository) = readable(&access, job, &order.repository)?;
        let allowance = self.limits.allowance(cancel);
        let open = access.open(repository, cluster.name.clone()).await?;
        let request = RestoreRequest {
            cluster: open.paced(Arc::new(allowance.clone())),
            key_file: access.key.path.clone(),
            url: repository.url.clone(),
            options: repository.options.clone(),
            target: order.target.clone(),
            data_dir: order.data_dir.clone(),
            tablespaces: order.tablespaces.clone(),
            delta: order.delta,
            backup: order.backup.clone(),
            complete: order.complete.clone(),
            start: order.start,
            keep_archiving: order.keep_archiving,
            port: order.port,
            plan_only: order.plan_only,
            processes: cluster.processes,
            allowance,
            normal: self.threads.normal().clone(),
            bin_dirs: self.config.postgres.bin_dirs.clone(),
            program: self.program.clone(),
            host: access.member.clone(),
            past: self.past(job).await,
        };
        progress.count(request.cluster.repository().store());
        Ok(Report::Restore(restore::run(request, progress, cancel).await?))
    }

    async fn verify(
        &self,
        job: &JobOrder,
        order: &VerifyOrder,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Report, Failure> {
        let access = self.access(job, &order.repository, cancel).await?;
        let (cluster, repository) = readable(&access, job, &order.repository)?;
        let allowance = self.limits.allowance(cancel);
        let open = access.open(repository, cluster.name.clone()).await?.paced(Arc::new(allowance.clone()));
        let depth = if order.deep { Depth::Content } else { Depth::Stored };
        let spec = VerifySpec { backup: order.backup.clone(), depth };
        progress.count(open.repository().store());
        progress.enter("plan", 0);
        let seen = |seen| match seen {
            Seen::Total(bytes) => progress.enter("verify", bytes),
            Seen::Read(bytes) => progress.add(bytes),
        };
        let report = verify(&open, &spec, seen, cancel).await.map_err(verify_failure)?;
        Ok(Report::Verify(VerifyReport {
            packs: report.packs,
            segments: report.segments,
            bytes: report.bytes,
            findings: report
                .findings
                .into_iter()
                .map(|finding| VerifyFinding {
                    object: finding.object,
                    problem: finding.problem,
                    backups: finding.backups,
                })
                .collect(),
        }))
    }

    async fn wal_find(
        &self,
        job: &JobOrder,
        order: &WalFindOrder,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Report, Failure> {
        let access = self.access(job, &order.repository, cancel).await?;
        let cluster = known(&access, job, &order.repository)?;
        let allowance = self.limits.allowance(cancel);
        let open = access.open(&cluster.repository, cluster.name.clone()).await?;
        let request = FindRequest {
            cluster: open.paced(Arc::new(allowance)),
            around: order.around,
            within: order.within,
            timeline: order.timeline,
            limit: order.limit,
            show: order.show,
        };
        progress.count(request.cluster.repository().store());
        Ok(Report::WalFind(Box::new(find::find(request, progress, cancel).await?)))
    }
}

#[async_trait]
impl Work for HostWork {
    async fn run(&self, order: JobOrder, progress: Progress, cancel: CancellationToken) -> Result<Report, Failure> {
        let work = self.clone();
        let doing = async move {
            let report = match &order.work {
                WorkOrder::Backup(backup) => work.backup(&order, backup, &progress, &cancel).await,
                WorkOrder::Restore(restore) => work.restore(&order, restore, &progress, &cancel).await,
                WorkOrder::Verify(verify) => work.verify(&order, verify, &progress, &cancel).await,
                WorkOrder::BackupPlan(plan) => work.backup_plan(&order, plan, &progress, &cancel).await,
                WorkOrder::WalFind(find) => work.wal_find(&order, find, &progress, &cancel).await,
            }?;
            work.remember(&order, &report, &progress).await;
            Ok::<Report, Failure>(report)
        };
        tokio::select! {
            result = self.threads.run(doing) => result,
            never = yielding::keep_yielding(Arc::clone(&self.limits), self.servers()) => match never {},
        }
    }
}

fn not_ready() -> Failure {
    let message = "this agent has not heard yet which clusters and repositories it may use";
    Failure::new("agent.not_ready", ExitCode::Failed, Remedy::Retry, message)
}

/// The order's cluster, in the repository that the order means.
fn known<'a>(access: &'a Access, job: &JobOrder, repository: &str) -> Result<&'a ClusterAccess, Failure> {
    let cluster = access.cluster(&job.cluster)?;
    if cluster.repository.name != repository {
        return Err(elsewhere(cluster, repository));
    }
    Ok(cluster)
}

/// The same for reading, which may be from a replica.
fn readable<'a>(
    access: &'a Access,
    job: &JobOrder,
    repository: &str,
) -> Result<(&'a ClusterAccess, &'a Arc<RepositoryAccess>), Failure> {
    let cluster = access.cluster(&job.cluster)?;
    let found = access.repositories.get(repository).ok_or_else(|| elsewhere(cluster, repository))?;
    Ok((cluster, found))
}

fn elsewhere(cluster: &ClusterAccess, repository: &str) -> Failure {
    let message = format!(
        "the order is for repository \"{repository}\", and this agent knows cluster {} in \"{}\"",
        cluster.name, cluster.repository.name
    );
    // The newer desired state may be on its way.
    Failure::new("repository.unknown", ExitCode::NotFound, Remedy::Retry, message)
}

fn no_instance(cluster: &ClusterAccess) -> Failure {
    let message = format!(
        "no instance of cluster {} is known on this host\nHINT: name its data directory in the agent's instances.",
        cluster.name
    );
    Failure::new("backup.no_instance", ExitCode::NotFound, Remedy::Operator, message)
}

async fn connection(instance: InstanceAccess) -> Result<String, Failure> {
    instance.reach().await.map_err(|error| {
        let message = crate::identity::connect::chain(&error);
        Failure::new("backup.postgres", ExitCode::Failed, Remedy::Retry, message)
    })
}

fn verify_failure(error: VerifyError) -> Failure {
    match &error {
        VerifyError::Cluster(cluster) => cluster_failure(cluster),
        VerifyError::NoSuchBackup(_) => Failure::new("backup.unknown", ExitCode::NotFound, Remedy::Operator, error),
        VerifyError::Cancelled => Failure::cancelled(),
    }
}
