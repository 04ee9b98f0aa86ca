//! What this host was asked to do and what came of it, kept across crashes: one durable file per job.
//!
//! A record is written before a job is answered and before it starts, and again when it ends, before the outcome is
//! sent. So whatever the moment of a crash, the agent knows at its next start what it had taken on, and says so. The
//! journal decides nothing about jobs; `jobs.rs` does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::{ClusterName, JobId};

use crate::durable::{self, DurableError, FileKind};
use crate::jobs::cost::JobCost;
use crate::jobs::order::{JobOrder, WorkKind};
use crate::jobs::report::Report;

const KIND: FileKind = FileKind { name: "job", version: 1 };

/// How long an acknowledged job is remembered, so that a late re-delivery gets its old answer. The controller's own
/// retries end within hours.
const REMEMBER: SignedDuration = SignedDuration::from_hours(7 * 24);

/// One job of this host: its latest attempt.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct JobRecord {
    pub job: JobId,
    pub attempt: u32,
    pub fencing_token: u64,
    pub cluster: ClusterName,
    pub work: WorkKind,
    /// What it occupies on this host: see `jobs::Claim`.
    pub subject: String,
    pub started_at: Timestamp,
    pub state: JobState,
    /// Once it is over; absent if the agent died with it.
    #[serde(default)]
    pub cost: Option<JobCost>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Set before the offer is answered; ended by the work, or by the next start of the agent.
    Running,
    /// Set when the work ended; sent to the controller until it acknowledges.
    Ended { ending: Ending, at: Timestamp },
    /// The controller has the outcome; kept for `REMEMBER` to answer re-deliveries.
    Acknowledged { ending: Ending, at: Timestamp },
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    Succeeded(Box<Report>),
    Failed { code: String, message: String, exit_code: i32, retryable: bool },
    Cancelled,
}

/// The end of one attempt, as the controller is told.
#[derive(Clone, PartialEq, Debug)]
pub struct JobOutcome {
    pub job: JobId,
    pub attempt: u32,
    pub fencing_token: u64,
    pub ending: Ending,
    pub cost: Option<JobCost>,
    pub started_at: Timestamp,
    pub finished_at: Timestamp,
}

impl JobRecord {
    pub fn begin(order: &JobOrder, subject: String, now: Timestamp) -> JobRecord {
        JobRecord {
            job: order.job.clone(),
            attempt: order.attempt,
            fencing_token: order.fencing_token,
            cluster: order.cluster.clone(),
            work: order.work.kind(),
            subject,
            started_at: now,
            state: JobState::Running,
            cost: None,
        }
    }

    /// `None` while it runs.
    pub fn outcome(&self) -> Option<JobOutcome> {
        let (JobState::Ended { ending, at } | JobState::Acknowledged { ending, at }) = &self.state else {
            return None;
        };
        Some(JobOutcome {
            job: self.job.clone(),
            attempt: self.attempt,
            fencing_token: self.fencing_token,
            ending: ending.clone(),
            cost: self.cost.clone(),
            started_at: self.started_at,
            finished_at: *at,
        })
    }
}

/// All records, in memory and on disk alike. Calls sync files: not for an async thread that others wait for.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    records: Mutex<BTreeMap<JobId, JobRecord>>,
}

