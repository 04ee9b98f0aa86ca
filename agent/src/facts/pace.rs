//! When a cluster's place in its repository is looked at next. Requests are money at most stores, and a look at an idle cluster
//! finds what was there before: so looks follow what this host knows without asking, its own shipping above all, and otherwise
//! come the more seldom the longer nothing was seen to change.
//!
//! What nobody here did, another member's backup or an object that vanished, is seen after as long again as it has been quiet,
//! and within [`LONGEST`].

use std::time::Duration;

use tokio::time::Instant;
use walfleet_repository::postgres::{Lsn, SystemId, Timeline};

use super::repository::RepositoryView;
use crate::archiving::Shipping;

/// Between two looks at the least, and how soon after something that changed.
const SHORTEST: Duration = Duration::from_secs(30);

/// Between two looks at an idle cluster at the most: with four requests each, and those of a day's first hour, some 120 a day.
const LONGEST: Duration = Duration::from_secs(3600);

/// The same while something is not well: others may fill or acknowledge a gap, and somebody waits for that to show.
const LONGEST_IN_TROUBLE: Duration = Duration::from_secs(30);

/// The same while WAL is streamed, however little of it: how far that is stored the stream itself tells at once.
const LONGEST_STREAMING: Duration = Duration::from_secs(300);

/// A look that takes many requests, of a hundred thousand segments, comes more seldom, down to this.
const LONGEST_FOR_COST: Duration = Duration::from_secs(900);
const PER_REQUEST: Duration = Duration::from_secs(3);

/// Looks take this part of the shipping's requests at the most.
const SHARE: u64 = 4;

/// What this host knows of a cluster's shipping without asking the store.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Signs {
    /// Made for WAL, whatever for: pieces, segments, looks at what others stored.
    requests: u64,
    timeline: Option<Timeline>,
    phase: &'static str,
    partings: u64,
    is_streamed: bool,
    /// What was stored then, by this host's account.
    stored: Vec<Stored>,
}

/// WAL of a timeline up to a position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stored {
    pub system_id: SystemId,
    pub timeline: Timeline,
    pub end: Lsn,
}

impl Signs {
    pub fn of(shipping: &Shipping) -> Signs {
        let stored = |(timeline, end)| Some(Stored { system_id: shipping.system_id?, timeline, end });
        Signs {
            stored: shipping.durable().filter_map(stored).collect(),
            requests: shipping.requests,
            timeline: shipping.streamed.timeline,
            phase: shipping.streamed.phase.word(),
            partings: shipping.partings,
            is_streamed: shipping.streamed.phase.is_well(),
        }
    }

    pub fn stored(&self) -> &[Stored] {
        &self.stored
    }

    /// Requests since then; fewer than before: they are counted anew.
    fn requests_since(&self, before: &Signs) -> u64 {
        self.requests.checked_sub(before.requests).unwrap_or(self.requests)
    }

    fn turned_since(&self, before: &Signs) -> bool {
        (self.timeline, self.phase, self.partings) != (before.timeline, before.phase, before.partings)
    }
}

/// What a look came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// What was there before, but for how far WAL goes.
    Same,
    /// Something else, or it was the first.
    Changed,
    /// An alarm, no answer, or nothing that could be restored.
    Trouble,
}

impl Found {
    pub fn between(before: &RepositoryView, now: &RepositoryView) -> Found {
        let is_restorable = now.windows.iter().any(|window| !window.ranges.is_empty());
        let is_missing = now.windows.iter().flat_map(|window| &window.gaps).any(|gap| !gap.acknowledged);
        if !is_restorable || is_missing || now.problem.is_some() {
            return Found::Trouble;
        }
        let outlines = |view: &RepositoryView| view.windows.iter().map(|window| window.outline()).collect::<Vec<_>>();
        match outlines(before) == outlines(now) && before.backups == now.backups {
            true => Found::Same,
            false => Found::Changed,
        }
    }
}

/// Of one cluster's looks.
#[derive(Clone, Debug)]
pub struct Pace {
    looked_at: Instant,
    signs: Signs,
    requests: u64,
    quiet: Duration,
}

