//! Admission: a token and a signing request become a member and a certificate, in one transaction that uses up the
//! token. Renewal, revocation, and who may take over a name.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::authority::{Issued, Subject};
use super::member::{self, Member, Roster};
use super::secret_file::hex;
use super::signing_request::{RequestError, SigningRequest};
use super::token::{self, MAX_LABELS, TokenRow, TokenText};
use super::{Authority, AuthorityError, MemberName, PeerIdentity, Role, now_us};
use crate::resources::selector::{is_label_key, is_label_value};
use crate::state::{Row, RowError, State, StateError, Txn, rows};

/// Attempts when others write the same rows at the same time.
const ATTEMPTS: usize = 8;
const MAX_HOSTNAME_BYTES: usize = 255;

/// How long certificates live.
#[derive(Debug, Clone)]
pub struct Lifetimes {
    pub agent: Duration,
    pub operator: Duration,
    /// How long after its end a certificate still serves for renewing, and for nothing else: a host that was off over
    /// the holidays comes back by itself. Zero: never.
    pub renewal_grace: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// One text for an unknown id and a wrong secret: who has no secret learns nothing.
    #[error(
        "the token is not known here\nHINT: create one with `walfleet token create`; each admits one member, once."
    )]
    UnknownToken,
    #[error("the token expired at {at}\nHINT: create a new one with `walfleet token create`.")]
    ExpiredToken { at: jiff::Timestamp },
    #[error(
        "the token was used by {by} at {at}\nHINT: create a new one with `walfleet token create`; if {by} is not yours, revoke it."
    )]
    UsedToken { by: MemberName, at: jiff::Timestamp },
    #[error(
        "the name {name} is taken by a living member with another key\nHINT: choose another name, or revoke {name} first."
    )]
    NameTaken { name: MemberName },
    #[error("{field} is refused: {problem}")]
    Invalid { field: &'static str, problem: String },
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("{name} is not a member of this fleet")]
    NoSuchMember { name: String },
    #[error("revoking {name} would leave the fleet without an admin\nHINT: admit another admin first.")]
    LastAdmin { name: MemberName },
    #[error(transparent)]
    Authority(AuthorityError),
    #[error(transparent)]
    Row(#[from] RowError),
}

impl From<StateError> for EnrolmentError {
    fn from(error: StateError) -> Self {
        Self::Row(error.into())
    }
}

impl From<AuthorityError> for EnrolmentError {
    fn from(error: AuthorityError) -> Self {
        match error {
            AuthorityError::Request(request) => Self::Request(request),
            other => Self::Authority(other),
        }
    }
}

/// A request to join, unchecked.
#[derive(Debug, Clone, Default)]
pub struct Join {
    pub token: String,
    pub name: String,
    pub csr_pem: String,
    pub writer_public_key: Vec<u8>,
    pub recipient: Vec<u8>,
    pub labels: BTreeMap<String, String>,
    pub hostname: String,
}

pub struct Enrolment {
    state: State,
    authority: Arc<Authority>,
    roster: Arc<Roster>,
    lifetimes: Lifetimes,
}

impl Enrolment {
    pub fn new(state: State, authority: Arc<Authority>, roster: Arc<Roster>, lifetimes: Lifetimes) -> Self {
        Self { state, authority, roster, lifetimes }
    }

    pub fn shared_authority(&self) -> Arc<Authority> {
        self.authority.clone()
    }

    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    pub fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    fn lifetime(&self, role: Role) -> Duration {
        if role == Role::Agent { self.lifetimes.agent } else { self.lifetimes.operator }
    }

