//! The names in one directory that the rules leave, sorted, held densely: a database may have a million files.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType};
use rustix::io::Errno;

use super::rules::{self, Room};
use crate::postgres::relation::{Fork, RelationFile};

/// Sorted such that walking it in order, and each directory at its descent, gives the byte order of whole paths. A
/// directory stands twice: by its name, and by its name with a slash, where its content belongs.
#[derive(Debug, Default)]
pub(super) struct Listing {
    names: Vec<u8>,
    /// Start and length in `names`.
    places: Vec<(u32, u16)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Item<'a> {
    Entry(&'a [u8]),
    Descent(&'a [u8]),
}

impl<'a> Item<'a> {
    pub fn name(self) -> &'a [u8] {
        match self {
            Item::Entry(name) | Item::Descent(name) => name,
        }
    }
}

impl Listing {
    pub fn read(directory: &OwnedFd, room: Room, version_directory: &[u8]) -> Result<Listing, Errno> {
        let unlogged = if room.holds_relations() { unlogged_relations(directory)? } else { HashSet::new() };
        let is_unlogged_content = |name: &[u8]| {
            !unlogged.is_empty()
                && RelationFile::parse(name)
                    .is_some_and(|file| file.fork != Fork::Init && unlogged.contains(&file.number))
        };
        let mut listing = Listing::default();
        for_each_entry(directory, |name, kind| {
            if room.excludes(name, version_directory) || is_unlogged_content(name) {
                return;
            }
            listing.push(&[name]);
            let enters = match kind {
                FileType::Directory => true,
                // An external tablespace, or a pg_wal that lies elsewhere and has made-up content anyway.
                FileType::Symlink => room == Room::TablespaceFolder || (room == Room::Top && name == b"pg_wal"),
                _ => false,
            };
            let emptied = matches!(room.below(name, version_directory), Room::Emptied);
            let skipped = room == Room::Top && name == b"lost+found";
            let strange = room == Room::TablespaceFolder && rules::oid(name).is_none();
            if enters && !emptied && !skipped && !strange {
                listing.push(&[name, b"/"]);
            }
        })?;
        listing.sort();
        Ok(listing)
    }

    /// What a restored `pg_wal` must have: its directories, none of its content.
    pub fn of_wal(major: u32) -> Listing {
        let mut listing = Listing::default();
        listing.push(&[b"archive_status"]);
        if major >= 17 {
            listing.push(&[b"summaries"]);
        }
        listing
    }

    pub fn get(&self, index: usize) -> Option<Item<'_>> {
        let place = self.places.get(index)?;
        let name = self.name(*place);
        Some(name.strip_suffix(b"/").map_or(Item::Entry(name), Item::Descent))
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    fn name(&self, (start, length): (u32, u16)) -> &[u8] {
        let start = start as usize;
        self.names.get(start..start + usize::from(length)).unwrap_or_default()
    }

    fn push(&mut self, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        // Names have at most 255 bytes, so 4 GiB of them are more than any directory holds.
        let (Ok(start), Ok(length)) = (u32::try_from(self.names.len()), u16::try_from(length)) else { return };
        self.places.push((start, length));
        parts.iter().for_each(|part| self.names.extend_from_slice(part));
    }

    fn sort(&mut self) {
        let mut places = std::mem::take(&mut self.places);
        places.sort_unstable_by(|a, b| self.name(*a).cmp(self.name(*b)));
        self.places = places;
    }
}

/// Relations that have an init fork: a first pass, so that the names need be held only once and without the excluded.
/// A relation that becomes unlogged later has its files taken, and reset by recovery (ResetUnloggedRelations).
fn unlogged_relations(directory: &OwnedFd) -> Result<HashSet<u32>, Errno> {
    let mut found = HashSet::new();
    for_each_entry(directory, |name, _| found.extend(rules::unlogged(name)))?;
    Ok(found)
}

/// All names with their kinds; for small directories.
pub(super) fn entries(directory: &OwnedFd) -> Result<Vec<(Vec<u8>, FileType)>, Errno> {
    let mut found = Vec::new();
    for_each_entry(directory, |name, kind| found.push((name.to_vec(), kind)))?;
    Ok(found)
}

fn for_each_entry(directory: &OwnedFd, mut each: impl FnMut(&[u8], FileType)) -> Result<(), Errno> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        let kind = match entry.file_type() {
            // Some file systems do not say.
            FileType::Unknown => match rustix::fs::statat(directory.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error),
            },
            known => known,
        };
        each(name, kind);
    }
    Ok(())
}
