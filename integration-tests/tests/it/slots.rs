//! The slot that keeps WAL until the repository has it is taken away: by hand, by the server, while the agent stands still.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::{CLUSTER, Setup, streamed_all};
use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::postgres::acknowledged::Acknowledged;
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;
use walfleet_repository::postgres::Lsn;

use crate::gaps::{SEEN, lsn, mark, marks, restored, streaming_fleet, write_segments};

/// A server that streams and gives up a silent agent soon.
fn host(scratch: &Scratch, settings: &[(&str, &str)]) -> anyhow::Result<Standalone> {
    let usual = [("wal_sender_timeout", "1500ms"), ("min_wal_size", "32MB"), ("max_wal_size", "64MB")];
    let settings = usual.iter().chain(settings).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let wal = json!({ "streaming": "on" });
    let setup = Setup { settings: settings.collect(), wal, streams_only: true, ..Setup::default() };
    let host = Standalone::set_up(scratch, &PgVersion::newest()?, Place::folder(scratch)?, setup)?;
    host.backup()?;
    mark(&host.server, "before")?;
    host.streamed_all()?;
    Ok(host)
}

fn drop_slot(server: &PgServer) -> anyhow::Result<()> {
    let session = server.session()?;
    wait_for("the slot to be dropped", Duration::from_secs(20), || {
        session.rows("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active")?;
        // The backend takes a moment to let go of it.
        Ok(session.execute("SELECT pg_drop_replication_slot('walfleet')").is_ok().then_some(()))
    })
}

fn wait_for_slot(server: &PgServer, condition: &str) -> anyhow::Result<()> {
    let session = server.session()?;
    wait_for(&format!("a slot of which {condition}"), SEEN, || {
        let sql = format!("SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = 'walfleet' AND {condition}");
        Ok(session.is_true(&sql)?.then_some(()))
    })
}

fn listed(host: &Standalone) -> anyhow::Result<Value> {
    Ok(host.agent.json(&["list", "--cluster", CLUSTER])?["recovery"][0].clone())
}

fn count(value: &Value) -> usize {
    value.as_array().map_or(0, Vec::len)
}

/// Everything up to now is one stretch, and restores.
fn must_be_whole(host: &Standalone, name: &str) -> anyhow::Result<()> {
    host.streamed_all()?;
    let window = listed(host)?;
    anyhow::ensure!(count(&window["ranges"]) == 1 && count(&window["gaps"]) == 0, "{window:#}");
    let copy = host.restore(name, &["--latest"])?;
    let copy = host.recovered(&copy)?;
    anyhow::ensure!(marks(&copy)? == marks(&host.server)?, "{:?}", marks(&copy)?);
    Ok(())
}

#[test]
fn a_slot_dropped_by_hand_is_made_anew_and_what_it_kept_is_stored_or_told() {
    in_scratch(|scratch| {
        scratch.allow_log("WAL is missing in the repository");
        // At first PostgreSQL has no reason to remove any.
        let host = host(scratch, &[("wal_keep_size", "1GB")])?;
        host.agent.freeze();
        drop_slot(&host.server)?;
        mark(&host.server, "without a slot")?;
        write_segments(&host.server, 3)?;
        host.agent.thaw();
        wait_for_slot(&host.server, "active")?;
        must_be_whole(&host, "whole")?;

        // Again, and this time the server has thrown it away.
        host.server.reload_with("wal_keep_size", "0")?;
        host.agent.freeze();
        drop_slot(&host.server)?;
        mark(&host.server, "lost")?;
        write_segments(&host.server, 10)?;
        host.server.session()?.execute("CHECKPOINT")?;
        write_segments(&host.server, 1)?;
        host.server.session()?.execute("CHECKPOINT")?;
        host.agent.thaw();
        wait_for_slot(&host.server, "active")?;
        let window = wait_for("the gap to be recorded", SEEN, || {
            let window = listed(&host)?;
            Ok(window["gaps"][0]["recorded"].is_object().then_some(window))
        })?;
        let gap = &window["gaps"][0];
        let reason = gap["recorded"]["reason"].as_str().unwrap_or_default();
        anyhow::ensure!(reason.contains("there was no replication slot walfleet"), "{gap}");
        mark(&host.server, "later")?;
        host.backup()?;
        host.streamed_all()?;
        let window = listed(&host)?;
        let ranges = &window["ranges"];
        anyhow::ensure!(count(ranges) == 2, "{window:#}");
        anyhow::ensure!(lsn(&ranges[0]["to_lsn"]) <= lsn(&gap["from_lsn"]), "{window:#}");
        anyhow::ensure!(lsn(&gap["to_lsn"]) <= lsn(&ranges[1]["from_lsn"]), "{window:#}");
        let latest = host.restore("latest", &["--latest"])?;
        let latest = host.recovered(&latest)?;
        anyhow::ensure!(marks(&latest)? == marks(&host.server)?, "{:?}", marks(&latest)?);
        Ok(())
    });
}

