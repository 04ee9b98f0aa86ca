//! The reference part of a backup: `clusters/<cluster>/backups/<backup>.refs`, in clear and signed.
//!
//! What one without any data key must know to plan, collect, copy and scrub. The log's commit names its digest, so it
//! cannot be exchanged afterwards; the signature says who wrote it.

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as proto;

use super::clear::{self, ClearError, ObjectKind};
use super::manifest::Counters;
use crate::ids::{BackupId, ClusterName, Digest, DomainId, PackId, RepositoryId};
use crate::layout;
use crate::postgres::{Lsn, SegmentSize, WalBranch};
use crate::signature::{SignatureError, Signed, Signer, TrustRoot, Writer};

/// A backup, as far as one without its key needs to know it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReferencePart {
    pub backup: BackupId,
    pub cluster: ClusterName,
    pub domain: DomainId,
    pub key_version: u32,
    /// As server_version_num: 180006 is 18.6.
    pub server_version_num: u32,
    pub wal: WalBranch,
    /// Redo position of the starting checkpoint: the first WAL a restore needs.
    pub start_lsn: Lsn,
    /// Restoring up to here makes the backup consistent.
    pub stop_lsn: Lsn,
    /// The source server's clock, microseconds since the Unix epoch.
    pub started_at_us: i64,
    pub stopped_at_us: i64,
    pub member: String,
    pub parents: Vec<BackupId>,
    pub counters: Counters,
    pub damaged_page_count: u64,
    pub segment_size: SegmentSize,
    /// When the place it was copied from saw its commit, microseconds since the Unix epoch. Only a keeper's word counts.
    pub seen_at_us: Option<i64>,
    /// Every pack that a restore reads, and in which session of this place it lies.
    pub sessions: Vec<SessionPacks>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SessionPacks {
    pub session: BackupId,
    /// `None`: this cluster's. Otherwise the one it was borrowed from.
    pub cluster: Option<ClusterName>,
    pub packs: Vec<PackUse>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackUse {
    pub pack: PackId,
    pub stored_bytes: u64,
    /// Of those, bytes of frames that this backup needs.
    pub used_bytes: u64,
}

/// A reference part that cannot be read or is not believed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReferenceError {
    #[error("reference part of {backup}: {source}")]
    Clear { backup: BackupId, source: ClearError },
    #[error("reference part of {backup}: {source}")]
    Signature { backup: BackupId, source: SignatureError },
    #[error("reference part of {backup}: it has the digest {found}, and the log's commit says {expected}")]
    Digest { backup: BackupId, expected: Digest, found: Digest },
    #[error("reference part of {backup}: {what}")]
    Malformed { backup: BackupId, what: String },
}

impl ReferencePart {
    /// The object's bytes.
    pub fn seal(&self, signer: &Signer, repository_id: RepositoryId) -> Bytes {
        let key = layout::reference(&self.cluster, &self.backup);
        let signed = signer.sign(repository_id, &key, reference_to_proto(self).encode_to_vec());
        clear::encode(ObjectKind::Reference, &signed.encode())
    }

    /// Reads the reference part that a commit named by its digest, and says who signed it.
    pub fn open(
        trust: &TrustRoot,
        cluster: &ClusterName,
        backup: &BackupId,
        committed: Digest,
        object: &[u8],
    ) -> Result<(ReferencePart, Writer), ReferenceError> {
        let malformed = |what: String| ReferenceError::Malformed { backup: backup.clone(), what };
        let untrusted = |source| ReferenceError::Signature { backup: backup.clone(), source };
        let body = clear::decode(ObjectKind::Reference, object)
            .map_err(|source| ReferenceError::Clear { backup: backup.clone(), source })?;
        let found = Digest(*blake3::hash(object).as_bytes());
        if found != committed {
            return Err(ReferenceError::Digest { backup: backup.clone(), expected: committed, found });
        }
        let signed = Signed::decode(body).map_err(untrusted)?;
        let writer = trust.verify(&layout::reference(cluster, backup), &signed).map_err(untrusted)?;
        let message = proto::ReferencePart::decode(signed.payload()).map_err(|error| malformed(error.to_string()))?;
        let part = reference_from_proto(message).map_err(malformed)?;
        if part.backup != *backup || part.cluster != *cluster {
            return Err(malformed(format!("it says it is {} of {}", part.backup, part.cluster)));
        }
        Ok((part, writer))
    }

    /// Every pack a restore reads, with the cluster and session under which it lies.
    pub fn packs(&self) -> impl Iterator<Item = (&ClusterName, &BackupId, &PackUse)> {
        self.sessions.iter().flat_map(|session| {
            let cluster = session.cluster.as_ref().unwrap_or(&self.cluster);
            session.packs.iter().map(move |pack| (cluster, &session.session, pack))
        })
    }
}

fn reference_to_proto(part: &ReferencePart) -> proto::ReferencePart {
    proto::ReferencePart {
        backup: part.backup.to_string(),
        cluster: part.cluster.to_string(),
        domain: Bytes::copy_from_slice(&part.domain.0),
        key_version: part.key_version,
        system_identifier: part.wal.system_id.0,
        server_version_num: part.server_version_num,
        timeline: part.wal.timeline.0,
        branch: Bytes::copy_from_slice(&part.wal.branch.0),
        start_lsn: part.start_lsn.0,
        stop_lsn: part.stop_lsn.0,
        started_at_us: part.started_at_us,
        stopped_at_us: part.stopped_at_us,
        member: part.member.clone(),
        parents: part.parents.iter().map(|parent| parent.to_string()).collect(),
        counters: Some(part.counters.to_wire()),
        damaged_page_count: part.damaged_page_count,
        wal_segment_bytes: part.segment_size.bytes(),
        seen_at_us: part.seen_at_us.unwrap_or(0),
        sessions: part.sessions.iter().map(session_to_proto).collect(),
    }
}

