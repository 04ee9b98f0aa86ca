//! `make demo`: the main job end to end on this machine. With `--keep` the fleet stays, with commands to try.

use std::process::ExitCode;

fn main() -> ExitCode {
    let keep = std::env::args().skip(1).any(|word| word == "--keep");
    walfleet_integration_tests::demo::run(keep)
}
