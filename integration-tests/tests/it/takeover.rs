//! A controller whose folder is lost without a copy: the recovery key makes another, and what was stored goes on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use walfleet_integration_tests::fleet::standalone::{CLUSTER, archive_all};
use walfleet_integration_tests::fleet::{Agent, Fleet, Place, Protected};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::ports::free_port;
use walfleet_integration_tests::postgres::barrier::{Barrier, Barriers, OwnRow};
use walfleet_integration_tests::postgres::{PgServer, PgVersion, judge};
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;

/// The server's archiver rests for a minute after three failures, and grants are looked after once a minute.
const SETTLED: Duration = Duration::from_secs(150);

/// A fleet that lost its controller, the backup from before, and what was true then.
struct Orphaned {
    fleet: Fleet,
    host: Protected,
    recovery_key: PathBuf,
    backup: String,
    truth: Barrier,
}

fn id_of(job: &Value) -> anyhow::Result<String> {
    anyhow::ensure!(job["state"] == "succeeded", "{job}");
    job["backup"]["id"].as_str().map(str::to_owned).ok_or_else(|| anyhow::anyhow!("no backup in {job}"))
}

/// Destroys a controller and makes another with the recovery key. No host has joined it yet.
fn orphaned(scratch: &Scratch, version: &PgVersion) -> anyhow::Result<Orphaned> {
    // Agents complain for as long as nobody they trust answers.
    scratch.allow_log("WARN");
    let fleet = Fleet::start(scratch)?;
    let host = fleet.protected(version)?;
    let backup = id_of(&fleet.backup(CLUSTER)?)?;
    let truth = Barriers::install(&host.server)?.pass()?;
    let recovery_key = scratch.join("from-the-safe.key");
    std::fs::rename(fleet.controller.recovery_key(), &recovery_key)?;
    let Fleet { controller, .. } = fleet;
    let controller = controller.lost_and_replaced(&recovery_key)?;
    // Its hosts know nothing of that and go on.
    host.server.session()?.execute("CREATE TABLE meanwhile AS SELECT 1 AS n")?;
    archive_all(&host.server)?;
    Ok(Orphaned { fleet: Fleet::with(scratch, controller)?, host, recovery_key, backup, truth })
}

impl Orphaned {
    /// The operator applies the documents that made the old fleet.
    fn apply(&self, scratch: &Scratch) -> anyhow::Result<()> {
        let url = format!("file://{}", scratch.join("repository").display());
        self.fleet.protect(&Place { url, options: BTreeMap::new(), credentials: Vec::new() })
    }

    /// A backup by the new controller, and the old one restored through it on another host.
    fn goes_on(&self, scratch: &Scratch, lab: &Agent) -> anyhow::Result<()> {
        let new = id_of(&self.fleet.backup(CLUSTER)?)?;
        wait_for("both backups to be listed", SETTLED, || {
            let listed = self.fleet.admin.json(&["backup", "list", CLUSTER])?.to_string();
            Ok((listed.contains(&self.backup) && listed.contains(&new)).then_some(()))
        })?;
        let (data_dir, port) = (scratch.join("restored"), free_port());
        let to = self.truth.time.replace("+00", " UTC");
        let (data_dir_text, port_text) = (data_dir.display().to_string(), port.to_string());
        let words = ["restore", "start", CLUSTER, "--on", lab.name(), "--data-dir", &data_dir_text, "--wait"];
        let target = ["--to", &to, "--backup", &self.backup, "--start", "--port", &port_text];
        wait_for("the key to be granted and the old backup to be restored", SETTLED, || {
            let answer = self.fleet.admin.run(&[&words[..], &target].concat())?;
            Ok((answer.code == 0).then_some(()))
        })?;
        let server = &self.host.server;
        let copy = PgServer::builder(scratch, "copy", server.version()).adopt(&data_dir, server.socket_dir(), port)?;
        copy.wait_until_writable()?;
        self.truth.must_be_state_of(&copy.session()?, OwnRow::Absent)?;
        judge::check_relations(&copy)
    }
}

#[test]
fn hosts_that_keep_their_keys_go_on_under_a_new_controller() {
    in_scratch(|scratch| {
        // The lab's restore may be asked for before its key is granted.
        scratch.allow_log("job failed");
        let version = PgVersion::newest()?;
        let mut orphaned = orphaned(scratch, &version)?;
        let agent = &mut orphaned.host.agent;
        agent.stop()?;
        let token = orphaned.fleet.token(&[])?;
        let refused = agent.join(orphaned.fleet.controller.url(), &token)?;
        anyhow::ensure!(refused.code == 4 && refused.stderr.contains("certificate.json"), "{refused:?}");
        let certificate = agent.state_dir().join("identity/certificate.json");
        std::fs::rename(&certificate, scratch.join("old-certificate.json"))?;
        orphaned.fleet.join(agent, &["restores=yes"])?;
        orphaned.apply(scratch)?;
        orphaned.fleet.wait_for_cluster(CLUSTER, "bound again", |cluster| cluster["policy"].is_string())?;
        let mut lab = orphaned.fleet.agent("lab1").postgres(&version).build()?;
        orphaned.fleet.join(&mut lab, &["restores=yes"])?;
        orphaned.goes_on(scratch, &lab)
    });
}

#[test]
fn where_no_host_has_a_key_any_more_the_recovery_key_grants_one() {
    in_scratch(|scratch| {
        scratch.allow_log("job failed");
        scratch.allow_log("never granted");
        let version = PgVersion::newest()?;
        let mut orphaned = orphaned(scratch, &version)?;
        let agent = &mut orphaned.host.agent;
        agent.stop()?;
        std::fs::remove_dir_all(agent.state_dir().join("identity"))?;
        orphaned.fleet.join(agent, &["restores=yes"])?;
        orphaned.apply(scratch)?;
        orphaned.fleet.wait_for_cluster(CLUSTER, "bound again", |cluster| cluster["policy"].is_string())?;
        grant(&orphaned.host.agent, &orphaned.recovery_key)?;
        let mut lab = orphaned.fleet.agent("lab1").postgres(&version).build()?;
        orphaned.fleet.join(&mut lab, &["restores=yes"])?;
        orphaned.goes_on(scratch, &lab)
    });
}

/// The operator brings the recovery key to the host for a moment.
fn grant(agent: &Agent, recovery_key: &Path) -> anyhow::Result<()> {
    let key = agent.state_dir().join("recovery.key");
    os_user().write(&key, std::fs::read_to_string(recovery_key)?)?;
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let words = ["grant", "--key-file", &key.display().to_string()];
    wait_for("the controller's word to reach the host", Duration::from_secs(30), || {
        let granted = agent.run(&words)?;
        Ok((granted.code == 0 && granted.stdout.contains("opens it now")).then_some(()))
    })?;
    Ok(std::fs::remove_file(&key)?)
}
