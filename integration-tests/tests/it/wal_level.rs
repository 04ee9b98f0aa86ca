//! WAL that was written with `wal_level = minimal`: it lies in the archive, and nothing is promised of it.

use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::streamed_all;
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Shutdown};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::wait_for;
use walfleet_repository::postgres::Lsn;

use crate::gaps::{NOT_RECOVERABLE, SEEN, lsn, mark, marks, restored, streaming_fleet};

const CLUSTER: &str = walfleet_integration_tests::fleet::standalone::CLUSTER;

/// Starts the server anew with a level and without what does not go with it.
fn restart_with(server: &mut PgServer, level: &str, senders: &str) -> anyhow::Result<()> {
    server.stop(Shutdown::Fast)?;
    server.append_settings([("wal_level", level), ("max_wal_senders", senders)].into_iter())?;
    server.start()
}

fn tables(server: &PgServer) -> anyhow::Result<Vec<String>> {
    server.session()?.column("SELECT relname FROM pg_class WHERE relname LIKE 'bulk%' ORDER BY 1")
}

#[test]
fn what_a_server_wrote_with_wal_level_minimal_is_a_gap_and_both_sides_restore() {
    in_scratch(|scratch| {
        let version = PgVersion::newest()?;
        let mut server = PgServer::builder(scratch, "primary", &version).create()?;
        let (fleet, mut agent) = streaming_fleet(scratch, &server, json!({}))?;
        let first = fleet.admin.json(&["backup", "list", CLUSTER])?["backups"][0]["id"].clone();
        mark(&server, "a before")?;
        streamed_all(&server)?;
        let before: Lsn = server.session()?.value("SELECT pg_current_wal_insert_lsn()")?.parse()?;

        // No server starts with wal_level = minimal as long as it has a slot.
        agent.stop()?;
        server.session()?.execute("SELECT pg_drop_replication_slot('walfleet')")?;
        restart_with(&mut server, "minimal", "0")?;
        let shut: Lsn = server.session()?.value("SELECT redo_lsn FROM pg_control_checkpoint()")?.parse()?;
        server.session()?.execute(
            "SET wal_skip_threshold = 0; BEGIN; CREATE TABLE bulk AS SELECT generate_series(1, 100000) AS n; COMMIT",
        )?;
        mark(&server, "b minimal")?;
        // What it recovers from by itself says nothing of its level.
        server.kill_nine()?;
        server.start()?;
        mark(&server, "c minimal again")?;
        restart_with(&mut server, "replica", "10")?;
        let again: Lsn = server.session()?.value("SELECT pg_current_wal_insert_lsn()")?.parse()?;
        scratch.allow_log("it is made anew");
        agent.start()?;
        mark(&server, "d behind")?;

        let seen = fleet.wait_for_cluster(CLUSTER, "the gap", |cluster| {
            cluster["recovery"][0]["gaps"][0]["recorded"]["by"] == "db1"
        })?;
        let gap = &seen["recovery"][0]["gaps"][0];
        let (from, to) = (lsn(&gap["from_lsn"]), lsn(&gap["to_lsn"]));
        anyhow::ensure!(from == shut && from < to && to <= again, "{gap}: from {shut} to {again}");
        let reason = gap["recorded"]["reason"].as_str().unwrap_or_default();
        anyhow::ensure!(reason.contains("wal_level=minimal") && gap["acknowledged"] == false, "{gap}");
        let shown = fleet.admin.run(&["wal", "gaps", CLUSTER])?.ok()?.stdout;
        anyhow::ensure!(shown.contains("wal_level=minimal"), "{shown}");
        let ranges = |cluster: &Value| cluster["recovery"][0]["ranges"].as_array().cloned().unwrap_or_default();
        let seen = wait_for("a backup behind it", SEEN, || {
            let cluster = fleet.cluster(CLUSTER)?;
            Ok((ranges(&cluster).len() == 2).then_some(cluster))
        })?;
        let windows = ranges(&seen);
        anyhow::ensure!(lsn(&windows[0]["to_lsn"]) == from && to <= lsn(&windows[1]["from_lsn"]), "{seen}");
        let jobs = fleet.admin.json(&["job", "list", "--cluster", CLUSTER])?;
        let made = jobs["jobs"].as_array().into_iter().flatten().filter(|job| job["requested_by"] == "gap").count();
        anyhow::ensure!(made == 1, "{jobs}");
        mark(&server, "e later")?;
        let later: Lsn = server.session()?.value("SELECT pg_current_wal_insert_lsn()")?.parse()?;
        mark(&server, "f last")?;
        streamed_all(&server)?;

        // Before it, up to its very beginning, at the end of what an older backup reaches, and behind it.
        let first = first.as_str().unwrap_or_default();
        let (before, edge, later) = (before.to_string(), from.to_string(), later.to_string());
        for (name, target) in [
            ("before", &["--to-lsn", before.as_str()][..]),
            ("edge", &["--to-lsn", edge.as_str()]),
            ("end", &["--latest", "--backup", first]),
        ] {
            let found = restored(scratch, &fleet, &version, name, target)?;
            anyhow::ensure!(
                marks(&found)? == ["a before"] && tables(&found)?.is_empty(),
                "{name}: {:?}",
                marks(&found)?
            );
        }
        let found = restored(scratch, &fleet, &version, "later", &["--to-lsn", later.as_str()])?;
        anyhow::ensure!(marks(&found)? == marks(&server)?[..5], "{:?}", marks(&found)?);
        let latest = restored(scratch, &fleet, &version, "latest", &["--latest"])?;
        anyhow::ensure!(marks(&latest)? == marks(&server)?, "{:?}", marks(&latest)?);
        anyhow::ensure!(latest.session()?.number("SELECT count(*) FROM bulk")? == 100_000);

        scratch.allow_log("lies where WAL is missing");
        scratch.allow_log("does not reach");
        let nowhere = scratch.join("nowhere").display().to_string();
        let behind = to.to_string();
        let inside = Lsn(from.0 / 2 + to.0 / 2).to_string();
        for target in [
            &["--to-lsn", inside.as_str()][..],
            &["--to-lsn", behind.as_str()],
            &["--to-lsn", later.as_str(), "--backup", first],
        ] {
            let words = [&["restore", "plan", CLUSTER, "--on", "db1", "--data-dir", &nowhere], target].concat();
            anyhow::ensure!(fleet.admin.run(&words)?.code == NOT_RECOVERABLE, "{target:?}");
        }
        Ok(())
    });
}
