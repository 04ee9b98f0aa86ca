//! How fast a phase goes and what is left of the operation. Pure: fed with what was seen at each look.
//!
//! The rate is that of the last [`WINDOW`], so that it follows what happens now, and of bytes that were truly moved: what
//! is spared passes in no time, and would make the rest look as quick.

use std::collections::VecDeque;

use crate::estimate::Expected;

/// Long enough that a pack's upload or a checkpoint of the server does not make it jump, short enough to follow.
const WINDOW: f64 = 20.0;

/// A rate from less is noise.
const SHORTEST: f64 = 2.0;

/// Looks closer to each other than this are one: bounds the memory, whoever looks how often.
const BETWEEN: f64 = 0.5;

/// From when on standing still is told, and in what steps.
const STILL_STEP: f64 = 10.0;

/// What was seen at one look. Times are seconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Moment {
    /// Since the operation began.
    pub at: f64,
    /// Since the phase was entered.
    pub in_phase: f64,
    pub phase: &'static str,
    pub done_bytes: u64,
    /// 0: not known.
    pub total_bytes: u64,
    pub spared_bytes: u64,
}

impl Moment {
    fn moved_bytes(&self) -> u64 {
        self.done_bytes.saturating_sub(self.spared_bytes)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Seen {
    pub bytes_per_second: Option<u64>,
    pub left_seconds: Option<u64>,
    pub still_seconds: u64,
}

#[derive(Default, Debug)]
pub struct Pace {
    /// Of the present phase, oldest first.
    looks: VecDeque<Moment>,
    /// When phase or bytes last changed.
    changed: Option<Moment>,
}

impl Pace {
    pub fn see(&mut self, now: &Moment, expected: Option<&Expected>) -> Seen {
        let last = self.changed.filter(|last| last.phase == now.phase && last.at <= now.at);
        if last.is_none_or(|last| last.done_bytes > now.done_bytes) {
            self.looks.clear();
            self.changed = Some(*now);
        } else if last.is_some_and(|last| last.done_bytes != now.done_bytes) {
            self.changed = Some(*now);
        }
        let still = self.changed.map_or(0.0, |changed| now.at - changed.at);
        let still_seconds = ((still / STILL_STEP).floor() * STILL_STEP) as u64;
        if self.looks.back().is_none_or(|back| now.at - back.at >= BETWEEN) {
            self.looks.push_back(*now);
        }
        // One look from before the window stays, so that it is always covered.
        while self.looks.get(1).is_some_and(|second| now.at - second.at >= WINDOW) {
            self.looks.pop_front();
        }
        if now.total_bytes == 0 && now.done_bytes == 0 {
            return Seen { left_seconds: without_bytes(now, expected), still_seconds, bytes_per_second: None };
        }
        if still_seconds > 0 {
            return Seen { still_seconds, ..Seen::default() };
        }
        let Some(rates) = self.rates(now) else { return Seen::default() };
        let in_phase = rates.left(now, expected);
        let left = in_phase.map(|left| left + after(now.phase, expected).unwrap_or(0.0));
        let bytes_per_second = (rates.moved >= 1.0).then_some(rates.moved as u64);
        Seen { bytes_per_second, left_seconds: left.map(|left| left.ceil() as u64), still_seconds }
    }

    fn rates(&self, now: &Moment) -> Option<Rates> {
        let first = self.looks.front()?;
        let span = now.at - first.at;
        if span < SHORTEST {
            return None;
        }
        let per_second = |before: u64, after: u64| after.saturating_sub(before) as f64 / span;
        Some(Rates {
            moved: per_second(first.moved_bytes(), now.moved_bytes()),
            done: per_second(first.done_bytes, now.done_bytes),
        })
    }
}

/// Bytes a second.
struct Rates {
    /// Moved.
    moved: f64,
    /// Moved or spared.
    done: f64,
}

impl Rates {
    /// Seconds until the phase's bytes are done.
    fn left(&self, now: &Moment, expected: Option<&Expected>) -> Option<f64> {
        let rest = now.total_bytes.saturating_sub(now.done_bytes);
        if now.total_bytes == 0 {
            return None;
        }
        if rest == 0 {
            return Some(0.0);
        }
        // What is still to be moved of the rest: as much as is known to be there; else the share that it had so far.
        let known = expected.and_then(|expected| expected.moved_bytes);
        let share = now.moved_bytes() as f64 / now.done_bytes.max(1) as f64;
        let to_move = match known.map(|all| all.saturating_sub(now.moved_bytes())) {
            Some(left) if left > 0 => (left as f64).min(rest as f64),
            _ => rest as f64 * share,
        };
        match (known, self.moved >= 1.0) {
            (Some(_), true) => Some(to_move / self.moved),
            // Nothing is known of the rest: no sooner than it passes, and no sooner than its share can be moved.
            (None, true) => Some((to_move / self.moved).max(rest as f64 / self.done)),
            // All is spared just now, which says nothing of what is to be moved.
            (_, false) if to_move >= 1.0 => None,
            (_, false) => (self.done >= 1.0).then(|| rest as f64 / self.done),
        }
    }
}

/// A phase that moves nothing takes as long as it did before; if it takes longer, nobody knows.
fn without_bytes(now: &Moment, expected: Option<&Expected>) -> Option<u64> {
    let phase = expected?.phase_seconds(now.phase)?;
    let left = phase - now.in_phase;
    (left > 0.0).then(|| (left + after(now.phase, expected).unwrap_or(0.0)).ceil() as u64)
}

/// What the phases behind this one took before.
fn after(phase: &str, expected: Option<&Expected>) -> Option<f64> {
    let phases = &expected?.phases;
    let behind = phases.iter().skip_while(|(name, _)| name != phase).skip(1);
    Some(behind.map(|(_, seconds)| seconds).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn copy(at: f64, done: u64, spared: u64) -> Moment {
        Moment {
            at,
            in_phase: at,
            phase: "copy",
            done_bytes: done * MB,
            total_bytes: 1000 * MB,
            spared_bytes: spared * MB,
        }
    }

    fn see_all(pace: &mut Pace, moments: impl IntoIterator<Item = Moment>, expected: Option<&Expected>) -> Seen {
        moments.into_iter().map(|moment| pace.see(&moment, expected)).last().unwrap_or_default()
    }

    fn expecting(moved_mb: Option<u64>, phases: &[(&str, f64)]) -> Expected {
        let phases = phases.iter().map(|(name, seconds)| ((*name).to_owned(), *seconds)).collect();
        Expected { seconds: 60.0, basis: String::new(), moved_bytes: moved_mb.map(|mb| mb * MB), phases }
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds_and_not_since_the_start() {
        let mut pace = Pace::default();
        assert_eq!(pace.see(&copy(0.0, 0, 0), None), Seen::default());
        assert_eq!(pace.see(&copy(1.0, 50, 0), None), Seen::default(), "too early to tell");
        // 50 MB/s for ten seconds, then 5 MB/s for thirty.
        see_all(&mut pace, (2..=10).map(|s| copy(f64::from(s), s as u64 * 50, 0)), None);
        let seen = see_all(&mut pace, (11..=40).map(|s| copy(f64::from(s), 500 + (s as u64 - 10) * 5, 0)), None);
        assert_eq!(seen.bytes_per_second, Some(5 * MB));
        assert_eq!(seen.left_seconds, Some((1000 - 650) / 5));
    }

    #[test]
    fn what_is_spared_makes_nothing_look_quick() {
        let mut pace = Pace::default();
        // Nine tenths pass at once; of the rest 10 MB are read each second.
        pace.see(&copy(0.0, 0, 0), None);
        let seen = see_all(&mut pace, (1..=4).map(|s| copy(f64::from(s), 900 + s as u64 * 10, 900)), None);
        assert_eq!(seen.bytes_per_second, Some(10 * MB));
        // With the amount known the rest is 60 MB at 10 MB/s.
        let mut pace = Pace::default();
        let known = expecting(Some(100), &[]);
        pace.see(&copy(0.0, 0, 0), Some(&known));
        let seen = see_all(&mut pace, (1..=4).map(|s| copy(f64::from(s), 900 + s as u64 * 10, 900)), Some(&known));
        assert_eq!(seen.left_seconds, Some(6));
        // And read first, spared later: 960 MB are left, of which 60 are to be read.
        let mut pace = Pace::default();
        pace.see(&copy(0.0, 0, 0), Some(&known));
        let seen = see_all(&mut pace, (1..=4).map(|s| copy(f64::from(s), s as u64 * 10, 0)), Some(&known));
        assert_eq!(seen.left_seconds, Some(6));
    }

    #[test]
    fn while_all_is_spared_nothing_is_said_of_what_is_to_be_read() {
        let mut pace = Pace::default();
        let known = expecting(Some(100), &[]);
        pace.see(&copy(0.0, 0, 0), Some(&known));
        let seen =
            see_all(&mut pace, (1..=4).map(|s| copy(f64::from(s), s as u64 * 100, s as u64 * 100)), Some(&known));
        assert_eq!(seen, Seen::default());
    }

    #[test]
    fn a_job_that_stands_still_gives_no_estimate() {
        let mut pace = Pace::default();
        let seen = see_all(&mut pace, (0..=5).map(|s| copy(f64::from(s), s as u64 * 10, 0)), None);
        assert!(seen.left_seconds.is_some());
        let seen = see_all(&mut pace, (6..=38).map(|s| copy(f64::from(s), 50, 0)), None);
        assert_eq!(seen, Seen { still_seconds: 30, ..Seen::default() });
        let seen = pace.see(&copy(39.0, 60, 0), None);
        assert_eq!(seen.still_seconds, 0, "it moves again");
        assert!(seen.bytes_per_second.is_some());
    }

    #[test]
    fn a_phase_without_bytes_takes_what_it_took_before_and_then_nobody_knows() {
        let wait =
            |at: f64| Moment { phase: "wait for wal", done_bytes: 0, total_bytes: 0, in_phase: at, ..copy(at, 0, 0) };
        let known = expecting(None, &[("copy", 20.0), ("wait for wal", 6.0), ("commit", 1.0)]);
        let mut pace = Pace::default();
        assert_eq!(pace.see(&wait(0.0), None).left_seconds, None);
        assert_eq!(pace.see(&wait(2.0), Some(&known)).left_seconds, Some(5), "4 of it, and 1 of what follows");
        let late = pace.see(&wait(25.0), Some(&known));
        assert_eq!((late.left_seconds, late.still_seconds), (None, 20));
    }

    #[test]
    fn what_follows_the_copy_counts_and_another_attempt_starts_over() {
        let known = expecting(None, &[("copy", 20.0), ("wait for wal", 6.0), ("commit", 1.0)]);
        let mut pace = Pace::default();
        let seen = see_all(&mut pace, (0..=4).map(|s| copy(f64::from(s), s as u64 * 100, 0)), Some(&known));
        assert_eq!(seen.left_seconds, Some(6 + 7));
        assert_eq!(pace.see(&copy(5.0, 1, 0), None), Seen::default(), "fewer bytes than before");
        assert_eq!(pace.see(&copy(3.0, 1, 0), None), Seen::default(), "a clock that went back");
    }

    #[test]
    fn the_window_stays_small() {
        let mut pace = Pace::default();
        see_all(&mut pace, (0..100_000).map(|ms| copy(f64::from(ms) / 1000.0, 1, 0)), None);
        assert!(pace.looks.len() <= (WINDOW / BETWEEN) as usize + 2, "{}", pace.looks.len());
    }
}
