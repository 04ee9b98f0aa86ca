//! `walfleet hold`

use clap::{ArgGroup, Args, Subcommand};
use jiff::Timestamp;

use crate::failure::Failure;
use crate::session::Session;
use crate::view::hold::Holds;
use crate::when::Reader;
use crate::wire::HoldSpec;

#[derive(Subcommand, Debug)]
pub enum HoldCommand {
    Place(PlaceArgs),
    /// List holds
    List {
        /// Only this cluster's
        #[arg(default_value = "", hide_default_value = true)]
        name: String,
    },
    /// Release a hold: from then on retention decides again
    Release {
        id: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// Keep a backup, or any second of a stretch of time, whatever retention says
///
/// It stands in the repository, and nothing that removes anything passes it.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("what").required(true).args(["backup", "from"])))]
#[command(after_help = "Examples:
  walfleet hold place orders --backup bk_06e2r4ycmn8q7t1w5x3z --reason 'before the migration' --until '2027-01-01 00:00 UTC'
  walfleet hold place orders --from '2026-06-04 14:00 UTC' --to '2026-06-04 15:00 UTC' --reason 'incident 1812'")]
pub struct PlaceArgs {
    /// The cluster
    name: String,
    /// Keep this backup
    #[arg(long, value_name = "ID", conflicts_with = "to")]
    backup: Option<String>,
    /// Keep any second from then on; the zone is part of it: '2026-06-04 14:31:59 UTC', '... Europe/Berlin'
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// ... up to then [default: without end]
    #[arg(long, value_name = "TIME", requires = "from")]
    to: Option<String>,
    /// What it is kept for
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// Release it by itself then [default: never]
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
}

impl HoldCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            HoldCommand::Place(args) => args.run(session).await,
            HoldCommand::List { name } => {
                let holds = session.client().await?.holds(&name).await?;
                session.show(&holds)
            }
            HoldCommand::Release { id, yes } => {
                let client = session.client().await?;
                let holds = client.holds("").await?.holds;
                let held = holds.into_iter().find(|held| held.id == id);
                let hint = "walfleet hold list shows them";
                let held = held.ok_or_else(|| Failure::NotFound { kind: "hold", name: id.clone(), hint })?;
                session.confirm(&format!("release {id} of {}, {}", held.cluster, held.reason), "yes", yes)?;
                client.release_hold(&held.cluster, &id).await?;
                session.note(&format!("{id} is released"));
                Ok(())
            }
        }
    }
}

impl PlaceArgs {
    async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let reader = Reader { now: session.now(), zone: &session.surroundings.zone };
        let read = |text: &Option<String>| -> Result<Option<Timestamp>, Failure> {
            let read = text.as_ref().map(|text| reader.read(text)).transpose();
            read.map_err(|error| Failure::Usage(error.to_string()))
        };
        let spec = HoldSpec {
            cluster: self.name,
            backup: self.backup.unwrap_or_default(),
            from: read(&self.from)?,
            to: read(&self.to)?,
            reason: self.reason,
            until: read(&self.until)?,
        };
        let holds = session.client().await?.place_hold(&spec).await?;
        session.show(&Holds { holds, unknown: Vec::new() })
    }
}
