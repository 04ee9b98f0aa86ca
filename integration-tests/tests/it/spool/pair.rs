//! A server whose commits wait for two hosts' spools, with all that it takes.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::CLUSTER;
use walfleet_integration_tests::fleet::whole::REPOSITORY;
use walfleet_integration_tests::fleet::{Agent, Controller, Fleet, Place};
use walfleet_integration_tests::network::Line;
use walfleet_integration_tests::output::Output;
use walfleet_integration_tests::ports::free_port;
use walfleet_integration_tests::postgres::acknowledged::{Acknowledged, Lost, Record};
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::scratch::Scratch;
use walfleet_integration_tests::{binaries, os_user, tree, wait_for};
use walfleet_repository::postgres::Lsn;

/// The peer waits ten seconds, and then stores what it has.
pub const STORED_LIMIT: Duration = Duration::from_secs(60);

/// A peer is missed after two seconds, and one that is back is found a second later.
const COMMITS_LIMIT: Duration = Duration::from_secs(15);

/// A server whose commits wait for the spools of its own agent and of the agent `keeper`.
pub struct Pair {
    /// Dropped before the controller and the server, so that it does not complain of their end.
    pub agent: Agent,
    pub keeper: Agent,
    pub server: PgServer,
    pub fleet: Fleet,
    pub scratch: Scratch,
    pub place: Place,
}

impl Pair {
    pub fn start(scratch: &Scratch, place: Place, wal: Value) -> anyhow::Result<Pair> {
        Pair::start_on((None, 1024), scratch, place, wal)
    }

    /// The keeper at the other end of a line, if there is one, with a spool of so many MiB.
    pub fn start_on(
        (line, spool_mib): (Option<&Line>, u32),
        scratch: &Scratch,
        place: Place,
        wal: Value,
    ) -> anyhow::Result<Pair> {
        let (near, far) = line.map_or((Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST), |line| (line.near(), line.far()));
        let mut controller = Controller::init_at(scratch, near)?;
        controller.environment(place.credentials.clone());
        let fleet = Fleet::with(scratch, controller)?;
        let version = PgVersion::newest()?;
        let server = PgServer::builder(scratch, "primary", &version).create()?;
        let agent = fleet.agent("db1").instance(CLUSTER, &server).environment(place.credentials.clone());
        let mut agent = agent.postgres(&version).build()?;
        let listen = format!("{far}:{}", free_port());
        let keeper = fleet.agent("keeper").environment(place.credentials.clone());
        let keeper = line.into_iter().fold(keeper, |keeper, line| keeper.inside(line.namespace()));
        let mut keeper =
            keeper.section("spool", json!({ "listen": listen, "advertise": listen, "size_mib": spool_mib })).build()?;
        fleet.join(&mut agent, &[])?;
        fleet.join(&mut keeper, &[])?;
        // The agent may hear of its cluster before the keeper of the repository has made that.
        scratch.allow_log("holds no repository");
        let pair = Pair { fleet, scratch: scratch.clone(), place, server, agent, keeper };
        pair.policy(wal)?;
        pair.wait_until("spools")?;
        let job = pair.fleet.backup(CLUSTER)?;
        anyhow::ensure!(job["state"] == "succeeded", "{job}");
        pair.server.reload_with("synchronous_standby_names", "walfleet")?;
        Ok(pair)
    }

    /// Declares the repository, and how WAL is shipped.
    pub fn policy(&self, wal: Value) -> anyhow::Result<()> {
        let repository = json!({
            "apiVersion": "walfleet/v1", "kind": "Repository", "name": REPOSITORY,
            "spec": { "url": self.place.url, "options": self.place.options },
        });
        let backup = json!({ "fast_checkpoint": true });
        let policy = json!({
            "apiVersion": "walfleet/v1", "kind": "Policy", "name": "everything",
            "spec": { "selector": "", "repository": REPOSITORY, "wal": wal, "backup": backup },
        });
        self.fleet.apply(&format!("{repository}\n---\n{policy}\n"))
    }

    /// Waits until the controller shows what commits wait for.
    pub fn wait_until(&self, waits_for: &str) -> anyhow::Result<Value> {
        self.fleet.wait_for_cluster(CLUSTER, &format!("commits that wait for {waits_for}"), |cluster| {
            let members = cluster["members"].as_array().into_iter().flatten();
            let mut spools = members.map(|member| &member["instance"]["archive"]["stream"]["spool"]);
            spools.any(|spool| spool["waits_for"] == waits_for)
        })
    }

    /// Waits until the controller says so of the cluster.
    pub fn wait_for_reason(&self, said: &str) -> anyhow::Result<Value> {
        self.fleet.wait_for_cluster(CLUSTER, &format!("\"{said}\""), |cluster| {
            cluster["reason"].as_str().is_some_and(|reason| reason.contains(said))
        })
    }

    pub fn commits(&self) -> anyhow::Result<i64> {
        self.server.session()?.number("SELECT count(*) FROM acknowledged")
    }

    /// Waits until commits return again.
    pub fn wait_for_commits(&self) -> anyhow::Result<()> {
        let before = self.commits()?;
        wait_for("commits to return", COMMITS_LIMIT, || Ok((self.commits()? > before + 50).then_some(())))
    }

