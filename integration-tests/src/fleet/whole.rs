//! A controller with agents joined to it, and what tests ask of such a fleet.

use std::time::Duration;

use anyhow::Context;
use serde_json::Value;

use super::standalone::CLUSTER;
use super::{Agent, AgentBuilder, Controller, Ctl, Place};
use crate::os_user::os_user;
use crate::output::Output;
use crate::postgres::dataset::Dataset;
use crate::postgres::{PgServer, PgVersion};
use crate::scratch::Scratch;
use crate::wait_for;

/// Facts come every second; this is for a machine that is very busy.
const FACTS_LIMIT: Duration = Duration::from_secs(60);

/// The documented exit code (docs: the command line).
const NOT_RECOVERABLE: i32 = 7;

/// The repository's name in documents.
pub const REPOSITORY: &str = "main";

/// A host of the fleet whose server is protected.
pub struct Protected {
    /// Dropped before the server, so that it does not complain of its end.
    pub agent: Agent,
    pub server: PgServer,
    pub dataset: Dataset,
}

pub struct Fleet {
    scratch: Scratch,
    pub controller: Controller,
    pub admin: Ctl,
}

impl Fleet {
    /// A controller of its own, running.
    pub fn start(scratch: &Scratch) -> anyhow::Result<Fleet> {
        Fleet::with(scratch, Controller::init(scratch)?)
    }

    /// With an initialised controller, which is started.
    pub fn with(scratch: &Scratch, mut controller: Controller) -> anyhow::Result<Fleet> {
        controller.start()?;
        let admin = controller.admin()?;
        Ok(Fleet { scratch: scratch.clone(), controller, admin })
    }

    /// A host that calls this controller; not joined yet.
    pub fn agent(&self, name: &str) -> AgentBuilder {
        Agent::builder(&self.scratch, name).controller(self.controller.url())
    }

    /// A token for one agent, with labels that policies may select restore hosts by.
    pub fn token(&self, labels: &[&str]) -> anyhow::Result<String> {
        let mut words = vec!["token", "create", "--role", "agent", "--ttl", "1h"];
        labels.iter().for_each(|label| words.extend(["--label", label]));
        let token = self.admin.json(&words)?;
        token["token"].as_str().map(str::to_owned).with_context(|| format!("no token in {token}"))
    }

    /// Another operator, in a role.
    pub fn operator(&self, name: &str, role: &str) -> anyhow::Result<Ctl> {
        let token = self.admin.json(&["token", "create", "--role", role, "--ttl", "1h"])?;
        let token = token["token"].as_str().with_context(|| format!("no token in {token}"))?;
        Ctl::login(&self.scratch, self.controller.url(), token, name)
    }

    /// Joins a host, starts its agent and waits until the controller sees it.
    pub fn join(&self, agent: &mut Agent, labels: &[&str]) -> anyhow::Result<()> {
        agent.join(self.controller.url(), &self.token(labels)?)?.ok()?;
        agent.start()?;
        self.wait_until_connected(agent.name())
    }

    pub fn wait_until_connected(&self, agent: &str) -> anyhow::Result<()> {
        wait_for(&format!("agent {agent} to connect"), FACTS_LIMIT, || {
            let answer = self.admin.run(&["agent", "show", agent, "-o", "json"])?;
            Ok((answer.code == 0 && answer.json()?["connected"] == true).then_some(()))
        })
    }

    /// Declares the repository and a policy that binds every cluster; hosts labelled `restores=yes` may restore.
    pub fn protect(&self, place: &Place) -> anyhow::Result<()> {
        let repository = serde_json::json!({
            "apiVersion": "walfleet/v1", "kind": "Repository", "name": REPOSITORY,
            "spec": { "url": place.url, "options": place.options },
        });
        let policy = serde_json::json!({
            "apiVersion": "walfleet/v1", "kind": "Policy", "name": "everything",
            "spec": {
                "selector": "", "repository": REPOSITORY,
                "backup": { "fast_checkpoint": true },
                "objectives": { "rpo": "1m", "backup_age": "1d" },
                "restore": { "hosts": "restores=yes" },
            },
        });
        self.apply(&format!("{repository}\n---\n{policy}\n"))
    }

