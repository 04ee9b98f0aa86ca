//! WAL of one cluster: how far it is stored, who ships it, and what is missing.

use jiff::Timestamp;
use serde::Serialize;

use super::agent::Archive;
use super::cluster::{Cluster, Gap, Protection};
use crate::ink::Ink;
use crate::print::{Page, Table, View};
use crate::quantity::{seconds, size};

#[derive(Debug, Serialize)]
pub struct WalStatus {
    pub cluster: String,
    pub state: Protection,
    pub reason: Option<String>,
    pub repositories: Vec<StoredWal>,
    pub members: Vec<Shipper>,
}

/// WAL as one repository holds it.
#[derive(Debug, Serialize)]
pub struct StoredWal {
    pub repository: String,
    pub as_of: Option<Timestamp>,
    pub newest_lsn: Option<String>,
    pub newest_commit_at: Option<Timestamp>,
    pub timeline: Option<u32>,
    pub lag_seconds: Option<f64>,
    pub open_gaps: usize,
}

#[derive(Debug, Serialize)]
pub struct Shipper {
    pub agent: String,
    pub role: Option<super::agent::Role>,
    pub connected: bool,
    pub facts_at: Option<Timestamp>,
    pub current_lsn: Option<String>,
    pub archive: Option<Archive>,
}

impl WalStatus {
    pub fn of(cluster: Cluster) -> WalStatus {
        let repositories = cluster
            .recovery
            .into_iter()
            .map(|window| StoredWal {
                open_gaps: window.gaps.iter().filter(|gap| !gap.acknowledged).count(),
                repository: window.repository,
                as_of: window.as_of,
                newest_lsn: window.newest_lsn,
                newest_commit_at: window.newest_commit_at,
                timeline: window.newest_timeline,
                lag_seconds: window.lag_seconds,
            })
            .collect();
        let members = cluster
            .members
            .into_iter()
            .map(|member| Shipper {
                agent: member.agent,
                connected: member.connected,
                facts_at: member.facts_at,
                role: member.instance.as_ref().map(|instance| instance.role),
                current_lsn: member.instance.as_ref().and_then(|instance| instance.current_lsn.clone()),
                archive: member.instance.and_then(|instance| instance.archive),
            })
            .collect();
        WalStatus { cluster: cluster.name, state: cluster.state, reason: cluster.reason, repositories, members }
    }
}

impl View for WalStatus {
    fn draw(&self, page: &mut Page) {
        let reason = self.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        page.line(format!("{}  {}{reason}", self.cluster, self.state.shown()));
        page.gap();
        if self.repositories.is_empty() {
            page.line("No repository is known to hold WAL of this cluster.");
        } else {
            let mut table =
                Table::new(&["REPOSITORY", "STORED UP TO", ">TIMELINE", "NEWEST COMMIT", ">LAG", ">GAPS", "AS OF"]);
            for stored in &self.repositories {
                table.row([
                    stored.repository.clone(),
                    stored.newest_lsn.clone().unwrap_or_default(),
                    stored.timeline.map(|timeline| timeline.to_string()).unwrap_or_default(),
                    page.when(stored.newest_commit_at),
                    stored.lag_seconds.map(seconds).unwrap_or_default(),
                    stored.open_gaps.to_string(),
                    page.short_when(stored.as_of),
                ]);
            }
            page.table(table);
        }
        page.gap();
        draw_shippers(&self.members, page);
    }
}

fn draw_shippers(members: &[Shipper], page: &mut Page) {
    if members.is_empty() {
        page.line("No agent has an instance of this cluster.");
        return;
    }
    let mut table = Table::new(&[
        "MEMBER",
        "ROLE",
        "SERVER AT",
        "CONFIRMED UP TO",
        "CONFIRMED",
        ">WAITING",
        ">FAILED",
        ">PG_WAL",
        "+>PG_WAL FREE",
        "AS OF",
        "+LAST SEGMENT",
    ]);
    for member in members {
        let archive = member.archive.as_ref();
        let of = |text: fn(&Archive) -> String| archive.map(text).unwrap_or_default();
        table.row([
            if member.connected { member.agent.clone() } else { format!("{} (not connected)", member.agent) },
            member.role.map(|role| role.word().to_owned()).unwrap_or_default(),
            member.current_lsn.clone().unwrap_or_default(),
            of(|archive| archive.durable_lsn.clone().unwrap_or_default()),
            page.short_when(archive.and_then(|archive| archive.durable_at)),
            of(|archive| archive.ready_segments.to_string()),
            of(|archive| archive.failed_count.to_string()),
            of(|archive| size(archive.pg_wal_bytes)),
            of(|archive| size(archive.pg_wal_free_bytes)),
            page.short_when(member.facts_at),
            of(|archive| archive.last_segment.clone().unwrap_or_default()),
        ]);
    }
    page.table(table);
    for member in members {
        let Some(archive) = &member.archive else { continue };
        if let Some(error) = &archive.last_error {
            page.line(Ink::Warn.on(&format!("{}: last archiving error: {error}", member.agent)));
        }
        if !archive.archive_command_set && member.role == Some(super::agent::Role::Primary) {
            page.line(Ink::Warn.on(&format!(
                "{}: archive_command does not call walfleet-agent; walfleet-agent doctor on that host says what to type",
                member.agent
            )));
        }
    }
}

#[derive(Debug, Serialize)]
pub struct WalGaps {
    pub cluster: String,
    pub gaps: Vec<RepositoryGap>,
}

#[derive(Debug, Serialize)]
pub struct RepositoryGap {
    pub repository: String,
    #[serde(flatten)]
    pub gap: Gap,
}

impl WalGaps {
    pub fn of(cluster: Cluster) -> WalGaps {
        let gaps = cluster
            .recovery
            .into_iter()
            .flat_map(|window| {
                let repository = window.repository;
                window.gaps.into_iter().map(move |gap| RepositoryGap { repository: repository.clone(), gap })
            })
            .collect();
        WalGaps { cluster: cluster.name, gaps }
    }
}

impl View for WalGaps {
    fn draw(&self, page: &mut Page) {
        if self.gaps.is_empty() {
            page.line(format!("No WAL of {} is known to be missing.", self.cluster));
            return;
        }
        let mut table = Table::new(&["REPOSITORY", ">TIMELINE", "FROM", "TO", ">MISSING", "ACKNOWLEDGED"]);
        for RepositoryGap { repository, gap } in &self.gaps {
            table.row([
                repository.clone(),
                gap.timeline.to_string(),
                gap.from_lsn.clone(),
                gap.to_lsn.clone(),
                gap.bytes().map(size).unwrap_or_default(),
                if gap.acknowledged { "yes" } else { "no" }.to_owned(),
            ]);
        }
        page.table(table);
        page.line("No moment inside a gap can be restored; a backup taken after it starts a new range.");
    }
}

impl Gap {
    fn bytes(&self) -> Option<u64> {
        let from: crate::quantity::Lsn = self.from_lsn.parse().ok()?;
        let to: crate::quantity::Lsn = self.to_lsn.parse().ok()?;
        to.0.checked_sub(from.0)
    }
}
