//! The sections of the configuration, their defaults with reasons, and their accepted ranges.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::limits::LimitsSpec;
use walfleet_repository::shipping::{Compression, LetGoAt, PieceInterval, ShippingSpec, Streaming, Synchronous};

use super::{ConfigError, DEFAULT_STATE_DIR};

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The agent's name in the fleet; the host's name if absent.
    pub name: Option<String>,
    /// Identity, job journal, desired state and spool. Survives reinstalling the agent.
    pub state_dir: PathBuf,
    /// Where `wal push` and `wal fetch` reach the agent; `<state_dir>/agent.sock` if absent.
    pub socket: Option<PathBuf>,
    pub controller: Option<ControllerConfig>,
    pub instances: Vec<InstanceConfig>,
    pub repository: Option<RepositoryConfig>,
    pub backup: BackupConfig,
    /// What backups, restores and verifications may take of this host, together; the policy's hold as well.
    pub limits: LimitsSpec,
    pub wal: WalConfig,
    pub postgres: PostgresConfig,
    pub labels: BTreeMap<String, String>,
    pub spool: SpoolConfig,
    pub metrics: MetricsConfig,
    pub telemetry: TelemetryConfig,
}

/// Absent on a host without a controller.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerConfig {
    /// `https://host:port`
    pub url: String,
}

/// A Postgres instance of this host and the cluster it is a member of.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceConfig {
    pub cluster: ClusterName,
    pub data_dir: PathBuf,
    /// libpq-like: "host=/var/run/postgresql port=5432 user=walfleet". From postmaster.pid if absent.
    #[serde(default)]
    pub connection: Option<String>,
    #[serde(default)]
    pub lineage: Lineage,
}

/// Whether a cluster that is a copy of another shares that one's key and content. It is decided when the cluster is first
/// archived or backed up, and never changes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lineage {
    /// Its first backup stores only what differs. Who may restore the copy can then read the other one's content, too.
    #[default]
    Shared,
    /// A key of its own, everything stored anew.
    Separate,
}

/// For hosts without a controller, which else names the repositories.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositoryConfig {
    /// `file:///path` or `s3://bucket/prefix`
    pub url: String,
    /// "endpoint", "region", …; credentials come from the environment.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    pub key_file: PathBuf,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BackupConfig {
    /// Threads that read, check, hash and compress.
    pub processes: u32,
    /// zstd level.
    pub compression_level: i32,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WalConfig {
    /// Segments uploaded at the same time, per instance.
    pub parallel_uploads: u32,
    /// Segments taken from archive_status ahead of the one Postgres asks for, and fetched ahead in recovery.
    pub read_ahead_segments: u32,
    /// Where the policy does not say.
    pub streaming: Option<Streaming>,
    pub piece_interval: Option<PieceInterval>,
    pub synchronous: Option<Synchronous>,
    pub compression: Option<Compression>,
    pub let_go_at: Option<LetGoAt>,
    /// The replication slot that keeps WAL until the repository has it.
    pub slot: String,
}

impl WalConfig {
    pub fn shipping(&self) -> ShippingSpec {
        ShippingSpec {
            streaming: self.streaming,
            piece_interval: self.piece_interval,
            synchronous: self.synchronous,
            compression: self.compression,
            let_go_at: self.let_go_at,
            ..ShippingSpec::NONE
        }
    }
}

#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PostgresConfig {
    /// Folders with `postgres` and `pg_ctl`, tried before the usual places.
    pub bin_dirs: Vec<PathBuf>,
}

/// What is kept of WAL until the repository has it, where commits wait for that: this host's own, and other hosts'.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpoolConfig {
    /// Where other agents bring theirs; nothing is kept for others if absent.
    pub listen: Option<SocketAddr>,
    /// Where they reach it, "host:port"; the host's name and the port of `listen` if absent.
    pub advertise: Option<String>,
    /// All spools of this host together.
    pub size_mib: u32,
}

impl Default for SpoolConfig {
    fn default() -> SpoolConfig {
        // At 50 MB/s of WAL, which compresses to a third, a minute without the repository.
        SpoolConfig { listen: None, advertise: None, size_mib: 1024 }
    }
}

impl SpoolConfig {
    /// What the controller is told.
    pub fn address(&self) -> Option<String> {
        let listen = self.listen?;
        Some(self.advertise.clone().unwrap_or_else(|| format!("{}:{}", hostname(), listen.port())))
    }
}

#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// Where Prometheus scrapes; nothing listens if absent.
    pub listen: Option<SocketAddr>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// A tracing filter: "info", "warn,walfleet_agent=debug".
    pub log: String,
    pub log_format: LogFormat,
    /// OTLP over gRPC: "http://collector:4317"; no traces are sent if absent.
    pub otlp_endpoint: Option<String>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            name: None,
            state_dir: PathBuf::from(DEFAULT_STATE_DIR),
            socket: None,
            controller: None,
            instances: Vec::new(),
            repository: None,
            backup: BackupConfig::default(),
            limits: LimitsSpec::NONE,
            wal: WalConfig::default(),
            postgres: PostgresConfig::default(),
            labels: BTreeMap::new(),
            spool: SpoolConfig::default(),
            metrics: MetricsConfig::default(),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl Default for BackupConfig {
    fn default() -> BackupConfig {
        // Half of the cores are left to Postgres; zstd 3 compressed heap pages to 1/12 at 1 GB/s a core.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        BackupConfig { processes: u32::try_from(cores / 2).unwrap_or(1).clamp(1, 16), compression_level: 3 }
    }
}

