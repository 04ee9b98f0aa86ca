//! Threads that do nothing but write, so that those who open content need not wait for a disk. Content of less than a slot is
//! written by who opened it, since it is copied into the page cache faster than it changes hands; parts of a chunk are, too.

use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use super::{ALIGNMENT, FetchError, PieceFile, PieceSink};
use crate::format::file_map::SLOT_BYTES;

/// Frames that follow each other go down together up to this.
pub(super) const WRITE_BYTES: usize = 1 << 20;

/// What goes to writers; what sinks write past the page cache is to be among it.
const HANDED_ON_BYTES: usize = SLOT_BYTES as usize;

/// Room of a buffer: a last slot may go beyond [`WRITE_BYTES`].
const BUFFER_BYTES: usize = ALIGNMENT + WRITE_BYTES + SLOT_BYTES as usize;

/// Where few threads open, a disk takes more writes at a time than that: measured, two wrote 2.0 to 2.7 GB/s to a local disk,
/// and four no less. One with latency needs as many as there are.
const FEW_WRITERS: usize = 4;

/// How many threads write what so many threads open.
pub(super) fn writers_for(threads: usize) -> usize {
    (2 * threads).min(FEW_WRITERS).max(threads)
}

/// Plain content that begins at a multiple of [`ALIGNMENT`], as long as it does not outgrow what was reserved.
pub(super) struct Plain {
    pub bytes: Vec<u8>,
    start: usize,
}

impl Plain {
    fn new() -> Plain {
        Plain { bytes: Vec::with_capacity(BUFFER_BYTES), start: 0 }
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.start = self.bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        self.bytes.resize(self.start, 0);
    }

    pub fn content(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }
}

/// Content on its way to a file.
pub(super) struct Writing {
    file: PieceFile,
    offset: u64,
    plain: Plain,
}

/// Buffers that were written and may be filled again. At most as many are about as there are threads and places in the queue.
#[derive(Default)]
pub(super) struct Spare(Mutex<Vec<Plain>>);

impl Spare {
    fn take(&self) -> Plain {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_else(Plain::new)
    }

    fn put(&self, plain: Plain) {
        // One that had to grow for a larger frame is given back.
        if plain.bytes.capacity() > BUFFER_BYTES {
            return;
        }
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(plain);
    }
}

/// How one thread that opens content gets it written.
pub(super) struct Out<'a> {
    pub sink: &'a dyn PieceSink,
    pub queue: SyncSender<Writing>,
    pub spare: &'a Spare,
    pub plain: Plain,
}

impl<'a> Out<'a> {
    pub fn new(sink: &'a dyn PieceSink, queue: SyncSender<Writing>, spare: &'a Spare) -> Out<'a> {
        Out { sink, queue, spare, plain: spare.take() }
    }

    /// Writes what lies in `plain`, or has it written; false if nobody writes any more.
    pub fn write(&mut self, file: &PieceFile, offset: u64) -> Result<bool, FetchError> {
        if self.plain.content().len() < HANDED_ON_BYTES {
            self.sink.write(file, offset, self.plain.content()).map_err(FetchError::Sink)?;
            return Ok(true);
        }
        self.sink.opened();
        let plain = std::mem::replace(&mut self.plain, Plain { bytes: Vec::new(), start: 0 });
        let is_taken = self.queue.send(Writing { file: file.clone(), offset, plain }).is_ok();
        self.plain = self.spare.take();
        Ok(is_taken)
    }
}

/// Writes on the calling thread until there is nothing more.
pub(super) fn write_queued(
    queue: &Mutex<Receiver<Writing>>,
    sink: &dyn PieceSink,
    spare: &Spare,
    stop: &CancellationToken,
) -> Result<(), FetchError> {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Writing { file, offset, plain }) = next else { return Ok(()) };
        if stop.is_cancelled() {
            return Ok(());
        }
        sink.write(&file, offset, plain.content()).map_err(FetchError::Sink)?;
        spare.put(plain);
    }
}
