//! Declared documents: policies, repositories, clusters as they were applied.

use jiff::Timestamp;
use serde::Serialize;

use crate::print::{Page, Table, View, faint};

#[derive(Clone, Debug, Serialize)]
pub struct Resource {
    pub kind: String,
    pub name: String,
    /// Counts its changes, from 1.
    pub generation: u64,
    pub applied_at: Option<Timestamp>,
    pub applied_by: String,
    pub bound_clusters: Vec<String>,
    /// The document, parsed; null if it does not parse.
    pub document: serde_json::Value,
    /// The document, as applied.
    #[serde(skip)]
    pub yaml: String,
}

impl View for Resource {
    fn draw(&self, page: &mut Page) {
        let at = page.when(self.applied_at);
        page.line(faint(format!("# generation {}, applied {at} by {}", self.generation, self.applied_by)));
        if !self.bound_clusters.is_empty() {
            page.line(faint(format!("# binds {}", self.bound_clusters.join(", "))));
        }
        for line in self.yaml.lines() {
            page.line(line);
        }
    }
}

/// All of one kind.
#[derive(Debug, Serialize)]
pub struct Policies {
    pub policies: Vec<Resource>,
}

#[derive(Debug, Serialize)]
pub struct Repositories {
    pub repositories: Vec<Resource>,
}

impl View for Policies {
    fn draw(&self, page: &mut Page) {
        if self.policies.is_empty() {
            page.line("No policies. Declare one: walfleet apply -f fleet.yaml");
            return;
        }
        let mut table = Table::new(&["NAME", "CLUSTERS", ">GENERATION", "APPLIED", "BY"]);
        for policy in &self.policies {
            table.row([
                policy.name.clone(),
                policy.bound_clusters.join(","),
                policy.generation.to_string(),
                page.when(policy.applied_at),
                policy.applied_by.clone(),
            ]);
        }
        page.table(table);
    }
}

impl View for Repositories {
    fn draw(&self, page: &mut Page) {
        if self.repositories.is_empty() {
            page.line("No repositories. Declare one: walfleet apply -f fleet.yaml");
            return;
        }
        let mut table = Table::new(&["NAME", "URL", ">GENERATION", "APPLIED", "BY"]);
        for repository in &self.repositories {
            table.row([
                repository.name.clone(),
                repository.url().unwrap_or_default(),
                repository.generation.to_string(),
                page.when(repository.applied_at),
                repository.applied_by.clone(),
            ]);
        }
        page.table(table);
    }
}

impl Resource {
    fn url(&self) -> Option<String> {
        let url = self.document.get("url").or_else(|| self.document.get("spec")?.get("url"))?;
        Some(url.as_str()?.to_owned())
    }
}
