//! `walfleet repository`

use clap::Subcommand;

use super::policy::{delete, show};
use crate::failure::Failure;
use crate::session::Session;
use crate::view::resource::Repositories;

#[derive(Subcommand, Debug)]
pub enum RepositoryCommand {
    /// List repositories and where they are
    List,
    /// Show one repository, as it was applied
    Show {
        /// The repository
        name: String,
    },
    /// Remove what nothing needs any more, which the controller does by itself every few hours
    ///
    /// Shows how much there is of it. It is removed once restores under way have had their time.
    Collect {
        /// The repository
        name: String,
        /// Only show it
        #[arg(long)]
        dry_run: bool,
    },
    /// Forget a repository that no cluster uses; what is stored in it stays
    Delete {
        /// The repository
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

impl RepositoryCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            RepositoryCommand::List => {
                let repositories = session.client().await?.documents("Repository", "").await?;
                session.show(&Repositories { repositories })
            }
            RepositoryCommand::Show { name } => {
                show(session, "Repository", "repository", &name, "walfleet repository list shows them").await
            }
            RepositoryCommand::Collect { name, dry_run } => {
                let garbage = session.client().await?.collect_repository(&name, dry_run).await?;
                session.show(&garbage)?;
                if !dry_run {
                    session.note("The controller looks at each cluster now.");
                }
                Ok(())
            }
            RepositoryCommand::Delete { name, yes } => delete(session, "Repository", "repository", &name, yes).await,
        }
    }
}
