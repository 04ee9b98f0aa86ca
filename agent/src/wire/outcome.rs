//! Journal entries, progress and outcomes, outward.

use walfleet_proto::agent::v1 as agent;
use walfleet_proto::job::v1 as proto;
use walfleet_proto::recovery::v1 as recovery;

use super::{past, path_text, text_of};
use crate::jobs::RunningJob;
use crate::jobs::report::{BackupPlanReport, BackupReport, Report, RestoreReport, VerifyReport};
use crate::journal::{Ending, JobOutcome, JobRecord};

pub(super) fn journal_entry(record: &JobRecord) -> agent::JournalEntry {
    agent::JournalEntry {
        job: record.job.to_string(),
        attempt: record.attempt,
        fencing_token: record.fencing_token,
        outcome: record.outcome().map(|outcome| self::outcome(&outcome)),
    }
}

pub(super) fn running_entry(running: &RunningJob) -> agent::JournalEntry {
    agent::JournalEntry {
        job: running.job.to_string(),
        attempt: running.attempt,
        fencing_token: running.fencing_token,
        outcome: None,
    }
}

pub(super) fn progress(running: &RunningJob, at: jiff::Timestamp) -> proto::JobProgress {
    proto::JobProgress {
        job: running.job.to_string(),
        attempt: running.attempt,
        fencing_token: running.fencing_token,
        phase: running.progress.phase.to_owned(),
        done_bytes: running.progress.done_bytes,
        total_bytes: running.progress.total_bytes,
        at_us: at.as_microsecond(),
        spared_bytes: running.progress.spared_bytes,
        bytes_per_second: running.progress.bytes_per_second,
        left_seconds: running.progress.left_seconds,
        still_seconds: running.progress.still_seconds,
        store_requests: running.progress.store_requests,
        expected: running
            .expected
            .as_ref()
            .map(|expected| proto::Expected { seconds: expected.seconds, basis: expected.basis.clone() }),
    }
}

pub(super) fn outcome(outcome: &JobOutcome) -> proto::JobOutcome {
    let mut message = proto::JobOutcome {
        job: outcome.job.to_string(),
        attempt: outcome.attempt,
        fencing_token: outcome.fencing_token,
        started_at_us: outcome.started_at.as_microsecond(),
        finished_at_us: outcome.finished_at.as_microsecond(),
        cost: outcome.cost.as_ref().map(past::cost),
        ..Default::default()
    };
    match &outcome.ending {
        Ending::Succeeded(report) => {
            message.set_state(proto::JobState::Succeeded);
            message.report = Some(self::report(report));
        }
        Ending::Failed { code, message: text, exit_code, retryable } => {
            message.set_state(proto::JobState::Failed);
            message.error_code = code.clone();
            message.error_message = text.clone();
            message.exit_code = *exit_code;
            message.retryable = *retryable;
        }
        Ending::Cancelled => {
            message.set_state(proto::JobState::Cancelled);
            message.error_code = "cancelled".into();
            message.error_message = "cancelled".into();
            message.exit_code = crate::failure::ExitCode::Failed as i32;
        }
    }
    message
}

fn report(report: &Report) -> proto::job_outcome::Report {
    match report {
        Report::Backup(backup) => proto::job_outcome::Report::Backup(backup_summary(backup)),
        Report::Restore(restore) => proto::job_outcome::Report::Restore(restore_report(restore)),
        Report::Verify(verify) => proto::job_outcome::Report::Verify(verify_report(verify)),
        Report::BackupPlan(plan) => proto::job_outcome::Report::BackupPlan(backup_plan_report(plan)),
        Report::WalFind(found) => proto::job_outcome::Report::WalFind(super::found::report(found)),
    }
}

pub(super) fn backup_summary(backup: &BackupReport) -> recovery::BackupSummary {
    recovery::BackupSummary {
        id: backup.id.to_string(),
        cluster: backup.cluster.to_string(),
        system_identifier: backup.system_identifier,
        server_version_num: backup.server_version_num,
        timeline: backup.timeline.0,
        start_lsn: backup.start_lsn.to_string(),
        stop_lsn: backup.stop_lsn.to_string(),
        started_at_us: backup.started_at.as_microsecond(),
        finished_at_us: backup.finished_at.as_microsecond(),
        member: backup.member.clone(),
        parents: backup.parents.iter().map(ToString::to_string).collect(),
        cluster_bytes: backup.cluster_bytes,
        read_bytes: backup.read_bytes,
        new_bytes: backup.new_bytes,
        stored_bytes: backup.stored_bytes,
        damaged_pages: backup.damaged_pages,
        state: backup.state.name().to_owned(),
        store_requests: backup.store_requests,
        unexplained_slots: backup.unexplained_slots,
        read_all_because: backup.read_all_because.clone().unwrap_or_default(),
    }
}

fn restore_report(restore: &RestoreReport) -> proto::RestoreReport {
    proto::RestoreReport {
        data_dir: path_text(&restore.data_dir),
        backup: restore.backup.to_string(),
        cluster_bytes: restore.cluster_bytes,
        fetched_bytes: restore.fetched_bytes,
        store_requests: restore.store_requests,
        wal_from_lsn: restore.wal_from_lsn.to_string(),
        wal_to_lsn: restore.wal_to_lsn.to_string(),
        timeline: restore.timeline.0,
        reached_lsn: text_of(&restore.reached_lsn),
        reached_commit_us: restore.reached_commit.map_or(0, jiff::Timestamp::as_microsecond),
        server_state: restore.server_state.clone(),
        connection: restore.connection.clone().unwrap_or_default(),
        copy_seconds: restore.copy_seconds,
        replay_seconds: restore.replay_seconds,
        estimated_seconds: restore.estimated_seconds.unwrap_or_default(),
        notes: restore.notes.clone(),
        wal_bytes: restore.wal_bytes,
        wal_segments: restore.wal_segments,
        estimated_from: restore.estimated_from.clone().unwrap_or_default(),
        at_most: restore.at_most,
    }
}

fn backup_plan_report(plan: &BackupPlanReport) -> proto::BackupPlanReport {
    proto::BackupPlanReport {
        cluster_bytes: plan.cluster_bytes,
        read_bytes: plan.read_bytes,
        stored_bytes: plan.stored_bytes,
        store_requests: plan.store_requests,
        seconds: plan.estimated_seconds,
        basis: plan.estimated_from.clone().unwrap_or_default(),
        read_all_because: plan.read_all_because.clone().unwrap_or_default(),
        notes: plan.notes.clone(),
    }
}

fn verify_report(verify: &VerifyReport) -> proto::VerifyReport {
    let finding = |finding: &crate::jobs::report::VerifyFinding| proto::VerifyFinding {
        object: finding.object.clone(),
        problem: finding.problem.clone(),
        backups: finding.backups.iter().map(ToString::to_string).collect(),
    };
    proto::VerifyReport {
        packs: verify.packs,
        segments: verify.segments,
        bytes: verify.bytes,
        findings: verify.findings.iter().map(finding).collect(),
    }
}
