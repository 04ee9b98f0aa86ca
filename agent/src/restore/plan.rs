//! What a restore takes: which backup, which WAL, over which timelines; or why the target cannot be reached.
//!
//! The decision itself is pure ([`choose_backup`]); here the repository is read for it, no more than it needs.

mod by_name;

use jiff::Timestamp;
use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::ids::BackupId;
use walfleet_repository::open::CommittedBackup;
use walfleet_repository::postgres::{Lsn, Timeline, WalBranch};
use walfleet_repository::recovery_window::{
    BackupFacts, Choice, KnownComplete, NotRecoverable, Pick, RecoveryPoint, StopAt, TargetPoint as Point,
    TimelineChoice, WalCatalog, choose_backup, split_brains,
};
use walfleet_repository::wal_archive::ArchiveError;
use walfleet_repository::wal_catalog;

use crate::estimate::Past;
use crate::failure::{ExitCode, Remedy};
use crate::history;
use crate::jobs::order::{RecoveryTarget, TargetAction, TargetPoint, TargetTimeline};

#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    NotRecoverable(#[from] NotRecoverable),
    #[error(
        "no restore point \"{name}\" lies in the WAL that leads from the backups to the chosen timeline\nHINT: names are case-sensitive; pg_create_restore_point() made it, and its segment must have been archived. Points on an abandoned timeline are found with --timeline."
    )]
    NoRestorePoint { name: String },
    #[error("restore point \"{name}\" at {point}: {reason}")]
    RestorePointOutOfReach { name: String, point: RecoveryPoint, reason: Box<NotRecoverable> },
    #[error(
        "the newest restore point \"{name}\" is at {newest}, and recovery by name would stop at an older one, at {first}: no backup lies between\nHINT: say which one by its position: --to-lsn {at} --exclusive for the newest; there are {all}.", at = newest.lsn
    )]
    RestorePointHidden { name: String, first: RecoveryPoint, newest: RecoveryPoint, all: String },
    #[error("the target says \"exclusive\", and {0} has no before and after\nHINT: leave --exclusive out.")]
    Exclusive(&'static str),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("backup {0} was chosen and is not in the log any more\nHINT: try again.")]
    Vanished(BackupId),
}

impl PlanError {
    pub fn classify(&self) -> (&'static str, ExitCode, Remedy) {
        match self {
            PlanError::NotRecoverable(NotRecoverable::NoSuchBackup { .. } | NotRecoverable::NoneTaken) => {
                ("restore.no_backup", ExitCode::NotFound, Remedy::Operator)
            }
            PlanError::NotRecoverable(_)
            | PlanError::NoRestorePoint { .. }
            | PlanError::RestorePointOutOfReach { .. }
            | PlanError::RestorePointHidden { .. } => {
                ("restore.not_recoverable", ExitCode::NotRecoverable, Remedy::Operator)
            }
            PlanError::Exclusive(_) => ("restore.target", ExitCode::Usage, Remedy::Operator),
            PlanError::Cluster(ClusterError::Unknown(_)) => {
                ("restore.no_cluster", ExitCode::NotFound, Remedy::Operator)
            }
            PlanError::Cluster(error) if error.is_retryable() => {
                ("restore.repository", ExitCode::Failed, Remedy::Retry)
            }
            PlanError::Archive(error) if error.is_retryable() => {
                ("restore.repository", ExitCode::Failed, Remedy::Retry)
            }
            PlanError::Cluster(_) | PlanError::Archive(_) => ("restore.repository", ExitCode::Failed, Remedy::Operator),
            PlanError::Vanished(_) => ("restore.repository", ExitCode::Failed, Remedy::Retry),
        }
    }
}

/// One branch on the way, and which of its segments `[from, to)` recovery cannot do without.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leg {
    pub wal: WalBranch,
    /// Set if another branch of its timeline leads to it: it is read from the segment of this position on.
    pub begins: Option<Lsn>,
    pub from: Lsn,
    pub to: Lsn,
}

/// What is behind the WAL of the plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlanEnd {
    /// Recovery stops by itself, or takes what has come meanwhile.
    Open,
    /// The plan's end stands for a time: WAL that comes later must not be replayed.
    There,
}

