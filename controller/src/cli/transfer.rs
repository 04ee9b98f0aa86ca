//! `state export` and `state import`.

use std::io::{BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Context;

use super::StateCommand;
use crate::config::Config;
use crate::serve::state_options;
use crate::state::{State, transfer};

pub async fn run(command: &StateCommand, out: &mut impl Write) -> anyhow::Result<()> {
    match command {
        StateCommand::Export { config, output } => {
            let state = open(&config.config)?;
            let Some(path) = output else {
                let keys = transfer::export(&state, &mut BufWriter::new(&mut *out)).await?;
                eprintln!("exported {keys} keys");
                return Ok(());
            };
            let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
            let mut file = BufWriter::new(file.with_context(|| format!("write {}", path.display()))?);
            let keys = transfer::export(&state, &mut file).await?;
            let file = file.into_inner().map_err(|error| error.into_error());
            file.and_then(|file| file.sync_all()).with_context(|| format!("write {}", path.display()))?;
            writeln!(out, "exported {keys} keys to {}", path.display())?;
        }
        StateCommand::Import { config, input } => {
            // First the file, then the state: a wrong path leaves no empty state behind.
            let file = std::fs::File::open(input).with_context(|| format!("read {}", input.display()))?;
            let state = open(&config.config)?;
            let keys = transfer::import(&state, &mut BufReader::new(file)).await?;
            writeln!(out, "imported {keys} keys")?;
        }
    }
    Ok(())
}

fn open(config: &Path) -> anyhow::Result<State> {
    let config = Config::load(config)?;
    Ok(State::open(&config.state_path(), state_options(&config))?)
}
