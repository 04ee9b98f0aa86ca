//! A failover after which nobody has the old primary's disk: of the old timeline the archive has less than the promoted server
//! had received, and the segment of the switch lies only in the new timeline's first file.

use std::time::Duration;

use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::{CLUSTER, Setup, streamed_all};
use walfleet_integration_tests::fleet::{Agent, Place, Standalone};
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;
use walfleet_repository::postgres::Lsn;

use crate::gaps::{lsn, mark, marks, write_segments};

const BROUGHT: Duration = Duration::from_secs(60);

struct FailedOver {
    host: Standalone,
    promoted: PgServer,
    /// On the old timeline, behind what the archive has of it, and in the segment of the switch.
    between: Lsn,
}

/// The old primary and its agent are gone; no agent was ever near the promoted server.
fn fail_over(scratch: &Scratch) -> anyhow::Result<FailedOver> {
    let version = PgVersion::newest()?;
    let setup = Setup { wal: json!({ "streaming": "on" }), streams_only: true, ..Setup::default() };
    let mut host = Standalone::set_up(scratch, &version, Place::folder(scratch)?, setup)?;
    // With archiving on, a promotion renames the old timeline's last segment, which no recovery asks for then.
    let archiving = [("archive_mode", "on"), ("archive_command", "false"), ("wal_keep_size", "512MB")];
    let standby = host.standby(&archiving)?;
    host.backup()?;
    mark(&host.server, "a stored")?;
    streamed_all(&host.server)?;
    host.agent.kill_nine()?;
    write_segments(&host.server, 3)?;
    mark(&host.server, "b received by the standby")?;
    let between: Lsn = host.server.session()?.value("SELECT pg_current_wal_insert_lsn()")?.parse()?;
    mark(&host.server, "c received, too")?;
    let end = host.server.session()?.value("SELECT pg_current_wal_flush_lsn()")?;
    wait_for("the standby to have it", BROUGHT, || {
        let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
        Ok(standby.session()?.is_true(&sql)?.then_some(()))
    })?;
    host.server.kill_nine()?;
    std::fs::remove_dir_all(host.server.data_dir())?;
    standby.promote()?;
    mark(&standby, "d promoted")?;
    // A slot made now begins on the new timeline.
    standby.session()?.execute("CHECKPOINT")?;
    mark(&standby, "e promoted")?;
    host.tablespace = standby.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
    Ok(FailedOver { host, promoted: standby, between })
}

fn second_agent(FailedOver { host, promoted, .. }: &FailedOver) -> anyhow::Result<Agent> {
    let mut agent = host.second_agent(promoted, json!({ "streaming": "on" }))?;
    agent.start()?;
    Ok(agent)
}

/// One unbroken range, and every side of the switch restores.
fn all_is_there(failed: &FailedOver, agent: &Agent, written: &[String], end: Lsn) -> anyhow::Result<()> {
    let listed = agent.json(&["list", "--cluster", CLUSTER])?;
    let recovery = &listed["recovery"][0];
    let count = |what: &str| recovery[what].as_array().map_or(0, Vec::len);
    anyhow::ensure!(count("gaps") == 0 && count("ranges") == 1, "{recovery}");
    let range = &recovery["ranges"][0];
    anyhow::ensure!(range["timeline"] == 2 && lsn(&range["to_lsn"]) >= end, "{recovery}, and the end is {end}");
    let between = failed.between.to_string();
    let found = failed.host.restore("between", &["--to-lsn", &between])?;
    let found = failed.host.recovered(&found)?;
    anyhow::ensure!(marks(&found)? == written[..2], "{:?}", marks(&found)?);
    let latest = failed.host.restore("latest", &["--latest"])?;
    let latest = failed.host.recovered(&latest)?;
    anyhow::ensure!(marks(&latest)? == written, "{:?}", marks(&latest)?);
    Ok(())
}

