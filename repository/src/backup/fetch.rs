//! Brings a backup's chunks to whoever writes them down: few large ranges, several in flight, opened on many threads.
//!
//! ```text
//! plan (one task)      walks the file list, loads maps, gathers pieces by window, coalesces them by pack
//!   │ ranges           bounded: ranges in flight × RANGE_BYTES of memory
//! fetch (n tasks)      one request each
//!   │ fetched ranges   bounded the same way
//! open (n threads)     decrypt, decompress, check, hand to the sink
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::backup::read::{BackupReader, PackKeys, ReadError, opener};
use crate::crypto::DomainKey;
use crate::format::file_map::{ChunkPlace, Run};
use crate::format::manifest::{Content, EntryKind, FileEntry};
use crate::format::sealed::{Decompressor, HEADER_LEN, Opener};
use crate::ids::PackId;
use crate::keyring::Keyring;
use crate::store::Store;

/// Stored bytes of one request at most: large enough that latency does not matter, small enough that several in flight
/// fit into memory.
const RANGE_BYTES: u64 = 8 << 20;

/// A hole between two wanted frames that is cheaper to read than to ask twice.
const COALESCE_GAP: u64 = 256 << 10;

/// Plain bytes gathered before they are sorted by pack: the more, the fewer and larger the ranges.
const WINDOW_BYTES: u64 = 1 << 30;

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

/// Takes files and their content. Called from many threads; content of one file may come in any order.
pub trait PieceSink: Send + Sync + 'static {
    /// Before any content of the entry: a directory or file comes into being, of its full size and all zero.
    fn entry(&self, number: FileNumber, entry: &FileEntry) -> std::io::Result<()>;
    /// Plain content at an offset of the file.
    fn write(&self, file: &PieceFile, offset: u64, content: &[u8]) -> std::io::Result<()>;
}

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
}

/// Where a chunk's bytes go in its file.
enum Goes {
    /// All of it, to here.
    Whole(u64),
    Parts(Box<[Run]>),
}

