//! Waiting for jobs: the outcome, the patience, the controller that goes away, the reader that goes away.

use std::io::{Error, ErrorKind, Write};
use std::time::Duration;

use tonic::Status;
use walfleet_ctl::Exit;
use walfleet_proto::job::v1::JobState;

use crate::canned::{self, fleet};
use crate::controller::{Asked, Controller, Script, Step};
use crate::terminal::Terminal;
use crate::transcript::Transcript;

fn step(job: walfleet_proto::operator::v1::JobView) -> Step {
    Step::Job(Box::new(job))
}

async fn controller(steps: Vec<Step>) -> Controller {
    Controller::with(Script { jobs: vec![canned::job(JobState::Queued)], watch: steps.into(), ..fleet() }).await
}

#[tokio::test]
async fn waiting() {
    let mut transcript = Transcript::of("wait");
    let mut offered = canned::job(JobState::Unknown);
    offered.reason = "agent db2 is not connected".to_owned();
    let steps = vec![
        step(canned::job(JobState::Offered)),
        step(canned::running("checkpoint", 0, 0)),
        step(canned::paced(Some(310 << 20), Some(30), 0)),
        Step::Pause(Duration::from_millis(1100)),
        step(canned::paced(None, None, 20)),
        Step::Pause(Duration::from_millis(1100)),
        step(offered),
        step(canned::running("wait for wal", 0, 0)),
        step(canned::backed_up()),
    ];
    let controller = controller(steps).await;
    let terminal = Terminal::alone().at(&controller);
    transcript.types(&terminal, "walfleet backup start orders --wait").await;
    transcript.remark("a failure of the job is the command's");
    let message = "pg_wal of orders is full\nHINT: free some space.";
    controller.script().watch.push_back(step(canned::failed(1, "backup.no_space", message)));
    transcript.types(&terminal, "walfleet job watch job_06e3a1b2c3d4e5f6g7h8").await;
    transcript.remark("as JSON the job is printed, however it ended");
    controller.script().watch.push_back(step(canned::failed(4, "agent.busy", "busy")));
    transcript.types(&terminal, "walfleet job watch job_06e3a1b2c3d4e5f6g7h8 -o json").await;
    transcript.remark("cancelled by somebody");
    controller.script().watch.push_back(step(canned::job(JobState::Cancelled)));
    transcript.types(&terminal, "walfleet job watch job_06e3a1b2c3d4e5f6g7h8").await;
    transcript.remark("without waiting");
    transcript.types(&terminal, "walfleet backup start orders").await;
    transcript.check();
}

#[tokio::test]
async fn patience_ends_and_the_job_goes_on() {
    let controller = controller(vec![step(canned::running("copy", 1, 2))]).await;
    let terminal = Terminal::alone().at(&controller);
    let answer = terminal.types("walfleet backup start orders --wait --timeout 1s").await;
    assert_eq!(answer.exit, Exit::TimedOut);
    assert!(answer.stderr.contains("walfleet job watch job_06e3a1b2c3d4e5f6g7h8"), "{answer:?}");
    assert_eq!(answer.stdout, "");
}

#[tokio::test]
async fn a_controller_that_restarts_is_found_again() {
    let steps = vec![
        step(canned::running("copy", 1, 2)),
        Step::Break(Status::unavailable("the controller shuts down")),
        Step::Break(Status::unavailable("no leader")),
        step(canned::running("commit", 2, 2)),
        Step::End,
        step(canned::backed_up()),
    ];
    let controller = controller(steps).await;
    let terminal = Terminal::alone().at(&controller);
    let answer = terminal.types("walfleet backup start orders --wait").await;
    assert_eq!(answer.exit, Exit::Done, "{answer:?}");
    assert_eq!(answer.stderr.matches("the job goes on, and this is tried again").count(), 1, "{answer:?}");
    assert!(answer.stderr.contains("the controller is back"), "{answer:?}");
    assert!(answer.stdout.contains("bk_06e2r4ycmn8q7t1w5x3z"), "{answer:?}");
}

#[tokio::test]
async fn what_will_not_pass_ends_the_waiting() {
    let controller = controller(vec![Step::Break(Status::permission_denied("ann is revoked"))]).await;
    let answer = Terminal::alone().at(&controller).types("walfleet backup start orders --wait").await;
    assert_eq!(answer.exit, Exit::Refused);
    assert!(answer.stderr.contains("ann is revoked"), "{answer:?}");
}

