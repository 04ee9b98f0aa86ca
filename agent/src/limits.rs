//! What bulk work (backups, restores, verifications) may take of this host, all of its jobs together, and how it makes way
//! for Postgres. WAL is none of it: it never waits here.
//!
//! [`HostLimits`] holds one [`Bucket`] for each quantity; whoever is about to read, write, send or fetch asks the job's
//! [`Allowance`], which waits. [`threads`] runs the work at a low priority, and [`yielding`] takes CPU away from it while
//! Postgres's processes have to queue. Nothing here knows what the work is.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use walfleet_repository::limits::LimitsSpec;
use walfleet_repository::store::{Pace, Stopped};

mod bucket;
pub mod queueing;
pub mod threads;
pub mod yielding;

use bucket::Bucket;

/// The longest nap: a limit that is lifted, and a job that is cancelled, are noticed this soon.
const NAP: Duration = Duration::from_millis(50);

/// That this process may run on: what a share of the CPU is a share of.
fn cores() -> u64 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64)
}

/// The limits of a host, shared by all that it does. Changing them takes effect on work under way.
pub struct HostLimits {
    spec: Mutex<LimitsSpec>,
    /// Of all cores, what Postgres leaves: 1 is all of them, and no limit.
    share: Mutex<f64>,
    /// In nanoseconds of work.
    cpu: Mutex<Bucket>,
    read: Mutex<Bucket>,
    write: Mutex<Bucket>,
    upload: Mutex<Bucket>,
    download: Mutex<Bucket>,
    /// Counts changes: what a thread did before the last one is not held against it.
    changes: AtomicU64,
}

impl HostLimits {
    pub fn new(spec: LimitsSpec) -> Arc<HostLimits> {
        let bucket = || Mutex::new(Bucket::new(Instant::now()));
        let limits = HostLimits {
            spec: Mutex::new(LimitsSpec::NONE),
            share: Mutex::new(1.0),
            cpu: bucket(),
            read: bucket(),
            write: bucket(),
            upload: bucket(),
            download: bucket(),
            changes: AtomicU64::new(0),
        };
        limits.set(spec);
        Arc::new(limits)
    }

    /// Makes these the host's limits from now on.
    pub fn set(&self, spec: LimitsSpec) {
        let mut current = lock(&self.spec);
        if *current == spec {
            return;
        }
        tracing::info!(?spec, "limits of backups, restores and verifications");
        *current = spec;
        self.changes.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        self.set_cpu(spec, *lock(&self.share), now);
        let rates = [
            (&self.read, spec.read),
            (&self.write, spec.write),
            (&self.upload, spec.upload),
            (&self.download, spec.download),
        ];
        for (bucket, rate) in rates {
            lock(bucket).set_rate(rate.map(walfleet_repository::limits::ByteRate::bytes_per_second), now);
        }
    }

    /// Changes what Postgres leaves.
    fn share_cpu(&self, next: impl FnOnce(f64) -> f64) {
        let spec = *lock(&self.spec);
        let mut share = lock(&self.share);
        *share = next(*share);
        self.set_cpu(spec, *share, Instant::now());
    }

    fn set_cpu(&self, spec: LimitsSpec, left: f64, now: Instant) {
        let granted = spec.cpu.map_or(1.0, |share| f64::from(share.percent()) / 100.0).min(left);
        let rate = (granted < 1.0).then(|| (granted * cores() as f64 * 1e9) as u64);
        lock(&self.cpu).set_rate(rate, now);
    }

    pub fn spec(&self) -> LimitsSpec {
        *lock(&self.spec)
    }

    /// What one job may take, until it is cancelled.
    pub fn allowance(self: &Arc<Self>, cancel: &CancellationToken) -> Allowance {
        Allowance { limits: Arc::clone(self), cancel: cancel.clone() }
    }

    /// Counts what was sent without waiting: bulk work then gets so much less.
    pub fn note_upload(&self, bytes: u64) {
        lock(&self.upload).charge(bytes, Instant::now());
    }

    /// Counts what the calling thread has worked since it was asked last.
    fn note_work(&self) {
        thread_local! {
            /// The thread's CPU clock when last seen, in nanoseconds, and at which change of the limits.
            static SEEN: Cell<(u64, u64)> = const { Cell::new((0, u64::MAX)) };
        }
        let changes = self.changes.load(Ordering::Relaxed);
        let clock = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        let clock = clock.tv_sec.cast_unsigned() * 1_000_000_000 + clock.tv_nsec.cast_unsigned();
        let (before, changes_before) = SEEN.replace((clock, changes));
        if changes == changes_before {
            lock(&self.cpu).charge(clock.saturating_sub(before), Instant::now());
        }
    }
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    // A bucket is consistent at every moment.
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One job's way to the host's limits. Once the job is cancelled nothing waits any more.
#[derive(Clone)]
pub struct Allowance {
    limits: Arc<HostLimits>,
    cancel: CancellationToken,
}

impl Allowance {
    /// For work that nobody limits.
    pub fn unlimited() -> Allowance {
        HostLimits::new(LimitsSpec::NONE).allowance(&CancellationToken::new())
    }

    /// The same, until this is cancelled.
    pub fn until(&self, cancel: &CancellationToken) -> Allowance {
        self.limits.allowance(cancel)
    }

    /// Blocks until so many bytes of a data directory may be read, and the thread may work on.
    pub fn read(&self, bytes: u64) {
        self.work();
        self.wait(&self.limits.read, bytes);
    }

    /// Blocks until so many bytes may be written into a directory that is restored, and the thread may work on.
    pub fn write(&self, bytes: u64) {
        self.work();
        self.wait(&self.limits.write, bytes);
    }

    /// Counts what this thread has worked since the last time, and blocks while that is too much.
    pub fn work(&self) {
        self.limits.note_work();
        self.wait(&self.limits.cpu, 0);
    }

    fn wait(&self, bucket: &Mutex<Bucket>, amount: u64) {
        while let Some(nap) = self.nap(bucket, amount) {
            std::thread::sleep(nap);
        }
    }

    /// Takes the amount, or says how long to sleep before asking again.
    fn nap(&self, bucket: &Mutex<Bucket>, amount: u64) -> Option<Duration> {
        if self.cancel.is_cancelled() {
            return None;
        }
        lock(bucket).take(amount, Instant::now()).err().map(|wait| wait.min(NAP))
    }
}

impl Pace for Allowance {
    fn upload(&self, bytes: u64) -> BoxFuture<'_, Result<(), Stopped>> {
        async move {
            while let Some(nap) = self.nap(&self.limits.upload, bytes) {
                tokio::time::sleep(nap).await;
            }
            if self.cancel.is_cancelled() { Err(Stopped) } else { Ok(()) }
        }
        .boxed()
    }

    fn download(&self, bytes: u64) -> BoxFuture<'_, ()> {
        async move {
            while let Some(nap) = self.nap(&self.limits.download, bytes) {
                tokio::time::sleep(nap).await;
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests;
