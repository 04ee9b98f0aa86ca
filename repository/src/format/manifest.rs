//! Manifests: what a backup is, sealed; and the parts of its file list, chunks in metadata packs.

use bytes::Bytes;
use prost::Message;
use walfleet_proto::repository::v1 as wire;

use crate::crypto::DomainKey;
use crate::format::clear::ObjectKind;
use crate::format::file_map::{ChunkPlace, MapError, PackTable, pack_ids, place_from_wire};
use crate::format::sealed::{Compressor, SealedError, SealedObject, SealedWriter};
use crate::ids::{BackupId, ClusterName, IdError};
use crate::postgres::{Branch, Lsn, ParseError, SegmentSize, SystemId, Timeline, WalBranch};

/// File entries of one part of the list: a few hundred KiB encoded.
pub const FILES_PER_PART: usize = 2048;

/// File maps may have overlays.
pub const FEATURE_OVERLAYS: u32 = 1;

/// Features of the format that this program reads, by number.
const KNOWN_FEATURES: &[u32] = &[FEATURE_OVERLAYS];

/// What a backup is, but for its files.
#[derive(Clone, PartialEq, Debug)]
pub struct Manifest {
    pub backup: BackupId,
    pub cluster: ClusterName,
    pub server_version_num: u32,
    pub wal: WalBranch,
    /// Redo position of the starting checkpoint: the first WAL a restore needs.
    pub start_lsn: Lsn,
    /// Restoring up to here makes the backup consistent.
    pub stop_lsn: Lsn,
    /// The source server's clock, microseconds since the Unix epoch.
    pub started_at_us: i64,
    pub stopped_at_us: i64,
    pub segment_size: SegmentSize,
    pub block_bytes: u32,
    pub catalog_version: u32,
    pub control_version: u32,
    pub data_checksums: bool,
    pub group_access: bool,
    pub member: String,
    /// "primary" or "standby".
    pub member_role: String,
    pub tool_version: String,
    pub backup_label: Bytes,
    pub tablespace_map: Bytes,
    pub tablespaces: Vec<Tablespace>,
    /// Settings that recovery needs to be at least as large, by name.
    pub recovery_settings: Vec<(String, u32)>,
    pub file_list: Vec<ChunkPlace>,
    pub file_count: u64,
    /// Some file map has pages laid over its slots.
    pub has_overlays: bool,
    /// global/pg_control: read last, written last.
    pub control_file: FileEntry,
    /// The first hundred; the reference part has their number.
    pub damaged_pages: Vec<DamagedPages>,
    pub counters: Counters,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tablespace {
    pub oid: u32,
    /// On the source host; empty for an in-place tablespace.
    pub location: String,
}

/// Pages that were wrong at every reading.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DamagedPages {
    pub path: String,
    /// Block numbers within the whole relation fork.
    pub blocks: Vec<u32>,
}

/// What a backup cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    pub cluster_bytes: u64,
    pub files: u64,
    pub read_bytes: u64,
    pub new_bytes: u64,
    pub stored_bytes: u64,
    pub new_packs: u64,
    pub store_requests: u64,
    /// Slots that were other than the parent's though no WAL says so.
    pub unexplained_slots: u64,
    pub read_scope: ReadScope,
}

/// Whether a backup read only what changed, or why everything. No more than this is told in the clear.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReadScope {
    /// By a version that did not say, or that knows more reasons than this one.
    #[default]
    Unknown,
    Changes,
    /// There was no backup to compare with.
    AllFirst,
    AllAsked,
    /// The parent is of another system, checksum setting or timeline, or ended later.
    AllOtherHistory,
    /// What some WAL since the parent changed is not known.
    AllWalNotKnown,
    /// The parent found more damaged pages than it names.
    AllDamage,
    /// The parent is a backup of the cluster that this one is a copy of.
    AllCopy,
}

