//! Progress as lines, for logs and pipes: one at each change of state or phase, else at most one a second.

use std::time::Duration;

use tokio::time::Instant;

use super::pace::Pace;
use crate::view::job::Job;

const EVERY: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Lines {
    last: Option<(String, Instant)>,
    last_line: String,
    pace: Pace,
}

impl Lines {
    /// The line that this state of the job is worth, if any.
    pub fn line(&mut self, job: &Job, now: Instant) -> Option<String> {
        let progress = job.progress.as_ref().filter(|_| !job.state.is_over());
        let pace = progress.map(|progress| self.pace.after(progress)).unwrap_or_default();
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
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::job::{JobState, Progress};

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
            progress: Some(Progress { phase: phase.to_owned(), done_bytes: done, total_bytes: Some(100), at: None }),
            order: None,
            error: None,
            backup: None,
            restore: None,
            verification: None,
        }
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
