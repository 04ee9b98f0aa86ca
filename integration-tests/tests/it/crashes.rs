//! Processes are killed and stores fail at any moment; afterwards everything goes on, and nothing is lost.

use std::time::Duration;

use walfleet_integration_tests::fleet::standalone::CLUSTER;
use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::load::Load;
use walfleet_integration_tests::postgres::{PgVersion, judge};
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::scratch::in_scratch;

#[test]
fn an_agent_killed_again_and_again_loses_no_wal_and_no_backup() {
    in_scratch(|scratch| {
        let mut host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        host.server.reload_with("archive_timeout", "1s")?;
        let mut load = Load::start(scratch, &host.server, &host.dataset, 3, Some(300))?;
        let first = host.backup()?;
        for round in 0..6u64 {
            // A backup of the host's own command runs beside the daemon and is killed with it.
            let mut backup = host.agent.command(&["backup", "--cluster", CLUSTER, "--fast"]);
            backup.arg("--config").arg(host.agent.config());
            let mut backup = backup.spawn()?;
            std::thread::sleep(Duration::from_millis(200 + 170 * round));
            host.agent.kill_nine()?;
            let _ = backup.kill();
            backup.wait()?;
            std::thread::sleep(Duration::from_millis(300));
            host.agent.start()?;
        }
        anyhow::ensure!(load.is_running()?, "the load ended early");
        let last = host.backup()?;
        assert_ne!(first["id"], last["id"]);
        load.stop()?;
        let expected = Fingerprint::take(&host.server.session()?)?;
        host.archive_all()?;
        // From the first backup, so that every segment since is needed.
        let oldest = first["id"].as_str().unwrap_or_default().to_owned();
        for (name, words) in [("oldest", vec!["--latest", "--backup", &oldest]), ("newest", vec!["--latest"])] {
            let restored = host.restore(name, &words)?;
            let server = host.recovered(&restored)?;
            Fingerprint::take(&server.session()?)?.must_equal(&expected)?;
            judge::check_relations(&server)?;
        }
        Ok(())
    });
}

#[test]
fn a_bad_line_to_the_store_slows_work_down_and_spoils_nothing() {
    in_scratch(|scratch| {
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::s3(&s3))?;
        // Retries are worth a warning.
        scratch.allow_log("WARN");
        for rule in [
            Rule::new(Fault::AnswerLost).method("PUT").one_in(5),
            Rule::new(Fault::Status(503)).one_in(7),
            Rule::new(Fault::Status(409)).method("PUT").one_in(9),
            Rule::new(Fault::TornAnswer(100)).method("GET").one_in(8),
            Rule::new(Fault::TornRequest(1000)).method("PUT").one_in(11),
            Rule::new(Fault::Cut).one_in(13),
        ] {
            s3.spoil(rule);
        }
        let load = Load::start(scratch, &host.server, &host.dataset, 2, Some(200))?;
        host.backup()?;
        host.archive_all()?;
        host.backup()?;
        load.stop()?;
        let expected = Fingerprint::take(&host.server.session()?)?;
        host.archive_all()?;
        let restored = host.restore("restored", &["--latest"])?;
        judge::verify_backup(host.server.version(), &restored.data_dir)?;
        let server = host.recovered(&restored)?;
        Fingerprint::take(&server.session()?)?.must_equal(&expected)?;
        anyhow::ensure!(s3.strikes() > 20, "only {} faults struck", s3.strikes());
        Ok(())
    });
}

#[test]
fn a_store_that_is_gone_for_a_while_is_caught_up_with() {
    in_scratch(|scratch| {
        let s3 = S3Server::start(&scratch.dir("s3")?)?;
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::s3(&s3))?;
        scratch.allow_log("WARN");
        scratch.allow_log("ERROR");
        host.backup()?;
        s3.spoil(Rule::new(Fault::Cut));
        let load = Load::start(scratch, &host.server, &host.dataset, 2, None)?;
        let session = host.server.session()?;
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(700));
            session.execute("SELECT pg_switch_wal()")?;
        }
        load.stop()?;
        let expected = Fingerprint::take(&session)?;
        s3.heal();
        host.archive_all()?;
        let restored = host.restore("restored", &["--latest"])?;
        let server = host.recovered(&restored)?;
        Fingerprint::take(&server.session()?)?.must_equal(&expected)
    });
}
