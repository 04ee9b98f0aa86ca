//! Sizes, durations and WAL positions: how people write them and how they read them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// `1.2 GiB`; below 1 KiB whole bytes.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be printed as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `0.9s`, `42s`, `3m 20s`, `2h 5m`, `3d 4h`.
pub fn seconds(value: f64) -> String {
    if !value.is_finite() || value < 0.0 {
        return "-".to_owned();
    }
    if value < 9.95 {
        return format!("{value:.1}s");
    }
    let whole = value.round() as u64;
    let pair = |high: u64, high_unit, low: u64, low_unit| {
        if low == 0 { format!("{high}{high_unit}") } else { format!("{high}{high_unit} {low}{low_unit}") }
    };
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => pair(whole / 60, "m", whole % 60, "s"),
        3600..86400 => pair(whole / 3600, "h", whole % 3600 / 60, "m"),
        _ => pair(whole / 86400, "d", whole % 86400 / 3600, "h"),
    }
}

/// A duration as operators type it: `90s`, `10m`, `1h30m`, `7d`, `2w`. A bare number is refused: seconds for one,
/// minutes for another.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("\"{text}\" is not a duration: write it with units, for example 90s, 10m, 1h30m or 7d");
    let mut total: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.len() - tail.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, tail) = tail.split_at(letters);
        let unit = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            "w" => 604_800,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        total = number.checked_mul(unit).and_then(|part| total.checked_add(part)).ok_or_else(wrong)?;
        rest = tail;
    }
    if text.is_empty() { Err(wrong()) } else { Ok(Duration::from_secs(total)) }
}

/// A WAL position as PostgreSQL prints it (src/backend/utils/adt/pg_lsn.c).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Lsn(pub u64);

impl FromStr for Lsn {
    type Err = String;

    fn from_str(text: &str) -> Result<Lsn, String> {
        let half = |part: &str| {
            let digits = (1..=8).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            if digits { u64::from_str_radix(part, 16).ok() } else { None }
        };
        text.split_once('/').and_then(|(high, low)| Some(Lsn(half(high)? << 32 | half(low)?))).ok_or_else(|| {
            format!("\"{text}\" is not a WAL position: write it as PostgreSQL does, for example 0/3000060")
        })
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well_at_their_borders() {
        let shown = [0, 1023, 1024, 1536, (1 << 20) - 1, 1 << 20, 5 << 30, u64::MAX].map(size);
        assert_eq!(
            shown,
            ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 MiB", "5.0 GiB", "16.0 EiB"].map(str::to_owned)
        );
    }

    #[test]
    fn durations_keep_two_units_at_most() {
        let shown = [0.94, 9.96, 59.4, 59.6, 200.0, 3600.0, 7500.0, 90_000.0, f64::NAN, -1.0].map(seconds);
        assert_eq!(shown, ["0.9s", "10s", "59s", "1m", "3m 20s", "1h", "2h 5m", "1d 1h", "-", "-"].map(str::to_owned));
    }

    #[test]
    fn typed_durations_need_units_and_never_overflow() {
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("7d"), Ok(Duration::from_secs(604_800)));
        for bad in ["", "10", "h", "1y", "-1h", "1h30", "1.5h", "99999999999999999999s", "9999999999999999w"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn positions_print_and_parse_as_postgres_does() {
        assert_eq!("16/B374D848".parse::<Lsn>().map(|lsn| lsn.to_string()), Ok("16/B374D848".to_owned()));
        for bad in ["", "0", "/0", "0/", "0/123456789", "g/0", "0/0/0"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }
}
