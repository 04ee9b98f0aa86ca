//! The fleet's certificate authority: one ECDSA P-256 key and its certificate, in two files of the controller's folder.
//! It decides every byte of what it signs; a signing request contributes its public key and nothing else.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber, date_time_ymd,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::secret_file::{self, SecretFileError, hex};
use super::signing_request::{RequestError, SigningRequest};
use super::{MemberName, Role, now_us};

pub const CERTIFICATE_FILE: &str = "authority.pem";
pub const KEY_FILE: &str = "authority.key";
/// Outlives the software; moving to a successor is done with both in the trusted set, never in a hurry.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(20 * 365 * 86_400);
/// How far a certificate's beginning lies in the past, for hosts whose clock is behind.
const CLOCK_SLACK: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error(transparent)]
    File(#[from] SecretFileError),
    #[error(
        "{} and {} are not a certificate authority and its key: {problem}\nHINT: restore both from a copy of the controller's folder.",
        certificate.display(), key.display()
    )]
    Damaged { certificate: PathBuf, key: PathBuf, problem: String },
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("{name:?} cannot stand in a server certificate\nHINT: use host names and IP addresses.")]
    ServerName { name: String },
    #[error("{operation}")]
    Crypto {
        operation: &'static str,
        #[source]
        source: rcgen::Error,
    },
    #[error("load the server certificate's key")]
    ServerKey(#[source] rustls::Error),
}

fn crypto(operation: &'static str) -> impl FnOnce(rcgen::Error) -> AuthorityError {
    move |source| AuthorityError::Crypto { operation, source }
}

/// What a member's certificate says.
pub struct Subject<'a> {
    pub name: &'a MemberName,
    pub role: Role,
    pub enrolment: &'a str,
}

impl Subject<'_> {
    fn uri(&self) -> String {
        let Subject { name, role, enrolment } = self;
        match role {
            Role::Agent => format!("walfleet://agent/{name}?enrolment={enrolment}"),
            role => format!("walfleet://operator/{name}?role={role}&enrolment={enrolment}"),
        }
    }
}

/// A certificate that was issued.
#[derive(Debug, Clone)]
pub struct Issued {
    pub pem: String,
    /// Hexadecimal.
    pub serial: String,
    pub not_after_us: i64,
}

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
}

impl Authority {
    /// Makes key and certificate and writes both; neither file may exist.
    pub fn create(folder: &Path, fleet: &str) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate().map_err(crypto("generate the authority's key"))?;
        let mut params = params(AUTHORITY_LIFETIME);
        params.distinguished_name.push(DnType::CommonName, format!("walfleet authority of {fleet}"));
        // No intermediates: what this key signs is a member or a server.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(crypto("sign the authority's certificate"))?;
        secret_file::create(&folder.join(KEY_FILE), key.serialize_pem().as_bytes())?;
        secret_file::create_public(&folder.join(CERTIFICATE_FILE), certificate.pem().as_bytes())?;
        Self::load(folder)
    }

    pub fn load(folder: &Path) -> Result<Self, AuthorityError> {
        let (certificate_path, key_path) = (folder.join(CERTIFICATE_FILE), folder.join(KEY_FILE));
        let pem = secret_file::read_public(&certificate_path)?;
        let key_pem = secret_file::read(&key_path)?;
        let damaged = |problem: String| AuthorityError::Damaged {
            certificate: certificate_path.clone(),
            key: key_path.clone(),
            problem,
        };
        let key = KeyPair::from_pem(&key_pem).map_err(|error| damaged(error.to_string()))?;
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| damaged(error.to_string()))?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(&certificate).map_err(|error| damaged(error.to_string()))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(damaged("the key is not the certificate's".to_owned()));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|error| damaged(error.to_string()))?;
        Ok(Self { issuer, certificate, pem })
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The end of every token: the first 16 hexadecimal digits of the certificate's SHA-256. By it a member that has
    /// nothing but a token knows the right controller.
    pub fn fingerprint(&self) -> String {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.certificate);
        digest.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    /// Signs a member's certificate.
    pub fn issue(
        &self,
        request: &SigningRequest,
        subject: &Subject<'_>,
        lifetime: Duration,
    ) -> Result<Issued, AuthorityError> {
        let mut params = params(lifetime);
        params.distinguished_name.push(DnType::CommonName, subject.name.as_str());
        let uri = subject.uri().try_into().map_err(crypto("name the member's certificate"))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let serial = params.serial_number.as_ref().map(SerialNumber::to_bytes).unwrap_or_default();
        let not_after_us = params.not_after.unix_timestamp().saturating_mul(1_000_000);
        let certificate =
            params.signed_by(request.key(), &self.issuer).map_err(crypto("sign a member's certificate"))?;
        Ok(Issued { pem: certificate.pem(), serial: hex(&serial), not_after_us })
    }

    /// A fresh key and certificate for the controller's own listener; the key lives in memory only. The authority's
    /// certificate goes with it, so that a token's fingerprint can be compared.
    pub fn server(&self, names: &[String], lifetime: Duration) -> Result<rustls::sign::CertifiedKey, AuthorityError> {
        let key = KeyPair::generate().map_err(crypto("generate the server's key"))?;
        let mut params = params(lifetime);
        params.distinguished_name.push(DnType::CommonName, "walfleet controller");
        params.subject_alt_names = names.iter().map(|name| server_name(name)).collect::<Result<_, _>>()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(crypto("sign the server's certificate"))?;
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let signing =
            rustls::crypto::aws_lc_rs::sign::any_supported_type(&private).map_err(AuthorityError::ServerKey)?;
        let chain = vec![certificate.der().clone(), self.certificate.clone()];
        Ok(rustls::sign::CertifiedKey::new(chain, signing))
    }
}

