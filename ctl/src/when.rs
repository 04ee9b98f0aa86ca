//! Moments: how they are printed, and how an operator's target time is read.
//!
//! A time without a zone is never guessed at: a restore to the wrong hour looks like a restore that worked.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};

/// Why a typed time is not one moment.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WhenError {
    #[error(
        "\"{text}\" is not a time\nHINT: write it as '2026-06-04 14:31:59 UTC', '2026-06-04 14:31:59.25 +02:00', \
         '2026-06-04 14:31:59 Europe/Berlin' or in RFC 3339."
    )]
    Malformed { text: String },
    #[error("\"{text}\" has no time zone; it could mean\n{readings}\nHINT: name the one you mean: {choices}.")]
    NoZone { text: String, readings: String, choices: String },
    #[error(
        "\"{zone}\" in \"{text}\" is not a time zone\nHINT: write UTC, an offset such as +02:00, or a name such as \
         Europe/Berlin; abbreviations mean different zones to different people."
    )]
    UnknownZone { text: String, zone: String },
    #[error(
        "\"{text}\" happened twice, when the clocks of {zone} were put back; it could mean\n{readings}\nHINT: name the \
         one you mean: {choices}."
    )]
    Twice { text: String, zone: String, readings: String, choices: String },
    #[error("\"{text}\" never happened: the clocks of {zone} were put forward over it\nHINT: write the time in UTC.")]
    Never { text: String, zone: String },
    #[error("\"{text}\" is finer than a microsecond, PostgreSQL's resolution\nHINT: give at most six decimals.")]
    TooFine { text: String },
}

/// `2026-06-04 14:31:59 UTC`
pub fn absolute(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// `2026-06-04 14:31:59.25 UTC`: with the fraction, where a second is too coarse.
pub fn precise(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S%.f UTC").to_string()
}

/// `10m ago`, `in 2h`, `now`
pub fn relative(at: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(at.as_second());
    let amount = match seconds.unsigned_abs() {
        0 => return "now".to_owned(),
        s @ 1..60 => format!("{s}s"),
        s @ 60..3600 => format!("{}m", s / 60),
        s @ 3600..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    };
    if seconds > 0 { format!("{amount} ago") } else { format!("in {amount}") }
}

/// `2026-06-04 14:31:59 UTC (10m ago)`
pub fn full(at: Timestamp, now: Timestamp) -> String {
    format!("{} ({})", absolute(at), relative(at, now))
}

/// Where and when the operator sits: for the readings of an incomplete time.
pub struct Reader<'a> {
    pub now: Timestamp,
    pub zone: &'a TimeZone,
}

