//! `walfleet wal gaps`

use clap::{Args, Subcommand};

use crate::failure::Failure;
use crate::session::Session;
use crate::target::{NumberedTimeline, parse_numbered};
use crate::view::wal::WalGaps;

/// WAL that should be stored and is not
#[derive(Args, Debug)]
pub struct GapsArgs {
    /// The cluster
    name: String,
    #[command(subcommand)]
    action: Option<GapsAction>,
}

#[derive(Subcommand, Debug)]
enum GapsAction {
    /// Say that a gap is known: it alarms no more, and shows with the reason
    Acknowledge {
        /// Where the gap begins, as the list shows it
        #[arg(long, value_name = "LSN")]
        from: String,
        /// Where the gap ends, as the list shows it: if it has grown since, nothing is acknowledged
        #[arg(long, value_name = "LSN")]
        to: String,
        /// The gap's timeline, where gaps on several begin there; of several with one number, 5-BRANCH
        #[arg(long, value_name = "TIMELINE", value_parser = parse_numbered)]
        timeline: Option<NumberedTimeline>,
        /// Why it is no alarm, for whoever reads it later
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
}

impl GapsArgs {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let client = session.client().await?;
        match self.action {
            None => {
                let cluster = client.cluster(&self.name).await?;
                session.show(&WalGaps::of(cluster))
            }
            Some(GapsAction::Acknowledge { from, to, timeline, reason }) => {
                let acknowledged = client.acknowledge_gap(&self.name, (&from, &to), timeline, &reason).await?;
                session.show(&WalGaps::acknowledged(self.name, acknowledged))?;
                if session.is_for_people() {
                    session.note("It shows everywhere once the agents have looked again, within a minute.");
                }
                Ok(())
            }
        }
    }
}
