//! Where a release's programs lie.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::process;

#[derive(Debug, thiserror::Error)]
pub enum BinariesError {
    #[error(
        "find the programs of PostgreSQL {major}: not in {}\n\
         HINT: install PostgreSQL {major}, or name its directory in postgres.bin_dirs.",
        looked_in(tried)
    )]
    NotFound { major: u32, tried: Vec<PathBuf> },
}

fn looked_in(tried: &[PathBuf]) -> String {
    tried.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The directory that holds `postgres` of exactly this release: one of the given, the distributions' places, the search
/// path, or where a running server was started from. Blocking: it asks the program for its version.
pub fn find_bin_dir(major: u32, extra_dirs: &[PathBuf]) -> Result<PathBuf, BinariesError> {
    let mut candidates: Vec<PathBuf> = extra_dirs.iter().flat_map(|dir| [dir.clone(), dir.join("bin")]).collect();
    // Debian and Ubuntu; the PostgreSQL project's packages for Red Hat.
    candidates.push(format!("/usr/lib/postgresql/{major}/bin").into());
    candidates.push(format!("/usr/pgsql-{major}/bin").into());
    candidates.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
    candidates.extend(process::server_pids().into_iter().filter_map(process::executable_dir));
    let mut tried = Vec::new();
    for candidate in candidates {
        if tried.contains(&candidate) {
            continue;
        }
        if release_in(&candidate) == Some(major) {
            return Ok(candidate);
        }
        tried.push(candidate);
    }
    Err(BinariesError::NotFound { major, tried })
}

/// server_version_num of a running server, by the word of its program, which an upgrade of the package may have
/// replaced on disk. Blocking.
pub fn running_version(pid: u32) -> Option<u32> {
    let (major, minor) = version_of(&process::executable(pid))?;
    major.checked_mul(10_000)?.checked_add(minor)
}

fn release_in(bin_dir: &Path) -> Option<u32> {
    let program = bin_dir.join("postgres");
    if !bin_dir.is_absolute() || !program.is_file() {
        return None;
    }
    version_of(&program).map(|(major, _)| major)
}

fn version_of(program: &Path) -> Option<(u32, u32)> {
    let output = Command::new(program).arg("--version").current_dir("/").output().ok()?;
    parse_version(&String::from_utf8(output.stdout).ok()?)
}

/// "postgres (PostgreSQL) 18.6 (Debian …)"; a development version is "19devel", and its minor number 0.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let version = text.split_once("(PostgreSQL) ")?.1;
    let version = version.split_whitespace().next()?;
    let (major, minor) = version.split_once('.').unwrap_or((version, ""));
    let number = |text: &str| text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok();
    Some((number(major)?, number(minor).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_say_their_version() {
        for (text, version) in [
            ("postgres (PostgreSQL) 18.6 (Debian 18.6-1.pgdg12+1)\n", Some((18, 6))),
            ("postgres (PostgreSQL) 15.14\n", Some((15, 14))),
            ("postgres (PostgreSQL) 19devel\n", Some((19, 0))),
            ("postgres (PostgreSQL) 19rc1 (Debian 19~rc1-1.2)\n", Some((19, 0))),
            ("postgres (EnterpriseDB) 15.1", None),
            ("", None),
        ] {
            assert_eq!(parse_version(text), version, "{text}");
        }
    }
}
