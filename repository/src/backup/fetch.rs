//! Brings a backup's chunks to whoever writes them down: few large ranges, several in flight, opened on many threads.
//!
//! ```text
//! plan (one task)      walks the file list, loads maps, gathers pieces by window, coalesces them by pack
//!   │                  (what the sink has already is compared first, a window at a time on n threads: [`sift`])
//!   │ ranges           bounded: ranges in flight × RANGE_BYTES of memory
//! fetch (n tasks)      one request each
//!   │ fetched ranges   bounded the same way
//! open (n threads)     decrypt, decompress, check, hand to the sink
//! ```

pub mod chunks;
mod laid;
mod openers;
mod sift;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::backup::fetch::laid::{Laid, LaidFile, LaidSlot};
use crate::backup::fetch::openers::Openers;
use crate::backup::fetch::sift::{Sifted, Window, ZeroRun};
use crate::backup::read::{BackupReader, ReadError};
use crate::crypto::DomainKey;
use crate::format::file_map::{ChunkPlace, Run};
use crate::format::manifest::{Content, EntryKind, FileEntry};
use crate::format::sealed::{Decompressor, Opener};
use crate::ids::PackId;

/// Stored bytes of one request at most: large enough that latency does not matter, small enough that several in flight
/// fit into memory.
const RANGE_BYTES: u64 = 8 << 20;

/// A hole between two wanted frames that is cheaper to read than to ask twice.
const COALESCE_GAP: u64 = 256 << 10;

/// Plain bytes gathered before they are sorted by pack: the more, the fewer and larger the ranges.
const WINDOW_BYTES: u64 = 1 << 30;

/// The first window is so much smaller, and each twice the one before: making files takes its time, and meanwhile there
/// is something to fetch and open.
const FIRST_WINDOW_BYTES: u64 = 32 << 20;

/// Pieces gathered at most, whatever their size: bounds memory with many small files.
const WINDOW_PIECES: usize = 64 << 10;

/// Which file of the walk; counts up from 0 in the order that [`PieceSink::entry`] saw them.
pub type FileNumber = u64;

/// A file that content is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PieceFile {
    pub number: FileNumber,
    /// As in its entry, so that a sink need not remember the paths of all files.
    pub path: Bytes,
}

/// What a sink has of a file before any content comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// All zero.
    Nothing,
    /// Something, which [`PieceSink::read`] tells: what is right already is not brought again.
    Content,
}

/// Takes files and their content. Called from many threads; content of one file may come in any order.
pub trait PieceSink: Send + Sync + 'static {
    /// Before any content of the entry: a directory or file comes into being, of its full size.
    fn entry(&self, number: FileNumber, entry: &FileEntry) -> std::io::Result<Found>;
    /// Plain content at an offset of the file. It begins at a multiple of [`ALIGNMENT`] in memory if it begins at one in
    /// the file.
    fn write(&self, file: &PieceFile, offset: u64, content: &[u8]) -> std::io::Result<()>;
    /// Fills `into` from an offset of a file found with content.
    fn read(&self, _file: &PieceFile, _offset: u64, _into: &mut [u8]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    /// So many bytes were right already.
    fn kept(&self, _bytes: u64) {}
}

/// Of content handed to [`PieceSink::write`]: what unbuffered writes ask for.
pub const ALIGNMENT: usize = 4096;

/// Frames that follow each other are handed on together up to this.
const WRITE_BYTES: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("write restored content: {0}")]
    Sink(#[source] std::io::Error),
    #[error("a restoring thread ended before its work was done")]
    Lost,
    #[error("cancelled")]
    Cancelled,
}

/// How hard to work.
#[derive(Clone, Copy, Debug)]
pub struct FetchOptions {
    /// Requests in flight.
    pub requests: usize,
    /// Threads that open and write.
    pub threads: usize,
}

struct Piece {
    file: PieceFile,
    place: ChunkPlace,
    goes: Goes,
    /// What may be there already.
    found: Found,
}

/// Where a chunk's bytes go in its file.
enum Goes {
    /// All of it, to here.
    Whole(u64),
    Parts(Box<[Run]>),
    /// All of it, with pages over it.
    Laid(Box<LaidSlot>),
    /// Pages of it, over slots that are opened later.
    Held(Arc<Laid>, Box<[Run]>),
}

impl Piece {
    fn new(file: PieceFile, found: Found, place: ChunkPlace, runs: &[Run]) -> Piece {
        let goes = match runs {
            [run] if run.from == 0 && run.len == place.frame.raw_len => Goes::Whole(run.to),
            runs => Goes::Parts(runs.into()),
        };
        Piece { file, place, goes, found }
    }
}

