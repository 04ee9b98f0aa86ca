//! Keys and sealing: domain keys, the key of each object, wrapping for recipients.
//!
//! One domain key seals everything of one cluster lineage. No object shares a key with another: each has a random salt
//! from which its own key derives, so that nonces may simply count (here: the frame's offset). AES-GCM does not commit
//! to its key, so every object also carries a commitment that is compared before anything is opened.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{self, EphemeralPrivateKey, PrivateKey, UnparsedPublicKey, X25519};
use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use crate::ids::{ChunkId, DomainId, RecipientId};

/// Bytes that AES-256-GCM adds to a frame (NIST SP 800-38D).
pub const TAG_LEN: usize = 16;

const OBJECT_KEY: &str = "walfleet 2026-11 object key v1";
const OBJECT_COMMITMENT: &str = "walfleet 2026-11 object key commitment v1";
const DOMAIN_COMMITMENT: &str = "walfleet 2026-11 domain key commitment v1";
const WRAP_KEY: &str = "walfleet 2026-11 domain key wrap v1";

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum CryptoError {
    #[error("the system's random number generator does not answer")]
    Random,
    #[error("{what} does not open: wrong key, or changed after it was sealed")]
    Open { what: &'static str },
    #[error(
        "{what} was sealed with another key than the one at hand\nHINT: use the key file that this repository's domain key was wrapped for."
    )]
    Commitment { what: &'static str },
    #[error("{what} is not a key")]
    NotAKey { what: &'static str },
    #[error("{what} is too large to seal")]
    TooLarge { what: &'static str },
}

/// Bytes from the system's generator.
pub fn random<const N: usize>() -> Result<[u8; N], CryptoError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| CryptoError::Random)?;
    Ok(bytes)
}

/// The secret of one version of a domain.
#[derive(Clone)]
pub struct DomainKey {
    pub domain: DomainId,
    /// From 1; a new one seals new data after a leak.
    pub version: u32,
    /// The same in every version, so that content ids remain comparable.
    id_key: Zeroizing<[u8; 32]>,
    data_key: Zeroizing<[u8; 32]>,
}

impl DomainKey {
    pub fn generate() -> Result<DomainKey, CryptoError> {
        DomainKey::from_parts(DomainId(random()?), 1, random()?, random()?)
    }

    pub fn from_parts(
        domain: DomainId,
        version: u32,
        id_key: [u8; 32],
        data_key: [u8; 32],
    ) -> Result<Self, CryptoError> {
        Ok(DomainKey { domain, version, id_key: Zeroizing::new(id_key), data_key: Zeroizing::new(data_key) })
    }

    pub(crate) fn secrets(&self) -> (&[u8; 32], &[u8; 32]) {
        (&self.id_key, &self.data_key)
    }

    /// What the cluster's log states of this key, so that no stranger's key passes for it.
    pub fn commitment(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key(DOMAIN_COMMITMENT);
        hasher.update(&self.domain.0).update(&self.version.to_le_bytes());
        hasher.update(&*self.id_key).update(&*self.data_key);
        *hasher.finalize().as_bytes()
    }

    /// The id of a piece of plain content. Not guessable without the key; equal within the domain.
    pub fn chunk_id(&self, plain: &[u8]) -> ChunkId {
        ChunkId(*blake3::keyed_hash(&self.id_key, plain).as_bytes())
    }

    /// The same of content that comes in portions.
    pub fn content_hasher(&self) -> ContentHasher {
        ContentHasher(blake3::Hasher::new_keyed(&self.id_key))
    }

    /// The key of the object with this salt.
    pub fn object_key(&self, salt: &[u8; 32]) -> ObjectKey {
        let derive = |context: &str| {
            let mut hasher = blake3::Hasher::new_derive_key(context);
            hasher.update(&*self.data_key).update(&self.domain.0).update(salt);
            Zeroizing::new(*hasher.finalize().as_bytes())
        };
        let key = UnboundKey::new(&AES_256_GCM, &*derive(OBJECT_KEY)).expect("AES-256-GCM takes 32 bytes");
        ObjectKey { key: LessSafeKey::new(key), commitment: *derive(OBJECT_COMMITMENT) }
    }
}

impl std::fmt::Debug for DomainKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DomainKey({} version {})", self.domain, self.version)
    }
}

/// Works out the id of content that grows: at any time that of all it has seen.
#[derive(Clone)]
pub struct ContentHasher(blake3::Hasher);

impl ContentHasher {
    pub fn update(&mut self, plain: &[u8]) {
        self.0.update(plain);
    }

    pub fn id(&self) -> ChunkId {
        ChunkId(*self.0.finalize().as_bytes())
    }
}

/// Seals and opens the frames of one object.
pub struct ObjectKey {
    key: LessSafeKey,
    commitment: [u8; 32],
}

impl ObjectKey {
    pub fn commitment(&self) -> &[u8; 32] {
        &self.commitment
    }

    /// Seals `buffer[from..]` in place and appends the tag. `nonce` must be new for this key: the frame's offset.
    pub fn seal_tail(&self, nonce: u64, aad: &[u8], buffer: &mut Vec<u8>, from: usize) -> Result<(), CryptoError> {
        let plain = buffer.get_mut(from..).ok_or(CryptoError::TooLarge { what: "frame" })?;
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce_of(nonce), Aad::from(aad), plain)
            .map_err(|_| CryptoError::TooLarge { what: "frame" })?;
        buffer.extend_from_slice(tag.as_ref());
        Ok(())
    }

    /// Opens a frame in place; the result is the buffer without its tag.
    pub fn open<'a>(
        &self,
        nonce: u64,
        aad: &[u8],
        frame: &'a mut [u8],
        what: &'static str,
    ) -> Result<&'a mut [u8], CryptoError> {
        self.key.open_in_place(nonce_of(nonce), Aad::from(aad), frame).map_err(|_| CryptoError::Open { what })
    }
}

