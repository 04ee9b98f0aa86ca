//! What this host's jobs of a cluster took, for estimates of the next ones: one small file per cluster in the state folder.
//!
//! A convenience, never trusted over what the repository says, and nothing is lost with it: what backups cost stands in
//! the repository, too. What does not read or cannot be written is passed over.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use walfleet_repository::format::manifest::ReadScope;
use walfleet_repository::format::reference::ReferencePart;
use walfleet_repository::ids::ClusterName;

use crate::durable::{self, FileKind};
use crate::estimate::{Past, PastWork, Reads};
use crate::jobs::cost::{JobCost, PhaseCost};
use crate::jobs::report::{BackupReport, Report, RestoreReport};

const KIND: FileKind = FileKind { name: "history", version: 1 };

/// Jobs kept of a cluster: enough that rare kinds are not pushed out by a backup every hour of the day.
const KEPT: usize = 64;

#[derive(Default, Serialize, Deserialize)]
struct Kept {
    /// Newest first.
    jobs: Vec<Past>,
}

/// The folder.
#[derive(Clone, Debug)]
pub struct History {
    folder: PathBuf,
}

impl History {
    pub fn new(state_dir: &Path) -> History {
        History { folder: state_dir.join("history") }
    }

    /// Newest first. Reads a file.
    pub fn of(&self, cluster: &ClusterName) -> Vec<Past> {
        match durable::read::<Kept>(&self.path(cluster), KIND) {
            Ok(kept) => kept.unwrap_or_default().jobs,
            Err(error) => {
                tracing::debug!(%cluster, %error, "this host's history does not read and begins anew");
                Vec::new()
            }
        }
    }

    /// Syncs a file. Only the user whose state folder it is adds to it: what another one made there, the agent could not
    /// write to.
    pub fn add(&self, cluster: &ClusterName, past: Past) {
        let owner = self.folder.parent().and_then(|state_dir| std::fs::metadata(state_dir).ok());
        if owner.is_none_or(|state_dir| state_dir.uid() != rustix::process::geteuid().as_raw()) {
            tracing::debug!(%cluster, "this host's history is not kept: the state folder is not this user's");
            return;
        }
        let mut jobs = self.of(cluster);
        jobs.insert(0, past);
        jobs.truncate(KEPT);
        let written =
            durable::make_folder(&self.folder).and_then(|()| durable::write(&self.path(cluster), KIND, &Kept { jobs }));
        if let Err(error) = written {
            tracing::debug!(%cluster, %error, "this host's history is not kept");
        }
    }

    fn path(&self, cluster: &ClusterName) -> PathBuf {
        self.folder.join(format!("{cluster}.json"))
    }
}

/// All that is known, each backup once: as the job counted it rather than as the repository tells.
pub fn gather(told: &[Past], kept: Vec<Past>, stored: Vec<Past>) -> Vec<Past> {
    let mut known: Vec<Past> = Vec::new();
    for past in told.iter().cloned().chain(kept).chain(stored) {
        let is_same = |other: &Past| match (&other.work, &past.work) {
            (PastWork::Backup { backup: one, .. }, PastWork::Backup { backup: other, .. }) => one == other,
            // The controller takes an end down a little later than the host; what was measured is the same.
            (PastWork::Restore { .. }, PastWork::Restore { .. }) => {
                let first = |of: &Past| of.phases.first().map_or(0.0, |phase| phase.seconds);
                other.host == past.host
                    && other.cluster_bytes == past.cluster_bytes
                    && (first(other) - first(&past)).abs() < 1e-6
            }
            _ => false,
        };
        if !known.iter().any(is_same) {
            known.push(past);
        }
    }
    known
}

/// What a job that succeeded here can tell the next ones; `None`: nothing.
pub fn past_of(report: &Report, cost: &JobCost, host: &str, delta: bool) -> Option<Past> {
    let finished_at = jiff::Timestamp::now();
    let past = |cluster_bytes, work| Past {
        host: host.to_owned(),
        finished_at,
        cluster_bytes,
        requests: cost.store.requests(),
        seconds: cost.seconds(),
        phases: cost.phases.clone(),
        work,
    };
    match report {
        Report::Backup(backup) => Some(past(backup.cluster_bytes, backup_work(backup))),
        Report::Restore(restore) if restore.is_planned() => None,
        Report::Restore(restore) => Some(past(restore.cluster_bytes, restore_work(restore, delta))),
        Report::Verify(_) | Report::BackupPlan(_) | Report::WalFind(_) => None,
    }
}

