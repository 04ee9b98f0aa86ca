//! Where a long command stands, in plain lines on stderr: at every phase, and every few seconds within one.

use std::time::Duration;

use tokio::time::Instant;

use super::print;
use crate::estimate::Expected;
use crate::progress::{BEFORE, Progress, ProgressReading};

/// Seldom enough for a log file, often enough for a person.
const EVERY: Duration = Duration::from_secs(5);

/// Between looks: the rate is that of what was seen.
const LOOK: Duration = Duration::from_secs(1);

/// Prints until dropped.
pub struct ProgressLines {
    task: tokio::task::JoinHandle<()>,
}

impl ProgressLines {
    pub fn show(what: &'static str, progress: Progress) -> ProgressLines {
        let task = tokio::spawn(async move {
            let mut phases = progress.phases();
            let mut lines = Lines { what, shown: None, is_expectation_told: false };
            loop {
                let reading = progress.read();
                for line in lines.due(&reading, progress.expected().as_deref(), Instant::now()) {
                    eprintln!("{line}");
                }
                tokio::select! {
                    changed = phases.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        });
        ProgressLines { task }
    }
}

impl Drop for ProgressLines {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Lines {
    what: &'static str,
    shown: Option<(&'static str, String, Instant)>,
    is_expectation_told: bool,
}

impl Lines {
    fn due(&mut self, reading: &ProgressReading, expected: Option<&Expected>, now: Instant) -> Vec<String> {
        let mut due = Vec::new();
        if let Some(expected) = expected.filter(|_| !std::mem::replace(&mut self.is_expectation_told, true)) {
            let seconds = print::seconds(expected.seconds);
            due.push(format!("{}: about {seconds} in all, as {}", self.what, expected.basis));
        }
        let line = line(self.what, reading);
        let is_due = match &self.shown {
            None => reading.phase != BEFORE,
            Some((phase, ..)) if *phase != reading.phase => true,
            Some((_, before, at)) => *before != line && now.duration_since(*at) >= EVERY,
        };
        if is_due {
            self.shown = Some((reading.phase, line.clone(), now));
            due.push(line);
        }
        due
    }
}

fn line(what: &str, reading: &ProgressReading) -> String {
    let ProgressReading { phase, done_bytes, total_bytes, .. } = *reading;
    let mut line = match (done_bytes, total_bytes) {
        (0, 0) => format!("{what}: {phase}"),
        (done, 0) => format!("{what}: {phase}, {}", print::bytes(done)),
        (done, total) => {
            // A file may have grown since it was counted.
            let percent = (done.min(total) as f64 / total as f64 * 100.0).floor();
            format!("{what}: {phase}, {percent}% of {}", print::bytes(total))
        }
    };
    if let Some(rate) = reading.bytes_per_second {
        line += &format!(", {}/s", print::bytes(rate));
    }
    if let Some(left) = reading.left_seconds {
        line += &format!(", about {} left", print::seconds(left as f64));
    }
    match (reading.still_seconds, done_bytes, total_bytes) {
        (0, ..) => {}
        // It moves no bytes: it waits.
        (still, 0, 0) => line += &format!(", for {}", print::seconds(still as f64)),
        (still, ..) => line += &format!(", stalled for {}", print::seconds(still as f64)),
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(done_bytes: u64, total_bytes: u64) -> ProgressReading {
        ProgressReading { phase: "copy", done_bytes, total_bytes, ..ProgressReading::default() }
    }

    #[test]
    fn a_line_says_no_more_than_is_known() {
        assert_eq!(line("backup", &reading(0, 0)), "backup: copy");
        assert_eq!(line("backup", &reading(1536, 0)), "backup: copy, 1.5 KiB");
        assert_eq!(line("backup", &reading(50, 200)), "backup: copy, 25% of 200 B");
        assert_eq!(line("backup", &reading(300, 200)), "backup: copy, 100% of 200 B");
        let moving = ProgressReading { bytes_per_second: Some(2048), left_seconds: Some(83), ..reading(50, 200) };
        assert_eq!(line("backup", &moving), "backup: copy, 25% of 200 B, 2.0 KiB/s, about 1m 23s left");
        let still = |done, total| ProgressReading { still_seconds: 20, ..reading(done, total) };
        assert_eq!(line("backup", &still(50, 200)), "backup: copy, 25% of 200 B, stalled for 20s");
        assert_eq!(line("backup", &still(0, 0)), "backup: copy, for 20s");
    }

    #[test]
    fn a_line_comes_at_each_phase_and_else_every_few_seconds_and_the_expectation_once() {
        let mut lines = Lines { what: "backup", shown: None, is_expectation_told: false };
        let expected =
            Expected { seconds: 20.0, basis: "the last 5 backups".into(), moved_bytes: None, phases: Vec::new() };
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(lines.due(&ProgressReading { phase: BEFORE, ..reading(0, 0) }, None, at(0)), [""; 0]);
        assert_eq!(lines.due(&reading(1, 10), None, at(1)).len(), 1);
        assert_eq!(
            lines.due(&reading(2, 10), Some(&expected), at(2)),
            ["backup: about 20s in all, as the last 5 backups"]
        );
        assert_eq!(lines.due(&reading(2, 10), Some(&expected), at(3)), [""; 0]);
        assert_eq!(lines.due(&reading(5, 10), Some(&expected), at(6)), ["backup: copy, 50% of 10 B"]);
        assert_eq!(lines.due(&reading(5, 10), Some(&expected), at(60)), [""; 0], "nothing new");
        let other = ProgressReading { phase: "commit", ..reading(0, 0) };
        assert_eq!(lines.due(&other, Some(&expected), at(61)), ["backup: commit"]);
    }
}
