//! `walfleet.recovery.v1`: targets, windows, backups.

use walfleet_proto::recovery::v1 as pb;
use walfleet_repository::postgres::Timeline;

use super::{WireError, bounded, lsn_in, lsn_out, required_lsn_in, required_time_in, time_in, time_out};
use crate::fleet::recovery::{BackupSummary, GapNote, RecoveryRange, RecoveryWindow, WalGap};
use crate::jobs::target::{Edge, RecoveryTarget, Stop, TargetAction, TimelineChoice};

pub fn window_in(window: pb::RecoveryWindow) -> Result<RecoveryWindow, WireError> {
    Ok(RecoveryWindow {
        repository: bounded(window.repository),
        as_of: required_time_in("as_of_us", window.as_of_us)?,
        ranges: window.ranges.into_iter().map(range_in).collect::<Result<_, _>>()?,
        gaps: window.gaps.into_iter().map(gap_in).collect::<Result<_, _>>()?,
        filled: window.filled.into_iter().map(gap_in).collect::<Result<_, _>>()?,
        newest_commit: time_in("newest_commit_us", window.newest_commit_us)?,
        newest_lsn: lsn_in("newest_lsn", &window.newest_lsn)?,
        newest_timeline: window.newest_timeline,
    })
}

fn range_in(range: pb::RecoveryRange) -> Result<RecoveryRange, WireError> {
    Ok(RecoveryRange {
        from: time_in("ranges.from_us", range.from_us)?,
        to: time_in("ranges.to_us", range.to_us)?,
        from_lsn: required_lsn_in("ranges.from_lsn", &range.from_lsn)?,
        to_lsn: required_lsn_in("ranges.to_lsn", &range.to_lsn)?,
        timeline: range.timeline,
        branch: bounded(range.branch),
    })
}

fn gap_in(gap: pb::WalGap) -> Result<WalGap, WireError> {
    Ok(WalGap {
        timeline: gap.timeline,
        branch: bounded(gap.branch),
        from_lsn: required_lsn_in("gaps.from_lsn", &gap.from_lsn)?,
        to_lsn: required_lsn_in("gaps.to_lsn", &gap.to_lsn)?,
        acknowledged: gap.acknowledged,
        from: time_in("gaps.from_us", gap.from_us)?,
        to: time_in("gaps.to_us", gap.to_us)?,
        recorded: gap.recorded.map(note_in).transpose()?,
        acknowledgement: gap.acknowledgement.map(note_in).transpose()?,
        system_identifier: gap.system_identifier,
    })
}

fn note_in(note: pb::GapNote) -> Result<GapNote, WireError> {
    let at = required_time_in("gaps.at_us", note.at_us)?;
    Ok(GapNote { by: bounded(note.by), at, reason: bounded(note.reason) })
}

pub fn gap_out(gap: &WalGap) -> pb::WalGap {
    pb::WalGap {
        timeline: gap.timeline,
        branch: gap.branch.clone(),
        from_lsn: gap.from_lsn.to_string(),
        to_lsn: gap.to_lsn.to_string(),
        acknowledged: gap.acknowledged,
        from_us: time_out(gap.from),
        to_us: time_out(gap.to),
        recorded: gap.recorded.as_ref().map(note_out),
        acknowledgement: gap.acknowledgement.as_ref().map(note_out),
        system_identifier: gap.system_identifier,
    }
}

fn note_out(note: &GapNote) -> pb::GapNote {
    pb::GapNote { by: note.by.clone(), at_us: note.at.as_microsecond(), reason: note.reason.clone() }
}

pub fn window_out(window: &RecoveryWindow) -> pb::RecoveryWindow {
    pb::RecoveryWindow {
        repository: window.repository.clone(),
        as_of_us: window.as_of.as_microsecond(),
        ranges: window
            .ranges
            .iter()
            .map(|range| pb::RecoveryRange {
                from_us: time_out(range.from),
                to_us: time_out(range.to),
                from_lsn: range.from_lsn.to_string(),
                to_lsn: range.to_lsn.to_string(),
                timeline: range.timeline,
                branch: range.branch.clone(),
            })
            .collect(),
        gaps: window.gaps.iter().map(gap_out).collect(),
        filled: window.filled.iter().map(gap_out).collect(),
        newest_commit_us: time_out(window.newest_commit),
        newest_lsn: lsn_out(window.newest_lsn),
        newest_timeline: window.newest_timeline,
    }
}