impl Pace {
    /// After a look that was begun at `now` with these signs, and took so many requests.
    pub fn after(before: Option<&Pace>, now: Instant, signs: Signs, (found, requests): (Found, u64)) -> Pace {
        let grown = before.map_or(SHORTEST, |before| before.quiet.saturating_mul(2));
        let quiet = match found {
            Found::Same => grown.min(LONGEST),
            Found::Trouble => grown.min(LONGEST_IN_TROUBLE),
            Found::Changed => SHORTEST,
        };
        Pace { looked_at: now, signs, requests, quiet }
    }

    pub fn signs(&self) -> &Signs {
        &self.signs
    }

    pub fn is_due(&self, now: Instant, signs: &Signs) -> bool {
        let since = now.saturating_duration_since(self.looked_at);
        let dear = PER_REQUEST.saturating_mul(u32::try_from(self.requests).unwrap_or(u32::MAX));
        if since < dear.clamp(SHORTEST, LONGEST_FOR_COST) {
            return false;
        }
        let shipped = signs.requests_since(&self.signs);
        let is_worth_it = !signs.is_streamed || shipped >= SHARE * self.requests || since >= LONGEST_STREAMING;
        since >= self.quiet || signs.turned_since(&self.signs) || shipped > 0 && is_worth_it
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: u64 = 10;

    /// Seconds at which looks of four requests were made; `shipped`: the requests for WAL until then, and whether that streams.
    fn looks(seconds: u64, shipped: impl Fn(u64) -> (u64, bool), found: impl Fn(u64) -> Found) -> Vec<u64> {
        let begun = Instant::now();
        let mut pace: Option<Pace> = None;
        let mut looks = Vec::new();
        for second in (0..seconds).step_by(TICK as usize) {
            let now = begun + Duration::from_secs(second);
            let (requests, is_streamed) = shipped(second);
            let signs = Signs { requests, is_streamed, ..Signs::default() };
            if pace.as_ref().is_none_or(|pace| pace.is_due(now, &signs)) {
                pace = Some(Pace::after(pace.as_ref(), now, signs, (found(second), 5)));
                looks.push(second);
            }
        }
        looks
    }

    const DAY: u64 = 86_400;

    #[test]
    fn a_day_of_an_idle_cluster_is_thirty_looks() {
        let looks = looks(DAY, |_| (0, true), |second| if second == 0 { Found::Changed } else { Found::Same });
        assert_eq!(looks[..5], [0, 30, 90, 210, 450]);
        assert!(looks.len() <= 30, "{}", looks.len());
    }

    #[test]
    fn looks_follow_what_is_shipped_and_take_a_part_of_its_requests() {
        let same = |_| Found::Same;
        let busy = looks(3600, |second| (second, true), same).len();
        assert!((100..=120).contains(&busy), "every half minute: {busy}");
        let piece_a_minute = looks(DAY, |second| (second / 60, true), same).len();
        assert!((280..=300).contains(&piece_a_minute), "every five minutes: {piece_a_minute}");
        let archived = looks(3600, |second| (second / 60, false), same).len();
        assert!(archived >= 60, "after every segment: {archived}");
        let one_commit = looks(DAY, |second| (u64::from(second >= 50_000), true), same);
        assert!(one_commit.contains(&50_000), "at once");
    }

    #[test]
    fn alarms_are_looked_after_and_changes_make_looks_frequent_again() {
        let idle = |_| (0, true);
        assert_eq!(looks(3600, idle, |_| Found::Trouble).len(), 120);
        let changed = |second| if second == 210 { Found::Changed } else { Found::Same };
        assert_eq!(looks(400, idle, changed), [0, 30, 90, 210, 240, 300]);
    }

    #[test]
    fn a_look_that_takes_many_requests_comes_seldom_and_a_turn_is_looked_at() {
        let now = Instant::now();
        let after = |requests| Pace::after(None, now, Signs::default(), (Found::Changed, requests));
        let turned = Signs { partings: 1, ..Signs::default() };
        let due = |requests, seconds| after(requests).is_due(now + Duration::from_secs(seconds), &turned);
        assert!(!due(0, 29) && due(0, 30) && !due(100, 299) && due(100, 300) && due(u64::MAX, 900));
        let idle = Pace { quiet: LONGEST, ..after(0) };
        assert!(!idle.is_due(now + Duration::from_secs(60), &Signs::default()));
        assert!(idle.is_due(now + Duration::from_secs(60), &turned));
    }
}
