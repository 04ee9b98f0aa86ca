//! WAL: ascending, and what the newest backup needs before anything older.
//!
//! A look at everything compares listings of both places. Between such looks only what is behind the last segment is listed,
//! which costs a few requests. What retention has let go of in either place is not brought, but for what makes backups consistent,
//! which comes with them.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use futures::stream::StreamExt;
use jiff::{SignedDuration, Timestamp};
use object_store::path::Path;

use super::{Copier, ReplicateError};
use crate::cluster_log::ClusterLog;
use crate::format::clear::ObjectKind;
use crate::format::gap_note::GapNote;
use crate::format::reference::ReferencePart;
use crate::format::wal_history::StoredHistory;
use crate::ids::ClusterName;
use crate::layout::{self, WalObject};
use crate::postgres::{Lsn, Segment, SegmentSize, SystemId, WalBranch};
use crate::store::Listed;

/// How long after those behind it a segment may still be expected: agents send several at once, and try again.
const SETTLED: SignedDuration = SignedDuration::from_hours(1);

/// Objects in flight, in order.
const IN_FLIGHT: usize = 4;

/// How far a cluster's WAL was brought. The caller keeps it between rounds; without it everything is looked at.
#[derive(Clone, Default, Debug)]
pub struct WalProgress {
    /// By branch, the segment up to which all were looked at; `None`: there was none.
    last: BTreeMap<WalBranch, Option<Path>>,
    /// What was brought and is listed again: no segments, and segments behind one that may still come.
    brought: HashSet<Path>,
    /// All that the first place had then is in the replica.
    pub complete_as_of: Option<Timestamp>,
}

/// Which of the WAL is to be brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// What came since, where that is known; otherwise what the newest backup needs and all behind it.
    Newest,
    /// All that the replica lacks.
    All,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct WalCopied {
    pub segments: u64,
    pub pieces: u64,
    pub bytes: u64,
    /// What does not read in the first place, and was not brought.
    pub damaged: Vec<String>,
}

/// A system's WAL that may have to be brought.
struct System {
    id: SystemId,
    size: SegmentSize,
    /// Where the newest live backup begins.
    newest: u64,
}

/// Of a branch, by what it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum What {
    History,
    Origin,
    Beside,
    GapNote,
    /// A segment, or what a promotion left of one.
    Segment {
        number: u64,
        is_whole: bool,
    },
}

