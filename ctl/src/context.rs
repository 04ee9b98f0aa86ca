//! Contexts: which controller, and as whom. Files under the configuration folder, or any file named on the command line.
//!
//! `config.yaml` holds the name of the current context; each context is a file of its own in `contexts/`, readable by
//! its owner only, since it carries a private key. Nothing here talks to a controller.

mod file;
mod folder;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::surroundings::Surroundings;
pub use file::{is_exposed, read_file};
pub use folder::{Contexts, Known, Overwrite};

/// What it takes to talk to one controller as one operator.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// `https://host:port`; `http://` only for a loopback address.
    pub controller: String,
    /// The name in the controller's certificate, where it is not the host of `controller` (a tunnel, a load balancer).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
    /// The fleet's certificate authorities, PEM.
    #[serde(default)]
    pub authorities: String,
    /// The operator's certificate, PEM.
    #[serde(default)]
    pub certificate: String,
    /// Its private key, PEM.
    #[serde(default)]
    pub key: String,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("controller", &self.controller).finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    #[error(
        "no context is chosen\nHINT: take the file that walfleet-controller init wrote: walfleet context add NAME \
         admin.context.yaml --use; or come with a token: walfleet login --controller https://HOST:PORT --token TOKEN; \
         or name a context with --context NAME|FILE or WALFLEET_CONTEXT (known here: {known})."
    )]
    NoneChosen { known: String },
    #[error("there is no context \"{name}\"\nHINT: known here: {known}. A file is named with a slash, as in ./{name}.")]
    Unknown { name: String, known: String },
    #[error("there is a context \"{name}\" already\nHINT: choose another name, or replace it with --force.")]
    Exists { name: String },
    #[error(
        "\"{name}\" cannot name a context\nHINT: use 1 to 63 of letters, digits, '-', '_' and '.', and begin with a letter or digit."
    )]
    BadName { name: String },
    #[error("{operation} {}: {source}", path.display())]
    File { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{} is not {what}: {reason}", path.display())]
    Syntax { path: PathBuf, what: &'static str, reason: String },
    #[error("{origin}: `{field}` {problem}\nHINT: {hint}.")]
    Invalid { origin: String, field: &'static str, problem: String, hint: &'static str },
    #[error(
        "neither HOME nor XDG_CONFIG_HOME is set, so contexts have no place\nHINT: name a context file with --context FILE."
    )]
    NoHome,
}

impl Context {
    /// Refuses what could only fail later with a worse message.
    pub fn validate(&self, origin: &str) -> Result<(), ContextError> {
        let invalid = |field, problem: &str, hint| {
            Err(ContextError::Invalid { origin: origin.to_owned(), field, problem: problem.to_owned(), hint })
        };
        match Address::parse(&self.controller) {
            None => {
                invalid("controller", "is not https://HOST:PORT", "write for example https://walfleet.example.org:7400")
            }
            Some(Address { encrypted: false, loopback: false, .. }) => {
                invalid("controller", "is not encrypted", "write https://; http:// is for a loopback address only")
            }
            Some(Address { encrypted: false, .. }) => Ok(()),
            Some(_) => {
                for (field, value, label) in [
                    ("authorities", &self.authorities, "CERTIFICATE"),
                    ("certificate", &self.certificate, "CERTIFICATE"),
                    ("key", &self.key, "PRIVATE KEY"),
                ] {
                    if !(value.contains("-----BEGIN ") && value.contains(label)) {
                        let problem = format!("holds no PEM {}", label.to_lowercase());
                        return invalid(field, &problem, "log in again, or copy the context file whole");
                    }
                }
                Ok(())
            }
        }
    }
}

/// A controller's URL taken apart as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
pub struct Address {
    pub encrypted: bool,
    pub loopback: bool,
    /// Host and port, as people name it.
    pub name: String,
}

impl Address {
    pub fn parse(url: &str) -> Option<Address> {
        let (encrypted, rest) = match (url.strip_prefix("https://"), url.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (None, Some(rest)) => (false, rest),
            (None, None) => return None,
        };
        let uri: tonic::codegen::http::Uri = url.parse().ok()?;
        let host = uri.host()?;
        if host.is_empty() || uri.authority()?.as_str().contains('@') || !matches!(uri.path(), "" | "/") {
            return None;
        }
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let loopback = bare == "localhost" || bare.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
        Some(Address { encrypted, loopback, name: rest.trim_end_matches('/').to_owned() })
    }
}

