//! Copies that go on under cluster names of their own: they share the original's content where their host holds its key,
//! and are whole by themselves.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use walfleet_integration_tests::fleet::standalone::CLUSTER;
use walfleet_integration_tests::fleet::{Agent, Fleet, Place, Standalone};
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::process::run;
use walfleet_integration_tests::scratch::{Scratch, in_scratch};

const COPY: &str = "orders-copy";

/// A restored directory as a server that archives for itself; not started.
fn server_of(scratch: &Scratch, version: &PgVersion, data_dir: &Path) -> anyhow::Result<PgServer> {
    PgServer::builder(scratch, "copy-server", version).setting("archive_mode", "on").open(data_dir)
}

fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_default()
}

/// A backup that refers to the original's and stores little; both reports as `backup` shows them.
fn must_cost_little(original: &Value, copy: &Value) -> anyhow::Result<()> {
    let (first, second) = (number(original, "new_bytes"), number(copy, "new_bytes"));
    println!("original {first} new bytes, copy {second}");
    // The fingerprint reads every page, and sets hint bits on some.
    anyhow::ensure!(first > 10 << 20 && second < first / 5, "{original}\n{copy}");
    anyhow::ensure!(copy["parents"][0] == original["id"], "{copy}");
    Ok(())
}

/// The copy's own life: a load of its own.
fn live(server: &PgServer) -> anyhow::Result<Fingerprint> {
    let mut load = server.client("pgbench");
    load.args(["-n", "-t", "50", "-c", "2"]);
    run(load)?;
    Fingerprint::take(&server.session()?)
}

#[test]
fn a_restored_copy_under_a_name_of_its_own_stores_what_differs_and_restores_whole() {
    in_scratch(|scratch| {
        // The copy's archiver tries the original's agent before it is told of its own.
        scratch.allow_log("belongs to no cluster of this agent");
        let version = PgVersion::of(17)?;
        let host = Standalone::start(scratch, &version, Place::folder(scratch)?)?;
        let original = host.backup()?;
        let restored = host.restore("copy", &["--latest"])?;
        let mut copy = server_of(scratch, &version, &restored.data_dir)?;
        copy.start()?;
        copy.wait_until_writable()?;
        let agent = |name: &str, cluster: &str, lineage: &str| {
            let builder = Agent::builder(scratch, name).instance_of(cluster, &copy, lineage);
            builder.repository(&host.place, &host.key_file).postgres(&version).build()
        };
        let mut own = agent("host2", COPY, "shared")?;
        own.start()?;
        own.archive_for(&copy)?;
        let expected = live(&copy)?;
        let first = own.json(&["backup", "--cluster", COPY, "--fast"])?;
        must_cost_little(&original, &first)?;
        let second = own.json(&["backup", "--cluster", COPY, "--fast"])?;
        anyhow::ensure!(second["parents"][0] == first["id"] && number(&second, "read_bytes") < 8 << 20, "{second}");

        for (name, backup) in [("again0", &first), ("again1", &second)] {
            let data_dir = scratch.join(name);
            let id = backup["id"].as_str().unwrap_or_default();
            let mut words = host.restore_words(&data_dir, &["--backup", id, "--immediate"]);
            words.iter_mut().filter(|word| *word == CLUSTER).for_each(|word| COPY.clone_into(word));
            // The copy's tablespace lies where the restore put it.
            let (original, own) = (format!("{}=", host.tablespace), format!("{}.fast=", restored.data_dir.display()));
            words.iter_mut().for_each(|word| *word = word.replace(&original, &own));
            host.run(&words)?.ok()?;
            let mut server = PgServer::builder(scratch, &format!("{name}-server"), &version).open(&data_dir)?;
            server.start()?;
            server.wait_until_writable()?;
            Fingerprint::take(&server.session()?)?.must_equal(&expected)?;
        }
        let verified = own.run(&["verify", "--cluster", COPY, "--deep"])?;
        anyhow::ensure!(verified.code == 0, "{verified:?}");

        // Kept apart by its configuration, the same server costs all of it again, and refers to nothing.
        let apart = agent("host3", "orders-apart", "separate")?;
        let third = apart.json(&["backup", "--cluster", "orders-apart", "--fast"])?;
        anyhow::ensure!(number(&third, "new_bytes") > number(&original, "new_bytes") / 2, "{third}");
        anyhow::ensure!(third["parents"] == serde_json::json!([]), "{third}");
        Ok(())
    });
}

#[test]
fn in_a_fleet_the_controller_lends_a_copy_its_first_parent() {
    in_scratch(|scratch| {
        scratch.allow_log("belongs to no cluster of this agent");
        // The agent is there before what it protects.
        scratch.allow_log("cannot be read");
        scratch.allow_log("job failed");
        let version = PgVersion::of(16)?;
        let fleet = Fleet::start(scratch)?;
        let _host = fleet.protected(&version)?;
        let original = fleet.backup(CLUSTER)?;
        let data_dir = scratch.join("copy");
        let mut copy = server_of(scratch, &version, &data_dir)?;
        let mut lab = fleet.agent("lab1").instance(COPY, &copy).postgres(&version).build()?;
        fleet.join(&mut lab, &["restores=yes"])?;
        let text = data_dir.display().to_string();
        let restore = ["restore", "start", CLUSTER, "--on", "lab1", "--data-dir", &text, "--latest", "--wait"];
        // A host hears in a moment that it may restore, and is granted the key after that.
        walfleet_integration_tests::wait_for("lab1 to restore", Duration::from_secs(120), || {
            Ok((fleet.admin.run(&restore)?.code == 0).then_some(()))
        })?;
        copy.start()?;
        copy.wait_until_writable()?;
        fleet.wait_for_cluster(COPY, "bound to its repository", |cluster| cluster["policy"].is_string())?;
        fleet.wait_until_bound(&lab, &copy)?;
        lab.archive_for(&copy)?;
        let expected = live(&copy)?;
        let started = std::time::Instant::now();
        let first = fleet.backup(COPY)?;
        anyhow::ensure!(started.elapsed() < Duration::from_secs(60), "the loan was waited for too long: {first}");
        must_cost_little(&original["backup"], &first["backup"])?;

        let again = scratch.join("again").display().to_string();
        let id = first["backup"]["id"].as_str().unwrap_or_default();
        let words = ["restore", "start", COPY, "--on", "db1", "--data-dir", &again, "--immediate", "--backup", id];
        // A host that may restore anything, granted the copy's key by the copy's host.
        walfleet_integration_tests::wait_for("db1 to restore the copy", Duration::from_secs(120), || {
            let answer = fleet.admin.run(&[&words[..], &["--wait"]].concat())?;
            Ok((answer.code == 0).then_some(()))
        })?;
        let mut server = PgServer::builder(scratch, "again-server", &version).open(Path::new(&again))?;
        server.start()?;
        server.wait_until_writable()?;
        Fingerprint::take(&server.session()?)?.must_equal(&expected)
    });
}
