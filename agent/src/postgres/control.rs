//! The control file, `global/pg_control` (ControlFileData, src/include/catalog/pg_control.h).
//!
//! It is read while the server may be writing it, so it is believed only with a right checksum.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use walfleet_repository::checksum;
use walfleet_repository::postgres::{Lsn, SegmentSize, SystemId, Timeline};

use super::bytes;
use super::wal_record::WalLevel;

/// PG_CONTROL_FILE_SIZE.
const FILE_BYTES: usize = 8192;
/// A server writes the file within microseconds; only damage looks torn for longer (get_controlfile,
/// src/common/controldata_utils.c, tries as often).
const ATTEMPTS: u32 = 10;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(10);

/// DBState.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ClusterState {
    StartingUp,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    /// Running, or not shut down properly.
    InProduction,
}

/// The settings that a server in hot standby needs at least as large as they were where the WAL was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecoverySettings {
    pub max_connections: u32,
    pub max_worker_processes: u32,
    pub max_wal_senders: u32,
    pub max_prepared_transactions: u32,
    pub max_locks_per_transaction: u32,
}

impl RecoverySettings {
    /// With the names of their settings.
    pub fn named(&self) -> [(&'static str, u32); 5] {
        [
            ("max_connections", self.max_connections),
            ("max_worker_processes", self.max_worker_processes),
            ("max_wal_senders", self.max_wal_senders),
            ("max_prepared_transactions", self.max_prepared_transactions),
            ("max_locks_per_transaction", self.max_locks_per_transaction),
        ]
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ControlFile {
    pub system_id: SystemId,
    pub control_version: u32,
    pub catalog_version: u32,
    pub state: ClusterState,
    /// Seconds since the Unix epoch, by the server's clock.
    pub modified_at: i64,
    pub checkpoint_lsn: Lsn,
    /// Where recovery would begin.
    pub redo_lsn: Lsn,
    /// Of the last checkpoint.
    pub timeline: Timeline,
    pub full_page_writes: bool,
    /// How far recovery must replay before the cluster is consistent; `None` outside archive recovery.
    pub min_recovery: Option<(Lsn, Timeline)>,
    /// Set while recovery from a backup has not reached the backup's end.
    pub backup_start_lsn: Option<Lsn>,
    pub backup_end_lsn: Option<Lsn>,
    pub backup_end_required: bool,
    pub wal_level: Option<WalLevel>,
    pub wal_log_hints: bool,
    pub recovery_settings: RecoverySettings,
    pub block_bytes: u32,
    /// Of a relation's file, in blocks.
    pub blocks_per_segment: u32,
    pub wal_segment_size: SegmentSize,
    pub data_checksums: bool,
}

/// The control file with the very bytes it was read from, for a backup to store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ControlCopy {
    pub file: ControlFile,
    pub bytes: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("read {}\nHINT: is this a PostgreSQL data directory, and may the agent's user read it?", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {fault}", path.display())]
    Content { path: PathBuf, fault: ControlFault },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ControlFault {
    #[error("a control file has {FILE_BYTES} bytes, this one {0}")]
    Length(usize),
    #[error(
        "control file version {0} is unknown\nHINT: walfleet knows 1300, 1700 and 1800, those of PostgreSQL 13 to 18."
    )]
    Version(u32),
    #[error(
        "control file version {0} has its bytes in the other order\nHINT: it comes from a machine of another architecture."
    )]
    ByteOrder(u32),
    #[error(
        "the checksum is {found:08x}, should be {expected:08x}, at every reading\nHINT: the file is damaged; restore from a backup."
    )]
    Checksum { expected: u32, found: u32 },
    #[error("{what} is {found}, which is impossible")]
    Value { what: &'static str, found: u64 },
}

impl ControlFile {
    /// Blocking, a tenth of a second at most.
    pub fn read(data_dir: &Path) -> Result<ControlFile, ControlError> {
        ControlCopy::read(data_dir).map(|copy| copy.file)
    }

    /// Of releases 13 to 18, whose layouts differ only in where the checksum stands.
    pub fn parse(content: &[u8]) -> Result<ControlFile, ControlFault> {
        if content.len() != FILE_BYTES {
            return Err(ControlFault::Length(content.len()));
        }
        let fields = Fields(content);
        let control_version = fields.u32(8);
        let crc_offset = match control_version {
            1300 | 1700 => 288,
            // default_char_signedness came in before it.
            1800 => 292,
            other if other != 0 && other.is_multiple_of(65_536) => return Err(ControlFault::ByteOrder(other)),
            other => return Err(ControlFault::Version(other)),
        };
        let found = fields.u32(crc_offset);
        let expected = checksum::crc32c(content.get(..crc_offset).unwrap_or_default());
        if found != expected {
            return Err(ControlFault::Checksum { expected, found });
        }
        fields.read(control_version)
    }
}

