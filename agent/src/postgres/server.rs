//! The SQL side of a server: one connection, what it tells about itself, and the low-level backup functions.
//!
//! Physical replication is spoken in `replication`. Every call ends with an answer or an error when the connection ends.

mod backup;
mod error;
mod facts;
mod recovery;
mod slots;

use std::path::Path;
use std::time::Duration;

use tokio::sync::watch;
use tokio_postgres::config::Host;
use tokio_postgres::types::{PgLsn, ToSql};
use tokio_postgres::{Client, Config, NoTls, Row};
use walfleet_repository::postgres::Lsn;

pub use backup::{BackupSession, BackupStop, CheckpointPace};
pub use error::{Refusal, ServerError, Target};
pub use facts::{
    ArchiveSettings, ArchiverState, Rights, ServerFacts, ServerRole, ServerTablespace, SynchronousException,
    SynchronousSettings,
};
pub use recovery::RecoveryStanding;
pub use slots::{KeptWal, SlotState, WalStatus};

/// In pg_stat_activity.
const APPLICATION_NAME: &str = "walfleet-agent";
const OLDEST_MAJOR: u32 = 13;
/// Long enough for a server under load, short enough for a person who waits.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A dead peer is noticed within about a minute, also behind a firewall that forgot the connection.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(30);

/// Nothing may end our session but us: a backup holds one for hours. Names resolve to the catalog alone.
const SESSION_SETTINGS: &str = "SET statement_timeout = 0; SET lock_timeout = 0; \
     SET idle_in_transaction_session_timeout = 0; SET search_path = pg_catalog; \
     SET DateStyle = ISO; SET TimeZone = 'UTC'; SET default_transaction_read_only = off";

