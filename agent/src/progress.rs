//! Where a long operation stands: written by the operation, read by whoever shows it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

/// A shared, cheap view of one operation. Bytes are counted without locks, since many threads do it.
#[derive(Clone, Debug)]
pub struct Progress {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    phase: watch::Sender<&'static str>,
    done_bytes: AtomicU64,
    /// 0: not known.
    total_bytes: AtomicU64,
}

/// One reading of a [`Progress`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProgressReading {
    pub phase: &'static str,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

impl Default for Progress {
    fn default() -> Self {
        Progress::new()
    }
}

impl Progress {
    pub fn new() -> Progress {
        let (phase, _) = watch::channel("start");
        Progress { inner: Arc::new(Inner { phase, done_bytes: AtomicU64::new(0), total_bytes: AtomicU64::new(0) }) }
    }

    /// Enters a phase; byte counts start again.
    pub fn enter(&self, phase: &'static str, total_bytes: u64) {
        self.inner.done_bytes.store(0, Ordering::Relaxed);
        self.inner.total_bytes.store(total_bytes, Ordering::Relaxed);
        self.inner.phase.send_replace(phase);
    }

    pub fn add(&self, bytes: u64) {
        self.inner.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn read(&self) -> ProgressReading {
        ProgressReading {
            phase: *self.inner.phase.borrow(),
            done_bytes: self.inner.done_bytes.load(Ordering::Relaxed),
            total_bytes: self.inner.total_bytes.load(Ordering::Relaxed),
        }
    }

    /// Wakes at every change of phase.
    pub fn phases(&self) -> watch::Receiver<&'static str> {
        self.inner.phase.subscribe()
    }
}
