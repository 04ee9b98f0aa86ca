//! Who is at the other end of a link between two agents. Both show the certificate that the fleet's authority gave them as
//! agents, and nobody else's will do: neither an operator's nor the controller's own.

use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};
use x509_parser::extensions::GeneralName;

use crate::identity::connect::{chain, provider};
use crate::identity::{Identity, IdentityError, TlsParts};

/// Of TCP and TLS each: a peer is a host nearby, and commits wait meanwhile.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);

/// A peer that is gone is noticed within the sum, though nothing is to be said.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("prepare TLS: {0}")]
    Setup(String),
    #[error("{address} is not host:port")]
    Address { address: String },
    #[error("{address} does not answer")]
    Timeout { address: String },
    #[error("{address}: {problem}")]
    Connect { address: String, problem: String },
}

fn setup(problem: impl std::fmt::Display) -> TrustError {
    TrustError::Setup(problem.to_string())
}

/// The agent whose certificate it is; `None`: it is no agent's.
pub fn agent_of(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let names = parsed.subject_alternative_name().ok()??;
    let [GeneralName::URI(uri)] = names.value.general_names[..] else { return None };
    let (name, _) = uri.strip_prefix("walfleet://agent/")?.split_once('?')?;
    (!name.is_empty() && !name.contains('/')).then(|| name.to_owned())
}

fn verifier(roots: RootCertStore) -> Result<Arc<dyn ClientCertVerifier>, TrustError> {
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build().map_err(setup)
}

/// For the agent that keeps.
pub fn server_config(identity: &Identity) -> Result<Arc<ServerConfig>, TrustError> {
    let TlsParts { roots, chain, key } = identity.tls()?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .with_client_cert_verifier(verifier(roots)?)
        .with_single_cert(chain, key)
        .map_err(setup)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed connection would carry a certificate that nobody verified today.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// For the agent that brings: the other end must be this agent.
fn client_config(identity: &Identity, peer: &str) -> Result<Arc<ClientConfig>, TrustError> {
    let TlsParts { roots, chain, key } = identity.tls()?;
    let known = Arc::new(KnownAgent { inner: verifier(roots)?, name: peer.to_owned() });
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(known)
        .with_client_auth_cert(chain, key)
        .map_err(setup)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Dials, secures, and opens HTTP/2. Safe to drop at any time.
pub async fn connect(identity: &Identity, peer: &str, address: &str) -> Result<Channel, TrustError> {
    let bad = || TrustError::Address { address: address.to_owned() };
    let uri: Uri = format!("http://{address}").parse().map_err(|_| bad())?;
    let (host, port) = (uri.host().ok_or_else(bad)?, uri.port_u16().ok_or_else(bad)?);
    let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(bare.clone()).map_err(|_| bad())?;
    let config = client_config(identity, peer)?;
    let late = || TrustError::Timeout { address: address.to_owned() };
    let failed = |problem: String| TrustError::Connect { address: address.to_owned(), problem };
    let socket = tokio::time::timeout(DIAL_TIMEOUT, TcpStream::connect((bare, port)));
    let socket = socket.await.map_err(|_| late())?.map_err(|error| failed(error.to_string()))?;
    // A piece is wanted at once.
    let _ = socket.set_nodelay(true);
    let secured = tokio_rustls::TlsConnector::from(config).connect(name, socket);
    let secured = tokio::time::timeout(DIAL_TIMEOUT, secured).await.map_err(|_| late())?;
    let secured = secured.map_err(|error| failed(error.to_string()))?;
    let endpoint = Endpoint::from(uri)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20);
    let mut made = Some(TokioIo::new(secured));
    let once = tower::service_fn(move |_: Uri| {
        let made = made.take().ok_or_else(|| std::io::Error::other("the connection has ended"));
        async move { made }
    });
    endpoint.connect_with_connector(once).await.map_err(|error| failed(chain(&error)))
}

/// One agent, by the name in its certificate; on which address it answers does not matter.
#[derive(Debug)]
struct KnownAgent {
    inner: Arc<dyn ClientCertVerifier>,
    name: String,
}

impl ServerCertVerifier for KnownAgent {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // As an agent's certificate: it is good for nothing else.
        self.inner.verify_client_cert(end_entity, intermediates, now)?;
        match agent_of(end_entity) {
            Some(found) if found == self.name => Ok(ServerCertVerified::assertion()),
            _ => Err(rustls::Error::InvalidCertificate(CertificateError::NotValidForName)),
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
