//! `walfleet-agent`: one process per Postgres host, and the host's own commands.

use std::process::exit;

use walfleet_agent::{cli, memory};

fn main() {
    let arguments: Vec<_> = std::env::args_os().collect();
    // Postgres waits for these, once a segment: no runtime, no telemetry, no configuration before them.
    if let Some(code) = cli::wal::dispatch(&arguments) {
        exit(code);
    }
    memory::give_back_large_buffers();
    exit(cli::run(arguments));
}
