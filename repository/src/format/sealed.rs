//! The container of every sealed object: packs, segments, manifests, history files.
//!
//! ```text
//! header   magic "WALFSEAL" · format version u16 · kind u16 · domain 16 · key version u32 · salt 32 · key commitment 32
//! frames   each AES-256-GCM under the object's own key; the nonce is the frame's offset in the object
//! directory  one more frame: a protobuf message that says what the frames are
//! trailer  directory offset u64 · directory length u32 · CRC-32C of all bytes before it u32 · magic "WALFTAIL"
//! ```
//!
//! Numbers are little-endian. Authenticated with every frame: kind, domain, key version and the object's name (of a
//! pack, whose name is the hash of the result: its salt). The CRC lets a scrub without keys tell a damaged object.

use std::io::Cursor;

use bytes::Bytes;
use zstd::zstd_safe::{CParameter, ParamSwitch};

use crate::checksum;
use crate::crypto::{self, CryptoError, DomainKey, ObjectKey, TAG_LEN};
use crate::format::clear::ObjectKind;
use crate::ids::DomainId;

pub const HEADER_LEN: usize = 96;
pub const TRAILER_LEN: usize = 24;
/// No sealed object is smaller: a directory has at least its tag.
pub const SMALLEST: u64 = (HEADER_LEN + TAG_LEN + TRAILER_LEN) as u64;
pub const FORMAT_VERSION: u16 = 1;

const MAGIC: &[u8; 8] = b"WALFSEAL";
const TRAILER_MAGIC: &[u8; 8] = b"WALFTAIL";

