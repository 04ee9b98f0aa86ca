//! WAL that comes by more than one way at once: by `archive_command` and by streaming, of primaries and standbys, bulk and newest.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::json;
use walfleet_integration_tests::fleet::standalone::{Setup, archive_all};
use walfleet_integration_tests::fleet::{Agent, Place, Standalone};
use walfleet_integration_tests::output::Output;
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::s3::{BUCKET, S3Server};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::{tree, wait_for};

use crate::gaps::{SEEN, write_segments};

/// A segment's, "000000010000000000000003".
pub fn is_segment(name: &str) -> bool {
    name.len() == 24 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[test]
fn archived_and_streamed_by_primary_and_standby_at_once_it_is_one_archive() {
    in_scratch(|scratch| {
        let folder = scratch.dir("s3")?;
        let store = S3Server::start(&folder)?;
        let version = PgVersion::newest()?;
        let setup = Setup { wal: json!({ "streaming": "on" }), ..Setup::default() };
        let host = Standalone::set_up(scratch, &version, Place::s3(&store), setup)?;
        let standby = host.standby(&[("archive_mode", "always")])?;
        let mut second = host.second_agent(&standby, json!({ "streaming": "on" }))?;
        second.start()?;
        second.archive_for(&standby)?;
        host.backup()?;
        let begun = Instant::now();
        let session = host.server.session()?;
        for number in 0..60 {
            session.execute(&format!("CREATE TABLE t{number} AS SELECT {number} AS n"))?;
            std::thread::sleep(Duration::from_millis(100));
            if number % 10 == 9 {
                write_segments(&host.server, 1)?;
            }
        }
        archive_all(&host.server)?;
        host.streamed_all()?;
        let last = session.value("SELECT last_archived_wal FROM pg_stat_archiver")?;
        wait_for("the standby to have archived it, too", SEEN, || {
            let sql = format!("SELECT coalesce(last_archived_wal, '') >= '{}' FROM pg_stat_archiver", &last[..24]);
            Ok(standby.session()?.is_true(&sql)?.then_some(()))
        })?;
        let seconds = begun.elapsed().as_secs();

        let objects = folder.join(BUCKET);
        let (mut segments, mut pieces) = (BTreeMap::<String, (u32, u64)>::new(), Vec::new());
        for (path, meta) in tree::all(&objects)?.into_iter().filter(|(_, meta)| meta.is_file()) {
            let key = path.strip_prefix(&objects)?.to_string_lossy().into_owned();
            let name = key.rsplit('/').next().unwrap_or_default().to_owned();
            if key.contains("/tails/") {
                pieces.push((key, meta.len()));
            } else if key.contains("/wal/") && is_segment(&name) {
                let stored = segments.entry(name).or_default();
                *stored = (stored.0 + 1, stored.1 + meta.len());
            }
        }
        anyhow::ensure!(segments.len() >= 7, "{segments:?}");
        anyhow::ensure!(segments.values().all(|(count, _)| *count == 1), "more than one branch: {segments:?}");
        // Nor is it sent twice: what one way brings, the other looks up.
        let mut sent = BTreeMap::<String, u32>::new();
        for request in store.seen().into_iter().filter(|request| request.method == "PUT") {
            let name = request.path.rsplit('/').next().unwrap_or_default().to_owned();
            if is_segment(&name) {
                *sent.entry(name).or_default() += 1;
            }
        }
        let twice = sent.values().filter(|count| **count > 1).count();
        anyhow::ensure!(twice <= 1, "sent more than once: {sent:?}");
        // Pieces: one a second at the most and the end of each segment, a sixteenth of them again, and the primary's alone.
        let most = (seconds + segments.len() as u64) * 17 / 16 + 2;
        anyhow::ensure!(pieces.len() as u64 <= most, "{} pieces in {seconds} s, {most} at most", pieces.len());
        let others: Vec<_> = pieces.iter().filter(|(key, _)| !key.contains("host1")).collect();
        anyhow::ensure!(others.is_empty(), "a standby that only follows sent {others:?}");
        let whole: u64 = segments.values().map(|(_, bytes)| bytes).sum();
        let in_pieces: u64 = pieces.iter().map(|(_, bytes)| bytes).sum();
        eprintln!("{} segments of {whole} bytes, {} pieces of {in_pieces} bytes", segments.len(), pieces.len());
        anyhow::ensure!(in_pieces <= whole, "{in_pieces} bytes in pieces, {whole} in segments");
        let copy = host.restore("copy", &["--latest"])?;
        let copy = host.recovered(&copy)?;
        let last =
            copy.session()?.number("SELECT max(substr(relname, 2)::int) FROM pg_class WHERE relname ~ '^t[0-9]+$'")?;
        assert_eq!(last, 59);
        Ok(())
    });
}

/// Until the repository has what a commit just wrote.
fn time_to_store(server: &PgServer) -> anyhow::Result<Duration> {
    let session = server.session()?;
    let begun = Instant::now();
    session.execute("CREATE TABLE IF NOT EXISTS tick (n int); INSERT INTO tick VALUES (1)")?;
    let end = session.value("SELECT pg_current_wal_flush_lsn()")?;
    wait_for("the newest WAL to be stored", SEEN, || {
        let sql = format!(
            "SELECT coalesce(max(flush_lsn) >= '{end}', false) FROM pg_stat_replication WHERE application_name = 'walfleet'"
        );
        Ok(session.is_true(&sql)?.then_some(()))
    })?;
    Ok(begun.elapsed())
}

/// An interval, its request, and a busy machine.
const SOON: Duration = Duration::from_secs(3);

#[test]
fn the_newest_wal_does_not_wait_while_a_gap_is_filled() {
    in_scratch(|scratch| {
        const LACKING: usize = 10;
        const SLOW: Duration = Duration::from_millis(1500);
        let folder = scratch.dir("s3")?;
        let store = S3Server::start(&folder)?;
        let version = PgVersion::newest()?;
        let settings = vec![("wal_keep_size".to_owned(), "1GB".to_owned())];
        let setup = Setup { settings, wal: json!({ "streaming": "on" }), streams_only: true, ..Setup::default() };
        let mut host = Standalone::set_up(scratch, &version, Place::s3(&store), setup)?;
        host.backup()?;
        write_segments(&host.server, LACKING + 2)?;
        host.streamed_all()?;

        // What the archive has lost is still here, and every segment takes its time.
        host.agent.stop()?;
        let objects = folder.join(BUCKET);
        let mut stored: Vec<_> = tree::all(&objects)?.into_iter().map(|(path, _)| path).collect();
        stored.retain(|path| path.to_string_lossy().contains("/wal/"));
        stored.retain(|path| path.file_name().is_some_and(|name| is_segment(&name.to_string_lossy())));
        stored.sort();
        let lost = stored.get(stored.len() - 1 - LACKING..stored.len() - 1).unwrap_or_default().to_vec();
        for path in &lost {
            std::fs::remove_file(path)?;
        }
        store.spoil(Rule::new(Fault::Slow(SLOW)).method("PUT").path_contains("/wal/"));
        host.agent.start()?;
        let missing = || lost.iter().filter(|path| !path.exists()).count();
        wait_for("the gap to be filled", SEEN, || Ok((missing() < LACKING).then_some(())))?;
        let mut times = Vec::new();
        while missing() > 1 {
            times.push(time_to_store(&host.server)?);
            std::thread::sleep(Duration::from_millis(300));
        }
        eprintln!("{} commits stored meanwhile, in {:?} at most", times.len(), times.iter().max());
        anyhow::ensure!(times.len() >= 4, "it was over at once: {times:?}");
        anyhow::ensure!(times.iter().all(|time| *time <= SOON), "{times:?}");
        wait_for("all of it", SEEN, || Ok((missing() == 0).then_some(())))?;
        Ok(())
    });
}

#[test]
fn a_server_does_not_wait_for_the_backlog_of_another_on_its_host() {
    in_scratch(|scratch| {
        const BACKLOG: usize = 40;
        let store = S3Server::start(&scratch.dir("s3")?)?;
        let (version, place, key) = (PgVersion::newest()?, Place::s3(&store), scratch.join("recovery.key"));
        let bulk = PgServer::builder(scratch, "bulk", &version).create()?;
        let quick = PgServer::builder(scratch, "quick", &version).create()?;
        let agent = Agent::builder(scratch, "host1").instance("bulk", &bulk).instance("quick", &quick);
        let agent = agent.repository(&place, &key).postgres(&version);
        let mut agent = agent.section("wal", json!({ "streaming": "on" })).build()?;
        let init: Vec<String> = std::iter::once("init".to_owned()).chain(place.flags(&key)).collect();
        let init: Vec<&str> = init.iter().map(String::as_str).collect();
        Output::of(agent.command(&init), SEEN)?.ok()?;
        agent.start()?;
        time_to_store(&bulk)?;
        time_to_store(&quick)?;
        agent.stop()?;
        write_segments(&bulk, BACKLOG)?;
        let rule = Rule::new(Fault::Slow(Duration::from_secs(3))).method("PUT").path_contains("/bulk/wal/");
        store.spoil(rule);
        agent.start()?;
        let waiting = || {
            bulk.session()?.number(
                "SELECT coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)), 0)::bigint FROM pg_replication_slots",
            )
        };
        time_to_store(&quick)?;
        let mut times = Vec::new();
        while waiting()? > 3 * (16 << 20) {
            times.push(time_to_store(&quick)?);
            std::thread::sleep(Duration::from_millis(200));
        }
        eprintln!("{} commits stored meanwhile, in {:?} at most", times.len(), times.iter().max());
        anyhow::ensure!(times.len() >= 4, "it was over at once: {times:?}");
        anyhow::ensure!(times.iter().all(|time| *time <= SOON), "{times:?}");
        time_to_store(&bulk)?;
        Ok(())
    });
}
