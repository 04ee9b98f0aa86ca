//! Disks that fill up: the repository's, `pg_wal`'s and the restored copy's. Nothing is lost, and room is all it takes to
//! go on. Mounting a small disk needs root; without it these tests say that they saw nothing.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::postgres::PgVersion;
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::load::{Load, must_balance};
use walfleet_integration_tests::process::run;
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;

pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// None without root.
    pub fn mount(scratch: &Scratch, megabytes: u32) -> anyhow::Result<Option<SmallDisk>> {
        SmallDisk::mount_on(scratch.dir("small")?, megabytes)
    }

    /// In place of what is in a folder. None without root.
    pub fn mount_on(folder: PathBuf, megabytes: u32) -> anyhow::Result<Option<SmallDisk>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting a small disk needs root");
            return Ok(None);
        }
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={megabytes}m,mode=777"), "tmpfs"]).arg(&folder);
        run(mount)?;
        Ok(Some(SmallDisk(folder)))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Whatever room there is, or comes to be, something else takes it, until the end of what is returned.
    pub fn fill(&self) -> anyhow::Result<Filled> {
        let path = self.0.join("filler");
        let mut file = File::create(&path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let filler = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                while file.write_all(&[7; 4096]).is_ok() {}
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Ok(Filled { path, stop, filler: Some(filler) })
    }

    fn grow(&self, megabytes: u32) -> anyhow::Result<()> {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,size={megabytes}m")]).arg(&self.0);
        run(mount).map(drop)
    }
}

/// A disk without room.
pub struct Filled {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    filler: Option<JoinHandle<()>>,
}

impl Drop for Filled {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.filler.take().map(JoinHandle::join);
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn restores_to(host: &Standalone, expected: &Fingerprint) -> anyhow::Result<()> {
    let restored = host.restore("restored", &["--latest"])?;
    let server = host.recovered(&restored)?;
    Fingerprint::take(&server.session()?)?.must_equal(expected)
}

#[test]
fn a_restore_onto_a_full_disk_leaves_an_unfinished_directory() {
    in_scratch(|scratch| {
        let Some(disk) = SmallDisk::mount(scratch, 12)? else { return Ok(()) };
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        host.backup()?;
        host.archive_all()?;
        let data_dir = disk.0.join("data");
        host.run(&host.restore_words(&data_dir, &["--latest"]))?.exit(1)?.says("o space left")?;
        let mut postgres = host.server.version().command("postgres");
        postgres.arg("-D").arg(&data_dir);
        assert!(run(postgres).is_err(), "PostgreSQL starts on what is left");
        Ok(())
    });
}

#[test]
fn a_full_repository_refuses_backups_and_wal_until_there_is_room() {
    in_scratch(|scratch| {
        let Some(disk) = SmallDisk::mount(scratch, 6)? else { return Ok(()) };
        scratch.allow_log("WARN");
        scratch.allow_log("ERROR");
        let folder = disk.0.join("repository");
        os_user().create_dir(&folder)?;
        let place = Place { url: format!("file://{}", folder.display()), ..Place::folder(scratch)? };
        let host = Standalone::start(scratch, &PgVersion::newest()?, place)?;
        let words = ["backup", "--cluster", "orders", "--fast"];
        let output = wait_for("the repository to be full", Duration::from_secs(120), || {
            let output = host.agent.run(&words)?;
            host.server.session()?.execute("CREATE TABLE IF NOT EXISTS noise (n text); INSERT INTO noise SELECT md5(random()::text) FROM generate_series(1, 50000)")?;
            Ok((output.code != 0).then_some(output))
        })?;
        output.exit(1)?.says("o space left")?;
        disk.grow(600)?;
        host.backup()?;
        let expected = Fingerprint::take(&host.server.session()?)?;
        host.archive_all()?;
        restores_to(&host, &expected)
    });
}

#[test]
fn a_full_pg_wal_loses_nothing() {
    in_scratch(|scratch| {
        let Some(disk) = SmallDisk::mount(scratch, 40)? else { return Ok(()) };
        scratch.allow_log("WARN");
        scratch.allow_log("ERROR");
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let waldir = format!("--waldir={}", disk.0.join("pg_wal").display());
        let initdb = ["--wal-segsize=1", &waldir];
        let mut host = Standalone::start_with(scratch, &PgVersion::newest()?, Place::s3(&s3), &initdb)?;
        for (name, value) in [("max_wal_size", "8MB"), ("min_wal_size", "2MB")] {
            host.server.reload_with(name, value)?;
        }
        host.backup()?;
        host.archive_all()?;
        s3.spoil(Rule::new(Fault::Cut));
        let load = Load::start(scratch, &host.server, &host.dataset, 4, None)?;
        // PostgreSQL gives up when it cannot write WAL: what was not committed is not lost, it never was.
        host.server.wait_for_end(Duration::from_secs(120))?;
        drop(load);
        s3.heal();
        disk.grow(400)?;
        host.server.start()?;
        must_balance(&host.server.session()?)?;
        let expected = Fingerprint::take(&host.server.session()?)?;
        host.archive_all()?;
        restores_to(&host, &expected)
    });
}
