//! Commits that wait for two hosts' spools: nothing acknowledged is lost with a host, whatever the store does meanwhile, and
//! a peer that is away is told of and costs no commit.

use std::time::{Duration, Instant};

use serde_json::json;
use walfleet_integration_tests::fleet::{Agent, Place};
use walfleet_integration_tests::network::Line;
use walfleet_integration_tests::postgres::acknowledged::Acknowledged;
use walfleet_integration_tests::process::run;
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::{tree, wait_for};
use walfleet_repository::postgres::Lsn;

use crate::full_disks::SmallDisk;

mod pair;

use pair::{Pair, STORED_LIMIT};

/// As a client of the workload sets it.
const REMOTE_WRITE: &str = "SET synchronous_commit = remote_write";

const BULK_TABLE: &str = "CREATE TABLE bulk (noise bytea STORAGE EXTERNAL)";

/// 16 MiB that do not compress.
const BULK: &str = "INSERT INTO bulk SELECT (SELECT string_agg(sha512((g || ' ' || i || random())::bytea), '')
    FROM generate_series(1, 16) i) FROM generate_series(1, 16000) g";

const AWAY: &str = "commits do not wait for two spools for now";
const BACK: &str = "commits wait for two spools again";

#[test]
fn commits_that_wait_for_two_spools_survive_the_host_whatever_the_store_does() {
    in_scratch(|scratch| {
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let wal = json!({ "streaming": "on", "synchronous": "spool" });
        let mut pair = Pair::start(scratch, Place::s3(&s3), wal)?;
        // So slow that the spools alone have the last seconds.
        s3.spoil(Rule::new(Fault::Slow(Duration::from_secs(3))).method("PUT"));
        let workload = Acknowledged::start(&pair.server, 4, REMOTE_WRITE)?;
        std::thread::sleep(Duration::from_secs(8));
        let disaster = pair.destroy()?;
        // Nor does it matter that the keeper is started anew.
        pair.keeper.kill_nine()?;
        pair.keeper.start()?;
        let commits = pair.lose_nothing(workload, disaster, Some(&s3))?;
        wait_for("the keeper to say that the store had lacked some", STORED_LIMIT, || {
            Ok(pair.keeper.log_text().contains("and the repository lacked, is stored").then_some(()))
        })?;
        // The store would have let a commit return every three seconds.
        assert!(commits > 400, "only {commits} commits");
        Ok(())
    });
}

