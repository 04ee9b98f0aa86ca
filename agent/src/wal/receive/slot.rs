//! The replication slot that keeps WAL until the repository has it.

use walfleet_repository::postgres::Lsn;

use super::{ReceiveError, Receiver};
use crate::postgres::replication::{Replication, ReplicationError};
use crate::postgres::server::{Server, SlotState, WalStatus};

/// Finds or makes the slot; returns from where on it keeps WAL.
///
/// Before one is made, the break is noted: WAL before it may be missing in the archive ([`super::rescue`]). One that was let go
/// of is made anew only once the repository answers: until then, letting the server have its space was the choice.
pub async fn hold(receiver: &Receiver, server: &Server, connection: &mut Replication) -> Result<Lsn, ReceiveError> {
    let name = &receiver.options.slot;
    let found = server.slot(name).await?;
    let why = match &found {
        Some(SlotState { wal_status: WalStatus::Lost, lost_because, .. }) => {
            let because = lost_because.as_ref().map(|because| format!(" ({because})")).unwrap_or_default();
            format!("the server let go of the WAL that replication slot {name} kept{because}")
        }
        Some(SlotState { restart_lsn: Some(at), .. }) => return Ok(*at),
        // Made without reserving WAL, and never used.
        Some(SlotState { restart_lsn: None, .. }) => format!("replication slot {name} kept no WAL"),
        None => format!("there was no replication slot {name}"),
    };
    if receiver.breaks.current()?.is_some_and(|found| found.let_go_from.is_some()) {
        let source = receiver.shipper.source();
        source.archive.branches(source.system_id).await?;
    }
    if found.is_some() {
        tracing::warn!(slot = name, "{why}; it is made anew");
    }
    receiver.breaks.begin(why)?;
    if found.is_some() {
        connection.drop_slot(name).await?;
    }
    match connection.create_slot(name).await {
        Err(ReplicationError::SlotExists { .. }) if server.has_logical_slot(name).await? => {
            return Err(ReceiveError::LogicalSlot { slot: name.to_owned() });
        }
        // Another connection of ours was quicker.
        Ok(()) | Err(ReplicationError::SlotExists { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let made = server.slot(name).await?.and_then(|slot| slot.restart_lsn);
    let restart_lsn = made.ok_or_else(|| ReceiveError::NothingReserved { slot: name.to_owned() })?;
    tracing::info!(slot = name, %restart_lsn, "a replication slot keeps WAL until the repository has it");
    Ok(restart_lsn)
}
