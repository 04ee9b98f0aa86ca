//! What a server that stopped left in `pg_wal`: stored once each time, and tried again while the store does not take it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::Receiver;
use crate::postgres::instance;
use crate::tasks::on_disk;
use crate::wal::fill;
use crate::wal::ship::ShipError;

/// Between two looks whether a server that had stopped runs again, while what it left is stored.
const RUNS_AGAIN: Duration = Duration::from_secs(1);

/// Between two tries, each of which lists the archive: doubled up to the longest.
const AGAIN: Duration = Duration::from_secs(1);
const LONGEST_AGAIN: Duration = Duration::from_secs(60);

/// Of one time that the server was found stopped.
#[derive(Default)]
pub struct Leftover {
    is_stored: bool,
    failed: Option<(Instant, Duration)>,
}

impl Leftover {
    pub fn is_due(&self, now: Instant) -> bool {
        !self.is_stored && self.failed.is_none_or(|(at, pause)| now.duration_since(at) >= pause)
    }

    pub fn tried(&mut self, is_stored: bool, now: Instant) {
        let pause = self.failed.map_or(AGAIN, |(_, pause)| (2 * pause).min(LONGEST_AGAIN));
        *self = Leftover { is_stored, failed: Some((now, pause)) };
    }
}

impl Receiver {
    /// Returns once the server runs.
    pub(super) async fn runs_again(&self) {
        loop {
            tokio::time::sleep(RUNS_AGAIN).await;
            let data_dir = self.instance.data_dir.clone();
            let runs = on_disk(move || instance::inspect(&data_dir).is_ok_and(|found| found.runs())).await;
            if runs {
                return;
            }
        }
    }

    /// Of a server that does not run, what it left in `pg_wal`. Whether that is done.
    pub(super) async fn store_leftover(&self) -> bool {
        let (data_dir, size) = (self.instance.data_dir.clone(), self.shipper.source().segment_size);
        let looked = tokio::task::spawn_blocking(move || {
            let stopped = instance::inspect(&data_dir).is_ok_and(|found| !found.runs());
            if stopped { fill::timelines(&data_dir, size) } else { BTreeSet::new() }
        });
        let timelines = looked.await.unwrap_or_default();
        let mut is_stored = !timelines.is_empty();
        // The newest hangs on the ones before.
        for timeline in timelines {
            match fill::leftover(&self.shipper, timeline).await {
                Ok(Some(end)) => {
                    tracing::info!(timeline = timeline.0, %end, "what a stopped server had left in pg_wal is stored");
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::info!(
                        timeline = timeline.0,
                        "what a stopped server has left in pg_wal is not stored: {error}"
                    );
                    // Without its history nobody will know where it belongs.
                    is_stored &= matches!(*error, ShipError::NoHistory(_));
                }
            }
        }
        is_stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_stored_is_tried_again_ever_more_seldom_and_what_is_stored_never() {
        let (mut leftover, begun, mut tries) = (Leftover::default(), Instant::now(), 0);
        let after = |seconds| begun + Duration::from_secs(seconds);
        for second in 0..3600 {
            if leftover.is_due(after(second)) {
                leftover.tried(false, after(second));
                tries += 1;
            }
        }
        assert!((60..70).contains(&tries), "{tries} in an hour");
        leftover.tried(true, after(3600));
        assert!(!leftover.is_due(after(36_000)));
    }
}
