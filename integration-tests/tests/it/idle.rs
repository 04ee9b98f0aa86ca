//! What a cluster costs on which nothing happens.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;
use walfleet_integration_tests::fleet::standalone::{CLUSTER, streamed_all};
use walfleet_integration_tests::fleet::whole::REPOSITORY;
use walfleet_integration_tests::fleet::{Controller, Fleet, Place};
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::s3::{S3Server, Seen};
use walfleet_integration_tests::scratch::in_scratch;

/// Requests of an agent's look at an idle cluster (docs/operation.md, "What it costs").
const PER_LOOK: usize = 4;

/// By method and the part of the repository.
fn kinds(seen: &[Seen]) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for request in seen {
        let key = request.path.rsplit('/').next().unwrap_or_default();
        let folder = request.path.trim_end_matches(key);
        *kinds.entry(format!("{} {folder}", request.method)).or_default() += 1;
    }
    kinds
}

#[test]
fn an_idle_cluster_costs_a_few_looks() {
    in_scratch(|scratch| {
        // Known to the agent a moment before the keeper has made it.
        scratch.allow_log("holds no repository");
        // On a loaded machine, before all is set up.
        scratch.allow_log("nobody stores the WAL that this standby receives");
        // The standby's agent may be asked for the backup before the primary's has granted it the key: another try follows.
        scratch.allow_log("was never granted to recipient");
        let seconds = std::env::var("WALFLEET_IDLE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(70_u64);
        let version = PgVersion::newest()?;
        let store = S3Server::start(&scratch.join("s3"))?;
        let place = Place::s3(&store);
        let mut controller = Controller::init(scratch)?;
        controller.environment(place.credentials.clone());
        let fleet = Fleet::with(scratch, controller)?;
        // A young server's housekeeping would end by itself.
        let primary = PgServer::builder(scratch, "primary", &version).setting("autovacuum", "off").create()?;
        let standby = PgServer::builder(scratch, "standby", &version).create_standby_of(&primary)?;
        let mut agents = Vec::new();
        for (name, server) in [("db1", &primary), ("db2", &standby)] {
            let agent = fleet.agent(name).instance(CLUSTER, server).environment(place.credentials.clone());
            let mut agent = agent.postgres(&version).build()?;
            fleet.join(&mut agent, &[])?;
            agents.push(agent);
        }
        let repository = json!({
            "apiVersion": "walfleet/v1", "kind": "Repository", "name": REPOSITORY,
            "spec": { "url": place.url, "options": place.options },
        });
        let policy = json!({
            "apiVersion": "walfleet/v1", "kind": "Policy", "name": "everything",
            "spec": {
                "selector": "", "repository": REPOSITORY, "wal": { "streaming": "on" },
                "backup": { "fast_checkpoint": true },
            },
        });
        fleet.apply(&format!("{repository}\n---\n{policy}\n"))?;
        fleet.wait_for_cluster(CLUSTER, "bound", |cluster| cluster["policy"].is_string())?;
        fleet.backup(CLUSTER)?;
        primary.session()?.execute("SELECT pg_switch_wal(); CHECKPOINT")?;
        streamed_all(&primary)?;
        fleet.wait_for_cluster(CLUSTER, "protected", |cluster| cluster["state"] == "protected")?;
        // The server's own last words, and the looks that follow them.
        std::thread::sleep(Duration::from_secs(45));

        // 30, 60, 120, … seconds lie between looks, and each agent looks for itself; the keeper asks once in an hour.
        let looks = agents.len() * if seconds <= 90 { 2 } else { 2 + (seconds / 60).ilog2() as usize };
        // On a loaded machine what went before takes longer than that.
        for is_last in [false, false, true] {
            let before = store.seen().len();
            std::thread::sleep(Duration::from_secs(seconds));
            let seen = store.seen().split_off(before);
            let (kinds, requests) = (kinds(&seen), seen.len());
            eprintln!("{requests} requests in {seconds} s: {kinds:#?}");
            let reads = seen.iter().all(|request| matches!(request.method.as_str(), "GET" | "HEAD"));
            if reads && requests <= looks * PER_LOOK + 1 {
                break;
            }
            anyhow::ensure!(!is_last, "{requests} requests in {seconds} s: {kinds:#?}");
        }
        Ok(())
    });
}
