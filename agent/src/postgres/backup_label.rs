//! What a `backup_label` says (build_backup_content, src/backend/access/transam/xlogbackup.c; before 15 in xlog.c). It is
//! only read here: the file itself is kept byte for byte.

use walfleet_repository::postgres::{Lsn, Timeline};

/// The server's role when the backup began.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum BackupSource {
    Primary,
    Standby,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupLabel {
    /// Redo position of the starting checkpoint: the first WAL a restore needs.
    pub start_lsn: Lsn,
    pub checkpoint_lsn: Lsn,
    /// Of the start, which may be an ancestor of the stop's.
    pub timeline: Timeline,
    pub source: BackupSource,
    pub label: String,
}

#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BackupLabelError {
    #[error("the backup label has no line \"{line}\"")]
    Missing { line: &'static str },
    #[error("the backup label says \"{line}: {found}\", which cannot be read")]
    Malformed { line: &'static str, found: String },
}

impl BackupLabel {
    pub fn parse(content: &[u8]) -> Result<BackupLabel, BackupLabelError> {
        let text = String::from_utf8_lossy(content);
        let find = |line: &'static str| {
            let value = |text: &str| text.strip_prefix(line)?.strip_prefix(": ").map(str::to_owned);
            text.lines().find_map(value).ok_or(BackupLabelError::Missing { line })
        };
        let malformed = |line, found: &str| BackupLabelError::Malformed { line, found: found.to_owned() };
        let position = |line| {
            let found = find(line)?;
            // "0/2000028 (file 000000010000000000000002)"
            let lsn = found.split(' ').next().and_then(|text| text.parse().ok());
            lsn.ok_or_else(|| malformed(line, &found))
        };
        let source = match find("BACKUP FROM")?.as_str() {
            "primary" | "master" => BackupSource::Primary,
            "standby" => BackupSource::Standby,
            other => return Err(malformed("BACKUP FROM", other)),
        };
        let timeline = find("START TIMELINE")?;
        let timeline = timeline.parse().ok().and_then(|id| Timeline::new(id).ok());
        Ok(BackupLabel {
            start_lsn: position("START WAL LOCATION")?,
            checkpoint_lsn: position("CHECKPOINT LOCATION")?,
            timeline: timeline
                .ok_or_else(|| malformed("START TIMELINE", &find("START TIMELINE").unwrap_or_default()))?,
            source,
            label: find("LABEL")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
        CHECKPOINT LOCATION: 0/2000060\n\
        BACKUP METHOD: streamed\n\
        BACKUP FROM: standby\n\
        START TIME: 2026-06-04 14:31:59 UTC\n\
        LABEL: walfleet bk_1: nightly\n\
        START TIMELINE: 3\n";

    #[test]
    fn a_label_tells_where_and_from_what_a_backup_began() {
        let label = BackupLabel::parse(LABEL.as_bytes()).unwrap();
        let expected = BackupLabel {
            start_lsn: Lsn(0x200_0028),
            checkpoint_lsn: Lsn(0x200_0060),
            timeline: Timeline(3),
            source: BackupSource::Standby,
            label: "walfleet bk_1: nightly".to_owned(),
        };
        assert_eq!(label, expected);
    }

    #[test]
    fn every_line_is_needed_and_must_read() {
        for line in ["START WAL LOCATION", "CHECKPOINT LOCATION", "BACKUP FROM", "LABEL", "START TIMELINE"] {
            let without: String =
                LABEL.lines().filter(|text| !text.starts_with(line)).map(|text| format!("{text}\n")).collect();
            assert_eq!(BackupLabel::parse(without.as_bytes()), Err(BackupLabelError::Missing { line }));
        }
        for (from, to) in [("0/2000028", "0-2000028"), ("TIMELINE: 3", "TIMELINE: 0"), ("standby", "nowhere")] {
            let error = BackupLabel::parse(LABEL.replace(from, to).as_bytes()).unwrap_err();
            assert!(matches!(error, BackupLabelError::Malformed { .. }), "{to}: {error}");
        }
        assert!(BackupLabel::parse(b"\xff\x00\xfe").is_err());
    }
}
