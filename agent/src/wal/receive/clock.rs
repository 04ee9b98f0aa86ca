//! Up to which moment of the server's clock everything is durable.

use std::collections::VecDeque;

use jiff::Timestamp;
use walfleet_repository::postgres::Lsn;

/// Two notes are at least so far apart.
const SPACING_US: i64 = 50_000;
/// Beyond it, every other one is forgotten: of a backlog of hours no more is known than is of use.
const MOST: usize = 1024;

/// What the server said of the end of its WAL, and when.
#[derive(Default, Debug)]
pub struct ServerClock {
    notes: VecDeque<(Lsn, Timestamp)>,
    complete_until: Option<Timestamp>,
}

impl ServerClock {
    /// As the sessions before left it.
    pub fn from(complete_until: Option<Timestamp>) -> ServerClock {
        ServerClock { notes: VecDeque::new(), complete_until }
    }

    /// The clock has gone back: what was committed before is dated later than what is to come, so that nothing follows from a
    /// moment that was noted.
    pub fn went_back(&mut self) {
        *self = ServerClock::default();
    }

    /// All that was committed before `at` lies before `end`: a commit returns once its record is flushed.
    pub fn note(&mut self, end: Lsn, at: Timestamp) {
        let newest = self.notes.back().map(|(_, at)| *at).max(self.complete_until);
        if newest.is_some_and(|newest| at < newest) {
            self.went_back();
        }
        if let Some((newest_end, newest_at)) = self.notes.back_mut()
            && (*newest_end == end || at.as_microsecond() - newest_at.as_microsecond() < SPACING_US)
        {
            // Of one end the latest time says most; of one time the earlier end would say too much.
            if *newest_end == end {
                *newest_at = at;
            }
            return;
        }
        if self.notes.len() == MOST {
            let mut keep = false;
            self.notes.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.notes.push_back((end, at));
    }

    /// Everything before `durable` is stored.
    pub fn reach(&mut self, durable: Lsn) {
        while let Some((_, at)) = self.notes.front().filter(|(end, _)| *end <= durable).copied() {
            self.complete_until = self.complete_until.max(Some(at));
            // The newest stays: a later time may come to it.
            if self.notes.len() == 1 {
                return;
            }
            self.notes.pop_front();
        }
    }

    pub fn complete_until(&self) -> Option<Timestamp> {
        self.complete_until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millisecond(ms).unwrap()
    }

    #[test]
    fn what_is_durable_is_complete_up_to_the_last_time_the_server_had_no_more() {
        let mut clock = ServerClock::default();
        clock.note(Lsn(100), at(0));
        clock.note(Lsn(200), at(100));
        clock.note(Lsn(220), at(110));
        clock.note(Lsn(300), at(200));
        clock.reach(Lsn(99));
        assert_eq!(clock.complete_until(), None);
        clock.reach(Lsn(250));
        assert_eq!(clock.complete_until(), Some(at(100)), "what was noted within the spacing is left out");
        clock.reach(Lsn(300));
        assert_eq!(clock.complete_until(), Some(at(200)));
        clock.note(Lsn(300), at(5000));
        clock.reach(Lsn(300));
        assert_eq!(clock.complete_until(), Some(at(5000)), "an idle server says so again and again");
        for n in 0..5000u64 {
            clock.note(Lsn(1000 + n), at(10_000 + n as i64 * 100));
        }
        assert!(clock.notes.len() <= MOST);
        clock.reach(Lsn(5999));
        assert_eq!(clock.complete_until(), Some(at(509_900)), "of the newest nothing is forgotten");
    }

    #[test]
    fn what_was_promised_by_a_clock_that_went_back_is_taken_back() {
        let mut clock = ServerClock::default();
        clock.note(Lsn(100), at(1000));
        clock.note(Lsn(200), at(7_200_000));
        clock.reach(Lsn(200));
        clock.note(Lsn(300), at(7_201_000));
        clock.note(Lsn(400), at(2000));
        assert_eq!(clock.complete_until(), None, "set back, and nothing noted since is durable");
        clock.reach(Lsn(300));
        assert_eq!(clock.complete_until(), None, "not by the other clock's notes either");
        clock.reach(Lsn(400));
        assert_eq!(clock.complete_until(), Some(at(2000)));
        clock.note(Lsn(400), at(1990));
        clock.reach(Lsn(400));
        assert_eq!(clock.complete_until(), Some(at(1990)), "by little, of an idle server");
        // Between two sessions.
        let mut clock = ServerClock::from(Some(at(7_200_000)));
        clock.reach(Lsn(500));
        assert_eq!(clock.complete_until(), Some(at(7_200_000)), "it holds as long as nothing else is heard");
        clock.note(Lsn(500), at(3000));
        clock.reach(Lsn(500));
        assert_eq!(clock.complete_until(), Some(at(3000)));
    }
}