    /// Admits a member. Sent again by the same member (same token, name and key), it answers again.
    pub async fn join(&self, join: &Join) -> Result<(Member, Issued), EnrolmentError> {
        let request = SigningRequest::from_pem(&join.csr_pem)?;
        let name: MemberName = join
            .name
            .parse()
            .map_err(|error: super::BadName| EnrolmentError::Invalid { field: "name", problem: error.to_string() })?;
        for _ in 0..ATTEMPTS {
            let token = self.find_token(&join.token).await?;
            let now = now_us();
            let present: Option<Row<Member>> = self.state.row(&member::key(&name)).await?;
            admit(&token.value, &name, present.as_ref().map(|row| &row.value), &request.key_fingerprint, now)?;
            let mut fresh = new_member(join, &name, &token.value, &request, now)?;
            let subject = Subject { name: &name, role: fresh.role, enrolment: &fresh.enrolment };
            let issued = self.authority.issue(&request, &subject, self.lifetime(fresh.role))?;
            fresh.certificate_serial = issued.serial.clone();
            fresh.certificate_not_after_us = issued.not_after_us;
            let used = token.value.used(&name, now);
            let key = member::key(&name);
            let unchanged = match &present {
                Some(row) => row.unchanged(),
                None => crate::state::Compare::absent(key.clone()),
            };
            let txn = Txn::new()
                .when(token.unchanged())
                .when(unchanged)
                .then(rows::put_row(token.key.clone(), &used)?)
                .then(rows::put_row(key, &fresh)?);
            let outcome = self.state.txn(txn).await?;
            if outcome.succeeded {
                self.learn(&fresh, outcome.revision);
                return Ok((fresh, issued));
            }
        }
        Err(RowError::Conflict { key: member::key(&name) }.into())
    }

