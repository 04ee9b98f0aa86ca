//! Who this host is: its keys, its certificate, and how it got and keeps them.
//!
//! In `<state_dir>/identity`, all 0600 and written durably:
//!
//! | file | what | when |
//! |---|---|---|
//! | `host.key` | the key that signs what this host writes, and the key that domain keys are wrapped for | once, never changed: losing it loses the right to read |
//! | `certificate.json` | TLS key, certificate, authorities and controller, together, so that none is ever newer than another | at joining and at each renewal |
//! | `pending.json` | the TLS key of a join under way, so that a lost answer can be asked for again | until joined |

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use walfleet_repository::key_file::{KeyFile, KeyFileError, KeyKind};
use walfleet_repository::signature::Signer;

use crate::durable::{self, DurableError, FileKind};

pub mod connect;
pub mod join;
pub mod renew;
pub mod token;

use connect::{ConnectError, Trust};

const CERTIFICATE: FileKind = FileKind { name: "certificate", version: 1 };
const PENDING: FileKind = FileKind { name: "pending-join", version: 1 };

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("this host is not enrolled: there is no {}\nHINT: walfleet-agent join --controller URL --token TOKEN", path.display())]
    NotEnrolled { path: PathBuf },
    #[error(transparent)]
    Durable(#[from] DurableError),
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("make a key: {problem}")]
    Key { problem: String },
    #[error("{what}: {problem}\nHINT: join again with a new token.")]
    Certificate { what: &'static str, problem: String },
}

/// What the controller signed, with the key it is for.
#[derive(Clone, Serialize, Deserialize)]
struct CertificateRecord {
    name: String,
    controller: String,
    key_pem: String,
    certificate_pem: String,
    /// The fleet's certificate authorities.
    authorities_pem: String,
}

/// A TLS key that waits for its certificate.
#[derive(Clone, Serialize, Deserialize)]
struct PendingKey {
    key_pem: String,
}

/// An enrolled host. Immutable: a renewal makes another.
#[derive(Clone)]
pub struct Identity {
    record: CertificateRecord,
    host_key: KeyFile,
    not_before: Timestamp,
    not_after: Timestamp,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({} until {})", self.record.name, self.not_after)
    }
}

/// The folder that an identity lies in.
#[derive(Clone, Debug)]
pub struct IdentityFolder {
    folder: PathBuf,
}

impl IdentityFolder {
    pub fn new(state_dir: &Path) -> IdentityFolder {
        IdentityFolder { folder: state_dir.join("identity") }
    }

    pub fn load(&self) -> Result<Identity, IdentityError> {
        let path = self.folder.join("certificate.json");
        let record =
            durable::read::<CertificateRecord>(&path, CERTIFICATE)?.ok_or(IdentityError::NotEnrolled { path })?;
        Identity::new(record, self.host_key()?)
    }

    pub fn is_enrolled(&self) -> bool {
        self.folder.join("certificate.json").exists()
    }

    /// The host's own key file: the key source of everything it reads and writes in repositories.
    pub fn host_key_path(&self) -> PathBuf {
        self.folder.join("host.key")
    }

    fn host_key(&self) -> Result<KeyFile, IdentityError> {
        Ok(KeyFile::read(&self.host_key_path())?)
    }

    /// Reads the host key, or makes it at the very first join.
    fn ensure_host_key(&self) -> Result<KeyFile, IdentityError> {
        durable::make_folder(&self.folder)?;
        let path = self.host_key_path();
        if !path.exists() {
            let key =
                KeyFile::generate(KeyKind::Host).map_err(|error| IdentityError::Key { problem: error.to_string() })?;
            // Under another name first: a crash in between must not leave half a key that every later start stumbles on.
            let temporary = self.folder.join("host.key.new");
            durable::remove(&temporary)?;
            key.create(&temporary)?;
            durable::rename(&temporary, &path)?;
        }
        self.host_key()
    }

    /// The key of a join that may already have reached the controller, or a new one, kept before it is used.
    fn pending_key(&self) -> Result<rcgen::KeyPair, IdentityError> {
        let path = self.folder.join("pending.json");
        if let Some(pending) = durable::read::<PendingKey>(&path, PENDING)? {
            return rcgen::KeyPair::from_pem(&pending.key_pem).map_err(key_problem);
        }
        let key = rcgen::KeyPair::generate().map_err(key_problem)?;
        durable::write(&path, PENDING, &PendingKey { key_pem: key.serialize_pem() })?;
        Ok(key)
    }

