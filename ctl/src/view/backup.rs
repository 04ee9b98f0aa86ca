//! A backup, alone and in lists.

use jiff::Timestamp;
use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, Table, View};
use crate::quantity::{seconds, size};

/// The first fields are the documented `last_backup`.
#[derive(Clone, Debug, Serialize)]
pub struct Backup {
    pub id: String,
    pub finished_at: Option<Timestamp>,
    /// Read from the server.
    pub read_bytes: u64,
    /// Not known to the repository before.
    pub new_bytes: u64,
    /// Written to it, compressed and sealed.
    pub stored_bytes: u64,
    pub cluster: String,
    pub state: String,
    pub started_at: Option<Timestamp>,
    pub duration_seconds: Option<f64>,
    pub cluster_bytes: u64,
    pub member: String,
    pub server_version: Option<String>,
    pub system_identifier: Option<String>,
    pub timeline: u32,
    pub start_lsn: String,
    pub stop_lsn: String,
    pub parents: Vec<String>,
    pub damaged_pages: u64,
    pub store_requests: u64,
    pub unexplained_slots: u64,
    /// Known without reading.
    pub spared_bytes: u64,
    /// Null: only what the WAL says has changed was read.
    pub read_all_because: Option<String>,
}

impl Backup {
    /// `48.2 GiB, of which 1.1 GiB new, 310.4 MiB stored`
    pub fn cost(&self) -> String {
        format!(
            "{}, of which {} new, {} stored",
            size(self.cluster_bytes),
            size(self.new_bytes),
            size(self.stored_bytes)
        )
    }

    /// `1.2 GiB; 46.8 GiB known to be as before`, or `48.0 GiB: everything, since it was asked for`
    fn shown_read(&self) -> String {
        match &self.read_all_because {
            Some(because) => format!("{}: everything, since {because}", size(self.read_bytes)),
            None if self.spared_bytes > 0 => {
                format!("{}; {} known to be as before", size(self.read_bytes), size(self.spared_bytes))
            }
            None => size(self.read_bytes),
        }
    }

    fn shown_damage(&self) -> String {
        match self.damaged_pages {
            0 => String::new(),
            number => Ink::Bad.on(&number.to_string()),
        }
    }
}

impl View for Backup {
    fn draw(&self, page: &mut Page) {
        page.line(format!("{}  {} of cluster {}", self.id, self.state, self.cluster));
        let damage = match self.damaged_pages {
            0 => "none found".to_owned(),
            number => Ink::Bad.on(&format!("{number}: the server's own pages fail their checksums")),
        };
        let unexplained = match self.unexplained_slots {
            0 => String::new(),
            number => Ink::Bad.on(&format!("{number} slots of 128 KiB changed though no WAL says so")),
        };
        let server = self.server_version.as_ref().map(|version| format!("PostgreSQL {version}, ")).unwrap_or_default();
        page.pairs(&[
            ("started", page.when(self.started_at)),
            ("finished", page.when(self.finished_at)),
            ("took", self.duration_seconds.map(seconds).unwrap_or_default()),
            ("taken from", format!("{server}member {}", self.member)),
            ("system identifier", self.system_identifier.clone().unwrap_or_default()),
            ("WAL", format!("{} to {} on timeline {}", self.start_lsn, self.stop_lsn, self.timeline)),
            ("size restored", size(self.cluster_bytes)),
            ("read", self.shown_read()),
            ("new", size(self.new_bytes)),
            ("stored", format!("{} in {} requests", size(self.stored_bytes), self.store_requests)),
            ("damaged pages", damage),
            ("unexplained", unexplained),
            ("compared with", self.parents.join("\n")),
        ]);
    }
}

#[derive(Debug, Serialize)]
pub struct Backups {
    pub cluster: String,
    pub backups: Vec<Backup>,
}

impl View for Backups {
    fn draw(&self, page: &mut Page) {
        if self.backups.is_empty() {
            page.line(format!("No backups of {0}. Take one: walfleet backup start {0} --wait", self.cluster));
            return;
        }
        let mut table = Table::new(&[
            "ID",
            "FINISHED",
            ">TOOK",
            ">SIZE",
            ">READ",
            ">NEW",
            ">STORED",
            "MEMBER",
            ">DAMAGED PAGES",
            "+STATE",
            "+>TIMELINE",
            "+START LSN",
            "+STOP LSN",
            "+>REQUESTS",
        ]);
        for backup in &self.backups {
            table.row([
                backup.id.clone(),
                page.when(backup.finished_at),
                backup.duration_seconds.map(seconds).unwrap_or_default(),
                size(backup.cluster_bytes),
                size(backup.read_bytes),
                size(backup.new_bytes),
                size(backup.stored_bytes),
                backup.member.clone(),
                backup.shown_damage(),
                backup.state.clone(),
                backup.timeline.to_string(),
                backup.start_lsn.clone(),
                backup.stop_lsn.clone(),
                backup.store_requests.to_string(),
            ]);
        }
        page.table(table);
    }
}
