//! Log entries: `clusters/<cluster>/log/<sequence>`, signed, in the envelope of objects in clear.
//!
//! Two outcomes of reading are kept apart. Bytes that are not an intact object stop the reader: nothing may be decided on
//! a log with a hole. An intact object that its signer could not or may not write is void: it is passed over, so that no
//! one who can create an object can stop a cluster's log for ever. Whether an entry fits the log so far is the fold's.

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as proto;
use walfleet_proto::repository::v1::log_entry::Action as ProtoAction;

use super::clear::{self, ClearError, ObjectKind};
use crate::ids::{BackupId, ClusterName, Digest, DomainId, HoldId, PackId, RepositoryId};
use crate::layout;
use crate::postgres::{Branch, Lsn, WalBranch};
use crate::signature::{Signed, Signer, TrustRoot, Writer};

/// One entry of a cluster's log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub cluster: ClusterName,
    pub sequence: u64,
    /// Only its writer knows it beforehand, so two entries are never byte for byte the same by chance.
    pub nonce: [u8; 16],
    /// The writer's clock, microseconds since the Unix epoch.
    pub at_us: i64,
    /// The election revision of the controller that wrote it; 0 in everyone else's entries.
    pub keeper_epoch: u64,
    pub action: Action,
}

/// What an entry does.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Action {
    Begin { domain: DomainId, key_commitment: [u8; 32] },
    KeyVersion { version: u32, key_commitment: [u8; 32] },
    Open(Open),
    Commit { session: BackupId, manifest_digest: Digest, reference_digest: Digest },
    Abort { session: BackupId, reason: String },
    Hold(Hold),
    Release { hold: HoldId },
    Expire { backup: BackupId, reason: String },
    Undelete { backup: BackupId },
    Purge { backup: BackupId },
    Trim { branch: WalBranch, lsn: Lsn },
    Borrow { cluster: ClusterName, backup: BackupId, hold: HoldId },
    Return { cluster: ClusterName, backup: BackupId },
    Moved { pack: PackId, session: BackupId },
}

/// A backup begins.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Open {
    pub session: BackupId,
    /// Live backups whose packs this one may refer to.
    pub parents: Vec<BackupId>,
    /// The scheduled run this serves.
    pub run: Option<String>,
    /// The branch that the backup starts on.
    pub wal: WalBranch,
    /// No WAL at or above this position may be trimmed.
    pub wal_floor: Lsn,
}

/// Something is kept.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Hold {
    pub hold: HoldId,
    pub subject: HoldSubject,
    pub reason: String,
    pub owner: String,
    /// `None`: without end. The keeper releases it then; the log itself knows no time.
    pub until_us: Option<i64>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum HoldSubject {
    Backup(BackupId),
    /// `[start, end)` of one branch.
    Wal {
        branch: WalBranch,
        start: Lsn,
        end: Lsn,
    },
    /// A stretch of time.
    Stretch(HeldStretch),
}

/// Any second of it can be restored from its base: held are that and the WAL of every branch of its system, from the floor of
/// its session on.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HeldStretch {
    pub base: BackupId,
    /// `None`: all that comes.
    pub end: Option<Lsn>,
    /// What was asked for, microseconds since the Unix epoch.
    pub from_us: i64,
    /// `None`: without end.
    pub to_us: Option<i64>,
}

impl Hold {
    /// Whether it keeps the WAL that a stretch is to keep.
    pub fn keeps_all_of(&self, wanted: &HeldStretch) -> bool {
        let reaches = |end: Option<Lsn>| end.is_none_or(|end| wanted.end.is_some_and(|wanted| wanted <= end));
        matches!(&self.subject, HoldSubject::Stretch(known) if known.base == wanted.base && reaches(known.end))
    }

    /// The backup that it keeps.
    pub fn backup(&self) -> Option<&BackupId> {
        match &self.subject {
            HoldSubject::Backup(backup) => Some(backup),
            HoldSubject::Stretch(stretch) => Some(&stretch.base),
            HoldSubject::Wal { .. } => None,
        }
    }
}

