//! WAL segments as stored: sealed content with what can be known without reading it.

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as wire;

use crate::checksum::crc32c_append;
use crate::crypto::{ContentHasher, DomainKey};
use crate::format::changed_blocks::{ChangedBlocks, ChangedBlocksError};
use crate::format::clear::ObjectKind;
use crate::format::manifest::{ManifestError, branch_from_wire};
use crate::format::sealed::{Compressor, Decompressor, FramePlace, SealedError, SealedObject, SealedWriter};
use crate::ids::ChunkId;
use crate::layout::WalLevelClass;
use crate::postgres::{Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};

/// Content is sealed in frames of this size, so that a 1 GiB segment can be opened in parallel and in little memory.
pub const CONTENT_FRAME_BYTES: u32 = 1 << 20;

/// What an object takes beside its content.
const ROOM_BESIDE: usize = 4096;

/// Commits closer together than this are thinned; the first and the last of a segment always stay, and the last one that is
/// recovered where `wal_level` goes to `minimal` behind it.
const COMMIT_RESOLUTION_US: i64 = 100_000;

/// A commit (or abort) record: the end of the record, and the time in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CommitPoint {
    pub lsn: Lsn,
    /// Microseconds since the Unix epoch.
    pub at_us: i64,
}

/// A record of pg_create_restore_point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RestorePoint {
    pub name: String,
    pub point: CommitPoint,
}

/// A record of XLOG_PARAMETER_CHANGE: the server began with this `wal_level`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalLevelChange {
    /// As [`crate::layout::WalLevelName::at`].
    pub at: Lsn,
    pub level: WalLevelClass,
}

/// What decoding a segment's records told.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct SegmentFacts {
    /// Up to the end of the last valid record; what lies behind is stale or zero.
    pub valid_bytes: u32,
    /// In WAL order.
    pub commits: Vec<CommitPoint>,
    pub restore_points: Vec<RestorePoint>,
    /// What backups need not read if it is not among this; `None`: unknown.
    pub changed_blocks: Option<ChangedBlocks>,
    /// In WAL order.
    pub wal_levels: Vec<WalLevelChange>,
}

/// The directory of a stored segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SegmentDirectory {
    pub wal: WalBranch,
    pub segment: Segment,
    pub segment_size: SegmentSize,
    pub valid_bytes: u32,
    /// Keyed hash of the valid bytes: two writers compare by it.
    pub content_id: ChunkId,
    /// Of the valid bytes; `None`: not noted.
    pub content_crc: Option<u32>,
    pub predecessor: Option<ChunkId>,
    pub content: Vec<FramePlace>,
    pub commit_times: Option<FramePlace>,
    /// `None`: unknown.
    pub changed_blocks: Option<FramePlace>,
    pub member: String,
    pub shipped_at_us: i64,
    pub first_commit: Option<CommitPoint>,
    pub last_commit: Option<CommitPoint>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SegmentError {
    #[error("wal segment: {0}")]
    Sealed(#[from] SealedError),
    #[error("wal segment: its directory does not read: {0}")]
    Directory(String),
    #[error("wal segment holds {found}, expected {expected}")]
    Identity { found: String, expected: String },
    #[error("wal segment: its content does not match its content id")]
    Content,
    #[error("wal segment: {0}")]
    ChangedBlocks(#[from] ChangedBlocksError),
    #[error("{bytes} valid bytes do not fit a segment of {size}")]
    ValidBytes { bytes: u32, size: u32 },
}

/// What the writer of a segment knows.
pub struct SegmentUpload<'a> {
    pub wal: WalBranch,
    pub segment: Segment,
    pub segment_size: SegmentSize,
    /// The whole segment file.
    pub content: &'a [u8],
    pub facts: &'a SegmentFacts,
    pub predecessor: Option<ChunkId>,
    pub member: &'a str,
    pub shipped_at_us: i64,
}

impl SegmentUpload<'_> {
    fn valid(&self) -> Result<&[u8], SegmentError> {
        let bad = SegmentError::ValidBytes { bytes: self.facts.valid_bytes, size: self.segment_size.bytes() };
        self.content.get(..self.facts.valid_bytes as usize).ok_or(bad)
    }

    /// The object's bytes, in `buffer`, and its directory. `key` is the object's key in the repository.
    pub fn seal(
        &self,
        domain: &DomainKey,
        key: &str,
        zstd: &mut Compressor,
        mut buffer: Vec<u8>,
    ) -> Result<(Bytes, SegmentDirectory), SegmentError> {
        buffer.clear();
        buffer.reserve(self.valid()?.len() / 2 + ROOM_BESIDE);
        SegmentSealer::begin(domain, key, buffer)?.finish(self, domain, zstd)
    }
}

