//! The fleet at a glance: what is not recoverable comes first, and an empty fleet says what to type next.

use jiff::Timestamp;
use serde::Serialize;

use super::agent::Agent;
use super::cluster::{Cluster, Protection};
use crate::ink::Ink;
use crate::print::{Page, Table, View, count, faint};

#[derive(Debug, Serialize)]
pub struct Status {
    /// Whose view this is.
    pub controller: String,
    pub controller_version: String,
    pub as_of: Option<Timestamp>,
    pub clusters: Vec<Cluster>,
    pub agents: Vec<Agent>,
    pub notices: Vec<String>,
}

impl Status {
    /// Worst first; equals by name.
    pub fn sorted(mut self) -> Status {
        self.clusters.sort_by(|a, b| (a.state, &a.name).cmp(&(b.state, &b.name)));
        self
    }

    fn summary(&self) -> String {
        let states = [Protection::Unprotected, Protection::Unknown, Protection::AtRisk, Protection::Protected];
        let counted: Vec<String> = states
            .into_iter()
            .map(|state| (state, self.clusters.iter().filter(|cluster| cluster.state == state).count()))
            .filter(|(_, number)| *number > 0)
            .map(|(state, number)| format!("{number} {}", state.word()))
            .collect();
        let away = self.agents.iter().filter(|agent| !agent.connected).count();
        let away = if away == 0 { String::new() } else { format!(", {away} not connected") };
        let clusters = if counted.is_empty() { String::new() } else { format!(": {}", counted.join(", ")) };
        format!("{}{clusters} · {}{away}", count(self.clusters.len(), "cluster"), count(self.agents.len(), "agent"))
    }
}

impl View for Status {
    fn draw(&self, page: &mut Page) {
        let as_of = self.as_of.map(|_| format!(", as of {}", page.when(self.as_of))).unwrap_or_default();
        page.line(faint(format!("seen by controller {} {}{as_of}", self.controller, self.controller_version)));
        page.line(self.summary());
        page.gap();
        if self.clusters.is_empty() {
            draw_first_steps(self.agents.is_empty(), page);
        } else {
            draw_clusters(&self.clusters, page);
        }
        let away: Vec<&Agent> = self.agents.iter().filter(|agent| !agent.connected).collect();
        if !away.is_empty() || !self.notices.is_empty() {
            page.gap();
        }
        for agent in away {
            let seen = agent
                .last_seen_at
                .map_or("was never seen".to_owned(), |_| format!("was last seen {}", page.when(agent.last_seen_at)));
            page.line(Ink::Warn.on(&format!("agent {} {seen}", agent.name)));
        }
        for notice in &self.notices {
            page.line(Ink::Warn.on(&format!("notice: {notice}")));
        }
    }
}

fn draw_clusters(clusters: &[Cluster], page: &mut Page) {
    let columns = [
        "STATE",
        "CLUSTER",
        "+RECOVERABLE FROM",
        "RECOVERABLE UNTIL",
        ">LAG",
        "LAST BACKUP",
        "NEXT BACKUP",
        "+POLICY",
        "REASON",
    ];
    let mut table = Table::new(&columns);
    for cluster in clusters {
        let range = cluster.newest_range();
        let last =
            cluster.last_backup.as_ref().map_or("never".to_owned(), |backup| page.short_when(backup.finished_at));
        table.row([
            cluster.state.shown(),
            cluster.name.clone(),
            page.when(range.and_then(|range| range.from)),
            range.map_or("nothing".to_owned(), |range| page.when(range.to)),
            cluster.shown_lag(),
            last,
            page.short_when(cluster.next_backup_at),
            cluster.policy.clone().unwrap_or_default(),
            cluster.shown_reason(),
        ]);
    }
    page.table(table);
}

fn draw_first_steps(no_agents: bool, page: &mut Page) {
    let steps: &[&str] = if no_agents {
        &[
            "The fleet is empty. To protect a first server:",
            "  1. here:                  walfleet token create --role agent",
            "  2. on the Postgres host:  walfleet-agent join --controller URL --token TOKEN",
            "  3. here:                  walfleet apply -f fleet.yaml   (a repository, a policy, the cluster)",
        ]
    } else {
        &[
            "No cluster is declared yet. Next:",
            "  walfleet agent list            see what the agents found",
            "  walfleet apply -f fleet.yaml   declare a repository, a policy and the clusters",
        ]
    };
    for line in steps {
        page.line(line);
    }
}
