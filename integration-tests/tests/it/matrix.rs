//! The promise itself, on every version: what was backed up under load is restored to every kind of target, and equals
//! what the source held there, table by table.

use std::time::Duration;

use walfleet_integration_tests::fleet::standalone::Restored;
use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::postgres::barrier::{Barrier, Barriers, OwnRow};
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::load::{Load, must_balance};
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Session, Shutdown, judge};
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;

/// Where each version's repository lies: both kinds of store see old and new servers.
#[derive(Clone, Copy)]
enum Kind {
    Folder,
    S3,
}

#[test]
fn postgresql_13_restores_to_every_kind_of_target() {
    every_target(13, Kind::S3, &[]);
}

#[test]
fn postgresql_14_restores_to_every_kind_of_target() {
    every_target(14, Kind::Folder, &["--wal-segsize=1"]);
}

#[test]
fn postgresql_15_restores_to_every_kind_of_target() {
    every_target(15, Kind::Folder, &["--no-data-checksums"]);
}

#[test]
fn postgresql_16_restores_to_every_kind_of_target() {
    every_target(16, Kind::S3, &[]);
}

#[test]
fn postgresql_17_restores_to_every_kind_of_target() {
    every_target(17, Kind::Folder, &["--wal-segsize=32"]);
}

#[test]
fn postgresql_18_restores_to_every_kind_of_target() {
    every_target(18, Kind::S3, &["--allow-group-access"]);
}

/// Options of initdb's bring other segment sizes, no checksums and readable files into play.
fn every_target(major: u32, kind: Kind, initdb: &[&str]) {
    in_scratch(|scratch| {
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let place = match kind {
            Kind::Folder => Place::folder(scratch)?,
            Kind::S3 => Place::s3(&s3),
        };
        let mut host = Standalone::start_with(scratch, &PgVersion::of(major)?, place, initdb)?;
        let history = live(scratch, &host)?;
        // From here on nothing of the host is left but what lies in the repository.
        host.agent.kill_nine()?;
        host.server.stop(Shutdown::Immediate)?;
        history.barriers.iter().enumerate().try_for_each(|(index, barrier)| restore_to(&host, barrier, index))?;
        restore_to_the_end(&host, &history)?;
        restore_to_consistency(&host)
    });
}

/// What happened on the source.
struct History {
    /// Two between the backups, two after the second.
    barriers: Vec<Barrier>,
    end: Fingerprint,
}

/// Two backups under load, barriers before and after the second, and all WAL archived at the end.
fn live(scratch: &Scratch, host: &Standalone) -> anyhow::Result<History> {
    let mut load = Load::start(scratch, &host.server, &host.dataset, 3, Some(300))?;
    let mut barriers = Barriers::install(&host.server)?;
    let mut passed = Vec::new();
    let mut pass = |count: usize| -> anyhow::Result<()> {
        for _ in 0..count {
            std::thread::sleep(Duration::from_millis(250));
            passed.push(barriers.pass()?);
        }
        Ok(())
    };
    let first = host.backup()?;
    pass(2)?;
    let second = host.backup()?;
    pass(2)?;
    anyhow::ensure!(second["parents"] == serde_json::json!([first["id"]]), "the second backup has no parent: {second}");
    let stored = |report: &serde_json::Value| report["stored_bytes"].as_u64().unwrap_or_default();
    anyhow::ensure!(stored(&second) < stored(&first), "the second backup stored no less:\n{first}\n{second}");
    anyhow::ensure!(load.is_running()?, "the load ended early");
    load.stop()?;
    let end = Fingerprint::take(&host.server.session()?)?;
    host.archive_all()?;
    Ok(History { barriers: passed, end })
}

