//! A cluster: what of it can be recovered, from where, and how it is kept.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::agent::Instance;
use super::backup::Backup;
use crate::ink::Ink;
use crate::print::{Page, Table, View, count, labels};
use crate::quantity::{seconds, size};

/// Worst first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// No recoverable point.
    Unprotected,
    /// No fresh facts.
    Unknown,
    /// An objective is missed.
    AtRisk,
    Protected,
}

impl Protection {
    pub fn word(self) -> &'static str {
        match self {
            Protection::Unprotected => "unprotected",
            Protection::Unknown => "unknown",
            Protection::AtRisk => "at risk",
            Protection::Protected => "protected",
        }
    }

    pub fn shown(self) -> String {
        let ink = match self {
            Protection::Unprotected => Ink::Bad,
            Protection::Unknown | Protection::AtRisk => Ink::Warn,
            Protection::Protected => Ink::Good,
        };
        ink.on(self.word())
    }
}

/// The first fields, and their order, are the documented sample.
#[derive(Clone, Debug, Serialize)]
pub struct Cluster {
    pub name: String,
    /// Text, since JSON readers round 64-bit numbers.
    pub system_identifier: Option<String>,
    pub state: Protection,
    /// Why, unless protected.
    pub reason: Option<String>,
    pub recovery: Vec<Recovery>,
    pub last_backup: Option<Backup>,
    pub last_drill: Option<Drill>,
    pub next_backup_at: Option<Timestamp>,
    pub policy: Option<String>,
    pub repository: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub server_version: Option<String>,
    pub cluster_bytes: Option<u64>,
    pub members: Vec<Member>,
}

/// What one repository can give back, as it was read at `as_of`.
#[derive(Clone, Debug, Serialize)]
pub struct Recovery {
    pub repository: String,
    pub as_of: Option<Timestamp>,
    pub ranges: Vec<Range>,
    pub gaps: Vec<Gap>,
    /// What was noted of WAL that is there by now.
    pub filled: Vec<Gap>,
    pub lag_seconds: Option<f64>,
    pub newest_commit_at: Option<Timestamp>,
    pub newest_lsn: Option<String>,
    pub newest_timeline: Option<u32>,
}

/// Any moment and any position between the two can be restored.
#[derive(Clone, Debug, Serialize)]
pub struct Range {
    pub from: Option<Timestamp>,
    pub to: Option<Timestamp>,
    pub from_lsn: String,
    pub to_lsn: String,
    pub timeline: u32,
}

#[derive(Clone, Debug, Serialize)]
pub struct Gap {
    pub timeline: u32,
    pub from_lsn: String,
    pub to_lsn: String,
    pub acknowledged: bool,
    /// The last commit before it, and the first behind it.
    pub from: Option<Timestamp>,
    pub to: Option<Timestamp>,
    /// Who had it last and no longer has it, since when, and why.
    pub recorded: Option<GapNote>,
    pub acknowledgement: Option<GapNote>,
}

/// What somebody said of a gap.
#[derive(Clone, Debug, Serialize)]
pub struct GapNote {
    /// A member or an operator.
    pub by: String,
    pub at: Option<Timestamp>,
    pub reason: String,
}

/// A restore that was made to prove that restores work.
#[derive(Clone, Debug, Serialize)]
pub struct Drill {
    pub id: String,
    pub verdict: String,
    pub restored_to: Option<Timestamp>,
    pub duration_seconds: f64,
}

#[derive(Clone, Debug, Serialize)]
pub struct Member {
    pub agent: String,
    pub connected: bool,
    pub facts_at: Option<Timestamp>,
    pub instance: Option<Instance>,
}

impl Cluster {
    /// The newest stretch that can be recovered, in whichever repository holds it.
    pub fn newest_range(&self) -> Option<&Range> {
        self.recovery.iter().flat_map(|window| &window.ranges).max_by_key(|range| range.to)
    }

    pub fn open_gaps(&self) -> usize {
        self.recovery.iter().flat_map(|window| &window.gaps).filter(|gap| !gap.acknowledged).count()
    }

    /// The lag of the repository that trails least.
    pub fn lag(&self) -> Option<f64> {
        self.recovery.iter().filter_map(|window| window.lag_seconds).min_by(f64::total_cmp)
    }

    pub fn shown_lag(&self) -> String {
        self.lag().map(seconds).unwrap_or_default()
    }

    pub fn shown_reason(&self) -> String {
        let open = self.open_gaps();
        let known = self.recovery.iter().map(|window| window.gaps.len()).sum::<usize>() - open;
        match (&self.reason, open) {
            (Some(reason), _) if known > 0 => format!("{reason}; {} in the WAL, acknowledged", count(known, "gap")),
            (Some(reason), _) => reason.clone(),
            (None, 0) if known == 0 => String::new(),
            (None, 0) => format!("{} in the WAL, acknowledged: walfleet wal gaps {}", count(known, "gap"), self.name),
            (None, open) => format!("{} in the WAL: walfleet wal gaps {}", count(open, "gap"), self.name),
        }
    }
}

