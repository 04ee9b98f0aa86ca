//! Where a long operation stands: written by the operation, read by whoever shows it.
//!
//! Also what it has cost so far: the time of each phase, and what was asked of the store.

mod pace;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::watch;
use walfleet_repository::store::Store;

use crate::estimate::Expected;
use crate::jobs::cost::{JobCost, PhaseCost, StoreCost};
use pace::{Moment, Pace};

/// A shared, cheap view of one operation. Bytes are counted without locks, since many threads do it.
#[derive(Clone, Debug)]
pub struct Progress {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    began: Instant,
    phase: watch::Sender<&'static str>,
    done_bytes: AtomicU64,
    /// 0: not known.
    total_bytes: AtomicU64,
    spared_bytes: AtomicU64,
    rest: Mutex<Rest>,
}

/// What changes seldom, or only when somebody looks.
#[derive(Debug)]
struct Rest {
    /// When the present phase was entered.
    entered: Instant,
    /// Those that are over.
    phases: Vec<PhaseCost>,
    /// The job's own handle: what it counts is the job's.
    store: Option<Store>,
    expected: Option<Arc<Expected>>,
    pace: Pace,
}

/// One reading of a [`Progress`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProgressReading {
    pub phase: &'static str,
    pub done_bytes: u64,
    /// 0: not known.
    pub total_bytes: u64,
    /// Of those done, what need not be read and took no time.
    pub spared_bytes: u64,
    /// What moved lately; `None` while there is nothing to tell, or nothing moves.
    pub bytes_per_second: Option<u64>,
    /// Until the operation is over, as far as it is known.
    pub left_seconds: Option<u64>,
    /// How long neither phase nor bytes have changed, in steps of ten.
    pub still_seconds: u64,
    pub store_requests: u64,
}

impl Default for Progress {
    fn default() -> Self {
        Progress::new()
    }
}

/// Before the first phase: nothing has been done yet.
pub const BEFORE: &str = "prepare";

impl Progress {
    pub fn new() -> Progress {
        let (phase, _) = watch::channel(BEFORE);
        let now = Instant::now();
        let rest = Rest { entered: now, phases: Vec::new(), store: None, expected: None, pace: Pace::default() };
        Progress {
            inner: Arc::new(Inner {
                began: now,
                phase,
                done_bytes: AtomicU64::new(0),
                total_bytes: AtomicU64::new(0),
                spared_bytes: AtomicU64::new(0),
                rest: Mutex::new(rest),
            }),
        }
    }

    /// Enters a phase; byte counts start again.
    pub fn enter(&self, phase: &'static str, total_bytes: u64) {
        let mut rest = self.rest();
        let now = Instant::now();
        let over = self.present(&rest, now);
        rest.phases.extend(over);
        rest.entered = now;
        let inner = &self.inner;
        inner.done_bytes.store(0, Ordering::Relaxed);
        inner.spared_bytes.store(0, Ordering::Relaxed);
        inner.total_bytes.store(total_bytes, Ordering::Relaxed);
        inner.phase.send_replace(phase);
    }

    pub fn add(&self, bytes: u64) {
        self.inner.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Done without doing anything.
    pub fn spare(&self, bytes: u64) {
        self.inner.spared_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.add(bytes);
    }

    /// What is asked of this handle of a store from its opening on is the operation's cost.
    pub fn count(&self, store: &Store) {
        self.rest().store = Some(store.clone());
    }

    /// What the operation is expected to take.
    pub fn expect(&self, expected: Expected) {
        self.rest().expected = Some(Arc::new(expected));
    }

    pub fn expected(&self) -> Option<Arc<Expected>> {
        self.rest().expected.clone()
    }

    /// Looks; the rate is that of what was seen at earlier looks, so whoever shows it looks every second or so.
    pub fn read(&self) -> ProgressReading {
        let mut rest = self.rest();
        let inner = &self.inner;
        let phase = *inner.phase.borrow();
        // Spared first: done is then never less.
        let spared_bytes = inner.spared_bytes.load(Ordering::Relaxed);
        let done_bytes = inner.done_bytes.load(Ordering::Relaxed).max(spared_bytes);
        let total_bytes = inner.total_bytes.load(Ordering::Relaxed);
        let now = Instant::now();
        let moment = Moment {
            at: now.duration_since(inner.began).as_secs_f64(),
            in_phase: now.duration_since(rest.entered).as_secs_f64(),
            phase,
            done_bytes,
            total_bytes,
            spared_bytes,
        };
        let Rest { pace, expected, store, .. } = &mut *rest;
        let seen = pace.see(&moment, expected.as_deref());
        ProgressReading {
            phase,
            done_bytes,
            total_bytes,
            spared_bytes,
            bytes_per_second: seen.bytes_per_second,
            left_seconds: seen.left_seconds,
            still_seconds: seen.still_seconds,
            store_requests: store.as_ref().map_or(0, |store| store.counters().requests()),
        }
    }

    /// What it has cost up to now.
    pub fn cost(&self) -> JobCost {
        let rest = self.rest();
        let present = self.present(&rest, Instant::now());
        let store = rest.store.as_ref().map_or(StoreCost::default(), |store| store.counters().into());
        JobCost { store, phases: rest.phases.iter().cloned().chain(present).collect() }
    }

    /// Wakes at every change of phase.
    pub fn phases(&self) -> watch::Receiver<&'static str> {
        self.inner.phase.subscribe()
    }

    fn present(&self, rest: &Rest, now: Instant) -> Option<PhaseCost> {
        let phase = *self.inner.phase.borrow();
        (phase != BEFORE).then(|| PhaseCost {
            phase: phase.to_owned(),
            seconds: now.duration_since(rest.entered).as_secs_f64(),
            bytes: self.inner.done_bytes.load(Ordering::Relaxed),
        })
    }

    fn rest(&self) -> MutexGuard<'_, Rest> {
        // Nothing under the lock can panic half-way through a change that matters.
        self.inner.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_is_counted_once_and_the_last_one_up_to_now() {
        let progress = Progress::new();
        assert_eq!(progress.cost().phases, [], "nothing was done yet");
        progress.enter("copy", 10);
        progress.add(4);
        progress.spare(6);
        progress.enter("commit", 0);
        let cost = progress.cost();
        let seen: Vec<_> = cost.phases.iter().map(|phase| (phase.phase.as_str(), phase.bytes)).collect();
        assert_eq!(seen, [("copy", 10), ("commit", 0)]);
        assert_eq!(progress.read().spared_bytes, 0, "of the phase before");
    }
}
