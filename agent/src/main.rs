//! `walfleet-agent`: one process per Postgres host, and the host's own commands.

use std::process::exit;

use walfleet_agent::cli;

fn main() {
    let arguments: Vec<_> = std::env::args_os().collect();
    // Postgres waits for these, once a segment: no runtime, no telemetry, no configuration before them.
    if let Some(code) = cli::wal::dispatch(&arguments) {
        exit(code);
    }
    exit(cli::run(arguments));
}