/// Seals a segment frame by frame while it comes.
pub struct SegmentSealer {
    writer: SealedWriter,
    content: Vec<FramePlace>,
    hasher: ContentHasher,
    crc: u32,
}

impl SegmentSealer {
    /// `buffer`: best as large as the object may come to be.
    pub fn begin(domain: &DomainKey, key: &str, buffer: Vec<u8>) -> Result<SegmentSealer, SegmentError> {
        let writer = SealedWriter::in_buffer(domain, ObjectKind::Segment, Some(key), buffer)?;
        Ok(SegmentSealer { writer, content: Vec::new(), hasher: domain.content_hasher(), crc: 0 })
    }

    /// Up to where content was sealed.
    pub fn sealed(&self) -> usize {
        self.content.len() * CONTENT_FRAME_BYTES as usize
    }

    /// Seals the whole frames of this beginning of the segment; all of it must be valid.
    pub fn push(&mut self, valid: &[u8], zstd: &mut Compressor) -> Result<(), SegmentError> {
        let behind = valid.get(self.sealed()..).unwrap_or_default();
        for frame in behind.chunks_exact(CONTENT_FRAME_BYTES as usize) {
            self.push_frame(frame, zstd)?;
        }
        Ok(())
    }

    fn push_frame(&mut self, frame: &[u8], zstd: &mut Compressor) -> Result<(), SegmentError> {
        self.hasher.update(frame);
        self.crc = crc32c_append(self.crc, frame);
        self.content.push(self.writer.push(frame, zstd)?);
        Ok(())
    }

    /// Seals the rest. What was sealed before must be the beginning of the upload's valid content.
    pub fn finish(
        mut self,
        upload: &SegmentUpload<'_>,
        domain: &DomainKey,
        zstd: &mut Compressor,
    ) -> Result<(Bytes, SegmentDirectory), SegmentError> {
        let valid = upload.valid()?;
        self.push(valid, zstd)?;
        let rest = valid.get(self.sealed()..).ok_or(SegmentError::Content)?;
        if !rest.is_empty() {
            self.push_frame(rest, zstd)?;
        }
        debug_assert_eq!(self.hasher.id(), domain.chunk_id(valid));
        let SegmentSealer { mut writer, content, hasher, crc } = self;
        let facts = upload.facts;
        // The times come last, so that one small read of the object's end brings them with the directory.
        let changes = facts.changed_blocks.as_ref().map(|changes| writer.push(&changes.encode(), zstd));
        let changed_blocks = changes.transpose()?;
        let times = encode_commit_times(upload.segment.start(upload.segment_size), facts);
        let commit_times = times.map(|times| writer.push(&times, zstd)).transpose()?;
        let directory = SegmentDirectory {
            wal: upload.wal,
            segment: upload.segment,
            segment_size: upload.segment_size,
            valid_bytes: facts.valid_bytes,
            content_id: hasher.id(),
            content_crc: Some(crc),
            predecessor: upload.predecessor,
            content,
            commit_times,
            changed_blocks,
            member: upload.member.to_owned(),
            shipped_at_us: upload.shipped_at_us,
            first_commit: facts.commits.first().copied(),
            last_commit: facts.commits.last().copied(),
        };
        let bytes = writer.finish(&directory.to_wire().encode_to_vec(), zstd)?;
        Ok((bytes, directory))
    }
}

