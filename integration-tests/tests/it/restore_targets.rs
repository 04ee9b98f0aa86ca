//! Where a restored server stands: where its plan said and nowhere else, whatever came meanwhile, went meanwhile, or was
//! left in the source's configuration.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use walfleet_integration_tests::fleet::standalone::{CLUSTER, Restored};
use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::postgres::barrier::{Barriers, OwnRow};
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Session};
use walfleet_integration_tests::process::run;
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::tree;

/// PostgreSQL 13 to 18 say so when they begin to write.
const PROMOTED: &str = "archive recovery complete";

/// The newest commit that the repository is known to hold, as `list` prints it.
fn newest_commit(host: &Standalone) -> anyhow::Result<String> {
    let listed = host.agent.json(&["list", "--cluster", CLUSTER])?;
    let newest = listed["recovery"][0]["ranges"][0]["to"].as_str();
    newest.map(str::to_owned).ok_or_else(|| anyhow::anyhow!("nothing can be recovered: {listed}"))
}

/// What a restore wrote down about its end.
fn plan_of(restored: &Restored) -> anyhow::Result<serde_json::Value> {
    Ok(serde_json::from_slice(&std::fs::read(restored.data_dir.join("pg_wal/walfleet-restore.json"))?)?)
}

fn steps(session: &Session) -> anyhow::Result<String> {
    session.value("SELECT coalesce(string_agg(n::text, ' ' ORDER BY n), 'none') FROM step")
}

#[test]
fn a_restore_ends_where_it_was_planned_to_and_stops_if_planned_wal_is_gone() {
    in_scratch(|scratch| {
        // Commit times tell afterwards what each plan promised.
        let initdb = ["-c", "track_commit_timestamp=on"];
        let host = Standalone::start_with(scratch, &PgVersion::newest()?, Place::folder(scratch)?, &initdb)?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE step (n serial)")?;
        host.backup()?;
        let mut segments = Vec::new();
        for _ in 0..4 {
            session.execute("INSERT INTO step DEFAULT VALUES")?;
            segments.push(session.value("SELECT pg_walfile_name(pg_current_wal_lsn())")?);
            host.archive_all()?;
        }
        let newest = newest_commit(&host)?;
        let to_newest = host.restore("newest", &["--to", &newest])?;
        let latest = host.restore("latest", &["--latest"])?;
        let plan = plan_of(&to_newest)?;
        assert_eq!(plan["ends_there"], true, "no later commit will stop recovery: {plan}");
        assert_eq!(plan["needed_to_lsn"], to_newest.report["wal_to_lsn"], "{plan}");
        assert_eq!(plan_of(&latest)?["ends_there"], false, "all there is, whenever it comes");

        // WAL comes while further restores are planned, and goes on coming.
        let stop = AtomicBool::new(false);
        let racing = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let session = host.server.session()?;
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..8 {
                        session.execute("INSERT INTO step DEFAULT VALUES")?;
                        std::thread::sleep(Duration::from_millis(25));
                    }
                    session.execute("SELECT pg_switch_wal()")?;
                }
                anyhow::Ok(())
            });
            let racing = (0..2).map(|round| {
                let newest = newest_commit(&host)?;
                anyhow::Ok((host.restore(&format!("racing-{round}"), &["--to", &newest])?, newest))
            });
            let racing: anyhow::Result<Vec<_>> = racing.collect();
            stop.store(true, Ordering::Relaxed);
            writer.join().expect("the writer does not panic")?;
            racing
        })?;
        host.archive_all()?;
        let all = steps(&session)?;
        assert!(all.len() > "1 2 3 4".len(), "nothing was written meanwhile: {all}");

        // A segment of the plan goes: at the end, and before it.
        let wal = scratch.join("repository/clusters").join(CLUSTER).join("wal");
        for (restored, gone, expected) in [(&to_newest, &segments[3], "1 2 3 4"), (&latest, &segments[1], all.as_str())]
        {
            let object = tree::largest_file(&wal, gone)?;
            let aside = scratch.join("aside");
            std::fs::rename(&object, &aside)?;
            let mut server = host.server_of(restored, false)?;
            server.spawn()?;
            let ended = server.wait_for_end(Duration::from_secs(60));
            let log = server.log_text();
            assert!(!log.contains(PROMOTED), "{}: it went on without {gone}:\n{log}", restored.name);
            ended?;
            let says = format!("{gone} was in the archive when the restore was planned and is gone");
            assert!(log.contains(&says) && log.contains("HINT: "), "{} does not say why:\n{log}", restored.name);
            assert!(restored.data_dir.join("recovery.signal").exists(), "{}: recovery is over", restored.name);
            // As the hint says: put back, it goes on to where it was to go.
            std::fs::rename(&aside, &object)?;
            server.start()?;
            server.wait_until_writable()?;
            assert_eq!(steps(&server.session()?)?, expected, "{}", restored.name);
        }
        for (restored, newest) in &racing {
            let committed = format!("FROM step WHERE pg_xact_commit_timestamp(xmin) <= '{newest}'");
            let promised = session.value(&format!("SELECT string_agg(n::text, ' ' ORDER BY n) {committed}"))?;
            let server = host.recovered(restored)?;
            assert_eq!(steps(&server.session()?)?, promised, "{} to {newest}", restored.name);
        }
        Ok(())
    });
}

