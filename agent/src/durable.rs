//! Small local files that must survive a crash whole or not at all: identity, desired state, the job journal.
//!
//! One line of magic, kind, version and checksum, then JSON that a person can read. Written to a temporary name,
//! synced, renamed over the old one, and the folder synced (the order of neon's `control_file.rs`); never edited in
//! place. Readers refuse what is damaged or newer than they know.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use walfleet_repository::checksum;

/// First word of every durable file.
const MAGIC: &str = "walfleet-agent";

/// More than any of these files can need (a desired state with thousands of clusters is a few MiB); a bound, so that a
/// stray file cannot take the agent's memory.
const MAX_BYTES: u64 = 64 << 20;

/// What a file holds, and the newest version of it that this agent understands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileKind {
    pub name: &'static str,
    pub version: u32,
}

/// Why a durable file could not be written or believed.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    #[error("{operation} {}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("read {}: {what}\nHINT: restore it from a backup of the host, or move it away to begin anew.", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error(
        "read {}: written as version {found}, this agent knows up to {known}\nHINT: install the newer agent that wrote it.",
        path.display()
    )]
    Newer { path: PathBuf, found: u32, known: u32 },
    #[error("encode {}: {source}", path.display())]
    Encode { path: PathBuf, source: serde_json::Error },
}

fn io_error<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> DurableError + 'a {
    move |source| DurableError::Io { operation, path: path.to_owned(), source }
}

/// Replaces the file; when this returns, the new content survives a power cut. Mode 0600.
pub fn write<T: Serialize>(path: &Path, kind: FileKind, value: &T) -> Result<(), DurableError> {
    let body =
        serde_json::to_vec_pretty(value).map_err(|source| DurableError::Encode { path: path.to_owned(), source })?;
    let mut bytes = format!("{MAGIC} {} {} {:08x}\n", kind.name, kind.version, checksum(kind, &body)).into_bytes();
    bytes.extend_from_slice(&body);
    bytes.push(b'\n');

    let folder = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // One writer per file (the state folder is locked), so one temporary name will do; a crash leaves at most this.
    let temporary = folder.join(format!(".{name}.tmp"));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(io_error("create", &temporary))?;
    file.write_all(&bytes).map_err(io_error("write", &temporary))?;
    file.sync_all().map_err(io_error("sync", &temporary))?;
    drop(file);
    rename(&temporary, path)
}

/// Moves a synced file to its final name, durably.
pub fn rename(from: &Path, to: &Path) -> Result<(), DurableError> {
    fs::rename(from, to).map_err(io_error("rename", to))?;
    sync_folder(to.parent().unwrap_or(Path::new(".")))
}

/// `None` if there is no such file.
pub fn read<T: DeserializeOwned>(path: &Path, kind: FileKind) -> Result<Option<T>, DurableError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    let damaged = |what: String| DurableError::Damaged { path: path.to_owned(), what };

    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(|| damaged("it has no header".into()))?;
    let (header, body) = bytes.split_at(end);
    let body = body.strip_prefix(b"\n").unwrap_or(body);
    let body = body.strip_suffix(b"\n").unwrap_or(body);
    let header = String::from_utf8_lossy(header);
    let fields: Vec<&str> = header.split(' ').collect();
    let [magic, name, version, checksum] = fields.as_slice() else {
        return Err(damaged("its header does not read as one".into()));
    };
    if *magic != MAGIC || *name != kind.name {
        return Err(damaged(format!("it begins with \"{magic} {name}\", not \"{MAGIC} {}\"", kind.name)));
    }
    let stated: u32 = version.parse().map_err(|_| damaged(format!("\"{version}\" is not a version")))?;
    if stated > kind.version {
        return Err(DurableError::Newer { path: path.to_owned(), found: stated, known: kind.version });
    }
    let computed = format!("{:08x}", self::checksum(FileKind { version: stated, ..kind }, body));
    if computed != *checksum {
        return Err(damaged(format!("its content has checksum {computed}, its header says {checksum}")));
    }
    serde_json::from_slice(body).map(Some).map_err(|error| damaged(error.to_string()))
}

/// CRC-32C over version and content, so that neither can change unnoticed.
fn checksum(kind: FileKind, body: &[u8]) -> u32 {
    checksum::crc32c_append(checksum::crc32c(&kind.version.to_le_bytes()), body)
}

/// Removes the file for good; nothing to do if it is not there.
pub fn remove(path: &Path) -> Result<(), DurableError> {
    match fs::remove_file(path) {
        Ok(()) => sync_folder(path.parent().unwrap_or(Path::new("."))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error("remove", path)(error)),
    }
}

/// Makes a folder, and those above it, readable by its owner alone.
pub fn make_folder(path: &Path) -> Result<(), DurableError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("create", path))
}

fn sync_folder(folder: &Path) -> Result<(), DurableError> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder).and_then(|file| file.sync_all()).map_err(io_error("sync", folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const KIND: FileKind = FileKind { name: "example", version: 1 };

    #[test]
    fn what_is_written_is_read_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        assert!(read::<Vec<u32>>(&path, KIND).unwrap().is_none());
        write(&path, KIND, &vec![1, 2]).unwrap();
        write(&path, KIND, &vec![3]).unwrap();
        assert_eq!(read::<Vec<u32>>(&path, KIND).unwrap(), Some(vec![3]));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write(&path, KIND, &"some content".to_owned()).unwrap();
        let good = fs::read(&path).unwrap();
        for length in 0..good.len() - 1 {
            fs::write(&path, &good[..length]).unwrap();
            assert!(read::<String>(&path, KIND).is_err(), "cut to {length} bytes");
        }
        for at in 0..good.len() - 1 {
            let mut bad = good.clone();
            bad[at] ^= 0x01;
            fs::write(&path, &bad).unwrap();
            assert!(read::<String>(&path, KIND).is_err(), "byte {at} flipped");
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write(&path, FileKind { version: 2, ..KIND }, &1).unwrap();
        assert!(matches!(read::<u32>(&path, KIND), Err(DurableError::Newer { found: 2, known: 1, .. })));
        write(&path, FileKind { name: "other", ..KIND }, &1).unwrap();
        assert!(matches!(read::<u32>(&path, KIND), Err(DurableError::Damaged { .. })));
    }
}
