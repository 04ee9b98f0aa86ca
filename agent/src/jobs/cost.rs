//! What a job asked of the object store, and where its time went: counted for every job, whatever its end.

use serde::{Deserialize, Serialize};
use walfleet_repository::store::CountersSnapshot;

#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct JobCost {
    #[serde(flatten)]
    pub store: StoreCost,
    /// In the order they were entered.
    pub phases: Vec<PhaseCost>,
}

/// Requests by kind; repeated attempts count, and `retries` of them were not the first of their operation.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoreCost {
    pub gets: u64,
    pub heads: u64,
    pub puts: u64,
    pub lists: u64,
    pub retries: u64,
    pub received_bytes: u64,
    /// Whether they arrived or not.
    pub sent_bytes: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PhaseCost {
    pub phase: String,
    pub seconds: f64,
    /// Done in it, what was spared included; 0 for phases that do not count bytes.
    pub bytes: u64,
}

impl JobCost {
    pub fn seconds(&self) -> f64 {
        self.phases.iter().map(|phase| phase.seconds).sum()
    }

    /// All the time in a phase, and what was done in it.
    pub fn phase(&self, name: &str) -> Option<(f64, u64)> {
        let of = self.phases.iter().filter(|phase| phase.phase == name);
        of.map(|phase| (phase.seconds, phase.bytes)).reduce(|a, b| (a.0 + b.0, a.1 + b.1))
    }
}

impl StoreCost {
    pub fn requests(&self) -> u64 {
        self.gets + self.heads + self.puts + self.lists
    }
}

impl From<CountersSnapshot> for StoreCost {
    fn from(counted: CountersSnapshot) -> StoreCost {
        StoreCost {
            gets: counted.gets,
            heads: counted.heads,
            puts: counted.puts,
            lists: counted.lists,
            retries: counted.retries,
            received_bytes: counted.read_bytes,
            sent_bytes: counted.written_bytes,
        }
    }
}
