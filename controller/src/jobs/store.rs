//! Jobs in the state. Every change is one transaction on the row as it was read, decided by `transition`.
//!
//! | key | what |
//! |---|---|
//! | `job/active/<id>` | a job that is not over |
//! | `job/done/<cluster>/<id>` | one that is; the newest few of each cluster are kept |
//! | `job/where/<id>` | the cluster of a job that is over |
//! | `job/request/<…>` | the job that a scheduled run, or a repeated request, made |
//! | `job/backup/<cluster>` | the newest backup that a job reported |
//! | `job/token` | the newest fencing token |

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use walfleet_repository::ids::{ClusterName, JobId};

use super::{Event, FencingToken, Job, JobState, Refusal, Report, Step, Work};
use crate::fleet::recovery::BackupSummary;
use crate::schedule::RunId;
use crate::state::rows::put_row;
use crate::state::{Compare, Op, Row, RowError, State, Txn};

const ACTIVE: &str = "job/active/";
const DONE: &str = "job/done/";
const WHERE: &str = "job/where/";
const REQUEST: &str = "job/request/";
const BACKUP: &str = "job/backup/";
const TOKEN: &str = "job/token";

#[derive(Debug, thiserror::Error)]
pub enum JobStoreError {
    #[error("there is no job {job}\nHINT: `walfleet job list` shows those that are kept.")]
    NotFound { job: JobId },
    #[error("job {job} is being changed by others without end")]
    Contended { job: JobId },
    #[error(transparent)]
    State(#[from] RowError),
}

impl From<crate::state::StateError> for JobStoreError {
    fn from(error: crate::state::StateError) -> JobStoreError {
        JobStoreError::State(error.into())
    }
}

/// What a new job is made of.
#[derive(Clone, Debug)]
pub struct NewJob {
    pub cluster: ClusterName,
    pub work: Work,
    pub on: Option<String>,
    pub requested_by: String,
    pub run: Option<RunId>,
    /// Whose repetition finds the same job, beside `run`: unique per caller.
    pub idempotency_key: Option<String>,
    pub traceparent: String,
    pub retries: u32,
}

/// The row that a request's key holds.
#[derive(Serialize, Deserialize)]
struct Requested {
    job: JobId,
}

/// The row that finds a job that is over.
#[derive(Serialize, Deserialize)]
struct Where {
    cluster: ClusterName,
}

/// A backup as a job reported it: known here before the agents' next look at the repository.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ReportedBackup {
    pub backup: BackupSummary,
    /// By the controller's clock.
    pub reported_at: Timestamp,
}

/// What became of an event.
#[derive(Clone, Debug)]
pub struct Applied {
    /// As it stands now.
    pub job: Job,
    /// Absent: it was carried out, or was so already.
    pub refused: Option<Refusal>,
    pub changed: bool,
}

/// The store of jobs. Cheap to clone.
#[derive(Clone)]
pub struct Jobs {
    state: State,
    /// Counts changes: whoever shows or plans jobs looks again when it moves.
    changes: watch::Sender<u64>,
    /// Copies of the rows under `job/backup/`.
    reported: Arc<Mutex<BTreeMap<ClusterName, ReportedBackup>>>,
}

/// Finished jobs kept of each cluster: a month of daily backups and then some, and few enough that ten thousand clusters
/// stay within a gigabyte.
pub const HISTORY: usize = 60;

/// Conflicts are rare and short: one controller writes, from few tasks.
const ATTEMPTS: usize = 32;

impl Jobs {
    pub async fn open(state: State) -> Result<Jobs, RowError> {
        let (rows, _) = state.rows::<ReportedBackup>(BACKUP).await?;
        let reported = rows.into_iter().map(|row| (row.value.backup.cluster.clone(), row.value)).collect();
        Ok(Jobs { state, changes: watch::Sender::new(0), reported: Arc::new(Mutex::new(reported)) })
    }

    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Creates the job, with `also` in the same transaction; if its run or request was made into a job before, answers
    /// that one and does nothing. `None`: `also`'s comparisons did not hold.
    pub async fn create(&self, new: NewJob, also: Txn, now: Timestamp) -> Result<Option<Job>, JobStoreError> {
        let request_key = match (&new.run, &new.idempotency_key) {
            (Some(run), _) => Some(format!("{REQUEST}run/{run}")),
            (None, Some(key)) => {
                Some(format!("{REQUEST}by/{}/{}", new.requested_by, blake3::hash(key.as_bytes()).to_hex()))
            }
            (None, None) => None,
        };
        for _ in 0..ATTEMPTS {
            if let Some(existing) = self.requested(request_key.as_deref()).await? {
                return Ok(Some(existing));
            }
            let job = new.clone().into_job(request_key.clone(), now);
            let key = format!("{ACTIVE}{}", job.id);
            let mut txn = also.clone().when(Compare::absent(key.clone())).then(put_row(key, &job)?);
            if let Some(request_key) = &request_key {
                let requested = Requested { job: job.id.clone() };
                txn = txn.when(Compare::absent(request_key.clone())).then(put_row(request_key.clone(), &requested)?);
            }
            if self.state.txn(txn).await?.succeeded {
                self.changed();
                return Ok(Some(job));
            }
            if request_key.is_none() || self.requested(request_key.as_deref()).await?.is_none() {
                return Ok(None);
            }
        }
        Ok(None)
    }

