//! Backups.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;
use futures::stream::{StreamExt, TryStreamExt};
use jiff::Timestamp;

use super::{Copier, ReplicateError};
use crate::cluster_log::{ClusterLog, ClusterState, SessionState};
use crate::format::log_entry::{Action, Open};
use crate::format::reference::{PackUse, ReferencePart, SessionPacks};
use crate::ids::{BackupId, ClusterName, Digest, PackId};
use crate::layout;
use crate::open::CommittedBackup;
use crate::signature::Role;
use crate::store::Creation;

/// Packs in flight: each costs up to 32 MiB of memory.
const IN_FLIGHT: usize = 6;

/// What became of a backup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copied {
    /// It is there now.
    Brought { packs: u64, bytes: u64 },
    /// It was there, or had been.
    WasThere,
    /// The replica has let go of the WAL that it needs.
    TooOld,
}

/// What a replica lacks.
#[derive(Debug)]
pub struct Lacking {
    pub backups: Vec<CommittedBackup>,
    /// Backups that do not read in the first place.
    pub damaged: Vec<String>,
}

/// What is to be brought under a session of the replica, and what lies there.
struct Division {
    parents: Vec<BackupId>,
    own: Vec<PackUse>,
    /// By the session under which they lie in the replica.
    others: BTreeMap<BackupId, Vec<PackUse>>,
}

