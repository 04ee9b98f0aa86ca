//! The controller's word, carried out by agents, through crashes of either: a job ends in a true state, WAL goes on.

use std::time::Duration;

use walfleet_integration_tests::fleet::Fleet;
use walfleet_integration_tests::fleet::standalone::{CLUSTER, archive_all};
use walfleet_integration_tests::ports::free_port;
use walfleet_integration_tests::postgres::barrier::{Barriers, OwnRow};
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::load::Load;
use walfleet_integration_tests::postgres::{PgServer, PgVersion, judge};
use walfleet_integration_tests::process::run;
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::wait_for;

const NOT_RECOVERABLE: i32 = 7;
const REFUSED: i32 = 4;

/// An agent looks at the repository once a minute, and after each job.
const FACTS_LIMIT: Duration = Duration::from_secs(90);

#[test]
fn an_operator_restores_a_second_on_another_host() {
    in_scratch(|scratch| {
        // Two of its restores are to be refused.
        scratch.allow_log("job failed");
        let version = PgVersion::of(16)?;
        let fleet = Fleet::start(scratch)?;
        let host = fleet.protected(&version)?;
        let mut lab = fleet.agent("lab1").postgres(&version).build()?;
        fleet.join(&mut lab, &["restores=yes"])?;
        host.server.reload_with("archive_timeout", "1s")?;
        let load = Load::start(scratch, &host.server, &host.dataset, 2, Some(200))?;
        let job = fleet.backup(CLUSTER)?;
        anyhow::ensure!(job["state"] == "succeeded", "{job}");
        let truth = Barriers::install(&host.server)?.pass()?;
        std::thread::sleep(Duration::from_secs(1));
        let to = truth.time.replace("+00", " UTC");
        fleet.wait_until_recoverable(CLUSTER, &["--to", &to], "lab1")?;

        let (data_dir, port) = (scratch.join("restored"), free_port());
        let (dir_text, port_text) = (data_dir.display().to_string(), port.to_string());
        let restore = ["restore", "start", CLUSTER, "--on", "lab1", "--data-dir", &dir_text, "--wait"];
        let restore = |more: &[&str]| fleet.admin.run(&[&restore[..], more].concat());
        restore(&["--to", "2020-01-01 00:00:00 UTC"])?.exit(NOT_RECOVERABLE)?;
        let plan = ["restore", "plan", CLUSTER, "--on", "lab1", "--data-dir", &dir_text, "--to", &to];
        fleet.admin.json(&plan)?;
        anyhow::ensure!(!data_dir.exists(), "a plan or a refusal left {dir_text}");
        restore(&["--to", &to, "--start", "--port", &port_text])?.ok()?;
        let copy = PgServer::builder(scratch, "copy", &version).adopt(&data_dir, host.server.socket_dir(), port)?;
        copy.wait_until_writable()?;
        truth.must_be_state_of(&copy.session()?, OwnRow::Absent)?;
        judge::check_relations(&copy)?;
        restore(&["--latest"])?.exit(REFUSED)?;

        // The copy went on, and is wanted as it was.
        copy.session()?.execute("CREATE TABLE later AS SELECT generate_series(1, 100000) AS n")?;
        let mut stop = version.command("pg_ctl");
        stop.args(["stop", "--mode=immediate", "--wait", "--pgdata"]).arg(&data_dir);
        run(stop)?;
        let again = restore(&["--to", &to, "--delta", "--start", "--port", &port_text])?.ok()?;
        anyhow::ensure!(again.stdout.contains("were kept"), "{}", again.stdout);
        copy.wait_until_writable()?;
        anyhow::ensure!(
            copy.session()?.is_true("SELECT to_regclass('later') IS NULL")?,
            "the copy is as it was before"
        );
        truth.must_be_state_of(&copy.session()?, OwnRow::Absent)?;
        load.stop()
    });
}

