//! Our programs, run as on real hosts: a controller, agents beside their servers, and the operator's command.

pub mod agent;
pub mod controller;
pub mod ctl;
pub mod standalone;
pub mod whole;

use std::collections::BTreeMap;

pub use agent::{Agent, AgentBuilder};
pub use controller::Controller;
pub use ctl::Ctl;
pub use standalone::Standalone;
pub use whole::{Fleet, Protected};

use crate::s3::S3Server;
use crate::scratch::Scratch;

/// Where a repository lies and how to reach it.
#[derive(Clone, Debug)]
pub struct Place {
    pub url: String,
    pub options: BTreeMap<String, String>,
    /// In the environment of whoever reads or writes there.
    pub credentials: Vec<(String, String)>,
}

impl Place {
    pub fn folder(scratch: &Scratch) -> anyhow::Result<Place> {
        let folder = scratch.dir("repository")?;
        Ok(Place { url: format!("file://{}", folder.display()), options: BTreeMap::new(), credentials: Vec::new() })
    }

    pub fn s3(server: &S3Server) -> Place {
        Place { url: server.url("fleet"), options: server.options(), credentials: server.credentials() }
    }

    /// The same as flags of the agent's own commands.
    pub fn flags(&self, key_file: &std::path::Path) -> Vec<String> {
        let mut flags = vec!["--repository".to_owned(), self.url.clone()];
        flags.extend(self.options.iter().flat_map(|(name, value)| ["--option".to_owned(), format!("{name}={value}")]));
        flags.extend(["--key-file".to_owned(), key_file.display().to_string()]);
        flags
    }
}
