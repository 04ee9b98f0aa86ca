//! A repository that was tampered with, or a disk that is full: found, named, and never restored as if it were whole.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use walfleet_integration_tests::fleet::standalone::CLUSTER;
use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::postgres::load::Load;
use walfleet_integration_tests::postgres::{PgVersion, Shutdown};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::tree::largest_file;

#[derive(Clone, Copy, Debug)]
enum Damage {
    FlipMiddle,
    CutHalf,
    Empty,
    Remove,
}

impl Damage {
    fn inflict(self, file: &Path) -> std::io::Result<()> {
        let mut bytes = std::fs::read(file)?;
        match self {
            Damage::FlipMiddle => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x10;
            }
            Damage::CutHalf => bytes.truncate(bytes.len() / 2),
            Damage::Empty => bytes.clear(),
            Damage::Remove => return std::fs::remove_file(file),
        }
        std::fs::write(file, bytes)
    }
}

#[test]
fn damaged_objects_are_found_by_verify_and_never_restored() {
    in_scratch(|scratch| {
        let mut host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        let backup = host.backup()?;
        host.archive_all()?;
        // It would bring a segment that is gone again, and so would pieces of it.
        host.agent.stop()?;
        if scratch.join("repository/tails").exists() {
            std::fs::remove_dir_all(scratch.join("repository/tails"))?;
        }
        let cluster = scratch.join("repository/clusters").join(CLUSTER);
        // A segment that the backup needs: one before it may go without loss.
        let start = backup["start_lsn"].as_str().unwrap_or_default();
        let segment = host.server.session()?.value(&format!("SELECT pg_walfile_name('{start}')"))?;
        let victims = [
            largest_file(&cluster.join("packs"), "")?,
            // A manifest's reference part is smaller than the manifest.
            largest_file(&cluster.join("backups"), "")?,
            largest_file(&cluster.join("wal"), &segment)?,
        ];
        let verify = |deep: bool| {
            let mut words = vec!["verify".to_owned()];
            words.extend(host.place.flags(&host.key_file));
            words.extend(["--cluster", CLUSTER, "-o", "json"].map(str::to_owned));
            words.extend(deep.then(|| "--deep".to_owned()));
            host.run(&words)
        };
        verify(false)?.ok()?;
        verify(true)?.ok()?;

        let damages = [Damage::FlipMiddle, Damage::CutHalf, Damage::Empty, Damage::Remove];
        let cases = victims.iter().flat_map(|file| damages.map(|damage| (file, damage)));
        for (tried, (file, damage)) in cases.enumerate() {
            let saved = std::fs::read(file)?;
            damage.inflict(file)?;
            let what = format!("{damage:?} of {}", file.display());
            let found = verify(true)?;
            anyhow::ensure!(
                found.code == 1,
                "{what}: verify ended with {}:\n{}{}",
                found.code,
                found.stdout,
                found.stderr
            );
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let said = format!("{}{}", found.stdout, found.stderr);
            anyhow::ensure!(said.contains(name.split('.').next().unwrap_or_default()), "{what}: not named:\n{said}");

            let data_dir = scratch.join(&format!("from-damaged-{tried}"));
            let mut words = host.restore_words(&data_dir, &["--latest", "--start", "--port", "1"]);
            words.extend(["--config".to_owned(), host.agent.config().display().to_string()]);
            let restore = host.run(&words)?;
            anyhow::ensure!(restore.code != 0, "{what}: restored:\n{}{}", restore.stdout, restore.stderr);
            // Either nothing is there, or nothing that PostgreSQL would start.
            if data_dir.exists() {
                let mut postgres = host.server.version().command("postgres");
                postgres.args(["-c", "port=1", "-c", "restore_command=false", "-D"]).arg(&data_dir);
                let refused =
                    walfleet_integration_tests::output::Output::of(postgres, std::time::Duration::from_secs(20))?;
                anyhow::ensure!(refused.code != 0, "{what}: PostgreSQL starts on what is left");
            }
            std::fs::write(file, saved)?;
            walfleet_integration_tests::os_user::os_user().own(file)?;
        }
        verify(true)?.ok()?;
        Ok(())
    });
}