impl SegmentDirectory {
    fn to_wire(&self) -> wire::SegmentDirectory {
        let point = |p: &CommitPoint| wire::CommitPoint { lsn: p.lsn.0, at_us: p.at_us };
        wire::SegmentDirectory {
            system_identifier: self.wal.system_id.0,
            timeline: self.wal.timeline.0,
            branch: Bytes::copy_from_slice(&self.wal.branch.0),
            start_lsn: self.segment.start(self.segment_size).0,
            segment_bytes: self.segment_size.bytes(),
            valid_bytes: self.valid_bytes,
            content_id: Bytes::copy_from_slice(&self.content_id.0),
            predecessor_content_id: self.predecessor.map_or_else(Bytes::new, |id| Bytes::copy_from_slice(&id.0)),
            content: self.content.iter().map(frame_to_wire).collect(),
            content_frame_bytes: CONTENT_FRAME_BYTES,
            commit_times: self.commit_times.as_ref().map(frame_to_wire),
            changed_blocks: self.changed_blocks.as_ref().map(frame_to_wire),
            member: self.member.clone(),
            shipped_at_us: self.shipped_at_us,
            first_commit: self.first_commit.as_ref().map(point),
            last_commit: self.last_commit.as_ref().map(point),
            content_crc32c: self.content_crc,
        }
    }

    /// Decodes a directory and checks that it is the one expected under its name.
    pub fn decode(bytes: &[u8], wal: WalBranch, segment: Segment) -> Result<SegmentDirectory, SegmentError> {
        let bad = |reason: String| SegmentError::Directory(reason);
        let d = wire::SegmentDirectory::decode(bytes).map_err(|e| bad(e.to_string()))?;
        let segment_size = SegmentSize::new(u64::from(d.segment_bytes)).map_err(|e| bad(e.to_string()))?;
        let found = WalBranch {
            system_id: SystemId(d.system_identifier),
            timeline: Timeline::new(d.timeline).map_err(|e| bad(e.to_string()))?,
            branch: branch_from_wire(&d.branch).map_err(|e: ManifestError| bad(e.to_string()))?,
        };
        let at =
            |wal: WalBranch, lsn: Lsn| format!("{}-{} at {lsn} of system {}", wal.timeline, wal.branch, wal.system_id);
        let expected_start = segment.start(segment_size);
        if found != wal || segment.timeline != wal.timeline || expected_start != Lsn(d.start_lsn) {
            return Err(SegmentError::Identity {
                found: at(found, Lsn(d.start_lsn)),
                expected: at(wal, expected_start),
            });
        }
        if d.valid_bytes > segment_size.bytes() {
            return Err(SegmentError::ValidBytes { bytes: d.valid_bytes, size: segment_size.bytes() });
        }
        let id = |bytes: &[u8]| ChunkId::from_slice(bytes).map_err(|e| bad(e.to_string()));
        let point = |p: wire::CommitPoint| CommitPoint { lsn: Lsn(p.lsn), at_us: p.at_us };
        let content: Vec<FramePlace> = d.content.iter().map(frame_from_wire).collect();
        if content.iter().map(|frame| u64::from(frame.raw_len)).sum::<u64>() != u64::from(d.valid_bytes) {
            return Err(bad("its frames do not add up to its valid bytes".into()));
        }
        Ok(SegmentDirectory {
            wal,
            segment,
            segment_size,
            valid_bytes: d.valid_bytes,
            content_id: id(&d.content_id)?,
            content_crc: d.content_crc32c,
            predecessor: (!d.predecessor_content_id.is_empty()).then(|| id(&d.predecessor_content_id)).transpose()?,
            content,
            commit_times: d.commit_times.as_ref().map(frame_from_wire),
            changed_blocks: d.changed_blocks.as_ref().map(frame_from_wire),
            member: d.member,
            shipped_at_us: d.shipped_at_us,
            first_commit: d.first_commit.map(point),
            last_commit: d.last_commit.map(point),
        })
    }
}

