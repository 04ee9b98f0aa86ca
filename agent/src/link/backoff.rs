//! How long to wait before dialling again: exponential, with full jitter, so that a fleet does not return in step.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(500);

/// A controller that comes back is found again within this; ten thousand agents then make some 700 attempts a second.
pub const CAP: Duration = Duration::from_secs(30);

#[derive(Clone, Default, Debug)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure. `chance` is uniform in [0, 1).
    pub fn next(&mut self, chance: f64) -> Duration {
        let ceiling = FIRST.saturating_mul(1 << self.failures.min(16)).min(CAP);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(chance.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_begin_anew_after_success() {
        let mut backoff = Backoff::default();
        let ceilings: Vec<_> = (0..8).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(ceilings, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(backoff.next(0.0), Duration::ZERO);
        backoff.reset();
        assert_eq!(backoff.next(1.0), FIRST);
    }
}
