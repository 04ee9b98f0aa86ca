//! Facts about this host's instances, outward.

use walfleet_proto::agent::v1 as proto;
use walfleet_proto::recovery::v1 as recovery;

use super::outcome::backup_summary;
use super::{path_text, text_of};
use crate::facts::{ArchiveFacts, Facts, InstanceFacts, InstanceRole, RecoveryWindow};

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

fn archive(archive: &ArchiveFacts) -> proto::ArchiveFacts {
    proto::ArchiveFacts {
        last_segment: archive.last_segment.clone().unwrap_or_default(),
        durable_lsn: text_of(&archive.durable_lsn),
        durable_at_us: archive.durable_at.map_or(0, jiff::Timestamp::as_microsecond),
        ready_segments: archive.ready_segments,
        failed_count: archive.failed_count,
        last_error: archive.last_error.clone().unwrap_or_default(),
        pg_wal_bytes: archive.pg_wal_bytes,
        pg_wal_free_bytes: archive.pg_wal_free_bytes,
        archive_command_set: archive.archive_command_set,
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
        gaps: window
            .gaps
            .iter()
            .map(|gap| recovery::WalGap {
                timeline: gap.timeline.0,
                branch: gap.branch.to_string(),
                from_lsn: gap.from_lsn.to_string(),
                to_lsn: gap.to_lsn.to_string(),
                acknowledged: gap.acknowledged,
            })
            .collect(),
        newest_commit_us: window.newest_commit.map_or(0, jiff::Timestamp::as_microsecond),
        newest_lsn: text_of(&window.newest_lsn),
        newest_timeline: window.newest_timeline.map_or(0, |timeline| timeline.0),
    }
}
