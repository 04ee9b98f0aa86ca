//! What nothing in a repository needs any more.

use jiff::Timestamp;
use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, Table, View, count};
use crate::quantity::size;

#[derive(Debug, Serialize)]
pub struct Garbage {
    pub repository: String,
    pub clusters: Vec<ClusterGarbage>,
}

#[derive(Debug, Serialize)]
pub struct ClusterGarbage {
    pub cluster: String,
    pub objects: u64,
    /// Of packs and WAL.
    pub bytes: u64,
    /// When it may be removed; absent: there is none.
    pub removable_at: Option<Timestamp>,
    /// Why it is not known.
    pub problem: Option<String>,
}

impl View for Garbage {
    fn draw(&self, page: &mut Page) {
        if self.clusters.is_empty() {
            page.line(format!("No cluster lies in {}.", self.repository));
            return;
        }
        let mut table = Table::new(&["CLUSTER", "GARBAGE", "OBJECTS", "REMOVABLE FROM"]);
        for cluster in &self.clusters {
            let row = match (&cluster.problem, cluster.removable_at) {
                (Some(problem), _) => [Ink::Warn.on("unknown"), String::new(), problem.clone()],
                (None, None) => ["none".to_owned(), String::new(), String::new()],
                (None, at) => [size(cluster.bytes), cluster.objects.to_string(), page.when(at)],
            };
            let [garbage, objects, when] = row;
            table.row([cluster.cluster.clone(), garbage, objects, when]);
        }
        page.table(table);
        let (all, objects) = self
            .clusters
            .iter()
            .fold((0, 0), |(all, objects), cluster| (all + cluster.bytes, objects + cluster.objects));
        if self.clusters.len() > 1 && objects > 0 {
            let objects = count(usize::try_from(objects).unwrap_or(usize::MAX), "object");
            page.line(format!("{} in {objects}", size(all)));
        }
    }
}
