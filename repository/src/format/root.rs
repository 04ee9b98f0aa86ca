//! `walfleet-repository`: what a reader needs to know before it reads anything else. Written once, in clear.
//!
//! Not signed: it names the key that all signatures lead to. Who must not take a stranger's repository for his own
//! compares that key with one he was given ([`crate::open`]).

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as proto;

use super::clear::{self, ClearError, FORMAT_VERSION, ObjectKind};
use crate::ids::{RecipientId, RepositoryId};
use crate::signature::{PublicKey, TrustRoot};

/// How the order of a cluster's log comes about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AppendMode {
    /// The store creates atomically: the object's creation is the append.
    AtomicCreate,
    /// The store does not: entries are committed in the controller's state first, objects are copies.
    Sequenced,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RepositoryRoot {
    pub repository_id: RepositoryId,
    /// At the root of every signature: the recovery key's.
    pub root_public_key: PublicKey,
    /// For whom every domain key is wrapped.
    pub recovery_recipient: RecipientId,
    pub append_mode: AppendMode,
    /// Microseconds since the Unix epoch.
    pub created_at_us: i64,
    /// What the probe saw when the repository was made.
    pub probe_creates: u32,
    pub probe_winners: u32,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RootError {
    #[error(transparent)]
    Clear(#[from] ClearError),
    #[error(
        "it needs format {found}, and this program reads up to {FORMAT_VERSION}\nHINT: upgrade walfleet on this host."
    )]
    Version { found: u32 },
    #[error("{0}")]
    Malformed(String),
}

impl RepositoryRoot {
    pub fn trust(&self) -> TrustRoot {
        TrustRoot { repository_id: self.repository_id, root_public_key: self.root_public_key }
    }

    /// The object's bytes.
    pub fn encode(&self) -> Bytes {
        let mode = match self.append_mode {
            AppendMode::AtomicCreate => proto::AppendMode::AtomicCreate,
            AppendMode::Sequenced => proto::AppendMode::Sequenced,
        };
        let message = proto::RepositoryRoot {
            repository_id: Bytes::copy_from_slice(&self.repository_id.0),
            format_version: FORMAT_VERSION.into(),
            root_public_key: Bytes::copy_from_slice(&self.root_public_key.0),
            recovery_recipient: Bytes::copy_from_slice(&self.recovery_recipient.0),
            append_mode: mode.into(),
            created_at_us: self.created_at_us,
            probe_creates: self.probe_creates,
            probe_winners: self.probe_winners,
        };
        clear::encode(ObjectKind::Root, &message.encode_to_vec())
    }

    pub fn decode(object: &[u8]) -> Result<RepositoryRoot, RootError> {
        let malformed = |error: &dyn std::fmt::Display| RootError::Malformed(error.to_string());
        let body = clear::decode(ObjectKind::Root, object)?;
        let message = proto::RepositoryRoot::decode(body).map_err(|error| malformed(&error))?;
        if message.format_version == 0 || message.format_version > FORMAT_VERSION.into() {
            return Err(RootError::Version { found: message.format_version });
        }
        let append_mode = match proto::AppendMode::try_from(message.append_mode) {
            Ok(proto::AppendMode::AtomicCreate) => AppendMode::AtomicCreate,
            Ok(proto::AppendMode::Sequenced) => AppendMode::Sequenced,
            Ok(proto::AppendMode::Unspecified) | Err(_) => {
                return Err(RootError::Malformed("it has no known order of appends".to_owned()));
            }
        };
        Ok(RepositoryRoot {
            repository_id: RepositoryId::from_slice(&message.repository_id).map_err(|error| malformed(&error))?,
            root_public_key: PublicKey::from_slice(&message.root_public_key).map_err(|error| malformed(&error))?,
            recovery_recipient: RecipientId::from_slice(&message.recovery_recipient)
                .map_err(|error| malformed(&error))?,
            append_mode,
            created_at_us: message.created_at_us,
            probe_creates: message.probe_creates,
            probe_winners: message.probe_winners,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_comes_back_and_a_cut_one_is_refused() {
        let root = RepositoryRoot {
            repository_id: RepositoryId([1; 16]),
            root_public_key: PublicKey([2; 32]),
            recovery_recipient: RecipientId([3; 32]),
            append_mode: AppendMode::AtomicCreate,
            created_at_us: 4,
            probe_creates: 32,
            probe_winners: 1,
        };
        let object = root.encode();
        assert_eq!(RepositoryRoot::decode(&object), Ok(root));
        assert!(RepositoryRoot::decode(&object[..object.len() - 1]).is_err());
        assert!(matches!(
            RepositoryRoot::decode(&clear::encode(ObjectKind::Root, b"")),
            Err(RootError::Version { found: 0 })
        ));
    }
}
