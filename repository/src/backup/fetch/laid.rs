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
use crate::format::file_map::{FileMap, MapError, Run, Slot, push_page};
use crate::format::overlay::{Overlay, PAGE_BYTES};

/// Of pages that a window holds. Two windows are under way at a time.
pub(super) const HELD_BYTES: u64 = 48 << 20;

/// Content by file and page.
type Pages = HashMap<(FileNumber, u32), Box<[u8]>>;

/// The pages of one window.
#[derive(Default)]
pub(super) struct Laid {
    pages: Mutex<Pages>,
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
            push_page(runs, *page);
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::format::file_map::{ChunkPlace, SLOT_BYTES, ShortId};
    use crate::format::sealed::FramePlace;
    use crate::ids::PackId;

    fn chunk(number: u32, raw_len: u32) -> ChunkPlace {
        let mut id = ShortId::default();
        id.0[..4].copy_from_slice(&number.to_le_bytes());
        ChunkPlace { pack: PackId([1; 32]), frame: FramePlace { offset: 0, stored_len: 9, raw_len }, id }
    }

    /// A gigabyte, every slot and some holes, of which two overlays take every third page in chunks of 16, the last slot
    /// whole.
    fn large() -> FileMap {
        let (slots, pages) = (8192u32, 131_072u32);
        let slot = |n| if n % 10 == 3 { Slot::Zero } else { Slot::Chunk(chunk(n, SLOT_BYTES)) };
        let over: Vec<u32> = (0..pages).filter(|page| page % 3 == 0 || *page >= pages - 16).collect();
        let overlays = over
            .chunks(16)
            .zip(slots..)
            .map(|(pages, n)| Overlay::of_chunk(chunk(n, pages.len() as u32 * PAGE_BYTES), pages.iter().copied()));
        FileMap {
            slot_bytes: SLOT_BYTES,
            size: u64::from(slots) * u64::from(SLOT_BYTES),
            slots: (0..slots).map(slot).collect(),
            overlays: overlays.collect(),
            base: None,
        }
    }

    #[test]
    fn a_window_holds_exactly_the_pages_of_its_slots_and_no_more_than_memory_allows() {
        let map = large();
        let file = PieceFile { number: 7, path: bytes::Bytes::new() };
        let mut laid_file = LaidFile::new(file, map.clone()).unwrap();
        // Who writes each page, as many times as somebody does.
        let mut written: BTreeMap<u32, u32> = BTreeMap::new();
        let mut windows = 0;
        loop {
            let mut window = Window::new(1 << 30);
            let done = laid_file.gather(&mut window);
            windows += 1;
            assert!(window.held_bytes <= HELD_BYTES + u64::from(SLOT_BYTES));
            window.laid.expect(window.held.len());
            for piece in &window.held {
                let Goes::Held(laid, runs) = &piece.goes else { panic!("held and not to be held") };
                let mut content = vec![0; piece.place.frame.raw_len as usize];
                for run in runs.iter() {
                    content[run.from as usize..][..run.len as usize].fill(1);
                }
                laid.put(7, runs, &content).unwrap();
            }
            assert_eq!(window.laid.left.load(Ordering::Relaxed), 0);
            for piece in &window.pieces {
                let runs = match &piece.goes {
                    Goes::Whole(offset) => vec![Run { from: 0, len: SLOT_BYTES, to: *offset }],
                    Goes::Laid(slot) => {
                        slot.lay(7, &mut vec![0; SLOT_BYTES as usize]).expect("all its pages are held");
                        vec![Run { from: 0, len: SLOT_BYTES, to: slot.offset }]
                    }
                    Goes::Parts(runs) => runs.to_vec(),
                    Goes::Held(..) => panic!("held, and not among the held"),
                };
                for run in runs {
                    for page in (run.to..run.to + u64::from(run.len)).step_by(PAGE_BYTES as usize) {
                        *written.entry((page / u64::from(PAGE_BYTES)) as u32).or_default() += 1;
                    }
                }
            }
            assert!(window.laid.pages.lock().unwrap().is_empty(), "pages are held that no slot asks for");
            if done {
                break;
            }
        }
        assert!(windows > 3, "{windows} windows");
        let (zero, overlaid) = (|page: u32| page / 16 % 10 == 3, map.overlaid().unwrap());
        for page in 0..131_072 {
            let expected = u32::from(!zero(page) || overlaid.contains(page));
            assert_eq!(written.get(&page).copied().unwrap_or(0), expected, "page {page}");
        }
    }
}
