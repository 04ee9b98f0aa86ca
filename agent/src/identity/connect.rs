//! One TLS connection to the controller, with errors that say whose fault it is.
//!
//! The connection is made here and handed to tonic whole, instead of letting tonic dial: so a wrong authority, a wrong
//! name and a wrong clock each have their own message, and a connection that ends is never silently re-made under an
//! old certificate.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::token::AuthorityFingerprint;

/// Of one attempt to reach the controller: TCP and TLS each. Longer than a lost SYN's second retry (1 s + 2 s + 4 s).
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// NAT devices forget a quiet connection after a few minutes at worst 30 s; a dead peer is noticed within the sum.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("controller url {url}: {problem}\nHINT: write it as https://host:port.")]
    Url { url: String, problem: String },
    #[error(
        "connect to controller {address}: {source}\nHINT: check that the controller runs there and that no firewall is in between."
    )]
    Dial { address: String, source: io::Error },
    #[error("connect to controller {address}: no answer within {} s\nHINT: check the address and the firewalls in between.", DIAL_TIMEOUT.as_secs())]
    Timeout { address: String },
    #[error("controller {address} is not signed by the authority this host trusts ({trusted})\nHINT: {hint}")]
    Authority { address: String, trusted: String, hint: &'static str },
    #[error(
        "the certificate of controller {address} is {what}; this host's clock says {now}\nHINT: compare the clocks of both hosts (`timedatectl`, `chronyc tracking`)."
    )]
    Clock { address: String, what: &'static str, now: Timestamp },
    #[error(
        "the certificate of controller {address} is for other names\nHINT: use a name it was made for, or add this one to the controller's configuration."
    )]
    Name { address: String },
    #[error(
        "the controller {address} refused the connection: {reason}\nHINT: if this host's certificate was revoked or has expired, join again with a new token."
    )]
    Refused { address: String, reason: String },
    #[error("secure the connection to controller {address}: {source}")]
    Tls { address: String, source: io::Error },
    #[error("prepare TLS: {problem}")]
    Setup { problem: String },
}

/// By what the controller is known.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Before joining: by the fingerprint in the token.
    Pinned(AuthorityFingerprint),
    /// After: by the fleet's authorities, and this host by its own certificate.
    Member(Arc<ClientConfig>),
}

/// Dials, secures, and opens HTTP/2. Safe to drop at any time.
pub async fn connect(url: &str, trust: &Trust) -> Result<Channel, ConnectError> {
    let bad_url = |problem: &str| ConnectError::Url { url: url.to_owned(), problem: problem.to_owned() };
    let uri: Uri = url.parse().map_err(|error: tonic::codegen::http::uri::InvalidUri| bad_url(&error.to_string()))?;
    if uri.scheme_str() != Some("https") {
        return Err(bad_url("it does not begin with https://"));
    }
    let host = uri.host().ok_or_else(|| bad_url("it names no host"))?;
    let port = uri.port_u16().ok_or_else(|| bad_url("it names no port"))?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(bare.to_owned()).map_err(|error| bad_url(&error.to_string()))?;
    let address = format!("{host}:{port}");

    let config = match trust {
        Trust::Pinned(fingerprint) => Arc::new(pinned_config(*fingerprint)?),
        Trust::Member(config) => Arc::clone(config),
    };
    let timeout = || ConnectError::Timeout { address: address.clone() };
    let socket = tokio::time::timeout(DIAL_TIMEOUT, TcpStream::connect((bare, port)))
        .await
        .map_err(|_| timeout())?
        .map_err(|source| ConnectError::Dial { address: address.clone(), source })?;
    // Heartbeats and answers are small and wanted at once.
    let _ = socket.set_nodelay(true);
    let secured = tokio::time::timeout(DIAL_TIMEOUT, tokio_rustls::TlsConnector::from(config).connect(name, socket))
        .await
        .map_err(|_| timeout())?
        .map_err(|source| explain(&address, trust, source))?;

    // `http` for tonic, since TLS is already underneath; the origin is what the server sees.
    let plain = format!("http://{address}");
    let endpoint = Endpoint::from_shared(plain)
        .map_err(|error| bad_url(&error.to_string()))?
        .origin(uri.clone())
        .user_agent(concat!("walfleet-agent/", env!("CARGO_PKG_VERSION")))
        .map_err(|error| bad_url(&error.to_string()))?
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let mut made = Some(TokioIo::new(secured));
    let once = tower::service_fn(move |_: Uri| {
        let made = made.take().ok_or_else(|| io::Error::other("the connection has ended"));
        async move { made }
    });
    endpoint
        .connect_with_connector(once)
        .await
        .map_err(|error| ConnectError::Tls { address, source: io::Error::other(chain(&error)) })
}

/// What a TLS failure means for the person who reads it.
fn explain(address: &str, trust: &Trust, source: io::Error) -> ConnectError {
    let address = address.to_owned();
    let tls = source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let now = Timestamp::now();
    match tls {
        Some(rustls::Error::InvalidCertificate(problem)) => match problem {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                ConnectError::Clock { address, what: "no longer valid", now }
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                ConnectError::Clock { address, what: "not valid yet", now }
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                ConnectError::Name { address }
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => match trust {
                Trust::Pinned(fingerprint) => ConnectError::Authority {
                    address,
                    trusted: format!("the token's, {fingerprint}"),
                    hint: "the token is of another fleet, or something else answers there; ask for a token of this controller.",
                },
                Trust::Member(_) => ConnectError::Authority {
                    address,
                    trusted: "of the fleet it joined".into(),
                    hint: "if the controller was made anew, join again with a new token; else something else answers there.",
                },
            },
            _ => ConnectError::Tls { address, source },
        },
        Some(rustls::Error::AlertReceived(alert)) => ConnectError::Refused { address, reason: format!("{alert:?}") },
        _ => ConnectError::Tls { address, source },
    }
}

/// An error and its causes in one line; tonic's own text is only "transport error".
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

pub(super) fn setup(problem: impl std::fmt::Display) -> ConnectError {
    ConnectError::Setup { problem: problem.to_string() }
}

fn pinned_config(fingerprint: AuthorityFingerprint) -> Result<ClientConfig, ConnectError> {
    let provider = provider();
    let verifier = Arc::new(PinnedAuthority { fingerprint, provider: Arc::clone(&provider) });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Trusts exactly one authority, known by fingerprint, which the server must send in its chain; then verifies as usual.
#[derive(Debug)]
struct PinnedAuthority {
    fingerprint: AuthorityFingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| AuthorityFingerprint::of_certificate(certificate) == self.fingerprint)
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
