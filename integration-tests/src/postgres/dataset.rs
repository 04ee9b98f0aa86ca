//! What the servers of the tests hold: a bank that stays in balance, and one of each thing that is stored in its own way.

use anyhow::Context;

use super::PgServer;
use super::server::DATABASE;
use crate::process::run;

/// The database that the load does not touch.
pub const QUIET_DATABASE: &str = "quiet";

pub struct Dataset {
    /// pgbench's: 100,000 accounts (15 MB) each.
    pub scale: u32,
}

/// TOAST, GIN, partitions, a materialised view, an unlogged table, a large object; amcheck for [`super::judge`], created
/// here because a restored copy that is still in recovery cannot be given it.
const SCHEMA: &str = "
    CREATE EXTENSION amcheck;
    CREATE TABLE document (id bigserial PRIMARY KEY, body text NOT NULL, tags integer[] NOT NULL, at timestamptz DEFAULT now());
    CREATE INDEX document_tags ON document USING gin (tags);
    CREATE TABLE event (day date NOT NULL, what text NOT NULL) PARTITION BY RANGE (day);
    CREATE TABLE event_old PARTITION OF event FOR VALUES FROM ('2020-01-01') TO ('2025-01-01');
    CREATE TABLE event_new PARTITION OF event FOR VALUES FROM ('2025-01-01') TO ('2030-01-01');
    CREATE INDEX event_day ON event (day);
    CREATE UNLOGGED TABLE scribble (what text);
    INSERT INTO document (body, tags)
        SELECT repeat(md5(n::text), 1 + n % 400), ARRAY[n % 7, n % 11] FROM generate_series(1, 2000) n;
    INSERT INTO event SELECT '2020-01-01'::date + n % 3650, md5(n::text) FROM generate_series(1, 20000) n;
    INSERT INTO scribble SELECT md5(n::text) FROM generate_series(1, 1000) n;
    CREATE MATERIALIZED VIEW event_count AS SELECT day, count(*) FROM event GROUP BY day;
    SELECT lo_from_bytea(0, decode(repeat(md5('large object'), 1000), 'hex'));
";

impl Dataset {
    pub fn create(&self, server: &PgServer) -> anyhow::Result<()> {
        let mut command = server.client("pgbench");
        command.args(["-i", "-q", "-s", &self.scale.to_string()]);
        run(command).context("fill pgbench's tables")?;
        server.session()?.execute(SCHEMA)?;
        server.session()?.execute(&format!("CREATE DATABASE {QUIET_DATABASE}"))?;
        server.session_in(QUIET_DATABASE)?.execute(
            "CREATE EXTENSION amcheck; CREATE TABLE lasting AS SELECT n, md5(n::text) FROM generate_series(1, 5000) n;
             CREATE INDEX ON lasting (n)",
        )
    }

    /// A table in a tablespace of its own, touched by nothing later.
    pub fn add_tablespace(&self, server: &PgServer, name: &str) -> anyhow::Result<std::path::PathBuf> {
        let location = server.tablespace_dir(name)?;
        let session = server.session()?;
        session.execute(&format!("CREATE TABLESPACE {name} LOCATION '{}'", location.display()))?;
        session.execute(&format!(
            "CREATE TABLE far_{name} TABLESPACE {name} AS SELECT n, repeat(md5(n::text), 5) FROM generate_series(1, 10000) n"
        ))?;
        Ok(location)
    }

    /// Databases with user tables, for what is judged per database.
    pub fn databases() -> [&'static str; 2] {
        [DATABASE, QUIET_DATABASE]
    }
}
