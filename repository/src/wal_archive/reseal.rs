//! A segment that was sealed for one branch, to be stored in another: its name is part of what is sealed.

use super::{ArchiveError, OwnedSegment, SealedSegment, WalArchive, domain_for};
use crate::format::changed_blocks::ChangedBlocks;
use crate::format::clear::ObjectKind;
use crate::format::sealed::SealedObject;
use crate::format::wal_segment::{SegmentError, SegmentFacts, decode_commit_times, open_segment};
use crate::postgres::WalBranch;

impl WalArchive {
    /// Stores a segment in a branch, whichever it was sealed for; returns once it is durable.
    pub async fn store_segment_in(
        &self,
        wal: WalBranch,
        sealed: &SealedSegment,
    ) -> Result<super::Archived, ArchiveError> {
        if sealed.directory.wal == wal {
            return self.store_segment(sealed).await;
        }
        self.store_segment(&self.reseal(sealed, wal).await?).await
    }

    /// The same segment sealed for another branch.
    async fn reseal(&self, sealed: &SealedSegment, wal: WalBranch) -> Result<SealedSegment, ArchiveError> {
        let upload = self.opened(sealed, wal).await?;
        self.seal_segment(upload).await
    }

    /// What was sealed, for a branch.
    pub(super) async fn opened(&self, sealed: &SealedSegment, wal: WalBranch) -> Result<OwnedSegment, ArchiveError> {
        let (archive, key, bytes) = (self.clone(), sealed.key.to_string(), sealed.bytes.clone());
        let (directory, levels) = (sealed.directory.clone(), sealed.levels.clone());
        let opened = tokio::task::spawn_blocking(move || {
            let domain = domain_for(&bytes, &archive.keys, ObjectKind::Segment)?;
            let object = SealedObject::open(bytes.clone(), domain, ObjectKind::Segment, Some(&key))?;
            let (_, content) = open_segment(bytes, domain, &key, directory.wal, directory.segment)?;
            let start = directory.segment.start(directory.segment_size);
            let times = directory.commit_times.map(|frame| object.frame(frame)).transpose()?;
            let times = times.map(|times| decode_commit_times(start, &times)).transpose()?;
            let changes = directory.changed_blocks.map(|frame| object.frame(frame)).transpose()?;
            let changes = changes.map(|changes| ChangedBlocks::decode(&changes)).transpose()?;
            let (commits, restore_points) = times.unwrap_or_default();
            Ok::<_, SegmentError>(OwnedSegment {
                wal,
                segment: directory.segment,
                segment_size: directory.segment_size,
                content,
                facts: SegmentFacts {
                    valid_bytes: directory.valid_bytes,
                    commits,
                    restore_points,
                    changed_blocks: changes,
                    wal_levels: levels,
                },
                predecessor: directory.predecessor,
                member: directory.member,
                shipped_at_us: directory.shipped_at_us,
            })
        });
        let opened = opened.await.unwrap_or(Err(SegmentError::Content));
        opened.map_err(|source| ArchiveError::Segment { key: sealed.key.to_string(), source })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::Archived;
    use super::*;
    use crate::crypto::DomainKey;
    use crate::format::wal_segment::{CommitPoint, RestorePoint};
    use crate::keyring::Keyring;
    use crate::postgres::{Branch, Lsn, Segment, SegmentSize, SystemId, Timeline};
    use crate::store::Store;

    #[tokio::test]
    async fn what_was_sealed_for_one_branch_is_whole_in_another() {
        let keys = Keyring::of(DomainKey::generate().unwrap());
        let archive = WalArchive::new(Store::in_memory(), "orders".parse().unwrap(), Arc::new(keys), 3);
        let wal = WalBranch { system_id: SystemId(5), timeline: Timeline(1), branch: Branch::ROOT };
        let other = WalBranch { branch: Branch([8; 8]), ..wal };
        let (segment, size) = (Segment { timeline: Timeline(1), number: 2 }, SegmentSize::new(1 << 20).unwrap());
        let at = |bytes: u64, at_us| CommitPoint { lsn: Lsn((2 << 20) + bytes), at_us };
        let facts = SegmentFacts {
            valid_bytes: 900_000,
            commits: vec![at(100, 1_000_000), at(200, 2_000_000)],
            restore_points: vec![RestorePoint { name: "here".into(), point: at(300, 3_000_000) }],
            changed_blocks: Some(ChangedBlocks::default()),
            wal_levels: Vec::new(),
        };
        let upload = OwnedSegment {
            wal,
            segment,
            segment_size: size,
            content: vec![7; 1 << 20],
            facts: facts.clone(),
            predecessor: None,
            member: "pg1".into(),
            shipped_at_us: 9,
        };
        let sealed = archive.seal_segment(upload).await.unwrap();
        assert!(matches!(archive.store_segment_in(other, &sealed).await, Ok(Archived::Stored { .. })));
        assert_eq!(archive.store_segment_in(other, &sealed).await.unwrap(), Archived::AlreadyThere);
        assert_eq!(archive.get_segment(wal, segment, size).await.unwrap(), None);
        let (directory, content) = archive.get_segment(other, segment, size).await.unwrap().unwrap();
        assert_eq!((directory.content_id, directory.shipped_at_us), (sealed.content_id(), 9));
        assert!(content[..900_000].iter().all(|byte| *byte == 7));
        let (commits, points) = archive.commit_times(other, segment, size).await.unwrap();
        assert_eq!((commits, points), (facts.commits, facts.restore_points));
        assert_eq!(archive.changed_blocks(other, segment, size).await.unwrap(), facts.changed_blocks);
        assert!(matches!(archive.store_segment_in(wal, &sealed).await, Ok(Archived::Stored { .. })));
    }
}
