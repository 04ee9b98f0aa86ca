//! One word per cluster, with its reason: is it recoverable as promised? Pure, from facts alone; what cannot be seen is
//! unknown, never assumed.

use jiff::{SignedDuration, Timestamp};
use walfleet_repository::postgres::Lsn;

use super::clusters::{ClusterSeen, MemberSeen};
use super::observed::InstanceRole;
use super::recovery::{BackupSummary, RecoveryWindow};
use crate::jobs::ReportedBackup;
use crate::policy::Binding;
use crate::resources::Span;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protection {
    // In the order in which a status shows them: the worst first.
    /// No recoverable point.
    Unprotected,
    /// No fresh facts.
    Unknown,
    /// An objective is missed.
    AtRisk,
    Protected,
}

impl Protection {
    pub const ALL: [Protection; 4] =
        [Protection::Unprotected, Protection::Unknown, Protection::AtRisk, Protection::Protected];

    pub fn as_str(self) -> &'static str {
        match self {
            Protection::Unprotected => "unprotected",
            Protection::Unknown => "unknown",
            Protection::AtRisk => "at_risk",
            Protection::Protected => "protected",
        }
    }
}

/// What is to be said of a cluster.
#[derive(Clone, PartialEq, Debug)]
pub struct Assessment {
    pub state: Protection,
    /// Never empty unless protected.
    pub reason: String,
    /// Seconds that the repository trails the server, as of the freshest facts. `None`: not known.
    pub lag: Option<SignedDuration>,
    pub last_backup: Option<BackupSummary>,
}

/// Judges a cluster. `stale_after`: how old facts may be.
pub fn assess(
    now: Timestamp,
    cluster: &ClusterSeen<'_>,
    reported: Option<&ReportedBackup>,
    stale_after: Span,
) -> Assessment {
    let last_backup = last_backup(cluster, reported);
    let lag = lag(cluster);
    let (state, reason) = judge(now, cluster, last_backup.as_ref(), lag, stale_after);
    Assessment { state, reason, lag, last_backup }
}

fn judge(
    now: Timestamp,
    cluster: &ClusterSeen<'_>,
    last_backup: Option<&BackupSummary>,
    lag: Option<SignedDuration>,
    stale_after: Span,
) -> (Protection, String) {
    if cluster.members.is_empty() {
        let reason = cluster.problems.first().cloned();
        return (Protection::Unknown, reason.unwrap_or_else(|| "no agent declares an instance of it".to_owned()));
    }
    let freshest = cluster.members.iter().map(|member| member.received_at).max().unwrap_or(Timestamp::MIN);
    let age = now.duration_since(freshest);
    if age > seconds(stale_after) {
        return (Protection::Unknown, format!("its agents were last heard {} ago", in_words(age)));
    }
    let windows = windows(cluster);
    if windows.is_empty() {
        return (Protection::Unknown, "no agent has said yet what the repository holds".to_owned());
    }
    if windows.iter().all(|window| window.ranges.is_empty()) {
        return (Protection::Unprotected, no_range(last_backup));
    }
    let risks = risks(now, cluster, last_backup, lag, &windows);
    if risks.is_empty() { (Protection::Protected, String::new()) } else { (Protection::AtRisk, risks.join("; ")) }
}

fn no_range(last_backup: Option<&BackupSummary>) -> String {
    match last_backup {
        None => "there is no backup of it\nHINT: `walfleet backup start` takes one now.".to_owned(),
        Some(backup) => format!(
            "backup {} cannot be made consistent: its WAL is not in the repository\nHINT: `walfleet wal gaps` says what is missing.",
            backup.id
        ),
    }
}

/// Within the period in which every file is read whole once (agent: backup/spare.rs).
fn is_recent(now: Timestamp, backup: &BackupSummary) -> bool {
    backup.finished_at.is_some_and(|at| now.duration_since(at) < SignedDuration::from_hours(30 * 24))
}

/// Of each member; `walfleet agent show` has them all.
const MOST_PROBLEMS: usize = 3;

fn risks(
    now: Timestamp,
    cluster: &ClusterSeen<'_>,
    last_backup: Option<&BackupSummary>,
    lag: Option<SignedDuration>,
    windows: &[&RecoveryWindow],
) -> Vec<String> {
    let mut risks: Vec<String> = cluster.problems.iter().map(|problem| first_line(problem)).collect();
    if cluster.binding == Binding::Unbound {
        risks.push("no policy binds it".to_owned());
    }
    for gap in windows.iter().flat_map(|window| &window.gaps).filter(|gap| !gap.acknowledged) {
        risks.push(format!("WAL is missing on timeline {} from {} to {}", gap.timeline, gap.from_lsn, gap.to_lsn));
    }
    // A later backup need not meet it again: only what is read whole can show it.
    let strayed = |backup: &BackupSummary| backup.unexplained_slots > 0 && is_recent(now, backup);
    if let Some(backup) = backups(cluster).into_iter().chain(last_backup.cloned()).find(strayed) {
        risks.push(format!(
            "backup {} found {} slots that had changed past the WAL: those before it may lack the change",
            backup.id, backup.unexplained_slots
        ));
    }
    if let Some(objectives) = cluster.policy.map(|policy| &policy.objectives) {
        if let Some(rpo) = objectives.rpo {
            match lag {
                Some(lag) if lag > seconds(rpo) => {
                    risks.push(format!("the repository trails by {}, {rpo} is promised", in_words(lag)));
                }
                None => risks.push(format!("it is not known how far the repository trails, {rpo} is promised")),
                Some(_) => {}
            }
        }
        let age = last_backup.and_then(|backup| backup.finished_at).map(|at| now.duration_since(at));
        match (objectives.backup_age, age) {
            (Some(limit), Some(age)) if age > seconds(limit) => {
                risks.push(format!("the newest backup is {} old, {limit} is promised", in_words(age)));
            }
            (Some(_), None) => risks.push("no finished backup is known".to_owned()),
            _ => {}
        }
    }
    for member in &cluster.members {
        // The archiver's last error stands as long as it has not archived since; only then it is a present trouble.
        let archive = member.instance.archive.as_ref();
        if let Some(archive) = archive.filter(|archive| !archive.last_error.is_empty() && archive.ready_segments > 0) {
            risks.push(format!("{}: archiving fails: {}", member.agent, first_line(&archive.last_error)));
        }
        // What its agent says must be mended.
        let problems = member.instance.problems.iter().take(MOST_PROBLEMS);
        risks.extend(problems.map(|problem| format!("{}: {}", member.agent, first_line(problem))));
    }
    if cluster.members.iter().all(|member| member.instance.role == InstanceRole::Down) {
        risks.push("none of its servers answers".to_owned());
    }
    risks
}