    /// A new certificate for a member whose present one was verified and, by the door, found in force or within its
    /// grace. The key may be a new one.
    pub async fn renew(&self, peer: &PeerIdentity, csr_pem: &str) -> Result<Issued, EnrolmentError> {
        let request = SigningRequest::from_pem(csr_pem)?;
        let subject = Subject { name: &peer.name, role: peer.role, enrolment: &peer.enrolment };
        let issued = self.authority.issue(&request, &subject, self.lifetime(peer.role))?;
        for _ in 0..ATTEMPTS {
            let row: Option<Row<Member>> = self.state.row(&member::key(&peer.name)).await?;
            // Revoked or admitted anew since the door looked.
            let row = row
                .filter(|row| row.value.enrolment == peer.enrolment && row.value.revoked_at_us.is_none())
                .ok_or_else(|| EnrolmentError::NoSuchMember { name: peer.name.to_string() })?;
            let renewed = Member {
                key_fingerprint: request.key_fingerprint.clone(),
                certificate_serial: issued.serial.clone(),
                certificate_not_after_us: issued.not_after_us,
                ..row.value.clone()
            };
            match self.state.update_row(&row.key, row.mod_revision, &renewed).await {
                Ok(revision) => {
                    self.learn(&renewed, revision);
                    return Ok(issued);
                }
                Err(RowError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(RowError::Conflict { key: member::key(&peer.name) }.into())
    }

    /// Refuses every certificate of the member from now on; its streams end. Repeated, it changes nothing.
    pub async fn revoke(&self, name: &str, by: &str) -> Result<Member, EnrolmentError> {
        let absent = || EnrolmentError::NoSuchMember { name: name.chars().take(80).collect() };
        let name: MemberName = name.parse().map_err(|_| absent())?;
        for _ in 0..ATTEMPTS {
            let row: Row<Member> = self.state.row(&member::key(&name)).await?.ok_or_else(absent)?;
            if row.value.revoked_at_us.is_some() {
                self.learn(&row.value, row.mod_revision);
                return Ok(row.value);
            }
            if row.value.role == Role::Admin && !self.has_another_admin(&name).await? {
                return Err(EnrolmentError::LastAdmin { name });
            }
            let now = Some(now_us());
            let revoked = Member { revoked_at_us: now, revoked_by: Some(by.to_owned()), ..row.value.clone() };
            match self.state.update_row(&row.key, row.mod_revision, &revoked).await {
                Ok(revision) => {
                    self.learn(&revoked, revision);
                    return Ok(revoked);
                }
                Err(RowError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(RowError::Conflict { key: member::key(&name) }.into())
    }

    async fn has_another_admin(&self, name: &MemberName) -> Result<bool, EnrolmentError> {
        let (rows, _) = self.state.rows::<Member>("identity/member/").await?;
        let now = now_us();
        let is_admin = |member: &Member| member.role == Role::Admin && member.is_living(now);
        Ok(rows.iter().any(|row| row.value.name != *name && is_admin(&row.value)))
    }

    async fn find_token(&self, text: &str) -> Result<Row<TokenRow>, EnrolmentError> {
        let parts = TokenText::parse(text).ok_or(EnrolmentError::UnknownToken)?;
        let row: Option<Row<TokenRow>> = self.state.row(&token::key(parts.id)).await?;
        row.filter(|row| row.value.matches(parts.secret)).ok_or(EnrolmentError::UnknownToken)
    }

    /// So that the member's next call finds itself known, before the watch has told.
    fn learn(&self, member: &Member, mod_revision: u64) {
        let key = member::key(&member.name);
        self.roster.learn(Row { key, value: member.clone(), create_revision: 0, mod_revision });
    }
}

/// Whether the token admits this member now, beside the one that has the name.
fn admit(
    token: &TokenRow,
    name: &MemberName,
    present: Option<&Member>,
    key_fingerprint: &str,
    now: i64,
) -> Result<(), EnrolmentError> {
    let time = |us: i64| jiff::Timestamp::from_microsecond(us).unwrap_or_default();
    if token.expires_at_us <= now {
        return Err(EnrolmentError::ExpiredToken { at: time(token.expires_at_us) });
    }
    if let Some(by) = &token.used_by {
        // The same request again, its answer was lost: what it admitted is still there, with the same key.
        let again = by == name
            && present.is_some_and(|member| {
                member.enrolment == token.id
                    && member.key_fingerprint == key_fingerprint
                    && member.revoked_at_us.is_none()
            });
        if !again {
            return Err(EnrolmentError::UsedToken { by: by.clone(), at: time(token.used_at_us.unwrap_or_default()) });
        }
    }
    match present {
        // Operators' and agents' names are one namespace: nobody becomes something else while alive.
        Some(member) if member.is_living(now) && member.key_fingerprint != key_fingerprint => {
            Err(EnrolmentError::NameTaken { name: name.clone() })
        }
        _ => Ok(()),
    }
}

fn new_member(
    join: &Join,
    name: &MemberName,
    token: &TokenRow,
    request: &SigningRequest,
    now: i64,
) -> Result<Member, EnrolmentError> {
    let mut labels = join.labels.clone();
    labels.extend(token.labels.clone());
    check_labels(&labels).map_err(|problem| EnrolmentError::Invalid { field: "labels", problem })?;
    if join.hostname.len() > MAX_HOSTNAME_BYTES {
        let problem = format!("it has {} bytes, at most {MAX_HOSTNAME_BYTES} are accepted", join.hostname.len());
        return Err(EnrolmentError::Invalid { field: "hostname", problem });
    }
    let key = |field, bytes: &[u8]| match (token.role, bytes.len()) {
        (Role::Agent, 32) => Ok(Some(hex(bytes))),
        (Role::Agent, found) => {
            Err(EnrolmentError::Invalid { field, problem: format!("it has {found} bytes, an agent's has 32") })
        }
        (Role::Viewer | Role::Operator | Role::Admin, _) => Ok(None),
    };
    Ok(Member {
        name: name.clone(),
        role: token.role,
        enrolment: token.id.clone(),
        labels,
        hostname: join.hostname.clone(),
        key_fingerprint: request.key_fingerprint.clone(),
        writer_public_key: key("writer_public_key", &join.writer_public_key)?,
        recipient: key("recipient", &join.recipient)?,
        joined_at_us: now,
        certificate_serial: String::new(),
        certificate_not_after_us: 0,
        revoked_at_us: None,
        revoked_by: None,
    })
}

/// Labels as they may stand in selectors.
pub fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), String> {
    if labels.len() > MAX_LABELS {
        return Err(format!("{} of them, at most {MAX_LABELS} are accepted", labels.len()));
    }
    match labels.iter().find(|(key, value)| !is_label_key(key) || !is_label_value(value)) {
        None => Ok(()),
        Some((key, _)) => {
            let key: String = key.chars().take(70).collect();
            Err(format!("{key:?}, or its value, could not stand in a label selector"))
        }
    }
}

#[cfg(test)]
mod tests;
