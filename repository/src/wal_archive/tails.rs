//! The unfinished end of the WAL: pieces in, and the beginning of a segment put together out.
//!
//! Names find pieces; what is put together is checked link by link, so that no two servers' bytes are ever joined.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use futures::StreamExt;

use super::{ArchiveError, Archived, Strays, WalArchive, domain_for};
use crate::format::clear::ObjectKind;
use crate::format::wal_segment::{CommitPoint, RestorePoint, SegmentError, SegmentFacts};
use crate::format::wal_tail::{self, TailDirectory, TailPiece, TailUpload};
use crate::ids::ChunkId;
use crate::layout::{self, TailName};
use crate::postgres::{Segment, SegmentSize, WalBranch};
use crate::store::Creation;

/// Pieces read at once: mostly small, so latency counts.
const READS: usize = 16;

/// Of pieces that were looked at: a segment has some 45 that count.
const KNOWN_DIRECTORIES: usize = 1024;

/// A piece on its way into the archive.
#[derive(Clone, Debug)]
pub struct OwnedTail {
    pub wal: WalBranch,
    pub segment: Segment,
    pub segment_size: SegmentSize,
    pub name: TailName,
    pub before: ChunkId,
    pub after: ChunkId,
    pub bytes: Bytes,
    pub facts: SegmentFacts,
    pub shipped_at_us: i64,
    pub complete_at_us: Option<i64>,
}

/// The beginning of a segment, as far as pieces of it are there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Beginning {
    /// `[0, end)` of the segment.
    pub bytes: Vec<u8>,
    /// Where its last whole record ends.
    pub records_end: u32,
    pub member: String,
    pub commits: Vec<CommitPoint>,
    pub restore_points: Vec<RestorePoint>,
    pub pieces: usize,
}

/// As much of a segment as there is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unfinished {
    /// Padded with zeros to the segment's size.
    pub content: Vec<u8>,
    /// From here on it is padding.
    pub end: u32,
}

/// How far a member has a segment, and the id of all bytes up to there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mark {
    pub end: u32,
    pub content: ChunkId,
    pub member: String,
}

/// What is known of the beginning of a segment without its content.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BeginningFacts {
    /// Up to where the pieces go.
    pub end: u32,
    pub records_end: u32,
    /// Of the oldest and the newest piece that has one.
    pub first_commit: Option<CommitPoint>,
    pub last_commit: Option<CommitPoint>,
    /// The server's clock when it had no more WAL than this.
    pub complete_at_us: Option<i64>,
    pub member: String,
    /// Of the newest piece.
    pub shipped_at_us: i64,
}

impl WalArchive {
    /// Seals a piece; what it is called is part of what is sealed. Runs on the blocking pool.
    pub async fn seal_tail(&self, tail: OwnedTail) -> Result<(object_store::path::Path, Bytes), ArchiveError> {
        let key = layout::tail(&self.cluster, &tail.wal, (tail.segment, tail.segment_size), &tail.name);
        let (archive, name) = (self.clone(), key.to_string());
        let sealed = tokio::task::spawn_blocking(move || {
            let upload = TailUpload {
                wal: tail.wal,
                segment: tail.segment,
                segment_size: tail.segment_size,
                name: &tail.name,
                before: tail.before,
                after: tail.after,
                bytes: &tail.bytes,
                facts: &tail.facts,
                shipped_at_us: tail.shipped_at_us,
                complete_at_us: tail.complete_at_us,
            };
            archive.with_compressor(|zstd| upload.seal(archive.keys.newest(), &name, zstd))
        });
        let sealed = sealed.await.unwrap_or(Err(SegmentError::Content));
        match sealed {
            Ok(bytes) => Ok((key, bytes)),
            Err(source) => Err(ArchiveError::Segment { key: key.to_string(), source }),
        }
    }

