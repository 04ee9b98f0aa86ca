//! `kind: Policy`: which clusters it binds, when they are backed up and how, what is promised, who may restore.

use serde::{Deserialize, Serialize};
use walfleet_repository::limits::LimitsSpec;
use walfleet_repository::shipping::ShippingSpec;

use super::document::{Spec, SpecFault};
use super::retention_spec::RetentionSpec;
use super::selector::Selector;
use super::span::Span;
use crate::schedule::Schedule;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicySpec {
    /// Of clusters' labels; the label `name` is every cluster's own name. The empty selector binds them all.
    pub selector: Selector,
    /// Name of a declared Repository.
    pub repository: String,
    #[serde(default)]
    pub backup: BackupSpec,
    /// On each member's host, for all that is done there together. The lowest holds where several policies meet on one.
    #[serde(default, skip_serializing_if = "is_none")]
    pub limits: LimitsSpec,
    /// How each member's WAL is shipped.
    #[serde(default, skip_serializing_if = "says_nothing")]
    pub wal: ShippingSpec,
    /// Absent: everything is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionSpec>,
    #[serde(default)]
    pub objectives: ObjectivesSpec,
    #[serde(default)]
    pub restore: RestoreSpec,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackupSpec {
    /// Cron, five fields. Absent: backups on demand only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// IANA name.
    pub time_zone: String,
    /// Each cluster's run is put off by its own share of this, always the same.
    pub jitter: Span,
    /// zstd. Absent: the agent's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression_level: Option<i32>,
    /// Threads that read, check, hash and compress. Absent: the agent's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
    pub prefer: Prefer,
    /// An immediate checkpoint: the backup starts sooner, at the price of a burst of writes.
    pub fast_checkpoint: bool,
    /// Further attempts after a failure that may pass.
    pub retries: u32,
}

impl Default for BackupSpec {
    fn default() -> BackupSpec {
        BackupSpec {
            schedule: None,
            time_zone: "UTC".to_owned(),
            jitter: Span::ZERO,
            compression_level: None,
            processes: None,
            prefer: Prefer::Standby,
            fast_checkpoint: false,
            // With pauses of one, two and four minutes this rides out a store's or a server's restart.
            retries: 3,
        }
    }
}

/// Which member a backup is read from, if both kinds are fit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefer {
    Standby,
    Primary,
}

#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectivesSpec {
    /// The repository may trail the server by this much. Absent: nothing is promised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rpo: Option<Span>,
    /// The newest backup may be this old.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup_age: Option<Span>,
}

#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RestoreSpec {
    /// Agents, beside the members, that may restore the clusters bound here, and get their keys. Of the labels they were
    /// enrolled with, not those a host claims later; `name` is every agent's own name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Selector>,
}

fn says_nothing(shipping: &ShippingSpec) -> bool {
    *shipping == ShippingSpec::NONE
}

fn is_none(limits: &LimitsSpec) -> bool {
    *limits == LimitsSpec::NONE
}

impl PolicySpec {
    /// The compiled schedule. `validate` has passed, so it is absent only if none is declared.
    pub fn schedule(&self) -> Option<Schedule> {
        let cron = self.backup.schedule.as_deref()?;
        Schedule::new(cron, &self.backup.time_zone, self.backup.jitter).ok()
    }
}

/// zstd's own range (zstd.h, `ZSTD_maxCLevel` is 22); 20 to 22 need far more memory and are refused here.
const COMPRESSION_LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

impl Spec for PolicySpec {
    fn validate(&self) -> Result<(), SpecFault> {
        if self.repository.is_empty() {
            return Err(SpecFault::new("repository", "it is empty", "name a declared Repository."));
        }
        let backup = &self.backup;
        if let Some(level) = backup.compression_level.filter(|level| !COMPRESSION_LEVELS.contains(level)) {
            return Err(SpecFault::new(
                "backup.compression_level",
                format!("{level} is out of range"),
                "zstd levels 1 to 19 are accepted.",
            ));
        }
        if let Some(processes) = backup.processes.filter(|processes| !(1..=256).contains(processes)) {
            return Err(SpecFault::new(
                "backup.processes",
                format!("{processes} is out of range"),
                "1 to 256 are accepted.",
            ));
        }
        if backup.retries > 10 {
            let problem = format!("{} is out of range", backup.retries);
            return Err(SpecFault::new("backup.retries", problem, "0 to 10 are accepted."));
        }
        if backup.jitter > Span::hours(24) {
            let problem = format!("{} is out of range", backup.jitter);
            return Err(SpecFault::new("backup.jitter", problem, "0s to 24h are accepted."));
        }
        // The time zone is checked even without a schedule: a typing error must not wait for the day one is added.
        Schedule::new(backup.schedule.as_deref().unwrap_or("0 0 * * *"), &backup.time_zone, backup.jitter)
            .map_err(|error| SpecFault::new(error.path(), &error, error.hint()))?;
        if let Some(retention) = &self.retention {
            retention.validate()?;
        }
        for (path, objective) in [("rpo", self.objectives.rpo), ("backup_age", self.objectives.backup_age)] {
            if objective == Some(Span::ZERO) {
                let hint = "at least 1s is accepted; leave it out if nothing is promised.";
                return Err(SpecFault::new(format!("objectives.{path}"), "0s is out of range", hint));
            }
        }
        Ok(())
    }
}
