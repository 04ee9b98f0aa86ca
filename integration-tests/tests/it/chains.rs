//! Backups that read only what changed: whatever a server did since the parent, each one restores to the very files that
//! the server has, byte for byte.
//!
//! Chance chooses what is done, from a seed that is printed: `WALFLEET_SEED=7` repeats a run, `WALFLEET_ROUNDS=20`
//! makes the chains longer.

mod cases;
mod changes;
mod files;

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use walfleet_integration_tests::fleet::standalone::{CLUSTER, Restored};
use walfleet_integration_tests::fleet::{Agent, Place, Standalone};
use walfleet_integration_tests::output::Output;
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::{PgServer, PgVersion, judge};
use walfleet_integration_tests::scratch::in_scratch;

use changes::Writer;
use files::must_be_the_same;

#[test]
fn postgresql_13_restores_from_every_link_of_a_chain() {
    chain(13, &[]);
}

/// Without checksums hint bits are not in the WAL; and here both strategies of CREATE DATABASE are at hand.
#[test]
fn postgresql_15_restores_from_every_link_of_a_chain() {
    chain(15, &["--no-data-checksums", "--wal-segsize=1"]);
}

#[test]
fn postgresql_18_restores_from_every_link_of_a_chain() {
    chain(18, &["--wal-segsize=4"]);
}

/// What happens between two backups.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Round {
    Busy,
    Nothing,
    Crash,
    Restart,
}

impl Round {
    /// Quiet rounds come often enough that chains of spared files form.
    fn of(number: u32) -> Round {
        match number % 8 {
            2 => Round::Nothing,
            4 => Round::Crash,
            6 => Round::Restart,
            _ => Round::Busy,
        }
    }
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn chain(major: u32, initdb: &[&str]) {
    let seed = from_environment("WALFLEET_SEED").unwrap_or_else(rand::random);
    let rounds = from_environment("WALFLEET_ROUNDS").unwrap_or(20) as u32;
    eprintln!("WALFLEET_SEED={seed} WALFLEET_ROUNDS={rounds} on PostgreSQL {major}");
    in_scratch(|scratch| {
        let host = Standalone::start_with(scratch, &PgVersion::of(major)?, Place::folder(scratch)?, initdb)?;
        let mut links = Links { writer: Writer::new(host, StdRng::seed_from_u64(seed))?, kept: None, last: None };
        for number in 0..rounds {
            let round = Round::of(number);
            links
                .round(number, round)
                .map_err(|error| error.context(format!("seed {seed}, round {number} ({round:?})")))?;
        }
        links.end()
    });
}

struct Links {
    writer: Writer,
    /// An early link, and what was restored of it.
    kept: Option<(String, Restored)>,
    last: Option<Restored>,
}

impl Links {
    fn round(&mut self, number: u32, round: Round) -> anyhow::Result<()> {
        match round {
            Round::Busy => {
                for _ in 0..self.writer.rng.random_range(1..=6) {
                    let done = self.writer.change()?;
                    eprintln!("round {number}: {done}");
                }
            }
            Round::Nothing => {}
            Round::Crash => self.writer.crash()?,
            Round::Restart => self.writer.host.server.restart()?,
        }
        // Now and then all is read, and held against what the parent and the WAL say.
        let proof: &[&str] = if round == Round::Busy && number % 3 == 1 { &["--read-all"] } else { &[] };
        let host = &self.writer.host;
        let (report, reason) = taken(&host.agent, proof)?;
        anyhow::ensure!(reason.is_none(), "the changes are not known: {reason:?}");
        anyhow::ensure!(report["unexplained_slots"] == 0, "content changed past the WAL: {report}");
        let bytes = |name: &str| report[name].as_u64().unwrap_or_default();
        let (read, all) = (bytes("read_bytes"), bytes("cluster_bytes"));
        eprintln!("round {number}: {round:?}, read {read} of {all} bytes, stored {}", bytes("stored_bytes"));
        anyhow::ensure!(report["damaged_pages"] == 0, "pages are found damaged: {report}");
        // What is always read: free space and visibility maps, and what is no relation.
        anyhow::ensure!(number == 0 || round == Round::Busy || read < all / 4, "little is spared: {report}");
        let id = report["id"].as_str().unwrap_or_default().to_owned();
        let restored = host.restore(&format!("restored-{number}"), &["--latest", "--backup", &id])?;
        must_equal_the_source(&host.server, &report, &restored, true)?;
        match self.last.replace(restored) {
            Some(link) if self.kept.is_none() && number > 1 => self.kept = Some((previous_of(&report)?, link)),
            Some(link) => remove(&link)?,
            None => {}
        }
        Ok(())
    }

    fn end(self) -> anyhow::Result<()> {
        let Links { writer: Writer { host, .. }, kept, last } = self;
        let expected = Fingerprint::take(&host.server.session()?)?;
        host.archive_all()?;
        let last = last.expect("there was a round");
        judge::verify_backup(host.server.version(), &last.data_dir)?;
        let server = host.recovered(&last)?;
        Fingerprint::take(&server.session()?)?.must_equal(&expected)?;
        judge::check_relations(&server)?;
        drop(server);
        let mut words = vec!["verify".to_owned()];
        words.extend(host.place.flags(&host.key_file));
        words.extend(["--cluster", CLUSTER, "--deep"].map(str::to_owned));
        host.run(&words)?.ok()?;
        let Some((id, link)) = kept else { return Ok(()) };
        let again = host.restore("again", &["--latest", "--backup", &id])?;
        files::all_must_be_equal(&link.data_dir, &again.data_dir)?;
        let server = host.recovered(&again)?;
        Fingerprint::take(&server.session()?)?.must_equal(&expected)
    }
}

/// Takes a backup; its report, and what the log says if everything was read for want of proof.
fn taken(agent: &Agent, options: &[&str]) -> anyhow::Result<(Value, Option<String>)> {
    let mut backup = agent.command(&["backup", "--cluster", CLUSTER, "--fast", "-o", "json"]);
    backup.args(options).arg("--config").arg(agent.config()).env("WALFLEET_LOG", "walfleet_agent=info");
    let output = Output::of(backup, Duration::from_secs(60))?.ok()?;
    let is_known = output.stderr.contains("only what changed is read") || output.json()?["parents"] == json!([]);
    let line = output.stderr.lines().find(|line| line.contains("everything is read"));
    anyhow::ensure!(is_known != line.is_some(), "the log does not say what is read:\n{}", output.stderr);
    Ok((output.json()?, line.map(str::to_owned)))
}

/// The server is idle since the backup's own checkpoint: its files on disk are what was backed up.
/// Hint bits count if `hints` says so and checksums put them into the WAL.
fn must_equal_the_source(server: &PgServer, report: &Value, restored: &Restored, hints: bool) -> anyhow::Result<()> {
    let start = report["start_lsn"].as_str().unwrap_or_default().parse()?;
    let hints = hints && server.session()?.value("SHOW data_checksums")? == "on";
    must_be_the_same(server.data_dir(), &restored.data_dir, start, hints)
}

fn previous_of(report: &Value) -> anyhow::Result<String> {
    let parent = report["parents"][0].as_str().map(str::to_owned);
    parent.ok_or_else(|| anyhow::anyhow!("the backup has no parent: {report}"))
}

fn remove(restored: &Restored) -> anyhow::Result<()> {
    std::fs::remove_dir_all(&restored.data_dir)?;
    Ok(std::fs::remove_dir_all(format!("{}.fast", restored.data_dir.display()))?)
}
