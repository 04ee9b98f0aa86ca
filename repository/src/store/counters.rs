//! What a store was asked for: request counts are a cost that people see.

use std::sync::atomic::{AtomicU64, Ordering};

/// Running totals; relaxed, since nothing is decided on them.
#[derive(Default, Debug)]
pub struct Counters {
    gets: AtomicU64,
    heads: AtomicU64,
    puts: AtomicU64,
    lists: AtomicU64,
    retries: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

/// The totals at one moment. Every attempt counts as a request; `retries` of them were not the first of their operation.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct CountersSnapshot {
    pub gets: u64,
    pub heads: u64,
    pub puts: u64,
    /// Listings; a long one costs the store several requests.
    pub lists: u64,
    pub retries: u64,
    pub read_bytes: u64,
    /// Sent, whether they arrived or not.
    pub written_bytes: u64,
}

impl CountersSnapshot {
    pub fn requests(&self) -> u64 {
        self.gets + self.heads + self.puts + self.lists
    }

    /// What was added since an earlier snapshot of the same store.
    pub fn since(&self, earlier: &CountersSnapshot) -> CountersSnapshot {
        CountersSnapshot {
            gets: self.gets.saturating_sub(earlier.gets),
            heads: self.heads.saturating_sub(earlier.heads),
            puts: self.puts.saturating_sub(earlier.puts),
            lists: self.lists.saturating_sub(earlier.lists),
            retries: self.retries.saturating_sub(earlier.retries),
            read_bytes: self.read_bytes.saturating_sub(earlier.read_bytes),
            written_bytes: self.written_bytes.saturating_sub(earlier.written_bytes),
        }
    }
}

impl Counters {
    pub(super) fn get(&self) {
        self.gets.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn head(&self) {
        self.heads.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn list(&self) {
        self.lists.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn put(&self, bytes: usize) {
        self.puts.fetch_add(1, Ordering::Relaxed);
        self.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn read(&self, bytes: usize) {
        self.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn snapshot(&self) -> CountersSnapshot {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CountersSnapshot {
            gets: load(&self.gets),
            heads: load(&self.heads),
            puts: load(&self.puts),
            lists: load(&self.lists),
            retries: load(&self.retries),
            read_bytes: load(&self.read_bytes),
            written_bytes: load(&self.written_bytes),
        }
    }
}