    /// Waits until the server's agent has said something so often.
    pub fn wait_for_log(&self, text: &str, times: usize) -> anyhow::Result<()> {
        let what = format!("the agent to say \"{text}\" {times} times");
        wait_for(&what, STORED_LIMIT, || Ok((self.agent.log_text().matches(text).count() >= times).then_some(())))
    }

    /// Holds that no commit returns.
    pub fn must_wait(&self) -> anyhow::Result<()> {
        let before = self.commits()?;
        std::thread::sleep(Duration::from_secs(2));
        let after = self.commits()?;
        anyhow::ensure!(before == after, "{} commits returned that must wait", after - before);
        Ok(())
    }

    /// As the server has heard it: where what was received is written, and where it is flushed.
    pub fn positions(&self) -> anyhow::Result<(Lsn, Lsn)> {
        let column = "SELECT unnest(ARRAY[write_lsn, flush_lsn]) FROM pg_stat_replication";
        let reported = self.server.session()?.column(&format!("{column} WHERE application_name = 'walfleet'"))?;
        let [written, flushed] = &reported[..] else { anyhow::bail!("the agent does not stream: {reported:?}") };
        Ok((written.parse()?, flushed.parse()?))
    }

    /// The host is destroyed, and the repository alone restores all that the workload had been told.
    /// `spoilt`: the store, which is well again then. So many commits there were.
    pub fn destroy_and_lose_nothing(
        &mut self,
        workload: Acknowledged,
        spoilt: Option<&S3Server>,
    ) -> anyhow::Result<usize> {
        let disaster = self.destroy()?;
        self.lose_nothing(workload, disaster, spoilt)
    }

    /// The same of a host that is destroyed already.
    pub fn lose_nothing(
        &self,
        workload: Acknowledged,
        disaster: Instant,
        spoilt: Option<&S3Server>,
    ) -> anyhow::Result<usize> {
        let record = workload.end()?;
        if let Some(store) = spoilt {
            store.heal();
        }
        self.wait_until_stored()?;
        let lost = self.lost(&record, disaster)?;
        assert_eq!(lost.commits, 0, "{lost:?} of {}", record.commits());
        Ok(record.commits())
    }

    /// Server, disk and agent, with its spool, are gone at once.
    pub fn destroy(&mut self) -> anyhow::Result<Instant> {
        let disaster = Instant::now();
        self.server.kill_nine()?;
        self.agent.kill_nine()?;
        std::fs::remove_dir_all(self.server.data_dir())?;
        std::fs::remove_dir_all(self.agent.state_dir())?;
        Ok(disaster)
    }

    /// In the keeper's spool.
    pub fn kept_bytes(&self) -> anyhow::Result<u64> {
        let files = tree::all(&self.keeper.state_dir().join("spool"))?;
        Ok(files.iter().filter(|(_, meta)| meta.is_file()).map(|(_, meta)| meta.len()).sum())
    }

    /// Waits until the repository has all that the keeper has kept.
    pub fn wait_until_stored(&self) -> anyhow::Result<()> {
        wait_for("the keeper to store what it has", STORED_LIMIT, || {
            let files = tree::all(&self.keeper.state_dir().join("spool"))?;
            Ok((!files.iter().any(|(path, _)| path.extension().is_some_and(|ext| ext == "pieces"))).then_some(()))
        })
    }

    /// What a restore with nothing but the repository and the recovery key lacks.
    pub fn lost(&self, record: &Record, disaster: Instant) -> anyhow::Result<Lost> {
        let restored = self.scratch.join("restored");
        let mut command = os_user::os_user().command(binaries::program(binaries::AGENT)?);
        command.arg("restore").args(self.place.flags(&self.fleet.controller.recovery_key()));
        command.args(["--cluster", CLUSTER, "--latest", "--data-dir"]).arg(&restored);
        command.envs(self.place.credentials.iter().map(|(name, value)| (name, value)));
        Output::of(command, Duration::from_secs(180))?.ok()?;
        let builder = PgServer::builder(&self.scratch, "copy", self.server.version());
        let mut server = builder.environment(self.place.credentials.clone()).open(&restored)?;
        server.start()?;
        server.wait_until_writable()?;
        record.lost(&server.session()?, disaster)
    }

    /// Waits until the agent has what it needs to go on without the repository.
    pub fn wait_until_noted(&self) -> anyhow::Result<()> {
        let noted = self.agent.state_dir().join("wal-places").join(CLUSTER);
        wait_for("the agent to note where WAL goes", STORED_LIMIT, || Ok(noted.exists().then_some(())))
    }

    /// Waits until the repository has what is written by now.
    pub fn wait_until_flushed(&self) -> anyhow::Result<()> {
        let (written, _) = self.positions()?;
        wait_for("the repository to have what was written", STORED_LIMIT, || {
            Ok(self.positions().is_ok_and(|(_, flushed)| flushed >= written).then_some(()))
        })
    }

    pub fn start_agent_anew(&mut self) -> anyhow::Result<()> {
        self.agent.kill_nine()?;
        self.agent.start()
    }

    pub fn start_server_anew(&mut self) -> anyhow::Result<()> {
        self.server.kill_nine()?;
        self.server.start()
    }
}
