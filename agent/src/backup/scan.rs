//! Lists what belongs into a backup of a data directory, by the rules of pg_basebackup
//! (src/backend/backup/basebackup.c; before 15 src/backend/replication/basebackup.c).
//!
//! Entries come in the byte order of their paths, whatever the file system's order, so that two scans can be merged. Of
//! the tree only the names of the directories on the way to the current entry are held. It stats, but opens no file.
//! `global/pg_control` is left out: it must be copied last, see [`Scan::pg_control`].

mod listing;
mod rules;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::postgres::relation::RelationFile;
use listing::{Item, Listing};
use rules::Room;

const PG_CONTROL: &[u8] = b"global/pg_control";

/// What is scanned.
#[derive(Clone, Debug)]
pub struct ScanSpec {
    pub data_dir: PathBuf,
    /// Of the server, from pg_control or the server itself; names the tablespaces' version directory.
    pub major: u32,
    pub catalog_version: u32,
    /// Directories of which only the directory itself is kept, absolute or below the data directory: the server's
    /// log_directory. PostgreSQL's own are not among them, whatever stands here.
    pub without_content: Vec<PathBuf>,
}

/// A file or directory that belongs into the backup, as it was when it was looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ScannedFile {
    /// Below the data directory, tablespaces as `pg_tblspc/<oid>/…`.
    pub path: Vec<u8>,
    /// Where it lies; for a tablespace's file, at the tablespace's location.
    pub absolute: PathBuf,
    /// In bytes; it may grow, shrink or vanish at any time after.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    pub mtime_us: i64,
    pub kind: ScannedKind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScannedKind {
    /// An external tablespace's link `pg_tblspc/<oid>` is no entry; see [`Scan::tablespaces`].
    Directory,
    Relation(RelationSegment),
    Other,
}

/// A relation's file with its place in the catalog.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RelationSegment {
    /// OID; 1663 is pg_default, 1664 pg_global.
    pub tablespace: u32,
    /// OID; 0 in pg_global.
    pub database: u32,
    pub file: RelationFile,
}

/// A tablespace as `pg_tblspc` had it when the scan began.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ScannedTablespace {
    pub oid: u32,
    /// The link's text; `None` for an in-place tablespace, a directory under `pg_tblspc`.
    pub location: Option<PathBuf>,
}

/// Something in the tree that is left out though no rule of PostgreSQL names it. Worth telling.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Omitted {
    pub path: Vec<u8>,
    pub reason: OmittedReason,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OmittedReason {
    /// Not followed.
    Link { target: PathBuf },
    /// A socket, pipe or device.
    SpecialFile,
    /// Under `pg_tblspc`, but not named by an OID.
    NotATablespace,
    /// A file system's own directory.
    LostAndFound,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Scanned {
    File(ScannedFile),
    Omitted(Omitted),
}

#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    #[error("{operation} {}\nHINT: the agent must run as the operating system user that owns the data directory.", path.display())]
    Access { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{operation} {}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{} is a symbolic link to {}, and a backup without it would be useless\n\
         HINT: PostgreSQL supports links in pg_tblspc and for pg_wal only; move the directory back into its place.",
        path.display(), target.display()
    )]
    LinkInPlace { path: PathBuf, target: PathBuf },
    #[error(
        "the tablespace {oid} has no directory {} at its location\n\
         HINT: is its file system mounted? If the tablespace was dropped, remove the link {}.",
        String::from_utf8_lossy(version_directory), link.display()
    )]
    TablespaceContent { oid: u32, link: PathBuf, version_directory: Vec<u8> },
}

impl ScanError {
    fn new(operation: &'static str, path: &Path, error: Errno) -> ScanError {
        let (path, source) = (path.to_owned(), io::Error::from(error));
        match error {
            Errno::ACCESS | Errno::PERM => ScanError::Access { operation, path, source },
            _ => ScanError::Io { operation, path, source },
        }
    }
}

/// An iterator over a data directory. Blocking; files that vanish meanwhile are passed over, as the WAL has their end.
#[derive(Debug)]
pub struct Scan {
    spec: ScanSpec,
    /// Mode of directories that stand for links: the data directory's.
    directory_mode: u32,
    version_directory: Vec<u8>,
    tablespaces: Vec<ScannedTablespace>,
    /// Paths below the data directory that are a tablespace's location: read there, not here (only a WARNING to
    /// CREATE TABLESPACE).
    tablespaces_inside: BTreeSet<Vec<u8>>,
    stack: Vec<Level>,
}

/// A directory that is being walked.
#[derive(Debug)]
struct Level {
    /// Below the data directory, without a slash at the end; empty at the top.
    path: Vec<u8>,
    absolute: PathBuf,
    room: Room,
    /// `None` for `pg_wal`, whose entries are made up.
    directory: Option<OwnedFd>,
    listing: Listing,
    next: usize,
}

