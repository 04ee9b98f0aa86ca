//! Two servers of one cluster that write the same timeline apart: each one's WAL is kept and restored by itself, and people
//! are told.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::{CLUSTER, archive_all, streamed_all};
use walfleet_integration_tests::fleet::{Agent, Place, Standalone};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Shutdown};
use walfleet_integration_tests::process::run;
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::tree;

/// Each object of a repository that is a folder, by a hash of its content.
pub fn contents(folder: &Path) -> anyhow::Result<BTreeMap<PathBuf, u64>> {
    let files = tree::all(folder)?.into_iter().filter(|(_, meta)| meta.is_file());
    let hashed = files.map(|(path, _)| {
        let mut hasher = std::hash::DefaultHasher::new();
        std::fs::read(&path)?.hash(&mut hasher);
        Ok((path, hasher.finish()))
    });
    hashed.collect()
}

/// A copy of the host's stopped server, with a tablespace of its own.
fn copy(scratch: &Scratch, host: &Standalone) -> anyhow::Result<PgServer> {
    let (data_dir, tablespace) = (scratch.join("twin"), scratch.join("twin.fast"));
    for (from, to) in [(host.server.data_dir(), &data_dir), (Path::new(&host.tablespace), &tablespace)] {
        let mut copy = os_user().command("cp");
        copy.arg("-a").arg(from).arg(to);
        run(copy)?;
    }
    for link in std::fs::read_dir(data_dir.join("pg_tblspc"))? {
        let mut relink = os_user().command("ln");
        relink.arg("-sfn").arg(&tablespace).arg(link?.path());
        run(relink)?;
    }
    PgServer::builder(scratch, "twin-server", host.server.version()).open(&data_dir)
}

/// The agent of the copy's host; it writes with the same key.
fn agent_of(scratch: &Scratch, host: &Standalone, twin: &PgServer, wal: Value) -> anyhow::Result<Agent> {
    let agent = Agent::builder(scratch, "host2").repository(&host.place, &host.key_file).instance(CLUSTER, twin);
    agent.postgres(twin.version()).section("wal", wal).build()
}

/// The branches of timeline 1 that something can be recovered on, the timeline's own first; and what is wrong.
fn listed(agent: &Agent) -> anyhow::Result<(Vec<String>, String)> {
    let listed = agent.json(&["list", "--cluster", CLUSTER])?;
    let ranges = listed["recovery"][0]["ranges"].as_array().cloned().unwrap_or_default();
    let on_first = ranges.iter().filter(|range| range["timeline"] == 1);
    let mut branches: Vec<String> = on_first.filter_map(|range| range["branch"].as_str().map(str::to_owned)).collect();
    branches.sort();
    branches.dedup();
    anyhow::ensure!(branches.first().is_some_and(|first| first == "0000000000000000"), "{listed}");
    Ok((branches, listed["problem"].as_str().unwrap_or_default().to_owned()))
}

/// Restores the first server's end by default, and the twin's by its branch's name, from a backup that both have in common,
/// and from one of the twin's own.
fn both_must_restore(
    host: &mut Standalone,
    common: &str,
    own: &str,
    branch: &str,
    (first, second): (&Fingerprint, &Fingerprint),
) -> anyhow::Result<()> {
    // It lies in different places on the two hosts, but its oid is one.
    host.tablespace = host.server.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
    let name = format!("1-{branch}");
    let of_twin = ["--latest", "--timeline", &name];
    for (restored, words, expected) in [
        ("latest", &["--latest"][..], first),
        ("number", &["--latest", "--timeline", "1", "--backup", common], first),
        ("twin-common", &[&of_twin[..], &["--backup", common]].concat(), second),
        ("twin-own", &[&of_twin[..], &["--backup", own]].concat(), second),
        ("twin-newest", &of_twin, second),
    ] {
        let restored = host.restore(restored, words)?;
        let server = host.recovered(&restored)?;
        Fingerprint::take(&server.session()?)?.must_equal(expected)?;
    }
    Ok(())
}

fn lie(twin: &PgServer, rounds: u32) -> anyhow::Result<()> {
    let session = twin.session()?;
    session.execute("CREATE TABLE IF NOT EXISTS lies (n int)")?;
    for round in 0..rounds {
        session.execute("SELECT pg_switch_wal()")?;
        session.execute(&format!("INSERT INTO lies VALUES ({round})"))?;
    }
    Ok(())
}

const ALARM: &str = "split brain: host2 writes other WAL than host1 on timeline 1 from ";

