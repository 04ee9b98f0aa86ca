//! The fold: which entries count, and what they change. Pure; every reader of a prefix comes to the same state.
//!
//! Each condition is a [`Rule`] with a name. A void entry changes nothing but the count, so one writer's mistake or malice
//! stops no one else. Tests drop each rule in turn and find what then goes wrong (`model.rs`).

use std::fmt;

use super::state::{Borrowed, ClusterState, Committed, DomainKeys, Expiry, Session, SessionState, Stamp};
use crate::format::log_entry::{Action, Entry, Hold, HoldSubject, Open};
use crate::ids::BackupId;
use crate::signature::{Role, Writer};

/// A condition under which an entry counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Rule {
    /// The writer's certificates were valid at the time the entry claims.
    ValidCertificate,
    /// The writer may make this kind of entry here, and of this session.
    WriterMay,
    /// A keeper's epoch is not older than one already seen, and no one but a keeper has one.
    CurrentEpoch,
    /// The log was begun, once.
    Begun,
    /// Key versions follow one another.
    NextKeyVersion,
    /// A session's id is new.
    NewSession,
    /// Each parent is live, or borrowed.
    LiveParents,
    /// No open or committed session serves the same scheduled run.
    RunOnce,
    /// The session's WAL was not trimmed before it began.
    FloorAboveTrim,
    /// What is committed, aborted or moved into is open.
    SessionOpen,
    /// A hold's id is new.
    NewHold,
    /// What is held is not purged, nor trimmed.
    HoldsWhatIsThere,
    /// What is released is held.
    HoldThere,
    /// What is expired is live, what is brought back or purged is expired.
    BackupState,
    /// What is expired or purged is not held.
    NotHeld,
    /// What is purged is no open session's parent.
    NoOpenChild,
    /// A trim never goes back.
    TrimForward,
    /// What is borrowed is not borrowed already, what is returned is.
    BorrowedOnce,
    /// What is returned is needed by no open session or unpurged backup.
    ReturnUnneeded,
}

impl Rule {
    /// Every rule there is.
    pub const ALL: [Rule; 19] = [
        Rule::ValidCertificate,
        Rule::WriterMay,
        Rule::CurrentEpoch,
        Rule::Begun,
        Rule::NextKeyVersion,
        Rule::NewSession,
        Rule::LiveParents,
        Rule::RunOnce,
        Rule::FloorAboveTrim,
        Rule::SessionOpen,
        Rule::NewHold,
        Rule::HoldsWhatIsThere,
        Rule::HoldThere,
        Rule::BackupState,
        Rule::NotHeld,
        Rule::NoOpenChild,
        Rule::TrimForward,
        Rule::BorrowedOnce,
        Rule::ReturnUnneeded,
    ];
}

/// Why an entry does not count.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Void {
    /// `None`: the object is intact but not an entry of a writer of this repository.
    pub rule: Option<Rule>,
    pub reason: String,
}

impl fmt::Display for Void {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Void {}

/// What became of an entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    Accepted,
    Void(Void),
}

impl ClusterState {
    /// Folds the next entry in.
    pub fn apply(&mut self, entry: &Entry, writer: &Writer) -> Verdict {
        let verdict = match self.judge(entry, writer) {
            Ok(()) => {
                self.change(entry, writer);
                Verdict::Accepted
            }
            Err(void) => {
                self.voids += 1;
                Verdict::Void(void)
            }
        };
        // Even a keeper's void entry shows that a newer keeper was elected.
        if matches!(writer.role, Role::Keeper { .. }) && writer.valid_at(entry.at_us) {
            self.keeper_epoch = self.keeper_epoch.max(entry.keeper_epoch);
        }
        self.next += 1;
        verdict
    }

    /// Passes over an object that is intact but nobody's entry.
    pub fn pass_over(&mut self) {
        self.voids += 1;
        self.next += 1;
    }

    /// Whether the entry would count as the next one. Changes nothing.
    pub fn judge(&self, entry: &Entry, writer: &Writer) -> Result<(), Void> {
        self.require(Rule::ValidCertificate, writer.valid_at(entry.at_us), || {
            format!("the certificate of \"{}\" is not valid at the entry's time", writer.name())
        })?;
        self.require(Rule::WriterMay, self.writer_may(entry, writer), || {
            format!("\"{}\" may not write this entry", writer.name())
        })?;
        self.judge_epoch(entry, writer)?;
        let begins = matches!(entry.action, Action::Begin { .. });
        self.require(Rule::Begun, self.keys.is_none() == begins, || {
            if begins { "the log was begun already".to_owned() } else { "the log was not begun".to_owned() }
        })?;
        match &entry.action {
            Action::Begin { .. } => Ok(()),
            Action::KeyVersion { version, .. } => self.judge_key_version(*version),
            Action::Open(open) => self.judge_open(open),
            Action::Commit { session, .. } | Action::Abort { session, .. } | Action::Moved { session, .. } => self
                .require(Rule::SessionOpen, self.session(session).is_some_and(Session::is_open), || {
                    format!("session {session} is not open")
                }),
            Action::Hold(hold) => self.judge_hold(hold),
            Action::Release { hold } => {
                self.require(Rule::HoldThere, self.holds.contains_key(hold), || format!("there is no hold {hold}"))
            }
            Action::Expire { backup, .. } => self.judge_expire(backup),
            Action::Undelete { backup } => self.judge_expired(backup),
            Action::Purge { backup } => self.judge_purge(backup),
            Action::Trim { branch, lsn } => {
                let trimmed = self.trimmed_below(branch);
                self.require(Rule::TrimForward, *lsn > trimmed, || format!("WAL is trimmed to {trimmed} already"))
            }
            Action::Borrow { cluster, backup, .. } => {
                let known = self.borrowed.contains_key(&Borrowed { cluster: cluster.clone(), backup: backup.clone() });
                self.require(Rule::BorrowedOnce, !known, || format!("{backup} of {cluster} is borrowed already"))
            }
            Action::Return { cluster, backup } => {
                self.judge_return(&Borrowed { cluster: cluster.clone(), backup: backup.clone() })
            }
        }
    }

