//! A child process with its output in a log of the scratch folder, stopped by its pid when dropped.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::scratch::{Scratch, reaper};
use crate::wait_for;

/// Time to end by itself after a polite signal.
const GRACE: Duration = Duration::from_secs(10);

pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    /// Sent first when dropped.
    polite: Signal,
}

impl Process {
    /// Starts a command; what it prints is appended to `<name>.log`.
    pub fn spawn(scratch: &Scratch, name: &str, mut command: Command, polite: Signal) -> anyhow::Result<Process> {
        let log = scratch.join(&format!("{name}.log"));
        let file = OpenOptions::new().create(true).append(true).open(&log).context("open a log")?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("share a log")?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {name}: {:?}", command.get_program()))?;
        reaper::watch_pid(child.id());
        Ok(Process { name: name.to_owned(), child, log, polite })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Its end, if it has ended.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("wait for {}", self.name))
    }

    pub fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = kill_process(self.pid(), signal);
    }

    pub fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, limit, || self.ended())
    }

    /// Asks it to end, and kills it if it does not.
    pub fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        self.signal(self.polite);
        match self.wait(GRACE) {
            Ok(status) => Ok(status),
            Err(_) => {
                self.signal(Signal::KILL);
                self.wait(GRACE)
            }
        }
    }

    /// `kill -9` for it and all its descendants, as a crash of the host would; returns when all are gone.
    pub fn kill_nine(&mut self) -> anyhow::Result<()> {
        // Stopped first, it can start no child while the list is made.
        self.signal(Signal::STOP);
        let family = descendants(self.pid());
        self.signal(Signal::KILL);
        for pid in &family {
            let _ = kill_process(*pid, Signal::KILL);
        }
        self.wait(GRACE)?;
        wait_for("the end of killed descendants", GRACE, || {
            Ok(family.iter().all(|pid| test_kill_process(*pid).is_err()).then_some(()))
        })
    }

    /// Gives it up, to be left behind.
    pub fn leave_running(self) {
        reaper::forget_pid(self.child.id());
        std::mem::forget(self);
    }

    /// Waits for a text in its log, and fails early if it ends before.
    pub fn wait_for_log(&mut self, text: &str, limit: Duration) -> anyhow::Result<()> {
        let what = format!("\"{text}\" in the log of {}", self.name);
        wait_for(&what, limit, || {
            if self.log_text().contains(text) {
                return Ok(Some(()));
            }
            match self.ended()? {
                Some(status) => anyhow::bail!("{} ended ({status}) before it said \"{text}\"", self.name),
                None => Ok(None),
            }
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = self.child.id();
        if let Ok(None) = self.ended()
            && let Err(error) = self.stop()
        {
            eprintln!("{error:#}");
        }
        reaper::forget_pid(pid);
    }
}

/// All processes below one, by the parents in /proc/<pid>/stat.
fn descendants(root: Pid) -> Vec<Pid> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // "pid (name) state parent …", and the name may hold anything.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<i32>().ok());
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut family = Vec::new();
    let mut open = vec![root.as_raw_nonzero().get()];
    while let Some(parent) = open.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            family.extend(Pid::from_raw(child));
            open.push(child);
        }
    }
    family
}

/// Runs a command to its end; its standard output, or an error with what it said.
pub fn run(mut command: Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {:?}", command.get_program()))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    anyhow::ensure!(
        output.status.success(),
        "{:?} ended with {}:\n{stdout}{}",
        command.get_args().collect::<Vec<_>>(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(stdout)
}
