//! A job that tests of several modules begin with; they say what is different.

use jiff::Timestamp;

use super::work::Work;
use super::{FencingToken, Job, JobState};

/// Of cluster orders, waiting since then.
pub fn queued(work: Work, since: Timestamp) -> Job {
    Job {
        id: "job_1".parse().expect("an id"),
        cluster: "orders".parse().expect("a name"),
        work,
        on: None,
        requested_by: "ann".to_owned(),
        run: None,
        request_key: None,
        traceparent: String::new(),
        created_at: since,
        started_at: None,
        finished_at: None,
        retries: 0,
        failures: 0,
        attempt: 0,
        token: FencingToken(0),
        agent: None,
        cancel: None,
        state: JobState::Queued { reason: String::new(), not_before: since },
        outcome: None,
    }
}
