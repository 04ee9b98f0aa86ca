//! `walfleet`: the process around the library.

use std::process::ExitCode;

use walfleet_ctl::{Surroundings, run};
use walfleet_proto::telemetry::{self, TelemetryConfig};

/// Two threads: one follows, one exports spans.
#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    // A dependency may bring a second provider, and rustls then panics over which one is meant.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let surroundings = Surroundings::of_process();
    let config = TelemetryConfig {
        filter: surroundings.variable("WALFLEET_LOG").unwrap_or("warn").to_owned(),
        json: false,
        otlp_endpoint: surroundings.variable("OTEL_EXPORTER_OTLP_ENDPOINT").map(str::to_owned),
    };
    let telemetry = match telemetry::init("walfleet", &config) {
        Ok(guard) => Some(guard),
        // An operator in trouble is not stopped by a log filter.
        Err(error) => {
            eprintln!("warning: {error}");
            None
        }
    };
    let exit = run(std::env::args_os(), &surroundings, &mut std::io::stdout(), &mut std::io::stderr()).await;
    drop(telemetry);
    ExitCode::from(exit.code())
}
