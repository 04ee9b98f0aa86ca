//! Which names belong into a backup, by the directory they stand in. Pure.

use crate::backup::scan::RelationSegment;
use crate::postgres::relation::{Fork, RelationFile, is_temporary_relation};

/// DEFAULTTABLESPACE_OID and GLOBALTABLESPACE_OID (src/include/catalog/pg_tablespace.dat).
const PG_DEFAULT: u32 = 1663;
const PG_GLOBAL: u32 = 1664;

/// excludeDirContents: their content is worthless after a restart, or dangerous in a copy.
const KEPT_EMPTY: [&[u8]; 7] =
    [b"pg_stat_tmp", b"pg_replslot", b"pg_dynshmem", b"pg_notify", b"pg_serial", b"pg_snapshots", b"pg_subtrans"];

/// excludeFiles, of which pg_internal.init counts as a prefix.
const EXCLUDED_FILES: [&[u8]; 7] = [
    b"postgresql.auto.conf.tmp",
    b"current_logfiles.tmp",
    b"backup_label",
    b"tablespace_map",
    b"backup_manifest",
    b"postmaster.pid",
    b"postmaster.opts",
];
const EXCLUDED_PREFIXES: [&[u8]; 2] = [b"pg_internal.init", b"pgsql_tmp"];

/// What without which no server starts from a backup. The rest at the top level is kept empty or is not PostgreSQL's.
const NEEDED: [&[u8]; 9] = [
    b"base",
    b"global",
    b"pg_xact",
    b"pg_multixact",
    b"pg_commit_ts",
    b"pg_logical",
    b"pg_twophase",
    b"pg_tblspc",
    b"PG_VERSION",
];

/// What a directory is to PostgreSQL, which decides what its names mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Room {
    Top,
    Global,
    /// `base`.
    Databases,
    /// A database's directory in a tablespace.
    Database {
        tablespace: u32,
        database: u32,
    },
    /// `pg_tblspc`.
    TablespaceFolder,
    /// `pg_tblspc/<oid>`: one directory per major release and catalog version, of which one is this cluster's.
    Tablespace(u32),
    /// The directory of this release in a tablespace.
    TablespaceVersion(u32),
    /// `pg_wal`.
    Wal,
    /// Kept empty.
    Emptied,
    Other,
}

impl Room {
    pub fn below(self, name: &[u8], version_directory: &[u8]) -> Room {
        match self {
            Room::Top if is_kept_empty(name) && name == b"pg_wal" => Room::Wal,
            Room::Top if is_kept_empty(name) => Room::Emptied,
            Room::Top => match name {
                b"global" => Room::Global,
                b"base" => Room::Databases,
                b"pg_tblspc" => Room::TablespaceFolder,
                _ => Room::Other,
            },
            Room::Databases => database_room(PG_DEFAULT, name),
            Room::TablespaceFolder => oid(name).map_or(Room::Other, Room::Tablespace),
            Room::Tablespace(tablespace) if name == version_directory => Room::TablespaceVersion(tablespace),
            Room::TablespaceVersion(tablespace) => database_room(tablespace, name),
            _ => Room::Other,
        }
    }

    /// Whether a name in this directory is passed over without a word.
    pub fn excludes(self, name: &[u8], version_directory: &[u8]) -> bool {
        match self {
            Room::Emptied => true,
            Room::Tablespace(_) => name != version_directory,
            _ => {
                EXCLUDED_FILES.contains(&name)
                    || EXCLUDED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
                    || (self == Room::Global && name == b"pg_control")
                    || (self.holds_relations() && is_temporary_relation(name))
            }
        }
    }

    pub fn holds_relations(self) -> bool {
        matches!(self, Room::Global | Room::Database { .. })
    }

    pub fn relation(self, name: &[u8]) -> Option<RelationSegment> {
        let (tablespace, database) = match self {
            Room::Global => (PG_GLOBAL, 0),
            Room::Database { tablespace, database } => (tablespace, database),
            _ => return None,
        };
        RelationFile::parse(name).map(|file| RelationSegment { tablespace, database, file })
    }

    /// Whether a symbolic link of this name would take the place of something that a restored server needs.
    pub fn needs_no_links(self, name: &[u8]) -> bool {
        match self {
            Room::Top => NEEDED.contains(&name),
            Room::Global
            | Room::Databases
            | Room::Database { .. }
            | Room::Tablespace(_)
            | Room::TablespaceVersion(_) => true,
            _ => false,
        }
    }
}

fn database_room(tablespace: u32, name: &[u8]) -> Room {
    oid(name).map_or(Room::Other, |database| Room::Database { tablespace, database })
}

/// Whether a directory at the top level is kept without its content.
pub(super) fn is_kept_empty(name: &[u8]) -> bool {
    name == b"pg_wal" || KEPT_EMPTY.contains(&name)
}

/// The number of an unlogged relation, from the name of its init fork.
pub(super) fn unlogged(name: &[u8]) -> Option<u32> {
    RelationFile::parse(name).filter(|file| file.fork == Fork::Init).map(|file| file.number)
}

pub(super) fn oid(name: &[u8]) -> Option<u32> {
    let file = RelationFile::parse(name)?;
    (file.fork == Fork::Main && !name.contains(&b'.')).then_some(file.number)
}
