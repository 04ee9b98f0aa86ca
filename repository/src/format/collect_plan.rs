//! What a collector means to remove, and what it has removed: `clusters/<cluster>/collect/<sequence>`, in clear and signed.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use object_store::path::Path;
use prost::Message;
use walfleet_proto::repository::v1 as proto;

use super::clear::{self, ClearError, ObjectKind};
use super::log_entry::trim_to_proto;
use super::wal_branch;
use crate::ids::{BackupId, ClusterName, IdError, PackId, RepositoryId};
use crate::layout;
use crate::postgres::{Lsn, SegmentSize, WalBranch};
use crate::signature::{Role, SignatureError, Signed, Signer, TrustRoot};

/// Garbage, as seen at one prefix of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CollectPlan {
    pub cluster: ClusterName,
    pub sequence: u64,
    /// The writer's clock, microseconds since the Unix epoch.
    pub at_us: i64,
    /// By the session under which they lie.
    pub packs: BTreeMap<BackupId, Vec<PackId>>,
    /// Whose manifests go.
    pub backups: Vec<BackupId>,
    pub wal: BTreeMap<WalBranch, GarbageWal>,
    /// Below what each branch was trimmed.
    pub trims: BTreeMap<WalBranch, Lsn>,
    /// Of the packs and segments.
    pub bytes: u64,
}

/// Segments of one branch, by number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GarbageWal {
    pub size: SegmentSize,
    pub segments: BTreeSet<u64>,
}

/// What was removed at the end of a plan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Collected {
    pub cluster: ClusterName,
    pub sequence: u64,
    pub at_us: i64,
    /// Sessions that need not be looked at again.
    pub sessions: BTreeSet<BackupId>,
    /// Nor WAL below these, but for what backups and holds need.
    pub trims: BTreeMap<WalBranch, Lsn>,
    pub objects: u64,
    pub bytes: u64,
}

/// An object that is no such plan, or is not believed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CollectPlanError {
    #[error(transparent)]
    Clear(#[from] ClearError),
    #[error(transparent)]
    Signature(#[from] SignatureError),
    #[error("{0}")]
    Malformed(String),
    #[error("\"{0}\" may not plan removals")]
    Right(String),
}

impl CollectPlan {
    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.packs.is_empty() && self.backups.is_empty() && self.wal.is_empty()
    }

    pub fn objects(&self) -> u64 {
        let packs: usize = self.packs.values().map(Vec::len).sum();
        let segments: usize = self.wal.values().map(|wal| wal.segments.len()).sum();
        (packs + segments + self.backups.len()) as u64
    }

    pub fn seal(&self, signer: &Signer, repository_id: RepositoryId) -> Bytes {
        let message = proto::CollectPlan {
            cluster: self.cluster.to_string(),
            sequence: self.sequence,
            at_us: self.at_us,
            packs: self.packs.iter().map(packs_to_proto).collect(),
            backups: self.backups.iter().map(BackupId::to_string).collect(),
            wal: self.wal.iter().map(wal_to_proto).collect(),
            trims: self.trims.iter().map(|(wal, lsn)| trim_to_proto(wal, *lsn)).collect(),
            bytes: self.bytes,
        };
        let key = layout::collect_plan(&self.cluster, self.sequence);
        let signed = signer.sign(repository_id, &key, message.encode_to_vec());
        clear::encode(ObjectKind::CollectPlan, &signed.encode())
    }

    pub fn open(
        trust: &TrustRoot,
        cluster: &ClusterName,
        sequence: u64,
        object: &[u8],
    ) -> Result<CollectPlan, CollectPlanError> {
        let signed = of_keeper(trust, ObjectKind::CollectPlan, &layout::collect_plan(cluster, sequence), object)?;
        let message = proto::CollectPlan::decode(signed.payload()).map_err(malformed)?;
        let plan = CollectPlan {
            cluster: message.cluster.parse().map_err(malformed)?,
            sequence: message.sequence,
            at_us: message.at_us,
            packs: message.packs.into_iter().map(packs_from_proto).collect::<Result<_, _>>()?,
            backups: ids(&message.backups)?,
            wal: message.wal.into_iter().map(wal_from_proto).collect::<Result<_, _>>()?,
            trims: message.trims.iter().map(trim_from_proto).collect::<Result<_, _>>()?,
            bytes: message.bytes,
        };
        match (&plan.cluster, plan.sequence) == (cluster, sequence) {
            true => Ok(plan),
            false => Err(malformed(format!("it says it is plan {} of {}", plan.sequence, plan.cluster))),
        }
    }
}

impl Collected {
    pub fn seal(&self, signer: &Signer, repository_id: RepositoryId) -> Bytes {
        let message = proto::Collected {
            cluster: self.cluster.to_string(),
            sequence: self.sequence,
            at_us: self.at_us,
            sessions: self.sessions.iter().map(BackupId::to_string).collect(),
            trims: self.trims.iter().map(|(wal, lsn)| trim_to_proto(wal, *lsn)).collect(),
            objects: self.objects,
            bytes: self.bytes,
        };
        let key = layout::collected(&self.cluster, self.sequence);
        let signed = signer.sign(repository_id, &key, message.encode_to_vec());
        clear::encode(ObjectKind::Collected, &signed.encode())
    }

