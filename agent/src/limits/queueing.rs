//! How long Postgres's processes queue for a CPU: how long they were ready to run and did not (proc_pid_schedstat(5):
//! nanoseconds on a CPU, and waiting for one). That tells, whatever the priorities and whoever else is on the host.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Processes looked at, of each server: reading one's figures takes some 10 µs.
const PROCESSES: usize = 64;

/// Of the time that the server wants a CPU, what it may wait for one: chosen; what it costs and spares is measured
/// (`backup.busy` and `wal.pgbench` in docs/performance.md).
pub(super) const TOLERATED: f64 = 0.2;

/// Of one CPU: a server that runs for less than this has nothing to do, and its waits say nothing. Its background processes
/// wake now and then even when it is idle, and then wait a slice for a CPU: measured, a full backup of an idle server took
/// half as long again while that counted.
const QUIET: f64 = 0.05;

/// Between two looks of whoever asks now and then, and for how long one holds.
const OFTEN: Duration = Duration::from_secs(1);
const STALE: Duration = Duration::from_secs(10);

/// Nanoseconds that a process has run, and has waited to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Spent {
    running: u64,
    waiting: u64,
}

impl Spent {
    fn parse(schedstat: &str) -> Option<Spent> {
        let mut fields = schedstat.split_ascii_whitespace().map(str::parse);
        Some(Spent { running: fields.next()?.ok()?, waiting: fields.next()?.ok()? })
    }
}

/// What the servers' processes had spent at a time.
#[derive(Clone, Debug)]
pub(super) struct Look {
    spent: HashMap<u32, Spent>,
    at: Instant,
}

impl Default for Look {
    fn default() -> Look {
        Look { spent: HashMap::new(), at: Instant::now() }
    }
}

impl Look {
    /// Blocking, some files of procfs. Empty where nothing runs, or the kernel does not say.
    pub fn at(data_dirs: &[PathBuf]) -> Look {
        Look { spent: look(data_dirs), at: Instant::now() }
    }

    /// Of the time that processes which are in both wanted a CPU, the part that they waited; 0 if they hardly wanted one.
    pub fn waited_since(&self, before: &Look) -> f64 {
        waited(&before.spent, &self.spent, self.at.duration_since(before.at))
    }
}

fn waited(before: &HashMap<u32, Spent>, now: &HashMap<u32, Spent>, passed: Duration) -> f64 {
    let (mut running, mut waiting) = (0, 0);
    for (pid, now) in now {
        let Some(before) = before.get(pid) else { continue };
        running += now.running.saturating_sub(before.running);
        waiting += now.waiting.saturating_sub(before.waiting);
    }
    let wanted = running + waiting;
    if (running as f64) < QUIET * passed.as_nanos() as f64 { 0.0 } else { waiting as f64 / wanted as f64 }
}

fn look(data_dirs: &[PathBuf]) -> HashMap<u32, Spent> {
    let processes = data_dirs.iter().filter_map(|data_dir| postmaster(data_dir)).flat_map(|postmaster| {
        let children = std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"));
        let children: Vec<u32> =
            children.unwrap_or_default().split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect();
        // The newest last: those that have work now.
        children.into_iter().rev().take(PROCESSES)
    });
    let spent = |pid| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
        Some((pid, Spent::parse(&text)?))
    };
    processes.filter_map(spent).collect()
}

/// The first line of postmaster.pid (src/include/utils/pidfile.h).
fn postmaster(data_dir: &Path) -> Option<u32> {
    std::fs::read_to_string(data_dir.join("postmaster.pid")).ok()?.lines().next()?.trim().parse().ok()
}

/// Whether a server's processes queue, for somebody who asks now and then and must not wait for the answer.
pub struct Queueing {
    data_dirs: Vec<PathBuf>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    last: Look,
    waited: f64,
    is_looking: bool,
}

impl Queueing {
    pub fn of(data_dir: &Path) -> Arc<Queueing> {
        Arc::new(Queueing { data_dirs: vec![data_dir.to_owned()], seen: Mutex::default() })
    }

    /// As of the last look. Where that is a second ago, another one is made aside. To be called on a runtime.
    pub fn is_long(self: &Arc<Self>) -> bool {
        let mut seen = self.seen();
        let age = seen.last.at.elapsed();
        if age >= OFTEN && !std::mem::replace(&mut seen.is_looking, true) {
            let queueing = Arc::clone(self);
            tokio::task::spawn_blocking(move || queueing.look_again());
        }
        age < STALE && seen.waited > TOLERATED
    }

    fn look_again(&self) {
        let now = Look::at(&self.data_dirs);
        let mut seen = self.seen();
        seen.waited = now.waited_since(&seen.last);
        (seen.last, seen.is_looking) = (now, false);
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        // Nothing can panic while it is held.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn spent(processes: &[(u32, u64, u64)]) -> HashMap<u32, Spent> {
        processes.iter().map(|(pid, running, waiting)| (*pid, Spent { running: *running, waiting: *waiting })).collect()
    }

    #[test]
    fn only_processes_that_were_there_before_count_and_idle_servers_want_nothing() {
        let passed = Duration::from_secs(1);
        let before = spent(&[(1, 5 * SECOND, SECOND), (2, 0, 0), (3, SECOND, 9 * SECOND)]);
        let now = spent(&[(1, 5 * SECOND + SECOND / 4, SECOND + SECOND / 4), (2, SECOND / 2, 0), (4, 0, 100 * SECOND)]);
        assert!((waited(&before, &now, passed) - 0.25).abs() < 1e-9);
        let idle = spent(&[(1, 5 * SECOND + 1000, SECOND + SECOND / 2)]);
        assert_eq!(waited(&before, &idle, passed), 0.0);
        assert_eq!(waited(&HashMap::new(), &now, passed), 0.0);
    }

    #[test]
    fn the_kernels_figures_read() {
        assert_eq!(Spent::parse("123 456 7\n"), Some(Spent { running: 123, waiting: 456 }));
        assert_eq!((Spent::parse(""), Spent::parse("1"), Spent::parse("a b c")), (None, None, None));
    }
}
