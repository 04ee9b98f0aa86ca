//! The lock file of a running server, `postmaster.pid` (src/include/utils/pidfile.h).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// What a server wrote about itself. Lines that come late in its start may still be missing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Postmaster {
    pub pid: u32,
    /// As the server was told; may be another name of the directory.
    pub data_dir: PathBuf,
    /// Seconds since the Unix epoch.
    pub started_at: i64,
    pub port: u16,
    /// The first of unix_socket_directories.
    pub socket_dir: Option<PathBuf>,
    /// The first of listen_addresses.
    pub listen_address: Option<String>,
    /// Its System V shared memory segment's id.
    pub shared_memory: Option<u32>,
    pub status: PostmasterStatus,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PostmasterStatus {
    Starting,
    Stopping,
    /// Accepts connections.
    Ready,
    /// In recovery without hot standby: accepts none.
    Standby,
    Unknown,
}

#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line} is \"{found}\", expected {expected}")]
pub struct PidFileError {
    pub line: usize,
    pub found: String,
    pub expected: &'static str,
}

impl Postmaster {
    pub fn parse(content: &[u8]) -> Result<Postmaster, PidFileError> {
        let lines: Vec<&[u8]> = content.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).collect();
        let line = |number: usize| lines.get(number - 1).copied().unwrap_or_default();
        let text = |number| String::from_utf8_lossy(line(number)).into_owned();
        let error = |line, expected| PidFileError { line, found: text(line).chars().take(40).collect(), expected };
        // A server in single-user mode writes its pid negated.
        let pid = text(1).parse::<i32>().ok().map(i32::unsigned_abs).filter(|pid| *pid > 0);
        let filled = |number| Some(text(number)).filter(|text| !text.is_empty());
        Ok(Postmaster {
            pid: pid.ok_or_else(|| error(1, "a process id"))?,
            data_dir: PathBuf::from(OsStr::from_bytes(line(2))),
            started_at: filled(3).map_or(Ok(0), |text| text.parse().map_err(|_| error(3, "a time")))?,
            port: filled(4).map_or(Ok(0), |text| text.parse().map_err(|_| error(4, "a port")))?,
            socket_dir: Some(line(5)).filter(|dir| !dir.is_empty()).map(|dir| PathBuf::from(OsStr::from_bytes(dir))),
            listen_address: filled(6),
            // "<key> <id>"
            shared_memory: filled(7).and_then(|text| text.split_whitespace().nth(1)?.parse().ok()),
            status: match line(8) {
                b"starting" => PostmasterStatus::Starting,
                b"stopping" => PostmasterStatus::Stopping,
                b"ready" => PostmasterStatus::Ready,
                b"standby" => PostmasterStatus::Standby,
                _ => PostmasterStatus::Unknown,
            },
        })
    }
}
