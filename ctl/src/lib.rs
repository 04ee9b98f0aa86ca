//! `walfleet`, the operator's command: asks the controller, prints the answer, follows jobs.
//!
//! It decides nothing about the fleet and holds no data: every fact comes from the controller, every change goes
//! through it. Data goes to stdout through one printer (`print`), everything else to stderr; `wire` is the only door to
//! the generated types, `view` holds what is shown, `command/<noun>.rs` follows the command line word by word.
//!
//! [`run`] is the whole program without the process around it, so that tests type what operators type.

use std::ffi::OsString;
use std::io::Write;

use clap::{CommandFactory, FromArgMatches};
use tracing::Instrument;

mod certificate;
mod cli;
mod client;
mod command;
mod context;
mod exit;
mod failure;
mod follow;
mod ink;
mod print;
mod quantity;
mod renewal;
mod session;
mod surroundings;
mod target;
mod view;
mod when;
mod wire;

pub use exit::Exit;
pub use surroundings::Surroundings;

/// Runs one command line (the program's name first) to its end.
pub async fn run<I, T>(
    arguments: I,
    surroundings: &Surroundings,
    stdout: &mut (dyn Write + Send),
    stderr: &mut (dyn Write + Send),
) -> Exit
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let mut command = cli::Cli::command();
    if let Some(width) = surroundings.width {
        command = command.term_width(width);
    }
    let parsed = command.try_get_matches_from(arguments).and_then(|matches| {
        let path = command_path(&matches);
        Ok((path, cli::Cli::from_arg_matches(&matches)?))
    });
    let (path, cli) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return not_run(&error, surroundings, stdout, stderr),
    };
    let mut session =
        session::Session::new(surroundings, cli.everywhere.output, cli.everywhere.context, stdout, stderr);
    // The root of the trace that goes through controller and agent.
    let span = tracing::info_span!("command", otel.name = %format!("walfleet {path}"));
    match cli.command.run(&mut session).instrument(span).await {
        Ok(()) => Exit::Done,
        Err(failure) => {
            session.note(&format!("{} {failure}", ink::Ink::Bad.on("error:")));
            failure.exit()
        }
    }
}

/// Help, version, or a usage error: clap has the text.
fn not_run(
    error: &clap::Error,
    surroundings: &Surroundings,
    stdout: &mut (dyn Write + Send),
    stderr: &mut (dyn Write + Send),
) -> Exit {
    let text = |colour| if colour { error.render().ansi().to_string() } else { error.render().to_string() };
    if error.use_stderr() {
        let _ = write!(stderr, "{}", text(surroundings.colour_on_stderr()));
        Exit::Usage
    } else {
        let _ = write!(stdout, "{}", text(surroundings.colour_on_stdout()));
        Exit::Done
    }
}

fn command_path(matches: &clap::ArgMatches) -> String {
    let mut words = Vec::new();
    let mut level = matches.subcommand();
    while let Some((word, below)) = level {
        words.push(word);
        level = below.subcommand();
    }
    words.join(" ")
}
