//! What the controller tells of itself: Prometheus metrics and its readiness. Rooms register their own metrics here;
//! nobody reads them back.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// One gRPC method and how its calls ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabels {
    pub service: &'static str,
    pub method: &'static str,
    pub code: &'static str,
}

/// How a connection attempt ended before it carried a call.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RefusalLabels {
    pub reason: &'static str,
}

/// The controller's own metrics; cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    readiness: Arc<Mutex<BTreeMap<&'static str, Readiness>>>,
    pub calls: Family<CallLabels, Counter>,
    pub call_seconds: Histogram,
    pub connections: Gauge,
    pub refused_connections: Family<RefusalLabels, Counter>,
}

/// Whether a part of the controller can do its work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    NotReady { why: String },
}

impl Default for Metrics {
    fn default() -> Self {
        // From a state read to a transaction that waits for a slow disk.
        let buckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
        let metrics = Self {
            registry: Arc::new(Mutex::new(Registry::with_prefix("walfleet_controller"))),
            readiness: Arc::default(),
            calls: Family::default(),
            call_seconds: Histogram::new(buckets),
            connections: Gauge::default(),
            refused_connections: Family::default(),
        };
        metrics.register(|registry| {
            registry.register("calls", "Calls by method and gRPC code", metrics.calls.clone());
            registry.register(
                "call_seconds",
                "Time until a call was answered, or its stream begun",
                metrics.call_seconds.clone(),
            );
            registry.register("connections", "Open connections", metrics.connections.clone());
            let help = "Connections that ended before their first call";
            registry.register("refused_connections", help, metrics.refused_connections.clone());
        });
        metrics
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they hold is valid between any two statements that change it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Metrics {
    /// Adds metrics; names get the prefix `walfleet_controller_`.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut lock(&self.registry));
    }

    /// Says how a part fares. What was never said counts for nothing.
    pub fn set_readiness(&self, part: &'static str, readiness: Readiness) {
        lock(&self.readiness).insert(part, readiness);
    }

    /// The parts that are not ready, and why; empty: ready.
    pub fn not_ready(&self) -> Vec<String> {
        let parts = lock(&self.readiness);
        if parts.is_empty() {
            return vec!["starting".to_owned()];
        }
        let missing = parts.iter().filter_map(|(part, readiness)| match readiness {
            Readiness::Ready => None,
            Readiness::NotReady { why } => Some(format!("{part}: {why}")),
        });
        missing.collect()
    }

    fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &lock(&self.registry))?;
        Ok(text)
    }

    /// Serves `/metrics` and `/healthz` until cancelled.
    pub async fn serve(self, listener: TcpListener, cancel: CancellationToken) -> std::io::Result<()> {
        let routes = Router::new().route("/metrics", get(metrics)).route("/healthz", get(healthz)).with_state(self);
        axum::serve(listener, routes).with_graceful_shutdown(cancel.cancelled_owned()).await
    }

    pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
        TcpListener::bind(address).await
    }
}

async fn metrics(Shared(metrics): Shared<Metrics>) -> impl IntoResponse {
    // https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md, "Overall Structure".
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn healthz(Shared(metrics): Shared<Metrics>) -> impl IntoResponse {
    let missing = metrics.not_ready();
    if missing.is_empty() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("not ready\n{}\n", missing.join("\n")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_what_every_part_says() {
        let metrics = Metrics::default();
        assert_eq!(metrics.not_ready(), ["starting"]);
        metrics.set_readiness("state", Readiness::Ready);
        metrics.set_readiness("door", Readiness::NotReady { why: "stopping".to_owned() });
        assert_eq!(metrics.not_ready(), ["door: stopping"]);
        metrics.set_readiness("door", Readiness::Ready);
        assert!(metrics.not_ready().is_empty());
    }

    #[test]
    fn metrics_are_open_metrics_text() {
        let metrics = Metrics::default();
        metrics.calls.get_or_create(&CallLabels { service: "a.B", method: "C", code: "OK" }).inc();
        let text = metrics.encode().unwrap();
        assert!(text.contains("walfleet_controller_calls_total{service=\"a.B\",method=\"C\",code=\"OK\"} 1"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
