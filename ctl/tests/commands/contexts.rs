//! Contexts, and controllers that cannot be reached.

use walfleet_ctl::Exit;

use crate::canned::fleet;
use crate::controller::{Asked, Controller};
use crate::terminal::Terminal;
use crate::transcript::Transcript;

#[tokio::test]
async fn contexts() {
    let mut transcript = Transcript::of("context");
    let controller = Controller::with(fleet()).await;
    let terminal = Terminal::alone().masked(controller.address.to_string(), "CONTROLLER");
    let good = terminal.file("admin.yaml", &format!("controller: http://{}\n", controller.address));
    let bad = terminal.file("bad.yaml", "controller: [x\nkey: SECRET\n");
    for line in [
        "walfleet status",
        "walfleet context list",
        &format!("walfleet context add prod {good}"),
        &format!("walfleet context add prod {good}"),
        &format!("walfleet context add ../prod {good}"),
        &format!("walfleet context add lab {bad}"),
        "walfleet context use nope",
        "walfleet context use prod",
        "walfleet context list",
        "walfleet agent list",
        "walfleet agent list --context nope",
        &format!("walfleet agent list --context {good}"),
    ] {
        transcript.types(&terminal, line).await;
    }
    transcript.check();
}

#[tokio::test]
async fn a_controller_that_is_not_there_is_named() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let terminal = Terminal::alone().with_context(&format!("controller: http://{address}\n"));
    let answer = terminal.types("walfleet status").await;
    assert_eq!(answer.exit, Exit::Unreachable);
    assert!(answer.stderr.contains(&format!("controller {address} is unreachable: Connection refused")), "{answer:?}");
    assert!(answer.stderr.contains("\nHINT: "), "{answer:?}");
    let terminal = Terminal::alone().with_context("controller: http://no-such-host.invalid:1\n");
    let answer = terminal.types("walfleet status").await;
    assert_eq!(answer.exit, Exit::Usage, "plain text never leaves this machine: {answer:?}");
}

#[tokio::test]
async fn destruction_asks_for_the_name() {
    let controller = Controller::with(fleet()).await;
    let nobody = Terminal::alone().at(&controller);
    let answer = nobody.types("walfleet agent revoke db1").await;
    assert_eq!(answer.exit, Exit::Refused);
    assert!(answer.stderr.contains("db1 is the primary of orders"), "{answer:?}");
    assert!(answer.stderr.contains("--yes"), "{answer:?}");
    let hasty = Terminal::typing("yes\n").at(&controller).with_person();
    assert_eq!(hasty.types("walfleet policy delete standard").await.exit, Exit::Refused);
    assert!(controller.script().asked.is_empty());
    let careful = Terminal::typing("db1\n").at(&controller).with_person();
    assert_eq!(careful.types("walfleet agent revoke db1").await.exit, Exit::Done);
    assert_eq!(careful.types("walfleet policy delete standard --yes").await.exit, Exit::Done);
    let asked = controller.script().asked.clone();
    assert!(matches!(asked.as_slice(), [Asked::RevokeAgent(_), Asked::Delete(_)]), "{asked:?}");
}

#[tokio::test]
async fn colour_is_for_screens_and_no_color_is_honoured() {
    let controller = Controller::with(fleet()).await;
    let colourful = Terminal::alone().at(&controller).on_colour_screen();
    assert!(colourful.types("walfleet status").await.stdout.contains("\u{1b}[1;31munprotected\u{1b}[0m"));
    assert!(!colourful.types("walfleet status -o json").await.stdout.contains('\u{1b}'));
    let plain = colourful.with_variable("NO_COLOR", "1");
    assert!(!plain.types("walfleet status").await.stdout.contains('\u{1b}'));
}

#[tokio::test]
async fn every_view_is_one_json_document_and_the_same_as_yaml() {
    let controller = Controller::with(fleet()).await;
    let terminal = Terminal::alone().at(&controller);
    for command in
        ["status", "cluster list", "agent list", "job list", "token list", "policy list", "wal status orders"]
    {
        let json = terminal.types(&format!("walfleet {command} -o json")).await.json();
        let yaml = terminal.types(&format!("walfleet {command} -o yaml")).await.stdout;
        let from_yaml: serde_json::Value = serde_yaml_ng::from_str(&yaml).unwrap();
        assert_eq!(json, from_yaml, "{command}");
    }
}

#[tokio::test]
async fn every_command_is_the_root_of_a_trace() {
    // The program itself: spans have ids only where telemetry is installed, once for a process.
    let controller = Controller::with(fleet()).await;
    let folder = tempfile::tempdir().unwrap();
    let context = folder.path().join("c.yaml");
    std::fs::write(&context, format!("controller: http://{}\n", controller.address)).unwrap();
    let program = env!("CARGO_BIN_EXE_walfleet");
    let output =
        tokio::process::Command::new(program).args(["status", "--context"]).arg(&context).output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    let sent = controller.script().traceparents.clone();
    let [traceparent] = sent.as_slice() else { panic!("{sent:?}") };
    assert_eq!(traceparent.len(), 55, "{traceparent}");
    assert!(!traceparent.contains("00000000000000000000000000000000"), "{traceparent}");
}