/// How a target is reached.
#[derive(Clone, Debug)]
pub struct RestorePlan {
    pub backup: CommittedBackup,
    /// The branches that WAL is read from, oldest first; the last is the one recovered to.
    pub chain: Vec<Leg>,
    /// What recovery is told: as asked, or without a target where the end of the WAL is the target.
    pub target: RecoveryTarget,
    /// WAL that replay reads: `[from, to)`.
    pub wal_from: Lsn,
    pub wal_to: Lsn,
    pub ends: PlanEnd,
    pub notes: Vec<String>,
    /// What the cluster's backups took, as the repository tells.
    pub measured: Vec<Past>,
}

impl RestorePlan {
    pub fn timeline(&self) -> Timeline {
        self.chain.last().map_or(self.backup.reference.wal.timeline, |leg| leg.wal.timeline)
    }

    /// Bytes that a restore fetches at least.
    pub fn stored_bytes(&self) -> u64 {
        self.packs().map(|pack| pack.used_bytes).sum()
    }

    /// Requests that fetching takes, roughly: a pack is read in ranges of 8 MiB.
    pub fn fetch_requests(&self) -> u64 {
        self.packs().map(|pack| pack.used_bytes.div_ceil(8 << 20)).sum()
    }

    /// Bytes of WAL that replay reads, of records, before compression.
    pub fn wal_bytes(&self) -> u64 {
        self.wal_to.saturating_sub(self.wal_from)
    }

    /// And in how many segments they lie.
    pub fn wal_segments(&self) -> u64 {
        let size = u64::from(self.backup.reference.segment_size.bytes());
        match self.wal_bytes() {
            0 => 0,
            _ => (self.wal_to.0 - 1) / size - self.wal_from.0 / size + 1,
        }
    }

    fn packs(&self) -> impl Iterator<Item = &walfleet_repository::format::reference::PackUse> {
        self.backup.reference.sessions.iter().flat_map(|session| &session.packs)
    }
}

/// Reads the repository and decides. `complete`: what the cluster's servers were seen to have.
pub async fn plan(
    cluster: &OpenCluster,
    target: &RecoveryTarget,
    backup: Option<&BackupId>,
    complete: &[KnownComplete],
) -> Result<RestorePlan, PlanError> {
    if target.exclusive && !target.point.can_be_exclusive() {
        return Err(PlanError::Exclusive(match target.point {
            TargetPoint::Name(_) => "a restore point",
            TargetPoint::Immediate => "the end of the backup",
            _ => "the end of the WAL",
        }));
    }
    let log = cluster.log().await?;
    let backups = cluster.repository().backups(&log).await.readable;
    let facts: Vec<BackupFacts> = backups.iter().map(|backup| BackupFacts::from(&backup.reference)).collect();
    let sizes: Vec<_> = backups.iter().map(|backup| backup.reference.segment_size).collect();
    let archive = cluster.wal_archive(3);
    let mut catalog = wal_catalog::read(&archive, &wal_catalog::systems(&facts, &sizes)).await?;
    complete.iter().for_each(|known| catalog.note_complete(known));
    let point = point(target);
    let pick = Pick { target: point, timeline: timeline_choice(target.timeline), backup: backup.cloned() };
    let (choice, notes) = match &target.point {
        TargetPoint::Name(name) => {
            let held = by_name::Held { backups: &facts, archive: &archive, catalog: &catalog };
            by_name::choose(name, &pick, &held).await?
        }
        TargetPoint::Xid(xid) => (choose_backup(&pick, &facts, &catalog)?, note_of_xid(*xid, backup.is_some())),
        _ => (choose_backup(&pick, &facts, &catalog)?, Vec::new()),
    };
    let choice = match point {
        Point::Time { at_us, .. } => {
            // Now that the way is known, find where on it recovery ends.
            for read in &choice.reads {
                wal_catalog::read_around(&archive, &mut catalog, read.wal, read.from, at_us).await?;
            }
            choose_backup(&pick, &facts, &catalog)?
        }
        _ => choice,
    };
    let mut notes = notes;
    notes.extend(elsewhere(&catalog, &choice));
    let measured = backups.iter().filter_map(|backup| history::past_of_stored(&backup.reference)).collect();
    let chosen = backups.into_iter().find(|backup| backup.reference.backup == choice.backup);
    let chosen = chosen.ok_or_else(|| PlanError::Vanished(choice.backup.clone()))?;
    Ok(RestorePlan { measured, ..finish(target, choice, chosen, notes) })
}

