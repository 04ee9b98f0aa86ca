//! The agent's configuration: one YAML file, overlaid by `WALFLEET_AGENT__…` variables, checked before anything starts.
//!
//! One struct per section, in `config/section.rs`. Reading is here; nothing here opens a socket, a store or a server.

use std::path::{Path, PathBuf};

use config::{Environment, File, FileFormat};

mod section;

pub use section::{
    BackupConfig, Config, ControllerConfig, InstanceConfig, Lineage, LogFormat, MetricsConfig, PostgresConfig,
    RepositoryConfig, SpoolConfig, TelemetryConfig, WalConfig, default_socket, hostname,
};

/// Where `run` and the host's own commands look when `--config` is not given.
pub const DEFAULT_PATH: &str = "/etc/walfleet/agent.yaml";

/// Where state lies when the configuration does not say (FHS 3.0, 5.8).
pub const DEFAULT_STATE_DIR: &str = "/var/lib/walfleet-agent";

/// A configuration that cannot be used, by file and dotted path.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read configuration {}: {source}\nHINT: a sample that lists every option is deploy/agent.yaml.", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("read configuration {}: {what}", path.display())]
    Syntax { path: PathBuf, what: String },
    #[error("configuration {at}: {found} is not {expected}")]
    Value { at: String, found: String, expected: String },
    #[error("configuration {at}: {what}\nHINT: {hint}")]
    Conflict { at: String, what: String, hint: String },
}

impl Config {
    /// Reads, overlays the environment, checks.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Config::from_yaml(path, &text, std::env::vars_os().filter_map(variable).collect())
    }

    fn from_yaml(
        path: &Path,
        text: &str,
        environment: std::collections::HashMap<String, String>,
    ) -> Result<Config, ConfigError> {
        // `WALFLEET_AGENT__CONTROLLER__URL` is `controller.url`.
        let overlay =
            Environment::with_prefix("WALFLEET_AGENT").prefix_separator("__").separator("__").source(Some(environment));
        let config: Config = config::Config::builder()
            .add_source(File::from_str(text, FileFormat::Yaml))
            .add_source(overlay)
            .build()
            .and_then(config::Config::try_deserialize)
            .map_err(|error| ConfigError::Syntax { path: path.to_owned(), what: error.to_string() })?;
        config.validate()?;
        Ok(config)
    }
}

