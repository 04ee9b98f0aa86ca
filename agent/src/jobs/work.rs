//! Orders carried out on this host: finds the cluster, the repository and the key that an order is about, and hands over
//! to `backup`, `restore` and `verify`. Used by the job runner and by the host's own commands alike.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::keyring::KeyringError;
use walfleet_repository::verify::{self, Depth, VerifyError, VerifySpec};

use super::Work;
use super::order::{BackupOrder, Checkpoint, JobOrder, RestoreOrder, VerifyOrder, WorkOrder};
use super::report::{Report, VerifyFinding, VerifyReport};
use crate::access::{Access, AccessError, ClusterAccess, RepositoryAccess};
use crate::archiving::Archiving;
use crate::backup::{self, BackupRequest};
use crate::config::Config;
use crate::failure::{ExitCode, Failure, Remedy};
use crate::postgres::server::CheckpointPace;
use crate::progress::Progress;
use crate::restore::{self, RestoreRequest};
use crate::wal::socket::Shippers;

/// How long a backup of a standby waits for the primary to finish the segment that makes it consistent.
const WAL_WAIT: Duration = Duration::from_secs(15 * 60);

/// How long a restore waits to be granted the cluster's key by a host that has it.
const GRANT_WAIT: Duration = Duration::from_secs(60);

/// The real [`Work`].
pub struct HostWork {
    config: Arc<Config>,
    access: watch::Receiver<Option<Arc<Access>>>,
    archiving: Arc<Archiving>,
}

impl HostWork {
    pub fn new(
        config: Arc<Config>,
        access: watch::Receiver<Option<Arc<Access>>>,
        archiving: Arc<Archiving>,
    ) -> HostWork {
        HostWork { config, access, archiving }
    }

    fn access(&self) -> Result<Arc<Access>, Failure> {
        self.access.borrow().clone().ok_or_else(|| {
            let message = "this agent has not heard yet which clusters and repositories it may use";
            Failure::new("agent.not_ready", ExitCode::Failed, Remedy::Retry, message)
        })
    }

