//! The operator's command, as one operator of one controller.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::binaries;
use crate::os_user::os_user;
use crate::output::Output;

const COMMAND_LIMIT: Duration = Duration::from_secs(240);

pub struct Ctl {
    program: PathBuf,
    context: PathBuf,
}

impl Ctl {
    /// `context` is a file that says which controller and as whom.
    pub fn new(context: &Path) -> anyhow::Result<Ctl> {
        Ok(Ctl { program: binaries::program(binaries::CTL)?, context: context.to_owned() })
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    pub fn context(&self) -> &Path {
        &self.context
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = os_user().command(&self.program);
        command.arg("--context").arg(&self.context).args(words).env("NO_COLOR", "1");
        command
    }

    pub fn run(&self, words: &[&str]) -> anyhow::Result<Output> {
        Output::of(self.command(words), COMMAND_LIMIT)
    }

    /// Runs it with `-o json`; it must succeed.
    pub fn json(&self, words: &[&str]) -> anyhow::Result<Value> {
        let mut words = words.to_vec();
        words.extend(["-o", "json"]);
        self.run(&words)?.ok()?.json()
    }

    /// As a person would type it, for the demo.
    pub fn typed(&self, words: &[&str]) -> String {
        let quoted = words.iter().map(|word| if word.contains(' ') { format!("'{word}'") } else { (*word).to_owned() });
        std::iter::once("walfleet".to_owned()).chain(quoted).collect::<Vec<_>>().join(" ")
    }
}
