//! The embedded engine against the conformance suite, and what only a file can do wrong.

use std::ops::Bound;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use redb::BackendError;

use super::Options;
use crate::state::{Op, State, StateError, Txn, conformance};

fn file(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("state.redb")
}

fn open(folder: &tempfile::TempDir) -> State {
    State::open(&file(folder), Options::default()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_engine_conforms() {
    let folder = tempfile::tempdir().unwrap();
    conformance::scenarios(open(&folder)).await;
}

#[test]
fn the_embedded_engine_agrees_with_a_map() {
    let folder = tempfile::tempdir().unwrap();
    let count = std::cell::Cell::new(0);
    conformance::model(|| {
        count.set(count.get() + 1);
        State::open(&folder.path().join(format!("{}.redb", count.get())), Options::default()).unwrap()
    });
}

/// The file as the kernel holds it is what the next process finds after a kill: nothing that was acknowledged may be
/// missing from it, and nothing else be in it, though nobody closed it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_there_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let state = open(&folder);
    let lease = state.grant(Duration::from_secs(600)).await.unwrap();
    for round in 0..20u64 {
        let txn = Txn::new().then(Op::put(format!("key/{round:02}"), vec![round as u8; 5000])).then(Op::put_leased(
            "leased",
            round.to_string(),
            lease,
        ));
        let revision = state.txn(txn).await.unwrap().revision;
        let image = folder.path().join(format!("image-{round}.redb"));
        std::fs::copy(file(&folder), &image).unwrap();

        let after = State::open(&image, Options::default()).unwrap();
        assert_eq!(after.revision().await.unwrap(), revision);
        assert_eq!(after.list("key/").await.unwrap().0.len() as u64, round + 1);
        after.keep_alive(lease).await.unwrap();
        let next = after.put("key/next", "").await.unwrap();
        assert_eq!(next, revision + 1, "revisions go on where they were");
    }
}

#[tokio::test]
async fn leases_of_a_dead_controller_still_end() {
    let folder = tempfile::tempdir().unwrap();
    let state = open(&folder);
    let lease = state.grant(Duration::from_millis(300)).await.unwrap();
    state.txn(Txn::new().then(Op::put_leased("leased", "", lease))).await.unwrap();
    drop(state);
    let state = open(&folder);
    assert!(state.get("leased").await.unwrap().is_some());
    let mut watch = state.watch("leased", 0).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(10), watch.next()).await.unwrap().is_some());
    assert!(state.get("leased").await.unwrap().is_none());
}

#[tokio::test]
async fn a_second_controller_on_the_same_file_is_refused_until_the_first_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let state = open(&folder);
    let watch = state.watch("", 1).await.unwrap();
    let second = State::open(&file(&folder), Options::default());
    assert!(matches!(second, Err(StateError::Locked { .. })));
    drop(state);
    // A forgotten watch keeps no lock; its task may need a moment to notice.
    let mut reopened = State::open(&file(&folder), Options::default());
    for _ in 0..100 {
        if reopened.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        reopened = State::open(&file(&folder), Options::default());
    }
    reopened.unwrap();
    drop(watch);
}

#[tokio::test]
async fn a_file_that_is_no_state_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let text = "not a database ".repeat(1000);
    std::fs::write(file(&folder), &text).unwrap();
    let error = State::open(&file(&folder), Options::default()).err().unwrap();
    assert!(matches!(error, StateError::Storage { operation: "open", .. }), "{error}");
    assert_eq!(std::fs::read_to_string(file(&folder)).unwrap(), text);
}

#[tokio::test]
async fn history_is_bounded_and_a_late_watch_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { history_revisions: 10, ..Options::default() };
    let state = State::open(&file(&folder), options).unwrap();
    for i in 0..50 {
        state.put("key", i.to_string()).await.unwrap();
    }
    let mut late = state.watch("", 2).await.unwrap();
    assert!(matches!(late.next().await, Some(Err(StateError::Compacted { .. }))));
    let newest = state.revision().await.unwrap();
    let mut recent = state.watch("", newest - 9).await.unwrap();
    assert!(recent.next().await.unwrap().is_ok());
}

/// A file on a disk that is full whenever the test says so.
#[derive(Debug)]
pub struct FullDisk {
    file: redb::backends::FileBackend,
    is_full: Arc<AtomicBool>,
}

impl FullDisk {
    pub fn new(file: std::fs::File, is_full: Arc<AtomicBool>) -> Result<Self, redb::DatabaseError> {
        Ok(Self { file: redb::backends::FileBackend::new(file)?, is_full })
    }

    fn check(&self) -> std::io::Result<()> {
        if self.is_full.load(Ordering::SeqCst) { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl redb::StorageBackend for FullDisk {
    fn len(&self) -> std::io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.check()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> std::io::Result<()> {
        self.check()?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.check()?;
        self.file.write(offset, data)
    }

    fn close(&self) -> std::io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_fails_writes_and_nothing_is_lost_once_it_has_room_again() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options::default();
    let full = options.disk_is_full.clone();
    let state = State::open(&file(&folder), options).unwrap();
    let lease = state.grant(Duration::from_millis(400)).await.unwrap();
    state.txn(Txn::new().then(Op::put_leased("leased", "", lease))).await.unwrap();
    let mut watch = state.watch("key/", 0).await.unwrap();
    state.put("key/before", "1").await.unwrap();

    full.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let failed = state.put("key/during", "1").await.unwrap_err();
        assert!(matches!(failed, StateError::Storage { .. }), "{failed}");
    }
    // The lease ends in the meantime, and that cannot be written either.
    tokio::time::sleep(Duration::from_millis(600)).await;
    full.store(false, Ordering::SeqCst);
    // The next write opens the file, if the last failure could not.
    let after = state.put("key/after", "1").await.unwrap();
    assert_eq!(state.get("key/before").await.unwrap().unwrap().value, "1");
    assert_eq!(state.revision().await.unwrap(), after);
    let mut keys = Vec::new();
    while keys.last().is_none_or(|key| key != "key/after") {
        let event = tokio::time::timeout(Duration::from_secs(10), watch.next()).await.unwrap().unwrap().unwrap();
        keys.push(event.key().to_owned());
    }
    assert!(keys.starts_with(&["key/before".to_owned()]), "{keys:?}");
    let mut waited = 0;
    while state.get("leased").await.unwrap().is_some() {
        waited += 1;
        assert!(waited < 100, "the lease ends after all");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(state);
    assert!(open(&folder).get("key/after").await.unwrap().is_some());
}