#[test]
fn a_twins_archived_wal_goes_to_a_branch_of_its_own() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        scratch.allow_log("split brain");
        let mut host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        let common = host.backup()?["id"].as_str().unwrap_or_default().to_owned();
        host.archive_all()?;
        host.server.stop(Shutdown::Fast)?;
        let mut twin = copy(scratch, &host)?;
        host.server.start()?;
        host.server.session()?.execute("CREATE TABLE truth AS SELECT 1 AS n")?;
        host.archive_all()?;
        let (branches, problem) = listed(&host.agent)?;
        anyhow::ensure!(branches.len() == 1 && problem.is_empty(), "{branches:?}: {problem}");

        // The same system, the same timeline, the same segments, other records, and more of them than the original has. Its
        // archive_command still leads to the original's agent, which does not know it, so that its segments pile up.
        let mut agent = agent_of(scratch, &host, &twin, json!({}))?;
        agent.start()?;
        twin.start()?;
        lie(&twin, 4)?;
        let wal = scratch.join("repository/clusters").join(CLUSTER).join("wal");
        let archived = contents(&wal)?;
        agent.archive_for(&twin)?;
        archive_all(&twin)?;
        let own =
            agent.json(&["backup", "--cluster", CLUSTER, "--fast"])?["id"].as_str().unwrap_or_default().to_owned();
        agent.kill_nine()?;
        lie(&twin, 2)?;
        agent.start()?;
        archive_all(&twin)?;
        let lies = Fingerprint::take(&twin.session()?)?;
        // What the original writes next has its place.
        host.server.session()?.execute("INSERT INTO truth VALUES (2)")?;
        let truth = Fingerprint::take(&host.server.session()?)?;
        host.archive_all()?;

        let now = contents(&wal)?;
        for (path, content) in &archived {
            assert_eq!(now.get(path), Some(content), "{} was changed", path.display());
        }
        for agent in [&host.agent, &agent] {
            let (branches, problem) = listed(agent)?;
            anyhow::ensure!(branches.len() == 2 && problem.starts_with(ALARM), "{branches:?}: {problem}");
        }
        let (branches, _) = listed(&agent)?;
        twin.stop(Shutdown::Immediate)?;
        agent.stop()?;
        both_must_restore(&mut host, &common, &own, &branches[1], (&truth, &lies))?;

        // Who is promoted from the twin's branch goes on from that, and not from what the other stored under the same number.
        let name = format!("1-{}", branches[1]);
        let restored = host.restore("heir", &["--latest", "--timeline", &name, "--keep-archiving"])?;
        let mut heir = host.server_of(&restored, false)?;
        heir.set_override("archive_command", "false");
        heir.start()?;
        heir.wait_until_writable()?;
        let builder = Agent::builder(scratch, "host3").repository(&host.place, &host.key_file).instance(CLUSTER, &heir);
        let mut agent = builder.postgres(heir.version()).build()?;
        agent.start()?;
        heir.session()?.execute("CREATE TABLE heirloom AS SELECT 1 AS n")?;
        heir.stop(Shutdown::Fast)?;
        heir.set_override("archive_command", &agent.archive_command());
        heir.start()?;
        archive_all(&heir)?;
        let expected = Fingerprint::take(&heir.session()?)?;
        heir.stop(Shutdown::Fast)?;
        agent.stop()?;
        let restored = host.restore("heirs-heir", &["--latest", "--backup", &common])?;
        let server = host.recovered(&restored)?;
        assert_eq!(server.session()?.value("SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)")?, "00000003");
        Fingerprint::take(&server.session()?)?.must_equal(&expected)
    });
}

/// Neither fills its segment: what both have stored of it differs.
#[test]
fn twins_are_told_apart_before_a_segment_is_full() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        scratch.allow_log("split brain");
        let wal = json!({ "streaming": "on", "piece_interval": "200ms" });
        let place = Place::folder(scratch)?;
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, place, wal.clone())?;
        let common = host.backup()?["id"].as_str().unwrap_or_default().to_owned();
        host.server.session()?.execute("SELECT pg_switch_wal()")?;
        host.streamed_all()?;
        host.server.stop(Shutdown::Fast)?;
        let mut twin = copy(scratch, &host)?;
        let mut agent = agent_of(scratch, &host, &twin, wal)?;
        host.server.start()?;
        twin.start()?;
        agent.start()?;
        host.server.session()?.execute("CREATE TABLE truth AS SELECT 1 AS n")?;
        twin.session()?.execute("CREATE TABLE lies AS SELECT 1 AS n")?;
        let mut round = 1;
        walfleet_integration_tests::wait_for("the alarm", Duration::from_secs(60), || {
            round += 1;
            host.server.session()?.execute(&format!("INSERT INTO truth VALUES ({round})"))?;
            twin.session()?.execute(&format!("INSERT INTO lies VALUES ({round})"))?;
            let (branches, problem) = listed(&host.agent)?;
            anyhow::ensure!(branches.len() <= 2, "{branches:?}");
            Ok((branches.len() == 2 && problem.starts_with(ALARM)).then_some(()))
        })?;
        host.streamed_all()?;
        streamed_all(&twin)?;
        let (branches, _) = listed(&agent)?;
        let (truth, lies) = (Fingerprint::take(&host.server.session()?)?, Fingerprint::take(&twin.session()?)?);
        twin.stop(Shutdown::Immediate)?;
        agent.stop()?;
        host.tablespace = host.server.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
        let of_twin = format!("1-{}", branches[1]);
        for (name, words, expected) in [
            ("first", vec!["--latest", "--timeline", "1", "--backup", &common], &truth),
            ("second", vec!["--latest", "--timeline", &of_twin, "--backup", &common], &lies),
        ] {
            let restored = host.restore(name, &words)?;
            let server = host.recovered(&restored)?;
            Fingerprint::take(&server.session()?)?.must_equal(expected)?;
        }
        Ok(())
    });
}

