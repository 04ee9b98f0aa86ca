//! Where a backup's files go: a directory that cannot be mistaken for a whole one until it is.
//!
//! Order is the crash argument. First a marker file; then everything but `global/pg_control`, without which no
//! PostgreSQL starts; then one sync of every file system touched; then `pg_control`, durable; then the marker goes. A
//! directory with the marker and without `pg_control` is an unfinished restore.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use walfleet_repository::format::manifest::Tablespace;
use walfleet_repository::postgres::SystemId;

/// Its presence says: unfinished.
pub const MARKER: &str = "walfleet.restoring";

/// What the marker says of the cluster, for whoever goes on later.
const MARKER_SYSTEM: &str = "system identifier ";

#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("{operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error(
        "{path} is not empty\nHINT: restore into a new or empty directory, or with --delta over a copy of the same cluster; nothing was changed."
    )]
    NotEmpty { path: PathBuf },
    #[error(
        "{path} is not empty, and neither a pg_control nor an unfinished restore says whose data it holds\nHINT: a delta restore needs a data directory of the same cluster; name another directory; nothing was changed."
    )]
    Unidentified { path: PathBuf },
    #[error(
        "{path} belongs to system identifier {found}, the backup to {expected}\nHINT: a delta restore replaces a copy of the same cluster only; name another directory; nothing was changed."
    )]
    OtherSystem { path: PathBuf, found: SystemId, expected: SystemId },
    #[error(
        "{path} is not empty, and {link} does not lead to it\nHINT: map the tablespace to where it is, or to an empty directory; nothing was changed."
    )]
    OtherTablespace { path: PathBuf, link: PathBuf },
    #[error(
        "{path} belongs to a running PostgreSQL server (pid {pid})\nHINT: name another directory, or stop the server; nothing was changed."
    )]
    Running { path: PathBuf, pid: u32 },
    #[error(
        "{path} is an unfinished restore\nHINT: add --delta to go on where it was, or remove it (rm -r {}) and restore again.",
        printed(.remains)
    )]
    Unfinished { path: PathBuf, remains: Vec<PathBuf> },
    #[error("{path} is not an absolute path")]
    Relative { path: PathBuf },
    #[error(
        "{path} has {free} bytes free, and the backup needs {needed}\nHINT: free space or name another directory; nothing was changed."
    )]
    Space { path: PathBuf, free: u64, needed: u64 },
    #[error("the backup has no tablespace {0}\nHINT: name it by its location at the source or by its oid.")]
    UnknownTablespace(String),
    #[error("two tablespaces would go to {0}")]
    SameLocation(PathBuf),
}

fn printed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" ")
}

pub(super) fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> WriteError {
    let path = path.to_owned();
    move |source| WriteError::Io { operation, path, source }
}

/// Where everything goes, checked before anything is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Destination {
    pub data_dir: PathBuf,
    /// By oid; only tablespaces outside the data directory.
    pub tablespaces: BTreeMap<u32, PathBuf>,
}

impl Destination {
    /// Maps the backup's tablespaces: a new location by old location or oid, otherwise where they were.
    pub fn map(
        data_dir: &Path,
        tablespaces: &[Tablespace],
        mapping: &BTreeMap<String, PathBuf>,
    ) -> Result<Destination, WriteError> {
        if !data_dir.is_absolute() {
            return Err(WriteError::Relative { path: data_dir.to_owned() });
        }
        let outside = || tablespaces.iter().filter(|t| !t.location.is_empty());
        let known = |name: &str| outside().any(|t| t.location == name || t.oid.to_string() == name);
        if let Some(unknown) = mapping.keys().find(|name| !known(name)) {
            return Err(WriteError::UnknownTablespace(unknown.clone()));
        }
        let mut mapped = BTreeMap::new();
        let mut seen = BTreeSet::from([data_dir.to_owned()]);
        for tablespace in outside() {
            let new = mapping.get(&tablespace.location).or_else(|| mapping.get(&tablespace.oid.to_string()));
            let location = new.cloned().unwrap_or_else(|| PathBuf::from(&tablespace.location));
            if !location.is_absolute() {
                return Err(WriteError::Relative { path: location });
            }
            if !seen.insert(location.clone()) {
                return Err(WriteError::SameLocation(location));
            }
            mapped.insert(tablespace.oid, location);
        }
        Ok(Destination { data_dir: data_dir.to_owned(), tablespaces: mapped })
    }