#[test]
fn a_slot_that_was_idle_for_too_long_is_made_anew() {
    in_scratch(|scratch| {
        scratch.allow_log(
            "the server let go of the WAL that replication slot walfleet kept (idle_timeout); it is made anew",
        );
        // What the slot kept must still be there.
        let host = host(scratch, &[("idle_replication_slot_timeout", "1s"), ("wal_keep_size", "1GB")])?;
        host.agent.freeze();
        wait_for_slot(&host.server, "NOT active")?;
        mark(&host.server, "while the agent stood still")?;
        write_segments(&host.server, 2)?;
        std::thread::sleep(Duration::from_millis(1500));
        host.server.session()?.execute("CHECKPOINT")?;
        wait_for_slot(&host.server, "invalidation_reason = 'idle_timeout'")?;
        host.agent.thaw();
        wait_for_slot(&host.server, "active AND invalidation_reason IS NULL")?;
        must_be_whole(&host, "whole")
    });
}

#[test]
fn what_the_primary_no_longer_has_is_brought_by_a_standby_that_has_it() {
    in_scratch(|scratch| {
        scratch.allow_log("it is made anew");
        scratch.allow_log("WAL is missing in the repository");
        scratch.allow_log("nobody stores the WAL that this standby receives");
        // What the standby, without a slot, is behind for a moment is kept for it.
        let mut host = host(scratch, &[("max_slot_wal_keep_size", "64MB"), ("wal_keep_size", "64MB")])?;
        let standby = host.standby(&[("wal_keep_size", "1GB")])?;
        let mut second = host.second_agent(&standby, json!({ "streaming": "on" }))?;
        host.streamed_all()?;
        host.agent.stop()?;
        mark(&host.server, "while no agent ran")?;
        let session = host.server.session()?;
        for _ in 0..12 {
            write_segments(&host.server, 1)?;
            let end = session.value("SELECT pg_current_wal_flush_lsn()")?;
            wait_for("the standby to have it", SEEN, || {
                let sql = format!("SELECT pg_last_wal_receive_lsn() >= '{end}'");
                Ok(standby.session()?.is_true(&sql)?.then_some(()))
            })?;
        }
        session.execute("CHECKPOINT")?;
        wait_for_slot(&host.server, "wal_status = 'lost'")?;
        host.agent.start()?;
        wait_for("the gap to be recorded", SEEN, || {
            Ok(listed(&host)?["gaps"][0]["recorded"].is_object().then_some(()))
        })?;
        mark(&host.server, "later")?;
        host.streamed_all()?;

        second.start()?;
        let window = wait_for("the gap to be filled", SEEN, || {
            let window = listed(&host)?;
            Ok((count(&window["gaps"]) == 0).then_some(window))
        })?;
        anyhow::ensure!(count(&window["filled"]) > 0, "{window:#}");
        host.tablespace = host.server.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
        must_be_whole(&host, "whole")
    });
}