impl View for Cluster {
    fn draw(&self, page: &mut Page) {
        let reason = self.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        page.line(format!("{}  {}{reason}", self.name, self.state.shown()));
        let backup = self.last_backup.as_ref().map_or("never".to_owned(), |backup| {
            format!("{}  {}  {}", page.when(backup.finished_at), backup.id, backup.cost())
        });
        let server = [
            self.server_version.as_ref().map(|version| format!("PostgreSQL {version}")),
            self.cluster_bytes.map(size),
            self.system_identifier.as_ref().map(|id| format!("system identifier {id}")),
        ];
        page.pairs(&[
            ("server", server.into_iter().flatten().collect::<Vec<_>>().join(", ")),
            ("labels", labels(&self.labels)),
            ("policy", self.policy.clone().unwrap_or_else(|| "none binds it".to_owned())),
            ("repository", self.repository.clone().unwrap_or_default()),
            ("last backup", backup),
            ("next backup", self.next_backup_at.map_or("none is due".to_owned(), |_| page.when(self.next_backup_at))),
        ]);
        for window in &self.recovery {
            window.draw(page);
        }
        page.gap();
        draw_members(&self.members, page);
    }
}

impl Recovery {
    fn draw(&self, page: &mut Page) {
        page.gap();
        let lag = self.lag_seconds.map(|lag| format!(", {} behind the server", seconds(lag))).unwrap_or_default();
        let as_of = self.as_of.map(|_| format!(" as of {}", page.when(self.as_of))).unwrap_or_default();
        page.line(format!("Recoverable from repository {}{as_of}{lag}:", self.repository));
        if self.ranges.is_empty() {
            page.line(format!("  {}", Ink::Bad.on("nothing")));
        } else {
            let mut table = Table::new(&["FROM", "TO", "TIMELINE", "FROM LSN", "TO LSN"]);
            for range in &self.ranges {
                let timeline = range.timeline.to_string();
                let (from_lsn, to_lsn) = (range.from_lsn.clone(), range.to_lsn.clone());
                table.row([page.when(range.from), page.when(range.to), timeline, from_lsn, to_lsn]);
            }
            page.table(table);
        }
        for gap in &self.gaps {
            let known = gap.acknowledgement.as_ref().map(|note| format!(" by {}: {}", note.by, note.reason));
            let known =
                if gap.acknowledged { format!(" (acknowledged{})", known.unwrap_or_default()) } else { String::new() };
            let text = format!("WAL missing on timeline {}: {} to {}{known}", gap.timeline, gap.from_lsn, gap.to_lsn);
            page.line(if gap.acknowledged { text } else { Ink::Warn.on(&text) });
        }
    }
}

fn draw_members(members: &[Member], page: &mut Page) {
    if members.is_empty() {
        page.line("No agent has an instance of this cluster.");
        return;
    }
    let mut table =
        Table::new(&["MEMBER", "ROLE", "AGENT", "LSN", ">SIZE", "+DATA DIRECTORY", "+>PORT", "FACTS", "PROBLEMS"]);
    for member in members {
        let connected = if member.connected { "connected".to_owned() } else { Ink::Warn.on("not connected") };
        let instance = member.instance.as_ref();
        let of = |text: fn(&Instance) -> String| instance.map(text).unwrap_or_default();
        table.row([
            member.agent.clone(),
            of(|instance| instance.role.word().to_owned()),
            connected,
            of(|instance| instance.current_lsn.clone().unwrap_or_default()),
            of(|instance| instance.cluster_bytes.map(size).unwrap_or_default()),
            of(|instance| instance.data_dir.clone()),
            of(|instance| instance.port.to_string()),
            page.short_when(member.facts_at),
            of(|instance| instance.problems.join("; ")),
        ]);
    }
    page.table(table);
}

#[derive(Debug, Serialize)]
pub struct Clusters {
    pub clusters: Vec<Cluster>,
}

impl View for Clusters {
    fn draw(&self, page: &mut Page) {
        if self.clusters.is_empty() {
            page.line("No clusters. Declare one: walfleet apply -f fleet.yaml");
            return;
        }
        let columns = [
            "NAME",
            "STATE",
            "VERSION",
            ">SIZE",
            "POLICY",
            "REPOSITORY",
            "MEMBERS",
            "+SYSTEM IDENTIFIER",
            "+LABELS",
            "REASON",
        ];
        let mut table = Table::new(&columns);
        for cluster in &self.clusters {
            table.row([
                cluster.name.clone(),
                cluster.state.shown(),
                cluster.server_version.clone().unwrap_or_default(),
                cluster.cluster_bytes.map(size).unwrap_or_default(),
                cluster.policy.clone().unwrap_or_default(),
                cluster.repository.clone().unwrap_or_default(),
                cluster.members.iter().map(|member| member.agent.clone()).collect::<Vec<_>>().join(","),
                cluster.system_identifier.clone().unwrap_or_default(),
                labels(&cluster.labels),
                cluster.shown_reason(),
            ]);
        }
        page.table(table);
    }
}
