//! Keeping the certificate: renewed at two thirds of its life, swapped whole, announced to whoever connects with it.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::connect;
use super::{CertificateRecord, Identity, IdentityError, IdentityFolder};
use crate::wire::Enrolment;

/// Between attempts after a failed one: at least this, at most [`RETRY_MAX`]; a tenth of what is left in between.
const RETRY_MIN: Duration = Duration::from_secs(10);
const RETRY_MAX: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Connect(#[from] connect::ConnectError),
    #[error("renew this host's certificate: {reason}")]
    Refused { reason: String },
}

/// Two thirds into the life.
pub fn renewal_due(not_before: Timestamp, not_after: Timestamp) -> Timestamp {
    let life = not_after.as_second().saturating_sub(not_before.as_second()).max(0);
    Timestamp::from_second(not_before.as_second().saturating_add(life / 3 * 2)).unwrap_or(not_after)
}

/// How long to wait after a failed attempt: more often the less is left.
pub fn retry_after(now: Timestamp, not_after: Timestamp) -> Duration {
    let left = Duration::try_from(not_after.duration_since(now)).unwrap_or(Duration::ZERO);
    (left / 10).clamp(RETRY_MIN, RETRY_MAX)
}

/// Asks for a new certificate for a new key, over a connection made with the present one, and stores it.
pub async fn renew(folder: &IdentityFolder, present: &Identity, controller: &str) -> Result<Identity, RenewError> {
    let key = rcgen::KeyPair::generate().map_err(super::key_problem)?;
    let request = super::signing_request(&key, present.name())?;
    let channel = connect::connect(controller, &present.trust()?).await?;
    let enrolled = Enrolment::new(channel)
        .renew(request)
        .await
        .map_err(|status| RenewError::Refused { reason: connect::chain(&status) })?;
    let record = CertificateRecord {
        name: present.record.name.clone(),
        controller: controller.to_owned(),
        key_pem: key.serialize_pem(),
        certificate_pem: enrolled.certificate_pem,
        authorities_pem: enrolled.authorities_pem,
    };
    let renewed = Identity::new(record.clone(), present.host_key.clone())?;
    // Refuses what could not be used, before the present one is given up.
    renewed.trust()?;
    folder.store(&record)?;
    Ok(renewed)
}

/// Renews for as long as the agent runs. On cancellation it ends at once: a lost answer costs nothing, since the
/// present certificate stays.
pub async fn keep_renewed(
    folder: IdentityFolder,
    identity: watch::Sender<Arc<Identity>>,
    controller: String,
    cancel: CancellationToken,
) {
    let mut wait = until(renewal_due(identity.borrow().not_before(), identity.borrow().not_after()));
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
        let present = Arc::clone(&identity.borrow());
        // A sleep may be cut short below: ask again whether it is time.
        let due = renewal_due(present.not_before(), present.not_after());
        if Timestamp::now() < due {
            wait = until(due);
            continue;
        }
        let attempt = tokio::select! {
            () = cancel.cancelled() => return,
            attempt = renew(&folder, &present, &controller) => attempt,
        };
        wait = match attempt {
            Ok(renewed) => {
                tracing::info!(until = %renewed.not_after(), "certificate renewed");
                let due = renewal_due(renewed.not_before(), renewed.not_after());
                identity.send_replace(Arc::new(renewed));
                until(due).max(RETRY_MIN)
            }
            Err(error) => {
                let now = Timestamp::now();
                if now < present.not_after() {
                    tracing::warn!(%error, until = %present.not_after(), "certificate not renewed yet");
                } else {
                    tracing::error!(%error, since = %present.not_after(), "this host's certificate has expired; join again with a new token");
                }
                retry_after(now, present.not_after())
            }
        };
    }
}

/// Never more than an hour at a stretch, so that a clock set forward is noticed.
fn until(due: Timestamp) -> Duration {
    Duration::try_from(due.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO).min(RETRY_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_due_at_two_thirds_and_retried_faster_towards_the_end() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        assert_eq!(renewal_due(at(0), at(90)), at(60));
        assert_eq!(renewal_due(at(90), at(0)), at(90), "a life that ends before it begins is over at once");
        assert_eq!(retry_after(at(0), at(36_000_000)), RETRY_MAX);
        assert_eq!(retry_after(at(0), at(600)), Duration::from_secs(60));
        assert_eq!(retry_after(at(700), at(600)), RETRY_MIN);
    }
}