#[test]
fn a_peer_that_is_away_is_told_of_and_no_commit_is_lost_for_it() {
    in_scratch(|scratch| {
        // Each time that the keeper is gone.
        scratch.allow_log(AWAY);
        let wal = json!({ "streaming": "on", "synchronous": "spool" });
        let mut pair = Pair::start(scratch, Place::folder(scratch)?, wal)?;
        let workload = Acknowledged::start(&pair.server, 4, REMOTE_WRITE)?;
        std::thread::sleep(Duration::from_secs(1));
        pair.keeper.kill_nine()?;
        let cluster = pair.wait_until("repository")?;
        let reason = cluster["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("commits wait for the repository instead of two spools"), "{cluster}");
        let rows = || pair.server.session()?.value("SELECT count(*) FROM acknowledged");
        let before: u64 = rows()?.parse()?;
        std::thread::sleep(Duration::from_secs(1));
        let after: u64 = rows()?.parse()?;
        assert!(after > before + 20, "commits go on: {before} and a second later {after}");
        pair.keeper.start()?;
        pair.wait_until("spools")?;
        std::thread::sleep(Duration::from_secs(1));
        pair.destroy_and_lose_nothing(workload, None)?;
        Ok(())
    });
}

#[test]
fn commits_go_on_for_as_long_as_the_spools_have_room_and_only_the_repository_counts_as_flushed() {
    in_scratch(|scratch| {
        // Nobody reaches the store for a while.
        scratch.allow_log("WARN");
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let wal = json!({ "streaming": "on", "synchronous": "spool" });
        let mut pair = Pair::start(scratch, Place::s3(&s3), wal)?;
        let session = pair.server.session()?;
        session.execute(BULK_TABLE)?;
        let workload = Acknowledged::start(&pair.server, 4, REMOTE_WRITE)?;
        s3.spoil(Rule::new(Fault::Cut));
        std::thread::sleep(Duration::from_secs(1));
        let (_, flushed_before) = pair.positions()?;
        // Nothing that compresses, twelve segments: several times what waits for the store in memory.
        session.execute(REMOTE_WRITE)?;
        for _ in 0..12 {
            session.execute(BULK)?;
        }
        pair.wait_for_commits()?;
        let (written, flushed) = pair.positions()?;
        // Within its segment it may be told from the start again, as long as that is not whole.
        assert!(flushed <= flushed_before, "nothing has reached the store: {flushed_before}, then {flushed}");
        assert!(written.0 - flushed.0 > 192 << 20, "written {written}, flushed {flushed}");

        s3.heal();
        wait_for("the repository to have what was written", STORED_LIMIT, || {
            Ok((pair.positions()?.1 >= written).then_some(()))
        })?;
        pair.destroy_and_lose_nothing(workload, None)?;
        Ok(())
    });
}

#[test]
fn commits_go_on_while_a_segment_is_not_stored_whole_and_the_slot_keeps_it() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let mut pair = Pair::start(scratch, Place::s3(&s3), json!({ "streaming": "on", "synchronous": "spool" }))?;
        let workload = Acknowledged::start(&pair.server, 4, REMOTE_WRITE)?;
        // Pieces get through, and whole segments do not.
        s3.spoil(Rule::new(Fault::Hang).method("PUT").path_contains("/wal/"));
        let session = pair.server.session()?;
        let mut switched = Lsn::INVALID;
        for _ in 0..3 {
            switched = session.value("SELECT pg_switch_wal()")?.parse()?;
            pair.wait_for_commits()?;
        }
        let slot = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'walfleet'";
        std::thread::sleep(Duration::from_secs(3));
        let kept: Lsn = session.value(slot)?.parse()?;
        assert!(kept.0 + (32 << 20) <= switched.0, "the slot is at {kept}, and nothing before {switched} is whole");
        pair.agent.kill_nine()?;
        session.execute("CHECKPOINT")?;
        s3.heal();
        pair.agent.start()?;
        wait_for("the slot to go on", STORED_LIMIT, || {
            Ok((session.value(slot)?.parse::<Lsn>()? > switched).then_some(()))
        })?;
        pair.destroy_and_lose_nothing(workload, None)?;
        Ok(())
    });
}

#[test]
fn a_peer_that_is_frozen_or_cut_off_holds_commits_up_only_where_the_policy_says_so() {
    in_scratch(|scratch| {
        let Some(line) = Line::lay()? else { return Ok(()) };
        // Store, peer and the line to the controller are all away here.
        scratch.allow_log("WARN");
        let s3 = S3Server::start_at(&scratch.dir("s3")?, line.near())?;
        let wal =
            |without_peer: &str| json!({ "streaming": "on", "synchronous": "spool", "without_peer": without_peer });
        let pair = Pair::start_on((Some(&line), 1024), scratch, Place::s3(&s3), wal("alone"))?;
        let workload = Acknowledged::start(&pair.server, 4, REMOTE_WRITE)?;
        pair.wait_for_commits()?;
        // Without the store nobody else can let a commit return.
        let store_away = || s3.spoil(Rule::new(Fault::Status(503)).method("PUT"));
        store_away();
        pair.keeper.freeze();
        pair.wait_for_commits()?;
        let cluster = pair.wait_until("alone")?;
        assert!(cluster["reason"].as_str().is_some_and(|reason| reason.contains("are lost with it")), "{cluster}");
        pair.wait_for_log(AWAY, 1)?;
        pair.keeper.thaw();
        pair.wait_for_log(BACK, 1)?;
        pair.wait_for_commits()?;
        let told = pair.agent.log_text().matches(AWAY).count();
        line.cut()?;
        pair.wait_for_commits()?;
        pair.wait_for_log(AWAY, told + 1)?;
        line.mend()?;
        pair.wait_for_log(BACK, 2)?;
        pair.wait_for_commits()?;

        s3.heal();
        pair.policy(wal("wait"))?;
        pair.wait_for_log("streaming WAL", 2)?;
        pair.wait_until("spools")?;
        pair.wait_for_commits()?;
        store_away();
        pair.keeper.freeze();
        let cluster = pair.wait_until("peer")?;
        let reason = "commits wait until the peer's spool is back";
        assert!(cluster["reason"].as_str().is_some_and(|found| found.contains(reason)), "{cluster}");
        pair.must_wait()?;
        pair.keeper.thaw();
        pair.wait_for_commits()?;
        s3.heal();
        drop(workload.end()?);
        Ok(())
    });
}