pub fn backup_in(backup: pb::BackupSummary) -> Result<BackupSummary, WireError> {
    Ok(BackupSummary {
        id: backup.id.parse().map_err(|error| WireError::new("id", error))?,
        cluster: backup.cluster.parse().map_err(|error| WireError::new("cluster", error))?,
        system_identifier: backup.system_identifier,
        server_version_num: backup.server_version_num,
        timeline: backup.timeline,
        start_lsn: lsn_in("start_lsn", &backup.start_lsn)?,
        stop_lsn: lsn_in("stop_lsn", &backup.stop_lsn)?,
        started_at: time_in("started_at_us", backup.started_at_us)?,
        finished_at: time_in("finished_at_us", backup.finished_at_us)?,
        member: bounded(backup.member),
        parents: backup.parents.into_iter().map(bounded).collect(),
        cluster_bytes: backup.cluster_bytes,
        read_bytes: backup.read_bytes,
        new_bytes: backup.new_bytes,
        stored_bytes: backup.stored_bytes,
        damaged_pages: backup.damaged_pages,
        state: bounded(backup.state),
        store_requests: backup.store_requests,
        unexplained_slots: backup.unexplained_slots,
        read_all_because: bounded(backup.read_all_because),
    })
}

pub fn backup_out(backup: &BackupSummary) -> pb::BackupSummary {
    pb::BackupSummary {
        id: backup.id.to_string(),
        cluster: backup.cluster.to_string(),
        system_identifier: backup.system_identifier,
        server_version_num: backup.server_version_num,
        timeline: backup.timeline,
        start_lsn: lsn_out(backup.start_lsn),
        stop_lsn: lsn_out(backup.stop_lsn),
        started_at_us: time_out(backup.started_at),
        finished_at_us: time_out(backup.finished_at),
        member: backup.member.clone(),
        parents: backup.parents.clone(),
        cluster_bytes: backup.cluster_bytes,
        read_bytes: backup.read_bytes,
        new_bytes: backup.new_bytes,
        stored_bytes: backup.stored_bytes,
        damaged_pages: backup.damaged_pages,
        state: backup.state.clone(),
        store_requests: backup.store_requests,
        unexplained_slots: backup.unexplained_slots,
        read_all_because: backup.read_all_because.clone(),
    }
}

/// Absent: the end of the WAL that the repository holds.
pub fn target_in(target: Option<pb::RecoveryTarget>) -> Result<RecoveryTarget, WireError> {
    use pb::recovery_target::Kind;
    let target = target.unwrap_or_default();
    let edge = if target.exclusive { Edge::Before } else { Edge::After };
    let stop = match target.kind {
        Some(Kind::TimeUs(micros)) => Stop::Time { at: required_time_in("time_us", micros)?, edge },
        Some(Kind::Lsn(text)) => Stop::Lsn { at: required_lsn_in("lsn", &text)?, edge },
        Some(Kind::Xid(xid)) if xid < 3 => {
            // src/include/access/transam.h: FirstNormalTransactionId.
            return Err(WireError::new("xid", format!("{xid} is no transaction's id: they begin at 3")));
        }
        Some(Kind::Xid(xid)) => Stop::Xid { xid, edge },
        Some(Kind::Name(name)) => {
            // src/include/access/xlog_internal.h: MAXFNAMELEN is 64, the terminating zero included.
            if name.is_empty() || name.len() > 63 || name.contains('\0') {
                return Err(WireError::new("name", format!("{name:?} is no restore point's name: 1 to 63 bytes")));
            }
            Stop::Name(name)
        }
        Some(Kind::Immediate(_)) => Stop::Immediate,
        Some(Kind::Latest(_)) | None => Stop::Latest,
    };
    if target.exclusive && !matches!(stop, Stop::Time { .. } | Stop::Lsn { .. } | Stop::Xid { .. }) {
        let problem = "only a time, an LSN and a transaction id can be stopped before\nHINT: leave --exclusive out.";
        return Err(WireError::new("exclusive", problem));
    }
    let timeline = timeline_in(&target.timeline)?;
    let action = match target.action.as_str() {
        "" | "promote" => TargetAction::Promote,
        "pause" => TargetAction::Pause,
        "shutdown" => TargetAction::Shutdown,
        other => return Err(WireError::new("action", format!("{other:?} is not promote, pause or shutdown"))),
    };
    Ok(RecoveryTarget { stop, timeline, action })
}

