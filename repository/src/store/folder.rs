//! A folder as a store: object_store's, but for large new objects, which go to the disk past the page cache. That spares
//! the copy, which costs more than encryption and checksums do, and leaves the memory of a host that serves others as it
//! was. File systems that cannot do that are written through their cache.
//!
//! What is under way has the name that object_store gives it, the key with `#` and a number, which no listing shows.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use rustix::fs::OFlags;

/// Objects from this size on are written directly.
const DIRECT_BYTES: usize = 256 << 10;

/// In memory and in the file: what every disk takes.
const ALIGNMENT: usize = 4096;

/// One write. A disk is asked for the next when it has done this.
const WRITE_BYTES: usize = 1 << 20;

/// Buffers that are kept for the next object.
const BUFFERS: usize = 4;

#[derive(Clone, Debug)]
pub(super) struct FolderStore {
    inner: Arc<LocalFileSystem>,
    writer: Arc<Writer>,
}

#[derive(Debug)]
struct Writer {
    /// Whether this file system still takes direct writes.
    direct: AtomicBool,
    buffers: Mutex<Vec<Vec<u8>>>,
}

/// What became of a direct write.
enum Written {
    Stored,
    /// Nothing was: it is to be written the usual way.
    NotDirectly,
}

impl FolderStore {
    pub(super) fn new(inner: LocalFileSystem) -> FolderStore {
        let writer = Writer { direct: AtomicBool::new(true), buffers: Mutex::default() };
        FolderStore { inner: Arc::new(inner), writer: Arc::new(writer) }
    }
}

impl fmt::Display for FolderStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for FolderStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let is_direct = opts.mode == PutMode::Create
            && payload.content_length() >= DIRECT_BYTES
            && self.writer.direct.load(Ordering::Relaxed);
        if is_direct {
            let path = self.inner.path_to_filesystem(location)?;
            let (writer, content) = (Arc::clone(&self.writer), payload.clone());
            let written = tokio::task::spawn_blocking(move || writer.create(path, &content));
            match written.await.map_err(|source| Error::JoinError { source })?? {
                Written::Stored => return Ok(PutResult { e_tag: None, version: None, extensions: Default::default() }),
                Written::NotDirectly => {}
            }
        }
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

impl Writer {
    fn create(&self, path: PathBuf, content: &PutPayload) -> Result<Written> {
        let failed = |error: io::Error| {
            let source = format!("write {}: {error}", path.display());
            Error::Generic { store: "LocalFileSystem", source: io::Error::new(error.kind(), source).into() }
        };
        let (file, staged) = match stage(&path) {
            Ok(staged) => staged,
            // The first of its folder, which object_store makes durably.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Written::NotDirectly),
            Err(error) if error.kind() == ErrorKind::InvalidInput => return Ok(self.not_any_more()),
            Err(error) => return Err(failed(error)),
        };
        let written = self.write(file, content).and_then(|()| std::fs::hard_link(&staged, &path));
        let _ = std::fs::remove_file(&staged);
        match written {
            Ok(()) => {}
            Err(source) if source.kind() == ErrorKind::AlreadyExists => {
                let path = path.display().to_string();
                return Err(Error::AlreadyExists { path, source: source.into() });
            }
            Err(error) if error.kind() == ErrorKind::InvalidInput => return Ok(self.not_any_more()),
            Err(error) => return Err(failed(error)),
        }
        let parent = path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all());
        parent.map_err(failed)?;
        Ok(Written::Stored)
    }

    /// An alignment of its own, or none at all.
    fn not_any_more(&self) -> Written {
        self.direct.store(false, Ordering::Relaxed);
        Written::NotDirectly
    }

    /// All of it, durably.
    fn write(&self, mut file: File, content: &PutPayload) -> io::Result<()> {
        let pool = || self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let reused = pool().pop();
        let mut buffer = reused.unwrap_or_else(|| vec![0; WRITE_BYTES + ALIGNMENT]);
        let start = buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        let aligned = buffer.get_mut(start..start + WRITE_BYTES).unwrap_or_default();
        let written = write_through(&mut file, aligned, content);
        let mut pool = pool();
        if pool.len() < BUFFERS {
            pool.push(buffer);
        }
        drop(pool);
        written?;
        file.sync_all()
    }
}

