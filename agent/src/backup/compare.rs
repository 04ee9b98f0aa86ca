//! Where no WAL tells what changed: the slots of a file are held against the parent's own content, page by page, so that a
//! slot of which few pages differ is not stored whole.
//!
//! Content alone decides. A slot with the parent's id costs nothing but its hash; of the others the parent's chunks are
//! brought from the repository. Where that is in vain, since most pages of most slots differ, it ends.

use std::collections::BTreeMap;
use std::sync::Arc;

use roaring::RoaringBitmap;
use tokio::runtime::Handle;
use walfleet_repository::backup::fetch::chunks::ChunkReader;
use walfleet_repository::backup::file_list::PlacedOverlay;
use walfleet_repository::backup::write::{PackSession, PlacedSlot, WriteError, is_zero};
use walfleet_repository::format::file_map::{ChunkPlace, FileMap, SLOT_BYTES, Slot};
use walfleet_repository::format::overlay::{Overlay, OverlayPage, PAGE_BYTES};

use crate::backup::pages::GATHERED;
use crate::backup::spare::{ReadPlan, may_be_laid_over};
use crate::backup::stretch::{Reader, StretchError, StretchJob, StretchResult};

/// Bytes compared at once by one of so many threads: large enough that a store's latency is paid seldom, and small where many
/// pay it beside each other.
pub(super) fn batch_bytes(threads: usize) -> usize {
    let slots = if threads <= 4 { 32 } else { 8 };
    slots * SLOT_BYTES as usize
}

/// Slots of the parent that all threads may have in memory. With the pages laid over them, and what they are made of, each
/// takes up to 0.7 MiB.
pub(super) const SLOTS_HELD: usize = 64;

const PAGES_PER_SLOT: u32 = SLOT_BYTES / PAGE_BYTES;

/// For so many slots of a batch there may be one gathered chunk of half a megabyte: bounds memory. Slots beyond it are stored
/// whole.
const SLOTS_PER_OVERLAY: usize = 2;

/// So many of the parent's slots are looked at in a stretch before it counts how often that helped.
const TRIES: usize = 32;

/// Of those tried, one in so many has to be worth it.
const WORTH: usize = 4;

/// What a file's parent has, and how to get it.
#[derive(Clone)]
pub struct Former {
    pub map: Arc<FileMap>,
    pub chunks: Arc<ChunkReader>,
    pub runtime: Handle,
}

/// How a stretch was put together: what is neither in `whole` nor in `pages` is the parent's.
#[derive(Debug, Default)]
pub struct Compared {
    /// Slots stored anew, and those that are the parent's without the pages laid over it.
    pub whole: Vec<u32>,
    /// Pages laid over the parent's slots anew.
    pub pages: Vec<u32>,
    pub overlays: Vec<PlacedOverlay>,
    /// Pages that differ from the parent's, of slots whose parent's content was at hand.
    pub differing: RoaringBitmap,
}

/// How far looking at the parent has helped in a stretch.
#[derive(Default)]
pub(super) struct Worth {
    tried: usize,
    helped: usize,
}

impl Worth {
    fn is_hopeless(&self) -> bool {
        self.tried >= TRIES && self.helped * WORTH < self.tried
    }
}

impl Compared {
    pub fn absorb(&mut self, other: Compared) {
        self.whole.extend(other.whole);
        self.pages.extend(other.pages);
        self.overlays.extend(other.overlays);
        self.differing |= other.differing;
    }

    /// The overlays of a file that was compared in full: the parent's that stay, then the new ones.
    pub fn into_overlays(
        self,
        session: &PackSession,
        parent: &FileMap,
        size: u64,
    ) -> Result<Vec<PlacedOverlay>, WriteError> {
        let plan = ReadPlan { slots: self.whole, pages: self.pages };
        let mut overlays = super::copy::adopt_overlays(session, plan.kept_overlays(parent, size))?;
        overlays.extend(self.overlays);
        Ok(overlays)
    }
}

/// What a look at a slot alone tells.
enum Look<'a> {
    Placed(PlacedSlot),
    /// The parent has nothing there that it could be laid over.
    New,
    /// The parent has another version.
    Differs(Differing<'a>),
}

