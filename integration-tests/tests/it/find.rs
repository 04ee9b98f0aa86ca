//! Finding the moment: an accident is named by what the archive tells of it, and the target given with it undoes just that.

use std::time::Duration;

use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::{CLUSTER, archive_all};
use walfleet_integration_tests::fleet::{Fleet, Place, Standalone};
use walfleet_integration_tests::ports::free_port;
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Session};
use walfleet_integration_tests::scratch::{Scratch, in_scratch};

const REFUSED: i32 = 4;
const NOT_RECOVERABLE: i32 = 7;
/// Of a command line that may have been meant as a restore_command.
const NOT_THE_END_OF_WAL: i32 = 129;

/// The server's clock, as times are typed.
fn now(session: &Session) -> anyhow::Result<String> {
    session.value("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || ' UTC'")
}

/// What is listed of one kind, but for what no backup reaches: the making of the test's data.
fn of_kind<'a>(found: &'a Value, kind: &str) -> Vec<&'a Value> {
    let all = found["transactions"].as_array().into_iter().flatten();
    all.filter(|one| one["kind"] == kind && !one["restore"].is_null()).collect()
}

fn the_one<'a>(found: &'a Value, kind: &str) -> anyhow::Result<&'a Value> {
    match of_kind(found, kind)[..] {
        [one] => Ok(one),
        ref others => anyhow::bail!("{} of kind {kind}: {found:#}", others.len()),
    }
}

/// The arguments that restore to just before a transaction.
fn target(one: &Value) -> anyhow::Result<Vec<&str>> {
    let words: Vec<&str> = one["restore"].as_str().unwrap_or_default().split_whitespace().collect();
    anyhow::ensure!(words.first() == Some(&"--to-lsn") && words.get(2) == Some(&"--exclusive"), "{one}");
    Ok(words)
}

/// What was written down between the accidents.
fn diary(session: &Session) -> anyhow::Result<String> {
    session.value("SELECT string_agg(what, ' ' ORDER BY n) FROM diary")
}

#[test]
fn each_accident_is_named_and_undone_by_the_target_that_is_given_with_it() {
    for version in [PgVersion::of(13), PgVersion::newest()] {
        in_scratch(|scratch| undo_each_accident(scratch, &version?));
    }
}

fn undo_each_accident(scratch: &Scratch, version: &PgVersion) -> anyhow::Result<()> {
    let host = Standalone::start(scratch, version, Place::folder(scratch)?)?;
    let session = host.server.session()?;
    for table in ["shop", "ledger", "trail"] {
        session
            .execute(&format!("CREATE TABLE {table} AS SELECT i, repeat('x', 50) t FROM generate_series(1, 4000) i"))?;
    }
    session.execute("CREATE TABLE diary (n serial, what text)")?;
    session.execute("CREATE DATABASE doomed")?;
    host.server.session_in("doomed")?.execute("CREATE TABLE inside AS SELECT generate_series(1, 70) i")?;
    host.backup()?;
    let file = |table: &str| session.number(&format!("SELECT pg_relation_filenode('{table}')::bigint"));
    let (shop, ledger, trail) = (file("shop")?, file("ledger")?, file("trail")?);
    let begun = now(&session)?;
    let write = |what: &str| session.execute(&format!("INSERT INTO diary (what) VALUES ('{what}')"));
    let accidents = ["DELETE FROM shop", "DROP TABLE ledger", "TRUNCATE trail", "DROP DATABASE doomed"];
    for (number, accident) in (1..).zip(accidents) {
        write(&number.to_string())?;
        session.execute(accident)?;
    }
    session.execute("BEGIN; DELETE FROM diary; ROLLBACK")?;
    write("5")?;
    let ended = now(&session)?;
    host.archive_all()?;

    let find = |more: &[&str]| host.agent.json(&[&["wal", "find", "--cluster", CLUSTER][..], more].concat());
    let found = find(&["--around", &ended])?;
    let delete = the_one(&found, "delete")?;
    assert_eq!((delete["deleted"].as_u64(), delete["relations"][0]["relfilenode"].as_i64()), (Some(4000), Some(shop)));
    assert_eq!(delete["whole"], true, "{delete}");
    let (drop, truncate) = (the_one(&found, "drop")?, the_one(&found, "truncate")?);
    for (one, file) in [(drop, ledger), (truncate, trail)] {
        let files = one["dropped"].as_array().into_iter().flatten();
        anyhow::ensure!(files.into_iter().any(|dropped| dropped["relfilenode"] == file), "{file}: {one}");
    }
    // Inserts of the diary, but none of what was rolled back.
    anyhow::ensure!(of_kind(&found, "insert").len() >= 5, "{found:#}");

    let database = the_one(&found, "drop_database")?;
    for (name, one, seen, query, rows) in [
        ("undeleted", delete, "1", "SELECT count(*) FROM shop", 4000),
        ("undropped", drop, "1 2", "SELECT count(*) FROM ledger", 4000),
        ("untruncated", truncate, "1 2 3", "SELECT count(*) FROM trail", 4000),
        ("undoomed", database, "1 2 3 4", "SELECT count(*) FROM inside", 70),
    ] {
        let copy = host.recovered(&host.restore(name, &target(one)?)?)?;
        assert_eq!(diary(&copy.session()?)?, seen, "{name}: all that was committed before, and nothing after");
        let session = if name == "undoomed" { copy.session_in("doomed")? } else { copy.session()? };
        assert_eq!(session.number(query)?, rows, "{name}");
    }
    // What DROP DATABASE did is not undone by stopping at its commit.
    anyhow::ensure!(database["stop_lsn"] != database["lsn"], "{database}");

    say_what_lies_beside_an_idle_stretch(&host, &begun)?;
    let table = host.agent.run(&["wal", "find", "--cluster", CLUSTER, "--around", &ended])?.ok()?.stdout;
    for says in [format!("deletes 4000 rows of {}/{shop}", of_database(&host)?), "drops database".to_owned()] {
        anyhow::ensure!(table.contains(&says), "{says}:\n{table}");
    }
    host.agent.run(&["wal", "find", "00000001000000000000000A", "pg_wal/RECOVERYXLOG"])?.exit(NOT_THE_END_OF_WAL)?;
    Ok(())
}

