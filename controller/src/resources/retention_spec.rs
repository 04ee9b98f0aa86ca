//! `retention:` of a policy: what is kept, and for how long. A policy without it removes nothing.

use std::fmt;

use jiff::SignedDuration;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use walfleet_repository::retention::{Calendar, Promise};

use super::document::SpecFault;
use super::span::Span;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
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
/// Short, for tests.
const SHORTEST_WINDOW: Span = Span::minutes(1);

impl RetentionSpec {
    /// What asks for nothing but the minimum.
    pub fn least() -> RetentionSpec {
        RetentionSpec {
            window: SHORTEST_WINDOW,
            daily: 0,
            weekly: 0,
            monthly: 0,
            yearly: 0,
            time_zone: None,
            minimum: 1,
            trash: Span::ZERO,
        }
    }

    pub fn validate(&self) -> Result<(), SpecFault> {
        if self.window < SHORTEST_WINDOW {
            let hint = "at least 1m is accepted; leave `retention` out to keep everything.";
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
                Err(SpecFault::new(
                    "retention.time_zone",
                    format!("{zone:?} is not a time zone known on this machine"),
                    hint,
                ))
            }
            _ => Ok(()),
        }
    }

    /// With the time zone said. `zone`: the schedule's.
    pub fn in_zone(&self, zone: &str) -> RetentionSpec {
        let time_zone = self.time_zone.clone().unwrap_or_else(|| zone.to_owned());
        RetentionSpec { time_zone: Some(time_zone), ..self.clone() }
    }

    /// Whether whatever the other one keeps this one keeps, too.
    pub fn covers(&self, other: &RetentionSpec) -> bool {
        self.and(other) == *self && (self.time_zone == other.time_zone || !other.has_copies())
    }

    /// What keeps as much as either; of copies by days that begin elsewhere, as many.
    pub fn and(&self, other: &RetentionSpec) -> RetentionSpec {
        RetentionSpec {
            window: self.window.max(other.window),
            daily: self.daily.max(other.daily),
            weekly: self.weekly.max(other.weekly),
            monthly: self.monthly.max(other.monthly),
            yearly: self.yearly.max(other.yearly),
            time_zone: if self.has_copies() || !other.has_copies() { &self.time_zone } else { &other.time_zone }
                .clone(),
            minimum: self.minimum.max(other.minimum),
            trash: self.trash.max(other.trash),
        }
    }

    fn has_copies(&self) -> bool {
        [self.daily, self.weekly, self.monthly, self.yearly].iter().any(|count| *count > 0)
    }

    /// As the planner reads it.
    pub fn promise(&self) -> Promise {
        // Validated when it was declared; a machine that has lost its time zones begins its days elsewhere, no worse.
        let zone = self.time_zone.as_deref().and_then(|zone| TimeZone::get(zone).ok());
        let time_zone = zone.unwrap_or(TimeZone::UTC);
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

impl fmt::Display for RetentionSpec {
    /// In words, without what is as always.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to the second", self.window)?;
        let counts =
            [(self.daily, "daily"), (self.weekly, "weekly"), (self.monthly, "monthly"), (self.yearly, "yearly")];
        for (count, name) in counts.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, ", {count} {name}")?;
        }
        if self.minimum != minimum() {
            write!(f, ", at least {}", self.minimum)?;
        }
        if self.trash != trash() {
            write!(f, ", {} of trash", self.trash)?;
        }
        Ok(())
    }
}

fn seconds(span: Span) -> SignedDuration {
    // A span is at most ten years.
    SignedDuration::from_secs(span.as_seconds() as i64)
}
