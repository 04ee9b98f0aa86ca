//! An agent and the Postgres instances it found on its host.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, Table, View, labels};
use crate::quantity::size;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Primary,
    Standby,
    /// Found, but it does not answer.
    Down,
    Unknown,
}

impl Role {
    pub fn word(self) -> &'static str {
        match self {
            Role::Primary => "primary",
            Role::Standby => "standby",
            Role::Down => "down",
            Role::Unknown => "unknown",
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Instance {
    /// Null: found, and belongs to no cluster.
    pub cluster: Option<String>,
    pub role: Role,
    pub server_version: Option<String>,
    pub system_identifier: Option<String>,
    pub data_dir: String,
    pub port: u32,
    pub timeline: Option<u32>,
    pub current_lsn: Option<String>,
    pub cluster_bytes: Option<u64>,
    pub data_checksums: bool,
    pub archive: Option<Archive>,
    pub tablespaces: Vec<Tablespace>,
    pub problems: Vec<String>,
}

/// How WAL leaves this instance.
#[derive(Clone, Debug, Serialize)]
pub struct Archive {
    pub archive_command_set: bool,
    pub last_segment: Option<String>,
    pub durable_lsn: Option<String>,
    pub durable_at: Option<Timestamp>,
    pub ready_segments: u64,
    pub failed_count: u64,
    pub last_error: Option<String>,
    pub pg_wal_bytes: u64,
    pub pg_wal_free_bytes: u64,
    pub stream: Option<Stream>,
    /// At the rate at which WAL accumulates that the repository lacks or PostgreSQL keeps.
    pub pg_wal_full_in_seconds: Option<u64>,
    pub requests_last_hour: u64,
    pub stored_bytes_last_hour: u64,
}

/// WAL over the replication protocol.
#[derive(Clone, Debug, Serialize)]
pub struct Stream {
    /// off, streaming, following or waiting
    pub phase: String,
    pub problem: Option<String>,
    pub store_error: Option<String>,
    pub received_lsn: Option<String>,
    /// By the server's clock: everything committed before is in the repository.
    pub complete_until: Option<Timestamp>,
    pub pieces: u64,
    pub segments: u64,
    pub piece_interval_seconds: f64,
    pub synchronous: String,
    /// While commits may wait for spools.
    pub spool: Option<Spool>,
}

/// Commits that wait for two hosts' spools.
#[derive(Clone, Debug, Serialize)]
pub struct Spool {
    /// The agent that keeps them beside this one.
    pub peer: Option<String>,
    /// spools, or while one is away: repository, alone (this host's spool) or peer
    pub waits_for: String,
    /// Why not for the spools.
    pub problem: Option<String>,
    pub written_lsn: Option<String>,
    pub held_bytes: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct Tablespace {
    pub oid: u32,
    pub name: String,
    pub location: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Agent {
    pub name: String,
    pub hostname: String,
    pub labels: BTreeMap<String, String>,
    pub version: String,
    pub connected: bool,
    pub last_seen_at: Option<Timestamp>,
    pub joined_at: Option<Timestamp>,
    pub certificate_not_after: Option<Timestamp>,
    pub instances: Vec<Instance>,
    pub running_jobs: Vec<String>,
}

impl Agent {
    fn shown_connected(&self) -> String {
        if self.connected { Ink::Good.on("connected") } else { Ink::Warn.on("not connected") }
    }

    fn clusters(&self) -> String {
        let name = |instance: &Instance| instance.cluster.clone().unwrap_or_else(|| format!("({})", instance.data_dir));
        self.instances.iter().map(name).collect::<Vec<_>>().join(",")
    }
}

impl View for Agent {
    fn draw(&self, page: &mut Page) {
        page.line(format!("{}  {}", self.name, self.shown_connected()));
        page.pairs(&[
            ("host", self.hostname.clone()),
            ("version", self.version.clone()),
            ("labels", labels(&self.labels)),
            ("last seen", page.when(self.last_seen_at)),
            ("joined", page.when(self.joined_at)),
            (
                "certificate",
                self.certificate_not_after
                    .map_or(String::new(), |at| format!("valid until {}", crate::when::full(at, page.now))),
            ),
            ("running jobs", self.running_jobs.join("\n")),
        ]);
        page.gap();
        if self.instances.is_empty() {
            page.line("It found no Postgres instance on its host.");
            return;
        }
        for instance in &self.instances {
            instance.draw(page);
        }
    }
}

impl Instance {
    fn draw(&self, page: &mut Page) {
        let belongs = self.cluster.as_ref().map_or("no cluster".to_owned(), |name| format!("cluster {name}"));
        page.line(format!("{}  {}, {belongs}", self.data_dir, self.role.word()));
        let mut pairs = vec![
            ("server", self.server_version.as_ref().map_or(String::new(), |version| format!("PostgreSQL {version}"))),
            ("port", self.port.to_string()),
            ("system identifier", self.system_identifier.clone().unwrap_or_default()),
            ("size", self.cluster_bytes.map(size).unwrap_or_default()),
            ("data checksums", if self.data_checksums { "on" } else { "off" }.to_owned()),
            ("timeline", self.timeline.map(|timeline| timeline.to_string()).unwrap_or_default()),
            ("WAL position", self.current_lsn.clone().unwrap_or_default()),
        ];
        if let Some(archive) = &self.archive {
            pairs.push(("WAL stored up to", archive.stored(page)));
            pairs.push((
                "WAL waiting",
                format!("{} segments, pg_wal {}", archive.ready_segments, size(archive.pg_wal_bytes)),
            ));
        }
        let tablespaces: Vec<String> =
            self.tablespaces.iter().map(|space| format!("{} at {}", space.name, space.location)).collect();
        pairs.push(("tablespaces", tablespaces.join("\n")));
        pairs.push(("problems", self.problems.iter().map(|text| Ink::Warn.on(text)).collect::<Vec<_>>().join("\n")));
        page.pairs(&pairs);
    }
}

impl Archive {
    pub fn stored(&self, page: &Page) -> String {
        match &self.durable_lsn {
            Some(lsn) => format!("{lsn}  {}", page.when(self.durable_at)),
            None => "nothing yet".to_owned(),
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Agents {
    pub agents: Vec<Agent>,
}

impl View for Agents {
    fn draw(&self, page: &mut Page) {
        if self.agents.is_empty() {
            page.line("No agents. Admit one: walfleet token create --role agent");
            return;
        }
        let mut table = Table::new(&[
            "NAME",
            "STATE",
            "HOST",
            "VERSION",
            "CLUSTERS",
            ">JOBS",
            "LAST SEEN",
            "+CERTIFICATE UNTIL",
            "+JOINED",
            "+LABELS",
        ]);
        for agent in &self.agents {
            table.row([
                agent.name.clone(),
                agent.shown_connected(),
                agent.hostname.clone(),
                agent.version.clone(),
                agent.clusters(),
                agent.running_jobs.len().to_string(),
                page.when(agent.last_seen_at),
                page.when(agent.certificate_not_after),
                page.when(agent.joined_at),
                labels(&agent.labels),
            ]);
        }
        page.table(table);
    }
}
