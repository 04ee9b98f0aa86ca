//! A second place of a repository: what comes to the first is brought there, and restores without it.

use std::time::Duration;

use serde_json::{Value, json};
use walfleet_integration_tests::fleet::Fleet;
use walfleet_integration_tests::fleet::standalone::CLUSTER;
use walfleet_integration_tests::postgres::PgVersion;
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;

use crate::gaps::{mark, marks, restored, write_segments};

const PATIENCE: Duration = Duration::from_secs(60);

const REPLICA: &str = "second";

/// The documented exit code (docs: the command line).
const REFUSED: i32 = 4;

fn declare(scratch: &Scratch, fleet: &Fleet) -> anyhow::Result<()> {
    let url = format!("file://{}", scratch.join(REPLICA).display());
    let replica = json!({
        "apiVersion": "walfleet/v1", "kind": "Repository", "name": REPLICA,
        "spec": { "url": url, "replica_of": "main", "rpo": "1m" },
    });
    fleet.apply(&replica.to_string())
}

fn seen(fleet: &Fleet) -> anyhow::Result<Value> {
    let status = fleet.admin.json(&["replica", "status"])?;
    Ok(status["replicas"].as_array().and_then(|all| all.first().cloned()).unwrap_or_default())
}

/// Waits until the replica has all WAL as of a moment, and every backup.
fn wait_until_complete(fleet: &Fleet, as_of: &str) -> anyhow::Result<()> {
    let mut last = Value::Null;
    let found = wait_for("the replica to be complete", PATIENCE, || {
        last = seen(fleet)?;
        let is_complete = last["complete_as_of"].as_str().is_some_and(|at| at > as_of);
        Ok((is_complete && last["lacking_backups"] == 0).then_some(()))
    });
    found.map_err(|error| error.context(last.to_string()))
}

#[test]
fn a_replica_restores_when_the_first_place_is_gone() {
    in_scratch(|scratch| {
        let version = PgVersion::of(17)?;
        let fleet = Fleet::start(scratch)?;
        let host = fleet.protected(&version)?;
        mark(&host.server, "before the first")?;
        write_segments(&host.server, 2)?;
        fleet.backup(CLUSTER)?;
        mark(&host.server, "before the replica")?;
        write_segments(&host.server, 2)?;
        declare(scratch, &fleet)?;
        wait_until_complete(&fleet, "")?;
        write_segments(&host.server, 1)?;
        fleet.backup(CLUSTER)?;
        mark(&host.server, "the last")?;
        let now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')";
        let end = host.server.session()?.value("SELECT pg_current_wal_lsn()")?;
        fleet.wait_for_cluster(CLUSTER, "the mark is stored", |cluster| {
            let lsn = |value: &Value| crate::gaps::lsn(value);
            let durable = &cluster["members"][0]["instance"]["archive"]["durable_lsn"];
            durable.is_string() && lsn(durable) >= lsn(&Value::from(end.as_str()))
        })?;
        wait_until_complete(&fleet, &host.server.session()?.value(now)?)?;
        let shown = fleet.admin.run(&["replica", "status"])?.ok()?.stdout;
        anyhow::ensure!(shown.contains("complete"), "{shown}");

        let stranger =
            fleet.admin.run(&["restore", "plan", CLUSTER, "--on", "db1", "--data-dir", "/x", "--from", "main2"])?;
        anyhow::ensure!(stranger.code != 0 && stranger.stderr.contains("not declared"), "{stranger:?}");
        let itself = json!({
            "apiVersion": "walfleet/v1", "kind": "Repository", "name": "third",
            "spec": { "url": "file:///x", "replica_of": REPLICA },
        });
        let chained = scratch.join("chained.yaml");
        walfleet_integration_tests::os_user::os_user().write(&chained, itself.to_string())?;
        let refused = fleet.admin.run(&["apply", "-f", &chained.to_string_lossy()])?;
        anyhow::ensure!(refused.code != 0 && refused.stderr.contains("is a replica"), "{refused:?}");
        anyhow::ensure!(refused.code == REFUSED || refused.code == 2, "{refused:?}");

        // Whatever the programs say of a place that is gone.
        scratch.allow_log("");
        std::fs::rename(scratch.join("repository"), scratch.join("burnt"))?;
        let server = restored(scratch, &fleet, &version, "again", &["--latest", "--from", REPLICA])?;
        let found = marks(&server)?;
        anyhow::ensure!(found == ["before the first", "before the replica", "the last"], "{found:?}");
        let verified =
            fleet.admin.run(&["restore", "plan", CLUSTER, "--on", "db1", "--data-dir", "/x", "--from", REPLICA])?;
        anyhow::ensure!(verified.code == 0, "{verified:?}");
        Ok(())
    });
}
