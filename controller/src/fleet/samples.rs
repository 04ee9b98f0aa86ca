//! What tests of several modules take as seen of an agent; they say what is different.

use std::collections::BTreeMap;

use walfleet_repository::ids::RecipientId;
use walfleet_repository::postgres::Lsn;

use super::observed::{HelloObserved, InstanceObserved, InstanceRole, StreamObserved, StreamPhase};
use super::recovery::{BackupSummary, WalGap};

/// A primary of which nothing is archived yet.
pub fn instance(cluster: &str, system_identifier: u64) -> InstanceObserved {
    InstanceObserved {
        cluster: cluster.to_owned(),
        system_identifier,
        server_version_num: 170_000,
        role: InstanceRole::Primary,
        data_dir: format!("/data/{system_identifier}"),
        port: 5432,
        timeline: 1,
        current_lsn: None,
        cluster_bytes: 0,
        data_checksums: true,
        archive: None,
        windows: vec![],
        backups: vec![],
        problems: vec![],
        tablespaces: BTreeMap::new(),
    }
}

/// A stream that has brought nothing yet.
pub fn stream() -> StreamObserved {
    StreamObserved {
        phase: StreamPhase::Streaming,
        problem: String::new(),
        store_error: String::new(),
        received_lsn: None,
        complete_until: None,
        pieces: 0,
        segments: 0,
        piece_interval_ms: 1000,
        synchronous: "off".to_owned(),
        spool: None,
    }
}

/// Of the WAL of [`instance`] `(…, 7)`, from one position to another; nobody has said anything of it.
pub fn gap((from, to): (u64, u64), timeline: u32) -> WalGap {
    WalGap {
        timeline,
        branch: String::new(),
        from_lsn: Lsn(from),
        to_lsn: Lsn(to),
        acknowledged: false,
        from: None,
        to: None,
        recorded: None,
        acknowledgement: None,
        system_identifier: 7,
    }
}

pub fn hello() -> HelloObserved {
    HelloObserved {
        version: "1".to_owned(),
        incarnation: "a".to_owned(),
        hostname: "h".to_owned(),
        labels: BTreeMap::new(),
        recipient: RecipientId([1; 32]),
        capabilities: vec![],
        spool_address: None,
    }
}

/// A committed backup on timeline 1 of cluster orders.
pub fn backup(id: &str, system_identifier: u64, start_lsn: Lsn) -> BackupSummary {
    BackupSummary {
        id: id.parse().expect("an id"),
        cluster: "orders".parse().expect("a name"),
        system_identifier,
        server_version_num: 170_000,
        timeline: 1,
        start_lsn: Some(start_lsn),
        stop_lsn: Some(start_lsn),
        started_at: None,
        finished_at: None,
        member: "db1".to_owned(),
        parents: vec![],
        cluster_bytes: 0,
        read_bytes: 0,
        new_bytes: 0,
        stored_bytes: 0,
        damaged_pages: 0,
        state: "committed".to_owned(),
        store_requests: 0,
        unexplained_slots: 0,
        read_all_because: String::new(),
    }
}
