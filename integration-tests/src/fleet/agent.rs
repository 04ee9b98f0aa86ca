//! One host: an agent's configuration and state, its daemon, and its own commands.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal};
use serde_json::{Map, Value, json};

use super::Place;
use crate::binaries;
use crate::network::inside;
use crate::os_user::os_user;
use crate::output::Output;
use crate::postgres::{PgServer, PgVersion};
use crate::process::Process;
use crate::scratch::Scratch;
use crate::wait_for;

/// A backup of a test's cluster takes seconds; this is for a machine that is very busy.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);
const START_LIMIT: Duration = Duration::from_secs(20);

pub struct AgentBuilder {
    scratch: Scratch,
    name: String,
    config: Map<String, Value>,
    instances: Vec<Value>,
    environment: Vec<(String, String)>,
    namespace: Option<String>,
}

impl AgentBuilder {
    /// Its daemon runs in a network namespace; its own commands do not.
    pub fn inside(mut self, namespace: &str) -> AgentBuilder {
        self.namespace = Some(namespace.to_owned());
        self
    }

    /// A server of this host and the cluster it is a member of.
    pub fn instance(self, cluster: &str, server: &PgServer) -> AgentBuilder {
        self.instance_of(cluster, server, "shared")
    }

    /// The same, with its `lineage`.
    pub fn instance_of(mut self, cluster: &str, server: &PgServer, lineage: &str) -> AgentBuilder {
        self.instances.push(json!({
            "cluster": cluster,
            "data_dir": server.data_dir(),
            "connection": server.connection(),
            "lineage": lineage,
        }));
        self
    }

    /// Connects to its servers as this role, and not as a superuser.
    pub fn as_role(mut self, role: &str) -> AgentBuilder {
        for instance in &mut self.instances {
            // Of two the last counts.
            let connection = instance["connection"].as_str().map(|connection| format!("{connection} user={role}"));
            instance["connection"] = connection.into();
        }
        self
    }

    pub fn controller(self, url: &str) -> AgentBuilder {
        self.section("controller", json!({ "url": url }))
    }

    /// For a host without a controller.
    pub fn repository(self, place: &Place, key_file: &Path) -> AgentBuilder {
        let section = json!({ "url": place.url, "options": place.options, "key_file": key_file });
        self.section("repository", section).environment(place.credentials.clone())
    }

    /// Which PostgreSQL is installed on this host.
    pub fn postgres(self, version: &PgVersion) -> AgentBuilder {
        self.section("postgres", json!({ "bin_dirs": [version.bin()] }))
    }

    pub fn label(mut self, key: &str, value: &str) -> AgentBuilder {
        let labels = self.config.entry("labels").or_insert_with(|| json!({}));
        if let Some(labels) = labels.as_object_mut() {
            labels.insert(key.to_owned(), json!(value));
        }
        self
    }

    /// Any section of deploy/agent.yaml.
    pub fn section(mut self, name: &str, value: Value) -> AgentBuilder {
        self.config.insert(name.to_owned(), value);
        self
    }

    pub fn environment(mut self, variables: impl IntoIterator<Item = (impl ToString, impl ToString)>) -> AgentBuilder {
        self.environment.extend(variables.into_iter().map(|(name, value)| (name.to_string(), value.to_string())));
        self
    }

    /// Writes the configuration. Nothing runs yet.
    pub fn build(mut self) -> anyhow::Result<Agent> {
        let state_dir = self.scratch.dir(&format!("agent-{}", self.name))?;
        self.config.insert("name".to_owned(), json!(self.name));
        self.config.insert("state_dir".to_owned(), json!(state_dir));
        self.config.insert("instances".to_owned(), Value::Array(self.instances));
        let config = self.scratch.join(&format!("agent-{}.yaml", self.name));
        // JSON is YAML.
        os_user().write(&config, serde_json::to_string_pretty(&Value::Object(self.config))?)?;
        let log = self.scratch.join(&format!("agent-{}.log", self.name));
        self.scratch.watch_log(&log);
        Ok(Agent {
            scratch: self.scratch,
            name: self.name,
            program: binaries::program(binaries::AGENT)?,
            config,
            state_dir,
            environment: self.environment,
            namespace: self.namespace,
            process: None,
        })
    }
}

