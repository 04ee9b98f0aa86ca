//! Windows, backups and targets.

use walfleet_proto::recovery::v1 as proto;

use super::{moment, number, text};
use crate::target::{Action, Stop, Target};
use crate::view::backup::Backup;
use crate::view::cluster::{Gap, GapNote, Range, Recovery};
use crate::view::server_version;
use crate::when;

impl From<proto::BackupSummary> for Backup {
    fn from(wire: proto::BackupSummary) -> Backup {
        let (started_at, finished_at) = (moment(wire.started_at_us), moment(wire.finished_at_us));
        let duration = started_at.zip(finished_at).map(|(start, end)| end.duration_since(start).as_secs_f64());
        Backup {
            id: wire.id,
            finished_at,
            read_bytes: wire.read_bytes,
            new_bytes: wire.new_bytes,
            stored_bytes: wire.stored_bytes,
            cluster: wire.cluster,
            state: wire.state,
            started_at,
            duration_seconds: duration.filter(|seconds| *seconds >= 0.0),
            cluster_bytes: wire.cluster_bytes,
            member: wire.member,
            server_version: number(wire.server_version_num).map(server_version),
            system_identifier: number(wire.system_identifier).map(|id| id.to_string()),
            timeline: wire.timeline,
            start_lsn: wire.start_lsn,
            stop_lsn: wire.stop_lsn,
            parents: wire.parents,
            damaged_pages: wire.damaged_pages,
            store_requests: wire.store_requests,
            unexplained_slots: wire.unexplained_slots,
            spared_bytes: wire.cluster_bytes.saturating_sub(wire.read_bytes),
            read_all_because: text(wire.read_all_because),
        }
    }
}

impl From<proto::WalGap> for Gap {
    fn from(wire: proto::WalGap) -> Gap {
        let note = |note: proto::GapNote| GapNote { by: note.by, at: moment(note.at_us), reason: note.reason };
        Gap {
            timeline: wire.timeline,
            from_lsn: wire.from_lsn,
            to_lsn: wire.to_lsn,
            acknowledged: wire.acknowledged,
            from: moment(wire.from_us),
            to: moment(wire.to_us),
            recorded: wire.recorded.map(note),
            acknowledgement: wire.acknowledgement.map(note),
        }
    }
}

/// The lag is the cluster's: the caller knows whether it is this repository's.
pub fn window(wire: proto::RecoveryWindow, lag_seconds: Option<f64>) -> Recovery {
    let range = |range: proto::RecoveryRange| Range {
        from: moment(range.from_us),
        to: moment(range.to_us),
        from_lsn: range.from_lsn,
        to_lsn: range.to_lsn,
        timeline: range.timeline,
    };
    Recovery {
        repository: wire.repository,
        as_of: moment(wire.as_of_us),
        ranges: wire.ranges.into_iter().map(range).collect(),
        gaps: wire.gaps.into_iter().map(Gap::from).collect(),
        filled: wire.filled.into_iter().map(Gap::from).collect(),
        lag_seconds,
        newest_commit_at: moment(wire.newest_commit_us),
        newest_lsn: text(wire.newest_lsn),
        newest_timeline: number(wire.newest_timeline),
    }
}

impl From<&Target> for proto::RecoveryTarget {
    fn from(target: &Target) -> proto::RecoveryTarget {
        use proto::recovery_target::Kind;
        let kind = match &target.stop {
            Stop::Time(at) => Kind::TimeUs(at.as_microsecond()),
            Stop::Lsn(lsn) => Kind::Lsn(lsn.to_string()),
            Stop::Xid(xid) => Kind::Xid(*xid),
            Stop::Name(name) => Kind::Name(name.clone()),
            Stop::Immediate => Kind::Immediate(true),
            Stop::Latest => Kind::Latest(true),
        };
        proto::RecoveryTarget {
            kind: Some(kind),
            exclusive: target.exclusive,
            timeline: target.timeline.clone().unwrap_or_default(),
            action: target.action.map(Action::word).unwrap_or_default().to_owned(),
        }
    }
}

/// A target as people read it.
pub fn target_text(wire: &proto::RecoveryTarget) -> String {
    use proto::recovery_target::Kind;
    let stop = match &wire.kind {
        Some(Kind::TimeUs(us)) => moment(*us).map_or_else(|| format!("time {us}"), when::precise),
        Some(Kind::Lsn(lsn)) => format!("LSN {lsn}"),
        Some(Kind::Xid(xid)) => format!("transaction {xid}"),
        Some(Kind::Name(name)) => format!("restore point {name}"),
        Some(Kind::Immediate(_)) => "as soon as it is consistent".to_owned(),
        Some(Kind::Latest(_)) | None => "the end of the stored WAL".to_owned(),
    };
    let exclusive = if wire.exclusive { ", just before it" } else { "" };
    let timeline = if wire.timeline.is_empty() { String::new() } else { format!(", timeline {}", wire.timeline) };
    let action = if wire.action.is_empty() { String::new() } else { format!(", then {}", wire.action) };
    format!("{stop}{exclusive}{timeline}{action}")
}
