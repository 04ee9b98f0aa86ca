//! Which PostgreSQL versions are at hand: the folders that scripts/get_postgres.sh fills.

use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use crate::os_user::os_user;

/// A major version with all its programs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PgVersion {
    pub major: u32,
    bin: PathBuf,
}

/// What walfleet supports and scripts/get_postgres.sh brings.
pub const SUPPORTED: [u32; 6] = [13, 14, 15, 16, 17, 18];

impl PgVersion {
    /// Every supported version, or those named in `WALFLEET_PG_VERSIONS` ("13 18").
    pub fn all() -> anyhow::Result<Vec<PgVersion>> {
        let named = std::env::var("WALFLEET_PG_VERSIONS").unwrap_or_default();
        let majors: Vec<u32> = match named.trim() {
            "" => SUPPORTED.to_vec(),
            named => named.split([' ', ',']).map(str::parse).collect::<Result<_, _>>()?,
        };
        majors.into_iter().map(PgVersion::of).collect()
    }

    pub fn of(major: u32) -> anyhow::Result<PgVersion> {
        let folder = cache().join("pg").join(major.to_string());
        anyhow::ensure!(
            folder.join("complete").exists(),
            "there is no PostgreSQL {major} in {}\nHINT: run scripts/prepare.sh.",
            folder.display()
        );
        Ok(PgVersion { major, bin: folder.join("bin") })
    }

    /// For tests that need one server of no version in particular.
    pub fn newest() -> anyhow::Result<PgVersion> {
        PgVersion::of(*SUPPORTED.last().expect("the table is not empty"))
    }

    pub fn bin(&self) -> &PathBuf {
        &self.bin
    }

    /// A program of this version, to be run as the servers' user.
    pub fn command(&self, program: &str) -> Command {
        os_user().command(self.bin.join(program))
    }
}

impl fmt::Display for PgVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PostgreSQL {}", self.major)
    }
}

/// The same rule as in scripts/get_postgres.sh.
fn cache() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("WALFLEET_CACHE").unwrap_or_else(|| match rustix::process::geteuid().is_root() {
        true => PathBuf::from("/var/cache/walfleet-test"),
        false => from("XDG_CACHE_HOME")
            .unwrap_or_else(|| from("HOME").unwrap_or_default().join(".cache"))
            .join("walfleet-test"),
    })
}
