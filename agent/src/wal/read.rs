//! One file of `pg_wal` as Postgres names it, read and judged before it may be called WAL of this cluster.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use walfleet_repository::format::wal_segment::{CommitPoint, RestorePoint, SegmentFacts, WalLevelChange};
use walfleet_repository::layout::WalLevelClass;
use walfleet_repository::postgres::{Segment, SegmentSize, SystemId, Timeline};

use crate::postgres::wal_record::{
    Carry, ParameterChange, SegmentDigest, SegmentEnd, SegmentPlace, WalError, digest_segment,
};

/// Commits closer together are thinned in the archive's index.
const COMMIT_SPACING: Duration = Duration::from_millis(100);

/// What `archive_command` may be asked to archive (PostgreSQL's documentation, "Setting Up WAL Archiving").
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WalFile {
    Segment(Segment),
    /// `….partial`: the unfinished last segment of a timeline, left by a promotion.
    Partial(Segment),
    /// `0000000N.history`
    History(Timeline),
    /// `….<offset>.backup`: what a base backup leaves; nothing needs it.
    BackupHistory(Segment, u32),
}

#[derive(Debug, thiserror::Error)]
pub enum WalReadError {
    #[error("\"{name}\" is not the name of a WAL file\nHINT: archive_command passes %p, restore_command passes %f.")]
    Name { name: String },
    #[error("read {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error(
        "{path} has {found} bytes, a segment of this cluster has {expected}\nHINT: nothing was archived; Postgres will ask again."
    )]
    Length { path: PathBuf, found: u64, expected: u64 },
    #[error(
        "{path} is WAL of another cluster than the one it was to be archived for: {source}\nHINT: nothing was archived; check archive_command and the agent's instances."
    )]
    Foreign { path: PathBuf, source: WalError },
    #[error(
        "{path} belongs to system {found}, this cluster is system {expected}\nHINT: nothing was archived; check archive_command and the agent's instances."
    )]
    System { path: PathBuf, found: SystemId, expected: SystemId },
}

impl WalFile {
    pub fn parse(name: &str, size: SegmentSize) -> Result<WalFile, WalReadError> {
        let bad = || WalReadError::Name { name: name.to_owned() };
        if let Ok(timeline) = Timeline::from_history_name(name) {
            return Ok(WalFile::History(timeline));
        }
        let (stem, rest) = name.split_at_checked(24).ok_or_else(bad)?;
        let segment = Segment::from_file_name(stem, size).map_err(|_| bad())?;
        match rest {
            "" => Ok(WalFile::Segment(segment)),
            ".partial" => Ok(WalFile::Partial(segment)),
            _ => {
                let offset = rest.strip_prefix('.').and_then(|rest| rest.strip_suffix(".backup")).ok_or_else(bad)?;
                let offset = u32::from_str_radix(offset, 16).map_err(|_| bad())?;
                Ok(WalFile::BackupHistory(segment, offset))
            }
        }
    }

    pub fn timeline(self) -> Timeline {
        match self {
            WalFile::Segment(segment) | WalFile::Partial(segment) | WalFile::BackupHistory(segment, _) => {
                segment.timeline
            }
            WalFile::History(timeline) => timeline,
        }
    }
}

/// A segment's bytes and what its records say.
pub struct SegmentContent {
    pub bytes: Vec<u8>,
    pub facts: SegmentFacts,
    pub carry: Option<Carry>,
    /// Set if the records end before the segment does though Postgres calls it finished: it is archived as it is, and
    /// somebody should look.
    pub suspicion: Option<String>,
}

/// Reads a whole file of `pg_wal`; "not found" if it was there and is not any more.
///
/// PostgreSQL recycles a segment by renaming it and writing over it under its new name (RemoveXlogFile,
/// src/backend/access/transam/xlog.c). Whoever opened it before would read some of either, and take a server's own WAL for
/// another's. If the name still means the same file afterwards, nothing was written over yet.
pub fn read_in_place(path: &Path) -> std::io::Result<Vec<u8>> {
    read_and(path, Vec::new(), || {})
}

fn read_and(path: &Path, mut bytes: Vec<u8>, meanwhile: impl FnOnce()) -> std::io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    let opened = file.metadata()?;
    bytes.clear();
    bytes.reserve_exact(usize::try_from(opened.len()).unwrap_or_default());
    file.read_to_end(&mut bytes)?;
    meanwhile();
    let named = std::fs::metadata(path)?;
    match (named.dev(), named.ino()) == (opened.dev(), opened.ino()) {
        true => Ok(bytes),
        false => Err(std::io::Error::new(std::io::ErrorKind::NotFound, "it was recycled while it was read")),
    }
}

/// Reads a whole segment file and decodes it. `carry` is the predecessor's, if it is at hand.
pub fn read_segment(
    path: &Path,
    segment: Segment,
    size: SegmentSize,
    system_id: SystemId,
    carry: Option<Carry>,
) -> Result<SegmentContent, WalReadError> {
    read_segment_into(Vec::new(), path, segment, size, system_id, carry)
}

