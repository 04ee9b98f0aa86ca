//! `walfleet audit`

use clap::{Args, Subcommand};
use jiff::Timestamp;

use crate::failure::Failure;
use crate::quantity::parse_duration;
use crate::session::Session;
use crate::when::{Reader, WhenError};

#[derive(Subcommand, Debug)]
pub enum AuditCommand {
    List(ListArgs),
    /// Check that no entry was changed, dropped or slipped in: each carries the hash of the one before it
    ///
    /// It prints the hash of the newest entry. Note it elsewhere: a log that was rewritten as a whole has another.
    Verify,
}

/// List who changed what, and what was refused or failed; the newest last. Needs role admin
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet audit list
  walfleet audit list --since 7d --limit 1000
  walfleet audit list --since '2026-06-04 14:00:00 UTC'
  walfleet audit list -o json | jq '.entries[] | select(.outcome != \"done\")'")]
pub struct ListArgs {
    /// Only entries since then: a time with its zone, or how long ago
    #[arg(long, value_name = "TIME|DURATION")]
    since: Option<String>,
    /// At most so many, the newest: 1 to 10000 [default: 100]
    #[arg(long, default_value_t = 100, hide_default_value = true, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
}

impl AuditCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            AuditCommand::List(args) => {
                let reader = Reader { now: session.now(), zone: &session.surroundings.zone };
                let since = args.since.as_deref().map(|text| since(text, &reader)).transpose();
                let since = since.map_err(|error| Failure::Usage(format!("--since: {error}")))?;
                let log = session.client().await?.audit_entries(since, args.limit).await?;
                session.show(&log)
            }
            AuditCommand::Verify => {
                let verified = session.client().await?.verify_audit().await?;
                session.show(&verified)
            }
        }
    }
}

/// "7d" ago, or a moment. What begins like a duration and is none is read as a time, whose errors say more.
fn since(text: &str, reader: &Reader<'_>) -> Result<Timestamp, WhenError> {
    match parse_duration(text) {
        Ok(ago) => Ok(reader.now.checked_sub(ago).unwrap_or(Timestamp::UNIX_EPOCH)),
        Err(_) => reader.read(text),
    }
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::*;

    #[test]
    fn since_is_a_moment_or_a_distance_and_never_a_guess() {
        let now = "2026-06-04T14:00:00Z".parse().unwrap();
        let reader = Reader { now, zone: &TimeZone::UTC };
        let read = |text: &str| since(text, &reader).map(|at| at.to_string());
        assert_eq!(read("2h").unwrap(), "2026-06-04T12:00:00Z");
        assert_eq!(read("2026-06-01 00:00 UTC").unwrap(), "2026-06-01T00:00:00Z");
        assert_eq!(read("999999999w").unwrap(), "1970-01-01T00:00:00Z");
        for bad in ["2026-06-01 00:00", "yesterday", "7", ""] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
