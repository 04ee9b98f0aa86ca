//! The envelope of objects that lie in clear: magic, version, kind, length, body, checksum.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `WALFLEET` |
//! | 2 | format version, little endian |
//! | 2 | kind of object ([`ObjectKind`]), little endian |
//! | 4 | length of the body, little endian |
//! | n | body: a protobuf message |
//! | 32 | BLAKE3 of all the bytes before |
//!
//! The checksum finds accidents only; against forgery bodies are signed ([`crate::signature`]). Never interprets a body.

use std::fmt;

use bytes::Bytes;

/// The first bytes of every object in a repository.
pub const MAGIC: [u8; 8] = *b"WALFLEET";

/// The format that this program writes, and the newest it reads.
pub const FORMAT_VERSION: u16 = 1;

const HEADER_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 32;

/// Every kind of stored object; the number stands in its header.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum ObjectKind {
    // In clear, in this file's envelope.
    Root = 1,
    LogEntry = 2,
    Checkpoint = 3,
    DomainKey = 4,
    Reference = 5,
    GapNote = 6,
    CollectPlan = 7,
    Collected = 8,
    Origin = 9,
    // Sealed, with the header of `sealed`.
    Pack = 16,
    Manifest = 17,
    Segment = 18,
    Tail = 19,
    History = 20,
}

impl ObjectKind {
    pub fn number(self) -> u16 {
        self as u16
    }

    pub fn from_number(number: u16) -> Option<ObjectKind> {
        use ObjectKind::*;
        let clear = [Root, LogEntry, Checkpoint, DomainKey, Reference, GapNote, CollectPlan, Collected, Origin];
        let sealed = [Pack, Manifest, Segment, Tail, History];
        clear.into_iter().chain(sealed).find(|kind| kind.number() == number)
    }

    /// As people read it.
    pub fn name(self) -> &'static str {
        match self {
            ObjectKind::Root => "repository root",
            ObjectKind::LogEntry => "log entry",
            ObjectKind::Checkpoint => "log checkpoint",
            ObjectKind::DomainKey => "domain key",
            ObjectKind::Reference => "reference part",
            ObjectKind::GapNote => "gap note",
            ObjectKind::CollectPlan => "collection plan",
            ObjectKind::Collected => "report of a collection",
            ObjectKind::Origin => "origin of a timeline",
            ObjectKind::Pack => "pack",
            ObjectKind::Manifest => "manifest",
            ObjectKind::Segment => "WAL segment",
            ObjectKind::Tail => "WAL tail",
            ObjectKind::History => "timeline history",
        }
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Bytes that are not the object they should be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClearError {
    #[error("not a walfleet object: it begins with {found:02x?} instead of \"WALFLEET\"")]
    Magic { found: Vec<u8> },
    #[error(
        "format version {found}, and this program reads up to {FORMAT_VERSION}\nHINT: upgrade walfleet on this host."
    )]
    Version { found: u16 },
    #[error("a {} where a {expected} should be", Found(*.found))]
    Kind { expected: ObjectKind, found: u16 },
    #[error("{actual} bytes where {expected} should be")]
    Truncated { expected: u64, actual: u64 },
    #[error("{extra} bytes after its end")]
    Trailing { extra: u64 },
    #[error(
        "its checksum is wrong\nHINT: the object was damaged where it is stored; a copy in another place can replace it."
    )]
    Checksum,
}

struct Found(u16);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match ObjectKind::from_number(self.0) {
            Some(kind) => kind.fmt(f),
            None => write!(f, "object of unknown kind {}", self.0),
        }
    }
}

/// The object's bytes. The body's length is checked by no one but the reader of 4 GiB objects, of which there are none.
pub fn encode(kind: ObjectKind, body: &[u8]) -> Bytes {
    let length = u32::try_from(body.len()).expect("objects in clear are small: bodies of 4 GiB are never made");
    let mut object = Vec::with_capacity(HEADER_BYTES + body.len() + CHECKSUM_BYTES);
    object.extend_from_slice(&MAGIC);
    object.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    object.extend_from_slice(&kind.number().to_le_bytes());
    object.extend_from_slice(&length.to_le_bytes());
    object.extend_from_slice(body);
    let checksum = blake3::hash(&object);
    object.extend_from_slice(checksum.as_bytes());
    Bytes::from(object)
}

/// The body of an object of the kind `expected`; anything that is not exactly one such object is refused.
pub fn decode(expected: ObjectKind, object: &[u8]) -> Result<&[u8], ClearError> {
    let truncated = |expected: usize| ClearError::Truncated { expected: expected as u64, actual: object.len() as u64 };
    let (magic, rest) = object.split_first_chunk::<8>().ok_or_else(|| truncated(HEADER_BYTES + CHECKSUM_BYTES))?;
    if *magic != MAGIC {
        return Err(ClearError::Magic { found: magic.to_vec() });
    }
    let (header, rest) = rest.split_first_chunk::<8>().ok_or_else(|| truncated(HEADER_BYTES + CHECKSUM_BYTES))?;
    let [v0, v1, k0, k1, l0, l1, l2, l3] = *header;
    let version = u16::from_le_bytes([v0, v1]);
    if version == 0 || version > FORMAT_VERSION {
        return Err(ClearError::Version { found: version });
    }
    let kind = u16::from_le_bytes([k0, k1]);
    if kind != expected.number() {
        return Err(ClearError::Kind { expected, found: kind });
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let whole = HEADER_BYTES.saturating_add(length).saturating_add(CHECKSUM_BYTES);
    let (body, rest) = rest.split_at_checked(length).ok_or_else(|| truncated(whole))?;
    let (checksum, rest) = rest.split_first_chunk::<CHECKSUM_BYTES>().ok_or_else(|| truncated(whole))?;
    if !rest.is_empty() {
        return Err(ClearError::Trailing { extra: rest.len() as u64 });
    }
    let summed = object.get(..HEADER_BYTES + length).ok_or_else(|| truncated(whole))?;
    if blake3::hash(summed).as_bytes() != checksum {
        return Err(ClearError::Checksum);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_comes_back_and_its_bytes_are_as_documented() {
        let object = encode(ObjectKind::LogEntry, b"body");
        assert_eq!(&object[..20], b"WALFLEET\x01\0\x02\0\x04\0\0\0body");
        assert_eq!(decode(ObjectKind::LogEntry, &object), Ok(&b"body"[..]));
        assert_eq!(decode(ObjectKind::Root, &encode(ObjectKind::Root, b"")), Ok(&b""[..]));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let object = encode(ObjectKind::Reference, b"some body");
        for at in 0..object.len() {
            for bit in 0..8 {
                let mut damaged = object.to_vec();
                damaged[at] ^= 1 << bit;
                assert!(decode(ObjectKind::Reference, &damaged).is_err(), "byte {at} bit {bit}");
            }
            assert!(decode(ObjectKind::Reference, &object[..at]).is_err(), "cut at {at}");
        }
        let longer = [object.as_ref(), b"x"].concat();
        assert_eq!(decode(ObjectKind::Reference, &longer), Err(ClearError::Trailing { extra: 1 }));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let object = encode(ObjectKind::Root, b"body");
        let error = decode(ObjectKind::LogEntry, &object).unwrap_err();
        assert_eq!(error.to_string(), "a repository root where a log entry should be");
        let mut newer = object.to_vec();
        newer[8] = 2;
        assert_eq!(decode(ObjectKind::Root, &newer), Err(ClearError::Version { found: 2 }));
        assert!(matches!(decode(ObjectKind::Root, b"<html><body>"), Err(ClearError::Magic { .. })));
    }
}
