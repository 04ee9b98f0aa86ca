//! `walfleet diff`

use std::path::PathBuf;

use clap::Args;

use super::apply::documents;
use crate::failure::Failure;
use crate::session::Session;
use crate::wire::Intent;

/// Show what applying a file would change, and change nothing
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet diff -f fleet.yaml
  walfleet diff -f fleet.yaml -o json | jq '.changes[] | select(.change != \"unchanged\")'")]
pub struct DiffArgs {
    /// The file; - is standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
}

impl DiffArgs {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let yaml = documents(session, &self.file)?;
        let changes = session.client().await?.apply(&yaml, Intent::DryRun).await?;
        session.show(&changes)
    }
}
