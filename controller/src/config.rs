//! The controller's configuration: one YAML file, overlaid by `WALFLEET_CONTROLLER__…` variables, checked before
//! anything starts. Sections and ranges are in `config/section.rs`; reading is here.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use ::config::{Environment, File, FileFormat};

mod section;

pub use section::{
    AgentsConfig, CertificatesConfig, Config, JobsConfig, LimitsConfig, LogFormat, MetricsConfig, RetentionConfig,
    StateConfig, TelemetryConfig, hostname,
};

/// Where `run` looks when `--config` is not given.
pub const DEFAULT_PATH: &str = "/etc/walfleet/controller.yaml";

const PREFIX: &str = "WALFLEET_CONTROLLER";

/// A configuration that cannot be used, by file and dotted path.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read configuration {}\nHINT: `walfleet-controller init` writes one; a sample that lists every option is deploy/controller.yaml.", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("read configuration {}: {what}\nHINT: a sample that lists every option is deploy/controller.yaml.", path.display())]
    Syntax { path: PathBuf, what: String },
    #[error("configuration {at}: {found} is not {expected}")]
    Value { at: String, found: String, expected: String },
}

impl Config {
    /// Reads, overlays the environment, checks.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::from_yaml(path, &text, std::env::vars_os().filter_map(variable).collect())
    }

    fn from_yaml(path: &Path, text: &str, environment: HashMap<String, String>) -> Result<Self, ConfigError> {
        // `WALFLEET_CONTROLLER__METRICS__LISTEN` is `metrics.listen`.
        let overlay = Environment::with_prefix(PREFIX)
            .prefix_separator("__")
            .separator("__")
            .try_parsing(true)
            .list_separator(",")
            .with_list_parse_key("server_names")
            .source(Some(environment));
        let config: Self = ::config::Config::builder()
            .add_source(File::from_str(text, FileFormat::Yaml))
            .add_source(overlay)
            .build()
            .and_then(::config::Config::try_deserialize)
            .map_err(|error| ConfigError::Syntax { path: path.to_owned(), what: error.to_string() })?;
        config.validate()?;
        Ok(config)
    }
}

/// Only ours, so that another program's variable that is not UTF-8 does not stop the controller.
fn variable((name, value): (OsString, OsString)) -> Option<(String, String)> {
    let name = name.into_string().ok().filter(|name| name.starts_with("WALFLEET_CONTROLLER__"))?;
    Some((name, value.to_string_lossy().into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = include_str!("../../deploy/controller.yaml");

    fn parse(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Config::from_yaml(Path::new("test.yaml"), text, variables)
    }

    fn keys(value: &serde_json::Value, at: &str, into: &mut Vec<String>) {
        match value.as_object() {
            Some(object) => object.iter().for_each(|(key, value)| keys(value, &format!("{at}.{key}"), into)),
            None => into.push(at.to_owned()),
        }
    }

    #[test]
    fn the_sample_lists_every_option_and_shows_the_defaults() {
        let sample = parse(SAMPLE, &[]).unwrap();
        let raw: serde_json::Value = serde_yaml_ng::from_str(SAMPLE).unwrap();
        let (mut listed, mut known) = (Vec::new(), Vec::new());
        keys(&raw, "", &mut listed);
        keys(&serde_json::to_value(&sample).unwrap(), "", &mut known);
        listed.sort();
        known.sort();
        assert_eq!(listed, known);
        let defaults = parse("{}", &[]).unwrap();
        let shown = Config {
            name: None,
            server_names: Vec::new(),
            metrics: MetricsConfig { listen: None },
            telemetry: TelemetryConfig { otlp_endpoint: None, ..sample.telemetry.clone() },
            ..sample
        };
        assert_eq!(shown, defaults);
    }

    #[test]
    fn the_environment_overlays_the_file() {
        let variables = [
            ("WALFLEET_CONTROLLER__METRICS__LISTEN", "127.0.0.1:9999"),
            ("WALFLEET_CONTROLLER__AGENTS__HEARTBEAT_SECONDS", "3"),
            ("WALFLEET_CONTROLLER__SERVER_NAMES", "a.example,b.example"),
        ];
        let config = parse("agents: { heartbeat_seconds: 7 }", &variables).unwrap();
        assert_eq!(config.metrics.listen, Some("127.0.0.1:9999".parse().unwrap()));
        assert_eq!(config.agents.heartbeat_seconds, 3);
        assert_eq!(config.server_names, ["a.example", "b.example"]);
    }

    #[test]
    fn what_cannot_work_is_refused_with_its_path() {
        for (text, expected) in [
            ("agents: { heartbeat_seconds: 0 }", "agents.heartbeat_seconds"),
            ("agents: { heartbeat_seconds: 30, lost_after_seconds: 40 }", "agents.lost_after_seconds"),
            ("certificates: { agent_seconds: 1 }", "certificates.agent_seconds"),
            ("server_names: ['bad name']", "server_names[0]"),
            ("name: Bad_Name!", "name"),
            ("directory: relative", "directory"),
            ("telemetry: { otlp_endpoint: 'collector:4317' }", "telemetry.otlp_endpoint"),
            ("listen: nowhere", "listen"),
            ("agent: {}", "agent"),
            ("agents: { heartbeat: 1 }", "heartbeat"),
            (": : :", "test.yaml"),
        ] {
            let error = parse(text, &[]).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
