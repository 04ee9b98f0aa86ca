//! One writer's files, while it writes, and while it may come back.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use jiff::Timestamp;

use super::frames::{HEADER, Lies, MAGIC, header};
use super::{EXTENSION, LOCATION, LOCATION_FILE, Location, Owner, SpoolError, Spools, failed};
use crate::access::RepositoryAccess;
use crate::durable;
use crate::spool::SpooledPiece;

/// A file that has grown so far is followed by another.
const FILE_BYTES: u64 = 8 << 20;
/// The present file is removed rather than appended to if all is let go of and it is larger.
const SPENT_BYTES: u64 = 256 << 10;

pub(super) struct LogFile {
    pub(super) path: Arc<Path>,
    bytes: u64,
    /// The last piece in it.
    last: u64,
}

/// One writer's files. Everything is blocking.
pub struct SpoolLog {
    spools: Arc<Spools>,
    folder: PathBuf,
    pub(super) files: VecDeque<LogFile>,
    /// The last of `files`, while it is appended to.
    pub(super) open: Option<File>,
    released: u64,
}

impl SpoolLog {
    pub fn begin(spools: &Arc<Spools>, owner: &Owner, repository: &RepositoryAccess) -> Result<SpoolLog, SpoolError> {
        let folder = spools.folder(owner);
        locate(&folder, repository)?;
        Ok(SpoolLog { spools: Arc::clone(spools), folder, files: VecDeque::new(), open: None, released: 0 })
    }

    /// Appends pieces under ascending numbers and syncs them to disk. After an error none of them counts.
    pub fn append(&mut self, pieces: &[(u64, Arc<SpooledPiece>)]) -> Result<Vec<Lies>, SpoolError> {
        let bytes = pieces.iter().map(|(_, piece)| (HEADER + piece.sealed.len()) as u64).sum::<u64>();
        self.spools.reserve(bytes)?;
        let appended = self.write(pieces, bytes);
        if appended.is_err() {
            self.spools.held_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.take_back();
        }
        appended
    }

    /// Whatever a failed append left in the file, nothing is put behind it. A full disk has that much room again.
    fn take_back(&mut self) {
        let (Some(open), Some(file)) = (self.open.take(), self.files.back()) else { return };
        let _ = open.set_len(file.bytes);
        if file.bytes == MAGIC.len() as u64
            && let Some(file) = self.files.pop_back()
        {
            self.remove(&file);
        }
    }

    fn write(&mut self, pieces: &[(u64, Arc<SpooledPiece>)], bytes: u64) -> Result<Vec<Lies>, SpoolError> {
        if self.files.back().is_none_or(|file| file.bytes >= FILE_BYTES) || self.open.is_none() {
            self.next_file()?;
        }
        let (Some(open), Some(file)) = (&mut self.open, self.files.back_mut()) else { return Ok(Vec::new()) };
        let mut buffer = Vec::with_capacity(bytes as usize);
        let mut places = Vec::with_capacity(pieces.len());
        for (_, piece) in pieces {
            buffer.extend_from_slice(&header(piece));
            let (path, offset) = (Arc::clone(&file.path), file.bytes + buffer.len() as u64);
            places.push(Lies { path, offset, length: piece.sealed.len() as u32 });
            buffer.extend_from_slice(&piece.sealed);
        }
        open.write_all(&buffer).map_err(failed("append to", &file.path))?;
        open.sync_data().map_err(failed("sync", &file.path))?;
        file.bytes += bytes;
        file.last = pieces.last().map_or(file.last, |(number, _)| *number);
        Ok(places)
    }

    fn next_file(&mut self) -> Result<(), SpoolError> {
        let number = self.spools.named.fetch_add(1, Ordering::Relaxed);
        let name = format!("{:020}-{number:06}.{EXTENSION}", Timestamp::now().as_microsecond());
        let path = self.folder.join(name);
        let mut file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("create", &path))?;
        let synced = || File::open(&self.folder)?.sync_all();
        if let Err(error) = file.write_all(MAGIC).and_then(|()| synced()) {
            let _ = fs::remove_file(&path);
            return Err(failed("begin", &path)(error));
        }
        let bytes = MAGIC.len() as u64;
        self.spools.held_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.files.push_back(LogFile { path: path.into(), bytes, last: 0 });
        self.open = Some(file);
        Ok(())
    }

    /// Everything up to this piece is in the repository. What cannot be removed is left for later.
    pub fn release(&mut self, number: u64) {
        self.released = self.released.max(number);
        while self.files.front().is_some_and(|file| file.last <= number) {
            let is_present = self.files.len() == 1 && self.open.is_some();
            if is_present && self.files.front().is_some_and(|file| file.bytes < SPENT_BYTES) {
                break;
            }
            if is_present {
                self.open = None;
            }
            if let Some(file) = self.files.pop_front() {
                self.remove(&file);
            }
        }
    }

    fn remove(&self, file: &LogFile) {
        match fs::remove_file(&file.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => self.spools.leave(&file.path, file.bytes),
            _ => drop(self.spools.held_bytes.fetch_sub(file.bytes, Ordering::Relaxed)),
        }
    }

    /// What is not let go of is left until the writer comes back. Blocking.
    pub fn park(mut self) -> ParkedLog {
        self.open = None;
        self.release(self.released);
        let files = std::mem::take(&mut self.files);
        files.iter().for_each(|file| self.spools.leave(&file.path, file.bytes));
        let (spools, folder, released) = (Arc::clone(&self.spools), self.folder.clone(), self.released);
        ParkedLog { spools, folder, files, released }
    }
}

/// What a writer had that is not there.
pub struct ParkedLog {
    spools: Arc<Spools>,
    folder: PathBuf,
    files: VecDeque<LogFile>,
    released: u64,
}

impl ParkedLog {
    /// Goes on in a new file behind all that it had. `None`: not all of that is here and intact any more. Blocking.
    pub fn resume(self, repository: &RepositoryAccess) -> Result<Option<SpoolLog>, SpoolError> {
        let ParkedLog { spools, folder, files, released } = self;
        if !spools.take_up(files.iter().map(|file| &*file.path)) {
            return Ok(None);
        }
        let log = SpoolLog { spools, folder, files, open: None, released };
        locate(&log.folder, repository)?;
        Ok(Some(log))
    }
}

/// Notes where what lies in a folder belongs.
fn locate(folder: &Path, repository: &RepositoryAccess) -> Result<(), SpoolError> {
    durable::make_folder(folder)?;
    let (path, wanted) = (folder.join(LOCATION_FILE), Location::from(repository));
    if durable::read(&path, LOCATION)?.as_ref() != Some(&wanted) {
        durable::write(&path, LOCATION, &wanted)?;
    }
    Ok(())
}

impl Drop for SpoolLog {
    fn drop(&mut self) {
        while let Some(file) = self.files.pop_front() {
            if file.last <= self.released {
                self.remove(&file);
            } else {
                self.spools.leave(&file.path, file.bytes);
            }
        }
    }
}
