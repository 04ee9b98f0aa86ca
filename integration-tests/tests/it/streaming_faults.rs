//! Streaming while everything around it fails: the line, the store, the agent, the server. The judge is a workload that
//! remembers what it was told ([`Acknowledged`]).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::{CLUSTER, Setup};
use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::network::Line;
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::postgres::PgVersion;
use walfleet_integration_tests::postgres::acknowledged::{Acknowledged, Lost, Record};
use walfleet_integration_tests::process::run;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::s3::{BUCKET, S3Server};
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::{tree, wait_for};
use walfleet_repository::layout;
use walfleet_repository::postgres::{Lsn, Segment, SegmentSize, Timeline};

use crate::streaming::A_SECOND_OR_SO;

/// What befalls one part of the whole for a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Trouble {
    NarrowLine,
    TinyLine,
    CutLine,
    StoreRefuses,
    StoreHangs,
    AnswersLost,
    AnswersTorn,
    AgentKilled,
    AgentFrozen,
    ServerCrashed,
    SlotDropped,
    SegmentSwitched,
}

const TROUBLES: [Trouble; 12] = [
    Trouble::NarrowLine,
    Trouble::TinyLine,
    Trouble::CutLine,
    Trouble::StoreRefuses,
    Trouble::StoreHangs,
    Trouble::AnswersLost,
    Trouble::AnswersTorn,
    Trouble::AgentKilled,
    Trouble::AgentFrozen,
    Trouble::ServerCrashed,
    Trouble::SlotDropped,
    Trouble::SegmentSwitched,
];

struct Storm<'a> {
    host: Standalone,
    line: &'a Line,
    store: &'a S3Server,
}

impl Storm<'_> {
    fn befall(&mut self, trouble: Trouble, length: Duration) -> anyhow::Result<()> {
        let sleep = || std::thread::sleep(length);
        match trouble {
            Trouble::NarrowLine => self.on_line(|line| line.narrow(1000), length),
            Trouble::TinyLine => self.on_line(|line| line.narrow(100), length),
            Trouble::CutLine => self.on_line(Line::cut, length),
            Trouble::StoreRefuses => self.spoiled(&[Rule::new(Fault::Status(503))], length),
            Trouble::StoreHangs => self.spoiled(&[Rule::new(Fault::Hang).method("PUT").one_in(3)], length),
            Trouble::AnswersLost => self.spoiled(&[Rule::new(Fault::AnswerLost).method("PUT").one_in(2)], length),
            Trouble::AnswersTorn => self.spoiled(
                &[
                    Rule::new(Fault::TornAnswer(50)).method("GET").one_in(2),
                    Rule::new(Fault::TornRequest(200)).method("PUT").one_in(3),
                ],
                length,
            ),
            Trouble::AgentKilled => {
                self.host.agent.kill_nine()?;
                sleep();
                self.host.agent.start()
            }
            Trouble::AgentFrozen => {
                self.host.agent.freeze();
                sleep();
                self.host.agent.thaw();
                Ok(())
            }
            Trouble::ServerCrashed => {
                self.host.server.kill_nine()?;
                self.host.server.start()
            }
            Trouble::SlotDropped => {
                let session = self.host.server.session()?;
                wait_for("the slot to be dropped", Duration::from_secs(10), || {
                    session.rows("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'walfleet'")?;
                    let dropped = session.execute("SELECT pg_drop_replication_slot('walfleet')");
                    let gone = session
                        .is_true("SELECT NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = 'walfleet')")?;
                    Ok((dropped.is_ok() || gone).then_some(()))
                })
            }
            Trouble::SegmentSwitched => self.host.server.session()?.execute("SELECT pg_switch_wal()"),
        }
    }

    fn on_line(&self, harm: impl Fn(&Line) -> anyhow::Result<()>, length: Duration) -> anyhow::Result<()> {
        harm(self.line)?;
        std::thread::sleep(length);
        self.line.mend()
    }

    fn spoiled(&self, rules: &[Rule], length: Duration) -> anyhow::Result<()> {
        rules.iter().for_each(|rule| self.store.spoil(rule.clone()));
        std::thread::sleep(length);
        self.store.heal();
        Ok(())
    }
}

