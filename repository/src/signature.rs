//! Who wrote what: Ed25519 signatures over objects that lie in clear, and the certificates that give writers their rights.
//!
//! The root key signs keepers and agents, a keeper signs agents, an agent signs nobody. A signature covers the
//! repository's id and the object's key, so that nothing passes for something else or in another place. Clocks are the
//! caller's: a claimed time is checked by [`Writer::valid_at`].

mod wire;

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use object_store::path::Path;
use zeroize::Zeroizing;

use crate::ids::{ClusterName, IdError, RepositoryId};

const CERTIFICATE_CONTEXT: &[u8] = b"walfleet writer certificate v1\0";
const OBJECT_CONTEXT: &[u8] = b"walfleet signed object v1\0";

/// Root, keeper, agent: no chain is longer than a keeper's and an agent's certificate.
const LONGEST_CHAIN: usize = 2;

/// An Ed25519 public key (RFC 8032), printed in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl PublicKey {
    pub fn from_slice(bytes: &[u8]) -> Result<PublicKey, IdError> {
        bytes.try_into().map(PublicKey).map_err(|_| malformed(format!("{} bytes", bytes.len())))
    }

    fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(message, signature).is_ok()
    }
}

fn malformed(text: String) -> IdError {
    IdError::Malformed { text, what: "a signing key", hint: "it is 32 bytes in lower-case hexadecimal." }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        // A recipient has the same textual form, and its parser is checked already.
        text.parse::<crate::ids::RecipientId>().map(|key| PublicKey(key.0)).map_err(|_| malformed(text.to_owned()))
    }
}

/// What a certificate lets its holder be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CertifiedRole {
    /// Every entry in every cluster; may issue agents' certificates.
    Keeper,
    /// Opens, commits and aborts its own sessions in these clusters.
    Agent { clusters: Vec<ClusterName> },
}

/// What a certificate states.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WriterStatement {
    /// `None`: good for every repository with the same root key.
    pub repository_id: Option<RepositoryId>,
    pub public_key: PublicKey,
    pub role: CertifiedRole,
    /// The agent's or controller's name.
    pub name: String,
    /// Microseconds since the Unix epoch, both inclusive.
    pub not_before_us: i64,
    pub not_after_us: i64,
}

/// A statement as it was signed, and the signature. Not verified: only [`TrustRoot`] says what it is worth.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Certificate {
    /// Exactly the bytes that were signed; `claims` is read from them and never encoded again.
    statement: Vec<u8>,
    signature: Vec<u8>,
    claims: WriterStatement,
}

impl Certificate {
    /// What it claims.
    pub fn statement(&self) -> &WriterStatement {
        &self.claims
    }
}

/// A signed object's body. Not verified: only [`TrustRoot`] says what it is worth.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signed {
    payload: Vec<u8>,
    signer: PublicKey,
    signature: Vec<u8>,
    /// From the signer's up to the one that the root key signed.
    chain: Vec<Certificate>,
}

/// Whom a verified signature comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Writer {
    pub role: Role,
    pub public_key: PublicKey,
    /// The time in which all certificates of its chain are valid; `None` for the root key.
    validity_us: Option<(i64, i64)>,
}

/// A verified writer's role.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Role {
    /// The recovery key: may do everything.
    Root,
    Keeper {
        name: String,
    },
    Agent {
        name: String,
        clusters: Vec<ClusterName>,
    },
}

impl Writer {
    pub fn root(public_key: PublicKey) -> Writer {
        Writer { role: Role::Root, public_key, validity_us: None }
    }

    /// Whether the writer's certificates were valid at the time it claims.
    pub fn valid_at(&self, at_us: i64) -> bool {
        self.validity_us.is_none_or(|(from, until)| from <= at_us && at_us <= until)
    }

    /// For people and audit.
    pub fn name(&self) -> &str {
        match &self.role {
            Role::Root => "recovery key",
            Role::Keeper { name } | Role::Agent { name, .. } => name,
        }
    }
}

