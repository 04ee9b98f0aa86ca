//! When a cluster's next backup is due: cron in a time zone, put off by a stable share of the policy's jitter.
//!
//! Pure: the time is an argument, nothing is stored and nothing is started. What ran already is `reconcile`'s to know.
//!
//! Where the clock jumps, it is croner that decides, and the tests here hold it to this: a fixed time that falls into
//! the gap of spring runs once, when the gap is over; one that comes twice in autumn runs once, the first time;
//! `*/15 * * * *` keeps its pace through both.

use std::fmt;

use croner::Cron;
use croner::errors::CronError;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, Zoned};
use walfleet_repository::ids::ClusterName;

use crate::resources::Span;

/// A compiled schedule.
#[derive(Clone, Debug)]
pub struct Schedule {
    cron: Cron,
    zone: TimeZone,
    jitter: Span,
}

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum ScheduleError {
    #[error("{text:?} is not a cron expression: {problem}")]
    Cron { text: String, problem: String },
    #[error("{text:?} never comes: no such date exists")]
    Never { text: String },
    #[error("{text:?} is not a time zone known on this machine")]
    TimeZone { text: String },
}

impl ScheduleError {
    /// Of the field at fault, below `spec`.
    pub fn path(&self) -> &'static str {
        match self {
            ScheduleError::Cron { .. } | ScheduleError::Never { .. } => "backup.schedule",
            ScheduleError::TimeZone { .. } => "backup.time_zone",
        }
    }

    pub fn hint(&self) -> &'static str {
        match self {
            ScheduleError::Cron { .. } | ScheduleError::Never { .. } => {
                "write five fields: minute, hour, day of month, month, day of week; \"0 2 * * *\" is every day at 2:00."
            }
            ScheduleError::TimeZone { .. } => {
                "write an IANA name such as Europe/Berlin or UTC; if it is one, install the controller host's tzdata."
            }
        }
    }
}

/// One scheduled backup of one cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Run {
    /// What cron says, without the jitter: the run's name.
    pub scheduled: Timestamp,
    /// From when on it may start.
    pub start: Timestamp,
}

/// What is to be done about a schedule now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Due {
    /// The newest run whose time has come and that is newer than the one handled last. Older missed ones are covered
    /// by it: they are caught up once, not replayed.
    pub run: Option<Run>,
    /// The next one after that.
    pub next: Option<Run>,
}

/// `<policy>/<cluster>/<scheduled time>`: names the run in the state and in the repository's log, both of which refuse
/// to start it twice.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize, serde::Deserialize)]
pub struct RunId(String);

