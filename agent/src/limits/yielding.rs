//! Takes CPU away from bulk work while Postgres's processes queue for it, and gives it back when they do not.
//!
//! A low priority alone does not do it. Between control groups, and between sessions where the kernel groups them
//! (sched(7), "autogroup"), nice counts for nothing, and server and agent are never in one session.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::HostLimits;
use super::queueing::{Look, TOLERATED};

/// Between two looks: many time slices long, and still shorter than what a person notices.
const TICK: Duration = Duration::from_millis(100);

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

/// Watches the servers in these directories for as long as it is polled. To be run at normal priority, once for each job:
/// several watch alike, and what one of them finds holds for all.
pub async fn keep_yielding(limits: Arc<HostLimits>, data_dirs: Vec<PathBuf>) -> Infallible {
    let data_dirs = Arc::new(data_dirs);
    let mut before = Look::default();
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let asked = Arc::clone(&data_dirs);
        let now = tokio::task::spawn_blocking(move || Look::at(&asked)).await.unwrap_or_default();
        let waited = now.waited_since(&before);
        before = now;
        limits.share_cpu(|share| next_share(share, waited));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