/// A server that streams, as `wal` says, to a store on another host.
fn set_up(
    scratch: &Scratch,
    line: &Line,
    store: &S3Server,
    settings: &[(&str, &str)],
    wal: Value,
) -> anyhow::Result<Standalone> {
    let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let namespace = Some(line.namespace().to_owned());
    let setup = Setup { settings, wal, streams_only: true, namespace, ..Setup::default() };
    Standalone::set_up(scratch, &PgVersion::newest()?, Place::s3(store), setup)
}

/// What the repository alone says can be recovered up to: position and moment.
fn reported(host: &Standalone) -> anyhow::Result<(String, SystemTime)> {
    let listed = host.agent.json(&["list", "--cluster", CLUSTER])?;
    let ranges = listed["recovery"][0]["ranges"].as_array().cloned().unwrap_or_default();
    let [range] = &ranges[..] else { anyhow::bail!("not one stretch: {listed:#}") };
    let lsn = range["to_lsn"].as_str().unwrap_or_default().to_owned();
    let session = host.server.session()?;
    let moment = range["to"].as_str().unwrap_or_default();
    let us = session.number(&format!("SELECT (extract(epoch FROM timestamptz '{moment}') * 1000000)::bigint"))?;
    Ok((lsn, SystemTime::UNIX_EPOCH + Duration::from_micros(us.unsigned_abs())))
}

/// What the storm left behind is judged by `judge`: what of the record is lost, and what was reported to be recoverable.
fn weather(wal: Value, synchronous: &str, judge: impl FnOnce(&Record, &Lost, SystemTime)) {
    in_scratch(|scratch| {
        let Some(line) = Line::lay()? else { return Ok(()) };
        // Everything fails here but the restore.
        scratch.allow_log("WARN");
        scratch.allow_log("ERROR");
        let number =
            |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
        let (seed, rounds) = (number("WALFLEET_STORM_SEED", 1), number("WALFLEET_STORM_ROUNDS", 1));
        let store = S3Server::start_at(&scratch.dir("s3")?, line.near())?;
        // The server gives up a silent agent while it is frozen. What a dropped slot kept must still be there: without that
        // there is a gap (`gaps`).
        let settings = [("wal_sender_timeout", "1500ms"), ("wal_keep_size", "4GB")];
        let host = set_up(scratch, &line, &store, &settings, wal)?;
        host.backup()?;
        host.server.reload_with("synchronous_standby_names", synchronous)?;
        let workload = Acknowledged::start(&host.server, 4, "SET synchronous_commit = on")?;
        let mut storm = Storm { host, line: &line, store: &store };
        let mut random = StdRng::seed_from_u64(seed);
        let mut befell: BTreeMap<String, u32> = BTreeMap::new();
        for _ in 0..rounds {
            let mut troubles = TROUBLES;
            troubles.shuffle(&mut random);
            for trouble in troubles {
                let length = Duration::from_millis(random.random_range(300..2500));
                eprintln!("{trouble:?} for {length:?}");
                storm.befall(trouble, length)?;
                std::thread::sleep(Duration::from_millis(random.random_range(0..1000)));
                *befell.entry(format!("{trouble:?}")).or_default() += 1;
            }
        }
        let mut host = storm.host;
        wait_for("the stream to have caught up", Duration::from_secs(60), || {
            let waits = host.server.session()?.is_true("SELECT NOT EXISTS (SELECT FROM pg_stat_replication WHERE application_name = 'walfleet' AND pg_current_wal_lsn() - flush_lsn < 16 * 1024 * 1024)")?;
            Ok((!waits).then_some(()))
        })?;
        std::thread::sleep(Duration::from_secs(4));
        let (lsn, moment) = reported(&host)?;
        let (record, lost) = host.destroy(workload)?;
        eprintln!("{lost:?} of {} after {befell:?}", record.commits());
        judge(&record, &lost, moment);
        let restored = host.restore("reported", &["--to-lsn", &lsn])?;
        host.recovered(&restored)?;
        Ok(())
    });
}

