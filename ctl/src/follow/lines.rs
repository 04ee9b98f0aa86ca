//! Progress as lines, for logs and pipes: one at each change of state or phase, else at most one a second.

use std::time::Duration;

use tokio::time::Instant;

use crate::view::job::{Expected, Job, Progress};

const EVERY: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Lines {
    last: Option<(String, Instant)>,
    last_line: String,
    told: Option<Expected>,
}

impl Lines {
    /// The line that this state of the job is worth, if any.
    pub fn line(&mut self, job: &Job, now: Instant) -> Option<String> {
        let progress = progress_of(job);
        let pace = progress.map(|progress| progress.pace()).unwrap_or_default();
        let phase = progress.map(|progress| progress.phase.as_str()).unwrap_or_default();
        let stage = format!("{}/{}/{}/{:?}/{:?}", job.state.word(), job.attempt, phase, job.agent, job.reason);
        let due = match &self.last {
            Some((stage_before, at)) => *stage_before != stage || now.saturating_duration_since(*at) >= EVERY,
            None => true,
        };
        let mut line = format!("{}  {}", job.id, job.state.word());
        if let Some(agent) = &job.agent {
            line.push_str(&format!(" on {agent}"));
        }
        let progress = progress.map(|progress| progress.shown());
        let pace = Some(pace).filter(|pace| !pace.is_empty());
        for part in [job.reason.clone(), progress, pace].into_iter().flatten() {
            line.push_str(&format!("  {part}"));
        }
        if !due || line == self.last_line {
            return None;
        }
        self.last = Some((stage, now));
        self.last_line.clone_from(&line);
        let expected = progress_of(job).and_then(|progress| progress.expected.as_ref());
        if let Some(expected) = expected.filter(|expected| self.told.as_ref() != Some(expected)) {
            line.push_str(&format!("  {}", expected.shown()));
            self.told = Some(expected.clone());
        }
        Some(line)
    }
}

fn progress_of(job: &Job) -> Option<&Progress> {
    job.progress.as_ref().filter(|_| !job.state.is_over())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::job::JobState;

    fn job(state: JobState, phase: &str, done: u64) -> Job {
        Job {
            id: "job_1".to_owned(),
            kind: "backup".to_owned(),
            cluster: "orders".to_owned(),
            agent: Some("db1".to_owned()),
            state,
            reason: None,
            attempt: 1,
            created_at: None,
            started_at: None,
            finished_at: None,
            requested_by: "ann".to_owned(),
            progress: Some(Progress {
                phase: phase.to_owned(),
                done_bytes: done,
                total_bytes: Some(100),
                at: None,
                spared_bytes: 0,
                bytes_per_second: None,
                left_seconds: None,
                still_seconds: None,
                store_requests: 0,
                expected: None,
            }),
            order: None,
            error: None,
            backup: None,
            restore: None,
            verification: None,
            backup_plan: None,
            found: None,
            cost: None,
        }
    }

    #[test]
    fn what_is_expected_is_told_once() {
        let mut lines = Lines::default();
        let start = Instant::now();
        let expecting = |done| {
            let mut job = job(JobState::Running, "copy", done);
            let expected = Some(Expected { seconds: 200.0, basis: "the last 5 backups".to_owned() });
            job.progress = job.progress.map(|progress| Progress { expected, ..progress });
            job
        };
        let first = lines.line(&expecting(1), start).unwrap();
        assert!(first.ends_with("(1%)  about 3m 20s in all, as the last 5 backups"), "{first}");
        assert_eq!(lines.line(&expecting(1), start + EVERY), None, "nothing new");
        let second = lines.line(&expecting(2), start + EVERY).unwrap();
        assert!(second.ends_with("(2%)"), "{second}");
    }

    #[test]
    fn a_line_comes_at_each_phase_and_at_most_once_a_second() {
        let mut lines = Lines::default();
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let first = lines.line(&job(JobState::Running, "copy", 1), at(0));
        assert_eq!(first.as_deref(), Some("job_1  running on db1  copy  1 B of 100 B (1%)"));
        assert_eq!(lines.line(&job(JobState::Running, "copy", 50), at(999)), None);
        assert!(lines.line(&job(JobState::Running, "commit", 50), at(999)).is_some());
        assert!(lines.line(&job(JobState::Running, "commit", 60), at(2000)).is_some());
        assert_eq!(lines.line(&job(JobState::Running, "commit", 60), at(9000)), None, "nothing new");
        assert_eq!(
            lines.line(&job(JobState::Succeeded, "commit", 60), at(9001)).as_deref(),
            Some("job_1  succeeded on db1")
        );
    }
}
