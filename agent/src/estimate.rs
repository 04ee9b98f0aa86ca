//! What a backup or a restore will take, judged by what earlier ones of the same cluster took. Pure.
//!
//! Only what was measured is told: where nothing of the kind is known, there is no figure. Figures are medians of the
//! newest few, so that one odd night moves nothing.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::BackupId;

use crate::jobs::cost::PhaseCost;

/// How many jobs a figure is made of: enough for a median, few enough to follow a cluster that grows.
const SAMPLES: usize = 5;

/// A job that succeeded.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Past {
    /// The agent that did it.
    pub host: String,
    pub finished_at: Timestamp,
    /// Of the cluster then, as restored.
    pub cluster_bytes: u64,
    pub requests: u64,
    pub seconds: f64,
    /// Of what is known; the repository tells of the copy alone.
    pub phases: Vec<PhaseCost>,
    pub work: PastWork,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PastWork {
    Backup {
        backup: BackupId,
        read: Reads,
        read_bytes: u64,
        stored_bytes: u64,
    },
    /// `wal_bytes`: replayed; 0 if the server was not started. `delta`: over a copy.
    Restore {
        wal_bytes: u64,
        delta: bool,
    },
}

/// What a backup reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reads {
    Changes,
    All,
    /// All, and stores it, since nothing is there to compare with.
    First,
}

/// What an operation as a whole is expected to take.
#[derive(Clone, PartialEq, Debug)]
pub struct Expected {
    pub seconds: f64,
    /// For people: "the last 5 backups that read what changed".
    pub basis: String,
    /// Bytes to be moved of those that are counted, where not all are.
    pub moved_bytes: Option<u64>,
    /// In order.
    pub phases: Vec<(String, f64)>,
}

impl Expected {
    pub fn phase_seconds(&self, phase: &str) -> Option<f64> {
        self.phases.iter().find(|(name, _)| name == phase).map(|(_, seconds)| *seconds)
    }
}

/// What a backup will cost.
#[derive(Clone, PartialEq, Debug)]
pub struct BackupEstimate {
    pub read_bytes: u64,
    /// `None`: only first backups are known, and this one has something to compare with.
    pub stored_bytes: Option<u64>,
    pub store_requests: Option<u64>,
    pub expected: Expected,
}

/// `None`: no such backup is known.
pub fn backup(past: &[Past], reads: Reads, cluster_bytes: u64, host: &str) -> Option<BackupEstimate> {
    let of = |kinds: &[Reads]| {
        let fits = |one: &&Past| matches!(&one.work, PastWork::Backup { read, .. } if kinds.contains(read));
        nearest(past.iter().filter(fits).collect(), host)
    };
    let exact = of(&[reads]);
    let (samples, is_exact) = match (exact.jobs.is_empty(), reads) {
        (false, _) => (exact, true),
        // Both read everything; what they store differs.
        (true, Reads::All | Reads::First) => (of(&[Reads::All, Reads::First]), false),
        (true, Reads::Changes) => return None,
    };
    let what = match reads {
        Reads::Changes => "that read what changed",
        Reads::All | Reads::First => "that read everything",
    };
    let scale = |one: &Past| match reads {
        Reads::Changes => 1.0,
        Reads::All | Reads::First if cluster_bytes > 0 => cluster_bytes as f64 / one.cluster_bytes.max(1) as f64,
        Reads::All | Reads::First => 1.0,
    };
    let bytes = |of: fn(&PastWork) -> u64| samples.median(|one| of(&one.work) as f64 * scale(one));
    let read_bytes = bytes(|work| match work {
        PastWork::Backup { read_bytes, .. } => *read_bytes,
        PastWork::Restore { .. } => 0,
    })?;
    let stored_bytes = bytes(|work| match work {
        PastWork::Backup { stored_bytes, .. } => *stored_bytes,
        PastWork::Restore { .. } => 0,
    });
    let store_requests = samples.median(|one| one.requests as f64 * scale(one));
    Some(BackupEstimate {
        read_bytes: read_bytes as u64,
        stored_bytes: stored_bytes.filter(|_| is_exact).map(|bytes| bytes as u64),
        store_requests: store_requests.filter(|_| is_exact).map(|requests| requests.ceil() as u64),
        expected: Expected {
            seconds: samples.median(|one| one.seconds * scale(one))?,
            basis: samples.basis("backup", what),
            moved_bytes: (reads == Reads::Changes).then_some(read_bytes as u64),
            phases: samples.phases(|one, phase| if phase == "copy" { scale(one) } else { 1.0 }),
        },
    })
}

/// What a restore has to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RestoreNeeds {
    /// As restored: to be written, or over a copy at most so much.
    pub cluster_bytes: u64,
    /// To be replayed.
    pub wal_bytes: u64,
}