fn of_database(host: &Standalone) -> anyhow::Result<String> {
    host.server.session()?.value("SELECT oid FROM pg_database WHERE datname = current_database()")
}

/// Of the segment that is being written there are only pieces, and the newest ends in the middle of nowhere.
#[test]
fn an_accident_of_a_moment_ago_is_found_in_what_was_streamed() {
    in_scratch(|scratch| {
        let wal = json!({ "streaming": "on" });
        let host = Standalone::streaming(scratch, &PgVersion::newest()?, Place::folder(scratch)?, wal)?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE shop AS SELECT generate_series(1, 4000) i")?;
        host.backup()?;
        session.execute("SELECT pg_switch_wal()")?;
        session.execute("INSERT INTO shop VALUES (0)")?;
        session.execute("DELETE FROM shop WHERE i > 0")?;
        let around = now(&session)?;
        // Pieces of several seconds.
        std::thread::sleep(Duration::from_millis(1500));
        session.execute("INSERT INTO shop VALUES (-1)")?;
        session.execute("TRUNCATE shop")?;
        host.streamed_all()?;
        let words = ["wal", "find", "--cluster", CLUSTER, "--around", &around, "--within", "1m"];
        let found = host.agent.json(&words)?;
        the_one(&found, "truncate")?;
        let copy = host.recovered(&host.restore("undeleted", &target(the_one(&found, "delete")?)?)?)?;
        assert_eq!(copy.session()?.number("SELECT count(*) FROM shop")?, 4001);
        // Nearer than the newest commit of the segment.
        let narrow = ["wal", "find", "--cluster", CLUSTER, "--around", &around, "--within", "1s"];
        the_one(&host.agent.json(&narrow)?, "delete").map(drop)
    });
}

