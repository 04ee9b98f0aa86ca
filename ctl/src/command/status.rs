//! `walfleet status`

use clap::Args;

use crate::failure::Failure;
use crate::session::Session;

/// The fleet at a glance: what is not recoverable comes first
///
/// One line per cluster: until when it can be recovered, how far the repository trails the server,
/// the last and the next backup, and what is wrong. States, worst first:
///
///   unprotected   no moment of it can be recovered
///   unknown       no fresh facts: nobody can tell
///   at risk       recoverable, but an objective of its policy is missed
///   protected     all is well
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  walfleet status
  walfleet status -o wide
  walfleet status -o json | jq -r '.clusters[] | select(.state != \"protected\") | .name'"
)]
pub struct StatusArgs {}

impl StatusArgs {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let status = session.client().await?.status().await?.sorted();
        session.show(&status)
    }
}
