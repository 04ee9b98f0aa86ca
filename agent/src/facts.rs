//! What this host's instances are and do, as last seen: told to the controller, and shown by metrics.

use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};
use serde::{Serialize, Serializer};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::{Branch, Lsn, Timeline};

use walfleet_repository::shipping::Synchronous;

use crate::jobs::report::BackupReport;
use crate::wal::receive::{SpoolStatus, StreamPhase};

pub mod collect;
mod gaps;
mod pace;
pub mod repository;
mod server;
mod trend;
mod unstreamed;

/// A stream is a second behind.
const TRAILING: SignedDuration = SignedDuration::from_secs(10);

#[derive(Clone, PartialEq, Debug)]
pub struct Facts {
    pub at: Timestamp,
    pub instances: Vec<InstanceFacts>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InstanceRole {
    Primary,
    Standby,
    /// Found, but it does not answer.
    Down,
}

#[derive(Clone, PartialEq, Debug)]
pub struct InstanceFacts {
    /// `None`: found but not enrolled.
    pub cluster: Option<ClusterName>,
    /// 0: not known.
    pub system_identifier: u64,
    pub server_version_num: u32,
    pub role: InstanceRole,
    pub data_dir: PathBuf,
    pub port: u16,
    /// 0: not known.
    pub timeline: u32,
    /// Where the server is, on a standby what it has replayed.
    pub current_lsn: Option<Lsn>,
    pub cluster_bytes: u64,
    pub data_checksums: bool,
    pub archive: ArchiveFacts,
    /// What the repository holds of this cluster, as this agent last computed it.
    pub windows: Vec<RecoveryWindow>,
    pub backups: Vec<BackupReport>,
    /// Why it does not answer, or what doctor would say.
    pub problems: Vec<String>,
    pub tablespaces: Vec<TablespaceFacts>,
}

#[derive(Clone, Default, PartialEq, Debug)]
pub struct ArchiveFacts {
    /// The newest segment the repository confirmed, its end, and when.
    pub last_segment: Option<String>,
    /// Of the server's present timeline, where that is known.
    pub durable_lsn: Option<Lsn>,
    pub durable_timeline: Option<Timeline>,
    pub durable_at: Option<Timestamp>,
    /// Behind it a primary has written nothing but what an idle one writes by itself. `None`: more, or it is not known.
    pub quiet_from: Option<Lsn>,
    /// Segments waiting in archive_status.
    pub ready_segments: u64,
    /// pg_stat_archiver.
    pub failed_count: u64,
    pub last_error: Option<String>,
    pub pg_wal_bytes: u64,
    pub pg_wal_free_bytes: u64,
    pub archive_command_set: bool,
    pub stream: StreamFacts,
    /// At the rate at which WAL accumulates that the repository lacks or PostgreSQL keeps.
    pub pg_wal_full_in_seconds: Option<u64>,
    pub last_hour: LastHour,
}

/// WAL by streaming.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct StreamFacts {
    pub phase: StreamPhase,
    /// What the store complains of.
    pub store_error: Option<String>,
    pub received_lsn: Option<Lsn>,
    /// By the server's clock: everything committed before is durable.
    pub complete_until: Option<Timestamp>,
    pub pieces: u64,
    pub segments: u64,
    /// Between two pieces.
    pub piece_interval_ms: u64,
    pub synchronous: Synchronous,
    /// While commits may wait for spools.
    pub spool: Option<SpoolStatus>,
}

/// Of WAL shipping, and of looks at what is there.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct LastHour {
    pub requests: u64,
    pub stored_bytes: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TablespaceFacts {
    pub oid: u32,
    pub name: String,
    pub location: PathBuf,
}

/// What one repository can give back of one cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RecoveryWindow {
    pub repository: String,
    pub as_of: Timestamp,
    pub ranges: Vec<RecoveryRange>,
    pub gaps: Vec<WalGap>,
    /// What was noted of WAL that is there by now.
    pub filled: Vec<WalGap>,
    pub newest_commit: Option<Timestamp>,
    pub newest_lsn: Option<Lsn>,
    pub newest_timeline: Option<Timeline>,
}

/// Any second (any LSN) between the two can be restored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RecoveryRange {
    pub from: Option<Timestamp>,
    pub to: Option<Timestamp>,
    pub from_lsn: Lsn,
    pub to_lsn: Lsn,
    pub timeline: Timeline,
    #[serde(serialize_with = "as_text")]
    pub branch: Branch,
}

/// WAL that should be there and is not: [from, to).
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct WalGap {
    pub timeline: Timeline,
    #[serde(serialize_with = "as_text")]
    pub branch: Branch,
    pub from_lsn: Lsn,
    pub to_lsn: Lsn,
    /// As `acknowledgement` is there.
    pub acknowledged: bool,
    /// The last commit before it, and the first behind it.
    pub from: Option<Timestamp>,
    pub to: Option<Timestamp>,
    /// Who had it last and no longer has it.
    pub recorded: Option<GapNote>,
    pub acknowledgement: Option<GapNote>,
    #[serde(skip)]
    pub system_identifier: u64,
}

/// What somebody said of a gap.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct GapNote {
    /// A member or an operator.
    pub by: String,
    pub at: Timestamp,
    pub reason: String,
}

impl RecoveryWindow {
    /// Where stretches begin and what is missing, without how far they reach by now.
    fn outline(&self) -> RecoveryWindow {
        let still = |range: &RecoveryRange| RecoveryRange { to: None, to_lsn: Lsn::INVALID, ..range.clone() };
        RecoveryWindow {
            repository: self.repository.clone(),
            as_of: Timestamp::UNIX_EPOCH,
            ranges: self.ranges.iter().map(still).collect(),
            gaps: self.gaps.clone(),
            filled: self.filled.clone(),
            newest_commit: None,
            newest_lsn: None,
            newest_timeline: self.newest_timeline,
        }
    }
}