/// An intact object of a log, read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Opened {
    Entry {
        entry: Box<Entry>,
        writer: Writer,
    },
    /// Nothing that counts, and why.
    Void {
        reason: String,
    },
}

impl Entry {
    /// The object's bytes.
    pub fn seal(&self, signer: &Signer, repository_id: RepositoryId) -> Bytes {
        let key = layout::log_entry(&self.cluster, self.sequence);
        let signed = signer.sign(repository_id, &key, entry_to_proto(self).encode_to_vec());
        clear::encode(ObjectKind::LogEntry, &signed.encode())
    }
}

/// Reads the object that lies at a cluster's log under a number.
pub fn open(trust: &TrustRoot, cluster: &ClusterName, sequence: u64, object: &[u8]) -> Result<Opened, ClearError> {
    let body = clear::decode(ObjectKind::LogEntry, object)?;
    let key = layout::log_entry(cluster, sequence);
    let read = || -> Result<(Entry, Writer), String> {
        let signed = Signed::decode(body).map_err(|error| error.to_string())?;
        let writer = trust.verify(&key, &signed).map_err(|error| error.to_string())?;
        let message = proto::LogEntry::decode(signed.payload()).map_err(|error| error.to_string())?;
        let entry = entry_from_proto(message)?;
        if entry.cluster != *cluster || entry.sequence != sequence {
            return Err(format!("it says it is number {} of {}", entry.sequence, entry.cluster));
        }
        Ok((entry, writer))
    };
    Ok(match read() {
        Ok((entry, writer)) => Opened::Entry { entry: Box::new(entry), writer },
        Err(reason) => Opened::Void { reason },
    })
}

fn entry_to_proto(entry: &Entry) -> proto::LogEntry {
    proto::LogEntry {
        cluster: entry.cluster.to_string(),
        sequence: entry.sequence,
        nonce: entry.nonce.to_vec().into(),
        at_us: entry.at_us,
        keeper_epoch: entry.keeper_epoch,
        action: Some(action_to_proto(&entry.action)),
    }
}

fn entry_from_proto(message: proto::LogEntry) -> Result<Entry, String> {
    let action = message.action.ok_or("it has no known action")?;
    Ok(Entry {
        cluster: parse(&message.cluster)?,
        sequence: message.sequence,
        nonce: message.nonce.as_ref().try_into().map_err(|_| "its nonce is not of 16 bytes")?,
        at_us: message.at_us,
        keeper_epoch: message.keeper_epoch,
        action: action_from_proto(action)?,
    })
}

fn action_to_proto(action: &Action) -> ProtoAction {
    let bytes = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
    match action {
        Action::Begin { domain, key_commitment } => {
            ProtoAction::Begin(proto::Begin { domain: bytes(&domain.0), key_commitment: bytes(key_commitment) })
        }
        Action::KeyVersion { version, key_commitment } => {
            ProtoAction::KeyVersion(proto::KeyVersion { version: *version, key_commitment: bytes(key_commitment) })
        }
        Action::Open(open) => ProtoAction::Open(open_to_proto(open)),
        Action::Commit { session, manifest_digest, reference_digest } => ProtoAction::Commit(proto::Commit {
            session: session.to_string(),
            manifest_digest: bytes(&manifest_digest.0),
            reference_digest: bytes(&reference_digest.0),
        }),
        Action::Abort { session, reason } => {
            ProtoAction::Abort(proto::Abort { session: session.to_string(), reason: reason.clone() })
        }
        Action::Hold(hold) => ProtoAction::Hold(hold_to_proto(hold)),
        Action::Release { hold } => ProtoAction::Release(proto::Release { hold: hold.to_string() }),
        Action::Expire { backup, reason } => {
            ProtoAction::Expire(proto::Expire { backup: backup.to_string(), reason: reason.clone() })
        }
        Action::Undelete { backup } => ProtoAction::Undelete(proto::Undelete { backup: backup.to_string() }),
        Action::Purge { backup } => ProtoAction::Purge(proto::Purge { backup: backup.to_string() }),
        Action::Trim { branch, lsn } => ProtoAction::Trim(trim_to_proto(branch, *lsn)),
        Action::Borrow { cluster, backup, hold } => ProtoAction::Borrow(proto::Borrow {
            cluster: cluster.to_string(),
            backup: backup.to_string(),
            hold: hold.to_string(),
        }),
        Action::Return { cluster, backup } => {
            ProtoAction::Return(proto::Return { cluster: cluster.to_string(), backup: backup.to_string() })
        }
        Action::Moved { pack, session } => {
            ProtoAction::Moved(proto::Moved { pack: bytes(&pack.0), session: session.to_string() })
        }
    }
}