impl Piece {
    fn new(file: PieceFile, place: ChunkPlace, runs: &[Run]) -> Piece {
        let goes = match runs {
            [run] if run.from == 0 && run.len == place.frame.raw_len => Goes::Whole(run.to),
            runs => Goes::Parts(runs.into()),
        };
        Piece { file, place, goes }
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

    let files = tokio::select! {
        // Dropping the plan loses nothing that was not already handed on.
        () = stop.cancelled() => Ok(0),
        files = plan_ranges(&reader, &*sink, range_sender) => files,
    };
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
    Ok(FetchReport { files, fetched_bytes })
}

/// Walks the list, announces every entry to the sink and sends ranges; returns the number of entries.
async fn plan_ranges(
    reader: &BackupReader,
    sink: &dyn PieceSink,
    sender: mpsc::Sender<Range>,
) -> Result<u64, FetchError> {
    let mut number: FileNumber = 0;
    let (mut window, mut window_bytes) = (Vec::new(), 0u64);
    for part in &reader.manifest.file_list {
        for entry in reader.file_list_part(part).await? {
            sink.entry(number, &entry).map_err(FetchError::Sink)?;
            if let EntryKind::File { content, .. } = &entry.kind {
                let file = PieceFile { number, path: entry.path.clone() };
                match content {
                    Content::Empty | Content::Zero => {}
                    Content::Chunk(place) => {
                        window.push(Piece { file, place: *place, goes: Goes::Whole(0) });
                        window_bytes += u64::from(place.frame.raw_len);
                    }
                    Content::Map(place) => {
                        let map = reader.file_map(place).await?;
                        let pieces = map.for_each_chunk(|place, runs| {
                            window.push(Piece::new(file.clone(), *place, runs));
                            window_bytes += u64::from(place.frame.raw_len);
                        });
                        pieces.map_err(ReadError::Map)?;
                    }
                }
            }
            number += 1;
            if window_bytes >= WINDOW_BYTES || window.len() >= WINDOW_PIECES {
                send_window(std::mem::take(&mut window), &sender).await;
                window_bytes = 0;
            }
        }
    }
    send_window(window, &sender).await;
    Ok(number)
}

/// Sends the window's pieces as ranges. If nobody listens any more, an error is already on record.
async fn send_window(pieces: Vec<Piece>, sender: &mpsc::Sender<Range>) {
    for range in coalesce(pieces) {
        if sender.send(range).await.is_err() {
            return;
        }
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
    let (mut plain, mut stored) = (Vec::new(), Vec::new());
    loop {
        let next = fetched.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(Fetched { range, bytes, opener }) = next else { return Ok(()) };
        if stop.is_cancelled() {
            return Ok(());
        }
        let mut pieces = range.pieces.iter().peekable();
        while let Some(first) = pieces.next() {
            plain.clear();
            open_piece(first, &range, &bytes, &opener, &mut stored, &mut plain, &mut zstd, domain)?;
            let offset = match &first.goes {
                Goes::Whole(offset) => *offset,
                Goes::Parts(runs) => {
                    for run in runs {
                        let part = plain.get(run.from as usize..run.from as usize + run.len as usize);
                        let part = part.ok_or_else(|| content_error(&range))?;
                        sink.write(&first.file, run.to, part).map_err(FetchError::Sink)?;
                    }
                    continue;
                }
            };
            // Frames that follow each other in pack and file go down in one write.
            while let Some(next) = pieces.peek() {
                let end = offset + plain.len() as u64;
                let follows = matches!(next.goes, Goes::Whole(next) if next == end);
                if next.file.number != first.file.number || !follows || plain.len() >= 1 << 20 {
                    break;
                }
                open_piece(next, &range, &bytes, &opener, &mut stored, &mut plain, &mut zstd, domain)?;
                pieces.next();
            }
            sink.write(&first.file, offset, &plain).map_err(FetchError::Sink)?;
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
    Ok(())
}

/// Fetches ranges and keeps what opens each pack, since every pack has a key of its own.
struct Openers {
    store: Store,
    keys: Arc<Keyring>,
    packs: Arc<PackKeys>,
    known: Mutex<HashMap<PackId, Arc<Opener>>>,
}

impl Openers {
    fn new(store: Store, keys: Arc<Keyring>, packs: Arc<PackKeys>) -> Openers {
        Openers { store, keys, packs, known: Mutex::default() }
    }

    /// The range's bytes and what opens them. Widens a range near the pack's start to bring the header along.
    async fn fetch(&self, range: &mut Range) -> Result<(Arc<Opener>, Bytes), ReadError> {
        let key = self.packs.get(&range.pack).ok_or(ReadError::UnknownPack(range.pack))?;
        let store = |source| ReadError::Store { what: "pack", source };
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&range.pack).cloned();
        if let Some(opener) = known {
            let bytes = self.store.get_range(key, range.start..range.end).await.map_err(store)?;
            return Ok((opener, bytes));
        }
        if range.start <= COALESCE_GAP {
            range.start = 0;
            let bytes = self.store.get_range(key, 0..range.end).await.map_err(store)?;
            return Ok((self.learn(range.pack, &bytes)?, bytes));
        }
        let header = self.store.get_range(key, 0..HEADER_LEN as u64).await.map_err(store)?;
        let opener = self.learn(range.pack, &header)?;
        let bytes = self.store.get_range(key, range.start..range.end).await.map_err(store)?;
        Ok((opener, bytes))
    }

    fn learn(&self, pack: PackId, header: &[u8]) -> Result<Arc<Opener>, ReadError> {
        let opened = opener(header, &self.keys);
        let opener = Arc::new(opened.map_err(|source| ReadError::Sealed { object: format!("pack {pack}"), source })?);
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(pack, opener.clone());
        Ok(opener)
    }
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
        Piece { file, place, goes: Goes::Whole(0) }
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
