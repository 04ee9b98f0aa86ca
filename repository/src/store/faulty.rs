//! A store that misbehaves on demand, for the tests of this and other crates.
//!
//! Wraps any [`ObjectStore`] below [`super::Store`], so that retries and the settling of lost replies are what is tested.
//! Faults apply by operation and by a part of the key, a number of times or with a probability; a seed replays the choice.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// An answer like 503; nothing happened.
    Reject,
    /// Access is refused; nothing happened.
    Deny,
    /// S3's 409 to a create that met another: "already exists", and nothing was written by this one.
    Conflict,
    /// It happened, but the answer is a broken connection.
    LoseReply,
    /// No answer, for ever; nothing happened.
    Hang,
    /// The answer takes this long.
    Slow(Duration),
    /// The body ends in the middle, after its whole length was announced.
    Truncate,
    /// One bit of the body is wrong.
    Flip,
}

/// Which requests a fault applies to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum On {
    Put,
    /// Reads, ranges and heads.
    Get,
    List,
    Delete,
    Any,
}

#[derive(Debug)]
struct Rule {
    fault: Fault,
    on: On,
    key_part: String,
    /// So many pass first.
    spares: u64,
    times_left: u64,
    probability: f64,
}

/// The misbehaving store.
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    faults: Arc<Faults>,
}

/// What is to go wrong, and how often something has.
struct Faults {
    rules: Mutex<(Vec<Rule>, StdRng)>,
    injected: AtomicU64,
}

impl FaultyStore {
    /// Behaves until told otherwise.
    pub fn new(inner: Arc<dyn ObjectStore>, seed: u64) -> Arc<FaultyStore> {
        let rules = Mutex::new((Vec::new(), StdRng::seed_from_u64(seed)));
        Arc::new(FaultyStore { inner, faults: Arc::new(Faults { rules, injected: AtomicU64::new(0) }) })
    }

    /// An empty store in memory that behaves until told otherwise.
    pub fn in_memory(seed: u64) -> Arc<FaultyStore> {
        FaultyStore::new(Arc::new(object_store::memory::InMemory::new()), seed)
    }

    /// The next `times` matching requests fail so. Earlier rules go first; the first that matches applies.
    pub fn inject(&self, fault: Fault, on: On, key_part: &str, times: u64) {
        self.add(Rule { fault, on, key_part: key_part.to_owned(), spares: 0, times_left: times, probability: 1.0 });
    }

    /// All requests fail so, once so many have passed, until [`FaultyStore::heal`]: as for a process that is killed there.
    pub fn inject_after(&self, spares: u64, fault: Fault) {
        let (on, key_part) = (On::Any, String::new());
        self.add(Rule { fault, on, key_part, spares, times_left: u64::MAX, probability: 1.0 });
    }

    /// Matching requests fail so with this probability, until [`FaultyStore::heal`].
    pub fn inject_randomly(&self, fault: Fault, on: On, key_part: &str, probability: f64) {
        self.add(Rule { fault, on, key_part: key_part.to_owned(), spares: 0, times_left: u64::MAX, probability });
    }

    /// Behaves again.
    pub fn heal(&self) {
        self.faults.rules().0.clear();
    }

    /// How many requests were failed.
    pub fn injected(&self) -> u64 {
        self.faults.injected.load(Ordering::Relaxed)
    }

    fn add(&self, rule: Rule) {
        self.faults.rules().0.push(rule);
    }

    fn fault(&self, on: On, key: &Path) -> Option<Fault> {
        self.faults.next(on, key)
    }

    /// Faults that come before the request; the rest is for the caller.
    async fn before(&self, on: On, key: &Path) -> Result<Option<Fault>> {
        let fault = self.fault(on, key);
        let path = key.to_string();
        match fault {
            Some(Fault::Reject) => Err(broken("injected: 503")),
            Some(Fault::Deny) => Err(Error::PermissionDenied { path, source: "injected: 403".into() }),
            Some(Fault::Conflict) => Err(Error::AlreadyExists { path, source: "injected: 409".into() }),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Slow(time)) => {
                tokio::time::sleep(time).await;
                Ok(None)
            }
            Some(Fault::LoseReply | Fault::Truncate | Fault::Flip) | None => Ok(fault),
        }
    }
}

