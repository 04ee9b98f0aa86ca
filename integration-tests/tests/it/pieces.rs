//! Pieces of WAL and whole segments: what was received in pieces becomes whole, and what is damaged hides nothing else.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde_json::json;
use walfleet_integration_tests::fleet::standalone::CLUSTER;
use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::postgres::PgVersion;
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::{tree, wait_for};
use walfleet_repository::postgres::Lsn;

/// What a session does when it begins, on two busy cores.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn segments_that_were_on_their_way_when_the_agent_was_killed_become_whole() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        let folder = scratch.dir("s3")?;
        let store = S3Server::start(&folder)?;
        let wal = json!({ "streaming": "on", "synchronous": "repository" });
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, Place::s3(&store), wal)?;
        host.backup()?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE written (n int)")?;
        // Pieces get through, and whole segments do not.
        store.spoil(Rule::new(Fault::Hang).method("PUT").path_contains("/wal/"));
        // One: behind two that wait nothing more is received.
        let segments = [session.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")?];
        session.execute("INSERT INTO written SELECT generate_series(1, 1000)")?;
        // What fills at once has no pieces.
        host.streamed_all()?;
        session.execute("SELECT pg_switch_wal()")?;
        let end: Lsn = session.value("SELECT pg_current_wal_insert_lsn()")?.parse()?;
        session.execute("INSERT INTO written SELECT generate_series(1, 1000)")?;
        let slot = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'walfleet'";
        wait_for("the slot to pass it", SOON, || Ok((session.value(slot)?.parse::<Lsn>()? > end).then_some(())))?;
        host.agent.kill_nine()?;
        // What the slot has passed the server lets go of.
        session.execute("CHECKPOINT")?;
        session.execute("CHECKPOINT")?;
        for segment in &segments {
            let there =
                session.is_true(&format!("SELECT count(*) > 0 FROM pg_ls_waldir() WHERE name = '{segment}'"))?;
            anyhow::ensure!(!there, "{segment} still lies in pg_wal");
        }
        store.heal();
        host.agent.start()?;
        for segment in &segments {
            wait_for(&format!("{segment} to be stored whole"), SOON, || {
                let is_it = |path: &Path| {
                    let path = path.to_string_lossy();
                    path.contains("/wal/") && path.ends_with(segment)
                };
                Ok(tree::all(&folder)?.iter().any(|(path, meta)| meta.is_file() && is_it(path)).then_some(()))
            })?;
        }
        host.streamed_all()?;
        let mut words = vec!["verify".to_owned()];
        words.extend(host.place.flags(&host.key_file));
        words.extend(["--cluster", CLUSTER, "--deep"].map(str::to_owned));
        host.run(&words)?.ok()?;
        let restored = host.restore("restored", &["--latest"])?;
        assert_eq!(host.recovered(&restored)?.session()?.number("SELECT count(*) FROM written")?, 2000);
        Ok(())
    });
}

/// Damages an object as disks, and those who may only create, do.
fn damage(object: &Path, how: usize) -> anyhow::Result<()> {
    let mut bytes = std::fs::read(object)?;
    match how % 3 {
        0 => bytes.clear(),
        1 => bytes.truncate(bytes.len() / 2),
        _ => {
            let at = bytes.len() - 40;
            bytes[at] ^= 0x10;
        }
    }
    std::fs::write(object, bytes)?;
    Ok(())
}

