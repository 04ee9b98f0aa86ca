//! What the server says of its timelines.

use walfleet_repository::postgres::{Branch, Lsn, Timeline, TimelineHistory, WalBranch};

use super::{ReceiveError, Receiver};
use crate::postgres::replication::{Replication, SystemIdentity};

/// The timelines that lead to one, each with the position at which it was left; the oldest first.
pub async fn ancestors(connection: &mut Replication, timeline: Timeline) -> Result<Vec<(Timeline, Lsn)>, ReceiveError> {
    if timeline == Timeline::FIRST {
        return Ok(Vec::new());
    }
    let content = connection.timeline_history(timeline).await?;
    let history = TimelineHistory::parse(timeline, &content)
        .map_err(|error| ReceiveError::History { timeline, problem: error.to_string() })?;
    Ok(history.ancestors)
}

/// The timeline on which a position lies, on the server's way to its present one.
pub async fn timeline_of(
    connection: &mut Replication,
    identity: &SystemIdentity,
    at: Lsn,
) -> Result<Timeline, ReceiveError> {
    let ancestors = ancestors(connection, identity.timeline).await?;
    let before = ancestors.iter().find(|(_, end)| at < *end);
    Ok(before.map_or(identity.timeline, |(ancestor, _)| *ancestor))
}

/// A timeline's own branch. Its history is archived before any of its WAL.
pub async fn branch(
    connection: &mut Replication,
    receiver: &Receiver,
    timeline: Timeline,
) -> Result<WalBranch, ReceiveError> {
    let system_id = receiver.shipper.source().system_id;
    if timeline == Timeline::FIRST {
        return Ok(WalBranch { system_id, timeline, branch: Branch::ROOT });
    }
    let content = connection.timeline_history(timeline).await?;
    let (wal, _) = receiver.shipper.branches().store_history(timeline, &content).await?;
    Ok(wal)
}
