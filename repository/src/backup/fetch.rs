//! Brings a backup's chunks to whoever writes them down: few large ranges, several in flight, opened on many threads.
//!
//! ```text
//! plan (one task)      walks the file list, loads maps, gathers pieces by window, coalesces them by pack: [`plan`]
//!   │                  (what the sink has already is compared first, a window at a time on n threads: [`sift`])
//!   │ ranges           bounded: [`memory`]
//! fetch (n tasks)      one request each
//!   │ fetched ranges   bounded the same way
//! open (n threads)     decrypt, decompress, check: [`unpack`]
//!   │ plain content    bounded, in buffers that go round
//! write (m threads)    hand to the sink: [`writers`]
//! ```

pub mod chunks;
mod laid;
mod memory;
mod openers;
mod plan;
mod sift;
mod unpack;
mod writers;

use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::backup::fetch::laid::{Laid, LaidSlot};
use crate::backup::fetch::memory::{FETCHED_WAITING, FetchPlan};
use crate::backup::fetch::openers::Openers;
use crate::backup::fetch::plan::Plan;
use crate::backup::fetch::unpack::open_ranges;
use crate::backup::fetch::writers::{Out, Spare, write_queued, writers_for};
use crate::backup::read::{BackupReader, ReadError};
use crate::format::file_map::{ChunkPlace, Run};
use crate::format::manifest::FileEntry;
use crate::format::sealed::Opener;
use crate::ids::PackId;
use crate::keyring::Keyring;

/// Stored bytes of one request at most: large enough that latency does not matter, small enough that several in flight
/// fit into memory.
const RANGE_BYTES: u64 = 8 << 20;

/// A hole between two wanted frames that is cheaper to read than to ask twice.
const COALESCE_GAP: u64 = 256 << 10;

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
    /// Content is going to fill this stretch of a file that has nothing there, in pieces of any order.
    fn expect(&self, _file: &PieceFile, _offset: u64, _len: u64) {}
    /// Plain content at an offset of the file. It begins at a multiple of [`ALIGNMENT`] in memory if it begins at one in
    /// the file.
    fn write(&self, file: &PieceFile, offset: u64, content: &[u8]) -> std::io::Result<()>;
    /// The calling thread has opened content that another one is going to write.
    fn opened(&self) {}
    /// Fills `into` from an offset of a file found with content.
    fn read(&self, _file: &PieceFile, _offset: u64, _into: &mut [u8]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    /// So many bytes were right already.
    fn kept(&self, _bytes: u64) {}
}

/// Of content handed to [`PieceSink::write`]: what unbuffered writes ask for.
pub const ALIGNMENT: usize = 4096;

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
    /// Threads that open; at most so many as there is memory for.
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

impl Goes {
    /// Where in the file its first byte goes.
    fn offset(&self) -> u64 {
        match self {
            Goes::Whole(offset) => *offset,
            Goes::Laid(slot) => slot.offset,
            Goes::Parts(runs) | Goes::Held(_, runs) => runs.first().map_or(0, |run| run.to),
        }
    }
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

/// Writes that may wait for a thread.
const WRITES_WAITING: usize = 4;

/// What ends all tasks and threads of one restore: the first error, or that one of them is gone.
struct Failure {
    first: Mutex<Option<FetchError>>,
    stop: CancellationToken,
}

impl Failure {
    fn note(&self, error: FetchError) {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop.cancel();
    }

