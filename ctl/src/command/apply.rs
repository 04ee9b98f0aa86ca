//! `walfleet apply`

use std::path::PathBuf;

use clap::Args;

use crate::failure::Failure;
use crate::ink;
use crate::print::{Format, render};
use crate::session::Session;
use crate::view::change::Changes;
use crate::wire::Intent;

/// Declare policies, repositories and clusters, as YAML documents
///
/// All documents of the file take effect, or none. What is not in the file stays as it is. On a terminal, changes to
/// what already exists are shown first and must be confirmed.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet apply -f fleet.yaml
  walfleet apply -f fleet.yaml --dry-run
  generate-fleet | walfleet apply -f - --yes")]
pub struct ApplyArgs {
    /// The file; - is standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Show what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

impl ApplyArgs {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let yaml = documents(session, &self.file)?;
        let client = session.client().await?;
        if self.dry_run {
            let changes = client.apply(&yaml, Intent::DryRun).await?;
            return session.show(&changes);
        }
        // Standard input cannot both hold the documents and answer a question.
        let can_ask = session.surroundings.stdin_is_terminal && self.file.as_os_str() != "-";
        if can_ask && !self.yes {
            let planned = client.apply(&yaml, Intent::DryRun).await?;
            if planned.touch_existing() {
                preview(session, &planned)?;
                session.confirm("apply these changes to the fleet", "yes", false)?;
            }
        }
        let changes = client.apply(&yaml, Intent::Apply).await?;
        session.show(&changes)
    }
}

fn preview(session: &mut Session<'_>, planned: &Changes) -> Result<(), Failure> {
    let text = render(planned, Format::Table, session.now(), session.surroundings.colour_on_stderr())?;
    // It is rendered already; only its own escape codes may pass.
    session.note_rendered(&text);
    Ok(())
}

/// The documents of a file, refused early where they are none: the controller's word on YAML costs a round trip.
pub fn documents(session: &Session<'_>, file: &std::path::Path) -> Result<String, Failure> {
    use serde::Deserialize;
    let yaml = session.read_input(file)?;
    let name = ink::finish(&file.display().to_string(), false);
    for (number, document) in (1..).zip(serde_yaml_ng::Deserializer::from_str(&yaml)) {
        serde_yaml_ng::Value::deserialize(document)
            .map_err(|error| Failure::Usage(format!("{name}, document {number}, is not YAML: {error}")))?;
    }
    let hint = "HINT: it holds Policy, Repository and Cluster documents, separated by lines of \"---\".";
    if yaml.trim().is_empty() { Err(Failure::Usage(format!("{name} is empty\n{hint}"))) } else { Ok(yaml) }
}
