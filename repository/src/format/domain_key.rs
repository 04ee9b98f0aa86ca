//! A domain key as stored: wrapped for one recipient, in the envelope of objects in clear.
//!
//! The wrap is not signed; what makes a domain key the right one is the commitment in the cluster's log.

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as wire;
use zeroize::Zeroizing;

use crate::crypto::{self, CryptoError, DomainKey, RecipientSecret};
use crate::format::clear::{self, ClearError, ObjectKind};
use crate::ids::{DomainId, RecipientId};

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum DomainKeyError {
    #[error("wrapped domain key: {0}")]
    Clear(#[from] ClearError),
    #[error("wrapped domain key: {0}")]
    Crypto(#[from] CryptoError),
    #[error("wrapped domain key: it does not decode: {0}")]
    Decode(String),
    #[error("wrapped domain key is for {found}, expected {expected}")]
    Identity { found: String, expected: String },
}

fn aad(domain: DomainId, version: u32) -> Vec<u8> {
    [&domain.0[..], &version.to_le_bytes()].concat()
}

/// The stored object. `label` tells people whose recipient it is.
pub fn wrap(key: &DomainKey, recipient: RecipientId, label: &str) -> Result<Bytes, CryptoError> {
    let (id_key, data_key) = key.secrets();
    let secret = wire::DomainKey {
        domain: Bytes::copy_from_slice(&key.domain.0),
        version: key.version,
        id_key: Bytes::copy_from_slice(id_key),
        data_key: Bytes::copy_from_slice(data_key),
    };
    let secret = Zeroizing::new(secret.encode_to_vec());
    let (ephemeral, ciphertext) = crypto::wrap(&recipient, &aad(key.domain, key.version), &secret)?;
    let wrapped = wire::WrappedDomainKey {
        domain: Bytes::copy_from_slice(&key.domain.0),
        version: key.version,
        recipient: Bytes::copy_from_slice(&recipient.0),
        ephemeral: Bytes::copy_from_slice(&ephemeral),
        ciphertext: ciphertext.into(),
        label: label.to_owned(),
    };
    Ok(clear::encode(ObjectKind::DomainKey, &wrapped.encode_to_vec()))
}

/// The domain key in the object, which must be the one its name promises.
pub fn unwrap(
    object: &[u8],
    domain: DomainId,
    version: u32,
    recipient: &RecipientSecret,
) -> Result<DomainKey, DomainKeyError> {
    let decode = |e: prost::DecodeError| DomainKeyError::Decode(e.to_string());
    let body = clear::decode(ObjectKind::DomainKey, object)?;
    let wrapped = wire::WrappedDomainKey::decode(body).map_err(decode)?;
    if wrapped.domain[..] != domain.0 || wrapped.version != version || wrapped.recipient[..] != recipient.id().0 {
        return Err(DomainKeyError::Identity {
            found: format!("version {} of a domain, or another recipient", wrapped.version),
            expected: format!("version {version} of domain {domain}, recipient {}", recipient.id()),
        });
    }
    let fixed = |bytes: &[u8], what: &str| -> Result<[u8; 32], DomainKeyError> {
        bytes.try_into().map_err(|_| DomainKeyError::Decode(format!("{what} has {} bytes, expected 32", bytes.len())))
    };
    let ephemeral = fixed(&wrapped.ephemeral, "ephemeral key")?;
    let secret = recipient.unwrap(&ephemeral, &aad(domain, version), &wrapped.ciphertext)?;
    let secret = wire::DomainKey::decode(&secret[..]).map_err(decode)?;
    if secret.domain[..] != domain.0 || secret.version != version {
        return Err(DomainKeyError::Decode("the key inside is another than the one outside".into()));
    }
    let id_key = fixed(&secret.id_key, "id key")?;
    Ok(DomainKey::from_parts(domain, version, id_key, fixed(&secret.data_key, "data key")?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapped_key_opens_for_its_recipient_and_under_its_name_alone() {
        let key = DomainKey::generate().unwrap();
        let (alice, bob) = (RecipientSecret::generate().unwrap(), RecipientSecret::generate().unwrap());
        let object = wrap(&key, alice.id(), "alice").unwrap();
        let read = unwrap(&object, key.domain, 1, &alice).unwrap();
        assert_eq!(read.commitment(), key.commitment());
        assert!(unwrap(&object, key.domain, 1, &bob).is_err());
        assert!(unwrap(&object, key.domain, 2, &alice).is_err());
        assert!(unwrap(&object, DomainId([0; 16]), 1, &alice).is_err());
    }
}
