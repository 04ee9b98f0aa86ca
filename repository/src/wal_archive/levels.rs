//! Where `wal_level` changed. A listing must tell it, since a segment's content is not read for a recovery window: so it lies
//! beside the segments, under a name that says all of it.

use std::sync::PoisonError;

use bytes::Bytes;

use super::{ArchiveError, NOTES_BYTES, SealedSegment, Strays, WalArchive, domain_for};
use crate::format::clear::ObjectKind;
use crate::format::wal_history::StoredHistory;
use crate::format::wal_segment::WalLevelChange;
use crate::layout::{self, WalLevelClass, WalLevelName};
use crate::postgres::{Lsn, Segment, SegmentSize, WalBranch};
use crate::recovery_window::SegmentCommits;

/// What is known of a change to `minimal` beside its place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LevelNote {
    /// Who told it, and when by its clock, microseconds since the Unix epoch.
    pub member: String,
    pub at_us: i64,
    /// Of the segment that holds the place, the commits before it.
    pub commits_before: SegmentCommits,
}

impl WalArchive {
    /// Tells what a finished segment says of `wal_level`, unless another member's lies there under its name.
    pub(super) async fn note_levels_of(&self, sealed: &SealedSegment) -> Result<(), ArchiveError> {
        if sealed.levels.is_empty() {
            return Ok(());
        }
        let directory = &sealed.directory;
        match self.directory(directory.wal, directory.segment, directory.segment_size).await {
            Ok(existing) => sealed.agrees_with(existing)?,
            // What lies there does not read: the segment goes beside it.
            Err(error) if error.is_not_found() || error.is_damage() => {}
            Err(error) => return Err(error),
        }
        self.note_levels(directory.wal, &sealed.levels, (&directory.member, directory.shipped_at_us)).await
    }

    /// Returns once it is durable. To be called before the WAL that says so is there: as long as this is missing, more would be
    /// promised than can be restored.
    pub(super) async fn note_levels(
        &self,
        wal: WalBranch,
        changes: &[WalLevelChange],
        (member, shipped_at_us): (&str, i64),
    ) -> Result<(), ArchiveError> {
        for change in changes {
            let key = layout::wal_level(&self.cluster, &WalLevelName { wal, at: change.at, level: change.level });
            let note = StoredHistory {
                content: Bytes::new(),
                parent: None,
                member: member.to_owned(),
                shipped_at_us,
                divergence: None,
            };
            let sealed = note.seal(self.keys.newest(), key.as_ref(), wal);
            let sealed = sealed.map_err(|source| ArchiveError::Segment { key: key.to_string(), source })?;
            // Whoever told it before told the same: its name says it.
            let _ = self.store.create(&key, sealed).await?;
        }
        Ok(())
    }

    /// What is known of a change to `minimal`; `None`: it is another branch's, told before its member knew that. `is_whole`: the
    /// segment that holds it is finished in the archive; `None`: nothing of that is there.
    pub async fn level_note(
        &self,
        name: &WalLevelName,
        size: SegmentSize,
        strays: &Strays,
        is_whole: Option<bool>,
    ) -> Result<Option<LevelNote>, ArchiveError> {
        let segment = Segment { timeline: name.wal.timeline, number: name.at.segment_number(size) };
        let known = || self.level_notes.lock().unwrap_or_else(PoisonError::into_inner);
        let cached = known().get(name).cloned();
        let note = match cached {
            Some(note) => note,
            None => {
                let key = layout::wal_level(&self.cluster, name);
                let told = self.object_at_most(&key, NOTES_BYTES).await.and_then(|bytes| {
                    domain_for(&bytes, &self.keys, ObjectKind::History)
                        .and_then(|domain| StoredHistory::open(bytes.clone(), domain, key.as_ref(), name.wal))
                        .map_err(|source| ArchiveError::Segment { key: key.to_string(), source })
                });
                let told = match told {
                    Err(error) if !error.is_damage() => return Err(error),
                    told => told,
                };
                // Its name counts though it is damaged: nothing is promised that may not be restored.
                let (member, at_us) = told.map_or_else(
                    |error| {
                        tracing::warn!(%key, "who told of wal_level=minimal does not read: {error}");
                        ("unknown".to_owned(), 0)
                    },
                    |told| (told.member, told.shipped_at_us),
                );
                let commits_before = match is_whole {
                    Some(_) => self.commits_before(name, segment, size).await?,
                    None => SegmentCommits::None,
                };
                let note = LevelNote { member, at_us, commits_before };
                if is_whole == Some(true) {
                    known().insert(*name, note.clone());
                }
                note
            }
        };
        Ok(Some(note).filter(|note| !strays.has(segment, size, &note.member)))
    }

