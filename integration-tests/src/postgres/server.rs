//! One PostgreSQL server: made by initdb, copied from a primary, or found in a restored directory.
//!
//! The postmaster is our child, so its end is seen and it ends with the test. Each server has its own port and socket
//! folder. `fsync` is off: a test kills processes, not the machine.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal};

use super::{PgVersion, Session};
use crate::os_user::os_user;
use crate::ports::free_port;
use crate::process::{Process, run};
use crate::scratch::Scratch;
use crate::wait_for;

/// A start replays WAL, on two busy cores.
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(60);

pub const SUPERUSER: &str = "postgres";
pub const DATABASE: &str = "postgres";

/// Small and quick; a test overrides what it is about.
const SETTINGS: [(&str, &str); 12] = [
    ("listen_addresses", "127.0.0.1"),
    ("fsync", "off"),
    ("shared_buffers", "32MB"),
    ("max_connections", "40"),
    ("max_wal_senders", "8"),
    ("max_replication_slots", "8"),
    ("wal_level", "replica"),
    ("min_wal_size", "80MB"),
    ("max_wal_size", "256MB"),
    ("checkpoint_timeout", "30s"),
    ("log_line_prefix", "%m [%p] "),
    ("log_min_messages", "log"),
];

/// The two orderly ways to end a server, and the abrupt one that still lets it clean up (postmaster.c).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shutdown {
    Fast,
    Immediate,
}

pub struct ServerBuilder {
    scratch: Scratch,
    name: String,
    version: PgVersion,
    settings: Vec<(String, String)>,
    initdb: Vec<String>,
    basebackup: Vec<String>,
    environment: Vec<(String, String)>,
}

impl ServerBuilder {
    pub fn basebackup_option(mut self, option: impl ToString) -> ServerBuilder {
        self.basebackup.push(option.to_string());
        self
    }

    /// What the server's restore_command needs to reach the store, for example.
    pub fn environment(mut self, variables: impl IntoIterator<Item = (String, String)>) -> ServerBuilder {
        self.environment.extend(variables);
        self
    }

    pub fn setting(mut self, name: &str, value: impl ToString) -> ServerBuilder {
        self.settings.push((name.to_owned(), value.to_string()));
        self
    }

    pub fn initdb_option(mut self, option: impl ToString) -> ServerBuilder {
        self.initdb.push(option.to_string());
        self
    }

    /// A new cluster, with page checksums unless an option of the test's says otherwise, running.
    pub fn create(self) -> anyhow::Result<PgServer> {
        let server = self.lay_out()?;
        let checksums = match self.initdb.iter().any(|option| option == "--no-data-checksums") {
            // The option exists since 18, where checksums became the default.
            true if self.version.major < 18 => None,
            true => Some("--no-data-checksums"),
            false => Some("--data-checksums"),
        };
        let mut command = self.version.command("initdb");
        command
            .args(["-N", "-A", "trust", "-U", SUPERUSER, "-E", "UTF8", "--no-locale", "-D"])
            .arg(&server.data_dir)
            .args(checksums)
            .args(self.initdb.iter().filter(|option| *option != "--no-data-checksums"));
        run(command).with_context(|| format!("initdb for {}", self.name))?;
        self.configure(&server)?;
        server.into_started()
    }

    /// A streaming standby of a running primary, running.
    pub fn create_standby_of(self, primary: &PgServer) -> anyhow::Result<PgServer> {
        let server = self.lay_out()?;
        let mut command = self.version.command("pg_basebackup");
        command.args(["-R", "-X", "stream", "-c", "fast", "-d", &primary.connection(), "-D"]).arg(&server.data_dir);
        command.args(&self.basebackup);
        run(command).with_context(|| format!("pg_basebackup for {}", self.name))?;
        self.configure(&server)?;
        server.into_started()
    }

