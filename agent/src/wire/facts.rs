//! Facts about this host's instances, outward.

use walfleet_proto::agent::v1 as proto;
use walfleet_proto::recovery::v1 as recovery;

use super::outcome::backup_summary;
use super::{path_text, text_of};
use crate::facts::{ArchiveFacts, Facts, GapNote, InstanceFacts, InstanceRole, RecoveryWindow, StreamFacts, WalGap};
use crate::wal::receive::SpoolStatus;

pub(super) fn facts(facts: &Facts) -> proto::Facts {
    proto::Facts { at_us: facts.at.as_microsecond(), instances: facts.instances.iter().map(instance).collect() }
}

fn instance(instance: &InstanceFacts) -> proto::InstanceFacts {
    let role = match instance.role {
        InstanceRole::Primary => proto::InstanceRole::Primary,
        InstanceRole::Standby => proto::InstanceRole::Standby,
        InstanceRole::Down => proto::InstanceRole::Down,
    };
    proto::InstanceFacts {
        cluster: text_of(&instance.cluster),
        system_identifier: instance.system_identifier,
        server_version_num: instance.server_version_num,
        role: role.into(),
        data_dir: path_text(&instance.data_dir),
        port: instance.port.into(),
        timeline: instance.timeline,
        current_lsn: text_of(&instance.current_lsn),
        cluster_bytes: instance.cluster_bytes,
        data_checksums: instance.data_checksums,
        archive: Some(archive(&instance.archive)),
        windows: instance.windows.iter().map(window).collect(),
        backups: instance.backups.iter().map(backup_summary).collect(),
        problems: instance.problems.clone(),
        tablespaces: instance
            .tablespaces
            .iter()
            .map(|tablespace| proto::Tablespace {
                oid: tablespace.oid,
                name: tablespace.name.clone(),
                location: path_text(&tablespace.location),
            })
            .collect(),
    }
}

fn stream(stream: &StreamFacts) -> proto::StreamFacts {
    proto::StreamFacts {
        phase: stream.phase.word().to_owned(),
        problem: stream.phase.problem().unwrap_or_default().to_owned(),
        store_error: stream.store_error.clone().unwrap_or_default(),
        received_lsn: text_of(&stream.received_lsn),
        complete_until_us: stream.complete_until.map_or(0, jiff::Timestamp::as_microsecond),
        pieces: stream.pieces,
        segments: stream.segments,
        piece_interval_ms: stream.piece_interval_ms,
        synchronous: stream.synchronous.to_string(),
        spool: stream.spool.as_ref().map(spool),
    }
}

fn spool(spool: &SpoolStatus) -> proto::SpoolFacts {
    proto::SpoolFacts {
        peer: spool.peer.clone().unwrap_or_default(),
        waits_for: spool.waits_for.word().to_owned(),
        problem: spool.problem.clone().unwrap_or_default(),
        written_lsn: spool.written.to_string(),
        held_bytes: spool.held_bytes,
    }
}

fn archive(archive: &ArchiveFacts) -> proto::ArchiveFacts {
    proto::ArchiveFacts {
        last_segment: archive.last_segment.clone().unwrap_or_default(),
        durable_lsn: text_of(&archive.durable_lsn),
        quiet_from_lsn: text_of(&archive.quiet_from),
        durable_timeline: archive.durable_timeline.map_or(0, |timeline| timeline.0),
        durable_at_us: archive.durable_at.map_or(0, jiff::Timestamp::as_microsecond),
        ready_segments: archive.ready_segments,
        failed_count: archive.failed_count,
        last_error: archive.last_error.clone().unwrap_or_default(),
        pg_wal_bytes: archive.pg_wal_bytes,
        pg_wal_free_bytes: archive.pg_wal_free_bytes,
        archive_command_set: archive.archive_command_set,
        stream: Some(stream(&archive.stream)),
        // 0 says that nothing accumulates.
        pg_wal_full_in_seconds: archive.pg_wal_full_in_seconds.map_or(0, |seconds| seconds.max(1)),
        requests_last_hour: archive.last_hour.requests,
        stored_bytes_last_hour: archive.last_hour.stored_bytes,
    }
}

fn window(window: &RecoveryWindow) -> recovery::RecoveryWindow {
    recovery::RecoveryWindow {
        repository: window.repository.clone(),
        as_of_us: window.as_of.as_microsecond(),
        ranges: window
            .ranges
            .iter()
            .map(|range| recovery::RecoveryRange {
                from_us: range.from.map_or(0, jiff::Timestamp::as_microsecond),
                to_us: range.to.map_or(0, jiff::Timestamp::as_microsecond),
                from_lsn: range.from_lsn.to_string(),
                to_lsn: range.to_lsn.to_string(),
                timeline: range.timeline.0,
                branch: range.branch.to_string(),
            })
            .collect(),
        gaps: window.gaps.iter().map(gap).collect(),
        filled: window.filled.iter().map(gap).collect(),
        newest_commit_us: window.newest_commit.map_or(0, jiff::Timestamp::as_microsecond),
        newest_lsn: text_of(&window.newest_lsn),
        newest_timeline: window.newest_timeline.map_or(0, |timeline| timeline.0),
    }
}

fn gap(gap: &WalGap) -> recovery::WalGap {
    recovery::WalGap {
        timeline: gap.timeline.0,
        branch: gap.branch.to_string(),
        from_lsn: gap.from_lsn.to_string(),
        to_lsn: gap.to_lsn.to_string(),
        acknowledged: gap.acknowledged,
        from_us: gap.from.map_or(0, jiff::Timestamp::as_microsecond),
        to_us: gap.to.map_or(0, jiff::Timestamp::as_microsecond),
        recorded: gap.recorded.as_ref().map(note),
        acknowledgement: gap.acknowledgement.as_ref().map(note),
        system_identifier: gap.system_identifier,
    }
}

fn note(note: &GapNote) -> recovery::GapNote {
    recovery::GapNote { by: note.by.clone(), at_us: note.at.as_microsecond(), reason: note.reason.clone() }
}
