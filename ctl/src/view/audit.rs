//! The audit log: who changed what.

use jiff::Timestamp;
use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, Table, View, faint};

#[derive(Debug, Serialize)]
pub struct AuditEntry {
    pub sequence: u64,
    pub at: Option<Timestamp>,
    pub actor: String,
    pub role: String,
    pub call: String,
    pub object: String,
    /// "done", or why not.
    pub outcome: String,
    pub previous: String,
    pub hash: String,
}

#[derive(Debug, Serialize)]
pub struct AuditLog {
    /// The newest last.
    pub entries: Vec<AuditEntry>,
    /// The oldest entry that is kept, and the newest; null: the log is empty.
    pub first: Option<u64>,
    pub last: Option<u64>,
}

impl View for AuditLog {
    fn draw(&self, page: &mut Page) {
        if self.entries.is_empty() {
            page.line("No entries.");
        } else {
            let mut table = Table::new(&["+>ENTRY", "AT", "WHO", "ROLE", "CALL", "OBJECT", "OUTCOME", "+HASH"]);
            for entry in &self.entries {
                let outcome = &entry.outcome;
                table.row([
                    entry.sequence.to_string(),
                    page.when(entry.at),
                    entry.actor.clone(),
                    entry.role.clone(),
                    entry.call.clone(),
                    entry.object.clone(),
                    if outcome == "done" { outcome.clone() } else { Ink::Warn.on(outcome) },
                    entry.hash.clone(),
                ]);
            }
            page.table(table);
        }
        if let (Some(first), Some(last)) = (self.first, self.last) {
            let kept = usize::try_from((last + 1).saturating_sub(first)).unwrap_or(usize::MAX);
            if kept > self.entries.len() {
                let shown = self.entries.len();
                page.line(faint(format!("{shown} of {kept} entries; --since and --limit choose others")));
            }
        }
    }
}

#[derive(Debug, Serialize)]
pub struct VerifiedLog {
    pub first: Option<u64>,
    pub last: Option<u64>,
    pub entries: u64,
    pub head_hash: String,
}

impl View for VerifiedLog {
    fn draw(&self, page: &mut Page) {
        let (Some(first), Some(last)) = (self.first, self.last) else {
            page.line("The audit log is empty.");
            return;
        };
        page.line(format!("The audit log is whole, from entry {first} to entry {last}."));
        page.line(format!("Hash of entry {last}: {}", self.head_hash));
        page.line(faint("Note it elsewhere: a log that was rewritten as a whole has another."));
    }
}