#[test]
fn objects_of_wal_that_do_not_read_are_named_and_cost_only_themselves() {
    in_scratch(|scratch| {
        // They are named.
        scratch.allow_log("WARN");
        let (place, wal) = (Place::folder(scratch)?, json!({ "streaming": "on" }));
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, place, wal)?;
        host.backup()?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE written (n int)")?;
        session.execute("INSERT INTO written SELECT generate_series(1, 1000)")?;
        let before = session.value("SELECT pg_current_wal_flush_lsn()")?;
        session.execute("SELECT pg_switch_wal()")?;
        let lost = session.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")?;
        session.execute("INSERT INTO written SELECT generate_series(1, 1000); SELECT pg_switch_wal()")?;
        let begun = session.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")?;
        // Several pieces.
        for _ in 0..3 {
            session.execute("INSERT INTO written SELECT generate_series(1, 1000)")?;
            host.streamed_all()?;
            std::thread::sleep(Duration::from_millis(1200));
        }
        let slot = "SELECT pg_walfile_name(restart_lsn) FROM pg_replication_slots WHERE slot_name = 'walfleet'";
        wait_for("the slot to pass the first", SOON, || Ok((session.value(slot)? == begun).then_some(())))?;
        host.agent.kill_nine()?;
        session.execute("CHECKPOINT")?;
        session.execute("CHECKPOINT")?;

        let repository = scratch.join("repository");
        let objects: Vec<PathBuf> = tree::all(&repository)?
            .into_iter()
            .filter(|(path, meta)| meta.is_file() && path.to_string_lossy().contains(CLUSTER))
            .map(|(path, _)| path)
            .collect();
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let whole = objects.iter().find(|path| text(path).contains("/wal/") && text(path).ends_with(&lost));
        damage(whole.context("the whole segment")?, 1)?;
        let pieces: Vec<_> =
            objects.iter().filter(|path| text(path).contains("tails/") && text(path).contains(&begun)).collect();
        anyhow::ensure!(pieces.len() >= 3, "{pieces:?}");
        for (how, piece) in pieces.iter().enumerate() {
            damage(piece, how)?;
        }
        // By its name it has everything.
        let foreign = pieces[0].with_file_name("00000000-01000000.host1");
        std::fs::write(&foreign, "made by somebody without a key")?;
        os_user().own(&foreign)?;

        let listed = host.agent.json(&["list", "--cluster", CLUSTER])?;
        assert!(listed["problem"].as_str().is_some_and(|problem| problem.contains(&lost)), "{listed:#}");
        let end: Lsn = listed["recovery"][0]["ranges"][0]["to_lsn"].as_str().unwrap_or_default().parse()?;
        let before_lsn: Lsn = before.parse()?;
        assert!(end >= before_lsn && end.0 - before_lsn.0 <= 16 << 20, "it ends before {lost}: {listed:#}");
        host.agent.start()?;
        session.execute("INSERT INTO written SELECT generate_series(1, 1000)")?;
        host.streamed_all()?;

        let count = |name: &str, target: &[&str]| -> anyhow::Result<i64> {
            let restored = host.restore(name, target)?;
            host.recovered(&restored)?.session()?.number("SELECT count(*) FROM written")
        };
        assert_eq!(count("before", &["--to-lsn", &before])?, 1000);
        host.backup()?;
        session.execute("INSERT INTO written SELECT generate_series(1, 1000)")?;
        host.streamed_all()?;
        assert_eq!(count("behind", &["--latest"])?, 7000);
        Ok(())
    });
}

/// As by a rule of the bucket, or a disk. The server writes nothing, so nothing would bring it by itself.
#[test]
fn what_vanishes_from_the_end_of_the_archive_is_told_of_and_stored_again() {
    in_scratch(|scratch| {
        scratch.allow_log("not in the repository any more");
        scratch.allow_log("WAL that the repository lacks lies here");
        let (place, wal) = (Place::folder(scratch)?, json!({ "streaming": "on" }));
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, place, wal)?;
        host.server.reload_with("wal_keep_size", "1GB")?;
        host.backup()?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE written (n int); INSERT INTO written SELECT generate_series(1, 1000)")?;
        session.execute("SELECT pg_switch_wal()")?;
        let last = session.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")?;
        session.execute("INSERT INTO written SELECT generate_series(1, 1000); SELECT pg_switch_wal()")?;
        session.execute("INSERT INTO written SELECT generate_series(1, 1000)")?;
        host.streamed_all()?;
        let end: Lsn = session.value("SELECT pg_current_wal_flush_lsn()")?.parse()?;
        drop(session);
        let repository = scratch.join("repository");
        let found = |what: &str| -> anyhow::Result<Vec<PathBuf>> {
            let all = tree::all(&repository)?.into_iter().filter(|(_, meta)| meta.is_file());
            Ok(all.map(|(path, _)| path).filter(|path| path.to_string_lossy().contains(what)).collect())
        };
        let whole = wait_for("the last whole segment", SOON, || {
            Ok(found(&last)?.into_iter().find(|path| path.to_string_lossy().contains("/wal/")))
        })?;
        std::fs::remove_file(&whole)?;
        for piece in found("/tails/")? {
            std::fs::remove_file(piece)?;
        }
        // It is looked half a minute after the agent began.
        host.wait_until_restorable(end, Duration::from_secs(90))?;
        host.server.kill_nine()?;
        host.agent.kill_nine()?;
        let restored = host.restore("restored", &["--latest"])?;
        assert_eq!(host.recovered(&restored)?.session()?.number("SELECT count(*) FROM written")?, 3000);
        Ok(())
    });
}
