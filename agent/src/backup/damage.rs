//! Pages that are not as they should be: the first of a backup by name, all of them by number.
//!
//! A failing disk has millions, so what is held does not grow with them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::sync::Arc;

use walfleet_repository::format::manifest::DamagedPages;
use walfleet_repository::postgres::Lsn;

use crate::postgres::page::{Damage, SuspiciousPage};

/// Pages that the log and the manifest name: whoever has more needs another disk before another line.
pub const NAMED: usize = 100;

/// Pages from the future that are held until the end of the backup is known.
const FUTURES: usize = 10_000;

/// A page that is not as it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadPage {
    /// Within the whole relation fork.
    pub block: u32,
    pub damage: Damage,
}

/// Of one stretch of a file.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct BadPages {
    /// The first [`NAMED`] whose damage is certain.
    named: Vec<BadPage>,
    /// All whose damage is certain.
    certain: u64,
    /// With a change from a future, which is damage only if that is behind the end of the backup.
    futures: Vec<(u32, Lsn)>,
}

impl BadPages {
    pub fn push(&mut self, page: &SuspiciousPage) {
        if let Damage::Future { lsn } = page.damage {
            self.futures.push((page.block, lsn));
            return;
        }
        self.certain += 1;
        if self.named.len() < NAMED {
            self.named.push(BadPage { block: page.block, damage: page.damage });
        }
    }

    pub fn is_empty(&self) -> bool {
        self.certain == 0 && self.futures.is_empty()
    }
}