/// A split brain of which this restore takes one side.
fn elsewhere(catalog: &WalCatalog, choice: &Choice) -> Vec<String> {
    let found = split_brains(catalog, Timestamp::now().as_microsecond());
    let not_taken = found.iter().filter(|split| split.wal != choice.wal && split.wal.system_id == choice.wal.system_id);
    not_taken.map(|split| format!("{split}, and is no part of this")).collect()
}

/// Transactions end in another order than that of their numbers, and the archive's index has no numbers.
fn note_of_xid(xid: u64, backup_given: bool) -> Vec<String> {
    if backup_given {
        return vec![format!(
            "where transaction {xid} ended is not known: if before this backup, recovery fails at the end"
        )];
    }
    vec![format!(
        "where transaction {xid} ended is not known beforehand, so the oldest backup of the newest unbroken stretch of WAL is \
         taken and replay may be long; --backup ID takes a newer one from before it"
    )]
}

fn finish(target: &RecoveryTarget, choice: Choice, backup: CommittedBackup, mut notes: Vec<String>) -> RestorePlan {
    let mut chain: Vec<Leg> = Vec::new();
    let behind = |chain: &[Leg], wal: WalBranch| chain.last().is_some_and(|leg| leg.wal.timeline == wal.timeline);
    for read in &choice.reads {
        let begins = behind(&chain, read.wal).then_some(read.from);
        chain.push(Leg { wal: read.wal, begins, from: read.from, to: read.to });
    }
    if chain.last().is_none_or(|leg| leg.wal != choice.wal) {
        let begins = behind(&chain, choice.wal).then_some(choice.tip_begins);
        chain.push(Leg { wal: choice.wal, begins, from: Lsn::INVALID, to: Lsn::INVALID });
    }
    let mut ends = if choice.ends_there { PlanEnd::There } else { PlanEnd::Open };
    let mut target = target.clone();
    if choice.stop == StopAt::EndOfWal {
        if target.point != TargetPoint::Latest {
            ends = PlanEnd::There;
            notes.push(
                "the target is the newest commit there is: recovery goes to the end of the WAL there was".to_owned(),
            );
        }
        if target.action != TargetAction::Promote {
            notes.push("recovery to the end of the WAL always ends in a promotion".to_owned());
        }
        target.point = TargetPoint::Latest;
        target.exclusive = false;
        target.action = TargetAction::Promote;
    }
    if let Some(gap) = choice.ends_at_gap {
        notes.push(format!("WAL is missing from {} to {}: what comes behind is not reached", gap.from, gap.to));
    }
    if backup.reference.damaged_page_count > 0 {
        notes.push(format!(
            "the source had {} damaged pages when it was backed up",
            backup.reference.damaged_page_count
        ));
    }
    let measured = Vec::new();
    RestorePlan { wal_from: choice.from, wal_to: choice.to, backup, chain, target, ends, notes, measured }
}

pub(crate) fn timeline_choice(timeline: TargetTimeline) -> TimelineChoice {
    match timeline {
        TargetTimeline::Latest => TimelineChoice::Latest,
        TargetTimeline::Current => TimelineChoice::Current,
        TargetTimeline::Number(number) => TimelineChoice::Number(number),
        TargetTimeline::Branch(name) => TimelineChoice::Named(name),
    }
}

/// The target as the planner takes it. Where a restore point lies is found [`by_name`].
fn point(target: &RecoveryTarget) -> Point {
    match &target.point {
        TargetPoint::Time(at) => Point::Time { at_us: Timestamp::as_microsecond(*at), inclusive: !target.exclusive },
        TargetPoint::Lsn(lsn) => Point::Lsn(*lsn),
        TargetPoint::Xid(_) | TargetPoint::Name(_) => Point::Somewhere,
        TargetPoint::Immediate => Point::Immediate,
        TargetPoint::Latest => Point::Latest,
    }
}
