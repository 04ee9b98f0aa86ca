//! Timeline histories as stored, and in their place on a branch that has none of its own: where that one comes from.

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as wire;

use crate::crypto::DomainKey;
use crate::format::clear::{self, ClearError, ObjectKind};
use crate::format::manifest::branch_from_wire;
use crate::format::sealed::{Compressor, SealedObject, SealedWriter};
use crate::format::wal_segment::SegmentError;
use crate::ids::ChunkId;
use crate::postgres::{Branch, Lsn, TimelineHistory, WalBranch};

/// Derives a diverged branch's id from where it left, with what, and whose it is.
const DIVERGED_BRANCH: &str = "walfleet 2026-11 diverged branch v1";

/// What lies at a branch's `history`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoredHistory {
    /// As Postgres wrote it; of timeline 1, which has none, empty.
    pub content: Bytes,
    /// The branch of the last ancestor that it names; `None`: not known.
    pub parent: Option<Branch>,
    /// Who stored it, and when by its clock.
    pub member: String,
    pub shipped_at_us: i64,
    pub divergence: Option<Divergence>,
}

/// An origin that does not read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OriginError {
    #[error(transparent)]
    Clear(#[from] ClearError),
    #[error("{0}")]
    Malformed(String),
}

/// Where one member's WAL left a branch, since another member had stored other records under its names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Divergence {
    /// Whose WAL it is.
    pub member: String,
    /// Who had stored what differs.
    pub stored_by: String,
    /// The branch it left; same system and timeline.
    pub from: Branch,
    /// Start of the first segment that differs.
    pub at: Lsn,
    /// Of the bytes by which the member saw that they differ.
    pub content: ChunkId,
    pub joint: Joint,
    /// Starts of the segments behind `at` that the member had stored in the branch it left before it knew.
    pub strays: Vec<Lsn>,
    /// Starts of the segments of which it had stored pieces there.
    pub stray_tails: Vec<Lsn>,
    /// The member's clock, microseconds since the Unix epoch.
    pub found_at_us: i64,
}

/// How a diverged branch goes on from the one it left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Joint {
    /// The WAL before it is that branch's.
    Sound,
    /// Nobody knows that, or it is known not to be: nothing before it leads to it.
    Open,
}

impl Divergence {
    /// The id of the branch that the member's WAL goes to.
    pub fn branch(&self) -> Branch {
        let mut hasher = blake3::Hasher::new_derive_key(DIVERGED_BRANCH);
        hasher.update(&self.from.0).update(&self.at.0.to_be_bytes()).update(&self.content.0);
        hasher.update(self.member.as_bytes());
        let mut branch = [0; 8];
        branch.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        Branch(branch)
    }

    fn to_wire(&self) -> wire::Divergence {
        let lsns = |lsns: &[Lsn]| lsns.iter().map(|lsn| lsn.0).collect();
        wire::Divergence {
            from_branch: Bytes::copy_from_slice(&self.from.0),
            lsn: self.at.0,
            content_id: Bytes::copy_from_slice(&self.content.0),
            stored_by: self.stored_by.clone(),
            is_joined: self.joint == Joint::Sound,
            stray_segment_lsns: lsns(&self.strays),
            stray_tail_lsns: lsns(&self.stray_tails),
        }
    }

    fn from_wire(d: wire::Divergence, member: &str, found_at_us: i64) -> Result<Divergence, SegmentError> {
        let bad = |reason: String| SegmentError::Directory(reason);
        let lsns = |lsns: Vec<u64>| lsns.into_iter().map(Lsn).collect();
        Ok(Divergence {
            member: member.to_owned(),
            stored_by: d.stored_by,
            from: branch_from_wire(&d.from_branch).map_err(|e| bad(e.to_string()))?,
            at: Lsn(d.lsn),
            content: ChunkId::from_slice(&d.content_id).map_err(|e| bad(e.to_string()))?,
            joint: if d.is_joined { Joint::Sound } else { Joint::Open },
            strays: lsns(d.stray_segment_lsns),
            stray_tails: lsns(d.stray_tail_lsns),
            found_at_us,
        })
    }
}

impl StoredHistory {
    /// The object's bytes. `key` is its key in the repository.
    pub fn seal(&self, domain: &DomainKey, key: &str, wal: WalBranch) -> Result<Bytes, SegmentError> {
        let writer = SealedWriter::new(domain, ObjectKind::History, Some(key), 1024)?;
        Ok(writer.finish(&self.to_wire(wal).encode_to_vec(), &mut Compressor::new(3))?)
    }

    fn to_wire(&self, wal: WalBranch) -> wire::TimelineHistory {
        wire::TimelineHistory {
            system_identifier: wal.system_id.0,
            timeline: wal.timeline.0,
            content: self.content.clone(),
            member: self.member.clone(),
            shipped_at_us: self.shipped_at_us,
            parent_branch: self.parent.map(|parent| Bytes::copy_from_slice(&parent.0)).unwrap_or_default(),
            divergence: self.divergence.as_ref().map(Divergence::to_wire),
        }
    }

    pub fn open(bytes: Bytes, domain: &DomainKey, key: &str, wal: WalBranch) -> Result<StoredHistory, SegmentError> {
        let object = SealedObject::open(bytes, domain, ObjectKind::History, Some(key))?;
        let message = wire::TimelineHistory::decode(&object.directory[..]);
        StoredHistory::from_wire(message.map_err(|e| SegmentError::Directory(e.to_string()))?, wal)
    }

