//! What a server tells about itself. Each fact that needs a right of its own is left unknown without it, so that an
//! unprivileged agent still sees what it may.

use std::collections::HashMap;
use std::path::PathBuf;

use walfleet_repository::postgres::{Lsn, SegmentSize, SystemId, Timeline};

use super::{Server, ServerError, get, lsn};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ServerRole {
    Primary,
    /// In recovery: a standby, or a restored copy before its promotion.
    Standby,
}

#[derive(Clone, PartialEq, Debug)]
pub struct ServerFacts {
    pub version_num: u32,
    pub role: ServerRole,
    pub system_id: SystemId,
    pub catalog_version: u32,
    pub control_version: u32,
    pub timeline: Timeline,
    /// On a primary the end of WAL, on a standby what it has replayed.
    pub current_lsn: Lsn,
    pub wal_segment_size: SegmentSize,
    pub block_bytes: u32,
    pub data_checksums: bool,
    /// `None`: the role may not see it; see [`Rights`].
    pub data_directory: Option<PathBuf>,
    /// Outside the data directory on Debian; `None` as above.
    pub config_file: Option<PathBuf>,
    pub hba_file: Option<PathBuf>,
    /// Relative to the data directory unless absolute.
    pub log_directory: Option<PathBuf>,
    pub wal_level: String,
    pub full_page_writes: bool,
    pub archive: ArchiveSettings,
    pub archiver: Option<ArchiverState>,
    pub synchronous: SynchronousSettings,
    /// But for the two built-in ones.
    pub tablespaces: Vec<ServerTablespace>,
    /// The server's clock, microseconds since the Unix epoch.
    pub clock_us: i64,
}

#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct ArchiveSettings {
    /// "off", "on" or "always".
    pub mode: String,
    /// `None`: the role may not see it, or it is empty.
    pub command: Option<String>,
    /// Since 15; must not be set together with a command.
    pub library: Option<String>,
    /// 0: off.
    pub timeout_seconds: u32,
}

/// Whom commits wait for.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct SynchronousSettings {
    /// synchronous_standby_names
    pub standby_names: String,
    /// synchronous_commit, of sessions that do not say otherwise.
    pub commit: String,
    /// Of sessions of a role, in a database, or both, where that is set for them (ALTER ROLE, ALTER DATABASE).
    pub exceptions: Vec<SynchronousException>,
}

/// synchronous_commit of some sessions; `None`: of all roles, in all databases.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct SynchronousException {
    pub role: Option<String>,
    pub database: Option<String>,
    pub commit: String,
}

/// pg_stat_archiver. Times are microseconds since the Unix epoch.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct ArchiverState {
    pub archived_count: u64,
    pub last_archived: Option<(String, i64)>,
    pub failed_count: u64,
    pub last_failed: Option<(String, i64)>,
}

