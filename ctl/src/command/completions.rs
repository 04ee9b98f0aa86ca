//! `walfleet completions`

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::failure::Failure;
use crate::session::Session;

/// Print completions for a shell
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet completions bash > /etc/bash_completion.d/walfleet
  walfleet completions zsh > \"${fpath[1]}/_walfleet\"
  walfleet completions fish > ~/.config/fish/completions/walfleet.fish")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl CompletionsArgs {
    pub fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        // Into memory first: the generator panics on a pipe that closes.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "walfleet", &mut script);
        session.write(&script)
    }
}
