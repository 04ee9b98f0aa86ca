//! `walfleet cluster`

use clap::Subcommand;

use super::policy::delete;
use crate::failure::Failure;
use crate::session::Session;
use crate::view::cluster::Clusters;

#[derive(Subcommand, Debug)]
pub enum ClusterCommand {
    /// List clusters
    #[command(after_help = "Examples:
  walfleet cluster list
  walfleet cluster list -l 'env=prod,tier in (a,b)'")]
    List {
        /// Only those whose labels match
        #[arg(short = 'l', long, value_name = "LABELS", default_value = "", hide_default_value = true)]
        selector: String,
    },
    /// Show what of a cluster can be recovered, its members, WAL and last backup
    #[command(after_help = "Examples:
  walfleet cluster show orders
  walfleet cluster show orders -o json | jq '.recovery[].ranges'")]
    Show {
        /// The cluster
        name: String,
    },
    /// Forget a cluster's declaration; its backups and WAL stay in the repository
    Delete {
        /// The cluster
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

impl ClusterCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            ClusterCommand::List { selector } => {
                let clusters = session.client().await?.clusters(&selector).await?;
                session.show(&Clusters { clusters })
            }
            ClusterCommand::Show { name } => {
                let cluster = session.client().await?.cluster(&name).await?;
                session.show(&cluster)
            }
            ClusterCommand::Delete { name, yes } => delete(session, "Cluster", "cluster", &name, yes).await,
        }
    }
}
