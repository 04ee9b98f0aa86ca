//! `walfleet.job.v1`: orders outward, outcomes and restore requests inward.

mod found;
mod past;

use std::fmt::Write;

use prost::Message;
use walfleet_proto::job::v1 as pb;

use super::{WireError, bounded, recovery, time_in, time_out};
use crate::fleet::Progress;
use crate::jobs::work::{BackupWork, CompleteWork, RestoreWork, StandbyWork, VerifyWork, Work};
use crate::jobs::{Job, JobError, Outcome, Phase, Report, Verdict};
pub use found::wal_find_in;

pub fn phase_out(phase: Phase) -> pb::JobState {
    match phase {
        Phase::Queued => pb::JobState::Queued,
        Phase::Offered => pb::JobState::Offered,
        Phase::Running => pb::JobState::Running,
        Phase::Unknown => pb::JobState::Unknown,
        Phase::Succeeded => pb::JobState::Succeeded,
        Phase::Failed => pb::JobState::Failed,
        Phase::Cancelled => pb::JobState::Cancelled,
    }
}

/// An order on its way to the agent, with what finished jobs of the cluster took. `past`: newest first.
pub fn offer_out(job: &Job, past: &[Job]) -> pb::JobOrder {
    let past = past.iter().filter_map(past::past_out).take(past::MOST).collect();
    pb::JobOrder { past, ..order_out(job) }
}

pub fn order_out(job: &Job) -> pb::JobOrder {
    use pb::job_order::Work as Order;
    let work = match &job.work {
        Work::Backup(work) => Order::Backup(backup_out(job, work)),
        Work::Restore(work) => Order::Restore(restore_out(work)),
        Work::Verify(work) => Order::Verify(verify_out(work)),
        Work::BackupPlan(work) => {
            Order::BackupPlan(pb::BackupPlanOrder { repository: work.repository.clone(), read_all: work.read_all })
        }
        Work::WalFind(work) => Order::WalFind(found::order_out(work)),
    };
    pb::JobOrder {
        job: job.id.to_string(),
        attempt: job.attempt,
        fencing_token: job.token.0,
        cluster: job.cluster.to_string(),
        traceparent: job.traceparent.clone(),
        past: Vec::new(),
        work: Some(work),
    }
}

fn backup_out(job: &Job, work: &BackupWork) -> pb::BackupOrder {
    pb::BackupOrder {
        repository: work.repository.clone(),
        run: job.run_name(),
        fast_checkpoint: work.fast_checkpoint,
        read_all: work.read_all,
        compression_level: work.compression_level.unwrap_or_default(),
        processes: work.processes.unwrap_or_default(),
    }
}

fn restore_out(work: &RestoreWork) -> pb::RestoreOrder {
    pb::RestoreOrder {
        repository: work.repository.clone(),
        target: Some(recovery::target_out(&work.target)),
        data_dir: work.data_dir.clone(),
        tablespaces: work.tablespaces.clone().into_iter().collect(),
        backup: work.backup.as_ref().map(ToString::to_string).unwrap_or_default(),
        start: work.start,
        keep_archiving: work.keep_archiving,
        port: work.port.map(u32::from).unwrap_or_default(),
        delta: work.delta,
        standby: work.standby.is_some(),
        apply_delay_seconds: work.standby.as_ref().map_or(0, |standby| standby.apply_delay_seconds),
        plan_only: work.plan_only,
        complete: work.complete.iter().map(complete_out).collect(),
    }
}

fn complete_out(known: &CompleteWork) -> pb::KnownComplete {
    pb::KnownComplete {
        system_identifier: known.system_identifier,
        timeline: known.timeline,
        lsn: known.lsn.to_string(),
        at_us: known.at.as_microsecond(),
    }
}

fn verify_out(work: &VerifyWork) -> pb::VerifyOrder {
    pb::VerifyOrder {
        repository: work.repository.clone(),
        backup: work.backup.as_ref().map(ToString::to_string).unwrap_or_default(),
        deep: work.deep,
    }
}

