//! Stops what this process started, should this process be killed before it could.
//!
//! A shell holds the other end of a pipe; when the pipe closes, for whatever reason, it kills the processes that it was
//! told of and not told to forget. A pid alone is not trusted: its start time must match.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex};

const SCRIPT: &str = r#"
trap '' INT TERM HUP
declare -A pids dirs
started() { [ -r "/proc/$1/stat" ] && sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
while read -r verb what; do
  case $verb in
    pid) pids[$what]=$(started "$what") ;;
    dir) dirs[$what]=1 ;;
    forget-pid) unset "pids[$what]" ;;
    forget-dir) unset "dirs[$what]" ;;
    keep-all) pids=(); dirs=() ;;
  esac
done
for pid in "${!pids[@]}"; do
  [ -n "${pids[$pid]}" ] && [ "$(started "$pid")" = "${pids[$pid]}" ] && kill -KILL "$pid"
done
for dir in "${!dirs[@]}"; do
  find "$dir" -name postmaster.pid 2>/dev/null | while read -r file; do
    pid=$(head -n 1 "$file")
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = postgres ] && kill -QUIT "$pid"
  done
  sleep 1
  rm -rf "$dir"
done
"#;

static REAPER: LazyLock<Mutex<Child>> = LazyLock::new(|| {
    let child = Command::new("bash")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("bash is there: scripts/prepare.sh needs it too");
    Mutex::new(child)
});

fn tell(verb: &str, what: &dyn std::fmt::Display) {
    let mut reaper = REAPER.lock().expect("no holder panics");
    if let Some(pipe) = &mut reaper.stdin {
        // A reaper that is gone costs only the safety net.
        let _ = writeln!(pipe, "{verb} {what}");
    }
}

pub fn watch_pid(pid: u32) {
    tell("pid", &pid);
}

pub fn forget_pid(pid: u32) {
    tell("forget-pid", &pid);
}

pub fn watch_dir(dir: &Path) {
    tell("dir", &dir.display());
}

pub fn forget_dir(dir: &Path) {
    tell("forget-dir", &dir.display());
}

pub fn keep_all() {
    tell("keep-all", &"");
}