#[test]
fn a_damaged_page_is_counted_and_the_backup_goes_on() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        scratch.allow_log("ERROR");
        let mut host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        let session = host.server.session()?;
        let relation = session.value("SELECT pg_relation_filepath('pgbench_accounts')")?;
        session.execute("CHECKPOINT")?;
        drop(session);
        host.server.stop(Shutdown::Fast)?;
        let file = host.server.data_dir().join(relation);
        let mut bytes = std::fs::read(&file)?;
        // Within the rows of the hundredth page.
        bytes[99 * 8192 + 6000] ^= 0xFF;
        std::fs::write(&file, bytes)?;
        host.server.start()?;
        let report = host.backup()?;
        assert_eq!(report["damaged_pages"], 1, "{report}");
        Ok(())
    });
}

/// Pages of a file as they were, checksum and all: some tool brought back an old copy.
fn bring_back(file: &Path, former: &[u8], pages: Range<usize>) -> anyhow::Result<()> {
    let mut bytes = std::fs::read(file)?;
    let at = pages.start * 8192..pages.end * 8192;
    anyhow::ensure!(bytes[at.clone()] != former[at.clone()], "{} has not changed", file.display());
    bytes[at.clone()].copy_from_slice(&former[at]);
    Ok(std::fs::write(file, bytes)?)
}

#[test]
fn what_changes_past_the_wal_is_found_when_everything_is_read() {
    in_scratch(|scratch| {
        scratch.allow_log("ERROR");
        let mut host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        let words = ["backup", "--cluster", CLUSTER, "--fast", "--read-all"];
        let session = host.server.session()?;
        session.execute("CREATE TABLE small WITH (autovacuum_enabled = off) AS SELECT 1 AS n")?;
        session.execute("ALTER TABLE pgbench_accounts SET (autovacuum_enabled = off)")?;
        let file = |name: &str| -> anyhow::Result<PathBuf> {
            let relative = session.value(&format!("SELECT pg_relation_filepath('{name}')"))?;
            Ok(host.server.data_dir().join(relative))
        };
        let (large, small) = (file("pgbench_accounts")?, file("small")?);
        session.execute("CHECKPOINT")?;
        let (former, former_small) = (std::fs::read(&large)?, std::fs::read(&small)?);
        session.execute("UPDATE pgbench_accounts SET abalance = 7 WHERE ctid = '(100,1)'")?;
        session.execute("UPDATE small SET n = 2")?;
        host.backup()?;
        let quiet = host.agent.json(&words)?;
        assert_eq!(quiet["unexplained_slots"], 0, "{quiet}");
        assert_eq!(quiet["read_bytes"], quiet["cluster_bytes"], "{quiet}");
        drop(session);
        host.server.stop(Shutdown::Fast)?;
        bring_back(&large, &former, 100..101)?;
        bring_back(&small, &former_small, 0..1)?;
        host.server.start()?;
        let spared = host.backup()?;
        assert_eq!(spared["unexplained_slots"], 0, "nobody looked: {spared}");
        // WAL that names another page of the same slot explains nothing.
        host.server.session()?.execute("UPDATE pgbench_accounts SET abalance = 8 WHERE ctid = '(101,1)'")?;
        let found = host.agent.json(&words)?;
        assert_eq!(found["unexplained_slots"], 2, "{found}");
        let after = host.agent.json(&words)?;
        assert_eq!(after["unexplained_slots"], 0, "stored as it is now: {after}");
        Ok(())
    });
}

#[test]
fn what_a_busy_server_changes_while_everything_is_read_is_no_alarm() {
    in_scratch(|scratch| {
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        host.backup()?;
        let load = Load::start(scratch, &host.server, &host.dataset, 4, None)?;
        // Checkpoints bring to the files what changed since the backup's own.
        let (session, over) = (host.server.session()?, AtomicBool::new(false));
        std::thread::scope(|scope| {
            let flushing = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    session.execute("CHECKPOINT")?;
                }
                anyhow::Ok(())
            });
            let quiet = (0..3).try_for_each(|_| {
                let read = host.agent.json(&["backup", "--cluster", CLUSTER, "--fast", "--read-all"])?;
                anyhow::ensure!(read["unexplained_slots"] == 0, "{read}");
                Ok(())
            });
            over.store(true, Ordering::Relaxed);
            flushing.join().expect("no panic")?;
            quiet
        })?;
        load.stop()
    });
}