/// Opens a whole segment object frame by frame into `sink`, and pads it with zeros to the segment's size. What was sunk counts
/// only once this returns: the last thing it does is to compare the content with its checksum or id.
pub fn unpack_segment(
    bytes: &Bytes,
    domain: &DomainKey,
    key: &str,
    (wal, segment): (WalBranch, Segment),
    mut sink: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<SegmentDirectory, UnpackError> {
    let object =
        SealedObject::open(bytes.clone(), domain, ObjectKind::Segment, Some(key)).map_err(SegmentError::from)?;
    let directory = SegmentDirectory::decode(&object.directory, wal, segment)?;
    let (mut check, mut decompressor) = (ContentCheck::of(&directory, domain), Decompressor::new());
    let (mut stored, mut plain) = (Vec::new(), Vec::new());
    for frame in &directory.content {
        plain.clear();
        object.frame_into(*frame, &mut stored, &mut plain, &mut decompressor).map_err(SegmentError::from)?;
        check.update(&plain);
        sink(&plain)?;
    }
    check.finish()?;
    plain.clear();
    plain.resize(CONTENT_FRAME_BYTES as usize, 0);
    let mut padding = (directory.segment_size.bytes() - directory.valid_bytes) as usize;
    while padding > 0 {
        let zeros = plain.get(..padding).unwrap_or(&plain);
        sink(zeros)?;
        padding -= zeros.len();
    }
    Ok(directory)
}

/// Compares unpacked content with what its directory says. Its frames are authenticated: what this finds is a fault of memory
/// or of a program, the writer's or ours, for which the checksum does as well as the id and is much less work.
enum ContentCheck {
    Crc { found: u32, expected: u32 },
    Id { found: Box<ContentHasher>, expected: ChunkId },
}

impl ContentCheck {
    fn of(directory: &SegmentDirectory, domain: &DomainKey) -> ContentCheck {
        match directory.content_crc {
            Some(expected) => ContentCheck::Crc { found: 0, expected },
            None => ContentCheck::Id { found: Box::new(domain.content_hasher()), expected: directory.content_id },
        }
    }

    fn update(&mut self, plain: &[u8]) {
        match self {
            ContentCheck::Crc { found, .. } => *found = crc32c_append(*found, plain),
            ContentCheck::Id { found, .. } => found.update(plain),
        }
    }

    fn finish(&self) -> Result<(), SegmentError> {
        let is_it = match self {
            ContentCheck::Crc { found, expected } => found == expected,
            ContentCheck::Id { found, expected } => found.id() == *expected,
        };
        if is_it { Ok(()) } else { Err(SegmentError::Content) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error("write it: {0}")]
    Sink(#[from] std::io::Error),
}

/// Opens a whole segment object: its directory and its content, padded with zeros to the segment's size.
pub fn open_segment(
    bytes: Bytes,
    domain: &DomainKey,
    key: &str,
    wal: WalBranch,
    segment: Segment,
) -> Result<(SegmentDirectory, Vec<u8>), SegmentError> {
    let object = SealedObject::open(bytes, domain, ObjectKind::Segment, Some(key))?;
    let directory = SegmentDirectory::decode(&object.directory, wal, segment)?;
    let mut content = Vec::with_capacity(directory.segment_size.bytes() as usize);
    for frame in &directory.content {
        content.extend_from_slice(&object.frame(*frame)?);
    }
    if domain.chunk_id(&content) != directory.content_id {
        return Err(SegmentError::Content);
    }
    content.resize(directory.segment_size.bytes() as usize, 0);
    Ok((directory, content))
}

pub(super) fn frame_to_wire(frame: &FramePlace) -> wire::Frame {
    wire::Frame { offset: frame.offset, stored_len: frame.stored_len, raw_len: frame.raw_len }
}

pub(super) fn frame_from_wire(frame: &wire::Frame) -> FramePlace {
    FramePlace { offset: frame.offset, stored_len: frame.stored_len, raw_len: frame.raw_len }
}

/// Nothing if there is neither a commit nor a restore point.
pub(super) fn encode_commit_times(start: Lsn, facts: &SegmentFacts) -> Option<Vec<u8>> {
    if facts.commits.is_empty() && facts.restore_points.is_empty() {
        return None;
    }
    let mut times = wire::CommitTimes::default();
    let (mut last_lsn, mut last_us) = (start.0, 0i64);
    let end = facts.commits.len().saturating_sub(1);
    for (index, commit) in facts.commits.iter().enumerate() {
        let near = commit.at_us.abs_diff(last_us) < COMMIT_RESOLUTION_US.unsigned_abs();
        let next = facts.commits.get(index + 1).map_or(Lsn(u64::MAX), |next| next.lsn);
        let is_last_of_level = facts.wal_levels.iter().any(|change| commit.lsn <= change.at && change.at < next);
        if near && index != 0 && index != end && !is_last_of_level {
            continue;
        }
        let Ok(delta) = u32::try_from(commit.lsn.0.saturating_sub(last_lsn)) else { continue };
        times.lsn_deltas.push(delta);
        times.time_deltas_us.push(commit.at_us.wrapping_sub(last_us));
        (last_lsn, last_us) = (commit.lsn.0, commit.at_us);
    }
    times.restore_points = facts
        .restore_points
        .iter()
        .map(|r| wire::RestorePoint {
            name: r.name.clone(),
            point: Some(wire::CommitPoint { lsn: r.point.lsn.0, at_us: r.point.at_us }),
        })
        .collect();
    Some(times.encode_to_vec())
}

/// Decodes the commit-times sidecar of the segment that starts at `start`.
pub fn decode_commit_times(start: Lsn, bytes: &[u8]) -> Result<(Vec<CommitPoint>, Vec<RestorePoint>), SegmentError> {
    let times = wire::CommitTimes::decode(bytes).map_err(|e| SegmentError::Directory(e.to_string()))?;
    let (mut lsn, mut at_us) = (start.0, 0i64);
    let commits = times
        .lsn_deltas
        .iter()
        .zip(&times.time_deltas_us)
        .map(|(lsn_delta, time_delta)| {
            lsn = lsn.saturating_add(u64::from(*lsn_delta));
            at_us = at_us.wrapping_add(*time_delta);
            CommitPoint { lsn: Lsn(lsn), at_us }
        })
        .collect();
    let points = times
        .restore_points
        .into_iter()
        .map(|r| {
            let point = r.point.unwrap_or_default();
            RestorePoint { name: r.name, point: CommitPoint { lsn: Lsn(point.lsn), at_us: point.at_us } }
        })
        .collect();
    Ok((commits, points))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::Branch;

    fn commit(lsn: u64, at_us: i64) -> CommitPoint {
        CommitPoint { lsn: Lsn(lsn), at_us }
    }

    #[test]
    fn a_segment_sealed_while_it_comes_is_the_one_sealed_at_once() {
        let key = DomainKey::generate().unwrap();
        let wal = WalBranch { system_id: SystemId(9), timeline: Timeline(1), branch: Branch::ROOT };
        let (size, segment) = (SegmentSize::new(4 << 20).unwrap(), Segment { timeline: Timeline(1), number: 3 });
        let content: Vec<u8> = (0..4u32 << 20).map(|at| (at / 7 % 251) as u8).collect();
        let mut zstd = Compressor::new(3);
        for valid_bytes in [4 << 20, (3 << 20) + 5, 2 << 20] {
            let facts = SegmentFacts { valid_bytes, ..SegmentFacts::default() };
            let upload = SegmentUpload {
                wal,
                segment,
                segment_size: size,
                content: &content,
                facts: &facts,
                predecessor: None,
                member: "pg1",
                shipped_at_us: 5,
            };
            let mut coming = SegmentSealer::begin(&key, "k", Vec::new()).unwrap();
            for received in [5, 1 << 20, (1 << 20) + 1, 2 << 20] {
                coming.push(&content[..received], &mut zstd).unwrap();
                assert_eq!(coming.sealed(), received >> 20 << 20);
            }
            let (bytes, directory) = coming.finish(&upload, &key, &mut zstd).unwrap();
            let (_, at_once) = upload.seal(&key, "k", &mut zstd, Vec::new()).unwrap();
            assert_eq!(directory, at_once);
            let (_, opened) = open_segment(bytes, &key, "k", wal, segment).unwrap();
            assert_eq!(opened[..valid_bytes as usize], content[..valid_bytes as usize]);
        }
    }

    /// A segment of two frames whose directory says what `change` makes of it, unpacked.
    fn unpacked(content: &[u8], change: impl Fn(&mut SegmentDirectory)) -> Result<Vec<u8>, UnpackError> {
        let key = DomainKey::generate().unwrap();
        let wal = WalBranch { system_id: SystemId(9), timeline: Timeline(1), branch: Branch::ROOT };
        let segment = Segment { timeline: Timeline(1), number: 3 };
        let facts = SegmentFacts { valid_bytes: content.len() as u32 - 9, ..SegmentFacts::default() };
        let upload = SegmentUpload {
            wal,
            segment,
            segment_size: SegmentSize::new(content.len() as u64).unwrap(),
            content,
            facts: &facts,
            predecessor: None,
            member: "pg1",
            shipped_at_us: 5,
        };
        let mut zstd = Compressor::new(3);
        let (_, mut directory) = upload.seal(&key, "k", &mut zstd, Vec::new()).unwrap();
        let mut writer = SealedWriter::new(&key, ObjectKind::Segment, Some("k"), 0).unwrap();
        for frame in upload.valid().unwrap().chunks(CONTENT_FRAME_BYTES as usize) {
            writer.push(frame, &mut zstd).unwrap();
        }
        change(&mut directory);
        let bytes = writer.finish(&directory.to_wire().encode_to_vec(), &mut zstd).unwrap();
        let mut found = Vec::new();
        unpack_segment(&bytes, &key, "k", (wal, segment), |piece| {
            found.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn what_unpacks_is_compared_with_its_checksum_or_else_with_its_id() {
        let mut content: Vec<u8> = (0..2u32 << 20).map(|at| (at / 5 % 253) as u8).collect();
        let valid = content.len() - 9;
        content[valid..].fill(0);
        type Change = fn(&mut SegmentDirectory);
        let kept: [Change; 2] = [|_| {}, |directory| directory.content_crc = None];
        for change in kept {
            assert!(unpacked(&content, change).unwrap() == content);
        }
        let refused: [Change; 2] = [
            |directory| directory.content_crc = directory.content_crc.map(|crc| crc ^ 1),
            |directory| (directory.content_crc, directory.content_id) = (None, ChunkId([3; 32])),
        ];
        for change in refused {
            let error = unpacked(&content, change).unwrap_err();
            assert!(matches!(error, UnpackError::Segment(SegmentError::Content)), "{error}");
        }
    }

    #[test]
    fn a_segment_comes_back_whole_with_its_times() {
        let key = DomainKey::generate().unwrap();
        let wal = WalBranch { system_id: SystemId(9), timeline: Timeline(1), branch: Branch::ROOT };
        let size = SegmentSize::new(1 << 20).unwrap();
        let segment = Segment { timeline: Timeline(1), number: 3 };
        let mut content = vec![0xAB; 1 << 20];
        content[700_000..].fill(0x77);
        let start = segment.start(size).0;
        let facts = SegmentFacts {
            valid_bytes: 700_000,
            commits: vec![commit(start + 10, 1_000_000), commit(start + 20, 1_050_000), commit(start + 30, 1_060_000)],
            restore_points: vec![RestorePoint { name: "before".into(), point: commit(start + 25, 1_055_000) }],
            changed_blocks: Some(ChangedBlocks::default()),
            wal_levels: Vec::new(),
        };
        let upload = SegmentUpload {
            wal,
            segment,
            segment_size: size,
            content: &content,
            facts: &facts,
            predecessor: None,
            member: "pg1",
            shipped_at_us: 5,
        };
        let (bytes, directory) = upload.seal(&key, "k", &mut Compressor::new(3), Vec::new()).unwrap();
        let (read, restored) = open_segment(bytes.clone(), &key, "k", wal, segment).unwrap();
        assert_eq!(read, directory);
        assert_eq!(&restored[..700_000], &content[..700_000]);
        assert!(restored[700_000..].iter().all(|b| *b == 0), "stale bytes do not travel");
        let object = SealedObject::open(bytes.clone(), &key, ObjectKind::Segment, Some("k")).unwrap();
        let times = object.frame(directory.commit_times.unwrap()).unwrap();
        let (commits, points) = decode_commit_times(segment.start(size), &times).unwrap();
        assert_eq!(commits, [facts.commits[0], facts.commits[2]], "thinned, but first and last stay");
        assert_eq!(points, facts.restore_points);
        assert!(open_segment(bytes, &key, "k", wal, segment.next()).is_err(), "not under another number");
    }
}
