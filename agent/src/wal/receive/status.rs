//! What streaming is doing, for facts and metrics, and for those who ship the same server's WAL another way.

use std::time::Instant;

use jiff::Timestamp;
use walfleet_repository::postgres::{Lsn, Segment, SegmentSize, Timeline};

use super::SpoolStatus;

/// What streaming is doing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum StreamPhase {
    /// Not asked for, or not begun.
    #[default]
    Off,
    Streaming,
    /// A standby: its primary's agent streams, and the archive is watched.
    Following,
    /// Why not; it is tried again.
    Waiting(String),
}

impl StreamPhase {
    /// Whether WAL gets where it belongs by it.
    pub fn is_well(&self) -> bool {
        matches!(self, StreamPhase::Streaming | StreamPhase::Following)
    }

    pub fn word(&self) -> &'static str {
        match self {
            StreamPhase::Off => "off",
            StreamPhase::Streaming => "streaming",
            StreamPhase::Following => "following",
            StreamPhase::Waiting(_) => "waiting",
        }
    }

    pub fn problem(&self) -> Option<&str> {
        match self {
            StreamPhase::Waiting(problem) => Some(problem),
            _ => None,
        }
    }
}

/// What has been received and stored, for facts and metrics.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StreamStatus {
    pub phase: StreamPhase,
    /// Since when it waits, if it does.
    pub waiting_since: Option<Instant>,
    pub timeline: Option<Timeline>,
    /// From here on everything up to the next two was received by this process.
    pub from: Lsn,
    /// The repository has everything before it in whole segments.
    pub sealed: Lsn,
    /// The repository has everything before it.
    pub durable: Lsn,
    pub received: Lsn,
    /// The end of the server's WAL, as it said last.
    pub server_end: Lsn,
    pub durable_at: Option<Timestamp>,
    /// By the server's clock: everything committed before is durable.
    pub complete_until: Option<Timestamp>,
    pub pieces: u64,
    pub segments: u64,
    pub already_there: u64,
    pub stored_bytes: u64,
    pub failures: u64,
    /// Of the store, while it fails.
    pub last_error: Option<String>,
    /// While commits may wait for spools.
    pub spool: Option<SpoolStatus>,
}

impl StreamStatus {
    pub fn is_streaming(&self) -> bool {
        self.phase == StreamPhase::Streaming
    }

    /// Whether it has brought this segment of the same server, or found it in the archive with the content that lies here. A
    /// standby that only follows has not compared everything.
    pub fn has_brought(&self, segment: Segment, size: SegmentSize) -> bool {
        let within = self.from <= segment.start(size) && segment.end(size) <= self.sealed;
        self.timeline == Some(segment.timeline) && within && self.phase != StreamPhase::Following
    }

    /// On a standby whose WAL others store: how much of what was there at the last look the archive lacked.
    pub fn lacking(&self) -> Option<u64> {
        (self.phase == StreamPhase::Following).then(|| self.received.0.saturating_sub(self.durable.0))
    }

    /// Nothing is received, and this is why.
    pub fn wait(&mut self, problem: String) {
        if !matches!(self.phase, StreamPhase::Waiting(_)) {
            self.waiting_since = Some(Instant::now());
        }
        self.phase = StreamPhase::Waiting(problem);
        self.spool = None;
    }

    /// A connection begins to receive from `at` on; what the archive has from `seen` on was found to be this server's. What a
    /// connection before brought counts on if nothing lies between.
    pub(super) fn begin(&mut self, timeline: Timeline, seen: Lsn, at: Lsn) {
        let goes_on = self.timeline == Some(timeline) && self.from <= seen && seen <= self.sealed;
        if !goes_on {
            self.from = seen;
        }
        if self.timeline != Some(timeline) {
            // It was of another timeline's WAL.
            self.complete_until = None;
        }
        self.timeline = Some(timeline);
        // What failed to be stored is on its way anew, or nobody's here any more.
        self.last_error = None;
        (self.sealed, self.durable, self.received) = (at, at, at);
    }

    /// Whether another member is looked to for this segment.
    pub fn follows(&self, segment: Segment) -> bool {
        self.phase == StreamPhase::Following && self.timeline == Some(segment.timeline)
    }

    /// Whether it has brought, or will bring, this segment of the same server.
    pub fn covers(&self, segment: Segment, size: SegmentSize) -> bool {
        self.timeline == Some(segment.timeline) && self.from <= segment.start(size) && self.is_streaming()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_connection_before_brought_counts_on_if_nothing_is_between() {
        let mut status = StreamStatus { phase: StreamPhase::Streaming, ..StreamStatus::default() };
        let size = SegmentSize::new(1 << 20).unwrap();
        let lsn = |segment: u64| Lsn(segment << 20);
        let covers = |status: &StreamStatus, number| status.covers(Segment { timeline: Timeline(1), number }, size);
        status.begin(Timeline(1), lsn(4), lsn(6));
        assert!(covers(&status, 4), "found in the archive with this server's content");
        status.sealed = lsn(9);
        status.begin(Timeline(1), lsn(9), lsn(11));
        assert_eq!((covers(&status, 3), covers(&status, 4), covers(&status, 10)), (false, true, true));
        status.phase = StreamPhase::Waiting("it is away".into());
        let brought = |number| status.has_brought(Segment { timeline: Timeline(1), number }, size);
        assert_eq!((brought(3), brought(4), brought(10), brought(11)), (false, true, true, false));
        status.phase = StreamPhase::Streaming;
        status.begin(Timeline(1), lsn(20), lsn(20));
        assert_eq!((covers(&status, 10), covers(&status, 20)), (false, true));
        status.complete_until = Some(Timestamp::UNIX_EPOCH);
        status.begin(Timeline(1), lsn(20), lsn(20));
        assert!(status.complete_until.is_some(), "of the same WAL");
        status.begin(Timeline(2), lsn(20), lsn(20));
        assert!(!covers(&status, 20), "of another timeline");
        assert_eq!(status.complete_until, None, "what the other server's clock said");
    }
}
