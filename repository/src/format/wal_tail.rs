//! Pieces of a segment that is not finished yet, as stored: what makes the newest second restorable.
//!
//! A piece says what the segment's bytes were before it and are with it, by keyed hashes, so that pieces are only ever put
//! together as they were received.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as wire;

use crate::crypto::DomainKey;
use crate::format::clear::ObjectKind;
use crate::format::manifest::{ManifestError, branch_from_wire};
use crate::format::sealed::{Compressor, FramePlace, SealedObject, SealedWriter};
use crate::format::wal_segment::{
    CONTENT_FRAME_BYTES, CommitPoint, RestorePoint, SegmentError, SegmentFacts, decode_commit_times,
    encode_commit_times, frame_from_wire, frame_to_wire,
};
use crate::ids::ChunkId;
use crate::layout::TailName;
use crate::postgres::{Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};

/// What the writer of a piece knows.
pub struct TailUpload<'a> {
    pub wal: WalBranch,
    pub segment: Segment,
    pub segment_size: SegmentSize,
    /// Where it lies in the segment: `from` and `to` by these.
    pub name: &'a TailName,
    /// Of the segment's bytes before it, and with it.
    pub before: ChunkId,
    pub after: ChunkId,
    pub bytes: &'a [u8],
    /// Of the records that end in it; `valid_bytes` is where the last whole record before its end does, from the segment's
    /// start.
    pub facts: &'a SegmentFacts,
    pub shipped_at_us: i64,
    /// The server's clock when it said that it had no more WAL than this.
    pub complete_at_us: Option<i64>,
}

/// The directory of a stored piece.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TailDirectory {
    pub name: TailName,
    pub before: ChunkId,
    pub after: ChunkId,
    pub records_end: u32,
    pub shipped_at_us: i64,
    pub first_commit: Option<CommitPoint>,
    pub last_commit: Option<CommitPoint>,
    pub complete_at_us: Option<i64>,
    content: Vec<FramePlace>,
    pub(crate) commit_times: Option<FramePlace>,
}

/// A piece, opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TailPiece {
    pub directory: TailDirectory,
    pub bytes: Vec<u8>,
    pub commits: Vec<CommitPoint>,
    pub restore_points: Vec<RestorePoint>,
}

impl TailUpload<'_> {
    /// The object's bytes. `key` is its key in the repository.
    pub fn seal(&self, domain: &DomainKey, key: &str, zstd: &mut Compressor) -> Result<Bytes, SegmentError> {
        let length = self.name.to.checked_sub(self.name.from);
        if length.map(|length| length as usize) != Some(self.bytes.len()) || self.name.to > self.segment_size.bytes() {
            return Err(SegmentError::Directory(format!("{} is no piece of {} bytes", self.name, self.bytes.len())));
        }
        let mut writer = SealedWriter::new(domain, ObjectKind::Tail, Some(key), self.bytes.len() / 2 + 1024)?;
        let frames = self.bytes.chunks(CONTENT_FRAME_BYTES as usize);
        let content = frames.map(|frame| writer.push(frame, zstd)).collect::<Result<Vec<_>, _>>()?;
        let times = encode_commit_times(self.segment.start(self.segment_size), self.facts);
        let commit_times = times.map(|times| writer.push(&times, zstd)).transpose()?;
        let point = |p: &CommitPoint| wire::CommitPoint { lsn: p.lsn.0, at_us: p.at_us };
        let directory = wire::TailDirectory {
            system_identifier: self.wal.system_id.0,
            timeline: self.wal.timeline.0,
            branch: Bytes::copy_from_slice(&self.wal.branch.0),
            start_lsn: self.segment.start(self.segment_size).0,
            segment_bytes: self.segment_size.bytes(),
            from: self.name.from,
            to: self.name.to,
            before_id: Bytes::copy_from_slice(&self.before.0),
            content_id: Bytes::copy_from_slice(&self.after.0),
            content: content.iter().map(frame_to_wire).collect(),
            content_frame_bytes: CONTENT_FRAME_BYTES,
            commit_times: commit_times.as_ref().map(frame_to_wire),
            records_end: self.facts.valid_bytes,
            member: self.name.member.clone(),
            shipped_at_us: self.shipped_at_us,
            first_commit: self.facts.commits.first().map(point),
            last_commit: self.facts.commits.last().map(point),
            complete_at_us: self.complete_at_us.unwrap_or(0),
        };
        Ok(writer.finish(&directory.encode_to_vec(), zstd)?)
    }
}

