//! `run`: the daemon.

use walfleet_proto::telemetry::{self, TelemetryConfig};

use crate::cli::{RunArgs, usage};
use crate::config::{Config, LogFormat};
use crate::daemon;
use crate::failure::Failure;

pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let config = Config::load(&args.config).map_err(usage)?;
    let telemetry = TelemetryConfig {
        filter: config.telemetry.log.clone(),
        json: config.telemetry.log_format == LogFormat::Json,
        otlp_endpoint: config.telemetry.otlp_endpoint.clone(),
    };
    super::provide_cryptography();
    let runtime = super::runtime()?;
    let result = runtime.block_on(async {
        let _telemetry = telemetry::init("walfleet-agent", &telemetry).map_err(usage)?;
        daemon::run(config).await
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}
