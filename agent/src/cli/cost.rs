//! What a command's work cost, beside its report.

use serde::Serialize;

use super::print;
use crate::jobs::cost::{JobCost, PhaseCost};

/// A report with what it cost, in one JSON object.
#[derive(Serialize)]
pub struct Costed<'a, T> {
    #[serde(flatten)]
    pub report: &'a T,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spared_bytes: Option<u64>,
    pub cost: &'a JobCost,
}

/// Lines for people, as [`print::fields`] takes them.
pub fn fields(cost: &JobCost) -> Vec<(&'static str, String)> {
    let store = &cost.store;
    let mut kinds = Vec::new();
    for (count, kind) in [(store.gets, "get"), (store.puts, "put"), (store.heads, "head"), (store.lists, "list")] {
        if count > 0 {
            kinds.push(format!("{count} {kind}"));
        }
    }
    if store.retries > 0 {
        kinds.push(format!("{} of them again", store.retries));
    }
    let mut requests = format!("{} requests", store.requests());
    if !kinds.is_empty() {
        requests += &format!(" ({})", kinds.join(", "));
    }
    let (down, up) = (print::bytes(store.received_bytes), print::bytes(store.sent_bytes));
    let phase = |phase: &PhaseCost| format!("{} {}", phase.phase, print::seconds(phase.seconds));
    let phases: Vec<String> = cost.phases.iter().map(phase).collect();
    vec![("store", format!("{requests}, {down} down, {up} up")), ("time", phases.join(", "))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::cost::StoreCost;

    #[test]
    fn only_kinds_that_were_asked_for_are_named() {
        let store = StoreCost { gets: 3, puts: 2, retries: 1, received_bytes: 2048, ..StoreCost::default() };
        let phases = vec![PhaseCost { phase: "copy".into(), seconds: 12.0, bytes: 7 }];
        let cost = JobCost { store, phases };
        let lines = fields(&cost);
        assert_eq!(lines[0].1, "5 requests (3 get, 2 put, 1 of them again), 2.0 KiB down, 0 B up");
        assert_eq!(lines[1].1, "copy 12s");
    }
}
