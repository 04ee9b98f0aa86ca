//! More than one server of a cluster: a standby that is backed up and promoted, a twin that diverges.

use std::time::Duration;

use walfleet_integration_tests::fleet::standalone::{CLUSTER, archive_all};
use walfleet_integration_tests::fleet::{Agent, Place, Standalone};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::postgres::barrier::{Barriers, OwnRow};
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::load::{Load, must_balance};
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Shutdown, judge};
use walfleet_integration_tests::process::run;
use walfleet_integration_tests::scratch::{Scratch, in_scratch};

/// The agent of a second member, writing with the same key.
fn second_agent(scratch: &Scratch, host: &Standalone, server: &PgServer) -> anyhow::Result<Agent> {
    let agent = Agent::builder(scratch, "host2").instance(CLUSTER, server).repository(&host.place, &host.key_file);
    let mut agent = agent.postgres(server.version()).build()?;
    agent.start()?;
    agent.archive_for(server)?;
    Ok(agent)
}

#[test]
fn a_standby_is_backed_up_and_promoted_and_both_sides_of_the_switch_restore() {
    in_scratch(|scratch| {
        let mut host = Standalone::start(scratch, &PgVersion::of(17)?, Place::folder(scratch)?)?;
        // The stop position of a standby's backup lies in a segment that only the primary finishes.
        host.server.reload_with("archive_timeout", "1s")?;
        let mapping = format!("--tablespace-mapping={}={}", host.tablespace, scratch.join("standby.fast").display());
        let standby = PgServer::builder(scratch, "standby", host.server.version())
            .basebackup_option(&mapping)
            .create_standby_of(&host.server)?;
        let mut second = second_agent(scratch, &host, &standby)?;
        let mut barriers = Barriers::install(&host.server)?;
        let load = Load::start(scratch, &host.server, &host.dataset, 2, Some(200))?;
        host.backup()?;
        let from_standby = second.json(&["backup", "--cluster", CLUSTER, "--fast"])?;
        assert_eq!(from_standby["member"], "host2", "{from_standby}");
        let before = barriers.pass()?;
        std::thread::sleep(Duration::from_millis(1500));
        load.stop()?;
        host.archive_all()?;
        host.agent.stop()?;
        host.server.stop(Shutdown::Fast)?;
        standby.promote()?;
        let load = Load::start(scratch, &standby, &host.dataset, 2, Some(200))?;
        std::thread::sleep(Duration::from_secs(1));
        load.stop()?;
        let after = Fingerprint::take(&standby.session()?)?;
        archive_all(&standby)?;
        // It lies in different places on the two members, but its oid is one.
        host.tablespace = standby.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
        second.stop()?;

        let id = from_standby["id"].as_str().unwrap_or_default();
        for (name, words) in
            [("old", vec!["--to", before.time.as_str(), "--action", "pause"]), ("new", vec!["--latest"])]
        {
            for (which, backup) in [("any", vec![]), ("standby", vec!["--backup", id])] {
                // A backup serves only targets after its end.
                let restored = host.restore(&format!("{name}-{which}"), &[words.clone(), backup].concat())?;
                judge::verify_backup(host.server.version(), &restored.data_dir)?;
                let mut server = host.server_of(&restored, false)?;
                server.start()?;
                let session = server.session()?;
                if name == "old" {
                    walfleet_integration_tests::wait_for("the pause", Duration::from_secs(60), || {
                        Ok(session.is_true("SELECT pg_is_wal_replay_paused()")?.then_some(()))
                    })?;
                    before.must_be_state_of(&session, OwnRow::Absent)?;
                } else {
                    server.wait_until_writable()?;
                    Fingerprint::take(&session)?.must_equal(&after)?;
                }
                must_balance(&session)?;
                judge::check_relations(&server)?;
            }
        }
        Ok(())
    });
}

#[test]
fn a_twin_that_diverges_cannot_replace_what_was_archived() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        scratch.allow_log("ERROR");
        let mut host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        host.backup()?;
        host.archive_all()?;
        host.server.stop(Shutdown::Fast)?;
        let twin_dir = scratch.join("twin");
        let mut copy = os_user().command("cp");
        copy.arg("-a").arg(host.server.data_dir()).arg(&twin_dir);
        run(copy)?;
        host.server.start()?;
        host.server.session()?.execute("CREATE TABLE truth AS SELECT 1 AS n")?;
        let expected = Fingerprint::take(&host.server.session()?)?;
        host.archive_all()?;

        // The same system, the same timeline, the same segments, other records.
        let mut twin = PgServer::builder(scratch, "twin-server", host.server.version()).open(&twin_dir)?;
        let agent = Agent::builder(scratch, "host2").repository(&host.place, &host.key_file).instance(CLUSTER, &twin);
        let mut agent = agent.build()?;
        agent.start()?;
        twin.set_override("archive_command", &agent.archive_command());
        // The tablespace is a link to the original's: only the catalog is touched.
        twin.start()?;
        let session = twin.session()?;
        session.execute("CREATE TABLE lies AS SELECT 2 AS n")?;
        session.execute("SELECT pg_switch_wal()")?;
        walfleet_integration_tests::wait_for("the twin's segment to be refused", Duration::from_secs(30), || {
            Ok((session.number("SELECT failed_count FROM pg_stat_archiver")? > 0).then_some(()))
        })?;
        drop(session);
        twin.stop(Shutdown::Immediate)?;

        let restored = host.restore("restored", &["--latest"])?;
        let mut server = host.server_of(&restored, false)?;
        server.start()?;
        server.wait_until_writable()?;
        Fingerprint::take(&server.session()?)?.must_equal(&expected)
    });
}