/// A file beside the object to be, for direct writes.
fn stage(path: &std::path::Path) -> io::Result<(File, PathBuf)> {
    for number in 1_u64.. {
        let mut staged = path.as_os_str().to_owned();
        staged.push(format!("#{number}"));
        let flags = OFlags::DIRECT.bits().cast_signed();
        match OpenOptions::new().write(true).create_new(true).custom_flags(flags).open(&staged) {
            Ok(file) => return Ok((file, PathBuf::from(staged))),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => {
                // A file system may make the file and then refuse the flag.
                if error.kind() == ErrorKind::InvalidInput {
                    let _ = std::fs::remove_file(&staged);
                }
                return Err(error);
            }
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}

/// The last bytes, fewer than a disk takes at once, go the usual way.
fn write_through(file: &mut File, buffer: &mut [u8], content: &PutPayload) -> io::Result<()> {
    let mut filled = 0;
    for mut chunk in content.iter().map(|chunk| chunk.as_ref()) {
        while !chunk.is_empty() {
            let room = buffer.get_mut(filled..).unwrap_or_default();
            let (now, later) = chunk.split_at(chunk.len().min(room.len()));
            room.get_mut(..now.len()).unwrap_or_default().copy_from_slice(now);
            (filled, chunk) = (filled + now.len(), later);
            if filled == buffer.len() {
                file.write_all(buffer)?;
                filled = 0;
            }
        }
    }
    let (whole, rest) = buffer.get(..filled).unwrap_or_default().split_at(filled - filled % ALIGNMENT);
    file.write_all(whole)?;
    if !rest.is_empty() {
        rustix::fs::fcntl_setfl(&*file, rustix::fs::fcntl_getfl(&*file)? - OFlags::DIRECT)?;
        file.write_all(rest)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn large_objects_are_created_once_and_whole() {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let inner = LocalFileSystem::new_with_prefix(folder.path()).unwrap().with_fsync(true);
        let store = FolderStore::new(inner);
        let create = || PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let content = |len: usize| (0..len).map(|i| (i * 7 / 13) as u8).collect::<Vec<u8>>();
        for (number, len) in
            [DIRECT_BYTES, 2 * WRITE_BYTES, 3 * WRITE_BYTES + ALIGNMENT + 1, WRITE_BYTES - 1, 5].into_iter().enumerate()
        {
            let key = Path::from(format!("folder/{number}"));
            let chunks: PutPayload = content(len).chunks(300_001).map(Bytes::copy_from_slice).collect();
            store.put_opts(&key, chunks, create()).await.unwrap();
            assert_eq!(store.get_opts(&key, GetOptions::default()).await.unwrap().bytes().await.unwrap(), content(len));
            let again = store.put_opts(&key, vec![1; len].into(), create()).await;
            assert!(matches!(again, Err(Error::AlreadyExists { .. })), "{again:?}");
            assert_eq!(store.get_opts(&key, GetOptions::default()).await.unwrap().bytes().await.unwrap(), content(len));
        }
        let mut left: Vec<_> = std::fs::read_dir(folder.path().join("folder")).unwrap().collect();
        left.retain(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains('#'));
        assert!(left.is_empty(), "{left:?}");
        assert!(store.writer.direct.load(Ordering::Relaxed), "no direct write was refused");
    }

    /// A file system in memory that takes no direct writes, or does.
    #[tokio::test]
    async fn a_file_system_without_direct_writes_is_written_to_all_the_same() {
        let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return };
        let store = FolderStore::new(LocalFileSystem::new_with_prefix(folder.path()).unwrap());
        let create = || PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        for (number, direct) in [true, false].into_iter().enumerate() {
            store.writer.direct.store(direct, Ordering::Relaxed);
            let key = Path::from(format!("folder/{number}"));
            store.put_opts(&key, vec![3; DIRECT_BYTES + 1].into(), create()).await.unwrap();
            let found = store.get_opts(&key, GetOptions::default()).await.unwrap().bytes().await.unwrap();
            assert_eq!(found, vec![3; DIRECT_BYTES + 1]);
        }
    }
}