/// What an operator may have left in a source's files, each of which would keep a restore from its target, have the copy
/// archive or follow its source, or start something else than the copy. The server itself does not take it up.
fn leave_settings_behind(server: &PgServer, witness: &Path) -> anyhow::Result<()> {
    let touch = |name: &str| format!("touch {}", witness.join(name).display());
    let own = server.data_dir().display().to_string();
    let settings = [
        ("data_directory", own.as_str()),
        ("recovery_target_time", "2001-01-01 00:00:00+00"),
        ("restore_command", &touch("restore_command")),
        ("logging_collector", "on"),
        ("log_destination", "csvlog"),
        ("include", "left.conf"),
    ];
    let included = [
        ("recovery_target_action", "shutdown"),
        ("recovery_target_inclusive", "off"),
        ("recovery_target_timeline", "current"),
        ("recovery_min_apply_delay", "1h"),
        ("hot_standby", "off"),
        ("archive_cleanup_command", &touch("archive_cleanup_command")),
        ("recovery_end_command", &touch("recovery_end_command")),
    ];
    let lines: Vec<String> = included.iter().map(|(name, value)| format!("{name} = '{value}'\n")).collect();
    os_user().write(&server.data_dir().join("left.conf"), lines.concat())?;
    std::fs::set_permissions(server.data_dir().join("left.conf"), PermissionsExt::from_mode(0o640))?;
    server.append_settings(settings.into_iter())?;
    let session = server.session()?;
    for (name, value) in [
        ("primary_conninfo", server.connection()),
        ("archive_mode", "always".to_owned()),
        ("archive_command", touch("archive_command")),
        ("recovery_target", "immediate".to_owned()),
    ] {
        session.execute(&format!("ALTER SYSTEM SET {name} = '{value}'"))?;
    }
    Ok(())
}

