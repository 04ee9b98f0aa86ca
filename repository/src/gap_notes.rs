//! Gaps, and what is known of them: who let go of the WAL and why, and who has acknowledged that it is missing.
//!
//! A gap is what the catalog shows ([`crate::recovery_window`]); a note only says more of it. One case is the other way round:
//! of WAL that was let go of and behind which nothing lies yet, the note is the first that tells.
//!
//! Where a server wrote with `wal_level = minimal` the WAL itself tells ([`crate::recovery_window::unlogged`]); such a gap counts as
//! recorded once that has ended, since a backup can begin behind it then.

use std::collections::BTreeMap;

use crate::format::gap_note::{GapNote, GapNoteError, GapNoteKind};
use crate::ids::ClusterName;
use crate::layout::{self, GapNoteName};
use crate::open::Repository;
use crate::postgres::{Lsn, WalBranch};
use crate::recovery_window::{BackupFacts, WalCatalog, WalGap, Windows};
use crate::signature::Signer;
use crate::store::{Creation, StoreError};

#[derive(Debug, thiserror::Error)]
pub enum GapNotesError {
    #[error("gap notes: {0}")]
    Store(#[from] StoreError),
    #[error("{key}: {source}")]
    Note { key: String, source: GapNoteError },
}

/// A gap with what is known of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KnownGap {
    pub gap: WalGap,
    /// Who had it last and no longer has it.
    pub recorded: Option<GapNote>,
    /// It alarms no more.
    pub acknowledged: Option<GapNote>,
}

/// Every gap, and what was noted of WAL that is there by now.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct KnownGaps {
    pub gaps: Vec<KnownGap>,
    pub filled: Vec<GapNote>,
}

/// Stores a note; returns once it is durable. The same note is there once.
pub async fn store(repository: &Repository, signer: &Signer, note: &GapNote) -> Result<(), GapNotesError> {
    let (name, object) = note.seal(signer, repository.id());
    match repository.store().create(&layout::gap_note(&note.cluster, &name), object).await? {
        Creation::Created => Ok(()),
        // Its name holds the hash of what it says; read, to be sure that it counts.
        Creation::AlreadyThere => read(repository, &note.cluster, &name).await.map(drop),
    }
}

pub async fn read(
    repository: &Repository,
    cluster: &ClusterName,
    name: &GapNoteName,
) -> Result<GapNote, GapNotesError> {
    let key = layout::gap_note(cluster, name);
    let object = repository.store().get(&key).await?;
    let note = GapNote::open(&repository.trust(), cluster, name, &object);
    note.map_err(|source| GapNotesError::Note { key: key.to_string(), source })
}

/// Puts notes to the gaps that they are about.
///
/// A record is about every gap that it touches. An acknowledgement is about those that it covers whole: of more WAL than
/// somebody knew of, nobody knows.
pub fn know(windows: &Windows, backups: &[BackupFacts], catalog: &WalCatalog, notes: &[GapNote]) -> KnownGaps {
    let mut gaps = windows.gaps.clone();
    let mut filled = Vec::new();
    for note in notes.iter().filter(|note| !windows.gaps.iter().any(|gap| touches(note, gap))) {
        if is_stored(catalog, note) {
            filled.push(note.clone());
        } else if note.kind == GapNoteKind::Recorded && is_needed(backups, note) {
            gaps.push(WalGap { wal: note.wal, from: note.from, to: note.to });
        }
    }
    let gaps = merged(gaps);
    let newest = |kind, fits: &dyn Fn(&GapNote) -> bool| {
        notes.iter().filter(|note| note.kind == kind && fits(note)).max_by_key(|note| note.at_us).cloned()
    };
    let known = |gap: WalGap| KnownGap {
        recorded: newest(GapNoteKind::Recorded, &|note| touches(note, &gap)).or_else(|| {
            let unlogged = catalog.unlogged_at(&gap).filter(|found| found.to.is_some());
            unlogged.map(|found| found.recorded.clone())
        }),
        acknowledged: newest(GapNoteKind::Acknowledged, &|note| covers(note, &gap)),
        gap,
    };
    KnownGaps { gaps: gaps.into_iter().map(known).collect(), filled }
}