impl TailDirectory {
    /// Decodes a directory and checks that it is the one expected under its name.
    pub fn decode(
        bytes: &[u8],
        wal: WalBranch,
        (segment, size): (Segment, SegmentSize),
        name: &TailName,
    ) -> Result<TailDirectory, SegmentError> {
        let bad = |reason: String| SegmentError::Directory(reason);
        let d = wire::TailDirectory::decode(bytes).map_err(|e| bad(e.to_string()))?;
        let found = WalBranch {
            system_id: SystemId(d.system_identifier),
            timeline: Timeline::new(d.timeline).map_err(|e| bad(e.to_string()))?,
            branch: branch_from_wire(&d.branch).map_err(|e: ManifestError| bad(e.to_string()))?,
        };
        let found_name = TailName { from: d.from, to: d.to, member: d.member };
        let start = segment.start(size);
        if found != wal || Lsn(d.start_lsn) != start || d.segment_bytes != size.bytes() || found_name != *name {
            let at = |wal: WalBranch, lsn: Lsn, name: &TailName| {
                format!("{}-{} at {lsn}, {name} of system {}", wal.timeline, wal.branch, wal.system_id)
            };
            return Err(SegmentError::Identity {
                found: at(found, Lsn(d.start_lsn), &found_name),
                expected: at(wal, start, name),
            });
        }
        if d.records_end > d.to {
            return Err(SegmentError::ValidBytes { bytes: d.records_end, size: d.to });
        }
        let content: Vec<FramePlace> = d.content.iter().map(frame_from_wire).collect();
        if content.iter().map(|frame| u64::from(frame.raw_len)).sum::<u64>() != u64::from(name.to - name.from) {
            return Err(bad("its frames do not add up to its bytes".into()));
        }
        let id = |bytes: &[u8]| ChunkId::from_slice(bytes).map_err(|e| bad(e.to_string()));
        let point = |p: wire::CommitPoint| CommitPoint { lsn: Lsn(p.lsn), at_us: p.at_us };
        Ok(TailDirectory {
            name: found_name,
            before: id(&d.before_id)?,
            after: id(&d.content_id)?,
            records_end: d.records_end,
            shipped_at_us: d.shipped_at_us,
            first_commit: d.first_commit.map(point),
            last_commit: d.last_commit.map(point),
            complete_at_us: (d.complete_at_us != 0).then_some(d.complete_at_us),
            content,
            commit_times: d.commit_times.as_ref().map(frame_from_wire),
        })
    }
}

/// Opens a whole piece.
pub fn open_tail(
    bytes: Bytes,
    domain: &DomainKey,
    key: &str,
    wal: WalBranch,
    (segment, size): (Segment, SegmentSize),
    name: &TailName,
) -> Result<TailPiece, SegmentError> {
    let object = SealedObject::open(bytes, domain, ObjectKind::Tail, Some(key))?;
    let directory = TailDirectory::decode(&object.directory, wal, (segment, size), name)?;
    let mut content = Vec::with_capacity((name.to - name.from) as usize);
    for frame in &directory.content {
        content.extend_from_slice(&object.frame(*frame)?);
    }
    let (commits, restore_points) = match directory.commit_times {
        Some(frame) => decode_commit_times(segment.start(size), &object.frame(frame)?)?,
        None => (Vec::new(), Vec::new()),
    };
    Ok(TailPiece { directory, bytes: content, commits, restore_points })
}

/// Where pieces of a member end that follow each other from the segment's start, by names: how many it takes to there, and
/// the last of them.
pub(crate) fn reached<'a>(
    names: impl Iterator<Item = &'a TailName>,
) -> BTreeMap<(&'a str, u32), (usize, &'a TailName)> {
    let mut pieces: Vec<&TailName> = names.collect();
    pieces.sort_unstable();
    let mut reached: BTreeMap<(&str, u32), (usize, &TailName)> = BTreeMap::new();
    for piece in pieces {
        let member = piece.member.as_str();
        let steps = match piece.from {
            0 => 1,
            from => match reached.get(&(member, from)) {
                Some((steps, _)) => steps + 1,
                None => continue,
            },
        };
        let known = reached.entry((member, piece.to)).or_insert((steps, piece));
        if steps < known.0 {
            *known = (steps, piece);
        }
    }
    reached
}