/// Only ours, so that another program's variable that is not UTF-8 does not stop the agent.
fn variable((name, value): (std::ffi::OsString, std::ffi::OsString)) -> Option<(String, String)> {
    let name = name.into_string().ok().filter(|name| name.starts_with("WALFLEET_AGENT__"))?;
    Some((name, value.to_string_lossy().into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        with_environment(text, &[])
    }

    fn with_environment(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Config::from_yaml(Path::new("test.yaml"), text, variables)
    }

    #[test]
    fn the_sample_lists_every_option_and_is_valid() {
        let text = include_str!("../../deploy/agent.yaml");
        let sample = parse(text).unwrap();
        assert_eq!(sample.instances.len(), 1);
        // Every key that a full configuration serialises to stands in the sample, possibly commented out.
        let full = serde_json::to_value(Config::with_every_option()).unwrap();
        fn keys(value: &serde_json::Value, into: &mut Vec<String>) {
            match value {
                serde_json::Value::Object(map) => map.iter().for_each(|(key, value)| {
                    into.push(key.clone());
                    keys(value, into);
                }),
                serde_json::Value::Array(items) => items.iter().for_each(|item| keys(item, into)),
                _ => {}
            }
        }
        let mut wanted = Vec::new();
        keys(&full, &mut wanted);
        for key in wanted {
            assert!(text.contains(&format!("{key}:")), "deploy/agent.yaml does not mention {key}");
        }
        // And what is commented out is valid too.
        let uncommented: String = text
            .lines()
            .map(|line| line.replacen("#: ", "", 1))
            .filter(|line| !line.starts_with('#'))
            .map(|line| line + "\n")
            .collect();
        parse(&uncommented).unwrap();
    }

    #[test]
    fn an_empty_file_is_a_configuration() {
        let config = parse("{}").unwrap();
        assert_eq!(config.state_dir, Path::new(DEFAULT_STATE_DIR));
        assert_eq!(config.socket_path(), Path::new("/var/lib/walfleet-agent/agent.sock"));
    }

    #[test]
    fn variables_overlay_the_file() {
        let config = with_environment(
            "backup: { processes: 2 }\ncontroller: { url: 'https://a:7443' }",
            &[("WALFLEET_AGENT__BACKUP__PROCESSES", "3"), ("WALFLEET_AGENT__CONTROLLER__URL", "https://b:7443")],
        )
        .unwrap();
        assert_eq!(config.backup.processes, 3);
        assert_eq!(config.controller.unwrap().url, "https://b:7443");
    }

    #[test]
    fn what_is_wrong_is_named_by_its_path() {
        for (text, says) in [
            ("unknown: 1", "unknown"),
            ("backup: { proceses: 1 }", "proceses"),
            ("backup: { processes: 0 }", "backup.processes: 0 is not"),
            ("backup: { processes: 65 }", "1 to 64"),
            ("backup: { compression_level: 20 }", "1 to 19"),
            ("limits: { cpu: 0% }", "\"0%\" is not a share of the cores\nHINT"),
            ("limits: { cpu: 50 }", "HINT: write a whole number of percent"),
            ("limits: { upload: 50Mbit }", "\"50Mbit\" is not a rate\nHINT"),
            ("limits: { uplaod: 50MB/s }", "uplaod"),
            ("wal: { parallel_uploads: 0 }", "wal.parallel_uploads"),
            ("wal: { read_ahead_segments: 5000 }", "wal.read_ahead_segments"),
            ("wal: { streaming: maybe }", "\"maybe\" is not auto, on or off"),
            ("wal: { synchronous: on }", "\"on\" is not off, repository or spool"),
            ("wal: { synchronous: spool }", "HINT: set wal.synchronous to spool in the policy"),
            ("spool: { listen: '0.0.0.0:7433' }", "there is no controller"),
            ("spool: { size_mib: 1 }", "spool.size_mib: 1 is not"),
            ("spool: { advertise: 'a b' }", "spool.advertise"),
            ("wal: { piece_interval: 1 }", "HINT: write a whole number and a unit, 100ms to 1h"),
            ("wal: { slot: 'Wal-fleet' }", "wal.slot: \"Wal-fleet\" is not"),
            ("name: 'Not Valid'", "name: \"Not Valid\" is not"),
            ("state_dir: relative/path", "state_dir"),
            (&format!("socket: /{}", "x".repeat(120)), "socket"),
            ("controller: { url: 'http://a:1' }", "controller.url"),
            ("controller: { url: 'a:1' }", "controller.url"),
            ("metrics: { listen: 'nonsense' }", "listen"),
            ("instances: [{ cluster: 'Orders', data_dir: /d }]", "cluster"),
            ("instances: [{ cluster: orders, data_dir: d }]", "instances[0].data_dir"),
            ("instances: [{ cluster: a, data_dir: /d }, { cluster: b, data_dir: /d/ }]", "instances[1].data_dir"),
            ("instances: [{ cluster: a, data_dir: /d }, { cluster: a, data_dir: /e }]", "instances[1].cluster"),
            ("instances: [{ cluster: a, data_dir: /d, connection: 'port=x' }]", "instances[0].connection"),
            ("repository: { url: 'ftp://x', key_file: /k }", "repository.url"),
            ("repository: { url: 'file:///x' }", "key_file"),
            ("postgres: { bin_dirs: [bin] }", "postgres.bin_dirs[0]"),
            ("labels: { env: \"a\\nb\" }", "labels.env"),
            ("a: [", "test.yaml"),
        ] {
            let message = parse(text).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(says), "{text}: {message}");
        }
    }

    #[test]
    fn controller_and_repository_exclude_each_other() {
        let text = "controller: { url: 'https://a:1' }\nrepository: { url: 'file:///x', key_file: /k }";
        assert!(matches!(parse(text), Err(ConfigError::Conflict { .. })));
    }
}
