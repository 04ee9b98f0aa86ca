//! The fleet in numbers, for Prometheus: jobs by state, agents, protection, lag, age of backups. Refreshed at the pace
//! of a scrape, not of events.

use std::time::Duration;

use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tokio_util::sync::CancellationToken;

use super::report::Overview;
use super::{Reconciler, in_full};
use crate::fleet::protection::Protection;
use crate::jobs::Phase;
use crate::metrics::Metrics;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClusterLabels {
    cluster: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClusterStateLabels {
    cluster: String,
    state: &'static str,
}

type Seconds = Gauge<f64, std::sync::atomic::AtomicU64>;

/// Cheap to clone.
#[derive(Clone, Default)]
pub struct FleetMetrics {
    jobs: Family<StateLabels, Gauge>,
    agents_connected: Gauge,
    agents_known: Gauge,
    protection: Family<ClusterStateLabels, Gauge>,
    lag: Family<ClusterLabels, Seconds>,
    backup_age: Family<ClusterLabels, Seconds>,
}

/// Prometheus scrapes every 15 to 60 seconds.
const PACE: Duration = Duration::from_secs(15);

impl FleetMetrics {
    pub fn register(metrics: &Metrics) -> FleetMetrics {
        let fleet = FleetMetrics::default();
        metrics.register(|registry| {
            registry.register("jobs", "Jobs that are not over, by state", fleet.jobs.clone());
            registry.register("agents_connected", "Agents with a stream here", fleet.agents_connected.clone());
            registry.register("agents_known", "Agents ever seen and not revoked", fleet.agents_known.clone());
            let help = "1 for the state the cluster is in: protected, at_risk, unprotected or unknown";
            registry.register("cluster_protection", help, fleet.protection.clone());
            let help = "How far the repository trails the server; absent if not known";
            registry.register("cluster_lag_seconds", help, fleet.lag.clone());
            let help = "Age of the newest backup; absent without one";
            registry.register("cluster_backup_age_seconds", help, fleet.backup_age.clone());
        });
        fleet
    }

    /// Refreshes until cancelled.
    pub async fn run(&self, reconciler: &Reconciler, cancel: &CancellationToken) {
        loop {
            match reconciler.overview(Timestamp::now()).await {
                Ok(overview) => self.show(&overview),
                Err(error) => tracing::warn!(error = in_full(&error), "cannot measure the fleet"),
            }
            if cancel.run_until_cancelled(tokio::time::sleep(PACE)).await.is_none() {
                return;
            }
        }
    }

    fn show(&self, overview: &Overview) {
        for phase in Phase::ALL.into_iter().filter(|phase| !phase.is_over()) {
            let count = overview.jobs.iter().filter(|job| job.phase() == phase).count();
            self.jobs.get_or_create(&StateLabels { state: phase.as_str() }).set(whole(count));
        }
        let living = || overview.picture.agents.values().filter(|seen| !seen.enrolled.revoked);
        self.agents_known.set(whole(living().count()));
        self.agents_connected.set(whole(living().filter(|seen| seen.connected).count()));
        // What is gone or not known any more must not stay on show.
        self.protection.clear();
        self.lag.clear();
        self.backup_age.clear();
        for cluster in overview.picture.assemble().clusters.values() {
            let assessment = overview.assess(cluster);
            let name = cluster.name.to_string();
            for state in Protection::ALL {
                let labels = ClusterStateLabels { cluster: name.clone(), state: state.as_str() };
                self.protection.get_or_create(&labels).set(i64::from(assessment.state == state));
            }
            let labels = ClusterLabels { cluster: name };
            if let Some(lag) = assessment.lag {
                self.lag.get_or_create(&labels).set(lag.as_secs_f64());
            }
            if let Some(at) = assessment.last_backup.and_then(|backup| backup.finished_at) {
                self.backup_age.get_or_create(&labels).set(overview.picture.now.duration_since(at).as_secs_f64());
            }
        }
    }
}

fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