/// The context a command uses: `--context`, else `WALFLEET_CONTEXT`, else the current one.
///
/// What has a slash in it, or ends in `.yaml` or `.yml`, is a file; anything else is a name.
pub fn resolve(choice: Option<&str>, surroundings: &Surroundings) -> Result<Resolved, ContextError> {
    let chosen = choice.or_else(|| surroundings.variable("WALFLEET_CONTEXT"));
    if let Some(file) = chosen.filter(|text| text.contains('/') || text.ends_with(".yaml") || text.ends_with(".yml")) {
        return Resolved::read(PathBuf::from(file));
    }
    let contexts = match Contexts::of(surroundings) {
        Err(ContextError::NoHome) if chosen.is_none() => {
            return Err(ContextError::NoneChosen { known: "none".to_owned() });
        }
        other => other?,
    };
    let name = match chosen {
        Some(name) => name.to_owned(),
        None => contexts.current()?.ok_or_else(|| ContextError::NoneChosen { known: contexts.known() })?,
    };
    if !contexts.names()?.contains(&name) {
        return Err(ContextError::Unknown { known: contexts.known(), name });
    }
    Resolved::read(contexts.path(&name))
}

/// A context and the file it came from.
pub struct Resolved {
    pub context: Context,
    pub path: PathBuf,
}

impl Resolved {
    fn read(path: PathBuf) -> Result<Resolved, ContextError> {
        Ok(Resolved { context: read_file(&path)?, path })
    }

    /// Writes the context back to where it came from.
    pub fn store(&self) -> Result<(), ContextError> {
        file::write_private(&self.path, &file::to_yaml(&self.context, &self.path)?)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn plain(controller: &str) -> Context {
        Context {
            controller: controller.to_owned(),
            server_name: None,
            authorities: String::new(),
            certificate: String::new(),
            key: String::new(),
        }
    }

    fn home(folder: &Path) -> Surroundings {
        Surroundings::bare(jiff::Timestamp::UNIX_EPOCH, std::io::empty())
            .with_variable("HOME", folder.display().to_string())
    }

    #[test]
    fn only_a_loopback_address_may_go_without_encryption() {
        for good in ["http://127.0.0.1:7400", "http://[::1]:7400/", "http://localhost:1"] {
            assert!(plain(good).validate("x").is_ok(), "{good}");
        }
        for bad in [
            "http://10.0.0.1:7400",
            "10.0.0.1:7400",
            "",
            "https://",
            "ftp://a",
            "https://user@host:1",
            "https://host/path",
            "http://localhost.evil.org",
        ] {
            assert!(plain(bad).validate("x").is_err(), "{bad}");
        }
    }

    #[test]
    fn an_encrypted_context_needs_its_whole_identity() {
        let error = plain("https://c:7400").validate("x").unwrap_err().to_string();
        assert!(error.contains("`authorities` holds no PEM certificate"), "{error}");
    }

    #[test]
    fn contexts_are_private_and_the_chosen_one_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let surroundings = home(folder.path());
        let contexts = Contexts::of(&surroundings).unwrap();
        assert!(matches!(resolve(None, &surroundings), Err(ContextError::NoneChosen { .. })));
        let path = contexts.save("prod", &plain("http://127.0.0.1:1"), Overwrite::Refuse).unwrap();
        assert!(!is_exposed(&path));
        contexts.save("lab", &plain("http://127.0.0.1:2"), Overwrite::Refuse).unwrap();
        let again = contexts.save("lab", &plain("http://127.0.0.1:3"), Overwrite::Refuse);
        assert!(matches!(again, Err(ContextError::Exists { .. })));
        contexts.choose("prod").unwrap();
        assert_eq!(resolve(None, &surroundings).unwrap().context.controller, "http://127.0.0.1:1");
        assert_eq!(resolve(Some("lab"), &surroundings).unwrap().context.controller, "http://127.0.0.1:2");
        let by_variable = home(folder.path()).with_variable("WALFLEET_CONTEXT", path.display().to_string());
        assert_eq!(resolve(None, &by_variable).unwrap().context.controller, "http://127.0.0.1:1");
        assert!(matches!(contexts.choose("nope"), Err(ContextError::Unknown { .. })));
        assert!(contexts.save("../x", &plain("http://127.0.0.1:1"), Overwrite::Refuse).is_err());
    }

    #[test]
    fn a_damaged_context_never_shows_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.yaml");
        std::fs::write(&path, "controller: https://a:1\nkey: {SECRET\n").unwrap();
        let error = read_file(&path).unwrap_err().to_string();
        assert!(!error.contains("SECRET") && error.contains("line"), "{error}");
        std::fs::write(&path, "controller: https://a:1\nkeys: SECRET\n").unwrap();
        let error = read_file(&path).unwrap_err().to_string();
        assert!(!error.contains("SECRET"), "{error}");
    }
}