/// Neighbouring frames of one pack that one request brings.
struct Range {
    pack: PackId,
    start: u64,
    end: u64,
    pieces: Vec<Piece>,
}

struct Fetched {
    range: Range,
    bytes: Bytes,
    opener: Arc<Opener>,
}

/// What fetching has done so far.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct FetchReport {
    pub files: u64,
    pub fetched_bytes: u64,
    /// Of plain content that the sink had already.
    pub kept_bytes: u64,
}

/// Brings the content of every file of the backup to the sink. After cancellation or an error some content has reached
/// the sink and some has not.
pub async fn fetch_all(
    reader: Arc<BackupReader>,
    sink: Arc<dyn PieceSink>,
    options: FetchOptions,
    cancel: &CancellationToken,
) -> Result<FetchReport, FetchError> {
    let stop = cancel.child_token();
    let failure: Arc<OnceLock<FetchError>> = Arc::default();
    // Two ranges wait for a request, two fetched ones for a thread: neither side idles, memory stays bounded.
    let (range_sender, ranges) = mpsc::channel::<Range>(2);
    let (fetched_sender, fetched) = mpsc::channel::<Fetched>(2);
    let ranges = Arc::new(tokio::sync::Mutex::new(ranges));
    let fetched = Arc::new(Mutex::new(fetched));
    let openers = Arc::new(Openers::new(reader.store().clone(), reader.keys().clone(), reader.packs().clone()));

    let mut tasks = tokio::task::JoinSet::new();
    let fail = |failure: &Arc<OnceLock<FetchError>>, stop: &CancellationToken| {
        let (failure, stop) = (failure.clone(), stop.clone());
        move |error: FetchError| {
            let _ = failure.set(error);
            stop.cancel();
        }
    };
    for _ in 0..options.requests.max(1) {
        let (ranges, sender, openers) = (ranges.clone(), fetched_sender.clone(), openers.clone());
        let (failed, stop) = (fail(&failure, &stop), stop.clone());
        let fetching = async move {
            tokio::select! {
                // Dropping a request half-way loses nothing: its bytes have gone nowhere yet.
                () = stop.cancelled() => Ok(0),
                done = fetch_ranges(&ranges, &sender, &openers) => done,
            }
            .unwrap_or_else(|error| {
                failed(error.into());
                0
            })
        };
        tasks.spawn(fetching.in_current_span());
    }
    drop((fetched_sender, ranges));
    let mut threads = Vec::new();
    for _ in 0..options.threads.max(1) {
        let (fetched, sink, keys) = (fetched.clone(), sink.clone(), reader.keys().clone());
        let (failed, stop) = (fail(&failure, &stop), stop.clone());
        threads.push(tokio::task::spawn_blocking(move || {
            if let Err(error) = open_ranges(&fetched, &*sink, keys.newest(), &stop) {
                failed(error);
            }
        }));
    }
    drop(fetched);

    let mut plan = Plan {
        reader: &reader,
        sink: &sink,
        threads: options.threads,
        stop: &stop,
        window_bytes: FIRST_WINDOW_BYTES,
        kept_bytes: 0,
    };
    let files = tokio::select! {
        // Dropping the plan loses nothing that was not already handed on.
        () = stop.cancelled() => Ok(0),
        files = plan.ranges(range_sender) => files,
    };
    let kept_bytes = plan.kept_bytes;
    let files = files.unwrap_or_else(|error| {
        fail(&failure, &stop)(error);
        0
    });
    // A task that panicked took a range with it: nothing that was written may pass for whole.
    let mut fetched_bytes = 0;
    while let Some(done) = tasks.join_next().await {
        fetched_bytes += done.unwrap_or_else(|_| {
            fail(&failure, &stop)(FetchError::Lost);
            0
        });
    }
    for thread in threads {
        if thread.await.is_err() {
            fail(&failure, &stop)(FetchError::Lost);
        }
    }
    if let Some(error) = Arc::into_inner(failure).and_then(OnceLock::into_inner) {
        return Err(error);
    }
    if cancel.is_cancelled() {
        return Err(FetchError::Cancelled);
    }
    Ok(FetchReport { files, fetched_bytes, kept_bytes })
}

/// The one that walks the list.
struct Plan<'a> {
    reader: &'a BackupReader,
    sink: &'a Arc<dyn PieceSink>,
    threads: usize,
    stop: &'a CancellationToken,
    /// Of the present window.
    window_bytes: u64,
    kept_bytes: u64,
}

