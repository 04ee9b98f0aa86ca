//! What is asked wrongly, or stands in the way, ends in a clear message and the documented exit code, and changes nothing.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use walfleet_integration_tests::fleet::standalone::CLUSTER;
use walfleet_integration_tests::fleet::{Agent, Place, Standalone};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::scratch::in_scratch;

/// The documented exit codes (docs: the command line).
const FAILED: i32 = 1;
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 4;
const NOT_RECOVERABLE: i32 = 7;

#[test]
fn restores_that_cannot_be_say_why_and_leave_no_directory() {
    in_scratch(|scratch| {
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        let nothing = host.restore_words(&scratch.join("never"), &["--latest"]);
        host.run(&nothing)?.exit(NOT_FOUND)?;
        host.backup()?;
        host.archive_all()?;
        let cases: [(&[&str], i32, &str); 9] = [
            (&["--to", "2020-01-01 00:00:00 UTC"], NOT_RECOVERABLE, "20"),
            (&["--to", "2100-01-01 00:00:00 UTC"], NOT_RECOVERABLE, "20"),
            (&["--to-lsn", "0/1000000"], NOT_RECOVERABLE, "0/"),
            (&["--to-lsn", "FFFF/0"], NOT_RECOVERABLE, "0/"),
            (&["--to-name", "no_such_point"], NOT_RECOVERABLE, "no_such_point"),
            (&["--timeline", "9"], NOT_RECOVERABLE, "9"),
            (&["--to", "2026-06-04 14:31:59"], USAGE, "has no time zone"),
            (&["--to", "yesterday"], USAGE, "is not a time"),
            (&["--to-lsn", "0/3000060", "--to-xid", "7"], USAGE, "cannot be used with"),
        ];
        for (target, code, says) in cases {
            let data_dir = scratch.join("never");
            let output = host.run(&host.restore_words(&data_dir, target))?.exit(code)?.says(says)?;
            assert!(!data_dir.exists(), "{} left {}", output.command, data_dir.display());
        }
        Ok(())
    });
}

#[test]
fn a_directory_in_use_is_refused_and_left_as_it_is() {
    in_scratch(|scratch| {
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        host.backup()?;
        host.archive_all()?;
        let occupied = scratch.dir("occupied")?;
        os_user().write(&occupied.join("precious"), "keep me")?;
        host.run(&host.restore_words(&occupied, &["--latest"]))?.exit(REFUSED)?.says("not empty")?;
        assert_eq!(std::fs::read_to_string(occupied.join("precious"))?, "keep me");
        assert_eq!(std::fs::read_dir(&occupied)?.count(), 1);

        host.run(&host.restore_words(host.server.data_dir(), &["--latest"]))?.exit(REFUSED)?;
        host.server.session()?.execute("SELECT 1")?;

        // The tablespace's old place is not empty either, and nobody mapped it.
        let mut words = host.restore_words(&scratch.join("unmapped"), &["--latest"]);
        let flag = words.iter().position(|word| word == "--tablespace").expect("mapped by default");
        words.drain(flag..flag + 2);
        host.run(&words)?.exit(REFUSED)?.says("primary.fast is not empty")?;
        Ok(())
    });
}

#[test]
fn keys_and_repositories_that_do_not_fit_are_named() {
    in_scratch(|scratch| {
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        host.backup()?;
        let list = |place: &Place, key: &Path| {
            let words = std::iter::once("list".to_owned()).chain(place.flags(key)).collect::<Vec<_>>();
            host.run(&[words, ["--cluster", CLUSTER].map(str::to_owned).into()].concat())
        };
        list(&host.place, &host.key_file)?.ok()?;

        let other = Place { url: format!("file://{}", scratch.dir("other")?.display()), ..host.place.clone() };
        let other_key = scratch.join("other.key");
        let init: Vec<String> = std::iter::once("init".to_owned()).chain(other.flags(&other_key)).collect();
        host.run(&init)?.ok()?;
        list(&host.place, &other_key)?.exit(REFUSED)?.says("key")?;
        list(&other, &other_key)?.exit(NOT_FOUND)?.says(CLUSTER)?;
        // A repository is never made anew under another key.
        let again = std::iter::once("init".to_owned()).chain(host.place.flags(&other_key)).collect::<Vec<_>>();
        host.run(&again)?.exit(REFUSED)?;

        list(&host.place, &scratch.join("no.key"))?.exit(FAILED)?.says("no.key")?;
        std::fs::set_permissions(&other_key, std::fs::Permissions::from_mode(0o644))?;
        list(&other, &other_key)?.exit(FAILED)?.says("chmod 600")?;
        let nowhere = Place { url: format!("file://{}", scratch.join("nowhere").display()), ..host.place.clone() };
        // A mount that is missing must not look like a repository that never was.
        list(&nowhere, &host.key_file)?.exit(FAILED)?.says("check the mount")?;
        Ok(())
    });
}

