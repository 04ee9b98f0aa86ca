//! Long-lived tasks: each named, each restarted alone, all waited for at the end.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Before a failed task is started again: doubles from the first to the last, and begins anew once it held for a while.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LAST_WAIT: Duration = Duration::from_secs(60);
const HELD: Duration = Duration::from_secs(300);

#[derive(Default)]
pub struct Tasks {
    running: Mutex<BTreeMap<&'static str, JoinHandle<()>>>,
}

impl Tasks {
    pub fn new() -> Tasks {
        Tasks::default()
    }

    /// Starts a task and keeps it up until `stop`. `start` is called anew after each failure, panic or unexpected end.
    pub fn spawn<F, Fut>(&self, name: &'static str, stop: &CancellationToken, start: F)
    where
        F: Fn(CancellationToken) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), String>> + Send + 'static,
    {
        let handle = tokio::spawn(keep_up(name, stop.clone(), start));
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(name, handle);
    }

    /// Waits for the named tasks (none named: all that are left), then names and drops those that did not end.
    pub async fn wait(&self, names: &[&'static str], deadline: Duration) {
        let waited: Vec<(&'static str, JoinHandle<()>)> = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            let wanted: Vec<_> =
                running.keys().copied().filter(|name| names.is_empty() || names.contains(name)).collect();
            wanted.into_iter().filter_map(|name| Some((name, running.remove(name)?))).collect()
        };
        let end = tokio::time::Instant::now() + deadline;
        for (name, mut handle) in waited {
            if tokio::time::timeout_at(end, &mut handle).await.is_err() {
                tracing::warn!(task = name, "did not end in time");
                handle.abort();
            }
        }
    }
}

async fn keep_up<F, Fut>(name: &'static str, stop: CancellationToken, start: F)
where
    F: Fn(CancellationToken) -> Fut + Send + 'static,
    Fut: Future<Output = Result<(), String>> + Send + 'static,
{
    let mut wait = FIRST_WAIT;
    loop {
        let begun = Instant::now();
        let ended = tokio::spawn(start(stop.clone())).await;
        if stop.is_cancelled() {
            if let Ok(Err(error)) = ended {
                tracing::warn!(task = name, error, "ended with an error");
            }
            return;
        }
        if begun.elapsed() >= HELD {
            wait = FIRST_WAIT;
        }
        let seconds = wait.as_secs();
        match ended {
            Ok(Ok(())) => tracing::warn!(task = name, seconds, "ended by itself and is started again"),
            Ok(Err(error)) => tracing::error!(task = name, error, seconds, "failed and is started again"),
            Err(panic) => tracing::error!(task = name, %panic, seconds, "met a bug and is started again"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(LAST_WAIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn a_task_is_started_again_after_errors_and_panics_until_it_is_stopped() {
        let (tasks, stop) = (Tasks::new(), CancellationToken::new());
        let starts = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&starts);
        tasks.spawn("example", &stop, move |stop| {
            let number = counted.fetch_add(1, Ordering::SeqCst);
            async move {
                match number {
                    0 => Err("scripted".to_owned()),
                    1 => panic!("scripted"),
                    _ => {
                        stop.cancelled().await;
                        Ok(())
                    }
                }
            }
        });
        // Waits of one and two seconds lie between the three.
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if starts.load(Ordering::SeqCst) == 3 {
                break;
            }
        }
        stop.cancel();
        tasks.wait(&["example"], Duration::from_secs(1)).await;
        assert_eq!(starts.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn a_task_that_does_not_end_is_given_up() {
        let (tasks, stop) = (Tasks::new(), CancellationToken::new());
        tasks.spawn("deaf", &stop, |_| std::future::pending());
        tokio::task::yield_now().await;
        stop.cancel();
        tasks.wait(&[], Duration::from_millis(50)).await;
    }
}
