//! `walfleet wal`

mod find;
mod gaps;

use clap::Subcommand;

use crate::failure::Failure;
use crate::session::Session;
use crate::view::wal::WalStatus;
use find::FindArgs;
use gaps::GapsArgs;

#[derive(Subcommand, Debug)]
pub enum WalCommand {
    /// How far a cluster's WAL is stored, who ships it, and what waits
    Status {
        /// The cluster
        name: String,
    },
    Gaps(GapsArgs),
    Find(FindArgs),
}

impl WalCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            WalCommand::Status { name } => {
                let cluster = session.client().await?.cluster(&name).await?;
                session.show(&WalStatus::of(cluster))
            }
            WalCommand::Gaps(args) => args.run(session).await,
            WalCommand::Find(args) => args.run(session).await,
        }
    }
}