fn action_from_proto(action: ProtoAction) -> Result<Action, String> {
    Ok(match action {
        ProtoAction::Begin(begin) => Action::Begin {
            domain: DomainId::from_slice(&begin.domain).map_err(text)?,
            key_commitment: commitment(&begin.key_commitment)?,
        },
        ProtoAction::KeyVersion(version) => {
            Action::KeyVersion { version: version.version, key_commitment: commitment(&version.key_commitment)? }
        }
        ProtoAction::Open(open) => Action::Open(open_from_proto(open)?),
        ProtoAction::Commit(commit) => Action::Commit {
            session: parse(&commit.session)?,
            manifest_digest: Digest::from_slice(&commit.manifest_digest).map_err(text)?,
            reference_digest: Digest::from_slice(&commit.reference_digest).map_err(text)?,
        },
        ProtoAction::Abort(abort) => Action::Abort { session: parse(&abort.session)?, reason: abort.reason },
        ProtoAction::Hold(hold) => Action::Hold(hold_from_proto(hold)?),
        ProtoAction::Release(release) => Action::Release { hold: parse(&release.hold)? },
        ProtoAction::Expire(expire) => Action::Expire { backup: parse(&expire.backup)?, reason: expire.reason },
        ProtoAction::Undelete(undelete) => Action::Undelete { backup: parse(&undelete.backup)? },
        ProtoAction::Purge(purge) => Action::Purge { backup: parse(&purge.backup)? },
        ProtoAction::Trim(trim) => Action::Trim {
            branch: wal_branch(trim.system_identifier, trim.timeline, &trim.branch)?,
            lsn: Lsn(trim.lsn),
        },
        ProtoAction::Borrow(borrow) => Action::Borrow {
            cluster: parse(&borrow.cluster)?,
            backup: parse(&borrow.backup)?,
            hold: parse(&borrow.hold)?,
        },
        ProtoAction::Return(returned) => {
            Action::Return { cluster: parse(&returned.cluster)?, backup: parse(&returned.backup)? }
        }
        ProtoAction::Moved(moved) => {
            Action::Moved { pack: PackId::from_slice(&moved.pack).map_err(text)?, session: parse(&moved.session)? }
        }
    })
}

fn open_to_proto(open: &Open) -> proto::Open {
    proto::Open {
        session: open.session.to_string(),
        parents: open.parents.iter().map(|parent| parent.to_string()).collect(),
        run: open.run.clone().unwrap_or_default(),
        system_identifier: open.wal.system_id.0,
        timeline: open.wal.timeline.0,
        wal_floor_lsn: open.wal_floor.0,
        branch: Bytes::copy_from_slice(&open.wal.branch.0),
    }
}

fn open_from_proto(open: proto::Open) -> Result<Open, String> {
    Ok(Open {
        session: parse(&open.session)?,
        parents: open.parents.iter().map(|parent| parse(parent)).collect::<Result<_, _>>()?,
        run: Some(open.run).filter(|run| !run.is_empty()),
        wal: wal_branch(open.system_identifier, open.timeline, &open.branch)?,
        wal_floor: Lsn(open.wal_floor_lsn),
    })
}