/// An operator's order. An empty repository: `repository`, the cluster's own.
pub fn restore_in(order: pb::RestoreOrder, repository: &str) -> Result<RestoreWork, WireError> {
    if !order.data_dir.starts_with('/') {
        let problem = format!("{:?} is not an absolute path\nHINT: give --data-dir an absolute path.", order.data_dir);
        return Err(WireError::new("data_dir", problem));
    }
    for (old, new) in &order.tablespaces {
        if old.is_empty() || !new.starts_with('/') {
            let problem = format!("{old}={new}: the new place is not an absolute path");
            return Err(WireError::new("tablespaces", problem));
        }
    }
    let port = match order.port {
        0 => None,
        port => Some(u16::try_from(port).map_err(|_| WireError::new("port", format!("{port} is not a port")))?),
    };
    if order.apply_delay_seconds > 0 && !order.standby {
        let problem = "only a standby can stay behind\nHINT: add --standby.";
        return Err(WireError::new("apply_delay_seconds", problem));
    }
    // recovery_min_apply_delay is an integer of milliseconds (src/backend/utils/misc/guc_tables.c).
    if order.apply_delay_seconds > 2_147_483 {
        return Err(WireError::new("apply_delay_seconds", "more than 2147483 is not accepted by PostgreSQL"));
    }
    Ok(RestoreWork {
        repository: if order.repository.is_empty() { repository.to_owned() } else { order.repository },
        target: recovery::target_in(order.target).map_err(|error| error.within("target"))?,
        data_dir: order.data_dir,
        tablespaces: order.tablespaces.into_iter().collect(),
        backup: backup_id("backup", &order.backup)?,
        start: order.start,
        keep_archiving: order.keep_archiving,
        port,
        delta: order.delta,
        standby: order.standby.then_some(StandbyWork { apply_delay_seconds: order.apply_delay_seconds }),
        plan_only: order.plan_only,
        complete: Vec::new(),
    })
}

/// Empty: none.
pub fn backup_id(field: &str, text: &str) -> Result<Option<walfleet_repository::ids::BackupId>, WireError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|error| WireError::new(field, error))
}

/// Total: an attempt's end is never refused for what it says beside it, or the agent would repeat it for ever. What does
/// not read is left out.
pub fn outcome_in(outcome: pb::JobOutcome) -> Outcome {
    let error = |code: &str, message: String| JobError {
        code: if outcome.error_code.is_empty() { code.to_owned() } else { bounded(outcome.error_code.clone()) },
        message: bounded(message),
        // Only the documented codes leave this door; a failure is never reported as success.
        exit_code: if (1..=7).contains(&outcome.exit_code) { outcome.exit_code } else { 1 },
        retryable: outcome.retryable,
    };
    let verdict = match outcome.state() {
        pb::JobState::Succeeded => Verdict::Succeeded,
        pb::JobState::Failed => Verdict::Failed(error("job.failed", outcome.error_message.clone())),
        pb::JobState::Cancelled => Verdict::Cancelled(error("job.cancelled", outcome.error_message.clone())),
        other => {
            let message = format!("its agent reported {} as its end: {}", other.as_str_name(), outcome.error_message);
            Verdict::Failed(error("job.malformed_outcome", message))
        }
    };
    Outcome {
        verdict,
        started_at: time_in("started_at_us", outcome.started_at_us).ok().flatten(),
        finished_at: time_in("finished_at_us", outcome.finished_at_us).ok().flatten(),
        report: outcome.report.and_then(|report| report_in(report).ok()),
        cost: outcome.cost.map(|cost| hex(&bounded_cost(cost).encode_to_vec())),
    }
}

/// Findings kept of a verification: enough to act on, and a bound for the state.
const MAX_FINDINGS: usize = 500;

