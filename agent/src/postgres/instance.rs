//! Finds PostgreSQL instances on this host and says of each what it is, whether a server runs in it, and with which
//! binaries. Reads files and /proc only; nothing here connects, starts or stops anything.

mod binaries;
mod postmaster;
mod process;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub use binaries::{BinariesError, find_bin_dir, running_version};
pub use postmaster::{PidFileError, Postmaster, PostmasterStatus};

pub(super) use process::user_name;

use super::server::local_connection_string;

/// A data directory and what goes on in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Instance {
    /// Without links, so that one directory has one name.
    pub data_dir: PathBuf,
    /// From PG_VERSION.
    pub major: u32,
    /// Name of the directory's owner, the role that peer authentication gives.
    pub owner: Option<String>,
    pub state: InstanceState,
}

/// Whether a server runs in a data directory. In a container of its own process ids it cannot be seen from outside.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum InstanceState {
    /// Nothing uses the directory; a pid file may have been left by a crash.
    Stopped,
    Running(Postmaster),
    /// The postmaster is gone, but processes that it started still use the data: it is as little to be touched as a
    /// running server's.
    Orphaned {
        pids: Vec<u32>,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("{operation} {}\nHINT: is this a PostgreSQL data directory, and may the agent's user read it?", path.display())]
    Read { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{} says \"{found}\"\nHINT: walfleet needs PostgreSQL 13 or later.", path.display())]
    Version { path: PathBuf, found: String },
    #[error("{}: {source}", path.display())]
    PidFile { path: PathBuf, source: PidFileError },
}

impl InstanceError {
    fn read(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstanceError {
        let path = path.to_owned();
        move |source| InstanceError::Read { operation, path, source }
    }
}

/// The configured data directories and those that running servers use, each once.
pub fn discover(configured: &[PathBuf]) -> Vec<(PathBuf, Result<Instance, InstanceError>)> {
    let mut directories: BTreeSet<PathBuf> =
        configured.iter().map(|path| path.canonicalize().unwrap_or_else(|_| path.clone())).collect();
    directories.extend(process::data_dirs());
    directories.into_iter().map(|path| (path.clone(), inspect(&path))).collect()
}

pub fn inspect(data_dir: &Path) -> Result<Instance, InstanceError> {
    let data_dir = data_dir.canonicalize().map_err(InstanceError::read("resolve", data_dir))?;
    let owner = std::fs::metadata(&data_dir).map_err(InstanceError::read("stat", &data_dir))?.uid();
    let path = data_dir.join("PG_VERSION");
    let text = std::fs::read_to_string(&path).map_err(InstanceError::read("read", &path))?;
    let found = text.trim();
    let major = found.parse().ok().filter(|major| (13..1000).contains(major));
    let major = major.ok_or_else(|| InstanceError::Version { path, found: found.chars().take(20).collect() })?;
    let state = state(&data_dir)?;
    Ok(Instance { data_dir, major, owner: process::user_name(owner), state })
}

/// As the postmaster judges the lock file of a predecessor (CreateLockFile, src/backend/utils/init/miscinit.c;
/// PGSharedMemoryIsInUse, src/backend/port/sysv_shmem.c), and by whoever works in the directory.
fn state(data_dir: &Path) -> Result<InstanceState, InstanceError> {
    let path = data_dir.join("postmaster.pid");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(without_postmaster(data_dir, None)),
        Err(source) => return Err(InstanceError::Read { operation: "read", path, source }),
    };
    match Postmaster::parse(&text) {
        Ok(postmaster) if process::is_server_of(postmaster.pid, data_dir) => Ok(InstanceState::Running(postmaster)),
        Ok(postmaster) => Ok(without_postmaster(data_dir, Some(&postmaster))),
        // Empty for a moment while a server starts; a process in the directory tells it from a crash's remains.
        Err(source) => match without_postmaster(data_dir, None) {
            InstanceState::Stopped if text.iter().all(u8::is_ascii_whitespace) => Ok(InstanceState::Stopped),
            _ => Err(InstanceError::PidFile { path, source }),
        },
    }
}

fn without_postmaster(data_dir: &Path, last: Option<&Postmaster>) -> InstanceState {
    let pids = process::servers_in(data_dir);
    let attached = last.and_then(|last| last.shared_memory).is_some_and(process::is_shared_memory_attached);
    if pids.is_empty() && !attached { InstanceState::Stopped } else { InstanceState::Orphaned { pids } }
}

impl Instance {
    pub fn is_stopped(&self) -> bool {
        self.state == InstanceState::Stopped
    }

    pub fn runs(&self) -> bool {
        matches!(self.state, InstanceState::Running(_))
    }

    /// To the running server by what its pid file says, as the directory's owner.
    pub fn connection_string(&self) -> Option<String> {
        let InstanceState::Running(postmaster) = &self.state else { return None };
        let user = self.owner.as_deref().unwrap_or("postgres");
        // Abstract sockets begin with '@' and cannot be named to the client library.
        let socket_dir = postmaster.socket_dir.as_ref().filter(|dir| dir.is_absolute());
        let host = socket_dir.cloned().or_else(|| postmaster.listen_address.as_deref().map(reachable))?;
        Some(local_connection_string(&host, postmaster.port, user))
    }
}

/// What listens everywhere is reached at home.
fn reachable(listen_address: &str) -> PathBuf {
    let everywhere = listen_address == "*" || listen_address.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified());
    PathBuf::from(if everywhere { "localhost" } else { listen_address })
}

#[cfg(test)]
mod tests;
