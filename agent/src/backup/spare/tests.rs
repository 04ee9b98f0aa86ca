//! Plans applied to made-up files: what is put together from the parent and what was read is the file, byte for byte.

use proptest::prelude::*;
use walfleet_repository::format::file_map::{SLOT_BYTES, ShortId};
use walfleet_repository::format::sealed::FramePlace;
use walfleet_repository::ids::PackId;

use super::*;
use crate::postgres::relation::{Fork, RelationFile};

const PAGES_PER_SLOT: u32 = SLOT_BYTES / PAGE_BYTES;

fn place(number: u32) -> ChunkPlace {
    let frame = FramePlace { offset: number, stored_len: 1, raw_len: SLOT_BYTES };
    let mut id = ShortId::default();
    id.0[..4].copy_from_slice(&number.to_le_bytes());
    ChunkPlace { pack: PackId([1; 32]), frame, id }
}

/// A model of stored content: what each page of each chunk holds.
#[derive(Default)]
struct Chunks(Vec<Vec<u64>>);

impl Chunks {
    fn store(&mut self, pages: Vec<u64>) -> ChunkPlace {
        self.0.push(pages);
        place(self.0.len() as u32 - 1)
    }

    fn read(&self, map: &FileMap) -> Vec<u64> {
        let mut pages = vec![0; (map.size / u64::from(PAGE_BYTES)) as usize];
        let each = |place: &ChunkPlace, runs: &[walfleet_repository::format::file_map::Run]| {
            let chunk = &self.0[place.frame.offset as usize];
            for run in runs {
                for index in 0..run.len / PAGE_BYTES {
                    let to = (run.to / u64::from(PAGE_BYTES)) as usize + index as usize;
                    pages[to] = chunk[(run.from / PAGE_BYTES + index) as usize];
                }
            }
        };
        map.for_each_chunk(each).unwrap();
        pages
    }
}

/// One backup of `file` (a number for each page, 0 for a zero page) over its parent.
fn backup(chunks: &mut Chunks, parent: &FileMap, file: &[u64], changes: &FileChanges) -> (FileMap, ReadPlan) {
    let size = file.len() as u64 * u64::from(PAGE_BYTES);
    let plan = ReadPlan::new(parent, size, changes, |_| true);
    let mut map = FileMap { size, overlays: plan.kept_overlays(parent, size), ..parent.clone() };
    map.slots.resize(file.len().div_ceil(PAGES_PER_SLOT as usize), Slot::Zero);
    for slot in &plan.slots {
        let first = (slot * PAGES_PER_SLOT) as usize;
        let content = file[first..file.len().min(first + PAGES_PER_SLOT as usize)].to_vec();
        map.slots[*slot as usize] = match content.iter().all(|page| *page == 0) {
            true => Slot::Zero,
            false => Slot::Chunk(chunks.store(content)),
        };
    }
    for gathered in plan.pages.chunks(PAGES_PER_SLOT as usize) {
        let chunk = chunks.store(gathered.iter().map(|page| file[*page as usize]).collect());
        map.overlays.push(Overlay::of_chunk(chunk, gathered.iter().copied()));
    }
    (map, plan)
}

#[derive(Clone, Debug)]
enum Event {
    Write(Vec<u32>),
    Truncate(u32),
    Extend(u32),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => prop::collection::vec(0u32..200, 0..40).prop_map(Event::Write),
        1 => (0u32..200).prop_map(Event::Truncate),
        1 => (0u32..60).prop_map(Event::Extend),
    ]
}

proptest! {
    /// Chains of twenty backups over writes, truncations and extensions, each read back.
    #[test]
    fn every_backup_of_a_chain_reads_back(
        length in 0u32..200,
        rounds in prop::collection::vec(prop::collection::vec(event(), 0..4), 20),
    ) {
        let mut chunks = Chunks::default();
        let mut version = 1u64;
        let mut file: Vec<u64> = (0..length).map(|page| u64::from(page % 5) * 1000).collect();
        let empty = FileMap { slot_bytes: SLOT_BYTES, size: 0, slots: Vec::new(), overlays: Vec::new(), base: None };
        let (mut map, _) = backup(&mut chunks, &empty, &file, &FileChanges::default());
        prop_assert_eq!(&chunks.read(&map), &file);
        for events in rounds {
            let mut changes = FileChanges::default();
            for event in events {
                match event {
                    Event::Write(pages) => {
                        let length = file.len();
                        for page in pages.into_iter().filter(|page| (*page as usize) < length) {
                            version += 1;
                            file[page as usize] = version;
                            changes.pages.insert(page);
                        }
                    }
                    Event::Truncate(to) => {
                        file.truncate(to as usize);
                        let cut = u64::from(to) * u64::from(PAGE_BYTES);
                        changes.cut_to = Some(changes.cut_to.map_or(cut, |former| former.min(cut)));
                    }
                    // Zero pages are added without a record.
                    Event::Extend(by) => file.resize(file.len() + by as usize, 0),
                }
            }
            let (next, plan) = backup(&mut chunks, &map, &file, &changes);
            prop_assert_eq!(&chunks.read(&next), &file);
            FileMap::decode(&next.encode()).expect("no page is laid over twice");
            prop_assert!(!changes.is_untouched(next.size) || next.size < map.size || plan.slots.iter().all(|slot| {
                u64::from(*slot + 1) * u64::from(SLOT_BYTES) > map.size || map.slot_len(*slot as usize) < SLOT_BYTES
            }), "only what was added is read");
            map = next;
        }
    }
}

