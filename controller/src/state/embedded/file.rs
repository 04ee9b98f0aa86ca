//! The file under the engine: made, locked, opened, and opened anew after a write failed. redb refuses all work after
//! an I/O error until then.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable};

use super::{FIRST_REVISION, KV, LEASE, LEASE_KEY, LOG, META};
use crate::state::{LeaseId, StateError};

const FORMAT: u64 = 1;

#[derive(Debug, Clone)]
pub struct Options {
    /// Revisions kept for watches that fell behind. Twice as many may be kept for a while.
    pub history_revisions: u64,
    /// redb's page cache.
    pub cache_bytes: usize,
    /// Writes to the file fail while it is set.
    #[cfg(test)]
    pub(crate) disk_is_full: Arc<std::sync::atomic::AtomicBool>,
}

impl Default for Options {
    fn default() -> Self {
        // Minutes of history under load: a watcher that is further behind lists again, which is cheaper by then.
        // 64 MiB hold the whole state of a fleet of some thousand agents.
        Self {
            history_revisions: 10_000,
            cache_bytes: 64 << 20,
            #[cfg(test)]
            disk_is_full: Arc::default(),
        }
    }
}

/// What the engine keeps in memory of a file.
pub(super) struct Contents {
    pub revision: u64,
    pub leases: Vec<(LeaseId, Duration)>,
}

pub(super) struct StateFile {
    path: PathBuf,
    options: Options,
    /// `None` between a failed write and the next success in opening.
    database: RwLock<Option<Database>>,
}

impl StateFile {
    pub(super) fn open(path: &Path, options: Options) -> Result<(Self, Contents), StateError> {
        let file = Self { path: path.to_owned(), options, database: RwLock::new(None) };
        let database = file.open_database().map_err(|failure| match failure {
            DatabaseError::DatabaseAlreadyOpen => StateError::Locked { path: path.to_owned() },
            other => file.error("open", other),
        })?;
        if let Err(found) = prepare(&database).map_err(|source| file.error("prepare", source))? {
            let place = path.display().to_string();
            return Err(StateError::Format { place, found, known: FORMAT });
        }
        let contents = read_contents(&database).map_err(|source| file.error("read", source))?;
        *file.database.write().unwrap_or_else(PoisonError::into_inner) = Some(database);
        Ok((file, contents))
    }

    fn open_database(&self) -> Result<Database, DatabaseError> {
        let io = |source| DatabaseError::Storage(redb::StorageError::Io(source));
        // For its owner alone: it holds hashes of tokens and the fleet's map.
        let mut how = std::fs::OpenOptions::new();
        how.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = how.open(&self.path).map_err(io)?;
        // So that a new file's name is as durable as what is acknowledged in it.
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)?;
        let mut builder = Database::builder();
        builder.set_cache_size(self.options.cache_bytes);
        #[cfg(not(test))]
        return builder.create_file(file);
        #[cfg(test)]
        return builder.create_with_backend(super::tests::FullDisk::new(file, self.options.disk_is_full.clone())?);
    }

    /// Runs `work` on the open file.
    pub(super) fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, redb::Error> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        work(database.as_ref().ok_or(redb::Error::DatabaseClosed)?)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.database.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Closes and opens the file; waits for readers to finish.
    pub(super) fn reopen(&self) -> Result<Contents, StateError> {
        let mut place = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // First the old one, which holds the lock.
        drop(place.take());
        let database = self.open_database().map_err(|source| self.error("open", source))?;
        let contents = read_contents(&database).map_err(|source| self.error("read", source))?;
        *place = Some(database);
        Ok(contents)
    }

    pub(super) fn error(&self, operation: &'static str, source: impl Into<redb::Error>) -> StateError {
        let place = self.path.display().to_string();
        StateError::Storage { operation, place, source: Arc::new(source.into()) }
    }
}

/// Creates the tables of a new file; tells the format that is not ours.
fn prepare(database: &Database) -> Result<Result<(), u64>, redb::Error> {
    let write = database.begin_write()?;
    {
        let mut meta = write.open_table(META)?;
        let format = meta.get("format")?.map(|found| found.value());
        match format {
            None => {
                meta.insert("format", FORMAT)?;
                meta.insert("revision", FIRST_REVISION)?;
                meta.insert("compacted", 0)?;
            }
            Some(FORMAT) => {}
            Some(other) => return Ok(Err(other)),
        }
        write.open_table(KV)?;
        write.open_table(LOG)?;
        write.open_table(LEASE)?;
        write.open_table(LEASE_KEY)?;
    }
    write.commit()?;
    Ok(Ok(()))
}

fn read_contents(database: &Database) -> Result<Contents, redb::Error> {
    let read = database.begin_read()?;
    let revision = read.open_table(META)?.get("revision")?.map_or(FIRST_REVISION, |found| found.value());
    let mut leases = Vec::new();
    for entry in read.open_table(LEASE)?.iter()? {
        let (id, length) = entry?;
        leases.push((LeaseId(id.value()), Duration::from_millis(length.value())));
    }
    Ok(Contents { revision, leases })
}