/// The same into a buffer that was used before: memory that is fresh costs as much as what is read into it.
pub fn read_segment_into(
    buffer: Vec<u8>,
    path: &Path,
    segment: Segment,
    size: SegmentSize,
    system_id: SystemId,
    carry: Option<Carry>,
) -> Result<SegmentContent, WalReadError> {
    let bytes = read_and(path, buffer, || {}).map_err(|source| WalReadError::Io { path: path.to_owned(), source })?;
    let (found, expected) = (bytes.len() as u64, u64::from(size.bytes()));
    if found != expected {
        return Err(WalReadError::Length { path: path.to_owned(), found, expected });
    }
    let place =
        SegmentPlace { start: segment.start(size), size, timeline: segment.timeline, system_id: Some(system_id) };
    let mut digest = digest_segment(place, carry, COMMIT_SPACING, &bytes)
        .map_err(|source| WalReadError::Foreign { path: path.to_owned(), source })?;
    if let Some(found) = digest.system_id.filter(|found| *found != system_id) {
        return Err(WalReadError::System { path: path.to_owned(), found, expected: system_id });
    }
    let suspicion = suspicion(&digest);
    let facts = facts_of(&mut digest);
    Ok(SegmentContent { bytes, facts, carry: digest.carry, suspicion })
}

/// What leads into the next segment, from the content of this one alone.
pub fn read_carry(content: &[u8], segment: Segment, size: SegmentSize, system_id: SystemId) -> Option<Carry> {
    let place =
        SegmentPlace { start: segment.start(size), size, timeline: segment.timeline, system_id: Some(system_id) };
    digest_segment(place, None, COMMIT_SPACING, content).ok()?.carry
}

/// What is odd about a segment that Postgres calls finished.
pub fn suspicion(digest: &SegmentDigest) -> Option<String> {
    match digest.end {
        SegmentEnd::Broken(reason) => Some(format!("its records end at byte {}: {reason:?}", digest.valid_bytes)),
        SegmentEnd::MoreToCome => Some("its records end before the segment".to_owned()),
        _ => None,
    }
}

pub fn facts_of(digest: &mut SegmentDigest) -> SegmentFacts {
    let point = |lsn, at_us| CommitPoint { lsn, at_us };
    SegmentFacts {
        valid_bytes: digest.valid_bytes,
        commits: digest.completions.iter().map(|c| point(c.end, c.at_us)).collect(),
        restore_points: digest
            .restore_points
            .iter()
            .map(|r| RestorePoint { name: r.name.clone(), point: point(r.end, r.at_us) })
            .collect(),
        changed_blocks: digest.changed_blocks.take().filter(|_| digest.end.is_complete()),
        wal_levels: digest.parameter_changes.iter().map(wal_level_change).collect(),
    }
}

/// What a change of settings means for the WAL around it: what can be recovered ends before the record before, where a target
/// still stops recovery before it comes to the change.
pub fn wal_level_change(change: &ParameterChange) -> WalLevelChange {
    match change.ends_archive_recovery() {
        true => WalLevelChange { at: change.previous, level: WalLevelClass::Minimal },
        false => WalLevelChange { at: change.end, level: WalLevelClass::Replica },
    }
}

/// A history file: a few lines, never more than a page or two. `None` if it is not there.
pub async fn read_small(data_dir: &Path, name: &str) -> Result<Option<Vec<u8>>, WalReadError> {
    const LIMIT: u64 = 1 << 20;
    let path = data_dir.join("pg_wal").join(name);
    let read = tokio::task::spawn_blocking(move || {
        let io = |source| WalReadError::Io { path: path.clone(), source };
        let found = match std::fs::metadata(&path) {
            Ok(found) => found.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        };
        if found == 0 || found > LIMIT {
            return Err(WalReadError::Length { path: path.clone(), found, expected: LIMIT });
        }
        std::fs::read(&path).map(Some).map_err(io)
    });
    read.await.unwrap_or_else(|_| Err(WalReadError::Name { name: name.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_that_is_recycled_while_it_is_read_is_not_there_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("000000010000000000000001");
        let recycled = folder.path().join("000000010000000000000009");
        std::fs::write(&path, "first").unwrap();
        assert_eq!(read_in_place(&path).unwrap(), b"first");
        let gone = read_and(&path, Vec::new(), || std::fs::rename(&path, &recycled).unwrap());
        assert_eq!(gone.unwrap_err().kind(), std::io::ErrorKind::NotFound);
        let replaced = read_and(&recycled, b"used before".to_vec(), || {
            std::fs::rename(&recycled, &path).unwrap();
            std::fs::write(&recycled, "another").unwrap();
        });
        assert_eq!(replaced.unwrap_err().kind(), std::io::ErrorKind::NotFound);
    }

    #[test]
    fn every_name_that_postgres_archives_is_told_apart() {
        let size = SegmentSize::DEFAULT;
        let parse = |name: &str| WalFile::parse(name, size);
        let segment = Segment { timeline: Timeline(1), number: 2 };
        assert_eq!(parse("000000010000000000000002").unwrap(), WalFile::Segment(segment));
        assert_eq!(parse("000000010000000000000002.partial").unwrap(), WalFile::Partial(segment));
        assert_eq!(parse("000000010000000000000002.00000028.backup").unwrap(), WalFile::BackupHistory(segment, 0x28));
        assert_eq!(parse("0000000A.history").unwrap(), WalFile::History(Timeline(10)));
        for bad in ["", "x", "../000000010000000000000002", "000000010000000000000002.tmp", "RECOVERYXLOG"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