impl ReadScope {
    /// Why everything was read, in words; `None`: it was not, or nobody said.
    pub fn read_all_because(self) -> Option<&'static str> {
        match self {
            ReadScope::Unknown | ReadScope::Changes => None,
            ReadScope::AllFirst => Some("there was no backup to compare with"),
            ReadScope::AllAsked => Some("it was asked for"),
            ReadScope::AllOtherHistory => {
                Some("the parent backup is of another system, checksum setting or timeline, or ended later")
            }
            ReadScope::AllWalNotKnown => Some("what some WAL since the parent backup changed is not known"),
            ReadScope::AllDamage => Some("the parent backup found more damaged pages than it names"),
            ReadScope::AllCopy => Some("the parent backup is of the cluster that this one is a copy of"),
        }
    }

    fn to_wire(self) -> wire::ReadScope {
        match self {
            ReadScope::Unknown => wire::ReadScope::Unspecified,
            ReadScope::Changes => wire::ReadScope::Changes,
            ReadScope::AllFirst => wire::ReadScope::AllFirst,
            ReadScope::AllAsked => wire::ReadScope::AllAsked,
            ReadScope::AllOtherHistory => wire::ReadScope::AllOtherHistory,
            ReadScope::AllWalNotKnown => wire::ReadScope::AllWalNotKnown,
            ReadScope::AllDamage => wire::ReadScope::AllDamage,
            ReadScope::AllCopy => wire::ReadScope::AllCopy,
        }
    }

    fn from_wire(scope: wire::ReadScope) -> ReadScope {
        match scope {
            wire::ReadScope::Unspecified => ReadScope::Unknown,
            wire::ReadScope::Changes => ReadScope::Changes,
            wire::ReadScope::AllFirst => ReadScope::AllFirst,
            wire::ReadScope::AllAsked => ReadScope::AllAsked,
            wire::ReadScope::AllOtherHistory => ReadScope::AllOtherHistory,
            wire::ReadScope::AllWalNotKnown => ReadScope::AllWalNotKnown,
            wire::ReadScope::AllDamage => ReadScope::AllDamage,
            wire::ReadScope::AllCopy => ReadScope::AllCopy,
        }
    }
}

/// One file or directory of the backup.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileEntry {
    /// Relative, '/' as separator; tablespaces as `pg_tblspc/<oid>/…`.
    pub path: Bytes,
    pub kind: EntryKind,
    pub mode: u32,
    pub mtime_us: i64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EntryKind {
    Directory,
    /// `crc32c`: `None` if the file was not read whole.
    File {
        size: u64,
        crc32c: Option<u32>,
        content: Content,
    },
}

