//! Where a long command stands, in plain lines on stderr: at every phase, and every few seconds within one.

use std::time::Duration;

use crate::progress::{Progress, ProgressReading};

/// Seldom enough for a log file, often enough for a person.
const EVERY: Duration = Duration::from_secs(5);

/// Prints until dropped.
pub struct ProgressLines {
    task: tokio::task::JoinHandle<()>,
}

impl ProgressLines {
    pub fn show(what: &'static str, progress: Progress) -> ProgressLines {
        let task = tokio::spawn(async move {
            let mut phases = progress.phases();
            let mut shown: Option<ProgressReading> = None;
            loop {
                let reading = progress.read();
                if shown != Some(reading) && reading.phase != "start" {
                    eprintln!("{}", line(what, reading));
                    shown = Some(reading);
                }
                tokio::select! {
                    changed = phases.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(EVERY) => {}
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

fn line(what: &str, reading: ProgressReading) -> String {
    let ProgressReading { phase, done_bytes, total_bytes } = reading;
    match (done_bytes, total_bytes) {
        (0, 0) => format!("{what}: {phase}"),
        (done, 0) => format!("{what}: {phase}, {}", super::print::bytes(done)),
        (done, total) => {
            // A file may have grown since it was counted.
            let percent = (done.min(total) as f64 / total as f64 * 100.0).floor();
            format!("{what}: {phase}, {percent}% of {}", super::print::bytes(total))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_no_more_than_is_known() {
        let reading = |done_bytes, total_bytes| ProgressReading { phase: "copy", done_bytes, total_bytes };
        assert_eq!(line("backup", reading(0, 0)), "backup: copy");
        assert_eq!(line("backup", reading(1536, 0)), "backup: copy, 1.5 KiB");
        assert_eq!(line("backup", reading(50, 200)), "backup: copy, 25% of 200 B");
        assert_eq!(line("backup", reading(300, 200)), "backup: copy, 100% of 200 B");
    }
}
