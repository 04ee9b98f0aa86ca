//! The demo's story: a fleet of two hosts, a disaster, and the second before it back on the other host.
//!
//! It runs on the tests' harness, so whatever it shows is what the tests prove.

mod narrator;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::fleet::standalone::CLUSTER;
use crate::fleet::{Agent, Fleet, Place};
use crate::os_user::{OsUser, os_user};
use crate::ports::free_port;
use crate::postgres::barrier::{Barrier, Barriers, OwnRow};
use crate::postgres::dataset::Dataset;
use crate::postgres::load::{Load, must_balance, transactions};
use crate::postgres::{PgServer, PgVersion, Session, judge};
use crate::scratch::Scratch;
use narrator::Narrator;

/// pgbench's scale: 500,000 accounts, about 100 MB with their indexes.
const SCALE: u32 = 5;
const CLIENTS: u32 = 4;
const TRANSACTIONS_PER_SECOND: u32 = 400;
const RESTORE_HOST: &str = "lab1";

pub fn run(keep: bool) -> ExitCode {
    let scratch = match Scratch::new() {
        Ok(scratch) => scratch,
        Err(error) => {
            eprintln!("demo: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let narrator = Narrator::begin(&scratch);
    match tell(&scratch, &narrator) {
        Ok(stage) => {
            narrator.verdict(Ok(()));
            if keep {
                stage.leave_running(&scratch);
            } else {
                drop(stage);
                scratch.forgive_logs();
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            narrator.verdict(Err(&error));
            scratch.show_logs();
            scratch.forgive_logs();
            ExitCode::FAILURE
        }
    }
}

/// Everything that runs in the end, so that it can be left running.
struct Stage {
    load: Load,
    agents: Vec<Agent>,
    fleet: Fleet,
    servers: Vec<PgServer>,
    restored: PathBuf,
    restored_connection: String,
    psql: PathBuf,
}

fn tell(scratch: &Scratch, say: &Narrator) -> anyhow::Result<Stage> {
    let version = PgVersion::newest()?;
    let scene = set_the_scene(scratch, say, &version)?;
    let mut load = protect(scratch, say, &scene)?;
    let truth = lose(say, &scene)?;
    anyhow::ensure!(load.is_running()?, "the load ended early");
    let copy = recover(scratch, say, &scene, &truth)?;
    let Scene { orders, lab, db1, lab1, fleet, .. } = scene;
    Ok(Stage {
        load,
        agents: vec![db1, lab1],
        fleet,
        restored: copy.data_dir().to_owned(),
        restored_connection: copy.connection(),
        servers: vec![orders, lab, copy],
        psql: version.bin().join("psql"),
    })
}

struct Scene {
    dataset: Dataset,
    /// The one that is protected.
    orders: PgServer,
    /// Another cluster's, on the host that restores.
    lab: PgServer,
    fleet: Fleet,
    db1: Agent,
    lab1: Agent,
}

fn set_the_scene(scratch: &Scratch, say: &Narrator, version: &PgVersion) -> anyhow::Result<Scene> {
    let what = format!("start two {version} servers: \"orders\" on host db1, another on {RESTORE_HOST}");
    let (orders, lab) = say.step(&what, || {
        let orders = PgServer::builder(scratch, "orders", version)
            .setting("archive_mode", "on")
            .setting("archive_command", "false")
            // Every second is in the repository five seconds later, busy or not.
            .setting("archive_timeout", "5s")
            .create()?;
        Ok((orders, PgServer::builder(scratch, "lab", version).create()?))
    })?;
    let dataset = Dataset { scale: SCALE };
    let what = format!("fill orders with {} accounts, documents, indexes", SCALE * 100_000);
    say.step(&what, || dataset.create(&orders))?;
    let what = "make and start a controller: certificate authority, first admin, recovery key";
    let fleet = say.step(what, || Fleet::start(scratch))?;
    let (db1, lab1) = say.step("join both hosts with single-use tokens and start their agents", || {
        let mut db1 = fleet.agent("db1").instance(CLUSTER, &orders).postgres(version).build()?;
        let mut lab1 = fleet.agent(RESTORE_HOST).postgres(version).build()?;
        fleet.join(&mut db1, &[])?;
        fleet.join(&mut lab1, &["restores=yes"])?;
        Ok((db1, lab1))
    })?;
    Ok(Scene { dataset, orders, lab, fleet, db1, lab1 })
}

/// A policy, a load, two backups.
fn protect(scratch: &Scratch, say: &Narrator, scene: &Scene) -> anyhow::Result<Load> {
    let Scene { dataset, orders, fleet, db1, .. } = scene;
    let place = Place::folder(scratch)?;
    say.step("apply a policy: every cluster, encrypted, into a repository in a folder", || {
        fleet.protect(&place)?;
        fleet.wait_for_cluster(CLUSTER, "bound to its repository", |cluster| cluster["policy"].is_string())?;
        fleet.wait_until_bound(db1, orders)?;
        db1.archive_for(orders)
    })?;
    let what = format!("start a load of {TRANSACTIONS_PER_SECOND} writing transactions a second");
    let load = say.step(&what, || Load::start(scratch, orders, dataset, CLIENTS, Some(TRANSACTIONS_PER_SECOND)))?;
    say.walfleet(fleet, "take a backup under load", &["backup", "start", CLUSTER, "--wait"])?;
    std::thread::sleep(Duration::from_secs(2));
    say.walfleet(fleet, "take another: only what changed is stored", &["backup", "start", CLUSTER, "--wait"])?;
    say.step("wait until the controller has heard what the repository holds", || {
        fleet.wait_for_cluster(CLUSTER, "protected", |cluster| cluster["state"] == "protected").map(drop)
    })?;
    say.walfleet(fleet, "the fleet at a glance", &["status"])?;
    Ok(load)
}

/// The truth at a moment, and a second later the disaster.
fn lose(say: &Narrator, scene: &Scene) -> anyhow::Result<Barrier> {
    let what = "note what every table holds at this moment, by a snapshot of the source";
    let (truth, before) = say.step(what, || Barriers::install(&scene.orders)?.pass_and(summary))?;
    let session = scene.orders.session()?;
    say.detail(&format!("the moment: {}; {before}", target_time(&truth)));
    std::thread::sleep(Duration::from_secs(1));
    say.step("the disaster: UPDATE pgbench_accounts SET abalance = 0, without a WHERE", || {
        session.execute("UPDATE pgbench_accounts SET abalance = 0")
    })?;
    std::thread::sleep(Duration::from_secs(1));
    anyhow::ensure!(must_balance(&session).is_err(), "the disaster did no harm");
    say.detail(&format!("the load goes on upon the wreck: {}", summary(&session)?));
    Ok(truth)
}

fn recover(scratch: &Scratch, say: &Narrator, scene: &Scene, truth: &Barrier) -> anyhow::Result<PgServer> {
    let Scene { orders, fleet, .. } = scene;
    let to = target_time(truth);
    say.step("wait until the repository reaches past that moment", || {
        fleet.wait_until_recoverable(CLUSTER, &["--to", &to], RESTORE_HOST)
    })?;
    let (restored, port) = (scratch.join("restored"), free_port());
    let (data_dir, port_text) = (restored.display().to_string(), port.to_string());
    let words = ["restore", "start", CLUSTER, "--to", &to, "--on", RESTORE_HOST, "--data-dir", &data_dir];
    let words: Vec<&str> = words.into_iter().chain(["--start", "--port", &port_text, "--wait"]).collect();
    say.walfleet(fleet, &format!("restore the second before, on {RESTORE_HOST}"), &words)?;
    let builder = PgServer::builder(scratch, "restored", orders.version());
    let copy = builder.adopt(&restored, orders.socket_dir(), port)?;
    say.step("compare every table with what it held at that moment, and check every index", || {
        judge_copy(&copy, truth)
    })?;
    say.detail(&format!("restored: {}", summary(&copy.session()?)?));
    Ok(copy)
}

fn judge_copy(copy: &PgServer, truth: &Barrier) -> anyhow::Result<()> {
    copy.wait_until_writable()?;
    let session = copy.session()?;
    truth.must_be_state_of(&session, OwnRow::Absent)?;
    must_balance(&session)?;
    judge::check_relations(copy)
}

/// One line about the bank, to be seen beside another.
fn summary(session: &Session) -> anyhow::Result<String> {
    let count = transactions(session)?;
    let zero = session.number("SELECT count(*) FROM pgbench_accounts WHERE abalance <> 0")?;
    let balanced = if must_balance(session).is_ok() { "the books balance" } else { "the books do not balance" };
    Ok(format!("{count} transactions, {zero} accounts not at zero, {balanced}"))
}

/// As an operator types it.
fn target_time(barrier: &Barrier) -> String {
    barrier.time.replace("+00", " UTC")
}

impl Stage {
    fn leave_running(self, scratch: &Scratch) {
        let walfleet =
            format!("{} --context {}", self.fleet.admin.program().display(), self.fleet.admin.context().display());
        let walfleet = match os_user() {
            OsUser::Ourselves => walfleet,
            // The context holds a private key, which only its owner may read.
            OsUser::Other { name, .. } => format!("setpriv --reuid {name} --regid {name} --init-groups {walfleet}"),
        };
        let stop = scratch.join("stop");
        scratch.keep();
        let written = std::fs::write(&stop, STOP.replace("@folder@", &scratch.path().display().to_string()));
        println!("\nThe fleet keeps running. To try:\n");
        println!("  alias walfleet='{walfleet}'");
        println!("  walfleet status");
        println!("  walfleet cluster show {CLUSTER}");
        println!("  walfleet backup list {CLUSTER}");
        println!(
            "  walfleet restore start {CLUSTER} --latest --on {RESTORE_HOST} --data-dir {}-2 --start --port {} --wait",
            self.restored.display(),
            free_port()
        );
        println!("  {} '{}'      # the restored copy", self.psql.display(), self.restored_connection);
        match written {
            Ok(()) => println!("\nTo stop everything and remove it:  bash {}", stop.display()),
            Err(error) => println!("\nTo stop everything: kill what runs in {} ({error})", scratch.path().display()),
        }
        self.load.leave_running();
        self.agents.into_iter().for_each(Agent::leave_running);
        self.fleet.controller.leave_running();
        self.servers.into_iter().for_each(PgServer::leave_running);
    }
}

/// Ends what runs with a file or folder of the demo on its command line, and nothing else.
const STOP: &str = r#"#!/usr/bin/env bash
set -euo pipefail
folder=@folder@
find "$folder" -name postmaster.pid | while read -r file; do kill -QUIT "$(head -n 1 "$file")" 2>/dev/null || true; done
for process in /proc/[0-9]*; do
  pid=${process#/proc/}
  [ "$pid" != $$ ] && tr '\0' ' ' < "$process/cmdline" 2>/dev/null | grep -qF -- "$folder/" && kill "$pid" 2>/dev/null || true
done
sleep 2
rm -rf "$folder"
"#;