impl Scan {
    pub fn new(spec: ScanSpec) -> Result<Scan, ScanError> {
        let data_dir = spec.data_dir.clone();
        let fail = |operation, error| ScanError::new(operation, &data_dir, error);
        let directory = open_directory(&data_dir, OFlags::empty()).map_err(|error| fail("open directory", error))?;
        let stat = rustix::fs::fstat(&directory).map_err(|error| fail("stat directory", error))?;
        let mut scan = Scan {
            directory_mode: permissions(&stat),
            version_directory: format!("PG_{}_{}", spec.major, spec.catalog_version).into_bytes(),
            spec,
            tablespaces: Vec::new(),
            tablespaces_inside: BTreeSet::new(),
            stack: Vec::new(),
        };
        scan.find_tablespaces()?;
        let listing = Listing::read(&directory, Room::Top, &scan.version_directory)
            .map_err(|error| fail("read directory", error))?;
        let (path, absolute) = (Vec::new(), scan.spec.data_dir.clone());
        scan.stack.push(Level { path, absolute, room: Room::Top, directory: Some(directory), listing, next: 0 });
        Ok(scan)
    }

    /// Known from the start, by OID.
    pub fn tablespaces(&self) -> &[ScannedTablespace] {
        &self.tablespaces
    }

    /// The control file, which must be copied after everything else: on a standby its minimum recovery point is the end
    /// of the backup (do_pg_backup_stop, src/backend/access/transam/xlog.c).
    pub fn pg_control(&self) -> Result<ScannedFile, ScanError> {
        let absolute = self.spec.data_dir.join(OsStr::from_bytes(PG_CONTROL));
        let stat = rustix::fs::lstat(&absolute).map_err(|error| ScanError::new("stat", &absolute, error))?;
        Ok(file(PG_CONTROL.to_vec(), absolute, &stat, ScannedKind::Other))
    }

    fn find_tablespaces(&mut self) -> Result<(), ScanError> {
        let folder = self.spec.data_dir.join("pg_tblspc");
        let fail = |error| ScanError::new("read directory", &folder, error);
        let directory = open_directory(&folder, OFlags::NOFOLLOW).map_err(fail)?;
        let top = self.spec.data_dir.canonicalize().unwrap_or_else(|_| self.spec.data_dir.clone());
        for (name, kind) in listing::entries(&directory).map_err(fail)? {
            let Some(oid) = rules::oid(&name) else { continue };
            let location = match kind {
                FileType::Directory => None,
                FileType::Symlink => match rustix::fs::readlinkat(&directory, name.as_slice(), Vec::new()) {
                    Ok(target) => Some(PathBuf::from(OsStr::from_bytes(target.as_bytes()))),
                    Err(Errno::NOENT) => continue,
                    Err(error) => {
                        return Err(ScanError::new("read link", &folder.join(OsStr::from_bytes(&name)), error));
                    }
                },
                _ => continue,
            };
            let resolved = location.as_ref().and_then(|location| folder.join(location).canonicalize().ok());
            if let Some(inside) = resolved.as_deref().and_then(|resolved| resolved.strip_prefix(&top).ok()) {
                self.tablespaces_inside.insert(inside.as_os_str().as_bytes().to_vec());
            }
            self.tablespaces.push(ScannedTablespace { oid, location });
        }
        self.tablespaces.sort_by_key(|tablespace| tablespace.oid);
        Ok(())
    }

    /// The next item of the innermost directory, judged; `None` if it yields nothing.
    fn step(&mut self) -> Result<Option<Scanned>, ScanError> {
        let Some(level) = self.stack.last_mut() else { return Ok(None) };
        let Some(item) = level.listing.get(level.next) else {
            self.stack.pop();
            return Ok(None);
        };
        level.next += 1;
        let name = item.name().to_vec();
        let path = joined(&level.path, &name);
        let absolute = level.absolute.join(OsStr::from_bytes(&name));
        match item {
            Item::Descent(_) => self.descend(path, absolute, &name).map(|()| None),
            Item::Entry(_) => self.visit(path, absolute, &name),
        }
    }