/// A signature that is not believed, and why.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SignatureError {
    #[error("not a signed object: {what}")]
    Malformed { what: String },
    #[error("the signature by {signer} is not over this object at \"{key}\" in this repository")]
    Signature { signer: PublicKey, key: String },
    #[error(
        "signed by {signer}, which is neither the root key {root} nor certified by it\nHINT: check that this host was enrolled for this repository, and not for another."
    )]
    NotRooted { signer: PublicKey, root: PublicKey },
    #[error("the certificate of \"{name}\" is not signed by the key above it")]
    Certificate { name: String },
    #[error("the certificate of \"{name}\" is for repository {found}, and this is {expected}")]
    Repository { name: String, found: RepositoryId, expected: RepositoryId },
    #[error(
        "\"{issuer}\" may not certify \"{name}\": only the root certifies keepers, and only the root and keepers certify agents"
    )]
    Issuer { issuer: String, name: String },
    #[error("a chain of {0} certificates, and none is longer than {LONGEST_CHAIN}")]
    ChainTooLong(usize),
    #[error("the certificate of \"{name}\" is for key {certified}, and the signer is {signer}")]
    Holder { name: String, certified: PublicKey, signer: PublicKey },
    #[error("{0}")]
    Key(&'static str),
}

/// A private key and the certificates that give it its rights.
pub struct Signer {
    key: Ed25519KeyPair,
    public_key: PublicKey,
    chain: Vec<Certificate>,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("public_key", &self.public_key).finish_non_exhaustive()
    }
}

impl Signer {
    /// From a 32-byte seed (RFC 8032's private key), without certificates: the root key, or a key still to be certified.
    pub fn from_seed(seed: &[u8; 32]) -> Signer {
        let key =
            Ed25519KeyPair::from_seed_unchecked(seed).expect("every 32 bytes are an Ed25519 seed (RFC 8032, 5.1.5)");
        let mut public_key = [0; 32];
        public_key.copy_from_slice(key.public_key().as_ref());
        Signer { key, public_key: PublicKey(public_key), chain: Vec::new() }
    }

    /// A new random key, and its seed to be kept safe.
    pub fn generate() -> (Signer, Zeroizing<[u8; 32]>) {
        let mut seed = Zeroizing::new([0; 32]);
        aws_lc_rs::rand::fill(seed.as_mut_slice()).expect("the system's random source works");
        (Signer::from_seed(&seed), seed)
    }

    /// Gives the key its certificates: its own first, the one that the root key signed last.
    pub fn with_chain(mut self, chain: Vec<Certificate>) -> Result<Signer, SignatureError> {
        if chain.len() > LONGEST_CHAIN {
            return Err(SignatureError::ChainTooLong(chain.len()));
        }
        if let Some(own) = chain.first().filter(|own| own.claims.public_key != self.public_key) {
            let (name, certified) = (own.claims.name.clone(), own.claims.public_key);
            return Err(SignatureError::Holder { name, certified, signer: self.public_key });
        }
        self.chain = chain;
        Ok(self)
    }

    pub fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// The certificates that go with every signature.
    pub fn chain(&self) -> &[Certificate] {
        &self.chain
    }

    /// Signs an object's payload for the key under which it will lie.
    pub fn sign(&self, repository_id: RepositoryId, key: &Path, payload: Vec<u8>) -> Signed {
        let signature = self.key.sign(&object_message(repository_id, key, &payload)).as_ref().to_vec();
        Signed { payload, signer: self.public_key, signature, chain: self.chain.clone() }
    }

    /// Certifies another key. What the certificate is worth depends on this signer's own rights.
    pub fn issue(&self, claims: WriterStatement) -> Certificate {
        let statement = wire::encode_statement(&claims);
        let signature = self.key.sign(&certificate_message(&statement)).as_ref().to_vec();
        Certificate { statement, signature, claims }
    }

    /// The chain that the holder of a certificate issued by this signer presents.
    pub fn chain_below(&self, certificate: Certificate) -> Vec<Certificate> {
        std::iter::once(certificate).chain(self.chain.iter().cloned()).collect()
    }
}

