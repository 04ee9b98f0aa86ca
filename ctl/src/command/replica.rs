//! `walfleet replica`

use clap::Subcommand;

use crate::failure::Failure;
use crate::session::Session;

#[derive(Subcommand, Debug)]
pub enum ReplicaCommand {
    /// What came to replicas, and how far each trails
    Status,
}

impl ReplicaCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            ReplicaCommand::Status => {
                let replicas = session.client().await?.replicas().await?;
                session.show(&replicas)
            }
        }
    }
}
