//! What a joining member sends: proof that it holds a key. Subject, names and extensions of the request are not even
//! looked at.

use rcgen::SubjectPublicKeyInfo;
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

/// An RSA-4096 request has 2 KiB; ours has 300 bytes.
const MAX_BYTES: usize = 16 * 1024;

#[derive(Debug, thiserror::Error)]
#[error(
    "the signing request is refused: {problem}\nHINT: send a PEM PKCS#10 request, signed by its own ECDSA P-256, P-384 or Ed25519 key."
)]
pub struct RequestError {
    problem: String,
}

/// A member's key, which has proven that it signed its request.
pub struct SigningRequest {
    key: SubjectPublicKeyInfo,
    /// BLAKE3 of the SubjectPublicKeyInfo's DER, in hexadecimal: tells keys apart.
    pub key_fingerprint: String,
}

impl SigningRequest {
    /// Reads and verifies a request.
    pub fn from_pem(pem: &str) -> Result<Self, RequestError> {
        let refuse = |problem: &str| RequestError { problem: problem.to_owned() };
        if pem.len() > MAX_BYTES {
            return Err(refuse("it is larger than 16 KiB"));
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(|_| refuse("it is not PEM"))?;
        let (rest, request) =
            X509CertificationRequest::from_der(&der).map_err(|_| refuse("it is not a PKCS#10 request"))?;
        if !rest.is_empty() {
            return Err(refuse("bytes follow it"));
        }
        request.verify_signature().map_err(|_| refuse("it is not signed by its own key"))?;
        let spki = request.certification_request_info.subject_pki.raw;
        let key = SubjectPublicKeyInfo::from_der(spki).map_err(|_| refuse("its key is of an unknown kind"))?;
        let known = [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];
        if !known.contains(&rcgen::PublicKeyData::algorithm(&key)) {
            return Err(refuse("its key is of a kind that is not accepted"));
        }
        Ok(Self { key, key_fingerprint: blake3::hash(spki).to_hex().to_string() })
    }

    pub fn key(&self) -> &SubjectPublicKeyInfo {
        &self.key
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    #[test]
    fn requests_that_do_not_prove_their_key_are_refused() {
        let good =
            CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        assert!(SigningRequest::from_pem(&good).is_ok());
        // A character of the last full line lies in the signature.
        let at = good.find("-----END").unwrap() - 20;
        let other = if &good[at..=at] == "A" { "B" } else { "A" };
        let forged = format!("{}{other}{}", &good[..at], &good[at + 1..]);
        let rsa = KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256)
            .and_then(|key| CertificateParams::default().serialize_request(&key)?.pem());
        let mut refused = vec![forged, good.replace("REQUEST", "WHATEVER"), String::new(), "x".repeat(MAX_BYTES + 1)];
        refused.push(good[..100].to_owned());
        refused.extend(rsa);
        for bad in refused {
            assert!(SigningRequest::from_pem(&bad).is_err(), "{bad}");
        }
    }
}
