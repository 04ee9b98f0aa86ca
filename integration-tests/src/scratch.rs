//! One test's place on disk, and the end of all it started.
//!
//! On the way out it stops every PostgreSQL whose data directory lies within, shows the logs if the test failed, judges
//! the logs if it did not, and removes the folder. Should this process die first, the [`reaper`] does the stopping.

pub mod reaper;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::log_watch::LogWatch;
use crate::os_user::os_user;

/// A Unix socket's path holds 107 bytes, of which `.s.PGSQL.12345` and our own folders need half.
const LONGEST_BASE: usize = 40;

/// Cheap to clone; the last clone's end is the end of the folder.
#[derive(Clone)]
pub struct Scratch(Arc<Inner>);

struct Inner {
    path: PathBuf,
    kept: Mutex<bool>,
    watches: Mutex<Vec<PathBuf>>,
    allowed: Mutex<Vec<String>>,
}

/// Runs a test's body; an error becomes a panic while the folder still stands, so that the logs are shown.
pub fn in_scratch(body: impl FnOnce(&Scratch) -> anyhow::Result<()>) {
    let scratch = Scratch::new().expect("a scratch folder can be made");
    if let Err(error) = body(&scratch) {
        panic!("{error:#}");
    }
}

impl Scratch {
    /// `$TMPDIR`, if its path is short enough for a socket, else /tmp. `WALFLEET_KEEP=1` keeps the folder.
    pub fn new() -> anyhow::Result<Scratch> {
        let base = std::env::temp_dir();
        let base = if base.as_os_str().len() > LONGEST_BASE { PathBuf::from("/tmp") } else { base };
        let path = tempfile::Builder::new().prefix("wf-").tempdir_in(&base).context("create a scratch folder")?.keep();
        os_user().own(&path)?;
        reaper::watch_dir(&path);
        let kept = std::env::var_os("WALFLEET_KEEP").is_some_and(|value| value == "1");
        Ok(Scratch(Arc::new(Inner {
            path,
            kept: Mutex::new(kept),
            watches: Mutex::default(),
            allowed: Mutex::default(),
        })))
    }

    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// A path below the scratch folder, not created.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.path.join(name)
    }

    /// A new folder that the servers' user owns.
    pub fn dir(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.join(name);
        os_user().create_dir(&path)?;
        Ok(path)
    }

    /// Leaves folder and servers behind, for a person to look at.
    pub fn keep(&self) {
        *self.0.kept.lock().expect("no holder panics") = true;
        reaper::keep_all();
    }

    /// Has a log judged at the end of the test.
    pub fn watch_log(&self, log: &Path) {
        self.0.watches.lock().expect("no holder panics").push(log.to_owned());
    }

    /// Announces a WARN or ERROR line that this test provokes: any line that contains `text`.
    pub fn allow_log(&self, text: &str) {
        self.0.allowed.lock().expect("no holder panics").push(text.to_owned());
    }

    /// Has no log judged any more: for the demo, which has a verdict of its own.
    pub fn forgive_logs(&self) {
        self.0.watches.lock().expect("no holder panics").clear();
    }

    /// The ends of all logs, to standard error.
    pub fn show_logs(&self) {
        show_logs(self.path());
    }

    /// Complaints of our programs that were not announced.
    pub fn complaints(&self) -> Vec<String> {
        self.0.complaints()
    }
}

impl Inner {
    fn complaints(&self) -> Vec<String> {
        let watch = LogWatch::new(self.allowed.lock().expect("no holder panics").clone());
        let logs = self.watches.lock().expect("no holder panics");
        logs.iter().flat_map(|log| watch.complaints(log)).collect()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if *self.kept.lock().expect("no holder panics") {
            eprintln!("kept {}", self.path.display());
            return;
        }
        stop_postmasters(&self.path);
        let complaints = self.complaints();
        if std::thread::panicking() {
            show_logs(&self.path);
        }
        reaper::forget_dir(&self.path);
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
        if !complaints.is_empty() && !std::thread::panicking() {
            panic!("our programs complained, and the test did not announce it:\n{}", complaints.join("\n"));
        }
    }
}

/// Stops what a restore may have started behind our back.
fn stop_postmasters(root: &Path) {
    let pids: Vec<Pid> = find(root, "postmaster.pid")
        .iter()
        .filter_map(|file| {
            std::fs::read_to_string(file).ok()?.lines().next()?.trim().parse().ok().and_then(Pid::from_raw)
        })
        .filter(|pid| runs_postgres(*pid))
        .collect();
    for pid in &pids {
        // SIGQUIT is the immediate shutdown (postmaster.c).
        let _ = kill_process(*pid, Signal::QUIT);
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while pids.iter().any(|pid| test_kill_process(*pid).is_ok()) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A stale file may name a pid that is another program's by now.
fn runs_postgres(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).is_ok_and(|name| name.trim() == "postgres")
}

/// Files of that name below a folder, without following links.
fn find(root: &Path, name: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(find(&entry.path(), name)),
            Ok(_) if entry.file_name() == name => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

/// The ends of all logs, for the report of a failed test.
fn show_logs(root: &Path) {
    const LINES: usize = 40;
    let Ok(entries) = std::fs::read_dir(root) else { return };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "log"))
    {
        let bytes = std::fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default();
        eprintln!("--- {} (last {} of {} lines)\n{}", path.display(), tail.len(), lines.len(), tail.join("\n"));
    }
}
