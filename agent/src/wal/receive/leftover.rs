//! WAL that is read from `pg_wal` since it cannot be streamed: what a server that stopped left there, stored once each time and tried
//! again while the store does not take it; and what a primary writes that runs and from which nothing can be received.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::{ReceiveError, Receiver};
use crate::postgres::control::{ClusterState, ControlFile};
use crate::postgres::instance;
use crate::tasks::on_disk;
use crate::wal::fill::{self, Scope};
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

/// How long nothing can be received from a server that runs before its files are read.
pub const BESIDE_AFTER: Duration = Duration::from_secs(30);

impl Receiver {
    /// Whether what a server that runs writes is to be read from its files. Not where another server answers, or where the
    /// repository takes nothing anyway.
    pub(super) fn may_read_beside(&self, error: &ReceiveError) -> bool {
        let is_in_vain = error.is_of_the_store() || matches!(error, ReceiveError::OtherSystem { .. });
        let since = self.status().borrow().waiting_since;
        !is_in_vain && since.is_some_and(|since| since.elapsed() >= BESIDE_AFTER)
    }

    /// Of a primary that runs, what lies behind the newest archived segment.
    pub(super) async fn store_beside(&self) {
        let data_dir = self.instance.data_dir.clone();
        let looked = on_disk(move || {
            let runs = instance::inspect(&data_dir).is_ok_and(|found| found.runs());
            let control = ControlFile::read(&data_dir).ok().filter(|_| runs)?;
            // A standby's primary has an agent of its own.
            (control.state == ClusterState::InProduction).then_some(control.timeline)
        });
        let Some(timeline) = looked.await else { return };
        match fill::leftover(&self.shipper, timeline, Scope::Newest).await {
            Ok(Some(end)) => {
                tracing::info!(timeline = timeline.0, %end, "WAL that is not streamed is stored from pg_wal")
            }
            Ok(None) => {}
            Err(error) => {
                tracing::info!(timeline = timeline.0, "WAL that is not streamed is not stored from pg_wal: {error}");
            }
        }
    }

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
            match fill::leftover(&self.shipper, timeline, Scope::Everything).await {
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
