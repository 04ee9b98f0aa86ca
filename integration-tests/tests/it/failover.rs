//! More than one server of a cluster: a standby that is backed up and promoted, copies that are promoted apart.

use std::time::Duration;

use serde_json::Value;
use walfleet_integration_tests::fleet::standalone::{CLUSTER, archive_all, streamed_all};
use walfleet_integration_tests::fleet::{Agent, Place, Standalone};
use walfleet_integration_tests::postgres::barrier::{Barriers, OwnRow};
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::load::{Load, must_balance};
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Shutdown, judge};
use walfleet_integration_tests::scratch::in_scratch;

use crate::split_brain::contents;

fn second_agent(host: &Standalone, server: &PgServer) -> anyhow::Result<Agent> {
    let mut agent = host.second_agent(server, Value::Null)?;
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
        let standby = host.standby(&[])?;
        let mut second = second_agent(&host, &standby)?;
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
        // What the first host did not bring of the first timeline comes from here.
        streamed_all(&standby)?;
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

/// Two copies of one backup that were promoted apart take the same number, and here the same host and place as well.
#[test]
fn two_promotions_to_one_number_are_both_kept_and_a_restore_is_told_to_choose() {
    in_scratch(|scratch| {
        let mut host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        let first = host.backup()?;
        let session = host.server.session()?;
        session.execute("SELECT pg_create_restore_point('fork')")?;
        session.execute("CREATE TABLE after_the_fork AS SELECT 0 AS n")?;
        drop(session);
        let before = Fingerprint::take(&host.server.session()?)?;
        host.archive_all()?;
        host.server.stop(Shutdown::Immediate)?;

        // Both are promoted before either's history is in the archive, where the second would find it.
        let place = scratch.join("place");
        let mut server: Option<PgServer> = None;
        let mut ends = Vec::new();
        for (name, target) in [("red", &["--latest"][..]), ("blue", &["--to-name", "fork"])] {
            let copy = host.restore(name, &[target, &["--keep-archiving"]].concat())?;
            std::fs::rename(&copy.data_dir, &place)?;
            let server = match &mut server {
                Some(server) => server,
                none => none.insert(PgServer::builder(scratch, "place-server", host.server.version()).open(&place)?),
            };
            server.set_override("archive_command", "false");
            server.start()?;
            server.wait_until_writable()?;
            let session = server.session()?;
            session.execute(&format!(
                "CREATE TABLE only_{name} AS SELECT n FROM generate_series(1, 1000) n; CHECKPOINT"
            ))?;
            let timeline = session.value("SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)")?;
            assert_eq!(timeline, "00000002", "{name} has a number of its own already");
            ends.push((name, Fingerprint::take(&session)?));
            drop(session);
            server.stop(Shutdown::Immediate)?;
            std::fs::rename(&place, &copy.data_dir)?;
        }
        let mut server = server.expect("opened for the first");

        // One agent, one instance: under its feet one copy goes and the other comes.
        let builder = Agent::builder(scratch, "host2").instance(CLUSTER, &server);
        let mut agent = builder.repository(&host.place, &host.key_file).postgres(host.server.version()).build()?;
        agent.start()?;
        server.set_override("archive_command", &agent.archive_command());
        let repository = scratch.join("repository");
        let mut kept = contents(&repository)?;
        let mut branches: Vec<String> = Vec::new();
        for (name, _) in &ends {
            std::fs::rename(scratch.join(name), &place)?;
            server.start()?;
            archive_all(&server)?;
            agent.json(&["backup", "--cluster", CLUSTER, "--fast"])?;
            archive_all(&server)?;
            server.stop(Shutdown::Immediate)?;
            std::fs::rename(&place, scratch.join(name))?;
            let now = contents(&repository)?;
            for (path, content) in &kept {
                assert_eq!(now.get(path), Some(content), "{name} changed {}", path.display());
            }
            kept = now;
            let listed = host.agent.json(&["list", "--cluster", CLUSTER])?;
            let ranges = listed["recovery"][0]["ranges"].as_array().cloned().unwrap_or_default();
            let second =
                ranges.iter().filter(|range| range["timeline"] == 2).filter_map(|range| range["branch"].as_str());
            let new: Vec<&str> = second.filter(|branch| !branches.iter().any(|known| known == branch)).collect();
            anyhow::ensure!(new.len() == 1, "{name} is not listed as one branch more: {listed}");
            branches.extend(new.into_iter().map(str::to_owned));
            let all = ranges.iter().filter(|range| range["timeline"] == 2).count();
            anyhow::ensure!(all == branches.len(), "{all} ranges of {branches:?}: {listed}");
        }
        agent.stop()?;

        let never = scratch.join("never");
        for words in [&["--latest"][..], &["--timeline", "2"]] {
            let refused = host.run(&host.restore_words(&never, words))?.exit(7)?.says("HINT: ")?;
            for branch in &branches {
                assert!(
                    refused.stderr.contains(branch),
                    "{branch} is not among what may be chosen:\n{}",
                    refused.stderr
                );
            }
            assert!(!never.exists(), "something was restored");
        }
        // What was there before, and each of the two from the backup that both came of.
        let common = first["id"].as_str().unwrap_or_default();
        let named: Vec<String> = branches.iter().map(|branch| format!("2-{branch}")).collect();
        let mut expected = vec![("before", vec!["--timeline", "1"], &before)];
        for ((name, end), timeline) in ends.iter().zip(&named) {
            expected.push((name, vec!["--timeline", timeline, "--backup", common], end));
        }
        for (name, words, fingerprint) in expected {
            let restored = host.restore(&format!("{name}-restored"), &words)?;
            let server = host.recovered(&restored)?;
            Fingerprint::take(&server.session()?)?.must_equal(fingerprint)?;
        }
        Ok(())
    });
}
