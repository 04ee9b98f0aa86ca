//! PostgreSQL's own tools as judges of what was restored.

use std::path::Path;

use anyhow::Context;

use super::dataset::Dataset;
use super::{PgServer, PgVersion};
use crate::process::run;

/// Every file against the `backup_manifest` within. WAL is not asked for: a restore fetches it while it replays.
pub fn verify_backup(version: &PgVersion, data_dir: &Path) -> anyhow::Result<()> {
    let mut command = version.command("pg_verifybackup");
    command.args(["--no-parse-wal", "--quiet"]).arg(data_dir);
    run(command).map(drop).with_context(|| format!("pg_verifybackup {}", data_dir.display()))
}

/// Every page's checksum; the server must be stopped cleanly.
pub fn check_pages(version: &PgVersion, data_dir: &Path) -> anyhow::Result<()> {
    let mut command = version.command("pg_checksums");
    command.args(["--check", "-D"]).arg(data_dir);
    run(command).map(drop).with_context(|| format!("pg_checksums {}", data_dir.display()))
}

/// Every table (14 and later) and every B-tree, each heap row found in its indexes; works in recovery too.
pub fn check_relations(server: &PgServer) -> anyhow::Result<()> {
    for database in Dataset::databases() {
        if server.version().major >= 14 {
            let mut command = server.client("pg_amcheck");
            command.args(["--heapallindexed", "-d", database]);
            run(command).with_context(|| format!("pg_amcheck {database}"))?;
        } else {
            // amcheck has no heap check before 14. Unlogged indexes have no content in recovery.
            server.session_in(database)?.execute(
                "SELECT bt_index_check(c.oid, true) FROM pg_class c JOIN pg_am a ON a.oid = c.relam JOIN pg_index i ON i.indexrelid = c.oid
                 WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p' AND i.indisready AND i.indisvalid",
            )?;
        }
    }
    Ok(())
}
