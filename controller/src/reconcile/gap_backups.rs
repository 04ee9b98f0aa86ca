//! A gap that a member recorded makes a backup: what lies behind it can be restored only from one that begins there.
//!
//! Only recorded ones. A hole in a listing may be a segment that is on its way; a record says that the last one who had the WAL
//! no longer has it. And only those that the server which writes has behind it: no backup can begin behind what it will never
//! come to, as WAL of a timeline that was abandoned.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use walfleet_proto::telemetry;
use walfleet_repository::ids::ClusterName;

use super::schedules::backup_work;
use super::{ReconcileError, Reconciler};
use crate::fleet::clusters::{Assembly, ClusterSeen};
use crate::fleet::protection::{backups, leader, windows};
use crate::fleet::recovery::{BackupSummary, WalGap};
use crate::jobs::work::Work;
use crate::jobs::{Job, JobKind, NewJob, Phase};
use crate::resources::Span;
use crate::state::rows::put_row;
use crate::state::{Row, RowError, State, Txn};

const PREFIX: &str = "gap/";
/// Of jobs that a gap made.
pub const REQUESTED_BY: &str = "gap";

/// Another member may still have what is missing, and fills a gap within a look or two at the repository.
const OTHERS_FILL_WITHIN: SignedDuration = SignedDuration::from_secs(90);

/// After each backup for the same gap, if it failed or does not begin behind it. After the last of them it is left to the
/// schedule and to people: what did not help so often will not, and each may read the whole cluster.
const PAUSES: [SignedDuration; 4] = [
    SignedDuration::from_mins(10),
    SignedDuration::from_mins(30),
    SignedDuration::from_hours(2),
    SignedDuration::from_hours(6),
];
const MOST_TRIES: usize = PAUSES.len() + 1;

/// A cluster's newest gap without a backup behind it. One row per cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Unanswered {
    /// Timeline, branch and end.
    gap: String,
    since: Timestamp,
    /// When a backup was last asked for.
    asked: Option<Timestamp>,
    /// How often.
    #[serde(default)]
    tries: usize,
}

/// Gaps for which no more backups are made, by cluster.
#[derive(Default)]
pub struct GivenUp(BTreeMap<String, Unanswered>);

impl GivenUp {
    pub async fn load(state: &State) -> Result<GivenUp, RowError> {
        let (rows, _) = state.rows::<Unanswered>(PREFIX).await?;
        let given_up = rows.into_iter().filter(|row| row.value.tries >= MOST_TRIES);
        Ok(GivenUp(given_up.map(|row| (row.key.trim_start_matches(PREFIX).to_owned(), row.value)).collect()))
    }

    /// What is to be said of a cluster.
    pub fn problem(&self, now: Timestamp, cluster: &ClusterSeen<'_>, stale_after: Span) -> Option<String> {
        let gap = unanswered(now, cluster, stale_after)?;
        let found = self.0.get(cluster.name.as_str()).filter(|found| found.gap == name_of(gap))?;
        // Of the last one, the agents may not have told yet.
        let is_over = found.asked.is_none_or(|asked| now.duration_since(asked) >= PAUSES[0]);
        is_over.then(|| {
            format!("after {} tries no backup begins behind {}, where WAL is missing", found.tries, gap.to_lsn)
        })
    }
}