    /// Refuses anything but new or empty directories, and too little space. Changes nothing.
    pub fn check(&self, needed: u64) -> Result<(), WriteError> {
        for path in std::iter::once(&self.data_dir).chain(self.tablespaces.values()) {
            check_empty(path)?;
        }
        // Tablespaces may lie elsewhere; then this asks for more than the data directory alone needs, never for less.
        let existing = self.data_dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let stat = rustix::fs::statvfs(existing).map_err(|e| io("stat file system of", existing)(e.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if self.tablespaces.is_empty() && free < needed {
            return Err(WriteError::Space { path: existing.to_owned(), free, needed });
        }
        Ok(())
    }

    /// As [`Destination::check`] for a directory that may hold a copy of the cluster, whole, damaged or unfinished.
    pub fn check_copy(&self, needed: u64, system_id: SystemId) -> Result<(), WriteError> {
        let path = &self.data_dir;
        match check_empty(path) {
            Ok(()) => return self.check(needed),
            Err(WriteError::NotEmpty { .. } | WriteError::Unfinished { .. }) => {}
            Err(other) => return Err(other),
        }
        match system_of(path)? {
            None => return Err(WriteError::Unidentified { path: path.clone() }),
            Some(found) if found != system_id => {
                return Err(WriteError::OtherSystem { path: path.clone(), found, expected: system_id });
            }
            Some(_) => {}
        }
        for (oid, location) in &self.tablespaces {
            let link = self.link(*oid);
            if fs::read_link(&link).is_ok_and(|target| target == *location) {
                continue;
            }
            check_empty(location).map_err(|error| match error {
                WriteError::NotEmpty { path } | WriteError::Unfinished { path, .. } => {
                    WriteError::OtherTablespace { path, link }
                }
                other => other,
            })?;
        }
        Ok(())
    }

    fn link(&self, oid: u32) -> PathBuf {
        self.data_dir.join("pg_tblspc").join(oid.to_string())
    }

    /// Makes the directories, the marker, and the links to the tablespaces; from here on no PostgreSQL starts there.
    pub fn begin(
        &self,
        mode: DirectoryMode,
        description: &str,
        system_id: SystemId,
    ) -> Result<FileSystems, WriteError> {
        make_directory(&self.data_dir, mode)?;
        let marker = format!("{description}\n{MARKER_SYSTEM}{}\n", system_id.0);
        write_durable(&self.data_dir.join(MARKER), marker.as_bytes(), 0o600)?;
        let control = self.data_dir.join("global/pg_control");
        match fs::remove_file(&control) {
            Ok(()) => sync_folder(&self.data_dir.join("global"))?,
            Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {}
            Err(source) => return Err(io("remove", &control)(source)),
        }
        for location in self.tablespaces.values() {
            make_directory(location, mode)?;
        }
        if !self.tablespaces.is_empty() {
            make_directory(&self.data_dir.join("pg_tblspc"), mode)?;
            for (oid, location) in &self.tablespaces {
                make_link(location, &self.link(*oid))?;
            }
        }
        FileSystems::open(self)
    }

    /// The last step: the directory is whole from here on.
    pub fn finish(&self, control_mode: u32, control: &[u8]) -> Result<(), WriteError> {
        write_durable(&self.data_dir.join("global/pg_control"), control, control_mode)?;
        let marker = self.data_dir.join(MARKER);
        fs::remove_file(&marker).map_err(io("remove", &marker))?;
        sync_folder(&self.data_dir)
    }
}

/// The file systems that are written to, held open from before the first write: what could not be written back since
/// then is told to these descriptors, whoever else syncs meanwhile (errseq_t, Linux lib/errseq.c).
pub struct FileSystems(Vec<(PathBuf, File)>);

impl FileSystems {
    fn open(destination: &Destination) -> Result<FileSystems, WriteError> {
        let (mut seen, mut open) = (BTreeSet::new(), Vec::new());
        // WAL may lie elsewhere (initdb --waldir), and a delta restore leaves it there.
        let wal = Some(destination.data_dir.join("pg_wal")).filter(|path| path.is_dir());
        for path in std::iter::once(&destination.data_dir).chain(destination.tablespaces.values()).chain(&wal) {
            let folder = File::open(path).map_err(io("open", path))?;
            if seen.insert(folder.metadata().map_err(io("stat", path))?.dev()) {
                open.push((path.clone(), folder));
            }
        }
        Ok(FileSystems(open))
    }

    /// Makes everything written so far durable: one sync for each file system rather than one for each file.
    pub fn sync(&self) -> Result<(), WriteError> {
        for (path, folder) in &self.0 {
            rustix::fs::syncfs(folder).map_err(|e| io("sync file system of", path)(e.into()))?;
        }
        Ok(())
    }
}

/// Of a data directory that is not empty: as its control file has it, else as the marker of an unfinished restore.
fn system_of(data_dir: &Path) -> Result<Option<SystemId>, WriteError> {
    let read = |name: &str| match fs::read(data_dir.join(name)) {
        Ok(content) => Ok(Some(content)),
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(source) => Err(io("read", &data_dir.join(name))(source)),
    };
    // system_identifier is the first field of ControlFileData (pg_control.h), in the host's byte order.
    if let Some((first, _)) = read("global/pg_control")?.as_deref().and_then(<[u8]>::split_first_chunk) {
        return Ok(Some(SystemId(u64::from_ne_bytes(*first))));
    }
    let marker = read(MARKER)?.unwrap_or_default();
    let marker = String::from_utf8_lossy(&marker);
    let number = marker.lines().find_map(|line| line.strip_prefix(MARKER_SYSTEM)?.parse().ok());
    Ok(number.map(SystemId))
}

fn make_link(location: &Path, link: &Path) -> Result<(), WriteError> {
    match fs::read_link(link) {
        Ok(target) if target == location => return Ok(()),
        Ok(_) => fs::remove_file(link).map_err(io("remove", link))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        // No link: a directory, as that of a tablespace in place.
        Err(_) => fs::remove_dir_all(link).map_err(io("remove", link))?,
    }
    std::os::unix::fs::symlink(location, link).map_err(io("link", link))
}

/// Whether the source allowed group access (initdb --allow-group-access).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DirectoryMode {
    Owner,
    Group,
}

impl DirectoryMode {
    pub fn directory(self) -> u32 {
        match self {
            DirectoryMode::Owner => 0o700,
            DirectoryMode::Group => 0o750,
        }
    }