impl Journal {
    /// Reads the folder. What was running when the agent last stopped is ended here as failed, to be tried again: a
    /// backup's session is aborted by the next attempt's log append, and a restore left its directory marked unfinished.
    pub fn open(folder: &Path, now: Timestamp) -> Result<Journal, DurableError> {
        durable::make_folder(folder)?;
        let mut records = BTreeMap::new();
        for path in job_files(folder)? {
            let record = match durable::read::<JobRecord>(&path, KIND) {
                Ok(Some(record)) => record,
                Ok(None) => continue,
                Err(error @ DurableError::Damaged { .. }) => {
                    // One bad file must not keep a host from being backed up. The controller learns from the missing
                    // entry in Hello that the job is lost.
                    set_aside(&path, &error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            records.insert(record.job.clone(), record);
        }
        let journal = Journal { folder: folder.to_owned(), records: Mutex::new(records) };
        journal.end_interrupted(now)?;
        journal.forget_old(now)?;
        Ok(journal)
    }

    pub fn get(&self, job: &JobId) -> Option<JobRecord> {
        self.lock().get(job).cloned()
    }

    /// Running, or ended and not yet acknowledged: what Hello tells.
    pub fn unsettled(&self) -> Vec<JobRecord> {
        self.lock().values().filter(|record| !matches!(record.state, JobState::Acknowledged { .. })).cloned().collect()
    }

    pub fn put(&self, record: JobRecord) -> Result<(), DurableError> {
        let mut records = self.lock();
        durable::write(&self.path(&record.job), KIND, &record)?;
        records.insert(record.job.clone(), record);
        Ok(())
    }

    /// Records how an attempt ended, and what it cost. Nothing changes if the record is of another attempt.
    pub fn end(
        &self,
        job: &JobId,
        fencing_token: u64,
        ending: Ending,
        cost: Option<JobCost>,
        now: Timestamp,
    ) -> Result<(), DurableError> {
        self.change(job, fencing_token, |record| match &record.state {
            JobState::Running => Some(JobRecord { state: JobState::Ended { ending, at: now }, cost, ..record.clone() }),
            JobState::Ended { .. } | JobState::Acknowledged { .. } => None,
        })
    }

    /// The controller has the outcome. Nothing changes if the record is of another attempt, or still running.
    pub fn acknowledge(&self, job: &JobId, fencing_token: u64, now: Timestamp) -> Result<(), DurableError> {
        self.change(job, fencing_token, |record| match &record.state {
            JobState::Ended { ending, at } => {
                let state = JobState::Acknowledged { ending: ending.clone(), at: *at };
                Some(JobRecord { state, ..record.clone() })
            }
            JobState::Running | JobState::Acknowledged { .. } => None,
        })?;
        self.forget_old(now)
    }

    fn change(
        &self,
        job: &JobId,
        fencing_token: u64,
        next: impl FnOnce(&JobRecord) -> Option<JobRecord>,
    ) -> Result<(), DurableError> {
        let mut records = self.lock();
        let Some(record) = records.get_mut(job).filter(|record| record.fencing_token == fencing_token) else {
            return Ok(());
        };
        if let Some(changed) = next(record) {
            let written = durable::write(&self.path(job), KIND, &changed);
            // Memory follows even if the disk is full: the outcome still reaches the controller. Should the agent then
            // die, it reports the job as interrupted, which a controller that has the outcome ignores.
            *record = changed;
            return written;
        }
        Ok(())
    }

    fn end_interrupted(&self, now: Timestamp) -> Result<(), DurableError> {
        let running: Vec<(JobId, u64)> = self
            .lock()
            .values()
            .filter(|record| record.state == JobState::Running)
            .map(|record| (record.job.clone(), record.fencing_token))
            .collect();
        for (job, token) in running {
            tracing::warn!(%job, "the agent stopped while this job ran; it is reported as failed");
            self.end(&job, token, Ending::restarted(), None, now)?;
        }
        Ok(())
    }

    fn forget_old(&self, now: Timestamp) -> Result<(), DurableError> {
        let mut records = self.lock();
        let old: Vec<JobId> = records
            .values()
            .filter(
                |record| matches!(record.state, JobState::Acknowledged { at, .. } if now.duration_since(at) > REMEMBER),
            )
            .map(|record| record.job.clone())
            .collect();
        for job in old {
            durable::remove(&self.path(&job))?;
            records.remove(&job);
        }
        Ok(())
    }

    fn path(&self, job: &JobId) -> PathBuf {
        // A JobId is a prefix, lower-case letters and digits: safe as a file name.
        self.folder.join(format!("{job}.json"))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<JobId, JobRecord>> {
        // Records are replaced whole, so a panic elsewhere leaves none half changed.
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ending {
    /// The agent was stopped under the job.
    pub fn restarted() -> Ending {
        Ending::Failed {
            code: "agent.restarted".into(),
            message: "the agent was restarted while the job ran".into(),
            exit_code: 1,
            retryable: true,
        }
    }
}

fn job_files(folder: &Path) -> Result<Vec<PathBuf>, DurableError> {
    let fail = |source| DurableError::Io { operation: "list", path: folder.to_owned(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("job_") && name.ends_with(".json") {
            paths.push(path);
        }
    }
    Ok(paths)
}

fn set_aside(path: &Path, error: &DurableError) {
    let aside = path.with_extension("damaged");
    let moved = std::fs::rename(path, &aside);
    tracing::error!(file = %path.display(), %error, moved = moved.is_ok(), "a journalled job cannot be read and is forgotten");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(job: &str) -> JobRecord {
        JobRecord {
            job: job.parse().unwrap(),
            attempt: 1,
            fencing_token: 7,
            cluster: "orders".parse().unwrap(),
            work: WorkKind::Backup,
            subject: "instance orders".into(),
            started_at: Timestamp::UNIX_EPOCH,
            state: JobState::Running,
            cost: None,
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn a_job_that_ran_when_the_agent_died_is_reported_as_failed_and_retryable() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path(), at(0)).unwrap();
        journal.put(record("job_a")).unwrap();
        drop(journal);

        let journal = Journal::open(folder.path(), at(9)).unwrap();
        let outcome = journal.unsettled()[0].outcome().unwrap();
        assert_eq!(outcome.finished_at, at(9));
        assert!(matches!(outcome.ending, Ending::Failed { code, retryable: true, .. } if code == "agent.restarted"));
    }

    #[test]
    fn an_outcome_is_kept_until_acknowledged_and_remembered_for_a_week() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path(), at(0)).unwrap();
        let job: JobId = "job_a".parse().unwrap();
        journal.put(record("job_a")).unwrap();
        journal.acknowledge(&job, 7, at(0)).unwrap();
        assert_eq!(journal.get(&job).unwrap().state, JobState::Running, "what runs cannot be acknowledged");
        journal.end(&job, 6, Ending::Cancelled, None, at(1)).unwrap();
        assert_eq!(journal.get(&job).unwrap().state, JobState::Running, "another attempt's end is not this one's");
        journal.end(&job, 7, Ending::Cancelled, Some(JobCost::default()), at(1)).unwrap();
        drop(journal);

        let journal = Journal::open(folder.path(), at(2)).unwrap();
        assert_eq!(journal.unsettled().len(), 1);
        journal.acknowledge(&job, 7, at(3)).unwrap();
        assert!(journal.unsettled().is_empty());
        assert!(journal.get(&job).unwrap().outcome().unwrap().cost.is_some());
        drop(journal);

        let week_later = at(2 + 8 * 24 * 3600);
        assert!(Journal::open(folder.path(), week_later).unwrap().get(&job).is_none());
    }

    #[test]
    fn a_damaged_record_is_set_aside_and_the_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path(), at(0)).unwrap();
        journal.put(record("job_a")).unwrap();
        journal.put(record("job_b")).unwrap();
        drop(journal);
        std::fs::write(folder.path().join("job_a.json"), "walfleet-agent job 1 0").unwrap();

        let journal = Journal::open(folder.path(), at(1)).unwrap();
        assert_eq!(journal.unsettled().len(), 1);
        assert!(folder.path().join("job_a.damaged").exists());
    }
}
