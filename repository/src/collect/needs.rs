//! What a prefix of a cluster's log still needs, and so what it does not. Pure, and the whole of what collection's safety
//! rests on: what is dead here can never be named by a later entry ([`crate::cluster_log::fold`]), so that a collector may
//! act on it however late, and however often.
//!
//! - A session that is closed never gets packs again, and a later session's parents are live at its own `Open`: what no
//!   unpurged backup needs then is never needed.
//! - WAL below a trim is named by no later `Open` on its branch and no later `Hold`, since trims never go back. A session counts on
//!   the other branches of its system, too, so that WAL of one that was left may come to be needed again, needlessly: what is
//!   removed is judged when it is.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::cluster_log::{ClusterState, Session, SessionState};
use crate::format::log_entry::HoldSubject;
use crate::format::reference::{PackUse, ReferencePart};
use crate::ids::{BackupId, ClusterName, PackId};
use crate::postgres::{Lsn, SystemId, WalBranch};

/// What must stay.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Needs {
    /// The prefix: so many entries.
    pub sequence: u64,
    /// Of this cluster's packs, those that unpurged backups need.
    packs: HashSet<PackId>,
    /// Sessions of which nothing may go.
    open: BTreeSet<BackupId>,
    /// Sessions that are over, with whether their backup is there.
    closed: BTreeMap<BackupId, bool>,
    trims: BTreeMap<WalBranch, Lsn>,
    stretches: Vec<Stretch>,
}

/// WAL `[from, to)`.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Stretch {
    system_id: SystemId,
    /// `None`: of all of the system's branches, since a backup of a standby may end on another timeline than it began on.
    wal: Option<WalBranch>,
    from: Lsn,
    /// `None`: to the end.
    to: Option<Lsn>,
}

/// The reference part of a backup that is not purged is not there or is not believed: nothing can be said of what is needed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("what backup {0} needs cannot be read, so nothing can be removed")]
pub struct UnknownNeeds(pub BackupId);

impl Needs {
    /// `references`: of every backup that is not purged.
    pub fn of(
        cluster: &ClusterName,
        state: &ClusterState,
        references: &BTreeMap<BackupId, ReferencePart>,
    ) -> Result<Needs, UnknownNeeds> {
        let mut needs = Needs {
            sequence: state.next(),
            packs: HashSet::new(),
            open: BTreeSet::new(),
            closed: BTreeMap::new(),
            trims: state.trims().clone(),
            stretches: Vec::new(),
        };
        for session in state.sessions() {
            let (system_id, floor) = (session.open.wal.system_id, session.open.wal_floor);
            match &session.state {
                SessionState::Open => {
                    needs.open.insert(session.id().clone());
                    needs.stretches.push(Stretch { system_id, wal: None, from: floor, to: None });
                }
                SessionState::Live(_) | SessionState::Expired(..) => {
                    let part = references.get(session.id()).ok_or_else(|| UnknownNeeds(session.id().clone()))?;
                    needs.closed.insert(session.id().clone(), true);
                    let own = |(of, _, used): (&ClusterName, &BackupId, &PackUse)| (of == cluster).then_some(used.pack);
                    needs.packs.extend(part.packs().filter_map(own));
                    needs.stretches.push(consistent(session, part));
                }
                SessionState::Aborted { .. } | SessionState::Purged => {
                    needs.closed.insert(session.id().clone(), false);
                }
            }
        }
        let held = state.holds().filter_map(|hold| match &hold.subject {
            HoldSubject::Wal { branch, start, end } => {
                Some(Stretch { system_id: branch.system_id, wal: Some(*branch), from: *start, to: Some(*end) })
            }
            HoldSubject::Backup(_) => None,
            // Its base is not purged, so its session is there.
            HoldSubject::Stretch(stretch) => {
                let open = &state.session(&stretch.base)?.open;
                let (system_id, from) = (open.wal.system_id, open.wal_floor);
                Some(Stretch { system_id, wal: None, from, to: stretch.end })
            }
        });
        needs.stretches.extend(held);
        Ok(needs)
    }