#[test]
fn nothing_left_in_the_sources_configuration_steers_a_restore() {
    in_scratch(|scratch| {
        let version = PgVersion::newest()?;
        let host = Standalone::start_with(scratch, &version, Place::folder(scratch)?, &["--allow-group-access"])?;
        let mut barriers = Barriers::install(&host.server)?;
        let witness = scratch.dir("witness")?;
        leave_settings_behind(&host.server, &witness)?;
        let data_dir = host.server.data_dir().to_owned();
        os_user().write(&data_dir.join("server.key"), "read by its owner alone")?;
        std::fs::set_permissions(data_dir.join("server.key"), PermissionsExt::from_mode(0o400))?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE counted (n integer)")?;
        host.backup()?;
        // A commit on the way, which a delay would hold up and an early target would not reach.
        session.execute("INSERT INTO counted VALUES (1)")?;
        let first = barriers.pass()?;
        // Nor is a started copy's word needed: this one lets nobody in through its socket.
        let hba = std::fs::read_to_string(data_dir.join("pg_hba.conf"))?;
        std::fs::write(data_dir.join("pg_hba.conf"), format!("local all all reject\n{hba}"))?;
        host.backup()?;
        session.execute("INSERT INTO counted VALUES (2)")?;
        let second = barriers.pass()?;
        host.archive_all()?;

        let copy = host.restore_under("0077", "by-name", &["--to-name", &first.name, "--start"])?;
        assert_eq!(copy.report["server_state"], "running (promoted)", "{}", copy.report);
        let server = host.server_of(&copy, true)?;
        let session = server.session()?;
        first.must_be_state_of(&session, OwnRow::Absent)?;
        must_have_modes_of_group_access(&copy)?;
        must_stand_alone(&session, &copy)?;
        drop(session);
        let mut stop = version.command("pg_ctl");
        stop.arg("-D").arg(&copy.data_dir).args(["-m", "fast", "-w", "stop"]);
        run(stop)?;
        // By its own files alone.
        let mut server = PgServer::builder(scratch, "by-name-again", &version).open(&copy.data_dir)?;
        server.start()?;
        let session = server.session()?;
        assert_eq!(session.value("SHOW logging_collector")?, "on", "the source's logging is back");
        must_stand_alone(&session, &copy)?;

        let lsn = second.lsn.to_string();
        let copy = host.restore("by-lsn", &["--to-lsn", &lsn, "--action", "pause", "--start"])?;
        assert_eq!(copy.report["server_state"], "running (paused at target)", "{}", copy.report);
        let session = Session::open(&format!("host=127.0.0.1 port={} user=postgres dbname=postgres", copy.port))?;
        assert!(session.is_true("SELECT pg_is_wal_replay_paused()")?, "it is not paused");
        second.must_be_state_of(&session, OwnRow::Absent)?;

        let followers = "SELECT count(*) FROM pg_stat_replication WHERE application_name <> 'walfleet'";
        assert_eq!(host.server.session()?.number(followers)?, 0, "a copy follows its source");
        let left: Vec<_> = std::fs::read_dir(&witness)?.flatten().map(|entry| entry.file_name()).collect();
        assert!(left.is_empty(), "commands of the source were run: {left:?}");
        Ok(())
    });
}

/// It writes, archives nothing and follows nobody.
fn must_stand_alone(session: &Session, copy: &Restored) -> anyhow::Result<()> {
    assert_eq!(session.value("SHOW data_directory")?, copy.data_dir.display().to_string());
    assert_eq!(session.value("SHOW archive_mode")?, "off");
    assert!(!session.is_true("SELECT pg_is_in_recovery()")?);
    assert_eq!(session.number("SELECT count(*) FROM pg_stat_wal_receiver")?, 0);
    session.execute(
        "CREATE TABLE IF NOT EXISTS walfleet_test.own (n integer); INSERT INTO walfleet_test.own VALUES (1)",
    )?;
    session.execute("SELECT pg_switch_wal()")?;
    let waiting = tree::all(&copy.data_dir.join("pg_wal/archive_status"))?;
    anyhow::ensure!(!waiting.iter().any(|(path, _)| path.extension().is_some_and(|e| e == "ready")), "{waiting:?}");
    Ok(())
}

/// As `initdb --allow-group-access` gave them, and PostgreSQL since; two files are for the owner alone.
fn must_have_modes_of_group_access(copy: &Restored) -> anyhow::Result<()> {
    let for_owner = [("server.key", 0o400), ("pg_wal/walfleet-restore.json", 0o600)];
    let tablespace = PathBuf::from(format!("{}.fast", copy.data_dir.display()));
    for (path, found) in tree::all(&copy.data_dir)?.into_iter().chain(tree::all(&tablespace)?) {
        if found.is_symlink() {
            continue;
        }
        let special = for_owner.iter().find(|(name, _)| path == copy.data_dir.join(name)).map(|(_, mode)| *mode);
        let expected = special.unwrap_or(if found.is_dir() { 0o750 } else { 0o640 });
        let mode = found.permissions().mode() & 0o7777;
        anyhow::ensure!(mode == expected, "{} has {mode:o} instead of {expected:o}", path.display());
    }
    Ok(())
}