#[test]
fn whatever_befalls_line_store_agent_and_server_the_promise_holds_again() {
    weather(json!({ "streaming": "on" }), "", |record, lost, moment| {
        assert!(record.commits() > 200, "only {} commits", record.commits());
        assert!(lost.time <= A_SECOND_OR_SO, "{lost:?}");
        assert!(
            lost.since.is_none_or(|since| since > moment),
            "{lost:?}, but everything until {moment:?} was promised"
        );
    });
}

#[test]
fn whatever_befalls_them_no_commit_that_waited_for_the_repository_is_lost() {
    let wal = json!({ "streaming": "on", "synchronous": "repository" });
    weather(wal, "walfleet", |record, lost, _| {
        assert!(record.commits() > 50, "only {} commits", record.commits());
        assert_eq!(lost.commits, 0, "{lost:?}");
    });
}

/// Where the slot may stand at the farthest: up to there everything lies in the store, by the names of what lies there.
fn stored_until(objects: &Path, confirmed: Lsn) -> anyhow::Result<Lsn> {
    let size = SegmentSize::new(16 << 20)?;
    let segment = Segment { timeline: Timeline(1), number: confirmed.segment_number(size) };
    let (name, start) = (segment.file_name(size), segment.start(size));
    let (mut pieces, mut whole) = (Vec::new(), false);
    for (path, meta) in tree::all(objects)?.into_iter().filter(|(_, meta)| meta.is_file()) {
        let key = path.strip_prefix(objects)?.to_string_lossy().into_owned();
        anyhow::ensure!(meta.len() > 0, "{key} is empty");
        if key.contains("/wal/") && key.ends_with(&name) {
            whole = true;
        } else if key.contains("tails/") && key.contains(&name) {
            pieces.extend(layout::tail_name(&object_store::path::Path::from(key)));
        }
    }
    pieces.sort();
    let reached =
        pieces.iter().fold(0, |reached, piece| if piece.from <= reached { reached.max(piece.to) } else { reached });
    Ok(if whole { segment.end(size) } else { Lsn(start.0 + u64::from(reached)) })
}

#[test]
fn an_agent_killed_at_any_request_has_confirmed_nothing_that_is_not_there() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        let folder = scratch.dir("s3")?;
        let store = S3Server::start(&folder)?;
        // The slot follows every piece.
        let wal = json!({ "streaming": "on", "synchronous": "repository" });
        let mut host = Standalone::streaming(scratch, &PgVersion::newest()?, Place::s3(&store), wal)?;
        host.backup()?;
        let workload = Acknowledged::start(&host.server, 2, "SET synchronous_commit = on")?;
        let session = host.server.session()?;
        let mut moved = BTreeSet::new();
        for fault in [Fault::Hang, Fault::AnswerLost] {
            for request in 0..7 {
                let struck = store.strikes();
                store.spoil(Rule::new(fault).method("PUT").after(request).times(1));
                if request % 2 == 1 {
                    session.execute("SELECT pg_create_restore_point('x'); SELECT pg_switch_wal()")?;
                }
                wait_for("the fault to strike", Duration::from_secs(20), || {
                    Ok((store.strikes() > struck).then_some(()))
                })?;
                host.agent.kill_nine()?;
                store.heal();
                let confirmed: Lsn = session
                    .value("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'walfleet'")?
                    .parse()?;
                // An object that was being written when its request was dropped has another name.
                let stored = stored_until(&folder.join(BUCKET), confirmed)?;
                anyhow::ensure!(
                    confirmed <= stored,
                    "{fault:?} {request}: confirmed {confirmed}, and stored is {stored}"
                );
                moved.insert(confirmed);
                host.agent.start()?;
            }
        }
        anyhow::ensure!(moved.len() > 7, "the slot hardly moved: {moved:?}");
        host.server.reload_with("synchronous_standby_names", "walfleet")?;
        std::thread::sleep(Duration::from_secs(3));
        let (record, lost) = host.destroy(workload)?;
        assert_eq!(lost.commits, 0, "{lost:?} of {}", record.commits());
        Ok(())
    });
}

