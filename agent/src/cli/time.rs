//! Points in time as people write them. A zone is required: a restore to an hour beside the wanted one is a disaster
//! after the disaster.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TimeError {
    #[error("\"{text}\" is not a time\nHINT: write it as 2026-06-04 14:31:59 UTC, or with an offset or a zone's name.")]
    Syntax { text: String },
    #[error(
        "\"{text}\" has no time zone\nHINT: it could be \"{utc}\", or on this host's clock \"{local}\" ({local_in_utc}); say which."
    )]
    NoZone { text: String, utc: String, local: String, local_in_utc: String },
    #[error(
        "\"{zone}\" is not a time zone this host knows\nHINT: use UTC, an offset such as +02:00, or a name such as Europe/Berlin."
    )]
    Zone { zone: String },
    #[error(
        "\"{text}\" happens {how} where the clock changes: {readings}\nHINT: give the offset instead of the zone's name."
    )]
    ClockChange { text: String, how: &'static str, readings: String },
}

/// Reads a time with a zone; `host` is the zone that people at this host think in.
pub fn parse(text: &str, host: &TimeZone) -> Result<Timestamp, TimeError> {
    let text = text.trim();
    // With an offset or a Z, in ISO 8601 as Postgres and RFC 3339 write it.
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    if let Ok(at) = text.parse::<Zoned>() {
        return Ok(at.timestamp());
    }
    if let Ok(civil) = text.parse::<DateTime>() {
        return Err(no_zone(text, civil, host));
    }
    let syntax = || TimeError::Syntax { text: text.to_owned() };
    let (civil, zone) = text.rsplit_once(char::is_whitespace).ok_or_else(syntax)?;
    let civil: DateTime = civil.trim_end().parse().map_err(|_| syntax())?;
    let zone = self::zone(zone)?;
    let ambiguous = zone.to_ambiguous_timestamp(civil);
    ambiguous.unambiguous().map_err(|_| clock_change(text, &zone, civil))
}

/// A span of time with its units: `90s`, `5m`, `1h30m`.
pub fn duration(text: &str) -> Result<std::time::Duration, String> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit() || b"hms".contains(&byte));
    let read = text.parse::<jiff::SignedDuration>().ok().filter(|_| is_plain);
    let read = read.and_then(|span| std::time::Duration::try_from(span).ok());
    read.ok_or_else(|| format!("\"{text}\" is not a duration: write it with units, for example 90s, 10m or 1h30m"))
}

/// This host's zone, for [`parse`].
pub fn host_zone() -> TimeZone {
    TimeZone::system()
}

fn zone(text: &str) -> Result<TimeZone, TimeError> {
    let unknown = || TimeError::Zone { zone: text.to_owned() };
    if matches!(text, "UTC" | "utc" | "Z" | "z" | "GMT") {
        return Ok(TimeZone::UTC);
    }
    if text.starts_with(['+', '-']) {
        // "+02", "+0200" and "+02:00", by the reader of times.
        let example = format!("2000-01-01T00:00:00{text}").parse::<Timestamp>().map_err(|_| unknown())?;
        let epoch = jiff::civil::date(2000, 1, 1).at(0, 0, 0, 0).to_zoned(TimeZone::UTC).map_err(|_| unknown())?;
        let seconds = epoch.timestamp().as_second() - example.as_second();
        let seconds = i32::try_from(seconds).map_err(|_| unknown())?;
        return jiff::tz::Offset::from_seconds(seconds).map(TimeZone::fixed).map_err(|_| unknown());
    }
    // Abbreviations are not unique (IST is three zones), and "EST" would be taken for one that has no summer time.
    if !text.contains('/') {
        return Err(unknown());
    }
    TimeZone::get(text).map_err(|_| unknown())
}

fn no_zone(text: &str, civil: DateTime, host: &TimeZone) -> TimeError {
    let utc = format!("{} UTC", plain(civil));
    match host.to_zoned(civil) {
        Ok(local) => TimeError::NoZone {
            text: text.to_owned(),
            utc,
            local: format!("{}{}", plain(civil), local.strftime("%:z")),
            local_in_utc: format!("{} UTC", plain(TimeZone::UTC.to_datetime(local.timestamp()))),
        },
        Err(_) => TimeError::Syntax { text: text.to_owned() },
    }
}

fn clock_change(text: &str, zone: &TimeZone, civil: DateTime) -> TimeError {
    use jiff::tz::AmbiguousOffset;
    let (how, before, after) = match zone.to_ambiguous_timestamp(civil).offset() {
        AmbiguousOffset::Gap { before, after } => ("never", before, after),
        AmbiguousOffset::Fold { before, after } => ("twice", before, after),
        AmbiguousOffset::Unambiguous { .. } => return TimeError::Syntax { text: text.to_owned() },
    };
    TimeError::ClockChange { text: text.to_owned(), how, readings: format!("at offset {before} or {after}") }
}

fn plain(civil: DateTime) -> String {
    civil.strftime("%Y-%m-%d %H:%M:%S%.f").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_usual_way_to_write_one_moment_is_read_alike() {
        let moment: Timestamp = "2026-06-04T14:31:59Z".parse().unwrap();
        for text in [
            "2026-06-04 14:31:59 UTC",
            "2026-06-04T14:31:59Z",
            "2026-06-04 14:31:59+00",
            "2026-06-04 16:31:59+02:00",
            "2026-06-04 16:31:59 +02:00",
            "2026-06-04 16:31:59 +0200",
            "2026-06-04 09:31:59 -05",
            "2026-06-04 16:31:59 Europe/Berlin",
            "2026-06-04T16:31:59+02:00[Europe/Berlin]",
        ] {
            assert_eq!(parse(text, &TimeZone::UTC).unwrap(), moment, "{text}");
        }
        let fraction = parse("2026-06-04 14:31:59.123456+00", &TimeZone::UTC).unwrap();
        assert_eq!(fraction.as_microsecond() % 1_000_000, 123_456);
    }

    #[test]
    fn durations_have_units() {
        use std::time::Duration;
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        for bad in ["", "5", "-5m", "5 minutes", "PT5M", "m", "5x", "99999999999999999999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_time_without_a_zone_is_refused_with_both_readings() {
        let host = TimeZone::get("Europe/Berlin").unwrap();
        let message = parse("2026-06-04 14:31:59", &host).unwrap_err().to_string();
        for part in ["2026-06-04 14:31:59 UTC", "2026-06-04 14:31:59+02:00", "2026-06-04 12:31:59 UTC"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn what_is_ambiguous_or_unknown_is_refused() {
        let parse = |text| parse(text, &TimeZone::UTC);
        assert!(matches!(parse("2026-10-25 02:30:00 Europe/Berlin"), Err(TimeError::ClockChange { how: "twice", .. })));
        assert!(matches!(parse("2026-03-29 02:30:00 Europe/Berlin"), Err(TimeError::ClockChange { how: "never", .. })));
        assert!(matches!(parse("2026-06-04 14:31:59 EST"), Err(TimeError::Zone { .. })));
        assert!(matches!(parse("2026-06-04 14:31:59 Mars/Base"), Err(TimeError::Zone { .. })));
        for text in ["", "now", "yesterday UTC", "2026-13-04 14:31:59 UTC", "14:31:59 UTC"] {
            assert!(matches!(parse(text), Err(TimeError::Syntax { .. })), "{text}");
        }
    }
}