/// A snapshot of its disk from before the open segment's last pieces.
#[test]
fn what_a_server_writes_after_a_rollback_is_kept_beside_what_it_wrote_before() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        scratch.allow_log("split brain");
        let wal = json!({ "streaming": "on", "piece_interval": "200ms" });
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, Place::folder(scratch)?, wal)?;
        let common = host.backup()?["id"].as_str().unwrap_or_default().to_owned();
        host.server.session()?.execute("SELECT pg_switch_wal(); CREATE TABLE life (number int, row int)")?;
        host.streamed_all()?;
        host.server.stop(Shutdown::Fast)?;
        let parts = [host.server.data_dir().to_owned(), PathBuf::from(&host.tablespace)];
        let snapshot = |index: usize| scratch.join(&format!("snapshot-{index}"));
        for (index, part) in parts.iter().enumerate() {
            let mut copy = os_user().command("cp");
            copy.arg("-a").arg(part).arg(snapshot(index));
            run(copy)?;
        }
        let mut lives = Vec::new();
        for (life, rows) in [(1, 5000), (2, 300)] {
            host.server.start()?;
            let session = host.server.session()?;
            session.execute(&format!("INSERT INTO life SELECT {life}, generate_series(1, {rows})"))?;
            drop(session);
            host.streamed_all()?;
            lives.push(Fingerprint::take(&host.server.session()?)?);
            if life == 1 {
                host.server.stop(Shutdown::Immediate)?;
                for (index, part) in parts.iter().enumerate() {
                    std::fs::remove_dir_all(part)?;
                    std::fs::rename(snapshot(index), part)?;
                }
            }
        }
        let alarm = "host1 writes other WAL than it did before on timeline 1 from ";
        let mut branches = Vec::new();
        walfleet_integration_tests::wait_for("the alarm", Duration::from_secs(30), || {
            let (listed, problem) = listed(&host.agent)?;
            branches = listed;
            Ok((branches.len() == 2 && problem.starts_with(alarm)).then_some(()))
        })?;
        host.tablespace = host.server.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
        for (number, branch) in branches.iter().enumerate() {
            let name = if number == 0 { "1".to_owned() } else { format!("1-{branch}") };
            let words = ["--latest", "--timeline", &name, "--backup", &common];
            let restored = host.restore(&format!("life-{number}"), &words)?;
            let server = host.recovered(&restored)?;
            Fingerprint::take(&server.session()?)?.must_equal(&lives[number])?;
        }
        Ok(())
    });
}

#[test]
fn a_twins_streamed_wal_goes_to_a_branch_of_its_own() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        scratch.allow_log("split brain");
        let wal = json!({ "streaming": "on" });
        let place = Place::folder(scratch)?;
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, place, wal.clone())?;
        let common = host.backup()?["id"].as_str().unwrap_or_default().to_owned();
        host.streamed_all()?;
        host.server.stop(Shutdown::Fast)?;
        let mut twin = copy(scratch, &host)?;
        host.server.start()?;
        host.server.session()?.execute("CREATE TABLE truth AS SELECT 1 AS n")?;
        host.server.session()?.execute("SELECT pg_switch_wal()")?;
        host.streamed_all()?;

        // Its copy of the slot stands where the two parted.
        let mut agent = agent_of(scratch, &host, &twin, wal)?;
        twin.start()?;
        lie(&twin, 3)?;
        agent.start()?;
        streamed_all(&twin)?;
        // Under way, within a segment, a new process finds what the one before began.
        lie(&twin, 1)?;
        streamed_all(&twin)?;
        agent.kill_nine()?;
        lie(&twin, 1)?;
        agent.start()?;
        let own =
            agent.json(&["backup", "--cluster", CLUSTER, "--fast"])?["id"].as_str().unwrap_or_default().to_owned();
        lie(&twin, 1)?;
        let session = host.server.session()?;
        session.execute("INSERT INTO truth VALUES (2)")?;
        // The names of its next segments are its own still.
        session.execute("SELECT pg_switch_wal()")?;
        session.execute("INSERT INTO truth VALUES (3)")?;
        session.execute("SELECT pg_switch_wal()")?;
        session.execute("INSERT INTO truth VALUES (4)")?;
        drop(session);
        streamed_all(&twin)?;
        host.streamed_all()?;
        let (truth, lies) = (Fingerprint::take(&host.server.session()?)?, Fingerprint::take(&twin.session()?)?);
        walfleet_integration_tests::wait_for("both to be listed", Duration::from_secs(30), || {
            let (branches, problem) = listed(&host.agent)?;
            anyhow::ensure!(branches.len() <= 2, "{branches:?}");
            Ok((branches.len() == 2 && problem.starts_with(ALARM)).then_some(()))
        })?;
        let (branches, _) = listed(&agent)?;
        twin.stop(Shutdown::Immediate)?;
        agent.kill_nine()?;
        both_must_restore(&mut host, &common, &own, &branches[1], (&truth, &lies))
    });
}

