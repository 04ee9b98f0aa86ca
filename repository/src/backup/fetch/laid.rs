//! Pages laid over slots, held until their slots are opened, so that a slot goes down whole in one large write. A window
//! holds so many of them as memory allows; they are brought before its slots.

use std::collections::HashMap;
use std::ops::Range as Slots;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use roaring::RoaringBitmap;
use tokio::sync::Notify;

use super::sift::Window;
use super::{FileNumber, Found, Goes, Piece, PieceFile};
use crate::format::file_map::{FileMap, MapError, Run, Slot};
use crate::format::overlay::{Overlay, PAGE_BYTES};

/// Of pages that a window holds. Two windows are under way at a time.
pub(super) const HELD_BYTES: u64 = 48 << 20;

/// The pages of one window.
#[derive(Default)]
pub(super) struct Laid {
    pages: Mutex<HashMap<(FileNumber, u32), Box<[u8]>>>,
    /// Pieces that are still to bring some.
    left: AtomicUsize,
    all: Notify,
}

impl Laid {
    pub fn expect(&self, pieces: usize) {
        self.left.store(pieces, Ordering::Release);
    }

    /// Until all are there.
    pub async fn wait(&self) {
        while self.left.load(Ordering::Acquire) > 0 {
            self.all.notified().await;
        }
    }

    /// Takes what a piece brings; nothing if the chunk is too short for it.
    pub fn put(&self, file: FileNumber, runs: &[Run], chunk: &[u8]) -> Option<()> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        for run in runs {
            let part = chunk.get(run.from as usize..run.from as usize + run.len as usize)?;
            let first = (run.to / u64::from(PAGE_BYTES)) as u32;
            for (page, content) in (first..).zip(part.chunks(PAGE_BYTES as usize)) {
                pages.insert((file, page), content.into());
            }
        }
        drop(pages);
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.all.notify_one();
        }
        Some(())
    }
}

/// A slot that pages go over.
pub(super) struct LaidSlot {
    pub offset: u64,
    count: usize,
    laid: Arc<Laid>,
}

impl LaidSlot {
    /// Lays its pages over a slot's own content; nothing if one of them is missing.
    pub fn lay(&self, file: FileNumber, slot: &mut [u8]) -> Option<()> {
        let mut pages = self.laid.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let first = (self.offset / u64::from(PAGE_BYTES)) as u32;
        let mut count = 0;
        for (page, place) in (first..).zip(slot.chunks_exact_mut(PAGE_BYTES as usize)) {
            if let Some(content) = pages.remove(&(file, page)) {
                place.copy_from_slice(content.get(..PAGE_BYTES as usize)?);
                count += 1;
            }
        }
        (count == self.count).then_some(())
    }
}

/// The pieces of one file that is not there yet, window by window.
pub(super) struct LaidFile {
    file: PieceFile,
    map: FileMap,
    overlaid: RoaringBitmap,
    next: usize,
}

impl LaidFile {
    pub fn new(file: PieceFile, map: FileMap) -> Result<LaidFile, MapError> {
        let overlaid = map.overlaid()?;
        Ok(LaidFile { file, map, overlaid, next: 0 })
    }

    /// Adds as many pieces as the window takes; false if some are left.
    pub fn gather(&mut self, window: &mut Window) -> bool {
        let from = self.next;
        let mut laid_slots = RoaringBitmap::new();
        while self.next < self.map.slots.len() && !window.is_full() {
            self.slot(self.next, &mut laid_slots, window);
            self.next += 1;
        }
        for overlay in &self.map.overlays {
            self.overlay(overlay, from..self.next, &laid_slots, window);
        }
        self.next == self.map.slots.len()
    }

    fn slot(&self, number: usize, laid_slots: &mut RoaringBitmap, window: &mut Window) {
        let Some(Slot::Chunk(place)) = self.map.slots.get(number) else { return };
        let (offset, len) = (number as u64 * u64::from(self.map.slot_bytes), self.map.slot_len(number));
        let first = (offset / u64::from(PAGE_BYTES)) as u32;
        let count = self.overlaid.range_cardinality(first..first.saturating_add(len.div_ceil(PAGE_BYTES)));
        let bytes = count * u64::from(PAGE_BYTES);
        if bytes >= u64::from(len) {
            return;
        }
        let goes = match count {
            0 => Goes::Whole(offset),
            _ => {
                laid_slots.insert(number as u32);
                window.held_bytes += bytes;
                Goes::Laid(Box::new(LaidSlot { offset, count: count as usize, laid: window.laid.clone() }))
            }
        };
        window.push(Piece { file: self.file.clone(), place: *place, goes, found: Found::Nothing });
    }

    fn overlay(&self, overlay: &Overlay, slots: Slots<usize>, laid_slots: &RoaringBitmap, window: &mut Window) {
        let slot_of = |page: u32| page / (self.map.slot_bytes / PAGE_BYTES);
        let (mut held, mut bare) = (Vec::new(), Vec::new());
        for page in &overlay.pages {
            if !slots.contains(&(slot_of(page.page) as usize)) {
                continue;
            }
            let runs = if laid_slots.contains(slot_of(page.page)) { &mut held } else { &mut bare };
            push_page(runs, page.position * PAGE_BYTES, u64::from(page.page) * u64::from(PAGE_BYTES));
        }
        let piece = |goes| Piece { file: self.file.clone(), place: overlay.chunk, goes, found: Found::Nothing };
        if !held.is_empty() {
            let held = piece(Goes::Held(window.laid.clone(), held.into()));
            window.held.push(held);
        }
        if !bare.is_empty() {
            window.push(piece(Goes::Parts(bare.into())));
        }
    }
}

fn push_page(runs: &mut Vec<Run>, from: u32, to: u64) {
    match runs.last_mut() {
        Some(last) if last.from + last.len == from && last.to + u64::from(last.len) == to => last.len += PAGE_BYTES,
        _ => runs.push(Run { from, len: PAGE_BYTES, to }),
    }
}
