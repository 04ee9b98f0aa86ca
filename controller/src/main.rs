//! The controller's process: parse, load, build, run until told to stop, then stop in order.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use walfleet_controller::cli::{self, Cli, Command, init, transfer};
use walfleet_controller::config::{Config, LogFormat};
use walfleet_controller::serve;
use walfleet_proto::telemetry::{self, TelemetryConfig};

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Before anything speaks TLS: with no process-wide provider rustls would have to guess one.
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        eprintln!("walfleet-controller: another cryptography provider is installed already");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("walfleet-controller: start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(execute(cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("walfleet-controller: {}", cli::describe(&error));
            ExitCode::from(cli::exit_code(&error))
        }
    }
}

async fn execute(command: Command) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    match command {
        Command::Init(args) => init::init(&args, &mut out).await?,
        Command::Admin(args) => init::admin(&args, &mut out).await?,
        Command::State { command } => transfer::run(&command, &mut out).await?,
        Command::Run(args) => run(Config::load(&args.config)?).await?,
    }
    out.flush().context("write to standard output")
}

async fn run(config: Config) -> anyhow::Result<()> {
    // First of all, so that everything after it is logged; dropped last, so that the last spans leave.
    let _telemetry = telemetry::init("walfleet-controller", &telemetry_config(&config))?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;

    let mut running = serve::start(config).await?;
    tracing::info!(address = %running.address, metrics = ?running.metrics_address, version = env!("CARGO_PKG_VERSION"), "ready");

    // Safe to drop: the signals take nothing, and `ended` only waits.
    let signal = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        fault = running.ended() => return Err(fault.into()),
    };
    tracing::info!(signal, "stopping");
    // Health, then loops and streams, then calls in flight, with a deadline; a second signal cuts it short.
    let stopped = tokio::select! {
        stopped = running.stop() => stopped,
        _ = terminate.recv() => anyhow::bail!("stopped at once by a second signal"),
        _ = interrupt.recv() => anyhow::bail!("stopped at once by a second signal"),
    };
    if let Err(error) = stopped {
        tracing::warn!(%error, "stopped, but not in order");
    }
    // The state closes with its last handle: every acknowledged write has been durable since its acknowledgement.
    tracing::info!("stopped");
    Ok(())
}

fn telemetry_config(config: &Config) -> TelemetryConfig {
    TelemetryConfig {
        filter: config.telemetry.log.clone(),
        json: config.telemetry.log_format == LogFormat::Json,
        otlp_endpoint: config.telemetry.otlp_endpoint.clone(),
    }
}