/// The twin itself has no agent: of its WAL there is only what its standby receives.
#[test]
fn what_a_twins_standby_receives_goes_to_a_branch_too() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        scratch.allow_log("split brain");
        scratch.allow_log("take a backup of it");
        let version = PgVersion::newest()?;
        let wal = json!({ "streaming": "on" });
        let mut host = Standalone::streaming(scratch, &version, Place::folder(scratch)?, wal.clone())?;
        let common = host.backup()?["id"].as_str().unwrap_or_default().to_owned();
        host.streamed_all()?;
        host.server.stop(Shutdown::Fast)?;
        let mut twin = copy(scratch, &host)?;
        twin.start()?;
        let mapping = format!(
            "--tablespace-mapping={}={}",
            scratch.join("twin.fast").display(),
            scratch.join("standby.fast").display()
        );
        let standby =
            PgServer::builder(scratch, "standby", &version).basebackup_option(&mapping).create_standby_of(&twin)?;
        let mut agent = agent_of(scratch, &host, &standby, wal)?;
        agent.start()?;
        walfleet_integration_tests::wait_for("the standby's WAL to be followed", Duration::from_secs(30), || {
            Ok(agent.log_text().contains("its WAL is followed in the archive").then_some(()))
        })?;
        host.server.start()?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE truth AS SELECT 1 AS n")?;
        for _ in 0..3 {
            session.execute("SELECT pg_switch_wal()")?;
            session.execute("INSERT INTO truth VALUES (2)")?;
        }
        drop(session);
        host.streamed_all()?;
        lie(&twin, 3)?;
        walfleet_integration_tests::wait_for("the alarm", Duration::from_secs(60), || {
            let (_, problem) = listed(&host.agent)?;
            Ok(problem.starts_with(ALARM).then_some(()))
        })?;
        // Of what the twin wrote before there was a standby, nobody has a piece: its branch restores from a backup of its own.
        twin.session()?.execute("CHECKPOINT")?;
        // It ends with a segment that the twin finishes.
        let own = std::thread::scope(|scope| {
            let backup = scope.spawn(|| agent.json(&["backup", "--cluster", CLUSTER]));
            while !backup.is_finished() {
                lie(&twin, 1)?;
                std::thread::sleep(Duration::from_millis(500));
            }
            backup.join().map_err(|_| anyhow::anyhow!("the backup panicked"))?
        })?;
        let own = own["id"].as_str().unwrap_or_default().to_owned();
        lie(&twin, 1)?;
        let end = twin.session()?.value("SELECT pg_current_wal_flush_lsn()")?;
        walfleet_integration_tests::wait_for("what the standby has to be stored", Duration::from_secs(60), || {
            let sql = "FROM pg_stat_replication WHERE application_name = 'walfleet'";
            let sql = format!("SELECT coalesce(max(flush_lsn) >= '{end}', false) {sql}");
            Ok(standby.session()?.is_true(&sql)?.then_some(()))
        })?;
        let (truth, lies) = (Fingerprint::take(&host.server.session()?)?, Fingerprint::take(&twin.session()?)?);
        host.streamed_all()?;
        let (branches, _) = listed(&host.agent)?;
        anyhow::ensure!(branches.len() == 2, "{branches:?}");
        host.tablespace = host.server.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
        let of_twin = format!("1-{}", branches[1]);
        for (name, timeline, backup, expected) in [("first", "1", &common, &truth), ("second", &of_twin, &own, &lies)] {
            let restored = host.restore(name, &["--latest", "--timeline", timeline, "--backup", backup])?;
            let server = host.recovered(&restored)?;
            Fingerprint::take(&server.session()?)?.must_equal(expected)?;
        }
        Ok(())
    });
}
