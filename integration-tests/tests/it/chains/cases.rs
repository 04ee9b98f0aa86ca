//! What must not be taken from a parent, and what may be after all: pages changed past the WAL, other timelines, damage.

use std::time::Duration;

use serde_json::Value;
use walfleet_integration_tests::fleet::{Agent, Place, Standalone};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::load::Load;
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Shutdown, judge};
use walfleet_integration_tests::process::run;
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;

use super::{must_equal_the_source, taken};

fn host(scratch: &Scratch) -> anyhow::Result<Standalone> {
    let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
    // Nothing is written but by the test.
    let quiet = [("autovacuum", "off"), ("checkpoint_timeout", "1h"), ("bgwriter_lru_maxpages", "0")];
    host.server.append_settings(quiet.into_iter())?;
    host.server.session()?.execute("SELECT pg_reload_conf()")?;
    Ok(host)
}

/// Takes a backup and restores it to what the server has; its report, and why everything was read if it was.
fn proven(host: &Standalone, name: &str) -> anyhow::Result<(Value, Option<String>)> {
    proven_by(host, (&host.agent, &host.server), name)
}

/// The same by another member of the cluster.
fn proven_by(
    host: &Standalone,
    (agent, server): (&Agent, &PgServer),
    name: &str,
) -> anyhow::Result<(Value, Option<String>)> {
    let (report, reason) = taken(agent, &[])?;
    let id = report["id"].as_str().unwrap_or_default();
    let restored = host.restore(name, &["--latest", "--backup", id])?;
    // A standby learns of hint bits only with the first image of a page after a checkpoint, and sets none of its own.
    let has_standby = host.server.session()?.number("SELECT count(*) FROM pg_stat_replication")? > 0;
    must_equal_the_source(server, &report, &restored, !has_standby)?;
    Ok((report, reason))
}

#[test]
fn everything_is_read_after_checksums_were_turned_off_and_on() {
    in_scratch(|scratch| {
        let mut host = host(scratch)?;
        host.backup()?;
        for (option, name) in [("--disable", "off"), ("--enable", "on")] {
            host.server.stop(Shutdown::Fast)?;
            let mut checksums = host.server.version().command("pg_checksums");
            checksums.args([option, "-D"]).arg(host.server.data_dir());
            run(checksums)?;
            host.server.start()?;
            let (report, reason) = proven(&host, name)?;
            assert_eq!(report["read_bytes"], report["cluster_bytes"], "{report}");
            assert!(reason.is_some_and(|reason| reason.contains("checksums were turned on or off")));
        }
        let (_, reason) = proven(&host, "after")?;
        assert_eq!(reason, None);
        Ok(())
    });
}

#[test]
fn a_promotion_between_two_backups_keeps_what_the_parent_has() {
    in_scratch(|scratch| {
        let mut host = host(scratch)?;
        for timeline in 1..=3 {
            let session = host.server.session()?;
            session.execute("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid % 5000 = 7")?;
            session.execute(&format!("CREATE TABLE before_{timeline} AS SELECT generate_series(1, 9000) n"))?;
            drop(session);
            let (report, reason) = proven(&host, &format!("before-{timeline}"))?;
            assert_eq!((report["timeline"].as_u64(), reason), (Some(timeline), None), "{report}");
            host.server
                .session()?
                .execute("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid % 5000 = 9")?;
            host.server.stop(Shutdown::Immediate)?;
            os_user().write(&host.server.data_dir().join("standby.signal"), "")?;
            host.server.start()?;
            host.server.promote()?;
            host.server.session()?.execute("DELETE FROM pgbench_accounts WHERE aid % 5000 = 11")?;
        }
        Ok(())
    });
}

