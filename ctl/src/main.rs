//! `walfleet`: the process around the library.

use std::process::ExitCode;

use walfleet_ctl::{Exit, Surroundings, run};
use walfleet_proto::telemetry::{self, TelemetryConfig};

fn main() -> ExitCode {
    // A dependency may bring a second provider, and rustls then panics over which one is meant.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    // Two threads: one follows, one exports spans.
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: start threads: {error}");
            return ExitCode::from(Exit::Failed.code());
        }
    };
    let exit = runtime.block_on(command());
    // A look-up of a name may hang in the resolver long after its deadline; nobody waits for it.
    runtime.shutdown_background();
    ExitCode::from(exit.code())
}

async fn command() -> Exit {
    let surroundings = Surroundings::of_process();
    let config = TelemetryConfig {
        filter: surroundings.variable("WALFLEET_LOG").unwrap_or("warn").to_owned(),
        json: false,
        otlp_endpoint: surroundings.variable("OTEL_EXPORTER_OTLP_ENDPOINT").map(str::to_owned),
    };
    // Until the end of the command: dropping it sends the spans off.
    let _telemetry = match telemetry::init("walfleet", &config) {
        Ok(guard) => Some(guard),
        // An operator in trouble is not stopped by a log filter.
        Err(error) => {
            eprintln!("warning: {error}");
            None
        }
    };
    run(std::env::args_os(), &surroundings, &mut std::io::stdout(), &mut std::io::stderr()).await
}