impl Plan<'_> {
    /// Announces every entry to the sink and sends ranges; returns the number of entries.
    async fn ranges(&mut self, sender: mpsc::Sender<Range>) -> Result<u64, FetchError> {
        let mut number: FileNumber = 0;
        let mut window = Window::new(self.window_bytes);
        for part in &self.reader.manifest.file_list {
            for entry in self.reader.file_list_part(part).await? {
                let found = self.sink.entry(number, &entry).map_err(FetchError::Sink)?;
                if let EntryKind::File { size, content, .. } = &entry.kind {
                    let file = PieceFile { number, path: entry.path.clone() };
                    self.gather(file, found, *size, content, &mut window, &sender).await?;
                }
                number += 1;
                if window.is_full() {
                    let filled = self.filled(&mut window);
                    self.send(filled, &sender).await?;
                }
            }
        }
        self.send(window, &sender).await?;
        Ok(number)
    }

    async fn gather(
        &mut self,
        file: PieceFile,
        found: Found,
        size: u64,
        content: &Content,
        window: &mut Window,
        sender: &mpsc::Sender<Range>,
    ) -> Result<(), FetchError> {
        match content {
            Content::Empty => {}
            Content::Zero => window.zero(&file, found, 0, size),
            Content::Chunk(place) => window.push(Piece { file, place: *place, goes: Goes::Whole(0), found }),
            Content::Map(place) => {
                let map = self.reader.file_map(place).await?;
                if found == Found::Nothing && !map.overlays.is_empty() {
                    let mut file = LaidFile::new(file, map).map_err(ReadError::Map)?;
                    while !file.gather(window) {
                        let filled = self.filled(window);
                        self.send(filled, sender).await?;
                    }
                    return Ok(());
                }
                let pieces =
                    map.for_each_chunk(|place, runs| window.push(Piece::new(file.clone(), found, *place, runs)));
                pieces.map_err(ReadError::Map)?;
                let zeros = map.for_each_zero(|offset, len| window.zero(&file, found, offset, len));
                zeros.map_err(ReadError::Map)?;
            }
        }
        Ok(())
    }

    /// The window, and a larger one in its place.
    fn filled(&mut self, window: &mut Window) -> Window {
        self.window_bytes = (2 * self.window_bytes).min(WINDOW_BYTES);
        std::mem::replace(window, Window::new(self.window_bytes))
    }

    /// Sends what the sink has not as ranges. If nobody listens any more, an error is already on record.
    async fn send(&mut self, mut window: Window, sender: &mpsc::Sender<Range>) -> Result<(), FetchError> {
        if !window.held.is_empty() {
            let (laid, held) = (window.laid.clone(), std::mem::take(&mut window.held));
            laid.expect(held.len());
            for range in coalesce(held) {
                if sender.send(range).await.is_err() {
                    return Ok(());
                }
            }
            // Meanwhile what is left of the window before is opened.
            laid.wait().await;
        }
        let pieces = match window.found {
            false => window.pieces,
            true => {
                let (sink, keys) = (self.sink.clone(), self.reader.keys().clone());
                let (threads, stop) = (self.threads, self.stop.clone());
                let sifting =
                    tokio::task::spawn_blocking(move || sift::sift(window, &*sink, keys.newest(), threads, &stop));
                let Sifted { missing, not_zero, kept_bytes } = sifting.await.map_err(|_| FetchError::Lost)??;
                self.kept_bytes += kept_bytes;
                for ZeroRun { file, offset, len } in not_zero {
                    let zeros = vec![0; len as usize];
                    self.sink.write(&file, offset, &zeros).map_err(FetchError::Sink)?;
                }
                missing
            }
        };
        for range in coalesce(pieces) {
            if sender.send(range).await.is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// Sorts pieces by place and joins neighbours.
fn coalesce(mut pieces: Vec<Piece>) -> Vec<Range> {
    // Packs in the order the files name them first, so that content reaches a disk roughly in file order.
    let mut order: HashMap<PackId, usize> = HashMap::new();
    for piece in &pieces {
        let next = order.len();
        order.entry(piece.place.pack).or_insert(next);
    }
    pieces.sort_by_key(|piece| (order.get(&piece.place.pack).copied(), piece.place.frame.offset));
    let mut ranges: Vec<Range> = Vec::new();
    for piece in pieces {
        let (start, end) = (u64::from(piece.place.frame.offset), piece.place.frame.end());
        match ranges.last_mut() {
            Some(range)
                if range.pack == piece.place.pack
                    && start <= range.end + COALESCE_GAP
                    && end.max(range.end) - range.start <= RANGE_BYTES =>
            {
                range.end = range.end.max(end);
                range.pieces.push(piece);
            }
            _ => ranges.push(Range { pack: piece.place.pack, start, end, pieces: vec![piece] }),
        }
    }
    ranges
}

/// Fetches ranges until there are no more; returns the bytes fetched.
async fn fetch_ranges(
    ranges: &tokio::sync::Mutex<mpsc::Receiver<Range>>,
    sender: &mpsc::Sender<Fetched>,
    openers: &Openers,
) -> Result<u64, ReadError> {
    let mut fetched = 0;
    loop {
        let Some(mut range) = ranges.lock().await.recv().await else { return Ok(fetched) };
        let (opener, bytes) = openers.fetch(&mut range).await?;
        fetched += bytes.len() as u64;
        if sender.send(Fetched { range, bytes, opener }).await.is_err() {
            return Ok(fetched);
        }
    }
}

/// Opens fetched ranges on the calling thread until there are no more.
fn open_ranges(
    fetched: &Mutex<mpsc::Receiver<Fetched>>,
    sink: &dyn PieceSink,
    domain: &DomainKey,
    stop: &CancellationToken,
) -> Result<(), FetchError> {
    let mut zstd = Decompressor::new();
    let (mut plain, mut stored) = (Plain::new(), Vec::new());
    loop {
        let next = fetched.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(Fetched { range, bytes, opener }) = next else { return Ok(()) };
        if stop.is_cancelled() {
            return Ok(());
        }
        let mut pieces = range.pieces.iter().peekable();
        while let Some(first) = pieces.next() {
            plain.clear();
            open_piece(first, &range, &bytes, &opener, &mut stored, &mut plain.bytes, &mut zstd, domain)?;
            let offset = match &first.goes {
                Goes::Whole(offset) => *offset,
                Goes::Laid(slot) => slot.offset,
                Goes::Held(laid, runs) => {
                    laid.put(first.file.number, runs, plain.content()).ok_or_else(|| content_error(&range))?;
                    continue;
                }
                Goes::Parts(runs) => {
                    for run in runs {
                        let part = plain.content().get(run.from as usize..run.from as usize + run.len as usize);
                        let part = part.ok_or_else(|| content_error(&range))?;
                        sink.write(&first.file, run.to, part).map_err(FetchError::Sink)?;
                    }
                    continue;
                }
            };
            // Frames that follow each other in pack and file go down in one write.
            while let Some(next) = pieces.peek() {
                let end = offset + plain.content().len() as u64;
                let follows = match &next.goes {
                    Goes::Whole(offset) => *offset == end,
                    Goes::Laid(slot) => slot.offset == end,
                    Goes::Parts(_) | Goes::Held(..) => false,
                };
                if next.file.number != first.file.number || !follows || plain.content().len() >= WRITE_BYTES {
                    break;
                }
                open_piece(next, &range, &bytes, &opener, &mut stored, &mut plain.bytes, &mut zstd, domain)?;
                pieces.next();
            }
            sink.write(&first.file, offset, plain.content()).map_err(FetchError::Sink)?;
        }
    }
}

/// Plain content that begins at a multiple of [`ALIGNMENT`], as long as it does not outgrow what was reserved.
struct Plain {
    bytes: Vec<u8>,
    start: usize,
}

impl Plain {
    fn new() -> Plain {
        Plain { bytes: Vec::with_capacity(2 * WRITE_BYTES), start: 0 }
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.start = self.bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        self.bytes.resize(self.start, 0);
    }

    fn content(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::file_map::ShortId;
    use crate::format::sealed::FramePlace;

    fn piece(file: u64, pack: u8, offset: u32, len: u32) -> Piece {
        let frame = FramePlace { offset, stored_len: len, raw_len: len };
        let file = PieceFile { number: file, path: Bytes::new() };
        let place = ChunkPlace { pack: PackId([pack; 32]), frame, id: ShortId::default() };
        Piece { file, place, goes: Goes::Whole(0), found: Found::Nothing }
    }

    #[test]
    fn neighbours_become_one_range_and_strangers_do_not() {
        let pieces = vec![
            piece(0, 2, 96, 1000),
            piece(1, 1, 5_000_000, 1000),
            piece(2, 2, 1096, 1000),
            piece(3, 1, 96, 1000),
            piece(4, 2, 100_000, 7 << 20),
            piece(5, 2, 100_000 + (7 << 20), 2 << 20),
        ];
        let ranges = coalesce(pieces);
        let seen: Vec<_> = ranges.iter().map(|r| (r.pack.0[0], r.start, r.end, r.pieces.len())).collect();
        let seven = 7 << 20;
        assert_eq!(
            seen,
            [
                (2, 96, 100_000 + seven, 3),
                (2, 100_000 + seven, 100_000 + seven + (2 << 20), 1),
                (1, 96, 1096, 1),
                (1, 5_000_000, 5_001_000, 1),
            ]
        );
    }
}