    async fn requested(&self, request_key: Option<&str>) -> Result<Option<Job>, JobStoreError> {
        let Some(key) = request_key else { return Ok(None) };
        match self.state.row::<Requested>(key).await? {
            Some(row) => Ok(Some(self.get(&row.value.job).await?)),
            None => Ok(None),
        }
    }

    pub async fn get(&self, id: &JobId) -> Result<Job, JobStoreError> {
        if let Some(row) = self.active_row(id).await? {
            return Ok(row.value);
        }
        // A job moves from active to done in one transaction and never back, so that it cannot be missed in between.
        if let Some(place) = self.state.row::<Where>(&format!("{WHERE}{id}")).await?
            && let Some(row) = self.state.row::<Job>(&format!("{DONE}{}/{id}", place.value.cluster)).await?
        {
            return Ok(row.value);
        }
        Err(JobStoreError::NotFound { job: id.clone() })
    }

    async fn active_row(&self, id: &JobId) -> Result<Option<Row<Job>>, RowError> {
        self.state.row(&format!("{ACTIVE}{id}")).await
    }

    /// All that are not over, oldest first.
    pub async fn active(&self) -> Result<Vec<Job>, JobStoreError> {
        let (rows, _) = self.state.rows::<Job>(ACTIVE).await?;
        Ok(rows.into_iter().map(|row| row.value).collect())
    }

    /// Of those that are over, the newest `limit`, newest first; of one cluster or of all.
    pub async fn done(&self, cluster: Option<&ClusterName>, limit: usize) -> Result<Vec<Job>, JobStoreError> {
        match cluster {
            Some(cluster) => {
                let (rows, _) = self.state.rows::<Job>(&format!("{DONE}{cluster}/")).await?;
                Ok(rows.into_iter().rev().take(limit).map(|row| row.value).collect())
            }
            None => {
                // Ids sort by time, so that this index does too.
                let (places, _) = self.state.rows::<Where>(WHERE).await?;
                let mut jobs = Vec::new();
                for place in places.iter().rev().take(limit) {
                    let id = place.key.trim_start_matches(WHERE);
                    jobs.extend(
                        self.state
                            .row::<Job>(&format!("{DONE}{}/{id}", place.value.cluster))
                            .await?
                            .map(|row| row.value),
                    );
                }
                Ok(jobs)
            }
        }
    }

    /// Carries an event out.
    pub async fn apply(&self, id: &JobId, event: Event, now: Timestamp) -> Result<Applied, JobStoreError> {
        for _ in 0..ATTEMPTS {
            let Some(row) = self.active_row(id).await? else {
                return self.apply_after_the_end(id, event, now).await;
            };
            let next = match row.value.on_event(event.clone(), now) {
                Step::To(next) => *next,
                Step::Unchanged => return Ok(Applied { job: row.value, refused: None, changed: false }),
                Step::Refused(refusal) => {
                    return Ok(Applied { job: row.value, refused: Some(refusal), changed: false });
                }
            };
            if self.replace(&row, &next, Txn::new()).await? {
                return Ok(Applied { job: next, refused: None, changed: true });
            }
        }
        Err(JobStoreError::Contended { job: id.clone() })
    }

    async fn apply_after_the_end(&self, id: &JobId, event: Event, now: Timestamp) -> Result<Applied, JobStoreError> {
        let job = self.get(id).await?;
        match job.on_event(event, now) {
            Step::Refused(refusal) => Ok(Applied { job, refused: Some(refusal), changed: false }),
            Step::Unchanged | Step::To(_) => Ok(Applied { job, refused: None, changed: false }),
        }
    }