#[test]
fn a_file_in_which_the_parent_found_damage_is_read_again() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        scratch.allow_log("ERROR");
        let mut host = host(scratch)?;
        let session = host.server.session()?;
        session.execute("SELECT count(*) FROM pgbench_accounts")?;
        let file = host.server.data_dir().join(session.value("SELECT pg_relation_filepath('pgbench_accounts')")?);
        drop(session);
        let mut sound = Vec::new();
        for (name, damaged) in [("damaged", 1), ("still-damaged", 1), ("repaired", 0), ("at-rest", 0)] {
            host.server.stop(Shutdown::Fast)?;
            match name {
                "damaged" => {
                    sound = std::fs::read(&file)?;
                    let mut bytes = sound.clone();
                    // Within the rows of the hundredth page.
                    bytes[99 * 8192 + 6000] ^= 0xFF;
                    std::fs::write(&file, bytes)?;
                }
                "repaired" => std::fs::write(&file, &sound)?,
                _ => {}
            }
            host.server.start()?;
            let (report, reason) = proven(&host, name)?;
            assert_eq!((report["damaged_pages"].as_u64(), reason), (Some(damaged), None), "{name}: {report}");
            let read = report["read_bytes"].as_u64().unwrap_or_default();
            let reads_the_file = read > sound.len() as u64;
            assert_eq!(reads_the_file, name != "at-rest", "{name}: {report}");
        }
        Ok(())
    });
}

#[test]
fn primary_and_standby_take_turns_in_one_chain() {
    in_scratch(|scratch| {
        let mut host = host(scratch)?;
        // The stop position of a standby's backup lies in a segment that only the primary finishes.
        host.server.reload_with("archive_timeout", "1s")?;
        let standby = host.standby(&[])?;
        host.tablespace = standby.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
        let mut second = host.second_agent(&standby, Value::Null)?;
        second.start()?;
        let primary = host.server.session()?;
        for turn in 0..6 {
            primary.execute(&format!("UPDATE pgbench_accounts SET abalance = {turn} WHERE aid % 5000 = {turn}"))?;
            primary.execute(&format!("CREATE TABLE turn_{turn} AS SELECT generate_series(1, 9000) n"))?;
            primary.execute(&format!("DELETE FROM turn_{} WHERE n > 4000", turn / 2 * 2))?;
            primary.execute(&format!("VACUUM turn_{}", turn / 2 * 2))?;
            let (report, reason) = match turn % 3 {
                0 => proven(&host, &format!("turn-{turn}"))?,
                _ => {
                    primary.execute("CHECKPOINT")?;
                    let end = primary.value("SELECT pg_current_wal_flush_lsn()")?;
                    let caught_up = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
                    let session = standby.session()?;
                    wait_for("the standby", Duration::from_secs(30), || {
                        Ok(session.is_true(&caught_up)?.then_some(()))
                    })?;
                    proven_by(&host, (&second, &standby), &format!("turn-{turn}"))?
                }
            };
            assert_eq!(report["member"], if turn % 3 == 0 { "host1" } else { "host2" });
            assert_eq!(reason, None, "{report}");
        }
        Ok(())
    });
}

/// Segments are short, so that each backup begins far behind its parent, within a record, with most of what leads there
/// recycled; autovacuum and checkpoints come when they like.
#[test]
fn backups_of_a_server_that_writes_know_what_changed_and_restore_to_its_end() {
    in_scratch(|scratch| {
        let initdb = ["--wal-segsize=1"];
        let mut host = Standalone::start_with(scratch, &PgVersion::of(16)?, Place::folder(scratch)?, &initdb)?;
        let settings = [("min_wal_size", "2MB"), ("max_wal_size", "4MB"), ("autovacuum_naptime", "1s")];
        host.server.append_settings(settings.into_iter())?;
        host.server.restart()?;
        let load = Load::start(scratch, &host.server, &host.dataset, 3, Some(200))?;
        for number in 0..6 {
            let (report, reason) = taken(&host.agent, &[])?;
            assert_eq!(reason, None, "backup {number}: {report}");
            let bytes = |name: &str| report[name].as_u64().unwrap_or_default();
            assert!(number == 0 || bytes("read_bytes") < bytes("cluster_bytes"), "backup {number}: {report}");
            std::thread::sleep(Duration::from_millis(600));
        }
        load.stop()?;
        let expected = Fingerprint::take(&host.server.session()?)?;
        host.archive_all()?;
        let restored = host.restore("restored", &["--latest"])?;
        judge::verify_backup(host.server.version(), &restored.data_dir)?;
        let mut server = host.recovered(&restored)?;
        Fingerprint::take(&server.session()?)?.must_equal(&expected)?;
        judge::check_relations(&server)?;
        server.stop(Shutdown::Fast)?;
        judge::check_pages(server.version(), &restored.data_dir)
    });
}
