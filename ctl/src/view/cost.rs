//! What a job asked of the object store, and where its time went; and what a backup is expected to cost.

use serde::Serialize;

use crate::print::{Page, View};
use crate::quantity::{seconds, size};

#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// All kinds together.
    pub store_requests: u64,
    pub gets: u64,
    pub puts: u64,
    pub heads: u64,
    pub lists: u64,
    /// Of the requests, those that were not the first of their operation.
    pub retries: u64,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    /// In the order they were entered.
    pub phases: Vec<Phase>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    pub phase: String,
    pub seconds: f64,
    /// Null: it counts none.
    pub bytes: Option<u64>,
}

impl Cost {
    /// `412 requests (400 get, 10 put, 2 list), 1.1 MiB down, 310.0 MiB up`
    pub fn shown_store(&self) -> String {
        let kinds = [(self.gets, "get"), (self.puts, "put"), (self.heads, "head"), (self.lists, "list")];
        let mut kinds: Vec<String> =
            kinds.iter().filter(|(count, _)| *count > 0).map(|(count, kind)| format!("{count} {kind}")).collect();
        if self.retries > 0 {
            kinds.push(format!("{} of them again", self.retries));
        }
        let kinds = if kinds.is_empty() { String::new() } else { format!(" ({})", kinds.join(", ")) };
        let (down, up) = (size(self.received_bytes), size(self.sent_bytes));
        format!("{} requests{kinds}, {down} down, {up} up", self.store_requests)
    }

    /// `copy 3m 2s, wait for wal 4.0s, commit 0.5s`
    pub fn shown_phases(&self) -> String {
        let shown = |phase: &Phase| format!("{} {}", phase.phase, seconds(phase.seconds));
        self.phases.iter().map(shown).collect::<Vec<_>>().join(", ")
    }
}

/// What a backup is expected to cost; null: nothing is known of its kind.
#[derive(Clone, Debug, Serialize)]
pub struct BackupPlan {
    pub cluster_bytes: u64,
    pub read_bytes: Option<u64>,
    pub stored_bytes: Option<u64>,
    pub store_requests: Option<u64>,
    pub estimated_seconds: Option<f64>,
    /// What the figures were made of.
    pub estimated_from: Option<String>,
    /// Null: only what the WAL says has changed would be read.
    pub read_all_because: Option<String>,
    pub notes: Vec<String>,
}

impl BackupPlan {
    pub fn draw(&self, cluster: &str, agent: &str, page: &mut Page) {
        page.line(format!("plan: back up {cluster} on {agent}; nothing is changed"));
        let known = |bytes: Option<u64>| bytes.map_or("not known".to_owned(), size);
        let read = match &self.read_all_because {
            Some(because) => format!("{}: everything, since {because}", known(self.read_bytes)),
            None => known(self.read_bytes),
        };
        let requests = self.store_requests.map(|count| format!(" in {count} requests")).unwrap_or_default();
        let time = match (self.estimated_seconds, &self.estimated_from) {
            (Some(time), Some(from)) => format!("about {}, as {from}", seconds(time)),
            _ => "not known: no such backup was taken yet".to_owned(),
        };
        page.pairs(&[
            ("cluster size", size(self.cluster_bytes)),
            ("to read", read),
            ("to store", known(self.stored_bytes) + &requests),
            ("estimated time", time),
            ("notes", self.notes.join("\n")),
        ]);
    }
}

/// The answer of `backup plan`.
#[derive(Debug, Serialize)]
pub struct PlannedBackup {
    pub cluster: String,
    pub agent: String,
    #[serde(flatten)]
    pub plan: BackupPlan,
}

impl View for PlannedBackup {
    fn draw(&self, page: &mut Page) {
        self.plan.draw(&self.cluster, &self.agent, page);
    }
}
