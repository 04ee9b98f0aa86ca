//! Last-known facts and pins in the state: `agent/<name>` and `cluster/<name>`.

use std::collections::BTreeMap;

use walfleet_repository::ids::ClusterName;

use super::clusters::Pin;
use super::observed::AgentObserved;
use crate::state::rows::put_row;
use crate::state::{RowError, State, Txn};

const AGENTS: &str = "agent/";
const PINS: &str = "cluster/";

pub async fn load_agents(state: &State) -> Result<BTreeMap<String, AgentObserved>, RowError> {
    let (rows, _) = state.rows::<AgentObserved>(AGENTS).await?;
    Ok(rows.into_iter().map(|row| (row.key.trim_start_matches(AGENTS).to_owned(), row.value)).collect())
}

/// Backups stored of each instance. The rest comes again with the agent's next facts; until then the newest are enough
/// to judge by, and a fleet of ten thousand fits into the state.
const STORED_BACKUPS: usize = 10;

pub async fn store_agent(state: &State, agent: &str, observed: &AgentObserved) -> Result<(), RowError> {
    let mut stored = observed.clone();
    for instance in stored.facts.iter_mut().flat_map(|facts| &mut facts.instances) {
        let surplus = instance.backups.len().saturating_sub(STORED_BACKUPS);
        instance.backups.drain(..surplus);
    }
    state.txn(Txn::new().then(put_row(format!("{AGENTS}{agent}"), &stored)?)).await?;
    Ok(())
}

pub async fn load_pins(state: &State) -> Result<BTreeMap<ClusterName, Pin>, RowError> {
    let (rows, _) = state.rows::<Pin>(PINS).await?;
    Ok(rows.into_iter().filter_map(|row| Some((row.key.strip_prefix(PINS)?.parse().ok()?, row.value))).collect())
}

/// Pins a cluster that was seen for the first time, or notes what its documents or a new member changed.
pub async fn store_pin(state: &State, cluster: &ClusterName, pin: &Pin) -> Result<(), RowError> {
    let key = format!("{PINS}{cluster}");
    let row = state.row::<Pin>(&key).await?;
    let mut stored = pin.clone();
    stored.members.extend(row.iter().flat_map(|row| row.value.members.iter().cloned()));
    match state.update_row(&key, row.map_or(0, |row| row.mod_revision), &stored).await {
        // The next pass sees what the other one wrote.
        Ok(_) | Err(RowError::Conflict { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
