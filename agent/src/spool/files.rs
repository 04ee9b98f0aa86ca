//! Pieces on disk: files that are only appended to, one writer each, removed once everything in them is let go of.
//!
//! `<root>/<cluster>/from-<member>/<time>-<number>.pieces`, and beside them `repository.json`: where they belong. What a
//! writer leaves behind when it ends (its connection lost, the agent restarted) is *left*: somebody looks whether the
//! repository has it ([`super::left`]).

mod frames;
mod log;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use walfleet_repository::ids::ClusterName;

use crate::access::RepositoryAccess;
use crate::durable::{self, DurableError, FileKind};
pub use frames::{Contents, Damaged, Found, Lies, read};
pub use log::{ParkedLog, SpoolLog};

const EXTENSION: &str = "pieces";

const LOCATION: FileKind = FileKind { name: "spooled-repository", version: 1 };
const LOCATION_FILE: &str = "repository.json";

#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error("{operation} {}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Durable(#[from] DurableError),
    #[error("the repository of {0} is not known any more")]
    NoRepository(ClusterName),
    #[error(
        "the spool holds {held} bytes, {most} at most\nHINT: the repository has been away for long; spool.size_mib is how much is kept."
    )]
    Full { held: u64, most: u64 },
}

fn failed<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SpoolError + 'a {
    move |source| SpoolError::Io { operation, path: path.to_owned(), source }
}

/// All spools of this host.
pub struct Spools {
    root: PathBuf,
    most_bytes: u64,
    held_bytes: AtomicU64,
    left: Mutex<BTreeMap<PathBuf, LeftFile>>,
    named: AtomicU64,
}

/// A file without a writer.
#[derive(Clone, Copy)]
struct LeftFile {
    since: Instant,
    /// As it counts in `held_bytes`.
    bytes: u64,
    /// What was said to be kept in it is not.
    is_damaged: bool,
}

/// Whose pieces they are.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Owner {
    pub cluster: ClusterName,
    pub member: String,
}

/// Where a cluster's pieces belong, kept so that they get there even if nobody speaks of the cluster any more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Location {
    pub name: String,
    pub url: String,
    pub options: BTreeMap<String, String>,
    pub root: Option<[u8; 32]>,
}

impl From<&RepositoryAccess> for Location {
    fn from(access: &RepositoryAccess) -> Location {
        Location {
            name: access.name.clone(),
            url: access.url.clone(),
            options: access.options.clone(),
            root: access.root.as_ref().map(|root| root.0),
        }
    }
}

impl From<Location> for RepositoryAccess {
    fn from(location: Location) -> RepositoryAccess {
        let root = location.root.map(walfleet_repository::signature::PublicKey);
        RepositoryAccess { name: location.name, url: location.url, options: location.options, root }
    }
}

/// Files that were left, by whose they are.
pub type Left = BTreeMap<Owner, Vec<PathBuf>>;

impl Spools {
    /// Finds what an earlier process left. Blocking.
    pub fn open(root: PathBuf, most_bytes: u64) -> Result<Arc<Spools>, SpoolError> {
        durable::make_folder(&root)?;
        let mut left = BTreeMap::new();
        let mut held = 0;
        for cluster in subfolders(&root)? {
            for member in subfolders(&cluster)? {
                for entry in fs::read_dir(&member).map_err(failed("list", &member))? {
                    let entry = entry.map_err(failed("list", &member))?;
                    if entry.path().extension().is_some_and(|extension| extension == EXTENSION) {
                        let bytes = entry.metadata().map_or(0, |metadata| metadata.len());
                        held += bytes;
                        left.insert(entry.path(), LeftFile { since: Instant::now(), bytes, is_damaged: false });
                    }
                }
            }
        }
        Ok(Arc::new(Spools {
            root,
            most_bytes,
            held_bytes: AtomicU64::new(held),
            left: Mutex::new(left),
            named: AtomicU64::new(0),
        }))
    }

    pub fn held_bytes(&self) -> u64 {
        self.held_bytes.load(Ordering::Relaxed)
    }

    /// What more they hold.
    pub fn room(&self) -> u64 {
        self.most_bytes.saturating_sub(self.held_bytes())
    }

    fn left(&self) -> std::sync::MutexGuard<'_, BTreeMap<PathBuf, LeftFile>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was left at least so long ago.
    pub fn left_for(&self, age: std::time::Duration) -> Left {
        let mut found = Left::new();
        for (path, _) in self.left().iter().filter(|(_, file)| file.since.elapsed() >= age) {
            if let Some(owner) = self.owner_of(path) {
                found.entry(owner).or_default().push(path.clone());
            }
        }
        found
    }

    fn owner_of(&self, path: &Path) -> Option<Owner> {
        let below = path.strip_prefix(&self.root).ok()?;
        let mut parts = below.components().map(|part| part.as_os_str().to_str());
        let cluster = parts.next()??.parse().ok()?;
        let member = parts.next()??.strip_prefix("from-")?.to_owned();
        Some(Owner { cluster, member })
    }

    /// A file's writer is gone.
    fn leave(&self, path: &Path, bytes: u64) {
        let left = LeftFile { since: Instant::now(), bytes, is_damaged: false };
        self.left().insert(path.to_path_buf(), left);
    }

    /// A writer that left them is back. Whether they are its own again: all of them are still here, and none is damaged.
    fn take_up<'a>(&self, paths: impl Iterator<Item = &'a Path> + Clone) -> bool {
        let mut left = self.left();
        let are_here = paths.clone().all(|path| left.get(path).is_some_and(|file| !file.is_damaged));
        if are_here {
            left.retain(|path, _| !paths.clone().any(|taken| taken == path));
        }
        are_here
    }

    /// Not all that is in a file reads.
    pub fn note_damage(&self, path: &Path) {
        if let Some(file) = self.left().get_mut(path) {
            file.is_damaged = true;
        }
    }

    /// The repository has what is in it. Blocking. Nothing if its writer is back: the file is its own again.
    pub fn forget(&self, path: &Path) -> Result<(), SpoolError> {
        let mut left = self.left();
        let Some(file) = left.get(path) else { return Ok(()) };
        match fs::remove_file(path) {
            // Somebody was quicker.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(failed("remove", path))?,
        }
        self.held_bytes.fetch_sub(file.bytes, Ordering::Relaxed);
        left.remove(path);
        Ok(())
    }

    fn folder(&self, owner: &Owner) -> PathBuf {
        self.root.join(owner.cluster.as_str()).join(format!("from-{}", owner.member))
    }

    /// Where the pieces of an owner belong.
    pub fn location(&self, owner: &Owner) -> Result<Option<Location>, SpoolError> {
        Ok(durable::read(&self.folder(owner).join(LOCATION_FILE), LOCATION)?)
    }

    fn reserve(&self, bytes: u64) -> Result<(), SpoolError> {
        let held = self.held_bytes.fetch_add(bytes, Ordering::Relaxed);
        if held + bytes > self.most_bytes {
            self.held_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(SpoolError::Full { held, most: self.most_bytes });
        }
        Ok(())
    }
}

fn subfolders(folder: &Path) -> Result<Vec<PathBuf>, SpoolError> {
    let entries = fs::read_dir(folder).map_err(failed("list", folder))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let paths = paths.collect::<Result<Vec<_>, _>>().map_err(failed("list", folder))?;
    Ok(paths.into_iter().filter(|path| path.is_dir()).collect())
}

#[cfg(test)]
mod tests;