impl Faults {
    fn rules(&self) -> MutexGuard<'_, (Vec<Rule>, StdRng)> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to go wrong with a request.
    fn next(&self, on: On, key: &Path) -> Option<Fault> {
        let mut guard = self.rules();
        let (rules, random) = &mut *guard;
        let matching = |rule: &&mut Rule| {
            rule.times_left > 0 && (rule.on == on || rule.on == On::Any) && key.as_ref().contains(&rule.key_part)
        };
        let rule = rules.iter_mut().find(matching)?;
        if rule.spares > 0 {
            rule.spares -= 1;
            return None;
        }
        if rule.probability < 1.0 && !random.random_bool(rule.probability) {
            return None;
        }
        rule.times_left -= 1;
        self.injected.fetch_add(1, Ordering::Relaxed);
        Some(rule.fault)
    }
}

fn broken(what: &'static str) -> Error {
    let source = Box::new(std::io::Error::new(std::io::ErrorKind::TimedOut, what));
    Error::Generic { store: "faulty", source }
}

/// The same result with a damaged body; size and range stay as announced.
async fn damaged(result: GetResult, fault: Fault) -> Result<GetResult> {
    let (meta, range, attributes) = (result.meta.clone(), result.range.clone(), result.attributes.clone());
    let extensions = result.extensions.clone();
    let mut body = result.bytes().await?.to_vec();
    let middle = body.len() / 2;
    match fault {
        Fault::Truncate => body.truncate(middle),
        _ => {
            if let Some(byte) = body.get_mut(middle) {
                *byte ^= 1;
            }
        }
    }
    let payload = GetResultPayload::Stream(futures::stream::once(async { Ok(Bytes::from(body)) }).boxed());
    Ok(GetResult { payload, meta, range, attributes, extensions })
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyStore({})", self.inner)
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let fault = self.before(On::Put, location).await?;
        let result = self.inner.put_opts(location, payload, opts).await?;
        match fault {
            Some(Fault::LoseReply) => Err(broken("injected: connection reset")),
            _ => Ok(result),
        }
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.before(On::Put, location).await?;
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let fault = self.before(On::Get, location).await?;
        let result = self.inner.get_opts(location, options).await?;
        match fault {
            Some(Fault::LoseReply) => Err(broken("injected: connection reset")),
            Some(fault @ (Fault::Truncate | Fault::Flip)) => damaged(result, fault).await,
            _ => Ok(result),
        }
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.before(On::Get, location).await?;
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let faults = Arc::clone(&self.faults);
        let judged = locations.map(move |location| {
            let location = location?;
            let path = location.to_string();
            match faults.next(On::Delete, &location) {
                Some(Fault::Deny) => Err(Error::PermissionDenied { path, source: "injected: 403".into() }),
                Some(Fault::Reject) => Err(broken("injected: 503")),
                _ => Ok(location),
            }
        });
        self.inner.delete_stream(judged.boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.fault(On::List, prefix.unwrap_or(&Path::ROOT)) {
            None | Some(Fault::Slow(_)) => self.inner.list(prefix),
            Some(Fault::Hang) => futures::stream::pending().boxed(),
            Some(_) => {
                // What was listed before the connection broke is not the whole listing.
                let half = self.inner.list(prefix).take(1);
                half.chain(futures::stream::once(async { Err(broken("injected: listing cut")) })).boxed()
            }
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.before(On::List, prefix.unwrap_or(&Path::ROOT)).await?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.before(On::Put, to).await?;
        self.inner.copy_opts(from, to, options).await
    }
}