#[test]
fn a_peer_whose_connection_was_lost_is_brought_nothing_that_it_holds_already() {
    in_scratch(|scratch| {
        let Some(line) = Line::lay()? else { return Ok(()) };
        // Store, peer and the line to the controller are all away here.
        scratch.allow_log("WARN");
        let s3 = S3Server::start_at(&scratch.dir("s3")?, line.near())?;
        let wal = json!({ "streaming": "on", "synchronous": "spool", "without_peer": "alone" });
        let mut pair = Pair::start_on((Some(&line), 64), scratch, Place::s3(&s3), wal)?;
        let session = pair.server.session()?;
        session.execute(BULK_TABLE)?;
        let workload = Acknowledged::start(&pair.server, 4, REMOTE_WRITE)?;
        s3.spoil(Rule::new(Fault::Cut));
        session.execute(REMOTE_WRITE)?;
        // Three quarters of the peer's spool: twice that it has no room for.
        for _ in 0..3 {
            session.execute(BULK)?;
        }
        pair.wait_for_commits()?;
        let held = pair.kept_bytes()?;
        assert!(held > 40 << 20, "{held}");
        for times in 1..=2 {
            line.cut()?;
            pair.wait_for_log(AWAY, times)?;
            pair.wait_for_commits()?;
            line.mend()?;
            pair.wait_for_log(BACK, times)?;
        }
        pair.wait_for_commits()?;
        let again = pair.kept_bytes()?;
        assert!(again >= held && again < held + (8 << 20), "{held} bytes before, {again} after");
        pair.destroy_and_lose_nothing(workload, Some(&s3))?;
        Ok(())
    });
}

#[test]
fn a_full_spool_disk_is_as_good_as_away_until_there_is_room() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let wal = json!({ "streaming": "on", "synchronous": "spool", "without_peer": "alone" });
        let mut pair = Pair::start(scratch, Place::s3(&s3), wal)?;
        let on_small_disk = |agent: &mut Agent| {
            agent.stop()?;
            let disk = SmallDisk::mount_on(agent.state_dir().join("spool"), 48)?;
            agent.start()?;
            anyhow::Ok(disk)
        };
        let Some(theirs) = on_small_disk(&mut pair.keeper)? else { return Ok(()) };
        let Some(own) = on_small_disk(&mut pair.agent)? else { return Ok(()) };
        pair.wait_until("spools")?;
        let workload = Acknowledged::start(&pair.server, 4, REMOTE_WRITE)?;
        pair.wait_for_commits()?;

        s3.spoil(Rule::new(Fault::Status(503)).method("PUT"));
        let filled = theirs.fill()?;
        pair.wait_for_reason("o space left")?;
        pair.wait_until("alone")?;
        pair.wait_for_commits()?;
        std::thread::sleep(Duration::from_secs(3));
        let told = pair.keeper.log_text().matches("another host's WAL is not kept").count();
        assert_eq!((told, pair.agent.log_text().matches(AWAY).count()), (1, 1), "however often it is tried");
        drop(filled);
        pair.wait_until("spools")?;
        pair.wait_for_commits()?;
        s3.heal();

        let filled = own.fill()?;
        pair.wait_for_reason("o space left")?;
        pair.wait_until("repository")?;
        pair.wait_for_commits()?;
        drop(filled);
        pair.wait_until("spools")?;
        s3.spoil(Rule::new(Fault::Status(503)).method("PUT"));
        pair.wait_for_commits()?;
        let disaster = Instant::now();
        pair.agent.kill_nine()?;
        pair.server.kill_nine()?;
        drop(own);
        std::fs::remove_dir_all(pair.server.data_dir())?;
        std::fs::remove_dir_all(pair.agent.state_dir())?;
        pair.lose_nothing(workload, disaster, Some(&s3))?;
        Ok(())
    });
}

