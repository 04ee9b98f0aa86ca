//! `wal push` and `wal fetch`: dispatched before anything else, and ended with codes that Postgres understands. `wal find`
//! is a command as any other, but for its wrong usage, which may be a misspelt fetch.
//!
//! Postgres takes 1 to 125 from `restore_command` for "no such file" and ends recovery there without a word
//! (RestoreArchivedFile, src/backend/access/transam/xlogarchive.c). So a fetch ends with 0 or 1 only where
//! [`client::fetch`] says so; every other way out, a misspelt command included, is above 125.

use std::ffi::{OsStr, OsString};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use walfleet_repository::ids::ClusterName;

use super::{OutputArgs, RepositoryArgs, time};
use crate::config::{DEFAULT_STATE_DIR, default_socket};
use crate::jobs::order::{TargetTimeline, TimelineError};
use crate::wal::client::{self, FetchArgs, PushArgs};
use crate::wal::fetch::SOURCE_FILE;
use crate::wal::prefetch;

/// Wrong arguments of `wal fetch`.
const FETCH_USAGE: i32 = 129;

/// A bug. As if aborted (128 + SIGABRT).
const FETCH_PANICKED: i32 = 134;

/// Wrong arguments of everything else.
const USAGE: i32 = 2;

#[derive(Subcommand, Debug)]
pub enum WalCommand {
    /// For archive_command: ends with 0 once the file is durable in the repository.
    Push(PushCommand),
    /// For restore_command: 0 delivered whole, 1 the archive does not have it, above 125 anything else.
    Fetch(FetchCommand),
    Find(FindArgs),
}

