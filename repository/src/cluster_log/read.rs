//! Reading on: from where the handle stands to the first missing number.

use bytes::Bytes;
use futures::future::join_all;

use super::{ClusterLog, LogError, Verdict};
use crate::format::log_entry::{self, Opened};
use crate::layout;
use crate::store::StoreError;

/// Entries asked for at once while catching up. Each is below a kilobyte, so it is latency that counts: at 20 ms a request
/// a log of ten thousand entries is read in about ten seconds. A checkpoint will save most of that.
const READ_AHEAD: u64 = 16;

/// Entries in order, and whether the log ends after them.
struct Window {
    objects: Vec<Bytes>,
    at_end: bool,
}

impl ClusterLog {
    /// An idle log costs one request: the window begins at one entry and doubles while entries are found.
    pub(super) async fn read_on(&mut self) -> Result<(), LogError> {
        let mut window = 1;
        loop {
            let first = self.state.next();
            let read = self.read_window(first, window).await?;
            for (sequence, object) in (first..).zip(&read.objects) {
                self.fold(sequence, object)?;
            }
            if read.at_end {
                return Ok(());
            }
            window = (window * 2).min(READ_AHEAD);
        }
    }

    /// The entries from `first` on, up to the first missing one.
    async fn read_window(&self, first: u64, count: u64) -> Result<Window, LogError> {
        let sequences: Vec<u64> = (first..first.saturating_add(count)).collect();
        let read = join_all(sequences.iter().map(|sequence| self.read_entry(*sequence))).await;
        let read: Vec<Option<Bytes>> = read.into_iter().collect::<Result<_, _>>()?;
        let found = read.iter().take_while(|object| object.is_some()).count();
        let behind = (first..).zip(&read).skip(found).find(|(_, object)| object.is_some());
        if let Some((present, _)) = behind {
            // The requests ran side by side, so the earlier number may have been created after we looked. If it is still
            // not there, an entry was lost, and to append in its place would be to write another history.
            let missing = first + found as u64;
            if self.read_entry(missing).await?.is_none() {
                return Err(LogError::Hole { cluster: self.cluster.clone(), missing, present });
            }
        }
        let at_end = found < sequences.len() && behind.is_none();
        Ok(Window { objects: read.into_iter().map_while(|object| object).collect(), at_end })
    }

    async fn read_entry(&self, sequence: u64) -> Result<Option<Bytes>, LogError> {
        match self.store.get(&layout::log_entry(&self.cluster, sequence)).await {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(source) => Err(self.store_error(source)),
        }
    }

    fn fold(&mut self, sequence: u64, object: &[u8]) -> Result<(), LogError> {
        let opened = log_entry::open(&self.trust, &self.cluster, sequence, object)
            .map_err(|source| LogError::Unreadable { cluster: self.cluster.clone(), sequence, source })?;
        match opened {
            Opened::Entry { entry, writer } => {
                if let Verdict::Void(void) = self.state.apply(&entry, &writer) {
                    let (cluster, writer) = (&self.cluster, writer.name());
                    tracing::warn!(%cluster, sequence, writer, reason = %void, "log entry does not count");
                }
            }
            Opened::Void { reason } => {
                tracing::warn!(cluster = %self.cluster, sequence, reason, "log entry is nobody's");
                self.state.pass_over();
            }
        }
        Ok(())
    }

    pub(super) fn store_error(&self, source: StoreError) -> LogError {
        LogError::Store { cluster: self.cluster.clone(), source }
    }
}
