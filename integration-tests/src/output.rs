//! What a command of ours answered: text, errors, exit code.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Output {
    /// As typed, without the program's folder.
    pub command: String,
    pub stdout: String,
    pub stderr: String,
    /// 128 + signal if a signal ended it, as a shell says it.
    pub code: i32,
}

impl Output {
    /// Runs a command to its end, and fails if it takes longer: a command that hangs is a finding.
    pub fn of(mut command: Command, limit: Duration) -> anyhow::Result<Output> {
        use std::os::unix::process::ExitStatusExt;
        let typed = typed(&command);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {typed}"))?;
        let pid = rustix::process::Pid::from_child(&child);
        let (ended, watched) = std::sync::mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            let started = Instant::now();
            // Disconnected when the command has ended.
            if watched.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                return Some(started.elapsed());
            }
            None
        });
        let output = child.wait_with_output().with_context(|| format!("wait for {typed}"))?;
        drop(ended);
        let hung = watchdog.join().ok().flatten();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        anyhow::ensure!(hung.is_none(), "{typed} did not end within {limit:?}; it said:\n{stdout}{stderr}");
        let code = output.status.code().or(output.status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
        anyhow::ensure!(!stderr.contains(" panicked at "), "{typed} panicked:\n{stderr}");
        Ok(Output { command: typed, stdout, stderr, code })
    }

    /// Exit code 0, or an error with all that was said.
    pub fn ok(self) -> anyhow::Result<Output> {
        self.exit(0)
    }

    /// The documented exit code.
    pub fn exit(self, code: i32) -> anyhow::Result<Output> {
        anyhow::ensure!(
            self.code == code,
            "{} ended with {} instead of {code}:\n{}{}",
            self.command,
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }

    /// A text in the error output: what a person needs to read.
    pub fn says(self, text: &str) -> anyhow::Result<Output> {
        anyhow::ensure!(self.stderr.contains(text), "{} does not say \"{text}\":\n{}", self.command, self.stderr);
        Ok(self)
    }

    pub fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("{} gives JSON:\n{}", self.command, self.stdout))
    }
}

fn typed(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_string_lossy());
    // Behind setpriv and its options, the program is what was meant.
    let words: Vec<_> = words.collect();
    let start = words.iter().position(|word| word == "--").filter(|_| words.first().is_some_and(|w| w == "setpriv"));
    let words = words.get(start.map_or(0, |dashes| dashes + 1)..).unwrap_or_default();
    let short = |(index, word): (usize, &std::borrow::Cow<'_, str>)| match (index, word.rsplit_once('/')) {
        (0, Some((_, name))) => name.to_owned(),
        _ if word.contains(' ') => format!("'{word}'"),
        _ => word.to_string(),
    };
    words.iter().enumerate().map(short).collect::<Vec<_>>().join(" ")
}