impl Reader<'_> {
    /// A moment, from `YYYY-MM-DD HH:MM[:SS[.ffffff]]` with a zone (`UTC`, `Z`, an offset, `Area/City`) or RFC 3339.
    pub fn read(&self, text: &str) -> Result<Timestamp, WhenError> {
        let text = text.trim();
        let malformed = || WhenError::Malformed { text: text.to_owned() };
        let (clock, zone) = split_zone(text).ok_or_else(malformed)?;
        let civil: DateTime = clock.parse().map_err(|_| malformed())?;
        if civil.subsec_nanosecond() % 1000 != 0 {
            return Err(WhenError::TooFine { text: text.to_owned() });
        }
        let moment = |offset: Offset| offset.to_timestamp(civil).map_err(|_| malformed());
        if zone.is_empty() {
            return Err(self.without_zone(text, clock, civil));
        }
        if zone.eq_ignore_ascii_case("utc") || zone.eq_ignore_ascii_case("gmt") || zone.eq_ignore_ascii_case("z") {
            return moment(Offset::UTC);
        }
        let unknown = || WhenError::UnknownZone { text: text.to_owned(), zone: zone.to_owned() };
        if zone.starts_with(['+', '-']) {
            return moment(parse_offset(zone).ok_or_else(unknown)?);
        }
        if !zone.contains('/') {
            return Err(unknown());
        }
        let place = TimeZone::get(zone).map_err(|_| unknown())?;
        match place.to_ambiguous_timestamp(civil).offset() {
            AmbiguousOffset::Unambiguous { offset } => moment(offset),
            AmbiguousOffset::Gap { .. } => Err(WhenError::Never { text: text.to_owned(), zone: zone.to_owned() }),
            AmbiguousOffset::Fold { before, after } => {
                let (readings, choices) = self.readings(clock, civil, &[(before, ""), (after, "")]);
                Err(WhenError::Twice { text: text.to_owned(), zone: zone.to_owned(), readings, choices })
            }
        }
    }

    fn without_zone(&self, text: &str, clock: &str, civil: DateTime) -> WhenError {
        let here = self.zone.to_ambiguous_timestamp(civil).offset();
        let mut offsets = vec![(Offset::UTC, "")];
        let local = match here {
            AmbiguousOffset::Unambiguous { offset } => vec![offset],
            AmbiguousOffset::Gap { .. } => Vec::new(),
            AmbiguousOffset::Fold { before, after } => vec![before, after],
        };
        offsets.extend(local.into_iter().map(|offset| (offset, "the zone of this machine")));
        let same = offsets.iter().all(|(offset, _)| *offset == Offset::UTC);
        if same {
            offsets.truncate(1);
        }
        let (mut readings, mut choices) = self.readings(clock, civil, &offsets);
        if same {
            readings.push_str("\n  or a time in the zone where you read it (this machine's zone is UTC)");
            choices.push_str(&format!(" or '{clock} +02:00', with the offset of that zone"));
        }
        WhenError::NoZone { text: text.to_owned(), readings, choices }
    }

    fn readings(&self, clock: &str, civil: DateTime, offsets: &[(Offset, &str)]) -> (String, String) {
        let mut readings = Vec::new();
        let mut choices = Vec::new();
        for (offset, what) in offsets {
            let Ok(at) = offset.to_timestamp(civil) else { continue };
            let name = if *offset == Offset::UTC { "UTC".to_owned() } else { offset_name(*offset) };
            let reading = if *offset == Offset::UTC {
                format!("  {}", full(at, self.now))
            } else {
                format!("  {clock} {name}, which is {}", full(at, self.now))
            };
            readings.push(if what.is_empty() { reading } else { format!("{reading}, in {what}") });
            choices.push(format!("'{clock} {name}'"));
        }
        (readings.join("\n"), choices.join(" or "))
    }
}

/// `+02:00`, and seconds where a zone of the past has them.
fn offset_name(offset: Offset) -> String {
    let seconds = offset.seconds();
    let sign = if seconds < 0 { '-' } else { '+' };
    let seconds = seconds.unsigned_abs();
    let minutes = format!("{sign}{:02}:{:02}", seconds / 3600, seconds % 3600 / 60);
    if seconds.is_multiple_of(60) { minutes } else { format!("{minutes}:{:02}", seconds % 60) }
}

/// Date and clock, then what stands behind them; `None` if it does not begin as a time.
fn split_zone(text: &str) -> Option<(&str, &str)> {
    let shape = text.as_bytes();
    let digits =
        |range: std::ops::Range<usize>| shape.get(range).is_some_and(|part| part.iter().all(u8::is_ascii_digit));
    let mark = |at: usize, allowed: &[u8]| shape.get(at).is_some_and(|byte| allowed.contains(byte));
    let date = digits(0..4) && mark(4, b"-") && digits(5..7) && mark(7, b"-") && digits(8..10);
    let minutes = mark(10, b" Tt") && digits(11..13) && mark(13, b":") && digits(14..16);
    if !(date && minutes) {
        return None;
    }
    let mut end = 16;
    if mark(16, b":") && digits(17..19) {
        end = 19;
        if mark(19, b".") && digits(20..21) {
            end = 20 + shape.iter().skip(20).take_while(|byte| byte.is_ascii_digit()).count();
        }
    }
    // A leap second (":60") is read as the second after, and Postgres has none: refused with the rest.
    if text.get(17..19) == Some("60") {
        return None;
    }
    let (clock, rest) = text.split_at_checked(end)?;
    let zone = rest.trim_start();
    let separated = zone.len() < rest.len() || zone.is_empty() || zone.starts_with(['+', '-', 'Z', 'z']);
    if separated && !zone.contains(char::is_whitespace) { Some((clock, zone)) } else { None }
}