#[test]
fn a_controller_killed_during_a_backup_comes_back_to_a_true_state() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        let mut fleet = Fleet::start(scratch)?;
        let host = fleet.protected(&PgVersion::newest()?)?;
        for round in 0..4u64 {
            let job = fleet.admin.json(&["backup", "start", CLUSTER])?;
            let id = job["id"].as_str().unwrap_or_default().to_owned();
            std::thread::sleep(Duration::from_millis(40 + 150 * round));
            fleet.controller.kill_nine()?;
            // Its loss stops no WAL.
            host.server.session()?.execute("CREATE TABLE IF NOT EXISTS meanwhile AS SELECT 1 AS n")?;
            archive_all(&host.server)?;
            fleet.controller.start()?;
            fleet.admin.run(&["job", "watch", &id, "--timeout", "60s"])?.ok()?;
        }
        // Each job made one backup, and none was made twice. The list is what the agent last said.
        let count = || Ok(fleet.admin.json(&["backup", "list", CLUSTER])?["backups"].as_array().map_or(0, Vec::len));
        wait_for("4 jobs to have made 4 backups", FACTS_LIMIT, || Ok((count()? >= 4).then_some(())))?;
        let count: anyhow::Result<usize> = count();
        assert_eq!(count?, 4);
        Ok(())
    });
}

#[test]
fn an_agent_killed_during_a_job_comes_back_and_the_job_ends_in_a_true_state() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        let fleet = Fleet::start(scratch)?;
        let mut host = fleet.protected(&PgVersion::newest()?)?;
        for round in 0..4u64 {
            let job = fleet.admin.json(&["backup", "start", CLUSTER])?;
            let id = job["id"].as_str().unwrap_or_default().to_owned();
            std::thread::sleep(Duration::from_millis(60 + 150 * round));
            host.agent.kill_nine()?;
            host.agent.start()?;
            // Succeeded, by this attempt or a later one, or failed with a reason; never stuck.
            let watched = fleet.admin.run(&["job", "watch", &id, "--timeout", "120s"])?;
            anyhow::ensure!(watched.code <= 1, "{watched:?}");
            let job = fleet.admin.json(&["job", "show", &id])?;
            let backup = job["backup"]["id"].as_str().unwrap_or("none");
            match job["state"].as_str() {
                Some("succeeded") => wait_for(&format!("{backup} to be listed: {job}"), FACTS_LIMIT, || {
                    let listed = fleet.admin.json(&["backup", "list", CLUSTER])?;
                    Ok(listed.to_string().contains(backup).then_some(()))
                })?,
                Some("failed") => anyhow::ensure!(job["error"]["message"].is_string(), "{job}"),
                _ => anyhow::bail!("not over: {job}"),
            }
        }
        fleet.backup(CLUSTER)?;
        Ok(())
    });
}

/// Principle 1: with the bucket, the key and the agent's program, any backup restores.
#[test]
fn without_controller_and_hosts_the_recovery_key_restores() {
    in_scratch(|scratch| {
        let version = PgVersion::of(15)?;
        let fleet = Fleet::start(scratch)?;
        let mut host = fleet.protected(&version)?;
        fleet.backup(CLUSTER)?;
        let load = Load::start(scratch, &host.server, &host.dataset, 2, Some(200))?;
        std::thread::sleep(Duration::from_secs(1));
        load.stop()?;
        let expected = Fingerprint::take(&host.server.session()?)?;
        archive_all(&host.server)?;
        let key = scratch.join("from-the-safe.key");
        std::fs::rename(fleet.controller.recovery_key(), &key)?;
        let program = walfleet_integration_tests::binaries::program("walfleet-agent")?;
        host.agent.kill_nine()?;
        host.server.kill_nine()?;
        let Fleet { mut controller, .. } = fleet;
        controller.kill_nine()?;
        for gone in ["controller", "agent-db1", "orders"] {
            std::fs::remove_dir_all(scratch.join(gone))?;
        }

        let url = format!("file://{}", scratch.join("repository").display());
        let restored = scratch.join("restored");
        let mut command = walfleet_integration_tests::os_user::os_user().command(program);
        command.args(["restore", "--repository", &url, "--key-file"]).arg(&key);
        command.args(["--cluster", CLUSTER, "--latest", "--data-dir"]).arg(&restored);
        walfleet_integration_tests::output::Output::of(command, Duration::from_secs(120))?.ok()?;
        let mut server = PgServer::builder(scratch, "copy", &version).open(&restored)?;
        server.start()?;
        server.wait_until_writable()?;
        Fingerprint::take(&server.session()?)?.must_equal(&expected)
    });
}