fn hold_to_proto(hold: &Hold) -> proto::Hold {
    let (backup, wal, stretch) = match &hold.subject {
        HoldSubject::Backup(backup) => (backup.to_string(), None, None),
        HoldSubject::Stretch(stretch) => (stretch.base.to_string(), None, Some(stretch_to_proto(stretch))),
        HoldSubject::Wal { branch, start, end } => {
            let range = proto::WalRange {
                system_identifier: branch.system_id.0,
                timeline: branch.timeline.0,
                branch: Bytes::copy_from_slice(&branch.branch.0),
                start_lsn: start.0,
                end_lsn: end.0,
            };
            (String::new(), Some(range), None)
        }
    };
    proto::Hold {
        hold: hold.hold.to_string(),
        backup,
        wal,
        reason: hold.reason.clone(),
        owner: hold.owner.clone(),
        until_us: hold.until_us.unwrap_or(0),
        stretch,
    }
}

fn stretch_to_proto(stretch: &HeldStretch) -> proto::HeldStretch {
    proto::HeldStretch {
        end_lsn: stretch.end.map_or(0, |end| end.0),
        from_us: stretch.from_us,
        to_us: stretch.to_us.unwrap_or(0),
    }
}

fn hold_from_proto(hold: proto::Hold) -> Result<Hold, String> {
    let subject = match (hold.backup.is_empty(), hold.wal, hold.stretch) {
        (false, None, None) => HoldSubject::Backup(parse(&hold.backup)?),
        (false, None, Some(stretch)) => HoldSubject::Stretch(HeldStretch {
            base: parse(&hold.backup)?,
            end: Some(Lsn(stretch.end_lsn)).filter(|end| *end != Lsn::INVALID),
            from_us: stretch.from_us,
            to_us: Some(stretch.to_us).filter(|to| *to != 0),
        }),
        (true, Some(range), None) if range.start_lsn < range.end_lsn => HoldSubject::Wal {
            branch: wal_branch(range.system_identifier, range.timeline, &range.branch)?,
            start: Lsn(range.start_lsn),
            end: Lsn(range.end_lsn),
        },
        (true, Some(_), None) => return Err("it holds an empty range".to_owned()),
        _ => return Err("a hold keeps a backup, a range of WAL, or a stretch of time from a backup on".to_owned()),
    };
    let until_us = Some(hold.until_us).filter(|until| *until != 0);
    Ok(Hold { hold: parse(&hold.hold)?, subject, reason: hold.reason, owner: hold.owner, until_us })
}

/// Without bytes, the first.
fn wal_branch(system_identifier: u64, timeline: u32, branch: &[u8]) -> Result<WalBranch, String> {
    super::wal_branch(system_identifier, timeline, if branch.is_empty() { &Branch::ROOT.0 } else { branch })
}

pub(super) fn trim_to_proto(branch: &WalBranch, lsn: Lsn) -> proto::Trim {
    proto::Trim {
        system_identifier: branch.system_id.0,
        timeline: branch.timeline.0,
        branch: Bytes::copy_from_slice(&branch.branch.0),
        lsn: lsn.0,
    }
}

fn commitment(bytes: &[u8]) -> Result<[u8; 32], String> {
    bytes.try_into().map_err(|_| "a key commitment has 32 bytes".to_owned())
}

