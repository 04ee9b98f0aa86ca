//! Who may write what to repositories: certificates for agents' writer keys, issued by the keeper's key and kept in the
//! state until they must be renewed, so that an agent's desired state does not change for nothing.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::signature::PublicKey;

use crate::identity::{KeeperKey, Member};

/// Encoded certificates, leaf first, ending with the one that the root key signed; and what they are good for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WriterChain {
    pub certificates: Vec<Vec<u8>>,
    writer_key: String,
    clusters: Vec<ClusterName>,
    not_after: Timestamp,
}

#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    #[error("agent {agent} was enrolled without a writer key\nHINT: revoke it and let it join again.")]
    NoKey { agent: String },
    #[error("the writer key of agent {agent} does not read\nHINT: revoke it and let it join again.")]
    BadKey { agent: String },
}

/// The chain told last, while it fits; else a fresh one. Renewed after a third of its life: an agent that loses the
/// controller can write for the rest.
pub fn chain(
    keeper: &KeeperKey,
    agent: &Member,
    clusters: Vec<ClusterName>,
    told: Option<&WriterChain>,
    lifetime: SignedDuration,
    now: Timestamp,
) -> Result<WriterChain, WriterError> {
    let name = agent.name.to_string();
    let writer_key = agent.writer_public_key.clone().ok_or_else(|| WriterError::NoKey { agent: name.clone() })?;
    let fits = |told: &&WriterChain| {
        told.clusters == clusters
            && told.writer_key == writer_key
            && told.not_after.duration_since(now) > lifetime * 2 / 3
    };
    if let Some(told) = told.filter(fits) {
        return Ok(told.clone());
    }
    let public_key: PublicKey = writer_key.parse().map_err(|_| WriterError::BadKey { agent: name.clone() })?;
    let not_after = now.checked_add(lifetime).unwrap_or(Timestamp::MAX);
    let certificates = keeper.writer_chain(&name, public_key, clusters.clone(), not_after.as_microsecond());
    Ok(WriterChain { certificates, writer_key, clusters, not_after })
}
