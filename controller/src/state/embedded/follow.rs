//! Watches: each reads the log of changes behind the writer, at its own pace.

use std::sync::{Arc, Weak};
use std::time::Duration;

use redb::ReadableDatabase;
use tokio::sync::{mpsc, watch};

use super::{LOG, META, Shared, record};
use crate::state::{Event, StateError, Watch};

/// Events between the reader and its consumer: a page of the log may wait here, more is left in the file.
const CHANNEL: usize = 256;
/// Changes read from the log at a time.
const PAGE: usize = 512;

/// Between two looks at a file that is being opened anew.
const REOPENING: Duration = Duration::from_millis(100);

/// A page of the log, already filtered by prefix.
struct Changes {
    events: Vec<Event>,
    /// The revision to go on from.
    next: u64,
}

/// `from` 0: from the next change on. The task ends with the engine, or with its consumer.
pub(super) fn start(shared: &Arc<Shared>, prefix: String, from: u64) -> Watch {
    let (sender, events) = mpsc::channel(CHANNEL);
    let committed = shared.committed.subscribe();
    let from = if from == 0 { *committed.borrow() + 1 } else { from };
    // A weak handle: a forgotten watch keeps neither the file open nor its lock held.
    tokio::spawn(follow(Arc::downgrade(shared), committed, prefix, from, sender));
    Watch::new(events)
}

async fn follow(
    shared: Weak<Shared>,
    mut committed: watch::Receiver<u64>,
    prefix: String,
    mut from: u64,
    sender: mpsc::Sender<Result<Event, StateError>>,
) {
    let mut check = true;
    loop {
        let newest = *committed.borrow_and_update();
        // The first round also runs when there is nothing new: it finds out about compaction.
        while check || from <= newest {
            check = false;
            let Some(shared) = shared.upgrade() else { return };
            let page_prefix = prefix.clone();
            let page = tokio::task::spawn_blocking(move || read_changes(&shared, &page_prefix, from, newest)).await;
            match page {
                Ok(Ok(changes)) => {
                    from = changes.next;
                    for event in changes.events {
                        if sender.send(Ok(event)).await.is_err() {
                            return;
                        }
                    }
                }
                // After a failed write, until the writer has opened the file anew: nothing is lost, so it is waited for.
                Ok(Err(error)) if is_between_files(&error) => {
                    check = true;
                    tokio::select! {
                        // Both are safe to drop: neither takes anything.
                        () = tokio::time::sleep(REOPENING) => {}
                        () = sender.closed() => return,
                    }
                }
                Ok(Err(error)) => {
                    let _ = sender.send(Err(error)).await;
                    return;
                }
                Err(_shutting_down) => return,
            }
        }
        tokio::select! {
            // Both are safe to drop: neither takes anything.
            changed = committed.changed() => if changed.is_err() { return },
            () = sender.closed() => return,
        }
    }
}

/// Whether the file was read after a write to it had failed and before it was opened anew (`file`).
fn is_between_files(error: &StateError) -> bool {
    let StateError::Storage { source, .. } = error else { return false };
    matches!(source.downcast_ref::<redb::Error>(), Some(redb::Error::DatabaseClosed | redb::Error::PreviousIo))
}

/// Changes of revisions `from..=newest`, a page at a time, never splitting a revision.
fn read_changes(shared: &Shared, prefix: &str, from: u64, newest: u64) -> Result<Changes, StateError> {
    let mut events = Vec::new();
    let mut next = newest.max(from.saturating_sub(1)) + 1;
    let mut seen = 0;
    shared.read("follow", |database| {
        let read = database.begin_read()?;
        let compacted = read.open_table(META)?.get("compacted")?.map_or(0, |found| found.value());
        if from <= compacted {
            return Ok(Err(StateError::Compacted { requested: from, compacted }));
        }
        for entry in read.open_table(LOG)?.range((from, 0)..=(newest, u32::MAX))? {
            let (key, change) = entry?;
            let (revision, number) = key.value();
            if seen >= PAGE && number == 0 {
                next = revision;
                break;
            }
            seen += 1;
            match record::decode_change(revision, change.value()) {
                Ok(event) if event.key().starts_with(prefix) => events.push(event),
                Ok(_) => {}
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(()))
    })??;
    Ok(Changes { events, next })
}
