//! Replicas.

use jiff::Timestamp;
use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, Table, View, count};

#[derive(Debug, Serialize)]
pub struct Replicas {
    pub replicas: Vec<Replica>,
}

/// A cluster in a replica.
#[derive(Debug, Serialize)]
pub struct Replica {
    pub repository: String,
    pub replica_of: String,
    pub cluster: String,
    /// All the WAL that the first place had then is there; absent: not known yet.
    pub complete_as_of: Option<Timestamp>,
    /// How far it may trail.
    pub rpo_seconds: Option<u64>,
    pub late: bool,
    /// Backups that are not there yet; absent: nobody has looked.
    pub lacking_backups: Option<u64>,
    /// What does not read in the first place.
    pub damaged: Vec<String>,
    pub problem: Option<String>,
}

impl Replica {
    fn state(&self) -> String {
        match (&self.problem, self.damaged.len(), self.complete_as_of, self.lacking_backups) {
            (Some(problem), ..) => Ink::Warn.on(problem),
            (None, 1.., ..) => {
                Ink::Warn.on(&format!("{} damaged in the first place", count(self.damaged.len(), "object")))
            }
            (None, 0, None, _) => "not looked at yet".to_owned(),
            (None, 0, Some(_), _) if self.late => Ink::Warn.on("late"),
            (None, 0, Some(_), Some(0)) => Ink::Good.on("complete"),
            (None, 0, Some(_), _) => "backups under way".to_owned(),
        }
    }
}

impl View for Replicas {
    fn draw(&self, page: &mut Page) {
        if self.replicas.is_empty() {
            page.line("No replicas. A Repository with replica_of makes one.");
            return;
        }
        let mut table = Table::new(&["REPLICA", "OF", "CLUSTER", "ALL WAL AS OF", "BACKUPS LACKING", "STATE"]);
        for replica in &self.replicas {
            table.row([
                replica.repository.clone(),
                replica.replica_of.clone(),
                replica.cluster.clone(),
                page.when(replica.complete_as_of),
                replica.lacking_backups.map_or_else(String::new, |lacking| lacking.to_string()),
                replica.state(),
            ]);
        }
        page.table(table);
    }
}
