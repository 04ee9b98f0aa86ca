//! The program itself: how it ends, as Postgres, scripts and service managers see it (docs/command-line.md).

use std::path::Path;
use std::process::{Command, Output};

fn agent(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_walfleet-agent"))
        .args(arguments)
        .current_dir(folder)
        .env_remove("WALFLEET_SOCKET")
        .env_remove("WALFLEET_TOKEN")
        .output()
        .expect("the agent runs")
}

/// Exit code and stderr.
fn ends(folder: &Path, arguments: &[&str]) -> (i32, String) {
    let output = agent(folder, arguments);
    (output.status.code().expect("it exits"), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_fetch_that_cannot_be_answered_stops_recovery() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("broken.json"), "{").unwrap();
    for arguments in [
        &["wal", "fetch"][..],
        &["wal", "fetch", "--nonsense", "a", "b"],
        &["wal", "fetsch", "000000010000000000000001", "pg_wal/RECOVERYXLOG"],
        &["wal", "fetch", "000000010000000000000001", "pg_wal/RECOVERYXLOG"],
        &["wal", "fetch", "--source", "broken.json", "000000010000000000000001", "RECOVERYXLOG"],
    ] {
        let (code, stderr) = ends(folder.path(), arguments);
        assert!(code > 125 && !stderr.is_empty(), "{arguments:?}: {code} {stderr}");
    }
}

#[test]
fn a_push_without_an_agent_fails_so_that_postgres_keeps_the_wal() {
    let folder = tempfile::tempdir().unwrap();
    let (code, stderr) = ends(folder.path(), &["wal", "push", "--socket", "none.sock", "pg_wal/0001"]);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("HINT: "), "{stderr}");
}

#[test]
fn commands_end_with_the_documented_codes() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("bad.yaml"), "backup: { processes: 0 }").unwrap();
    std::fs::write(path("bare.yaml"), format!("state_dir: {}\n", path("state"))).unwrap();
    let fleet = format!("state_dir: {}\ncontroller: {{ url: 'https://localhost:1' }}\n", path("state"));
    std::fs::write(path("fleet.yaml"), fleet).unwrap();
    let (url, key) = (format!("file://{}", path("repository")), path("recovery.key"));
    let store = ["--repository", &url, "--key-file", &key];
    let token = "wft_1.secret.0123456789abcdef";

    let table: [(&[&str], i32, &str); 12] = [
        (&["nonsense"], 2, "nonsense"),
        (&["run", "--config", &path("none.yaml")], 2, "none.yaml"),
        (&["run", "--config", &path("bad.yaml")], 2, "backup.processes"),
        (&["run", "--config", &path("bare.yaml")], 2, "neither a controller nor a repository"),
        (&["run", "--config", &path("fleet.yaml")], 2, "not enrolled"),
        (&["doctor", "--config", &path("bare.yaml")], 1, "checks need attention"),
        (&["join", "--controller", "https://localhost:1", "--token", "nonsense"], 2, "not a join token"),
        (&["join", "--controller", "https://localhost:1", "--token", token, "--state-dir", &path("s")], 5, "firewall"),
        (&["list", "--repository", "ftp://x", "--key-file", &key], 2, "--repository"),
        (&["init", "--repository", &url, "--key-file", &key], 0, ""),
        (&["init", "--repository", &url, "--key-file", &path("other.key")], 4, "another recovery key"),
        (&["list", "--repository", &format!("{url}/other"), "--key-file", &key], 1, "HINT: "),
    ];
    for (arguments, expected, says) in table {
        let (code, stderr) = ends(folder.path(), arguments);
        assert_eq!(code, expected, "{arguments:?}: {stderr}");
        assert!(stderr.contains(says), "{arguments:?}: {stderr}");
    }

    let with = |command: &[&'static str], rest: &[&'static str]| {
        let arguments: Vec<&str> = command.iter().copied().chain(store).chain(rest.iter().copied()).collect();
        ends(folder.path(), &arguments)
    };
    assert_eq!(with(&["list"], &[]).0, 0);
    let (code, stderr) = with(&["list"], &["--cluster", "nobody"]);
    assert_eq!(code, 3, "{stderr}");
    let (code, stderr) = with(&["verify"], &["--cluster", "nobody"]);
    assert_eq!(code, 3, "{stderr}");
    let (code, stderr) = with(&["restore"], &["--cluster", "nobody", "--data-dir", "x", "--to", "2026-06-04 14:31:59"]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("2026-06-04 14:31:59 UTC"), "{stderr}");
    let (code, stderr) = with(&["backup"], &["--cluster", "nobody"]);
    assert_eq!(code, 2, "{stderr}");
}

#[test]
fn json_on_stdout_is_one_document() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().join("repository").display());
    let key = folder.path().join("recovery.key").display().to_string();
    let output = agent(folder.path(), &["init", "--repository", &url, "--key-file", &key, "-o", "json"]);
    let made: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&made["made"], &made["key_made"]), (&true.into(), &true.into()));
    let output = agent(folder.path(), &["init", "--repository", &url, "--key-file", &key, "-o", "json"]);
    let again: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&again["made"], &again["key_made"]), (&false.into(), &false.into()));
    assert_eq!(made["repository"], again["repository"]);
}
