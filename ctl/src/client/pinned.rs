//! The first connection of all, when nothing is trusted yet but the token in the operator's hand.
//!
//! A token ends in the fingerprint of the fleet's authority. The controller shows its chain; the authority in it must
//! have that fingerprint, and the rest is ordinary verification below that authority. The token's secret is sent only
//! after that.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tonic::transport::ClientTlsConfig;

use super::{CallError, Client, endpoint};
use crate::context::Address;

/// A join token, as far as it can be checked here: `wft_<id>.<secret>.<fingerprint>`.
#[derive(Clone)]
pub struct Token {
    text: String,
    fingerprint: String,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "this is not a join token\nHINT: copy the whole line that walfleet token create printed: wft_ID.SECRET.FINGERPRINT."
)]
pub struct TokenError;

impl Token {
    pub fn parse(text: &str) -> Result<Token, TokenError> {
        let text = text.trim();
        let mut parts = text.strip_prefix("wft_").ok_or(TokenError)?.split('.');
        let (Some(id), Some(secret), Some(fingerprint), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError);
        };
        let whole = !id.is_empty() && !secret.is_empty();
        // Sixteen digits are 64 bits; a longer one is a future token and as good.
        let hex = fingerprint.len() >= 16
            && fingerprint.len() <= 64
            && fingerprint.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if whole && hex {
            Ok(Token { text: text.to_owned(), fingerprint: fingerprint.to_owned() })
        } else {
            Err(TokenError)
        }
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// The fingerprint of an authority: SHA-256 of its certificate's DER, in hexadecimal.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Client {
    /// Connects without a client certificate to the controller that the token names.
    pub async fn connect_pinned(url: &str, token: &Token) -> Result<Client, CallError> {
        let address = Address::parse(url);
        let name = address.as_ref().map_or_else(|| url.to_owned(), |address| address.name.clone());
        let bad = |error: tonic::transport::Error| CallError::configuration(&name, &error);
        let mut endpoint = endpoint(url).map_err(bad)?;
        if address.is_some_and(|address| address.encrypted) {
            let verifier = Arc::new(PinnedAuthority { fingerprint: token.fingerprint.clone() });
            endpoint = endpoint.tls_config_with_verifier(ClientTlsConfig::new(), verifier).map_err(bad)?;
        }
        Client::open(endpoint, name).await
    }
}

#[derive(Debug)]
struct PinnedAuthority {
    fingerprint: String,
}

impl PinnedAuthority {
    fn below(&self, authority: &CertificateDer<'_>) -> Result<Arc<WebPkiServerVerifier>, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        WebPkiServerVerifier::builder(Arc::new(roots))
            .build()
            .map_err(|error| rustls::Error::General(format!("build certificate verifier: {error}")))
    }
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .chain([leaf])
            .find(|certificate| fingerprint(certificate).starts_with(&self.fingerprint))
            .ok_or(CertificateError::ApplicationVerificationFailure)?;
        self.below(authority)?.verify_server_cert(leaf, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_token_is_taken() {
        assert!(Token::parse(" wft_a1.s3cret.0123456789abcdef\n").is_ok());
        for bad in [
            "",
            "wft_",
            "a1.s.0123456789abcdef",
            "wft_a1.s.0123456789abcde",
            "wft_a1.s.0123456789ABCDEF",
            "wft_a1..0123456789abcdef",
            "wft_a1.s.t.0123456789abcdef",
            "wft_a1.s.éé23456789abcdef",
        ] {
            assert_eq!(Token::parse(bad).map(|_| ()), Err(TokenError), "{bad}");
        }
    }
}
