//! What changes over time: how much WAL waits for the repository, when `pg_wal` will be full, and what an hour costs.

use std::collections::VecDeque;

use jiff::{SignedDuration, Timestamp};
use walfleet_repository::postgres::Lsn;

use super::LastHour;

const HOUR: SignedDuration = SignedDuration::from_hours(1);

/// The rate at which WAL accumulates is that of this long: shorter, and a checkpoint's burst looks like a flood.
const RATE_OVER: SignedDuration = SignedDuration::from_secs(120);
const RATE_OVER_AT_LEAST: SignedDuration = SignedDuration::from_secs(20);

/// The same for files, of 16 MiB mostly: over less, what fills slowly would come and go.
const KEPT_OVER: SignedDuration = SignedDuration::from_mins(10);

/// A connection is made anew within this.
const RECONNECTED_WITHIN: SignedDuration = SignedDuration::from_secs(30);

/// Less than this waits on any busy server.
const NOT_WORTH_A_WORD: u64 = 64 << 20;

/// One look at an instance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sample {
    pub at: Timestamp,
    pub current_lsn: Option<Lsn>,
    /// Of the server's own timeline.
    pub durable_lsn: Option<Lsn>,
    /// Whoever streams moves the slot on.
    pub is_streamed: bool,
    /// What the slot keeps.
    pub slot_bytes: u64,
    pub pg_wal_bytes: u64,
    /// Of what PostgreSQL keeps until it is archived.
    pub ready_bytes: u64,
    /// Since the agent started.
    pub requests: u64,
    pub stored_bytes: u64,
}

impl Sample {
    fn waiting(&self) -> Option<u64> {
        Some(self.current_lsn?.saturating_sub(self.durable_lsn?))
    }
}

/// The looks of the last hour.
#[derive(Clone, Default, Debug)]
pub struct Trend {
    samples: VecDeque<Sample>,
}

impl Trend {
    pub fn note(&mut self, sample: Sample) {
        self.samples.push_back(sample);
        while self.samples.front().is_some_and(|oldest| sample.at.duration_since(oldest.at) > HOUR) {
            self.samples.pop_front();
        }
    }

    /// Until what accumulates in `pg_wal` has used up what is free; `None` while nothing does.
    pub fn full_in(&self, free_bytes: u64) -> Option<SignedDuration> {
        let per_second = [self.lacking(), self.kept()].into_iter().flatten().reduce(f64::max)?;
        // Ten years is as good as never.
        let full_in = SignedDuration::try_from_secs_f64(free_bytes as f64 / per_second).ok();
        full_in.filter(|full_in| full_in.as_hours() < 10 * 365 * 24)
    }

    /// Bytes a second by which the WAL grows that the repository lacks.
    fn lacking(&self) -> Option<f64> {
        let last = self.samples.back()?;
        let waiting = last.waiting().filter(|waiting| *waiting >= NOT_WORTH_A_WORD)?;
        let first = self.first_within(RATE_OVER)?;
        rate(first, last, first.waiting()?, waiting)
    }

    /// Bytes a second by which `pg_wal` itself grows, while PostgreSQL keeps what the archiver has not taken, or a slot what nobody
    /// moves it past: no WAL is streamed, or nothing was ever stored of this timeline. At other times it grows up to `max_wal_size` and no more.
    fn kept(&self) -> Option<f64> {
        let (last, first) = (self.samples.back()?, self.first_within(KEPT_OVER)?);
        let archiver = last.ready_bytes >= NOT_WORTH_A_WORD && last.ready_bytes > first.ready_bytes;
        let is_unstreamed =
            !self.samples.iter().rev().take_while(|seen| self.is_recent(seen)).any(|seen| seen.is_streamed);
        let is_stuck = is_unstreamed || last.current_lsn.is_some() && last.durable_lsn.is_none();
        let slot = is_stuck && last.slot_bytes > first.slot_bytes;
        // 0: it could not be read.
        let is_kept = first.pg_wal_bytes > 0 && (archiver || slot && last.pg_wal_bytes >= NOT_WORTH_A_WORD);
        is_kept.then(|| rate(first, last, first.pg_wal_bytes, last.pg_wal_bytes)).flatten()
    }

    fn is_recent(&self, sample: &Sample) -> bool {
        self.samples.back().is_some_and(|last| last.at.duration_since(sample.at) <= RECONNECTED_WITHIN)
    }

    fn first_within(&self, length: SignedDuration) -> Option<&Sample> {
        let last = self.samples.back()?;
        self.samples.iter().find(|sample| last.at.duration_since(sample.at) <= length)
    }