    pub fn open(
        trust: &TrustRoot,
        cluster: &ClusterName,
        sequence: u64,
        object: &[u8],
    ) -> Result<Collected, CollectPlanError> {
        let signed = of_keeper(trust, ObjectKind::Collected, &layout::collected(cluster, sequence), object)?;
        let message = proto::Collected::decode(signed.payload()).map_err(malformed)?;
        let collected = Collected {
            cluster: message.cluster.parse().map_err(malformed)?,
            sequence: message.sequence,
            at_us: message.at_us,
            sessions: ids(&message.sessions)?.into_iter().collect(),
            trims: message.trims.iter().map(trim_from_proto).collect::<Result<_, _>>()?,
            objects: message.objects,
            bytes: message.bytes,
        };
        match (&collected.cluster, collected.sequence) == (cluster, sequence) {
            true => Ok(collected),
            false => Err(malformed(format!("it says it is of {}", collected.cluster))),
        }
    }
}

/// The object's content, if a keeper or the root key signed it.
fn of_keeper(trust: &TrustRoot, kind: ObjectKind, key: &Path, object: &[u8]) -> Result<Signed, CollectPlanError> {
    let signed = Signed::decode(clear::decode(kind, object)?)?;
    let writer = trust.verify(key, &signed)?;
    match writer.role {
        Role::Root | Role::Keeper { .. } => Ok(signed),
        Role::Agent { .. } => Err(CollectPlanError::Right(writer.name().to_owned())),
    }
}

fn packs_to_proto((session, packs): (&BackupId, &Vec<PackId>)) -> proto::GarbagePacks {
    let packs = packs.iter().map(|pack| Bytes::copy_from_slice(&pack.0)).collect();
    proto::GarbagePacks { session: session.to_string(), packs }
}

fn packs_from_proto(message: proto::GarbagePacks) -> Result<(BackupId, Vec<PackId>), CollectPlanError> {
    let packs = message.packs.iter().map(|pack| PackId::from_slice(pack)).collect::<Result<_, _>>();
    Ok((message.session.parse().map_err(malformed)?, packs.map_err(malformed)?))
}

fn wal_to_proto((wal, garbage): (&WalBranch, &GarbageWal)) -> proto::GarbageWal {
    proto::GarbageWal {
        system_identifier: wal.system_id.0,
        timeline: wal.timeline.0,
        branch: Bytes::copy_from_slice(&wal.branch.0),
        segment_bytes: garbage.size.bytes(),
        segments: garbage.segments.iter().copied().collect(),
    }
}

fn trim_from_proto(message: &proto::Trim) -> Result<(WalBranch, Lsn), CollectPlanError> {
    let wal = wal_branch(message.system_identifier, message.timeline, &message.branch).map_err(malformed)?;
    Ok((wal, Lsn(message.lsn)))
}

fn wal_from_proto(message: proto::GarbageWal) -> Result<(WalBranch, GarbageWal), CollectPlanError> {
    let wal = wal_branch(message.system_identifier, message.timeline, &message.branch).map_err(malformed)?;
    let size = SegmentSize::new(message.segment_bytes.into()).map_err(malformed)?;
    Ok((wal, GarbageWal { size, segments: message.segments.into_iter().collect() }))
}

fn ids(names: &[String]) -> Result<Vec<BackupId>, CollectPlanError> {
    names.iter().map(|name| name.parse().map_err(|error: IdError| malformed(error))).collect()
}

fn malformed(error: impl std::fmt::Display) -> CollectPlanError {
    CollectPlanError::Malformed(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{Branch, SystemId, Timeline};
    use crate::signature::{CertifiedRole, WriterStatement};

    #[test]
    fn a_plan_is_a_keepers_of_that_cluster_and_number() {
        let root = Signer::from_seed(&[1; 32]);
        let trust = TrustRoot { repository_id: RepositoryId([7; 16]), root_public_key: root.public_key() };
        let orders: ClusterName = "orders".parse().unwrap();
        let wal = WalBranch { system_id: SystemId(7), timeline: Timeline(2), branch: Branch([5; 8]) };
        let plan = CollectPlan {
            cluster: orders.clone(),
            sequence: 9,
            at_us: 5,
            packs: [("bk_1".parse().unwrap(), vec![PackId([1; 32]), PackId([2; 32])])].into(),
            backups: vec!["bk_1".parse().unwrap()],
            wal: [(wal, GarbageWal { size: SegmentSize::DEFAULT, segments: [3, 4, 9].into() })].into(),
            trims: [(wal, Lsn(8))].into(),
            bytes: 77,
        };
        let open = |object: &[u8], sequence| CollectPlan::open(&trust, &orders, sequence, object);
        let object = plan.seal(&root, trust.repository_id);
        assert_eq!(open(&object, 9).as_ref(), Ok(&plan));
        assert_eq!(plan.objects(), 6);
        assert!(matches!(open(&object, 8), Err(CollectPlanError::Signature(_))), "copied to another name");
        let key = Signer::from_seed(&[2; 32]);
        let agent = root.issue(WriterStatement {
            repository_id: None,
            public_key: key.public_key(),
            role: CertifiedRole::Agent { clusters: vec![orders.clone()] },
            name: "db1".to_owned(),
            not_before_us: 0,
            not_after_us: 9,
        });
        let agent = key.with_chain(vec![agent]).unwrap();
        let forged = plan.seal(&agent, trust.repository_id);
        assert_eq!(open(&forged, 9), Err(CollectPlanError::Right("db1".to_owned())));
        for at in 0..object.len() {
            assert!(open(&object[..at], 9).is_err(), "cut at {at}");
        }
        let done = Collected {
            cluster: orders.clone(),
            sequence: 9,
            at_us: 6,
            sessions: ["bk_1".parse().unwrap()].into(),
            trims: [(wal, Lsn(8))].into(),
            objects: 6,
            bytes: 77,
        };
        let object = done.seal(&root, trust.repository_id);
        assert_eq!(Collected::open(&trust, &orders, 9, &object), Ok(done));
        assert!(open(&object, 9).is_err(), "a report is no plan");
    }
}
