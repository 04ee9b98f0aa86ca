//! Threads for bulk work, at a priority below everything else on the host.
//!
//! On Linux a priority is a thread's own (setpriority(2), "C library/kernel differences"), and threads inherit it from the
//! one that makes them. So jobs run on a runtime of their own, with all they spawn; what must not be slow, WAL and servers
//! that are started, goes back to the runtime that made it.

use std::future::Future;
use std::sync::Arc;

use tokio::runtime::{Builder, Handle, Runtime};
use tracing::Instrument;

use super::HostLimits;
use crate::tasks::settled;

/// Of nice(2). The I/O priority follows from it, as long as nothing sets one: best-effort, the lowest level
/// (ioprio_set(2), "io_nice = (cpu_nice + 20) / 5"). The least that does so: at 19, a backup of 2 CPU-seconds took 80 s
/// beside compilers that had nice 10.
pub const NICE: i32 = 15;

/// A runtime whose threads, and theirs, have a low priority. Dropping it waits for nothing.
pub struct BulkThreads {
    runtime: Option<Runtime>,
    normal: Handle,
}

impl BulkThreads {
    /// To be made on the runtime that everything else runs on.
    pub fn new(limits: &Arc<HostLimits>) -> std::io::Result<BulkThreads> {
        let (parking, stopping) = (Arc::clone(limits), Arc::clone(limits));
        let runtime = Builder::new_multi_thread()
            .enable_all()
            .thread_name("bulk")
            .on_thread_start(lower_priority)
            // What they do between two waits, TLS above all, counts as work.
            .on_thread_park(move || parking.note_work())
            .on_thread_stop(move || stopping.note_work())
            .build()?;
        Ok(BulkThreads { runtime: Some(runtime), normal: Handle::current() })
    }

    /// Runs it there. Dropping the future leaves it running.
    pub async fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        let runtime = self.runtime.as_ref().map_or(&self.normal, Runtime::handle);
        settled(runtime.spawn(work.in_current_span())).await
    }

    /// What is no bulk work, and the threads it makes: at the host's priority again.
    pub fn normal(&self) -> &Handle {
        &self.normal
    }
}

impl Drop for BulkThreads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Of the calling thread.
fn lower_priority() {
    // Refused only where the thread's priority is lower already.
    let _ = rustix::process::setpriority_process(None, NICE);
}
