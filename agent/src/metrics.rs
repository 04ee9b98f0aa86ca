//! What Prometheus scrapes, and `/healthz`. Reads what others keep; holds nothing up and decides nothing.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::AtomicU64;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::shipping::Synchronous;

use crate::archiving::Shipping;
use crate::facts::{Facts, InstanceRole};
use crate::jobs::order::WorkKind;
use crate::jobs::report::Report;
use crate::jobs::{JobObserver, Jobs};
use crate::journal::{Ending, JobOutcome};
use crate::link::LinkState;
use crate::wal::receive::{StreamPhase, WaitsFor};

/// A content type that Prometheus and its kin agree on (OpenMetrics 1.0).
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfCluster {
    cluster: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfJob {
    kind: &'static str,
    outcome: &'static str,
}

type OfClusters = Family<OfCluster, Gauge<f64, AtomicU64>>;

/// All metrics of the agent.
pub struct Metrics {
    registry: Registry,
    link_up: Gauge,
    certificate_expiry: Gauge,
    running_jobs: Gauge,
    jobs: Family<OfJob, Counter>,
    job_seconds: Family<OfJob, Histogram>,
    instance_up: OfClusters,
    archive_ready: OfClusters,
    archive_failed: OfClusters,
    pg_wal_bytes: OfClusters,
    pg_wal_free_bytes: OfClusters,
    wal_shipped: OfClusters,
    wal_failures: OfClusters,
    wal_stored_bytes: OfClusters,
    wal_pieces: OfClusters,
    wal_requests: OfClusters,
    wal_streaming: OfClusters,
    wal_spool_degraded: OfClusters,
    wal_spool_bytes: OfClusters,
    wal_complete_until: OfClusters,
    pg_wal_full_in: OfClusters,
    wal_gaps: OfClusters,
    wal_durable_lsn: OfClusters,
    wal_durable_at: OfClusters,
    last_backup_at: OfClusters,
    backup_new_bytes: OfClusters,
    backup_stored_bytes: OfClusters,
    damaged_pages: OfClusters,
    unexplained_slots: OfClusters,
}

impl Metrics {
    pub fn new() -> Arc<Metrics> {
        let mut registry = Registry::with_prefix("walfleet_agent");
        let build = prometheus_client::metrics::info::Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The agent's version", build);
        let mut of_clusters = |name: &str, help: &str| {
            let family = OfClusters::default();
            registry.register(name, help, family.clone());
            family
        };
        let instance_up = of_clusters("instance_up", "1 if the cluster's server on this host answers");
        let archive_ready = of_clusters("archive_ready_segments", "Segments that wait in archive_status");
        let archive_failed = of_clusters("archive_failed", "Failed attempts, as pg_stat_archiver counts them");
        let pg_wal_bytes = of_clusters("pg_wal_bytes", "Bytes in pg_wal");
        let pg_wal_free_bytes = of_clusters("pg_wal_free_bytes", "Free bytes of pg_wal's file system");
        let wal_shipped = of_clusters("wal_shipped_files", "Files stored since the agent started");
        let wal_failures = of_clusters("wal_ship_failures", "Failed uploads since the agent started");
        let wal_stored_bytes = of_clusters("wal_stored_bytes", "Bytes of WAL stored since the agent started");
        let wal_pieces =
            of_clusters("wal_pieces_stored", "Pieces of unfinished segments stored since the agent started");
        let wal_requests =
            of_clusters("wal_store_requests", "Requests to the repository for WAL since the agent started");
        let wal_spool_degraded = of_clusters(
            "wal_spool_degraded",
            "1 while commits that are to wait for two spools wait for something else",
        );
        let wal_spool_bytes = of_clusters("wal_spool_bytes", "Bytes in this host's spool, of all clusters");
        let wal_streaming = of_clusters("wal_streaming", "1 while WAL is streamed, or followed on a standby");
        let wal_complete_until = of_clusters(
            "wal_complete_until_timestamp_seconds",
            "By the server's clock: everything committed before is in the repository",
        );
        let pg_wal_full_in = of_clusters(
            "pg_wal_full_in_seconds",
            "Until pg_wal is full at the rate at which WAL accumulates that is not stored or not let go of; -1 while it does not",
        );
        let wal_gaps = of_clusters(
            "wal_gaps",
            "Gaps in the WAL that the repository holds and nobody has acknowledged, as last seen by this agent",
        );
        let wal_durable_lsn = of_clusters("wal_durable_lsn", "End of the newest segment that the repository confirmed");
        let wal_durable_at = of_clusters(
            "wal_durable_timestamp_seconds",
            "When the repository last confirmed any WAL, which may be hours old: wal_complete_until tells how far a stream trails",
        );
        let last_backup_at = of_clusters("last_backup_timestamp_seconds", "When the last backup by this agent ended");
        let backup_new_bytes =
            of_clusters("last_backup_new_bytes", "Bytes that the last backup had to store anew, plain");
        let backup_stored_bytes = of_clusters("last_backup_stored_bytes", "Bytes that the last backup stored");
        let damaged_pages = of_clusters("last_backup_damaged_pages", "Pages with a wrong checksum in the last backup");

        let unexplained_slots = of_clusters(
            "last_backup_unexplained_slots",
            "Slots read for proof in the last backup that differed from its parent's though no WAL says so",
        );

        let (link_up, certificate_expiry, running_jobs) = (Gauge::default(), Gauge::default(), Gauge::default());
        registry.register("link_up", "1 while linked to the controller", link_up.clone());
        let help = "When this host's certificate expires, seconds since the Unix epoch; 0 without one";
        registry.register("certificate_expiry_timestamp_seconds", help, certificate_expiry.clone());
        registry.register("running_jobs", "Jobs that run now", running_jobs.clone());
        let jobs = Family::<OfJob, Counter>::default();
        registry.register("jobs", "Jobs that ended", jobs.clone());
        // From a second to half a day: a verification of little and a restore of much.
        let job_seconds = Family::<OfJob, Histogram>::new_with_constructor(|| {
            Histogram::new([1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 10_800.0, 43_200.0])
        });
        registry.register_with_unit("job_duration", "How long jobs took", Unit::Seconds, job_seconds.clone());

        Arc::new(Metrics {
            registry,
            link_up,
            certificate_expiry,
            running_jobs,
            jobs,
            job_seconds,
            instance_up,
            archive_ready,
            archive_failed,
            pg_wal_bytes,
            pg_wal_free_bytes,
            wal_shipped,
            wal_failures,
            wal_stored_bytes,
            wal_pieces,
            wal_requests,
            wal_streaming,
            wal_spool_degraded,
            wal_spool_bytes,
            wal_complete_until,
            pg_wal_full_in,
            wal_gaps,
            wal_durable_lsn,
            wal_durable_at,
            last_backup_at,
            backup_new_bytes,
            backup_stored_bytes,
            damaged_pages,
            unexplained_slots,
        })
    }

    fn set(family: &OfClusters, cluster: &ClusterName, value: f64) {
        family.get_or_create(&OfCluster { cluster: cluster.to_string() }).set(value);
    }

    pub fn note_facts(&self, facts: &Facts) {
        for instance in &facts.instances {
            let Some(cluster) = &instance.cluster else { continue };
            let archive = &instance.archive;
            Self::set(&self.instance_up, cluster, f64::from(u8::from(instance.role != InstanceRole::Down)));
            Self::set(&self.archive_ready, cluster, archive.ready_segments as f64);
            Self::set(&self.archive_failed, cluster, archive.failed_count as f64);
            Self::set(&self.pg_wal_bytes, cluster, archive.pg_wal_bytes as f64);
            Self::set(&self.pg_wal_free_bytes, cluster, archive.pg_wal_free_bytes as f64);
            let full_in = archive.pg_wal_full_in_seconds.map_or(-1.0, |seconds| seconds as f64);
            Self::set(&self.pg_wal_full_in, cluster, full_in);
            // Not known: no figure.
            if !instance.windows.is_empty() {
                let gaps = instance.windows.iter().flat_map(|window| &window.gaps);
                Self::set(&self.wal_gaps, cluster, gaps.filter(|gap| !gap.acknowledged).count() as f64);
            }
        }
    }

    fn note_shipping(&self, cluster: &ClusterName, shipping: &Shipping) {
        let (archived, streamed) = (&shipping.archived, &shipping.streamed);
        Self::set(&self.wal_shipped, cluster, (archived.shipped + streamed.segments) as f64);
        Self::set(&self.wal_pieces, cluster, streamed.pieces as f64);
        Self::set(&self.wal_requests, cluster, shipping.requests as f64);
        Self::set(&self.wal_failures, cluster, (archived.failures + streamed.failures) as f64);
        Self::set(&self.wal_stored_bytes, cluster, shipping.stored_bytes() as f64);
        Self::set(&self.wal_streaming, cluster, f64::from(u8::from(streamed.phase.is_well())));
        match (&streamed.spool, shipping.shipping.synchronous) {
            (Some(spool), _) => {
                let is_degraded = spool.waits_for != WaitsFor::Spools;
                Self::set(&self.wal_spool_degraded, cluster, f64::from(u8::from(is_degraded)));
                Self::set(&self.wal_spool_bytes, cluster, spool.held_bytes as f64);
            }
            // Nothing is received: commits hang.
            (None, Some(Synchronous::Spool)) if matches!(streamed.phase, StreamPhase::Waiting(_)) => {
                Self::set(&self.wal_spool_degraded, cluster, 1.0)
            }
            (None, _) => {
                let cluster = OfCluster { cluster: cluster.to_string() };
                self.wal_spool_degraded.remove(&cluster);
                self.wal_spool_bytes.remove(&cluster);
            }
        }
        let durable = shipping.durable().max().map_or(0, |(_, lsn)| lsn.0);
        Self::set(&self.wal_durable_lsn, cluster, durable as f64);
        match streamed.complete_until {
            Some(at) => Self::set(&self.wal_complete_until, cluster, seconds(at)),
            None => drop(self.wal_complete_until.remove(&OfCluster { cluster: cluster.to_string() })),
        }
        if let Some(at) = archived.durable_at.max(streamed.durable_at) {
            Self::set(&self.wal_durable_at, cluster, seconds(at));
        }
    }
}

impl JobObserver for Metrics {
    fn ended(&self, kind: WorkKind, outcome: &JobOutcome) {
        let label = OfJob {
            kind: kind.name(),
            outcome: match &outcome.ending {
                Ending::Succeeded(_) => "succeeded",
                Ending::Failed { .. } => "failed",
                Ending::Cancelled => "cancelled",
            },
        };
        self.jobs.get_or_create(&label).inc();
        let took = outcome.finished_at.duration_since(outcome.started_at).as_secs_f64();
        self.job_seconds.get_or_create(&label).observe(took.max(0.0));
        if let Ending::Succeeded(report) = &outcome.ending
            && let Report::Backup(backup) = &**report
        {
            Self::set(&self.last_backup_at, &backup.cluster, seconds(backup.finished_at));
            Self::set(&self.backup_new_bytes, &backup.cluster, backup.new_bytes as f64);
            Self::set(&self.backup_stored_bytes, &backup.cluster, backup.stored_bytes as f64);
            Self::set(&self.damaged_pages, &backup.cluster, backup.damaged_pages as f64);
            Self::set(&self.unexplained_slots, &backup.cluster, backup.unexplained_slots as f64);
        }
    }
}

fn seconds(at: Timestamp) -> f64 {
    at.as_microsecond() as f64 / 1e6
}

/// What is read at each scrape.
pub struct Scrape {
    pub metrics: Arc<Metrics>,
    pub jobs: Arc<Jobs>,
    pub link: watch::Receiver<LinkState>,
    pub certificate_expiry: Box<dyn Fn() -> Option<Timestamp> + Send + Sync>,
    pub shipping: Box<dyn Fn() -> Vec<(ClusterName, Shipping)> + Send + Sync>,
    pub facts: watch::Receiver<Arc<Facts>>,
}

impl Scrape {
    fn text(&self) -> Result<String, std::fmt::Error> {
        let metrics = &self.metrics;
        metrics.link_up.set(i64::from(matches!(*self.link.borrow(), LinkState::Connected { .. })));
        metrics.certificate_expiry.set((self.certificate_expiry)().map_or(0, Timestamp::as_second));
        metrics.running_jobs.set(i64::try_from(self.jobs.now_running().len()).unwrap_or(i64::MAX));
        metrics.note_facts(&self.facts.borrow());
        for (cluster, status) in (self.shipping)() {
            metrics.note_shipping(&cluster, &status);
        }
        let mut text = String::new();
        encode(&mut text, &metrics.registry)?;
        Ok(text)
    }
}

/// Serves `/metrics` and `/healthz` until cancelled.
pub async fn serve(listen: SocketAddr, scrape: Arc<Scrape>, cancel: CancellationToken) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(listen).await?;
    tracing::info!(listen = %listener.local_addr()?, "serving metrics");
    axum::serve(listener, router(scrape)).with_graceful_shutdown(cancel.cancelled_owned()).await
}

fn router(scrape: Arc<Scrape>) -> Router {
    let healthy = || async { "ok\n" };
    Router::new().route("/metrics", get(metrics)).route("/healthz", get(healthy)).with_state(scrape)
}

async fn metrics(State(scrape): State<Arc<Scrape>>) -> impl IntoResponse {
    match scrape.text() {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
