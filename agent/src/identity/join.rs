//! Joining a fleet with a token.
//!
//! The controller is known by the fingerprint in the token, before the token's secret is sent. Keys are on disk before
//! they are spoken of. Whatever is lost on the way, joining again with a fresh token completes it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tonic::{Code, Status};

use super::connect::{self, Trust};
use super::token::{AuthorityFingerprint, JoinToken};
use super::{CertificateRecord, Identity, IdentityError, IdentityFolder};
use crate::config::hostname;
use crate::link::hinted;
use crate::wire::{Enrolled, Enrolment, JoinAsk};

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Connect(#[from] connect::ConnectError),
    #[error(
        "this host is enrolled already, as {name} of {controller}\nHINT: to enrol it anew, move {folder}/certificate.json away first, and leave host.key: what is stored can be read with it."
    )]
    AlreadyEnrolled { name: String, controller: String, folder: String },
    #[error(
        "the token was refused: {}",
        hinted(
            reason,
            "a token is good for one host and a short time; ask for a new one with `walfleet token create --role agent`."
        )
    )]
    Token { reason: String },
    #[error(
        "the name {name} is taken: {}",
        hinted(reason, "choose another with --name, or remove the old agent first.")
    )]
    NameTaken { name: String, reason: String },
    #[error("the controller refused to enrol this host: {reason}")]
    Refused { reason: String },
    #[error(
        "the controller did not answer: {reason}\nHINT: try again; if the token counts as used, ask for a new one. This host's keys are kept."
    )]
    Unanswered { reason: String },
    #[error(
        "the controller's answer cannot be trusted: {problem}\nHINT: something between this host and the controller may have been changed; ask whoever runs the controller."
    )]
    Answer { problem: String },
    #[error(
        "this host's clock says {now}, its new certificate begins at {not_before}\nHINT: set the clock (`timedatectl`, `chronyc tracking`), then start the agent."
    )]
    ClockBehind { now: Timestamp, not_before: Timestamp },
    #[error(
        "this host's clock says {now}, its new certificate ended at {not_after}\nHINT: set the clock (`timedatectl`, `chronyc tracking`), then start the agent."
    )]
    ClockAhead { now: Timestamp, not_after: Timestamp },
}

/// What a person gives.
#[derive(Clone, Debug)]
pub struct JoinRequest {
    pub controller: String,
    pub token: JoinToken,
    pub name: String,
    pub labels: BTreeMap<String, String>,
}

pub async fn join(folder: &IdentityFolder, request: JoinRequest) -> Result<Identity, JoinError> {
    if folder.is_enrolled() {
        let present = folder.load()?;
        return Err(JoinError::AlreadyEnrolled {
            name: present.name().to_owned(),
            controller: present.controller().to_owned(),
            folder: folder.folder.display().to_string(),
        });
    }
    let host_key = folder.ensure_host_key()?;
    let key = folder.pending_key()?;
    let pinned = request.token.fingerprint();
    let channel = connect::connect(&request.controller, &Trust::Pinned(pinned)).await?;
    let ask = JoinAsk {
        token: request.token.text().to_owned(),
        name: request.name.clone(),
        csr_pem: super::signing_request(&key, &request.name)?,
        writer_public_key: super::writer_public_key(&host_key),
        recipient: host_key.recipient.id().0,
        labels: request.labels,
        hostname: hostname(),
    };
    let enrolled = Enrolment::new(channel).join(ask).await.map_err(|status| refusal(&request.name, &status))?;
    check_authorities(&enrolled, pinned)?;
    let record = CertificateRecord {
        name: request.name,
        controller: request.controller,
        key_pem: key.serialize_pem(),
        certificate_pem: enrolled.certificate_pem,
        authorities_pem: enrolled.authorities_pem,
    };
    let identity =
        Identity::new(record.clone(), host_key).map_err(|error| JoinError::Answer { problem: error.to_string() })?;
    // Kept even if the clock is wrong: the token is spent, and the certificate is good once the clock is set.
    folder.store(&record)?;
    check_clock(&identity, Timestamp::now())?;
    Ok(identity)
}

fn refusal(name: &str, status: &Status) -> JoinError {
    let reason = status.message().to_owned();
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied => JoinError::Token { reason },
        Code::AlreadyExists => JoinError::NameTaken { name: name.to_owned(), reason },
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            JoinError::Unanswered { reason: connect::chain(status) }
        }
        _ => JoinError::Refused { reason },
    }
}

/// What the host trusts from now on must contain what the token promised.
fn check_authorities(enrolled: &Enrolled, pinned: AuthorityFingerprint) -> Result<(), JoinError> {
    let authorities =
        super::certificates(&enrolled.authorities_pem).map_err(|problem| JoinError::Answer { problem })?;
    if authorities.iter().any(|authority| AuthorityFingerprint::of_certificate(authority) == pinned) {
        Ok(())
    } else {
        Err(JoinError::Answer { problem: format!("none of its authorities is the token's, {pinned}") })
    }
}

fn check_clock(identity: &Identity, now: Timestamp) -> Result<(), JoinError> {
    if now < identity.not_before() {
        return Err(JoinError::ClockBehind { now, not_before: identity.not_before() });
    }
    if now >= identity.not_after() {
        return Err(JoinError::ClockAhead { now, not_after: identity.not_after() });
    }
    Ok(())
}
