//! Proves what a store promises before anything relies on it: an atomic create, and reading what was written.
//!
//! One widely used store accepts `If-None-Match: *` and ignores it, without an error. Probes go around [`super::Store`]'s
//! own settling, straight to single requests. What they create stays under `probe/`: agents may not delete.

use bytes::Bytes;
use futures::future::join_all;
use jiff::Timestamp;
use object_store::{ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::Store;
use super::error::{Operation, StoreError, StoreErrorKind};
use crate::layout;

/// Enough to overlap on any store, and to make winning by chance out of the question.
const CREATES: u32 = 32;

/// What a probe saw.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProbeReport {
    /// Concurrent creates of one key.
    pub creates: u32,
    /// How many the store said had created it. An atomic store lets one win.
    pub winners: u32,
    /// Creates whose outcome the store left open (errors, lost replies).
    pub unclear: u32,
    /// What lies there is what the winner wrote, at once.
    pub reads_what_was_written: bool,
    /// A create after that was refused, and changed nothing.
    pub refuses_existing: bool,
}

impl ProbeReport {
    /// Whether the creation of an object can be the append to a log.
    pub fn is_atomic(&self) -> bool {
        self.winners == 1 && self.reads_what_was_written && self.refuses_existing
    }
}

/// The store's present time, as it stamps what is created now. For the keeper: it takes away what it created.
pub async fn clock(store: &Store) -> Result<Timestamp, StoreError> {
    let key = layout::probe(&format!("{:032x}", rand::random::<u128>()));
    store.put_new(&key, Bytes::from_static(b"walfleet looks at the clock\n")).await?;
    let listed = store.listed(&key).await?;
    // Who may not delete leaves it, as other probes are.
    if let Err(error) = store.delete(vec![key.clone()]).await {
        tracing::debug!("a look at the store's clock is left there: {error}");
    }
    let at = listed.and_then(|listed| Timestamp::from_microsecond(listed.last_modified_us).ok());
    at.ok_or_else(|| StoreError::new(Operation::Probe, &key, StoreErrorKind::NotFound))
}

/// Probes a store. An error means that nothing is known: the store could not be reached, or refused us.
pub async fn probe(store: &Store) -> Result<ProbeReport, StoreError> {
    let key = layout::probe(&format!("{:032x}", rand::random::<u128>()));
    let body = |writer: u32| format!("walfleet store probe {writer} of {key}\n");
    let options = || PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    let create = |writer: u32| {
        store.counters.put(0);
        let put = store.inner.put_opts(&key, PutPayload::from(body(writer)), options());
        tokio::time::timeout(store.retry.request_timeout, put)
    };
    let outcomes = join_all((0..CREATES).map(create)).await;

    let (mut winners, mut unclear, mut last_error) = (Vec::new(), 0, None);
    for (writer, outcome) in (0..CREATES).zip(outcomes) {
        match outcome {
            Ok(Ok(_)) => winners.push(writer),
            Ok(Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })) => {}
            Ok(Err(source)) => {
                unclear += 1;
                last_error = Some(StoreError::from_store(Operation::Probe, &key, source));
            }
            Err(_) => {
                unclear += 1;
                let after = store.retry.request_timeout;
                last_error = Some(StoreError::new(Operation::Probe, &key, StoreErrorKind::TimedOut { after }));
            }
        }
    }
    if winners.is_empty() {
        // All refused a key that nobody else can know: no statement about the store.
        let nobody = || StoreError::new(Operation::Probe, &key, StoreErrorKind::Unreachable);
        return Err(last_error.unwrap_or_else(nobody));
    }

    let read = |written: object_store::Result<bytes::Bytes>| {
        written.map_err(|source| StoreError::from_store(Operation::Probe, &key, source))
    };
    let get = async || {
        store.counters.get();
        store.inner.get(&key).await?.bytes().await
    };
    let first = match get().await {
        Err(object_store::Error::NotFound { .. }) => None,
        written => Some(read(written)?),
    };
    let reads_what_was_written =
        first.as_ref().is_some_and(|first| winners.iter().any(|w| first == body(*w).as_bytes()));
    let again = create(CREATES).await;
    let refused =
        matches!(again, Ok(Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })));
    let unchanged = read(get().await).is_ok_and(|second| Some(second) == first);
    let report = ProbeReport {
        creates: CREATES,
        winners: u32::try_from(winners.len()).unwrap_or(u32::MAX),
        unclear,
        reads_what_was_written,
        refuses_existing: refused && unchanged,
    };
    tracing::info!(%store, ?report, "store probed");
    Ok(report)
}
