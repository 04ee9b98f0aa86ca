//! Everything tried by anyone: rights, epochs, keys, and what an accepted entry may never do.

use super::*;
use crate::signature::{CertifiedRole, Role, Signer, TrustRoot, WriterStatement};

/// Every kind of entry by every kind of writer, as a stranger to the protocol might try them.
fn anything_by_anyone() -> Vec<Attempt> {
    let root = Signer::from_seed(&[1; 32]);
    let certified = |name: &str, role: CertifiedRole, until: i64| {
        let key = Signer::from_seed(&[2; 32]).public_key();
        let (name, span) = (name.to_owned(), (0, until));
        let claims = WriterStatement {
            repository_id: None,
            public_key: key,
            role,
            name,
            not_before_us: span.0,
            not_after_us: span.1,
        };
        let trust = TrustRoot { repository_id: crate::ids::RepositoryId([0; 16]), root_public_key: root.public_key() };
        trust.verify_chain(key, &[root.issue(claims)]).unwrap()
    };
    let agent =
        |name: &str, of: ClusterName, until| certified(name, CertifiedRole::Agent { clusters: vec![of] }, until);
    let keeper = certified("keeper", CertifiedRole::Keeper, 9);
    let writers = [
        (Writer::root(root.public_key()), 0),
        (keeper.clone(), 1),
        (keeper, 2),
        (certified("late keeper", CertifiedRole::Keeper, 4), 2),
        (agent("db1", cluster(), 9), 0),
        (agent("db1", cluster(), 9), 3),
        (agent("db2", cluster(), 9), 0),
        (agent("db3", lender(), 9), 0),
    ];
    let wal_hold = |start| HoldSubject::Wal { branch: branch(), start: Lsn(start), end: Lsn(9) };
    let actions = [
        begin(),
        Action::Begin { domain: DomainId([2; 16]), key_commitment: [1; 32] },
        Action::KeyVersion { version: 1, key_commitment: [3; 32] },
        Action::KeyVersion { version: 2, key_commitment: [2; 32] },
        Action::KeyVersion { version: 3, key_commitment: [2; 32] },
        open("bk_1", None, None, 1),
        commit("bk_1"),
        Action::Abort { session: id("bk_1"), reason: String::new() },
        Action::Expire { backup: id("bk_1"), reason: String::new() },
        Action::Undelete { backup: id("bk_1") },
        Action::Purge { backup: id("bk_1") },
        hold("hold_1", wal_hold(1)),
        hold("hold_1", wal_hold(2)),
        Action::Release { hold: hold_id("hold_1") },
        Action::Trim { branch: branch(), lsn: Lsn(1) },
        Action::Borrow { cluster: lender(), backup: id(FOREIGN), hold: hold_id("hold_x") },
        Action::Borrow { cluster: lender(), backup: id(FOREIGN), hold: hold_id("hold_y") },
        Action::Return { cluster: lender(), backup: id(FOREIGN) },
    ];
    let by = |action: &Action| {
        let attempt = |(writer, keeper_epoch): &(Writer, u64)| Attempt {
            action: action.clone(),
            writer: writer.clone(),
            keeper_epoch: *keeper_epoch,
        };
        writers.iter().map(attempt).collect::<Vec<_>>()
    };
    actions.iter().flat_map(by).collect()
}

/// Tries everything by anyone in every state that can be reached so, and checks what each accepted entry did.
pub(super) fn try_anything(dropped: Option<Rule>) -> Result<usize, String> {
    let start = ClusterState { dropped, ..ClusterState::default() };
    let mut folds = Folds::new(start, anything_by_anyone());
    let mut from = 0;
    while from < folds.states.len() {
        for attempt in 0..folds.attempts.len() {
            if let Some(to) = folds.step(from as u32, attempt) {
                let Attempt { action, writer, keeper_epoch } = &folds.attempts[attempt];
                let (before, after) = (folds.state(from as u32), folds.state(to));
                broken_promise(before, after, &entry(before, action.clone(), *keeper_epoch), writer)?;
            }
        }
        from += 1;
    }
    Ok(from)
}

/// What an accepted entry must never do, whatever else goes on.
fn broken_promise(before: &ClusterState, after: &ClusterState, entry: &Entry, writer: &Writer) -> Result<(), String> {
    let broken = |what: &str| Err(format!("{what}: {:?} by {}", entry.action, writer.name()));
    if before == after {
        return broken("an accepted entry changed nothing");
    }
    if before.keys.is_none() && after.keys.is_none() {
        return broken("something was done before the log was begun");
    }
    for (id, then) in &before.sessions {
        let now = &after.sessions[id];
        if (&then.open, &then.opened) != (&now.open, &now.opened) {
            return broken("a session was opened again");
        }
        let allowed = match (&then.state, &now.state) {
            (a, b) if a == b => true,
            (SessionState::Open, SessionState::Live(_) | SessionState::Aborted { .. }) => true,
            (SessionState::Live(_), SessionState::Expired(..)) => !before.is_held(id),
            (SessionState::Expired(..), SessionState::Live(_)) => true,
            (SessionState::Expired(..), SessionState::Purged) => !before.is_held(id),
            _ => false,
        };
        if !allowed {
            return broken("a session went where it may not go");
        }
    }
    if before.holds.iter().any(|(id, hold)| after.holds.get(id).is_some_and(|now| now != hold)) {
        return broken("a hold was changed");
    }
    if before.borrowed.iter().any(|(what, hold)| after.borrowed.get(what).is_some_and(|now| now != hold)) {
        return broken("a borrowing was changed");
    }
    if before.trims.iter().any(|(branch, lsn)| after.trims[branch] < *lsn) {
        return broken("a trim went back");
    }
    if let (Some(then), Some(now)) = (&before.keys, &after.keys) {
        let kept = then.commitments.iter().all(|(version, key)| now.commitments.get(version) == Some(key));
        let dense = now.commitments.len() as u32 == now.newest_version();
        if then.domain != now.domain || !kept || !dense {
            return broken("keys were changed, not added");
        }
    }
    broken_right(before, entry, writer)
}

fn broken_right(before: &ClusterState, entry: &Entry, writer: &Writer) -> Result<(), String> {
    let broken = |what: &str| Err(format!("{what}: {:?} by {}", entry.action, writer.name()));
    if !writer.valid_at(entry.at_us) {
        return broken("a certificate was used out of its time");
    }
    match &writer.role {
        Role::Keeper { .. } if entry.keeper_epoch < before.keeper_epoch() => broken("a deposed keeper wrote"),
        Role::Agent { .. } if entry.keeper_epoch > 0 => broken("an agent spoke of epochs"),
        Role::Agent { name, clusters } => {
            let own = |session: &Session| session.opened.by == *name;
            let may = match &entry.action {
                Action::Begin { .. } | Action::Open(_) => true,
                Action::Commit { session, .. } | Action::Abort { session, .. } => {
                    before.session(session).is_none_or(own)
                }
                _ => false,
            };
            if may && clusters.contains(&entry.cluster) { Ok(()) } else { broken("an agent did what it may not") }
        }
        Role::Keeper { .. } | Role::Root => Ok(()),
    }
}
