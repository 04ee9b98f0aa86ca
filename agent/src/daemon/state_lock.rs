//! One agent per state folder: two would answer for each other's jobs.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("open {}: {source}", path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("another agent uses {}\nHINT: stop it, or give this one its own state_dir and socket.", folder.display())]
    Held { folder: PathBuf },
}

/// Held until dropped, or until the process ends in whatever way.
pub struct StateLock(#[expect(dead_code, reason = "the lock lives as long as the open file")] File);

pub fn take(state_dir: &Path) -> Result<StateLock, LockError> {
    let file = open(state_dir)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| LockError::Held { folder: state_dir.to_owned() })?;
    Ok(StateLock(file))
}

const FILE: &str = "agent.lock";

fn open(state_dir: &Path) -> Result<File, LockError> {
    let path = state_dir.join(FILE);
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| LockError::Open { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_kept_out_until_the_first_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let first = take(folder.path()).unwrap();
        assert!(matches!(take(folder.path()), Err(LockError::Held { .. })));
        drop(first);
        assert!(take(folder.path()).is_ok());
    }
}
