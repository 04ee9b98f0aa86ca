//! One protected server without a controller, and restores from nothing but the repository and its key.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;
use walfleet_repository::postgres::Lsn;

use super::{Agent, Place};
use crate::binaries;
use crate::os_user::os_user;
use crate::output::Output;
use crate::ports::free_port;
use crate::postgres::acknowledged::{Acknowledged, Lost, Record};
use crate::postgres::dataset::Dataset;
use crate::postgres::{PgServer, PgVersion, ServerBuilder};
use crate::scratch::Scratch;
use crate::wait_for;

pub const CLUSTER: &str = "orders";

/// A segment's way through the archiver, on two busy cores.
const ARCHIVE_LIMIT: Duration = Duration::from_secs(60);
const RESTORE_LIMIT: Duration = Duration::from_secs(180);

/// A server with the usual data and one tablespace, its agent running, its WAL archived.
pub struct Standalone {
    /// Dropped before the server, so that it does not complain of its end.
    pub agent: Agent,
    pub server: PgServer,
    scratch: Scratch,
    pub dataset: Dataset,
    /// The tablespace's location, or its oid, by which restores map it elsewhere.
    pub tablespace: String,
    pub place: Place,
    /// The recovery key.
    pub key_file: PathBuf,
}

/// What is not as usual with a server and its agent.
#[derive(Clone, Default)]
pub struct Setup {
    pub initdb: Vec<String>,
    /// Of postgresql.conf.
    pub settings: Vec<(String, String)>,
    /// That section of the agent's configuration.
    pub wal: Value,
    /// Without archive_command.
    pub streams_only: bool,
    /// The namespace in which the agent runs.
    pub namespace: Option<String>,
    /// What the agent connects as, and the statements that make it; else it is a superuser.
    pub role: Option<(String, String)>,
}

/// A data directory that a restore made.
pub struct Restored {
    pub name: String,
    pub data_dir: PathBuf,
    pub port: u16,
    pub report: Value,
}

impl Standalone {
    pub fn start(scratch: &Scratch, version: &PgVersion, place: Place) -> anyhow::Result<Standalone> {
        Standalone::start_with(scratch, version, place, &[])
    }

    /// With options of initdb's: another segment size, no checksums, WAL elsewhere.
    pub fn start_with(
        scratch: &Scratch,
        version: &PgVersion,
        place: Place,
        initdb: &[&str],
    ) -> anyhow::Result<Standalone> {
        let setup = Setup { initdb: initdb.iter().map(|option| (*option).to_owned()).collect(), ..Setup::default() };
        Standalone::set_up(scratch, version, place, setup)
    }

    /// One that streams its WAL and has no archive_command. `wal` is that section of the agent's configuration.
    pub fn streaming(scratch: &Scratch, version: &PgVersion, place: Place, wal: Value) -> anyhow::Result<Standalone> {
        Standalone::set_up(scratch, version, place, Setup { wal, streams_only: true, ..Setup::default() })
    }

    pub fn set_up(scratch: &Scratch, version: &PgVersion, place: Place, setup: Setup) -> anyhow::Result<Standalone> {
        let builder = PgServer::builder(scratch, "primary", version);
        let builder = match setup.streams_only {
            true => builder.setting("archive_mode", "off"),
            // Until the agent runs: WAL waits.
            false => builder.setting("archive_mode", "on").setting("archive_command", "false"),
        };
        let builder = setup.settings.iter().fold(builder, |builder, (name, value)| builder.setting(name, value));
        let server = setup.initdb.iter().fold(builder, ServerBuilder::initdb_option).create()?;
        let dataset = Dataset { scale: 1 };
        dataset.create(&server)?;
        let tablespace = dataset.add_tablespace(&server, "fast")?.display().to_string();
        let key_file = scratch.join("recovery.key");
        let agent = Agent::builder(scratch, "host1");
        let agent = setup.namespace.iter().fold(agent, |agent, namespace| agent.inside(namespace));
        let agent = agent.instance(CLUSTER, &server).repository(&place, &key_file).postgres(version);
        let agent = match &setup.role {
            Some((role, statements)) => {
                server.session()?.execute(statements)?;
                agent.as_role(role)
            }
            None => agent,
        };
        let mut agent = match setup.wal {
            Value::Null => agent.build()?,
            wal => agent.section("wal", wal).build()?,
        };
        let init: Vec<String> = std::iter::once("init".to_owned()).chain(place.flags(&key_file)).collect();
        let init: Vec<&str> = init.iter().map(String::as_str).collect();
        Output::of(agent.command(&init), Duration::from_secs(60))?.ok()?;
        agent.start()?;
        if !setup.streams_only {
            agent.archive_for(&server)?;
        }
        Ok(Standalone { scratch: scratch.clone(), server, agent, dataset, tablespace, place, key_file })
    }

    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Takes a backup with the host's own command; its report.
    pub fn backup(&self) -> anyhow::Result<Value> {
        self.agent.json(&["backup", "--cluster", CLUSTER, "--fast"])
    }

