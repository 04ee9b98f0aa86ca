//! Holds.

use jiff::Timestamp;
use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, Table, View};

#[derive(Debug, Serialize)]
pub struct Hold {
    pub id: String,
    pub cluster: String,
    pub repository: String,
    /// Of a stretch of time, the one that it is restored from.
    pub backup: Option<String>,
    /// Any second of it is kept.
    pub stretch: Option<Stretch>,
    /// WAL alone.
    pub wal: Option<String>,
    pub reason: String,
    pub owner: String,
    pub until: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
pub struct Stretch {
    pub from: Option<Timestamp>,
    /// Absent: without end.
    pub to: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
pub struct Holds {
    pub holds: Vec<Hold>,
    /// Repositories that did not answer, and why.
    pub unknown: Vec<String>,
}

impl Hold {
    fn what(&self, page: &Page) -> String {
        let backup = self.backup.as_deref().unwrap_or("?");
        match (&self.stretch, &self.wal) {
            (Some(stretch), _) => {
                let to = stretch.to.map_or_else(|| "on".to_owned(), |to| format!("to {}", page.when(Some(to))));
                format!("any second from {} {to}", page.when(stretch.from))
            }
            (None, Some(wal)) => format!("WAL of {wal}"),
            (None, None) => format!("backup {backup}"),
        }
    }
}

impl View for Holds {
    fn draw(&self, page: &mut Page) {
        for unknown in &self.unknown {
            page.line(Ink::Warn.on(unknown));
        }
        if self.holds.is_empty() {
            page.line("No holds.");
            return;
        }
        let mut table = Table::new(&["ID", "CLUSTER", "KEEPS", "UNTIL", "BY", "REASON", "+REPOSITORY", "+FROM BACKUP"]);
        for hold in &self.holds {
            table.row([
                hold.id.clone(),
                hold.cluster.clone(),
                hold.what(page),
                hold.until.map_or_else(|| "released".to_owned(), |until| page.when(Some(until))),
                hold.owner.clone(),
                hold.reason.clone(),
                hold.repository.clone(),
                hold.backup.clone().unwrap_or_default(),
            ]);
        }
        page.table(table);
    }
}