#[test]
fn a_request_that_is_never_answered_holds_commits_up_for_seconds() {
    in_scratch(|scratch| {
        let store = S3Server::start(&scratch.dir("s3")?)?;
        let wal = json!({ "streaming": "on", "synchronous": "repository" });
        let host = Standalone::streaming(scratch, &PgVersion::newest()?, Place::s3(&store), wal)?;
        host.backup()?;
        host.server.reload_with("synchronous_standby_names", "walfleet")?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE held (); INSERT INTO held DEFAULT VALUES")?;
        store.spoil(Rule::new(Fault::Hang).method("PUT").path_contains("tails/").times(1));
        let begun = Instant::now();
        session.execute("INSERT INTO held DEFAULT VALUES")?;
        let took = begun.elapsed();
        anyhow::ensure!(store.strikes() == 1, "nothing hung");
        anyhow::ensure!(took < Duration::from_secs(8), "the commit took {took:?}");
        Ok(())
    });
}

/// The primary dies, its standby is promoted, the old primary comes back as the new one's standby, and then the new
/// primary is destroyed too.
#[test]
fn a_failover_and_a_rewind_keep_one_archive_and_its_promise() {
    in_scratch(|scratch| {
        scratch.allow_log("WARN");
        let version = PgVersion::newest()?;
        let setup = Setup {
            settings: vec![("wal_log_hints".to_owned(), "on".to_owned())],
            wal: json!({ "streaming": "on" }),
            streams_only: true,
            ..Setup::default()
        };
        let mut host = Standalone::set_up(scratch, &version, Place::folder(scratch)?, setup)?;
        let mut standby = host.standby(&[])?;
        let mut second = host.second_agent(&standby, json!({ "streaming": "on" }))?;
        second.start()?;
        host.backup()?;
        let workload = Acknowledged::start(&host.server, 2, "SET synchronous_commit = on")?;
        std::thread::sleep(Duration::from_secs(2));
        let first_disaster = Instant::now();
        host.server.kill_nine()?;
        let before_failover = workload.end()?;
        standby.promote()?;
        standby.session()?.execute("ALTER TABLE acknowledged RENAME TO before_failover")?;
        let workload = Acknowledged::start(&standby, 2, "SET synchronous_commit = on")?;
        std::thread::sleep(Duration::from_secs(1));

        let mut rewind = version.command("pg_rewind");
        rewind.arg("--target-pgdata").arg(host.server.data_dir()).args(["--source-server", &standby.connection()]);
        run(rewind)?;
        let (port, socket_dir) = (host.server.port().to_string(), host.server.socket_dir().display().to_string());
        let conninfo = standby.connection();
        for (name, value) in
            [("port", &port), ("unix_socket_directories", &socket_dir), ("primary_conninfo", &conninfo)]
        {
            host.server.set_override(name, value);
        }
        os_user().write(&host.server.data_dir().join("standby.signal"), "")?;
        host.server.start()?;
        std::thread::sleep(Duration::from_secs(4));
        anyhow::ensure!(host.server.session()?.is_true("SELECT pg_is_in_recovery()")?, "it is no standby");

        let disaster = Instant::now();
        standby.kill_nine()?;
        second.kill_nine()?;
        host.tablespace = host.server.session()?.value("SELECT oid FROM pg_tablespace WHERE spcname = 'fast'")?;
        host.agent.kill_nine()?;
        let record = workload.end()?;
        let restored = host.restore("restored", &["--latest"])?;
        let server = host.recovered(&restored)?;
        let lost = record.lost(&server.session()?, disaster)?;
        assert!(record.commits() > 100, "only {} commits", record.commits());
        assert!(lost.time <= A_SECOND_OR_SO, "{lost:?} of {}", record.commits());
        let lost = before_failover.lost_in(&server.session()?, "before_failover", first_disaster)?;
        assert!(before_failover.commits() > 100 && lost.time <= A_SECOND_OR_SO, "before the failover: {lost:?}");
        let timeline = server.session()?.value("SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)")?;
        assert_eq!(timeline, "00000003", "the promotion's timeline, and the restore's own");
        Ok(())
    });
}