    /// Stores a piece; returns once it is durable. A member that receives the same bytes again finds it there.
    pub async fn put_tail(&self, tail: OwnedTail) -> Result<Archived, ArchiveError> {
        let (wal, place, name, after) = (tail.wal, (tail.segment, tail.segment_size), tail.name.clone(), tail.after);
        self.note_levels(wal, &tail.facts.wal_levels, (&name.member, tail.shipped_at_us)).await?;
        let (key, bytes) = self.seal_tail(tail).await?;
        let stored_bytes = bytes.len() as u64;
        if self.store.create(&key, bytes).await? == Creation::Created {
            return Ok(Archived::Stored { stored_bytes });
        }
        // All of it: somebody who had it sealed before it was stored may have stored a part.
        let existing = self.clone().read_tail(wal, place, name.clone()).await?.directory;
        match existing.after == after {
            true => Ok(Archived::AlreadyThere),
            false => Err(ArchiveError::Diverged { name: key.to_string(), stored_by: name.member, content: after }),
        }
    }

    /// The segments of a branch that pieces are there of, ascending. Costs a request for some thousand segments.
    pub async fn begun_segments(&self, wal: WalBranch, size: SegmentSize) -> Result<Vec<Segment>, ArchiveError> {
        let level = self.store.list_level(&layout::tails(&self.cluster, &wal)).await?;
        let segment = |folder| layout::parse_tail_segment(&self.cluster, &wal, folder, size);
        let mut begun: Vec<Segment> = level.folders.iter().filter_map(segment).collect();
        begun.sort_unstable();
        Ok(begun)
    }

