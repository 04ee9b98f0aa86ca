//! Writes what the repository brings below a data directory, and tells what is there already. Remembers nothing of a file
//! but that it is open.
//!
//! Large pieces go to the disk past the page cache: that spares the copy, which costs more than all decoding does, and
//! leaves the memory of a host that serves others as it was. The rest, and file systems that cannot do that, are buffered.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use walfleet_repository::backup::fetch::{ALIGNMENT, FileNumber, Found, PieceFile, PieceSink};
use walfleet_repository::format::manifest::{Content, EntryKind, FileEntry};
use walfleet_repository::format::overlay::PAGE_BYTES;

use super::write::{WriteError, create, io as failed};
use crate::progress::Progress;

/// Open files kept for further pieces; large files come in many pieces, small ones in one.
const OPEN_FILES: usize = 64;

/// From here on the way to the disk and back costs less than the copy into the page cache, since threads that only write wait
/// for it: a slot.
const DIRECT_BYTES: usize = 128 << 10;

/// From here on a stretch gets its blocks at once: in one extent rather than in one for each write, which writes faster
/// and is read faster ever after.
const EXPECTED_BYTES: u64 = 1 << 20;

/// What the owner may do with a file while it is being filled.
const OWNER_READS_AND_WRITES: u32 = 0o600;

pub struct FileSink {
    data_dir: PathBuf,
    progress: Progress,
    /// Whether files may be there, whose content is kept where it is right.
    over: bool,
    /// Whether this file system still takes direct writes.
    direct: AtomicBool,
    open: Mutex<Vec<(FileNumber, Arc<OpenFile>)>>,
    /// Files that their owner may not write (a server's private key, 0400), until their content is there.
    read_only: Mutex<Vec<(PathBuf, u32)>>,
}

struct OpenFile {
    path: PathBuf,
    buffered: File,
    direct: OnceLock<Option<File>>,
}

impl FileSink {
    /// Into a new directory.
    pub fn new(data_dir: &Path, progress: Progress) -> FileSink {
        FileSink {
            data_dir: data_dir.to_owned(),
            progress,
            over: false,
            direct: AtomicBool::new(true),
            open: Mutex::default(),
            read_only: Mutex::default(),
        }
    }

    /// Over what is there.
    pub fn over(data_dir: &Path, progress: Progress) -> FileSink {
        FileSink { over: true, ..FileSink::new(data_dir, progress) }
    }

    /// Once everything is written: takes away what only the writing needed.
    pub fn settle(&self) -> Result<(), WriteError> {
        for (path, mode) in self.read_only.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))
                .map_err(failed("set permissions of", &path))?;
        }
        Ok(())
    }

    fn path(&self, relative: &[u8]) -> PathBuf {
        self.data_dir.join(std::ffi::OsStr::from_bytes(relative))
    }

    fn file(&self, piece: &PieceFile) -> io::Result<Arc<OpenFile>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, file)) = open.iter().find(|(known, _)| *known == piece.number) {
            return Ok(file.clone());
        }
        let path = self.path(&piece.path);
        let buffered = OpenOptions::new().read(true).write(true).open(&path).map_err(|e| named("open", &path, e))?;
        let file = Arc::new(OpenFile { path, buffered, direct: OnceLock::new() });
        if open.len() >= OPEN_FILES {
            open.remove(0);
        }
        open.push((piece.number, file.clone()));
        Ok(file)
    }

    fn directory(&self, path: &Path, mode: u32) -> io::Result<()> {
        match fs::DirBuilder::new().mode(mode).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.map_err(|e| named("make directory", path, e))?,
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| named("set permissions of", path, e))
    }

    /// The file of this entry, open, and how long it was before.
    fn create(&self, path: &Path, mode: u32) -> io::Result<(File, u64)> {
        let there = match fs::symlink_metadata(path) {
            Ok(there) if self.over => there,
            // A directory that was empty has nothing of this name: an error says so.
            _ => {
                let created = create(OpenOptions::new().create_new(true), path, mode);
                return created.map(|file| (file, 0)).map_err(|e| named("create", path, e));
            }
        };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(|e| named("set permissions of", path, e))?;
        let no_follow = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
        let file = OpenOptions::new().write(true).custom_flags(no_follow).open(path);
        Ok((file.map_err(|e| named("open", path, e))?, there.len()))
    }

    /// Writes only the pages that differ: of a slot that was brought again most are right.
    fn write_differences(&self, file: &OpenFile, offset: u64, content: &[u8]) -> io::Result<()> {
        let mut there = vec![0; content.len()];
        file.buffered.read_exact_at(&mut there, offset).map_err(|e| named("read", &file.path, e))?;
        let page_bytes = PAGE_BYTES as usize;
        let pages = content.chunks(page_bytes).zip(there.chunks(page_bytes));
        let mut from = 0;
        let mut stretch = 0;
        for (new, old) in pages {
            if new == old {
                self.put(file, offset, content, from, stretch)?;
                from += stretch + new.len();
                stretch = 0;
            } else {
                stretch += new.len();
            }
        }
        self.put(file, offset, content, from, stretch)
    }

    fn put(&self, file: &OpenFile, offset: u64, content: &[u8], from: usize, len: usize) -> io::Result<()> {
        match content.get(from..from + len) {
            Some(part) if !part.is_empty() => self.write_all(file, offset + from as u64, part),
            _ => Ok(()),
        }
    }

    fn write_all(&self, file: &OpenFile, offset: u64, content: &[u8]) -> io::Result<()> {
        let written = self.write_direct(file, offset, content).map_err(|e| named("write", &file.path, e))?;
        let rest = content.get(written..).unwrap_or_default();
        file.buffered.write_all_at(rest, offset + written as u64).map_err(|e| named("write", &file.path, e))
    }

    /// How much of it went past the page cache; the rest is to be buffered.
    fn write_direct(&self, file: &OpenFile, offset: u64, content: &[u8]) -> io::Result<usize> {
        let aligned = (content.as_ptr().addr() | content.len()).is_multiple_of(ALIGNMENT)
            && offset.is_multiple_of(ALIGNMENT as u64);
        if !aligned || content.len() < DIRECT_BYTES || !self.direct.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let open = || {
            let flag = rustix::fs::OFlags::DIRECT.bits() as i32;
            OpenOptions::new().write(true).custom_flags(flag).open(&file.path).ok()
        };
        let Some(direct) = file.direct.get_or_init(open) else {
            self.direct.store(false, Ordering::Relaxed);
            return Ok(0);
        };
        match direct.write_at(content, offset) {
            // A short write ends where the next must be buffered.
            Ok(written) => Ok(written),
            // A file system with an alignment of its own.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.direct.store(false, Ordering::Relaxed);
                Ok(0)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(error) => Err(error),
        }
    }
}