impl RunId {
    pub fn new(policy: &str, cluster: &ClusterName, scheduled: Timestamp) -> RunId {
        RunId(format!("{policy}/{cluster}/{scheduled}"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Schedule {
    pub fn new(cron: &str, zone: &str, jitter: Span) -> Result<Schedule, ScheduleError> {
        let zone = TimeZone::get(zone).map_err(|_| ScheduleError::TimeZone { text: zone.to_owned() })?;
        let fault = |problem: String| ScheduleError::Cron { text: cron.to_owned(), problem };
        let fields = cron.split_whitespace().count();
        if fields != 5 && !cron.trim_start().starts_with('@') {
            return Err(fault(format!("it has {fields} fields, not 5")));
        }
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let compiled = parser.parse(cron).map_err(|error| fault(in_words(&error)))?;
        let schedule = Schedule { cron: compiled, zone, jitter };
        // From any fixed time: a date that never comes does not come from elsewhere either.
        match schedule.next_scheduled(Timestamp::UNIX_EPOCH) {
            Some(_) => Ok(schedule),
            None => Err(ScheduleError::Never { text: cron.to_owned() }),
        }
    }

    /// The first time after `after`, without jitter.
    fn next_scheduled(&self, after: Timestamp) -> Option<Timestamp> {
        self.cron.find_next_occurrence(&self.local(after), false).ok().map(|zoned| zoned.timestamp())
    }

    /// The last time at or before `until`, without jitter.
    fn last_scheduled(&self, until: Timestamp) -> Option<Timestamp> {
        self.cron.find_previous_occurrence(&self.local(until), true).ok().map(|zoned| zoned.timestamp())
    }

    fn local(&self, at: Timestamp) -> Zoned {
        at.to_zoned(self.zone.clone())
    }

    /// A cluster's share of the jitter: always the same, spread evenly over clusters.
    fn delay(&self, policy: &str, cluster: &ClusterName) -> SignedDuration {
        let window = self.jitter.as_seconds();
        if window == 0 {
            return SignedDuration::ZERO;
        }
        let mut hasher = blake3::Hasher::new_derive_key("walfleet 2026-11 schedule jitter v1");
        hasher.update(policy.as_bytes()).update(b"/").update(cluster.as_str().as_bytes());
        let mut bytes = [0; 8];
        hasher.finalize_xof().fill(&mut bytes);
        // `Span` is bounded to ten years, far below i64.
        SignedDuration::from_secs((u64::from_le_bytes(bytes) % window) as i64)
    }

    /// What is due `now`, if `handled` is the scheduled time of the newest run that needs no more attention (or, before
    /// the first, when the policy was bound: what lies before is nobody's to catch up).
    pub fn due(&self, now: Timestamp, policy: &str, cluster: &ClusterName, handled: Timestamp) -> Due {
        let delay = self.delay(policy, cluster);
        let run = |scheduled: Timestamp| {
            let start = scheduled.checked_add(delay).unwrap_or(Timestamp::MAX);
            Run { scheduled, start }
        };
        let come = now.checked_sub(delay).unwrap_or(Timestamp::MIN);
        let latest = self.last_scheduled(come).filter(|scheduled| *scheduled > handled);
        let next = self.next_scheduled(latest.unwrap_or(handled).max(come));
        Due { run: latest.map(run), next: next.map(run) }
    }
}

fn in_words(error: &CronError) -> String {
    match error {
        CronError::InvalidPattern(text) | CronError::IllegalCharacters(text) | CronError::ComponentError(text) => {
            let mut text = text.trim_end_matches('.').to_owned();
            if let Some(first) = text.get_mut(0..1) {
                first.make_ascii_lowercase();
            }
            text
        }
        CronError::EmptyPattern => "it is empty".to_owned(),
        CronError::InvalidDate | CronError::InvalidTime | CronError::TimeSearchLimitExceeded => {
            "no such time exists".to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect(text)
    }

    fn cluster(name: &str) -> ClusterName {
        name.parse().expect("a test's name")
    }

    fn berlin(cron: &str) -> Schedule {
        Schedule::new(cron, "Europe/Berlin", Span::ZERO).expect(cron)
    }

    /// All runs in a stretch, each handled before the next is asked for.
    fn runs(schedule: &Schedule, from: &str, to: &str) -> Vec<String> {
        let (mut handled, end, orders) = (at(from), at(to), cluster("orders"));
        let mut found = Vec::new();
        while let Some(next) = schedule.due(handled, "gold", &orders, handled).next.filter(|run| run.start < end) {
            found.push(next.scheduled.to_string());
            handled = next.scheduled;
        }
        found
    }

    #[test]
    fn a_fixed_time_in_the_gap_of_spring_runs_once_when_the_gap_is_over() {
        // 2027-03-28: 02:00 CET is 03:00 CEST.
        assert_eq!(
            runs(&berlin("30 2 * * *"), "2027-03-27T00:00:00Z", "2027-03-30T00:00:00Z"),
            ["2027-03-27T01:30:00Z", "2027-03-28T01:00:00Z", "2027-03-29T00:30:00Z"]
        );
    }

    #[test]
    fn a_fixed_time_that_comes_twice_in_autumn_runs_once() {
        // 2026-10-25: 03:00 CEST is 02:00 CET.
        assert_eq!(
            runs(&berlin("30 2 * * *"), "2026-10-24T00:00:00Z", "2026-10-27T00:00:00Z"),
            ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]
        );
    }

    #[test]
    fn an_interval_keeps_its_pace_through_both_changes() {
        for (from, to) in
            [("2026-10-24T22:00:00Z", "2026-10-25T04:00:00Z"), ("2027-03-27T22:00:00Z", "2027-03-28T04:00:00Z")]
        {
            let found = runs(&berlin("*/15 * * * *"), from, to);
            assert_eq!(found.len(), 6 * 4 - 1, "{found:?}");
            for pair in found.windows(2) {
                assert_eq!(at(&pair[1]).duration_since(at(&pair[0])), SignedDuration::from_mins(15), "{pair:?}");
            }
        }
    }

    #[test]
    fn what_was_missed_is_caught_up_once_and_not_replayed() {
        let (schedule, orders) = (berlin("0 2 * * *"), cluster("orders"));
        let handled = at("2026-06-01T00:00:00Z");
        let due = schedule.due(at("2026-06-09T12:00:00Z"), "gold", &orders, handled);
        let run = due.run.expect("eight runs were missed");
        assert_eq!(run.scheduled, at("2026-06-09T00:00:00Z"));
        assert_eq!(due.next.map(|run| run.scheduled), Some(at("2026-06-10T00:00:00Z")));
        let after = schedule.due(at("2026-06-09T12:00:00Z"), "gold", &orders, run.scheduled);
        assert_eq!(after.run, None);
        assert_eq!(after.next.map(|run| run.scheduled), Some(at("2026-06-10T00:00:00Z")));
    }

    #[test]
    fn nothing_before_the_binding_is_caught_up() {
        let due =
            berlin("0 2 * * *").due(at("2026-06-01T12:00:00Z"), "gold", &cluster("orders"), at("2026-06-01T11:00:00Z"));
        assert_eq!(due.run, None);
    }

    #[test]
    fn jitter_is_stable_per_cluster_and_within_its_window() {
        let schedule = Schedule::new("0 2 * * *", "UTC", Span::minutes(30)).expect("good");
        let mut delays: Vec<i64> =
            (0..200).map(|i| schedule.delay("gold", &cluster(&format!("c{i}"))).as_secs()).collect();
        assert!(delays.iter().all(|delay| (0..1800).contains(delay)));
        assert_eq!(schedule.delay("gold", &cluster("c7")).as_secs(), delays[7]);
        delays.sort_unstable();
        assert!(delays[0] < 180 && delays[199] > 1620, "{delays:?} is not spread over the window");
        // A run that cron has called but whose share is not over waits.
        let orders = cluster("orders");
        let delay = schedule.delay("gold", &orders);
        let (called, bound) = (at("2026-06-01T02:00:00Z"), at("2026-06-01T00:00:00Z"));
        let before = schedule.due(called + delay - SignedDuration::from_secs(1), "gold", &orders, bound);
        assert_eq!((before.run, before.next.map(|run| run.start)), (None, Some(called + delay)));
        assert_eq!(schedule.due(called + delay, "gold", &orders, bound).run.map(|run| run.scheduled), Some(called));
    }

    #[test]
    fn expressions_that_make_no_sense_are_refused() {
        for bad in ["", "0 2 * *", "0 2 * * * *", "61 * * * *", "0 25 * * *", "x y z a b", "0 0 30 2 *", "@sometimes"] {
            assert!(Schedule::new(bad, "UTC", Span::ZERO).is_err(), "{bad}");
        }
        assert!(Schedule::new("@daily", "UTC", Span::ZERO).is_ok());
        assert!(matches!(Schedule::new("0 2 * * *", "Mars/Base", Span::ZERO), Err(ScheduleError::TimeZone { .. })));
    }

    proptest! {
        /// Whatever the schedule and the moment: a due run is in the past and newer than the handled one, the next lies
        /// in the future, and handling the due run leaves nothing due.
        #[test]
        fn handling_what_is_due_leaves_nothing_due(
            now in 1_780_000_000_i64..1_860_000_000,
            behind in 0_i64..5_000_000,
            cron in prop::sample::select(vec!["30 2 * * *", "*/15 * * * *", "0 0 * * 1", "30 2 1 * *", "5 1-3 * * *"]),
            zone in prop::sample::select(vec!["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"]),
            jitter in 0_u64..7200,
        ) {
            let schedule = Schedule::new(cron, zone, Span::seconds(jitter)).expect("good");
            let orders = cluster("orders");
            let now = Timestamp::from_second(now).expect("in range");
            let handled = now - SignedDuration::from_secs(behind);
            let due = schedule.due(now, "gold", &orders, handled);
            let next = due.next.expect("these never end");
            prop_assert!(next.start > now);
            if let Some(run) = due.run {
                prop_assert!(run.start <= now && run.scheduled > handled && run.scheduled < next.scheduled);
                let again = schedule.due(now, "gold", &orders, run.scheduled);
                prop_assert_eq!(again.run, None);
                prop_assert_eq!(again.next, Some(next));
            }
        }
    }
}
