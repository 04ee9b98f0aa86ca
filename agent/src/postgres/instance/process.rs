//! Processes and shared memory, as Linux shows them in /proc.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// Names that a server's executable has.
const SERVER_NAMES: [&str; 2] = ["postgres", "postmaster"];

/// Data directories of all servers that can be seen: a server and its children work in theirs.
pub(super) fn data_dirs() -> BTreeSet<PathBuf> {
    let directory = |pid| {
        let path = fs::read_link(proc(pid, "cwd")).ok()?;
        // In another mount namespace the same path is another directory, or none.
        (same_directory(&path, &proc(pid, "cwd")) && path.join("PG_VERSION").exists()).then_some(path)
    };
    server_pids().into_iter().filter_map(directory).collect()
}

/// Server processes that work in a data directory.
pub(super) fn servers_in(data_dir: &Path) -> Vec<u32> {
    server_pids().into_iter().filter(|pid| same_directory(data_dir, &proc(*pid, "cwd"))).collect()
}

/// Whether a pid file's process lives and is that server, not a later process with its number.
pub(super) fn is_server_of(pid: u32, data_dir: &Path) -> bool {
    let alive = i32::try_from(pid).ok().and_then(Pid::from_raw).is_some_and(|pid| match test_kill_process(pid) {
        Ok(()) => true,
        // Not ours: whether it is the server, its name must tell.
        Err(Errno::PERM) => true,
        Err(_) => false,
    });
    if !alive || is_zombie(pid) {
        return false;
    }
    match fs::metadata(proc(pid, "cwd")) {
        Ok(_) => same_directory(data_dir, &proc(pid, "cwd")),
        // Another user's process does not show where it works. Better to take it for the server than to overwrite one.
        Err(_) => is_server(pid),
    }
}

/// The program that a process runs, also when its file was replaced since.
pub(super) fn executable(pid: u32) -> PathBuf {
    proc(pid, "exe")
}

/// Directory of the executables that the servers of a data directory were started from.
pub(super) fn executable_dir(pid: u32) -> Option<PathBuf> {
    fs::read_link(proc(pid, "exe")).ok()?.parent().map(Path::to_owned)
}

/// Every server process's id.
pub(super) fn server_pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| is_server(*pid)).collect()
}

fn is_server(pid: u32) -> bool {
    fs::read_to_string(proc(pid, "comm")).is_ok_and(|name| SERVER_NAMES.contains(&name.trim_end()))
}

/// Dead, but not yet waited for.
fn is_zombie(pid: u32) -> bool {
    // "123 (name) Z …"; the name may contain anything.
    let stat = fs::read_to_string(proc(pid, "stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}

fn proc(pid: u32, what: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{what}"))
}

fn same_directory(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => a.dev() == b.dev() && a.ino() == b.ino(),
        _ => false,
    }
}

/// Whether any process still has the segment mapped.
pub(super) fn is_shared_memory_attached(id: u32) -> bool {
    // key, shmid, perms, size, cpid, lpid, nattch, …
    let table = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let attached = |line: &str| {
        let mut fields = line.split_whitespace();
        let is_it = fields.nth(1)?.parse() == Ok(id);
        let count: u64 = fields.nth(4)?.parse().ok()?;
        Some(is_it && count > 0)
    };
    table.lines().any(|line| attached(line) == Some(true))
}

/// From /etc/passwd; users of other directories have no name here.
pub(in crate::postgres) fn user_name(uid: u32) -> Option<String> {
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}