struct Differing<'a> {
    number: u32,
    base: ChunkPlace,
    overlays: Vec<(&'a Overlay, OverlayPage)>,
}

impl Reader<'_> {
    /// Places the slots of one batch, of which `first` is the first's number.
    pub(super) fn compare(
        &mut self,
        job: &StretchJob,
        former: &Former,
        first: u32,
        content: &[u8],
        (worth, result): (&mut Worth, &mut StretchResult),
    ) -> Result<(), StretchError> {
        let slots = || (first..).zip(content.chunks(SLOT_BYTES as usize));
        let looks: Vec<Look<'_>> = slots().map(|(number, slot)| self.look(former, number, slot)).collect();
        let differing = looks.iter().filter_map(|look| match look {
            Look::Differs(differing) => Some(differing),
            Look::Placed(_) | Look::New => None,
        });
        let differing: Vec<_> = differing.filter(|_| !worth.is_hopeless()).collect();
        let (parents, _held) = match differing.is_empty() {
            true => (BTreeMap::new(), None),
            false => {
                let held = former.runtime.block_on(self.counters.parents.acquire_many(looks.len() as u32));
                (self.parents(job, former, (differing.into_iter(), looks.len())), held.ok())
            }
        };
        let mut gathered = Gathered::default();
        for ((number, slot), look) in slots().zip(&looks) {
            if let Look::Placed(placed) = look {
                if *placed == PlacedSlot::Zero {
                    result.compared.whole.push(number);
                }
                result.slots.push(*placed);
                continue;
            }
            let laid = match (look, parents.get(&number)) {
                (Look::Differs(differing), Some(parent)) => {
                    worth.tried += 1;
                    let pages = differing_pages(number, slot, parent);
                    result.compared.differing.extend(&pages);
                    self.lay_over(differing, pages)
                }
                _ => None,
            };
            match laid {
                Some((base, pages)) => {
                    worth.helped += 1;
                    result.slots.push(base);
                    gathered.take(number, slot, &pages);
                    result.compared.pages.extend(pages);
                }
                None => {
                    result.compared.whole.push(number);
                    result.slots.push(PlacedSlot::Chunk(self.writer.store(slot, None)?));
                }
            }
        }
        self.store_gathered(&gathered, result)
    }

    fn look<'a>(&self, former: &'a Former, number: u32, slot: &[u8]) -> Look<'a> {
        if is_zero(slot) {
            return Look::Placed(PlacedSlot::Zero);
        }
        let Some(Slot::Chunk(base)) = former.map.slots.get(number as usize).copied() else { return Look::New };
        let overlays: Vec<_> = overlays_of(&former.map, number).collect();
        // A page that the file's end cuts cannot be laid over.
        let is_whole = slot.len() == base.frame.raw_len as usize && slot.len().is_multiple_of(PAGE_BYTES as usize);
        let is_at_hand = overlays.iter().all(|(overlay, _)| self.session.adopt(&overlay.chunk).is_some());
        match self.session.adopt(&base).filter(|_| is_at_hand) {
            Some(placed) if overlays.is_empty() && self.session.is_content_of(&base, slot) => {
                Look::Placed(PlacedSlot::Chunk(placed))
            }
            Some(_) if is_whole => Look::Differs(Differing { number, base, overlays }),
            Some(_) | None => Look::New,
        }
    }

    /// The parent's slot, and the pages that have to be laid over it; `None`: too many.
    fn lay_over(&self, differing: &Differing<'_>, pages: Vec<u32>) -> Option<(PlacedSlot, Vec<u32>)> {
        let kept = differing.overlays.iter().filter(|(_, page)| !pages.contains(&page.page)).count();
        let is_few = may_be_laid_over((pages.len() + kept) as u32, PAGES_PER_SLOT);
        let base = self.session.adopt(&differing.base).filter(|_| is_few)?;
        Some((PlacedSlot::Chunk(base), pages))
    }

    /// The parent's content of slots; those that cannot be brought are left out, and stored whole.
    fn parents<'a>(
        &self,
        job: &StretchJob,
        former: &Former,
        (differing, batch_slots): (impl Iterator<Item = &'a Differing<'a>>, usize),
    ) -> BTreeMap<u32, Vec<u8>> {
        let (mut bases, mut overlays) = (Vec::new(), Vec::new());
        let mut wanted = Vec::new();
        for slot in differing {
            let mut laid: Vec<ChunkPlace> = slot.overlays.iter().map(|(overlay, _)| overlay.chunk).collect();
            laid.retain(|place| !overlays.contains(place));
            laid.dedup();
            if (overlays.len() + laid.len()) * SLOTS_PER_OVERLAY <= batch_slots {
                overlays.extend(laid);
                bases.push(slot.base);
                wanted.push(slot);
            }
        }
        if wanted.is_empty() {
            return BTreeMap::new();
        }
        let places = [bases, overlays].concat();
        let bringing = self.cancel.run_until_cancelled(former.chunks.chunks(&places));
        let contents = match former.runtime.block_on(bringing) {
            Some(Ok(contents)) => contents,
            Some(Err(error)) => {
                tracing::warn!(path = %job.path.display(), "the parent's content does not read, and what differs is stored whole: {error}");
                return BTreeMap::new();
            }
            None => return BTreeMap::new(),
        };
        let content = |place: &ChunkPlace| {
            let index = places.iter().position(|known| known == place)?;
            contents.get(index)
        };
        let composed = wanted.into_iter().filter_map(|slot| {
            let mut plain = content(&slot.base)?.clone();
            for (overlay, page) in &slot.overlays {
                let from = (page.position * PAGE_BYTES) as usize;
                let new = content(&overlay.chunk)?.get(from..from + PAGE_BYTES as usize)?;
                let at = ((page.page % PAGES_PER_SLOT) * PAGE_BYTES) as usize;
                plain.get_mut(at..at + PAGE_BYTES as usize)?.copy_from_slice(new);
            }
            Some((slot.number, plain))
        });
        composed.collect()
    }

    fn store_gathered(&mut self, gathered: &Gathered, result: &mut StretchResult) -> Result<(), StretchError> {
        let contents = gathered.bytes.chunks(GATHERED * PAGE_BYTES as usize);
        for (content, pages) in contents.zip(gathered.pages.chunks(GATHERED)) {
            let chunk = self.writer.store(content, None)?;
            let pages = pages.iter().zip(0..).map(|(page, position)| OverlayPage { page: *page, position });
            result.compared.overlays.push(PlacedOverlay { chunk, pages: pages.collect() });
        }
        Ok(())
    }
}

