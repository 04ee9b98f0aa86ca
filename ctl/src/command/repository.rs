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
            RepositoryCommand::Delete { name, yes } => delete(session, "Repository", "repository", &name, yes).await,
        }
    }
}
