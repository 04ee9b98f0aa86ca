//! Judges data pages as they are read: checksum, header, and whether WAL will repair them anyway
//! (src/include/storage/checksum_impl.h, bufpage.h; PageIsVerified, src/backend/storage/page/bufpage.c;
//! verify_page_checksum, src/backend/backup/basebackup.c).
//!
//! A page that is being written while it is read looks damaged: whoever finds one reads it again before believing it.

use walfleet_repository::postgres::Lsn;

use super::bytes;

/// Of one relation file.
#[derive(Clone, Copy, Debug)]
pub struct PageRules {
    /// BLCKSZ, from pg_control.
    pub block_bytes: usize,
    /// Whether the cluster has data checksums.
    pub checksums: bool,
    /// Pages changed at or after this are replayed from WAL, whatever they look like now.
    pub start_lsn: Lsn,
    /// No page may claim a change behind this, the end of WAL as known when the page was read. If a page does, ask the
    /// server again before believing that it is damage.
    pub end_lsn: Lsn,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageVerdict {
    Intact,
    /// All zero: allocated, never written.
    New,
    /// Changed since the backup began.
    Replayed,
    Damaged(Damage),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    Checksum {
        stored: u16,
        computed: u16,
    },
    /// Bounds or flags that no page has.
    Header,
    /// Changed by WAL that does not exist.
    Future {
        lsn: Lsn,
    },
}

/// A page of a buffer that is not intact, new or to be replayed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SuspiciousPage {
    /// Of the page in the buffer.
    pub index: usize,
    /// Within the whole relation fork.
    pub block: u32,
    pub damage: Damage,
}

/// Of a block within the whole fork: checksums and reports count over all segments of a relation.
pub fn first_block_of_segment(segment: u32, blocks_per_segment: u32) -> u32 {
    segment.wrapping_mul(blocks_per_segment)
}

impl PageRules {
    /// Judges consecutive whole pages, the first of which is `first_block` of its fork. A rest shorter than a page is
    /// not looked at.
    pub fn suspicious(&self, pages: &[u8], first_block: u32) -> Vec<SuspiciousPage> {
        let mut found = Vec::new();
        for (index, page) in pages.chunks_exact(self.block_bytes.max(MIN_BLOCK)).enumerate() {
            let block = first_block.wrapping_add(index as u32);
            if self.is_plainly_intact(page, block) {
                continue;
            }
            if let PageVerdict::Damaged(damage) = self.judge(page, block) {
                found.push(SuspiciousPage { index, block, damage });
            }
        }
        found
    }

    /// The common case, one branch a page: everything is right about it, so that nothing else need be asked.
    fn is_plainly_intact(&self, page: &[u8], block: u32) -> bool {
        let Some(header) = PageHeader::read(page) else { return false };
        let right = !self.checksums || checksum(page, block) == header.checksum;
        right & header.is_sane(page.len()) & (header.lsn <= self.end_lsn)
    }

    /// Whether WAL from the backup's start on changed it: replay brings it about, whatever was read.
    pub fn is_replayed(&self, page: &[u8]) -> bool {
        PageHeader::read(page).is_some_and(|header| header.lsn >= self.start_lsn)
    }

    pub fn judge(&self, page: &[u8], block: u32) -> PageVerdict {
        let Some(header) = PageHeader::read(page) else { return PageVerdict::Damaged(Damage::Header) };
        if header.upper == 0 && page.iter().all(|byte| *byte == 0) {
            return PageVerdict::New;
        }
        if header.lsn > self.end_lsn {
            return PageVerdict::Damaged(Damage::Future { lsn: header.lsn });
        }
        if header.lsn >= self.start_lsn {
            return PageVerdict::Replayed;
        }
        if self.checksums {
            let computed = checksum(page, block);
            if computed != header.checksum {
                return PageVerdict::Damaged(Damage::Checksum { stored: header.checksum, computed });
            }
        }
        if header.is_sane(page.len()) { PageVerdict::Intact } else { PageVerdict::Damaged(Damage::Header) }
    }
}

/// Whether it is an SP-GiST index's first page (SpGistMetaPageData, SpGistPageOpaqueData;
/// src/include/access/spgist_private.h).
pub fn is_spgist_metapage(page: &[u8]) -> bool {
    let (magic, page_id) = (bytes::u32_at(page, CONTENTS_OFFSET), bytes::u16_at(page, page.len().saturating_sub(2)));
    magic == Some(SPGIST_MAGIC_NUMBER) && page_id == Some(SPGIST_PAGE_ID)
}

const SPGIST_MAGIC_NUMBER: u32 = 0xBA0B_ABEE;
const SPGIST_PAGE_ID: u16 = 0xFF82;
/// PageGetContents: behind the header, aligned.
const CONTENTS_OFFSET: usize = 24;