/// Keeps the path in an error that crosses the repository's border.
fn named(operation: &str, path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{operation} {}: {error}", path.display()))
}

impl PieceSink for FileSink {
    fn entry(&self, _number: FileNumber, entry: &FileEntry) -> io::Result<Found> {
        let path = self.path(&entry.path);
        let EntryKind::File { size, content, .. } = &entry.kind else {
            return self.directory(&path, entry.mode).map(|()| Found::Nothing);
        };
        let mode = entry.mode | OWNER_READS_AND_WRITES;
        let (file, mut before) = self.create(&path, mode)?;
        if mode != entry.mode {
            let mut read_only = self.read_only.lock().unwrap_or_else(PoisonError::into_inner);
            read_only.push((path.clone(), entry.mode));
        }
        let extend = |len| file.set_len(len).map_err(|e| named("extend", &path, e));
        if before > 0 && matches!(content, Content::Zero) {
            extend(0)?;
            before = 0;
        }
        // What is not written stays a hole: zero slots cost nothing.
        if before != *size {
            extend(*size)?;
        }
        Ok(if before > 0 { Found::Content } else { Found::Nothing })
    }

    fn expect(&self, file: &PieceFile, offset: u64, len: u64) {
        if len < EXPECTED_BYTES {
            return;
        }
        // Whatever a file system has against it, writing does without: one that compresses may say that it has no room, and
        // has.
        if let Ok(open) = self.file(file) {
            let _ = rustix::fs::fallocate(&open.buffered, rustix::fs::FallocateFlags::KEEP_SIZE, offset, len);
        }
    }

    fn write(&self, file: &PieceFile, offset: u64, content: &[u8]) -> io::Result<()> {
        let open = self.file(file)?;
        match self.over {
            true => self.write_differences(&open, offset, content)?,
            false => self.write_all(&open, offset, content)?,
        }
        self.progress.add(content.len() as u64);
        Ok(())
    }

    fn read(&self, file: &PieceFile, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let open = self.file(file)?;
        open.buffered.read_exact_at(into, offset).map_err(|e| named("read", &open.path, e))
    }

    fn kept(&self, bytes: u64) {
        self.progress.add(bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use bytes::Bytes;
    use walfleet_repository::format::file_map::{ChunkPlace, ShortId};
    use walfleet_repository::format::sealed::FramePlace;
    use walfleet_repository::ids::PackId;

    use super::*;

    #[test]
    fn what_is_expected_gets_room_and_what_is_not_stays_a_hole() {
        const MIB: u64 = 1 << 20;
        let folder = tempfile::tempdir().unwrap();
        let sink = FileSink::new(folder.path(), Progress::new());
        let frame = FramePlace { offset: 0, stored_len: 1, raw_len: 1 };
        let content = Content::Map(ChunkPlace { pack: PackId([0; 32]), frame, id: ShortId::default() });
        let entry = FileEntry {
            path: Bytes::from_static(b"relation"),
            mode: 0o600,
            mtime_us: 0,
            kind: EntryKind::File { size: 64 * MIB, crc32c: None, content },
        };
        assert_eq!(sink.entry(0, &entry).unwrap(), Found::Nothing);
        let file = PieceFile { number: 0, path: entry.path };
        sink.expect(&file, 8 * MIB, 4 * MIB);
        sink.write(&file, 9 * MIB, &[7; 8192]).unwrap();
        let path = folder.path().join("relation");
        let stat = fs::metadata(&path).unwrap();
        assert_eq!(stat.len(), 64 * MIB);
        assert!(stat.blocks() * 512 < 6 * MIB, "{} bytes are taken", stat.blocks() * 512);
        let read = fs::read(&path).unwrap();
        let written = 9 * MIB as usize..9 * MIB as usize + 8192;
        assert!(read.iter().enumerate().all(|(at, byte)| *byte == if written.contains(&at) { 7 } else { 0 }));
    }
}
