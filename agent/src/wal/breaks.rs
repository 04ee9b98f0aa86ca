//! A break: from here on this host may no longer have what the archive lacks, since its slot was lost or let go of.
//!
//! Noted on this host before a slot is made anew, and forgotten once what was still there is stored and what was not is noted
//! in the repository. So a crash between the two loses nothing, and what was let go of while the repository was away is told
//! when it is back.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::cluster::OpenCluster;
use walfleet_repository::format::gap_note::{GapNote, GapNoteKind};
use walfleet_repository::gap_notes::{self, GapNotesError};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::{Lsn, WalBranch};
use walfleet_repository::signature::Signer;

use crate::durable::{self, DurableError, FileKind};

const KIND: FileKind = FileKind { name: "break", version: 1 };

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Break {
    pub at: Timestamp,
    /// Why the slot no longer keeps it, for people.
    pub why: String,
    /// Where the slot stood when the policy had it let go; `None`: nobody chose it.
    pub let_go_from: Option<Lsn>,
}

impl Break {
    /// As a problem of the cluster, as long as the repository does not tell.
    pub fn problem(&self) -> Option<String> {
        let from = self.let_go_from?;
        Some(format!(
            "WAL from {from} on was let go of at {}: {}\nHINT: mend the way to the repository; then what is left is stored, and the rest is a gap: restores from behind it take a backup from behind it, which a controller has taken at once.",
            self.at.strftime("%Y-%m-%d %H:%M:%S UTC"),
            self.why
        ))
    }
}

fn file(state_dir: &Path, cluster: &ClusterName) -> PathBuf {
    state_dir.join("breaks").join(cluster.as_str())
}

/// The break of a cluster's WAL on this host that the repository does not tell of yet.
pub fn current(state_dir: &Path, cluster: &ClusterName) -> Result<Option<Break>, DurableError> {
    durable::read(&file(state_dir, cluster), KIND)
}

/// Notes a break durably; one that is noted already stays as it is, since it began earlier, unless only the new one was chosen.
pub fn begin(state_dir: &Path, cluster: &ClusterName, found: &Break) -> Result<(), DurableError> {
    let mut found = found.clone();
    match current(state_dir, cluster)? {
        Some(earlier) if earlier.let_go_from.is_none() && found.let_go_from.is_some() => found.at = earlier.at,
        Some(_) => return Ok(()),
        None => {}
    }
    durable::make_folder(&state_dir.join("breaks"))?;
    durable::write(&file(state_dir, cluster), KIND, &found)
}

/// Where breaks of one cluster are noted, here and in the repository.
pub struct Breaks {
    pub state_dir: PathBuf,
    pub cluster: OpenCluster,
    pub signer: Signer,
    /// This agent's name.
    pub member: String,
}

impl Breaks {
    pub fn current(&self) -> Result<Option<Break>, DurableError> {
        current(&self.state_dir, self.cluster.name())
    }

    pub fn begin(&self, why: String) -> Result<(), DurableError> {
        begin(&self.state_dir, self.cluster.name(), &Break { at: Timestamp::now(), why, let_go_from: None })
    }

    /// Says in the repository that `[from, to)` is on this host no more; returns once that is durable.
    pub async fn record(&self, wal: WalBranch, (from, to): (Lsn, Lsn), of: &Break) -> Result<(), GapNotesError> {
        let note = GapNote {
            cluster: self.cluster.name().clone(),
            wal,
            from,
            to,
            kind: GapNoteKind::Recorded,
            by: self.member.clone(),
            reason: of.why.clone(),
            at_us: Timestamp::now().as_microsecond(),
            since_us: of.at.as_microsecond(),
        };
        gap_notes::store(self.cluster.repository(), &self.signer, &note).await
    }

    /// The repository tells all there is to tell.
    pub fn end(&self) -> Result<(), DurableError> {
        durable::remove(&file(&self.state_dir, self.cluster.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_break_stays_until_it_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let cluster: ClusterName = "orders".parse().unwrap();
        let found = |why: &str, from| Break { at: Timestamp::UNIX_EPOCH, why: why.to_owned(), let_go_from: from };
        assert_eq!(current(folder.path(), &cluster).unwrap(), None);
        begin(folder.path(), &cluster, &found("pg_wal was full", Some(Lsn(5)))).unwrap();
        begin(folder.path(), &cluster, &found("there was no slot", None)).unwrap();
        let current = current(folder.path(), &cluster).unwrap().unwrap();
        assert_eq!(current.why, "pg_wal was full");
        assert!(current.problem().unwrap().contains("0/5"));
        assert_eq!(found("the slot was lost", None).problem(), None, "the session that finds it tells it at once");
    }
}