impl Default for WalConfig {
    fn default() -> WalConfig {
        // Of a backlog as many segments are under way as keep a store of 100 ms latency busy; what they take of memory is
        // bounded apart. Sixty-four ahead hide a burst of a gigabyte.
        WalConfig {
            parallel_uploads: 32,
            read_ahead_segments: 64,
            streaming: None,
            piece_interval: None,
            synchronous: None,
            compression: None,
            let_go_at: None,
            slot: "walfleet".to_owned(),
        }
    }
}

impl Default for TelemetryConfig {
    fn default() -> TelemetryConfig {
        TelemetryConfig { log: "info".to_owned(), log_format: LogFormat::Text, otlp_endpoint: None }
    }
}

/// Bytes of sun_path, less its final zero (sys/un.h on Linux).
const SOCKET_PATH_MAX: usize = 107;

impl Config {
    pub fn socket_path(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| default_socket(&self.state_dir))
    }

    /// The configured name, or the host's if it will do.
    pub fn agent_name(&self) -> Result<String, ConfigError> {
        let name = self.name.clone().unwrap_or_else(|| hostname().to_ascii_lowercase());
        check_name("name", &name)?;
        Ok(name)
    }

    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(name) = &self.name {
            check_name("name", name)?;
        }
        absolute("state_dir", &self.state_dir)?;
        let socket = self.socket_path();
        absolute("socket", &socket)?;
        let length = socket.as_os_str().len();
        if length > SOCKET_PATH_MAX {
            return Err(value("socket", format!("a path of {length} bytes"), "one of at most 107 bytes"));
        }
        if let Some(controller) = &self.controller {
            controller_url("controller.url", &controller.url)?;
        }
        self.validate_instances()?;
        if let Some(repository) = &self.repository {
            repository.validate("repository")?;
        }
        if self.controller.is_some() && self.repository.is_some() {
            return Err(ConfigError::Conflict {
                at: "repository".into(),
                what: "there is a controller, which names the repositories".into(),
                hint: "remove the repository section, or the controller section.".into(),
            });
        }
        range("backup.processes", self.backup.processes.into(), 1, 64)?;
        range("backup.compression_level", self.backup.compression_level.into(), 1, 19)?;
        range("wal.parallel_uploads", self.wal.parallel_uploads.into(), 1, 64)?;
        range("wal.read_ahead_segments", self.wal.read_ahead_segments.into(), 0, 1024)?;
        slot_name("wal.slot", &self.wal.slot)?;
        if self.wal.synchronous == Some(Synchronous::Spool) {
            return Err(ConfigError::Conflict {
                at: "wal.synchronous".into(),
                what: "which agent's spool keeps this host's WAL is for a controller to say".into(),
                hint:
                    "set wal.synchronous to spool in the policy; without a controller, repository loses nothing either."
                        .into(),
            });
        }
        range("spool.size_mib", self.spool.size_mib.into(), 64, 1 << 20)?;
        if let Some(address) = &self.spool.advertise {
            let parsed = format!("http://{address}").parse::<tonic::transport::Uri>().ok();
            let good = parsed.is_some_and(|uri| uri.port_u16().is_some_and(|port| port != 0) && uri.path() == "/");
            if !good {
                return Err(value("spool.advertise", format!("{address:?}"), "\"host:port\""));
            }
            if self.spool.listen.is_none() {
                return Err(value("spool.advertise", "set", "of use without spool.listen"));
            }
        }
        if self.spool.listen.is_some() && self.controller.is_none() {
            return Err(ConfigError::Conflict {
                at: "spool.listen".into(),
                what: "there is no controller that could name this agent to others".into(),
                hint: "remove it, or join a controller.".into(),
            });
        }
        for (index, folder) in self.postgres.bin_dirs.iter().enumerate() {
            absolute(&format!("postgres.bin_dirs[{index}]"), folder)?;
        }
        for (key, text) in &self.labels {
            let fits = |text: &str| (1..=63).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
            if !fits(key) || !fits(text) {
                return Err(value(format!("labels.{key}"), format!("{text:?}"), "1 to 63 printable characters"));
            }
        }
        Ok(())
    }

    fn validate_instances(&self) -> Result<(), ConfigError> {
        let (mut folders, mut clusters) = (BTreeSet::new(), BTreeSet::new());
        for (index, instance) in self.instances.iter().enumerate() {
            let at = format!("instances[{index}]");
            absolute(&format!("{at}.data_dir"), &instance.data_dir)?;
            // Components, so that a trailing slash does not hide a repetition.
            if !folders.insert(instance.data_dir.components().collect::<PathBuf>()) {
                return Err(ConfigError::Conflict {
                    at: format!("{at}.data_dir"),
                    what: format!("{} is named twice", instance.data_dir.display()),
                    hint: "an instance is a member of one cluster; remove one of the two.".into(),
                });
            }
            if !clusters.insert(&instance.cluster) {
                return Err(ConfigError::Conflict {
                    at: format!("{at}.cluster"),
                    what: format!("{} is named twice", instance.cluster),
                    hint: "two members of one cluster on one host need an agent each, with its own state_dir.".into(),
                });
            }
            if let Some(connection) = &instance.connection
                && let Err(error) = connection.parse::<tokio_postgres::Config>()
            {
                // The text itself may hold a password and is not repeated.
                let expected = "\"host=/var/run/postgresql port=5432 user=postgres\" or the like";
                return Err(value(format!("{at}.connection"), format!("the given text ({error})"), expected));
            }
        }
        Ok(())
    }

    /// Every option present: what the sample is held against.
    #[cfg(test)]
    pub(super) fn with_every_option() -> Config {
        Config {
            name: Some("db1".into()),
            socket: Some("/run/walfleet/agent.sock".into()),
            controller: Some(ControllerConfig { url: "https://controller:7400".into() }),
            instances: vec![InstanceConfig {
                cluster: "orders".parse().unwrap(),
                data_dir: "/data".into(),
                connection: Some("port=5432".into()),
                lineage: Lineage::Separate,
            }],
            repository: Some(RepositoryConfig {
                url: "file:///srv/walfleet".into(),
                options: BTreeMap::new(),
                key_file: "/key".into(),
            }),
            limits: LimitsSpec {
                cpu: "50%".parse().ok(),
                read: "1MB/s".parse().ok(),
                write: "1MB/s".parse().ok(),
                upload: "1MB/s".parse().ok(),
                download: "1MB/s".parse().ok(),
            },
            wal: WalConfig {
                streaming: Some(Streaming::On),
                piece_interval: Some(PieceInterval::default()),
                synchronous: Some(Synchronous::Repository),
                compression: Some(Compression::Fixed),
                let_go_at: "90%".parse().ok(),
                ..WalConfig::default()
            },
            spool: SpoolConfig {
                listen: Some(SocketAddr::from(([0, 0, 0, 0], 7433))),
                advertise: Some("db1.example.net:7433".into()),
                ..SpoolConfig::default()
            },
            ..Config::default()
        }
    }
}

