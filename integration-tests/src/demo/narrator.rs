//! What the demo says: one line per step with the time it took, commands as an operator types them, and the verdict.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::fleet::Fleet;
use crate::scratch::Scratch;

/// Where the times stand.
const WIDTH: usize = 96;

pub struct Narrator {
    began: Instant,
    colours: bool,
}

impl Narrator {
    pub fn begin(scratch: &Scratch) -> Narrator {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        println!("walfleet demo: two hosts, a controller, a repository; a disaster, and the second before it back.");
        println!("Everything is real and lives in {}.\n", scratch.path().display());
        Narrator { began: Instant::now(), colours }
    }

    /// Does a step and says how long it took.
    pub fn step<T>(&self, what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        print!("  {what} ");
        // Seen while it works.
        let _ = std::io::stdout().flush();
        let started = Instant::now();
        let outcome = work();
        let dots = ".".repeat(WIDTH.saturating_sub(what.chars().count()).max(3));
        let mark = match &outcome {
            Ok(_) => self.ink("32", &seconds(started.elapsed())),
            Err(_) => self.ink("31", "failed"),
        };
        println!("{dots} {mark}");
        outcome
    }

    /// Runs the operator's command and shows what was typed and what it answered.
    pub fn walfleet(&self, fleet: &Fleet, what: &str, words: &[&str]) -> anyhow::Result<()> {
        let output = self.step(what, || fleet.admin.run(words)?.ok())?;
        println!("    {}", self.ink("1", &format!("$ {}", fleet.admin.typed(words))));
        for line in output.stdout.lines().filter(|line| !line.trim().is_empty()) {
            println!("      {line}");
        }
        Ok(())
    }

    /// Something seen, under the step that showed it.
    pub fn detail(&self, what: &str) {
        println!("    {what}");
    }

    pub fn verdict(&self, outcome: Result<(), &anyhow::Error>) {
        let took = seconds(self.began.elapsed());
        match outcome {
            Ok(()) => {
                let verdict = self.ink("1;32", "PASSED");
                println!("\n{verdict}: every table is what it was at that moment, on another host. {took} in all.");
            }
            Err(error) => println!("\n{}: {error:#}\n({took} in all)", self.ink("1;31", "FAILED")),
        }
    }

    fn ink(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
