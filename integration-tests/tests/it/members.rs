//! Several members of a cluster whose agents do not all do the same, or not all live: one archive, and none of it twice.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::{CLUSTER, Setup, archive_all};
use walfleet_integration_tests::fleet::{Agent, Place, Standalone};
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::{tree, wait_for};
use walfleet_repository::postgres::Lsn;

use crate::both_ways::is_segment;
use crate::gaps::{SEEN, lsn, mark, marks, write_segments};

/// A standby with an agent of its own.
fn second_member(host: &Standalone, settings: &[(&str, &str)], wal: Value) -> anyhow::Result<(PgServer, Agent)> {
    let standby = host.standby(settings)?;
    let mut agent = host.second_agent(&standby, wal)?;
    agent.start()?;
    Ok((standby, agent))
}

/// Waits until everything that the server has written is said to be recoverable, without a gap.
fn wait_until_recoverable(agent: &Agent, server: &PgServer) -> anyhow::Result<()> {
    wait_until_recoverable_to(agent, end_of(server)?)
}

fn end_of(server: &PgServer) -> anyhow::Result<Lsn> {
    Ok(server.session()?.value("SELECT pg_current_wal_flush_lsn()")?.parse()?)
}

fn wait_until_recoverable_to(agent: &Agent, end: Lsn) -> anyhow::Result<()> {
    wait_for(&format!("{end} to be recoverable"), SEEN, || {
        let listed = agent.json(&["list", "--cluster", CLUSTER])?;
        let ranges = listed["recovery"][0]["ranges"].as_array().cloned().unwrap_or_default();
        let reached = ranges.last().is_some_and(|range| lsn(&range["to_lsn"]) >= end);
        Ok((ranges.len() == 1 && reached).then_some(()))
    })
}

/// How often each segment lies in the folder of a repository, under whatever branch.
fn segments(repository: &Path) -> anyhow::Result<BTreeMap<String, u32>> {
    let mut found = BTreeMap::new();
    for (path, meta) in tree::all(&repository.join("clusters").join(CLUSTER).join("wal"))? {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if meta.is_file() && is_segment(&name) {
            *found.entry(name).or_default() += 1;
        }
    }
    anyhow::ensure!(!found.is_empty(), "no segment in {}", repository.display());
    Ok(found)
}

#[test]
fn a_standbys_agent_steps_in_for_its_primarys_and_both_make_one_archive() {
    in_scratch(|scratch| {
        scratch.allow_log("nobody stores the WAL that this standby receives");
        let wal = json!({ "streaming": "on" });
        let place = Place::folder(scratch)?;
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, place, wal.clone())?;
        host.backup()?;
        let (_standby, second) = second_member(&host, &[], wal)?;
        wait_for("the standby to be followed", SEEN, || {
            Ok(second.log_text().contains("its WAL is followed in the archive").then_some(()))
        })?;
        host.agent.kill_nine()?;
        mark(&host.server, "while the primary had no agent")?;
        write_segments(&host.server, 3)?;
        mark(&host.server, "in a segment that is not finished")?;
        wait_until_recoverable(&second, &host.server)?;
        let copy = host.restore("copy", &["--latest"])?;
        let copy = host.recovered(&copy)?;
        anyhow::ensure!(marks(&copy)? == marks(&host.server)?, "{:?}", marks(&copy)?);

        host.agent.start()?;
        mark(&host.server, "with both")?;
        write_segments(&host.server, 2)?;
        host.streamed_all()?;
        wait_until_recoverable(&second, &host.server)?;
        let found = segments(&scratch.join("repository"))?;
        anyhow::ensure!(found.values().all(|count| *count == 1), "{found:?}");
        Ok(())
    });
}

/// Nobody finishes the segment in which such a backup ends.
#[test]
fn a_standby_of_an_idle_primary_is_backed_up_at_once() {
    backed_up_while_the_primary_is_idle("on");
}

/// And nobody brings its beginning, but the standby itself.
#[test]
fn a_standby_of_an_idle_primary_that_only_archives_is_backed_up_soon() {
    backed_up_while_the_primary_is_idle("off");
}

fn backed_up_while_the_primary_is_idle(streaming: &str) {
    in_scratch(|scratch| {
        let wal = json!({ "streaming": streaming });
        let streams = streaming == "on";
        let setup = Setup { wal: wal.clone(), streams_only: streams, ..Setup::default() };
        let mut host = Standalone::set_up(scratch, &PgVersion::newest()?, Place::folder(scratch)?, setup)?;
        host.backup()?;
        let (standby, second) = second_member(&host, &[], wal)?;
        mark(&host.server, "in a segment that is not finished")?;
        if streams {
            host.streamed_all()?;
        }
        let end = host.server.session()?.value("SELECT pg_current_wal_flush_lsn()")?;
        wait_for("the standby to have replayed it", SEEN, || {
            let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
            Ok(standby.session()?.is_true(&sql)?.then_some(()))
        })?;
        let begun = Instant::now();
        let backup = second.json(&["backup", "--cluster", CLUSTER, "--fast"])?;
        anyhow::ensure!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
        let id = backup["id"].as_str().unwrap_or_default();
        host.tablespace = host.server.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
        let copy = host.restore("copy", &["--latest", "--backup", id])?;
        let copy = host.recovered(&copy)?;
        anyhow::ensure!(marks(&copy)? == marks(&host.server)?, "{:?}", marks(&copy)?);
        drop(copy);
        // The primary goes on in the segment of which the standby's has a beginning.
        mark(&host.server, "behind it")?;
        let end = end_of(&host.server)?;
        match streams {
            true => host.streamed_all()?,
            false => drop(archive_all(&host.server)?),
        }
        wait_until_recoverable_to(&second, end)?;
        let found = segments(&scratch.join("repository"))?;
        anyhow::ensure!(found.values().all(|count| *count == 1), "{found:?}");
        Ok(())
    });
}

/// As while a fleet is brought from one way to the other, host by host.
#[test]
fn an_agent_that_only_archives_and_one_that_streams_make_one_archive() {
    in_scratch(|scratch| {
        // Until the standby's agent streams nobody brings unfinished segments.
        scratch.allow_log("nobody stores the WAL that this standby receives");
        let (archives, streams) = (json!({ "streaming": "off" }), json!({ "streaming": "on" }));
        let setup = Setup { wal: archives, ..Setup::default() };
        let host = Standalone::set_up(scratch, &PgVersion::newest()?, Place::folder(scratch)?, setup)?;
        host.backup()?;
        let (standby, second) = second_member(&host, &[("archive_mode", "always")], streams)?;
        second.archive_for(&standby)?;
        for round in 0..3 {
            mark(&host.server, &format!("round {round}"))?;
            write_segments(&host.server, 2)?;
        }
        archive_all(&host.server)?;
        mark(&host.server, "in a segment that is not finished")?;
        // What the primary's agent brings at the end of a segment alone, the standby's brings at once.
        wait_until_recoverable(&second, &host.server)?;
        archive_all(&host.server)?;
        wait_until_recoverable(&second, &host.server)?;
        let found = segments(&scratch.join("repository"))?;
        anyhow::ensure!(found.values().all(|count| *count == 1), "{found:?}");
        let copy = host.restore("copy", &["--latest"])?;
        let copy = host.recovered(&copy)?;
        anyhow::ensure!(marks(&copy)? == marks(&host.server)?, "{:?}", marks(&copy)?);
        Ok(())
    });
}