impl Copier<'_> {
    /// Live backups that the replica lacks, and those that were begun, the newest first: once that is there, it is of use.
    pub async fn lacking(&self, cluster: &ClusterName) -> Result<Lacking, ReplicateError> {
        let (from, to) = self.logs(cluster).await?;
        let known = |id: &BackupId| to.state().session(id).is_some_and(|session| !session.is_open());
        let backups = self.source.backups(&from).await;
        let damaged = backups.unreadable.iter().filter(|(id, _)| !known(id));
        let damaged = damaged.map(|(id, error)| format!("backup {id}: {error}")).collect();
        self.all_came(backups.unreadable, self.source)?;
        let is_wanted = |backup: &CommittedBackup| {
            let id = &backup.reference.backup;
            let is_live = from.state().session(id).is_some_and(|session| session.is_live());
            (is_live || to.state().session(id).is_some()) && !known(id)
        };
        let lacking = backups.readable.into_iter().filter(is_wanted);
        let mut lacking: Vec<CommittedBackup> = lacking.collect();
        lacking.reverse();
        Ok(Lacking { backups: lacking, damaged })
    }

    /// Ends what was begun of backups that are gone by now in the first place.
    pub async fn give_up(&self, cluster: &ClusterName) -> Result<(), ReplicateError> {
        let (from, mut to) = self.logs(cluster).await?;
        let is_gone = |id: &BackupId| {
            from.state().session(id).is_some_and(|session| !session.is_open() && session.committed().is_none())
        };
        let left: Vec<BackupId> =
            to.state().open_sessions().map(|session| session.id().clone()).filter(is_gone).collect();
        for id in left {
            let reason = "it is gone where it was copied from".to_owned();
            let abort = Action::Abort { session: id.clone(), reason };
            let is_open = |state: &ClusterState| state.session(&id).is_some_and(|session| session.is_open());
            to.append_unless_done(self.author, |state| is_open(state).then(|| abort.clone())).await?;
        }
        Ok(())
    }

    /// Brings one, with the WAL that makes it consistent.
    pub async fn copy_backup(&self, cluster: &ClusterName, backup: &CommittedBackup) -> Result<Copied, ReplicateError> {
        let (from, mut to) = self.logs(cluster).await?;
        let part = &backup.reference;
        let id = &part.backup;
        let floor = from.state().session(id).map_or(part.start_lsn, |session| session.open.wal_floor);
        let known = self.known_packs(&to).await?;
        let mut division = match to.state().session(id) {
            Some(session) if session.is_open() => divide(part, &known, Some(&session.open.parents)),
            Some(_) => return Ok(Copied::WasThere),
            None if to.state().trimmed_below(&part.wal) > floor => return Ok(Copied::TooOld),
            None => divide(part, &known, None),
        };
        let open =
            Open { session: id.clone(), parents: division.parents.clone(), run: None, wal: part.wal, wal_floor: floor };
        to.append_unless_done(self.author, |state| {
            let is_live = |parent: &BackupId| state.session(parent).is_some_and(|parent| parent.is_live());
            let can = state.session(id).is_none() && open.parents.iter().all(is_live);
            (can && state.trimmed_below(&open.wal) <= floor).then(|| Action::Open(open.clone()))
        })
        .await?;
        match to.state().session(id).filter(|session| session.is_open()) {
            // The replica's own retention went on; the next look decides anew.
            None => return Ok(Copied::TooOld),
            // Another copier was first, and named other parents.
            Some(session) if session.open.parents != division.parents => {
                division = divide(part, &known, Some(&session.open.parents));
            }
            Some(_) => {}
        }
        let bytes = self.copy_packs(cluster, part, &division.own, from.state()).await?;
        self.copy_manifest(cluster, backup).await?;
        self.copy_stretch(cluster, part, floor).await?;
        let reference_digest = self.put_reference(cluster, backup, &division).await?;
        let commit =
            Action::Commit { session: id.clone(), manifest_digest: backup.commit.manifest_digest, reference_digest };
        to.append_unless_done(self.author, |state| {
            state.session(id).is_some_and(|session| session.is_open()).then(|| commit.clone())
        })
        .await?;
        match to.state().session(id).map(|session| &session.state) {
            Some(SessionState::Live(_) | SessionState::Expired(..)) => {
                Ok(Copied::Brought { packs: division.own.len() as u64, bytes })
            }
            _ => Ok(Copied::TooOld),
        }
    }

    /// The packs that live backups of the replica need, the newest backup's first.
    async fn known_packs(&self, to: &ClusterLog) -> Result<Vec<(BackupId, Needed)>, ReplicateError> {
        let backups = self.target.backups(to).await;
        // One that is damaged there can be no parent.
        self.all_came(backups.unreadable, self.target)?;
        let is_live =
            |backup: &&CommittedBackup| to.state().session(&backup.reference.backup).is_some_and(|own| own.is_live());
        let needed = |backup: &CommittedBackup| {
            let part = &backup.reference;
            let homes = part.packs().filter(|(of, ..)| *of == &part.cluster);
            (part.backup.clone(), homes.map(|(_, session, used)| (used.pack, session.clone())).collect())
        };
        Ok(backups.readable.iter().rev().filter(is_live).map(needed).collect())
    }

    async fn copy_packs(
        &self,
        cluster: &ClusterName,
        part: &ReferencePart,
        own: &[PackUse],
        from: &ClusterState,
    ) -> Result<u64, ReplicateError> {
        let there = self.at_target(self.target.store().list(&layout::session_packs(cluster, &part.backup)).await)?;
        let there: HashMap<PackId, u64> = there
            .iter()
            .filter_map(|object| Some((layout::parse_pack(cluster, &object.key)?.1, object.size)))
            .collect();
        let homes: HashMap<PackId, (&ClusterName, &BackupId)> =
            part.packs().map(|(of, session, used)| (used.pack, (of, session))).collect();
        let lacking = own.iter().filter(|used| there.get(&used.pack) != Some(&used.stored_bytes));
        let copies = lacking.filter_map(|used| {
            let (of, session) = homes.get(&used.pack)?;
            let moved = from.moved(&used.pack).filter(|_| *of == cluster);
            let source = layout::pack(of, moved.unwrap_or(session), used.pack);
            let target = layout::pack(cluster, &part.backup, used.pack);
            let pack = used.pack;
            Some(async move {
                let bytes = self.at_source(self.source.store().get(&source).await)?;
                let found = PackId(*blake3::hash(&bytes).as_bytes());
                if found != pack {
                    return Err(self.damaged(&source, &format!("its hash is {found}")));
                }
                let size = bytes.len() as u64;
                match self.at_target(self.target.store().create(&target, bytes).await)? {
                    Creation::Created => Ok(size),
                    Creation::AlreadyThere => Err(self.taken(&target)),
                }
            })
        });
        let copies: Vec<_> = copies.collect();
        futures::stream::iter(copies)
            .buffer_unordered(IN_FLIGHT)
            .try_fold(0, |sum, size| async move { Ok(sum + size) })
            .await
    }

    async fn copy_manifest(&self, cluster: &ClusterName, backup: &CommittedBackup) -> Result<(), ReplicateError> {
        let key = layout::manifest(cluster, &backup.reference.backup);
        let bytes = self.at_source(self.source.store().get(&key).await)?;
        if Digest(*blake3::hash(&bytes).as_bytes()) != backup.commit.manifest_digest {
            return Err(self.damaged(&key, &"it is not the one that its commit names"));
        }
        match self.at_target(self.target.store().create(&key, bytes).await)? {
            Creation::Created => Ok(()),
            Creation::AlreadyThere => Err(self.taken(&key)),
        }
    }

    /// The reference part as it is here, signed by the keeper. One that a copier before us left is as good, if it says the same.
    async fn put_reference(
        &self,
        cluster: &ClusterName,
        backup: &CommittedBackup,
        division: &Division,
    ) -> Result<Digest, ReplicateError> {
        let part = &backup.reference;
        let mut sessions: Vec<SessionPacks> = Vec::new();
        if !division.own.is_empty() {
            sessions.push(SessionPacks { session: part.backup.clone(), cluster: None, packs: division.own.clone() });
        }
        sessions.extend(division.others.iter().map(|(session, packs)| SessionPacks {
            session: session.clone(),
            cluster: None,
            packs: packs.clone(),
        }));
        let copy = ReferencePart {
            parents: division.parents.clone(),
            sessions,
            seen_at_us: Some(self.seen_at(cluster, backup).await?),
            ..part.clone()
        };
        let object = copy.seal(self.author.signer, self.target.id());
        let key = layout::reference(cluster, &part.backup);
        if self.at_target(self.target.store().create(&key, object.clone()).await)? == Creation::Created {
            return Ok(digest(&object));
        }
        let there = self.at_target(self.target.store().get(&key).await)?;
        let found = ReferencePart::open(&self.target.trust(), cluster, &part.backup, digest(&there), &there);
        match found {
            Ok((found, writer)) if found == copy && !matches!(writer.role, Role::Agent { .. }) => Ok(digest(&there)),
            _ => Err(self.taken(&key)),
        }
    }

    /// When the first place saw the commit: the order in time that retention goes by here, too.
    async fn seen_at(&self, cluster: &ClusterName, backup: &CommittedBackup) -> Result<i64, ReplicateError> {
        let key = layout::log_entry(cluster, backup.commit.stamp.sequence);
        let listed = self.at_source(self.source.store().listed(&key).await)?;
        let stored_at = listed.map_or_else(|| Timestamp::now().as_microsecond(), |listed| listed.last_modified_us);
        Ok(backup.seen_before_us().map_or(stored_at, |seen| seen.min(stored_at)))
    }
}

