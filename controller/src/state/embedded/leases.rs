//! Deadlines of leases, in memory. Their lengths and keys are the tables' business.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::state::LeaseId;

#[derive(Default)]
pub(super) struct Leases {
    by_id: HashMap<LeaseId, Lease>,
}

struct Lease {
    length: Duration,
    deadline: Instant,
}

impl Leases {
    /// Every lease of the file, with its full time from now.
    pub(super) fn restored(lengths: Vec<(LeaseId, Duration)>) -> Self {
        let mut leases = Self::default();
        leases.adopt(lengths);
        leases
    }

    /// Begins the leases of the file that are not known here: their end could not be written.
    pub(super) fn adopt(&mut self, lengths: Vec<(LeaseId, Duration)>) {
        for (id, length) in lengths {
            if !self.contains(id) {
                self.begin(id, length);
            }
        }
    }

    pub(super) fn begin(&mut self, id: LeaseId, length: Duration) {
        self.by_id.insert(id, Lease { length, deadline: Instant::now() + length });
    }

    pub(super) fn contains(&self, id: LeaseId) -> bool {
        self.by_id.contains_key(&id)
    }

    /// The lease's length, if it has not ended.
    pub(super) fn keep_alive(&mut self, id: LeaseId) -> Option<Duration> {
        let now = Instant::now();
        let lease = self.by_id.get_mut(&id).filter(|lease| lease.deadline > now)?;
        lease.deadline = now + lease.length;
        Some(lease.length)
    }

    pub(super) fn end(&mut self, id: LeaseId) -> bool {
        self.by_id.remove(&id).is_some()
    }

    /// Removes the leases whose time is over: from here on no keep-alive brings them back.
    pub(super) fn take_ended(&mut self, now: Instant) -> Vec<LeaseId> {
        let mut ended: Vec<_> =
            self.by_id.iter().filter(|(_, lease)| lease.deadline <= now).map(|(id, _)| *id).collect();
        ended.sort();
        self.by_id.retain(|_, lease| lease.deadline > now);
        ended
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.by_id.values().map(|lease| lease.deadline).min()
    }
}
