//! The threads that open what was fetched: decrypt, decompress, check, and hand on to the sink.

use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::writers::{Out, WRITE_BYTES};
use super::{FetchError, Fetched, Goes, Piece, Range};
use crate::backup::read::ReadError;
use crate::crypto::DomainKey;
use crate::format::sealed::{Decompressor, Opener};

/// Opens fetched ranges on the calling thread until there are no more.
pub(super) fn open_ranges(
    fetched: &Mutex<mpsc::Receiver<Fetched>>,
    out: &mut Out<'_>,
    domain: &DomainKey,
    stop: &CancellationToken,
) -> Result<(), FetchError> {
    let mut zstd = Decompressor::new();
    let mut stored = Vec::new();
    loop {
        let next = fetched.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(Fetched { mut range, bytes, opener }) = next else { return Ok(()) };
        if stop.is_cancelled() {
            return Ok(());
        }
        // Of a pack that threads filled together the slots of each file lie in order, but not beside each other.
        range.pieces.sort_by_key(|piece| (piece.file.number, piece.goes.offset()));
        let mut pieces = range.pieces.iter().peekable();
        while let Some(first) = pieces.next() {
            out.plain.clear();
            open_piece(first, &range, &bytes, &opener, &mut stored, &mut out.plain.bytes, &mut zstd, domain)?;
            let offset = match &first.goes {
                Goes::Whole(offset) => *offset,
                Goes::Laid(slot) => slot.offset,
                Goes::Held(laid, runs) => {
                    laid.put(first.file.number, runs, out.plain.content()).ok_or_else(|| content_error(&range))?;
                    continue;
                }
                Goes::Parts(runs) => {
                    for run in runs {
                        let part = out.plain.content().get(run.from as usize..run.from as usize + run.len as usize);
                        let part = part.ok_or_else(|| content_error(&range))?;
                        out.sink.write(&first.file, run.to, part).map_err(FetchError::Sink)?;
                    }
                    continue;
                }
            };
            // Slots that follow each other go down in one write.
            while let Some(next) = pieces.peek() {
                let end = offset + out.plain.content().len() as u64;
                let follows = match &next.goes {
                    Goes::Whole(offset) => *offset == end,
                    Goes::Laid(slot) => slot.offset == end,
                    Goes::Parts(_) | Goes::Held(..) => false,
                };
                if next.file.number != first.file.number || !follows || out.plain.content().len() >= WRITE_BYTES {
                    break;
                }
                open_piece(next, &range, &bytes, &opener, &mut stored, &mut out.plain.bytes, &mut zstd, domain)?;
                pieces.next();
            }
            if !out.write(&first.file, offset)? {
                return Ok(());
            }
        }
    }
}

fn content_error(range: &Range) -> ReadError {
    ReadError::Content { object: format!("pack {}", range.pack) }
}

/// Appends one piece's plain content, checked against its id.
#[allow(clippy::too_many_arguments, reason = "scratch buffers are reused across pieces by one caller")]
fn open_piece(
    piece: &Piece,
    range: &Range,
    bytes: &[u8],
    opener: &Opener,
    stored: &mut Vec<u8>,
    plain: &mut Vec<u8>,
    zstd: &mut Decompressor,
    domain: &DomainKey,
) -> Result<(), FetchError> {
    let frame = piece.place.frame;
    let object = || format!("pack {}", range.pack);
    let start = (u64::from(frame.offset) - range.start) as usize;
    let content = bytes.get(start..start + frame.stored_len as usize);
    let content = content.ok_or_else(|| content_error(range))?;
    stored.clear();
    stored.extend_from_slice(content);
    let from = plain.len();
    opener.open_into(frame, stored, plain, zstd).map_err(|source| ReadError::Sealed { object: object(), source })?;
    let opened = plain.get(from..).unwrap_or_default();
    if domain.chunk_id(opened).0[..16] != piece.place.id.0 {
        return Err(content_error(range).into());
    }
    if let Goes::Laid(slot) = &piece.goes {
        let opened = plain.get_mut(from..).unwrap_or_default();
        slot.lay(piece.file.number, opened).ok_or_else(|| content_error(range))?;
    }
    Ok(())
}
