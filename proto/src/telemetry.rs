//! Logs, spans and the trace context that travels with calls and jobs; the same in every binary.
//!
//! Logs go to stderr. Spans always get ids, so that one trace joins a command, the controller and the agent even where
//! only one of them exports; they are exported over OTLP/gRPC where an endpoint is configured. Never decides what is
//! worth a span or a log line.

use std::io::IsTerminal;
use std::time::Duration;

use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{TraceContextExt, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Span;
use tracing::level_filters::LevelFilter;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// W3C Trace Context, level 1.
const TRACEPARENT: &str = "traceparent";
/// How long a process waits at its end for spans to leave; a missing collector must not hold up an exit.
const FLUSH_DEADLINE: Duration = Duration::from_secs(2);
/// Of one export, so that the flush above is not spent on a single attempt.
const EXPORT_TIMEOUT: Duration = Duration::from_millis(1500);

#[derive(Debug, Clone)]
pub struct TelemetryConfig {
    /// `tracing_subscriber::EnvFilter` directives: "info", "info,walfleet_agent=debug", …
    pub filter: String,
    /// One JSON object per line instead of text.
    pub json: bool,
    /// "http://127.0.0.1:4317"; spans are not exported without it.
    pub otlp_endpoint: Option<String>,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { filter: "info".to_owned(), json: false, otlp_endpoint: None }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error(
        "parse log filter {filter:?}: {source}\nHINT: use a level such as \"info\", or \"info,walfleet_agent=debug\"."
    )]
    Filter { filter: String, source: tracing_subscriber::filter::ParseError },
    #[error(
        "build span exporter for {endpoint:?}: {source}\nHINT: name the collector's OTLP/gRPC endpoint, such as \"http://127.0.0.1:4317\"."
    )]
    Exporter { endpoint: String, source: opentelemetry_otlp::ExporterBuildError },
    #[error("install the log subscriber: {source}")]
    Install { source: tracing_subscriber::util::TryInitError },
}

/// Keeps the exporter alive. Dropping it flushes spans, for `FLUSH_DEADLINE` at most: drop it before
/// `std::process::exit`, which runs no destructors.
#[must_use = "spans are flushed when the guard is dropped"]
pub struct Guard {
    provider: SdkTracerProvider,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // A collector that is away is no fault of ours: the exporter has logged it.
        let _ = self.provider.shutdown_with_timeout(FLUSH_DEADLINE);
    }
}

/// Installs logs and spans for the process; once. With an endpoint it must run inside a multi-threaded tokio runtime,
/// on which the exporter's connection lives.
pub fn init(service_name: &'static str, config: &TelemetryConfig) -> Result<Guard, TelemetryError> {
    let filter = EnvFilter::try_new(&config.filter)
        .map_err(|source| TelemetryError::Filter { filter: config.filter.clone(), source })?;
    let provider = provider(service_name, config.otlp_endpoint.as_deref())?;
    let spans = tracing_opentelemetry::layer().with_tracer(provider.tracer(service_name)).with_filter(span_targets());
    let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let text = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(ansi);
    let logs = if config.json { text.json().boxed() } else { text.boxed() };
    tracing_subscriber::registry()
        .with(logs.with_filter(filter))
        .with(spans)
        .try_init()
        .map_err(|source| TelemetryError::Install { source })?;
    Ok(Guard { provider })
}

fn provider(service_name: &'static str, endpoint: Option<&str>) -> Result<SdkTracerProvider, TelemetryError> {
    let resource = Resource::builder()
        .with_service_name(service_name)
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    let builder = SdkTracerProvider::builder().with_resource(resource);
    let Some(endpoint) = endpoint else { return Ok(builder.build()) };
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(|source| TelemetryError::Exporter { endpoint: endpoint.to_owned(), source })?;
    Ok(builder.with_batch_exporter(exporter).build())
}

/// Ours at INFO and above. The transport below the exporter is left out: it would report its own reports.
fn span_targets() -> Targets {
    let mut targets = Targets::new().with_default(LevelFilter::INFO);
    for transport in ["opentelemetry", "h2", "hyper", "hyper_util", "tonic", "tower", "reqwest", "rustls"] {
        targets = targets.with_target(transport, LevelFilter::OFF);
    }
    targets
}

/// The current span as a W3C `traceparent`, for a job order; empty without one.
pub fn current_traceparent() -> String {
    traceparent(&Span::current().context())
}

fn traceparent(context: &Context) -> String {
    let span = context.span();
    let span = span.span_context();
    if !span.is_valid() {
        return String::new();
    }
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8())
}

/// Makes `span` a child of the span that `traceparent` names. Must come before the span is entered. Anything that is
/// not a valid `traceparent` is ignored: telemetry never fails a job.
pub fn set_parent(span: &Span, traceparent: &str) {
    adopt(span, &OneHeader { traceparent });
}

/// Client interceptor: sends the current span's context along.
///
/// `Client::with_interceptor(channel, telemetry::inject)`
pub fn inject(mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut Metadata(request.metadata_mut()));
    Ok(request)
}

/// The span of one incoming call, child of the caller's. For `tonic::transport::Server::trace_fn`.
pub fn server_span(request: &http::Request<()>) -> Span {
    let method = request.uri().path().trim_start_matches('/');
    let span = tracing::info_span!("call", otel.name = method, otel.kind = "server", rpc.method = method);
    adopt(&span, &Headers(request.headers()));
    span
}

fn adopt(span: &Span, carrier: &dyn Extractor) {
    let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), carrier);
    if parent.span().span_context().is_valid() {
        // Refused only where no span layer is installed, or where the span has begun.
        let _ = span.set_parent(parent);
    }
}

struct OneHeader<'a> {
    traceparent: &'a str,
}

impl Extractor for OneHeader<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        key.eq_ignore_ascii_case(TRACEPARENT).then_some(self.traceparent)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

struct Headers<'a>(&'a http::HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

struct Metadata<'a>(&'a mut tonic::metadata::MetadataMap);

impl Injector for Metadata<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) = (tonic::metadata::MetadataKey::from_bytes(key.as_bytes()), value.parse()) {
            self.0.insert(key, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_spans(check: impl FnOnce()) {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), check);
    }

    #[test]
    fn one_trace_id_travels_through_metadata_and_job_orders() {
        with_spans(|| {
            let command = tracing::info_span!("command");
            let sent = command.in_scope(|| inject(tonic::Request::new(()))).unwrap();
            let header = sent.metadata().get(TRACEPARENT).unwrap().to_str().unwrap().to_owned();

            let call =
                server_span(&http::Request::builder().uri("/a.B/C").header(TRACEPARENT, &header).body(()).unwrap());
            let order = call.in_scope(current_traceparent);
            let job = tracing::info_span!("job");
            set_parent(&job, &order);
            let last = job.in_scope(current_traceparent);

            let trace = |text: &str| text.split('-').nth(1).unwrap().to_owned();
            assert_eq!(trace(&header), trace(&order));
            assert_eq!(trace(&header), trace(&last));
            assert_ne!(order, last, "each has its own span id");
        });
    }

    #[test]
    fn a_foreign_traceparent_that_does_not_parse_is_ignored() {
        with_spans(|| {
            for text in ["", "00", "00-0-0-00", "zz-日本-x-01", &"0".repeat(5000)] {
                let span = tracing::info_span!("job");
                set_parent(&span, text);
                assert_eq!(span.in_scope(current_traceparent).len(), 55, "{text}");
            }
        });
    }

    #[test]
    fn without_spans_there_is_no_traceparent() {
        assert_eq!(current_traceparent(), "");
    }
}
