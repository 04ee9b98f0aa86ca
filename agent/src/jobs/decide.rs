//! What to answer to an offer: a pure function of the journal's record, what runs, and the order.

use walfleet_repository::ids::JobId;

use super::order::{JobOrder, WorkOrder};
use crate::journal::JobRecord;

/// What a job occupies while it runs; two jobs with one claim exclude each other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claim(String);

impl Claim {
    /// A backup occupies its instance, a restore its directory, a verification the cluster's share of the store.
    pub fn of(order: &JobOrder) -> Claim {
        Claim(match &order.work {
            WorkOrder::Backup(_) => format!("backup of {}", order.cluster),
            WorkOrder::Restore(restore) => {
                // By components, so that "/a/b/" and "/a//b" are one directory.
                let folder: std::path::PathBuf = restore.data_dir.components().collect();
                format!("restore into {}", folder.display())
            }
            WorkOrder::Verify(_) => format!("verification of {}", order.cluster),
            // They only look: any number may run, beside anything.
            WorkOrder::BackupPlan(_) => format!("{}: backup plan of {}", order.job, order.cluster),
            WorkOrder::WalFind(_) => format!("{}: search of {}", order.job, order.cluster),
        })
    }

    pub fn into_subject(self) -> String {
        self.0
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// New here: journal it and run it.
    Start,
    /// The same job, attempt and token again: the same answer, and nothing changes.
    AlreadyTaken,
    /// An earlier attempt of it still runs here and is being stopped; another time may do.
    Superseding,
    Refused {
        reason: String,
        busy: bool,
    },
}

impl Answer {
    pub fn is_accepted(&self) -> bool {
        matches!(self, Answer::Start | Answer::AlreadyTaken)
    }
}

pub fn decide(record: Option<&JobRecord>, running: &[(&JobId, &str)], order: &JobOrder, claim: &Claim) -> Answer {
    let refused = |reason: String| Answer::Refused { reason, busy: false };
    if let Some(record) = record {
        let (known, asked) = (record.fencing_token, order.fencing_token);
        if asked < known {
            return refused(format!(
                "fencing token {asked} is older than {known}, which this agent has seen for the job"
            ));
        }
        if asked == known && order.attempt != record.attempt {
            return refused(format!(
                "attempt {} comes with the fencing token {asked} of attempt {}",
                order.attempt, record.attempt
            ));
        }
        if asked == known {
            return Answer::AlreadyTaken;
        }
    }
    if running.iter().any(|(job, _)| **job == order.job) {
        return Answer::Superseding;
    }
    match running.iter().find(|(_, subject)| *subject == claim.0) {
        Some((job, subject)) => Answer::Refused { reason: format!("{job} is at it: {subject}"), busy: true },
        None => Answer::Start,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::order::{VerifyOrder, WorkKind};
    use crate::journal::{Ending, JobState};
    use jiff::Timestamp;

    fn order(attempt: u32, fencing_token: u64) -> JobOrder {
        JobOrder {
            job: "job_a".parse().unwrap(),
            attempt,
            fencing_token,
            cluster: "orders".parse().unwrap(),
            traceparent: None,
            past: Vec::new(),
            work: WorkOrder::Verify(VerifyOrder { repository: "main".into(), backup: None, deep: false }),
        }
    }

    fn record(state: JobState) -> JobRecord {
        JobRecord {
            job: "job_a".parse().unwrap(),
            attempt: 2,
            fencing_token: 20,
            cluster: "orders".parse().unwrap(),
            work: WorkKind::Verify,
            subject: "verification of orders".into(),
            started_at: Timestamp::UNIX_EPOCH,
            state,
            cost: None,
        }
    }

    #[test]
    fn an_offer_is_taken_once_and_never_by_an_older_token() {
        let ended = JobState::Ended { ending: Ending::Cancelled, at: Timestamp::UNIX_EPOCH };
        let (own, other): (JobId, JobId) = ("job_a".parse().unwrap(), "job_b".parse().unwrap());
        let ours = [(&own, "verification of orders")];
        let others = [(&other, "verification of orders")];
        let elsewhere = [(&other, "verification of users")];
        type Row<'a> = (Option<JobState>, &'a [(&'a JobId, &'a str)], JobOrder, &'a str);
        let table: [Row<'_>; 9] = [
            (None, &[], order(1, 10), "start"),
            (None, &elsewhere, order(1, 10), "start"),
            (None, &others, order(1, 10), "busy"),
            (Some(JobState::Running), &ours, order(2, 20), "again"),
            (Some(ended.clone()), &[], order(2, 20), "again"),
            (Some(JobState::Running), &ours, order(1, 19), "refused"),
            (Some(ended.clone()), &[], order(3, 20), "refused"),
            (Some(ended), &[], order(3, 30), "start"),
            (Some(JobState::Running), &ours, order(3, 30), "superseding"),
        ];
        for (number, (state, running, order, expected)) in table.into_iter().enumerate() {
            let record = state.map(record);
            let said = match decide(record.as_ref(), running, &order, &Claim::of(&order)) {
                Answer::Start => "start",
                Answer::AlreadyTaken => "again",
                Answer::Superseding => "superseding",
                Answer::Refused { busy: true, .. } => "busy",
                Answer::Refused { busy: false, .. } => "refused",
            };
            assert_eq!(said, expected, "row {number}");
        }
    }
}