impl RepositoryConfig {
    pub fn validate(&self, at: &str) -> Result<(), ConfigError> {
        let known = ["file:///", "s3://"].iter().any(|scheme| {
            self.url
                .strip_prefix(scheme)
                .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_graphic()))
        });
        if !known {
            return Err(value(
                format!("{at}.url"),
                format!("{:?}", self.url),
                "\"file:///path\" or \"s3://bucket/prefix\"",
            ));
        }
        Ok(())
    }
}

/// As PostgreSQL takes it (ReplicationSlotValidateName, src/backend/replication/slot.c).
fn slot_name(at: &str, name: &str) -> Result<(), ConfigError> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    match (1..=63).contains(&name.len()) && name.bytes().all(allowed) {
        true => Ok(()),
        false => Err(value(at, format!("{name:?}"), "1 to 63 of a-z, 0-9 and '_'")),
    }
}

pub fn default_socket(state_dir: &Path) -> PathBuf {
    state_dir.join("agent.sock")
}

pub(super) fn check_name(at: &str, name: &str) -> Result<(), ConfigError> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_');
    if (1..=63).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(())
    } else {
        Err(value(at, format!("{name:?}"), "1 to 63 of a-z, 0-9, '-', '.' and '_'"))
    }
}

/// `https`, a host, a port, and nothing after.
fn controller_url(at: &str, url: &str) -> Result<(), ConfigError> {
    let parsed = url.parse::<tonic::transport::Uri>().ok();
    let good = parsed.is_some_and(|uri| {
        uri.scheme_str() == Some("https") && uri.port_u16().is_some() && matches!(uri.path(), "" | "/")
    });
    if good { Ok(()) } else { Err(value(at, format!("{url:?}"), "\"https://host:port\"")) }
}

fn absolute(at: &str, path: &Path) -> Result<(), ConfigError> {
    if path.is_absolute() { Ok(()) } else { Err(value(at, format!("{:?}", path.display()), "an absolute path")) }
}

fn range(at: &str, found: i64, least: i64, most: i64) -> Result<(), ConfigError> {
    if (least..=most).contains(&found) {
        Ok(())
    } else {
        Err(value(at, found.to_string(), format!("a number from {least} to {most}")))
    }
}

fn value(at: impl Into<String>, found: impl Into<String>, expected: impl Into<String>) -> ConfigError {
    ConfigError::Value { at: at.into(), found: found.into(), expected: expected.into() }
}

pub fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "localhost".to_owned(), |name| name.trim().to_owned())
}
