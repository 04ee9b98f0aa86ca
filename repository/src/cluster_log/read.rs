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

impl ClusterLog {
    /// An idle log costs one request; catching up doubles the window while entries are found.
    pub(super) async fn read_on(&mut self) -> Result<(), LogError> {
        let idle = self.confirmed_end == Some(self.state.next());
        let mut window = if idle { 1 } else { 2 };
        loop {
            let first = self.state.next();
            let objects = self.read_window(first, window).await?;
            for (sequence, object) in (first..).zip(&objects) {
                self.fold(sequence, object)?;
            }
            let still_idle = objects.is_empty() && self.confirmed_end == Some(first);
            if still_idle || (objects.len() as u64) < window && self.ends_here().await? {
                self.confirmed_end = Some(self.state.next());
                return Ok(());
            }
            window = (window * 2).min(READ_AHEAD);
        }
    }

    /// Whether the log ends where we stand, given that the next number was seen missing.
    ///
    /// Should the number after it be there, the next one was created after we looked; if it is still not there, an entry
    /// was lost, and to stop here would be to hide what follows, to append here would be to write another history.
    pub(super) async fn ends_here(&self) -> Result<bool, LogError> {
        let missing = self.state.next();
        let present = missing.saturating_add(1);
        if self.read_entry(present).await?.is_none() {
            return Ok(true);
        }
        if self.read_entry(missing).await?.is_none() {
            return Err(LogError::Hole { cluster: self.cluster.clone(), missing, present });
        }
        Ok(false)
    }

    /// The entries from `first` on, up to the first missing one or the end of the window.
    async fn read_window(&self, first: u64, count: u64) -> Result<Vec<Bytes>, LogError> {
        let sequences: Vec<u64> = (first..first.saturating_add(count)).collect();
        let read = join_all(sequences.iter().map(|sequence| self.read_entry(*sequence))).await;
        let read: Vec<Option<Bytes>> = read.into_iter().collect::<Result<_, _>>()?;
        Ok(read.into_iter().map_while(|object| object).collect())
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
