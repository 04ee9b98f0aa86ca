//! The host's own commands, a file each. They work without a controller, with the same code that its jobs run.

use std::future::Future;
use std::path::{Path, PathBuf};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use walfleet_proto::telemetry::{self, TelemetryConfig};

use crate::failure::{ExitCode, Failure, Remedy};

pub mod backup;
pub mod doctor;
pub mod find;
pub mod grant;
pub mod init;
pub mod join;
pub mod list;
mod open;
pub mod restore;
pub mod run;
pub mod verify;

/// As if ended by SIGINT: said twice, it is obeyed without waiting.
const INTERRUPTED_TWICE: i32 = 130;

/// Runs a command on a runtime of its own, with logs on stderr. The token is cancelled by SIGINT and SIGTERM.
fn run_async<F, Fut>(telemetry: &TelemetryConfig, act: F) -> Result<(), Failure>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = Result<(), Failure>>,
{
    provide_cryptography();
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let _telemetry = telemetry::init("walfleet-agent", telemetry).map_err(failed)?;
        let cancel = CancellationToken::new();
        let watching = tokio::spawn(cancel_on_signals(cancel.clone()));
        let result = act(cancel).await;
        watching.abort();
        result
    });
    // A request that hangs must not keep the command.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| failed(format!("start the runtime: {error}")))
}

/// One provider for all of TLS; without it rustls panics where two are compiled in.
pub(super) fn provide_cryptography() {
    // Already provided is as good.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

async fn cancel_on_signals(cancel: CancellationToken) {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    tokio::select! {
        _ = interrupt.recv() => eprintln!("walfleet-agent: stopping; once more to give up at once"),
        _ = terminate.recv() => {}
    }
    cancel.cancel();
    let _ = interrupt.recv().await;
    std::process::exit(INTERRUPTED_TWICE);
}

/// Of commands: warnings only, since progress has its own lines; $WALFLEET_LOG says otherwise.
fn quiet() -> TelemetryConfig {
    let filter = std::env::var("WALFLEET_LOG").unwrap_or_else(|_| "warn".to_owned());
    TelemetryConfig { filter, ..TelemetryConfig::default() }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::new("failed", ExitCode::Failed, Remedy::Operator, error)
}

/// This program, as restored servers and archive_command should call it.
fn program() -> PathBuf {
    std::env::current_exe().unwrap_or_else(|_| Path::new("walfleet-agent").to_owned())
}