    /// Replaces the certificate and its key in one step.
    fn store(&self, record: &CertificateRecord) -> Result<(), IdentityError> {
        durable::write(&self.folder.join("certificate.json"), CERTIFICATE, record)?;
        Ok(durable::remove(&self.folder.join("pending.json"))?)
    }
}

impl Identity {
    fn new(record: CertificateRecord, host_key: KeyFile) -> Result<Identity, IdentityError> {
        let bad = |problem: String| IdentityError::Certificate { what: "read this host's certificate", problem };
        let der = CertificateDer::from_pem_slice(record.certificate_pem.as_bytes())
            .map_err(|error| bad(error.to_string()))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(|error| bad(error.to_string()))?;
        let time = |time: x509_parser::time::ASN1Time| {
            Timestamp::from_second(time.timestamp()).map_err(|error| bad(error.to_string()))
        };
        let (not_before, not_after) = (time(parsed.validity().not_before)?, time(parsed.validity().not_after)?);
        let key = rcgen::KeyPair::from_pem(&record.key_pem).map_err(key_problem)?;
        // rcgen's raw public key is the content of the bit string.
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(bad("it is for another key".into()));
        }
        Ok(Identity { record, host_key, not_before, not_after })
    }

    #[cfg(test)]
    pub(crate) fn of(name: &str, key_pem: String, certificate_pem: String, authorities_pem: String) -> Identity {
        let (name, controller) = (name.to_owned(), "https://localhost:1".to_owned());
        let record = CertificateRecord { name, controller, key_pem, certificate_pem, authorities_pem };
        Identity::new(record, KeyFile::generate(KeyKind::Host).unwrap()).unwrap()
    }

    /// The agent's name in the fleet.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// Where it joined.
    pub fn controller(&self) -> &str {
        &self.record.controller
    }

    pub fn host_key(&self) -> &KeyFile {
        &self.host_key
    }

    pub fn recipient(&self) -> [u8; 32] {
        self.host_key.recipient.id().0
    }

    pub fn writer_public_key(&self) -> [u8; 32] {
        writer_public_key(&self.host_key)
    }

    pub fn not_before(&self) -> Timestamp {
        self.not_before
    }

    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// How the controller is known to this host, and this host to it.
    pub fn trust(&self) -> Result<Trust, IdentityError> {
        let TlsParts { roots, chain, key } = self.tls()?;
        let mut config = ClientConfig::builder_with_provider(connect::provider())
            .with_safe_default_protocol_versions()
            .map_err(connect::setup)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(connect::setup)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Trust::Member(Arc::new(config)))
    }

    /// Whom this host trusts, and what it shows.
    pub fn tls(&self) -> Result<TlsParts, IdentityError> {
        let bad = |what| move |problem: String| IdentityError::Certificate { what, problem };
        let authorities = certificates(&self.record.authorities_pem).map_err(bad("read the fleet's authorities"))?;
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(authority).map_err(|error| bad("trust the fleet's authority")(error.to_string()))?;
        }
        let chain = certificates(&self.record.certificate_pem).map_err(bad("read this host's certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(self.record.key_pem.as_bytes())
            .map_err(|error| bad("read this host's TLS key")(error.to_string()))?;
        Ok(TlsParts { roots, chain, key })
    }
}

/// Of one certificate.
pub struct TlsParts {
    pub roots: RootCertStore,
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

fn writer_public_key(host_key: &KeyFile) -> [u8; 32] {
    Signer::from_seed(&host_key.signing_seed).public_key().0
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    if found.is_empty() { Err("there is none in it".into()) } else { Ok(found) }
}

fn key_problem(error: rcgen::Error) -> IdentityError {
    IdentityError::Key { problem: error.to_string() }
}

/// A request that says nothing but "this is my key": the controller decides on everything else.
fn signing_request(key: &rcgen::KeyPair, name: &str) -> Result<String, IdentityError> {
    let mut params = rcgen::CertificateParams::new(Vec::new()).map_err(key_problem)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.serialize_request(key).and_then(|request| request.pem()).map_err(key_problem)
}
