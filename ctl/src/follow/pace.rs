//! How fast a phase of a job goes, by the agent's own clock, so that a slow link does not distort it.

use jiff::Timestamp;

use crate::quantity::{seconds, size};
use crate::view::job::Progress;

/// A rate from less is noise.
const SHORTEST_SECONDS: f64 = 2.0;

#[derive(Default)]
pub struct Pace {
    phase: String,
    began: Option<(Timestamp, u64)>,
}

impl Pace {
    /// `310.0 MiB/s, about 12s left`; empty while there is nothing to say.
    pub fn after(&mut self, progress: &Progress) -> String {
        let Some(at) = progress.at else { return String::new() };
        let (began_at, began_bytes) = match self.began {
            // A phase that starts over (another attempt) counts anew.
            Some((_, bytes)) if self.phase != progress.phase || bytes > progress.done_bytes => {
                (at, progress.done_bytes)
            }
            Some(began) => began,
            None => (at, progress.done_bytes),
        };
        self.began = Some((began_at, began_bytes));
        self.phase.clone_from(&progress.phase);
        let elapsed = at.duration_since(began_at).as_secs_f64();
        let done = progress.done_bytes.saturating_sub(began_bytes);
        if elapsed < SHORTEST_SECONDS || done == 0 {
            return String::new();
        }
        let rate = done as f64 / elapsed;
        let left = progress.total_bytes.map(|total| total.saturating_sub(progress.done_bytes)).filter(|left| *left > 0);
        let left =
            left.map(|left| format!(", about {} left", seconds((left as f64 / rate).ceil()))).unwrap_or_default();
        format!("{}/s{left}", size(rate as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(phase: &str, at: i64, done: u64) -> Progress {
        Progress {
            phase: phase.to_owned(),
            done_bytes: done << 20,
            total_bytes: Some(100 << 20),
            at: Timestamp::from_second(at).ok(),
        }
    }

    #[test]
    fn a_rate_is_told_once_there_is_one_and_anew_for_each_phase() {
        let mut pace = Pace::default();
        assert_eq!(pace.after(&progress("copy", 100, 0)), "");
        assert_eq!(pace.after(&progress("copy", 101, 9)), "");
        assert_eq!(pace.after(&progress("copy", 110, 50)), "5.0 MiB/s, about 10s left");
        assert_eq!(pace.after(&progress("replay", 111, 1)), "");
        assert_eq!(pace.after(&progress("replay", 113, 100)), "49.5 MiB/s");
    }

    #[test]
    fn a_clock_that_jumps_back_gives_no_rate() {
        let mut pace = Pace::default();
        pace.after(&progress("copy", 100, 0));
        assert_eq!(pace.after(&progress("copy", 50, 10)), "");
    }
}