/// What a begun segment lacks and the segments missing behind it are one gap to people.
fn merged(mut gaps: Vec<WalGap>) -> Vec<WalGap> {
    gaps.sort_unstable();
    let mut merged: Vec<WalGap> = Vec::new();
    for gap in gaps {
        match merged.last_mut() {
            Some(last) if last.wal == gap.wal && gap.from <= last.to => last.to = last.to.max(gap.to),
            _ => merged.push(gap),
        }
    }
    merged
}

fn touches(note: &GapNote, gap: &WalGap) -> bool {
    note.wal == gap.wal && note.from < gap.to && gap.from < note.to
}

fn covers(note: &GapNote, gap: &WalGap) -> bool {
    note.wal == gap.wal && note.from <= gap.from && gap.to <= note.to
}

/// Whether whole segments, or as much of one as counts, are there for all of it.
fn is_stored(catalog: &WalCatalog, note: &GapNote) -> bool {
    let Some(branch) = catalog.branches.get(&note.wal) else { return false };
    let size = branch.segment_size;
    let numbers = note.from.segment_number(size)..=Lsn(note.to.0.saturating_sub(1)).segment_number(size);
    let reaches = |number: u64| {
        let facts = branch.segments.get(&number);
        facts.is_some_and(|facts| !facts.is_begun || facts.records_end.is_some_and(|end| end >= note.to))
    };
    numbers.into_iter().all(reaches)
}

/// Whether any backup of the same system would replay it.
fn is_needed(backups: &[BackupFacts], note: &GapNote) -> bool {
    let of_system = backups.iter().filter(|backup| backup.wal.system_id == note.wal.system_id);
    of_system.map(|backup| backup.start_lsn).min().is_some_and(|first| first < note.to)
}

impl KnownGaps {
    /// Without what retention has let go of. What lies above a trim is promised still.
    pub fn above(self, trims: &BTreeMap<WalBranch, Lsn>) -> KnownGaps {
        let below = |wal: &WalBranch| trims.get(wal).copied().unwrap_or(Lsn::INVALID);
        let gaps = self.gaps.into_iter().filter(|known| known.gap.to > below(&known.gap.wal));
        let cut = |known: KnownGap| {
            let from = known.gap.from.max(below(&known.gap.wal));
            KnownGap { gap: WalGap { from, ..known.gap }, ..known }
        };
        KnownGaps { gaps: gaps.map(cut).collect(), ..self }
    }

