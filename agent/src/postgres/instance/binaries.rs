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

/// "postgres (PostgreSQL) 18.6 (Debian …)"; a development version is "19devel".
fn release_in(bin_dir: &Path) -> Option<u32> {
    let program = bin_dir.join("postgres");
    if !bin_dir.is_absolute() || !program.is_file() {
        return None;
    }
    let output = Command::new(program).arg("--version").current_dir("/").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split_once("(PostgreSQL) ")?.1;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