/// One kind of target for each barrier, each judged at rest and in recovery.
fn restore_to(host: &Standalone, barrier: &Barrier, index: usize) -> anyhow::Result<()> {
    let (lsn, xid) = (barrier.lsn.to_string(), barrier.xid.to_string());
    let targets: [(&str, Vec<&str>, OwnRow); 5] = [
        ("time", vec!["--to", &barrier.time], OwnRow::Absent),
        ("lsn", vec!["--to-lsn", &lsn], OwnRow::Absent),
        ("name", vec!["--to-name", &barrier.name], OwnRow::Absent),
        ("xid", vec!["--to-xid", &xid], OwnRow::Present),
        ("xid-exclusive", vec!["--to-xid", &xid, "--exclusive"], OwnRow::Absent),
    ];
    // The last barrier takes the last kind too.
    let chosen = targets.into_iter().enumerate().filter(|(kind, _)| *kind == index || (*kind == 4 && index == 3));
    for (_, (name, mut target, own)) in chosen {
        target.extend(["--action", "pause"]);
        let restored = host.restore(name, &target)?;
        judge::verify_backup(host.server.version(), &restored.data_dir)?;
        let mut server = host.server_of(&restored, false)?;
        server.start()?;
        let session = server.session()?;
        wait_until_paused(&session)?;
        barrier.must_be_state_of(&session, own)?;
        must_balance(&session)?;
        judge::check_relations(&server)?;
        anyhow::ensure!(session.value("SHOW archive_mode")? == "off", "a restored copy archives");
        let checksums = session.value("SHOW data_checksums")? == "on";
        drop(session);
        server.stop(Shutdown::Fast)?;
        if checksums {
            judge::check_pages(host.server.version(), &restored.data_dir)?;
        }
    }
    Ok(())
}

/// Started by the agent, to the end of the archive, and writing on a new timeline.
fn restore_to_the_end(host: &Standalone, history: &History) -> anyhow::Result<()> {
    let restored = host.restore("latest", &["--latest", "--start"])?;
    let server = host.server_of(&restored, true)?;
    server.wait_until_writable()?;
    let session = server.session()?;
    Fingerprint::take(&session)?.must_equal(&history.end)?;
    judge::check_relations(&server)?;
    anyhow::ensure!(session.number("SELECT timeline_id FROM pg_control_checkpoint()")? >= 1);
    session.execute("CREATE TABLE written_after_the_restore (n integer); CHECKPOINT")?;
    anyhow::ensure!(session.number("SELECT timeline_id FROM pg_control_checkpoint()")? == 2, "it is on timeline 2");
    moved_tablespace(&restored, &session)
}

/// As soon as the newest backup is consistent; shut down there, as asked.
fn restore_to_consistency(host: &Standalone) -> anyhow::Result<()> {
    let restored = host.restore("immediate", &["--immediate", "--action", "shutdown"])?;
    let mut server: PgServer = host.server_of(&restored, false)?;
    server.spawn()?;
    server.wait_for_end(Duration::from_secs(60))?;
    // recovery.signal still stands (recovery.conf's successor: a server that shut down at its target would shut down
    // again); promoting now is the operator's decision.
    std::fs::remove_file(restored.data_dir.join("recovery.signal"))?;
    server.start()?;
    must_balance(&server.session()?)?;
    judge::check_relations(&server)
}

fn wait_until_paused(session: &Session) -> anyhow::Result<()> {
    wait_for("recovery to pause at its target", Duration::from_secs(60), || {
        Ok(session.is_true("SELECT pg_is_wal_replay_paused()")?.then_some(()))
    })
}

/// The tablespace lies where it was mapped to, not where the source's still lies.
fn moved_tablespace(restored: &Restored, session: &Session) -> anyhow::Result<()> {
    let location = session.value("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'fast'")?;
    let expected = format!("{}.fast", restored.data_dir.display());
    anyhow::ensure!(location == expected, "the tablespace lies in {location} instead of {expected}");
    anyhow::ensure!(session.number("SELECT count(*) FROM far_fast")? == 10_000);
    Ok(())
}
