//! Retention on a real server, with margins of seconds and minutes: what is promised and what is held restores, and the rest goes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use walfleet_integration_tests::fleet::standalone::CLUSTER;
use walfleet_integration_tests::fleet::{Controller, Fleet, Protected};
use walfleet_integration_tests::postgres::PgVersion;
use walfleet_integration_tests::scratch::{Scratch, in_scratch};
use walfleet_integration_tests::wait_for;

use crate::gaps::{NOT_RECOVERABLE, apply, mark, marks, restored, write_segments};

/// The window and the days of trash are a minute long.
const PATIENCE: Duration = Duration::from_secs(180);

/// The documented exit code (docs: the command line).
const REFUSED: i32 = 4;

fn fleet(scratch: &Scratch) -> anyhow::Result<Fleet> {
    let controller = Controller::init(scratch)?;
    controller.configure("retention: { every_seconds: 2, notice_seconds: 3600, grace_seconds: 4 }")?;
    Fleet::with(scratch, controller)
}

/// A backup behind a mark and some WAL.
fn back_up(fleet: &Fleet, host: &Protected, name: &str) -> anyhow::Result<String> {
    mark(&host.server, name)?;
    write_segments(&host.server, 2)?;
    let job = fleet.backup(CLUSTER)?;
    Ok(job["backup"]["id"].as_str().unwrap_or_default().to_owned())
}

fn decision(fleet: &Fleet, backup: &str) -> anyhow::Result<String> {
    let plan = fleet.admin.json(&["retention", "plan", CLUSTER])?;
    let backups = plan["backups"].as_array().cloned().unwrap_or_default();
    let found = backups.iter().find(|planned| planned["backup"] == backup);
    Ok(found.map_or_else(String::new, |planned| planned["decision"].as_str().unwrap_or_default().to_owned()))
}

fn wait_for_decision(fleet: &Fleet, backup: &str, wanted: &str) -> anyhow::Result<()> {
    wait_for(&format!("{backup} to be decided: {wanted}"), PATIENCE, || {
        Ok((decision(fleet, backup)? == wanted).then_some(()))
    })
}

fn now(host: &Protected) -> anyhow::Result<String> {
    host.server
        .session()?
        .value("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || ' UTC'")
}

fn repository(scratch: &Scratch) -> PathBuf {
    scratch.join("repository")
}

fn segments(repository: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![repository.join("clusters").join(CLUSTER).join("wal")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if name.len() == 24 {
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}

#[test]
fn what_is_promised_or_held_restores_and_the_rest_goes_for_good() {
    in_scratch(|scratch| {
        // What is gone is asked for once.
        scratch.allow_log("is not one of this cluster that can be restored");
        let version = PgVersion::of(17)?;
        let fleet = fleet(scratch)?;
        let host = fleet.protected(&version)?;
        let first = back_up(&fleet, &host, "before the first")?;
        let second = back_up(&fleet, &host, "before the second")?;
        let from = now(&host)?;
        mark(&host.server, "held")?;
        let inside = host.server.session()?.value("SELECT pg_current_wal_lsn()")?;
        write_segments(&host.server, 1)?;
        let to = now(&host)?;
        let third = back_up(&fleet, &host, "before the third")?;
        let fourth = back_up(&fleet, &host, "before the fourth")?;
        let fifth = back_up(&fleet, &host, "before the fifth")?;

        let admin = &fleet.admin;
        admin.run(&["hold", "place", CLUSTER, "--backup", &first, "--reason", "an audit"])?.ok()?;
        admin.run(&["hold", "place", CLUSTER, "--from", &from, "--to", &to, "--reason", "an incident"])?.ok()?;
        let early = admin.run(&["hold", "place", CLUSTER, "--from", "2020-01-01 00:00 UTC", "--reason", "all"])?;
        anyhow::ensure!(early.code == REFUSED && early.stderr.contains("the first moment"), "{early:?}");
        let unsaid = admin.run(&["retention", "plan", CLUSTER])?;
        anyhow::ensure!(unsaid.code == REFUSED && unsaid.stderr.contains("so everything is"), "{unsaid:?}");

        let retention = json!({ "window": "1m", "minimum": 1, "trash": "1m" });
        apply(scratch, &fleet, json!({ "retention": retention }))?;
        wait_for_decision(&fleet, &third, "expire")?;
        wait_for_decision(&fleet, &fourth, "expire")?;
        let plan = admin.json(&["retention", "plan", CLUSTER])?;
        anyhow::ensure!(plan["acts_from"].is_string(), "it keeps less than before, and counts later: {plan}");
        admin.run(&["retention", "release", CLUSTER, "--yes"])?.ok()?;
        wait_for_decision(&fleet, &third, "wait")?;

        // What lies in the trash restores, and comes back where somebody wants it.
        let back = admin.run(&["hold", "place", CLUSTER, "--backup", &fourth, "--reason", "wanted after all"])?;
        back.ok()?;
        wait_for_decision(&fleet, &fourth, "keep")?;

        let manifest = |id: &str| repository(scratch).join("clusters").join(CLUSTER).join("backups").join(id);
        anyhow::ensure!(manifest(&third).exists(), "{}", manifest(&third).display());
        wait_for("the third backup to be removed", PATIENCE, || Ok((!manifest(&third).exists()).then_some(())))?;

        let listed = admin.json(&["hold", "list"])?;
        anyhow::ensure!(listed["holds"].as_array().is_some_and(|holds| holds.len() == 3), "{listed}");
        let shown = fleet.wait_for_cluster(CLUSTER, "told without a gap", |cluster| {
            let ranges = cluster["recovery"][0]["ranges"].as_array().map_or(0, Vec::len);
            cluster["recovery"][0]["gaps"] == json!([]) && cluster["reason"].is_null() && ranges == 2
        })?;
        // Of the first only what makes it consistent is left, and from the second on everything: it is held.
        let left = segments(&repository(scratch))?;
        let between =
            |name: &String| ("000000010000000000000006"..="000000010000000000000007").contains(&name.as_str());
        anyhow::ensure!(!left.iter().any(between), "{left:?}\n{}", shown["recovery"]);
        let all = [
            "before the fifth",
            "before the first",
            "before the fourth",
            "before the second",
            "before the third",
            "held",
        ];
        for (name, target, expected) in [
            ("first", vec!["--backup", &first, "--immediate"], vec!["before the first"]),
            (
                "held",
                vec!["--backup", &second, "--to-lsn", &inside],
                vec!["before the first", "before the second", "held"],
            ),
            ("latest", vec!["--latest"], all.to_vec()),
        ] {
            let server = restored(scratch, &fleet, &version, name, &target)?;
            let found = marks(&server)?;
            anyhow::ensure!(found == expected, "{name}: {found:?}");
        }
        let nowhere = scratch.join("nowhere").display().to_string();
        let plan =
            ["restore", "plan", CLUSTER, "--on", "db1", "--data-dir", &nowhere, "--backup", &third, "--immediate"];
        let refused = admin.run(&plan)?;
        anyhow::ensure!(refused.code == NOT_RECOVERABLE || refused.code == 3, "{refused:?}");
        admin.run(&["backup", "verify", CLUSTER, "--deep", "--wait"])?.ok()?;
        anyhow::ensure!(decision(&fleet, &fifth)? == "keep");
        Ok(())
    });
}