/// Of one backup, while it runs.
#[derive(Default, Debug)]
pub struct DamageLog {
    named: Vec<NamedPage>,
    certain: u64,
    /// Those furthest in the future: the first to be damage, whatever the end.
    futures: BinaryHeap<Reverse<Future>>,
    /// How far the furthest of those reaches that were not held.
    dropped: Option<Lsn>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Future {
    lsn: Lsn,
    path: Arc<str>,
    block: u32,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamedPage {
    pub path: Arc<str>,
    pub page: BadPage,
}

impl DamageLog {
    pub fn add(&mut self, path: &[u8], pages: &BadPages) {
        if pages.is_empty() {
            return;
        }
        let path: Arc<str> = String::from_utf8_lossy(path).into();
        self.certain += pages.certain;
        let room = NAMED.saturating_sub(self.named.len());
        let named = pages.named.iter().take(room).map(|page| NamedPage { path: path.clone(), page: *page });
        self.named.extend(named);
        for (block, lsn) in &pages.futures {
            self.futures.push(Reverse(Future { lsn: *lsn, path: path.clone(), block: *block }));
            if self.futures.len() > FUTURES {
                let dropped = self.futures.pop().map(|Reverse(future)| future.lsn);
                self.dropped = self.dropped.max(dropped);
            }
        }
    }

    /// What is really damaged, now that the end of the backup is known.
    pub fn judge(self, stop_lsn: Lsn) -> DamageReport {
        let real = self.futures.into_sorted_vec().into_iter().map(|Reverse(future)| future);
        let real: Vec<Future> = real.filter(|future| future.lsn > stop_lsn).collect();
        let count = self.certain + real.len() as u64;
        let mut named = self.named;
        let futures = real.into_iter().map(|Future { lsn, path, block }| {
            let damage = Damage::Future { lsn };
            NamedPage { path, page: BadPage { block, damage } }
        });
        named.extend(futures.take(NAMED.saturating_sub(named.len())));
        named.sort_by(|a, b| (&a.path, a.page.block).cmp(&(&b.path, b.page.block)));
        DamageReport { named, count, is_exact: self.dropped.is_none_or(|lsn| lsn <= stop_lsn) }
    }
}

/// The damage of a whole backup.
#[derive(PartialEq, Eq, Debug)]
pub struct DamageReport {
    /// By path and block, [`NAMED`] at most.
    pub named: Vec<NamedPage>,
    /// Never more than there are.
    pub count: u64,
    /// Otherwise there are more.
    pub is_exact: bool,
}

impl DamageReport {
    fn files(&self) -> impl Iterator<Item = (&Arc<str>, &[NamedPage])> {
        let files = self.named.chunk_by(|a, b| a.path == b.path);
        files.filter_map(|pages| Some((&pages.first()?.path, pages)))
    }

    pub fn for_manifest(&self) -> Vec<DamagedPages> {
        let blocks = |pages: &[NamedPage]| pages.iter().map(|page| page.page.block).collect();
        self.files().map(|(path, pages)| DamagedPages { path: path.to_string(), blocks: blocks(pages) }).collect()
    }

    /// Into the log, a line for each file.
    pub fn tell(&self) {
        for (path, pages) in self.files() {
            let blocks: Vec<String> = pages.iter().map(|page| page.page.to_string()).collect();
            let blocks = blocks.join(", ");
            tracing::warn!(%path, blocks, "damaged pages, read several times; they are backed up as they are");
        }
        if self.count > self.named.len() as u64 {
            let count = format!("{}{}", if self.is_exact { "" } else { "at least " }, self.count);
            tracing::warn!(count, named = self.named.len(), "more pages are damaged than are named");
        }
    }
}

impl fmt::Display for BadPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.damage {
            Damage::Checksum { stored, computed } => {
                write!(f, "{} (checksum {stored:04x}, expected {computed:04x})", self.block)
            }
            Damage::Header => write!(f, "{} (no page's header)", self.block),
            Damage::Future { lsn } => write!(f, "{} (changed at {lsn}, behind the end of WAL)", self.block),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(block: u32, damage: Damage) -> SuspiciousPage {
        SuspiciousPage { index: 0, block, damage }
    }

    fn bad(pages: impl IntoIterator<Item = SuspiciousPage>) -> BadPages {
        let mut bad = BadPages::default();
        pages.into_iter().for_each(|page| bad.push(&page));
        bad
    }

    const WRONG: Damage = Damage::Checksum { stored: 0x12, computed: 0xABCD };

    #[test]
    fn all_are_counted_and_the_first_are_named() {
        let mut log = DamageLog::default();
        log.add(b"base/1/2", &bad([page(7, WRONG), page(9, Damage::Header)]));
        log.add(b"base/1/3", &bad((0..131_072).map(|block| page(block, WRONG))));
        log.add(b"base/1/4", &bad([page(1, WRONG)]));
        let report = log.judge(Lsn(100));
        assert_eq!((report.count, report.named.len(), report.is_exact), (131_075, NAMED, true));
        let manifest = report.for_manifest();
        assert_eq!(manifest[0], DamagedPages { path: "base/1/2".into(), blocks: vec![7, 9] });
        assert_eq!((manifest.len(), manifest[1].blocks.len()), (2, NAMED - 2));
        assert_eq!(report.named[0].page.to_string(), "7 (checksum 0012, expected abcd)");
    }

    #[test]
    fn a_change_from_the_future_is_damage_only_behind_the_end_and_never_overcounted() {
        let futures = |lsns: std::ops::Range<u64>| {
            let mut log = DamageLog::default();
            log.add(b"x", &bad(lsns.map(|lsn| page(lsn as u32, Damage::Future { lsn: Lsn(lsn) }))));
            log.judge(Lsn(20_000))
        };
        let few = futures(19_990..20_003);
        assert_eq!(few.for_manifest(), [DamagedPages { path: "x".into(), blocks: vec![20_001, 20_002] }]);
        assert_eq!((few.count, few.is_exact), (2, true));
        let many = futures(0..25_001);
        assert_eq!((many.count, many.is_exact), (5_000, true), "what was not held is before the end");
        let too_many = futures(0..35_001);
        assert_eq!((too_many.count, too_many.is_exact), (FUTURES as u64, false));
    }
}
