//! TLS as this fleet speaks it: version 1.3 only, since both ends are ours; certificates of our authority only; none at
//! all is let through, for joining, and the gate refuses it everything else.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::identity::Authority;
use crate::identity::server_certificate::ServerCertificate;

#[derive(Debug, thiserror::Error)]
#[error("set up TLS")]
pub struct TlsError(#[source] Box<dyn std::error::Error + Send + Sync>);

/// The configuration of the listener.
pub fn server_config(
    authority: &Authority,
    certificate: Arc<ServerCertificate>,
    renewal_grace: Duration,
) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().clone()).map_err(|error| TlsError(error.into()))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|error| TlsError(error.into()))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TlsError(error.into()))?
        .with_client_cert_verifier(Arc::new(MemberVerifier { inner: verifier, renewal_grace }))
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec()];
    // Connections are long; a resumed one would carry a certificate that nobody verified today.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Ordinary verification, but a certificate that ended within the grace passes: the gate lets it renew, and nothing
/// else.
#[derive(Debug)]
struct MemberVerifier {
    inner: Arc<dyn ClientCertVerifier>,
    renewal_grace: Duration,
}

impl ClientCertVerifier for MemberVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let refused = match self.inner.verify_client_cert(end_entity, intermediates, now) {
            Err(error) if is_expiry(&error) => error,
            decided => return decided,
        };
        let not_after = x509_parser::parse_x509_certificate(end_entity)
            .ok()
            .and_then(|(_, parsed)| u64::try_from(parsed.validity().not_after.timestamp()).ok());
        match not_after {
            Some(not_after) if now.as_secs() <= not_after.saturating_add(self.renewal_grace.as_secs()) => {
                let then = UnixTime::since_unix_epoch(Duration::from_secs(not_after));
                self.inner.verify_client_cert(end_entity, intermediates, then)
            }
            _ => Err(refused),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

fn is_expiry(error: &rustls::Error) -> bool {
    use rustls::Error::InvalidCertificate;
    matches!(error, InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }))
}