#[test]
fn commits_go_on_while_the_store_is_away_whatever_is_started_anew() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let wal = json!({ "streaming": "on", "synchronous": "spool" });
        let mut pair = Pair::start(scratch, Place::s3(&s3), wal)?;
        let workload = Acknowledged::start(&pair.server, 4, REMOTE_WRITE)?;
        pair.wait_for_commits()?;
        pair.wait_until_noted()?;
        s3.spoil(Rule::new(Fault::Cut));
        pair.start_agent_anew()?;
        pair.wait_for_commits()?;
        let (written, flushed) = pair.positions()?;
        assert!(written > flushed, "only the repository lets the slot go on: {written}, {flushed}");
        let cluster = pair.wait_until("spools")?;
        let stream = &cluster["members"][0]["instance"]["archive"]["stream"];
        assert!(stream["store_error"].as_str().is_some_and(|found| found.contains("does not answer")), "{stream}");
        // Also the server, by a crash.
        pair.start_server_anew()?;
        pair.wait_for_commits()?;

        s3.heal();
        pair.wait_until_flushed()?;
        pair.wait_for_commits()?;
        s3.spoil(Rule::new(Fault::Cut));
        std::thread::sleep(Duration::from_secs(1));
        pair.start_agent_anew()?;
        pair.wait_for_commits()?;
        pair.destroy_and_lose_nothing(workload, Some(&s3))?;
        Ok(())
    });
}

/// Only what is to be stored is refused, then everything: a session begins where the slot stands, or none can.
#[test]
fn commits_go_on_while_a_store_that_answers_takes_nothing_whatever_is_started_anew() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let wal = json!({ "streaming": "on", "synchronous": "spool" });
        let mut pair = Pair::start(scratch, Place::s3(&s3), wal)?;
        pair.server.session()?.execute(BULK_TABLE)?;
        let workload = Acknowledged::start(&pair.server, 4, REMOTE_WRITE)?;
        pair.wait_for_commits()?;
        pair.wait_until_noted()?;
        s3.spoil(Rule::new(Fault::Status(503)).method("PUT"));
        let session = pair.server.session()?;
        session.execute(REMOTE_WRITE)?;
        for _ in 0..4 {
            session.execute(BULK)?;
        }
        drop(session);
        let (written, flushed) = pair.positions()?;
        assert!(written.0 - flushed.0 > 48 << 20, "written {written}, flushed {flushed}");
        pair.start_agent_anew()?;
        pair.wait_for_commits()?;

        // Whoever the agent is to the store, it is so no more.
        s3.spoil(Rule::new(Fault::Status(403)));
        pair.start_server_anew()?;
        pair.wait_for_commits()?;

        s3.heal();
        pair.wait_until_flushed()?;
        pair.destroy_and_lose_nothing(workload, None)?;
        Ok(())
    });
}