/// BLCKSZ is 1 to 32 KiB (configure --with-blocksize).
const MIN_BLOCK: usize = 1 << 10;
/// PD_VALID_FLAG_BITS.
const VALID_FLAGS: u16 = 0x7;
const CHECKSUM_OFFSET: usize = 8;

/// PageHeaderData.
struct PageHeader {
    lsn: Lsn,
    checksum: u16,
    flags: u16,
    lower: u16,
    upper: u16,
    special: u16,
}

impl PageHeader {
    fn read(page: &[u8]) -> Option<PageHeader> {
        let head: &[u8; 18] = page.first_chunk()?;
        // PageXLogRecPtr: the high half first.
        let lsn = u64::from(bytes::u32_at(head, 0)?) << 32 | u64::from(bytes::u32_at(head, 4)?);
        Some(PageHeader {
            lsn: Lsn(lsn),
            checksum: bytes::u16_at(head, CHECKSUM_OFFSET)?,
            flags: bytes::u16_at(head, 10)?,
            lower: bytes::u16_at(head, 12)?,
            upper: bytes::u16_at(head, 14)?,
            special: bytes::u16_at(head, 16)?,
        })
    }

    fn is_sane(&self, page_bytes: usize) -> bool {
        (self.flags & !VALID_FLAGS == 0)
            & (self.upper != 0)
            & (self.lower <= self.upper)
            & (self.upper <= self.special)
            & (usize::from(self.special) <= page_bytes)
            & self.special.is_multiple_of(8)
    }
}

const LANES: usize = 32;
const FNV_PRIME: u32 = 16_777_619;

/// checksumBaseOffsets.
const BASE_OFFSETS: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// pg_checksum_page: of the page with its checksum field zeroed, mixed with its block number, never zero.
pub fn checksum(page: &[u8], block: u32) -> u16 {
    let mut sums = BASE_OFFSETS;
    let mut rows = page.chunks_exact(LANES * 4);
    if let Some(first) = rows.next().and_then(|row| row.first_chunk::<{ LANES * 4 }>()) {
        let mut first = *first;
        first[CHECKSUM_OFFSET] = 0;
        first[CHECKSUM_OFFSET + 1] = 0;
        mix(&mut sums, &first);
    }
    for row in rows {
        if let Some(row) = row.first_chunk() {
            mix(&mut sums, row);
        }
    }
    let zeroes = [0; LANES * 4];
    mix(&mut sums, &zeroes);
    mix(&mut sums, &zeroes);
    let folded = sums.into_iter().fold(0, |folded, sum| folded ^ sum);
    ((folded ^ block) % 65_535 + 1) as u16
}

