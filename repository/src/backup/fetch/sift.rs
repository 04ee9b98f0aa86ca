//! Which of a window's pieces the sink has already: read, and compared by what their chunks' ids say, on many threads.
//!
//! A piece is kept only if that proves it. Of a slot with pages laid over it the whole chunk is not in the file any more,
//! so it is brought again; of a chunk of gathered pages all of whose pages are in use it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio_util::sync::CancellationToken;

use super::laid::{HELD_BYTES, Laid};
use super::{FetchError, Found, Goes, Piece, PieceFile, PieceSink, WINDOW_PIECES};
use crate::backup::write::is_zero;
use crate::crypto::DomainKey;

/// What a thread takes at a time: neighbours, so that it reads on where it was.
const BATCH: usize = 32;

/// Zero stretches are compared in parts of this.
const ZERO_BYTES: u64 = 128 << 10;

/// A stretch of a file that is to be zero.
pub(super) struct ZeroRun {
    pub file: PieceFile,
    pub offset: u64,
    pub len: u64,
}

/// Pieces gathered before they are sorted by pack.
pub(super) struct Window {
    /// Plain bytes that fill it.
    limit: u64,
    pub pieces: Vec<Piece>,
    /// Only of files found with content: in a new file what is not written is zero.
    pub zeros: Vec<ZeroRun>,
    /// What is to be brought before them: pages laid over their slots.
    pub held: Vec<Piece>,
    pub laid: Arc<Laid>,
    pub held_bytes: u64,
    /// Of plain content.
    pub bytes: u64,
    /// Whether any of it may be there already.
    pub found: bool,
}

impl Window {
    pub fn new(limit: u64) -> Window {
        Window {
            limit,
            pieces: Vec::new(),
            zeros: Vec::new(),
            held: Vec::new(),
            laid: Arc::default(),
            held_bytes: 0,
            bytes: 0,
            found: false,
        }
    }

    pub fn is_full(&self) -> bool {
        self.bytes >= self.limit
            || self.pieces.len() + self.zeros.len() >= WINDOW_PIECES
            || self.held_bytes >= HELD_BYTES
    }

    pub fn push(&mut self, piece: Piece) {
        self.bytes += u64::from(piece.place.frame.raw_len);
        self.found |= piece.found == Found::Content;
        self.pieces.push(piece);
    }

    pub fn zero(&mut self, file: &PieceFile, found: Found, offset: u64, len: u64) {
        if found == Found::Nothing {
            return;
        }
        self.found = true;
        for at in (0..len).step_by(ZERO_BYTES as usize) {
            self.zeros.push(ZeroRun { file: file.clone(), offset: offset + at, len: ZERO_BYTES.min(len - at) });
        }
    }
}

/// What is left to do of a window.
pub(super) struct Sifted {
    pub missing: Vec<Piece>,
    pub not_zero: Vec<ZeroRun>,
    pub kept_bytes: u64,
}

/// Blocking.
pub(super) fn sift(
    window: Window,
    sink: &dyn PieceSink,
    domain: &DomainKey,
    threads: usize,
    stop: &CancellationToken,
) -> Result<Sifted, FetchError> {
    let Window { pieces, zeros, .. } = window;
    let next = AtomicUsize::new(0);
    let total = pieces.len() + zeros.len();
    let compare = || -> Result<(Vec<usize>, u64), FetchError> {
        let (mut kept, mut kept_bytes, mut buffer) = (Vec::new(), 0, Vec::new());
        loop {
            let from = next.fetch_add(BATCH, Ordering::Relaxed);
            if from >= total || stop.is_cancelled() {
                return Ok((kept, kept_bytes));
            }
            for index in from..total.min(from + BATCH) {
                let same = match (pieces.get(index), index.checked_sub(pieces.len()).and_then(|i| zeros.get(i))) {
                    (Some(piece), _) => {
                        let len = has_piece(piece, sink, domain, &mut buffer)?;
                        sink.kept(len);
                        kept_bytes += len;
                        len > 0
                    }
                    (None, Some(run)) => has_zeros(run, sink, &mut buffer)?,
                    (None, None) => false,
                };
                if same {
                    kept.push(index);
                }
            }
        }
    };
    let done: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(compare)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(Err(FetchError::Lost))).collect()
    });
    let mut keep = vec![false; total];
    let mut kept_bytes = 0;
    for part in done {
        let (kept, bytes) = part?;
        kept_bytes += bytes;
        for index in kept {
            if let Some(keep) = keep.get_mut(index) {
                *keep = true;
            }
        }
    }
    if stop.is_cancelled() {
        return Err(FetchError::Cancelled);
    }
    let mut keep = keep.into_iter();
    let missing = pieces.into_iter().filter(|_| keep.next() != Some(true)).collect();
    let not_zero = zeros.into_iter().filter(|_| keep.next() != Some(true)).collect();
    Ok(Sifted { missing, not_zero, kept_bytes })
}

/// How much of the file is provably this piece: all of it, or nothing.
fn has_piece(piece: &Piece, sink: &dyn PieceSink, domain: &DomainKey, buffer: &mut Vec<u8>) -> Result<u64, FetchError> {
    if piece.found == Found::Nothing {
        return Ok(0);
    }
    let len = piece.place.frame.raw_len as usize;
    buffer.resize(len, 0);
    match &piece.goes {
        Goes::Whole(offset) => sink.read(&piece.file, *offset, buffer).map_err(FetchError::Sink)?,
        // Only for files that are not there.
        Goes::Laid(_) | Goes::Held(..) => return Ok(0),
        Goes::Parts(runs) => {
            // No byte of a chunk goes to two places: if the sum is the whole, nothing of it is missing in the file.
            if runs.iter().map(|run| run.len as usize).sum::<usize>() != len {
                return Ok(0);
            }
            for run in runs {
                let part = buffer.get_mut(run.from as usize..run.from as usize + run.len as usize);
                let Some(part) = part else { return Ok(0) };
                sink.read(&piece.file, run.to, part).map_err(FetchError::Sink)?;
            }
        }
    }
    Ok(if domain.chunk_id(buffer).0[..16] == piece.place.id.0 { len as u64 } else { 0 })
}

fn has_zeros(run: &ZeroRun, sink: &dyn PieceSink, buffer: &mut Vec<u8>) -> Result<bool, FetchError> {
    buffer.resize(run.len as usize, 0);
    sink.read(&run.file, run.offset, buffer).map_err(FetchError::Sink)?;
    Ok(is_zero(buffer))
}