    fn require(&self, rule: Rule, holds: bool, reason: impl FnOnce() -> String) -> Result<(), Void> {
        #[cfg(test)]
        let holds = holds || self.dropped == Some(rule);
        if holds { Ok(()) } else { Err(Void { rule: Some(rule), reason: reason() }) }
    }

    /// Rights by role. An agent begins its own cluster's log, since only hosts hold data keys; everything that decides
    /// on others' data is the keeper's.
    fn writer_may(&self, entry: &Entry, writer: &Writer) -> bool {
        let (name, clusters) = match &writer.role {
            Role::Root | Role::Keeper { .. } => return true,
            Role::Agent { name, clusters } => (name, clusters),
        };
        // Names are the controller's to give, and outlive an agent's keys.
        let own = |session: &BackupId| self.session(session).is_none_or(|session| session.opened.by == *name);
        let may = match &entry.action {
            Action::Begin { .. } | Action::Open(_) => true,
            Action::Commit { session, .. } | Action::Abort { session, .. } => own(session),
            Action::KeyVersion { .. }
            | Action::Hold(_)
            | Action::Release { .. }
            | Action::Expire { .. }
            | Action::Undelete { .. }
            | Action::Purge { .. }
            | Action::Trim { .. }
            | Action::Borrow { .. }
            | Action::Return { .. }
            | Action::Moved { .. } => false,
        };
        may && clusters.contains(&entry.cluster)
    }

    fn judge_epoch(&self, entry: &Entry, writer: &Writer) -> Result<(), Void> {
        let current = match writer.role {
            Role::Keeper { .. } => entry.keeper_epoch >= self.keeper_epoch,
            // An agent's word about epochs would fence every keeper off.
            Role::Root | Role::Agent { .. } => entry.keeper_epoch == 0,
        };
        self.require(Rule::CurrentEpoch, current, || {
            format!("keeper epoch {}, and {} was seen", entry.keeper_epoch, self.keeper_epoch)
        })
    }

    fn judge_key_version(&self, version: u32) -> Result<(), Void> {
        let newest = self.keys.as_ref().map_or(0, DomainKeys::newest_version);
        let next = newest.checked_add(1) == Some(version);
        self.require(Rule::NextKeyVersion, next, || format!("key version {version} after {newest}"))
    }

    fn judge_open(&self, open: &Open) -> Result<(), Void> {
        let known = self.sessions.contains_key(&open.session);
        self.require(Rule::NewSession, !known, || format!("session {} is not new", open.session))?;
        for parent in &open.parents {
            let live = match self.session(parent) {
                Some(session) => session.is_live(),
                None => self.borrowed.keys().any(|borrowed| borrowed.backup == *parent),
            };
            self.require(Rule::LiveParents, live, || format!("parent {parent} is not live"))?;
        }
        if let Some(run) = &open.run {
            self.require(Rule::RunOnce, self.serving(run).is_none(), || format!("run {run} is served already"))?;
        }
        let trimmed = self.trimmed_below(&open.wal);
        self.require(Rule::FloorAboveTrim, open.wal_floor >= trimmed, || {
            format!("WAL is needed from {}, and trimmed to {trimmed}", open.wal_floor)
        })
    }

    fn judge_hold(&self, hold: &Hold) -> Result<(), Void> {
        let known = self.holds.contains_key(&hold.hold);
        self.require(Rule::NewHold, !known, || format!("hold {} is there already", hold.hold))?;
        match &hold.subject {
            HoldSubject::Backup(backup) => {
                let there = self.session(backup).is_some_and(|session| session.committed().is_some());
                self.require(Rule::HoldsWhatIsThere, there, || format!("there is no backup {backup}"))
            }
            HoldSubject::Wal { branch, start, .. } => {
                let trimmed = self.trimmed_below(branch);
                self.require(Rule::HoldsWhatIsThere, *start >= trimmed, || format!("WAL is trimmed to {trimmed}"))
            }
            HoldSubject::Stretch(stretch) => {
                let base = self.session(&stretch.base).filter(|session| session.committed().is_some());
                let is_held = self.holds.values().any(|known| known.keeps_all_of(stretch));
                let is_there =
                    base.is_some_and(|base| is_held || base.open.wal_floor >= self.trimmed_below(&base.open.wal));
                self.require(Rule::HoldsWhatIsThere, is_there, || {
                    format!("there is no backup {} with the WAL behind it", stretch.base)
                })
            }
        }
    }

