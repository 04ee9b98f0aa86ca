//! Real servers for this crate's tests, in directories of their own, ended when dropped. Tests that need one skip
//! visibly where none is installed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::server::local_connection_string;

/// Binaries of one release.
#[derive(Clone, Debug)]
pub(crate) struct Installation {
    pub major: u32,
    pub bin: PathBuf,
}

/// The oldest and the newest, for what is the same code for all between. `WALFLEET_TEST_MAJORS=all` makes it all.
pub(crate) fn oldest_and_newest() -> Vec<Installation> {
    let mut all = installations();
    if all.len() > 2 && std::env::var("WALFLEET_TEST_MAJORS").is_err() {
        all.drain(1..all.len() - 1);
    }
    all
}

/// One per release: what scripts/get_postgres.sh brought, and the system's own. `WALFLEET_TEST_MAJORS=13,18` limits it,
/// `all` does not.
pub(crate) fn installations() -> Vec<Installation> {
    let mut folders = vec![PathBuf::from("/usr/lib/postgresql"), PathBuf::from("/var/cache/walfleet-test/pg")];
    folders.extend(std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/walfleet-test/pg")));
    folders.extend(std::env::var_os("WALFLEET_CACHE").map(|cache| Path::new(&cache).join("pg")));
    let wanted = std::env::var("WALFLEET_TEST_MAJORS").ok().filter(|list| list != "all");
    let is_wanted =
        |major: u32| wanted.as_ref().is_none_or(|list| list.split(',').any(|text| text.trim().parse() == Ok(major)));
    let mut found = std::collections::BTreeMap::new();
    for folder in folders {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let bin = entry.path().join("bin");
            let major = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(major) = major.filter(|major| is_wanted(*major) && bin.join("initdb").exists()) {
                found.insert(major, Installation { major, bin });
            }
        }
    }
    if found.is_empty() {
        eprintln!("SKIPPED: no PostgreSQL server is installed (scripts/get_postgres.sh brings them)");
    }
    found.into_values().collect()
}

impl Installation {
    pub fn has(&self, program: &str) -> bool {
        let has = self.bin.join(program).exists();
        if !has {
            eprintln!("SKIPPED for release {}: {program} is not installed", self.major);
        }
        has
    }

    /// Makes the servers' user the owner of everything under `path`.
    pub fn give(&self, path: &Path) {
        let Some((uid, gid)) = user() else { return };
        std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
        if fs::symlink_metadata(path).unwrap().is_dir() {
            fs::read_dir(path).unwrap().flatten().for_each(|entry| self.give(&entry.path()));
        }
    }

    /// Runs one of the programs as the servers' user; panics if it fails.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.try_run(program, arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{program} {arguments:?}: {}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }

    pub fn try_run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(self.bin.join(program));
        command.args(arguments).current_dir("/").env("TZ", "UTC").env("LC_ALL", "C");
        if let Some((uid, gid)) = user() {
            command.uid(uid).gid(gid);
        }
        command.output().expect("the program can be started")
    }
}

/// Postgres refuses to run as root: then the user whose it is on Debian, or that scripts/prepare.sh made.
fn user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let find = |name: &str| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut numbers = line.split(':').skip(2).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    };
    Some(find("postgres").or_else(|| find("walfleet-test")).expect("a user that PostgreSQL may run as"))
}

pub(crate) struct TestServer {
    pub installation: Installation,
    pub dir: tempfile::TempDir,
    pub data_dir: PathBuf,
    pub port: u16,
}

impl TestServer {
    /// `settings` are lines of postgresql.conf.
    pub fn start(installation: &Installation, initdb: &[&str], settings: &str) -> TestServer {
        let server = TestServer::create(installation);
        let data_dir = server.data_dir.display().to_string();
        let arguments = [&["-D", &data_dir, "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8"], initdb].concat();
        installation.run("initdb", &arguments);
        server.configure(settings);
        server.launch();
        server
    }

    /// A directory for a server whose data somebody else makes.
    pub fn create(installation: &Installation) -> TestServer {
        let dir = tempfile::Builder::new().prefix("wf").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let folder = dir.path().join("pg");
        fs::create_dir(&folder).unwrap();
        installation.give(&folder);
        // Only names a socket: each directory has its own.
        TestServer { installation: installation.clone(), data_dir: folder.join("data"), port: 5432, dir }
    }

    pub fn folder(&self) -> PathBuf {
        self.dir.path().join("pg")
    }

    pub fn configure(&self, settings: &str) {
        let path = self.data_dir.join("postgresql.conf");
        let own = format!(
            "\nlisten_addresses=''\nunix_socket_directories='{}'\nfsync=off\nshared_buffers=16MB\n\
             max_wal_senders=4\nhot_standby=on\n{settings}\n",
            self.folder().display()
        );
        let text = fs::read_to_string(&path).unwrap() + &own;
        fs::write(&path, text).unwrap();
    }

    pub fn launch(&self) {
        let log = self.folder().join("log");
        let (data_dir, log) = (self.data_dir.display().to_string(), log.display().to_string());
        self.installation.run("pg_ctl", &["-D", &data_dir, "-w", "-t", "60", "-l", &log, "start"]);
    }

    pub fn stop(&self, mode: &str) {
        self.installation.try_run("pg_ctl", &["-D", &self.data_dir.display().to_string(), "-w", "-m", mode, "stop"]);
    }

    pub fn connection_string(&self) -> String {
        local_connection_string(&self.folder(), self.port, "postgres")
    }

    /// Runs statements, each by itself, as the superuser.
    pub async fn sql(&self, statements: &[&str]) {
        self.sql_as("postgres", statements).await.unwrap();
    }

    pub async fn sql_as(&self, user: &str, statements: &[&str]) -> Result<(), tokio_postgres::Error> {
        let config = local_connection_string(&self.folder(), self.port, user);
        let (client, connection) = tokio_postgres::connect(&config, tokio_postgres::NoTls).await?;
        let connection = tokio::spawn(connection);
        for statement in statements {
            client.simple_query(statement).await?;
        }
        drop(client);
        connection.await.expect("no panic")
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if self.data_dir.join("postmaster.pid").exists() {
            self.stop("immediate");
        }
    }
}