/// `+02`, `+0200`, `+02:00`; at most 15:59, PostgreSQL's own limit (MAX_TZDISP_HOUR, src/include/datatype/timestamp.h).
fn parse_offset(text: &str) -> Option<Offset> {
    let sign = match text.get(..1)? {
        "+" => 1,
        "-" => -1,
        _ => return None,
    };
    let digits: String = match text.get(1..)? {
        rest if rest.len() == 5 && rest.get(2..3) == Some(":") => rest.replace(':', ""),
        rest => rest.to_owned(),
    };
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) || !matches!(digits.len(), 2 | 4) {
        return None;
    }
    let hours: i32 = digits.get(..2)?.parse().ok()?;
    let minutes: i32 = digits.get(2..4).unwrap_or("0").parse().ok()?;
    if hours > 15 || minutes > 59 {
        return None;
    }
    Offset::from_seconds(sign * (hours * 3600 + minutes * 60)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, zone: &str) -> Result<String, WhenError> {
        let zone = TimeZone::get(zone).unwrap();
        let now = "2026-06-04T14:41:59Z".parse().unwrap();
        Reader { now, zone: &zone }.read(text).map(|at| at.to_string())
    }

    #[test]
    fn every_documented_form_is_the_same_moment() {
        for text in [
            "2026-06-04 14:31:59 UTC",
            "2026-06-04 14:31:59 utc",
            "2026-06-04 14:31:59Z",
            "2026-06-04T14:31:59Z",
            "2026-06-04T16:31:59+02:00",
            "2026-06-04 16:31:59 +0200",
            "2026-06-04 16:31:59+02",
            "2026-06-04 09:31:59 -05:00",
            "2026-06-04 16:31:59 Europe/Berlin",
            "  2026-06-04 14:31:59 UTC ",
        ] {
            assert_eq!(read(text, "America/New_York"), Ok("2026-06-04T14:31:59Z".to_owned()), "{text}");
        }
        assert_eq!(read("2026-06-04 14:31:59.123456 UTC", "UTC"), Ok("2026-06-04T14:31:59.123456Z".to_owned()));
        assert_eq!(read("2026-06-04 14:31 UTC", "UTC"), Ok("2026-06-04T14:31:00Z".to_owned()));
    }

    #[test]
    fn a_time_without_a_zone_is_refused_with_both_readings() {
        let text = read("2026-06-04 14:31:59", "Europe/Berlin").unwrap_err().to_string();
        assert!(text.contains("2026-06-04 14:31:59 UTC (10m ago)"), "{text}");
        assert!(text.contains("2026-06-04 14:31:59 +02:00, which is 2026-06-04 12:31:59 UTC (2h ago)"), "{text}");
        assert!(text.contains("HINT: name the one you mean"), "{text}");
        let text = read("2026-06-04 14:31:59", "UTC").unwrap_err().to_string();
        assert!(text.contains("this machine's zone is UTC"), "{text}");
    }

    #[test]
    fn an_hour_that_came_twice_or_never_is_refused() {
        let twice = read("2026-10-25 02:30:00 Europe/Berlin", "UTC").unwrap_err();
        assert!(matches!(&twice, WhenError::Twice { .. }), "{twice}");
        assert!(twice.to_string().contains("'2026-10-25 02:30:00 +01:00'"), "{twice}");
        let never = read("2026-03-29 02:30:00 Europe/Berlin", "UTC").unwrap_err();
        assert!(matches!(never, WhenError::Never { .. }));
    }

    #[test]
    fn what_is_not_a_time_is_refused_and_never_half_read() {
        for bad in [
            "",
            "yesterday",
            "2026-06-04",
            "2026-06-04 UTC",
            "04/06/2026 14:31:59 UTC",
            "2026-13-04 14:31:59 UTC",
            "2026-06-31 14:31:59 UTC",
            "2026-06-04 25:31:59 UTC",
            "2026-06-04 14:31:60 UTC",
            "2026-06-04 14:31:5 UTC",
            "2026-06-04 14:31:59UTC+2",
            "2026-06-04 14:31:59 UTC now",
            "2026-06-04 14:31:59 +99:00",
            "2026-06-04 14:31:59 CET",
            "2026-06-04 14:31:59 Mars/Olympus",
            "2026-06-04 14:31:59.1234567 UTC",
            "2026-06-04 14:31:59 ü/ü",
            "２０26-06-04 14:31:59 UTC",
        ] {
            assert!(read(bad, "UTC").is_err(), "{bad}");
        }
    }

    #[test]
    fn distance_is_told_in_one_unit() {
        let now: Timestamp = "2026-06-04T14:41:59Z".parse().unwrap();
        let at = |text: &str| relative(text.parse().unwrap(), now);
        assert_eq!(at("2026-06-04T14:41:59.9Z"), "now");
        assert_eq!(at("2026-06-04T14:41:00Z"), "59s ago");
        assert_eq!(at("2026-06-04T16:41:59Z"), "in 2h");
        assert_eq!(at("2026-06-01T14:41:59Z"), "3d ago");
    }
}
