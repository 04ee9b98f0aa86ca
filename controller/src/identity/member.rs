//! Members of the fleet: one row each, and the roster, a copy in memory that every call is checked against.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{MemberName, PeerIdentity, Role, now_us};
use crate::state::{Event, Row, RowError, State, StateError, rows};

const PREFIX: &str = "identity/member/";
/// Between attempts to follow the state again.
const RETRY: Duration = Duration::from_secs(1);

pub fn key(name: &MemberName) -> String {
    format!("{PREFIX}{name}")
}

/// An agent or operator as it was admitted. Kept when revoked, so that the name's history is not lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub name: MemberName,
    pub role: Role,
    /// The token's id that admitted it, or "init"; certificates of another enrolment are refused.
    pub enrolment: String,
    /// The joining host's labels, overlaid by the token's.
    pub labels: BTreeMap<String, String>,
    pub hostname: String,
    /// BLAKE3 of its public key, in hexadecimal.
    pub key_fingerprint: String,
    /// Agents: 32 bytes in hexadecimal, the Ed25519 key that signs what it writes to repositories.
    pub writer_public_key: Option<String>,
    /// Agents: 32 bytes in hexadecimal, the X25519 key that domain keys are wrapped for.
    pub recipient: Option<String>,
    pub joined_at_us: i64,
    /// Of the newest certificate.
    pub certificate_serial: String,
    pub certificate_not_after_us: i64,
    pub revoked_at_us: Option<i64>,
    pub revoked_by: Option<String>,
}

impl Member {
    /// Whether somebody may still act under this name.
    pub fn is_living(&self, now_us: i64) -> bool {
        self.revoked_at_us.is_none() && self.certificate_not_after_us > now_us
    }
}

/// Why a verified certificate is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the certificate of {name} has expired\nHINT: renew it, or join again with a new token.")]
    Expired { name: MemberName },
    #[error("{name} is revoked\nHINT: an admin can admit it again with a new token.")]
    Revoked { name: MemberName },
    #[error(
        "{name} was admitted anew since this certificate was issued\nHINT: use the newer certificate, or join again with a new token."
    )]
    Replaced { name: MemberName },
    #[error(
        "{name} is not a member of this fleet\nHINT: the controller's state may have been restored from before it joined; join again with a new token."
    )]
    Unknown { name: MemberName },
}

type Known = HashMap<MemberName, Row<Member>>;

/// All members, as the state last showed them.
pub struct Roster {
    state: State,
    known: RwLock<Known>,
    /// Counts changes, for those who wait for one.
    changed: watch::Sender<u64>,
    /// Up to where the copy follows the state.
    revision: AtomicU64,
}

impl Roster {
    /// Reads all members; [`Roster::follow`] keeps the copy current.
    pub async fn open(state: State) -> Result<Arc<Self>, RowError> {
        let roster =
            Self { state, known: RwLock::default(), changed: watch::Sender::new(0), revision: AtomicU64::new(0) };
        roster.reload().await?;
        Ok(Arc::new(roster))
    }

    async fn reload(&self) -> Result<(), RowError> {
        let (rows, revision) = self.state.rows::<Member>(PREFIX).await?;
        let fresh = rows.into_iter().map(|row| (row.value.name.clone(), row)).collect();
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        self.revision.store(revision, Ordering::Relaxed);
        self.changed.send_modify(|count| *count += 1);
        Ok(())
    }

    /// Follows the members' changes for ever; on errors it reads everything again. Safe to drop.
    pub async fn follow(&self) {
        loop {
            if let Err(error) = self.follow_on().await {
                tracing::warn!(%error, "lost sight of the members' changes; reading all of them again");
            }
            tokio::time::sleep(RETRY).await;
            if let Err(error) = self.reload().await {
                tracing::warn!(%error, "cannot read the members");
            }
        }
    }

    async fn follow_on(&self) -> Result<(), RowError> {
        let mut watch = self.state.watch(PREFIX, self.revision.load(Ordering::Relaxed) + 1).await?;
        while let Some(event) = watch.next().await {
            let event = event?;
            self.revision.store(event.revision(), Ordering::Relaxed);
            match event {
                Event::Put { entry, .. } => self.learn(rows::decode(&entry)?),
                Event::Delete { key, .. } => {
                    if let Some(name) = key.strip_prefix(PREFIX).and_then(|name| name.parse().ok()) {
                        self.known.write().unwrap_or_else(PoisonError::into_inner).remove(&name);
                        self.changed.send_modify(|count| *count += 1);
                    }
                }
            }
        }
        Err(StateError::Closed.into())
    }

    /// Takes over a row unless a newer one is known; by whom it was written does not matter.
    pub(super) fn learn(&self, row: Row<Member>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.get(&row.value.name).is_none_or(|old| old.mod_revision < row.mod_revision) {
            known.insert(row.value.name.clone(), row);
            drop(known);
            self.changed.send_modify(|count| *count += 1);
        }
    }

    pub fn member(&self, name: &MemberName) -> Option<Member> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).get(name).map(|row| row.value.clone())
    }

    /// Every member, revoked ones included, by name.
    pub fn members(&self) -> Vec<Member> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let mut members: Vec<_> = known.values().map(|row| row.value.clone()).collect();
        members.sort_by(|a, b| a.name.cmp(&b.name));
        members
    }

    /// Counts up with every change of a member.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether the holder of a certificate may act now. Another controller may have admitted it a moment ago: what the
    /// copy does not know is looked up in the state before it is refused.
    pub async fn check(&self, peer: &PeerIdentity) -> Result<(), Refusal> {
        match self.judge(peer, now_us()) {
            Err(Refusal::Unknown { .. } | Refusal::Replaced { .. } | Refusal::Revoked { .. }) => {}
            decided => return decided,
        }
        match self.state.row::<Member>(&key(&peer.name)).await {
            Ok(Some(row)) => self.learn(row),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, name = %peer.name, "cannot look up a member"),
        }
        self.judge(peer, now_us())
    }

    /// As [`Roster::check`], from the copy alone.
    pub fn judge(&self, peer: &PeerIdentity, now_us: i64) -> Result<(), Refusal> {
        let name = || peer.name.clone();
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let member = &known.get(&peer.name).ok_or_else(|| Refusal::Unknown { name: name() })?.value;
        if member.enrolment != peer.enrolment || member.role != peer.role {
            return Err(Refusal::Replaced { name: name() });
        }
        if member.revoked_at_us.is_some() {
            return Err(Refusal::Revoked { name: name() });
        }
        if peer.not_after_us <= now_us {
            return Err(Refusal::Expired { name: name() });
        }
        Ok(())
    }

    /// Waits until the holder of a certificate may act no longer: to end its streams. It comes back with a renewed
    /// certificate on a new connection, or not at all. Safe to drop.
    pub async fn until_refused(&self, peer: &PeerIdentity) -> Refusal {
        let mut changes = self.changes();
        loop {
            changes.borrow_and_update();
            let now = now_us();
            if let Err(refusal) = self.judge(peer, now) {
                return refusal;
            }
            let left = u64::try_from(peer.not_after_us.saturating_sub(now)).unwrap_or(0).max(1000);
            tokio::select! {
                () = tokio::time::sleep(Duration::from_micros(left)) => {}
                // Cannot fail: the sender is in `self`.
                _ = changes.changed() => {}
            }
        }
    }
}