/// Nothing committed there, and the commits on either side are told.
fn say_what_lies_beside_an_idle_stretch(host: &Standalone, at: &str) -> anyhow::Result<()> {
    let session = host.server.session()?;
    session.execute("INSERT INTO diary (what) VALUES ('before')")?;
    std::thread::sleep(Duration::from_secs(1));
    let middle = now(&session)?;
    std::thread::sleep(Duration::from_secs(1));
    session.execute("INSERT INTO diary (what) VALUES ('after')")?;
    host.archive_all()?;
    let find = |around: &str, within: &str| {
        host.agent.json(&["wal", "find", "--cluster", CLUSTER, "--around", around, "--within", within])
    };
    let idle = find(&middle, "0s")?;
    assert_eq!((idle["commits"].as_u64(), idle["transactions"].as_array().map(Vec::len)), (Some(0), Some(0)), "{idle}");
    let at_lsn = |what: &str| session.value(&format!("SELECT xmin FROM diary WHERE what = '{what}'"));
    assert_eq!(idle["before"]["xid"].to_string(), at_lsn("before")?, "{idle}");
    assert_eq!(idle["after"]["xid"].to_string(), at_lsn("after")?, "{idle}");
    let future = find("2199-01-01 00:00:00 UTC", "5m")?;
    anyhow::ensure!(future["after"].is_null() && future["before"]["xid"].is_number(), "{future}");
    anyhow::ensure!(future["notes"].to_string().contains("no later commit is stored"), "{future}");
    let past = find("2001-01-01 00:00:00 UTC", "5m")?;
    anyhow::ensure!(past["before"].is_null() && past["after"]["xid"].is_number(), "{past}");
    let few = host.agent.json(&["wal", "find", "--cluster", CLUSTER, "--around", at, "--limit", "2"])?;
    assert_eq!(few["transactions"].as_array().map(Vec::len), Some(2), "{few}");
    assert_eq!(few["omitted"].as_u64().zip(few["commits"].as_u64()).map(|(omitted, all)| all - omitted), Some(2));
    Ok(())
}

#[test]
fn an_operator_finds_the_moment_and_restores_to_just_before_it() {
    in_scratch(|scratch| {
        // One search is to fail.
        scratch.allow_log("job failed");
        let version = PgVersion::of(16)?;
        let fleet = Fleet::start(scratch)?;
        let host = fleet.protected(&version)?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE shop AS SELECT generate_series(1, 4000) i")?;
        let around = now(&session)?;
        let early = ["wal", "find", CLUSTER, "--around", &around];
        // Nothing can be restored yet.
        fleet.admin.run(&early)?.exit(NOT_RECOVERABLE)?;
        fleet.backup(CLUSTER)?;
        session.execute("INSERT INTO shop VALUES (0)")?;
        let around = now(&session)?;
        session.execute("TRUNCATE shop")?;
        session.execute("INSERT INTO shop VALUES (1)")?;
        archive_all(&host.server)?;

        let words = ["wal", "find", CLUSTER, "--around", &around, "--within", "1m"];
        fleet.operator("vera", "viewer")?.run(&words)?.exit(REFUSED)?;
        let found = fleet.admin.json(&words)?;
        let truncate = the_one(&found, "truncate")?;
        let shown = fleet.admin.run(&[&words[..], &["-o", "wide"]].concat())?.ok()?.stdout;
        anyhow::ensure!(shown.contains("truncates ") && shown.contains("RESTORE TO JUST BEFORE"), "{shown}");
        anyhow::ensure!(shown.contains(truncate["restore"].as_str().unwrap_or("none")), "{shown}");

        let (data_dir, port) = (scratch.join("restored"), free_port());
        let (dir_text, port_text) = (data_dir.display().to_string(), port.to_string());
        let start =
            ["restore", "start", CLUSTER, "--on", "db1", "--data-dir", &dir_text, "--start", "--port", &port_text];
        fleet.admin.run(&[&start[..], &["--wait"], &target(truncate)?].concat())?.ok()?;
        let copy = PgServer::builder(scratch, "copy", &version).adopt(&data_dir, host.server.socket_dir(), port)?;
        copy.wait_until_writable()?;
        assert_eq!(copy.session()?.number("SELECT count(*) FROM shop")?, 4001);

        // The search can be looked at later.
        let jobs = fleet.admin.json(&["job", "list", "--cluster", CLUSTER])?;
        let jobs = jobs["jobs"].as_array().into_iter().flatten();
        let search = jobs.into_iter().find(|job| job["kind"] == "wal_find" && job["state"] == "succeeded");
        let id = search.and_then(|job| job["id"].as_str()).unwrap_or_default();
        let shown = fleet.admin.run(&["job", "show", id])?.ok()?.stdout;
        anyhow::ensure!(shown.contains("truncates "), "{shown}");
        Ok(())
    });
}
