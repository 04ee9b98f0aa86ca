//! What lies below a folder: a repository's objects, a data directory's files.

use std::fs::Metadata;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Everything below a folder, itself first, links not followed. What goes meanwhile, as a running server's files do, is
/// left out.
pub fn all(folder: &Path) -> anyhow::Result<Vec<(PathBuf, Metadata)>> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(path) = open.pop() {
        let meta = match std::fs::symlink_metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            other => other.with_context(|| format!("look at {}", path.display()))?,
        };
        if meta.is_dir() {
            match std::fs::read_dir(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                other => open.extend(other?.flatten().map(|entry| entry.path())),
            }
        }
        found.push((path, meta));
    }
    Ok(found)
}

/// The largest file below a folder whose name begins so.
pub fn largest_file(folder: &Path, name_begins: &str) -> anyhow::Result<PathBuf> {
    let begins = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(name_begins));
    let files = all(folder)?.into_iter().filter(|(path, meta)| meta.is_file() && begins(path));
    let largest = files.max_by_key(|(_, meta)| meta.len()).map(|(path, _)| path);
    largest.with_context(|| format!("no {name_begins}… lies in {}", folder.display()))
}