    /// On a thread. If it panics the others stop, which would wait for what it had.
    fn spawn(self: &Arc<Self>, work: impl FnOnce() -> Result<(), FetchError> + Send + 'static) -> JoinHandle<()> {
        let failure = self.clone();
        tokio::task::spawn_blocking(move || {
            let guard = failure.stop.clone().drop_guard();
            match work() {
                Ok(()) => drop(guard.disarm()),
                Err(error) => failure.note(error),
            }
        })
    }
}

/// Brings the content of every file of the backup to the sink. After cancellation or an error some content has reached
/// the sink and some has not.
pub async fn fetch_all(
    reader: Arc<BackupReader>,
    sink: Arc<dyn PieceSink>,
    options: FetchOptions,
    cancel: &CancellationToken,
) -> Result<FetchReport, FetchError> {
    let failure = Arc::new(Failure { first: Mutex::default(), stop: cancel.child_token() });
    let stop = &failure.stop;
    let FetchPlan { threads, range_bytes } = FetchPlan::new(options);
    // Two ranges wait for a request, two fetched ones for a thread: neither side idles, memory stays bounded.
    let (range_sender, ranges) = mpsc::channel::<Range>(2);
    let (fetched_sender, fetched) = mpsc::channel::<Fetched>(FETCHED_WAITING);
    let ranges = Arc::new(tokio::sync::Mutex::new(ranges));

    let openers = Arc::new(Openers::new(reader.store().clone(), reader.keys().clone(), reader.packs().clone()));
    let mut requests = JoinSet::new();
    for _ in 0..options.requests.max(1) {
        let (ranges, sender, openers) = (ranges.clone(), fetched_sender.clone(), openers.clone());
        let failure = failure.clone();
        let fetching = async move {
            let guard = failure.stop.clone().drop_guard();
            let done = tokio::select! {
                // Dropping a request half-way loses nothing: its bytes have gone nowhere yet.
                () = failure.stop.cancelled() => Ok(0),
                done = fetch_ranges(&ranges, &sender, &openers) => done,
            };
            guard.disarm();
            done.unwrap_or_else(|error| {
                failure.note(error.into());
                0
            })
        };
        requests.spawn(fetching.in_current_span());
    }
    drop((fetched_sender, ranges));
    let working = spawn_workers(&failure, fetched, &sink, threads, reader.keys());

    let mut plan = Plan::new(&reader, &sink, (threads, range_bytes), stop);
    let files = tokio::select! {
        // Dropping the plan loses nothing that was not already handed on.
        () = stop.cancelled() => Ok(0),
        files = plan.ranges(range_sender) => files,
    };
    let kept_bytes = plan.kept_bytes;
    let files = files.unwrap_or_else(|error| {
        failure.note(error);
        0
    });
    // A task that panicked took a range with it: nothing that was written may pass for whole.
    let mut fetched_bytes = 0;
    while let Some(done) = requests.join_next().await {
        fetched_bytes += done.unwrap_or_else(|_| {
            failure.note(FetchError::Lost);
            0
        });
    }
    for thread in working {
        if thread.await.is_err() {
            failure.note(FetchError::Lost);
        }
    }
    if let Some(error) = failure.first.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(error);
    }
    if cancel.is_cancelled() {
        return Err(FetchError::Cancelled);
    }
    Ok(FetchReport { files, fetched_bytes, kept_bytes })
}

/// The threads that open what is fetched, and those that write it.
fn spawn_workers(
    failure: &Arc<Failure>,
    fetched: mpsc::Receiver<Fetched>,
    sink: &Arc<dyn PieceSink>,
    threads: usize,
    keys: &Arc<Keyring>,
) -> Vec<JoinHandle<()>> {
    let fetched = Arc::new(Mutex::new(fetched));
    let (queue_sender, queue) = sync_channel(WRITES_WAITING);
    let (queue, spare) = (Arc::new(Mutex::new(queue)), Arc::new(Spare::default()));
    // Whoever waits for another hears of its end: each side of a channel is held by those who use it, and by nobody else.
    let opening = (0..threads).map(|_| {
        let (fetched, sink, keys) = (fetched.clone(), sink.clone(), keys.clone());
        let (queue, spare, stop) = (queue_sender.clone(), spare.clone(), failure.stop.clone());
        failure.spawn(move || open_ranges(&fetched, &mut Out::new(&*sink, queue, &spare), keys.newest(), &stop))
    });
    let writing = (0..writers_for(threads)).map(|_| {
        let (queue, sink, spare, stop) = (queue.clone(), sink.clone(), spare.clone(), failure.stop.clone());
        failure.spawn(move || write_queued(&queue, &*sink, &spare, &stop))
    });
    opening.chain(writing).collect()
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
