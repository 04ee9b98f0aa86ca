//! WAL of one cluster: how far it is stored, who ships it, and what is missing.

use jiff::Timestamp;
use serde::Serialize;

use super::agent::{Archive, Spool, Stream};
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
    pub acknowledged_gaps: usize,
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
                acknowledged_gaps: window.gaps.iter().filter(|gap| gap.acknowledged).count(),
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
                    match stored.acknowledged_gaps {
                        0 => stored.open_gaps.to_string(),
                        known => format!("{} (+{known} acknowledged)", stored.open_gaps),
                    },
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
        "STREAM",
        "SERVER AT",
        "CONFIRMED UP TO",
        "CONFIRMED",
        ">WAITING",
        ">FAILED",
        ">PG_WAL",
        "+>PG_WAL FREE",
        "AS OF",
        "+>REQUESTS/H",
        "+>STORED/H",
        "+LAST SEGMENT",
    ]);
    for member in members {
        let archive = member.archive.as_ref();
        let of = |text: fn(&Archive) -> String| archive.map(text).unwrap_or_default();
        table.row([
            if member.connected { member.agent.clone() } else { format!("{} (not connected)", member.agent) },
            member.role.map(|role| role.word().to_owned()).unwrap_or_default(),
            archive.and_then(|archive| archive.stream.as_ref()).map(Stream::in_words).unwrap_or_default(),
            member.current_lsn.clone().unwrap_or_default(),
            of(|archive| archive.durable_lsn.clone().unwrap_or_default()),
            page.short_when(archive.and_then(|archive| archive.durable_at)),
            of(|archive| archive.ready_segments.to_string()),
            of(|archive| archive.failed_count.to_string()),
            of(|archive| size(archive.pg_wal_bytes)),
            of(|archive| size(archive.pg_wal_free_bytes)),
            page.short_when(member.facts_at),
            of(|archive| archive.requests_last_hour.to_string()),
            of(|archive| size(archive.stored_bytes_last_hour)),
            of(|archive| archive.last_segment.clone().unwrap_or_default()),
        ]);
    }
    page.table(table);
    for member in members {
        let Some(archive) = &member.archive else { continue };
        if let Some(error) = &archive.last_error {
            page.line(Ink::Warn.on(&format!("{}: last archiving error: {error}", member.agent)));
        }
        if let Some(stream) = &archive.stream {
            for problem in [&stream.problem, &stream.store_error].into_iter().flatten() {
                page.line(Ink::Warn.on(&format!("{}: {problem}", member.agent)));
            }
            if let Some(spool) = &stream.spool {
                page.line(spool.in_words(&member.agent));
            }
        }
        if let Some(full_in) = archive.pg_wal_full_in_seconds {
            let full_in = seconds(full_in as f64);
            page.line(Ink::Warn.on(&format!(
                "{}: pg_wal will be full in {full_in}, at the rate at which WAL accumulates there",
                member.agent
            )));
        }
        let streams = archive.stream.as_ref().is_some_and(Stream::is_well);
        if !archive.archive_command_set && !streams && member.role == Some(super::agent::Role::Primary) {
            page.line(Ink::Warn.on(&format!(
                "{}: WAL is neither streamed nor archived; walfleet-agent doctor on that host says what to type",
                member.agent
            )));
        }
    }
}

impl Spool {
    fn in_words(&self, agent: &str) -> String {
        let peer = self.peer.as_deref().unwrap_or("nobody");
        let instead = match self.waits_for.as_str() {
            "spools" => return format!("{agent}: commits wait for its spool and {peer}'s"),
            "alone" => format!("{agent}: commits wait for its own spool alone, and are lost with it"),
            "peer" => format!("{agent}: commits wait until {peer}'s spool is back, or for the timer"),
            _ => format!("{agent}: commits wait for the repository instead of its spool and {peer}'s"),
        };
        Ink::Warn.on(&format!("{instead}: {}", self.problem.as_deref().unwrap_or_default()))
    }
}

impl Stream {
    fn is_well(&self) -> bool {
        matches!(self.phase.as_str(), "streaming" | "following")
    }

