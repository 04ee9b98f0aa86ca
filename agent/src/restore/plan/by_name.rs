//! How a restore point is reached. PostgreSQL is told its name and stops at the first of that name it meets
//! (recoveryStopsAfter, src/backend/access/transam/xlogrecovery.c), so the backup must lie behind every older one of it.

use walfleet_repository::postgres::Lsn;
use walfleet_repository::recovery_window::lineage::Lineage;
use walfleet_repository::recovery_window::{
    BackupFacts, Choice, Pick, RecoveryPoint, TargetPoint as Point, TimelineChoice, WalCatalog, choose_backup, ways,
};
use walfleet_repository::wal_archive::WalArchive;
use walfleet_repository::wal_catalog::restore_points::Search;

use super::PlanError;

/// How many points of one name a message lists.
const LISTED: usize = 10;

/// What the repository holds.
pub(super) struct Held<'a> {
    pub backups: &'a [BackupFacts],
    pub archive: &'a WalArchive,
    pub catalog: &'a WalCatalog,
}

/// The newest restore point of a name on the chosen timeline, and the backup that reaches it; of a given backup the first
/// that its recovery meets. Also notes for people. `pick` says all but the target.
pub(super) async fn choose(name: &str, pick: &Pick, held: &Held<'_>) -> Result<(Choice, Vec<String>), PlanError> {
    // A timeline or a backup that does not exist is refused as for any other target.
    choose_backup(&Pick { target: Point::Latest, ..pick.clone() }, held.backups, held.catalog)?;
    for (way, backups) in served_ways(pick, held)? {
        let search = Search { archive: held.archive, catalog: held.catalog, way: &way, name };
        let from = backups.iter().map(|backup| backup.start_lsn).min().unwrap_or(Lsn::INVALID);
        let found = match pick.backup {
            None => search.newest(from).await?,
            Some(_) => search.first(from).await?,
        };
        if let Some(point) = found {
            return reach(&search, point, &backups, pick).await;
        }
    }
    Err(PlanError::NoRestorePoint { name: name.to_owned() })
}

/// The ways with the backups that may be taken on each; that with the newest backup first.
fn served_ways(pick: &Pick, held: &Held<'_>) -> Result<Vec<(Lineage, Vec<BackupFacts>)>, PlanError> {
    let may = |way: &Lineage, backup: &BackupFacts| {
        way.holds(backup)
            && (pick.timeline != TimelineChoice::Current || backup.wal == way.tip())
            && pick.backup.as_ref().is_none_or(|wanted| *wanted == backup.id)
    };
    let on = |way: Lineage| {
        let backups: Vec<_> = held.backups.iter().filter(|backup| may(&way, backup)).cloned().collect();
        (way, backups)
    };
    let mut served: Vec<_> = ways(pick.timeline, held.backups, held.catalog)?.into_iter().map(on).collect();
    served.retain(|(_, backups)| !backups.is_empty());
    served.sort_by_key(|(_, backups)| std::cmp::Reverse(backups.iter().map(|backup| backup.stopped_at_us).max()));
    Ok(served)
}

async fn reach(
    search: &Search<'_>,
    point: RecoveryPoint,
    backups: &[BackupFacts],
    pick: &Pick,
) -> Result<(Choice, Vec<String>), PlanError> {
    let name = search.name;
    let exact = Pick {
        target: Point::Lsn(point.lsn),
        timeline: TimelineChoice::Exactly(search.way.tip()),
        backup: pick.backup.clone(),
    };
    let choice = choose_backup(&exact, backups, search.catalog).map_err(|reason| {
        PlanError::RestorePointOutOfReach { name: name.to_owned(), point, reason: Box::new(reason) }
    })?;
    let mut notes = vec![format!("restore point \"{name}\" is at {point}")];
    if pick.backup.is_some() {
        if let Some(newest) = search.newest(point.lsn).await? {
            notes.push(format!("the newest of that name is at {newest}; recovery from this backup stops before it"));
        }
        return Ok((choice, notes));
    }
    let mut met = search.between(choice.from, point.lsn).await?;
    match met.first().copied() {
        None => Ok((choice, notes)),
        Some(first) => {
            met.push(point);
            Err(PlanError::RestorePointHidden { name: name.to_owned(), first, newest: point, all: listed(&met) })
        }
    }
}

fn listed(points: &[RecoveryPoint]) -> String {
    let skipped = points.len().saturating_sub(LISTED);
    let newest: Vec<String> = points.iter().skip(skipped).map(ToString::to_string).collect();
    if skipped == 0 { newest.join(", ") } else { format!("{skipped} older ones, {}", newest.join(", ")) }
}

#[cfg(test)]
mod tests;