/// `make proof`. Stores that answer at once, slowly, and hardly; hosts that end at every phase of what an agent does.
#[test]
#[ignore = "it takes minutes"]
fn fifty_hosts_are_destroyed_and_no_commit_is_lost_to_their_spools() {
    for round in 0..50u64 {
        in_scratch(|scratch| {
            let s3 = S3Server::start(&scratch.dir("s3")?)?;
            let mut pair = Pair::start(scratch, Place::s3(&s3), json!({ "streaming": "on", "synchronous": "spool" }))?;
            let delay = Duration::from_millis([0, 200, 2000][round as usize % 3]);
            s3.spoil(Rule::new(Fault::Slow(delay)).method("PUT"));
            let workload = Acknowledged::start(&pair.server, 4, REMOTE_WRITE)?;
            std::thread::sleep(Duration::from_millis(2000 + round * 337));
            let commits = pair.destroy_and_lose_nothing(workload, Some(&s3))?;
            println!("store slower by {delay:?}: none of {commits} acknowledged commits lost");
            Ok(())
        });
    }
}

/// Of all transactions of pgbench, in milliseconds: how many a second, the median and the 99th percentile.
fn measure(pair: &Pair, mode: &str, settings: &str) -> anyhow::Result<(usize, f64, f64)> {
    const SECONDS: usize = 10;
    let logs = pair.scratch.dir(&format!("times-{mode}"))?;
    let mut pgbench = pair.server.client("pgbench");
    pgbench.args(["-n", "-N", "-c", "8", "-j", "2", "-T", &SECONDS.to_string(), "--log"]).current_dir(&logs);
    pgbench.env("PGOPTIONS", settings);
    run(pgbench)?;
    let mut taken = Vec::new();
    for (path, meta) in tree::all(&logs)? {
        if meta.is_file() {
            let text = std::fs::read_to_string(&path)?;
            taken.extend(text.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<f64>().ok()));
            std::fs::remove_file(path)?;
        }
    }
    taken.sort_by(f64::total_cmp);
    let of = |share: f64| taken.get((taken.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN) / 1000.0;
    Ok((taken.len() / SECONDS, of(0.5), of(0.99)))
}

/// The figures of docs/operation.md. `cargo test … --test it -- --ignored --nocapture commits_under_load`
#[test]
#[ignore = "it measures, and holds nothing against it"]
fn what_commits_under_load_take_in_each_mode() {
    let store = |scratch: &Scratch, delay: Option<u64>| {
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let place = if delay.is_some() { Place::s3(&s3) } else { Place::folder(scratch)? };
        let mut pair = Pair::start(scratch, place, json!({ "streaming": "on", "synchronous": "spool" }))?;
        pair.server.reload_with("max_wal_size", "8GB")?;
        let init = run({
            let mut init = pair.server.client("pgbench");
            init.args(["-i", "-q", "-s", "20"]).env("PGOPTIONS", "-c synchronous_commit=local");
            init
        });
        init?;
        if let Some(millis) = delay {
            s3.spoil(Rule::new(Fault::Slow(Duration::from_millis(millis))).method("PUT"));
        }
        let row = |mode: &str, settings: &str| {
            let (rate, median, p99) = measure(&pair, mode, settings)?;
            println!("{delay:?} {mode}: {rate}/s, median {median:.2} ms, p99 {p99:.2} ms");
            anyhow::Ok(())
        };
        row("spool", "-c synchronous_commit=remote_write")?;
        row("nobody", "-c synchronous_commit=local")?;
        pair.policy(json!({ "streaming": "on", "synchronous": "repository" }))?;
        std::thread::sleep(Duration::from_secs(5));
        row("repository", "-c synchronous_commit=on")?;
        pair.server.reload_with("synchronous_standby_names", "")?;
        pair.agent.stop()?;
        anyhow::Ok(())
    };
    in_scratch(|scratch| store(scratch, None));
    in_scratch(|scratch| store(scratch, Some(50)));
}
