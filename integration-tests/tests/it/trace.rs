//! One trace from the operator's command through controller and agent to the object store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use tonic::{Request, Response, Status};
use walfleet_integration_tests::fleet::standalone::CLUSTER;
use walfleet_integration_tests::fleet::{Fleet, Place};
use walfleet_integration_tests::output::Output;
use walfleet_integration_tests::postgres::dataset::Dataset;
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::{block_on, runtime, wait_for};

/// Daemons export every few seconds (the SDK's batch processor: 5 s); this is for a machine that is very busy.
const EXPORT_LIMIT: Duration = Duration::from_secs(30);
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

#[test]
fn one_trace_leads_from_the_command_through_controller_and_agent_to_the_store() {
    in_scratch(|scratch| {
        let collector = Collector::start()?;
        let version = PgVersion::newest()?;
        let mut fleet = Fleet::start(scratch)?;
        fleet.controller.stop()?;
        fleet.controller.configure(&format!("telemetry: {{ otlp_endpoint: '{}' }}", collector.endpoint))?;
        fleet.controller.start()?;
        let server = PgServer::builder(scratch, "orders", &version)
            .setting("archive_mode", "on")
            .setting("archive_command", "false")
            .create()?;
        Dataset { scale: 1 }.create(&server)?;
        let telemetry = serde_json::json!({ "otlp_endpoint": collector.endpoint });
        let agent = fleet.agent("db1").instance(CLUSTER, &server).postgres(&version).section("telemetry", telemetry);
        let mut agent = agent.build()?;
        fleet.join(&mut agent, &[])?;
        fleet.protect(&Place::folder(scratch)?)?;
        fleet.wait_for_cluster(CLUSTER, "bound to its repository", |cluster| cluster["policy"].is_string())?;
        fleet.wait_until_bound(&agent, &server)?;
        agent.archive_for(&server)?;

        let mut command = fleet.admin.command(&["backup", "start", CLUSTER, "--wait"]);
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.endpoint);
        Output::of(command, COMMAND_LIMIT)?.ok()?;

        // The command's own spans left before it ended.
        let root = collector.spans().into_iter().find(|span| span.service == "walfleet" && span.parent.is_empty());
        let root = root.ok_or_else(|| anyhow::anyhow!("the command exported no root span"))?;
        assert_eq!(root.name, "walfleet backup start");
        let mut missing = String::new();
        let trace = wait_for("the whole trace of the backup", EXPORT_LIMIT, || {
            let trace = Trace::of(&root.trace, collector.spans());
            match trace.wants() {
                Some(wanted) => {
                    missing = format!("{wanted}\n{}", trace.drawn());
                    Ok(None)
                }
                None => Ok(Some(trace)),
            }
        });
        let trace = trace.map_err(|error| error.context(missing))?;
        let stored = trace.spans.values().find(|span| span.is_a_write()).expect("wanted above");
        let path = trace.path_to(stored);
        let services: Vec<_> = path.iter().map(|span| span.service.as_str()).collect();
        let names: Vec<_> = path.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(services[..3], ["walfleet", "walfleet-controller", "walfleet-agent"], "{names:?}");
        assert_eq!(names[..3], ["walfleet backup start", "walfleet.operator.v1.Jobs/StartBackup", "job"]);
        drop(agent);
        Ok(())
    });
}

#[derive(Clone, Debug)]
struct Span {
    service: String,
    trace: Vec<u8>,
    id: Vec<u8>,
    /// Empty: the root.
    parent: Vec<u8>,
    name: String,
}

impl Span {
    fn is_a_write(&self) -> bool {
        self.service == "walfleet-agent" && self.name == "store.create"
    }
}

/// The spans of one trace, by their ids.
struct Trace {
    spans: BTreeMap<Vec<u8>, Span>,
}

impl Trace {
    fn of(id: &[u8], spans: Vec<Span>) -> Trace {
        let ours = spans.into_iter().filter(|span| span.trace == id);
        Trace { spans: ours.map(|span| (span.id.clone(), span)).collect() }
    }

    /// What it lacks of being whole: every program's part, a write to the store, and no span without its parent.
    fn wants(&self) -> Option<String> {
        let services: BTreeSet<_> = self.spans.values().map(|span| span.service.as_str()).collect();
        if services != BTreeSet::from(["walfleet", "walfleet-agent", "walfleet-controller"]) {
            return Some(format!("spans of {services:?} only"));
        }
        let orphan = |span: &&Span| !span.parent.is_empty() && !self.spans.contains_key(&span.parent);
        if let Some(orphan) = self.spans.values().find(orphan) {
            return Some(format!("no parent of {} of {}", orphan.name, orphan.service));
        }
        if self.spans.values().filter(|span| span.parent.is_empty()).count() != 1 {
            return Some("more than one root".to_owned());
        }
        (!self.spans.values().any(Span::is_a_write)).then(|| "no store.create of the agent's".to_owned())
    }

    /// From the root down.
    fn path_to<'s>(&'s self, span: &'s Span) -> Vec<&'s Span> {
        let mut path: Vec<_> = std::iter::successors(Some(span), |span| self.spans.get(&span.parent)).collect();
        path.reverse();
        path
    }

    fn drawn(&self) -> String {
        let mut lines: BTreeMap<String, usize> = BTreeMap::new();
        for span in self.spans.values() {
            let path = self.path_to(span).into_iter().map(|span| format!("{}:{}", span.service, span.name));
            *lines.entry(path.collect::<Vec<_>>().join(" > ")).or_default() += 1;
        }
        lines.iter().map(|(path, count)| format!("{count:5} {path}\n")).collect()
    }
}

/// An OTLP/gRPC collector that keeps what it is sent.
#[derive(Clone)]
struct Collector {
    endpoint: String,
    received: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
}

impl Collector {
    fn start() -> anyhow::Result<Collector> {
        let listener = block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let collector = Collector { endpoint: format!("http://{}", listener.local_addr()?), received: Arc::default() };
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener));
        runtime().spawn(server);
        Ok(collector)
    }

    fn spans(&self) -> Vec<Span> {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        let mut spans = Vec::new();
        for resource in received.iter().flat_map(|request| &request.resource_spans) {
            let attributes = resource.resource.iter().flat_map(|resource| &resource.attributes);
            let name = attributes.filter(|attribute| attribute.key == "service.name").find_map(|attribute| {
                match attribute.value.as_ref()?.value.as_ref()? {
                    Value::StringValue(name) => Some(name.clone()),
                    _ => None,
                }
            });
            let service = name.unwrap_or_default();
            for span in resource.scope_spans.iter().flat_map(|scope| &scope.spans) {
                spans.push(Span {
                    service: service.clone(),
                    trace: span.trace_id.clone(),
                    id: span.span_id.clone(),
                    parent: span.parent_span_id.clone(),
                    name: span.name.clone(),
                });
            }
        }
        spans
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