/// Pages of one batch that are laid over the parent's slots.
#[derive(Default)]
struct Gathered {
    pages: Vec<u32>,
    bytes: Vec<u8>,
}

impl Gathered {
    fn take(&mut self, slot: u32, content: &[u8], pages: &[u32]) {
        for page in pages {
            let at = ((page - slot * PAGES_PER_SLOT) * PAGE_BYTES) as usize;
            if let Some(content) = content.get(at..at + PAGE_BYTES as usize) {
                self.bytes.extend_from_slice(content);
                self.pages.push(*page);
            }
        }
    }
}

/// The pages laid over a slot, each with what lays it.
fn overlays_of(map: &FileMap, number: u32) -> impl Iterator<Item = (&Overlay, OverlayPage)> {
    let (first, end) = (number * PAGES_PER_SLOT, (number + 1) * PAGES_PER_SLOT);
    map.overlays.iter().flat_map(move |overlay| {
        let from = overlay.pages.partition_point(|page| page.page < first);
        let pages = overlay.pages.get(from..).unwrap_or_default().iter();
        pages.take_while(move |page| page.page < end).map(move |page| (overlay, *page))
    })
}

/// The numbers of the pages, within the file, in which a slot differs from its parent.
fn differing_pages(number: u32, slot: &[u8], parent: &[u8]) -> Vec<u32> {
    let pages = slot.chunks(PAGE_BYTES as usize).zip(parent.chunks(PAGE_BYTES as usize));
    let differing = (number * PAGES_PER_SLOT..).zip(pages).filter(|(_, (now, former))| now != former);
    differing.map(|(page, _)| page).collect()
}