fn report_in(report: pb::job_outcome::Report) -> Result<Report, WireError> {
    use pb::job_outcome::Report as Wire;
    match report {
        Wire::Backup(backup) => recovery::backup_in(backup)
            .map(|backup| Report::Backup(Box::new(backup)))
            .map_err(|error| error.within("outcome.backup")),
        Wire::BackupPlan(mut plan) => {
            plan.notes.truncate(200);
            Ok(Report::BackupPlan(hex(&plan.encode_to_vec())))
        }
        Wire::WalFind(found) => Ok(Report::WalFind(hex(&found::bounded_report(found).encode_to_vec()))),
        Wire::Restore(mut restore) => {
            restore.notes.truncate(200);
            Ok(Report::Restore(hex(&restore.encode_to_vec())))
        }
        Wire::Verify(mut verify) => {
            verify.findings.truncate(MAX_FINDINGS);
            verify.findings.iter_mut().for_each(|finding| finding.backups.truncate(20));
            Ok(Report::Verify(hex(&verify.encode_to_vec())))
        }
    }
}

fn report_out(report: &Report) -> Option<pb::job_outcome::Report> {
    use pb::job_outcome::Report as Wire;
    match report {
        Report::Backup(backup) => Some(Wire::Backup(recovery::backup_out(backup))),
        Report::Restore(encoded) => pb::RestoreReport::decode(unhex(encoded)?.as_slice()).ok().map(Wire::Restore),
        Report::BackupPlan(encoded) => {
            pb::BackupPlanReport::decode(unhex(encoded)?.as_slice()).ok().map(Wire::BackupPlan)
        }
        Report::WalFind(encoded) => pb::WalFindReport::decode(unhex(encoded)?.as_slice()).ok().map(Wire::WalFind),
        Report::Verify(encoded) => pb::VerifyReport::decode(unhex(encoded)?.as_slice()).ok().map(Wire::Verify),
    }
}

pub fn outcome_out(job: &Job, outcome: &Outcome) -> pb::JobOutcome {
    let (state, error) = match &outcome.verdict {
        Verdict::Succeeded => (pb::JobState::Succeeded, None),
        Verdict::Failed(error) => (pb::JobState::Failed, Some(error)),
        Verdict::Cancelled(error) => (pb::JobState::Cancelled, Some(error)),
    };
    pb::JobOutcome {
        job: job.id.to_string(),
        attempt: job.attempt,
        fencing_token: job.token.0,
        state: state.into(),
        error_code: error.map(|error| error.code.clone()).unwrap_or_default(),
        error_message: error.map(|error| error.message.clone()).unwrap_or_default(),
        exit_code: error.map_or(0, |error| error.exit_code),
        retryable: error.is_some_and(|error| error.retryable),
        started_at_us: time_out(outcome.started_at),
        finished_at_us: time_out(outcome.finished_at),
        report: outcome.report.as_ref().and_then(report_out),
        cost: past::cost_of(outcome),
    }
}

pub fn progress_out(job: &Job, progress: &Progress) -> pb::JobProgress {
    pb::JobProgress {
        job: job.id.to_string(),
        attempt: progress.attempt,
        fencing_token: progress.token.0,
        phase: progress.phase.clone(),
        done_bytes: progress.done_bytes,
        total_bytes: progress.total_bytes,
        at_us: progress.at.as_microsecond(),
        spared_bytes: progress.spared_bytes,
        bytes_per_second: progress.bytes_per_second,
        left_seconds: progress.left_seconds,
        still_seconds: progress.still_seconds,
        store_requests: progress.store_requests,
        expected: progress
            .expected
            .as_ref()
            .map(|expected| pb::Expected { seconds: expected.seconds, basis: expected.basis.clone() }),
    }
}

/// A job has a handful of phases; a bound for the state.
fn bounded_cost(mut cost: pb::JobCost) -> pb::JobCost {
    cost.phases.truncate(32);
    cost.phases.iter_mut().for_each(|phase| phase.phase = bounded(std::mem::take(&mut phase.phase)));
    cost
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes all that is written");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len() / 2).map(|i| u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()).collect()
}