#[tokio::test]
async fn a_start_whose_answer_was_lost_is_sent_again_under_the_same_key() {
    let controller = controller(Vec::new()).await;
    controller.script().refusals.push_back(Status::unavailable("connection reset"));
    let answer = Terminal::alone().at(&controller).types("walfleet backup start orders").await;
    assert_eq!(answer.exit, Exit::Done, "{answer:?}");
    let asked = controller.script().asked.clone();
    let [Asked::Backup(first), Asked::Backup(second)] = asked.as_slice() else { panic!("{asked:?}") };
    assert_eq!(first.idempotency_key, second.idempotency_key);
    assert_eq!(first.idempotency_key.len(), 32);
}

#[tokio::test]
async fn an_operator_who_interrupts_learns_that_the_job_goes_on() {
    // In a process of its own: the signal is the process's.
    let program = env!("CARGO_BIN_EXE_walfleet");
    let controller = controller(vec![step(canned::running("copy", 1, 2))]).await;
    let folder = tempfile::tempdir().unwrap();
    let context = folder.path().join("c.yaml");
    std::fs::write(&context, format!("controller: http://{}\n", controller.address)).unwrap();
    let child = tokio::process::Command::new(program)
        .args(["backup", "start", "orders", "--wait", "--context"])
        .arg(&context)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let id = child.id().unwrap().to_string();
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if controller.script().watch.is_empty() {
            break;
        }
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(std::process::Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().await.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(i32::from(Exit::TimedOut.code())), "{stderr}");
    assert!(stderr.contains("goes on\nHINT: follow it with: walfleet job watch job_06e3a1b2c3d4e5f6g7h8"), "{stderr}");
}

#[tokio::test]
async fn on_a_terminal_progress_is_a_bar_that_leaves_no_trace() {
    let pause = || Step::Pause(Duration::from_millis(400));
    let steps = vec![
        step(canned::running("checkpoint", 0, 0)),
        pause(),
        step(canned::running("copy", 3 << 30, 12 << 30)),
        pause(),
        step(canned::backed_up()),
    ];
    let controller = controller(steps).await;
    let folder = tempfile::tempdir().unwrap();
    let context = folder.path().join("c.yaml");
    std::fs::write(&context, format!("controller: http://{}\n", controller.address)).unwrap();
    let line = format!("{} backup start orders --wait --context {}", env!("CARGO_BIN_EXE_walfleet"), context.display());
    // util-linux gives the program a terminal of its own.
    let child = tokio::process::Command::new("script")
        .args(["--quiet", "--return", "--command", &format!("stty cols 160; {line}"), "/dev/null"])
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .stdin(std::process::Stdio::null())
        .output();
    let output = child.await.unwrap();
    let screen = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{screen}");
    assert!(screen.contains("backup of orders on db2  checkpoint"), "{screen:?}");
    assert!(screen.contains("25%") && screen.contains("copy  3.0 GiB of 12.0 GiB"), "{screen:?}");
    // The last bar is erased (EL) before the report is written.
    let report = screen.rfind("bk_06e2r4ycmn8q7t1w5x3z  committed").unwrap();
    assert!(screen[..report].ends_with("\u{1b}[2K"), "{screen:?}");
}

struct Broken(ErrorKind);

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(Error::from(self.0))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_closed_pipe_ends_quietly_and_a_full_disk_does_not() {
    let controller = controller(vec![step(canned::failed(7, "x", "y"))]).await;
    let terminal = Terminal::alone().at(&controller);
    for line in ["walfleet status", "walfleet completions bash", "walfleet --help"] {
        let quiet = terminal.types_into(line, &mut Broken(ErrorKind::BrokenPipe)).await;
        assert_eq!(quiet, (Exit::Done, String::new()), "{line}");
    }
    let (exit, stderr) = terminal.types_into("walfleet status", &mut Broken(ErrorKind::StorageFull)).await;
    assert_eq!(exit, Exit::Failed);
    assert!(stderr.contains("write to standard output"), "{stderr}");
    let line = "walfleet job watch job_06e3a1b2c3d4e5f6g7h8 -o json";
    let (exit, _) = terminal.types_into(line, &mut Broken(ErrorKind::BrokenPipe)).await;
    assert_eq!(exit, Exit::NotRecoverable, "the job's end is still the exit code");
}
