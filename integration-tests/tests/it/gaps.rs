//! WAL that is lost to the archive: it is never claimed, it is told, a backup is taken behind it, and somebody may know of it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::{CLUSTER, streamed_all};
use walfleet_integration_tests::fleet::{Agent, Fleet, Place, Standalone};
use walfleet_integration_tests::output::Output;
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;
use walfleet_repository::postgres::Lsn;

/// While something is missing agents look at repositories every half minute, and a job waits for its turn.
pub const SEEN: Duration = Duration::from_secs(120);

/// The documented exit codes (docs: the command line).
const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 4;
pub const NOT_RECOVERABLE: i32 = 7;

/// Writes so many segments of 16 MB, each ended by a switch.
pub fn write_segments(server: &PgServer, count: usize) -> anyhow::Result<()> {
    let session = server.session()?;
    for _ in 0..count {
        session.execute(
            "SELECT pg_logical_emit_message(false, 'fill', repeat('x', 1000000)) FROM generate_series(1, 15)",
        )?;
        session.execute("SELECT pg_switch_wal()")?;
    }
    Ok(())
}

pub fn mark(server: &PgServer, what: &str) -> anyhow::Result<()> {
    let session = server.session()?;
    session.execute("CREATE TABLE IF NOT EXISTS mark (what text)")?;
    session.execute(&format!("INSERT INTO mark VALUES ('{what}')"))
}

pub fn marks(server: &PgServer) -> anyhow::Result<Vec<String>> {
    server.session()?.column("SELECT what FROM mark ORDER BY what")
}

pub fn lsn(value: &Value) -> Lsn {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no LSN in {value}"))
}

/// A fleet with one host whose server only streams, with a backup of it. `policy`: what its spec says beside the usual.
pub fn streaming_fleet(scratch: &Scratch, server: &PgServer, policy: Value) -> anyhow::Result<(Fleet, Agent)> {
    let fleet = Fleet::start(scratch)?;
    let mut agent = fleet.agent("db1").instance(CLUSTER, server).postgres(server.version()).build()?;
    // Known to the agent a moment before the keeper has made it.
    scratch.allow_log("holds no repository");
    fleet.join(&mut agent, &["restores=yes"])?;
    Place::folder(scratch)?;
    apply(scratch, &fleet, policy)?;
    fleet.wait_for_cluster(CLUSTER, "bound", |cluster| cluster["policy"].is_string())?;
    wait_for("the stream", SEEN, || {
        let session = server.session()?;
        Ok(session
            .is_true("SELECT count(*) = 1 FROM pg_stat_replication WHERE application_name = 'walfleet'")?
            .then_some(()))
    })?;
    fleet.backup(CLUSTER)?;
    Ok((fleet, agent))
}

/// The folder that [`Place::folder`] made.
fn place(scratch: &Scratch) -> Place {
    let url = format!("file://{}", scratch.join("repository").display());
    Place { url, options: BTreeMap::new(), credentials: Vec::new() }
}

pub fn apply(scratch: &Scratch, fleet: &Fleet, policy: Value) -> anyhow::Result<()> {
    let place = place(scratch);
    let repository = json!({
        "apiVersion": "walfleet/v1", "kind": "Repository", "name": "main", "spec": { "url": place.url },
    });
    let mut spec = json!({
        "selector": "", "repository": "main", "backup": { "fast_checkpoint": true },
        "restore": { "hosts": "restores=yes" },
    });
    if let (Some(spec), Value::Object(more)) = (spec.as_object_mut(), policy) {
        spec.extend(more);
    }
    let policy = json!({ "apiVersion": "walfleet/v1", "kind": "Policy", "name": "everything", "spec": spec });
    fleet.apply(&format!("{repository}\n---\n{policy}\n"))
}

pub fn restored(
    scratch: &Scratch,
    fleet: &Fleet,
    version: &PgVersion,
    name: &str,
    target: &[&str],
) -> anyhow::Result<PgServer> {
    let data_dir = scratch.join(name);
    let text = data_dir.display().to_string();
    let words = [&["restore", "start", CLUSTER, "--on", "db1", "--data-dir", &text, "--wait"], target].concat();
    let job = fleet.admin.json(&words)?;
    anyhow::ensure!(job["state"] == "succeeded", "{job}");
    let mut server = PgServer::builder(scratch, &format!("{name}-server"), version).open(&data_dir)?;
    server.start()?;
    server.wait_until_writable()?;
    Ok(server)
}

