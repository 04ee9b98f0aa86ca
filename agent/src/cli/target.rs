//! The flags that say where recovery is to stop.

use clap::{Args, ValueEnum};
use walfleet_repository::postgres::Lsn;

use super::time;
use crate::failure::Failure;
use crate::jobs::order::{RecoveryTarget, TargetAction, TargetPoint, TargetTimeline, TimelineError};

#[derive(Args, Clone, Default, Debug)]
pub struct TargetArgs {
    /// A point in time, with its zone: '2026-06-04 14:31:59 UTC'.
    #[arg(long, value_name = "TIME", group = "point")]
    to: Option<String>,
    /// A WAL position: 0/3000060.
    #[arg(long, value_name = "LSN", group = "point")]
    to_lsn: Option<Lsn>,
    /// A transaction, as pg_current_xact_id() gives it.
    #[arg(long, value_name = "XID", group = "point")]
    to_xid: Option<u64>,
    /// A restore point made by pg_create_restore_point().
    #[arg(long, value_name = "NAME", group = "point")]
    to_name: Option<String>,
    /// As soon as the backup is consistent.
    #[arg(long, group = "point")]
    immediate: bool,
    /// The end of the WAL that the repository holds; the default.
    #[arg(long, group = "point")]
    latest: bool,
    /// Stop just before the target instead of just after it.
    #[arg(long)]
    exclusive: bool,
    /// Follow this timeline; N-BRANCH names one of several with one number, by as many digits as tell it from the others.
    #[arg(long, value_name = "N|N-BRANCH|latest|current", default_value = "latest", value_parser = timeline)]
    timeline: TargetTimeline,
    /// What Postgres does at the target.
    #[arg(long, value_enum, default_value_t)]
    action: ActionArg,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, ValueEnum)]
enum ActionArg {
    #[default]
    Promote,
    Pause,
    Shutdown,
}

impl TargetArgs {
    pub fn target(self) -> Result<RecoveryTarget, Failure> {
        let point = if let Some(text) = &self.to {
            TargetPoint::Time(time::parse(text, &time::host_zone()).map_err(super::usage)?)
        } else if let Some(lsn) = self.to_lsn {
            TargetPoint::Lsn(lsn)
        } else if let Some(xid) = self.to_xid {
            TargetPoint::Xid(xid)
        } else if let Some(name) = self.to_name {
            TargetPoint::Name(name)
        } else if self.immediate {
            TargetPoint::Immediate
        } else {
            TargetPoint::Latest
        };
        if self.exclusive && !point.can_be_exclusive() {
            return Err(super::usage("--exclusive goes with --to, --to-lsn and --to-xid only"));
        }
        let action = match self.action {
            ActionArg::Promote => TargetAction::Promote,
            ActionArg::Pause => TargetAction::Pause,
            ActionArg::Shutdown => TargetAction::Shutdown,
        };
        Ok(RecoveryTarget { point, exclusive: self.exclusive, timeline: self.timeline, action })
    }
}

fn timeline(text: &str) -> Result<TargetTimeline, TimelineError> {
    if text.is_empty() { Err(TimelineError::Word(String::new())) } else { text.parse() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use walfleet_repository::postgres::Timeline;

    #[derive(Parser, Debug)]
    struct Only {
        #[command(flatten)]
        target: TargetArgs,
    }

    fn target(flags: &[&str]) -> Result<RecoveryTarget, String> {
        let arguments = std::iter::once("x").chain(flags.iter().copied());
        let only = Only::try_parse_from(arguments).map_err(|error| error.to_string())?;
        only.target.target().map_err(|failure| failure.to_string())
    }

    #[test]
    fn each_kind_of_target_is_read() {
        let point = |flags: &[&str]| target(flags).unwrap().point;
        assert_eq!(point(&[]), TargetPoint::Latest);
        assert_eq!(point(&["--latest"]), TargetPoint::Latest);
        assert_eq!(point(&["--immediate"]), TargetPoint::Immediate);
        assert_eq!(point(&["--to-lsn", "0/3000060"]), TargetPoint::Lsn(Lsn(0x300_0060)));
        assert_eq!(point(&["--to-xid", "742"]), TargetPoint::Xid(742));
        assert_eq!(point(&["--to-name", "before"]), TargetPoint::Name("before".into()));
        assert!(matches!(point(&["--to", "2026-06-04 14:31:59 UTC"]), TargetPoint::Time(_)));
        let full = target(&["--to-xid", "1", "--exclusive", "--timeline", "3", "--action", "pause"]).unwrap();
        assert_eq!((full.exclusive, full.action), (true, TargetAction::Pause));
        assert_eq!(full.timeline, TargetTimeline::Number(Timeline(3)));
        let branch = target(&["--timeline", "3-0f3c"]).unwrap().timeline;
        assert_eq!(branch, TargetTimeline::Branch("3-0f3c".parse().unwrap()));
    }

    #[test]
    fn targets_exclude_each_other_and_need_what_they_need() {
        for bad in [
            &["--latest", "--immediate"][..],
            &["--to-xid", "1", "--to-lsn", "0/1"],
            &["--to", "2026-06-04 14:31:59"],
            &["--exclusive"],
            &["--immediate", "--exclusive"],
            &["--to-lsn", "nonsense"],
            &["--timeline", "0"],
            &["--timeline", "newest"],
            &["--timeline", ""],
            &["--timeline", "+3"],
            &["--timeline", "3-"],
            &["--timeline", "3-xyz"],
            &["--timeline", "0-0f3c"],
            &["--action", "explode"],
        ] {
            assert!(target(bad).is_err(), "{bad:?}");
        }
    }
}
