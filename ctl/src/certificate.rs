//! Reading and asking for operator certificates: only what the command line shows and needs.

use jiff::Timestamp;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

pub struct Described {
    /// Common name.
    pub name: String,
    pub not_after: Timestamp,
}

/// Whose the first certificate in `pem` is and until when; `None` if it cannot be read.
pub fn describe(pem: &str) -> Option<Described> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
    let not_after = Timestamp::from_second(certificate.validity().not_after.timestamp()).ok()?;
    Some(Described { name, not_after })
}

/// A new key, and the request for a certificate that names it. The key never leaves this machine.
pub struct Request {
    pub key_pem: String,
    pub csr_pem: String,
}

pub fn request(name: &str) -> Result<Request, rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    let csr_pem = parameters.serialize_request(&key)?.pem()?;
    Ok(Request { key_pem: key.serialize_pem(), csr_pem })
}
