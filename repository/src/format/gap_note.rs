//! Gap notes: `…/gaps/<from>-<to>.<tag>`, in clear and signed.
//!
//! What is missing is seen by what lies in the archive. A note says why, and who knows of it; it never makes WAL missing, and
//! never makes it be there.

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as proto;

use super::clear::{self, ClearError, ObjectKind};
use crate::ids::{ClusterName, RepositoryId};
use crate::layout::{self, GapNoteName};
use crate::postgres::{Lsn, WalBranch};
use crate::signature::{Role, SignatureError, Signed, Signer, TrustRoot, Writer};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GapNote {
    pub cluster: ClusterName,
    pub wal: WalBranch,
    /// `[from, to)`, not empty.
    pub from: Lsn,
    pub to: Lsn,
    pub kind: GapNoteKind,
    /// The member whose agent let go of it, or the operator who knows of it.
    pub by: String,
    pub reason: String,
    /// The writer's clock when it wrote this, microseconds since the Unix epoch.
    pub at_us: i64,
    /// When the WAL was let go of; of an acknowledgement, as `at_us`.
    pub since_us: i64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum GapNoteKind {
    /// The server, or its agent by the policy's choice, no longer had it.
    Recorded,
    /// An operator knows of the gap: it alarms no more.
    Acknowledged,
}

/// A note that does not read or is not believed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GapNoteError {
    #[error(transparent)]
    Clear(#[from] ClearError),
    #[error(transparent)]
    Signature(#[from] SignatureError),
    #[error("{0}")]
    Malformed(String),
    #[error("{writer} may not say so of WAL of cluster {cluster}")]
    Right { writer: String, cluster: ClusterName },
}

impl GapNote {
    /// The object's name and bytes. The same note always has the same name.
    pub fn seal(&self, signer: &Signer, repository_id: RepositoryId) -> (GapNoteName, Bytes) {
        let payload = to_proto(self).encode_to_vec();
        let tag = blake3::hash(&payload).as_bytes().first_chunk::<8>().copied().unwrap_or_default();
        let name = GapNoteName { wal: self.wal, from: self.from, to: self.to, tag: u64::from_be_bytes(tag) };
        let signed = signer.sign(repository_id, &layout::gap_note(&self.cluster, &name), payload);
        (name, clear::encode(ObjectKind::GapNote, &signed.encode()))
    }

    /// Reads the note of that name; it counts only if its writer may say what it says.
    pub fn open(
        trust: &TrustRoot,
        cluster: &ClusterName,
        name: &GapNoteName,
        object: &[u8],
    ) -> Result<GapNote, GapNoteError> {
        let signed = Signed::decode(clear::decode(ObjectKind::GapNote, object)?)?;
        let writer = trust.verify(&layout::gap_note(cluster, name), &signed)?;
        let malformed = |what: String| GapNoteError::Malformed(what);
        let message = proto::GapNote::decode(signed.payload()).map_err(|error| malformed(error.to_string()))?;
        let note = from_proto(message).map_err(malformed)?;
        if note.cluster != *cluster || (note.wal, note.from, note.to) != (name.wal, name.from, name.to) {
            return Err(malformed(format!(
                "it says it is of {} to {} of cluster {}",
                note.from, note.to, note.cluster
            )));
        }
        match note.may_be_of(&writer) {
            true => Ok(note),
            false => Err(GapNoteError::Right { writer: writer.name().to_owned(), cluster: cluster.clone() }),
        }
    }

    /// A host that is taken over must not be able to silence an alarm.
    fn may_be_of(&self, writer: &Writer) -> bool {
        let may = match &writer.role {
            Role::Root | Role::Keeper { .. } => true,
            Role::Agent { clusters, .. } => self.kind == GapNoteKind::Recorded && clusters.contains(&self.cluster),
        };
        may && writer.valid_at(self.at_us)
    }
}

fn to_proto(note: &GapNote) -> proto::GapNote {
    proto::GapNote {
        cluster: note.cluster.to_string(),
        range: Some(proto::WalRange {
            system_identifier: note.wal.system_id.0,
            timeline: note.wal.timeline.0,
            branch: Bytes::copy_from_slice(&note.wal.branch.0),
            start_lsn: note.from.0,
            end_lsn: note.to.0,
        }),
        kind: match note.kind {
            GapNoteKind::Recorded => proto::GapNoteKind::Recorded,
            GapNoteKind::Acknowledged => proto::GapNoteKind::Acknowledged,
        }
        .into(),
        by: note.by.clone(),
        reason: note.reason.clone(),
        at_us: note.at_us,
        since_us: note.since_us,
    }
}

fn from_proto(message: proto::GapNote) -> Result<GapNote, String> {
    let kind = match message.kind() {
        proto::GapNoteKind::Recorded => GapNoteKind::Recorded,
        proto::GapNoteKind::Acknowledged => GapNoteKind::Acknowledged,
        proto::GapNoteKind::Unspecified => return Err(format!("a note of unknown kind {}", message.kind)),
    };
    let range = message.range.ok_or("it names no WAL")?;
    let wal = super::wal_branch(range.system_identifier, range.timeline, &range.branch)?;
    Ok(GapNote {
        cluster: message.cluster.parse().map_err(|error: crate::ids::IdError| error.to_string())?,
        wal,
        from: Lsn(range.start_lsn),
        to: Lsn(range.end_lsn),
        kind,
        by: message.by,
        reason: message.reason,
        at_us: message.at_us,
        since_us: message.since_us,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{Branch, SystemId, Timeline};
    use crate::signature::{CertifiedRole, WriterStatement};

    fn note(kind: GapNoteKind) -> GapNote {
        GapNote {
            cluster: "orders".parse().unwrap(),
            wal: WalBranch { system_id: SystemId(7412), timeline: Timeline(1), branch: Branch::ROOT },
            from: Lsn(1 << 24),
            to: Lsn(3 << 24),
            kind,
            by: "db1".to_owned(),
            reason: "the slot was lost".to_owned(),
            at_us: 5,
            since_us: 4,
        }
    }

    #[test]
    fn a_note_counts_if_its_writer_may_say_so() {
        let root = Signer::from_seed(&[1; 32]);
        let trust = TrustRoot { repository_id: RepositoryId([7; 16]), root_public_key: root.public_key() };
        let certified = |role| {
            let signer = Signer::from_seed(&[2; 32]);
            let claims = WriterStatement {
                repository_id: None,
                public_key: signer.public_key(),
                role,
                name: "db1".to_owned(),
                not_before_us: 0,
                not_after_us: 9,
            };
            let chain = vec![root.issue(claims)];
            signer.with_chain(chain).unwrap()
        };
        let agent = |cluster: &str| certified(CertifiedRole::Agent { clusters: vec![cluster.parse().unwrap()] });
        let read = |note: &GapNote, signer: &Signer| {
            let (name, object) = note.seal(signer, trust.repository_id);
            GapNote::open(&trust, &note.cluster, &name, &object)
        };
        let (recorded, acknowledged) = (note(GapNoteKind::Recorded), note(GapNoteKind::Acknowledged));
        for signer in [&root, &certified(CertifiedRole::Keeper)] {
            assert_eq!(read(&recorded, signer).as_ref(), Ok(&recorded));
            assert_eq!(read(&acknowledged, signer).as_ref(), Ok(&acknowledged));
        }
        assert_eq!(read(&recorded, &agent("orders")).as_ref(), Ok(&recorded));
        let refused = |read| matches!(read, Err(GapNoteError::Right { .. }));
        assert!(refused(read(&acknowledged, &agent("orders"))), "a host silences no alarm");
        assert!(refused(read(&recorded, &agent("other"))));
        assert!(
            refused(read(&GapNote { at_us: 10, ..recorded.clone() }, &agent("orders"))),
            "its certificate was over"
        );
        assert!(matches!(read(&recorded, &Signer::from_seed(&[3; 32])), Err(GapNoteError::Signature(_))));
    }

    #[test]
    fn a_note_is_of_what_its_name_says() {
        let root = Signer::from_seed(&[1; 32]);
        let trust = TrustRoot { repository_id: RepositoryId([7; 16]), root_public_key: root.public_key() };
        let note = note(GapNoteKind::Recorded);
        let (name, object) = note.seal(&root, trust.repository_id);
        assert_eq!(note.seal(&root, trust.repository_id).0, name, "written again it is the same object");
        let moved = GapNoteName { to: Lsn(4 << 24), ..name };
        assert!(GapNote::open(&trust, &note.cluster, &moved, &object).is_err());
        for at in 0..object.len() {
            assert!(GapNote::open(&trust, &note.cluster, &name, &object[..at]).is_err(), "cut at {at}");
        }
    }
}
