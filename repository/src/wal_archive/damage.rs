//! Objects that are not what their names say: damaged, cut short, or made by somebody who may create and holds no key. One of
//! them never hides the others: it counts as absent, and is named once.

use std::sync::PoisonError;

use object_store::path::Path;

use super::{ArchiveError, Archived, OwnedTail, SealedSegment, WalArchive};
use crate::format::clear::ObjectKind;
use crate::format::sealed;
use crate::layout::TailName;
use crate::store::{Store, StoreError, StoreErrorKind};

impl WalArchive {
    /// What was read; `None` if it is not there, or is no more what it should be, which is said once. Errors: the store's.
    pub fn readable<T>(&self, read: Result<T, ArchiveError>) -> Result<Option<T>, ArchiveError> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) if error.is_damage() => {
                let problem = error.to_string();
                let mut said = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
                if said.insert(problem.clone()) {
                    tracing::warn!("an object of the WAL archive does not read, and counts as absent: {problem}");
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Stores a segment as a piece of itself: under its own name lies what does not open, and nothing is ever overwritten.
    pub(super) async fn store_beside(&self, sealed: &SealedSegment) -> Result<Archived, ArchiveError> {
        let upload = self.opened(sealed, sealed.directory.wal).await?;
        let mut content = upload.content;
        content.resize(upload.segment_size.bytes() as usize, 0);
        self.put_tail(OwnedTail {
            wal: upload.wal,
            segment: upload.segment,
            segment_size: upload.segment_size,
            name: TailName { from: 0, to: upload.segment_size.bytes(), member: upload.member },
            before: self.content_hasher().id(),
            after: self.id_of(&content),
            bytes: content.into(),
            facts: upload.facts,
            shipped_at_us: upload.shipped_at_us,
            complete_at_us: None,
        })
        .await
    }
}

/// Whether an object is there and undamaged, as far as can be told without its key.
pub(crate) async fn reads_back(store: &Store, key: &Path, kind: ObjectKind) -> Result<bool, StoreError> {
    match store.get(key).await {
        Ok(bytes) => Ok(sealed::check(&bytes, kind).is_ok()),
        Err(error) if error.is_not_found() || matches!(error.kind(), StoreErrorKind::TooLarge { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
