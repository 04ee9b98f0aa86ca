//! `walfleet restore`

use std::collections::BTreeMap;
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::failure::Failure;
use crate::follow::{self, WaitArgs, started};
use crate::quantity::parse_duration;
use crate::session::Session;
use crate::target::TargetArgs;
use crate::view::job::Job;
use crate::view::restore::Plan;
use crate::when::Reader;
use crate::wire::RestoreSpec;

/// A plan reads manifests and the list of WAL, nothing more; one that takes longer is stuck.
const PLAN_LIMIT: Duration = Duration::from_secs(120);

#[derive(Subcommand, Debug)]
pub enum RestoreCommand {
    Plan(PlanArgs),
    Start(StartArgs),
}

/// Say what a restore would take: which backup, which WAL, how many bytes, how long
///
/// Nothing is changed. A target that cannot be reached ends with exit code 7 and says what can.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet restore plan orders --on lab1 --data-dir /srv/pg/orders
  walfleet restore plan orders --to '2026-06-04 14:31:59 UTC' --on lab1 --data-dir /srv/pg/orders")]
pub struct PlanArgs {
    #[command(flatten)]
    what: WhatArgs,
    /// Over a copy of the same cluster: says what it takes at most, since what is right already is kept
    #[arg(long)]
    delta: bool,
    /// Stop waiting for the plan after this long (exit code 6) [default: 2m]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    target: TargetArgs,
}

/// Restore a cluster, as it was at any second, on any host of the fleet
///
/// The directory must be empty or new, and stays unmistakably unfinished until it is whole. The restored copy archives
/// nothing unless asked to, so that it cannot disturb what is stored.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet restore start orders --on lab1 --data-dir /srv/pg/orders --start --wait
  walfleet restore start orders --on lab1 --data-dir /srv/pg/orders --start --wait \\
    --to '2026-06-04 14:31:59 UTC'
  walfleet restore start orders --on lab1 --data-dir /srv/pg/orders --start \\
    --to-xid 742 --exclusive --action pause
  walfleet restore start orders --on lab1 --data-dir /srv/pg/orders --wait \\
    --tablespace /ssd/fast=/srv/pg/fast")]
pub struct StartArgs {
    #[command(flatten)]
    what: WhatArgs,
    /// Start Postgres and wait until it stands at its target
    #[arg(long)]
    start: bool,
    /// The started server's port [default: as in its configuration]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..), requires = "start")]
    port: Option<u16>,
    /// Leave archive_mode as it was at the source
    #[arg(long)]
    keep_archiving: bool,
    /// Over a copy of the same cluster: keep what is right, fetch the rest, remove what the backup does not have
    #[arg(long)]
    delta: bool,
    /// Restore as a standby, which goes on following the stored WAL
    // Hidden, as the one below, while no agent can do it: they are understood, and refused with a reason.
    #[arg(long, hide = true)]
    standby: bool,
    /// The standby stays this far behind
    #[arg(long, hide = true, value_name = "DURATION", value_parser = parse_duration, requires = "standby")]
    apply_delay: Option<Duration>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    target: TargetArgs,
}

#[derive(Args, Debug)]
struct WhatArgs {
    /// The cluster
    name: String,
    /// The host to restore on: the name of its agent
    #[arg(long, value_name = "AGENT")]
    on: String,
    /// The data directory there; an absolute path
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    data_dir: String,
    /// Put a tablespace elsewhere: its old location (or oid) and the new one; may be repeated
    #[arg(long = "tablespace", value_name = "OLD=NEW", value_parser = tablespace)]
    tablespaces: Vec<(String, String)>,
    /// This backup instead of the best one for the target
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    backup: String,
    /// From this replica instead of the cluster's own repository
    #[arg(long, value_name = "REPOSITORY", default_value = "", hide_default_value = true)]
    from: String,
}

/// The other host's paths cannot be looked at from here; what no host would take is refused at once.
fn absolute(text: &str) -> Result<String, String> {
    let plain = text.starts_with('/') && !text.contains(['\0', '\n']) && !text.split('/').any(|part| part == "..");
    if !plain {
        return Err("it must be an absolute path on the agent's host, without \"..\"".to_owned());
    }
    match text.trim_end_matches('/') {
        "" => Err("that is the root directory".to_owned()),
        path => Ok(path.to_owned()),
    }
}

