//! The sections of the configuration, their defaults with reasons, and their accepted ranges.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use crate::identity::MemberName;
use crate::identity::authority::check_server_name;
use crate::identity::enrol::Lifetimes;

const DAY: u64 = 86_400;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The controller's name, for people; the host's name if absent.
    pub name: Option<String>,
    /// Where agents and operators call.
    pub listen: SocketAddr,
    /// Host names and IP addresses that its certificate is good for, beside the host's name and the loopback addresses.
    pub server_names: Vec<String>,
    /// Authority and keeper key; made by `init`.
    pub directory: PathBuf,
    pub state: StateConfig,
    pub certificates: CertificatesConfig,
    pub agents: AgentsConfig,
    pub jobs: JobsConfig,
    pub retention: RetentionConfig,
    pub limits: LimitsConfig,
    pub metrics: MetricsConfig,
    pub telemetry: TelemetryConfig,
    /// How long running calls may take to end once the controller is told to stop.
    pub shutdown_seconds: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StateConfig {
    /// Relative to `directory`.
    pub path: PathBuf,
    /// Changes kept for watches that fell behind.
    pub history_revisions: u64,
    pub cache_mib: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CertificatesConfig {
    pub agent_seconds: u64,
    pub operator_seconds: u64,
    /// How long after its end a certificate still serves for renewing, and for nothing else.
    pub renewal_grace_seconds: u64,
    /// The listener's own; renewed after two thirds.
    pub server_seconds: u64,
    /// What agents may sign in repositories with; sent anew after a third. An agent without a controller can write for
    /// the rest of it.
    pub writer_seconds: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentsConfig {
    pub heartbeat_seconds: u32,
    /// Silence after which an agent counts as lost; at least two heartbeats.
    pub lost_after_seconds: u32,
    /// Facts come on change, and at least this often.
    pub facts_interval_seconds: u32,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobsConfig {
    /// How long a running job's agent may be silent before the job's state is unknown.
    pub lease_seconds: u32,
    /// How long an agent may take to answer an offer.
    pub offer_seconds: u32,
    /// How often everything is looked at again, beside on change.
    pub reconcile_seconds: u32,
    /// How long jobs that are over stay listed.
    pub history_days: u32,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionConfig {
    /// Between two plans of one cluster: something is kept that much longer than promised, at most.
    pub every_seconds: u64,
    /// A policy that keeps less than before acts after it stood for so long.
    pub notice_seconds: u64,
    /// Restores under way may read what is to be removed for so long.
    pub grace_seconds: u64,
    /// Objects removed per second and cluster, at most.
    pub removals_per_second: u32,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Open connections; one per agent, and what operators open.
    pub connections: u32,
    pub handshake_seconds: u64,
}

#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// `/metrics` for Prometheus and `/healthz`, in clear; nothing listens if absent.
    pub listen: Option<SocketAddr>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// A tracing filter: "info", "warn,walfleet_controller=debug".
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
    fn default() -> Self {
        Self {
            name: None,
            listen: SocketAddr::from(([0, 0, 0, 0], 7400)),
            server_names: Vec::new(),
            // FHS 3.0, 5.8.
            directory: PathBuf::from("/var/lib/walfleet-controller"),
            state: StateConfig::default(),
            certificates: CertificatesConfig::default(),
            agents: AgentsConfig::default(),
            jobs: JobsConfig::default(),
            retention: RetentionConfig::default(),
            limits: LimitsConfig::default(),
            metrics: MetricsConfig::default(),
            telemetry: TelemetryConfig::default(),
            // Answers take milliseconds; streams are told to end. systemd kills after 90.
            shutdown_seconds: 10,
        }
    }
}

impl Default for StateConfig {
    fn default() -> Self {
        // Minutes of changes of a busy fleet; 64 MiB hold the state of some thousand agents.
        Self { path: PathBuf::from("state.redb"), history_revisions: 10_000, cache_mib: 64 }
    }
}

impl Default for CertificatesConfig {
    fn default() -> Self {
        Self {
            // A stolen one is worth a day; renewal needs the controller only now and then.
            agent_seconds: DAY,
            operator_seconds: 30 * DAY,
            // A host that was off for a month's holidays comes back by itself.
            renewal_grace_seconds: 30 * DAY,
            server_seconds: 30 * DAY,
            // A controller may be gone for two months before any host stops writing.
            writer_seconds: 90 * DAY,
        }
    }
}

impl Default for AgentsConfig {
    fn default() -> Self {
        // 10,000 agents send 1,000 heartbeats a second; a lost host is noticed within half a minute.
        Self { heartbeat_seconds: 10, lost_after_seconds: 30, facts_interval_seconds: 60 }
    }
}

impl Default for JobsConfig {
    fn default() -> Self {
        // An agent's restart takes seconds; a minute of silence is worth telling people.
        Self { lease_seconds: 60, offer_seconds: 20, reconcile_seconds: 5, history_days: 30 }
    }
}

impl Default for RetentionConfig {
    fn default() -> Self {
        // A slip is seen within a day; restores of terabytes take hours. A store that answers in 50 ms takes 200 removals a
        // second, a few at a time.
        Self { every_seconds: 6 * 3600, notice_seconds: DAY, grace_seconds: DAY, removals_per_second: 200 }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self { connections: 20_000, handshake_seconds: 10 }
    }
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { log: "info".to_owned(), log_format: LogFormat::Text, otlp_endpoint: None }
    }
}

impl Config {
    pub fn state_path(&self) -> PathBuf {
        self.directory.join(&self.state.path)
    }

    /// The configured name, or the host's.
    pub fn controller_name(&self) -> String {
        self.name.clone().unwrap_or_else(hostname)
    }

    /// Everything the server certificate is for.
    pub fn certificate_names(&self) -> Vec<String> {
        let mut names = self.server_names.clone();
        names.extend([hostname(), "localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()]);
        if !self.listen.ip().is_unspecified() {
            names.push(self.listen.ip().to_string());
        }
        let mut seen = std::collections::HashSet::new();
        // A host's own name may be no host name in the sense of DNS.
        names.retain(|name| check_server_name(name).is_ok() && seen.insert(name.clone()));
        names
    }

    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(name) = &self.name {
            name.parse::<MemberName>().map_err(|_| value("name", name, "1 to 63 of a-z, 0-9, '-', '_' and '.'"))?;
        }
        for (index, name) in self.server_names.iter().enumerate() {
            let expected = "a host name or an IP address";
            check_server_name(name).map_err(|_| value(&format!("server_names[{index}]"), name, expected))?;
        }
        absolute("directory", &self.directory)?;
        if self.state.path.as_os_str().is_empty() {
            return Err(value("state.path", "\"\"", "a file name"));
        }
        range("state.history_revisions", self.state.history_revisions, 100, 10_000_000)?;
        range("state.cache_mib", self.state.cache_mib, 1, 65_536)?;
        let certificates = &self.certificates;
        // Seconds, for tests of renewal.
        range("certificates.agent_seconds", certificates.agent_seconds, 5, 365 * DAY)?;
        range("certificates.operator_seconds", certificates.operator_seconds, 60, 3650 * DAY)?;
        range("certificates.renewal_grace_seconds", certificates.renewal_grace_seconds, 0, 3650 * DAY)?;
        range("certificates.server_seconds", certificates.server_seconds, 60, 825 * DAY)?;
        range("certificates.writer_seconds", certificates.writer_seconds, 3600, 3650 * DAY)?;
        let agents = &self.agents;
        range("agents.heartbeat_seconds", agents.heartbeat_seconds.into(), 1, 300)?;
        let two = u64::from(agents.heartbeat_seconds) * 2;
        range("agents.lost_after_seconds", agents.lost_after_seconds.into(), two, 86_400)?;
        range("agents.facts_interval_seconds", agents.facts_interval_seconds.into(), 1, 86_400)?;
        range("jobs.lease_seconds", self.jobs.lease_seconds.into(), two, 86_400)?;
        range("jobs.offer_seconds", self.jobs.offer_seconds.into(), 1, 3600)?;
        range("jobs.reconcile_seconds", self.jobs.reconcile_seconds.into(), 1, 3600)?;
        range("jobs.history_days", self.jobs.history_days.into(), 1, 3650)?;
        let retention = &self.retention;
        // Seconds, for tests.
        range("retention.every_seconds", retention.every_seconds, 1, 7 * DAY)?;
        range("retention.notice_seconds", retention.notice_seconds, 0, 30 * DAY)?;
        range("retention.grace_seconds", retention.grace_seconds, 1, 30 * DAY)?;
        range("retention.removals_per_second", retention.removals_per_second.into(), 1, 10_000)?;
        range("limits.connections", self.limits.connections.into(), 1, 1_000_000)?;
        range("limits.handshake_seconds", self.limits.handshake_seconds, 1, 300)?;
        range("shutdown_seconds", self.shutdown_seconds, 1, 600)?;
        match &self.telemetry.otlp_endpoint {
            Some(url) if !url.starts_with("http://") && !url.starts_with("https://") => {
                Err(value("telemetry.otlp_endpoint", url, "a URL such as http://collector:4317"))
            }
            _ => Ok(()),
        }
    }
}

impl CertificatesConfig {
    pub fn lifetimes(&self) -> Lifetimes {
        Lifetimes {
            agent: Duration::from_secs(self.agent_seconds),
            operator: Duration::from_secs(self.operator_seconds),
            renewal_grace: Duration::from_secs(self.renewal_grace_seconds),
        }
    }

    pub fn server(&self) -> Duration {
        Duration::from_secs(self.server_seconds)
    }

    pub fn writer(&self) -> Duration {
        Duration::from_secs(self.writer_seconds)
    }
}

/// The kernel's host name; "controller" where it has none.
pub fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim().to_ascii_lowercase();
    if name.is_empty() { "controller".to_owned() } else { name }
}

fn value(at: &str, found: impl ToString, expected: &str) -> ConfigError {
    ConfigError::Value { at: at.to_owned(), found: found.to_string(), expected: expected.to_owned() }
}

fn range(at: &str, found: u64, least: u64, most: u64) -> Result<(), ConfigError> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    Err(value(at, found, &format!("between {least} and {most}")))
}

fn absolute(at: &str, path: &Path) -> Result<(), ConfigError> {
    if path.is_absolute() { Ok(()) } else { Err(value(at, path.display(), "an absolute path")) }
}