pub struct Agent {
    scratch: Scratch,
    name: String,
    program: PathBuf,
    config: PathBuf,
    state_dir: PathBuf,
    environment: Vec<(String, String)>,
    namespace: Option<String>,
    process: Option<Process>,
}

impl Agent {
    pub fn builder(scratch: &Scratch, name: &str) -> AgentBuilder {
        AgentBuilder {
            scratch: scratch.clone(),
            name: name.to_owned(),
            config: Map::new(),
            instances: Vec::new(),
            environment: Vec::new(),
            namespace: None,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn config(&self) -> &Path {
        &self.config
    }

    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    pub fn socket(&self) -> PathBuf {
        self.state_dir.join("agent.sock")
    }

    /// What a server of this host is given as archive_command.
    pub fn archive_command(&self) -> String {
        format!("{} wal push --socket {} %p", self.program.display(), self.socket().display())
    }

    /// Has a running server of this host archive through this agent.
    pub fn archive_for(&self, server: &PgServer) -> anyhow::Result<()> {
        server.reload_with("archive_command", &self.archive_command())
    }

    /// One of the agent's own commands, with its configuration.
    pub fn run(&self, words: &[&str]) -> anyhow::Result<Output> {
        let mut words = words.to_vec();
        let config = self.config.to_string_lossy();
        words.extend(["--config", &config]);
        Output::of(self.command(&words), COMMAND_LIMIT)
    }

    /// Runs it with `-o json`; it must succeed.
    pub fn json(&self, words: &[&str]) -> anyhow::Result<Value> {
        let mut words = words.to_vec();
        words.extend(["-o", "json"]);
        self.run(&words)?.ok()?.json()
    }

    /// The program with exactly these words.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = os_user().command(&self.program);
        command.args(words);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    pub fn join(&self, controller: &str, token: &str) -> anyhow::Result<Output> {
        self.run(&["join", "--controller", controller, "--token", token])
    }

    /// Starts the daemon and waits until its socket answers.
    pub fn start(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.process.is_none(), "agent {} runs already", self.name);
        let command = self.command(&["run", "--config", &self.config.to_string_lossy()]);
        let command = self.namespace.iter().fold(command, |command, namespace| inside(namespace, &command));
        let name = format!("agent-{}", self.name);
        self.process = Some(Process::spawn(&self.scratch, &name, command, Signal::TERM)?);
        let socket = self.socket();
        let process = self.process.as_mut().context("just spawned")?;
        wait_for(&format!("agent {} to listen", self.name), START_LIMIT, || {
            if let Some(status) = process.ended()? {
                anyhow::bail!("agent {} ended ({status}) while starting:\n{}", self.name, process.log_text());
            }
            Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok().then_some(()))
        })
    }

    /// As systemd would: SIGTERM, and it must end by itself with 0.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let mut process = self.process.take().with_context(|| format!("agent {} does not run", self.name))?;
        process.signal(Signal::TERM);
        let status = process.wait(Duration::from_secs(20))?;
        anyhow::ensure!(status.success(), "agent {} ended with {status} on SIGTERM", self.name);
        Ok(())
    }

    pub fn kill_nine(&mut self) -> anyhow::Result<()> {
        self.process.take().with_context(|| format!("agent {} does not run", self.name))?.kill_nine()
    }

    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        match &mut self.process {
            Some(process) => Ok(process.ended()?.is_none()),
            None => Ok(false),
        }
    }

    /// As on a host that swaps, or whose hypervisor stands still.
    pub fn freeze(&self) {
        self.process.iter().for_each(|process| process.signal(Signal::STOP));
    }

    pub fn thaw(&self) {
        self.process.iter().for_each(|process| process.signal(Signal::CONT));
    }

    /// Of the daemon, while it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.process.as_ref().map(Process::pid)
    }

    pub fn log_text(&self) -> String {
        self.process.as_ref().map(Process::log_text).unwrap_or_default()
    }

    pub fn leave_running(mut self) {
        if let Some(process) = self.process.take() {
            process.leave_running();
        }
    }
}