impl Copier<'_> {
    pub async fn copy_wal(
        &self,
        cluster: &ClusterName,
        part: Part,
        progress: &mut WalProgress,
    ) -> Result<WalCopied, ReplicateError> {
        let begun_at = Timestamp::now();
        let (from, to) = self.logs(cluster).await?;
        let mut copied = WalCopied::default();
        for system in self.systems(&from).await? {
            let folder = layout::wal_system(cluster, system.id);
            let branches = self.at_source(self.source.store().list_level(&folder).await)?.folders;
            let branches: Vec<WalBranch> =
                branches.iter().filter_map(|folder| layout::parse_wal_branch(cluster, folder)).collect();
            let is_known = branches.iter().all(|wal| progress.last.contains_key(wal));
            let (listed, there) = if part == Part::Newest && is_known {
                (self.news(cluster, &branches, progress).await?, HashSet::new())
            } else {
                let there = self.at_target(self.target.store().list(&folder).await)?;
                let listed = self.at_source(self.source.store().list(&folder).await)?;
                (listed, there.into_iter().map(|object| object.key).collect())
            };
            let cursors = cursors(cluster, &branches, &listed, system.size, progress);
            let is_wanted = |wal: &WalBranch, what: &What| match what {
                What::Segment { number, .. } => {
                    let end = Segment { timeline: wal.timeline, number: *number }.end(system.size);
                    let trimmed = from.state().trimmed_below(wal).max(to.state().trimmed_below(wal));
                    end > trimmed && (part == Part::All || is_known || *number >= system.newest)
                }
                _ => true,
            };
            let found = listed.into_iter();
            let found = found.filter(|object| !there.contains(&object.key) && !progress.brought.contains(&object.key));
            let mut todo: Vec<(What, WalBranch, Path)> = found
                .filter_map(|object| {
                    let (wal, what) = what(cluster, &branches, &object.key, system.size)?;
                    is_wanted(&wal, &what).then_some((what, wal, object.key))
                })
                .collect();
            todo.sort();
            self.copy_all(cluster, todo, progress, &mut copied).await?;
            progress.last.extend(cursors);
            progress.forget_passed(cluster, system.size);
            self.copy_pieces(cluster, &system, &mut copied).await?;
        }
        // What does not read will not be brought by another try, and is told.
        progress.complete_as_of = Some(begun_at);
        Ok(copied)
    }

    /// Systems that have a live backup: without one, nobody knows how large their segments are, nor needs them.
    async fn systems(&self, from: &ClusterLog) -> Result<Vec<System>, ReplicateError> {
        let mut systems: BTreeMap<SystemId, System> = BTreeMap::new();
        let backups = self.source.backups(from).await;
        self.all_came(backups.unreadable, self.source)?;
        for backup in backups.readable {
            let part = backup.reference;
            let begins = part.start_lsn.segment_number(part.segment_size);
            let id = part.wal.system_id;
            let system = systems.entry(id).or_insert(System { id, size: part.segment_size, newest: begins });
            system.newest = system.newest.max(begins);
        }
        Ok(systems.into_values().collect())
    }

    async fn news(
        &self,
        cluster: &ClusterName,
        branches: &[WalBranch],
        progress: &mut WalProgress,
    ) -> Result<Vec<Listed>, ReplicateError> {
        let mut news = Vec::new();
        for wal in branches {
            let folder = layout::wal_branch(cluster, wal);
            news.extend(match progress.last.get(wal).and_then(Option::as_ref) {
                Some(last) => self.at_source(self.source.store().list_after(&folder, last).await)?,
                None => self.at_source(self.source.store().list(&folder).await)?,
            });
        }
        Ok(news)
    }

    async fn copy_all(
        &self,
        cluster: &ClusterName,
        todo: Vec<(What, WalBranch, Path)>,
        progress: &mut WalProgress,
        copied: &mut WalCopied,
    ) -> Result<(), ReplicateError> {
        let copies = todo.into_iter().map(|(what, wal, key)| async move {
            let size = self.copy_object(cluster, what, &wal, &key).await;
            (what, key, size)
        });
        let copies: Vec<_> = copies.collect();
        let mut copies = futures::stream::iter(copies).buffered(IN_FLIGHT);
        while let Some((what, key, size)) = copies.next().await {
            match size {
                Ok(size) => copied.bytes += size.unwrap_or(0),
                Err(ReplicateError::Damaged { key, what, .. }) => copied.damaged.push(format!("{key}: {what}")),
                Err(ReplicateError::Taken { key, .. }) => {
                    copied.damaged.push(format!("{key}: other content lies in the replica"));
                }
                Err(error) => return Err(error),
            }
            copied.segments += u64::from(matches!(what, What::Segment { is_whole: true, .. }));
            progress.brought.insert(key);
        }
        Ok(())
    }

    async fn copy_object(
        &self,
        cluster: &ClusterName,
        what: What,
        wal: &WalBranch,
        key: &Path,
    ) -> Result<Option<u64>, ReplicateError> {
        match what {
            What::Segment { .. } => self.copy_sealed(key, ObjectKind::Segment).await,
            What::History | What::Beside => self.copy_sealed(key, ObjectKind::History).await,
            What::Origin => {
                let bytes = self.at_source(self.source.store().get(key).await)?;
                StoredHistory::open_clear(&bytes, *wal).map_err(|error| self.damaged(key, &error))?;
                let size = bytes.len() as u64;
                // Another program may write the same with other bytes.
                let _either_way = self.at_target(self.target.store().create(key, bytes).await)?;
                Ok(Some(size))
            }
            What::GapNote => {
                let Some(name) = layout::parse_gap_note(cluster, key) else { return Ok(None) };
                let bytes = self.at_source(self.source.store().get(key).await)?;
                let note = match GapNote::open(&self.source.trust(), cluster, &name, &bytes) {
                    Ok(note) => note,
                    Err(error) => return Err(self.damaged(key, &error)),
                };
                let (name, object) = note.seal(self.author.signer, self.target.id());
                let size = object.len() as u64;
                let key = layout::gap_note(cluster, &name);
                let _either_way = self.at_target(self.target.store().create(&key, object).await)?;
                Ok(Some(size))
            }
        }
    }

    /// Pieces of segments that are not finished.
    async fn copy_pieces(
        &self,
        cluster: &ClusterName,
        system: &System,
        copied: &mut WalCopied,
    ) -> Result<(), ReplicateError> {
        let folder = layout::system_tails(cluster, system.id);
        let pieces = self.at_source(self.source.store().list(&folder).await)?;
        if pieces.is_empty() {
            return Ok(());
        }
        let there = self.at_target(self.target.store().list(&folder).await)?;
        let there: HashSet<Path> = there.into_iter().map(|object| object.key).collect();
        let mut finished: BTreeMap<(WalBranch, u64), bool> = BTreeMap::new();
        let mut lacking: Vec<(u64, u32, Path)> = Vec::new();
        for piece in pieces.into_iter().filter(|piece| !there.contains(&piece.key)) {
            let Some((wal, segment, name)) = layout::parse_piece(cluster, &piece.key, system.size) else { continue };
            let is_finished = match finished.get(&(wal, segment.number)) {
                Some(is_finished) => *is_finished,
                None => {
                    let whole = layout::wal_segment(cluster, &wal, segment, system.size);
                    let is_finished = self.at_target(self.target.store().exists(&whole).await)?;
                    finished.insert((wal, segment.number), is_finished);
                    is_finished
                }
            };
            if !is_finished {
                lacking.push((segment.number, name.from, piece.key));
            }
        }
        lacking.sort();
        for (_, _, key) in lacking {
            match self.copy_sealed(&key, ObjectKind::Tail).await {
                Ok(size) => {
                    copied.pieces += u64::from(size.is_some());
                    copied.bytes += size.unwrap_or(0);
                }
                Err(ReplicateError::Damaged { key, what, .. }) => copied.damaged.push(format!("{key}: {what}")),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The WAL that makes a backup consistent, on all branches of its system: a backup of a standby may end on another one than it
    /// began on.
    pub(super) async fn copy_stretch(
        &self,
        cluster: &ClusterName,
        part: &ReferencePart,
        floor: Lsn,
    ) -> Result<(), ReplicateError> {
        let (system_id, size) = (part.wal.system_id, part.segment_size);
        let folder = layout::wal_system(cluster, system_id);
        let branches = self.at_source(self.source.store().list_level(&folder).await)?.folders;
        let branches: BTreeSet<WalBranch> =
            branches.iter().filter_map(|folder| layout::parse_wal_branch(cluster, folder)).collect();
        let (first, last) = (floor.min(part.start_lsn).segment_number(size), part.stop_lsn.segment_number(size));
        let mut copied = WalCopied::default();
        for wal in branches {
            for key in [layout::wal_history(cluster, &wal), layout::wal_origin(cluster, &wal)] {
                let what = if key == layout::wal_origin(cluster, &wal) { What::Origin } else { What::History };
                if self.is_lacking(&key).await? {
                    self.copy_object(cluster, what, &wal, &key).await?;
                }
            }
            for number in first..=last {
                let key = layout::wal_segment(cluster, &wal, Segment { timeline: wal.timeline, number }, size);
                if self.is_lacking(&key).await? {
                    self.copy_sealed(&key, ObjectKind::Segment).await?;
                }
            }
        }
        self.copy_pieces(cluster, &System { id: system_id, size, newest: first }, &mut copied).await
    }

    /// Whether an object of the first place is not in the replica.
    async fn is_lacking(&self, key: &Path) -> Result<bool, ReplicateError> {
        if self.at_target(self.target.store().exists(key).await)? {
            return Ok(false);
        }
        self.at_source(self.source.store().exists(key).await)
    }
}

impl WalProgress {
    /// What lies before the cursors is not listed again.
    fn forget_passed(&mut self, cluster: &ClusterName, size: SegmentSize) {
        let last = &self.last;
        self.brought.retain(|key| match layout::parse_wal_object(cluster, key, size) {
            Some((wal, WalObject::Segment(_))) => {
                last.get(&wal).and_then(Option::as_ref).is_none_or(|cursor| key > cursor)
            }
            _ => true,
        });
    }
}

/// Where to list on from, by branch. Segments are stored in any order: before one that is missing the cursor stands until what is
/// behind it has lain there for an hour. What comes later still is found when everything is looked at.
fn cursors(
    cluster: &ClusterName,
    branches: &[WalBranch],
    listed: &[Listed],
    size: SegmentSize,
    progress: &WalProgress,
) -> BTreeMap<WalBranch, Option<Path>> {
    let mut segments: BTreeMap<WalBranch, BTreeMap<u64, &Listed>> = BTreeMap::new();
    for object in listed {
        if let Some((wal, WalObject::Segment(segment))) = layout::parse_wal_object(cluster, &object.key, size) {
            segments.entry(wal).or_default().insert(segment.number, object);
        }
    }
    let settled_us = (Timestamp::now() - SETTLED).as_microsecond();
    let number = |key: &Path| match layout::parse_wal_object(cluster, key, size) {
        Some((_, WalObject::Segment(segment))) => Some(segment.number),
        _ => None,
    };
    let cursor = |wal: &WalBranch| {
        let mut cursor = progress.last.get(wal).cloned().flatten();
        let mut last = cursor.as_ref().and_then(number);
        for (number, object) in segments.get(wal).into_iter().flatten() {
            let follows = last.is_none_or(|last| *number <= last + 1);
            if !follows && object.last_modified_us > settled_us {
                break;
            }
            if last.is_none_or(|last| *number > last) {
                (cursor, last) = (Some(object.key.clone()), Some(*number));
            }
        }
        (*wal, cursor)
    };
    branches.iter().map(cursor).collect()
}

fn what(cluster: &ClusterName, branches: &[WalBranch], key: &Path, size: SegmentSize) -> Option<(WalBranch, What)> {
    if let Some((wal, found)) = layout::parse_wal_object(cluster, key, size) {
        return Some(match found {
            WalObject::Segment(segment) => (wal, What::Segment { number: segment.number, is_whole: true }),
            WalObject::History => (wal, What::History),
        });
    }
    if let Some(name) = layout::parse_gap_note(cluster, key) {
        return Some((name.wal, What::GapNote));
    }
    branches.iter().find_map(|wal| {
        if *key == layout::wal_origin(cluster, wal) {
            return Some((*wal, What::Origin));
        }
        if let Some(segment) = layout::parse_wal_partial(cluster, wal, key, size) {
            return Some((*wal, What::Segment { number: segment.number, is_whole: false }));
        }
        let is_beside = layout::parse_wal_backup_history(cluster, wal, key, size).is_some()
            || layout::parse_wal_level(cluster, key).is_some_and(|name| name.wal == *wal);
        is_beside.then_some((*wal, What::Beside))
    })
}
