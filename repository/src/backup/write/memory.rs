//! How much memory a backup's packs take, whatever the number of threads that fill them.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::format::pack::PACK_TARGET_BYTES;

/// Packs of content that fill at a time. All threads share them: a thread holds one only while it appends a chunk that it
/// has compressed before, a twentieth of its time, so that two serve many.
pub(super) const OPEN_PACKS: usize = 2;

/// Full packs on their way to the store: those being uploaded, and one that is being hashed meanwhile.
pub(super) const FULL_PACKS: usize = super::UPLOADS_IN_FLIGHT + 1;

/// What packs and threads take together: an agent is to stay below 256 MiB, and its lists, its runtime and the program
/// itself need some 40 of them.
const BUDGET_BYTES: usize = 208 << 20;

/// More threads than this find no disk that is fast enough for them.
const MOST_THREADS: usize = 64;

/// Smaller packs are not worth a request each.
const LEAST_PACK_BYTES: usize = 4 << 20;

/// Beside its target a pack has one more chunk and its directory.
const PACK_ROOM_BYTES: usize = 1 << 20;

/// Of a writing thread: what it reads into, a mebibyte, and what its compressor needs. Measured for gathered chunks of
/// 512 KiB: 1 MiB at level 3, 3 at 6, 5.4 at 9, 6.2 at 19.
const fn thread_bytes(level: i32) -> usize {
    match level {
        ..=3 => 5 << 19,
        4..=6 => 9 << 19,
        _ => 8 << 20,
    }
}

/// What fits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct WritePlan {
    pub threads: usize,
    /// Stored bytes at which a pack of content is full.
    pub pack_bytes: usize,
}

impl WritePlan {
    /// For so many threads, or as many as there is memory for: rather smaller packs than fewer threads.
    pub fn new(threads: usize, level: i32) -> WritePlan {
        let (packs, of_thread) = (OPEN_PACKS + FULL_PACKS, thread_bytes(level));
        let least = packs * (LEAST_PACK_BYTES + PACK_ROOM_BYTES);
        let threads = threads.clamp(1, MOST_THREADS).min((BUDGET_BYTES - least) / of_thread);
        let pack_bytes = (BUDGET_BYTES - threads * of_thread) / packs - PACK_ROOM_BYTES;
        WritePlan { threads, pack_bytes: pack_bytes.min(PACK_TARGET_BYTES) }
    }
}

/// Lets so many in at a time.
pub(super) struct Gate {
    free: Mutex<usize>,
    left: Condvar,
}

/// To have been let in; leaves when it is dropped.
pub(super) struct Inside(Arc<Gate>);

impl Gate {
    pub fn new(most: usize) -> Arc<Gate> {
        Arc::new(Gate { free: Mutex::new(most), left: Condvar::new() })
    }

    /// Blocks while it is full.
    pub fn enter(self: &Arc<Self>) -> Inside {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = self.left.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Inside(self.clone())
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_asked_for_fits_and_few_threads_fill_whole_packs() {
        for level in 1..=19 {
            for asked in 0..=256 {
                let plan = WritePlan::new(asked, level);
                let packs = (OPEN_PACKS + FULL_PACKS) * (plan.pack_bytes + PACK_ROOM_BYTES);
                assert!(packs + plan.threads * thread_bytes(level) <= BUDGET_BYTES, "{asked} at {level}: {plan:?}");
                assert!(plan.pack_bytes >= LEAST_PACK_BYTES && plan.threads >= 1, "{asked} at {level}: {plan:?}");
                assert!(plan.threads == asked || !(1..=16).contains(&asked), "{asked} at {level}: {plan:?}");
            }
        }
        assert_eq!(WritePlan::new(4, 19), WritePlan { threads: 4, pack_bytes: PACK_TARGET_BYTES });
        assert_eq!(WritePlan::new(16, 3), WritePlan { threads: 16, pack_bytes: PACK_TARGET_BYTES });
        assert_eq!(WritePlan::new(256, 3).threads, 64);
    }
}
