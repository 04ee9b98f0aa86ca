//! What a restore did, and what one would cost.

use jiff::Timestamp;
use serde::Serialize;

use crate::print::{Page, View, count};
use crate::quantity::{seconds, size};
use crate::when;

#[derive(Clone, Debug, Serialize)]
pub struct Restore {
    pub data_dir: String,
    pub backup: String,
    /// Of the data directory.
    pub cluster_bytes: u64,
    /// From the store.
    pub fetched_bytes: u64,
    pub store_requests: u64,
    pub wal_from_lsn: Option<String>,
    pub wal_to_lsn: Option<String>,
    pub timeline: u32,
    /// Where the started server stands.
    pub reached_lsn: Option<String>,
    pub reached_commit_at: Option<Timestamp>,
    pub server_state: String,
    pub connection: Option<String>,
    pub copy_seconds: f64,
    pub replay_seconds: f64,
    pub estimated_seconds: Option<f64>,
    pub notes: Vec<String>,
    /// That replay reads: records, and the segments they lie in.
    pub wal_bytes: u64,
    pub wal_segments: u64,
    /// What the estimate was made of.
    pub estimated_from: Option<String>,
    /// Of a plan over a copy: what it takes at most, since what is right already is kept.
    pub at_most: bool,
}

impl Restore {
    fn shown_wal(&self) -> String {
        match (&self.wal_from_lsn, &self.wal_to_lsn) {
            (Some(from), Some(to)) => format!("{from} to {to} on timeline {}", self.timeline),
            (Some(from), None) => format!("from {from} on timeline {}", self.timeline),
            (None, _) => String::new(),
        }
    }

    pub fn draw_done(&self, cluster: &str, agent: &str, target: &str, page: &mut Page) {
        page.line(format!("restored {cluster} on {agent} in {}", self.data_dir));
        let reached = match (&self.reached_lsn, self.reached_commit_at) {
            // To the microsecond: next to a target a second is too coarse.
            (Some(lsn), Some(at)) => {
                format!("{lsn}, last commit {} ({})", when::precise(at), when::relative(at, page.now))
            }
            (Some(lsn), None) => lsn.clone(),
            (None, _) => String::new(),
        };
        let replayed = if self.reached_lsn.is_some() {
            format!(", replayed WAL in {}", seconds(self.replay_seconds))
        } else {
            String::new()
        };
        page.pairs(&[
            ("target", target.to_owned()),
            ("backup", self.backup.clone()),
            ("WAL", self.shown_wal()),
            (
                "copied",
                format!(
                    "{} from {} fetched in {} requests",
                    size(self.cluster_bytes),
                    size(self.fetched_bytes),
                    self.store_requests
                ),
            ),
            ("took", format!("copied in {}{replayed}", seconds(self.copy_seconds))),
            ("server", self.server_state.clone()),
            ("stands at", reached),
            ("connect", self.connection.as_ref().map(|connection| psql(connection)).unwrap_or_default()),
            ("notes", self.notes.join("\n")),
        ]);
    }

    pub fn draw_plan(&self, cluster: &str, agent: &str, target: &str, page: &mut Page) {
        page.line(format!("plan: restore {cluster} on {agent} into {}; nothing is changed", self.data_dir));
        let at_most = if self.at_most { "at most " } else { "" };
        let time = match (self.estimated_seconds, &self.estimated_from) {
            (Some(time), Some(from)) => format!("{at_most}about {}, as {from}", seconds(time)),
            // An older agent, which assumed.
            (Some(time), None) => seconds(time),
            (None, _) => "not known: neither a restore nor a backup that read everything is known".to_owned(),
        };
        page.pairs(&[
            ("target", target.to_owned()),
            ("backup", self.backup.clone()),
            ("WAL", self.shown_wal()),
            ("to write", format!("{at_most}{}", size(self.cluster_bytes))),
            ("to fetch", format!("{at_most}{} in {} requests", size(self.fetched_bytes), self.store_requests)),
            (
                "to replay",
                format!("{} of WAL in {}", size(self.wal_bytes), count(self.wal_segments as usize, "segment")),
            ),
            ("estimated time", time),
            ("notes", self.notes.join("\n")),
        ]);
    }
}

/// The agent gives a conninfo string or a whole command.
fn psql(connection: &str) -> String {
    if connection.starts_with("psql") { connection.to_owned() } else { format!("psql {}", quoted(connection)) }
}

fn quoted(text: &str) -> String {
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./:=@%+,?&".contains(&byte));
    if plain && !text.contains(['?', '&']) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// The answer of `restore plan`.
#[derive(Debug, Serialize)]
pub struct Plan {
    pub cluster: String,
    pub agent: String,
    pub target: String,
    #[serde(flatten)]
    pub restore: Restore,
}

impl View for Plan {
    fn draw(&self, page: &mut Page) {
        self.restore.draw_plan(&self.cluster, &self.agent, &self.target, page);
    }
}
