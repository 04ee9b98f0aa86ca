//! Two data directories, compared file by file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use walfleet_repository::postgres::Lsn;

const PAGE: usize = 8192;

/// What holds a cluster's data. The rest is configuration, WAL, or worthless after a restart.
const DATA: [&str; 7] = ["base", "global", "pg_xact", "pg_multixact", "pg_commit_ts", "pg_twophase", "pg_tblspc"];

/// A restored directory against the one that was backed up, whose server is idle.
///
/// What a page has from after the backup's `start` is for replay to bring. Unless `hints` count, a page that only hint bits
/// changed may be the parent's.
pub fn must_be_the_same(source: &Path, restored: &Path, start: Lsn, hints: bool) -> anyhow::Result<()> {
    let (expected, found) = (listed(source)?, listed(restored)?);
    let names = |of: &BTreeMap<String, PathBuf>| of.keys().cloned().collect::<Vec<_>>();
    let without = |from: &BTreeMap<String, PathBuf>, other: &BTreeMap<String, PathBuf>| {
        names(from).into_iter().filter(|name| !other.contains_key(name)).collect::<Vec<_>>()
    };
    let (missing, extra) = (without(&expected, &found), without(&found, &expected));
    ensure!(missing.is_empty() && extra.is_empty(), "not restored: {missing:?}; restored in excess: {extra:?}");
    let mut differences = Vec::new();
    for (name, path) in &expected {
        let (mut live, mut copy) = (read(path)?, read(&found[name])?);
        if live == copy {
            continue;
        }
        if live.len() != copy.len() {
            differences.push(format!("{name}: {} bytes instead of {}", copy.len(), live.len()));
            continue;
        }
        for (block, (live, copy)) in live.chunks_mut(PAGE).zip(copy.chunks_mut(PAGE)).enumerate() {
            if live == copy || lsn(live) >= start {
                continue;
            }
            if !hints && live.len() == PAGE {
                without_hints(live);
                without_hints(copy);
            }
            if live != copy {
                let at: Vec<usize> = (0..live.len()).filter(|at| live[*at] != copy[*at]).take(8).collect();
                let (is, should) = (lsn(copy), lsn(live));
                differences.push(format!("{name}: page {block} of {is} instead of {should} differs at {at:?}"));
            }
        }
    }
    ensure!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
    Ok(())
}

/// Two restores of the same backup.
pub fn all_must_be_equal(one: &Path, other: &Path) -> anyhow::Result<()> {
    let (one, other) = (listed(one)?, listed(other)?);
    ensure!(one.keys().eq(other.keys()), "other files:\n{:?}\n{:?}", one.keys(), other.keys());
    for (name, path) in one {
        ensure!(read(&path)? == read(&other[&name])?, "{name} differs");
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// The files that belong into a backup, by their names below the data directory.
fn listed(data_dir: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    for part in DATA {
        list(&data_dir.join(part), part, &mut files)?;
    }
    // Of an unlogged relation only the init fork is backed up.
    let unlogged: Vec<String> = files.keys().filter_map(|name| name.strip_suffix("_init")).map(str::to_owned).collect();
    files.retain(|name, _| {
        let relation = name.rsplit_once('/').map_or(name.as_str(), |(_, file)| file).split(['_', '.']).next();
        let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
        let main = format!("{folder}/{}", relation.unwrap_or_default());
        name.ends_with("_init") || !unlogged.contains(&main)
    });
    Ok(files)
}

fn list(folder: &Path, name: &str, files: &mut BTreeMap<String, PathBuf>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        let excluded = file.starts_with("pg_internal.init") || file.starts_with("pgsql_tmp") || file == "pg_control";
        let temporary = file.starts_with('t') && file[1..].starts_with(|first: char| first.is_ascii_digit());
        if excluded || temporary {
            continue;
        }
        let below = format!("{name}/{file}");
        // Tablespaces are links.
        match std::fs::metadata(entry.path())?.is_dir() {
            true => list(&entry.path(), &below, files)?,
            false => drop(files.insert(below, entry.path())),
        }
    }
    Ok(())
}

fn u16_at(page: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([page[at], page[at + 1]])
}

fn u32_at(page: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

/// PageXLogRecPtr: the upper half first.
fn lsn(page: &[u8]) -> Lsn {
    match page.len() {
        PAGE => Lsn(u64::from(u32_at(page, 0)) << 32 | u64::from(u32_at(page, 4))),
        _ => Lsn(0),
    }
}

/// Clears what may change without WAL (src/backend/access/common/bufmask.c): hints in the page header, on line pointers,
/// on rows, and in what index pages say of themselves at their end.
fn without_hints(page: &mut [u8]) {
    let (lower, special) = (usize::from(u16_at(page, 12)).min(PAGE), usize::from(u16_at(page, 16)));
    // The checksum over all this; PD_HAS_FREE_LINES, PD_PAGE_FULL; pd_prune_xid.
    page[8..10].fill(0);
    page[10] &= !0x03;
    page[20..24].fill(0);
    // An image leaves out the hole, where rows that were removed may still be seen.
    let upper = usize::from(u16_at(page, 14)).min(PAGE);
    page[lower.min(upper)..upper].fill(0);
    for at in (24..lower).step_by(4).take_while(|at| at + 4 <= PAGE) {
        let pointer = u32_at(page, at);
        let (offset, kind) = ((pointer & 0x7FFF) as usize, pointer >> 15 & 3);
        // LP_DEAD to LP_NORMAL.
        if kind == 3 {
            page[at..at + 4].copy_from_slice(&(pointer & !(3 << 15) | 1 << 15).to_le_bytes());
        }
        // A heap page has no special space; t_cid, which replay does not bring, and t_infomask's bits for known outcomes.
        if special == PAGE && kind == 1 && offset + 23 <= PAGE {
            page[offset + 8..offset + 12].fill(0);
            page[offset + 21] &= !0x0F;
        }
    }
    // B-tree, hash and GiST: "has dead entries", and B-tree's vacuum cycle.
    if special == PAGE - 16 {
        page[special + 12] &= !0xD0;
        page[special + 14..special + 16].fill(0);
    }
}
