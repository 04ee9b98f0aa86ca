//! `walfleet wal`

use clap::Subcommand;

use crate::failure::Failure;
use crate::session::Session;
use crate::view::wal::{WalGaps, WalStatus};

#[derive(Subcommand, Debug)]
pub enum WalCommand {
    /// How far a cluster's WAL is stored, who ships it, and what waits
    Status {
        /// The cluster
        name: String,
    },
    /// WAL that should be stored and is not
    Gaps {
        /// The cluster
        name: String,
    },
}

impl WalCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            WalCommand::Status { name } => {
                let cluster = session.client().await?.cluster(&name).await?;
                session.show(&WalStatus::of(cluster))
            }
            WalCommand::Gaps { name } => {
                let cluster = session.client().await?.cluster(&name).await?;
                session.show(&WalGaps::of(cluster))
            }
        }
    }
}