    /// The same in clear, without the reasons that end a history's lines: they may hold what an operator wrote.
    pub fn in_clear(&self, wal: WalBranch) -> Bytes {
        let parsed = TimelineHistory::parse(wal.timeline, &self.content).ok();
        let ancestors = parsed.map(|history| history.ancestors).unwrap_or_default();
        let lines: String = ancestors.iter().map(|(timeline, lsn)| format!("{timeline}\t{lsn}\t\n")).collect();
        let history = wire::TimelineHistory { content: lines.into(), ..self.to_wire(wal) };
        let message = wire::WalOrigin { branch: Bytes::copy_from_slice(&wal.branch.0), history: Some(history) };
        clear::encode(ObjectKind::Origin, &message.encode_to_vec())
    }

    pub fn open_clear(object: &[u8], wal: WalBranch) -> Result<StoredHistory, OriginError> {
        let body = clear::decode(ObjectKind::Origin, object)?;
        let message = wire::WalOrigin::decode(body).map_err(|error| OriginError::Malformed(error.to_string()))?;
        if message.branch[..] != wal.branch.0 {
            return Err(OriginError::Malformed("it is another branch's".to_owned()));
        }
        let history = message.history.ok_or_else(|| OriginError::Malformed("it tells nothing".to_owned()))?;
        StoredHistory::from_wire(history, wal).map_err(|error| OriginError::Malformed(error.to_string()))
    }

    fn from_wire(message: wire::TimelineHistory, wal: WalBranch) -> Result<StoredHistory, SegmentError> {
        let bad = |reason: String| SegmentError::Directory(reason);
        if message.system_identifier != wal.system_id.0 || message.timeline != wal.timeline.0 {
            return Err(SegmentError::Identity {
                found: format!("timeline {} of system {}", message.timeline, message.system_identifier),
                expected: format!("timeline {} of system {}", wal.timeline, wal.system_id),
            });
        }
        let parent = match &message.parent_branch[..] {
            [] => None,
            branch => Some(branch_from_wire(branch).map_err(|e| bad(e.to_string()))?),
        };
        let divergence = message.divergence;
        let divergence = divergence.map(|d| Divergence::from_wire(d, &message.member, message.shipped_at_us));
        Ok(StoredHistory {
            content: message.content,
            parent,
            divergence: divergence.transpose()?,
            member: message.member,
            shipped_at_us: message.shipped_at_us,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{SystemId, Timeline};

    fn divergence() -> Divergence {
        Divergence {
            member: "pg2".to_owned(),
            stored_by: "pg1".to_owned(),
            from: Branch([3; 8]),
            at: Lsn(5 << 24),
            content: ChunkId([9; 32]),
            joint: Joint::Sound,
            strays: vec![Lsn(6 << 24)],
            stray_tails: vec![Lsn(6 << 24), Lsn(7 << 24)],
            found_at_us: 77,
        }
    }

    #[test]
    fn where_a_branch_comes_from_is_read_back() {
        let key = DomainKey::generate().unwrap();
        let wal = WalBranch { system_id: SystemId(9), timeline: Timeline(2), branch: divergence().branch() };
        let stored = StoredHistory {
            content: Bytes::from_static(b"1\t0/3000000\tno recovery target specified\n"),
            parent: Some(Branch::ROOT),
            member: "pg2".to_owned(),
            shipped_at_us: 77,
            divergence: Some(divergence()),
        };
        let bytes = stored.seal(&key, "k", wal).unwrap();
        assert_eq!(StoredHistory::open(bytes.clone(), &key, "k", wal).unwrap(), stored);
        let other = WalBranch { timeline: Timeline(3), ..wal };
        assert!(StoredHistory::open(bytes.clone(), &key, "k", other).is_err());
        assert!(StoredHistory::open(bytes, &key, "another", wal).is_err());
    }

    #[test]
    fn in_clear_stand_the_positions_and_no_words() {
        let wal = WalBranch { system_id: SystemId(9), timeline: Timeline(3), branch: Branch([4; 8]) };
        let stored = StoredHistory {
            content: Bytes::from_static(b"1\t0/3000000\tat restore point \"the secret one\"\n\n2\t0/5000000\tx\n"),
            parent: Some(Branch([3; 8])),
            member: "pg2".to_owned(),
            shipped_at_us: 77,
            divergence: None,
        };
        let object = stored.in_clear(wal);
        assert!(!object.windows(6).any(|bytes| bytes == b"secret"));
        let read = StoredHistory::open_clear(&object, wal).unwrap();
        let parsed = |stored: &StoredHistory| TimelineHistory::parse(wal.timeline, &stored.content).unwrap();
        assert_eq!((parsed(&read), read.parent), (parsed(&stored), stored.parent));
        let other = WalBranch { branch: Branch([5; 8]), ..wal };
        assert!(matches!(StoredHistory::open_clear(&object, other), Err(OriginError::Malformed(_))));
        let diverged = StoredHistory { content: Bytes::new(), divergence: Some(divergence()), ..stored };
        let first = WalBranch { timeline: Timeline(1), branch: divergence().branch(), ..wal };
        let read = StoredHistory::open_clear(&diverged.in_clear(first), first).unwrap();
        assert_eq!(read.divergence, Some(divergence()));
        for at in 0..object.len() {
            assert!(StoredHistory::open_clear(&object[..at], wal).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn each_member_and_each_difference_has_a_branch_of_its_own() {
        let branch = divergence().branch();
        for other in [
            Divergence { member: "pg3".to_owned(), ..divergence() },
            Divergence { from: Branch::ROOT, ..divergence() },
            Divergence { at: Lsn(6 << 24), ..divergence() },
            Divergence { content: ChunkId([8; 32]), ..divergence() },
        ] {
            assert_ne!(other.branch(), branch);
        }
        // Found again after a crash: the same.
        assert_eq!(Divergence { found_at_us: 78, strays: Vec::new(), ..divergence() }.branch(), branch);
    }
}
