//! `pg_wal` that fills while the repository takes nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::{CLUSTER, streamed_all};
use walfleet_integration_tests::fleet::whole::REPOSITORY;
use walfleet_integration_tests::fleet::{Agent, Controller, Fleet, Place};
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;

use crate::full_disks::SmallDisk;
use crate::gaps::{SEEN, mark, write_segments};

/// A fleet with one host, whose server streams to an object store as `wal` of its policy says.
fn streaming_to(scratch: &Scratch, store: &S3Server, server: &PgServer, wal: Value) -> anyhow::Result<(Fleet, Agent)> {
    let place = Place::s3(store);
    let mut controller = Controller::init(scratch)?;
    controller.environment(place.credentials.clone());
    let fleet = Fleet::with(scratch, controller)?;
    let agent = fleet.agent("db1").instance(CLUSTER, server).environment(place.credentials.clone());
    let mut agent = agent.postgres(server.version()).build()?;
    fleet.join(&mut agent, &[])?;
    let repository = json!({
        "apiVersion": "walfleet/v1", "kind": "Repository", "name": REPOSITORY,
        "spec": { "url": place.url, "options": place.options },
    });
    let policy = json!({
        "apiVersion": "walfleet/v1", "kind": "Policy", "name": "everything",
        "spec": { "selector": "", "repository": REPOSITORY, "backup": { "fast_checkpoint": true }, "wal": wal },
    });
    fleet.apply(&format!("{repository}\n---\n{policy}\n"))?;
    fleet.wait_for_cluster(CLUSTER, "streamed", |cluster| {
        cluster["members"][0]["instance"]["archive"]["stream"]["phase"] == "streaming"
    })?;
    Ok((fleet, agent))
}

/// The slot goes on keeping WAL whoever runs: an agent that cannot even begin must say so.
#[test]
fn a_pg_wal_that_fills_is_foreseen_by_an_agent_that_began_while_the_store_was_away() {
    in_scratch(|scratch| {
        // The store is away for the rest.
        scratch.allow_log("WARN");
        let store = S3Server::start(&scratch.dir("s3")?)?;
        let server = PgServer::builder(scratch, "primary", &PgVersion::newest()?).create()?;
        let (fleet, mut agent) = streaming_to(scratch, &store, &server, json!({ "streaming": "on" }))?;
        streamed_all(&server)?;

        store.spoil(Rule::new(Fault::Cut));
        agent.kill_nine()?;
        agent.start()?;
        let is_seen = AtomicBool::new(false);
        let session = server.session()?;
        std::thread::scope(|scope| {
            // Segments of next to nothing take their whole place in pg_wal.
            scope.spawn(|| {
                while !is_seen.load(Ordering::Relaxed) {
                    let sql = "SELECT pg_logical_emit_message(false, 'fill', 'x'), pg_switch_wal()";
                    if session.execute(sql).is_err() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(250));
                }
            });
            let seen = fleet.wait_for_cluster(CLUSTER, "a risk of pg_wal", |cluster| {
                cluster["reason"].as_str().is_some_and(|reason| reason.contains("pg_wal will be full in"))
            });
            is_seen.store(true, Ordering::Relaxed);
            let archive = &seen?["members"][0]["instance"]["archive"];
            anyhow::ensure!(archive["stream"]["phase"] == "waiting", "{archive}");
            anyhow::ensure!(archive["stream"]["problem"].is_string(), "it says why nothing is received: {archive}");
            Ok(())
        })
    });
}

#[test]
fn a_policys_limit_in_percent_lets_go_of_wal_before_the_disk_is_full() {
    in_scratch(|scratch| {
        let Some(disk) = SmallDisk::mount(scratch, 400)? else { return Ok(()) };
        // The store is away for minutes.
        scratch.allow_log("WARN");
        scratch.allow_log("ERROR");
        let store = S3Server::start(&scratch.dir("s3")?)?;
        let server = PgServer::builder(scratch, "primary", &PgVersion::newest()?)
            .initdb_option(format!("--waldir={}", disk.path().join("pg_wal").display()))
            .setting("min_wal_size", "32MB")
            .setting("max_wal_size", "64MB")
            .create()?;
        let wal = json!({ "streaming": "on", "let_go_at": "60%" });
        let (fleet, _agent) = streaming_to(scratch, &store, &server, wal)?;
        fleet.backup(CLUSTER)?;
        mark(&server, "before")?;
        streamed_all(&server)?;

        store.spoil(Rule::new(Fault::Status(503)));
        // 60 % are 240 MB.
        write_segments(&server, 17)?;
        let session = server.session()?;
        let slots =
            |wanted: i64| Ok((session.number("SELECT count(*) FROM pg_replication_slots")? == wanted).then_some(()));
        wait_for("the slot to be let go of", SEEN, || slots(0))?;
        wait_for("the space to be free", SEEN, || {
            session.execute("CHECKPOINT")?;
            Ok((session.number("SELECT sum(size)::bigint FROM pg_ls_waldir()")? <= 128 << 20).then_some(()))
        })?;
        store.heal();

        let seen = fleet.wait_for_cluster(CLUSTER, "the gap, and a backup behind it", |cluster| {
            let recovery = &cluster["recovery"][0];
            recovery["gaps"][0]["recorded"].is_object()
                && recovery["ranges"].as_array().is_some_and(|ranges| ranges.len() == 2)
        })?;
        let gap = &seen["recovery"][0]["gaps"][0];
        let reason = gap["recorded"]["reason"].as_str().unwrap_or_default();
        anyhow::ensure!(reason.contains("let_go_at: 60%"), "{gap}");
        let jobs = fleet.admin.json(&["job", "list", "--cluster", CLUSTER])?;
        let made = jobs["jobs"].as_array().into_iter().flatten().filter(|job| job["requested_by"] == "gap").count();
        anyhow::ensure!(made == 1, "{jobs}");
        Ok(())
    });
}