    pub fn file(self) -> u32 {
        match self {
            DirectoryMode::Owner => 0o600,
            DirectoryMode::Group => 0o640,
        }
    }
}

fn check_empty(path: &Path) -> Result<(), WriteError> {
    let mut entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(io("read directory", path)(source)),
    };
    if entries.next().is_none() {
        return Ok(());
    }
    let pid = fs::read_to_string(path.join("postmaster.pid")).ok();
    let pid = pid.and_then(|text| text.lines().next()?.trim().parse::<u32>().ok());
    if let Some(pid) = pid.filter(|pid| Path::new(&format!("/proc/{pid}")).exists()) {
        return Err(WriteError::Running { path: path.to_owned(), pid });
    }
    // With pg_control it was whole, even if the marker could not be removed any more: somebody may have used it since.
    if !path.join(MARKER).exists() || path.join("global/pg_control").exists() {
        return Err(WriteError::NotEmpty { path: path.to_owned() });
    }
    // Its links are this restore's own: they lead to directories that were empty when it began.
    let links = fs::read_dir(path.join("pg_tblspc")).into_iter().flatten().flatten();
    let tablespaces = links.filter_map(|link| fs::read_link(link.path()).ok()).filter(|target| target.exists());
    let remains = std::iter::once(path.to_owned()).chain(tablespaces).collect();
    Err(WriteError::Unfinished { path: path.to_owned(), remains })
}

fn make_directory(path: &Path, mode: DirectoryMode) -> Result<(), WriteError> {
    fs::DirBuilder::new().recursive(true).mode(mode.directory()).create(path).map_err(io("make directory", path))?;
    // An existing one, or one made under a umask, is brought to what PostgreSQL demands (checkDataDir, miscinit.c).
    fs::set_permissions(path, fs::Permissions::from_mode(mode.directory())).map_err(io("set permissions of", path))
}

