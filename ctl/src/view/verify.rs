//! What a verification found.

use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, Table, count};
use crate::quantity::size;

#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    pub packs: u64,
    pub segments: u64,
    pub bytes: u64,
    pub findings: Vec<Finding>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The object's key in the repository.
    pub object: String,
    pub problem: String,
    /// Backups that cannot be restored whole because of it.
    pub backups: Vec<String>,
}

impl Verification {
    pub fn draw(&self, cluster: &str, page: &mut Page) {
        let read = format!("{} packs and {} WAL segments, {}", self.packs, self.segments, size(self.bytes));
        if self.findings.is_empty() {
            page.line(format!("verified {cluster}: {read}; everything is as it was written"));
            return;
        }
        page.line(format!("verified {cluster}: {read}; {}", Ink::Bad.on(&count(self.findings.len(), "finding"))));
        let mut table = Table::new(&["OBJECT", "PROBLEM", "BACKUPS NOT RESTORABLE"]);
        for finding in &self.findings {
            table.row([finding.object.clone(), finding.problem.clone(), finding.backups.join(",")]);
        }
        page.table(table);
    }
}