/// As on a hypervisor that stands still: the server has long ended the connection when the agent goes on.
#[test]
fn an_agent_frozen_for_minutes_under_load_catches_up_and_no_alarm_stays() {
    in_scratch(|scratch| {
        scratch.allow_log("no link to the controller");
        // What was on its way when it was frozen.
        scratch.allow_log("no answer within");
        let version = PgVersion::newest()?;
        let server = PgServer::builder(scratch, "primary", &version).setting("wal_sender_timeout", "10s").create()?;
        let (fleet, agent) = streaming_fleet(scratch, &server, json!({ "objectives": { "rpo": "30s" } }))?;
        fleet.wait_for_cluster(CLUSTER, "protected", |cluster| cluster["state"] == "protected")?;
        let workload = Acknowledged::start(&server, 2, "SET synchronous_commit = on")?;
        agent.freeze();
        fleet.wait_for_cluster(CLUSTER, "an alarm", |cluster| cluster["state"] != "protected")?;
        std::thread::sleep(Duration::from_secs(125));
        anyhow::ensure!(server.session()?.is_true("SELECT NOT active FROM pg_replication_slots")?);
        agent.thaw();
        let healthy = |cluster: &Value| cluster["state"] == "protected" && count(&cluster["recovery"][0]["gaps"]) == 0;
        fleet.wait_for_cluster(CLUSTER, "protected again", healthy)?;
        std::thread::sleep(Duration::from_secs(2));
        let record = workload.end()?;
        streamed_all(&server)?;
        for _ in 0..10 {
            let cluster = fleet.cluster(CLUSTER)?;
            anyhow::ensure!(healthy(&cluster), "{cluster:#}");
            std::thread::sleep(Duration::from_secs(1));
        }
        let copy = restored(scratch, &fleet, &version, "copy", &["--latest"])?;
        let lost = record.lost(&copy.session()?, Instant::now())?;
        anyhow::ensure!(lost.commits == 0 && record.commits() > 1000, "{lost:?} of {}", record.commits());
        Ok(())
    });
}

/// A standby that is followed moves its slot on itself: nobody's connection would end with it.
#[test]
fn a_following_standbys_slot_that_is_gone_is_made_anew() {
    in_scratch(|scratch| {
        scratch.allow_log("keeps no WAL any more");
        scratch.allow_log("it is made anew");
        let host = host(scratch, &[])?;
        let standby = host.standby(&[])?;
        let mut second = host.second_agent(&standby, json!({ "streaming": "on" }))?;
        second.start()?;
        wait_for_slot(&standby, "restart_lsn IS NOT NULL")?;
        standby.session()?.execute("SELECT pg_drop_replication_slot('walfleet')")?;
        wait_for_slot(&standby, "restart_lsn IS NOT NULL")
    });
}

/// Nothing can be received, and nothing is archived: no connection for replication is left.
#[test]
fn what_cannot_be_streamed_is_read_from_the_servers_files() {
    in_scratch(|scratch| {
        scratch.allow_log("WAL is not streamed");
        let settings = vec![("max_wal_senders".to_owned(), "0".to_owned())];
        let wal = json!({ "streaming": "on" });
        let setup = Setup { settings, wal, streams_only: true, ..Setup::default() };
        let mut host = Standalone::set_up(scratch, &PgVersion::newest()?, Place::folder(scratch)?, setup)?;
        host.backup()?;
        mark(&host.server, "in a finished segment")?;
        write_segments(&host.server, 2)?;
        mark(&host.server, "in one that is being written")?;
        let end: Lsn = host.server.session()?.value("SELECT pg_current_wal_flush_lsn()")?.parse()?;
        let written = marks(&host.server)?;
        host.wait_until_restorable(end, Duration::from_secs(150))?;
        host.server.kill_nine()?;
        host.agent.kill_nine()?;
        let copy = host.restore("copy", &["--latest"])?;
        assert_eq!(marks(&host.recovered(&copy)?)?, written);
        Ok(())
    });
}
