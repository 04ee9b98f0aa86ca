//! Waiting for work that runs elsewhere.
//!
//! A panic there goes on here. Work that a runtime ended early says nothing: only a runtime that is being shut down does
//! that, and then nobody reads what comes after.

use std::future::Future;

use tokio::task::{JoinError, JoinHandle, spawn_blocking};

/// Waits for a task, on this runtime or another.
pub async fn settled<T>(task: JoinHandle<T>) -> T {
    outcome(task.await).await
}

/// What a task ended with.
pub async fn outcome<T>(ended: Result<T, JoinError>) -> T {
    match ended {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => std::future::pending().await,
        },
    }
}

/// Runs what waits for a disk: syncing a file can take seconds on a loaded database host.
pub fn on_disk<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = T> {
    settled(spawn_blocking(act))
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use super::*;

    #[test]
    fn work_that_a_runtime_leaves_undone_on_its_way_down_is_no_panic() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let handle = runtime.handle().clone();
        runtime.shutdown_background();
        let never_run = {
            let _entered = handle.enter();
            polled(on_disk(|| ()))
        };
        assert_eq!(never_run, Poll::Pending);
    }

    fn polled<T>(future: impl Future<Output = T>) -> Poll<T> {
        let mut future = std::pin::pin!(future);
        future.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
    }
}