    pub fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        let file = self.scratch.join("fleet.yaml");
        os_user().write(&file, yaml)?;
        self.admin.run(&["apply", "-f", &file.to_string_lossy()])?.ok().map(drop)
    }

    pub fn cluster(&self, name: &str) -> anyhow::Result<Value> {
        self.admin.json(&["cluster", "show", name])
    }

    /// Waits until something is true of a cluster as the controller shows it.
    pub fn wait_for_cluster(&self, name: &str, what: &str, test: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let mut last = String::new();
        let found = wait_for(&format!("cluster {name}: {what}"), FACTS_LIMIT, || {
            let answer = self.admin.run(&["cluster", "show", name, "-o", "json"])?;
            last = format!("{}{}", answer.stdout, answer.stderr);
            Ok((answer.code == 0).then(|| answer.json()).transpose()?.filter(&test))
        });
        found.with_context(|| last)
    }

    /// Waits until a moment can be restored, by asking for the plan: facts about repositories come once a minute.
    pub fn wait_until_recoverable(&self, name: &str, target: &[&str], on: &str) -> anyhow::Result<()> {
        let data_dir = self.scratch.join("only-planned").display().to_string();
        let words = [&["restore", "plan", name, "--on", on, "--data-dir", &data_dir], target].concat();
        wait_for(&format!("cluster {name} to be recoverable as of {target:?}"), FACTS_LIMIT, || {
            let answer = self.admin.run(&words)?;
            anyhow::ensure!(answer.code == 0 || answer.code == NOT_RECOVERABLE, "{answer:?}");
            Ok((answer.code == 0).then_some(()))
        })
    }

    /// The repository in a folder, a server with the usual data and its host joined and archiving, and a policy.
    pub fn protected(&self, version: &PgVersion) -> anyhow::Result<Protected> {
        let server = PgServer::builder(&self.scratch, "orders", version)
            .setting("archive_mode", "on")
            .setting("archive_command", "false")
            .create()?;
        let dataset = Dataset { scale: 1 };
        dataset.create(&server)?;
        let mut agent = self.agent("db1").instance(CLUSTER, &server).postgres(version).build()?;
        self.join(&mut agent, &["restores=yes"])?;
        self.protect(&Place::folder(&self.scratch)?)?;
        self.wait_for_cluster(CLUSTER, "bound to its repository", |cluster| cluster["policy"].is_string())?;
        self.wait_until_bound(&agent, &server)?;
        agent.archive_for(&server)?;
        Ok(Protected { agent, server, dataset })
    }

    /// Waits until an agent has heard from the controller which cluster its server belongs to: until it takes a segment.
    /// PostgreSQL would ask three times and then rest for a minute (pgarch.c).
    pub fn wait_until_bound(&self, agent: &Agent, server: &PgServer) -> anyhow::Result<()> {
        self.scratch.allow_log("belongs to no cluster of this agent");
        self.scratch.allow_log("has not heard yet which clusters");
        // Known to the agent a moment before the keeper has made it.
        self.scratch.allow_log("holds no repository");
        let session = server.session()?;
        let segment = session.value("SELECT pg_walfile_name(pg_switch_wal())")?;
        let path = server.data_dir().join("pg_wal").join(segment).display().to_string();
        let socket = agent.socket().display().to_string();
        wait_for(&format!("agent {} to archive", agent.name()), FACTS_LIMIT, || {
            let push = agent.command(&["wal", "push", "--socket", &socket, &path]);
            Ok((Output::of(push, FACTS_LIMIT)?.code == 0).then_some(()))
        })
    }

    /// Takes a backup now and waits for it; the job as it ended.
    pub fn backup(&self, cluster: &str) -> anyhow::Result<Value> {
        self.admin.json(&["backup", "start", cluster, "--wait"])
    }
}
