//! The object store as the rest of the crate sees it: a few operations on keys, with retries, deadlines and counters.
//!
//! Owns what a reply means: every ambiguous outcome of a create is settled here by reading back. Never overwrites and
//! never deletes; whoever may delete (the keeper) gets a module of its own.

mod address;
mod attempt;
mod counters;
mod error;
pub mod faulty;
mod folder;
mod pace;
pub mod probe;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};

pub use address::{Folder, StoreOptions};
pub use attempt::RetryPolicy;
pub use counters::{Counters, CountersSnapshot};
pub use error::{Operation, StoreError, StoreErrorKind};
pub use pace::{Pace, Stopped};

use attempt::Attempts;

/// No object has more: a WAL segment has 1 GiB at most, and its notes some more.
pub const LARGEST_OBJECT: u64 = 5 << 28;

/// What became of a create.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "who did not create the object must look at what lies there"]
pub enum Creation {
    /// The object lies there with exactly these bytes, durably.
    Created,
    /// The object lies there with other bytes: someone else was first.
    AlreadyThere,
}

/// One object of a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    pub key: Path,
    pub size: u64,
    /// The store's clock, microseconds since the Unix epoch. Decides nothing.
    pub last_modified_us: i64,
}

/// Requests that delete at once.
const DELETES: usize = 16;

/// The objects and the folders directly below a prefix.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct ListedLevel {
    pub folders: Vec<Path>,
    pub objects: Vec<Listed>,
}

