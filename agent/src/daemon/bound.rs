//! Keeps the host's access and its limits up to date with what the controller wants and with the present certificate.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{AccessSender, Membership};
use crate::access::Access;
use crate::config::Config;

/// Computes it anew; on an error the former stays, since what worked keeps working.
pub(super) fn bind_once(config: &Config, membership: &Membership, access: &AccessSender) {
    let Some(desired) = membership.desired.watch().borrow().clone() else { return };
    membership.limits.set(config.limits.and(desired.limits));
    let identity = Arc::clone(&membership.identity.borrow());
    match Access::member(config, &identity, membership.folder.host_key_path(), &desired) {
        Ok(bound) => {
            for problem in &bound.problems {
                // Facts and doctor show it for as long as it lasts. At first it is only the order of messages: the
                // controller learns of instances after it has greeted the agent.
                tracing::info!("{problem}");
            }
            access.send_replace(Some(Arc::new(bound)));
        }
        Err(error) => tracing::error!(%error, generation = desired.generation, "the desired state cannot be used"),
    }
}

pub(super) async fn keep_bound(
    config: &Config,
    membership: &Membership,
    access: &AccessSender,
    stop: CancellationToken,
) {
    let mut desired = membership.desired.watch();
    // What came between the start and this subscription.
    bind_once(config, membership, access);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = desired.changed() => if changed.is_err() { return },
        }
        bind_once(config, membership, access);
    }
}
