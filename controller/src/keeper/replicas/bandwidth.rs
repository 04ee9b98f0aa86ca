//! How fast backups are brought.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;
use walfleet_repository::limits::ByteRate;
use walfleet_repository::store::{Pace, Stopped};

/// So many bytes a second. Whoever comes waits until those before are paid for.
#[derive(Debug)]
pub struct Bandwidth {
    rate: ByteRate,
    free_at: Mutex<Instant>,
}

impl Bandwidth {
    pub fn of(rate: ByteRate) -> Bandwidth {
        Bandwidth { rate, free_at: Mutex::new(Instant::now()) }
    }

    fn turn(&self, bytes: u64) -> Instant {
        let cost = Duration::from_secs_f64(bytes as f64 / self.rate.bytes_per_second() as f64);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = (*free_at).max(Instant::now());
        *free_at = turn + cost;
        *free_at
    }
}

impl Pace for Bandwidth {
    fn upload(&self, bytes: u64) -> BoxFuture<'_, Result<(), Stopped>> {
        let turn = self.turn(bytes);
        Box::pin(async move {
            tokio::time::sleep_until(turn).await;
            Ok(())
        })
    }

    fn download(&self, bytes: u64) -> BoxFuture<'_, ()> {
        Box::pin(tokio::time::sleep_until(self.turn(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_the_time_that_their_rate_says() {
        let bandwidth = Bandwidth::of(ByteRate::from_bytes_per_second(1_000_000).expect("a rate"));
        let begun = Instant::now();
        let (first, second) = (bandwidth.turn(2_000_000), bandwidth.turn(1_000_000));
        assert_eq!((second - first).as_secs(), 1);
        assert!((first - begun).as_secs_f64() > 1.9);
    }
}
