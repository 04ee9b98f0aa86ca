//! `walfleet job`

use std::time::Duration;

use clap::Subcommand;

use crate::failure::Failure;
use crate::follow;
use crate::quantity::parse_duration;
use crate::session::Session;
use crate::view::job::Jobs;

#[derive(Subcommand, Debug)]
pub enum JobCommand {
    /// List jobs, the newest first
    #[command(after_help = "Examples:
  walfleet job list --active
  walfleet job list --cluster orders --limit 10 -o wide")]
    List {
        /// Only those of this cluster
        #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
        cluster: String,
        /// Only those that are not over
        #[arg(long)]
        active: bool,
        /// At most this many
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
    },
    /// Show one job: what it does, how far it is, how it ended
    Show {
        /// The job
        id: String,
    },
    /// Follow a job to its end; its outcome becomes the exit code
    Watch {
        /// The job
        id: String,
        /// Stop watching after this long (exit code 6); the job goes on
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        timeout: Option<Duration>,
    },
    /// Ask a job to stop at its next safe point
    Cancel {
        /// The job
        id: String,
    },
}

impl JobCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            JobCommand::List { cluster, active, limit } => {
                let jobs = session.client().await?.list_jobs(&cluster, active, limit).await?;
                session.show(&Jobs { jobs })
            }
            JobCommand::Show { id } => {
                let job = session.client().await?.job(&id).await?;
                session.show(&job)
            }
            JobCommand::Watch { id, timeout } => {
                let client = session.client().await?;
                let job = client.job(&id).await?;
                let job = follow::to_the_end(session, &client, job, timeout).await?;
                follow::conclude(session, &job)
            }
            JobCommand::Cancel { id } => {
                let job = session.client().await?.cancel_job(&id).await?;
                session.show(&job)?;
                if session.is_for_people() && !job.state.is_over() {
                    session.note("it stops at its next safe point; walfleet job watch shows when");
                }
                Ok(())
            }
        }
    }
}