#[test]
fn a_slot_that_would_be_mostly_laid_over_is_stored_whole() {
    let size = 2 * u64::from(SLOT_BYTES);
    let slots = vec![Slot::Chunk(place(0)), Slot::Chunk(place(1))];
    let overlay = Overlay::of_chunk(place(2), 0..10);
    let parent = FileMap { slot_bytes: SLOT_BYTES, size, slots, overlays: vec![overlay], base: None };
    let changes = |pages: &[u32]| FileChanges { cut_to: None, pages: pages.iter().copied().collect() };
    let plan = |pages: &[u32]| ReadPlan::new(&parent, size, &changes(pages), |_| true);
    assert_eq!(plan(&[10, 11]), ReadPlan { slots: vec![], pages: vec![10, 11] });
    assert_eq!(plan(&[10, 11, 12]), ReadPlan { slots: vec![0], pages: vec![] });
    assert_eq!(plan(&[0, 1, 10, 11]).pages, [0, 1, 10, 11], "laid over again is not laid over more");
    assert!(ReadPlan::new(&parent, size, &changes(&[]), |_| true).is_empty());
    let lost = ReadPlan::new(&parent, size, &changes(&[]), |chunk| *chunk != place(2));
    assert_eq!(lost.slots, [0], "what a lost chunk was laid over is read");
    assert_eq!(ReadPlan::new(&parent, size, &changes(&[]), |chunk| *chunk != place(1)).slots, [1]);
}

#[test]
fn changes_of_a_relation_are_told_by_file() {
    let mut changed = ChangedBlocks::default();
    let name = ForkName { tablespace: 1663, database: 5, relation: 16384, fork: 0 };
    changed.change(name, 7);
    changed.change(name, 131_072 + 9);
    changed.cut(name, 131_072 + 100);
    changed.change_database(1663, 6);
    let since = Since { changed: Arc::new(changed), block_bytes: 8192, blocks_per_segment: 131_072 };
    let file = |database, number, fork, segment| RelationSegment {
        tablespace: 1663,
        database,
        file: RelationFile { number, fork, segment },
    };
    let of = |relation| since.changes_of(&relation);
    let first = of(file(5, 16384, Fork::Main, 0)).unwrap();
    assert_eq!((first.cut_to, first.pages.iter().collect::<Vec<_>>()), (None, vec![7]));
    assert!(first.is_untouched(7 * 8192) && !first.is_untouched(8 * 8192));
    let second = of(file(5, 16384, Fork::Main, 1)).unwrap();
    assert_eq!((second.cut_to, second.pages.iter().collect::<Vec<_>>()), (Some(100 * 8192), vec![9]));
    assert_eq!(of(file(5, 16384, Fork::Main, 2)).unwrap().cut_to, Some(0), "all behind the cut was gone");
    assert_eq!(of(file(5, 16385, Fork::Main, 0)), Some(FileChanges::default()));
    assert_eq!(of(file(5, 16384, Fork::VisibilityMap, 0)), None);
    assert_eq!(of(file(5, 16384, Fork::FreeSpaceMap, 0)), None);
    assert_eq!(of(file(6, 16385, Fork::Main, 0)), None, "its folder was copied");
    let wide = Since { block_bytes: 32_768, ..since };
    assert_eq!(
        wide.changes_of(&file(5, 16384, Fork::Main, 0)).unwrap().pages.iter().collect::<Vec<_>>(),
        [28, 29, 30, 31]
    );
}

#[test]
fn every_file_is_due_for_proof_once_in_a_period() {
    let day = 86_400_000_000i64;
    let begin = 1_780_000_000_000_000i64;
    for number in 0..200u32 {
        let path = format!("base/5/{number}").into_bytes();
        let due = |since_us, until_us| Proof { since_us, until_us, compares: true }.is_due(&path);
        let days = (0..60).filter(|at| due(begin + at * day, begin + (at + 1) * day)).count();
        assert_eq!(days, 2, "in sixty daily backups");
        assert!(due(begin, begin + 30 * day) && !due(begin, begin) && due(i64::MIN, begin));
    }
    let is_due = |number: u32| {
        let proof = Proof { since_us: begin, until_us: begin + day, compares: true };
        proof.is_due(format!("base/5/{number}").as_bytes())
    };
    let share = (0..3000).filter(|number| is_due(*number)).count();
    assert!((60..140).contains(&share), "about a thirtieth each day: {share}");
}