#[derive(Args, Debug)]
pub struct PushCommand {
    /// %p
    path: PathBuf,
    /// Where the agent listens; $WALFLEET_SOCKET, or the default, if not given.
    #[arg(long, value_name = "PATH", env = "WALFLEET_SOCKET")]
    socket: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct FetchCommand {
    /// %f
    name: String,
    /// %p
    path: PathBuf,
    /// What the restore wrote down about where to fetch from.
    #[arg(long, value_name = "FILE", default_value = SOURCE_FILE)]
    source: PathBuf,
}

/// Which transactions committed around a moment, what each did, and how to restore to just before it.
#[derive(Args, Debug)]
pub struct FindArgs {
    #[command(flatten)]
    pub repository: RepositoryArgs,
    #[arg(long, value_name = "NAME")]
    pub cluster: ClusterName,
    /// The moment, with its zone: '2026-06-04 14:31:59 UTC'.
    #[arg(long, value_name = "TIME")]
    pub around: String,
    /// How far to look on either side: 90s, 5m, 1h30m.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = time::duration)]
    pub within: std::time::Duration,
    /// The WAL that leads to this timeline; N-BRANCH names one of several with one number.
    #[arg(long, value_name = "N|N-BRANCH|latest", default_value = "latest", value_parser = timeline)]
    pub timeline: TargetTimeline,
    /// Transactions listed at most, up to 500 [default: 50; with --all 500].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=500))]
    pub limit: Option<u32>,
    /// List every commit, the nearest first to be kept, instead of those that destroyed or changed most.
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

fn timeline(text: &str) -> Result<TargetTimeline, TimelineError> {
    match text {
        // Each backup has its own.
        "" | "current" => Err(TimelineError::Word(text.to_owned())),
        _ => text.parse(),
    }
}

/// A parser of its own for each, so that nothing else is set up.
#[derive(Parser, Debug)]
#[command(name = "walfleet-agent wal push", bin_name = "walfleet-agent wal push", no_binary_name = true)]
struct PushParser {
    #[command(flatten)]
    push: PushCommand,
}

#[derive(Parser, Debug)]
#[command(name = "walfleet-agent wal fetch", bin_name = "walfleet-agent wal fetch", no_binary_name = true)]
struct FetchParser {
    #[command(flatten)]
    fetch: FetchCommand,
}

#[derive(Parser, Debug)]
#[command(name = "walfleet-agent wal prefetch", no_binary_name = true)]
struct PrefetchParser {
    #[arg(long)]
    source: PathBuf,
    /// The segment behind which it begins.
    after: String,
}

/// Carries out `wal push` and `wal fetch`; `None` for every other command line.
pub fn dispatch(arguments: &[OsString]) -> Option<i32> {
    let word = |index: usize| arguments.get(index).and_then(|word| word.to_str());
    match (word(1), word(2)) {
        (Some("wal"), Some("push")) => Some(push(arguments.get(3..).unwrap_or_default())),
        // Started by `wal fetch`, and by nobody else.
        (Some("wal"), Some("prefetch")) => {
            let arguments = arguments.get(3..).unwrap_or_default();
            // Where the postmaster is a container's first process it inherits this one, and takes an end with anything but 0
            // or 1 for the crash of a child of its own (CleanupBackend, src/backend/postmaster/postmaster.c).
            Some(contained(|| prefetch(arguments)).min(1))
        }
        (Some("wal"), Some("fetch")) => {
            let arguments = arguments.get(3..).unwrap_or_default();
            Some(contained(|| fetch(arguments)))
        }
        _ => None,
    }
}

/// The exit code of a command line that was not understood. One that may have been meant as a restore_command must not
/// look like the end of WAL.
pub fn usage_code(arguments: &[OsString]) -> i32 {
    let says = |word: &str| arguments.iter().skip(1).take(3).any(|argument| argument == OsStr::new(word));
    if says("fetch") || (says("wal") && !says("push")) { FETCH_USAGE } else { USAGE }
}

fn push(arguments: &[OsString]) -> i32 {
    match PushParser::try_parse_from(arguments) {
        Ok(PushParser { push }) => {
            let socket = push.socket.unwrap_or_else(|| default_socket(DEFAULT_STATE_DIR.as_ref()));
            client::push(&PushArgs { socket, path: push.path })
        }
        Err(error) => {
            let _ = error.print();
            if error.use_stderr() { USAGE } else { 0 }
        }
    }
}

fn fetch(arguments: &[OsString]) -> i32 {
    match FetchParser::try_parse_from(arguments) {
        Ok(FetchParser { fetch }) => {
            client::fetch(&FetchArgs { source: fetch.source, name: fetch.name, destination: fetch.path })
        }
        Err(error) => {
            let _ = error.print();
            // Only a person asks for help and nothing else. In a restore_command even that delivered no file.
            let alone = arguments.len() == 1;
            if error.use_stderr() || !alone { FETCH_USAGE } else { 0 }
        }
    }
}

/// Nobody waits for it, and nobody hears why it ended; what it did not bring, a fetch brings itself and says so.
fn prefetch(arguments: &[OsString]) -> i32 {
    match PrefetchParser::try_parse_from(arguments) {
        Ok(parsed) => prefetch::run(&parsed.source, &parsed.after).map_or(client::FETCH_FAILED, |()| 0),
        Err(_) => FETCH_USAGE,
    }
}

/// A panic would exit with 101, the end of WAL.
fn contained(act: impl FnOnce() -> i32) -> i32 {
    std::panic::catch_unwind(AssertUnwindSafe(act)).unwrap_or(FETCH_PANICKED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        std::iter::once("walfleet-agent").chain(line.split_whitespace()).map(OsString::from).collect()
    }

    #[test]
    fn only_the_two_are_dispatched_early() {
        for line in ["", "run", "wal", "wal find a b", "wal fetsch a b", "doctor", "list wal push x"] {
            assert_eq!(dispatch(&words(line)), None, "{line}");
        }
    }

    #[test]
    fn a_wrong_fetch_never_looks_like_the_end_of_wal() {
        for line in [
            "wal fetch",
            "wal fetch onlyname",
            "wal fetch a b c",
            "wal fetch --nonsense a b",
            "wal fetch --help a b",
            "wal fetch --source",
            "wal fetch 000000010000000000000001 /nonexistent/x --source /nonexistent/y",
        ] {
            let code = dispatch(&words(line)).unwrap();
            assert!(code > 125, "{line}: {code}");
        }
        for line in ["wal", "wal find a b", "wal find", "wal fetsch a b", "wla fetch a b", "fetch a b", "wal --x fetch"]
        {
            assert!(usage_code(&words(line)) > 125, "{line}");
        }
        use std::os::unix::ffi::OsStringExt;
        let mut broken = words("wal fetch");
        broken.push(OsString::from_vec(vec![0xFF]));
        broken.push("x".into());
        assert!(dispatch(&broken).unwrap() > 125);
    }

    #[test]
    fn a_panic_never_looks_like_the_end_of_wal() {
        assert_eq!(contained(|| panic!("scripted")), FETCH_PANICKED);
        assert_eq!(contained(|| 1), 1);
    }

    #[test]
    fn a_failed_push_is_counted_by_postgres_and_does_not_restart_its_archiver() {
        for line in ["wal push", "wal push a b", "wal push --socket /nonexistent/agent.sock x"] {
            let code = dispatch(&words(line)).unwrap();
            assert!((1..=125).contains(&code), "{line}: {code}");
        }
        assert_eq!(usage_code(&words("wal push")), USAGE);
    }
}