/// `None`: neither a restore nor a backup that read everything is known.
pub fn restore(past: &[Past], needs: RestoreNeeds, host: &str) -> Option<Expected> {
    let is_whole = |one: &&Past| {
        one.cluster_bytes > 0 && matches!(one.work, PastWork::Restore { delta: false, .. }) && copied(one) > 0.0
    };
    let restores = nearest(past.iter().filter(is_whole).collect(), host);
    let scale = |one: &Past| needs.cluster_bytes as f64 / one.cluster_bytes.max(1) as f64;
    if let Some(copy) = restores.median(|one| copied(one) * scale(one)) {
        let replay = replay(&restores.jobs, needs.wal_bytes);
        let beside = if needs.wal_bytes > 0 && replay.is_none() { ", without replay" } else { "" };
        let mut phases = restores.phases(|one, phase| if COPYING.contains(&phase) { scale(one) } else { 1.0 });
        phases.retain(|(phase, _)| COPYING.contains(&phase.as_str()) || replay.is_some() && phase == "start");
        let start: f64 = phases.iter().filter(|(phase, _)| phase == "start").map(|(_, seconds)| seconds).sum();
        phases.extend(replay.map(|seconds| ("replay".to_owned(), (seconds - start).max(0.0))));
        return Some(Expected {
            seconds: copy + replay.unwrap_or(0.0),
            basis: format!("{}{beside}", restores.basis("restore", "")),
            moved_bytes: None,
            phases,
        });
    }
    // Nobody restored it yet: it is written about as fast as it was read.
    let read_whole = |one: &&Past| {
        matches!(one.work, PastWork::Backup { read: Reads::All | Reads::First, .. }) && one.cluster_bytes > 0
    };
    let backups = nearest(past.iter().filter(read_whole).collect(), host);
    let copy = backups.median(|one| phase_seconds(one, "copy").unwrap_or(one.seconds) * scale(one))?;
    let beside = if needs.wal_bytes > 0 { ", without replay" } else { "" };
    Some(Expected {
        seconds: copy,
        basis: format!("{}, since no restore is known{beside}", backups.basis("backup", "that read everything")),
        moved_bytes: None,
        phases: vec![("restore".to_owned(), copy)],
    })
}

/// The phases of a restore that take as long as the cluster is large.
const COPYING: [&str; 2] = ["restore", "finish"];

fn copied(one: &Past) -> f64 {
    COPYING.into_iter().filter_map(|phase| phase_seconds(one, phase)).sum()
}

/// Replay as fast as before, and no quicker than the quickest start of a server.
fn replay(restores: &[&Past], wal_bytes: u64) -> Option<f64> {
    let mut quickest = f64::INFINITY;
    let (mut bytes, mut seconds) = (0.0, 0.0);
    for one in restores {
        let PastWork::Restore { wal_bytes: replayed, .. } = &one.work else { continue };
        let Some(took) = phase_seconds(one, "replay").filter(|took| *replayed > 0 && took.is_finite()) else {
            continue;
        };
        let took = took + phase_seconds(one, "start").unwrap_or(0.0);
        quickest = quickest.min(took);
        bytes += *replayed as f64;
        seconds += took;
    }
    if bytes == 0.0 || wal_bytes == 0 {
        return None;
    }
    Some((wal_bytes as f64 * seconds / bytes).max(quickest))
}

fn phase_seconds(one: &Past, name: &str) -> Option<f64> {
    let of = one.phases.iter().filter(|phase| phase.phase == name);
    of.map(|phase| phase.seconds).reduce(|a, b| a + b)
}

/// The newest few of a kind, of this host if it has done any.
struct Samples<'a> {
    jobs: Vec<&'a Past>,
    is_here: bool,
}

fn nearest<'a>(mut jobs: Vec<&'a Past>, host: &str) -> Samples<'a> {
    jobs.sort_by_key(|one| std::cmp::Reverse(one.finished_at));
    let is_here = jobs.iter().any(|one| one.host == host);
    if is_here {
        jobs.retain(|one| one.host == host);
    }
    jobs.truncate(SAMPLES);
    Samples { jobs, is_here }
}

impl Samples<'_> {
    fn median(&self, of: impl Fn(&Past) -> f64) -> Option<f64> {
        let mut values: Vec<f64> = self.jobs.iter().map(|one| of(one)).filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }

    /// `the last 5 backups that read everything`, and whether somewhere else.
    fn basis(&self, noun: &str, which: &str) -> String {
        let elsewhere = if self.is_here { "" } else { " on other hosts" };
        let which = if which.is_empty() { String::new() } else { format!(" {which}") };
        match self.jobs.len() {
            1 => format!("the last {noun}{which}{}", elsewhere.replace("other hosts", "another host")),
            count => format!("the last {count} {noun}s{which}{elsewhere}"),
        }
    }

    /// In the order of the newest job that tells the most of them.
    fn phases(&self, scale: impl Fn(&Past, &str) -> f64) -> Vec<(String, f64)> {
        let most = self.jobs.iter().map(|one| one.phases.len()).max().unwrap_or(0);
        let Some(model) = self.jobs.iter().find(|one| one.phases.len() == most) else { return Vec::new() };
        let median = |name: &str| {
            let telling = self.jobs.iter().copied().filter(|one| phase_seconds(one, name).is_some()).collect();
            Samples { jobs: telling, is_here: self.is_here }
                .median(|one| phase_seconds(one, name).unwrap_or(0.0) * scale(one, name))
        };
        model.phases.iter().filter_map(|phase| Some((phase.phase.clone(), median(&phase.phase)?))).collect()
    }
}

#[cfg(test)]
mod tests;
