//! What Postgres starts: `wal push` and `wal fetch`. Both begin in milliseconds and end in a documented exit code.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::wal::fetch::{self, FetchOutcome};
use crate::wal::socket::{Reply, Request};

/// Longer than the agent itself waits, so that its answer is what ends the call.
const ANSWER_DEADLINE: Duration = Duration::from_secs(330);

/// For `wal push`: anything but 0 makes Postgres try again; below 126 it counts as a failed attempt in
/// pg_stat_archiver, above it would restart the archiver (pgarch.c).
const PUSH_FAILED: i32 = 1;

/// For `wal fetch`: 1 to 125 mean "end of WAL" and would end recovery silently; above 125 recovery stops
/// (RestoreArchivedFile, src/backend/access/transam/xlogarchive.c).
pub const FETCH_ABSENT: i32 = 1;
pub const FETCH_FAILED: i32 = 200;

pub struct PushArgs {
    pub socket: PathBuf,
    /// `%p`: relative to the data directory, which is the working directory then.
    pub path: PathBuf,
}

/// Returns 0 once the file is durable in the repository.
pub fn push(args: &PushArgs) -> i32 {
    let path = match absolute(&args.path) {
        Ok(path) => path,
        Err(error) => {
            eprintln!("walfleet-agent: {}: {error}", args.path.display());
            return PUSH_FAILED;
        }
    };
    match ask(&args.socket, &Request::Push { path }) {
        Ok(Reply::Done) => 0,
        Ok(Reply::Failed { message }) => {
            eprintln!("walfleet-agent: {message}");
            PUSH_FAILED
        }
        Err(error) => {
            eprintln!(
                "walfleet-agent: the agent does not answer at {}: {error}\nHINT: start it (systemctl start walfleet-agent); Postgres keeps the WAL and tries again.",
                args.socket.display()
            );
            PUSH_FAILED
        }
    }
}

/// Keeps links as they are: the data directory is where the working directory says it is.
fn absolute(path: &Path) -> std::io::Result<PathBuf> {
    if path.is_absolute() { Ok(path.to_owned()) } else { Ok(std::env::current_dir()?.join(path)) }
}

/// One question to the running agent.
pub fn ask(socket: &Path, request: &Request) -> std::io::Result<Reply> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let mut text = serde_json::to_string(request)?;
    text.push('\n');
    stream.write_all(text.as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    if line.is_empty() {
        return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "it closed the connection"));
    }
    serde_json::from_str(&line).map_err(std::io::Error::other)
}

pub struct FetchArgs {
    /// The restore's own description, written beside the WAL of the restored server.
    pub source: PathBuf,
    /// `%f`
    pub name: String,
    /// `%p`
    pub destination: PathBuf,
}

/// Returns 0 for a file delivered whole, [`FETCH_ABSENT`] for a proven absence, and a code above 125 for all else.
pub fn fetch(args: &FetchArgs) -> i32 {
    match fetch::fetch(&args.source, &args.name, &args.destination) {
        Ok(FetchOutcome::Delivered) => 0,
        Ok(FetchOutcome::Absent) => FETCH_ABSENT,
        Err(error) => {
            eprintln!("walfleet-agent: fetch {}: {error}", args.name);
            FETCH_FAILED
        }
    }
}
