//! `retention:` of a policy: what is kept, and for how long. A policy without it removes nothing.

use jiff::SignedDuration;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use walfleet_repository::retention::{Calendar, Promise};

use super::document::SpecFault;
use super::span::Span;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetentionSpec {
    /// Every second of this long before now can be restored.
    pub window: Span,
    /// The last backup of each of so many days, weeks (from Monday on), months and years that have one. Of these only the WAL
    /// that makes each consistent is kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub daily: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub weekly: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub monthly: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub yearly: u32,
    /// IANA name, for where days begin. Absent: the schedule's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// So many restorable backups are kept whatever else is promised.
    #[serde(default = "minimum")]
    pub minimum: u32,
    /// What has expired can be brought back for so long.
    #[serde(default = "trash")]
    pub trash: Span,
}

/// A backup that turns out not to restore must not be the only one.
fn minimum() -> u32 {
    2
}

/// A mistake in a policy is seen within a week.
fn trash() -> Span {
    Span::hours(7 * 24)
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// A hundred years of days: beyond it a number is a slip.
const MOST_COPIES: u32 = 36_500;
const SHORTEST_WINDOW: Span = Span::hours(1);

impl RetentionSpec {
    pub fn validate(&self) -> Result<(), SpecFault> {
        if self.window < SHORTEST_WINDOW {
            let hint = "at least 1h is accepted; leave `retention` out to keep everything.";
            return Err(SpecFault::new("retention.window", format!("{} is out of range", self.window), hint));
        }
        if !(1..=1_000).contains(&self.minimum) {
            let problem = format!("{} is out of range", self.minimum);
            return Err(SpecFault::new("retention.minimum", problem, "1 to 1000 are accepted."));
        }
        let counts =
            [("daily", self.daily), ("weekly", self.weekly), ("monthly", self.monthly), ("yearly", self.yearly)];
        if let Some((name, count)) = counts.into_iter().find(|(_, count)| *count > MOST_COPIES) {
            let problem = format!("{count} is out of range");
            return Err(SpecFault::new(format!("retention.{name}"), problem, "0 to 36500 are accepted."));
        }
        match &self.time_zone {
            Some(zone) if TimeZone::get(zone).is_err() => {
                let hint = "write an IANA name such as Europe/Berlin or UTC; if it is one, install the controller host's tzdata.";
                Err(SpecFault::new("retention.time_zone", format!("{zone:?} is not a time zone known on this machine"), hint))
            }
            _ => Ok(()),
        }
    }

    /// As the planner reads it. `zone`: the schedule's.
    pub fn promise(&self, zone: &str) -> Promise {
        let zone = self.time_zone.as_deref().unwrap_or(zone);
        // Validated when it was declared; a machine that has lost its time zones begins its days elsewhere, no worse.
        let time_zone = TimeZone::get(zone).unwrap_or(TimeZone::UTC);
        let count = |count: u32| count as usize;
        Promise {
            window: seconds(self.window),
            calendar: Calendar {
                daily: count(self.daily),
                weekly: count(self.weekly),
                monthly: count(self.monthly),
                yearly: count(self.yearly),
                time_zone,
            },
            minimum: count(self.minimum),
            trash: seconds(self.trash),
        }
    }
}

fn seconds(span: Span) -> SignedDuration {
    // A span is at most ten years.
    SignedDuration::from_secs(span.as_seconds() as i64)
}
