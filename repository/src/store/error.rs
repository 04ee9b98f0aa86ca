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
    Delete,
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
            Operation::Delete => "delete",
            Operation::Probe => "probe",
        })
    }
}

/// Why it did not work.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreErrorKind {
    NotFound,
    /// Another object lies there.
    AlreadyExists,
    OutOfRange {
        start: u64,
        end: u64,
        size: u64,
    },
    Unauthorized,
    NoSpace,
    Unreachable,
    TimedOut {
        after: Duration,
    },
    /// A body shorter than announced.
    Torn {
        expected: u64,
        received: u64,
    },
    /// More than an object of its kind may have; nothing of it was read.
    TooLarge {
        size: u64,
        most: u64,
    },
    /// A URL or setting that cannot work, in words.
    Unusable(String),
    Other,
}

impl StoreErrorKind {
    fn hint(&self) -> Option<&'static str> {
        match self {
            StoreErrorKind::Unauthorized => Some(
                "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), what they may do with this bucket or \
                 folder, and this host's clock.",
            ),
            StoreErrorKind::NoSpace => Some("make room in the file system of the repository."),
            StoreErrorKind::Unreachable | StoreErrorKind::TimedOut { .. } => {
                Some("check that the store's endpoint is up and reachable from this host.")
            }
            StoreErrorKind::NotFound
            | StoreErrorKind::AlreadyExists
            | StoreErrorKind::OutOfRange { .. }
            | StoreErrorKind::Torn { .. }
            | StoreErrorKind::TooLarge { .. }
            | StoreErrorKind::Unusable(_)
            | StoreErrorKind::Other => None,
        }
    }
}

impl fmt::Display for StoreErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreErrorKind::NotFound => f.write_str("no such object"),
            StoreErrorKind::AlreadyExists => f.write_str("another object lies there"),
            StoreErrorKind::OutOfRange { start, end, size } => {
                write!(f, "bytes {start} to {end} of an object of {size}")
            }
            StoreErrorKind::Unauthorized => f.write_str("access refused"),
            StoreErrorKind::NoSpace => f.write_str("the store is out of space"),
            StoreErrorKind::Unreachable => f.write_str("the store does not answer properly"),
            StoreErrorKind::TimedOut { after } => write!(f, "no answer within {after:?}"),
            StoreErrorKind::TooLarge { size, most } => {
                write!(f, "it has {size} bytes, and nothing of its kind more than {most}")
            }
            StoreErrorKind::Torn { expected, received } => {
                write!(f, "{received} bytes came where {expected} were announced")
            }
            StoreErrorKind::Unusable(why) => f.write_str(why),
            StoreErrorKind::Other => f.write_str("the store refused"),
        }
    }
}

/// An operation that failed for good: attempts are over when one sees it.
#[derive(Clone, Debug)]
pub struct StoreError(Box<Failed>);

#[derive(Clone, Debug)]
struct Failed {
    operation: Operation,
    key: String,
    kind: StoreErrorKind,
    tries: Tries,
    /// What the store or the system said.
    cause: Option<String>,
}

impl Error for StoreError {}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.0.kind.to_string();
        // Words about a URL or setting bring their own hint.
        let (what, own_hint) =
            kind.split_once("\nHINT: ").map_or((kind.as_str(), None), |(what, hint)| (what, Some(hint)));
        write!(f, "{} \"{}\"{}: {what}", self.0.operation, self.0.key, self.0.tries)?;
        if let Some(cause) = &self.0.cause {
            write!(f, ": {cause}")?;
        }
        let own_hint = own_hint.or_else(|| self.lacks_credentials().then_some(NO_CREDENTIALS));
        own_hint.or(self.0.kind.hint()).map_or(Ok(()), |hint| write!(f, "\nHINT: {hint}"))
    }
}

/// Where object_store looks for credentials when nobody gave any: the metadata service of cloud machines.
const METADATA_SERVICE: &str = "169.254.169.254";

const NO_CREDENTIALS: &str = "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.";

/// Of a cause's text: a store may answer with a page of XML.
const LONGEST_CAUSE: usize = 400;

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
        StoreError(Box::new(Failed { operation, key: key.to_string(), kind, tries: Tries::default(), cause: None }))
    }

    pub fn operation(&self) -> Operation {
        self.0.operation
    }

    pub fn key(&self) -> &str {
        &self.0.key
    }

    pub fn kind(&self) -> &StoreErrorKind {
        &self.0.kind
    }

    pub fn is_not_found(&self) -> bool {
        self.0.kind == StoreErrorKind::NotFound
    }

    /// Whether the same request may succeed later without anyone changing anything.
    pub fn is_retryable(&self) -> bool {
        match self.0.kind {
            StoreErrorKind::Unreachable | StoreErrorKind::TimedOut { .. } | StoreErrorKind::Torn { .. } => true,
            StoreErrorKind::NotFound
            | StoreErrorKind::AlreadyExists
            | StoreErrorKind::OutOfRange { .. }
            | StoreErrorKind::Unauthorized
            | StoreErrorKind::NoSpace
            | StoreErrorKind::TooLarge { .. }
            | StoreErrorKind::Unusable(_)
            | StoreErrorKind::Other => false,
        }
    }

    fn lacks_credentials(&self) -> bool {
        self.0.cause.as_ref().is_some_and(|cause| cause.contains(METADATA_SERVICE))
    }

    pub(super) fn with_cause(mut self, cause: &(dyn Error + 'static)) -> Self {
        // object_store repeats its sources in its own text, but not the innermost ones, such as a refused connection.
        let mut innermost = cause;
        while let Some(inner) = innermost.source() {
            innermost = inner;
        }
        let innermost = innermost.to_string();
        let mut text = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if let Some((end, _)) = text.char_indices().nth(LONGEST_CAUSE) {
            text.truncate(end);
            text.push('…');
        }
        if innermost.len() < 100 && !text.contains(&innermost) {
            text = format!("{text}: {innermost}");
        }
        self.0.cause = Some(text);
        self
    }

    pub(super) fn after(mut self, made: u32, took: Duration) -> Self {
        self.0.tries = Tries { made, took };
        self
    }

    /// A conflict under which nothing lies is S3's 409: concurrent creates met, and none is said to have won.
    pub(super) fn into_passing_conflict(mut self) -> Self {
        if self.0.kind == StoreErrorKind::AlreadyExists {
            self.0.kind = StoreErrorKind::Unreachable;
        }
        self
    }

    pub(super) fn from_io(operation: Operation, key: &Path, source: std::io::Error) -> Self {
        StoreError::new(operation, key, kind_of_io(&source)).with_cause(&source)
    }

    pub(super) fn from_store(operation: Operation, key: &Path, source: object_store::Error) -> Self {
        let error = StoreError::new(operation, key, classify(&source));
        // Of what is not there, the kind says it all.
        let plain = matches!(error.0.kind, StoreErrorKind::NotFound | StoreErrorKind::AlreadyExists);
        if plain { error } else { error.with_cause(&source) }
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
