//! What can go wrong between us and the store, and what follows from it.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use object_store::path::Path;

/// What was being done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    Open,
    Get,
    GetRange,
    Head,
    Create,
    /// Reading back after a create whose outcome was not certain.
    Settle,
    List,
    Probe,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Open => "open store",
            Operation::Get => "read",
            Operation::GetRange => "read part of",
            Operation::Head => "look up",
            Operation::Create => "create",
            Operation::Settle => "read back",
            Operation::List => "list",
            Operation::Probe => "probe",
        })
    }
}

/// Why it did not work.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreErrorKind {
    #[error("no such object")]
    NotFound,
    #[error("another object lies there")]
    AlreadyExists,
    #[error("bytes {start} to {end} of an object of {size}")]
    OutOfRange { start: u64, end: u64, size: u64 },
    #[error(
        "access refused\nHINT: check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), what they may do with this bucket or folder, and this host's clock."
    )]
    Unauthorized,
    #[error("the store is out of space\nHINT: make room in the file system of the repository.")]
    NoSpace,
    #[error("the store does not answer properly\nHINT: check that the endpoint is reachable from this host.")]
    Unreachable,
    #[error("no answer within {after:?}\nHINT: check that the endpoint is reachable from this host, and its load.")]
    TimedOut { after: Duration },
    #[error("{received} bytes came where {expected} were announced")]
    Torn { expected: u64, received: u64 },
    #[error("{0}")]
    Unusable(String),
    #[error("the store refused")]
    Other,
}

/// An operation that failed for good: attempts are over when one sees it.
#[derive(Debug, thiserror::Error)]
#[error("{operation} \"{key}\"{tries}: {kind}")]
pub struct StoreError {
    operation: Operation,
    key: String,
    kind: StoreErrorKind,
    tries: Tries,
    source: Option<Box<dyn Error + Send + Sync>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tries {
    made: u32,
    took: Duration,
}

impl fmt::Display for Tries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.made > 1 { write!(f, " ({} attempts in {:.1?})", self.made, self.took) } else { Ok(()) }
    }
}

impl StoreError {
    pub fn new(operation: Operation, key: impl fmt::Display, kind: StoreErrorKind) -> Self {
        StoreError { operation, key: key.to_string(), kind, tries: Tries::default(), source: None }
    }

    pub fn operation(&self) -> Operation {
        self.operation
    }

    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn kind(&self) -> &StoreErrorKind {
        &self.kind
    }

    pub fn is_not_found(&self) -> bool {
        self.kind == StoreErrorKind::NotFound
    }

    /// Whether the same request may succeed later without anyone changing anything.
    pub fn is_retryable(&self) -> bool {
        match self.kind {
            StoreErrorKind::Unreachable | StoreErrorKind::TimedOut { .. } | StoreErrorKind::Torn { .. } => true,
            StoreErrorKind::NotFound
            | StoreErrorKind::AlreadyExists
            | StoreErrorKind::OutOfRange { .. }
            | StoreErrorKind::Unauthorized
            | StoreErrorKind::NoSpace
            | StoreErrorKind::Unusable(_)
            | StoreErrorKind::Other => false,
        }
    }

    pub(super) fn with_source(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    pub(super) fn after(mut self, made: u32, took: Duration) -> Self {
        self.tries = Tries { made, took };
        self
    }

    /// A conflict under which nothing lies is S3's 409: concurrent creates met, and none is said to have won.
    pub(super) fn into_passing_conflict(mut self) -> Self {
        if self.kind == StoreErrorKind::AlreadyExists {
            self.kind = StoreErrorKind::Unreachable;
        }
        self
    }

    pub(super) fn from_io(operation: Operation, key: &Path, source: std::io::Error) -> Self {
        StoreError::new(operation, key, kind_of_io(&source)).with_source(source)
    }

    pub(super) fn from_store(operation: Operation, key: &Path, source: object_store::Error) -> Self {
        StoreError::new(operation, key, classify(&source)).with_source(source)
    }
}

fn classify(error: &object_store::Error) -> StoreErrorKind {
    use object_store::Error as E;
    match error {
        E::NotFound { .. } => StoreErrorKind::NotFound,
        E::AlreadyExists { .. } | E::Precondition { .. } => StoreErrorKind::AlreadyExists,
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => StoreErrorKind::Unauthorized,
        E::Generic { .. } => classify_generic(error),
        _ => StoreErrorKind::Other,
    }
}

/// A file system's errors carry an `io::Error`. Of HTTP errors the status is only in the text (object_store 0.14 keeps
/// `RetryError` to itself): the client's own faults are final, all else may pass.
fn classify_generic(error: &object_store::Error) -> StoreErrorKind {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if current.is::<object_store::client::HttpError>() {
            return StoreErrorKind::Unreachable;
        }
        if let Some(io) = current.downcast_ref::<std::io::Error>() {
            return kind_of_io(io);
        }
        cause = current.source();
    }
    match http_status(&error.to_string()) {
        Some(408 | 425 | 429) => StoreErrorKind::Unreachable,
        Some(status) if (400..500).contains(&status) => StoreErrorKind::Other,
        Some(_) => StoreErrorKind::Unreachable,
        None if matches!(error, object_store::Error::Generic { store: "S3", .. }) => StoreErrorKind::Unreachable,
        None => StoreErrorKind::Other,
    }
}

fn http_status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

fn kind_of_io(error: &std::io::Error) -> StoreErrorKind {
    use std::io::ErrorKind as K;
    match error.kind() {
        K::NotFound => StoreErrorKind::NotFound,
        K::PermissionDenied | K::ReadOnlyFilesystem => StoreErrorKind::Unauthorized,
        K::StorageFull | K::QuotaExceeded => StoreErrorKind::NoSpace,
        K::TimedOut | K::Interrupted | K::StaleNetworkFileHandle => StoreErrorKind::Unreachable,
        _ => StoreErrorKind::Other,
    }
}
