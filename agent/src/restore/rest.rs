//! Before a delta restore brings anything: removes what the backup does not have, and what is not of the kind it has.
//!
//! The directory is walked in the order of the backup's list, so that the two are merged without holding either. It goes
//! through no link but those of the backup's own tablespaces and a pg_wal that lies elsewhere (initdb --waldir).

use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use walfleet_repository::backup::fetch::FetchError;
use walfleet_repository::backup::read::{BackupReader, ParentFiles};
use walfleet_repository::format::manifest::EntryKind;

use super::RestoreError;
use super::write::{Destination, MARKER, WriteError, io};

const TABLESPACES: &[u8] = b"pg_tblspc";

/// Removes the rest; returns how many files and directories that were (those below a removed directory not counted).
/// Blocking, but for the reading of the list.
pub fn remove(
    destination: &Destination,
    reader: Arc<BackupReader>,
    cancel: &CancellationToken,
) -> Result<u64, RestoreError> {
    let version = format!("PG_{}_", reader.manifest.server_version_num / 10_000).into_bytes();
    let list = ParentFiles::new(reader);
    let mut rest = Rest { destination, list, version, runtime: tokio::runtime::Handle::current(), removed: 0 };
    let mut stack = vec![Level::read(Vec::new(), &destination.data_dir)?];
    while let Some(level) = stack.last_mut() {
        if cancel.is_cancelled() {
            return Err(FetchError::Cancelled.into());
        }
        let Some((name, descend)) = level.items.pop() else {
            stack.pop();
            continue;
        };
        let path = match level.path.is_empty() {
            true => name.clone(),
            false => [&level.path[..], &name].join(&b'/'),
        };
        let absolute = level.absolute.join(OsStr::from_bytes(&name));
        match descend {
            true => stack.push(Level::read(path, &absolute)?),
            false if rest.judge(&path, &absolute)? => level.descend_into(name),
            false => {}
        }
    }
    Ok(rest.removed)
}

/// A directory that is being walked.
struct Level {
    path: Vec<u8>,
    absolute: PathBuf,
    /// Names still to be looked at (`false`) and directories to be walked, the next one last.
    items: Vec<(Vec<u8>, bool)>,
}

impl Level {
    fn read(path: Vec<u8>, absolute: &Path) -> Result<Level, WriteError> {
        let mode = fs::metadata(absolute).map_err(io("stat", absolute))?.permissions().mode();
        if mode & 0o700 != 0o700 {
            let opened = fs::set_permissions(absolute, fs::Permissions::from_mode(mode & 0o7777 | 0o700));
            opened.map_err(io("set permissions of", absolute))?;
        }
        let mut items = Vec::new();
        for entry in fs::read_dir(absolute).map_err(io("read directory", absolute))? {
            let name: OsString = entry.map_err(io("read directory", absolute))?.file_name();
            items.push((name.into_vec(), false));
        }
        items.sort_by(|a, b| b.cmp(a));
        Ok(Level { path, absolute: absolute.to_owned(), items })
    }

    /// Its content has its place in the order where `name/` has.
    fn descend_into(&mut self, name: Vec<u8>) {
        let key = [&name[..], b"/"].concat();
        let at = self.items.partition_point(|(other, descend)| {
            let other = if *descend { [&other[..], b"/"].concat() } else { other.clone() };
            other > key
        });
        self.items.insert(at, (name, true));
    }
}

struct Rest<'a> {
    destination: &'a Destination,
    list: ParentFiles,
    /// How this version's directories in tablespaces begin.
    version: Vec<u8>,
    runtime: tokio::runtime::Handle,
    removed: u64,
}

impl Rest<'_> {
    /// Removes it, unless the backup has it; says whether its content is to be looked at.
    fn judge(&mut self, path: &[u8], absolute: &Path) -> Result<bool, RestoreError> {
        let there = fs::symlink_metadata(absolute).map_err(io("stat", absolute))?;
        let listed = self.runtime.block_on(self.list.find(path))?;
        // A tablespace below the data directory (against the server's advice) is walked by its link.
        let is_location = self.destination.tablespaces.values().any(|location| location.starts_with(absolute));
        if path == MARKER.as_bytes() || path == b"lost+found" || is_location {
            return Ok(false);
        }
        let tablespace = tablespace_of(path);
        match tablespace.as_ref().map(|(oid, names)| (*oid, &names[..])) {
            Some((oid, [])) if there.is_symlink() => {
                if self.destination.tablespaces.contains_key(&oid) {
                    return Ok(true);
                }
                // Its files would be taken for what replay creates anew under the same names.
                self.remove_version_directories(absolute)?;
            }
            // Others may have their directories there, as other versions of PostgreSQL do.
            Some((oid, [name]))
                if self.destination.tablespaces.contains_key(&oid) && !name.starts_with(&self.version) =>
            {
                return Ok(false);
            }
            _ => {}
        }
        let is_right = listed.is_some_and(|entry| match entry.kind {
            EntryKind::Directory => there.is_dir() || is_wal_elsewhere(path, absolute, &there),
            // A file with another name besides is another's, too (pg_upgrade --link): it is not written to.
            EntryKind::File { .. } => there.is_file() && there.nlink() == 1,
        });
        if is_right {
            return Ok(there.is_dir() || there.is_symlink());
        }
        let removed = if there.is_dir() { fs::remove_dir_all(absolute) } else { fs::remove_file(absolute) };
        removed.map_err(io("remove", absolute))?;
        self.removed += 1;
        Ok(false)
    }

    fn remove_version_directories(&self, location: &Path) -> Result<(), WriteError> {
        let Ok(entries) = fs::read_dir(location) else { return Ok(()) };
        for entry in entries.flatten().filter(|entry| entry.file_name().as_bytes().starts_with(&self.version)) {
            fs::remove_dir_all(entry.path()).map_err(io("remove", &entry.path()))?;
        }
        Ok(())
    }
}

/// The tablespace that a path below `pg_tblspc` is of, and the names after its oid.
fn tablespace_of(path: &[u8]) -> Option<(u32, Vec<&[u8]>)> {
    let mut names = path.split(|byte| *byte == b'/');
    if names.next() != Some(TABLESPACES) {
        return None;
    }
    let oid = std::str::from_utf8(names.next()?).ok()?.parse().ok()?;
    Some((oid, names.collect()))
}

fn is_wal_elsewhere(path: &[u8], absolute: &Path, there: &Metadata) -> bool {
    path == b"pg_wal" && there.is_symlink() && absolute.is_dir()
}