    /// The pieces of a segment.
    pub async fn tails(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<Vec<TailName>, ArchiveError> {
        let listed = self.store.list(&layout::segment_tails(&self.cluster, &wal, segment, size)).await?;
        let name = |key| layout::parse_tail(&self.cluster, &wal, (segment, size), key);
        Ok(listed.iter().filter_map(|object| name(&object.key)).collect())
    }

    /// How far the pieces of a segment go, by their names and the newest's directories; `None` if there are none.
    pub async fn beginning_facts(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<Option<BeginningFacts>, ArchiveError> {
        self.beginning_facts_without(wal, segment, size, &Strays::default()).await
    }

    /// The same without what is not the branch's own.
    pub async fn beginning_facts_without(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
        strays: &Strays,
    ) -> Result<Option<BeginningFacts>, ArchiveError> {
        let mut names = self.tails(wal, segment, size).await?;
        strays.sift(segment, size, &mut names);
        loop {
            let chain: Vec<TailName> = wal_tail::longest_chain(&names).into_iter().cloned().collect();
            let reads: Vec<_> =
                chain.iter().map(|name| self.clone().known_directory(wal, (segment, size), name.clone())).collect();
            let read: Vec<_> = futures::stream::iter(reads).buffered(READS).collect().await;
            let pieces = match self.all_readable(&chain, read)? {
                Ok(pieces) => pieces,
                Err(damaged) => {
                    names.retain(|name| !damaged.contains(name));
                    continue;
                }
            };
            // What does not follow would not be delivered either, and is not promised.
            let mut before = self.keys.newest().content_hasher().id();
            let stranger = pieces.iter().find(|piece| std::mem::replace(&mut before, piece.after) != piece.before);
            if let Some(stranger) = stranger {
                names.retain(|name| *name != stranger.name);
                continue;
            }
            return Ok(pieces.last().map(|last| BeginningFacts {
                end: last.name.to,
                records_end: pieces.iter().map(|piece| piece.records_end).max().unwrap_or_default(),
                first_commit: pieces.iter().find_map(|piece| piece.first_commit),
                last_commit: pieces.iter().rev().find_map(|piece| piece.last_commit),
                complete_at_us: last.complete_at_us,
                member: last.name.member.clone(),
                shipped_at_us: last.shipped_at_us,
            }));
        }
    }

    /// What other members than this one have of a segment: of each one's pieces the newest that ends at `upto` at the most,
    /// and the same beginning of the whole segment, if another brought that.
    ///
    /// Two requests, where nobody has any; where others have, one for each, of whose pieces none is read twice, and those for who left
    /// the branch.
    pub async fn others_marks(
        &self,
        wal: WalBranch,
        place: (Segment, SegmentSize),
        (member, upto): (&str, u32),
    ) -> Result<Vec<Mark>, ArchiveError> {
        let mut names = self.tails(wal, place.0, place.1).await?;
        if names.iter().any(|name| name.member != member) {
            self.strays(wal).await?.sift(place.0, place.1, &mut names);
        }
        let others: BTreeSet<&str> =
            names.iter().map(|name| name.member.as_str()).filter(|who| *who != member).collect();
        let mut marks = Vec::new();
        for other in others {
            let newest = wal_tail::chain(&names, other).into_iter().rev().find(|piece| piece.to <= upto);
            let Some(newest) = newest.cloned() else { continue };
            let directory = self.clone().known_directory(wal, place, newest).await;
            let Some(directory) = self.readable(directory)? else { continue };
            marks.push(Mark { end: directory.name.to, content: directory.after, member: other.to_owned() });
        }
        let whole = match self.readable(self.directory(wal, place.0, place.1).await)? {
            Some(directory) if directory.member != member => {
                self.readable(self.get_segment(wal, place.0, place.1).await)?.flatten()
            }
            _ => None,
        };
        marks.extend(whole.map(|(directory, content)| {
            let end = upto.min(directory.valid_bytes);
            let content = self.id_of(content.get(..end as usize).unwrap_or_default());
            Mark { end, content, member: directory.member }
        }));
        Ok(marks)
    }

    /// A piece's directory, read once: pieces never change.
    async fn known_directory(
        self,
        wal: WalBranch,
        place: (Segment, SegmentSize),
        name: TailName,
    ) -> Result<Arc<TailDirectory>, ArchiveError> {
        let key = layout::tail(&self.cluster, &wal, place, &name);
        let known = || self.directories.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(directory) = known().get(&key) {
            return Ok(Arc::clone(directory));
        }
        let directory = Arc::new(self.tail_directory(wal, place, &name).await?);
        let mut known = known();
        if known.len() >= KNOWN_DIRECTORIES {
            known.clear();
        }
        known.insert(key, Arc::clone(&directory));
        Ok(directory)
    }

    /// The beginning of a segment, put together from the pieces of the member that has most of it; `None` if there are
    /// none.
    pub async fn beginning(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<Option<Beginning>, ArchiveError> {
        self.beginning_without(wal, segment, size, &Strays::default()).await
    }

    /// The same without what is not the branch's own.
    pub async fn beginning_without(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
        strays: &Strays,
    ) -> Result<Option<Beginning>, ArchiveError> {
        let mut names = self.tails(wal, segment, size).await?;
        strays.sift(segment, size, &mut names);
        self.join(wal, (segment, size), names).await
    }

    /// The same from the pieces of one member, and for good: whoever goes on from it tells the server that it is stored.
    pub async fn beginning_of(
        &self,
        wal: WalBranch,
        place: (Segment, SegmentSize),
        member: &str,
    ) -> Result<Option<Beginning>, ArchiveError> {
        let mut names = self.tails(wal, place.0, place.1).await?;
        names.retain(|name| name.member == member);
        for name in &names {
            let key = layout::tail(&self.cluster, &wal, place, name);
            self.readable(self.store.make_durable(&key).await.map_err(ArchiveError::from))?;
        }
        self.join(wal, place, names).await
    }

    async fn join(
        &self,
        wal: WalBranch,
        place: (Segment, SegmentSize),
        mut names: Vec<TailName>,
    ) -> Result<Option<Beginning>, ArchiveError> {
        loop {
            let chain: Vec<TailName> = wal_tail::longest_chain(&names).into_iter().cloned().collect();
            if chain.is_empty() {
                return Ok(None);
            }
            match self.put_together(wal, place, &chain).await? {
                Ok(beginning) => return Ok(Some(beginning)),
                // What else is there may still fit together.
                Err(strangers) => names.retain(|name| !strangers.contains(name)),
            }
        }
    }

    /// A segment, or as much of it as there is, padded with zeros to its size; `None` if there is nothing.
    pub async fn get_content(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<Option<Vec<u8>>, ArchiveError> {
        match self.readable(self.get_segment(wal, segment, size).await)?.flatten() {
            Some((_, content)) => Ok(Some(content)),
            None => Ok(self.get_unfinished(wal, segment, size).await?.map(|unfinished| unfinished.content)),
        }
    }

    /// As much of a segment as there is though nobody stored it whole, padded with zeros to its size: pieces of it, or what
    /// a promotion left, whichever is more. `None` if there is nothing.
    pub async fn get_unfinished(
        &self,
        wal: WalBranch,
        segment: Segment,
        size: SegmentSize,
    ) -> Result<Option<Unfinished>, ArchiveError> {
        let begun = self.beginning_without(wal, segment, size, &self.strays(wal).await?).await?;
        let left = self.get_partial(wal, segment, size).await?;
        let left_bytes = left.as_ref().map_or(0, |(directory, _)| directory.valid_bytes);
        Ok(match (begun, left) {
            (Some(begun), _) if begun.bytes.len() >= left_bytes as usize => {
                // A segment has at most 1 GiB.
                let (end, mut content) = (begun.bytes.len() as u32, begun.bytes);
                content.resize(size.bytes() as usize, 0);
                Some(Unfinished { content, end })
            }
            (_, left) => left.map(|(_, content)| Unfinished { content, end: left_bytes }),
        })
    }

    /// What was read of a chain, or those that do not read.
    fn all_readable<T>(
        &self,
        chain: &[TailName],
        read: Vec<Result<T, ArchiveError>>,
    ) -> Result<Result<Vec<T>, Vec<TailName>>, ArchiveError> {
        let (mut pieces, mut damaged) = (Vec::new(), Vec::new());
        for (name, piece) in chain.iter().zip(read) {
            match self.readable(piece)? {
                Some(piece) => pieces.push(piece),
                None => damaged.push(name.clone()),
            }
        }
        Ok(if damaged.is_empty() { Ok(pieces) } else { Err(damaged) })
    }

    /// The pieces of a chain joined, or those that do not read, or the first that does not follow.
    async fn put_together(
        &self,
        wal: WalBranch,
        place: (Segment, SegmentSize),
        chain: &[TailName],
    ) -> Result<Result<Beginning, Vec<TailName>>, ArchiveError> {
        let reads: Vec<_> = chain.iter().cloned().map(|name| self.clone().read_tail(wal, place, name)).collect();
        let read: Vec<Result<TailPiece, _>> = futures::stream::iter(reads).buffered(READS).collect().await;
        let pieces = match self.all_readable(chain, read)? {
            Ok(pieces) => pieces,
            Err(damaged) => return Ok(Err(damaged)),
        };
        let mut hasher = self.keys.newest().content_hasher();
        let mut beginning = Beginning {
            bytes: Vec::with_capacity(chain.last().map_or(0, |last| last.to as usize)),
            records_end: 0,
            member: chain.first().map(|first| first.member.clone()).unwrap_or_default(),
            commits: Vec::new(),
            restore_points: Vec::new(),
            pieces: pieces.len(),
        };
        for piece in pieces {
            let follows = piece.directory.before == hasher.id();
            hasher.update(&piece.bytes);
            if !follows || piece.directory.after != hasher.id() {
                // Bytes of another life of that server.
                tracing::warn!(piece = %piece.directory.name, "a piece of WAL does not follow the one before it");
                return Ok(Err(vec![piece.directory.name]));
            }
            beginning.bytes.extend_from_slice(&piece.bytes);
            beginning.records_end = beginning.records_end.max(piece.directory.records_end);
            beginning.commits.extend(piece.commits);
            beginning.restore_points.extend(piece.restore_points);
        }
        Ok(Ok(beginning))
    }

    async fn read_tail(
        self,
        wal: WalBranch,
        (segment, size): (Segment, SegmentSize),
        name: TailName,
    ) -> Result<TailPiece, ArchiveError> {
        let key = layout::tail(&self.cluster, &wal, (segment, size), &name);
        let bytes = self.object(&key, size).await?;
        let opened = domain_for(&bytes, &self.keys, ObjectKind::Tail)
            .and_then(|domain| wal_tail::open_tail(bytes.clone(), domain, key.as_ref(), wal, (segment, size), &name));
        opened.map_err(|source| ArchiveError::Segment { key: key.to_string(), source })
    }

    /// What a piece says of itself, without its content.
    pub async fn tail_directory(
        &self,
        wal: WalBranch,
        (segment, size): (Segment, SegmentSize),
        name: &TailName,
    ) -> Result<TailDirectory, ArchiveError> {
        let key = layout::tail(&self.cluster, &wal, (segment, size), name);
        let ends = self.ends(&key, ObjectKind::Tail).await?;
        TailDirectory::decode(&ends.directory, wal, (segment, size), name)
            .map_err(|source| ArchiveError::Segment { key: key.to_string(), source })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::crypto::DomainKey;
    use crate::keyring::Keyring;
    use crate::postgres::{Branch, Lsn, SystemId, Timeline};
    use crate::store::Store;

    const WAL: WalBranch = WalBranch { system_id: SystemId(5), timeline: Timeline(1), branch: Branch::ROOT };
    const SEGMENT: Segment = Segment { timeline: Timeline(1), number: 2 };

    fn size() -> SegmentSize {
        SegmentSize::new(1 << 20).unwrap()
    }

    fn archive() -> WalArchive {
        let keys = Keyring::of(DomainKey::generate().unwrap());
        WalArchive::new(Store::in_memory(), "orders".parse().unwrap(), Arc::new(keys), 3)
    }

    /// `[from, to)` of a segment whose bytes are `content`.
    async fn put(archive: &WalArchive, content: &[u8], from: u32, to: u32, member: &str) {
        let mut hasher = archive.content_hasher();
        hasher.update(&content[..from as usize]);
        let before = hasher.id();
        let bytes = Bytes::copy_from_slice(&content[from as usize..to as usize]);
        hasher.update(&bytes);
        let at = CommitPoint { lsn: Lsn(SEGMENT.start(size()).0 + u64::from(to)), at_us: i64::from(to) };
        // One without a commit.
        let commits = if to == 700 { Vec::new() } else { vec![at] };
        let tail = OwnedTail {
            wal: WAL,
            segment: SEGMENT,
            segment_size: size(),
            name: TailName { from, to, member: member.to_owned() },
            before,
            after: hasher.id(),
            bytes,
            facts: SegmentFacts { valid_bytes: to - 1, commits, ..SegmentFacts::default() },
            shipped_at_us: 0,
            complete_at_us: Some(9),
        };
        archive.put_tail(tail).await.unwrap();
    }

    #[tokio::test]
    async fn pieces_make_the_beginning_of_a_segment() {
        let (archive, content) = (archive(), (0..1000u32).map(|at| (at % 251) as u8).collect::<Vec<_>>());
        assert_eq!(archive.beginning(WAL, SEGMENT, size()).await.unwrap(), None);
        assert_eq!(archive.beginning_facts(WAL, SEGMENT, size()).await.unwrap(), None);
        for (from, to) in [(0, 300), (300, 600), (600, 700), (900, 1000)] {
            put(&archive, &content, from, to, "pg1").await;
        }
        let begun = archive.beginning(WAL, SEGMENT, size()).await.unwrap().unwrap();
        assert_eq!(begun.bytes, &content[..700], "up to the hole");
        assert_eq!((begun.records_end, begun.pieces, begun.commits.len()), (699, 3, 2));
        let facts = archive.beginning_facts(WAL, SEGMENT, size()).await.unwrap().unwrap();
        assert_eq!((facts.end, facts.records_end, facts.complete_at_us), (700, 699, Some(9)));
        assert_eq!(facts.last_commit.map(|commit| commit.at_us), Some(600), "of the piece before");
        put(&archive, &content, 0, 700, "pg1").await;
        let begun = archive.beginning(WAL, SEGMENT, size()).await.unwrap().unwrap();
        assert_eq!((begun.bytes.len(), begun.pieces), (700, 1), "one that takes in the others");
        assert_eq!(archive.begun_segments(WAL, size()).await.unwrap(), [SEGMENT]);
    }

    #[tokio::test]
    async fn bytes_of_two_servers_are_never_joined() {
        let archive = archive();
        let (one, other) = (vec![1u8; 1000], vec![2u8; 1000]);
        put(&archive, &one, 0, 300, "pg1").await;
        put(&archive, &other, 300, 900, "pg1").await;
        put(&archive, &other, 0, 200, "pg2").await;
        let begun = archive.beginning(WAL, SEGMENT, size()).await.unwrap().unwrap();
        assert_eq!(begun.bytes, &one[..300], "what followed was of another life of it");
        let facts = archive.beginning_facts(WAL, SEGMENT, size()).await.unwrap().unwrap();
        assert_eq!(facts.end, 300, "no more is promised than is delivered");
        put(&archive, &other, 200, 400, "pg2").await;
        let begun = archive.beginning(WAL, SEGMENT, size()).await.unwrap().unwrap();
        assert_eq!((begun.bytes, begun.member.as_str()), (other[..400].to_vec(), "pg2"), "who has most");
    }
}
