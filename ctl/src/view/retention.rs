//! What is kept of a cluster, and why.

use jiff::Timestamp;
use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, Table, View, count};

#[derive(Debug, Serialize)]
pub struct RetentionPlan {
    pub cluster: String,
    pub repository: String,
    pub at: Option<Timestamp>,
    /// Any second since then is promised.
    pub window_from: Option<Timestamp>,
    pub backups: Vec<BackupRetention>,
    pub wal: Vec<WalRetention>,
    /// Why nothing of it is done; empty: it is.
    pub refused: Vec<String>,
    /// The policy keeps less than what is in force: it counts from then on, if it still says so.
    pub acts_from: Option<Timestamp>,
    /// Names what it removes.
    pub digest: String,
    /// Whether an operator's word is needed, or would make it act sooner.
    pub can_be_released: bool,
}

#[derive(Debug, Serialize)]
pub struct BackupRetention {
    pub backup: String,
    pub seen_at: Option<Timestamp>,
    pub restorable: bool,
    pub decision: Decision,
    pub reasons: Vec<String>,
    /// Of one that waits in the trash.
    pub until: Option<Timestamp>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    Keep,
    BringBack,
    Expire,
    Wait,
    Purge,
    Unknown,
}

/// WAL that the window no longer needs.
#[derive(Debug, Serialize)]
pub struct WalRetention {
    pub system_identifier: String,
    pub timeline: u32,
    pub branch: String,
    pub below_lsn: String,
    pub segments: u64,
}

impl Decision {
    fn shown(self) -> String {
        match self {
            Decision::Keep => Ink::Good.on("keep"),
            Decision::BringBack => Ink::Good.on("bring back"),
            Decision::Expire => Ink::Warn.on("expire"),
            Decision::Wait => "in the trash".to_owned(),
            Decision::Purge => Ink::Warn.on("remove"),
            Decision::Unknown => "unknown".to_owned(),
        }
    }
}

impl View for RetentionPlan {
    fn draw(&self, page: &mut Page) {
        let of = |wanted: &[Decision]| self.backups.iter().filter(|backup| wanted.contains(&backup.decision)).count();
        let (kept, goes) = (of(&[Decision::Keep, Decision::BringBack]), of(&[Decision::Expire]));
        page.line(format!(
            "{} in {}: any second from {} on is promised; {} kept, {goes} to the trash",
            self.cluster,
            self.repository,
            page.when(self.window_from),
            count(kept, "backup"),
        ));
        for refused in &self.refused {
            page.line(Ink::Warn.on(&format!("nothing is removed: {refused}")));
        }
        if let Some(at) = self.acts_from {
            page.line(Ink::Warn.on(&format!(
                "the policy keeps less than before: it acts from {} on, if it still says so then",
                page.when(Some(at))
            )));
        }
        page.gap();
        let mut table = Table::new(&["BACKUP", "TAKEN", "RESTORABLE", "", "WHY"]);
        for backup in &self.backups {
            let why = match (backup.decision, backup.until) {
                (Decision::Expire, _) => "outside the window, and no copy that is promised".to_owned(),
                (Decision::Wait, until) => format!("until {}", page.when(until)),
                (Decision::Purge, _) => "its days in the trash are over".to_owned(),
                _ => backup.reasons.join("; "),
            };
            let restorable = if backup.restorable { "yes".to_owned() } else { Ink::Warn.on("no") };
            table.row([backup.backup.clone(), page.when(backup.seen_at), restorable, backup.decision.shown(), why]);
        }
        page.table(table);
        for wal in &self.wal {
            page.line(format!(
                "WAL of timeline {} below {} is not needed for the window: {}, but for what makes kept backups consistent",
                wal.timeline,
                wal.below_lsn,
                count(usize::try_from(wal.segments).unwrap_or(usize::MAX), "segment"),
            ));
        }
    }
}