    /// Looks at one entry itself.
    fn visit(&self, path: Vec<u8>, absolute: PathBuf, name: &[u8]) -> Result<Option<Scanned>, ScanError> {
        let Some(level) = self.stack.last() else { return Ok(None) };
        let Some(directory) = &level.directory else {
            return Ok(Some(Scanned::File(self.empty_directory(path, absolute))));
        };
        let stat = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(ScanError::new("stat", &absolute, error)),
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        let omitted = |path, reason| Ok(Some(Scanned::Omitted(Omitted { path, reason })));
        if level.room == Room::TablespaceFolder && rules::oid(name).is_none() {
            return omitted(path, OmittedReason::NotATablespace);
        }
        if level.room == Room::Top && name == b"lost+found" {
            return omitted(path, OmittedReason::LostAndFound);
        }
        let scanned = match kind {
            FileType::Directory => file(path, absolute, &stat, ScannedKind::Directory),
            FileType::RegularFile => {
                let relation = level.room.relation(name);
                file(path, absolute, &stat, relation.map_or(ScannedKind::Other, ScannedKind::Relation))
            }
            // An external tablespace: its content follows under this name, the link itself is made on restore.
            FileType::Symlink if level.room == Room::TablespaceFolder => return Ok(None),
            FileType::Symlink if level.room == Room::Top && rules::is_kept_empty(name) => {
                self.empty_directory(path, absolute)
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(directory, name, Vec::new()).unwrap_or_default();
                let target = PathBuf::from(OsStr::from_bytes(target.as_bytes()));
                if level.room.needs_no_links(name) {
                    return Err(ScanError::LinkInPlace { path: absolute, target });
                }
                return omitted(path, OmittedReason::Link { target });
            }
            _ => return omitted(path, OmittedReason::SpecialFile),
        };
        Ok(Some(Scanned::File(scanned)))
    }

    /// Goes into a directory, if its content belongs into the backup.
    fn descend(&mut self, path: Vec<u8>, absolute: PathBuf, name: &[u8]) -> Result<(), ScanError> {
        let Some(level) = self.stack.last() else { return Ok(()) };
        let room = level.room.below(name, &self.version_directory);
        if room == Room::Wal {
            let listing = Listing::of_wal(self.spec.major);
            self.stack.push(Level { path, absolute, room, directory: None, listing, next: 0 });
            return Ok(());
        }
        let excluded = |without: &PathBuf| self.spec.data_dir.join(without) == absolute;
        let is_log = room == Room::Other && self.spec.without_content.iter().any(excluded);
        if is_log || self.tablespaces_inside.contains(&path) {
            return Ok(());
        }
        // Only tablespaces are reached by a link.
        let follow = if matches!(room, Room::Tablespace(_)) { OFlags::empty() } else { OFlags::NOFOLLOW };
        let directory = match open_directory(&absolute, follow) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => return self.expect_dropped(room, absolute),
            Err(error) => return Err(ScanError::new("open directory", &absolute, error)),
        };
        let listing = Listing::read(&directory, room, &self.version_directory);
        let listing = listing.map_err(|error| ScanError::new("read directory", &absolute, error))?;
        if matches!(room, Room::Tablespace(_)) && listing.is_empty() {
            return self.expect_dropped(room, absolute);
        }
        self.stack.push(Level { path, absolute, room, directory: Some(directory), listing, next: 0 });
        Ok(())
    }

    /// A directory that is gone was dropped meanwhile. But a tablespace that is still linked and has nothing of this
    /// cluster is a file system that is not mounted. DROP TABLESPACE removes the directory first, the link at once after.
    fn expect_dropped(&self, room: Room, absolute: PathBuf) -> Result<(), ScanError> {
        let Room::Tablespace(oid) = room else { return Ok(()) };
        for _ in 0..10 {
            match rustix::fs::lstat(&absolute) {
                Err(Errno::NOENT) => return Ok(()),
                Err(error) => return Err(ScanError::new("stat", &absolute, error)),
                Ok(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
        Err(ScanError::TablespaceContent { oid, link: absolute, version_directory: self.version_directory.clone() })
    }

    fn empty_directory(&self, path: Vec<u8>, absolute: PathBuf) -> ScannedFile {
        let mode = self.directory_mode;
        ScannedFile { path, absolute, size: 0, mode, mtime_us: 0, kind: ScannedKind::Directory }
    }
}

impl Iterator for Scan {
    type Item = Result<Scanned, ScanError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.stack.is_empty() {
            if let Some(result) = self.step().transpose() {
                return Some(result);
            }
        }
        None
    }
}

fn open_directory(path: &Path, extra: OFlags) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | extra;
    rustix::fs::open(path, flags, Mode::empty())
}

fn joined(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() { name.to_vec() } else { [folder, b"/", name].concat() }
}

fn permissions(stat: &Stat) -> u32 {
    stat.st_mode & 0o7777
}

fn file(path: Vec<u8>, absolute: PathBuf, stat: &Stat, kind: ScannedKind) -> ScannedFile {
    let size = if kind == ScannedKind::Directory { 0 } else { u64::try_from(stat.st_size).unwrap_or(0) };
    let mtime_us = stat.st_mtime.saturating_mul(1_000_000).saturating_add(stat.st_mtime_nsec as i64 / 1000);
    ScannedFile { path, absolute, size, mode: permissions(stat), mtime_us, kind }
}

#[cfg(test)]
mod tests;