    /// Requests and stored bytes of the last hour, or of as much of it as is known; a restart counts from nothing.
    pub fn last_hour(&self) -> LastHour {
        let mut hour = LastHour::default();
        for (earlier, later) in self.samples.iter().zip(self.samples.iter().skip(1)) {
            let grown = |from: u64, to: u64| if to >= from { to - from } else { to };
            hour.requests += grown(earlier.requests, later.requests);
            hour.stored_bytes += grown(earlier.stored_bytes, later.stored_bytes);
        }
        hour
    }
}

/// Bytes a second, if it grows and was seen for long enough.
fn rate(first: &Sample, last: &Sample, from: u64, to: u64) -> Option<f64> {
    let over = last.at.duration_since(first.at);
    let grown = to.checked_sub(from).filter(|grown| *grown > 0)?;
    (over >= RATE_OVER_AT_LEAST).then(|| grown as f64 / over.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(second: i64, waiting: u64, requests: u64) -> Sample {
        let at = Timestamp::from_second(second).unwrap();
        let (current_lsn, durable_lsn) = (Some(Lsn(waiting + 5)), Some(Lsn(5)));
        Sample {
            at,
            current_lsn,
            durable_lsn,
            is_streamed: true,
            slot_bytes: 0,
            pg_wal_bytes: 0,
            ready_bytes: 0,
            requests,
            stored_bytes: requests * 10,
        }
    }

    #[test]
    fn a_full_disk_is_foreseen_while_wal_accumulates_and_not_otherwise() {
        let mut trend = Trend::default();
        assert_eq!(trend.full_in(1 << 30), None);
        for second in (0..=200).step_by(10) {
            trend.note(sample(second, 100_000_000 + second as u64 * 1_000_000, 0));
        }
        assert_eq!(trend.full_in(60_000_000).map(|full_in| full_in.as_secs()), Some(60), "a megabyte a second");
        for second in (210..=400).step_by(10) {
            trend.note(sample(second, 300_000_000, 0));
        }
        assert_eq!(trend.full_in(60_000_000), None, "it waits, but no more than before");
        for second in (410..=600).step_by(10) {
            trend.note(sample(second, second as u64 * 1000, 0));
        }
        assert_eq!(trend.full_in(60_000_000), None, "so little waits always");
    }

    #[test]
    fn a_full_disk_is_foreseen_while_the_server_keeps_wal_that_the_repository_has() {
        const SEGMENT: u64 = 16 << 20;
        // A segment every ten seconds, and all of it streamed.
        let after = |change: &dyn Fn(Sample, u64) -> Sample| {
            let mut trend = Trend::default();
            for second in (0..=200).step_by(10) {
                let segments = second as u64 / 10;
                trend
                    .note(change(Sample { pg_wal_bytes: (10 + segments) * SEGMENT, ..sample(second, 0, 0) }, segments));
            }
            trend.full_in(60 * SEGMENT).map(|full_in| full_in.as_secs())
        };
        let failing = |sample, segments| Sample { ready_bytes: segments * SEGMENT, ..sample };
        assert_eq!(after(&failing), Some(600));
        assert_eq!(after(&|sample, _| sample), None, "up to max_wal_size");
        let slow = |sample, _| Sample { ready_bytes: 8 * SEGMENT, ..sample };
        assert_eq!(after(&slow), None, "the archiver trails, and no more than before");
        let slot = |sample, segments| Sample { slot_bytes: segments * SEGMENT, ..sample };
        assert_eq!(after(&slot), None, "it is moved on, by segments of 1 GiB perhaps");
        let other_timeline = |sample, segments| Sample { durable_lsn: None, ..slot(sample, segments) };
        assert_eq!(after(&other_timeline), Some(600), "the slot keeps what is not stored at all");
        let stuck = |sample, segments| Sample { is_streamed: false, ..slot(sample, segments) };
        assert_eq!(after(&stuck), Some(600), "the slot keeps what archive_command has stored long since");
        let anew = |sample, segments| Sample { is_streamed: segments != 20, ..slot(sample, segments) };
        assert_eq!(after(&anew), None, "the connection is made anew at this moment");
        let unknown = |sample, _| Sample { durable_lsn: None, is_streamed: false, ..sample };
        assert_eq!(after(&unknown), None, "nobody keeps it");
        let both = |sample, segments| {
            let current_lsn = Some(Lsn(5 + (100 + segments * 2) * SEGMENT));
            failing(Sample { current_lsn, ..sample }, segments)
        };
        assert_eq!(after(&both), Some(300), "the faster one");
    }

    #[test]
    fn an_hour_counts_what_came_in_it_across_restarts() {
        let mut trend = Trend::default();
        for (second, requests) in [(0, 100), (1800, 150), (3000, 160), (3600, 7), (5000, 17)] {
            trend.note(sample(second, 0, requests));
        }
        assert_eq!(trend.last_hour(), LastHour { requests: 10 + 7 + 10, stored_bytes: 270 });
    }
}
