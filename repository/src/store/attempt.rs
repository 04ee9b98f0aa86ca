//! How long one attempt may take, and when there is another.
//!
//! object_store's own retries are switched off: a create that it repeats in silence would meet its own object.

use std::future::Future;
use std::time::Duration;

use object_store::path::Path;
use tokio::time::Instant;

use super::error::{Operation, StoreError, StoreErrorKind};

/// When to try again, and when to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RetryPolicy {
    /// The first pause; doubled after every attempt, with a random half taken off.
    pub first_pause: Duration,
    pub longest_pause: Duration,
    /// No attempt begins later than this after the first one began.
    pub deadline: Duration,
    /// What any request may take, beside the time its bytes need.
    pub request_timeout: Duration,
    /// The slowest link that is still waited for, in bytes a second: bounds what a body may take.
    pub slowest_bytes_per_second: u64,
}

impl Default for RetryPolicy {
    /// Three minutes outlast a store's restart or a failover of its front end. A 32 MiB pack at 256 KiB/s takes about two
    /// minutes; slower than that, a backup would never end anyway.
    fn default() -> Self {
        RetryPolicy {
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(10),
            deadline: Duration::from_secs(180),
            request_timeout: Duration::from_secs(30),
            slowest_bytes_per_second: 256 << 10,
        }
    }
}

impl RetryPolicy {
    /// A single attempt.
    pub fn never() -> Self {
        RetryPolicy { deadline: Duration::ZERO, ..RetryPolicy::default() }
    }

    /// For a small object that somebody waits for, after so many times in vain: a request that is not answered within four seconds is
    /// made again, and after five the error is told. On a slow line each time waits twice as long as the one before, up to
    /// what this policy says.
    #[must_use]
    pub fn hurried(self, tries: u32) -> Self {
        const FIRST: Duration = Duration::from_secs(4);
        const DEADLINE: Duration = Duration::from_secs(5);
        RetryPolicy {
            deadline: self.deadline.min(DEADLINE),
            request_timeout: self.request_timeout.min(FIRST.saturating_mul(1 << tries.min(10))),
            ..self
        }
    }

    /// Pauses of milliseconds, for tests.
    pub fn impatient() -> Self {
        RetryPolicy {
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(10),
            deadline: Duration::from_secs(5),
            request_timeout: Duration::from_millis(500),
            ..RetryPolicy::default()
        }
    }

    fn timeout(&self, bytes: u64) -> Duration {
        self.request_timeout + Duration::from_secs(bytes / self.slowest_bytes_per_second.max(1))
    }
}

/// The attempts of one operation.
pub(super) struct Attempts<'a> {
    operation: Operation,
    key: &'a Path,
    policy: &'a RetryPolicy,
    began: Instant,
    made: u32,
}

impl<'a> Attempts<'a> {
    pub(super) fn new(operation: Operation, key: &'a Path, policy: &'a RetryPolicy) -> Self {
        Attempts { operation, key, policy, began: Instant::now(), made: 0 }
    }

    pub(super) fn error(&self, kind: StoreErrorKind) -> StoreError {
        StoreError::new(self.operation, self.key, kind)
    }

    /// Runs one request that moves `bytes`, within its time.
    pub(super) async fn limit<T>(
        &self,
        bytes: u64,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        let limit = self.policy.timeout(bytes);
        match tokio::time::timeout(limit, request).await {
            Ok(outcome) => outcome.map_err(|source| StoreError::from_store(self.operation, self.key, source)),
            Err(_) => Err(self.error(StoreErrorKind::TimedOut { after: limit })),
        }
    }

    /// A listing is many requests, so it may take as long as all attempts together.
    pub(super) async fn limit_listing<T>(
        &self,
        listing: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        let limit = self.policy.deadline.max(self.policy.request_timeout);
        match tokio::time::timeout(limit, listing).await {
            Ok(outcome) => outcome.map_err(|source| StoreError::from_store(self.operation, self.key, source)),
            Err(_) => Err(self.error(StoreErrorKind::TimedOut { after: limit })),
        }
    }

    /// Sleeps before another attempt, or gives the error back when it is final or time is up.
    pub(super) async fn wait(&mut self, error: StoreError) -> Result<(), StoreError> {
        self.made += 1;
        let pause = self.pause();
        if !error.is_retryable() || self.began.elapsed() + pause > self.policy.deadline {
            return Err(error.after(self.made, self.began.elapsed()));
        }
        tracing::debug!(operation = %self.operation, key = %self.key, attempt = self.made, %error, "trying again");
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn pause(&self) -> Duration {
        let doubled = self.policy.first_pause.saturating_mul(1 << self.made.saturating_sub(1).min(16));
        doubled.min(self.policy.longest_pause).mul_f64(0.5 + rand::random::<f64>() / 2.0)
    }
}