    /// A directory that already holds a cluster, restored for example; not started. Its files are not touched: where
    /// it listens is said on the command line.
    pub fn open(self, data_dir: &Path) -> anyhow::Result<PgServer> {
        let mut server = self.lay_out()?;
        server.data_dir = data_dir.to_owned();
        server.overrides = [
            ("port", server.port.to_string()),
            ("unix_socket_directories", server.socket_dir.display().to_string()),
            ("listen_addresses", "127.0.0.1".to_owned()),
            ("fsync", "off".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .chain(self.settings)
        .collect();
        Ok(server)
    }

    /// A server that someone else started in a directory of this scratch folder; it is stopped with the folder.
    pub fn adopt(self, data_dir: &Path, socket_dir: &Path, port: u16) -> anyhow::Result<PgServer> {
        let mut server = self.lay_out()?;
        (server.data_dir, server.socket_dir, server.port) = (data_dir.to_owned(), socket_dir.to_owned(), port);
        Ok(server)
    }

    fn lay_out(&self) -> anyhow::Result<PgServer> {
        Ok(PgServer {
            scratch: self.scratch.clone(),
            name: self.name.clone(),
            version: self.version.clone(),
            data_dir: self.scratch.join(&self.name),
            socket_dir: self.scratch.dir(&format!("{}.s", self.name))?,
            port: free_port(),
            overrides: Vec::new(),
            environment: self.environment.clone(),
            process: None,
        })
    }

    fn configure(&self, server: &PgServer) -> anyhow::Result<()> {
        let own =
            [("port", server.port.to_string()), ("unix_socket_directories", server.socket_dir.display().to_string())];
        let all = SETTINGS.iter().map(|(name, value)| (*name, (*value).to_owned())).chain(own);
        let given = self.settings.iter().map(|(name, value)| (name.as_str(), value.clone()));
        server.append_settings(all.chain(given))
    }
}

pub struct PgServer {
    scratch: Scratch,
    name: String,
    version: PgVersion,
    data_dir: PathBuf,
    socket_dir: PathBuf,
    port: u16,
    /// On the command line, where they win over every file.
    overrides: Vec<(String, String)>,
    environment: Vec<(String, String)>,
    process: Option<Process>,
}

impl PgServer {
    pub fn builder(scratch: &Scratch, name: &str, version: &PgVersion) -> ServerBuilder {
        ServerBuilder {
            scratch: scratch.clone(),
            name: name.to_owned(),
            version: version.clone(),
            settings: Vec::new(),
            initdb: Vec::new(),
            basebackup: Vec::new(),
            environment: Vec::new(),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn version(&self) -> &PgVersion {
        &self.version
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    pub fn socket_dir(&self) -> &Path {
        &self.socket_dir
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// For libpq and tokio-postgres, over the socket.
    pub fn connection(&self) -> String {
        self.connection_to(DATABASE)
    }

    pub fn connection_to(&self, database: &str) -> String {
        format!("host={} port={} user={SUPERUSER} dbname={database}", self.socket_dir.display(), self.port)
    }

    pub fn session(&self) -> anyhow::Result<Session> {
        Session::open(&self.connection())
    }

    pub fn session_in(&self, database: &str) -> anyhow::Result<Session> {
        Session::open(&self.connection_to(database))
    }

    /// A client program of this version, told where the server is.
    pub fn client(&self, program: &str) -> Command {
        let mut command = self.version.command(program);
        command.env("PGHOST", &self.socket_dir).env("PGPORT", self.port.to_string());
        command.env("PGUSER", SUPERUSER).env("PGDATABASE", DATABASE);
        command
    }

    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.scratch.join(&format!("{}.log", self.name))).unwrap_or_default())
            .into_owned()
    }

    /// Adds to postgresql.conf; later lines win.
    pub fn append_settings(
        &self,
        settings: impl Iterator<Item = (impl AsRef<str>, impl AsRef<str>)>,
    ) -> anyhow::Result<()> {
        use std::io::Write;
        let path = self.data_dir.join("postgresql.conf");
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).context("open postgresql.conf")?;
        for (name, value) in settings {
            writeln!(file, "{} = '{}'", name.as_ref(), value.as_ref().replace('\'', "''"))
                .context("write postgresql.conf")?;
        }
        Ok(())
    }

    /// Has its next start say this on the command line.
    pub fn set_override(&mut self, name: &str, value: &str) {
        self.overrides.push((name.to_owned(), value.to_owned()));
    }

    /// Changes a setting that takes effect without a restart.
    pub fn reload_with(&self, name: &str, value: &str) -> anyhow::Result<()> {
        self.append_settings([(name, value)].into_iter())?;
        self.session()?.execute("SELECT pg_reload_conf()")
    }

    /// Starts it and waits until it accepts connections.
    pub fn start(&mut self) -> anyhow::Result<()> {
        self.spawn()?;
        let process = self.process.as_mut().context("just spawned")?;
        let (name, data_dir) = (&self.name, &self.data_dir);
        let ready = wait_for(&format!("{name} to accept connections"), START_LIMIT, || match process.ended()? {
            Some(status) => anyhow::bail!("{name} ended ({status}) while starting"),
            None => Ok(is_ready(data_dir, process.pid()).then_some(())),
        });
        ready.with_context(|| last_lines(&self.log_text()))
    }

    /// Starts it without waiting: recovery may take its time, or stop the server at its target.
    pub fn spawn(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.process.is_none(), "{} runs already", self.name);
        let mut command = self.version.command("postgres");
        command.arg("-D").arg(&self.data_dir);
        for (name, value) in &self.overrides {
            command.args(["-c", &format!("{name}={value}")]);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        self.process = Some(Process::spawn(&self.scratch, &self.name, command, Signal::QUIT)?);
        Ok(())
    }

    fn into_started(mut self) -> anyhow::Result<PgServer> {
        self.start()?;
        Ok(self)
    }

    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        match &mut self.process {
            Some(process) => Ok(process.ended()?.is_none()),
            None => Ok(false),
        }
    }

    pub fn stop(&mut self, how: Shutdown) -> anyhow::Result<()> {
        let mut process = self.process.take().with_context(|| format!("{} does not run", self.name))?;
        process.signal(match how {
            Shutdown::Fast => Signal::INT,
            Shutdown::Immediate => Signal::QUIT,
        });
        process.wait(STOP_LIMIT).map(drop)
    }

    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.stop(Shutdown::Fast)?;
        self.start()
    }

