//! Where a restore is to stop, from the target flags of the command line.

use clap::{Args, ValueEnum};
use jiff::Timestamp;

use crate::quantity::Lsn;
use crate::when::{Reader, WhenError};

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    Time(Timestamp),
    Lsn(Lsn),
    Xid(u64),
    Name(String),
    Immediate,
    Latest,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    pub stop: Stop,
    pub exclusive: bool,
    /// "latest", "current", a number, or a branch such as "5-0f3c"; `None` is latest.
    pub timeline: Option<String>,
    /// `None` is promote.
    pub action: Option<Action>,
}

/// What Postgres does at the target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Action {
    /// Open it for writing, on a new timeline
    Promote,
    /// Stay readable at the target, to look first
    Pause,
    /// Stop the server there
    Shutdown,
}

impl Action {
    pub fn word(self) -> &'static str {
        match self {
            Action::Promote => "promote",
            Action::Pause => "pause",
            Action::Shutdown => "shutdown",
        }
    }
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TargetError {
    #[error(transparent)]
    Time(#[from] WhenError),
    #[error("--exclusive needs a target to stop before\nHINT: it goes with --to, --to-lsn or --to-xid.")]
    ExclusiveOfNothing,
    #[error("\"{name}\" cannot name a restore point\nHINT: PostgreSQL allows 1 to 63 bytes (pg_create_restore_point).")]
    Name { name: String },
}

/// The target flags, the same for planning and for restoring.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Target (one of; default: the end of the stored WAL)")]
pub struct TargetArgs {
    /// The state at this moment; the zone is part of it: '2026-06-04 14:31:59 UTC', '... +02:00', '... Europe/Berlin'
    #[arg(long, value_name = "TIME", group = "stop")]
    pub to: Option<String>,
    /// The state at this WAL position, such as 0/3000060
    #[arg(long, value_name = "LSN", group = "stop", value_parser = |text: &str| text.parse::<Lsn>())]
    pub to_lsn: Option<Lsn>,
    /// The state at the end of this transaction
    #[arg(long, value_name = "XID", group = "stop", value_parser = clap::value_parser!(u64).range(1..))]
    pub to_xid: Option<u64>,
    /// The state at this restore point (pg_create_restore_point)
    #[arg(long, value_name = "NAME", group = "stop")]
    pub to_name: Option<String>,
    /// The end of the backup: the first consistent state
    #[arg(long, group = "stop")]
    pub immediate: bool,
    /// The end of the stored WAL
    #[arg(long, group = "stop")]
    pub latest: bool,
    /// Stop just before the target instead of just after it
    #[arg(long)]
    pub exclusive: bool,
    /// Follow this timeline: a number, latest or current (the backup's own); of several with one number, 5-BRANCH, by as
    /// many digits as tell it from the others [default: latest]
    #[arg(long, value_name = "TIMELINE", value_parser = parse_timeline)]
    pub timeline: Option<String>,
    /// What Postgres does at the target [default: promote]
    #[arg(long, value_enum, hide_possible_values = false)]
    pub action: Option<Action>,
}

/// A timeline by its number, and of several with one number by its branch, or the beginning of its name.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct NumberedTimeline {
    /// 0: whichever.
    pub number: u32,
    /// Empty: whichever.
    pub branch: String,
}

impl NumberedTimeline {
    fn parse(text: &str) -> Option<NumberedTimeline> {
        let (number, branch) = match text.split_once('-') {
            // Eight bytes of the history's hash, in hexadecimal.
            Some((number, branch)) if (1..=16).contains(&branch.len()) => (number, branch),
            Some(_) => return None,
            None => (text, ""),
        };
        let is_hexadecimal = branch.bytes().all(|byte| byte.is_ascii_hexdigit());
        let is_decimal = number.bytes().all(|byte| byte.is_ascii_digit());
        let number = number.parse().ok().filter(|number| *number > 0 && is_decimal && is_hexadecimal)?;
        Some(NumberedTimeline { number, branch: branch.to_ascii_lowercase() })
    }
}

/// For clap.
pub fn parse_numbered(text: &str) -> Result<NumberedTimeline, String> {
    NumberedTimeline::parse(text)
        .ok_or_else(|| "it is a number from 1, or a number and a branch such as 5-9f3c".to_owned())
}

fn parse_timeline(text: &str) -> Result<String, String> {
    if matches!(text, "latest" | "current") || NumberedTimeline::parse(text).is_some() {
        Ok(text.to_ascii_lowercase())
    } else {
        Err("it is a number from 1, a number and a branch such as 5-9f3c, latest or current".to_owned())
    }
}

impl TargetArgs {
    pub fn target(&self, reader: &Reader<'_>) -> Result<Target, TargetError> {
        let stop = match (&self.to, self.to_lsn, self.to_xid, &self.to_name) {
            (Some(time), ..) => Stop::Time(reader.read(time)?),
            (None, Some(lsn), ..) => Stop::Lsn(lsn),
            (None, None, Some(xid), _) => Stop::Xid(xid),
            (None, None, None, Some(name)) => Stop::Name(restore_point(name)?),
            (None, None, None, None) if self.immediate => Stop::Immediate,
            (None, None, None, None) => Stop::Latest,
        };
        let precise = matches!(stop, Stop::Time(_) | Stop::Lsn(_) | Stop::Xid(_));
        if self.exclusive && !precise {
            return Err(TargetError::ExclusiveOfNothing);
        }
        Ok(Target { stop, exclusive: self.exclusive, timeline: self.timeline.clone(), action: self.action })
    }
}

/// MAXFNAMELEN is 64 with its final zero (src/include/access/xlog_internal.h).
fn restore_point(name: &str) -> Result<String, TargetError> {
    if name.is_empty() || name.len() > 63 || name.contains(['\0', '\n']) {
        return Err(TargetError::Name { name: name.to_owned() });
    }
    Ok(name.to_owned())
}
