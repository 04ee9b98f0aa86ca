//! The operator's command, as one operator of one controller.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use serde_json::Value;

use crate::binaries;
use crate::os_user::os_user;
use crate::output::Output;
use crate::scratch::Scratch;

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

    /// Becomes an operator with a token; the context lies in a new folder of its own.
    pub fn login(scratch: &Scratch, controller: &str, token: &str, name: &str) -> anyhow::Result<Ctl> {
        let program = binaries::program(binaries::CTL)?;
        let home = scratch.dir(&format!("operator-{name}"))?;
        let mut command = os_user().command(&program);
        command.args(["login", "--controller", controller, "--token", token, "--name", name, "-o", "json"]);
        command.env("XDG_CONFIG_HOME", &home);
        let answer = Output::of(command, COMMAND_LIMIT)?.ok()?.json()?;
        let context = answer["path"].as_str().with_context(|| format!("login names no context file: {answer}"))?;
        Ok(Ctl { program, context: PathBuf::from(context) })
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
