//! Spans reach a collector, joined to the caller's trace; a collector that is away holds up nobody. In a file of its
//! own, since a process has one subscriber.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use tonic::{Request, Response, Status};
use walfleet_proto::telemetry::{self, TelemetryConfig};

#[derive(Clone, Default)]
struct Collector {
    received: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.received.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_reach_the_collector_under_the_callers_trace() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let collector = Collector::default();
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(collector.clone()))
        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener));
    let server = tokio::spawn(server);

    let config = TelemetryConfig { otlp_endpoint: Some(endpoint), ..TelemetryConfig::default() };
    let guard = telemetry::init("walfleet-test", &config).unwrap();
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let job = tracing::info_span!("job", job = "job_1");
    telemetry::set_parent(&job, parent);
    job.in_scope(|| tracing::info_span!("copy").in_scope(|| tracing::info!("copied")));
    drop(job);
    drop(guard);

    let received = collector.received.lock().unwrap().clone();
    let resources: Vec<_> = received.iter().flat_map(|request| &request.resource_spans).collect();
    let text = format!("{:?}", resources[0].resource);
    assert!(text.contains("walfleet-test"), "{text}");
    let spans: Vec<_> = resources.iter().flat_map(|spans| &spans.scope_spans).flat_map(|scope| &scope.spans).collect();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert!(spans.iter().all(|span| hex(&span.trace_id) == "0af7651916cd43dd8448eb211c80319c"), "{spans:?}");
    let find = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    assert_eq!(hex(&find("job").parent_span_id), "b7ad6b7169203331");
    assert_eq!(find("copy").parent_span_id, find("job").span_id);

    // Away: the end of a process is delayed by no more than the flush's deadline.
    server.abort();
    let begun = Instant::now();
    assert!(telemetry::init("walfleet-test", &config).is_err(), "a process has one subscriber");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}
