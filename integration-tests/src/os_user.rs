//! The account under which servers and agents run: ourselves, or an unprivileged user when tests run as root.

use std::ffi::OsStr;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::Context;

/// Made by scripts/prepare.sh; PostgreSQL's packages bring the second.
const CANDIDATES: [&str; 2] = ["walfleet-test", "postgres"];

#[derive(Debug)]
pub enum OsUser {
    /// Tests run as an ordinary user, and so does all they start.
    Ourselves,
    Other {
        name: &'static str,
        uid: u32,
        gid: u32,
    },
}

pub fn os_user() -> &'static OsUser {
    static USER: OnceLock<OsUser> = OnceLock::new();
    USER.get_or_init(|| {
        if !rustix::process::geteuid().is_root() {
            return OsUser::Ourselves;
        }
        CANDIDATES
            .into_iter()
            .find_map(|name| Some(OsUser::Other { name, uid: id("-u", name)?, gid: id("-g", name)? }))
            .expect("tests run as root, but there is no user for PostgreSQL: run scripts/prepare.sh")
    })
}

fn id(what: &str, user: &str) -> Option<u32> {
    let output = Command::new("id").args([what, user]).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

impl OsUser {
    /// A command that runs as this user, from `/`, without settings of the caller's that PostgreSQL or a store would obey.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = match self {
            OsUser::Ourselves => Command::new(program),
            OsUser::Other { name, .. } => {
                // setpriv replaces itself by the program, so the child's pid is the program's.
                let mut command = Command::new("setpriv");
                command.args(["--reuid", name, "--regid", name, "--init-groups", "--"]).arg(program);
                command
            }
        };
        for (name, _) in std::env::vars_os() {
            if [b"PG".as_slice(), b"AWS_", b"WALFLEET_"]
                .iter()
                .any(|prefix| name.as_encoded_bytes().starts_with(prefix))
            {
                command.env_remove(name);
            }
        }
        command.env("LC_ALL", "C.UTF-8").env("HOME", "/nonexistent").current_dir("/");
        command
    }

    pub fn own(&self, path: &Path) -> anyhow::Result<()> {
        match self {
            OsUser::Ourselves => Ok(()),
            OsUser::Other { uid, gid, .. } => {
                chown(path, Some(*uid), Some(*gid)).with_context(|| format!("give {} away", path.display()))
            }
        }
    }

    /// Creates a folder that this user owns, 0700 as PostgreSQL wants it.
    pub fn create_dir(&self, path: &Path) -> anyhow::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().mode(0o700).create(path).with_context(|| format!("create {}", path.display()))?;
        self.own(path)
    }

    /// Writes a file that this user owns.
    pub fn write(&self, path: &Path, content: impl AsRef<[u8]>) -> anyhow::Result<()> {
        std::fs::write(path, content).with_context(|| format!("write {}", path.display()))?;
        self.own(path)
    }

    /// Whether this user may run a program where it lies (a tree below /root is closed to others).
    pub fn may_run(&self, program: &Path) -> bool {
        match self {
            OsUser::Ourselves => true,
            OsUser::Other { .. } => {
                self.command("test").arg("-x").arg(program).status().is_ok_and(|status| status.success())
            }
        }
    }
}
