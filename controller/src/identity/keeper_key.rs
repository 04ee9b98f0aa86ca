//! The controller's signing key for repositories: certified by the fleet's recovery key as a keeper, so that the
//! controller can certify agents as writers while the recovery key lies offline. It opens nothing.

use std::path::Path;

use serde::{Deserialize, Serialize};
use walfleet_repository::ids::{ClusterName, RecipientId};
use walfleet_repository::key_file::KeyFile;
use walfleet_repository::signature::{Certificate, CertifiedRole, PublicKey, SignatureError, Signer, WriterStatement};
use zeroize::Zeroizing;

use super::now_us;
use super::secret_file::{self, SecretFileError, hex};

pub const FILE: &str = "keeper.key";
/// As long as the authority: whoever takes the controller's folder has both, and re-rooting replaces both.
const KEEPER_LIFETIME_US: i64 = 20 * 365 * 86_400 * 1_000_000;
/// For entries of hosts whose clock is behind.
const CLOCK_SLACK_US: i64 = 3600 * 1_000_000;

#[derive(Debug, thiserror::Error)]
pub enum KeeperKeyError {
    #[error(transparent)]
    File(#[from] SecretFileError),
    #[error("{path} is not a keeper key: {problem}\nHINT: restore it from a copy of the controller's folder.")]
    Damaged { path: String, problem: String },
    #[error("certify the keeper's key")]
    Certify(#[from] SignatureError),
}

/// The file's content.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    walfleet_keeper_key: u32,
    /// 32 bytes in hexadecimal: an Ed25519 seed (RFC 8032).
    signing_seed: String,
    /// Encoded `walfleet.repository.v1.WriterCertificate`, in hexadecimal, by the root key.
    certificate: String,
    /// The recovery key's public halves, in hexadecimal.
    root_public_key: String,
    recovery_recipient: String,
}

pub struct KeeperKey {
    signer: Signer,
    root_public_key: PublicKey,
    recovery_recipient: RecipientId,
}

impl KeeperKey {
    /// Makes a key, has the recovery key certify it for every repository of this root, and writes it.
    pub fn create(folder: &Path, name: &str, recovery: &KeyFile) -> Result<Self, KeeperKeyError> {
        let root = Signer::from_seed(&recovery.signing_seed);
        let (signer, seed) = Signer::generate();
        let now = now_us();
        let certificate = root.issue(WriterStatement {
            repository_id: None,
            public_key: signer.public_key(),
            role: CertifiedRole::Keeper,
            name: name.to_owned(),
            not_before_us: now - CLOCK_SLACK_US,
            not_after_us: now + KEEPER_LIFETIME_US,
        });
        let stored = Stored {
            walfleet_keeper_key: 1,
            signing_seed: hex(seed.as_slice()),
            certificate: hex(&certificate.encode()),
            root_public_key: root.public_key().to_string(),
            recovery_recipient: recovery.recipient.id().to_string(),
        };
        let text = Zeroizing::new(serde_json::to_string_pretty(&stored).expect("strings and numbers are JSON"));
        drop(Zeroizing::new(stored.signing_seed));
        secret_file::create(&folder.join(FILE), text.as_bytes())?;
        let signer = signer.with_chain(vec![certificate])?;
        Ok(Self { signer, root_public_key: root.public_key(), recovery_recipient: recovery.recipient.id() })
    }

    pub fn load(folder: &Path) -> Result<Self, KeeperKeyError> {
        let path = folder.join(FILE);
        let text = Zeroizing::new(secret_file::read(&path)?);
        let damaged =
            |problem: &str| KeeperKeyError::Damaged { path: path.display().to_string(), problem: problem.to_owned() };
        // The parser's message could quote the seed.
        let stored: Stored = serde_json::from_str(&text).map_err(|_| damaged("it does not parse"))?;
        if stored.walfleet_keeper_key != 1 {
            return Err(damaged("it is of another version"));
        }
        let seed = from_hex(&Zeroizing::new(stored.signing_seed))
            .and_then(|seed| <[u8; 32]>::try_from(seed).ok())
            .map(Zeroizing::new)
            .ok_or_else(|| damaged("signing_seed is not 32 bytes"))?;
        let certificate = from_hex(&stored.certificate).ok_or_else(|| damaged("certificate is not hexadecimal"))?;
        let certificate = Certificate::decode(&certificate).map_err(|error| damaged(&error.to_string()))?;
        Ok(Self {
            signer: Signer::from_seed(&seed).with_chain(vec![certificate])?,
            root_public_key: stored.root_public_key.parse().map_err(|_| damaged("root_public_key does not parse"))?,
            recovery_recipient: stored
                .recovery_recipient
                .parse()
                .map_err(|_| damaged("recovery_recipient does not parse"))?,
        })
    }

    /// The root that the fleet's repositories must name.
    pub fn root_public_key(&self) -> PublicKey {
        self.root_public_key
    }

    /// Whom every domain key is wrapped for, so that the recovery key opens all.
    pub fn recovery_recipient(&self) -> RecipientId {
        self.recovery_recipient
    }

    /// For what the controller itself writes to repositories.
    pub fn signer(&self) -> &Signer {
        &self.signer
    }

    /// The chain of an agent that may write to these clusters, encoded as `Desired.writer_chain` wants it: valid from an
    /// hour ago until `not_after_us`.
    pub fn writer_chain(
        &self,
        agent: &str,
        public_key: PublicKey,
        clusters: Vec<ClusterName>,
        not_after_us: i64,
    ) -> Vec<Vec<u8>> {
        let certificate = self.signer.issue(WriterStatement {
            repository_id: None,
            public_key,
            role: CertifiedRole::Agent { clusters },
            name: agent.to_owned(),
            not_before_us: now_us() - CLOCK_SLACK_US,
            not_after_us,
        });
        self.signer.chain_below(certificate).iter().map(Certificate::encode).collect()
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use walfleet_repository::ids::RepositoryId;
    use walfleet_repository::key_file::KeyKind;
    use walfleet_repository::signature::{Role, TrustRoot};

    use super::*;

    #[test]
    fn an_agent_certified_by_the_reloaded_keeper_is_trusted_under_the_recovery_key() {
        let folder = tempfile::tempdir().unwrap();
        let recovery = KeyFile::generate(KeyKind::Recovery).unwrap();
        KeeperKey::create(folder.path(), "controller", &recovery).unwrap();
        let keeper = KeeperKey::load(folder.path()).unwrap();
        assert_eq!(keeper.recovery_recipient(), recovery.recipient.id());

        let (agent, _) = Signer::generate();
        let clusters = vec!["orders".parse().unwrap()];
        let chain = keeper.writer_chain("db1", agent.public_key(), clusters.clone(), now_us() + 1_000_000);
        let chain: Vec<_> = chain.iter().map(|bytes| Certificate::decode(bytes).unwrap()).collect();
        let root = TrustRoot { repository_id: RepositoryId([7; 16]), root_public_key: keeper.root_public_key() };
        let writer = root.verify_chain(agent.public_key(), &chain).unwrap();
        assert_eq!(writer.role, Role::Agent { name: "db1".to_owned(), clusters });
        assert!(writer.valid_at(now_us()) && !writer.valid_at(now_us() + 2_000_000));
    }
}
