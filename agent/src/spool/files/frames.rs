//! How pieces lie in a file: the magic, then one after the other, each with its checksum, its length and its numbers.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use walfleet_repository::checksum;
use walfleet_repository::postgres::Lsn;
use walfleet_repository::wal_archive::TailPlace;

use super::{SpoolError, failed};
use crate::spool::{MOST_PIECE_BYTES, PieceNumbers, SpooledPiece};

pub(super) const MAGIC: &[u8; 16] = b"walfleet-spool 1";
/// Of an entry: checksum, length of what is sealed, and the numbers of [`PieceNumbers`].
pub(super) const HEADER: usize = 48;

/// Where a piece lies, to be read again while its log lives.
#[derive(Clone, Debug)]
pub struct Lies {
    pub(super) path: Arc<Path>,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Lies {
    /// Blocking.
    pub fn read(&self) -> Result<Bytes, SpoolError> {
        let mut sealed = vec![0; self.length as usize];
        let read = File::open(&self.path).and_then(|file| file.read_exact_at(&mut sealed, self.offset));
        read.map_err(failed("read", &self.path))?;
        Ok(sealed.into())
    }
}

/// What is written before a piece.
pub(super) fn header(piece: &SpooledPiece) -> [u8; HEADER] {
    let PieceNumbers { system_identifier, timeline, branch, start_lsn, segment_bytes, from, to } = piece.numbers();
    let mut header = [0; HEADER];
    let mut at = 4;
    let mut put = |bytes: &[u8]| {
        header[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&(piece.sealed.len() as u32).to_le_bytes());
    put(&system_identifier.to_le_bytes());
    put(&timeline.to_le_bytes());
    put(&branch);
    put(&start_lsn.to_le_bytes());
    put(&segment_bytes.to_le_bytes());
    put(&from.to_le_bytes());
    put(&to.to_le_bytes());
    let checksum = checksum::crc32c_append(checksum::crc32c(&header[4..]), &piece.sealed);
    header[..4].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// A piece of a file.
#[derive(Clone, Debug)]
pub struct Found {
    pub place: TailPlace,
    pub from: u32,
    pub to: u32,
    pub lies: Lies,
}

impl Found {
    pub fn lsn(&self, offset: u32) -> Lsn {
        self.place.segment.at(self.place.size, offset)
    }
}

/// A stretch of a file that does not read, between what does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Damaged {
    pub bytes: Range<u64>,
    /// Up to where the piece before holds WAL; `None`: none is before.
    pub behind: Option<Lsn>,
    /// From where the piece after holds it; `None`: none is after.
    pub before: Option<Lsn>,
}

/// What a file holds.
#[derive(Default, Debug)]
pub struct Contents {
    pub pieces: Vec<Found>,
    pub damaged: Vec<Damaged>,
}

/// Every piece of a file that is as it was written. A last one that is cut off is none: it was never acknowledged. What else does not
/// read is damaged, and what is behind it is found by its checksum. Blocking.
pub fn read(path: &Path) -> Result<Contents, SpoolError> {
    let bytes = fs::read(path).map_err(failed("read", path))?;
    let path = Arc::<Path>::from(path);
    let mut contents = Contents::default();
    let mut offset = if bytes.starts_with(MAGIC) { MAGIC.len() } else { 0 };
    while offset < bytes.len() {
        if let Ok((piece, next)) = piece_at(&path, &bytes, offset) {
            contents.pieces.push(piece);
            offset = next;
            continue;
        }
        // A length may be what is damaged, so the next piece is where one reads.
        let intact = (offset + 1..bytes.len()).find_map(|at| Some((at, piece_at(&path, &bytes, at).ok()?.0)));
        if intact.is_none() && matches!(piece_at(&path, &bytes, offset), Err(Unread::CutOff)) {
            break;
        }
        let end = intact.as_ref().map_or(bytes.len(), |(at, _)| *at);
        contents.damaged.push(Damaged {
            bytes: offset as u64..end as u64,
            behind: contents.pieces.last().map(|piece| piece.lsn(piece.to)),
            before: intact.map(|(_, piece)| piece.lsn(piece.from)),
        });
        offset = end;
    }
    Ok(contents)
}

/// Why no piece is somewhere.
enum Unread {
    /// The file ends within it.
    CutOff,
    Damaged,
}

fn piece_at(path: &Arc<Path>, bytes: &[u8], at: usize) -> Result<(Found, usize), Unread> {
    let header = bytes.get(at..at + HEADER).ok_or(Unread::CutOff)?;
    let (checksum, length, numbers) = numbers(header).ok_or(Unread::Damaged)?;
    let place = numbers.place().filter(|_| length as usize <= MOST_PIECE_BYTES).ok_or(Unread::Damaged)?;
    let (begin, end) = (at + HEADER, at + HEADER + length as usize);
    let sealed = bytes.get(begin..end).ok_or(Unread::CutOff)?;
    if checksum::crc32c_append(checksum::crc32c(header.get(4..).unwrap_or_default()), sealed) != checksum {
        return Err(Unread::Damaged);
    }
    let lies = Lies { path: Arc::clone(path), offset: begin as u64, length };
    Ok((Found { place, from: numbers.from, to: numbers.to, lies }, end))
}

fn numbers(header: &[u8]) -> Option<(u32, u32, PieceNumbers)> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(header.get(at..at + 8)?.try_into().ok()?));
    let numbers = PieceNumbers {
        system_identifier: u64_at(8)?,
        timeline: u32_at(16)?,
        branch: header.get(20..28)?.try_into().ok()?,
        start_lsn: u64_at(28)?,
        segment_bytes: u32_at(36)?,
        from: u32_at(40)?,
        to: u32_at(44)?,
    };
    Some((u32_at(0)?, u32_at(4)?, numbers))
}