/// A repository's place, opened. Cloning is cheap; clones share counters.
///
/// Dropping a pending future of a `create` leaves its outcome unknown: the object may or may not appear.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    /// As people name it; without secrets.
    url: Arc<str>,
    /// Set for a store in a folder: a settled create must be made durable there before it may be believed.
    folder: Option<Arc<std::path::Path>>,
    retry: RetryPolicy,
    counters: Arc<Counters>,
    pace: Option<Arc<dyn Pace>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("url", &self.url).finish_non_exhaustive()
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl Store {
    /// Opens `file:///path` or `s3://bucket/prefix`. Nothing is read yet.
    pub fn open(url: &str, options: &StoreOptions) -> Result<Store, StoreError> {
        let backend = address::open(url, options)?;
        let folder = backend.folder.map(Arc::from);
        let (url, retry) = (Arc::from(url), options.retry);
        Ok(Store { inner: backend.store, url, folder, retry, counters: Arc::default(), pace: None })
    }

    /// Wraps a store that the caller made, a faulty one for instance. `url` is only its name.
    pub fn wrap(inner: Arc<dyn ObjectStore>, url: &str, retry: RetryPolicy) -> Store {
        Store { inner, url: Arc::from(url), folder: None, retry, counters: Arc::default(), pace: None }
    }

    /// An empty store that lasts as long as its handle.
    pub fn in_memory() -> Store {
        Store::wrap(Arc::new(object_store::memory::InMemory::new()), "memory:///", RetryPolicy::default())
    }

    /// The same store for bulk work: what it fetches, and the packs it sends, wait for `pace`. Small objects are created
    /// without.
    #[must_use]
    pub fn paced(&self, pace: Arc<dyn Pace>) -> Store {
        Store { pace: Some(pace), ..self.clone() }
    }

    /// The same store for small objects that somebody waits for: [`RetryPolicy::hurried`].
    #[must_use]
    pub fn hurried(&self, tries: u32) -> Store {
        Store { retry: self.retry.hurried(tries), ..self.clone() }
    }

    pub(crate) fn pace(&self) -> Option<&Arc<dyn Pace>> {
        self.pace.as_ref()
    }

    /// As people name it; without secrets.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Requests and bytes since the store was opened.
    pub fn counters(&self) -> CountersSnapshot {
        self.counters.snapshot()
    }

    /// The whole object, of at most [`LARGEST_OBJECT`] bytes.
    pub async fn get(&self, key: &Path) -> Result<Bytes, StoreError> {
        self.get_at_most(key, LARGEST_OBJECT).await
    }

    /// The whole object, if it has at most so many bytes: who writes the bucket must not fill the memory of who reads it.
    #[tracing::instrument(name = "store.get", skip_all, fields(otel.kind = "client", key = %key))]
    pub async fn get_at_most(&self, key: &Path, most: u64) -> Result<Bytes, StoreError> {
        let (bytes, _) = self.fetch(Operation::Get, key, None, most).await?;
        Ok(bytes)
    }

    /// Exactly the bytes `[start, end)`; an object that ends before `end` is an error.
    #[tracing::instrument(name = "store.get_range", skip_all, fields(otel.kind = "client", key = %key, start = range.start, end = range.end))]
    pub async fn get_range(&self, key: &Path, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let (bytes, size) =
            self.fetch(Operation::GetRange, key, Some(GetRange::Bounded(range.clone())), LARGEST_OBJECT).await?;
        if bytes.len() as u64 == range.end - range.start {
            Ok(bytes)
        } else {
            let kind = StoreErrorKind::OutOfRange { start: range.start, end: range.end, size };
            Err(StoreError::new(Operation::GetRange, key, kind))
        }
    }

    /// The last `count` bytes, or all of a smaller object, and the object's whole size.
    #[tracing::instrument(name = "store.get_suffix", skip_all, fields(otel.kind = "client", key = %key))]
    pub async fn get_suffix(&self, key: &Path, count: u64) -> Result<(Bytes, u64), StoreError> {
        self.fetch(Operation::GetRange, key, Some(GetRange::Suffix(count)), LARGEST_OBJECT).await
    }

    /// The object's size.
    pub async fn head(&self, key: &Path) -> Result<u64, StoreError> {
        Ok(self.meta(key).await?.size)
    }

    /// As a listing would show it; `None` if it is not there.
    pub async fn listed(&self, key: &Path) -> Result<Option<Listed>, StoreError> {
        match self.meta(key).await {
            Ok(meta) => Ok(Some(Listed::from(meta))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn meta(&self, key: &Path) -> Result<ObjectMeta, StoreError> {
        let mut attempts = Attempts::new(Operation::Head, key, &self.retry);
        loop {
            self.counters.head();
            match attempts.limit(0, self.inner.head(key)).await {
                Ok(meta) => return Ok(meta),
                Err(error) => self.again(&mut attempts, error).await?,
            }
        }
    }

    /// Whether the object lies there. Liveness is never concluded from this.
    pub async fn exists(&self, key: &Path) -> Result<bool, StoreError> {
        Ok(self.listed(key).await?.is_some())
    }

    /// Creates the object unless one lies there, atomically, and says which.
    ///
    /// A lost reply, and the conflict that S3 may answer though nothing was written (409, which object_store maps to
    /// `AlreadyExists`), are settled by reading back: the same bytes mean created, other bytes mean that someone else
    /// was first, and absence means to try again. So bytes that two writers could both have must carry a nonce.
    /// After a retryable error the outcome is unknown: the object may appear later.
    #[tracing::instrument(name = "store.create", skip_all, fields(otel.kind = "client", key = %key, bytes = bytes.len()))]
    pub async fn create(&self, key: &Path, bytes: Bytes) -> Result<Creation, StoreError> {
        let mut attempts = Attempts::new(Operation::Create, key, &self.retry);
        loop {
            // An attempt whose reply was lost may still arrive: then the next one meets it and reads it back.
            let error = match self.try_create(&mut attempts, key, &bytes).await {
                Ok(()) => return Ok(Creation::Created),
                Err(error) if *error.kind() == StoreErrorKind::AlreadyExists => {
                    if let Some(creation) = self.settle(key, &bytes).await? {
                        return Ok(creation);
                    }
                    error.into_passing_conflict()
                }
                Err(error) => error,
            };
            if let Err(last) = self.again(&mut attempts, error).await {
                // Time is up, but one look may still tell what became of it.
                let seen = self.try_settle(&mut attempts, key, &bytes).await;
                let ours = last.is_retryable() && seen.is_ok_and(|creation| creation == Creation::Created);
                return if ours { self.make_durable(key).await.map(|()| Creation::Created) } else { Err(last) };
            }
        }
    }

    /// Stores an object whose name is unique or the hash of its content. Finding the same bytes there is success.
    pub async fn put_new(&self, key: &Path, bytes: Bytes) -> Result<(), StoreError> {
        match self.create(key, bytes).await? {
            Creation::Created => Ok(()),
            Creation::AlreadyThere => Err(StoreError::new(Operation::Create, key, StoreErrorKind::AlreadyExists)),
        }
    }

    /// Every object below `prefix`, in no promised order. A listing is for finding things, never for concluding that
    /// something is gone.
    #[tracing::instrument(name = "store.list", skip_all, fields(otel.kind = "client", prefix = %prefix))]
    pub async fn list(&self, prefix: &Path) -> Result<Vec<Listed>, StoreError> {
        let mut attempts = Attempts::new(Operation::List, prefix, &self.retry);
        loop {
            self.counters.list();
            let listing = self.inner.list(Some(prefix)).map_ok(Listed::from).try_collect::<Vec<_>>();
            match attempts.limit_listing(listing).await {
                Ok(listed) => return Ok(listed),
                Err(error) => self.again(&mut attempts, error).await?,
            }
        }
    }

    /// Those of them whose keys sort behind `after`.
    pub async fn list_after(&self, prefix: &Path, after: &Path) -> Result<Vec<Listed>, StoreError> {
        let mut attempts = Attempts::new(Operation::List, prefix, &self.retry);
        loop {
            self.counters.list();
            let listing = self.inner.list_with_offset(Some(prefix), after).map_ok(Listed::from).try_collect::<Vec<_>>();
            match attempts.limit_listing(listing).await {
                Ok(listed) => return Ok(listed),
                Err(error) => self.again(&mut attempts, error).await?,
            }
        }
    }

    /// Deletes objects; one that is gone already is no error. The keeper alone may: agents have no right to.
    #[tracing::instrument(name = "store.delete", skip_all, fields(otel.kind = "client", count = keys.len()))]
    pub async fn delete(&self, keys: Vec<Path>) -> Result<(), StoreError> {
        let deletes = futures::stream::iter(keys.into_iter().map(|key| self.delete_one(key)));
        deletes.buffer_unordered(DELETES).try_collect().await
    }

    async fn delete_one(&self, key: Path) -> Result<(), StoreError> {
        let mut attempts = Attempts::new(Operation::Delete, &key, &self.retry);
        loop {
            match attempts.limit(0, self.inner.delete(&key)).await {
                Err(error) if !error.is_not_found() => self.again(&mut attempts, error).await?,
                Ok(()) | Err(_) => return Ok(()),
            }
        }
    }

    /// The folders and objects directly below `prefix`.
    #[tracing::instrument(name = "store.list_level", skip_all, fields(otel.kind = "client", prefix = %prefix))]
    pub async fn list_level(&self, prefix: &Path) -> Result<ListedLevel, StoreError> {
        let mut attempts = Attempts::new(Operation::List, prefix, &self.retry);
        loop {
            self.counters.list();
            match attempts.limit_listing(self.inner.list_with_delimiter(Some(prefix))).await {
                Ok(level) => {
                    let objects = level.objects.into_iter().map(Listed::from).collect();
                    return Ok(ListedLevel { folders: level.common_prefixes, objects });
                }
                Err(error) => self.again(&mut attempts, error).await?,
            }
        }
    }

    /// Bytes of the range and the size of the whole object.
    async fn fetch(
        &self,
        operation: Operation,
        key: &Path,
        range: Option<GetRange>,
        most: u64,
    ) -> Result<(Bytes, u64), StoreError> {
        let known = match &range {
            Some(GetRange::Bounded(range)) => Some(range.end - range.start),
            Some(GetRange::Suffix(count)) => Some(*count),
            Some(GetRange::Offset(_)) | None => None,
        };
        // Before the attempts, whose time is limited.
        self.wait_to_fetch(known).await;
        let mut attempts = Attempts::new(operation, key, &self.retry);
        loop {
            match self.try_fetch(&mut attempts, key, range.clone(), most).await {
                Ok(fetched) => {
                    self.wait_to_fetch(known.is_none().then_some(fetched.0.len() as u64)).await;
                    return Ok(fetched);
                }
                Err(error) => self.again(&mut attempts, error).await?,
            }
        }
    }

    async fn wait_to_fetch(&self, bytes: Option<u64>) {
        if let (Some(pace), Some(bytes)) = (&self.pace, bytes) {
            pace.download(bytes).await;
        }
    }

    async fn try_fetch(
        &self,
        attempts: &mut Attempts<'_>,
        key: &Path,
        range: Option<GetRange>,
        most: u64,
    ) -> Result<(Bytes, u64), StoreError> {
        self.counters.get();
        let is_of_end = matches!(range, Some(GetRange::Suffix(_)));
        let options = GetOptions { range, ..GetOptions::default() };
        match attempts.limit(0, self.inner.get_opts(key, options)).await {
            Ok(result) if result.range.end - result.range.start > most => {
                Err(attempts.error(StoreErrorKind::TooLarge { size: result.meta.size, most }))
            }
            Ok(result) => self.read_body(attempts, result).await,
            // No range of an empty object can be had, and stores say so in words of their own.
            Err(error) if is_of_end && !error.is_not_found() => match attempts.limit(0, self.inner.head(key)).await {
                Ok(meta) if meta.size == 0 => Ok((Bytes::new(), 0)),
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    async fn read_body(&self, attempts: &Attempts<'_>, result: GetResult) -> Result<(Bytes, u64), StoreError> {
        let (size, expected) = (result.meta.size, result.range.end.saturating_sub(result.range.start));
        let bytes = attempts.limit(expected, result.bytes()).await?;
        self.counters.read(bytes.len());
        if bytes.len() as u64 != expected {
            // A reply cut short that the HTTP client did not notice.
            let kind = StoreErrorKind::Torn { expected, received: bytes.len() as u64 };
            return Err(attempts.error(kind));
        }
        Ok((bytes, size))
    }

    async fn try_create(&self, attempts: &mut Attempts<'_>, key: &Path, bytes: &Bytes) -> Result<(), StoreError> {
        self.counters.put(bytes.len());
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let put = self.inner.put_opts(key, PutPayload::from(bytes.clone()), options);
        attempts.limit(bytes.len() as u64, put).await.map(|_| ())
    }

    /// What lies under a key after a create whose outcome is not certain; `None`: nothing.
    async fn settle(&self, key: &Path, bytes: &Bytes) -> Result<Option<Creation>, StoreError> {
        let mut attempts = Attempts::new(Operation::Settle, key, &self.retry);
        loop {
            match self.try_settle(&mut attempts, key, bytes).await {
                Ok(creation) => {
                    self.make_durable(key).await?;
                    return Ok(Some(creation));
                }
                Err(error) if error.is_not_found() => return Ok(None),
                Err(error) => self.again(&mut attempts, error).await?,
            }
        }
    }

    async fn try_settle(&self, attempts: &mut Attempts<'_>, key: &Path, bytes: &Bytes) -> Result<Creation, StoreError> {
        self.counters.get();
        let result = attempts.limit(0, self.inner.get_opts(key, GetOptions::default())).await?;
        if result.meta.size != bytes.len() as u64 {
            return Ok(Creation::AlreadyThere);
        }
        let (stored, _) = self.read_body(attempts, result).await?;
        Ok(if stored == *bytes { Creation::Created } else { Creation::AlreadyThere })
    }

    /// In a folder, an object that is visible may not be durable yet: its writer can have died, or failed, between
    /// linking the name and syncing the directory. Whoever believes in it syncs it first.
    pub async fn make_durable(&self, key: &Path) -> Result<(), StoreError> {
        let Some(folder) = self.folder.clone() else { return Ok(()) };
        let path = key.parts().fold(folder.to_path_buf(), |path, part| path.join(part.as_ref()));
        let synced = tokio::task::spawn_blocking(move || {
            std::fs::File::open(&path)?.sync_all()?;
            let parents = path.ancestors().skip(1).take_while(|parent| parent.starts_with(&folder));
            parents.into_iter().try_for_each(|parent| std::fs::File::open(parent)?.sync_all())
        });
        let outcome = synced.await.unwrap_or_else(|join| Err(std::io::Error::other(join)));
        outcome.map_err(|source| StoreError::from_io(Operation::Settle, key, source))
    }

    /// Waits before the next attempt, or gives the error back if there is to be none.
    async fn again(&self, attempts: &mut Attempts<'_>, error: StoreError) -> Result<(), StoreError> {
        attempts.wait(error).await?;
        self.counters.retry();
        Ok(())
    }
}

impl From<object_store::ObjectMeta> for Listed {
    fn from(meta: object_store::ObjectMeta) -> Listed {
        Listed { key: meta.location, size: meta.size, last_modified_us: meta.last_modified.timestamp_micros() }
    }
}

#[cfg(test)]
mod tests;