/// The pieces of one member that follow each other from the segment's start, as far as they go: what the names say. Of
/// several ways there the one of fewest pieces.
pub fn chain<'a>(names: &'a [TailName], member: &str) -> Vec<&'a TailName> {
    let reached = reached(names.iter().filter(|name| name.member == member));
    let mut chain = Vec::new();
    let mut end = reached.last_key_value().map_or(0, |((_, end), _)| *end);
    while let Some((_, piece)) = reached.get(&(member, end)) {
        chain.push(*piece);
        end = piece.from;
    }
    chain.reverse();
    chain
}

/// The chain that goes farthest; of several the one of the first member by name.
pub fn longest_chain(names: &[TailName]) -> Vec<&TailName> {
    let members: BTreeSet<&str> = names.iter().map(|name| name.member.as_str()).collect();
    let chains = members.into_iter().rev().map(|member| chain(names, member));
    chains.max_by_key(|chain| chain.last().map_or(0, |last| last.to)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::Branch;

    fn name(from: u32, to: u32, member: &str) -> TailName {
        TailName { from, to, member: member.to_owned() }
    }

    #[test]
    fn a_piece_comes_back_under_its_own_name_only() {
        let key = DomainKey::generate().unwrap();
        let wal = WalBranch { system_id: SystemId(9), timeline: Timeline(1), branch: Branch::ROOT };
        let (segment, size) = (Segment { timeline: Timeline(1), number: 3 }, SegmentSize::new(1 << 20).unwrap());
        let (before, bytes, piece) = (vec![1u8; 100], vec![2u8; 50], name(100, 150, "pg1"));
        let mut hasher = key.content_hasher();
        hasher.update(&before);
        let begun = hasher.id();
        hasher.update(&bytes);
        assert_eq!(begun, key.chunk_id(&before));
        let start = segment.start(size).0;
        let commits =
            vec![CommitPoint { lsn: Lsn(start + 120), at_us: 5 }, CommitPoint { lsn: Lsn(start + 144), at_us: 6 }];
        let upload = TailUpload {
            wal,
            segment,
            segment_size: size,
            name: &piece,
            before: begun,
            after: hasher.id(),
            bytes: &bytes,
            facts: &SegmentFacts { valid_bytes: 144, commits: commits.clone(), ..SegmentFacts::default() },
            shipped_at_us: 7,
            complete_at_us: Some(8),
        };
        let stored = upload.seal(&key, "k", &mut Compressor::new(3)).unwrap();
        let opened = open_tail(stored.clone(), &key, "k", wal, (segment, size), &piece).unwrap();
        assert_eq!((&opened.bytes, &opened.commits), (&bytes, &commits));
        assert_eq!((opened.directory.records_end, opened.directory.complete_at_us), (144, Some(8)));
        assert_eq!(opened.directory.after, key.chunk_id(&[before, bytes].concat()));
        for (segment, name) in
            [(segment.next(), piece.clone()), (segment, name(100, 150, "pg2")), (segment, name(99, 149, "pg1"))]
        {
            let refused = open_tail(stored.clone(), &key, "k", wal, (segment, size), &name);
            assert!(matches!(refused, Err(SegmentError::Identity { .. })), "{refused:?}");
        }
    }

    #[test]
    fn pieces_follow_each_other_and_the_ones_that_take_in_others_go_first() {
        let a = |from, to| name(from, to, "a");
        let names = [a(0, 10), a(10, 20), a(0, 20), a(20, 30), a(40, 50), name(0, 25, "b"), name(25, 28, "b")];
        assert_eq!(chain(&names, "a"), [&names[2], &names[3]], "what is behind a hole does not count");
        assert_eq!(longest_chain(&names), [&names[2], &names[3]]);
        assert_eq!(longest_chain(&names[5..]), [&names[5], &names[6]]);
        let again = [a(0, 20), a(20, 22), a(0, 15), a(15, 30), a(15, 20)];
        assert_eq!(chain(&again, "a"), [&again[2], &again[3]], "received twice and cut otherwise");
        assert!(longest_chain(&[a(5, 10)]).is_empty());
        assert!(longest_chain(&[]).is_empty());
    }
}
