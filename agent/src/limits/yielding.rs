//! Takes CPU away from bulk work while Postgres's processes queue for it, and gives it back when they do not.
//!
//! A low priority alone does not do it. Between control groups, and between sessions where the kernel groups them
//! (sched(7), "autogroup"), nice counts for nothing, and server and agent are never in one session. What always tells is
//! how long the server's processes were ready to run and did not (proc_pid_schedstat(5): nanoseconds on a CPU, and waiting
//! for one).

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::HostLimits;

/// Between two looks: many time slices long, and still shorter than what a person notices.
const TICK: Duration = Duration::from_millis(100);

/// Processes looked at, of each server: reading one's figures takes some 10 µs.
const PROCESSES: usize = 64;

/// Of the time that the server wants a CPU, what it may wait for one: chosen; what it costs and spares is measured
/// (`backup.busy` in docs/performance.md).
const TOLERATED: f64 = 0.2;

/// Of one CPU: a server that runs for less than this has nothing to do, and its waits say nothing. Its background processes
/// wake now and then even when it is idle, and then wait a slice for a CPU: measured, a full backup of an idle server took
/// half as long again while that counted.
const QUIET: f64 = 0.05;

/// Of all cores: what is never taken away. A server that is always busy, or waits for others than us, must have its backup all
/// the same, and in a time that can be foreseen.
const LEAST: f64 = 0.2;
/// A server that waits gets room within half a second; one that does not costs bulk work at most two and a half.
const SHRINK: f64 = 0.6;
const GROW: f64 = 0.04;

/// The share of the cores that bulk work may have after a look that found this.
fn next_share(share: f64, waited: f64) -> f64 {
    let next = if waited > TOLERATED { share * SHRINK } else { share + GROW };
    next.clamp(LEAST, 1.0)
}

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

/// Of the time that processes which are in both wanted a CPU, the part that they waited; 0 if they hardly wanted one.
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

/// Of the servers' processes; empty where nothing runs, or the kernel does not say.
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

/// Watches the servers in these directories for as long as it is polled. To be run at normal priority, once for each job:
/// several watch alike, and what one of them finds holds for all.
pub async fn keep_yielding(limits: Arc<HostLimits>, data_dirs: Vec<PathBuf>) -> Infallible {
    let data_dirs = Arc::new(data_dirs);
    let mut before = (HashMap::new(), std::time::Instant::now());
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let asked = Arc::clone(&data_dirs);
        let now = tokio::task::spawn_blocking(move || look(&asked)).await.unwrap_or_default();
        let waited = waited(&before.0, &now, before.1.elapsed());
        before = (now, std::time::Instant::now());
        limits.share_cpu(|share| next_share(share, waited));
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
    fn a_waiting_server_gets_room_within_half_a_second_and_bulk_work_never_stops() {
        let mut share = 1.0;
        for _ in 0..5 {
            share = next_share(share, 0.5);
        }
        assert!(share < 0.25, "{share}");
        for _ in 0..100 {
            share = next_share(share, 1.0);
        }
        assert_eq!(share, LEAST);
        for _ in 0..25 {
            share = next_share(share, 0.0);
        }
        assert_eq!(share, 1.0);
    }

    #[test]
    fn the_kernels_figures_read() {
        assert_eq!(Spent::parse("123 456 7\n"), Some(Spent { running: 123, waiting: 456 }));
        assert_eq!((Spent::parse(""), Spent::parse("1"), Spent::parse("a b c")), (None, None, None));
    }
}
