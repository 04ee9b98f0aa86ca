//! Memory of segments and large pieces that were stored, for the next ones. The kernel clears fresh memory page by page: measured on
//! a server that keeps its CPUs busy, that was a fourth of all that streaming took.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

/// Kept at most, besides what is in use: one of any size, or several that are no larger together than this, which is one for a
/// segment of the usual size and one for a piece of it.
const KEPT_BYTES: usize = 20 << 20;

/// Smaller memory comes from what the allocator holds anyway, larger would be held for too few.
const LEAST_BYTES: usize = 1 << 20;
const MOST_BYTES: usize = 64 << 20;

/// What nobody has asked for in this time is given back: WAL comes slowly.
const UNUSED: Duration = Duration::from_secs(10);

/// Cheap to clone; all clones share.
#[derive(Clone, Default)]
pub struct Spare(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    /// The smallest first.
    buffers: Vec<Vec<u8>>,
    used_at: Option<Instant>,
}

impl Spare {
    /// Empty, and with room for so many bytes.
    pub fn take(&self, bytes: usize) -> Vec<u8> {
        let mut kept = self.kept();
        if (LEAST_BYTES..=MOST_BYTES).contains(&bytes) {
            kept.used_at = Some(Instant::now());
            let fits = kept.buffers.partition_point(|buffer| buffer.capacity() < bytes);
            if fits < kept.buffers.len() {
                return kept.buffers.remove(fits);
            }
        }
        drop(kept);
        Vec::with_capacity(bytes)
    }

    /// For the next. Of too many the smallest goes: what fits everything is asked for again.
    pub fn give(&self, mut buffer: Vec<u8>) {
        if !(LEAST_BYTES..=MOST_BYTES).contains(&buffer.capacity()) {
            return;
        }
        buffer.clear();
        let mut kept = self.kept();
        let place = kept.buffers.partition_point(|other| other.capacity() < buffer.capacity());
        kept.buffers.insert(place, buffer);
        while kept.buffers.len() > 1 && kept.buffers.iter().map(Vec::capacity).sum::<usize>() > KEPT_BYTES {
            kept.buffers.remove(0);
        }
    }

    /// A copy whose memory comes back once nobody has it any more.
    pub fn copy(&self, bytes: &[u8]) -> Bytes {
        if bytes.len() < LEAST_BYTES {
            return Bytes::copy_from_slice(bytes);
        }
        let mut buffer = self.take(bytes.len());
        buffer.extend_from_slice(bytes);
        Bytes::from_owner(Lent { buffer, home: self.clone() })
    }

    /// Gives back what is not used any more; whether there is nothing left.
    pub fn tidy(&self) -> bool {
        let mut kept = self.kept();
        if kept.used_at.is_none_or(|used_at| used_at.elapsed() >= UNUSED) {
            kept.buffers = Vec::new();
        }
        kept.buffers.is_empty()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing can panic while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Lent {
    buffer: Vec<u8>,
    home: Spare,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.home.give(mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_is_taken_again_and_never_more_is_kept_than_a_little() {
        let spare = Spare::default();
        let place = |bytes: &[u8]| bytes.as_ptr() as usize;
        let copy = spare.copy(&[7; LEAST_BYTES]);
        let (there, part) = (place(&copy), copy.slice(5..));
        assert_eq!(copy, vec![7; LEAST_BYTES]);
        drop(copy);
        assert!(spare.tidy(), "somebody still has a part of it");
        drop(part);
        assert!(!spare.tidy());
        let again = spare.take(LEAST_BYTES - 1);
        assert!(again.capacity() < LEAST_BYTES, "too small to be worth it");
        let again = spare.take(LEAST_BYTES);
        assert_eq!((place(&again), again.len()), (there, 0));
        let many = (0..30).map(|_| Vec::with_capacity(LEAST_BYTES));
        for buffer in many.chain([again, vec![0; 9], Vec::with_capacity(MOST_BYTES + 1)]) {
            spare.give(buffer);
        }
        assert_eq!(spare.kept().buffers.len(), KEPT_BYTES / LEAST_BYTES);
        let larger = spare.take(LEAST_BYTES + 1);
        assert!(larger.capacity() > LEAST_BYTES);
        assert_eq!(spare.kept().buffers.len(), KEPT_BYTES / LEAST_BYTES, "none of them fits");
        spare.give(Vec::with_capacity(2 * KEPT_BYTES));
        assert_eq!(spare.kept().buffers.len(), 1, "one of any size");
    }

    #[test]
    fn small_ones_do_not_take_the_place_of_a_large_one() {
        let spare = Spare::default();
        let segment = spare.take(16 * LEAST_BYTES);
        let there = segment.as_ptr() as usize;
        for bytes in [LEAST_BYTES, 3 * LEAST_BYTES, 2 * LEAST_BYTES] {
            spare.give(Vec::with_capacity(bytes));
        }
        spare.give(segment);
        assert_eq!(spare.take(2 * LEAST_BYTES).capacity(), 3 * LEAST_BYTES, "the smallest that fits");
        let again = spare.take(16 * LEAST_BYTES);
        assert_eq!(again.as_ptr() as usize, there);
    }
}
