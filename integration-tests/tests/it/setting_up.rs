//! Setting hosts up: what is not ready ends once and says why, doctor says what comes next, and what is found on a host
//! shows as what it is.

use std::time::Duration;

use serde_json::Value;
use walfleet_integration_tests::binaries;
use walfleet_integration_tests::fleet::standalone::CLUSTER;
use walfleet_integration_tests::fleet::{Agent, Fleet};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::output::Output;
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Shutdown};
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;

/// The documented exit code, after which the units do not restart.
const USAGE: i32 = 2;
const FAILED: i32 = 1;
const DONE: i32 = 0;

/// An agent looks at its host every ten seconds; this is for a machine that is very busy.
const FACTS_LIMIT: Duration = Duration::from_secs(60);
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

fn controller_run(config: &std::path::Path) -> anyhow::Result<Output> {
    let mut command = os_user().command(binaries::program(binaries::CONTROLLER)?);
    command.arg("run").arg("--config").arg(config);
    Output::of(command, COMMAND_LIMIT)
}

#[test]
fn a_program_that_needs_a_person_ends_with_the_code_after_which_units_stay_down() {
    in_scratch(|scratch| {
        let config = scratch.join("controller.yaml");
        controller_run(&config)?.exit(USAGE)?.says("read configuration")?;
        os_user().write(&config, "listen: nowhere")?;
        controller_run(&config)?.exit(USAGE)?.says("listen")?;
        os_user().write(&config, format!("directory: {}", scratch.join("empty").display()))?;
        controller_run(&config)?.exit(USAGE)?.says("walfleet-controller init")?;

        let host = Agent::builder(scratch, "db1").controller("https://127.0.0.1:1").build()?;
        host.run(&["run"])?.exit(USAGE)?.says("walfleet-agent join")?;
        let findings = doctor(&host, FAILED)?;
        let (join, start) = (position(&findings, "identity"), position(&findings, "socket"));
        anyhow::ensure!(join.is_some() && join < start, "to join comes before to start: {findings:?}");
        Ok(())
    });
}

#[test]
fn doctor_asks_the_controller_politely_and_hears_of_a_revocation() {
    in_scratch(|scratch| {
        let fleet = Fleet::start(scratch)?;
        let mut host = fleet.agent("db1").build()?;
        fleet.join(&mut host, &[])?;
        wait_for("the host to hear what it is to do", FACTS_LIMIT, || {
            Ok((host.run(&["doctor", "--no-probe"])?.code == DONE).then_some(()))
        })?;
        let findings = doctor(&host, DONE)?;
        let found = |check| position(&findings, check).and_then(|at| findings.get(at)).cloned().unwrap_or_default();
        let (controller, clock) = (found("controller"), found("clock"));
        anyhow::ensure!(controller["verdict"] == "ok" && clock["verdict"] == "ok", "{findings:?}");
        anyhow::ensure!(controller["message"].to_string().contains("as agent db1"), "{controller}");
        let log = controller_log(scratch)?;
        anyhow::ensure!(!log.contains("refused"), "doctor is no noise at the controller:\n{log}");

        host.stop()?;
        fleet.admin.run(&["agent", "revoke", "db1", "--yes"])?.ok()?;
        let log = fleet.admin.json(&["audit", "list", "--since", "1h", "--limit", "1"])?;
        let newest = &log["entries"][0];
        anyhow::ensure!(newest["call"] == "Access.RevokeAgent" && newest["actor"] == "admin", "{log}");
        let whole = fleet.admin.json(&["audit", "verify"])?;
        anyhow::ensure!(whole["head_hash"] == newest["hash"], "{whole}: {log}");
        let findings = doctor(&host, FAILED)?;
        let controller = position(&findings, "controller").and_then(|at| findings.get(at)).cloned().unwrap_or_default();
        anyhow::ensure!(controller["verdict"] == "fix" && controller.to_string().contains("revoked"), "{controller}");
        Ok(())
    });
}

#[test]
fn a_running_server_that_nobody_declared_shows_as_what_it_is() {
    in_scratch(|scratch| {
        let version = PgVersion::newest()?;
        let fleet = Fleet::start(scratch)?;
        let stranger = PgServer::builder(scratch, "stranger", &version).create()?;
        let shown = stranger.session()?.value("SHOW server_version")?;
        let shown = shown.split(' ').next().unwrap_or_default().to_owned();
        // Declared, and not running.
        let mut down = PgServer::builder(scratch, "orders", &version).create()?;
        down.stop(Shutdown::Fast)?;
        let mut host = fleet.agent("db1").instance(CLUSTER, &down).build()?;
        fleet.join(&mut host, &[])?;
        let instance = |data_dir: &std::path::Path| {
            wait_for(&format!("{} to be seen", data_dir.display()), FACTS_LIMIT, || {
                let agent = fleet.admin.json(&["agent", "show", "db1"])?;
                let instances = agent["instances"].as_array().cloned().unwrap_or_default();
                Ok(instances.into_iter().find(|instance| instance["data_dir"] == data_dir.display().to_string()))
            })
        };
        let seen = instance(stranger.data_dir())?;
        anyhow::ensure!(seen["role"] == "primary" && seen["server_version"] == shown.as_str(), "{shown}: {seen}");
        anyhow::ensure!(seen["cluster"].is_null() && seen["system_identifier"].is_string(), "{seen}");
        let seen = instance(down.data_dir())?;
        let major = shown.split('.').next().unwrap_or_default();
        anyhow::ensure!(seen["role"] == "down" && seen["server_version"] == major, "{seen}");
        Ok(())
    });
}

/// Its findings, in their order.
fn doctor(host: &Agent, code: i32) -> anyhow::Result<Vec<Value>> {
    let answer = host.run(&["doctor", "--no-probe", "-o", "json"])?.exit(code)?.json()?;
    Ok(answer["findings"].as_array().cloned().unwrap_or_default())
}

fn position(findings: &[Value], check: &str) -> Option<usize> {
    findings.iter().position(|finding| finding["check"] == check)
}

fn controller_log(scratch: &Scratch) -> anyhow::Result<String> {
    Ok(String::from_utf8_lossy(&std::fs::read(scratch.join("controller.log"))?).into_owned())
}
