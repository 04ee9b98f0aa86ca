//! Where WAL was written with `wal_level = minimal`. A request for each such stretch and one for the segment in which it
//! begins, once; and those that find the last commit before it.

use super::note_newest_commit;
use crate::format::gap_note::{GapNote, GapNoteKind};
use crate::layout::{WalLevelClass, WalLevelName};
use crate::postgres::{Lsn, WalBranch};
use crate::recovery_window::{SegmentCommits, Unlogged, WalCatalog};
use crate::wal_archive::{ArchiveError, Strays, WalArchive, ended_by};

const REASON: &str = "the server ran with wal_level=minimal: no backup from before can be recovered beyond that";

/// Takes in those of a branch. What else lies there of it must be known.
pub(super) async fn note(
    archive: &WalArchive,
    catalog: &mut WalCatalog,
    wal: WalBranch,
    (levels, strays): (&[WalLevelName], &Strays),
) -> Result<(), ArchiveError> {
    let to_minimal = |name: &&WalLevelName| name.wal == wal && name.level == WalLevelClass::Minimal;
    for name in levels.iter().filter(to_minimal) {
        let Some(branch) = catalog.branches.get(&wal) else { return Ok(()) };
        let number = name.at.segment_number(branch.segment_size);
        let is_whole = branch.segments.get(&number).map(|facts| !facts.is_begun);
        let Some(note) = archive.level_note(name, branch.segment_size, strays, is_whole).await? else { continue };
        let to = ended_by(levels, name);
        let recorded = GapNote {
            cluster: archive.cluster().clone(),
            wal,
            from: name.at,
            to: to.unwrap_or(Lsn(u64::MAX)),
            kind: GapNoteKind::Recorded,
            by: note.member,
            reason: REASON.to_owned(),
            at_us: note.at_us,
            since_us: note.at_us,
        };
        let commits_before = note.commits_before;
        catalog.unlogged.push(Unlogged { wal, from: name.at, to, commits_before, recorded });
        if let (SegmentCommits::None, Some(before)) = (commits_before, number.checked_sub(1)) {
            note_newest_commit(archive, catalog, wal, before).await?;
        }
    }
    Ok(())
}
