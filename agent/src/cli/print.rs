//! What goes to stdout: aligned tables for people, one JSON document for programs.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::OutputFormat;
use crate::failure::{ExitCode, Failure, Remedy};

/// Prints `value` as JSON, or what `table` makes of it. A reader that went away is no failure of ours.
pub fn output<T: Serialize>(format: OutputFormat, value: &T, table: impl FnOnce(&T) -> String) -> Result<(), Failure> {
    use std::io::Write;
    let text = match format {
        OutputFormat::Table => table(value),
        OutputFormat::Json => {
            let problem = |error| Failure::new("output", ExitCode::Failed, Remedy::Operator, format!("print: {error}"));
            serde_json::to_string_pretty(value).map_err(problem)? + "\n"
        }
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new("output", ExitCode::Failed, Remedy::Operator, format!("write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

/// Columns under their heads, two spaces apart.
pub fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..heads.len())
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
            cells.chain(heads.get(column).map(|head| head.len())).max().unwrap_or(0)
        })
        .collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(heads.to_vec());
    for row in rows {
        text += &line(row.iter().map(String::as_str).collect());
    }
    text
}

/// A name and a value a line, values aligned.
pub fn fields(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    fields.iter().map(|(name, value)| format!("{name:<width$}  {value}\n")).collect()
}

/// Binary units, one digit behind the point where it says something.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or("EiB");
    if value >= 100.0 { format!("{value:.0} {name}") } else { format!("{value:.1} {name}") }
}

/// `2026-06-04 14:31:59 UTC (10m ago)`
pub fn time(at: Timestamp, now: Timestamp) -> String {
    format!("{} ({})", at.strftime("%Y-%m-%d %H:%M:%S UTC"), ago(now.duration_since(at)))
}

fn ago(since: SignedDuration) -> String {
    let seconds = since.as_secs();
    let span = match seconds.unsigned_abs() {
        s @ 0..60 => format!("{s}s"),
        s @ 60..3600 => format!("{}m", s / 60),
        s @ 3600..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    };
    if seconds < 0 { format!("in {span}") } else { format!("{span} ago") }
}

/// `1m 23s`
pub fn seconds(seconds: f64) -> String {
    let whole = seconds.max(0.0);
    match whole as u64 {
        0..10 => format!("{whole:.1}s"),
        s @ 10..60 => format!("{s}s"),
        s @ 60..3600 => format!("{}m {}s", s / 60, s % 60),
        s => format!("{}h {}m", s / 3600, s / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_as_people_say_them() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_048_575, "1.0 MiB"),
            (157_286_400, "150 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        assert_eq!(time(at(0), at(600)), "1970-01-01 00:00:00 UTC (10m ago)");
        assert_eq!(time(at(60), at(0)), "1970-01-01 00:01:00 UTC (in 1m)");
        assert_eq!((seconds(1.25), seconds(83.0), seconds(7260.0)), ("1.2s".into(), "1m 23s".into(), "2h 1m".into()));
    }

    #[test]
    fn columns_align() {
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), String::new()]];
        assert_eq!(table(&["ID", "N"], &rows), "ID    N\na     1\nlong\n");
        assert_eq!(fields(&[("a", "1".into()), ("long", "2".into())]), "a     1\nlong  2\n");
    }
}
