//! What was read of objects that never change, kept for whoever looks at the same archive again and again.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use object_store::path::Path;

use super::{ArchiveError, WalArchive};
use crate::format::wal_history::StoredHistory;
use crate::layout;
use crate::postgres::{Segment, SegmentSize, WalBranch};
use crate::recovery_window::SegmentFacts;
use crate::wal_catalog;

/// Of either kind; beyond, all are forgotten and read once more.
const KEPT: usize = 4096;

#[derive(Default)]
pub(super) struct Known {
    facts: Mutex<HashMap<Path, SegmentFacts>>,
    histories: Mutex<HashMap<Path, StoredHistory>>,
}

fn recall<T: Clone>(known: &Mutex<HashMap<Path, T>>, key: &Path) -> Option<T> {
    known.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
}

fn keep<T: Clone>(known: &Mutex<HashMap<Path, T>>, key: Path, value: &T) {
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    if known.len() >= KEPT {
        known.clear();
    }
    known.insert(key, value.clone());
}

impl WalArchive {
    /// What a listed segment's directory tells. Costs a request the first time.
    pub async fn known_facts(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<SegmentFacts, ArchiveError> {
        let key = layout::wal_segment(&self.cluster, &wal, segment, size);
        if let Some(facts) = recall(&self.known.facts, &key) {
            return Ok(facts);
        }
        let facts = wal_catalog::facts_of(&self.directory(wal, segment, size).await?);
        keep(&self.known.facts, key, &facts);
        Ok(facts)
    }

    /// As [`WalArchive::stored_history`]. Costs a request until there is one.
    pub async fn known_history(&self, wal: WalBranch) -> Result<Option<StoredHistory>, ArchiveError> {
        let key = layout::wal_history(&self.cluster, &wal);
        if let Some(history) = recall(&self.known.histories, &key) {
            return Ok(Some(history));
        }
        let history = self.stored_history(wal).await?;
        history.iter().for_each(|history| keep(&self.known.histories, key.clone(), history));
        Ok(history)
    }
}