impl ArchiverState {
    /// Whether the newest attempt failed.
    pub fn is_failing(&self) -> bool {
        match (&self.last_failed, &self.last_archived) {
            (Some((_, failed_at)), Some((_, archived_at))) => failed_at > archived_at,
            (failed, _) => failed.is_some(),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServerTablespace {
    pub oid: u32,
    pub name: String,
    /// Relative to the data directory for in-place ones.
    pub location: PathBuf,
}

/// What the role may do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rights {
    pub user: String,
    pub superuser: bool,
    /// May stream WAL.
    pub replication: bool,
    /// The statements that a superuser must run before backups work; empty if all is well.
    pub missing_grants: Vec<String>,
}

const FACTS: &str = "read the server's state";

const STATE_SQL: &str = "SELECT pg_is_in_recovery(), \
    s.system_identifier, s.catalog_version_no, s.pg_control_version, \
    i.bytes_per_wal_segment, i.database_block_size, i.data_page_checksum_version <> 0, \
    CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_replay_lsn(), '0/0') ELSE pg_current_wal_insert_lsn() END, \
    (extract(epoch FROM clock_timestamp()) * 1000000)::bigint \
    FROM pg_control_system() s, pg_control_init() i";

/// On a primary the WAL's own names say it. On a standby the receiver knows first, then the point that recovery has
/// reached, then the last restart point; each lags the one before.
const TIMELINE_SQL: &str = "SELECT CASE WHEN pg_is_in_recovery() THEN greatest( \
      (SELECT received_tli FROM pg_stat_wal_receiver), \
      (SELECT min_recovery_end_timeline FROM pg_control_recovery()), \
      (SELECT timeline_id FROM pg_control_checkpoint())) END";

const SETTINGS_SQL: &str = "SELECT name, setting FROM pg_settings WHERE name IN \
    ('data_directory', 'config_file', 'hba_file', 'log_directory', 'wal_level', 'full_page_writes', \
     'archive_mode', 'archive_command', 'archive_library', 'archive_timeout', \
     'synchronous_standby_names', 'synchronous_commit')";

const ARCHIVER_SQL: &str = "SELECT archived_count, last_archived_wal, \
    (extract(epoch FROM last_archived_time) * 1000000)::bigint, failed_count, last_failed_wal, \
    (extract(epoch FROM last_failed_time) * 1000000)::bigint FROM pg_stat_archiver";

/// Settings lie there as they were typed, under the name that guc_tables.c has.
const EXCEPTIONS_SQL: &str = "SELECT rolname::text, datname::text, lower(split_part(said, '=', 2)) \
    FROM pg_db_role_setting CROSS JOIN unnest(setconfig) said \
    LEFT JOIN pg_roles ON pg_roles.oid = setrole LEFT JOIN pg_database ON pg_database.oid = setdatabase \
    WHERE split_part(said, '=', 1) = 'synchronous_commit' ORDER BY 1, 2";

/// Without pg_default and pg_global, which have no location.
const TABLESPACES_SQL: &str = "SELECT oid, spcname::text, pg_tablespace_location(oid) FROM pg_tablespace \
    WHERE oid NOT IN (1663, 1664) ORDER BY oid";

impl Server {
    pub async fn facts(&self) -> Result<ServerFacts, ServerError> {
        let row = self.one(FACTS, STATE_SQL, &[]).await?;
        let role = if get(&row, 0, FACTS)? { ServerRole::Standby } else { ServerRole::Primary };
        let settings = self.settings().await?;
        let setting = |name: &str| settings.get(name).cloned().filter(|value| !value.is_empty());
        let path = |name: &str| setting(name).map(PathBuf::from);
        Ok(ServerFacts {
            version_num: self.version_num(),
            role,
            // bigint, though the identifier is unsigned.
            system_id: SystemId(get::<i64>(&row, 1, FACTS)?.cast_unsigned()),
            catalog_version: get::<i32>(&row, 2, FACTS)?.cast_unsigned(),
            control_version: get::<i32>(&row, 3, FACTS)?.cast_unsigned(),
            timeline: self.timeline().await?,
            current_lsn: lsn(&row, 7, FACTS)?,
            wal_segment_size: segment_size(get(&row, 4, FACTS)?)?,
            block_bytes: get::<i32>(&row, 5, FACTS)?.cast_unsigned(),
            data_checksums: get(&row, 6, FACTS)?,
            data_directory: path("data_directory"),
            config_file: path("config_file"),
            hba_file: path("hba_file"),
            log_directory: path("log_directory"),
            wal_level: setting("wal_level").unwrap_or_default(),
            full_page_writes: setting("full_page_writes").is_none_or(|value| value == "on"),
            archive: ArchiveSettings {
                mode: setting("archive_mode").unwrap_or_default(),
                // What SHOW prints of a command that archive_mode = off makes pointless.
                command: setting("archive_command").filter(|command| command != "(disabled)"),
                library: setting("archive_library"),
                timeout_seconds: setting("archive_timeout").and_then(|value| value.parse().ok()).unwrap_or(0),
            },
            synchronous: SynchronousSettings {
                standby_names: setting("synchronous_standby_names").unwrap_or_default(),
                commit: setting("synchronous_commit").unwrap_or_default(),
                exceptions: self.synchronous_exceptions().await?,
            },
            archiver: self.archiver().await?,
            tablespaces: self.tablespaces().await?,
            clock_us: get(&row, 8, FACTS)?,
        })
    }

    /// The timeline that the server writes or replays.
    pub async fn timeline(&self) -> Result<Timeline, ServerError> {
        let operation = "read the timeline";
        let row = self.one(operation, TIMELINE_SQL, &[]).await?;
        let answer = |found: String| ServerError::Answer { operation, found, expected: "a timeline" };
        if let Some(id) = get::<Option<i32>>(&row, 0, operation)? {
            return Timeline::new(id.cast_unsigned()).map_err(|_| answer(id.to_string()));
        }
        // pg_walfile_name fails in recovery; a promotion between the two statements is no harm.
        let row = self.one(operation, "SELECT pg_walfile_name(pg_current_wal_insert_lsn())", &[]).await?;
        let name: String = get(&row, 0, operation)?;
        let id = name.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok());
        id.and_then(|id| Timeline::new(id).ok()).ok_or_else(|| answer(name))
    }

    async fn settings(&self) -> Result<HashMap<String, String>, ServerError> {
        let rows = self.all(FACTS, SETTINGS_SQL).await?;
        rows.iter().map(|row| Ok((get(row, 0, FACTS)?, get(row, 1, FACTS)?))).collect()
    }

    /// None if the role may not look.
    async fn synchronous_exceptions(&self) -> Result<Vec<SynchronousException>, ServerError> {
        let operation = "read the settings of roles and databases";
        let rows = match self.all(operation, EXCEPTIONS_SQL).await {
            Err(ServerError::Refused { .. }) => return Ok(Vec::new()),
            rows => rows?,
        };
        let exception = |row| {
            let (role, database) = (get(row, 0, operation)?, get(row, 1, operation)?);
            Ok(SynchronousException { role, database, commit: get(row, 2, operation)? })
        };
        rows.iter().map(exception).collect()
    }

    /// `None` if the role may not look.
    pub async fn archiver(&self) -> Result<Option<ArchiverState>, ServerError> {
        let operation = "read the archiver's state";
        let row = match self.one(operation, ARCHIVER_SQL, &[]).await {
            Err(ServerError::Refused { .. }) => return Ok(None),
            row => row?,
        };
        let event = |wal, at| -> Result<Option<(String, i64)>, ServerError> {
            Ok(get::<Option<String>>(&row, wal, operation)?.zip(get(&row, at, operation)?))
        };
        Ok(Some(ArchiverState {
            archived_count: get::<i64>(&row, 0, operation)?.cast_unsigned(),
            last_archived: event(1, 2)?,
            failed_count: get::<i64>(&row, 3, operation)?.cast_unsigned(),
            last_failed: event(4, 5)?,
        }))
    }

    async fn tablespaces(&self) -> Result<Vec<ServerTablespace>, ServerError> {
        let operation = "list the tablespaces";
        let rows = self.all(operation, TABLESPACES_SQL).await?;
        let tablespace = |row| {
            let location: String = get(row, 2, operation)?;
            let (oid, name) = (get(row, 0, operation)?, get(row, 1, operation)?);
            Ok(ServerTablespace { oid, name, location: location.into() })
        };
        rows.iter().map(tablespace).collect()
    }

    /// Bytes of all tablespaces, that is of the cluster without its WAL; `None` if the role may not know. The server
    /// stats every file for it: not for every heartbeat.
    pub async fn cluster_bytes(&self) -> Result<Option<u64>, ServerError> {
        let operation = "measure the cluster";
        let sql = "SELECT sum(pg_tablespace_size(oid))::bigint FROM pg_tablespace";
        match self.one(operation, sql, &[]).await {
            Err(ServerError::Refused { .. }) => Ok(None),
            row => Ok(get::<Option<i64>>(&row?, 0, operation)?.map(i64::cast_unsigned)),
        }
    }

    pub async fn rights(&self) -> Result<Rights, ServerError> {
        let operation = "read the role's rights";
        let (start, stop) = self.backup_functions();
        let sql = format!(
            "SELECT current_user::text, rolsuper, rolreplication OR rolsuper, \
             has_function_privilege('{start}', 'EXECUTE'), has_function_privilege('{stop}', 'EXECUTE'), \
             has_function_privilege('pg_switch_wal()', 'EXECUTE'), \
             pg_has_role('pg_read_all_settings', 'USAGE') \
             FROM pg_roles WHERE rolname = current_user"
        );
        let row = self.one(operation, &sql, &[]).await?;
        let [start, stop] = self.backup_grants();
        let switch = self.grant("EXECUTE ON FUNCTION pg_switch_wal()");
        let needed = [(3, start), (4, stop), (5, switch), (6, self.grant("pg_read_all_settings"))];
        let mut missing_grants = Vec::new();
        for (column, grant) in needed {
            if !get::<bool>(&row, column, operation)? {
                missing_grants.push(grant);
            }
        }
        let (superuser, replication) = (get(&row, 1, operation)?, get(&row, 2, operation)?);
        Ok(Rights { user: get(&row, 0, operation)?, superuser, replication, missing_grants })
    }
}

fn segment_size(bytes: i32) -> Result<SegmentSize, ServerError> {
    let found = || ServerError::Answer { operation: FACTS, found: bytes.to_string(), expected: "a WAL segment size" };
    u64::try_from(bytes).ok().and_then(|bytes| SegmentSize::new(bytes).ok()).ok_or_else(found)
}
