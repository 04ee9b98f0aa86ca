//! `walfleet wal find`

use std::time::Duration;

use clap::Args;

use crate::failure::Failure;
use crate::follow;
use crate::quantity::parse_duration;
use crate::session::Session;
use crate::view::found::Search;
use crate::when::Reader;
use crate::wire::FindSpec;

/// Gigabytes of WAL may be read from a store far away.
const FIND_LIMIT: Duration = Duration::from_secs(900);

/// Find a transaction around a time, and the target that restores to just before it
///
/// Read from the archived WAL by a member of the cluster; nothing is changed. Relations are told by numbers: database and
/// relfilenode. For each transaction the target is given that restores to just before it.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet wal find orders --around '2026-06-04 14:31:59 UTC'
  walfleet wal find orders --around '2026-06-04 14:31:59 UTC' --within 30s --all
  walfleet restore start orders --to-lsn 1/3DFFFF38 --exclusive --on lab1 --data-dir /srv/pg/orders --start")]
pub struct FindArgs {
    /// The cluster
    name: String,
    /// The moment; the zone is part of it: '2026-06-04 14:31:59 UTC', '... +02:00', '... Europe/Berlin'
    #[arg(long, value_name = "TIME")]
    around: String,
    /// How far to look on either side
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = parse_duration)]
    within: Duration,
    /// In the WAL that leads to this timeline: a number, or a branch such as 5-9f3c [default: the latest]
    #[arg(long, value_name = "N|N-BRANCH|latest", default_value = "latest", hide_default_value = true)]
    timeline: String,
    /// List at most so many, up to 500 [default: 50; with --all 500]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=500))]
    limit: Option<u32>,
    /// List every commit, instead of those that destroyed or changed most and some beside them
    #[arg(long)]
    all: bool,
    /// The agent that reads [default: the controller chooses a member]
    #[arg(long, value_name = "AGENT", default_value = "", hide_default_value = true)]
    on: String,
    /// Stop waiting for the answer after this long (exit code 6) [default: 15m]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
}

impl FindArgs {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let reader = Reader { now: session.now(), zone: &session.surroundings.zone };
        let around = reader.read(&self.around).map_err(|error| Failure::Usage(error.to_string()))?;
        let spec = FindSpec {
            cluster: self.name,
            agent: self.on,
            around,
            within: self.within,
            timeline: self.timeline,
            // The default is the agent's.
            limit: self.limit.unwrap_or(if self.all { 500 } else { 0 }),
            all: self.all,
        };
        let client = session.client().await?;
        let job = client.start_wal_find(&spec).await?;
        let job = follow::to_the_end(session, &client, job, Some(self.timeout.unwrap_or(FIND_LIMIT))).await?;
        follow::succeeded(&job)?;
        let empty = || Failure::Usage("the answer came back empty".to_owned());
        let found = job.found.ok_or_else(empty)?;
        session.show(&Search { cluster: job.cluster, agent: job.agent.unwrap_or_default(), found })
    }
}
