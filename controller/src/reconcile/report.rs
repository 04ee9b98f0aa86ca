//! What the fleet looks like to a reader: the picture, judged. Used by the calls and by the metrics.

use std::collections::BTreeMap;

use jiff::Timestamp;
use walfleet_repository::ids::ClusterName;

use super::gap_backups::GivenUp;
use super::schedules::{self, Followed};
use super::{Picture, ReconcileError, Reconciler};
use crate::fleet::clusters::ClusterSeen;
use crate::fleet::protection::{self, Assessment, Protection};
use crate::jobs::{Job, ReportedBackup};
use crate::resources::Span;
use crate::state::Row;

/// Everything a status needs, read at one moment.
pub struct Overview {
    pub picture: Picture,
    pub followed: BTreeMap<String, Row<Followed>>,
    pub jobs: Vec<Job>,
    /// Of each cluster, the newest backup that a job of it reported.
    pub reported: BTreeMap<ClusterName, ReportedBackup>,
    given_up: GivenUp,
    stale_after: Span,
}

/// Facts older than this many intervals say nothing of now.
const STALE_INTERVALS: u64 = 3;

impl Reconciler {
    pub async fn overview(&self, now: Timestamp) -> Result<Overview, ReconcileError> {
        Ok(Overview {
            picture: self.picture(now).await?,
            followed: schedules::load(&self.state).await?,
            jobs: self.jobs.active().await?,
            reported: self.jobs.reported_backups(),
            given_up: GivenUp::load(&self.state).await?,
            stale_after: self.stale_after(),
        })
    }

    pub(super) fn stale_after(&self) -> Span {
        let interval = self.fleet.timing.facts_interval.as_secs().max(1);
        Span::seconds(interval * STALE_INTERVALS)
    }
}

impl Overview {
    pub fn assess(&self, cluster: &ClusterSeen<'_>) -> Assessment {
        let now = self.picture.now;
        let mut assessment = protection::assess(now, cluster, self.reported.get(&cluster.name), self.stale_after);
        // Its gap is a risk already.
        if assessment.state == Protection::AtRisk {
            let problem = self.given_up.problem(now, cluster, self.stale_after);
            assessment.reason.extend(problem.map(|problem| format!("; {problem}")));
        }
        assessment
    }

    /// When the next scheduled backup may start.
    pub fn next_backup(&self, cluster: &ClusterSeen<'_>) -> Option<Timestamp> {
        let (policy, spec) = (cluster.binding.policy()?, cluster.policy?);
        let row = self.followed.get(cluster.name.as_str()).filter(|row| row.value.policy == policy);
        let handled = row.map_or(self.picture.now, |row| row.value.handled);
        let due = spec.schedule()?.due(self.picture.now, policy, &cluster.name, handled);
        due.run.or(due.next).map(|run| run.start)
    }
}
