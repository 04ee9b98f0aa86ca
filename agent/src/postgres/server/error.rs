//! What goes wrong with a server, told such that the reader knows what to do.

use std::fmt;

use tokio_postgres::error::{DbError, SqlState};

/// A server as people know it: where it listens and who asks. Holds no password.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target(pub String);

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error(
        "read the connection string\nHINT: it reads as \"host=/var/run/postgresql port=5432 user=walfleet dbname=postgres\"."
    )]
    ConnectionString { source: tokio_postgres::Error },
    #[error("connect to {target}\nHINT: is the server running, and is this where it listens?")]
    Unreachable { target: Target, source: tokio_postgres::Error },
    #[error(
        "connect to {target}: no answer within {seconds} s\nHINT: is the server overloaded or stopped, or a firewall between?"
    )]
    NoAnswer { target: Target, seconds: u64 },
    #[error("connect to {target}: {message}\nHINT: {hint}")]
    Rejected { target: Target, message: String, hint: &'static str },
    #[error(
        "connect to {target}: {message}\nHINT: the server answers again by itself; on a standby, hot_standby must be on."
    )]
    StartingUp { target: Target, message: String },
    #[error("{target} runs PostgreSQL {version}\nHINT: walfleet needs release 13 or later.")]
    TooOld { target: Target, version: String },
    #[error("{operation}: {message}\nHINT: as a superuser, run: {grant}")]
    MissingRight { operation: &'static str, message: String, grant: String },
    /// The server understood and declined; message and hint are its own.
    #[error("{operation}: {refusal}")]
    Refused { operation: &'static str, refusal: Refusal },
    #[error(
        "{operation}: the connection to {target} was lost\nHINT: the server's log says whether it stopped or the session was ended."
    )]
    Lost { operation: &'static str, target: Target, source: Option<tokio_postgres::Error> },
    #[error("{operation}: the server answered \"{found}\", expected {expected}")]
    Answer { operation: &'static str, found: String, expected: &'static str },
    #[error("{operation}")]
    Query { operation: &'static str, source: tokio_postgres::Error },
}

impl ServerError {
    /// Whether the same call may succeed later without anybody's doing.
    pub fn is_transient(&self) -> bool {
        match self {
            ServerError::Unreachable { .. }
            | ServerError::NoAnswer { .. }
            | ServerError::StartingUp { .. }
            | ServerError::Lost { .. } => true,
            ServerError::ConnectionString { .. }
            | ServerError::Rejected { .. }
            | ServerError::TooOld { .. }
            | ServerError::MissingRight { .. }
            | ServerError::Refused { .. }
            | ServerError::Answer { .. }
            | ServerError::Query { .. } => false,
        }
    }

    pub(super) fn connecting(target: Target, source: tokio_postgres::Error) -> ServerError {
        let Some(refusal) = source.as_db_error() else {
            let text = source.to_string();
            // The client library's own complaints: no password given, a method it does not know; TLS, which it lacks.
            let hint = match () {
                () if text.starts_with("authentication error") || text.starts_with("invalid configuration") => PASSWORD,
                () if text.starts_with("error performing TLS") => NO_TLS,
                () => return ServerError::Unreachable { target, source },
            };
            return ServerError::Rejected { target, message: whole(&source), hint };
        };
        let message = refusal.message().to_owned();
        let hint = match refusal.code() {
            code if *code == SqlState::CANNOT_CONNECT_NOW => return ServerError::StartingUp { target, message },
            code if *code == SqlState::INVALID_PASSWORD => PASSWORD,
            code if *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
                "the role must exist and have LOGIN, and pg_hba.conf must admit it."
            }
            code if *code == SqlState::INVALID_CATALOG_NAME => "name an existing database: dbname=postgres.",
            code if *code == SqlState::TOO_MANY_CONNECTIONS => {
                "raise max_connections, or give the role a reserved connection."
            }
            code if *code == SqlState::INSUFFICIENT_PRIVILEGE => "the role needs CONNECT on the database.",
            _ => "the server's log may say more.",
        };
        ServerError::Rejected { target, message, hint }
    }

    pub(super) fn of_query(operation: &'static str, target: &Target, source: tokio_postgres::Error) -> ServerError {
        let is_closed = source.is_closed();
        match source.as_db_error() {
            Some(error) if *error.code() == SqlState::ADMIN_SHUTDOWN || *error.code() == SqlState::CRASH_SHUTDOWN => {
                ServerError::Lost { operation, target: target.clone(), source: Some(source) }
            }
            Some(error) => ServerError::Refused { operation, refusal: Refusal::from(error) },
            None if is_closed || is_io(&source) => {
                ServerError::Lost { operation, target: target.clone(), source: Some(source) }
            }
            None => ServerError::Query { operation, source },
        }
    }

    /// Says which GRANT is missing, where that is what the server complained of.
    pub(super) fn or_missing_right(self, grant: impl FnOnce() -> String) -> ServerError {
        match self {
            ServerError::Refused { operation, refusal } if refusal.is_privilege() => {
                ServerError::MissingRight { operation, message: refusal.message, grant: grant() }
            }
            other => other,
        }
    }
}

const PASSWORD: &str = "check user and password of the connection string, or pg_hba.conf.";

const NO_TLS: &str = "connect by the Unix socket, or with sslmode=disable: the agent speaks to its own host only.";

fn is_io(error: &tokio_postgres::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<std::io::Error>())
}

/// An error with its causes on one line.
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// An ERROR of the server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// SQLSTATE.
    pub code: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl Refusal {
    fn is_privilege(&self) -> bool {
        self.code == SqlState::INSUFFICIENT_PRIVILEGE.code()
    }
}

impl From<&DbError> for Refusal {
    fn from(error: &DbError) -> Refusal {
        Refusal {
            code: error.code().code().to_owned(),
            message: error.message().to_owned(),
            detail: error.detail().map(str::to_owned),
            hint: error.hint().map(str::to_owned),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        match &self.hint {
            Some(hint) => write!(f, "\nHINT: {hint}"),
            None => Ok(()),
        }
    }
}
