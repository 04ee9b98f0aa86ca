//! `walfleet policy`

use clap::Subcommand;

use crate::failure::Failure;
use crate::session::Session;
use crate::view::resource::{Policies, Resource};

#[derive(Subcommand, Debug)]
pub enum PolicyCommand {
    /// List policies and the clusters each binds
    List,
    /// Show one policy, as it was applied
    Show {
        /// The policy
        name: String,
    },
    /// Remove a policy that binds no cluster
    Delete {
        /// The policy
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

impl PolicyCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            PolicyCommand::List => {
                let policies = session.client().await?.documents("Policy", "").await?;
                session.show(&Policies { policies })
            }
            PolicyCommand::Show { name } => {
                show(session, "Policy", "policy", &name, "walfleet policy list shows them").await
            }
            PolicyCommand::Delete { name, yes } => delete(session, "Policy", "policy", &name, yes).await,
        }
    }
}

/// The document of that kind and name; shared by the nouns that are declared.
pub async fn show(
    session: &mut Session<'_>,
    kind: &str,
    noun: &'static str,
    name: &str,
    hint: &'static str,
) -> Result<(), Failure> {
    let found: Vec<Resource> = session.client().await?.documents(kind, name).await?;
    let resource = found.into_iter().find(|resource| resource.name == name);
    let resource = resource.ok_or_else(|| Failure::NotFound { kind: noun, name: name.to_owned(), hint })?;
    session.show(&resource)
}

/// Takes a declaration back. Backups and WAL stay where they are.
pub async fn delete(
    session: &mut Session<'_>,
    kind: &str,
    noun: &'static str,
    name: &str,
    yes: bool,
) -> Result<(), Failure> {
    session.confirm(&format!("delete {noun} {name}"), name, yes)?;
    session.client().await?.delete(kind, name).await?;
    session.note(&format!("{noun} {name} is deleted"));
    Ok(())
}