    /// Sessions that are over, with whether their backup is there.
    pub fn closed(&self) -> impl Iterator<Item = (&BackupId, bool)> {
        self.closed.iter().map(|(session, is_there)| (session, *is_there))
    }

    /// Whether a pack that lies under a session is garbage. One under a session that the log does not know is not judged.
    pub fn is_dead_pack(&self, session: &BackupId, pack: PackId) -> bool {
        self.closed.contains_key(session) && !self.packs.contains(&pack)
    }

    /// Whether a backup's manifest is garbage.
    pub fn is_dead_backup(&self, backup: &BackupId) -> bool {
        self.closed.get(backup) == Some(&false)
    }

    /// Below what a branch is trimmed.
    pub fn trims(&self) -> impl Iterator<Item = (&WalBranch, Lsn)> {
        self.trims.iter().map(|(wal, below)| (wal, *below))
    }

    /// Whether a segment, `[from, to)` of a branch, is garbage.
    pub fn is_dead_wal(&self, wal: &WalBranch, from: Lsn, to: Lsn) -> bool {
        let is_trimmed = self.trims.get(wal).is_some_and(|below| to <= *below);
        is_trimmed && !self.stretches.iter().any(|stretch| stretch.meets(wal, from, to))
    }
}

/// The WAL that makes a backup consistent. What its agent told when it began counts beside what it told at the end.
fn consistent(session: &Session, part: &ReferencePart) -> Stretch {
    let from = session.open.wal_floor.min(part.start_lsn);
    let to = Some(part.stop_lsn)
        .filter(|stop| *stop > session.open.wal_floor && part.wal.system_id == session.open.wal.system_id);
    Stretch { system_id: session.open.wal.system_id, wal: None, from, to }
}

