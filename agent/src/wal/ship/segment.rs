//! One segment: read, decoded behind its predecessor, sealed as hard as there is time for, and stored.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use jiff::Timestamp;
use walfleet_repository::postgres::{Segment, WalBranch};
use walfleet_repository::shipping::Compression;
use walfleet_repository::wal_archive::{Archived, OwnedSegment, SealedSegment, WalArchive};

use super::{BACKLOG, LARGE_BACKLOG, SEALED_KIB, SegmentForm, ShipError, Shipper, predecessor_carry};
use crate::wal::branches::{Put, Ticket};
use crate::wal::read::{SegmentContent, WalReadError, read_segment_into};

impl Shipper {
    /// Stores a finished segment where it belongs.
    pub(super) async fn ship_segment(
        &self,
        segment: Segment,
        ticket: &Ticket,
        form: SegmentForm,
    ) -> Result<Archived, ShipError> {
        loop {
            // Nothing is held while those before it are waited for: they may need it.
            let base = self.find_branch(segment.timeline).await?;
            self.branches.look_at_others(base, segment).await?;
            let slot = self.slot().await?;
            let home = self.branches.home(base, segment).await?;
            let content_permit = self.contents.acquire().await.map_err(|_| ShipError::Stopping)?;
            let upload = Arc::new(self.upload(home, segment, form).await?);
            if self.stream.borrow().follows(segment) && self.is_there(&upload).await? {
                drop((slot, content_permit));
                let put = Put::Stored(home, Archived::AlreadyThere);
                if let Some(archived) = self.branches.settle(base, segment, put, ticket).await? {
                    return Ok(archived);
                }
                continue;
            }
            let archive = self.archive_for(self.backlog.load(Ordering::Relaxed));
            let sealed = archive.seal_segment(Arc::clone(&upload)).await?;
            self.keep_buffer(Arc::into_inner(upload).map(|upload| upload.content));
            drop(content_permit);
            let kib = u32::try_from(sealed.len() / 1024).unwrap_or(u32::MAX).clamp(1, SEALED_KIB);
            let permit = self.sealed_kib.acquire_many(kib).await.map_err(|_| ShipError::Stopping)?;
            let put = self.branches.put_segment(base, &sealed).await?;
            self.keep_sealed(sealed);
            drop((slot, permit));
            if let Some(archived) = self.branches.settle(base, segment, put, ticket).await? {
                return Ok(archived);
            }
        }
    }

    /// Whether the archive has a segment with the same records. Where it most likely does, that is quicker found out than by
    /// sending it.
    async fn is_there(&self, upload: &OwnedSegment) -> Result<bool, ShipError> {
        let archive = &self.source.archive;
        match archive.directory(upload.wal, upload.segment, upload.segment_size).await {
            Ok(there) => {
                let valid = upload.content.get(..upload.facts.valid_bytes as usize).unwrap_or_default();
                Ok(there.valid_bytes == upload.facts.valid_bytes && there.content_id == archive.id_of(valid))
            }
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// No more of them than contents at once; none once nothing waits.
    pub(super) fn keep_buffer(&self, buffer: Option<Vec<u8>>) {
        let is_needed = !self.to_decode.borrow().is_empty();
        let mut buffers = self.buffers();
        match is_needed {
            true => buffers.extend(buffer),
            false => buffers.clear(),
        }
    }

    pub(super) fn keep_sealed(&self, sealed: SealedSegment) {
        match self.to_decode.borrow().is_empty() {
            true => self.source.archive.reuse_nothing(),
            false => self.source.archive.reuse(sealed),
        }
    }

    pub(super) fn buffers(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn slot(&self) -> Result<tokio::sync::SemaphorePermit<'_>, ShipError> {
        self.slots.acquire().await.map_err(|_| ShipError::Stopping)
    }

    /// A segment read and decoded, for a branch.
    pub(super) async fn upload(
        &self,
        wal: WalBranch,
        segment: Segment,
        form: SegmentForm,
    ) -> Result<OwnedSegment, ShipError> {
        let mut content = self.decode(segment, form).await?;
        self.is_decoded(segment);
        if let Some(suspicion) = content.suspicion.filter(|_| form != SegmentForm::Partial) {
            let name = segment.file_name(self.source.segment_size);
            if form == SegmentForm::Presumed {
                return Err(ShipError::Unfinished { name, suspicion });
            }
            content.facts.valid_bytes = self.source.segment_size.bytes();
            tracing::warn!(
                segment = name,
                "a finished segment does not read to its end and is archived as it is: {suspicion}"
            );
        }
        Ok(OwnedSegment {
            wal,
            segment,
            segment_size: self.source.segment_size,
            content: content.bytes,
            facts: content.facts,
            predecessor: None,
            member: self.source.member.clone(),
            shipped_at_us: Timestamp::now().as_microsecond(),
        })
    }

    /// The archive, compressing as hard as so many waiting segments leave time for, and the server leaves CPU.
    pub fn archive_for(&self, backlog: usize) -> &WalArchive {
        match backlog {
            _ if self.source.compression != Compression::Adaptive => &self.source.archive,
            _ if self.queueing.is_long() => &self.lightest,
            0..BACKLOG => &self.source.archive,
            BACKLOG..LARGE_BACKLOG => &self.light,
            LARGE_BACKLOG.. => &self.lightest,
        }
    }

    pub(super) fn is_decoded(&self, segment: Segment) {
        self.to_decode.send_if_modified(|waiting| waiting.remove(&segment));
    }

    /// Reads and decodes a segment behind its predecessor.
    pub(super) async fn decode(&self, segment: Segment, form: SegmentForm) -> Result<SegmentContent, ShipError> {
        let mut last = self.decoding.lock().await;
        let known = last.take().filter(|(previous, _)| previous.next() == segment).map(|(_, carry)| carry);
        let (source, size) = (self.source.clone(), self.source.segment_size);
        let buffer = self.buffers().pop().unwrap_or_default();
        let read = tokio::task::spawn_blocking(move || {
            let carry = known.or_else(|| predecessor_carry(&source, segment));
            let name = match form {
                SegmentForm::Whole | SegmentForm::Presumed => segment.file_name(size),
                SegmentForm::Partial => format!("{}.partial", segment.file_name(size)),
            };
            let path = source.data_dir.join("pg_wal").join(name);
            let content = read_segment_into(buffer, &path, segment, size, source.system_id, carry)?;
            Ok::<_, WalReadError>(content)
        });
        let mut content = read.await.map_err(|_| ShipError::Stopping)??;
        if form != SegmentForm::Partial {
            *last = content.carry.take().map(|carry| (segment, carry));
        }
        Ok(content)
    }
}
