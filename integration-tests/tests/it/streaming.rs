//! WAL by streaming: what is lost with a host, and that nothing else ever is.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;
use walfleet_integration_tests::fleet::standalone::{CLUSTER, Setup, streamed_all};
use walfleet_integration_tests::fleet::{Fleet, Place, Standalone};
use walfleet_integration_tests::ports::free_port;
use walfleet_integration_tests::postgres::acknowledged::Acknowledged;
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Shutdown};
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::{tree, wait_for};

/// What the interval of a second allows: the second, the piece's way to the store on a busy machine.
pub const A_SECOND_OR_SO: Duration = Duration::from_millis(1500);

#[test]
fn a_host_destroyed_under_load_loses_a_second_at_most() {
    in_scratch(|scratch| {
        let place = Place::folder(scratch)?;
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, place, json!({ "streaming": "on" }))?;
        host.backup()?;
        let workload = Acknowledged::start(&host.server, 4, "SET synchronous_commit = on")?;
        std::thread::sleep(Duration::from_secs(5));
        let (record, lost) = host.destroy(workload)?;
        assert!(record.commits() > 500, "only {} commits", record.commits());
        assert!(lost.time <= A_SECOND_OR_SO, "{lost:?} of {}", record.commits());
        Ok(())
    });
}

#[test]
fn commits_that_wait_for_the_repository_are_never_lost() {
    in_scratch(|scratch| {
        let place = Place::folder(scratch)?;
        let wal = json!({ "streaming": "on", "synchronous": "repository" });
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, place, wal)?;
        host.backup()?;
        host.server.reload_with("synchronous_standby_names", "walfleet")?;
        let workload = Acknowledged::start(&host.server, 4, "SET synchronous_commit = on")?;
        std::thread::sleep(Duration::from_secs(3));
        let (record, lost) = host.destroy(workload)?;
        assert!(record.commits() > 100, "only {} commits", record.commits());
        assert_eq!(lost.commits, 0, "{lost:?} of {}", record.commits());
        Ok(())
    });
}

#[test]
fn what_a_dead_server_left_on_its_disk_is_brought_by_its_agent_alone() {
    in_scratch(|scratch| {
        let place = Place::folder(scratch)?;
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, place, json!({ "streaming": "on" }))?;
        host.backup()?;
        let workload = Acknowledged::start(&host.server, 4, "SET synchronous_commit = on")?;
        std::thread::sleep(Duration::from_secs(1));
        host.agent.kill_nine()?;
        std::thread::sleep(Duration::from_secs(1));
        // More than the segment that was begun.
        host.server.session()?.execute("SELECT pg_switch_wal()")?;
        std::thread::sleep(Duration::from_secs(1));
        let disaster = Instant::now();
        host.server.kill_nine()?;
        host.agent.start()?;
        wait_for("what was left to be stored", Duration::from_secs(30), || {
            Ok(host.agent.log_text().contains("had left in pg_wal is stored").then_some(()))
        })?;
        let (record, lost) = host.lost_since(disaster, workload)?;
        assert_eq!(lost.commits, 0, "{lost:?} of {}", record.commits());
        Ok(())
    });
}

#[test]
fn what_a_server_left_is_stored_though_it_had_stopped_before_and_ran_while_the_store_was_away() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        let store = S3Server::start(&scratch.dir("s3")?)?;
        let wal = json!({ "streaming": "on" });
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, Place::s3(&store), wal)?;
        host.backup()?;
        host.server.session()?.execute("CREATE TABLE written (n int)")?;
        host.streamed_all()?;
        host.server.stop(Shutdown::Fast)?;
        // What is left, nothing, is looked for.
        std::thread::sleep(Duration::from_secs(4));
        store.spoil(Rule::new(Fault::Status(403)));
        host.server.start()?;
        wait_for("the agent to be refused", Duration::from_secs(30), || {
            Ok(host.agent.log_text().contains("the store refused").then_some(()))
        })?;
        let session = host.server.session()?;
        session.execute("INSERT INTO written SELECT generate_series(1, 1000); SELECT pg_switch_wal()")?;
        session.execute("INSERT INTO written SELECT generate_series(1, 1000)")?;
        drop(session);
        host.server.kill_nine()?;
        std::thread::sleep(Duration::from_secs(1));
        store.heal();
        wait_for("what was left to be stored", Duration::from_secs(40), || {
            Ok(host.agent.log_text().contains("had left in pg_wal is stored").then_some(()))
        })?;
        let restored = host.restore("restored", &["--latest"])?;
        assert_eq!(host.recovered(&restored)?.session()?.number("SELECT count(*) FROM written")?, 2000);
        Ok(())
    });
}