    async fn commits_before(
        &self,
        name: &WalLevelName,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<SegmentCommits, ArchiveError> {
        let Some((commits, _)) = self.readable(self.commit_times(name.wal, segment, size).await)? else {
            return Ok(SegmentCommits::None);
        };
        let mut before = commits.iter().filter(|commit| commit.lsn <= name.at).map(|commit| commit.at_us);
        let first = before.next();
        Ok(first.map_or(SegmentCommits::None, |first_us| SegmentCommits::Between {
            first_us,
            last_us: before.next_back().unwrap_or(first_us),
        }))
    }
}

/// The first place behind another at which WAL can be replayed again.
pub fn ended_by(levels: &[WalLevelName], minimal: &WalLevelName) -> Option<Lsn> {
    let ends = levels.iter().filter(|level| level.level == WalLevelClass::Replica && level.wal == minimal.wal);
    ends.map(|level| level.at).filter(|at| *at > minimal.at).min()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{Archived, OwnedSegment};
    use super::*;
    use crate::crypto::DomainKey;
    use crate::format::wal_segment::{CommitPoint, SegmentFacts};
    use crate::keyring::Keyring;
    use crate::postgres::{Branch, SystemId, Timeline};
    use crate::store::Store;

    const SIZE: u64 = 1 << 20;
    const WAL: WalBranch = WalBranch { system_id: SystemId(5), timeline: Timeline(1), branch: Branch::ROOT };

    /// Segment 2, which the level leaves and comes back in. Commits within a tenth of a second, on both sides.
    fn upload(wal: WalBranch, fill: u8, member: &str, at: u64) -> OwnedSegment {
        let lsn = |bytes: u64| Lsn(2 * SIZE + bytes);
        let commits = [100, 200, 300, 5000].map(|bytes| CommitPoint { lsn: lsn(bytes), at_us: bytes as i64 });
        let changes = [(at, WalLevelClass::Minimal), (at + 1000, WalLevelClass::Replica)];
        OwnedSegment {
            wal,
            segment: Segment { timeline: Timeline(1), number: 2 },
            segment_size: SegmentSize::new(SIZE).unwrap(),
            content: vec![fill; SIZE as usize],
            facts: SegmentFacts {
                valid_bytes: SIZE as u32,
                commits: commits.to_vec(),
                wal_levels: changes.map(|(at, level)| WalLevelChange { at: lsn(at), level }).to_vec(),
                ..SegmentFacts::default()
            },
            predecessor: None,
            member: member.to_owned(),
            shipped_at_us: 9,
        }
    }

    #[tokio::test]
    async fn a_change_is_told_of_the_branch_that_has_it_and_by_nobody_whose_segment_is_refused() {
        let keys = Keyring::of(DomainKey::generate().unwrap());
        let archive = WalArchive::new(Store::in_memory(), "orders".parse().unwrap(), Arc::new(keys), 3);
        let (size, other) = (SegmentSize::new(SIZE).unwrap(), WalBranch { branch: Branch([8; 8]), ..WAL });
        for _ in 0..2 {
            archive.put_segment(upload(WAL, 1, "db1", 400)).await.unwrap();
        }
        let twin = archive.seal_segment(upload(WAL, 2, "db2", 350)).await.unwrap();
        assert!(matches!(archive.store_segment(&twin).await, Err(ArchiveError::Diverged { .. })));
        assert!(matches!(archive.store_segment_in(other, &twin).await, Ok(Archived::Stored { .. })));
        let listed = archive.list(SystemId(5), size).await.unwrap();
        for (wal, at, member) in [(WAL, 400, "db1"), (other, 350, "db2")] {
            let levels = &listed[&wal].levels;
            let (from, to) = (Lsn(2 * SIZE + at), Lsn(2 * SIZE + at + 1000));
            assert_eq!(levels.iter().map(|level| level.at).collect::<Vec<_>>(), [from, to]);
            assert_eq!(ended_by(levels, &levels[0]), Some(to));
            let note = archive.level_note(&levels[0], size, &Strays::default(), Some(true)).await.unwrap().unwrap();
            // The last before is there though it is close to the first.
            let commits_before = SegmentCommits::Between { first_us: 100, last_us: 300 };
            assert_eq!(note, LevelNote { member: member.to_owned(), at_us: 9, commits_before });
        }
    }
}