fn backup_work(backup: &BackupReport) -> PastWork {
    let read = match &backup.read_all_because {
        None => Reads::Changes,
        Some(_) if backup.parents.is_empty() => Reads::First,
        Some(_) => Reads::All,
    };
    let (read_bytes, stored_bytes) = (backup.read_bytes, backup.stored_bytes);
    PastWork::Backup { backup: backup.id.clone(), read, read_bytes, stored_bytes }
}

fn restore_work(restore: &RestoreReport, delta: bool) -> PastWork {
    let replayed = restore.reached_lsn.map_or(0, |reached| reached.saturating_sub(restore.wal_from_lsn));
    PastWork::Restore { wal_bytes: replayed, delta }
}

/// A backup as its reference part tells of it; `None`: by a version that did not say what it read.
pub fn past_of_stored(reference: &ReferencePart) -> Option<Past> {
    let counters = reference.counters;
    let read = match counters.read_scope {
        ReadScope::Unknown => return None,
        ReadScope::Changes => Reads::Changes,
        ReadScope::AllFirst => Reads::First,
        ReadScope::AllAsked
        | ReadScope::AllOtherHistory
        | ReadScope::AllWalNotKnown
        | ReadScope::AllDamage
        | ReadScope::AllCopy => Reads::All,
    };
    let seconds = reference.stopped_at_us.saturating_sub(reference.started_at_us) as f64 / 1e6;
    let copy = PhaseCost { phase: "copy".to_owned(), seconds: seconds.max(0.0), bytes: counters.cluster_bytes };
    Some(Past {
        host: reference.member.clone(),
        finished_at: jiff::Timestamp::from_microsecond(reference.stopped_at_us).ok()?,
        cluster_bytes: counters.cluster_bytes,
        requests: counters.store_requests,
        seconds: copy.seconds,
        phases: vec![copy],
        work: PastWork::Backup {
            backup: reference.backup.clone(),
            read,
            read_bytes: counters.read_bytes,
            stored_bytes: counters.stored_bytes,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn past(day: i64) -> Past {
        Past {
            host: "db1".into(),
            finished_at: jiff::Timestamp::from_second(day * 86_400).unwrap(),
            cluster_bytes: 1,
            requests: 1,
            seconds: 1.5,
            phases: Vec::new(),
            work: PastWork::Backup {
                backup: format!("bk_{day}").parse().unwrap(),
                read: Reads::Changes,
                read_bytes: 1,
                stored_bytes: 1,
            },
        }
    }

    #[test]
    fn the_newest_stay_and_a_damaged_file_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (history, cluster) = (History::new(folder.path()), "orders".parse().unwrap());
        for day in 0..100 {
            history.add(&cluster, past(day));
        }
        let kept = history.of(&cluster);
        assert_eq!((kept.len(), kept.first()), (KEPT, Some(&past(99))));
        std::fs::write(folder.path().join("history/orders.json"), "walfleet-agent history 1 0\n{}").unwrap();
        assert_eq!(history.of(&cluster), []);
        history.add(&cluster, past(1));
        assert_eq!(history.of(&cluster), [past(1)]);
    }

    #[test]
    fn a_host_without_a_state_folder_of_its_own_keeps_nothing_and_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("history"), "in the way").unwrap();
        for state_dir in [folder.path().to_owned(), folder.path().join("none")] {
            let history = History::new(&state_dir);
            history.add(&"orders".parse().unwrap(), past(1));
            assert_eq!(history.of(&"orders".parse().unwrap()), []);
        }
        assert!(!folder.path().join("none").exists(), "whoever comes first must not own it");
    }

    #[test]
    fn a_backup_counts_once_whoever_tells_of_it() {
        let counted = Past { seconds: 9.0, ..past(2) };
        let known = gather(std::slice::from_ref(&counted), vec![past(2), past(1)], vec![past(1), past(3)]);
        assert_eq!(known, [counted, past(1), past(3)]);
    }

    #[test]
    fn a_restore_counts_once_and_another_one_soon_after_counts_too() {
        let restore = |day, seconds: f64| Past {
            work: PastWork::Restore { wal_bytes: 0, delta: false },
            phases: vec![PhaseCost { phase: "plan".into(), seconds, bytes: 0 }],
            ..past(day)
        };
        let told = Past { seconds: 1.6, ..restore(1, 0.25) };
        let known = gather(std::slice::from_ref(&told), vec![restore(1, 0.125), restore(1, 0.25)], Vec::new());
        assert_eq!(known, [told, restore(1, 0.125)]);
    }
}