type Needed = HashMap<PackId, BackupId>;

/// Which of a backup's packs lie in the replica under sessions that it may name as parents. `fixed`: those it named already.
fn divide(part: &ReferencePart, known: &[(BackupId, Needed)], fixed: Option<&[BackupId]>) -> Division {
    let mut seen: HashSet<PackId> = HashSet::new();
    let mut left: Vec<PackUse> = part.packs().map(|(_, _, used)| *used).filter(|used| seen.insert(used.pack)).collect();
    let mut division =
        Division { parents: fixed.unwrap_or_default().to_vec(), own: Vec::new(), others: BTreeMap::new() };
    for (backup, needed) in known {
        if fixed.is_some_and(|fixed| !fixed.contains(backup)) {
            continue;
        }
        let (there, lacking): (Vec<PackUse>, Vec<PackUse>) =
            left.into_iter().partition(|used| needed.contains_key(&used.pack));
        left = lacking;
        if there.is_empty() {
            continue;
        }
        if fixed.is_none() {
            division.parents.push(backup.clone());
        }
        for used in there {
            division.others.entry(needed[&used.pack].clone()).or_default().push(used);
        }
    }
    Division { own: left, ..division }
}

fn digest(object: &Bytes) -> Digest {
    Digest(*blake3::hash(object).as_bytes())
}