/// Writes a small file that the sync of everything makes durable.
pub fn write_plain(path: &Path, content: &[u8], mode: u32) -> Result<(), WriteError> {
    create_plain(path, mode)?.write_all(content).map_err(io("write", path))
}

/// A file to be written, that the sync of everything makes durable.
pub fn create_plain(path: &Path, mode: u32) -> Result<File, WriteError> {
    create(OpenOptions::new().create(true).truncate(true), path, mode).map_err(io("create", path))
}

/// Writes a small file whole: temporary name, sync, rename, sync of the folder.
pub fn write_durable(path: &Path, content: &[u8], mode: u32) -> Result<(), WriteError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".walfleet-new");
    let temporary = PathBuf::from(temporary);
    let written = create(OpenOptions::new().create(true).truncate(true), &temporary, mode)
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(io("write", path))?;
    sync_folder(path.parent().unwrap_or(Path::new("/")))
}

/// A file to be written, with a mode exactly as at the source: what is created loses the bits of the umask of whoever
/// restores.
pub(super) fn create(how: &mut OpenOptions, path: &Path, mode: u32) -> std::io::Result<File> {
    let file = how.write(true).mode(mode).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    Ok(file)
}

fn sync_folder(path: &Path) -> Result<(), WriteError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(io("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tablespace(oid: u32, location: &str) -> Tablespace {
        Tablespace { oid, location: location.into() }
    }

    #[test]
    fn tablespaces_are_mapped_by_location_or_oid_and_never_onto_each_other() {
        let spaces = [tablespace(1, "/a"), tablespace(2, "/b"), tablespace(3, "")];
        let map = |pairs: &[(&str, &str)]| {
            let mapping = pairs.iter().map(|(old, new)| ((*old).to_owned(), PathBuf::from(new))).collect();
            Destination::map(Path::new("/d"), &spaces, &mapping)
        };
        let mapped = map(&[("/a", "/new/a"), ("2", "/new/b")]).unwrap();
        assert_eq!(mapped.tablespaces, BTreeMap::from([(1, "/new/a".into()), (2, "/new/b".into())]));
        assert!(matches!(map(&[("/x", "/y")]), Err(WriteError::UnknownTablespace(_))));
        assert!(matches!(map(&[("/a", "/b")]), Err(WriteError::SameLocation(_))));
        assert!(matches!(map(&[("/a", "/d")]), Err(WriteError::SameLocation(_))));
        assert!(matches!(map(&[("/a", "rel")]), Err(WriteError::Relative { .. })));
    }

    #[test]
    fn only_new_or_empty_directories_are_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let check =
            |path: &Path, needed| Destination { data_dir: path.to_owned(), tablespaces: BTreeMap::new() }.check(needed);
        assert!(check(&folder.path().join("new"), 0).is_ok());
        assert!(check(folder.path(), 0).is_ok());
        assert!(matches!(check(folder.path(), u64::MAX), Err(WriteError::Space { .. })));
        fs::write(folder.path().join("x"), "").unwrap();
        assert!(matches!(check(folder.path(), 0), Err(WriteError::NotEmpty { .. })));
        fs::write(folder.path().join("postmaster.pid"), format!("{}\n", std::process::id())).unwrap();
        assert!(matches!(check(folder.path(), 0), Err(WriteError::Running { .. })));
        fs::write(folder.path().join(MARKER), "").unwrap();
        assert!(matches!(check(folder.path(), 0), Err(WriteError::Running { .. })), "whatever else lies there");
        fs::remove_file(folder.path().join("postmaster.pid")).unwrap();
        let tablespace = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("pg_tblspc")).unwrap();
        std::os::unix::fs::symlink(tablespace.path(), folder.path().join("pg_tblspc/1")).unwrap();
        let refused = check(folder.path(), 0).unwrap_err().to_string();
        let remains = format!("rm -r {} {})", folder.path().display(), tablespace.path().display());
        assert!(refused.contains(&remains), "{refused}");
        fs::create_dir(folder.path().join("global")).unwrap();
        fs::write(folder.path().join("global/pg_control"), "").unwrap();
        assert!(matches!(check(folder.path(), 0), Err(WriteError::NotEmpty { .. })), "it was whole");
    }
}