#[test]
fn a_segment_that_vanished_from_the_archive_is_brought_again_by_whoever_has_it() {
    in_scratch(|scratch| {
        let place = Place::folder(scratch)?;
        let host = Standalone::streaming(scratch, &PgVersion::newest()?, place, json!({ "streaming": "on" }))?;
        // The server is who has it, however soon its next checkpoint.
        host.server.reload_with("wal_keep_size", "1GB")?;
        host.backup()?;
        let session = host.server.session()?;
        let name = session.value("SELECT pg_walfile_name(pg_current_wal_lsn())")?;
        for _ in 0..3 {
            session.execute("SELECT pg_create_restore_point('x'); SELECT pg_switch_wal()")?;
        }
        host.streamed_all()?;
        let objects = scratch.join("repository").join("clusters/orders/wal");
        let find = || -> anyhow::Result<Option<PathBuf>> {
            let all = tree::all(&objects)?;
            Ok(all.into_iter().map(|(path, _)| path).find(|path| path.ends_with(&name)))
        };
        let lost = wait_for("the segment to be archived", Duration::from_secs(30), find)?;
        std::fs::remove_file(&lost)?;
        // It is looked for half a minute after what was stored, and then more and more seldom.
        wait_for("the gap to be filled", Duration::from_secs(120), find)?;
        Ok(())
    });
}

/// What lies in the repository says of an idle server only when it wrote last; its agent says that it wrote no more.
#[test]
fn a_moment_of_an_idle_stretch_is_reached_though_no_wal_tells_of_it() {
    in_scratch(|scratch| {
        // Plans are asked for until one can be made.
        scratch.allow_log("job failed");
        let version = PgVersion::newest()?;
        let fleet = Fleet::start(scratch)?;
        let host = fleet.protected(&version)?;
        fleet.backup(CLUSTER)?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE said (word text); INSERT INTO said VALUES ('the last word')")?;
        streamed_all(&host.server)?;
        std::thread::sleep(Duration::from_secs(3));
        let moment = session
            .value("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || ' UTC'")?;
        fleet.wait_until_recoverable(CLUSTER, &["--to", &moment], "db1")?;
        let (data_dir, port) = (scratch.join("restored"), free_port());
        let (dir_text, port_text) = (data_dir.display().to_string(), port.to_string());
        let restore = ["restore", "start", CLUSTER, "--on", "db1", "--data-dir", &dir_text, "--to", &moment];
        fleet.admin.run(&[&restore[..], &["--start", "--port", &port_text, "--wait"]].concat())?.ok()?;
        let copy = PgServer::builder(scratch, "copy", &version).adopt(&data_dir, host.server.socket_dir(), port)?;
        copy.wait_until_writable()?;
        assert_eq!(copy.session()?.value("SELECT word FROM said")?, "the last word");
        Ok(())
    });
}

/// More than the agent holds at once, so that it reads no further.
#[test]
fn a_server_stops_though_much_waits_for_a_store_that_does_not_answer() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        scratch.allow_log("ERROR");
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let wal = json!({ "streaming": "on" });
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, Place::s3(&s3), wal)?;
        host.backup()?;
        host.streamed_all()?;
        s3.spoil(Rule::new(Fault::Hang));
        let session = host.server.session()?;
        session.execute("CREATE TABLE noise (bytes bytea); ALTER TABLE noise ALTER bytes SET STORAGE EXTERNAL")?;
        for _ in 0..7 {
            let random = "INSERT INTO noise SELECT decode(string_agg(md5(random()::text), ''), 'hex') \
                          FROM generate_series(1, 2000) g, generate_series(1, 500) h GROUP BY g";
            session.execute(random)?;
        }
        let expected = Fingerprint::take(&session)?;
        drop(session);
        let began = Instant::now();
        host.server.stop(Shutdown::Fast)?;
        let took = began.elapsed();
        assert!(took < Duration::from_secs(40), "{took:?}");
        s3.heal();
        host.server.start()?;
        host.streamed_all()?;
        let restored = host.restore("restored", &["--latest"])?;
        let server = host.recovered(&restored)?;
        Fingerprint::take(&server.session()?)?.must_equal(&expected)
    });
}

/// With segments of 1, 16 and 64 MiB.
#[test]
fn everything_streamed_is_restored_on_every_release() {
    let check = |version: &PgVersion, megabytes: u32| {
        in_scratch(|scratch| {
            let setup = Setup {
                initdb: vec![format!("--wal-segsize={megabytes}")],
                settings: vec![("min_wal_size".to_owned(), format!("{}MB", 2 * megabytes.max(16)))],
                wal: json!({ "streaming": "on" }),
                streams_only: true,
                ..Setup::default()
            };
            let mut host = Standalone::set_up(scratch, version, Place::folder(scratch)?, setup)?;
            host.backup()?;
            let session = host.server.session()?;
            for round in 0..4 {
                session.execute(
                    "INSERT INTO document (body, tags) SELECT repeat(md5(i::text), 100), ARRAY[i] FROM generate_series(1, 3000) i",
                )?;
                match round {
                    1 => host.agent.kill_nine().and_then(|()| host.agent.start())?,
                    2 => session.execute("SELECT pg_switch_wal()")?,
                    _ => {}
                }
            }
            let expected = Fingerprint::take(&session)?;
            host.streamed_all()?;
            let restored = host.restore("restored", &["--latest"])?;
            let server = host.recovered(&restored)?;
            Fingerprint::take(&server.session()?)?.must_equal(&expected)
        });
    };
    for (version, megabytes) in PgVersion::all().unwrap().iter().zip([1, 64, 16].into_iter().cycle()) {
        check(version, megabytes);
    }
}