/// The newest view of each repository, whichever member has it.
pub fn windows<'s>(cluster: &'s ClusterSeen<'_>) -> Vec<&'s RecoveryWindow> {
    let mut newest = std::collections::BTreeMap::<&str, &RecoveryWindow>::new();
    for window in cluster.members.iter().flat_map(|member| &member.instance.windows) {
        let held = newest.entry(&window.repository).or_insert(window);
        if window.as_of > held.as_of {
            *held = window;
        }
    }
    newest.into_values().collect()
}

/// All backups that any member knows of, newest first; of two views of the same one, the fresher member's.
pub fn backups(cluster: &ClusterSeen<'_>) -> Vec<BackupSummary> {
    let mut members: Vec<&MemberSeen<'_>> = cluster.members.iter().collect();
    members.sort_by_key(|member| member.received_at);
    let mut by_id = std::collections::BTreeMap::new();
    for backup in members.into_iter().flat_map(|member| &member.instance.backups) {
        by_id.insert(backup.id.clone(), backup.clone());
    }
    // Ids sort by time.
    by_id.into_values().rev().collect()
}

/// Whether a backup that a job reported can be missing from what the agents saw of the repository: until they look again.
/// After that, the repository's word counts, which may be that it expired.
pub fn is_news(cluster: &ClusterSeen<'_>, reported: &ReportedBackup) -> bool {
    windows(cluster).iter().all(|window| window.as_of < reported.reported_at)
}

fn last_backup(cluster: &ClusterSeen<'_>, reported: Option<&ReportedBackup>) -> Option<BackupSummary> {
    let seen = backups(cluster).into_iter().filter(|backup| backup.state != "expired");
    let news = reported.filter(|reported| is_news(cluster, reported)).map(|reported| reported.backup.clone());
    seen.chain(news).max_by(|a, b| (a.finished_at, &a.id).cmp(&(b.finished_at, &b.id)))
}

/// How far the repository trails the server that writes (or, without one, the standby that is furthest).
///
/// Nothing, if all of its WAL is durable. Otherwise the age of the newest commit that the repository holds, by the
/// server's own clock: a commit after that may exist and is not there. If no segment waits and the newest one came
/// after that commit, its arrival serves: it held everything up to then.
fn lag(cluster: &ClusterSeen<'_>) -> Option<SignedDuration> {
    let leader = cluster
        .members
        .iter()
        .filter(|member| member.instance.role != InstanceRole::Down && member.instance.current_lsn.is_some())
        .max_by_key(|member| {
            let writes = member.instance.role == InstanceRole::Primary;
            (writes, member.instance.timeline, member.instance.current_lsn)
        })?;
    let windows = windows(cluster);
    let durable = cluster
        .members
        .iter()
        .filter_map(|member| member.instance.archive.as_ref()?.durable_lsn)
        .chain(windows.iter().filter_map(|window| window.newest_lsn))
        .max()
        .unwrap_or(Lsn::INVALID);
    if leader.instance.current_lsn <= Some(durable) {
        return Some(SignedDuration::ZERO);
    }
    let newest_commit = windows.iter().filter_map(|window| window.newest_commit).max();
    let arrival = leader
        .instance
        .archive
        .as_ref()
        .filter(|archive| archive.ready_segments == 0)
        .and_then(|archive| archive.durable_at);
    let known = newest_commit.max(arrival)?;
    Some(leader.facts_at.duration_since(known).max(SignedDuration::ZERO))
}

fn seconds(span: Span) -> SignedDuration {
    // A span is at most ten years.
    SignedDuration::from_secs(span.as_seconds() as i64)
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// In the largest unit that leaves at least two of it: "95s", "12m", "26h", "9d".
pub fn in_words(length: SignedDuration) -> String {
    let seconds = length.as_secs().max(0);
    for (unit, scale) in [("d", 86_400), ("h", 3_600), ("m", 60)] {
        if seconds >= 2 * scale {
            return format!("{}{unit}", seconds / scale);
        }
    }
    format!("{seconds}s")
}

#[cfg(test)]
mod tests;
