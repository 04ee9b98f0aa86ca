//! How much memory fetching takes, whatever the number of threads: ranges that are fetched and not opened yet, and what
//! threads open them into. On top come held pages ([`super::laid::HELD_BYTES`], for two windows), and a megabyte for each
//! thread that opens, each that writes, and each write that waits.

use super::{FetchOptions, RANGE_BYTES};

/// Fetched ranges that may wait for a thread.
pub(super) const FETCHED_WAITING: usize = 2;

/// Of ranges that are being fetched, wait or are being opened.
const RANGES_BYTES: u64 = 80 << 20;

/// More threads than this open content faster (3 GB/s each) than any disk or network takes or brings it.
const MOST_THREADS: usize = 16;

/// What fits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FetchPlan {
    pub threads: usize,
    /// Stored bytes of one range at most.
    pub range_bytes: u64,
}

impl FetchPlan {
    pub fn new(options: FetchOptions) -> FetchPlan {
        let threads = options.threads.clamp(1, MOST_THREADS);
        let ranges = options.requests.max(1) + FETCHED_WAITING + threads;
        FetchPlan { threads, range_bytes: (RANGES_BYTES / ranges as u64).min(RANGE_BYTES) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_fit_whatever_is_asked_for_and_few_threads_have_large_ones() {
        for threads in 0..=256 {
            let FetchPlan { threads: of, range_bytes } = FetchPlan::new(FetchOptions { requests: 4, threads });
            assert!((4 + 2 + of as u64) * range_bytes <= RANGES_BYTES, "{threads}");
            assert!(range_bytes >= 3 << 20 && (of == threads || !(1..=16).contains(&threads)), "{threads}");
            assert!(range_bytes == RANGE_BYTES || threads > 4, "{threads}");
        }
    }
}