    /// Whether a stretch of missing WAL is one that somebody has acknowledged.
    pub fn is_acknowledged(&self, wal: &WalBranch, from: Lsn, to: Lsn) -> bool {
        let within = |known: &&KnownGap| known.gap.wal == *wal && known.gap.from < to && from < known.gap.to;
        let mut touched = self.gaps.iter().filter(within).peekable();
        touched.peek().is_some() && touched.all(|known| known.acknowledged.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{Branch, Segment, SegmentSize, SystemId, Timeline};
    use crate::recovery_window::{BranchWal, recovery_windows};

    const WAL: WalBranch = WalBranch { system_id: SystemId(7), timeline: Timeline(1), branch: Branch::ROOT };

    fn lsn(segment: u64) -> Lsn {
        Lsn(segment << 24)
    }

    fn catalog(segments: impl IntoIterator<Item = u64>) -> WalCatalog {
        let segments = segments.into_iter().map(|number| Segment { timeline: Timeline(1), number });
        let branch = BranchWal::listed(SegmentSize::DEFAULT, segments, None);
        WalCatalog { branches: [(WAL, branch)].into(), ..WalCatalog::default() }
    }

    fn note(kind: GapNoteKind, from: u64, to: u64) -> GapNote {
        let (by, reason) = ("anna".to_owned(), "known".to_owned());
        let (from, to) = (lsn(from), lsn(to));
        GapNote { cluster: "orders".parse().unwrap(), wal: WAL, from, to, kind, by, reason, at_us: 1, since_us: 1 }
    }

    /// Gaps as (from, to, recorded, acknowledged), and how many notes are of WAL that is there.
    fn known(segments: impl IntoIterator<Item = u64>, notes: &[GapNote]) -> (Vec<(u64, u64, bool, bool)>, usize) {
        let backup = BackupFacts {
            id: "bk_1".parse().unwrap(),
            wal: WAL,
            start_lsn: lsn(2),
            stop_lsn: Lsn(lsn(2).0 + 100),
            stopped_at_us: 1,
        };
        let catalog = catalog(segments);
        let windows = recovery_windows(std::slice::from_ref(&backup), &catalog);
        let known = know(&windows, &[backup], &catalog, notes);
        let number = |lsn: Lsn| lsn.0 >> 24;
        let gap = |known: &KnownGap| {
            let (from, to) = (number(known.gap.from), number(known.gap.to));
            (from, to, known.recorded.is_some(), known.acknowledged.is_some())
        };
        (known.gaps.iter().map(gap).collect(), known.filled.len())
    }

    #[test]
    fn notes_go_with_the_gaps_they_are_about() {
        use GapNoteKind::{Acknowledged, Recorded};
        assert_eq!(known([2, 3, 6, 7], &[]), (vec![(4, 6, false, false)], 0));
        assert_eq!(known([2, 3, 6, 7], &[note(Recorded, 4, 6)]), (vec![(4, 6, true, false)], 0));
        let both = [note(Recorded, 4, 6), note(Acknowledged, 4, 6)];
        assert_eq!(known([2, 3, 6, 7], &both), (vec![(4, 6, true, true)], 0));
        assert_eq!(known([2, 3, 4, 6], &both), (vec![(5, 6, true, true)], 0), "what is left of it");
        assert_eq!(known(2..=7, &both), (vec![], 2), "it was filled");
        assert_eq!(known([2, 3, 7], &both), (vec![(4, 7, true, false)], 0), "nobody knew of so much");
    }

    #[test]
    fn what_retention_let_go_of_is_no_gap() {
        let of = |from, to| KnownGap {
            gap: WalGap { wal: WAL, from: lsn(from), to: lsn(to) },
            recorded: None,
            acknowledged: None,
        };
        let left = |below: u64| {
            let known = KnownGaps { gaps: vec![of(4, 6), of(7, 9)], filled: vec![] };
            let left = known.above(&[(WAL, lsn(below))].into()).gaps.into_iter();
            left.map(|known| (known.gap.from.0 >> 24, known.gap.to.0 >> 24)).collect::<Vec<_>>()
        };
        assert_eq!(left(4), [(4, 6), (7, 9)]);
        assert_eq!(left(5), [(5, 6), (7, 9)]);
        assert_eq!((left(6), left(9)), (vec![(7, 9)], vec![]));
    }

    #[test]
    fn what_lies_side_by_side_is_one_gap() {
        let gap = |from: u64, to: u64| WalGap { wal: WAL, from: Lsn(from), to: Lsn(to) };
        assert_eq!(merged(vec![gap(5, 9), gap(2, 3), gap(3, 5), gap(20, 30)]), [gap(2, 9), gap(20, 30)]);
    }

    #[test]
    fn what_was_let_go_of_shows_before_anything_lies_behind_it() {
        use GapNoteKind::{Acknowledged, Recorded};
        assert_eq!(known([2, 3], &[note(Recorded, 4, 6)]), (vec![(4, 6, true, false)], 0));
        assert_eq!(known([2, 3], &[note(Acknowledged, 4, 6)]), (vec![], 0), "an acknowledgement makes no gap");
        assert_eq!(known([2, 3], &[note(Recorded, 1, 2)]), (vec![], 0), "no backup needs it");
    }
}
