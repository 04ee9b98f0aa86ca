//! One word per cluster, with its reason: is it recoverable as promised? Pure, from facts alone; what cannot be seen is
//! unknown, never assumed.

use jiff::{SignedDuration, Timestamp};

use super::clusters::{ClusterSeen, MemberSeen};
use super::observed::{ArchiveObserved, InstanceRole};
use super::recovery::{BackupSummary, RecoveryWindow};
use crate::jobs::ReportedBackup;
use crate::policy::Binding;
use crate::resources::Span;

mod lag;

use lag::lag;
pub use lag::leader;

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
    let lag = leader(now, cluster, stale_after).and_then(|leader| lag(cluster, leader));
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
    let silence = silence(cluster, age, stale_after);
    if silence == Silence::TooLong {
        return (Protection::Unknown, format!("its agents were last heard {} ago", in_words(age)));
    }
    if let Silence::LongerThanPromised(rpo) = silence {
        let reason = format!(
            "its agents were last heard {} ago: the repository may trail by more than {rpo}, which is promised",
            in_words(age)
        );
        return (Protection::Unknown, reason);
    }
    let windows = windows(cluster);
    if windows.is_empty() {
        return (
            Protection::Unknown,
            also_filling("no agent has said yet what the repository holds".to_owned(), cluster),
        );
    }
    if windows.iter().all(|window| window.ranges.is_empty()) {
        return (Protection::Unprotected, also_filling(no_range(last_backup), cluster));
    }
    let mut risks = risks(now, cluster, last_backup, lag, &windows);
    if lag.is_none() {
        risks.extend(leader(now, cluster, stale_after).map(nothing_stored));
    }
    risks.extend(silent_primary(now, cluster, stale_after));
    if risks.is_empty() { (Protection::Protected, String::new()) } else { (Protection::AtRisk, risks.join("; ")) }
}

/// Of all agents of a cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Silence {
    NotLong,
    /// Nobody who is connected has told anything since, and more time has passed than the repository may trail.
    LongerThanPromised(Span),
    TooLong,
}

fn silence(cluster: &ClusterSeen<'_>, age: SignedDuration, stale_after: Span) -> Silence {
    if age > seconds(stale_after) {
        return Silence::TooLong;
    }
    let is_vouched_for = cluster.members.iter().any(|member| member.vouches);
    match exceeded(cluster, is_vouched_for, age) {
        Some(rpo) => Silence::LongerThanPromised(rpo),
        None => Silence::NotLong,
    }
}

/// The promise that nobody can vouch for: facts are older. Those over a stream that stands are an interval old at most,
/// which says nothing of its WAL.
fn exceeded(cluster: &ClusterSeen<'_>, is_vouched_for: bool, age: SignedDuration) -> Option<Span> {
    let promised = cluster.policy.and_then(|policy| policy.objectives.rpo);
    promised.filter(|rpo| !is_vouched_for && age > seconds(*rpo))
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
        let why = gap.recorded.as_ref().map(|note| format!(" ({}: {})", note.by, first_line(&note.reason)));
        let (timeline, from, to) = (gap.timeline, gap.from_lsn, gap.to_lsn);
        risks.push(format!("WAL is missing on timeline {timeline} from {from} to {to}{}", why.unwrap_or_default()));
    }
    // A later backup need not meet it again: only what is read whole can show it.
    let strayed = |backup: &BackupSummary| backup.unexplained_slots > 0 && is_recent(now, backup);
    if let Some(backup) = backups(cluster).into_iter().chain(last_backup.cloned()).find(strayed) {
        risks.push(format!(
            "backup {} found {} slots that had changed past the WAL: those before it may lack the change",
            backup.id, backup.unexplained_slots
        ));
    }
    let promised = cluster.policy.and_then(|policy| policy.objectives.rpo);
    if let Some(lag) = lag.filter(|lag| promised.is_none() && *lag > NOTHING_PROMISED) {
        risks.push(format!("the repository trails by {}", in_words(lag)));
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
        if let Some(archive) = &member.instance.archive {
            risks.extend(shipping_risks(member.agent, archive));
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

/// With a backup in the repository, and a server that says where it is, this alone leaves the lag unknown.
fn nothing_stored(leader: &MemberSeen<'_>) -> String {
    format!("{}: of timeline {}, on which it is, nothing is known to be stored", leader.agent, leader.instance.timeline)
}

/// Where no objective says how far the repository may trail, it is worth a word beyond this.
const NOTHING_PROMISED: SignedDuration = SignedDuration::from_hours(1);

/// Others may be heard: what the one that writes does since is not seen. Not where another has taken its place.
fn silent_primary(now: Timestamp, cluster: &ClusterSeen<'_>, stale_after: Span) -> Option<String> {
    let mut primaries = cluster.members.iter().filter(|member| member.instance.role == InstanceRole::Primary);
    let age = |member: &MemberSeen<'_>| now.duration_since(member.received_at);
    let newest = primaries.by_ref().min_by_key(|member| age(member))?;
    let heard = || format!("{}: the primary's agent was last heard {} ago", newest.agent, in_words(age(newest)));
    if age(newest) > seconds(stale_after) {
        return Some(heard());
    }
    let rpo = exceeded(cluster, newest.vouches, age(newest))?;
    Some(format!("{}: the repository may trail by more than {rpo}, which is promised", heard()))
}

/// Said in time for a person to act.
const FULL_SOON: u64 = 12 * 3600;

fn full_soon(agent: &str, archive: &ArchiveObserved) -> Option<String> {
    let seconds = archive.pg_wal_full_in_seconds.filter(|seconds| *seconds < FULL_SOON)?;
    let full_in = in_words(SignedDuration::from_secs(seconds as i64));
    Some(format!("{agent}: pg_wal will be full in {full_in}, as WAL accumulates there"))
}

/// A server that is about to stop is told of whatever else is to be said of its cluster.
fn also_filling(reason: String, cluster: &ClusterSeen<'_>) -> String {
    let full = cluster.members.iter().filter_map(|member| full_soon(member.agent, member.instance.archive.as_ref()?));
    std::iter::once(reason).chain(full).collect::<Vec<_>>().join("; ")
}

fn shipping_risks(agent: &str, archive: &ArchiveObserved) -> Vec<String> {
    let mut risks: Vec<String> = full_soon(agent, archive).into_iter().collect();
    if let Some(stream) = archive.stream.as_ref().filter(|stream| !stream.store_error.is_empty()) {
        risks.push(format!("{agent}: WAL is not stored: {}", first_line(&stream.store_error)));
    }
    let spool = archive.stream.as_ref().and_then(|stream| stream.spool.as_ref());
    if let Some(spool) = spool.filter(|spool| spool.waits_for != "spools") {
        let instead = match spool.waits_for.as_str() {
            "alone" => "commits wait for this host's spool alone, and are lost with it",
            "peer" => "commits wait until the peer's spool is back, or for the timer",
            _ => "commits wait for the repository instead of two spools",
        };
        let peer = if spool.peer.is_empty() { String::new() } else { format!("{}: ", spool.peer) };
        risks.push(format!("{agent}: {instead}: {peer}{}", first_line(&spool.problem)));
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
