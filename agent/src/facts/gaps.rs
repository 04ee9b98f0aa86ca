//! Gaps, as facts and lists show them. Notes never change, nor does what lies around a gap: both are read once.

use std::collections::BTreeMap;

use walfleet_repository::cluster::OpenCluster;
use walfleet_repository::format::gap_note::{self, GapNoteError, GapNoteKind};
use walfleet_repository::gap_notes::{self, GapNotesError, KnownGaps};
use walfleet_repository::layout::GapNoteName;
use walfleet_repository::recovery_window::{self, WalCatalog};
use walfleet_repository::wal_archive::WalArchive;
use walfleet_repository::wal_catalog::gap_edges::{self, Edges};

use super::repository::time;
use super::{GapNote, WalGap};
use crate::identity::connect::chain;

#[derive(Default)]
pub struct GapLooks {
    /// `None`: it is nobody's who may say so.
    notes: BTreeMap<GapNoteName, Option<gap_note::GapNote>>,
    edges: BTreeMap<recovery_window::WalGap, Edges>,
}

impl GapLooks {
    /// Reads the notes that are not known yet; returns what does not read.
    pub async fn read_notes(&mut self, cluster: &OpenCluster, names: &[GapNoteName]) -> Vec<String> {
        self.notes.retain(|name, _| names.contains(name));
        let mut problems = Vec::new();
        for name in names {
            if self.notes.contains_key(name) {
                continue;
            }
            match gap_notes::read(cluster.repository(), cluster.name(), name).await {
                Ok(note) => drop(self.notes.insert(*name, Some(note))),
                Err(GapNotesError::Note {
                    key,
                    source: source @ (GapNoteError::Signature(_) | GapNoteError::Right { .. }),
                }) => {
                    tracing::warn!(key, "a gap note does not count: {source}");
                    self.notes.insert(*name, None);
                }
                Err(error) => problems.push(format!("a gap note does not read: {}", chain(&error))),
            }
        }
        problems
    }

    pub fn notes(&self) -> Vec<gap_note::GapNote> {
        self.notes.values().flatten().cloned().collect()
    }

    /// Gaps, and what was noted of WAL that is there by now.
    pub async fn facts(
        &mut self,
        archive: &WalArchive,
        catalog: &WalCatalog,
        known: KnownGaps,
    ) -> (Vec<WalGap>, Vec<WalGap>) {
        self.edges.retain(|gap, _| known.gaps.iter().any(|known| known.gap == *gap));
        let mut gaps = Vec::new();
        for known in known.gaps {
            let edges = self.edges(archive, catalog, &known.gap).await;
            gaps.push(WalGap {
                from: edges.before_us.map(time),
                to: edges.behind_us.map(time),
                acknowledged: known.acknowledged.is_some(),
                recorded: known.recorded.as_ref().map(note),
                acknowledgement: known.acknowledged.as_ref().map(note),
                ..gap(&known.gap)
            });
        }
        (gaps, known.filled.iter().map(filled).collect())
    }

    /// When it was is a service to people: that it cannot be told now is no reason to show nothing.
    async fn edges(&mut self, archive: &WalArchive, catalog: &WalCatalog, gap: &recovery_window::WalGap) -> Edges {
        if let Some(known) = self.edges.get(gap) {
            return *known;
        }
        match gap_edges::read(archive, catalog, gap).await {
            Ok(edges) => {
                // What lies behind it may still come.
                if edges.behind_us.is_some() {
                    self.edges.insert(*gap, edges);
                }
                edges
            }
            Err(error) => {
                tracing::debug!("when a gap was is not known: {error}");
                Edges::default()
            }
        }
    }
}

fn gap(gap: &recovery_window::WalGap) -> WalGap {
    WalGap {
        timeline: gap.wal.timeline,
        branch: gap.wal.branch,
        from_lsn: gap.from,
        to_lsn: gap.to,
        acknowledged: false,
        from: None,
        to: None,
        recorded: None,
        acknowledgement: None,
        system_identifier: gap.wal.system_id.0,
    }
}

fn filled(said: &gap_note::GapNote) -> WalGap {
    let (recorded, acknowledgement) = match said.kind {
        GapNoteKind::Recorded => (Some(note(said)), None),
        GapNoteKind::Acknowledged => (None, Some(note(said))),
    };
    let range = recovery_window::WalGap { wal: said.wal, from: said.from, to: said.to };
    WalGap { acknowledged: acknowledgement.is_some(), recorded, acknowledgement, ..gap(&range) }
}

fn note(said: &gap_note::GapNote) -> GapNote {
    GapNote { by: said.by.clone(), at: time(said.since_us), reason: said.reason.clone() }
}