    /// `kill -9` for the postmaster and every backend.
    pub fn kill_nine(&mut self) -> anyhow::Result<()> {
        self.process.take().with_context(|| format!("{} does not run", self.name))?.kill_nine()
    }

    /// Waits until it has ended by itself (recovery_target_action = shutdown).
    pub fn wait_for_end(&mut self, limit: Duration) -> anyhow::Result<()> {
        let mut process = self.process.take().with_context(|| format!("{} does not run", self.name))?;
        process.wait(limit).map(drop)
    }

    /// Ends recovery and waits until it writes.
    pub fn promote(&self) -> anyhow::Result<()> {
        let session = self.session()?;
        anyhow::ensure!(session.is_true("SELECT pg_promote(true, 60)")?, "{} did not promote in 60 s", self.name);
        wait_for("the end of recovery", START_LIMIT, || {
            Ok((!session.is_true("SELECT pg_is_in_recovery()")?).then_some(()))
        })
    }

    /// Waits until recovery has ended by itself (recovery_target_action = promote, or end of WAL).
    pub fn wait_until_writable(&self) -> anyhow::Result<()> {
        let session = self.session()?;
        wait_for("the end of recovery", START_LIMIT, || {
            Ok((!session.is_true("SELECT pg_is_in_recovery()")?).then_some(()))
        })
    }

    /// A new folder for a tablespace, beside the data directory.
    pub fn tablespace_dir(&self, name: &str) -> anyhow::Result<PathBuf> {
        self.scratch.dir(&format!("{}.{name}", self.name))
    }

    /// Gives up a running server, to be left behind.
    pub fn leave_running(mut self) {
        if let Some(process) = self.process.take() {
            process.leave_running();
        }
    }
}

impl Drop for PgServer {
    fn drop(&mut self) {
        // The process's own drop sends SIGQUIT, an immediate shutdown, and waits.
        self.process.take();
    }
}

/// Line 8 of postmaster.pid is "ready" once connections are accepted, on a hot standby too (utils/pidfile.h); line 1 is
/// the pid, by which a file that a killed server left is told apart.
fn is_ready(data_dir: &Path, pid: Pid) -> bool {
    let content = std::fs::read_to_string(data_dir.join("postmaster.pid")).unwrap_or_default();
    let lines: Vec<&str> = content.lines().map(str::trim).collect();
    lines.first() == Some(&pid.to_string().as_str()) && lines.get(7) == Some(&"ready")
}

fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n")
}

/// Hands a folder that a test filled to the servers' user.
pub fn own_recursively(path: &Path) -> anyhow::Result<()> {
    os_user().own(path)?;
    if path.is_dir() && !path.is_symlink() {
        for entry in std::fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
            own_recursively(&entry?.path())?;
        }
    }
    Ok(())
}
