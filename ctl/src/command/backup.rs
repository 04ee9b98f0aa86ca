//! `walfleet backup`

use std::time::Duration;

use clap::{Args, Subcommand};

use crate::failure::Failure;
use crate::follow::{self, WaitArgs, started};
use crate::quantity::parse_duration;
use crate::session::Session;
use crate::view::backup::Backups;
use crate::view::cost::PlannedBackup;

#[derive(Subcommand, Debug)]
pub enum BackupCommand {
    Plan(PlanArgs),
    Start(StartArgs),
    /// List the backups of a cluster
    List {
        name: String,
    },
    /// Show one backup
    Show {
        id: String,
    },
    /// Take an expired backup out of the trash
    ///
    /// It is kept from then on for as long as the policy's retention wants it, which is asked anew within hours: place a hold on one
    /// that is to stay.
    Undelete {
        id: String,
    },
    Verify(VerifyArgs),
}

/// A plan asks a server and reads a few small objects; one that takes longer is stuck.
const PLAN_LIMIT: Duration = Duration::from_secs(120);

/// Say what a backup would take: how many bytes read and stored, how many requests, how long
///
/// Nothing is changed. The figures are those of the cluster's last backups of the same kind; where there are none, there
/// is no figure.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet backup plan orders
  walfleet backup plan orders --on db2 --read-all")]
pub struct PlanArgs {
    /// The cluster
    name: String,
    /// The member it would be taken from [default: the controller chooses, a standby if it can]
    #[arg(long, value_name = "AGENT", default_value = "", hide_default_value = true)]
    on: String,
    /// As if every file were read whole
    #[arg(long)]
    read_all: bool,
    /// Stop waiting for the plan after this long (exit code 6) [default: 2m]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
}

impl PlanArgs {
    async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let client = session.client().await?;
        let job = client.start_backup_plan(&self.name, &self.on, self.read_all).await?;
        let job = follow::to_the_end(session, &client, job, Some(self.timeout.unwrap_or(PLAN_LIMIT))).await?;
        follow::succeeded(&job)?;
        let empty = || Failure::Usage("the plan came back empty".to_owned());
        let plan = job.backup_plan.ok_or_else(empty)?;
        session.show(&PlannedBackup { cluster: job.cluster, agent: job.agent.unwrap_or_default(), plan })
    }
}

/// Take a backup of a cluster now
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet backup start orders --wait
  walfleet backup start orders --on db2 --wait --timeout 2h
  id=$(walfleet backup start orders -o json | jq -r .id)")]
pub struct StartArgs {
    /// The cluster
    name: String,
    /// The member to take it from [default: the controller chooses, a standby if it can]
    #[arg(long, value_name = "AGENT", default_value = "", hide_default_value = true)]
    on: String,
    /// Spread the checkpoint over time instead of making it at once: slower, easier on the disks
    #[arg(long)]
    spread_checkpoint: bool,
    /// Read every file whole, and hold what the WAL says did not change against the backup before.
    #[arg(long)]
    read_all: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Read backups back and compare every byte with what was written
///
/// Ends with exit code 1 if anything is damaged, and says which backups it touches.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet backup verify orders --wait
  walfleet backup verify orders --backup bk_06e2r4ycmn8q7t1w5x3z --deep --wait")]
pub struct VerifyArgs {
    /// The cluster
    name: String,
    /// This backup only [default: all that are kept, and the WAL]
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    backup: String,
    /// Decrypt and decompress as well, beyond comparing the stored bytes
    #[arg(long)]
    deep: bool,
    /// The agent that reads [default: the controller chooses]
    #[arg(long, value_name = "AGENT", default_value = "", hide_default_value = true)]
    on: String,
    #[command(flatten)]
    wait: WaitArgs,
}

impl BackupCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            BackupCommand::Plan(args) => args.run(session).await,
            BackupCommand::Start(args) => {
                let client = session.client().await?;
                let job = client.start_backup(&args.name, &args.on, args.spread_checkpoint, args.read_all).await?;
                started(session, &client, job, &args.wait).await
            }
            BackupCommand::List { name } => {
                let backups = session.client().await?.backups(&name).await?;
                session.show(&Backups { cluster: name, backups })
            }
            BackupCommand::Show { id } => {
                let backup = session.client().await?.backup(&id).await?;
                session.show(&backup)
            }
            BackupCommand::Undelete { id } => {
                let client = session.client().await?;
                let backup = client.backup(&id).await?;
                client.undelete(&backup.cluster, &id).await?;
                session.show(&client.backup(&id).await?)
            }
            BackupCommand::Verify(args) => {
                let client = session.client().await?;
                let job = client.start_verify(&args.name, &args.backup, args.deep, &args.on).await?;
                started(session, &client, job, &args.wait).await
            }
        }
    }
}