fn as_text<S: Serializer>(branch: &Branch, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(branch)
}

impl Facts {
    pub fn none() -> Facts {
        Facts { at: Timestamp::UNIX_EPOCH, instances: Vec::new() }
    }

    /// Whether something changed that the controller should not wait for: positions, sizes and counts that move all
    /// the time do not count, unless the repository trails.
    pub fn differs_materially(&self, other: &Facts) -> bool {
        let steady = |facts: &Facts| -> Vec<(InstanceFacts, Option<Timestamp>)> {
            let trailing = |instance: &InstanceFacts| instance.archive.trails(facts.at).then_some(facts.at);
            facts.instances.iter().map(|instance| (instance.steady(), trailing(instance))).collect()
        };
        steady(self) != steady(other)
    }
}

impl InstanceFacts {
    /// Without what moves all the time.
    fn steady(&self) -> InstanceFacts {
        let stream = StreamFacts {
            phase: self.archive.stream.phase.clone(),
            spool: self.archive.stream.spool.as_ref().map(SpoolStatus::outline),
            ..StreamFacts::default()
        };
        let archive = ArchiveFacts {
            archive_command_set: self.archive.archive_command_set,
            failed_count: self.archive.failed_count,
            last_error: self.archive.last_error.clone(),
            stream,
            ..ArchiveFacts::default()
        };
        let windows = self.windows.iter().map(RecoveryWindow::outline).collect();
        InstanceFacts { current_lsn: None, cluster_bytes: 0, windows, archive, ..self.clone() }
    }
}

impl ArchiveFacts {
    /// Whether what the server has committed is not brought by its stream as it should be.
    fn trails(&self, at: Timestamp) -> bool {
        let is_all_there = self.quiet_from.is_some() && self.quiet_from <= self.durable_lsn;
        !is_all_there && self.stream.complete_until.is_some_and(|until| at.duration_since(until) > TRAILING)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn down(cluster: &str) -> InstanceFacts {
        InstanceFacts {
            cluster: Some(cluster.parse().unwrap()),
            system_identifier: 0,
            server_version_num: 0,
            role: InstanceRole::Down,
            data_dir: "/data".into(),
            port: 5432,
            timeline: 0,
            current_lsn: None,
            cluster_bytes: 0,
            data_checksums: false,
            archive: ArchiveFacts::default(),
            windows: Vec::new(),
            backups: Vec::new(),
            problems: vec!["it does not answer".into()],
            tablespaces: Vec::new(),
        }
    }

    #[test]
    fn moving_positions_are_not_news_but_roles_and_failures_are() {
        let facts = |change: &dyn Fn(&mut InstanceFacts)| {
            let mut instance = down("orders");
            change(&mut instance);
            Facts { at: Timestamp::UNIX_EPOCH, instances: vec![instance] }
        };
        let before = facts(&|_| {});
        assert!(!before.differs_materially(&facts(&|instance| instance.current_lsn = Some(Lsn(5)))));
        assert!(!before.differs_materially(&facts(&|instance| instance.archive.ready_segments = 5)));
        assert!(before.differs_materially(&facts(&|instance| instance.role = InstanceRole::Primary)));
        assert!(before.differs_materially(&facts(&|instance| instance.archive.failed_count = 1)));
        assert!(before.differs_materially(&Facts::none()));

        // A stream that stands still.
        let trailing = |seconds: i64, quiet_from: Option<Lsn>| {
            let mut trailing = facts(&|instance| {
                instance.archive.stream.complete_until = Some(Timestamp::UNIX_EPOCH);
                (instance.archive.quiet_from, instance.archive.durable_lsn) = (quiet_from, Some(Lsn(7)));
            });
            trailing.at = Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds);
            trailing
        };
        assert!(!trailing(1, None).differs_materially(&trailing(9, None)));
        assert!(trailing(9, None).differs_materially(&trailing(11, None)));
        assert!(trailing(11, None).differs_materially(&trailing(21, None)), "every look is told of");
        assert!(!trailing(11, Some(Lsn(7))).differs_materially(&trailing(21, Some(Lsn(7)))), "it only idles");

        let window = |reaches: u64, gaps: Vec<WalGap>| RecoveryWindow {
            repository: "main".into(),
            as_of: Timestamp::now(),
            ranges: vec![RecoveryRange {
                from: None,
                to: None,
                from_lsn: Lsn(1),
                to_lsn: Lsn(reaches),
                timeline: Timeline(1),
                branch: Branch::ROOT,
            }],
            gaps,
            filled: Vec::new(),
            newest_commit: None,
            newest_lsn: Some(Lsn(reaches)),
            newest_timeline: Some(Timeline(1)),
        };
        let gap = WalGap {
            timeline: Timeline(1),
            branch: Branch::ROOT,
            from_lsn: Lsn(1),
            to_lsn: Lsn(2),
            acknowledged: false,
            from: None,
            to: None,
            recorded: None,
            acknowledgement: None,
            system_identifier: 0,
        };
        let with = |window: RecoveryWindow| facts(&move |instance| instance.windows = vec![window.clone()]);
        let earlier = with(window(5, Vec::new()));
        assert!(!earlier.differs_materially(&with(window(9, Vec::new()))), "WAL came as it always does");
        assert!(earlier.differs_materially(&with(window(9, vec![gap]))));
        assert!(earlier.differs_materially(&before));
    }
}
