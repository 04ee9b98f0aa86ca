//! Timeline histories and backup histories: small, sealed, and never content of WAL.

use bytes::Bytes;

use super::{ArchiveError, Archived, NOTES_BYTES, WalArchive, domain_for};
use crate::format::clear::ObjectKind;
use crate::format::wal_history::StoredHistory;
use crate::layout;
use crate::postgres::{Branch, Segment, SegmentSize, SystemId, Timeline, TimelineHistory, WalBranch};
use crate::store::Creation;

impl WalArchive {
    /// Stores a timeline history file under the branch that its content makes. `parent`: the branch of the last ancestor
    /// that it names, where that is known.
    pub async fn put_history(
        &self,
        system_id: SystemId,
        timeline: Timeline,
        content: &[u8],
        parent: Option<Branch>,
        member: &str,
        shipped_at_us: i64,
    ) -> Result<Archived, ArchiveError> {
        TimelineHistory::parse(timeline, content).map_err(|source| ArchiveError::History { timeline, source })?;
        let wal = WalBranch { system_id, timeline, branch: Branch::of_history(content) };
        let history = StoredHistory {
            content: Bytes::copy_from_slice(content),
            parent,
            member: member.to_owned(),
            shipped_at_us,
            divergence: None,
        };
        // The name holds the content's hash, so whatever lies there already is this file.
        self.create_history(wal, &history).await
    }

    pub(super) async fn create_history(
        &self,
        wal: WalBranch,
        history: &StoredHistory,
    ) -> Result<Archived, ArchiveError> {
        let key = layout::wal_history(&self.cluster, &wal);
        let sealed = history.seal(self.keys.newest(), key.as_ref(), wal);
        let bytes = sealed.map_err(|source| ArchiveError::Segment { key: key.to_string(), source })?;
        let stored_bytes = bytes.len() as u64;
        // Before it, so that whoever sees the one has the other.
        let origin = self.store.create(&layout::wal_origin(&self.cluster, &wal), history.in_clear(wal)).await?;
        if origin == Creation::AlreadyThere {
            tracing::debug!(?wal, "where the branch comes from was told already");
        }
        match self.store.create(&key, bytes).await? {
            Creation::Created => Ok(Archived::Stored { stored_bytes }),
            // Read it to be sure that it opens, or to have it named. Its name holds what it said.
            Creation::AlreadyThere => {
                self.readable(self.stored_history(wal).await)?;
                Ok(Archived::AlreadyThere)
            }
        }
    }

    /// Stores a backup history file. It is never needed for a restore; it is kept because Postgres asked for it.
    pub async fn put_backup_history(
        &self,
        wal: WalBranch,
        (segment, size, offset): (Segment, SegmentSize, u32),
        content: &[u8],
        member: &str,
        shipped_at_us: i64,
    ) -> Result<Archived, ArchiveError> {
        let key = layout::wal_backup_history(&self.cluster, &wal, segment, size, offset);
        let history = StoredHistory {
            content: Bytes::copy_from_slice(content),
            parent: None,
            member: member.to_owned(),
            shipped_at_us,
            divergence: None,
        };
        let sealed = history.seal(self.keys.newest(), key.as_ref(), wal);
        let bytes = sealed.map_err(|source| ArchiveError::Segment { key: key.to_string(), source })?;
        let stored_bytes = bytes.len() as u64;
        Ok(match self.store.create(&key, bytes).await? {
            Creation::Created => Archived::Stored { stored_bytes },
            Creation::AlreadyThere => Archived::AlreadyThere,
        })
    }

    /// The history file of a branch as Postgres wrote it; `None` if the archive does not hold it.
    pub async fn history(&self, wal: WalBranch) -> Result<Option<Bytes>, ArchiveError> {
        let stored = self.stored_history(wal).await?;
        // Timeline 1 has none, and so its branches have none.
        Ok(stored.map(|stored| stored.content).filter(|content| !content.is_empty()))
    }

    /// The same with all that was stored along.
    pub async fn stored_history(&self, wal: WalBranch) -> Result<Option<StoredHistory>, ArchiveError> {
        let key = layout::wal_history(&self.cluster, &wal);
        let named = |source| ArchiveError::Segment { key: key.to_string(), source };
        let bytes = match self.object_at_most(&key, NOTES_BYTES).await {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let domain = domain_for(&bytes, &self.keys, ObjectKind::History).map_err(named)?;
        StoredHistory::open(bytes.clone(), domain, key.as_ref(), wal).map(Some).map_err(named)
    }
}
