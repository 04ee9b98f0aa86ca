//! The harness of the whole-system tests and of the demo: real PostgreSQL 13 to 18, the real binaries, a real S3 server.
//!
//! A test takes a [`scratch::Scratch`], and everything it starts lives and dies with it: folders, servers, processes.
//! PostgreSQL refuses to run as root, so everything that touches a data directory runs as [`os_user::os_user`].
//! Nothing here is async for its user: tests wait for processes, and plain threads say that best. What must be async
//! (SQL sessions, the S3 server) runs on one [`runtime`] of the process.
//!
//! Whether a restore is true is judged three ways: [`postgres::barrier`] says exactly what the source held at a time,
//! position, transaction and restore point while the load runs on; `pg_verifybackup` and `pg_amcheck`
//! ([`postgres::judge`]) say whether files and indexes are sound; [`log_watch`] fails a test on any complaint of our
//! programs that it did not announce.

pub mod binaries;
pub mod demo;
pub mod fleet;
pub mod log_watch;
pub mod network;
pub mod os_user;
pub mod output;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod s3;
pub mod scratch;
pub mod tree;

use std::future::Future;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The runtime behind everything async in the harness. Never call [`block_on`] from within it.
pub fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("harness")
            .enable_all()
            .build()
            .expect("a runtime needs only threads")
    })
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    runtime().block_on(future)
}

/// Polls until `probe` answers, or fails naming what was awaited.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = probe()? {
            return Ok(found);
        }
        anyhow::ensure!(started.elapsed() < limit, "waited {limit:?} in vain for {what}");
        std::thread::sleep(Duration::from_millis(25));
    }
}