/// Empty: the latest.
pub fn timeline_in(text: &str) -> Result<TimelineChoice, WireError> {
    Ok(match text {
        "" | "latest" => TimelineChoice::Latest,
        "current" => TimelineChoice::Current,
        branch if branch.contains('-') => {
            TimelineChoice::Branch(branch.parse().map_err(|error| WireError::new("timeline", error))?)
        }
        number => number
            .parse::<u32>()
            .ok()
            .and_then(|number| Timeline::new(number).ok())
            .map(TimelineChoice::Number)
            .ok_or_else(|| {
                WireError::new("timeline", format!("{number:?} is not latest, current, a number or a branch"))
            })?,
    })
}

pub fn timeline_out(timeline: TimelineChoice) -> String {
    match timeline {
        TimelineChoice::Latest => "latest".to_owned(),
        TimelineChoice::Current => "current".to_owned(),
        TimelineChoice::Number(timeline) => timeline.0.to_string(),
        TimelineChoice::Branch(name) => name.to_string(),
    }
}

pub fn target_out(target: &RecoveryTarget) -> pb::RecoveryTarget {
    use pb::recovery_target::Kind;
    let (kind, edge) = match &target.stop {
        Stop::Time { at, edge } => (Kind::TimeUs(at.as_microsecond()), *edge),
        Stop::Lsn { at, edge } => (Kind::Lsn(at.to_string()), *edge),
        Stop::Xid { xid, edge } => (Kind::Xid(*xid), *edge),
        Stop::Name(name) => (Kind::Name(name.clone()), Edge::After),
        Stop::Immediate => (Kind::Immediate(true), Edge::After),
        Stop::Latest => (Kind::Latest(true), Edge::After),
    };
    pb::RecoveryTarget {
        kind: Some(kind),
        exclusive: edge == Edge::Before,
        timeline: timeline_out(target.timeline),
        action: match target.action {
            TargetAction::Promote => "promote",
            TargetAction::Pause => "pause",
            TargetAction::Shutdown => "shutdown",
        }
        .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_comes_out_as_it_went_in_and_nonsense_is_refused() {
        use pb::recovery_target::Kind;
        let target = |kind, exclusive| pb::RecoveryTarget {
            kind: Some(kind),
            exclusive,
            timeline: "latest".to_owned(),
            action: "promote".to_owned(),
        };
        for good in [
            target(Kind::TimeUs(1_780_000_000_000_000), true),
            target(Kind::Lsn("0/3000060".to_owned()), false),
            target(Kind::Xid(742), true),
            target(Kind::Name("before_migration".to_owned()), false),
            target(Kind::Immediate(true), false),
            pb::RecoveryTarget { timeline: "7".to_owned(), ..target(Kind::Latest(true), false) },
            pb::RecoveryTarget { timeline: "7-0f3c".to_owned(), ..target(Kind::Latest(true), false) },
        ] {
            assert_eq!(target_in(Some(good.clone())).map(|parsed| target_out(&parsed)), Ok(good));
        }
        for bad in [
            target(Kind::TimeUs(i64::MAX), false),
            target(Kind::Lsn("3000060".to_owned()), false),
            target(Kind::Xid(0), false),
            target(Kind::Name(String::new()), false),
            target(Kind::Latest(true), true),
            pb::RecoveryTarget { timeline: "0".to_owned(), ..target(Kind::Latest(true), false) },
            pb::RecoveryTarget { timeline: "7-xyz".to_owned(), ..target(Kind::Latest(true), false) },
            pb::RecoveryTarget { action: "explode".to_owned(), ..target(Kind::Latest(true), false) },
        ] {
            assert!(target_in(Some(bad.clone())).is_err(), "{bad:?}");
        }
    }
}
