//! `walfleet retention`

use clap::Subcommand;

use crate::failure::Failure;
use crate::session::Session;

#[derive(Subcommand, Debug)]
pub enum RetentionCommand {
    /// What is kept of a cluster and what goes, each with its reason
    Plan {
        /// The cluster
        name: String,
    },
    /// Let a plan pass that removes far more than usual, or that keeps less than before
    ///
    /// The plan is shown and must be confirmed. What it removes now may be removed, once and within a day, and no more; a policy
    /// that keeps less than before, which acts a day after it was applied otherwise, acts at once. It is done within minutes.
    Release {
        /// The cluster
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

impl RetentionCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            RetentionCommand::Plan { name } => {
                let plan = session.client().await?.retention_plan(&name).await?;
                session.show(&plan)
            }
            RetentionCommand::Release { name, yes } => {
                let client = session.client().await?;
                let plan = client.retention_plan(&name).await?;
                session.show(&plan)?;
                if plan.can_be_released {
                    session.confirm(&format!("let this plan of {name} pass"), &name, yes)?;
                }
                client.release_retention(&name, &plan.digest).await?;
                session.note("Released: it is done within minutes, and once.");
                Ok(())
            }
        }
    }
}
