//! What backups and restores may take of a host: they keep to it, and neither WAL nor an operator has to wait for them.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::Context;
use walfleet_integration_tests::fleet::standalone::{CLUSTER, archive_all};
use walfleet_integration_tests::fleet::{Agent, Fleet, Place, Standalone};
use walfleet_integration_tests::output::Output;
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::wait_for;

const CANCELLED_LIMIT: Duration = Duration::from_secs(20);

/// So many megabytes that do not compress.
fn fill(server: &PgServer, megabytes: u32) -> anyhow::Result<()> {
    let session = server.session()?;
    // Out of line and not compressed: a row of 64 KiB in its TOAST table.
    session.execute("CREATE TABLE noise (bytes bytea)")?;
    session.execute("ALTER TABLE noise ALTER bytes SET STORAGE EXTERNAL")?;
    session.execute(&format!(
        "INSERT INTO noise SELECT (SELECT string_agg(sha256(random()::text::bytea), '') FROM generate_series(1, 2048)
         WHERE row > 0) FROM generate_series(1, {megabytes} * 16) row"
    ))
}

/// The nice values of the daemon's threads, by name.
fn priorities(agent: &Agent) -> anyhow::Result<BTreeMap<String, i32>> {
    let pid = agent.pid().context("the agent does not run")?;
    let mut found = BTreeMap::new();
    for thread in fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()))? {
        // Threads come and go.
        let Ok(stat) = fs::read_to_string(thread?.path().join("stat")) else { continue };
        let (name, fields) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") ")).context(stat.clone())?;
        // Field 19 of proc_pid_stat(5); these begin with the third.
        let nice = fields.split(' ').nth(16).and_then(|nice| nice.parse().ok()).context(stat.clone())?;
        found.insert(name.to_owned(), nice);
    }
    Ok(found)
}

/// The policy that binds every cluster, with these limits.
fn limit(fleet: &Fleet, limits: &str) -> anyhow::Result<()> {
    let policy = format!(
        "apiVersion: walfleet/v1\nkind: Policy\nname: everything\nspec:\n  selector: \"\"\n  repository: main\n  \
         backup: {{ fast_checkpoint: true, processes: 2 }}\n  limits: {limits}\n"
    );
    fleet.apply(&policy)
}

#[test]
fn a_policys_limits_hold_and_change_under_way_while_wal_goes_through() {
    in_scratch(|scratch| {
        let fleet = Fleet::start(scratch)?;
        let host = fleet.protected(&PgVersion::newest()?)?;
        let normal = priorities(&host.agent)?.get("walfleet-agent").copied().context("no main thread")?;
        let limited = |agent: &Agent, text: &str| {
            let text = text.to_owned();
            wait_for("the agent to hear of its limits", Duration::from_secs(60), || {
                Ok(agent.log_text().contains(&text).then_some(()))
            })
        };
        // Hours, for all that a cluster has.
        limit(&fleet, "{ read: 100kB/s, upload: 100kB/s }")?;
        limited(&host.agent, "100000")?;
        let start = || -> anyhow::Result<String> {
            let job = fleet.admin.json(&["backup", "start", CLUSTER])?;
            let id = job["id"].as_str().unwrap_or_default().to_owned();
            wait_for("a backup to read", Duration::from_secs(60), || {
                // Each names itself when it begins, in any order.
                let threads = priorities(&host.agent)?;
                Ok(["backup-read-0", "backup-read-1"].iter().all(|name| threads.contains_key(*name)).then_some(()))
            })?;
            Ok(id)
        };
        let job = start()?;
        let threads = priorities(&host.agent)?;
        assert_eq!((threads["backup-read-0"], threads["bulk"]), (15, 15), "{threads:?}");
        assert_eq!((threads["walfleet-agent"], threads["tokio-rt-worker"]), (normal, normal), "{threads:?}");
        for _ in 0..2 {
            archive_all(&host.server)?;
        }
        let state = |job: &str| -> anyhow::Result<String> {
            let shown = fleet.admin.json(&["job", "show", job])?;
            Ok(shown["state"].as_str().unwrap_or_default().to_owned())
        };
        assert_eq!(state(&job)?, "running");
        let cancelled = Instant::now();
        fleet.admin.run(&["job", "cancel", &job])?.ok()?;
        wait_for("the job to be cancelled", CANCELLED_LIMIT, || Ok((state(&job)? == "cancelled").then_some(())))?;
        assert!(cancelled.elapsed() < CANCELLED_LIMIT);

        let job = start()?;
        limit(&fleet, "{}")?;
        fleet.admin.run(&["job", "watch", &job, "--timeout", "60s"])?.ok()?;
        assert_eq!(state(&job)?, "succeeded");
        Ok(())
    });
}

#[test]
fn what_is_sent_fetched_and_restored_takes_as_long_as_the_hosts_limits_say() {
    in_scratch(|scratch| {
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        fill(&host.server, 12)?;
        let config = host.agent.config().display().to_string();
        let timed = |words: &[&str], limit: (&str, &str)| -> anyhow::Result<(serde_json::Value, f64)> {
            let mut command = host.agent.command(&[words, &["--config", &config, "-o", "json"]].concat());
            command.env(limit.0, limit.1);
            let began = Instant::now();
            let report = Output::of(command, Duration::from_secs(180))?.ok()?.json()?;
            Ok((report, began.elapsed().as_secs_f64()))
        };
        let words = ["backup", "--cluster", CLUSTER, "--fast"];
        let (report, took) = timed(&words, ("WALFLEET_AGENT__LIMITS__UPLOAD", "4MB/s"))?;
        let stored = report["stored_bytes"].as_f64().context("stored_bytes")?;
        assert!(stored > 12e6, "{report}");
        // Its last pack, of metadata, begins when what came before is paid for.
        assert!(took > 0.8 * stored / 4e6, "{stored} bytes in {took} s");

        let data_dir = scratch.join("restored").display().to_string();
        let moved = format!("{}={data_dir}.fast", host.tablespace);
        let words = ["restore", "--cluster", CLUSTER, "--data-dir", &data_dir, "--tablespace", &moved, "--latest"];
        let (report, took) = timed(&words, ("WALFLEET_AGENT__LIMITS__WRITE", "20MB/s"))?;
        let written = report["cluster_bytes"].as_f64().context("cluster_bytes")?;
        assert!(took > 0.6 * written / 20e6, "{written} bytes in {took} s");

        let words = [&words[..], &["--delta"]].concat();
        std::fs::remove_dir_all(&data_dir)?;
        std::fs::remove_dir_all(format!("{data_dir}.fast"))?;
        let (report, took) = timed(&words, ("WALFLEET_AGENT__LIMITS__DOWNLOAD", "4MB/s"))?;
        let fetched = report["fetched_bytes"].as_f64().context("fetched_bytes")?;
        // What the first request brings is owed only when the next one comes.
        assert!(fetched > 12e6 && took > 0.4 * fetched / 4e6, "{fetched} bytes in {took} s");
        let (report, took) = timed(&words, ("WALFLEET_AGENT__LIMITS__READ", "20MB/s"))?;
        assert!(took > 0.6 * written / 20e6, "{written} bytes compared in {took} s: {report}");
        Ok(())
    });
}