/// Whose connection string was not given: a server of this host by its socket directory.
pub fn local_connection_string(socket_dir: &Path, port: u16, user: &str) -> String {
    let quoted = |text: &str| {
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+:@".contains(&b));
        if plain { text.to_owned() } else { format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'")) }
    };
    format!("host={} port={port} user={} dbname=postgres", quoted(&socket_dir.to_string_lossy()), quoted(user))
}

/// A connection to a server of release 13 or later.
#[derive(Debug)]
pub struct Server {
    client: Client,
    target: Target,
    /// As server_version_num: 180006 is 18.6.
    version_num: u32,
    /// As SQL takes it.
    quoted_user: String,
    /// Becomes true when the connection has ended.
    ended: watch::Receiver<bool>,
}

impl Server {
    /// `connection` is libpq's keyword form or a URL. The database is `postgres` if it names none.
    pub async fn connect(connection: &str) -> Result<Server, ServerError> {
        let mut config: Config = connection.parse().map_err(|source| ServerError::ConnectionString { source })?;
        if config.get_dbname().is_none() {
            config.dbname("postgres");
        }
        config.application_name(APPLICATION_NAME);
        config.connect_timeout(CONNECT_TIMEOUT).keepalives_idle(KEEPALIVE);
        config.keepalives_interval(KEEPALIVE / 3).keepalives_retries(3).tcp_user_timeout(2 * KEEPALIVE);
        let target = target(&config);
        // The library's timeout covers the network only, not a server that accepts and then says nothing.
        let connecting = tokio::time::timeout(2 * CONNECT_TIMEOUT, config.connect(NoTls)).await;
        let seconds = 2 * CONNECT_TIMEOUT.as_secs();
        let (client, connection) = connecting
            .map_err(|_| ServerError::NoAnswer { target: target.clone(), seconds })?
            .map_err(|source| ServerError::connecting(target.clone(), source))?;
        let (sender, ended) = watch::channel(false);
        // Ends by itself when the client is dropped, or when the server does.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to PostgreSQL ended");
            }
            sender.send_replace(true);
        });
        let mut server = Server { client, target, version_num: 0, quoted_user: String::new(), ended };
        server.settle().await?;
        Ok(server)
    }

    async fn settle(&mut self) -> Result<(), ServerError> {
        let operation = "read the server's version";
        let sql = "SELECT current_setting('server_version_num')::int, quote_ident(current_user)";
        let row = self.one(operation, sql, &[]).await?;
        let version_num = get::<i32>(&row, 0, operation)?.cast_unsigned();
        self.version_num = version_num;
        self.quoted_user = get(&row, 1, operation)?;
        if self.major() < OLDEST_MAJOR {
            let version = format!("{}.{}", version_num / 10_000, version_num % 10_000);
            return Err(ServerError::TooOld { target: self.target.clone(), version });
        }
        let operation = "prepare the session";
        let fail = |source| ServerError::of_query(operation, &self.target, source);
        self.client.batch_execute(SESSION_SETTINGS).await.map_err(fail)?;
        if self.major() >= 14 {
            self.client.batch_execute("SET idle_session_timeout = 0").await.map_err(fail)?;
        }
        Ok(())
    }

    pub fn target(&self) -> &Target {
        &self.target
    }

    pub fn version_num(&self) -> u32 {
        self.version_num
    }

    pub fn major(&self) -> u32 {
        self.version_num / 10_000
    }

    pub fn is_connected(&self) -> bool {
        !self.client.is_closed() && !*self.ended.borrow()
    }

    /// Returns when the connection has ended, whoever ended it. Safe to drop.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // The sender's end without a value means the same.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Ends the current WAL segment so that it can be archived, and returns the end of the switch record. Does nothing
    /// to a segment that is empty. Primaries only.
    pub async fn switch_wal(&self) -> Result<Lsn, ServerError> {
        let operation = "switch to a new WAL segment";
        let grant = || self.grant("EXECUTE ON FUNCTION pg_switch_wal()");
        let row = self.one(operation, "SELECT pg_switch_wal()", &[]).await;
        lsn(&row.map_err(|error| error.or_missing_right(grant))?, 0, operation)
    }

    /// The end of WAL: on a primary what is inserted, on a standby what is replayed.
    pub async fn wal_position(&self) -> Result<Lsn, ServerError> {
        let operation = "read the WAL position";
        let sql = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
                   ELSE pg_current_wal_insert_lsn() END";
        let row = self.one(operation, sql, &[]).await?;
        lsn(&row, 0, operation)
    }

    async fn one(
        &self,
        operation: &'static str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, ServerError> {
        self.client
            .query_one(sql, parameters)
            .await
            .map_err(|source| ServerError::of_query(operation, &self.target, source))
    }

    async fn all(&self, operation: &'static str, sql: &str) -> Result<Vec<Row>, ServerError> {
        let rows = self.client.query(sql, &[]).await;
        rows.map_err(|source| ServerError::of_query(operation, &self.target, source))
    }

    /// What a superuser must run for this session's role.
    fn grant(&self, what: &str) -> String {
        format!("GRANT {what} TO {};", self.quoted_user)
    }
}

/// A column's value, or the complaint that the server answered in another form.
fn get<'r, T: tokio_postgres::types::FromSql<'r>>(
    row: &'r Row,
    column: usize,
    operation: &'static str,
) -> Result<T, ServerError> {
    row.try_get(column).map_err(|source| ServerError::Query { operation, source })
}

fn lsn(row: &Row, column: usize, operation: &'static str) -> Result<Lsn, ServerError> {
    get::<PgLsn>(row, column, operation).map(|lsn| Lsn(lsn.into()))
}

fn target(config: &Config) -> Target {
    let host = match config.get_hosts().first() {
        Some(Host::Tcp(name)) => name.clone(),
        Some(Host::Unix(path)) => path.display().to_string(),
        None => "localhost".to_owned(),
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let user = config.get_user().map(|user| format!(" as {user}")).unwrap_or_default();
    Target(format!("PostgreSQL at {host} port {port}{user}"))
}

#[cfg(test)]
mod tests;
