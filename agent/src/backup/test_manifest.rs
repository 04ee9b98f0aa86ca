//! A manifest for tests, which say what matters to them.

use bytes::Bytes;
use walfleet_repository::format::manifest::{Counters, EntryKind, FileEntry, Manifest};
use walfleet_repository::postgres::{Lsn, SegmentSize, WalBranch};

/// Of a cluster without files.
pub(super) fn test_manifest(wal: WalBranch, start_lsn: Lsn, stop_lsn: Lsn) -> Manifest {
    Manifest {
        backup: "bk_a".parse().expect("a backup's name"),
        cluster: "orders".parse().expect("a cluster's name"),
        server_version_num: 180_000,
        wal,
        start_lsn,
        stop_lsn,
        started_at_us: 1,
        stopped_at_us: 2,
        segment_size: SegmentSize::DEFAULT,
        block_bytes: 8192,
        catalog_version: 1,
        control_version: 1800,
        data_checksums: true,
        group_access: false,
        member: "db1".to_owned(),
        member_role: "primary".to_owned(),
        tool_version: "0".to_owned(),
        backup_label: Bytes::new(),
        tablespace_map: Bytes::new(),
        tablespaces: Vec::new(),
        recovery_settings: Vec::new(),
        file_list: Vec::new(),
        file_count: 0,
        has_overlays: false,
        control_file: FileEntry { path: Bytes::new(), kind: EntryKind::Directory, mode: 0, mtime_us: 0 },
        damaged_pages: Vec::new(),
        counters: Counters::default(),
    }
}
