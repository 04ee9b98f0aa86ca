//! What is known of a server beside what lies in the repository: that up to a moment it wrote no more than that.

use super::WalCatalog;
use crate::postgres::{Lsn, SystemId, Timeline, WalBranch};

/// A page header, the most that a server's end of WAL may lie behind its last record (XLogLongPageHeaderData,
/// src/include/access/xlog_internal.h).
const PAGE_HEADER_BYTES: u64 = 40;

/// What a server was seen to have, and the repository with it. An idle server writes nothing that could say it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KnownComplete {
    pub system_id: SystemId,
    pub timeline: Timeline,
    /// The end of its WAL.
    pub lsn: Lsn,
    /// All that it committed before lies before `lsn`. Its own clock, microseconds since the Unix epoch.
    pub at_us: i64,
}

impl WalCatalog {
    /// Takes it in where the catalog itself reaches as far. Of a timeline with several branches it does not say which is
    /// meant, and nothing is taken in.
    pub fn note_complete(&mut self, known: &KnownComplete) {
        let meant = |wal: &&WalBranch| (wal.system_id, wal.timeline) == (known.system_id, known.timeline);
        let mut of_timeline = self.branches.keys().filter(meant);
        let (Some(wal), None) = (of_timeline.next().copied(), of_timeline.next()) else { return };
        let Some(branch) = self.branches.get_mut(&wal) else { return };
        let size = branch.segment_size;
        if let Some((number, last)) = branch.segments.iter_mut().next_back() {
            let whole = Lsn(number.saturating_add(1).saturating_mul(u64::from(size.bytes())));
            let end = last.records_end.filter(|_| last.is_begun).unwrap_or(whole);
            if known.lsn.0 <= end.0.saturating_add(PAGE_HEADER_BYTES) {
                last.complete_at_us = last.complete_at_us.max(Some(known.at_us));
            }
        }
    }
}
