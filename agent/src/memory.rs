//! How the allocator treats large buffers: the one place with unsafe code, a call of the C library.
//!
//! Packs, ranges and segments are buffers of 1 to 33 MiB that live for a moment, on any thread. glibc maps the first of
//! them and gives it back, but then raises its threshold (up to 32 MiB, mallopt(3)) and takes the following ones from
//! arenas, one for each thread or so, which keep what was freed. Measured with 500,000 relations: a restore's peak was
//! 305 MiB, and 123 MiB with a threshold that stays.

/// Buffers from this size on are mapped, and given back to the system once they are dropped. A fault for each page
/// costs less than a tenth of what decompressing or encrypting it does.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_FROM_BYTES: libc::c_int = 1 << 20;

/// To be called once, before other threads are started. Elsewhere than with glibc it does nothing.
pub fn give_back_large_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code, reason = "the C library's allocator has no safe interface")]
    // SAFETY: mallopt takes two integers and refuses what it does not know; it touches nothing of ours.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES);
    }
}