fn parse<T: std::str::FromStr<Err = crate::ids::IdError>>(name: &str) -> Result<T, String> {
    name.parse().map_err(text)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{SystemId, Timeline};

    fn branch() -> WalBranch {
        WalBranch { system_id: SystemId(7412), timeline: Timeline(2), branch: Branch([5; 8]) }
    }

    fn every_action() -> Vec<Action> {
        let (backup, other): (BackupId, BackupId) = ("bk_1".parse().unwrap(), "bk_2".parse().unwrap());
        let (hold, cluster): (HoldId, ClusterName) = ("hold_1".parse().unwrap(), "clone".parse().unwrap());
        let keep = |subject, until_us| {
            let (reason, owner) = ("audit".to_owned(), "anna".to_owned());
            Action::Hold(Hold { hold: hold.clone(), subject, reason, owner, until_us })
        };
        vec![
            Action::Begin { domain: DomainId([1; 16]), key_commitment: [2; 32] },
            Action::KeyVersion { version: 2, key_commitment: [3; 32] },
            Action::Open(Open {
                session: backup.clone(),
                parents: vec![other],
                run: Some("nightly/1".to_owned()),
                wal: branch(),
                wal_floor: Lsn(9),
            }),
            Action::Commit {
                session: backup.clone(),
                manifest_digest: Digest([4; 32]),
                reference_digest: Digest([5; 32]),
            },
            Action::Abort { session: backup.clone(), reason: "lost".to_owned() },
            keep(HoldSubject::Backup(backup.clone()), None),
            keep(HoldSubject::Wal { branch: branch(), start: Lsn(1), end: Lsn(2) }, Some(7)),
            keep(
                HoldSubject::Stretch(HeldStretch { base: backup.clone(), end: None, from_us: 5, to_us: Some(6) }),
                None,
            ),
            Action::Release { hold: hold.clone() },
            Action::Expire { backup: backup.clone(), reason: "daily 8".to_owned() },
            Action::Undelete { backup: backup.clone() },
            Action::Purge { backup: backup.clone() },
            Action::Trim { branch: branch(), lsn: Lsn(8) },
            Action::Borrow { cluster: cluster.clone(), backup: backup.clone(), hold },
            Action::Return { cluster, backup: backup.clone() },
            Action::Moved { pack: PackId([6; 32]), session: backup },
        ]
    }

    fn entry(action: Action) -> Entry {
        Entry { cluster: "orders".parse().unwrap(), sequence: 3, nonce: [9; 16], at_us: 11, keeper_epoch: 12, action }
    }

    #[test]
    fn every_action_comes_back_as_it_was() {
        let signer = Signer::from_seed(&[1; 32]);
        let trust = TrustRoot { repository_id: RepositoryId([7; 16]), root_public_key: signer.public_key() };
        for action in every_action() {
            let entry = entry(action);
            let object = entry.seal(&signer, trust.repository_id);
            let opened = open(&trust, &entry.cluster, 3, &object).unwrap();
            let writer = Writer::root(signer.public_key());
            assert_eq!(opened, Opened::Entry { entry: Box::new(entry), writer });
        }
    }

    #[test]
    fn damage_stops_and_forgery_is_void() {
        let (signer, stranger) = (Signer::from_seed(&[1; 32]), Signer::from_seed(&[2; 32]));
        let trust = TrustRoot { repository_id: RepositoryId([7; 16]), root_public_key: signer.public_key() };
        let entry = entry(every_action().remove(0));
        let object = entry.seal(&signer, trust.repository_id);
        let mut damaged = object.to_vec();
        damaged[40] ^= 1;
        assert_eq!(open(&trust, &entry.cluster, 3, &damaged), Err(ClearError::Checksum));
        let void =
            |object: &[u8], sequence| matches!(open(&trust, &entry.cluster, sequence, object), Ok(Opened::Void { .. }));
        assert!(void(&entry.seal(&stranger, trust.repository_id), 3));
        assert!(void(&object, 4), "copied to another number");
        assert!(void(&clear::encode(ObjectKind::LogEntry, b"\xff\xff"), 3));
        let renumbered = Entry { sequence: 4, ..entry.clone() };
        let signed = signer.sign(
            trust.repository_id,
            &layout::log_entry(&entry.cluster, 3),
            entry_to_proto(&renumbered).encode_to_vec(),
        );
        assert!(void(&clear::encode(ObjectKind::LogEntry, &signed.encode()), 3));
        let unknown = proto::LogEntry { action: None, ..entry_to_proto(&entry) };
        let key = layout::log_entry(&entry.cluster, 3);
        let signed = signer.sign(trust.repository_id, &key, unknown.encode_to_vec());
        assert!(void(&clear::encode(ObjectKind::LogEntry, &signed.encode()), 3));
    }
}