/// What every signature in one repository must lead to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TrustRoot {
    pub repository_id: RepositoryId,
    pub root_public_key: PublicKey,
}

impl TrustRoot {
    /// Who signed the object at `key`. Whether that writer may say what the payload says is for the reader to judge, and
    /// whether its certificates were valid then, by [`Writer::valid_at`].
    pub fn verify(&self, key: &Path, signed: &Signed) -> Result<Writer, SignatureError> {
        let message = object_message(self.repository_id, key, &signed.payload);
        if !signed.signer.verifies(&message, &signed.signature) {
            return Err(SignatureError::Signature { signer: signed.signer, key: key.to_string() });
        }
        self.verify_chain(signed.signer, &signed.chain)
    }

    /// What a key with these certificates is in this repository.
    pub fn verify_chain(&self, signer: PublicKey, chain: &[Certificate]) -> Result<Writer, SignatureError> {
        if chain.len() > LONGEST_CHAIN {
            return Err(SignatureError::ChainTooLong(chain.len()));
        }
        let mut writer = Writer::root(self.root_public_key);
        for certificate in chain.iter().rev() {
            writer = self.descend(&writer, certificate)?;
        }
        if writer.public_key == signer {
            return Ok(writer);
        }
        Err(match chain.first() {
            None => SignatureError::NotRooted { signer, root: self.root_public_key },
            Some(own) => {
                SignatureError::Holder { name: own.claims.name.clone(), certified: own.claims.public_key, signer }
            }
        })
    }

    /// The holder of a certificate, given the verified writer who should have issued it.
    fn descend(&self, issuer: &Writer, certificate: &Certificate) -> Result<Writer, SignatureError> {
        let claims = &certificate.claims;
        let name = claims.name.clone();
        if !issuer.public_key.verifies(&certificate_message(&certificate.statement), &certificate.signature) {
            return Err(SignatureError::Certificate { name });
        }
        if let Some(found) = claims.repository_id.filter(|id| *id != self.repository_id) {
            return Err(SignatureError::Repository { name, found, expected: self.repository_id });
        }
        let role = match (&issuer.role, &claims.role) {
            (Role::Root, CertifiedRole::Keeper) => Role::Keeper { name },
            (Role::Root | Role::Keeper { .. }, CertifiedRole::Agent { clusters }) => {
                Role::Agent { name, clusters: clusters.clone() }
            }
            (Role::Keeper { .. }, CertifiedRole::Keeper) | (Role::Agent { .. }, _) => {
                return Err(SignatureError::Issuer { issuer: issuer.name().to_owned(), name });
            }
        };
        let (from, until) = issuer.validity_us.unwrap_or((i64::MIN, i64::MAX));
        let validity = (from.max(claims.not_before_us), until.min(claims.not_after_us));
        Ok(Writer { role, public_key: claims.public_key, validity_us: Some(validity) })
    }
}

fn certificate_message(statement: &[u8]) -> Vec<u8> {
    [CERTIFICATE_CONTEXT, statement].concat()
}

fn object_message(repository_id: RepositoryId, key: &Path, payload: &[u8]) -> Vec<u8> {
    [OBJECT_CONTEXT, &repository_id.0, key.as_ref().as_bytes(), &[0], payload].concat()
}

impl Signed {
    /// The encoded message that was signed. Nothing in it is believed before [`TrustRoot::verify`].
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The bytes of the body.
    pub fn encode(&self) -> Vec<u8> {
        wire::encode_signed(self)
    }

    pub fn decode(body: &[u8]) -> Result<Signed, SignatureError> {
        wire::decode_signed(body)
    }
}

impl Certificate {
    /// An encoded `walfleet.repository.v1.WriterCertificate`.
    pub fn encode(&self) -> Vec<u8> {
        wire::encode_certificate(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Certificate, SignatureError> {
        wire::decode_certificate(bytes)
    }
}

#[cfg(test)]
mod tests;
