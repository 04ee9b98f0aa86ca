//! A token bucket that may go into debt: what is taken at once, a pack of 32 MiB, is often more than a second's worth.
//!
//! Whoever asks gets all of it as soon as nothing is owed, and what it took is owed from then on. So over any stretch of
//! time no more passes than the rate allows, and one asker's amount more. Pure: the caller brings the time.

use std::time::{Duration, Instant};

/// Credit never grows beyond what flows in during this time: it makes up for sleeps that took too long, and no more.
const SAVED: Duration = Duration::from_millis(100);

pub struct Bucket {
    /// A second; `None`: no limit.
    rate: Option<u64>,
    /// Billionths of what is counted; below zero it is owed.
    level: i128,
    at: Instant,
}

impl Bucket {
    /// Without a limit.
    pub fn new(now: Instant) -> Bucket {
        Bucket { rate: None, level: 0, at: now }
    }

    /// What is owed stays so, unless there is no limit any more.
    pub fn set_rate(&mut self, rate: Option<u64>, now: Instant) {
        self.flow(now);
        self.rate = rate;
        self.level = if rate.is_some() { self.level.min(0) } else { 0 };
    }

    /// Takes the amount if nothing is owed, else says in how long that will be.
    pub fn take(&mut self, amount: u64, now: Instant) -> Result<(), Duration> {
        self.flow(now);
        let Some(rate) = self.rate else { return Ok(()) };
        if self.level < 0 {
            let nanos = self.level.unsigned_abs().div_ceil(u128::from(rate.max(1)));
            return Err(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)));
        }
        self.level -= billion(amount);
        Ok(())
    }

    /// Takes the amount whatever is owed.
    pub fn charge(&mut self, amount: u64, now: Instant) {
        self.flow(now);
        if self.rate.is_some() {
            self.level -= billion(amount);
        }
    }

    fn flow(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        let rate = i128::from(self.rate.unwrap_or(0));
        let inflow = rate.saturating_mul(i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX));
        let most = rate * SAVED.as_nanos() as i128;
        self.level = self.level.saturating_add(inflow).min(most);
    }
}

fn billion(amount: u64) -> i128 {
    i128::from(amount) * 1_000_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Askers of `amount` who come back as told, for so long; returns what they got.
    fn taken(bucket: &mut Bucket, from: Instant, seconds: u64, amount: u64) -> u64 {
        let (mut now, mut taken) = (from, 0);
        while now < from + Duration::from_secs(seconds) {
            match bucket.take(amount, now) {
                Ok(()) => taken += amount,
                Err(wait) => now += wait,
            }
        }
        taken
    }

    #[test]
    fn over_time_exactly_the_rate_passes_whatever_the_size_of_the_pieces() {
        for amount in [1 << 10, 1 << 20, 32 << 20] {
            let start = Instant::now();
            let mut bucket = Bucket::new(start);
            bucket.set_rate(Some(10 << 20), start);
            let taken = taken(&mut bucket, start, 100, amount);
            let expected = 100 * (10 << 20);
            assert!((expected..=expected + 2 * amount).contains(&taken), "{amount}: {taken}");
        }
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        bucket.set_rate(Some(1000), start);
        let later = start + Duration::from_secs(3600);
        let taken = taken(&mut bucket, later, 10, 10);
        assert!((10_000..=10_200).contains(&taken), "{taken}");
    }

    #[test]
    fn a_change_of_the_rate_holds_at_once_and_without_one_nothing_waits() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        assert!((0..1000).all(|_| bucket.take(u64::MAX, start).is_ok()));
        bucket.set_rate(Some(100), start);
        bucket.take(1000, start).unwrap();
        assert_eq!(bucket.take(1, start), Err(Duration::from_secs(10)));
        bucket.set_rate(Some(1000), start);
        assert_eq!(bucket.take(1, start), Err(Duration::from_secs(1)));
        bucket.set_rate(None, start);
        assert_eq!(bucket.take(1, start), Ok(()));
    }

    #[test]
    fn what_is_charged_without_waiting_is_taken_from_the_others() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        bucket.set_rate(Some(100), start);
        bucket.charge(500, start);
        bucket.charge(500, start);
        assert_eq!(bucket.take(1, start), Err(Duration::from_secs(10)));
        assert_eq!(bucket.take(1, start + Duration::from_secs(10)), Ok(()));
    }

    #[test]
    fn a_clock_that_seems_to_go_back_gives_nothing_twice() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        bucket.set_rate(Some(100), start);
        bucket.take(1000, start + Duration::from_secs(5)).unwrap();
        assert!(bucket.take(1, start).is_err());
        assert!(bucket.take(1, start + Duration::from_secs(14)).is_err());
    }
}