fn nonce_of(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// The secret half of a recipient: whoever has it can open domain keys wrapped for it.
#[derive(Clone)]
pub struct RecipientSecret {
    secret: Zeroizing<[u8; 32]>,
    id: RecipientId,
}

impl RecipientSecret {
    pub fn generate() -> Result<RecipientSecret, CryptoError> {
        RecipientSecret::from_bytes(random()?)
    }

    /// From 32 bytes, an X25519 private key (RFC 7748).
    pub fn from_bytes(secret: [u8; 32]) -> Result<RecipientSecret, CryptoError> {
        let what = "recipient secret";
        let key = PrivateKey::from_private_key(&X25519, &secret).map_err(|_| CryptoError::NotAKey { what })?;
        let public = key.compute_public_key().map_err(|_| CryptoError::NotAKey { what })?;
        let id = RecipientId::from_slice(public.as_ref()).map_err(|_| CryptoError::NotAKey { what })?;
        Ok(RecipientSecret { secret: Zeroizing::new(secret), id })
    }

    pub fn id(&self) -> RecipientId {
        self.id
    }

    pub fn secret_bytes(&self) -> &[u8; 32] {
        &self.secret
    }

    /// Opens what [`wrap`] made for this recipient.
    pub fn unwrap(&self, ephemeral: &[u8; 32], aad: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, CryptoError> {
        let what = "wrapped domain key";
        let key = PrivateKey::from_private_key(&X25519, &*self.secret).map_err(|_| CryptoError::NotAKey { what })?;
        let peer = UnparsedPublicKey::new(&X25519, &ephemeral[..]);
        let key = agreement::agree(&key, peer, CryptoError::NotAKey { what }, |shared| {
            Ok(wrap_key(shared, ephemeral, &self.id))
        })?;
        let mut buffer = Zeroizing::new(sealed.to_vec());
        let len =
            key.open_in_place(nonce_of(0), Aad::from(aad), &mut buffer).map_err(|_| CryptoError::Open { what })?.len();
        buffer.truncate(len);
        Ok(buffer)
    }
}

/// Seals a small secret for a recipient: the ephemeral public key and the sealed bytes.
pub fn wrap(recipient: &RecipientId, aad: &[u8], secret: &[u8]) -> Result<([u8; 32], Vec<u8>), CryptoError> {
    let what = "recipient";
    let ephemeral = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).map_err(|_| CryptoError::Random)?;
    let public = ephemeral.compute_public_key().map_err(|_| CryptoError::NotAKey { what })?;
    let public: [u8; 32] = public.as_ref().try_into().map_err(|_| CryptoError::NotAKey { what })?;
    let peer = UnparsedPublicKey::new(&X25519, &recipient.0[..]);
    let key = agreement::agree_ephemeral(ephemeral, peer, CryptoError::NotAKey { what }, |shared| {
        Ok(wrap_key(shared, &public, recipient))
    })?;
    let mut sealed = secret.to_vec();
    key.seal_in_place_append_tag(nonce_of(0), Aad::from(aad), &mut sealed)
        .map_err(|_| CryptoError::TooLarge { what: "secret" })?;
    Ok((public, sealed))
}

fn wrap_key(shared: &[u8], ephemeral: &[u8; 32], recipient: &RecipientId) -> LessSafeKey {
    let mut hasher = blake3::Hasher::new_derive_key(WRAP_KEY);
    hasher.update(shared).update(ephemeral).update(&recipient.0);
    let key = Zeroizing::new(*hasher.finalize().as_bytes());
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &*key).expect("AES-256-GCM takes 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapped_secret_opens_for_its_recipient_alone() {
        let alice = RecipientSecret::generate().unwrap();
        let mallory = RecipientSecret::generate().unwrap();
        let (ephemeral, sealed) = wrap(&alice.id(), b"domain", b"secret").unwrap();
        assert_eq!(&**alice.unwrap(&ephemeral, b"domain", &sealed).unwrap(), b"secret");
        assert!(alice.unwrap(&ephemeral, b"other", &sealed).is_err());
        assert!(mallory.unwrap(&ephemeral, b"domain", &sealed).is_err());
        for i in 0..sealed.len() {
            let mut flipped = sealed.clone();
            flipped[i] ^= 1;
            assert!(alice.unwrap(&ephemeral, b"domain", &flipped).is_err());
        }
    }

    #[test]
    fn a_frame_opens_only_at_its_place_and_under_its_name() {
        let key = DomainKey::generate().unwrap();
        let object = key.object_key(&[7; 32]);
        let mut buffer = b"head".to_vec();
        buffer.extend_from_slice(b"content");
        object.seal_tail(4, b"name", &mut buffer, 4).unwrap();
        assert_eq!(&buffer[..4], b"head");
        let open = |nonce, aad: &[u8], key: &ObjectKey| {
            key.open(nonce, aad, &mut buffer[4..].to_vec(), "frame").map(|b| b.to_vec())
        };
        assert_eq!(open(4, b"name", &object).unwrap(), b"content");
        assert!(open(5, b"name", &object).is_err());
        assert!(open(4, b"other", &object).is_err());
        assert!(open(4, b"name", &key.object_key(&[8; 32])).is_err());
        assert_ne!(object.commitment(), key.object_key(&[8; 32]).commitment());
    }
}