#[test]
fn a_slot_that_the_server_lost_becomes_a_gap_and_a_backup_and_is_acknowledged() {
    in_scratch(|scratch| {
        let version = PgVersion::newest()?;
        let server = PgServer::builder(scratch, "primary", &version)
            .setting("max_slot_wal_keep_size", "32MB")
            .setting("min_wal_size", "32MB")
            .setting("max_wal_size", "64MB")
            .create()?;
        let (fleet, mut agent) = streaming_fleet(scratch, &server, json!({}))?;
        mark(&server, "before")?;
        let before = server.session()?.value("SELECT pg_current_wal_insert_lsn()")?;
        // The record at a target is replayed, too.
        server.session()?.execute("SELECT pg_create_restore_point('before')")?;
        streamed_all(&server)?;
        agent.stop()?;
        mark(&server, "lost in between")?;
        write_segments(&server, 10)?;
        let session = server.session()?;
        wait_for("the slot to be lost", SEEN, || {
            session.execute("CHECKPOINT")?;
            Ok(session.is_true("SELECT wal_status = 'lost' FROM pg_replication_slots")?.then_some(()))
        })?;
        scratch.allow_log("it is made anew");
        scratch.allow_log("WAL is missing in the repository");
        agent.start()?;
        mark(&server, "later")?;

        // It is told, with who lost it and why, and a backup is taken without being asked for.
        let seen = fleet.wait_for_cluster(CLUSTER, "the gap", |cluster| {
            cluster["recovery"][0]["gaps"][0]["recorded"]["by"] == "db1"
        })?;
        let gap = &seen["recovery"][0]["gaps"][0];
        let (from, to) = (lsn(&gap["from_lsn"]), lsn(&gap["to_lsn"]));
        anyhow::ensure!(from < to && gap["acknowledged"] == false && gap["from"].is_string(), "{gap}");
        let reason = gap["recorded"]["reason"].as_str().unwrap_or_default();
        anyhow::ensure!(reason.contains("the server let go of the WAL that replication slot walfleet kept"), "{gap}");
        anyhow::ensure!(seen["state"] == "at_risk" || seen["state"] == "unknown", "{seen}");
        let ranges = |cluster: &Value| cluster["recovery"][0]["ranges"].as_array().map_or(0, Vec::len);
        let seen = wait_for("a backup behind the gap", SEEN, || {
            let cluster = fleet.cluster(CLUSTER)?;
            Ok((ranges(&cluster) == 2).then_some(cluster))
        })?;
        let jobs = fleet.admin.json(&["job", "list", "--cluster", CLUSTER])?;
        let ours = |job: &&Value| job["requested_by"] == "gap";
        let made = jobs["jobs"].as_array().into_iter().flatten().filter(ours).count();
        anyhow::ensure!(made == 1, "{jobs}");

        // The windows end at the gap and begin behind it, both restore, and nothing in it does.
        let windows = &seen["recovery"][0]["ranges"];
        let (end, start) = (lsn(&windows[0]["to_lsn"]), lsn(&windows[1]["from_lsn"]));
        anyhow::ensure!(end <= from && to <= start, "{windows}, and {from} to {to} is missing");
        let earlier = restored(scratch, &fleet, &version, "earlier", &["--to-lsn", &before])?;
        anyhow::ensure!(marks(&earlier)? == ["before"], "{:?}", marks(&earlier)?);
        let latest = restored(scratch, &fleet, &version, "latest", &["--latest"])?;
        anyhow::ensure!(marks(&latest)? == marks(&server)?, "{:?}", marks(&latest)?);
        let inside = Lsn(from.0 / 2 + to.0 / 2).to_string();
        scratch.allow_log("lies where WAL is missing");
        let nowhere = scratch.join("nowhere").display().to_string();
        let plan = ["restore", "plan", CLUSTER, "--on", "db1", "--data-dir", &nowhere, "--to-lsn", &inside];
        anyhow::ensure!(fleet.admin.run(&plan)?.code == NOT_RECOVERABLE);

        acknowledge(scratch, &fleet, &agent, (from, to))
    });
}

