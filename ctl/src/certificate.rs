//! Reading and asking for operator certificates: only what the command line shows and needs. The key never leaves this
//! machine.

use jiff::Timestamp;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

pub struct Described {
    /// Common name.
    pub name: String,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}

impl Described {
    /// In the last third of its life, as agents do it: early enough for a controller that is away for days.
    pub fn is_due(&self, now: Timestamp) -> bool {
        let life = self.not_after.duration_since(self.not_before).as_secs();
        now.as_second() >= self.not_before.as_second().saturating_add(life / 3 * 2)
    }
}

/// Whose the first certificate in `pem` is and until when; `None` if it cannot be read.
pub fn describe(pem: &str) -> Option<Described> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
    let not_before = Timestamp::from_second(certificate.validity().not_before.timestamp()).ok()?;
    let not_after = Timestamp::from_second(certificate.validity().not_after.timestamp()).ok()?;
    Some(Described { name, not_before, not_after })
}

pub fn new_key() -> Result<String, rcgen::Error> {
    Ok(KeyPair::generate()?.serialize_pem())
}

/// The request for a certificate that names the key of `key_pem`.
pub fn request(name: &str, key_pem: &str) -> Result<String, rcgen::Error> {
    let key = KeyPair::from_pem(key_pem)?;
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.serialize_request(&key)?.pem()
}