impl Stretch {
    fn meets(&self, wal: &WalBranch, from: Lsn, to: Lsn) -> bool {
        let is_of = self.wal.map_or(self.system_id == wal.system_id, |own| own == *wal);
        is_of && self.from < to && self.to.is_none_or(|end| from < end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster_log::Verdict;
    use crate::format::log_entry::{Action, Entry, Hold, Open};
    use crate::format::reference::SessionPacks;
    use crate::format::reference::tests::sample;
    use crate::ids::{Digest, DomainId};
    use crate::signature::{PublicKey, Writer};

    fn orders() -> ClusterName {
        "orders".parse().unwrap()
    }

    fn id(name: &str) -> BackupId {
        name.parse().unwrap()
    }

    #[derive(Default)]
    struct Log {
        state: ClusterState,
        references: BTreeMap<BackupId, ReferencePart>,
    }

    impl Log {
        fn begun() -> Log {
            let mut log = Log::default();
            log.add(Action::Begin { domain: DomainId([1; 16]), key_commitment: [1; 32] });
            log
        }

        fn add(&mut self, action: Action) {
            let entry = Entry {
                cluster: orders(),
                sequence: self.state.next(),
                nonce: [0; 16],
                at_us: 0,
                keeper_epoch: 0,
                action,
            };
            let verdict = self.state.apply(&entry, &Writer::root(PublicKey([0; 32])));
            assert_eq!(verdict, Verdict::Accepted, "{entry:?}");
        }

        fn open(&mut self, name: &str, parents: &[&str], floor: u64) {
            let part = sample("orders", name);
            let parents = parents.iter().map(|parent| id(parent)).collect();
            self.add(Action::Open(Open {
                session: id(name),
                parents,
                run: None,
                wal: part.wal,
                wal_floor: Lsn(floor),
            }));
        }

        /// A backup of the packs that are given, by session; consistent between two positions.
        fn back_up(&mut self, name: &str, parents: &[&str], packs: &[(&str, u8)], (start, stop): (u64, u64)) {
            self.open(name, parents, start);
            let mut part = sample("orders", name);
            (part.start_lsn, part.stop_lsn) = (Lsn(start), Lsn(stop));
            let used = |(session, number): &(&str, u8)| SessionPacks {
                session: id(session),
                cluster: None,
                packs: vec![PackUse { pack: PackId([*number; 32]), stored_bytes: 10, used_bytes: 5 }],
            };
            part.sessions = packs.iter().map(used).collect();
            self.references.insert(id(name), part);
            let (manifest_digest, reference_digest) = (Digest([1; 32]), Digest([2; 32]));
            self.add(Action::Commit { session: id(name), manifest_digest, reference_digest });
        }

        fn needs(&self) -> Needs {
            Needs::of(&orders(), &self.state, &self.references).unwrap()
        }
    }

    #[test]
    fn a_pack_lives_as_long_as_any_backup_that_is_not_purged_needs_it() {
        let mut log = Log::begun();
        log.back_up("bk_1", &[], &[("bk_1", 1), ("bk_1", 2)], (10, 20));
        log.back_up("bk_2", &["bk_1"], &[("bk_1", 2), ("bk_2", 3)], (30, 40));
        log.open("bk_3", &["bk_2"], 50);
        let is_dead = |log: &Log, session: &str, pack: u8| log.needs().is_dead_pack(&id(session), PackId([pack; 32]));
        log.add(Action::Expire { backup: id("bk_1"), reason: String::new() });
        assert!(!is_dead(&log, "bk_1", 1), "it can be brought back");
        log.add(Action::Purge { backup: id("bk_1") });
        assert!(is_dead(&log, "bk_1", 1) && !is_dead(&log, "bk_1", 2) && !is_dead(&log, "bk_2", 3));
        assert!(is_dead(&log, "bk_2", 9), "sent twice, and named by no one");
        assert!(!is_dead(&log, "bk_3", 9), "it is being written");
        assert!(!is_dead(&log, "bk_9", 9), "nobody knows whose it is");
        assert!(log.needs().is_dead_backup(&id("bk_1")) && !log.needs().is_dead_backup(&id("bk_2")));
        log.add(Action::Abort { session: id("bk_3"), reason: String::new() });
        assert!(is_dead(&log, "bk_3", 9));
    }

    #[test]
    fn a_backup_whose_needs_are_not_known_stops_all() {
        let mut log = Log::begun();
        log.back_up("bk_1", &[], &[("bk_1", 1)], (10, 20));
        log.references.clear();
        assert_eq!(Needs::of(&orders(), &log.state, &log.references), Err(UnknownNeeds(id("bk_1"))));
    }

    #[test]
    fn below_a_trim_stays_what_makes_backups_consistent_what_is_held_and_what_a_session_may_need() {
        let mut log = Log::begun();
        log.back_up("bk_1", &[], &[], (100, 120));
        log.back_up("bk_2", &[], &[], (500, 520));
        let wal = sample("orders", "bk_1").wal;
        let other = WalBranch { system_id: SystemId(wal.system_id.0 + 1), ..wal };
        let dead = |log: &Log| -> Vec<u64> {
            let needs = log.needs();
            (0..10).map(|at| at * 100).filter(|at| needs.is_dead_wal(&wal, Lsn(*at), Lsn(at + 100))).collect()
        };
        assert!(dead(&log).is_empty());
        let subject = HoldSubject::Wal { branch: wal, start: Lsn(300), end: Lsn(301) };
        let (reason, owner) = (String::new(), String::new());
        log.add(Action::Hold(Hold { hold: "hold_1".parse().unwrap(), subject, reason, owner, until_us: None }));
        log.add(Action::Trim { branch: wal, lsn: Lsn(850) });
        assert_eq!(dead(&log), [0, 200, 400, 600, 700], "the one in which the trim lies stays whole");
        assert!(!log.needs().is_dead_wal(&other, Lsn(0), Lsn(100)));
        log.open("bk_3", &[], 900);
        log.add(Action::Release { hold: "hold_1".parse().unwrap() });
        log.add(Action::Trim { branch: wal, lsn: Lsn(1000) });
        assert_eq!(dead(&log), [0, 200, 300, 400, 600, 700, 800]);
        log.add(Action::Expire { backup: id("bk_1"), reason: String::new() });
        log.add(Action::Purge { backup: id("bk_1") });
        log.add(Action::Abort { session: id("bk_3"), reason: String::new() });
        assert_eq!(dead(&log), [0, 100, 200, 300, 400, 600, 700, 800, 900]);
    }
}
