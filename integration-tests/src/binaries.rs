//! Where the programs under test are: built by `cargo build --workspace --bins` into the folder this program lies in.
//!
//! When tests run as root in a tree that the servers' user cannot enter (below /root, say), the programs are copied to
//! where it can.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Context;

use crate::os_user::{OsUser, os_user};

pub const AGENT: &str = "walfleet-agent";
pub const CONTROLLER: &str = "walfleet-controller";
pub const CTL: &str = "walfleet";

/// A program that the servers' user may run.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let built = folder()?.join(name);
    anyhow::ensure!(
        built.exists(),
        "{} is not built\nHINT: run cargo build --workspace --bins first; make test does.",
        built.display()
    );
    if os_user().may_run(&built) {
        return Ok(built);
    }
    copy_outside(&built)
}

/// target/debug, whether this is target/debug/demo or target/debug/deps/it-….
fn folder() -> anyhow::Result<PathBuf> {
    let mut folder = std::env::current_exe().context("find this program")?;
    folder.pop();
    if folder.ends_with("deps") {
        folder.pop();
    }
    Ok(folder)
}

/// One folder of copies per process, gone with the scratch folders of this boot.
fn copy_outside(built: &Path) -> anyhow::Result<PathBuf> {
    static COPIES: OnceLock<PathBuf> = OnceLock::new();
    let folder = COPIES.get_or_init(|| {
        let folder = PathBuf::from(format!("/tmp/wf-programs-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("/tmp takes a folder");
        os_user().own(&folder).expect("root may give a folder away");
        crate::scratch::reaper::watch_dir(&folder);
        folder
    });
    let copy = folder.join(built.file_name().unwrap_or_default());
    if !copy.exists() {
        // Under another name first: a test beside this one must not start half a program.
        let part = tempfile::NamedTempFile::new_in(folder).context("copy a program")?;
        std::fs::copy(built, part.path()).with_context(|| format!("copy {}", built.display()))?;
        os_user().own(part.path())?;
        part.persist(&copy).context("publish a copied program")?;
    }
    anyhow::ensure!(
        matches!(os_user(), OsUser::Ourselves) || os_user().may_run(&copy),
        "cannot run {}",
        copy.display()
    );
    Ok(copy)
}