/// Valid from an hour ago for `lifetime` from now, with a serial number of 127 random bits (RFC 5280, 4.1.2.2).
fn params(lifetime: Duration) -> CertificateParams {
    let epoch = date_time_ymd(1970, 1, 1);
    let now = Duration::from_micros(u64::try_from(now_us()).unwrap_or(0));
    let mut params = CertificateParams::default();
    params.not_before = epoch + now.saturating_sub(CLOCK_SLACK);
    params.not_after = epoch + now.saturating_add(lifetime);
    params.distinguished_name = DistinguishedName::new();
    params.use_authority_key_identifier_extension = true;
    let mut serial: [u8; 16] = rand::random();
    // Positive, and of full length: the first bit is zero, the second one.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params
}

fn server_name(name: &str) -> Result<SanType, AuthorityError> {
    let bad = || AuthorityError::ServerName { name: name.to_owned() };
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    rustls_pki_types::DnsName::try_from(name).map_err(|_| bad())?;
    Ok(SanType::DnsName(name.try_into().map_err(|_| bad())?))
}

/// Checks a name for [`Authority::server`].
pub fn check_server_name(name: &str) -> Result<(), AuthorityError> {
    server_name(name).map(drop)
}

/// A new key and its certificate under `subject`, both PEM: for the first operator, who has nobody to send a request to.
pub fn issue_with_new_key(
    authority: &Authority,
    subject: &Subject<'_>,
    lifetime: Duration,
) -> Result<(String, Issued, SigningRequest), AuthorityError> {
    let key = KeyPair::generate().map_err(crypto("generate a member's key"))?;
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .and_then(|csr| csr.pem())
        .map_err(crypto("make a signing request"))?;
    let request = SigningRequest::from_pem(&csr)?;
    let issued = authority.issue(&request, subject, lifetime)?;
    Ok((key.serialize_pem(), issued, request))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::super::peer;
    use super::*;

    fn authority() -> (tempfile::TempDir, Authority) {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path(), "test").unwrap();
        (folder, authority)
    }

    #[test]
    fn a_request_contributes_its_key_and_nothing_else() {
        let (_folder, authority) = authority();
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let mut greedy = CertificateParams::new(vec!["controller.example".to_owned()]).unwrap();
        greedy.subject_alt_names.push(SanType::URI("walfleet://operator/root?role=admin".try_into().unwrap()));
        greedy.distinguished_name.push(DnType::CommonName, "root");
        greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        greedy.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        greedy.custom_extensions.push(rcgen::CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]));
        let csr = greedy.serialize_request(&key).unwrap().pem().unwrap();

        let request = SigningRequest::from_pem(&csr).unwrap();
        let subject = Subject { name: &"db1".parse().unwrap(), role: Role::Agent, enrolment: "e1" };
        let issued = authority.issue(&request, &subject, Duration::from_secs(60)).unwrap();
        let der = CertificateDer::from_pem_slice(issued.pem.as_bytes()).unwrap();
        let identity = peer::PeerIdentity::from_certificate(&der).unwrap();
        assert_eq!((identity.name.as_str(), identity.role, identity.enrolment.as_str()), ("db1", Role::Agent, "e1"));
        assert_eq!((identity.serial, identity.not_after_us), (issued.serial, issued.not_after_us));
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
        assert!(!parsed.is_ca());
        assert_eq!(parsed.subject().to_string(), "CN=db1");
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth);
        assert_eq!(parsed.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 1);
    }

    #[test]
    fn an_authority_is_loaded_only_whole_and_private() {
        let (folder, first) = authority();
        assert_eq!(Authority::load(folder.path()).unwrap().fingerprint(), first.fingerprint());
        let again = Authority::create(folder.path(), "test");
        assert!(
            matches!(again, Err(AuthorityError::File(SecretFileError::File { operation: "write", .. }))),
            "never overwritten"
        );

        let key = folder.path().join(KEY_FILE);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            Authority::load(folder.path()),
            Err(AuthorityError::File(SecretFileError::Exposed { mode: 0o644, .. }))
        ));
        fs::remove_file(&key).unwrap();
        let (other, _) = authority();
        fs::copy(other.path().join(KEY_FILE), &key).unwrap();
        assert!(matches!(Authority::load(folder.path()), Err(AuthorityError::Damaged { .. })));
    }
}
