//! Files of the controller's folder: written once, durably, never over an existing one; secrets for their owner alone.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    #[error("{operation} {}", path.display())]
    File {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} may be read by others (mode {mode:03o})\nHINT: chmod 600 {}", path.display(), path.display())]
    Exposed { path: PathBuf, mode: u32 },
}

/// Reads a secret that nobody but its owner (and root) may read.
pub fn read(path: &Path) -> Result<String, SecretFileError> {
    let mode = fs::metadata(path).map_or(0, |metadata| metadata.permissions().mode() & 0o777);
    if mode & 0o077 != 0 {
        return Err(SecretFileError::Exposed { path: path.to_owned(), mode });
    }
    read_public(path)
}

pub fn read_public(path: &Path) -> Result<String, SecretFileError> {
    fs::read_to_string(path).map_err(|source| SecretFileError::File {
        operation: "read",
        path: path.to_owned(),
        source,
    })
}

/// For the owner alone.
pub fn create(path: &Path, content: &[u8]) -> Result<(), SecretFileError> {
    write(path, content, 0o600)
}

pub fn create_public(path: &Path, content: &[u8]) -> Result<(), SecretFileError> {
    write(path, content, 0o644)
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), SecretFileError> {
    let fail = |source| SecretFileError::File { operation: "write", path: path.to_owned(), source };
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(fail)?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(fail)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(fail)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