#[test]
fn a_server_that_cannot_be_backed_up_says_why() {
    in_scratch(|scratch| {
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        let backup = |words: &[&str]| host.agent.run(&[&["backup", "--cluster", CLUSTER, "--fast"], words].concat());
        let session = host.server.session()?;
        session.execute("CREATE ROLE guarded SUPERUSER LOGIN PASSWORD 'right'; CREATE ROLE weak LOGIN")?;
        let hba = std::fs::read_to_string(host.server.data_dir().join("pg_hba.conf"))?;
        os_user()
            .write(&host.server.data_dir().join("pg_hba.conf"), format!("local all guarded scram-sha-256\n{hba}"))?;
        session.execute("SELECT pg_reload_conf()")?;
        let connect = |rest: &str| {
            format!("host={} port={} dbname=postgres {rest}", host.server.socket_dir().display(), host.server.port())
        };
        let wrong = connect("user=guarded password=wrong");
        let output = backup(&["--connection", &wrong])?.exit(FAILED)?.says("password")?;
        assert!(!output.stderr.contains("password=wrong"), "the password is shown:\n{}", output.stderr);
        backup(&["--connection", &connect("user=guarded password=right")])?.ok()?;
        backup(&["--connection", &connect("user=weak")])?.exit(FAILED)?.says("HINT")?;
        backup(&["--connection", "host=/nonexistent port=1 user=postgres"])?.exit(FAILED)?;
        backup(&["--data-dir", &scratch.path().display().to_string()])?.exit(FAILED)?.says("data directory")?;

        // The connection leads to another server than the data directory belongs to.
        let stranger = PgServer::builder(scratch, "stranger", host.server.version()).create()?;
        backup(&["--connection", &stranger.connection()])?.exit(REFUSED)?;
        Ok(())
    });
}

#[test]
fn a_malformed_configuration_is_named_by_file_and_path() {
    in_scratch(|scratch| {
        let mut broken = Agent::builder(scratch, "broken").build()?;
        for (yaml, says) in [
            ("a: [", "agent-broken.yaml"),
            ("backup: { processes: 0 }", "backup.processes"),
            ("unknown_section: 1", "unknown_section"),
            ("state_dir: relative", "state_dir"),
        ] {
            os_user().write(broken.config(), yaml)?;
            broken.run(&["run"])?.exit(USAGE)?.says(says)?;
        }
        assert!(!broken.is_running()?);
        Ok(())
    });
}

/// Postgres takes 1 to 125 for "end of WAL" and promotes without a word.
#[test]
fn wal_fetch_says_absent_only_for_a_proven_absence() {
    in_scratch(|scratch| {
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        host.backup()?;
        host.archive_all()?;
        let restored = host.restore("restored", &["--latest"])?;
        let source = restored.data_dir.join("pg_wal/walfleet-restore.json").display().to_string();
        let into = restored.data_dir.join("pg_wal/RECOVERYXLOG").display().to_string();
        let fetch = |words: &[&str]| {
            let words = [&["wal", "fetch"], words].concat();
            host.run(&words.into_iter().map(str::to_owned).collect::<Vec<_>>())
        };
        let session = host.server.session()?;
        let start = restored.report["wal_from_lsn"].as_str().unwrap_or_default().to_owned();
        let first = session.value(&format!("SELECT pg_walfile_name('{start}')"))?;
        fetch(&[&first, &into, "--source", &source])?.ok()?;
        assert_eq!(std::fs::metadata(&into)?.len(), 16 << 20);
        fetch(&["0000000100000FFF000000AA", &into, "--source", &source])?.exit(1)?;
        fetch(&["00000009.history", &into, "--source", &source])?.exit(1)?;
        let above = |words: &[&str]| -> anyhow::Result<()> {
            let output = fetch(words)?;
            anyhow::ensure!(output.code > 125, "{} ended with {}", output.command, output.code);
            Ok(())
        };
        above(&[])?;
        above(&[&first])?;
        above(&[&first, &into, "--sauce", &source])?;
        above(&["not-a-segment", &into, "--source", &source])?;
        above(&[&first, "/nonexistent/folder/RECOVERYXLOG", "--source", &source])?;
        above(&[&first, &into, "--source", &scratch.join("absent.json").display().to_string()])?;
        os_user().write(&scratch.join("broken.json"), "{")?;
        above(&[&first, &into, "--source", &scratch.join("broken.json").display().to_string()])?;
        std::fs::rename(scratch.join("repository"), scratch.join("unmounted"))?;
        above(&[&first, &into, "--source", &source])?;
        above(&["0000000100000FFF000000AA", &into, "--source", &source])?;
        std::fs::rename(scratch.join("unmounted"), scratch.join("repository"))?;
        Ok(())
    });
}
