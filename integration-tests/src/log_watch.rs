//! Reads the logs of our programs and finds what a person would have to look at.
//!
//! ERROR means that a person must look, WARN that it went on (docs: house style); a test that provokes one says so.

use std::path::Path;

pub struct LogWatch {
    allowed: Vec<String>,
}

impl LogWatch {
    pub fn new(allowed: Vec<String>) -> LogWatch {
        LogWatch { allowed }
    }

    /// Lines of a log that complain and were not announced. A panic is a complaint that nothing can allow.
    pub fn complaints(&self, log: &Path) -> Vec<String> {
        let bytes = std::fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let name = log.file_name().unwrap_or_default().to_string_lossy();
        text.lines()
            .map(without_colours)
            .filter(|line| {
                is_panic(line) || (is_complaint(line) && !self.allowed.iter().any(|text| line.contains(text)))
            })
            .map(|line| format!("{name}: {line}"))
            .collect()
    }
}

/// `thread 'name' panicked at …`, since Rust 1.91 with a thread id after the name.
fn is_panic(line: &str) -> bool {
    line.starts_with("thread '") && line.contains(" panicked at ")
}

/// The level is the second word of tracing's text form, and a field of its JSON form.
fn is_complaint(line: &str) -> bool {
    if line.starts_with('{') {
        return line.contains(r#""level":"WARN""#) || line.contains(r#""level":"ERROR""#);
    }
    line.split_whitespace().take(2).any(|word| word == "WARN" || word == "ERROR")
}

fn without_colours(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        plain.push_str(before);
        rest = after.split_once('m').map_or("", |(_, after)| after);
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_found_in_text_json_and_colour_but_not_in_messages() {
        assert!(is_complaint("2026-11-21T05:00:00Z  WARN walfleet_agent::wal: the store is slow"));
        assert!(is_complaint(r#"{"timestamp":"…","level":"ERROR","message":"…"}"#));
        assert!(is_complaint(&without_colours("\u{1b}[2m2026-11-21T05:00:00Z\u{1b}[0m \u{1b}[33m WARN\u{1b}[0m x")));
        assert!(!is_complaint("2026-11-21T05:00:00Z  INFO walfleet_agent: an ERROR was expected"));
        assert!(is_panic("thread 'main' (123) panicked at agent/src/main.rs:1:1:"));
    }
}