fn tablespace(text: &str) -> Result<(String, String), String> {
    let (old, new) = text.split_once('=').ok_or("write OLD=NEW, such as /ssd/fast=/srv/fast")?;
    let oid = !old.is_empty() && old.bytes().all(|byte| byte.is_ascii_digit());
    if !oid && !old.starts_with('/') {
        return Err("the old location is an absolute path or the tablespace's oid".to_owned());
    }
    Ok((old.to_owned(), absolute(new)?))
}

impl WhatArgs {
    fn tablespaces(&self) -> Result<BTreeMap<String, String>, Failure> {
        let mut mapped = BTreeMap::new();
        for (old, new) in &self.tablespaces {
            if mapped.insert(old.clone(), new.clone()).is_some() {
                return Err(Failure::Usage(format!(
                    "--tablespace maps {old} twice\nHINT: name each old location once."
                )));
            }
            if mapped.values().filter(|other| *other == new).count() > 1 {
                return Err(Failure::Usage(format!(
                    "--tablespace puts two tablespaces into {new}\nHINT: each needs a directory of its own."
                )));
            }
            let inside = |outer: &str, inner: &str| inner == outer || inner.starts_with(&format!("{outer}/"));
            if inside(&self.data_dir, new) || inside(new, &self.data_dir) {
                return Err(Failure::Usage(format!(
                    "--tablespace puts {old} into {new}, and the data directory is {}\nHINT: neither may lie inside the other.",
                    self.data_dir
                )));
            }
        }
        Ok(mapped)
    }

    fn spec(&self, target: &TargetArgs, session: &Session<'_>) -> Result<RestoreSpec, Failure> {
        let reader = Reader { now: session.now(), zone: &session.surroundings.zone };
        Ok(RestoreSpec {
            cluster: self.name.clone(),
            agent: self.on.clone(),
            target: target.target(&reader)?,
            data_dir: self.data_dir.clone(),
            tablespaces: self.tablespaces()?,
            backup: self.backup.clone(),
            from: self.from.clone(),
            start: false,
            keep_archiving: false,
            port: 0,
            delta: false,
            standby: false,
            apply_delay: Duration::ZERO,
            plan_only: false,
        })
    }
}

impl RestoreCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            RestoreCommand::Plan(args) => args.run(session).await,
            RestoreCommand::Start(args) => args.run(session).await,
        }
    }
}

impl PlanArgs {
    async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let spec = RestoreSpec { plan_only: true, delta: self.delta, ..self.what.spec(&self.target, session)? };
        let client = session.client().await?;
        let job = client.start_restore(&spec).await?;
        let job = follow::to_the_end(session, &client, job, Some(self.timeout.unwrap_or(PLAN_LIMIT))).await?;
        follow::succeeded(&job)?;
        let plan = plan_of(job).ok_or_else(|| Failure::Usage("the plan came back empty".to_owned()))?;
        session.show(&plan)
    }
}

fn plan_of(job: Job) -> Option<Plan> {
    Some(Plan {
        target: job.order.and_then(|order| order.target).unwrap_or_default(),
        cluster: job.cluster,
        agent: job.agent.unwrap_or_default(),
        restore: job.restore?,
    })
}

impl StartArgs {
    async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let spec = RestoreSpec {
            start: self.start,
            keep_archiving: self.keep_archiving,
            port: self.port.unwrap_or(0),
            delta: self.delta,
            standby: self.standby,
            apply_delay: self.apply_delay.unwrap_or_default(),
            ..self.what.spec(&self.target, session)?
        };
        let client = session.client().await?;
        let job = client.start_restore(&spec).await?;
        started(session, &client, job, &self.wait).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_another_host_are_absolute_and_plain() {
        assert_eq!(absolute("/srv/pg/"), Ok("/srv/pg".to_owned()));
        for bad in ["", "/", "//", "srv", "./x", "/srv/../etc", "~/x", "/a\nb"] {
            assert!(absolute(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn tablespaces_are_named_by_location_or_oid() {
        assert_eq!(tablespace("/a=/b"), Ok(("/a".to_owned(), "/b".to_owned())));
        assert_eq!(tablespace("16385=/b"), Ok(("16385".to_owned(), "/b".to_owned())));
        for bad in ["/a", "/a=", "=/b", "a=/b", "/a=b"] {
            assert!(tablespace(bad).is_err(), "{bad}");
        }
    }
}