#[test]
fn a_promoted_server_s_first_file_has_what_is_missing_of_the_old_timeline() {
    in_scratch(|scratch| {
        let failed = fail_over(scratch)?;
        let agent = second_agent(&failed)?;
        mark(&failed.promoted, "f streamed")?;
        wait_for("the stream", BROUGHT, || {
            let sql = "SELECT count(*) = 1 FROM pg_stat_replication WHERE application_name = 'walfleet'";
            Ok(failed.promoted.session()?.is_true(sql)?.then_some(()))
        })?;
        streamed_all(&failed.promoted)?;
        let end = failed.promoted.session()?.value("SELECT pg_current_wal_flush_lsn()")?.parse()?;
        all_is_there(&failed, &agent, &marks(&failed.promoted)?, end)
    });
}

#[test]
fn a_promoted_server_that_stopped_leaves_what_is_missing_of_the_old_timeline() {
    in_scratch(|scratch| {
        let mut failed = fail_over(scratch)?;
        let written = marks(&failed.promoted)?;
        let end: Lsn = failed.promoted.session()?.value("SELECT pg_current_wal_flush_lsn()")?.parse()?;
        failed.promoted.kill_nine()?;
        let agent = second_agent(&failed)?;
        wait_for("what it left", BROUGHT, || {
            let listed = agent.json(&["list", "--cluster", CLUSTER])?;
            let newest = |range: &Value| range["timeline"] == 2 && lsn(&range["to_lsn"]) >= end;
            let ranges = listed["recovery"][0]["ranges"].as_array().cloned().unwrap_or_default();
            Ok(ranges.iter().any(newest).then_some(()))
        })?;
        all_is_there(&failed, &agent, &written, end)
    });
}

/// What the old primary had told its clients last, and nobody else had, is on its disk, which comes back after the failover.
#[test]
fn what_a_dead_primary_left_is_brought_after_a_failover_and_restored_by_its_timeline() {
    in_scratch(|scratch| {
        let version = PgVersion::newest()?;
        let setup = Setup { wal: json!({ "streaming": "on" }), streams_only: true, ..Setup::default() };
        let mut host = Standalone::set_up(scratch, &version, Place::folder(scratch)?, setup)?;
        let standby = host.standby(&[("wal_keep_size", "512MB")])?;
        host.backup()?;
        mark(&host.server, "a everywhere")?;
        streamed_all(&host.server)?;
        let end = host.server.session()?.value("SELECT pg_current_wal_flush_lsn()")?;
        wait_for("the standby to have it", BROUGHT, || {
            let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
            Ok(standby.session()?.is_true(&sql)?.then_some(()))
        })?;
        standby.session()?.execute("ALTER SYSTEM SET primary_conninfo = ''")?;
        standby.session()?.execute("SELECT pg_reload_conf()")?;
        host.agent.kill_nine()?;
        wait_for("the standby to be cut off", BROUGHT, || {
            Ok(standby.session()?.is_true("SELECT count(*) = 0 FROM pg_stat_wal_receiver")?.then_some(()))
        })?;
        mark(&host.server, "b on this disk alone")?;
        write_segments(&host.server, 2)?;
        mark(&host.server, "c in its last segment")?;
        let tail = marks(&host.server)?;
        host.server.kill_nine()?;
        standby.promote()?;
        mark(&standby, "d promoted")?;
        let failed = FailedOver { host, promoted: standby, between: Lsn(0) };
        let second = second_agent(&failed)?;
        streamed_all(&failed.promoted)?;
        let FailedOver { mut host, promoted, .. } = failed;
        host.agent.start()?;
        wait_for("what was left to be stored", BROUGHT, || {
            Ok(host.agent.log_text().contains("had left in pg_wal is stored").then_some(()))
        })?;
        mark(&promoted, "e promoted")?;
        streamed_all(&promoted)?;
        drop(second);
        host.tablespace = promoted.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
        for (name, words, expected) in
            [("latest", &["--latest"][..], marks(&promoted)?), ("tail", &["--latest", "--timeline", "1"], tail)]
        {
            let restored = host.restore(name, words)?;
            assert_eq!(marks(&host.recovered(&restored)?)?, expected, "{name}");
        }
        Ok(())
    });
}