    fn in_words(&self) -> String {
        match (self.phase.as_str(), self.synchronous.as_str()) {
            ("streaming", "off" | "") => format!("every {}", seconds(self.piece_interval_seconds)),
            ("streaming", _) => "synchronous".to_owned(),
            (phase, _) => phase.to_owned(),
        }
    }
}

#[derive(Debug, Serialize)]
pub struct WalGaps {
    pub cluster: String,
    pub gaps: Vec<RepositoryGap>,
    /// What was noted of WAL that is there by now.
    pub filled: Vec<RepositoryGap>,
}

#[derive(Debug, Serialize)]
pub struct RepositoryGap {
    pub repository: String,
    #[serde(flatten)]
    pub gap: Gap,
}

impl WalGaps {
    pub fn of(cluster: Cluster) -> WalGaps {
        let (mut gaps, mut filled) = (Vec::new(), Vec::new());
        for window in cluster.recovery {
            let of = |gap| RepositoryGap { repository: window.repository.clone(), gap };
            gaps.extend(window.gaps.into_iter().map(of));
            filled.extend(window.filled.into_iter().map(of));
        }
        WalGaps { cluster: cluster.name, gaps, filled }
    }

    /// The one that was acknowledged just now.
    pub fn acknowledged(cluster: String, gap: RepositoryGap) -> WalGaps {
        WalGaps { cluster, gaps: vec![gap], filled: Vec::new() }
    }
}

impl View for WalGaps {
    fn draw(&self, page: &mut Page) {
        if self.gaps.is_empty() {
            page.line(format!("No WAL of {} is known to be missing.", self.cluster));
        } else {
            draw_gaps(&self.gaps, page);
            page.line("No moment inside a gap can be restored; a backup taken after it starts a new range.");
        }
        for RepositoryGap { repository, gap } in &self.filled {
            let said = gap.acknowledgement.as_ref().map(|note| (note, "acknowledged"));
            let Some((note, word)) = said.or(gap.recorded.as_ref().map(|note| (note, "let go of"))) else { continue };
            page.line(format!(
                "{} to {} on timeline {} in {repository} was {word} by {} and has been filled since.",
                gap.from_lsn, gap.to_lsn, gap.timeline, note.by
            ));
        }
    }
}

fn draw_gaps(gaps: &[RepositoryGap], page: &mut Page) {
    let mut table = Table::new(&[
        "REPOSITORY",
        ">TIMELINE",
        "FROM",
        "TO",
        ">MISSING",
        "AFTER",
        "BEFORE",
        "LOST BY",
        "ACKNOWLEDGED",
    ]);
    for RepositoryGap { repository, gap } in gaps {
        let acknowledged =
            gap.acknowledgement.as_ref().map(|note| format!("{}, {}", note.by, page.short_when(note.at)));
        table.row([
            repository.clone(),
            gap.timeline.to_string(),
            gap.from_lsn.clone(),
            gap.to_lsn.clone(),
            gap.bytes().map(size).unwrap_or_default(),
            page.when(gap.from),
            page.when(gap.to),
            gap.recorded.as_ref().map(|note| note.by.clone()).unwrap_or_default(),
            acknowledged.unwrap_or_else(|| if gap.acknowledged { "yes" } else { "no" }.to_owned()),
        ]);
    }
    page.table(table);
    for RepositoryGap { gap, .. } in gaps {
        if let Some(note) = &gap.recorded {
            page.line(format!("{}: {}: {}, {}", gap.from_lsn, note.by, note.reason, page.when(note.at)));
        }
        if let Some(note) = &gap.acknowledgement {
            page.line(format!("{}: acknowledged by {}: {}", gap.from_lsn, note.by, note.reason));
        }
    }
}

impl Gap {
    fn bytes(&self) -> Option<u64> {
        let from: crate::quantity::Lsn = self.from_lsn.parse().ok()?;
        let to: crate::quantity::Lsn = self.to_lsn.parse().ok()?;
        to.0.checked_sub(from.0)
    }
}
