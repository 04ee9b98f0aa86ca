//! From the data directory into packs: one thread walks, several read, check, hash, compress and seal.
//!
//! ```text
//! walk (this thread)     scan order = list order; meets each file's entry in the parent; hands out what has to be read
//!   │ work               bounded: a few stretches a thread
//! read (n threads)       pread, page checksums, chunk ids, packs of their own ──► uploader (repository)
//!   │ placed stretches   bounded by the files that may be under way
//! assemble (this thread) puts stretches back into files and files into list order
//! ```
//!
//! Memory is the packs under way plus a fixed number of files, whatever the size of the cluster.

mod assemble;
mod compose;
mod proof;
mod walk;

pub(in crate::backup) use compose::adopt_overlays;

use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use walfleet_repository::backup::read::BackupReader;
use walfleet_repository::backup::write::{PackSession, WriteError};
use walfleet_repository::format::file_map::ChunkPlace;

use crate::backup::damage::DamageLog;
use crate::backup::pages::{PagesJob, PagesResult};
use crate::backup::scan::{Scan, ScanError, ScannedFile};
use crate::backup::spare::Known;
use crate::backup::stretch::{self, PageCheck, ReadCounters, StretchError, StretchJob, StretchResult};
use crate::limits::Allowance;
use crate::progress::Progress;
use walk::Walk;

#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error(transparent)]
    Read(#[from] StretchError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("cancelled")]
    Cancelled,
    #[error("a reading thread ended before its work was done")]
    ThreadLost,
}

/// What copying needs to know.
pub struct CopySpec {
    pub threads: usize,
    pub pages: PageCheck,
    pub parent: Option<Arc<BackupReader>>,
    /// What changed since the parent; `None`: everything is read.
    pub known: Option<Known>,
    /// What of the host the reading threads may take.
    pub allowance: Allowance,
}

/// What was copied.
#[derive(Debug, Default)]
pub struct CopyReport {
    pub file_list: Vec<ChunkPlace>,
    pub file_count: u64,
    pub cluster_bytes: u64,
    pub read_bytes: u64,
    pub damage: DamageLog,
    /// Entries that no rule of PostgreSQL leaves out, and that were.
    pub omitted: u64,
    /// Some file has pages laid over its slots.
    pub has_overlays: bool,
    /// Slots read for proof that were other than the parent's though no WAL says so.
    pub unexplained_slots: u64,
}

/// Copies everything that the scan yields. Blocks; call it off the runtime's own threads, with `runtime` at hand for
/// the store. After an error or cancellation the session's packs are garbage.
pub fn copy(
    scan: Scan,
    session: &Arc<PackSession>,
    spec: &CopySpec,
    runtime: &Handle,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<CopyReport, CopyError> {
    let writers = session.writers(spec.threads);
    let threads = writers.len();
    // Two pieces of work a thread wait: the walk stays ahead without opening many files.
    let (work_sender, work) = mpsc::sync_channel::<Work>(2 * threads);
    let (done_sender, done) = mpsc::channel::<Done>();
    let work = Arc::new(Mutex::new(work));
    let counters = ReadCounters::new(threads);
    std::thread::scope(|scope| {
        for (number, writer) in writers.into_iter().enumerate() {
            let (work, done) = (work.clone(), done_sender.clone());
            let reader = stretch::Reader::new(session, writer, spec, progress, &counters, cancel);
            let name = format!("backup-read-{number}");
            let thread = move || read_all(&work, &done, reader);
            std::thread::Builder::new().name(name).spawn_scoped(scope, thread).map_err(|_| CopyError::ThreadLost)?;
        }
        drop((done_sender, work));
        let mut walk = Walk::new(session, spec, threads, runtime, progress, done);
        let walked = walk.run(scan, work_sender, cancel);
        // The first failure of a thread explains more than the walk's own "nobody listens".
        let result = match (walk.failure.take(), walked) {
            (Some(failure), _) => Err(failure),
            (None, walked) => walked,
        };
        result.and_then(|()| walk.assembly.finish(counters.read_bytes.load(Ordering::Relaxed)))
    })
}

/// One piece of work for a thread.
enum Work {
    Files(Vec<(u64, FileJob)>),
    Stretch { number: u64, job: StretchJob },
    Pages { number: u64, job: Arc<PagesJob> },
}

/// A small file: one slot at most.
struct FileJob {
    file: ScannedFile,
    parent: Option<ChunkPlace>,
    /// Whether it is noted what WAL replay will bring about.
    proves: bool,
}

enum Done {
    Stretch {
        number: u64,
        result: StretchResult,
    },
    /// Read whole.
    File {
        number: u64,
        result: StretchResult,
    },
    /// What changed of it.
    Pages {
        number: u64,
        result: PagesResult,
    },
    Vanished {
        number: u64,
    },
    Failed(CopyError),
    /// The thread flushed its pack and ended.
    Ended,
}

/// Reads until there is no more work, then finishes the thread's pack.
fn read_all(work: &Mutex<Receiver<Work>>, done: &mpsc::Sender<Done>, mut reader: stretch::Reader<'_>) {
    let mut run = || -> Result<(), CopyError> {
        loop {
            let next = work.lock().unwrap_or_else(PoisonError::into_inner).recv();
            match next {
                Ok(Work::Stretch { number, job }) => {
                    let result = reader.stretch(&job)?;
                    let _ = done.send(Done::Stretch { number, result });
                }
                Ok(Work::Pages { number, job }) => {
                    let result = reader.pages(&job)?;
                    let _ = done.send(Done::Pages { number, result });
                }
                Ok(Work::Files(files)) => {
                    for (number, job) in files {
                        let finished = match reader.small_file(&job.file, job.parent.as_ref(), job.proves)? {
                            Some(result) => Done::File { number, result },
                            None => Done::Vanished { number },
                        };
                        let _ = done.send(finished);
                    }
                }
                Err(_) => return reader.flush().map_err(CopyError::from),
            }
        }
    };
    let _ = done.send(match run() {
        Ok(()) => Done::Ended,
        Err(error) => Done::Failed(error),
    });
}