impl ControlCopy {
    /// Blocking, a tenth of a second at most.
    pub fn read(data_dir: &Path) -> Result<ControlCopy, ControlError> {
        let path = data_dir.join("global").join("pg_control");
        let mut attempt = 1;
        loop {
            let bytes = match std::fs::read(&path) {
                Ok(bytes) => bytes,
                Err(source) => return Err(ControlError::Read { path, source }),
            };
            match ControlFile::parse(&bytes) {
                Ok(file) => return Ok(ControlCopy { file, bytes }),
                // A torn file shows by its checksum; the server never changes the rest.
                Err(ControlFault::Checksum { .. } | ControlFault::Length(_)) if attempt < ATTEMPTS => {
                    attempt += 1;
                    std::thread::sleep(BETWEEN_ATTEMPTS);
                }
                Err(fault) => return Err(ControlError::Content { path, fault }),
            }
        }
    }
}

/// The file's content; its length has been checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        bytes::u32_at(self.0, at).unwrap_or_default()
    }

    fn u64(&self, at: usize) -> u64 {
        bytes::u64_at(self.0, at).unwrap_or_default()
    }

    fn flag(&self, at: usize) -> bool {
        bytes::u8_at(self.0, at).is_some_and(|byte| byte != 0)
    }

    fn lsn(&self, at: usize) -> Option<Lsn> {
        Some(Lsn(self.u64(at))).filter(|lsn| *lsn != Lsn::INVALID)
    }

    /// Offsets by offsetof() with the headers of 14, 16, 17 and 18; compared with pg_controldata of all six releases.
    fn read(&self, control_version: u32) -> Result<ControlFile, ControlFault> {
        let impossible = |what, found: u32| ControlFault::Value { what, found: found.into() };
        let segment_bytes = self.u32(228);
        let wal_segment_size = SegmentSize::new(segment_bytes.into());
        let block_bytes = self.u32(216);
        if !block_bytes.is_power_of_two() || !(1 << 10..=1 << 15).contains(&block_bytes) {
            return Err(impossible("the block size", block_bytes));
        }
        let blocks_per_segment = self.u32(220);
        if blocks_per_segment == 0 {
            return Err(impossible("the relation segment size", blocks_per_segment));
        }
        let min_recovery_timeline = Timeline::new(self.u32(144)).ok();
        Ok(ControlFile {
            system_id: SystemId(self.u64(0)),
            control_version,
            catalog_version: self.u32(12),
            state: self.state()?,
            modified_at: self.u64(24).cast_signed(),
            checkpoint_lsn: Lsn(self.u64(32)),
            redo_lsn: Lsn(self.u64(40)),
            timeline: Timeline::new(self.u32(48)).map_err(|_| impossible("the timeline", 0))?,
            full_page_writes: self.flag(56),
            min_recovery: self.lsn(136).zip(min_recovery_timeline),
            backup_start_lsn: self.lsn(152),
            backup_end_lsn: self.lsn(160),
            backup_end_required: self.flag(168),
            wal_level: WalLevel::from_code(self.u32(172)),
            wal_log_hints: self.flag(176),
            recovery_settings: RecoverySettings {
                max_connections: self.u32(180),
                max_worker_processes: self.u32(184),
                max_wal_senders: self.u32(188),
                max_prepared_transactions: self.u32(192),
                max_locks_per_transaction: self.u32(196),
            },
            block_bytes,
            blocks_per_segment,
            wal_segment_size: wal_segment_size.map_err(|_| impossible("the WAL segment size", segment_bytes))?,
            data_checksums: self.u32(252) != 0,
        })
    }

    fn state(&self) -> Result<ClusterState, ControlFault> {
        Ok(match self.u32(16) {
            0 => ClusterState::StartingUp,
            1 => ClusterState::ShutDown,
            2 => ClusterState::ShutDownInRecovery,
            3 => ClusterState::ShuttingDown,
            4 => ClusterState::InCrashRecovery,
            5 => ClusterState::InArchiveRecovery,
            6 => ClusterState::InProduction,
            other => return Err(ControlFault::Value { what: "the cluster state", found: other.into() }),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::test_server::{TestServer, installations};
    use super::*;

    /// A control file of `version`, otherwise with the values of a usual cluster, its checksum right.
    fn control_file(version: u32) -> Vec<u8> {
        let mut content = vec![0; FILE_BYTES];
        let mut put = |at: usize, value: u32| content[at..at + 4].copy_from_slice(&value.to_le_bytes());
        for (at, value) in [(8, version), (16, 6), (48, 1), (172, 1), (216, 8192), (220, 131_072), (228, 16 << 20)] {
            put(at, value);
        }
        seal(&mut content, version);
        content
    }

    fn seal(content: &mut [u8], version: u32) {
        let offset = if version == 1800 { 292 } else { 288 };
        let crc = checksum::crc32c(&content[..offset]);
        content[offset..offset + 4].copy_from_slice(&crc.to_le_bytes());
    }

    #[test]
    fn unknown_versions_wrong_checksums_and_impossible_values_are_refused() {
        for version in [1300, 1700, 1800] {
            assert_eq!(ControlFile::parse(&control_file(version)).unwrap().control_version, version);
        }
        for version in [0, 1201, 1301, 1900] {
            assert_eq!(ControlFile::parse(&control_file(version)), Err(ControlFault::Version(version)));
        }
        let swapped = 1300u32.swap_bytes();
        assert_eq!(ControlFile::parse(&control_file(swapped)), Err(ControlFault::ByteOrder(swapped)));
        assert_eq!(ControlFile::parse(&[0; 300]), Err(ControlFault::Length(300)));
        let mut torn = control_file(1800);
        torn[100] ^= 1;
        assert!(matches!(ControlFile::parse(&torn), Err(ControlFault::Checksum { .. })));
        for at in [16, 48, 216, 220, 228] {
            let mut impossible = control_file(1700);
            impossible[at..at + 4].copy_from_slice(if at == 48 || at == 220 { &[0; 4] } else { &[9, 9, 9, 9] });
            seal(&mut impossible, 1700);
            assert!(matches!(ControlFile::parse(&impossible), Err(ControlFault::Value { .. })), "offset {at}");
        }
    }

    #[test]
    fn a_torn_file_is_read_again_until_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("global").join("pg_control");
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        let whole = control_file(1800);
        std::fs::write(&path, &whole[..4096]).unwrap();
        let writer = std::thread::spawn({
            let (path, whole) = (path.clone(), whole.clone());
            move || {
                std::thread::sleep(3 * BETWEEN_ATTEMPTS);
                std::fs::write(path, whole).unwrap();
            }
        });
        assert_eq!(ControlCopy::read(dir.path()).unwrap().bytes, whole);
        writer.join().unwrap();
        std::fs::write(&path, &whole[..4096]).unwrap();
        let error = ControlFile::read(dir.path()).unwrap_err();
        assert!(matches!(error, ControlError::Content { fault: ControlFault::Length(4096), .. }), "{error}");
    }

    #[test]
    fn it_reads_as_pg_controldata_prints_it() {
        for installation in installations() {
            let settings = "max_connections=33\nmax_worker_processes=5\nmax_prepared_transactions=7\n\
                max_locks_per_transaction=77\nwal_level=logical\nwal_log_hints=on";
            let server = TestServer::start(&installation, &["--wal-segsize=4", "-k"], settings);
            server.stop("fast");
            let file = ControlFile::read(&server.data_dir).unwrap();
            if !installation.has("pg_controldata") {
                continue;
            }
            let text = installation.run("pg_controldata", &[&server.data_dir.display().to_string()]);
            let printed: HashMap<&str, &str> =
                text.lines().filter_map(|line| line.split_once(':')).map(|(key, value)| (key, value.trim())).collect();
            let set = file.recovery_settings;
            let expected = [
                ("pg_control version number", file.control_version.to_string()),
                ("Catalog version number", file.catalog_version.to_string()),
                ("Database system identifier", file.system_id.to_string()),
                ("Latest checkpoint location", file.checkpoint_lsn.to_string()),
                ("Latest checkpoint's REDO location", file.redo_lsn.to_string()),
                ("Latest checkpoint's TimeLineID", file.timeline.to_string()),
                ("max_connections setting", set.max_connections.to_string()),
                ("max_worker_processes setting", set.max_worker_processes.to_string()),
                ("max_wal_senders setting", set.max_wal_senders.to_string()),
                ("max_prepared_xacts setting", set.max_prepared_transactions.to_string()),
                ("max_locks_per_xact setting", set.max_locks_per_transaction.to_string()),
                ("Database block size", file.block_bytes.to_string()),
                ("Blocks per segment of large relation", file.blocks_per_segment.to_string()),
                ("Bytes per WAL segment", file.wal_segment_size.bytes().to_string()),
                ("Data page checksum version", u32::from(file.data_checksums).to_string()),
            ];
            for (key, value) in expected {
                assert_eq!(printed.get(key), Some(&value.as_str()), "{key}, release {}", installation.major);
            }
            assert_eq!((file.state, file.wal_log_hints), (ClusterState::ShutDown, true));
            assert_eq!((file.wal_level, file.min_recovery, set.max_connections), (Some(WalLevel::Logical), None, 33));
        }
    }
}