    fn judge_expire(&self, backup: &BackupId) -> Result<(), Void> {
        let live = self.session(backup).is_some_and(Session::is_live);
        self.require(Rule::BackupState, live, || format!("backup {backup} is not live"))?;
        self.require(Rule::NotHeld, !self.is_held(backup), || format!("backup {backup} is held"))
    }

    fn judge_expired(&self, backup: &BackupId) -> Result<(), Void> {
        let expired = |session: &Session| matches!(session.state, SessionState::Expired(..));
        self.require(Rule::BackupState, self.session(backup).is_some_and(expired), || {
            format!("backup {backup} is not in the trash")
        })
    }

    fn judge_purge(&self, backup: &BackupId) -> Result<(), Void> {
        self.judge_expired(backup)?;
        self.require(Rule::NotHeld, !self.is_held(backup), || format!("backup {backup} is held"))?;
        let child = self.open_sessions().find(|session| session.open.parents.contains(backup));
        self.require(Rule::NoOpenChild, child.is_none(), || {
            let child = child.map_or("?", |session| session.id().as_str());
            format!("open session {child} may refer to backup {backup}")
        })
    }

    fn judge_return(&self, borrowed: &Borrowed) -> Result<(), Void> {
        self.require(Rule::BorrowedOnce, self.borrowed.contains_key(borrowed), || {
            format!("{} of {} is not borrowed", borrowed.backup, borrowed.cluster)
        })?;
        let needs = |session: &&Session| session.needs_content() && session.borrowed.contains(borrowed);
        let needed = self.sessions.values().find(needs);
        self.require(Rule::ReturnUnneeded, needed.is_none(), || {
            let by = needed.map_or("?", |session| session.id().as_str());
            format!("{by} needs {} of {}", borrowed.backup, borrowed.cluster)
        })
    }

    fn change(&mut self, entry: &Entry, writer: &Writer) {
        let stamp = Stamp { sequence: entry.sequence, at_us: entry.at_us, by: writer.name().to_owned() };
        match &entry.action {
            Action::Begin { domain, key_commitment } => {
                let commitments = [(1, *key_commitment)].into();
                self.keys = Some(DomainKeys { domain: *domain, commitments });
            }
            Action::KeyVersion { version, key_commitment } => {
                if let Some(keys) = &mut self.keys {
                    keys.commitments.insert(*version, *key_commitment);
                }
            }
            Action::Open(open) => {
                let borrowed = self.borrowed_through(&open.parents);
                let session = Session { open: open.clone(), opened: stamp, state: SessionState::Open, borrowed };
                self.sessions.insert(open.session.clone(), session);
            }
            Action::Commit { session, manifest_digest, reference_digest } => {
                let (manifest_digest, reference_digest) = (*manifest_digest, *reference_digest);
                let committed = Committed { manifest_digest, reference_digest, stamp };
                self.set(session, SessionState::Live(committed));
            }
            Action::Abort { session, reason } => self.set(session, SessionState::Aborted { reason: reason.clone() }),
            Action::Hold(hold) => {
                self.holds.insert(hold.hold.clone(), hold.clone());
            }
            Action::Release { hold } => {
                self.holds.remove(hold);
            }
            Action::Expire { backup, reason } => {
                if let Some(committed) = self.commit_of(backup) {
                    let expiry = Expiry { reason: reason.clone(), stamp };
                    self.set(backup, SessionState::Expired(committed, expiry));
                }
            }
            Action::Undelete { backup } => {
                if let Some(committed) = self.commit_of(backup) {
                    self.set(backup, SessionState::Live(committed));
                }
            }
            Action::Purge { backup } => self.set(backup, SessionState::Purged),
            Action::Trim { branch, lsn } => {
                self.trims.insert(*branch, *lsn);
            }
            Action::Borrow { cluster, backup, hold } => {
                let borrowed = Borrowed { cluster: cluster.clone(), backup: backup.clone() };
                self.borrowed.insert(borrowed, hold.clone());
            }
            Action::Return { cluster, backup } => {
                self.borrowed.remove(&Borrowed { cluster: cluster.clone(), backup: backup.clone() });
            }
            Action::Moved { pack, session } => {
                self.moved.insert(*pack, session.clone());
            }
        }
    }

    fn commit_of(&self, backup: &BackupId) -> Option<Committed> {
        self.session(backup)?.committed().cloned()
    }

    fn set(&mut self, session: &BackupId, state: SessionState) {
        if let Some(session) = self.sessions.get_mut(session) {
            session.state = state;
        }
    }
}
