//! The agent's Unix socket, where `wal push` asks: one line of JSON in, one line out.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::wal::ship::Shipper;

/// A request is a path and a verb; anything longer is not one.
const REQUEST_LIMIT: u64 = 16 << 10;

/// A client that connects says what it wants at once.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

/// How long `wal push` may wait for durability before it is told to come again; Postgres retries by itself, and a
/// waiting archiver cannot be shut down cleanly (pgarch.c waits for the command).
const PUSH_DEADLINE: Duration = Duration::from_secs(300);

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Absolute path of a file in some instance's `pg_wal`.
    Push { path: PathBuf },
    /// Whether an agent answers here.
    Ping {},
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    Done,
    Failed { message: String },
}

/// Finds who ships the WAL of a data directory.
#[async_trait]
pub trait Shippers: Send + Sync + 'static {
    /// The error is for the person who reads Postgres's log.
    async fn shipper(&self, data_dir: &Path) -> Result<Arc<Shipper>, String>;
}

/// Serves the socket until cancelled. An answer that is being waited for then is still given, up to a deadline.
pub async fn serve(path: &Path, shippers: Arc<dyn Shippers>, cancel: CancellationToken) -> std::io::Result<()> {
    let listener = bind(path).await?;
    let clients = TaskTracker::new();
    loop {
        let stream = tokio::select! {
            // Dropping accept() loses no connection: it stays in the backlog, and the client sees it closed.
            () = cancel.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match stream {
            Ok((stream, _)) => {
                let shippers = shippers.clone();
                clients.spawn(async move {
                    if let Err(error) = converse(stream, &*shippers).await {
                        tracing::debug!(%error, "a client of the socket went away");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the socket does not accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    let _ = std::fs::remove_file(path);
    clients.close();
    let _ = tokio::time::timeout(Duration::from_secs(10), clients.wait()).await;
    Ok(())
}

/// Binds, taking the place of a dead agent's socket but never of a living one's.
async fn bind(path: &Path) -> std::io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(std::io::Error::new(error.kind(), "another agent is serving it"));
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

async fn converse(stream: UnixStream, shippers: &dyn Shippers) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(read.take(REQUEST_LIMIT));
    let read = tokio::time::timeout(REQUEST_DEADLINE, reader.read_line(&mut line)).await;
    let reply = match read {
        Ok(Ok(_)) => match serde_json::from_str(&line) {
            Ok(request) => answer(request, shippers).await,
            Err(error) => failed(format!("the request does not read: {error}")),
        },
        Ok(Err(error)) => return Err(error),
        Err(_) => failed("no request came".to_owned()),
    };
    let mut text = serde_json::to_string(&reply).unwrap_or_default();
    text.push('\n');
    write.write_all(text.as_bytes()).await
}

fn failed(message: String) -> Reply {
    Reply::Failed { message }
}

async fn answer(request: Request, shippers: &dyn Shippers) -> Reply {
    match request {
        Request::Ping {} => Reply::Done,
        Request::Push { path } => match tokio::time::timeout(PUSH_DEADLINE, push(&path, shippers)).await {
            Ok(Ok(())) => Reply::Done,
            Ok(Err(message)) => {
                tracing::warn!(path = %path.display(), "not archived: {message}");
                failed(message)
            }
            Err(_) => failed(format!("the repository did not confirm within {} seconds", PUSH_DEADLINE.as_secs())),
        },
    }
}

async fn push(path: &Path, shippers: &dyn Shippers) -> Result<(), String> {
    let name = path.file_name().and_then(|name| name.to_str()).ok_or("the path names no file")?;
    let pg_wal = path.parent().ok_or("the path names no folder")?;
    // pg_wal may be a link to another disk; the data directory is where Postgres's working directory is.
    let data_dir = pg_wal.parent().ok_or("the file does not lie in a data directory's pg_wal")?;
    if pg_wal.file_name().is_none_or(|folder| folder != "pg_wal") {
        return Err(format!("{} does not lie in a data directory's pg_wal", path.display()));
    }
    let shipper = shippers.shipper(data_dir).await?;
    shipper.ship(name).await.map_err(|error| error.to_string())
}