/// Says how many backups became jobs.
pub async fn make_runs(
    reconciler: &Reconciler,
    assembly: &Assembly<'_>,
    jobs: &[Job],
    now: Timestamp,
) -> Result<usize, ReconcileError> {
    let (rows, _) = reconciler.state.rows::<Unanswered>(PREFIX).await?;
    let known: BTreeMap<String, Row<Unanswered>> = rows.into_iter().map(|row| (row.key.clone(), row)).collect();
    let mut made = 0;
    for cluster in assembly.clusters.values() {
        let gap = unanswered(now, cluster, reconciler.stale_after());
        let (Some(gap), Some(spec)) = (gap, cluster.policy) else { continue };
        let key = format!("{PREFIX}{}", cluster.name);
        let name = name_of(gap);
        let row = known.get(&key);
        let present = row.filter(|row| row.value.gap == name).map(|row| &row.value);
        let found = present.cloned().unwrap_or(Unanswered { gap: name, since: now, asked: None, tries: 0 });
        if !is_due(cluster, jobs, &found, now) {
            if present.is_none() {
                match reconciler.state.update_row(&key, row.map_or(0, |row| row.mod_revision), &found).await {
                    // Somebody else was first; the next pass sees what they wrote.
                    Ok(_) | Err(RowError::Conflict { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            continue;
        }
        let Some(work) = backup_work(cluster) else { continue };
        let asked = Unanswered { asked: Some(now), tries: found.tries + 1, ..found };
        let unchanged = match row {
            Some(row) => Txn::new().when(row.unchanged()),
            None => Txn::new().when(crate::state::Compare::absent(key.clone())),
        };
        let new = NewJob {
            cluster: cluster.name.clone(),
            work: Work::Backup(work),
            on: None,
            requested_by: REQUESTED_BY.to_owned(),
            run: None,
            idempotency_key: None,
            traceparent: trace(&cluster.name),
            retries: spec.backup.retries,
        };
        if let Some(job) = reconciler.jobs.create(new, unchanged.then(put_row(key, &asked)?), now).await? {
            made += 1;
            tracing::info!(job = %job.id, cluster = %cluster.name, from = %gap.from_lsn, to = %gap.to_lsn,
                attempt = asked.tries, of = MOST_TRIES, "WAL is missing for good: a backup begins behind it");
        }
    }
    Ok(made)
}

fn is_due(cluster: &ClusterSeen<'_>, jobs: &[Job], found: &Unanswered, now: Timestamp) -> bool {
    let ours = |job: &&Job| job.cluster == cluster.name && job.work.kind() == JobKind::Backup;
    // One that waits begins behind the gap; one of ours that runs does, too.
    let covers = |job: &Job| job.phase() == Phase::Queued || job.requested_by == REQUESTED_BY;
    if jobs.iter().filter(ours).any(covers) {
        return false;
    }
    let may_others_fill = cluster.members.iter().filter(|member| member.connected).count() > 1;
    match found.asked {
        Some(asked) => {
            let pause = PAUSES.get(found.tries.saturating_sub(1));
            pause.is_some_and(|pause| now.duration_since(asked) >= *pause)
        }
        None => !may_others_fill || now.duration_since(found.since) >= OTHERS_FILL_WITHIN,
    }
}

/// The newest recorded gap of the cluster's present system that nobody has acknowledged and behind which no backup begins,
/// though one could.
fn unanswered<'s>(now: Timestamp, cluster: &'s ClusterSeen<'_>, stale_after: Span) -> Option<&'s WalGap> {
    let leader = leader(now, cluster, stale_after)?.instance;
    let gaps = windows(cluster).into_iter().flat_map(|window| &window.gaps);
    let is_open = |gap: &&'s WalGap| gap.recorded.is_some() && !gap.acknowledged;
    let of_today = |gap: &&'s WalGap| {
        gap.system_identifier == 0 || cluster.system_identifier.is_none_or(|id| id == gap.system_identifier)
    };
    let has_passed = |gap: &&'s WalGap| gap.timeline <= leader.timeline && Some(gap.to_lsn) <= leader.current_lsn;
    let backups = backups(cluster);
    gaps.filter(is_open)
        .filter(of_today)
        .filter(has_passed)
        .filter(|gap| !is_behind(gap, &backups))
        .max_by_key(|gap| (gap.timeline, gap.to_lsn))
}

/// Whether any of the backups begins behind a gap.
fn is_behind(gap: &WalGap, backups: &[BackupSummary]) -> bool {
    backups.iter().filter(|backup| backup.state != "expired").any(|backup| {
        let same = gap.system_identifier == 0 || backup.system_identifier == gap.system_identifier;
        same && backup.timeline >= gap.timeline && backup.start_lsn.is_some_and(|start| start >= gap.to_lsn)
    })
}

fn name_of(gap: &WalGap) -> String {
    format!("{}-{} {}", gap.timeline, gap.branch, gap.to_lsn)
}

/// A trace of its own, that the agent's work joins.
fn trace(cluster: &ClusterName) -> String {
    tracing::info_span!("backup behind a gap", %cluster).in_scope(telemetry::current_traceparent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::clusters::MemberSeen;
    use crate::fleet::observed::InstanceObserved;
    use crate::fleet::recovery::{GapNote, RecoveryWindow};
    use crate::fleet::samples;
    use crate::policy::Binding;
    use walfleet_repository::postgres::Lsn;

    fn gap(to: u64, recorded: bool) -> WalGap {
        let note = GapNote { by: "db1".to_owned(), at: Timestamp::UNIX_EPOCH, reason: "it was lost".to_owned() };
        WalGap {
            timeline: 1,
            branch: "0".repeat(16),
            from_lsn: Lsn(1),
            to_lsn: Lsn(to),
            acknowledged: false,
            from: None,
            to: None,
            recorded: Some(note).filter(|_| recorded),
            acknowledgement: None,
            system_identifier: 7,
        }
    }

    /// The end of the gap that wants a backup of a primary on timeline 1 at 1000.
    fn wants(gaps: &[WalGap], backup_starts: &[u64]) -> Option<u64> {
        let backup = |start: &u64| samples::backup(&format!("bk_{start}"), 7, Lsn(*start));
        let window = RecoveryWindow {
            repository: "main".to_owned(),
            as_of: Timestamp::UNIX_EPOCH,
            ranges: vec![],
            gaps: gaps.to_vec(),
            filled: vec![],
            newest_commit: None,
            newest_lsn: None,
            newest_timeline: 1,
        };
        let instance = InstanceObserved {
            current_lsn: Some(Lsn(1000)),
            windows: vec![window],
            backups: backup_starts.iter().map(backup).collect(),
            ..samples::instance("orders", 7)
        };
        let now = Timestamp::UNIX_EPOCH;
        let member = MemberSeen {
            agent: "db1",
            instance: &instance,
            facts_at: now,
            received_at: now,
            connected: true,
            vouches: true,
        };
        let cluster = ClusterSeen {
            name: "orders".parse().expect("a name"),
            labels: BTreeMap::new(),
            system_identifier: Some(7),
            spec: None,
            members: vec![member],
            binding: Binding::Unbound,
            is_surely_bound: true,
            policy: None,
            repository: None,
            problems: vec![],
        };
        unanswered(now, &cluster, Span::minutes(6)).map(|gap| gap.to_lsn.0)
    }

    #[test]
    fn a_recorded_gap_wants_a_backup_that_begins_behind_it() {
        assert_eq!(wants(&[gap(100, true)], &[50]), Some(100));
        assert_eq!(wants(&[gap(100, true)], &[50, 100]), None);
        assert_eq!(wants(&[gap(100, false)], &[50]), None, "it may be on its way");
        assert_eq!(wants(&[gap(100, true), gap(300, true)], &[150]), Some(300));
    }

    #[test]
    fn a_gap_behind_which_no_backup_can_begin_or_that_is_known_wants_none() {
        let abandoned = WalGap { timeline: 2, ..gap(100, true) };
        assert_eq!(wants(std::slice::from_ref(&abandoned), &[50]), None, "the old primary was right and went on");
        assert_eq!(wants(&[gap(5000, true)], &[50]), None, "on a branch far ahead");
        assert_eq!(wants(&[WalGap { acknowledged: true, ..gap(100, true) }], &[50]), None);
        assert_eq!(wants(&[abandoned, gap(5000, true), gap(100, true)], &[50]), Some(100), "and none hides another");
    }
}