/// By an operator, with a reason; the alarm ends, and everything that shows the gap shows that, the repository alone too.
fn acknowledge(scratch: &Scratch, fleet: &Fleet, agent: &Agent, (from, to): (Lsn, Lsn)) -> anyhow::Result<()> {
    const REASON: &str = "the agent was away for an afternoon";
    let (from, to) = (from.to_string(), to.to_string());
    let words_to = |from: &str, to: &str| {
        ["wal", "gaps", CLUSTER, "acknowledge", "--from", from, "--to", to, "--reason", REASON]
            .map(str::to_owned)
            .to_vec()
    };
    let words = |from: &str| words_to(from, &to);
    let run = |operator: &walfleet_integration_tests::fleet::Ctl, words: Vec<String>| {
        operator.run(&words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let viewer = fleet.operator("looks", "viewer")?;
    anyhow::ensure!(run(&viewer, words(&from))?.code == REFUSED);
    anyhow::ensure!(run(&fleet.admin, words("0/1"))?.code == NOT_FOUND);
    let operator = fleet.operator("anna", "operator")?;
    let grown = run(&operator, words_to(&from, &from))?;
    anyhow::ensure!(grown.code == 4 && grown.stderr.contains(&format!("--to {to}")), "{grown:?}");
    run(&operator, words(&from))?.ok()?;
    let seen = fleet.wait_for_cluster(CLUSTER, "protected", |cluster| cluster["state"] == "protected")?;
    let gap = &seen["recovery"][0]["gaps"][0];
    anyhow::ensure!(gap["acknowledgement"]["by"] == "anna" && gap["acknowledgement"]["reason"] == REASON, "{gap}");
    let shown = fleet.admin.run(&["wal", "gaps", CLUSTER])?.ok()?.stdout;
    anyhow::ensure!(shown.contains(REASON), "{shown}");
    let audit = fleet.admin.json(&["audit", "list"])?.to_string();
    anyhow::ensure!(audit.contains("Wal.AcknowledgeGap"), "{audit}");

    let key = fleet.controller.recovery_key();
    let mut list = vec!["list".to_owned()];
    list.extend(place(scratch).flags(&key));
    list.extend(["--cluster", CLUSTER, "-o", "json"].map(str::to_owned));
    let list: Vec<&str> = list.iter().map(String::as_str).collect();
    let alone = Output::of(agent.command(&list), SEEN)?.ok()?.json()?;
    anyhow::ensure!(alone["recovery"][0]["gaps"][0]["acknowledgement"]["reason"] == REASON, "{alone}");
    Ok(())
}

#[test]
fn the_server_goes_before_the_archive_where_the_policy_says_so() {
    in_scratch(|scratch| {
        // A store that answers nothing, for as long as it takes.
        scratch.allow_log("WAL is not stored, and tried again");
        scratch.allow_log("WAL is not streamed");
        scratch.allow_log("is let go of, as the policy says");
        scratch.allow_log("it is made anew");
        scratch.allow_log("WAL is missing in the repository");
        let s3 = S3Server::start(&scratch.join("s3"))?;
        let version = PgVersion::newest()?;
        let settings = [("min_wal_size", "32MB"), ("max_wal_size", "64MB")];
        let setup = walfleet_integration_tests::fleet::standalone::Setup {
            wal: json!({ "streaming": "on", "let_go_at": "64MiB" }),
            streams_only: true,
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            ..Default::default()
        };
        let mut host = Standalone::set_up(scratch, &version, Place::s3(&s3), setup)?;
        host.backup()?;
        mark(&host.server, "before")?;
        host.streamed_all()?;

        // While the store takes WAL, no backlog is a reason.
        write_segments(&host.server, 8)?;
        host.streamed_all()?;
        let slots = |wanted: i64| {
            let session = host.server.session()?;
            Ok((session.number("SELECT count(*) FROM pg_replication_slots")? == wanted).then_some(()))
        };
        wait_for("the slot to be kept", Duration::from_secs(1), || slots(1))?;

        s3.spoil(Rule::new(Fault::Status(503)));
        write_segments(&host.server, 10)?;
        wait_for("the slot to be let go of", SEEN, || slots(0))?;
        let session = host.server.session()?;
        wait_for("the space to be free", SEEN, || {
            let size = session.number("SELECT sum(size)::bigint FROM pg_ls_waldir()")?;
            Ok((size <= 8 * (16 << 20)).then_some(()))
        })?;
        mark(&host.server, "lost")?;
        // What was decided outlives the agent: no slot fills the disk again as long as the store is away.
        host.agent.kill_nine()?;
        host.agent.start()?;
        std::thread::sleep(Duration::from_secs(5));
        wait_for("no slot", Duration::from_secs(1), || slots(0))?;
        write_segments(&host.server, 4)?;
        session.execute("CHECKPOINT; CHECKPOINT")?;

        s3.heal();
        wait_for("the slot", SEEN, || slots(1))?;
        host.streamed_all()?;
        let listed = wait_for("the gap to be recorded", SEEN, || {
            let listed = host.agent.json(&["list", "--cluster", CLUSTER])?;
            Ok(listed["recovery"][0]["gaps"][0]["recorded"].is_object().then_some(listed))
        })?;
        let gap = &listed["recovery"][0]["gaps"][0];
        let reason = gap["recorded"]["reason"].as_str().unwrap_or_default();
        anyhow::ensure!(reason.contains("let_go_at: 64MiB"), "{gap}");
        anyhow::ensure!(!host.agent.state_dir().join("breaks").join(CLUSTER).exists(), "the repository tells it now");
        mark(&host.server, "later")?;
        host.backup()?;
        host.streamed_all()?;
        let listed = host.agent.json(&["list", "--cluster", CLUSTER])?;
        let ranges = &listed["recovery"][0]["ranges"];
        anyhow::ensure!(lsn(&ranges[0]["to_lsn"]) <= lsn(&gap["from_lsn"]), "{listed}");
        anyhow::ensure!(lsn(&gap["to_lsn"]) <= lsn(&ranges[1]["from_lsn"]), "{listed}");
        let latest = host.restore("latest", &["--latest"])?;
        let latest = host.recovered(&latest)?;
        anyhow::ensure!(marks(&latest)? == marks(&host.server)?, "{:?}", marks(&latest)?);
        Ok(())
    });
}

#[test]
fn silence_is_an_alarm_and_idleness_is_not() {
    in_scratch(|scratch| {
        const RPO: Duration = Duration::from_secs(5);
        let version = PgVersion::newest()?;
        // PostgreSQL believes that its WAL is archived.
        let server = PgServer::builder(scratch, "primary", &version)
            .setting("archive_mode", "on")
            .setting("archive_command", "true")
            .create()?;
        let policy = |streaming: &str| json!({ "objectives": { "rpo": "5s" }, "wal": { "streaming": streaming } });
        let (fleet, mut agent) = streaming_fleet(scratch, &server, policy("on"))?;
        mark(&server, "before")?;
        streamed_all(&server)?;
        // Its archive_command is not ours, which is worth a word; what is asked here is whether its WAL arrives.
        let trails = |cluster: &Value| cluster["reason"].as_str().unwrap_or_default().contains("trails");
        let known = |cluster: &Value| cluster["recovery"][0]["lag_seconds"].as_f64() == Some(0.0);
        fleet.wait_for_cluster(CLUSTER, "all stored", |cluster| known(cluster) && !trails(cluster))?;
        for _ in 0..15 {
            let idle = fleet.cluster(CLUSTER)?;
            anyhow::ensure!(!trails(&idle) && known(&idle), "{idle}");
            std::thread::sleep(Duration::from_secs(1));
        }

        // Nothing arrives any more, and nobody complains: only the server's position tells.
        apply(scratch, &fleet, policy("off"))?;
        wait_for("the stream to end", SEEN, || {
            let session = server.session()?;
            Ok(session.is_true("SELECT count(*) = 0 FROM pg_stat_replication")?.then_some(()))
        })?;
        mark(&server, "nobody stores it")?;
        let begun = std::time::Instant::now();
        fleet.wait_for_cluster(CLUSTER, "an alarm", |cluster| trails(cluster) && cluster["state"] == "at_risk")?;
        // Servers are looked at every ten seconds.
        let late = begun.elapsed();
        anyhow::ensure!(late < RPO + Duration::from_secs(15), "it took {late:?}");

        apply(scratch, &fleet, policy("on"))?;
        fleet.wait_for_cluster(CLUSTER, "all stored again", |cluster| known(cluster) && !trails(cluster))?;
        agent.kill_nine()?;
        let begun = std::time::Instant::now();
        fleet.wait_for_cluster(CLUSTER, "an alarm", |cluster| cluster["state"] == "unknown")?;
        let late = begun.elapsed();
        anyhow::ensure!(late < RPO + Duration::from_secs(5), "it took {late:?}");
        Ok(())
    });
}
