//! Attempts that nobody can tell of: what the cluster's log says of them, and the end of what they left open.

use jiff::{SignedDuration, Timestamp};
use walfleet_repository::cluster_log::Author;
use walfleet_repository::format::log_entry::Action;
use walfleet_repository::open::Repository;

use super::{DEADLINE, Keeper, KeeperError};
use crate::fleet::recovery::BackupSummary;
use crate::jobs::{Event, Job, JobState, Outcome, Report, Verdict, Work};
use crate::reconcile::in_full;
use crate::resources::stored::Catalog;

impl Keeper {
    /// Settles jobs that were unknown for longer than is patient, and ends the sessions of attempts that are over. What
    /// cannot be settled for one is tried again in the next round, and keeps no other waiting.
    pub(super) async fn settle_lost(&self, catalog: &Catalog, now: Timestamp) -> Result<(), KeeperError> {
        let patience = SignedDuration::try_from(self.reconciler.fleet.timing.patience).unwrap_or(SignedDuration::MAX);
        let jobs = self.reconciler.jobs.active().await?;
        for job in &jobs {
            let settled = match &job.state {
                JobState::Unknown { since, reason, .. } if now.duration_since(*since) > patience => {
                    self.give_up(job, reason, catalog, now).await
                }
                // The attempt is over, and the next one wants to serve the same run: a session that a crash left open
                // would stand in its way.
                JobState::Queued { .. } if job.attempt > 0 && self.is_untidied(job) => {
                    self.tidy(job, catalog, now).await
                }
                _ => Ok(()),
            };
            if let Err(error) = settled {
                tracing::warn!(job = %job.id, error = in_full(&error), "cannot settle a lost attempt yet");
            }
        }
        self.tidied().retain(|(id, _)| jobs.iter().any(|job| job.id == *id));
        Ok(())
    }

    async fn give_up(&self, job: &Job, why: &str, catalog: &Catalog, now: Timestamp) -> Result<(), KeeperError> {
        let outcome = self.ask_in_time(job, catalog, now).await?;
        let found = outcome.is_some();
        let reason = format!("{why}; it was waited for long enough");
        self.reconciler.jobs.apply(&job.id, Event::GivenUp { outcome, reason }, now).await?;
        tracing::warn!(job = %job.id, found, "gave up waiting for a job's agent");
        Ok(())
    }

    async fn tidy(&self, job: &Job, catalog: &Catalog, now: Timestamp) -> Result<(), KeeperError> {
        if let Some(outcome) = self.ask_in_time(job, catalog, now).await? {
            let event = Event::GivenUp { outcome: Some(outcome), reason: String::new() };
            self.reconciler.jobs.apply(&job.id, event, now).await?;
        }
        self.tidied().insert((job.id.clone(), job.attempt));
        Ok(())
    }

    async fn ask_in_time(&self, job: &Job, catalog: &Catalog, now: Timestamp) -> Result<Option<Outcome>, KeeperError> {
        match tokio::time::timeout(DEADLINE, self.ask_log(job, catalog, now)).await {
            Ok(answer) => answer,
            Err(_) => Err(KeeperError::Timeout { name: job.work.repository().to_owned() }),
        }
    }

    fn tidied(&self) -> std::sync::MutexGuard<'_, std::collections::BTreeSet<(walfleet_repository::ids::JobId, u32)>> {
        self.tidied.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn is_untidied(&self, job: &Job) -> bool {
        matches!(job.work, Work::Backup(_)) && !self.tidied().contains(&(job.id.clone(), job.attempt))
    }

    /// The outcome that a backup's log proves. Otherwise what the attempt left open is aborted, so that it can commit no
    /// more: if it still ran, that costs a retry and nothing else.
    async fn ask_log(&self, job: &Job, catalog: &Catalog, now: Timestamp) -> Result<Option<Outcome>, KeeperError> {
        let Work::Backup(work) = &job.work else { return Ok(None) };
        // A repository that is declared no more cannot be asked, and serves no run.
        let Some(spec) = catalog.repositories.get(&work.repository) else { return Ok(None) };
        let repository = self.open(&work.repository, spec, now).await?;
        let run = job.run_name();
        let author = Author::keeper(self.reconciler.keeper.signer(), self.reconciler.epoch);
        let mut log = repository.cluster_log(&job.cluster);
        let reason = format!("its agent is gone; ended by the controller for {}", job.id);
        log.append_unless_done(author, |state| {
            let session = state.serving(&run).filter(|session| session.is_open())?;
            Some(Action::Abort { session: session.id().clone(), reason: reason.clone() })
        })
        .await?;
        // Decided on the prefix that the append ended with: what is committed there stays committed.
        let Some(session) = log.state().serving(&run) else { return Ok(None) };
        let Some(committed) = session.committed() else { return Ok(None) };
        let backup = summary(&repository, job, session.id(), committed).await?;
        let (started_at, finished_at) = (backup.started_at, backup.finished_at);
        Ok(Some(Outcome {
            verdict: Verdict::Succeeded,
            started_at,
            finished_at,
            report: Some(Report::Backup(Box::new(backup))),
            cost: None,
        }))
    }
}

async fn summary(
    repository: &Repository,
    job: &Job,
    id: &walfleet_repository::ids::BackupId,
    committed: &walfleet_repository::cluster_log::Committed,
) -> Result<BackupSummary, KeeperError> {
    let (part, _) = repository.reference(&job.cluster, id, committed).await?;
    Ok(BackupSummary {
        id: part.backup,
        cluster: part.cluster,
        system_identifier: part.wal.system_id.0,
        server_version_num: part.server_version_num,
        timeline: part.wal.timeline.0,
        start_lsn: Some(part.start_lsn),
        stop_lsn: Some(part.stop_lsn),
        started_at: Timestamp::from_microsecond(part.started_at_us).ok(),
        finished_at: Timestamp::from_microsecond(part.stopped_at_us).ok(),
        member: part.member,
        parents: part.parents.iter().map(ToString::to_string).collect(),
        cluster_bytes: part.counters.cluster_bytes,
        read_bytes: part.counters.read_bytes,
        new_bytes: part.counters.new_bytes,
        stored_bytes: part.counters.stored_bytes,
        damaged_pages: part.damaged_page_count,
        state: "committed".to_owned(),
        store_requests: part.counters.store_requests,
        unexplained_slots: part.counters.unexplained_slots,
        read_all_because: part.counters.read_scope.read_all_because().unwrap_or_default().to_owned(),
    })
}