fn session_to_proto(session: &SessionPacks) -> proto::SessionPacks {
    let pack_use = |used: &PackUse| proto::PackUse {
        pack: Bytes::copy_from_slice(&used.pack.0),
        stored_bytes: used.stored_bytes,
        used_bytes: used.used_bytes,
    };
    proto::SessionPacks {
        session: session.session.to_string(),
        cluster: session.cluster.as_ref().map_or_else(String::new, |cluster| cluster.to_string()),
        packs: session.packs.iter().map(pack_use).collect(),
    }
}

fn reference_from_proto(message: proto::ReferencePart) -> Result<ReferencePart, String> {
    let wal = super::wal_branch(message.system_identifier, message.timeline, &message.branch)?;
    if message.start_lsn > message.stop_lsn {
        return Err(format!("it starts at {} after its end at {}", Lsn(message.start_lsn), Lsn(message.stop_lsn)));
    }
    Ok(ReferencePart {
        backup: message.backup.parse().map_err(text)?,
        cluster: message.cluster.parse().map_err(text)?,
        domain: DomainId::from_slice(&message.domain).map_err(text)?,
        key_version: message.key_version,
        server_version_num: message.server_version_num,
        wal,
        start_lsn: Lsn(message.start_lsn),
        stop_lsn: Lsn(message.stop_lsn),
        started_at_us: message.started_at_us,
        stopped_at_us: message.stopped_at_us,
        member: message.member,
        parents: message.parents.iter().map(|parent| parent.parse().map_err(text)).collect::<Result<_, _>>()?,
        counters: Counters::from_wire(message.counters.unwrap_or_default()),
        damaged_page_count: message.damaged_page_count,
        segment_size: SegmentSize::new(message.wal_segment_bytes.into()).map_err(text)?,
        seen_at_us: Some(message.seen_at_us).filter(|us| *us != 0),
        sessions: message.sessions.into_iter().map(session_from_proto).collect::<Result<_, _>>()?,
    })
}

fn session_from_proto(message: proto::SessionPacks) -> Result<SessionPacks, String> {
    let pack_use = |used: proto::PackUse| {
        let pack = PackId::from_slice(&used.pack).map_err(text)?;
        Ok::<_, String>(PackUse { pack, stored_bytes: used.stored_bytes, used_bytes: used.used_bytes })
    };
    Ok(SessionPacks {
        session: message.session.parse().map_err(text)?,
        cluster: match message.cluster.as_str() {
            "" => None,
            name => Some(name.parse().map_err(text)?),
        },
        packs: message.packs.into_iter().map(pack_use).collect::<Result<_, _>>()?,
    })
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::postgres::{Branch, SystemId, Timeline};

    pub(crate) fn sample(cluster: &str, backup: &str) -> ReferencePart {
        let pack = |n: u8| PackUse { pack: PackId([n; 32]), stored_bytes: 100, used_bytes: 60 };
        let session = |id: &str, cluster: Option<&str>, packs| SessionPacks {
            session: id.parse().unwrap(),
            cluster: cluster.map(|name| name.parse().unwrap()),
            packs,
        };
        ReferencePart {
            backup: backup.parse().unwrap(),
            cluster: cluster.parse().unwrap(),
            domain: DomainId([1; 16]),
            key_version: 1,
            server_version_num: 180_006,
            wal: WalBranch { system_id: SystemId(7412), timeline: Timeline(1), branch: Branch::ROOT },
            start_lsn: Lsn(0x200_0028),
            stop_lsn: Lsn(0x200_0100),
            started_at_us: 1,
            stopped_at_us: 2,
            member: "db1".to_owned(),
            parents: vec!["bk_0".parse().unwrap()],
            counters: Counters { cluster_bytes: 5, ..Counters::default() },
            damaged_page_count: 1,
            segment_size: SegmentSize::DEFAULT,
            seen_at_us: None,
            sessions: vec![
                session(backup, None, vec![pack(1), pack(2)]),
                session("bk_9", Some("clone"), vec![pack(3)]),
            ],
        }
    }

    #[test]
    fn a_reference_part_comes_back_only_as_committed() {
        let (signer, part) = (Signer::from_seed(&[1; 32]), sample("orders", "bk_1"));
        let trust = TrustRoot { repository_id: RepositoryId([7; 16]), root_public_key: signer.public_key() };
        let object = part.seal(&signer, trust.repository_id);
        let digest = Digest(*blake3::hash(&object).as_bytes());
        let open = |digest, object: &[u8]| ReferencePart::open(&trust, &part.cluster, &part.backup, digest, object);
        assert_eq!(open(digest, &object).unwrap().0, part);
        assert_eq!(part.packs().count(), 3);
        assert!(matches!(open(Digest([0; 32]), &object), Err(ReferenceError::Digest { .. })));
        let forged = part.seal(&Signer::from_seed(&[2; 32]), trust.repository_id);
        let digest = Digest(*blake3::hash(&forged).as_bytes());
        assert!(matches!(open(digest, &forged), Err(ReferenceError::Signature { .. })));
        assert!(matches!(open(digest, &forged[..60]), Err(ReferenceError::Clear { .. })));
    }
}