    /// Has everything written so far archived, and waits until the repository confirmed it.
    pub fn archive_all(&self) -> anyhow::Result<Lsn> {
        archive_all(&self.server)
    }

    /// Words of a restore into a new folder, by nothing but the repository and its key; not yet run.
    pub fn restore_words(&self, data_dir: &Path, target: &[&str]) -> Vec<String> {
        let moved = format!("{}={}.fast", self.tablespace, data_dir.display());
        let mut words = vec!["restore".to_owned()];
        words.extend(self.place.flags(&self.key_file));
        words.extend(["--cluster", CLUSTER, "--tablespace", &moved].map(str::to_owned));
        words.extend(["--data-dir".to_owned(), data_dir.display().to_string()]);
        words.extend(target.iter().map(|word| (*word).to_owned()));
        words
    }

    /// One of the agent's commands as on a host that has only the program.
    pub fn command(&self, words: &[String]) -> anyhow::Result<Command> {
        let mut command = os_user().command(binaries::program(binaries::AGENT)?);
        command.args(words).envs(self.place.credentials.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    /// Runs it to its end.
    pub fn run(&self, words: &[String]) -> anyhow::Result<Output> {
        Output::of(self.command(words)?, RESTORE_LIMIT)
    }

    /// Waits until the repository has all that the server has written so far by streaming.
    pub fn streamed_all(&self) -> anyhow::Result<()> {
        streamed_all(&self.server)
    }

    /// Waits until the repository's first range of what can be restored reaches so far.
    pub fn wait_until_restorable(&self, end: Lsn, patience: Duration) -> anyhow::Result<()> {
        wait_for(&format!("WAL up to {end} to be stored"), patience, || {
            let listed = self.agent.json(&["list", "--cluster", CLUSTER])?;
            let reaches = listed["recovery"][0]["ranges"][0]["to_lsn"].as_str().unwrap_or_default().parse::<Lsn>();
            Ok(reaches.is_ok_and(|reaches| reaches >= end).then_some(()))
        })
    }

    /// Takes away server, data and agent at once; what the workload had been told by then, and what a restore from the
    /// repository alone lacks of it.
    pub fn destroy(&mut self, workload: Acknowledged) -> anyhow::Result<(Record, Lost)> {
        let disaster = Instant::now();
        self.server.kill_nine()?;
        self.agent.kill_nine()?;
        self.lost_since(disaster, workload)
    }

    /// The same for a server that does not run any more.
    pub fn lost_since(&mut self, disaster: Instant, workload: Acknowledged) -> anyhow::Result<(Record, Lost)> {
        std::fs::remove_dir_all(self.server.data_dir())?;
        let record = workload.end()?;
        let restored = self.restore("restored", &["--latest"])?;
        let lost = record.lost(&self.recovered(&restored)?.session()?, disaster)?;
        Ok((record, lost))
    }

    /// Restores into a new folder; `--start` among the words starts it on a port of its own.
    pub fn restore(&self, name: &str, target: &[&str]) -> anyhow::Result<Restored> {
        self.restore_with(name, target, |words| self.command(words))
    }

    /// The same with another umask than ours.
    pub fn restore_under(&self, umask: &str, name: &str, target: &[&str]) -> anyhow::Result<Restored> {
        self.restore_with(name, target, |words| {
            let mut command = os_user().command("sh");
            command.args(["-c", &format!("umask {umask} && exec \"$@\""), "sh"]);
            command.arg(binaries::program(binaries::AGENT)?).args(words);
            command.envs(self.place.credentials.iter().map(|(name, value)| (name, value)));
            Ok(command)
        })
    }

    fn restore_with(
        &self,
        name: &str,
        target: &[&str],
        command: impl FnOnce(&[String]) -> anyhow::Result<Command>,
    ) -> anyhow::Result<Restored> {
        let (data_dir, port) = (self.scratch.join(name), free_port());
        let mut words = self.restore_words(&data_dir, target);
        words.extend(["-o", "json"].map(str::to_owned));
        if target.contains(&"--start") {
            words.extend(["--port".to_owned(), port.to_string()]);
            // Which PostgreSQL is installed on the host is the one thing that the repository cannot know.
            words.extend(["--config".to_owned(), self.agent.config().display().to_string()]);
        }
        let report = Output::of(command(&words)?, RESTORE_LIMIT)?.ok()?.json()?;
        Ok(Restored { name: name.to_owned(), data_dir, port, report })
    }

    /// A restored directory as a server: running if the restore started it, else to be started here.
    pub fn server_of(&self, restored: &Restored, started: bool) -> anyhow::Result<PgServer> {
        let builder = PgServer::builder(&self.scratch, &format!("{}-server", restored.name), self.server.version());
        if started {
            // Its configuration is the source's, so its socket lies where the source's does.
            return builder.adopt(&restored.data_dir, self.server.socket_dir(), restored.port);
        }
        builder.environment(self.place.credentials.clone()).open(&restored.data_dir)
    }

    /// A standby of the server, with its tablespace in a folder of its own.
    pub fn standby(&self, settings: &[(&str, &str)]) -> anyhow::Result<PgServer> {
        let folder = self.scratch.join("standby.fast");
        let mapping = format!("--tablespace-mapping={}={}", self.tablespace, folder.display());
        let builder = PgServer::builder(&self.scratch, "standby", self.server.version()).basebackup_option(&mapping);
        let builder = settings.iter().fold(builder, |builder, (name, value)| builder.setting(name, value));
        builder.create_standby_of(&self.server)
    }

    /// The agent of a second member, writing with the same key. `wal` as in [`Setup`].
    pub fn second_agent(&self, server: &PgServer, wal: Value) -> anyhow::Result<Agent> {
        let agent = Agent::builder(&self.scratch, "host2").instance(CLUSTER, server);
        let agent = agent.repository(&self.place, &self.key_file).postgres(server.version());
        match wal {
            Value::Null => agent.build(),
            wal => agent.section("wal", wal).build(),
        }
    }

    /// A server on a restored directory, started, once it has recovered to the target and takes writes.
    pub fn recovered(&self, restored: &Restored) -> anyhow::Result<PgServer> {
        let mut server = self.server_of(restored, false)?;
        server.start()?;
        server.wait_until_writable()?;
        Ok(server)
    }
}

/// Waits until the repository has all that a server has written so far by streaming.
pub fn streamed_all(server: &PgServer) -> anyhow::Result<()> {
    let session = server.session()?;
    let end = session.value("SELECT pg_current_wal_flush_lsn()")?;
    wait_for("the stream to be durable", ARCHIVE_LIMIT, || {
        let sql = format!(
            "SELECT coalesce(max(flush_lsn) >= '{end}', false) FROM pg_stat_replication WHERE application_name = 'walfleet'"
        );
        Ok(session.is_true(&sql)?.then_some(()))
    })
}

/// Has everything a server wrote so far archived, and waits until the archiver was told that it is.
pub fn archive_all(server: &PgServer) -> anyhow::Result<Lsn> {
    let session = server.session()?;
    // A switch right after a switch does nothing: there must be a record between.
    session.execute("SELECT pg_create_restore_point('archive_all')")?;
    let end: Lsn = session.value("SELECT pg_switch_wal()")?.parse().context("read a WAL position")?;
    let last = session.value(&format!("SELECT pg_walfile_name('{end}')"))?;
    wait_for(&format!("{last} to be archived"), ARCHIVE_LIMIT, || {
        let archived = session.value("SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver")?;
        // Backup history files count too: "<segment>.<offset>.backup".
        Ok((archived.get(..24) >= last.get(..24)).then_some(()))
    })?;
    Ok(end)
}
