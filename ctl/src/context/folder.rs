//! The folder of contexts of one user: `config.yaml` names the current one, `contexts/` holds a file for each.

use std::io::ErrorKind;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::file::{read_file, to_yaml, write_private};
use super::{Context, ContextError};
use crate::surroundings::Surroundings;

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// The context that is used where none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    current: Option<String>,
}

/// A context and what is known of it without a controller.
#[derive(Debug)]
pub struct Known {
    pub name: String,
    pub current: bool,
    pub path: PathBuf,
    /// Why it cannot be used, instead of what it holds.
    pub content: Result<Context, ContextError>,
}

/// The folder of contexts of one user.
pub struct Contexts {
    folder: PathBuf,
}

impl Contexts {
    pub fn of(surroundings: &Surroundings) -> Result<Contexts, ContextError> {
        surroundings.configuration_folder().map(|folder| Contexts { folder }).ok_or(ContextError::NoHome)
    }

    fn config_path(&self) -> PathBuf {
        self.folder.join("config.yaml")
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join("contexts").join(format!("{name}.yaml"))
    }

    pub fn current(&self) -> Result<Option<String>, ContextError> {
        let path = self.config_path();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ContextError::File { operation: "read", path, source }),
        };
        if text.trim().is_empty() {
            return Ok(None);
        }
        let config: Config = serde_yaml_ng::from_str(&text).map_err(|error| ContextError::Syntax {
            path,
            what: "a walfleet configuration",
            reason: error.to_string(),
        })?;
        Ok(config.current)
    }

    pub fn names(&self) -> Result<Vec<String>, ContextError> {
        let folder = self.folder.join("contexts");
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(ContextError::File { operation: "list", path: folder, source }),
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| name.strip_suffix(".yaml").map(str::to_owned))
            .filter(|name| is_name(name))
            .collect();
        names.sort();
        Ok(names)
    }

    pub fn list(&self) -> Result<Vec<Known>, ContextError> {
        let current = self.current()?;
        let known = |name: String| {
            let path = self.path(&name);
            Known { current: current.as_ref() == Some(&name), content: read_file(&path), name, path }
        };
        Ok(self.names()?.into_iter().map(known).collect())
    }

    /// Makes `name` the context that is used where none is named.
    pub fn choose(&self, name: &str) -> Result<(), ContextError> {
        if !self.names()?.iter().any(|known| known == name) {
            return Err(ContextError::Unknown { name: name.to_owned(), known: self.known() });
        }
        let text = serde_yaml_ng::to_string(&Config { current: Some(name.to_owned()) }).unwrap_or_default();
        write_private(&self.config_path(), &text)
    }

    pub fn save(&self, name: &str, context: &Context, overwrite: Overwrite) -> Result<PathBuf, ContextError> {
        if !is_name(name) {
            return Err(ContextError::BadName { name: name.to_owned() });
        }
        let path = self.path(name);
        if overwrite == Overwrite::Refuse && path.exists() {
            return Err(ContextError::Exists { name: name.to_owned() });
        }
        write_private(&path, &to_yaml(context, &path)?)?;
        Ok(path)
    }

    pub fn check_free(&self, name: &str) -> Result<(), ContextError> {
        if !is_name(name) {
            return Err(ContextError::BadName { name: name.to_owned() });
        }
        if self.path(name).exists() { Err(ContextError::Exists { name: name.to_owned() }) } else { Ok(()) }
    }

    pub(super) fn known(&self) -> String {
        match self.names() {
            Ok(names) if names.is_empty() => "none".to_owned(),
            Ok(names) => names.join(", "),
            Err(error) => format!("not readable: {error}"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Overwrite {
    Refuse,
    Replace,
}

fn is_name(name: &str) -> bool {
    name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && name.len() <= 63
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}