    async fn backup(
        &self,
        job: &JobOrder,
        order: &BackupOrder,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Report, Failure> {
        let access = self.access()?;
        let cluster = member(&access, job, &order.repository)?;
        let instance = cluster.instance.clone().ok_or_else(|| no_instance(cluster))?;
        let connection = blocking({
            let instance = instance.clone();
            move || instance.connection_string()
        })
        .await?
        .map_err(|error| Failure::new("backup.postgres", ExitCode::Failed, Remedy::Retry, error))?;
        let shipper = self.archiving.shipper(&instance.data_dir).await;
        let request = BackupRequest {
            cluster: access.open_or_begin(&cluster.repository, cluster.name.clone()).await?,
            signer: Arc::new(access.key.signer().map_err(AccessError::from)?),
            member: access.member.clone(),
            data_dir: instance.data_dir,
            connection,
            run: Some(order.run.clone()),
            pace: match order.checkpoint {
                Checkpoint::Fast => CheckpointPace::Fast,
                Checkpoint::Spread => CheckpointPace::Spread,
            },
            compression_level: order.compression_level.unwrap_or(cluster.compression_level),
            processes: order.processes.unwrap_or(cluster.processes),
            shipper: shipper.map_err(|e| Failure::new("backup.repository", ExitCode::Failed, Remedy::Retry, e))?,
            wal_wait: WAL_WAIT,
        };
        Ok(Report::Backup(backup::run(request, progress, cancel).await?))
    }

    async fn restore(
        &self,
        job: &JobOrder,
        order: &RestoreOrder,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Report, Failure> {
        let unsupported =
            [(order.delta, "a delta restore"), (order.standby || order.apply_delay.is_some(), "restoring a standby")];
        if let Some((_, what)) = unsupported.iter().find(|(asked, _)| *asked) {
            let message =
                format!("{what} is not supported by this version\nHINT: restore into an empty directory, without it.");
            return Err(Failure::new("restore.unsupported", ExitCode::Refused, Remedy::Operator, message));
        }
        let access = self.access()?;
        let cluster = access.cluster(&job.cluster)?;
        let repository = if order.repository.is_empty() {
            cluster.repository.clone()
        } else {
            access.repository(&order.repository)?.clone()
        };
        progress.enter("open", 0);
        let request = RestoreRequest {
            cluster: open_granted(&access, &repository, cluster, cancel).await?,
            key_file: access.key.path.clone(),
            url: repository.url.clone(),
            options: repository.options.clone(),
            target: order.target.clone(),
            data_dir: order.data_dir.clone(),
            tablespaces: order.tablespaces.clone(),
            backup: order.backup.clone(),
            start: order.start,
            keep_archiving: order.keep_archiving,
            port: order.port,
            plan_only: order.plan_only,
            processes: cluster.processes,
            bin_dirs: self.config.postgres.bin_dirs.clone(),
            program: std::env::current_exe().map_err(|error| {
                Failure::new(
                    "restore.program",
                    ExitCode::Failed,
                    Remedy::Operator,
                    format!("find this program: {error}"),
                )
            })?,
        };
        Ok(Report::Restore(restore::run(request, progress, cancel).await?))
    }

    async fn verify(
        &self,
        job: &JobOrder,
        order: &VerifyOrder,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Report, Failure> {
        let access = self.access()?;
        let cluster = access.cluster(&job.cluster)?;
        let opened = access.open(&cluster.repository, cluster.name.clone()).await?;
        let depth = if order.deep { Depth::Content } else { Depth::Stored };
        let spec = VerifySpec { backup: order.backup.clone(), depth };
        progress.enter("verify", 0);
        let verified = verify::verify(&opened, &spec, |bytes| progress.add(bytes), cancel).await;
        let report = verified.map_err(|error| match error {
            VerifyError::Cancelled => Failure::cancelled(),
            VerifyError::NoSuchBackup(_) => {
                Failure::new("verify.no_backup", ExitCode::NotFound, Remedy::Operator, error)
            }
            VerifyError::Cluster(error) => AccessError::Cluster(error).into(),
        })?;
        let finding = |finding: verify::Finding| VerifyFinding {
            object: finding.object,
            problem: finding.problem,
            backups: finding.backups,
        };
        Ok(Report::Verify(VerifyReport {
            packs: report.packs,
            segments: report.segments,
            bytes: report.bytes,
            findings: report.findings.into_iter().map(finding).collect(),
        }))
    }
}

/// Opens a cluster that another host may be granting to this one just now.
async fn open_granted(
    access: &Access,
    repository: &RepositoryAccess,
    cluster: &ClusterAccess,
    cancel: &CancellationToken,
) -> Result<OpenCluster, Failure> {
    let began = tokio::time::Instant::now();
    loop {
        match access.open(repository, cluster.name.clone()).await {
            Err(AccessError::Cluster(ClusterError::Key { source: KeyringError::NotGranted { .. }, .. }))
                if began.elapsed() < GRANT_WAIT => {}
            other => return Ok(other?),
        }
        tokio::select! {
            () = cancel.cancelled() => return Err(Failure::cancelled()),
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
}

fn no_instance(cluster: &ClusterAccess) -> Failure {
    let message = format!(
        "no instance of cluster {} is known on this host\nHINT: name it in the agent's instances.",
        cluster.name
    );
    Failure::new("backup.no_instance", ExitCode::Refused, Remedy::Operator, message)
}

async fn blocking<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(act)
        .await
        .map_err(|error| Failure::new("agent.panicked", ExitCode::Failed, Remedy::Retry, error))
}

#[async_trait]
impl Work for HostWork {
    async fn run(&self, order: JobOrder, progress: Progress, cancel: CancellationToken) -> Result<Report, Failure> {
        match &order.work {
            WorkOrder::Backup(backup) => self.backup(&order, backup, &progress, &cancel).await,
            WorkOrder::Restore(restore) => self.restore(&order, restore, &progress, &cancel).await,
            WorkOrder::Verify(verify) => self.verify(&order, verify, &progress, &cancel).await,
        }
    }
}

/// The cluster of an order that only a member can carry out, in the repository that the order means.
fn member<'a>(access: &'a Access, job: &JobOrder, repository: &str) -> Result<&'a ClusterAccess, Failure> {
    let cluster = access.cluster(&job.cluster)?;
    if cluster.repository.name != repository {
        let message = format!(
            "the order is for repository \"{repository}\", and this agent knows cluster {} in \"{}\"",
            cluster.name, cluster.repository.name
        );
        // The newer desired state may be on its way.
        return Err(Failure::new("repository.unknown", ExitCode::NotFound, Remedy::Retry, message));
    }
    Ok(cluster)
}
