//! `pg_wal` that fills while the repository takes nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use walfleet_integration_tests::fleet::standalone::{CLUSTER, streamed_all};
use walfleet_integration_tests::fleet::whole::REPOSITORY;
use walfleet_integration_tests::fleet::{Controller, Fleet, Place};
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::scratch::in_scratch;

/// The slot goes on keeping WAL whoever runs: an agent that cannot even begin must say so.
#[test]
fn a_pg_wal_that_fills_is_foreseen_by_an_agent_that_began_while_the_store_was_away() {
    in_scratch(|scratch| {
        // The store is away for the rest.
        scratch.allow_log("WARN");
        let version = PgVersion::newest()?;
        let store = S3Server::start(&scratch.dir("s3")?)?;
        let place = Place::s3(&store);
        let mut controller = Controller::init(scratch)?;
        controller.environment(place.credentials.clone());
        let fleet = Fleet::with(scratch, controller)?;
        let server = PgServer::builder(scratch, "primary", &version).create()?;
        let agent = fleet.agent("db1").instance(CLUSTER, &server).environment(place.credentials.clone());
        let mut agent = agent.postgres(&version).build()?;
        fleet.join(&mut agent, &[])?;
        let repository = json!({
            "apiVersion": "walfleet/v1", "kind": "Repository", "name": REPOSITORY,
            "spec": { "url": place.url, "options": place.options },
        });
        let policy = json!({
            "apiVersion": "walfleet/v1", "kind": "Policy", "name": "everything",
            "spec": { "selector": "", "repository": REPOSITORY, "wal": { "streaming": "on" } },
        });
        fleet.apply(&format!("{repository}\n---\n{policy}\n"))?;
        fleet.wait_for_cluster(CLUSTER, "streamed", |cluster| {
            cluster["members"][0]["instance"]["archive"]["stream"]["phase"] == "streaming"
        })?;
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