/// One round of CHECKSUM_COMP in every lane.
#[inline(always)]
fn mix(sums: &mut [u32; LANES], row: &[u8; LANES * 4]) {
    for (sum, word) in sums.iter_mut().zip(row.as_chunks::<4>().0) {
        let mixed = *sum ^ u32::from_le_bytes(*word);
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::relation::RelationFile;
    use super::super::test_server::{TestServer, oldest_and_newest};
    use super::*;

    /// Known answers of an implementation of its own, which agrees with servers' pages.
    #[test]
    fn checksums_are_postgres_s_and_depend_on_the_block() {
        let page: Vec<u8> = (0..8192).map(|i| ((i * 7 + i / 256) % 251) as u8).collect();
        let computed = [0, 1, 131_072, 4_294_967_294].map(|block| checksum(&page, block));
        assert_eq!(computed, [1648, 1649, 1650, 63888]);
    }

    fn rules(checksums: bool) -> PageRules {
        PageRules { block_bytes: 8192, checksums, start_lsn: Lsn(0x1000), end_lsn: Lsn(0x2000) }
    }

    /// A heap page with some content, changed at `lsn`, with a right checksum.
    fn page(lsn: u64, block: u32) -> Vec<u8> {
        let mut page = vec![0; 8192];
        page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
        page[12..14].copy_from_slice(&28u16.to_le_bytes());
        page[14..16].copy_from_slice(&8000u16.to_le_bytes());
        page[16..18].copy_from_slice(&8192u16.to_le_bytes());
        page[18..20].copy_from_slice(&0x2004u16.to_le_bytes());
        page[8000..].fill(0x5A);
        seal(&mut page, block);
        page
    }

    fn seal(page: &mut [u8], block: u32) {
        let sum = checksum(page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
    }

    #[test]
    fn verdicts_follow_the_page_s_age() {
        let rules = rules(true);
        assert_eq!(rules.judge(&page(0x800, 7), 7), PageVerdict::Intact);
        assert_eq!(rules.judge(&vec![0; 8192], 7), PageVerdict::New);
        assert_eq!(rules.judge(&page(0x1000, 7), 8), PageVerdict::Replayed, "WAL repairs it, whatever it holds");
        let lsn = Lsn(0x2001);
        assert_eq!(rules.judge(&page(lsn.0, 7), 7), PageVerdict::Damaged(Damage::Future { lsn }));
        let moved = rules.judge(&page(0x800, 7), 8);
        assert!(matches!(moved, PageVerdict::Damaged(Damage::Checksum { .. })), "of another block");
        let mut torn = page(0x800, 7);
        torn[8191] ^= 1;
        assert!(matches!(rules.judge(&torn, 7), PageVerdict::Damaged(Damage::Checksum { .. })));
        let mut nearly_new = vec![0; 8192];
        nearly_new[8191] = 1;
        assert!(matches!(rules.judge(&nearly_new, 7), PageVerdict::Damaged(_)));
        assert_eq!(rules.judge(&[], 7), PageVerdict::Damaged(Damage::Header));
    }

    #[test]
    fn without_checksums_headers_alone_are_judged() {
        let rules = rules(false);
        let mut changed = page(0x800, 7);
        changed[8191] ^= 1;
        assert_eq!(rules.judge(&changed, 7), PageVerdict::Intact);
        for (at, value) in [(10, 0x80), (13, 0xFF), (15, 0xFF), (17, 0xFF), (16, 1)] {
            let mut page = page(0x800, 7);
            page[at] = value;
            assert_eq!(rules.judge(&page, 7), PageVerdict::Damaged(Damage::Header), "byte {at}");
        }
    }

    #[test]
    fn a_buffer_s_suspicious_pages_are_named_by_place_and_block() {
        let first = first_block_of_segment(2, 131_072);
        assert_eq!(first, 262_144);
        let mut pages: Vec<u8> = (0..8).flat_map(|n| page(if n == 3 { 0x1800 } else { 0x800 }, first + n)).collect();
        pages[2 * 8192..3 * 8192].fill(0);
        pages[3 * 8192 + 100] = 1;
        pages[5 * 8192 + 100] = 1;
        pages.extend([0xFF; 100]);
        let found = rules(true).suspicious(&pages, first);
        let places: Vec<_> = found.iter().map(|page| (page.index, page.block)).collect();
        assert_eq!(places, [(5, first + 5)]);
    }

    #[test]
    fn every_page_of_real_clusters_is_right_and_any_flipped_byte_is_found() {
        for installation in oldest_and_newest() {
            let server = TestServer::start(&installation, &["--data-checksums"], "");
            server.stop("fast");
            let far = Lsn(u64::MAX);
            let rules = PageRules { block_bytes: 8192, checksums: true, start_lsn: far, end_lsn: far };
            let mut pages = 0;
            for folder in ["global", "base/1"] {
                for entry in fs::read_dir(server.data_dir.join(folder)).unwrap() {
                    let entry = entry.unwrap();
                    if RelationFile::parse(entry.file_name().as_encoded_bytes()).is_none() {
                        continue;
                    }
                    let mut content = fs::read(entry.path()).unwrap();
                    assert_eq!(rules.suspicious(&content, 0), [], "{}", entry.path().display());
                    pages += content.len() / 8192;
                    for at in [9, 20, 4000, 8191] {
                        let Some(byte) = content.get_mut(at) else { continue };
                        *byte ^= 0x10;
                        assert_eq!(rules.suspicious(&content, 0).len(), 1, "byte {at} of {}", entry.path().display());
                        content[at] ^= 0x10;
                    }
                }
            }
            assert!(pages > 500, "{pages}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_first_page_of_an_spgist_index_is_told_from_all_others() {
        for installation in oldest_and_newest() {
            let server = TestServer::start(&installation, &[], "");
            let rows = "CREATE TABLE p AS SELECT point(i, i) AS at FROM generate_series(1, 5000) i";
            server.sql(&[rows, "CREATE INDEX ON p USING spgist (at)"]).await;
            server.stop("fast");
            let databases = fs::read_dir(server.data_dir.join("base")).unwrap();
            let files = databases.flat_map(|database| fs::read_dir(database.unwrap().path()).unwrap());
            let contents = files.map(|file| fs::read(file.unwrap().path()).unwrap());
            let pages: Vec<bool> =
                contents.flat_map(|file| file.chunks(8192).map(is_spgist_metapage).collect::<Vec<_>>()).collect();
            assert!(pages.len() > 1000 && pages.iter().filter(|is_one| **is_one).count() == 1, "{}", pages.len());
        }
    }
}