    /// Offers the job under a fresh token. The row is durable before the order can be sent.
    pub async fn offer(&self, id: &JobId, agent: &str, now: Timestamp) -> Result<Applied, JobStoreError> {
        for _ in 0..ATTEMPTS {
            let Some(row) = self.active_row(id).await? else {
                return self.apply_after_the_end(id, Event::Wait { reason: String::new() }, now).await;
            };
            let newest: Option<Row<FencingToken>> = self.state.row(TOKEN).await?;
            let token = FencingToken(newest.as_ref().map_or(0, |row| row.value.0) + 1);
            let next = match row.value.on_event(Event::Offer { agent: agent.to_owned(), token }, now) {
                Step::To(next) => *next,
                Step::Unchanged => return Ok(Applied { job: row.value, refused: None, changed: false }),
                Step::Refused(refusal) => {
                    return Ok(Applied { job: row.value, refused: Some(refusal), changed: false });
                }
            };
            let revision = newest.map_or(0, |row| row.mod_revision);
            let also = Txn::new().when(Compare::unchanged(TOKEN, revision)).then(put_row(TOKEN, &token)?);
            if self.replace(&row, &next, also).await? {
                return Ok(Applied { job: next, refused: None, changed: true });
            }
        }
        Err(JobStoreError::Contended { job: id.clone() })
    }

    /// Whether nobody was first.
    async fn replace(&self, row: &Row<Job>, next: &Job, also: Txn) -> Result<bool, JobStoreError> {
        let txn = also.when(row.unchanged());
        let txn = if next.is_over() {
            let place = Where { cluster: next.cluster.clone() };
            txn.then(Op::delete(row.key.clone()))
                .then(put_row(format!("{DONE}{}/{}", next.cluster, next.id), next)?)
                .then(put_row(format!("{WHERE}{}", next.id), &place)?)
        } else {
            txn.then(put_row(row.key.clone(), next)?)
        };
        let reported = next.reported_backup();
        let txn = match &reported {
            Some(reported) => txn.then(put_row(format!("{BACKUP}{}", next.cluster), reported)?),
            None => txn,
        };
        let written = self.state.txn(txn).await?.succeeded;
        if written {
            if let Some(reported) = reported {
                self.reported().insert(next.cluster.clone(), reported);
            }
            self.changed();
        }
        Ok(written)
    }

    fn reported(&self) -> MutexGuard<'_, BTreeMap<ClusterName, ReportedBackup>> {
        self.reported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest of each cluster.
    pub fn reported_backups(&self) -> BTreeMap<ClusterName, ReportedBackup> {
        self.reported().clone()
    }

    /// Forgets finished jobs of a cluster: all that ended before `before`, and all but the newest [`HISTORY`]. Says how
    /// many went.
    pub async fn prune(&self, cluster: &ClusterName, before: Timestamp) -> Result<usize, JobStoreError> {
        let (rows, _) = self.state.rows::<Job>(&format!("{DONE}{cluster}/")).await?;
        let surplus = rows.len().saturating_sub(HISTORY);
        let old = |row: &Row<Job>| row.value.finished_at.is_some_and(|at| at < before);
        let mut pruned = 0;
        for (_, row) in rows.iter().enumerate().filter(|(i, row)| *i < surplus || old(row)) {
            let mut txn = Txn::new()
                .when(row.unchanged())
                .then(Op::delete(row.key.clone()))
                .then(Op::delete(format!("{WHERE}{}", row.value.id)));
            if let Some(key) = &row.value.request_key {
                txn = txn.then(Op::delete(key.clone()));
            }
            self.state.txn(txn).await?;
            pruned += 1;
        }
        Ok(pruned)
    }
}

impl Job {
    /// What it made, if it is over and that was a backup.
    pub fn reported_backup(&self) -> Option<ReportedBackup> {
        let reported_at = self.finished_at?;
        match &self.outcome.as_ref()?.report {
            Some(Report::Backup(backup)) if self.is_over() => {
                // Under the job's cluster, whatever the agent wrote into the summary.
                let backup = BackupSummary { cluster: self.cluster.clone(), ..(**backup).clone() };
                Some(ReportedBackup { backup, reported_at })
            }
            _ => None,
        }
    }
}

impl NewJob {
    fn into_job(self, request_key: Option<String>, now: Timestamp) -> Job {
        Job {
            id: JobId::generate(),
            cluster: self.cluster,
            work: self.work,
            on: self.on,
            requested_by: self.requested_by,
            run: self.run,
            request_key,
            traceparent: self.traceparent,
            created_at: now,
            started_at: None,
            finished_at: None,
            retries: self.retries,
            failures: 0,
            attempt: 0,
            token: FencingToken(0),
            agent: None,
            cancel: None,
            state: JobState::Queued { reason: "it was just made".to_owned(), not_before: now },
            outcome: None,
        }
    }
}

#[cfg(test)]
mod tests;
