//! What jobs cost is counted and kept, and the next plans come near it.

use anyhow::Context;
use serde_json::Value;
use walfleet_integration_tests::fleet::Fleet;
use walfleet_integration_tests::fleet::standalone::{CLUSTER, archive_all};
use walfleet_integration_tests::ports::free_port;
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::scratch::in_scratch;

#[test]
fn plans_come_near_what_jobs_of_the_cluster_cost() {
    in_scratch(|scratch| {
        let version = PgVersion::of(16)?;
        let fleet = Fleet::start(scratch)?;
        let host = fleet.protected(&version)?;
        let mut lab = fleet.agent("lab1").postgres(&version).build()?;
        fleet.join(&mut lab, &["restores=yes"])?;

        let plan = fleet.admin.json(&["backup", "plan", CLUSTER])?;
        anyhow::ensure!(plan["estimated_seconds"].is_null() && plan["read_all_because"].is_string(), "{plan}");
        let first = fleet.backup(CLUSTER)?;
        must_be_counted(&first, &["checkpoint", "copy", "wait for wal", "commit"])?;
        anyhow::ensure!(first["backup"]["read_all_because"] == "there was no backup to compare with", "{first}");
        let mut last = Value::Null;
        for _ in 0..2 {
            host.server.session()?.execute("UPDATE pgbench_branches SET bbalance = bbalance + 1")?;
            archive_all(&host.server)?;
            last = fleet.backup(CLUSTER)?;
            let backup = &last["backup"];
            anyhow::ensure!(backup["read_all_because"].is_null(), "{backup}");
            let (read, all) = (number(backup, "read_bytes")?, number(backup, "cluster_bytes")?);
            anyhow::ensure!(read < all / 2 && number(backup, "spared_bytes")? == all - read, "{backup}");
        }
        let plan = fleet.admin.json(&["backup", "plan", CLUSTER])?;
        anyhow::ensure!(plan["estimated_from"] == "the last 2 backups that read what changed", "{plan}");
        anyhow::ensure!(plan["estimated_seconds"].is_number(), "{plan}");
        must_be_near(number(&plan, "read_bytes")?, number(&last["backup"], "read_bytes")?)?;
        must_be_near(number(&plan, "store_requests")?, number(&last["cost"], "store_requests")?)?;
        let all = fleet.admin.json(&["backup", "plan", CLUSTER, "--read-all"])?;
        must_be_near(number(&all, "read_bytes")?, number(&first["backup"], "read_bytes")?)?;

        let (data_dir, port) = (scratch.join("restored"), free_port());
        let (folder, port_text) = (data_dir.display().to_string(), port.to_string());
        let planned = |on: &str| {
            let plan = ["restore", "plan", CLUSTER, "--on", on, "--data-dir", &folder];
            fleet.admin.json(&plan)
        };
        let before = planned("lab1")?;
        let basis = "the last backup that read everything on another host, since no restore is known, without replay";
        anyhow::ensure!(before["estimated_from"] == basis, "{before}");
        let restore = ["restore", "start", CLUSTER, "--on", "lab1", "--data-dir", &folder, "--wait"];
        let done = fleet.admin.json(&[&restore[..], &["--start", "--port", &port_text]].concat())?;
        PgServer::builder(scratch, "copy", &version)
            .adopt(&data_dir, host.server.socket_dir(), port)?
            .wait_until_writable()?;
        must_be_counted(&done, &["plan", "restore", "finish", "start", "replay"])?;
        must_be_near(number(&before, "fetched_bytes")?, number(&done["restore"], "fetched_bytes")?)?;
        must_be_near(number(&before, "store_requests")?, number(&done["restore"], "store_requests")?)?;
        anyhow::ensure!(before["wal_segments"].as_u64() >= Some(1), "{before}");

        // Its own, and by the controller's word another host's.
        for (on, basis) in [("lab1", "the last restore"), ("db1", "the last restore on another host")] {
            let after = planned(on)?;
            anyhow::ensure!(after["estimated_from"] == basis, "{after}");
            anyhow::ensure!(after["at_most"] == false, "{after}");
        }
        let verified = fleet.admin.json(&["backup", "verify", CLUSTER, "--wait"])?;
        must_be_counted(&verified, &["verify"])
    });
}

/// By kind and by phase, in a job as it is shown later.
fn must_be_counted(job: &Value, phases: &[&str]) -> anyhow::Result<()> {
    let cost = &job["cost"];
    let kinds: u64 = ["gets", "puts", "heads", "lists"].iter().filter_map(|kind| cost[kind].as_u64()).sum();
    anyhow::ensure!(kinds > 0 && kinds == number(cost, "store_requests")?, "{cost}");
    anyhow::ensure!(number(cost, "received_bytes")? > 0, "{cost}");
    let counted: Vec<&str> =
        cost["phases"].as_array().into_iter().flatten().filter_map(|phase| phase["phase"].as_str()).collect();
    for phase in phases {
        anyhow::ensure!(counted.contains(phase), "no {phase} among {counted:?}");
    }
    Ok(())
}

fn number(of: &Value, field: &str) -> anyhow::Result<u64> {
    of[field].as_u64().with_context(|| format!("no {field} in {of}"))
}

/// Within a factor of two.
fn must_be_near(expected: u64, found: u64) -> anyhow::Result<()> {
    anyhow::ensure!(expected <= 2 * found && found <= 2 * expected, "{expected} was expected, and it was {found}");
    Ok(())
}