/// A frame larger than this, or a directory, is refused before memory is asked for.
const MAX_RAW_LEN: u32 = 256 << 20;

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum SealedError {
    #[error("{what} is {len} bytes, too short to be a sealed object")]
    TooShort { what: &'static str, len: u64 },
    #[error("{what} does not begin as a sealed object does")]
    Magic { what: &'static str },
    #[error("{what} has format version {found}, this program reads up to {known}\nHINT: use a newer walfleet.")]
    Version { what: &'static str, found: u16, known: u16 },
    #[error("{what} says it is of kind {found}, expected {expected}")]
    Kind { what: &'static str, found: u16, expected: u16 },
    #[error("{what} ends too early: its trailer is missing or damaged")]
    Trailer { what: &'static str },
    #[error("{what} is damaged: CRC-32C {found:08x}, expected {expected:08x}")]
    Checksum { what: &'static str, found: u32, expected: u32 },
    #[error("{what} belongs to domain {found}, the key at hand to {expected}")]
    Domain { what: &'static str, found: DomainId, expected: DomainId },
    #[error("{what} is sealed with version {found} of the domain key, which is not at hand")]
    KeyVersion { what: &'static str, found: u32 },
    #[error("{what}: a frame of {stored} bytes at {offset} does not lie within the object")]
    FrameBounds { what: &'static str, offset: u64, stored: u64 },
    #[error("{what}: a frame at {offset} unpacks to another length than the {expected} bytes it should have")]
    Length { what: &'static str, offset: u64, expected: u32 },
    #[error("{what}: its directory does not read: {reason}")]
    Directory { what: &'static str, reason: String },
    #[error("{what}: a frame does not compress")]
    Compress { what: &'static str },
    #[error(transparent)]
    Crypto(#[from] CryptoError),
}

/// Where a frame lies in its object.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FramePlace {
    pub offset: u32,
    /// With its tag.
    pub stored_len: u32,
    pub raw_len: u32,
}

impl FramePlace {
    pub fn end(self) -> u64 {
        u64::from(self.offset) + u64::from(self.stored_len)
    }
}

/// How much work compression is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effort {
    /// zstd's.
    Level(i32),
    /// A quarter less work than level 1 for a sixth more bytes, on WAL: its table of positions fits into a core's first cache,
    /// only matches from seven bytes on are looked for, and at two of three positions. zstd's own faster levels leave literals
    /// as they are, which costs WAL a third.
    Least,
}

impl Effort {
    /// zstd's level that it is, or begins from.
    pub fn level(self) -> i32 {
        match self {
            Effort::Level(level) => level,
            Effort::Least => 1,
        }
    }
}

/// A reusable zstd compressor; one per thread.
pub struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    buffer: Vec<u8>,
}

impl Compressor {
    pub fn new(level: i32) -> Compressor {
        Compressor::of(Effort::Level(level))
    }

    pub fn of(effort: Effort) -> Compressor {
        let mut zstd = zstd::bulk::Compressor::new(effort.level()).expect("zstd makes a context unless memory is gone");
        if effort == Effort::Least {
            let literals = CParameter::LiteralCompressionMode(ParamSwitch::Enable);
            for parameter in [CParameter::HashLog(11), CParameter::MinMatch(7), CParameter::TargetLength(2), literals] {
                zstd.set_parameter(parameter).expect("all are within zstd's bounds");
            }
        }
        Compressor { zstd, buffer: Vec::new() }
    }

    /// What a frame of this content holds.
    pub fn pack<'a>(&'a mut self, plain: &'a [u8]) -> Packed<'a> {
        Packed { raw_len: plain.len(), stored: self.compress(plain).unwrap_or(plain) }
    }

    /// The compressed bytes, or nothing if they would not be fewer.
    fn compress(&mut self, plain: &[u8]) -> Option<&[u8]> {
        // One byte less than the plain length is all the room there is: zstd fails early where it would not shrink.
        let room = plain.len().checked_sub(1)?;
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        let len = self.zstd.compress_to_buffer(plain, self.buffer.get_mut(..room)?).ok()?;
        self.buffer.get(..len)
    }
}

/// Content as a frame holds it: compressed, or plain if that does not shrink it, which its lengths then say.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    raw_len: usize,
    stored: &'a [u8],
}

/// Builds one sealed object in memory.
pub struct SealedWriter {
    buffer: Vec<u8>,
    key: ObjectKey,
    aad: Vec<u8>,
    what: &'static str,
}

impl SealedWriter {
    /// `name` is the object's key in the repository; `None` for a pack, which is bound to its salt instead.
    pub fn new(domain: &DomainKey, kind: ObjectKind, name: Option<&str>, capacity: usize) -> Result<Self, SealedError> {
        SealedWriter::in_buffer(domain, kind, name, Vec::with_capacity(capacity))
    }

    /// In memory that was used before: what was in it is gone.
    pub fn in_buffer(
        domain: &DomainKey,
        kind: ObjectKind,
        name: Option<&str>,
        mut buffer: Vec<u8>,
    ) -> Result<Self, SealedError> {
        let salt: [u8; 32] = crypto::random()?;
        let key = domain.object_key(&salt);
        buffer.clear();
        buffer.extend_from_slice(MAGIC);
        buffer.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        buffer.extend_from_slice(&(kind as u16).to_le_bytes());
        buffer.extend_from_slice(&domain.domain.0);
        buffer.extend_from_slice(&domain.version.to_le_bytes());
        buffer.extend_from_slice(&salt);
        buffer.extend_from_slice(key.commitment());
        let aad = aad(kind, &domain.domain, domain.version, name.map_or(&salt[..], str::as_bytes));
        Ok(SealedWriter { buffer, key, aad, what: kind.name() })
    }

    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    pub fn is_empty(&self) -> bool {
        self.buffer.len() == HEADER_LEN
    }

    /// Compresses and seals one frame.
    pub fn push(&mut self, plain: &[u8], compressor: &mut Compressor) -> Result<FramePlace, SealedError> {
        self.push_packed(compressor.pack(plain))
    }

    /// Seals one frame.
    pub fn push_packed(&mut self, packed: Packed<'_>) -> Result<FramePlace, SealedError> {
        let too_large = || SealedError::Crypto(CryptoError::TooLarge { what: self.what });
        let offset = u32::try_from(self.buffer.len()).map_err(|_| too_large())?;
        let raw_len = u32::try_from(packed.raw_len).ok().filter(|len| *len <= MAX_RAW_LEN).ok_or_else(too_large)?;
        let from = self.buffer.len();
        self.buffer.extend_from_slice(packed.stored);
        self.key.seal_tail(u64::from(offset), &self.aad, &mut self.buffer, from)?;
        let stored_len = u32::try_from(self.buffer.len() - from).map_err(|_| too_large())?;
        Ok(FramePlace { offset, stored_len, raw_len })
    }

    /// Appends the directory and the trailer.
    pub fn finish(mut self, directory: &[u8], compressor: &mut Compressor) -> Result<Bytes, SealedError> {
        let place = self.push(directory, compressor)?;
        self.buffer.extend_from_slice(&u64::from(place.offset).to_le_bytes());
        self.buffer.extend_from_slice(&place.raw_len.to_le_bytes());
        let crc = checksum::crc32c(&self.buffer);
        self.buffer.extend_from_slice(&crc.to_le_bytes());
        self.buffer.extend_from_slice(TRAILER_MAGIC);
        Ok(Bytes::from(self.buffer))
    }
}

fn aad(kind: ObjectKind, domain: &DomainId, key_version: u32, name: &[u8]) -> Vec<u8> {
    let mut aad = Vec::with_capacity(22 + name.len());
    aad.extend_from_slice(&(kind as u16).to_le_bytes());
    aad.extend_from_slice(&domain.0);
    aad.extend_from_slice(&key_version.to_le_bytes());
    aad.extend_from_slice(name);
    aad
}

/// The first bytes of a sealed object: what they say before any key is at hand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    pub kind: u16,
    pub domain: DomainId,
    pub key_version: u32,
    pub salt: [u8; 32],
    pub commitment: [u8; 32],
}

impl Header {
    pub fn parse(bytes: &[u8], kind: ObjectKind) -> Result<Header, SealedError> {
        let what = kind.name();
        let short = || SealedError::TooShort { what, len: bytes.len() as u64 };
        let mut fields = Fields(bytes);
        if fields.take::<8>().ok_or_else(short)? != *MAGIC {
            return Err(SealedError::Magic { what });
        }
        let version = u16::from_le_bytes(fields.take().ok_or_else(short)?);
        if version == 0 || version > FORMAT_VERSION {
            return Err(SealedError::Version { what, found: version, known: FORMAT_VERSION });
        }
        let found = u16::from_le_bytes(fields.take().ok_or_else(short)?);
        if found != kind as u16 {
            return Err(SealedError::Kind { what, found, expected: kind as u16 });
        }
        Ok(Header {
            kind: found,
            domain: DomainId(fields.take().ok_or_else(short)?),
            key_version: u32::from_le_bytes(fields.take().ok_or_else(short)?),
            salt: fields.take().ok_or_else(short)?,
            commitment: fields.take().ok_or_else(short)?,
        })
    }
}

/// Cuts fixed fields off the front of a slice.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }
}

/// Opens frames of one object whose header was read and whose key fits.
pub struct Opener {
    key: ObjectKey,
    aad: Vec<u8>,
    what: &'static str,
}

impl Opener {
    pub fn new(
        header: &Header,
        domain: &DomainKey,
        kind: ObjectKind,
        name: Option<&str>,
    ) -> Result<Opener, SealedError> {
        let what = kind.name();
        if header.domain != domain.domain {
            return Err(SealedError::Domain { what, found: header.domain, expected: domain.domain });
        }
        if header.key_version != domain.version {
            return Err(SealedError::KeyVersion { what, found: header.key_version });
        }
        let key = domain.object_key(&header.salt);
        if key.commitment() != &header.commitment {
            return Err(CryptoError::Commitment { what }.into());
        }
        let aad = aad(kind, &header.domain, header.key_version, name.map_or(&header.salt[..], str::as_bytes));
        Ok(Opener { key, aad, what })
    }

    /// The plain content of a frame. `stored` is exactly the frame's bytes and is used as scratch space.
    pub fn open(&self, place: FramePlace, stored: &mut [u8]) -> Result<Vec<u8>, SealedError> {
        let mut plain = Vec::new();
        self.open_into(place, stored, &mut plain, &mut Decompressor::new())?;
        Ok(plain)
    }

    /// Appends the plain content of a frame to `into`.
    pub fn open_into(
        &self,
        place: FramePlace,
        stored: &mut [u8],
        into: &mut Vec<u8>,
        decompressor: &mut Decompressor,
    ) -> Result<(), SealedError> {
        let offset = u64::from(place.offset);
        let bad_length = || SealedError::Length { what: self.what, offset, expected: place.raw_len };
        if stored.len() != place.stored_len as usize || stored.len() < TAG_LEN || place.raw_len > MAX_RAW_LEN {
            return Err(bad_length());
        }
        let content = self.key.open(offset, &self.aad, stored, self.what)?;
        if content.len() == place.raw_len as usize {
            into.extend_from_slice(content);
            return Ok(());
        }
        // Never trust a frame's own idea of its size: there is no more room than the buffer has.
        let start = into.len();
        into.reserve(place.raw_len as usize);
        let mut appended = Cursor::new(std::mem::take(into));
        appended.set_position(start as u64);
        let opened = decompressor.zstd.decompress_to_buffer(content, &mut appended);
        *into = appended.into_inner();
        match opened {
            Ok(len) if len == place.raw_len as usize => Ok(()),
            _ => {
                into.truncate(start);
                Err(bad_length())
            }
        }
    }
}

/// A reusable zstd decompressor; one per thread.
pub struct Decompressor {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Default for Decompressor {
    fn default() -> Self {
        Decompressor::new()
    }
}

impl Decompressor {
    pub fn new() -> Decompressor {
        let zstd = zstd::bulk::Decompressor::new().expect("zstd makes a context unless memory is gone");
        Decompressor { zstd }
    }
}

/// What the last bytes of a sealed object say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trailer {
    pub directory: FramePlace,
    /// Of all bytes before the CRC itself.
    pub crc32c: u32,
}

impl Trailer {
    /// From the last [`TRAILER_LEN`] bytes of an object of `total` bytes.
    pub fn parse(bytes: &[u8], total: u64, kind: ObjectKind) -> Result<Trailer, SealedError> {
        let what = kind.name();
        let bad = || SealedError::Trailer { what };
        let (_, bytes) = bytes.split_last_chunk::<TRAILER_LEN>().ok_or(SealedError::TooShort { what, len: total })?;
        let mut fields = Fields(bytes);
        let offset = u64::from_le_bytes(fields.take().ok_or_else(bad)?);
        let raw_len = u32::from_le_bytes(fields.take().ok_or_else(bad)?);
        let crc32c = u32::from_le_bytes(fields.take().ok_or_else(bad)?);
        if fields.take::<8>().ok_or_else(bad)? != *TRAILER_MAGIC {
            return Err(bad());
        }
        let end = total.checked_sub(TRAILER_LEN as u64).ok_or_else(bad)?;
        let stored_len = end.checked_sub(offset).filter(|len| *len >= TAG_LEN as u64).ok_or_else(bad)?;
        if offset < HEADER_LEN as u64 || raw_len > MAX_RAW_LEN {
            return Err(bad());
        }
        let offset = u32::try_from(offset).map_err(|_| bad())?;
        let stored_len = u32::try_from(stored_len).map_err(|_| bad())?;
        Ok(Trailer { directory: FramePlace { offset, stored_len, raw_len }, crc32c })
    }
}

/// Checks the bytes of a whole object without any key: header, trailer and CRC.
pub fn check(bytes: &[u8], kind: ObjectKind) -> Result<(Header, Trailer), SealedError> {
    let what = kind.name();
    let header = Header::parse(bytes, kind)?;
    let trailer = Trailer::parse(bytes, bytes.len() as u64, kind)?;
    // Before the CRC itself: all but the CRC and the magic behind it.
    let covered = bytes.len().checked_sub(12).and_then(|len| bytes.get(..len)).ok_or(SealedError::Trailer { what })?;
    let found = checksum::crc32c(covered);
    if found != trailer.crc32c {
        return Err(SealedError::Checksum { what, found, expected: trailer.crc32c });
    }
    Ok((header, trailer))
}

/// A whole object in memory, its directory opened.
pub struct SealedObject {
    pub header: Header,
    pub directory: Vec<u8>,
    opener: Opener,
    bytes: Bytes,
    what: &'static str,
}

impl SealedObject {
    pub fn open(bytes: Bytes, domain: &DomainKey, kind: ObjectKind, name: Option<&str>) -> Result<Self, SealedError> {
        let (header, trailer) = check(&bytes, kind)?;
        let opener = Opener::new(&header, domain, kind, name)?;
        let mut object = SealedObject { header, directory: Vec::new(), opener, bytes, what: kind.name() };
        object.directory = object.frame(trailer.directory)?;
        Ok(object)
    }

    /// Appends the plain content of one frame; `stored` is scratch space, used again and again.
    pub fn frame_into(
        &self,
        place: FramePlace,
        stored: &mut Vec<u8>,
        into: &mut Vec<u8>,
        decompressor: &mut Decompressor,
    ) -> Result<(), SealedError> {
        stored.clear();
        stored.extend_from_slice(slice(&self.bytes, place, self.what)?);
        self.opener.open_into(place, stored, into, decompressor)
    }

    /// The plain content of one frame.
    pub fn frame(&self, place: FramePlace) -> Result<Vec<u8>, SealedError> {
        let mut stored = slice(&self.bytes, place, self.what)?.to_vec();
        self.opener.open(place, &mut stored)
    }
}

/// The stored bytes of a frame within a whole object.
pub fn slice<'a>(bytes: &'a [u8], place: FramePlace, what: &'static str) -> Result<&'a [u8], SealedError> {
    let bounds =
        SealedError::FrameBounds { what, offset: u64::from(place.offset), stored: u64::from(place.stored_len) };
    usize::try_from(place.end()).ok().and_then(|end| bytes.get(place.offset as usize..end)).ok_or(bounds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(key: &DomainKey) -> (Bytes, Vec<FramePlace>, Vec<Vec<u8>>) {
        let mut compressor = Compressor::new(3);
        let mut writer = SealedWriter::new(key, ObjectKind::Segment, Some("some/key"), 1024).unwrap();
        let noise: Vec<u8> =
            (0..3000u32).flat_map(|i| blake3::hash(&i.to_le_bytes()).as_bytes()[..1].to_vec()).collect();
        let plains = vec![vec![b'a'; 5000], noise, Vec::new(), vec![1]];
        let places = plains.iter().map(|plain| writer.push(plain, &mut compressor).unwrap()).collect();
        (writer.finish(b"directory", &mut compressor).unwrap(), places, plains)
    }

    #[test]
    fn frames_come_back_whole_compressed_or_not() {
        let key = DomainKey::generate().unwrap();
        let (bytes, places, plains) = sample(&key);
        assert!(places[0].stored_len < 200, "compressible content shrinks");
        assert_eq!(places[1].stored_len as usize, plains[1].len() + TAG_LEN, "noise is stored raw");
        let object = SealedObject::open(bytes, &key, ObjectKind::Segment, Some("some/key")).unwrap();
        assert_eq!(object.directory, b"directory");
        for (place, plain) in places.iter().zip(&plains) {
            assert_eq!(&object.frame(*place).unwrap(), plain);
        }
    }

    #[test]
    fn no_flipped_cut_renamed_or_foreign_object_opens() {
        let key = DomainKey::generate().unwrap();
        let (bytes, _, _) = sample(&key);
        let open = |bytes: &[u8], key: &DomainKey, kind, name| {
            SealedObject::open(Bytes::copy_from_slice(bytes), key, kind, Some(name)).map(|_| ())
        };
        for i in 0..bytes.len() {
            let mut flipped = bytes.to_vec();
            flipped[i] ^= 0x10;
            assert!(open(&flipped, &key, ObjectKind::Segment, "some/key").is_err(), "byte {i}");
        }
        for len in 0..bytes.len() {
            assert!(open(&bytes[..len], &key, ObjectKind::Segment, "some/key").is_err(), "cut to {len}");
        }
        assert!(open(&bytes, &key, ObjectKind::Segment, "another/key").is_err());
        assert!(open(&bytes, &key, ObjectKind::Manifest, "some/key").is_err());
        assert!(open(&bytes, &DomainKey::generate().unwrap(), ObjectKind::Segment, "some/key").is_err());
    }
}