/// Where a file's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    Empty,
    /// Zero throughout; not stored.
    Zero,
    /// One chunk holds it all.
    Chunk(ChunkPlace),
    /// The chunk holds an encoded file map.
    Map(ChunkPlace),
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ManifestError {
    #[error("manifest: {0}")]
    Sealed(#[from] SealedError),
    #[error("{what} does not decode: {reason}")]
    Decode { what: &'static str, reason: String },
    #[error(
        "the manifest needs feature {0} of the format, which this program does not know\nHINT: use a newer walfleet."
    )]
    Feature(u32),
    #[error("{what}: {source}")]
    Map { what: &'static str, source: MapError },
    #[error("manifest: {0}")]
    Id(#[from] IdError),
    #[error("manifest: {0}")]
    Parse(#[from] ParseError),
    #[error("file entry {path:?}: {problem}")]
    Entry { path: String, problem: &'static str },
}

impl Manifest {
    pub fn seal(&self, domain: &DomainKey, key: &str, zstd: &mut Compressor) -> Result<Bytes, SealedError> {
        let writer = SealedWriter::new(domain, ObjectKind::Manifest, Some(key), 64 << 10)?;
        writer.finish(&self.to_wire().encode_to_vec(), zstd)
    }

    pub fn open(bytes: Bytes, domain: &DomainKey, key: &str) -> Result<Manifest, ManifestError> {
        let object = SealedObject::open(bytes, domain, ObjectKind::Manifest, Some(key))?;
        let decoded = wire::Manifest::decode(&object.directory[..])
            .map_err(|e| ManifestError::Decode { what: "manifest", reason: e.to_string() })?;
        Manifest::from_wire(decoded)
    }

    fn to_wire(&self) -> wire::Manifest {
        let mut packs = PackTable::default();
        let file_list = self.file_list.iter().map(|place| packs.place(place)).collect();
        let control_file = entry_to_wire(&self.control_file, &mut packs);
        wire::Manifest {
            backup: self.backup.to_string(),
            cluster: self.cluster.to_string(),
            required_features: self.has_overlays.then_some(FEATURE_OVERLAYS).into_iter().collect(),
            system_identifier: self.wal.system_id.0,
            server_version_num: self.server_version_num,
            timeline: self.wal.timeline.0,
            branch: Bytes::copy_from_slice(&self.wal.branch.0),
            start_lsn: self.start_lsn.0,
            stop_lsn: self.stop_lsn.0,
            started_at_us: self.started_at_us,
            stopped_at_us: self.stopped_at_us,
            wal_segment_bytes: self.segment_size.bytes(),
            block_bytes: self.block_bytes,
            catalog_version: self.catalog_version,
            control_version: self.control_version,
            data_checksums: self.data_checksums,
            group_access: self.group_access,
            member: self.member.clone(),
            member_role: self.member_role.clone(),
            tool_version: self.tool_version.clone(),
            backup_label: self.backup_label.clone(),
            tablespace_map: self.tablespace_map.clone(),
            tablespaces: self
                .tablespaces
                .iter()
                .map(|t| wire::Tablespace { oid: t.oid, location: t.location.clone() })
                .collect(),
            recovery_settings: self.recovery_settings.iter().cloned().collect(),
            packs: packs.into_wire(),
            file_list,
            file_count: self.file_count,
            control_file: Some(control_file),
            damaged_pages: self
                .damaged_pages
                .iter()
                .map(|d| wire::DamagedPages { path: d.path.clone(), blocks: d.blocks.clone() })
                .collect(),
            counters: Some(self.counters.to_wire()),
        }
    }

    fn from_wire(m: wire::Manifest) -> Result<Manifest, ManifestError> {
        if let Some(feature) = m.required_features.iter().find(|feature| !KNOWN_FEATURES.contains(feature)) {
            return Err(ManifestError::Feature(*feature));
        }
        let map = |source| ManifestError::Map { what: "manifest", source };
        let packs = pack_ids(&m.packs).map_err(map)?;
        let missing = |problem| ManifestError::Entry { path: "global/pg_control".into(), problem };
        let control_file = entry_from_wire(m.control_file.ok_or(missing("missing"))?, &packs)?;
        Ok(Manifest {
            backup: m.backup.parse()?,
            cluster: m.cluster.parse()?,
            server_version_num: m.server_version_num,
            wal: WalBranch {
                system_id: SystemId(m.system_identifier),
                timeline: Timeline::new(m.timeline)?,
                branch: branch_from_wire(&m.branch)?,
            },
            start_lsn: Lsn(m.start_lsn),
            stop_lsn: Lsn(m.stop_lsn),
            started_at_us: m.started_at_us,
            stopped_at_us: m.stopped_at_us,
            segment_size: SegmentSize::new(u64::from(m.wal_segment_bytes))?,
            block_bytes: m.block_bytes,
            catalog_version: m.catalog_version,
            control_version: m.control_version,
            data_checksums: m.data_checksums,
            group_access: m.group_access,
            member: m.member,
            member_role: m.member_role,
            tool_version: m.tool_version,
            backup_label: m.backup_label,
            tablespace_map: m.tablespace_map,
            tablespaces: m.tablespaces.into_iter().map(|t| Tablespace { oid: t.oid, location: t.location }).collect(),
            recovery_settings: {
                let mut settings: Vec<_> = m.recovery_settings.into_iter().collect();
                settings.sort();
                settings
            },
            file_list: m
                .file_list
                .iter()
                .map(|place| place_from_wire(place, &packs))
                .collect::<Result<_, _>>()
                .map_err(map)?,
            file_count: m.file_count,
            has_overlays: m.required_features.contains(&FEATURE_OVERLAYS),
            control_file,
            damaged_pages: m
                .damaged_pages
                .into_iter()
                .map(|d| DamagedPages { path: d.path, blocks: d.blocks })
                .collect(),
            counters: Counters::from_wire(m.counters.unwrap_or_default()),
        })
    }
}

pub(crate) fn branch_from_wire(bytes: &[u8]) -> Result<Branch, ManifestError> {
    let branch = bytes
        .try_into()
        .map_err(|_| ManifestError::Decode { what: "branch", reason: format!("{} bytes, expected 8", bytes.len()) })?;
    Ok(Branch(branch))
}

impl Counters {
    pub(crate) fn to_wire(self) -> wire::Counters {
        wire::Counters {
            cluster_bytes: self.cluster_bytes,
            files: self.files,
            read_bytes: self.read_bytes,
            new_bytes: self.new_bytes,
            stored_bytes: self.stored_bytes,
            new_packs: self.new_packs,
            store_requests: self.store_requests,
            unexplained_slots: self.unexplained_slots,
            read_scope: self.read_scope.to_wire().into(),
        }
    }

    pub(crate) fn from_wire(c: wire::Counters) -> Counters {
        Counters {
            cluster_bytes: c.cluster_bytes,
            files: c.files,
            read_bytes: c.read_bytes,
            new_bytes: c.new_bytes,
            stored_bytes: c.stored_bytes,
            new_packs: c.new_packs,
            store_requests: c.store_requests,
            unexplained_slots: c.unexplained_slots,
            // prost gives the default for a number that it does not know.
            read_scope: ReadScope::from_wire(c.read_scope()),
        }
    }
}

/// Encodes a part of the file list.
pub fn encode_part(files: &[FileEntry]) -> Vec<u8> {
    let mut packs = PackTable::default();
    let files = files.iter().map(|entry| entry_to_wire(entry, &mut packs)).collect();
    wire::FileListPart { packs: packs.into_wire(), files }.encode_to_vec()
}

pub fn decode_part(bytes: &[u8]) -> Result<Vec<FileEntry>, ManifestError> {
    let what = "file list part";
    let part = wire::FileListPart::decode(bytes).map_err(|e| ManifestError::Decode { what, reason: e.to_string() })?;
    let packs = pack_ids(&part.packs).map_err(|source| ManifestError::Map { what, source })?;
    part.files.into_iter().map(|entry| entry_from_wire(entry, &packs)).collect()
}

fn entry_to_wire(entry: &FileEntry, packs: &mut PackTable) -> wire::FileEntry {
    use wire::file_entry::Content as W;
    let mut result = wire::FileEntry {
        path: entry.path.clone(),
        mode: entry.mode,
        mtime_us: entry.mtime_us,
        ..wire::FileEntry::default()
    };
    match &entry.kind {
        EntryKind::Directory => result.set_kind(wire::FileKind::Directory),
        EntryKind::File { size, crc32c, content } => {
            result.set_kind(wire::FileKind::Regular);
            result.size = *size;
            result.crc32c = crc32c.unwrap_or_default();
            result.crc32c_unknown = crc32c.is_none();
            result.content = match content {
                Content::Empty => None,
                Content::Zero => Some(W::Zero(true)),
                Content::Chunk(place) => Some(W::Chunk(packs.place(place))),
                Content::Map(place) => Some(W::Map(packs.place(place))),
            };
        }
    }
    result
}

fn entry_from_wire(entry: wire::FileEntry, packs: &[crate::ids::PackId]) -> Result<FileEntry, ManifestError> {
    use wire::file_entry::Content as W;
    let bad = |problem| ManifestError::Entry { path: String::from_utf8_lossy(&entry.path).into_owned(), problem };
    // A path comes back onto a disk: it must stay below the data directory whatever the manifest says.
    let safe = entry.path.split(|b| *b == b'/').all(|part| !part.is_empty() && part != b"." && part != b"..");
    if !safe || entry.path.contains(&0) {
        return Err(bad("the path leaves the data directory"));
    }
    let map = |source| ManifestError::Map { what: "file entry", source };
    let kind = match entry.kind() {
        wire::FileKind::Directory => EntryKind::Directory,
        wire::FileKind::Regular => {
            let content = match &entry.content {
                None => Content::Empty,
                Some(W::Zero(_)) => Content::Zero,
                Some(W::Chunk(place)) => Content::Chunk(place_from_wire(place, packs).map_err(map)?),
                Some(W::Map(place)) => Content::Map(place_from_wire(place, packs).map_err(map)?),
            };
            let consistent = match content {
                Content::Empty => entry.size == 0,
                Content::Chunk(place) => u64::from(place.frame.raw_len) == entry.size,
                Content::Zero | Content::Map(_) => true,
            };
            if !consistent {
                return Err(bad("its size is not that of its content"));
            }
            let crc32c = (!entry.crc32c_unknown).then_some(entry.crc32c);
            EntryKind::File { size: entry.size, crc32c, content }
        }
        wire::FileKind::Unspecified => return Err(bad("it is neither file nor directory")),
    };
    Ok(FileEntry { path: entry.path, kind, mode: entry.mode & 0o7777, mtime_us: entry.mtime_us })
}

/// The order of the file list: by the bytes of whole paths.
pub fn path_order(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
    a.cmp(b)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::format::file_map::ShortId;
    use crate::format::sealed::FramePlace;
    use crate::ids::PackId;

    fn entry(path: &str, pack: u8) -> FileEntry {
        let frame = FramePlace { offset: 96, stored_len: 50, raw_len: 8192 };
        let place = ChunkPlace { pack: PackId([pack; 32]), frame, id: ShortId([pack; 16]) };
        FileEntry {
            path: Bytes::copy_from_slice(path.as_bytes()),
            kind: EntryKind::File { size: 8192, crc32c: Some(7), content: Content::Chunk(place) },
            mode: 0o600,
            mtime_us: 5,
        }
    }

    pub(crate) fn manifest() -> Manifest {
        Manifest {
            backup: BackupId::generate(),
            cluster: "orders".parse().unwrap(),
            server_version_num: 180_006,
            wal: WalBranch { system_id: SystemId(7), timeline: Timeline(2), branch: Branch([1; 8]) },
            start_lsn: Lsn(16),
            stop_lsn: Lsn(32),
            started_at_us: 1,
            stopped_at_us: 2,
            segment_size: SegmentSize::DEFAULT,
            block_bytes: 8192,
            catalog_version: 3,
            control_version: 1800,
            data_checksums: true,
            group_access: false,
            member: "pg1".into(),
            member_role: "primary".into(),
            tool_version: "0.1.0".into(),
            backup_label: Bytes::from_static(b"START"),
            tablespace_map: Bytes::new(),
            tablespaces: vec![Tablespace { oid: 16400, location: "/ts".into() }],
            recovery_settings: vec![("max_connections".into(), 100)],
            file_list: Vec::new(),
            file_count: 2,
            has_overlays: true,
            control_file: entry("global/pg_control", 3),
            damaged_pages: vec![DamagedPages { path: "base/1/2".into(), blocks: vec![1, 9] }],
            counters: Counters { cluster_bytes: 1, read_scope: ReadScope::AllAsked, ..Counters::default() },
        }
    }

    #[test]
    fn a_manifest_reads_back_as_sealed_and_only_under_its_own_key() {
        let key = DomainKey::generate().unwrap();
        let manifest = manifest();
        let bytes = manifest.seal(&key, "clusters/orders/backups/x", &mut Compressor::new(3)).unwrap();
        assert_eq!(Manifest::open(bytes.clone(), &key, "clusters/orders/backups/x").unwrap(), manifest);
        assert!(Manifest::open(bytes, &key, "clusters/orders/backups/y").is_err());
    }

    #[test]
    fn a_path_that_leaves_the_data_directory_is_refused() {
        for bad in ["../x", "/etc/passwd", "a//b", "a/./b", "", "a/..", "a\0b"] {
            let part = encode_part(&[entry(bad, 1)]);
            assert!(matches!(decode_part(&part), Err(ManifestError::Entry { .. })), "{bad:?}");
        }
        let good = vec![entry("base/1/2", 1), entry("base/1/3", 2)];
        assert_eq!(decode_part(&encode_part(&good)).unwrap(), good);
    }

    #[test]
    fn paths_are_ordered_by_their_bytes() {
        let mut paths: Vec<&[u8]> = vec![b"base/1.x", b"base/1/2", b"base", b"base/1", b"global"];
        paths.sort_by(|a, b| path_order(a, b));
        assert_eq!(paths, [&b"base"[..], b"base/1", b"base/1.x", b"base/1/2", b"global"]);
    }
}
