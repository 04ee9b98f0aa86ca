//! Every view as people and scripts get it.

use walfleet_ctl::Exit;
use walfleet_proto::job::v1::{BackupPlanReport, JobState, RestoreReport, VerifyFinding, VerifyReport, WalFindReport};

use crate::canned::{self, fleet};
use crate::controller::{Asked, Controller, Script, Step};
use crate::terminal::Terminal;
use crate::transcript::Transcript;

#[tokio::test]
async fn help_texts() {
    let terminal = Terminal::alone();
    let mut transcript = Transcript::of("help");
    for line in [
        "walfleet",
        "walfleet --help",
        "walfleet --version",
        "walfleet version -o json",
        "walfleet status --help",
        "walfleet apply --help",
        "walfleet diff --help",
        "walfleet policy --help",
        "walfleet repository --help",
        "walfleet cluster --help",
        "walfleet cluster list --help",
        "walfleet cluster show --help",
        "walfleet agent --help",
        "walfleet agent revoke --help",
        "walfleet backup --help",
        "walfleet backup start --help",
        "walfleet backup verify --help",
        "walfleet backup plan --help",
        "walfleet backup undelete --help",
        "walfleet retention --help",
        "walfleet replica --help",
        "walfleet hold --help",
        "walfleet hold place --help",
        "walfleet restore --help",
        "walfleet restore plan --help",
        "walfleet restore start --help",
        "walfleet wal --help",
        "walfleet wal find --help",
        "walfleet job --help",
        "walfleet job list --help",
        "walfleet job watch --help",
        "walfleet token --help",
        "walfleet token create --help",
        "walfleet audit --help",
        "walfleet audit list --help",
        "walfleet context --help",
        "walfleet context add --help",
        "walfleet login --help",
        "walfleet completions --help",
    ] {
        transcript.types(&terminal, line).await;
    }
    transcript.check();
}

#[tokio::test]
async fn status() {
    let mut transcript = Transcript::of("status");
    let controller = Controller::with(fleet()).await;
    let terminal = Terminal::alone().at(&controller);
    transcript.types(&terminal, "walfleet status").await;
    transcript.types(&terminal, "walfleet status -o wide").await;
    transcript.remark("an empty fleet says what to type next");
    let mut empty = Script::default();
    empty.status.controller = "ctl-1".to_owned();
    empty.status.controller_version = "0.1.0".to_owned();
    let controller = Controller::with(empty).await;
    let terminal = Terminal::alone().at(&controller);
    transcript.types(&terminal, "walfleet status").await;
    controller.script().status.agents = fleet().agents;
    transcript.types(&terminal, "walfleet status").await;
    transcript.check();
}

#[tokio::test]
async fn retention() {
    let mut transcript = Transcript::of("retention");
    let controller = Controller::with(fleet()).await;
    let terminal = Terminal::alone().at(&controller);
    for line in [
        "walfleet retention plan orders",
        "walfleet retention plan orders -o json",
        "walfleet retention plan billing",
        "walfleet backup undelete bk_06e2r4ycmn8q7t1w5x3z",
    ] {
        transcript.types(&terminal, line).await;
    }
    let asked = |asked: &Asked| matches!(asked, Asked::Undelete(wanted) if wanted.cluster == "orders");
    assert!(controller.script().asked.iter().any(asked));
    controller.script().retention.refused = vec![
        "19 of 21 backups would expire at once\nHINT: look at the plan; `walfleet retention release NAME` lets it pass once."
            .to_owned(),
    ];
    controller.script().retention.acts_from_us = canned::at("2026-06-05T09:00:00Z");
    controller.script().retention.can_be_released = true;
    transcript.types(&terminal, "walfleet retention release orders").await;
    transcript.types(&terminal, "walfleet retention release orders --yes").await;
    let released: Vec<Asked> = controller.script().asked.drain(..).skip(1).collect();
    assert!(matches!(&released[..], [Asked::ReleaseRetention(wanted)] if wanted.digest == "0f3c9a1b2d4e5f60"));
    transcript.check();
}

#[tokio::test]
async fn holds() {
    let mut transcript = Transcript::of("hold");
    let controller = Controller::with(fleet()).await;
    let terminal = Terminal::alone().at(&controller);
    for line in [
        "walfleet hold place orders --backup bk_06e2r4ycmn8q7t1w5x3z --reason 'before the migration' --until '2027-01-01 00:00 UTC'",
        "walfleet hold place orders --from '2026-06-04 14:00 UTC' --to '2026-06-04 15:00 UTC' --reason 'incident 1812'",
        "walfleet hold place orders --reason nothing",
        "walfleet hold list",
        "walfleet hold list -o json",
        "walfleet replica status",
        "walfleet replica status -o json",
        "walfleet repository collect main --dry-run",
        "walfleet repository collect main -o json",
        "walfleet hold release hold_1 --yes",
        "walfleet hold release hold_06e2r4ycmn8q7t1w5x3z",
        "walfleet hold release hold_06e2r4ycmn8q7t1w5x3z --yes",
    ] {
        transcript.types(&terminal, line).await;
    }
    let asked = controller.script().asked.clone();
    let [Asked::PlaceHold(backup), Asked::PlaceHold(stretch), Asked::ReleaseHold(released)] = &asked[..] else {
        panic!("{asked:?}");
    };
    assert_eq!((backup.from_us, backup.until_us), (0, canned::at("2027-01-01T00:00:00Z")));
    let (from, to) = (canned::at("2026-06-04T14:00:00Z"), canned::at("2026-06-04T15:00:00Z"));
    assert_eq!((stretch.from_us, stretch.to_us, stretch.backup.as_str()), (from, to, ""));
    assert_eq!(released.cluster, "orders");
    transcript.check();
}

#[tokio::test]
async fn clusters() {
    let mut transcript = Transcript::of("cluster");
    let controller = Controller::with(fleet()).await;
    let terminal = Terminal::alone().at(&controller);
    for line in [
        "walfleet cluster list",
        "walfleet cluster list -o wide",
        "walfleet cluster show orders",
        "walfleet cluster show billing -o wide",
        "walfleet cluster show sessions",
        "walfleet cluster show orders -o json",
        "walfleet cluster show sessions -o yaml",
        "walfleet cluster show nope",
        "walfleet wal status orders",
        "walfleet wal status billing -o wide",
        "walfleet wal gaps orders",
        "walfleet wal gaps billing",
        "walfleet wal gaps billing -o json",
        "walfleet wal gaps billing acknowledge --from 0/5000000 --to 0/7000000 --reason 'the slot was dropped'",
        "walfleet wal gaps billing acknowledge --from 0/5000000 --to 0/6000000 --reason grown",
        "walfleet wal gaps billing acknowledge --from 0/6000000 --to 0/7000000 --reason typo",
        "walfleet wal gaps billing acknowledge --from 0/5000000",
    ] {
        transcript.types(&terminal, line).await;
    }
    transcript.check();
}

#[tokio::test]
async fn the_rest_of_the_fleet() {
    let mut transcript = Transcript::of("fleet");
    let controller = Controller::with(fleet()).await;
    let terminal = Terminal::alone().at(&controller);
    for line in [
        "walfleet agent list",
        "walfleet agent show db1",
        "walfleet agent show db1 -o json",
        "walfleet backup list orders",
        "walfleet backup list orders -o wide",
        "walfleet backup show bk_06dznc4v2b7k9m3p5r8t",
        "walfleet backup show bk_06e2r4ycmn8q7t1w5x3z -o json",
        "walfleet backup show bk_nope",
        "walfleet policy list",
        "walfleet policy show standard",
        "walfleet policy show standard -o json",
        "walfleet policy show nope",
        "walfleet repository list",
        "walfleet job list",
        "walfleet job list -o wide",
        "walfleet job show job_06e3a1b2c3d4e5f6g7h8",
        "walfleet token create --role agent --label env=prod",
        "walfleet token create --role viewer -o json",
        "walfleet token list",
        "walfleet audit list",
        "walfleet audit list --since 1h --limit 2 -o json",
        "walfleet audit list --since '2026-06-04 14:00'",
        "walfleet audit verify",
    ] {
        transcript.types(&terminal, line).await;
    }
    let asked = controller.script().asked.iter().rev().find_map(|asked| match asked {
        Asked::Audit(request) => Some(*request),
        _ => None,
    });
    assert_eq!(asked.map(|asked| (asked.since_us, asked.limit)), Some((canned::at("2026-06-04T13:41:59Z"), 2)));
    transcript.remark("somebody edited the state");
    let broken =
        "audit log is broken at entry 3: its content is not what was recorded\nHINT: somebody changed the state.";
    controller.script().refusals.push_back(tonic::Status::data_loss(broken));
    transcript.types(&terminal, "walfleet audit verify").await;
    transcript.check();
}

#[tokio::test]
async fn what_jobs_cost_and_will_cost() {
    let mut transcript = Transcript::of("cost");
    let controller = Controller::with(Script { jobs: vec![canned::backed_up()], ..fleet() }).await;
    let terminal = Terminal::alone().at(&controller);
    transcript.types(&terminal, "walfleet job show job_06e3a1b2c3d4e5f6g7h8").await;
    transcript.types(&terminal, "walfleet job show job_06e3a1b2c3d4e5f6g7h8 -o json").await;
    transcript.remark("while it runs, and when it stalls");
    for job in [canned::paced(Some(310 << 20), Some(30), 0), canned::paced(None, None, 20)] {
        controller.script().jobs = vec![job];
        transcript.types(&terminal, "walfleet job show job_06e3a1b2c3d4e5f6g7h8").await;
    }
    transcript.types(&terminal, "walfleet job show job_06e3a1b2c3d4e5f6g7h8 -o json").await;
    transcript.remark("a plan, and one of which nothing is known");
    let known = BackupPlanReport {
        cluster_bytes: 48 << 30,
        read_bytes: Some(2 << 30),
        stored_bytes: Some(310 << 20),
        store_requests: Some(52),
        seconds: Some(188.7),
        basis: "the last 5 backups that read what changed".to_owned(),
        read_all_because: String::new(),
        notes: Vec::new(),
    };
    let unknown = BackupPlanReport {
        cluster_bytes: 48 << 30,
        read_bytes: Some(48 << 30),
        read_all_because: "there was no backup to compare with".to_owned(),
        ..BackupPlanReport::default()
    };
    controller.script().jobs = vec![canned::job(JobState::Queued)];
    for (report, flags) in
        [(known.clone(), ""), (known, " -o json"), (unknown.clone(), " --read-all"), (unknown, " -o json")]
    {
        controller.script().watch.extend([Step::Job(Box::new(canned::planned_backup(report)))]);
        transcript.types(&terminal, &format!("walfleet backup plan orders{flags}")).await;
    }
    transcript.check();
}

#[tokio::test]
async fn finding_the_moment() {
    let mut transcript = Transcript::of("find");
    let controller = Controller::with(Script { jobs: vec![canned::job(JobState::Queued)], ..fleet() }).await;
    let terminal = Terminal::alone().at(&controller);
    let around = "--around '2026-06-04 14:31:59 UTC'";
    for flags in ["", " --within 90s --timeline 2 --all --on db2 -o wide", " --limit 2 -o json"] {
        controller.script().watch.extend([Step::Job(Box::new(canned::found(canned::find_report())))]);
        transcript.types(&terminal, &format!("walfleet wal find orders {around}{flags}")).await;
    }
    transcript.remark("on an idle stretch, and behind all that is stored");
    let report = canned::find_report();
    let idle = WalFindReport { transactions: Vec::new(), commits: 0, notes: Vec::new(), ..report.clone() };
    let nothing = WalFindReport { after: None, searched_from_lsn: String::new(), ..idle.clone() };
    for report in [idle, nothing] {
        controller.script().watch.extend([Step::Job(Box::new(canned::found(report)))]);
        transcript.types(&terminal, &format!("walfleet wal find orders {around}")).await;
    }
    transcript.remark("what is refused here");
    transcript.types(&terminal, "walfleet wal find orders --around '2026-06-04 14:31:59'").await;
    transcript.types(&terminal, &format!("walfleet wal find orders {around} --limit 501")).await;
    let asked: Vec<String> = controller.script().asked.iter().map(|asked| format!("{asked:?}")).collect();
    let asked: Vec<&String> = asked.iter().filter(|asked| asked.starts_with("WalFind")).collect();
    let whole = asked.get(1).map(|asked| asked.as_str()).unwrap_or_default();
    for part in ["agent: \"db2\"", "within_seconds: 90", "timeline: \"2\"", "limit: 500", "all: true"] {
        assert!(whole.contains(part), "{part}: {whole}");
    }
    transcript.check();
}

#[tokio::test]
async fn applying() {
    let mut transcript = Transcript::of("apply");
    let controller = Controller::with(fleet()).await;
    let terminal = Terminal::typing("no\nyes\n").at(&controller).with_person();
    let file = terminal.file("fleet.yaml", "kind: Policy\nname: standard\n---\nkind: Repository\nname: main\n");
    let broken = terminal.file("broken.yaml", "kind: Policy\n---\nname: [1\n");
    let empty = terminal.file("empty.yaml", "\n");
    transcript.types(&terminal, &format!("walfleet diff -f {file}")).await;
    transcript.types(&terminal, &format!("walfleet apply -f {file} --dry-run")).await;
    transcript.remark("the operator types: no");
    transcript.types(&terminal, &format!("walfleet apply -f {file}")).await;
    transcript.remark("the operator types: yes");
    transcript.types(&terminal, &format!("walfleet apply -f {file}")).await;
    transcript.types(&terminal, &format!("walfleet apply -f {file} --yes -o json")).await;
    transcript.types(&terminal, &format!("walfleet apply -f {broken}")).await;
    transcript.types(&terminal, &format!("walfleet apply -f {empty}")).await;
    transcript.types(&terminal, "walfleet apply -f /nowhere/fleet.yaml").await;
    transcript.remark("the controller refuses a document");
    controller.script().refusals.push_back(tonic::Status::invalid_argument(
        "document 1, Policy standard: backup.schedule is not a cron expression: \"daily\"\nHINT: five fields, such as \"0 2 * * *\".",
    ));
    transcript.types(&terminal, &format!("walfleet diff -f {file}")).await;
    transcript.remark("a viewer may not apply");
    controller
        .script()
        .refusals
        .push_back(tonic::Status::permission_denied("bob is a viewer, and apply takes an admin"));
    transcript.types(&terminal, &format!("walfleet apply -f {file} --yes")).await;
    transcript.check();
    let applied: Vec<bool> = controller
        .script()
        .asked
        .iter()
        .map(|asked| matches!(asked, Asked::Apply(request) if !request.dry_run))
        .collect();
    // diff, dry run, no (a dry run only), yes (a dry run, then for good), --yes, then the two refusals.
    assert_eq!(applied, [false, false, false, false, true, true, false, true]);
}

#[tokio::test]
async fn restoring() {
    let mut transcript = Transcript::of("restore");
    let script = Script { jobs: vec![canned::restore_job(JobState::Queued, false)], ..fleet() };
    let controller = Controller::with(script).await;
    let terminal = Terminal::alone().at(&controller).in_zone("Europe/Berlin");
    let start = "walfleet restore start orders --on lab1 --data-dir /srv/pg/orders";

    transcript.remark("the main job: the second before the accident");
    let running = |phase: &str, done, total| {
        let progress = canned::running(phase, done, total).progress;
        Step::Job(Box::new(walfleet_proto::operator::v1::JobView {
            progress,
            ..canned::restore_job(JobState::Running, false)
        }))
    };
    controller.script().watch.extend([
        running("copy", 1 << 30, 48 << 30),
        running("replay", 0, 0),
        Step::Job(Box::new(canned::restored(canned::restore_report(), false))),
    ]);
    transcript.types(&terminal, &format!("{start} --to '2026-06-04 14:31:59 UTC' --start --wait")).await;
    transcript.remark("without waiting");
    transcript.types(&terminal, start).await;

    transcript.remark("a plan");
    let mut planned = canned::restore_report();
    planned.server_state = "planned".to_owned();
    planned.reached_lsn.clear();
    planned.connection.clear();
    planned.estimated_seconds = 107.0;
    planned.estimated_from = "the last 3 restores".to_owned();
    planned.notes = vec!["/srv/pg has 210.0 GiB free".to_owned()];
    controller.script().jobs = vec![canned::restore_job(JobState::Queued, true)];
    for line in ["", " -o json"] {
        controller.script().watch.extend([Step::Job(Box::new(canned::restored(planned.clone(), true)))]);
        let plan = "walfleet restore plan orders --on lab1 --data-dir /srv/pg/orders";
        transcript.types(&terminal, &format!("{plan} --to '2026-06-04 14:31:59 UTC'{line}")).await;
    }

    transcript.remark("over a copy, and where nothing of the kind was ever done");
    let over = RestoreReport { at_most: true, ..planned.clone() };
    let unknown = RestoreReport { estimated_seconds: 0.0, estimated_from: String::new(), ..planned };
    for report in [over, unknown] {
        controller.script().watch.extend([Step::Job(Box::new(canned::restored(report, true)))]);
        transcript.types(&terminal, "walfleet restore plan orders --on lab1 --data-dir /srv/pg/orders").await;
    }

    transcript.remark("what cannot be reached");
    let message = "no WAL of orders after 2026-06-04 14:41:57 UTC\nHINT: orders can be restored from 2026-06-03 02:21:40 UTC to 2026-06-04 14:41:57 UTC.";
    controller.script().watch.extend([Step::Job(Box::new(canned::failed(7, "target.too_late", message)))]);
    transcript.types(&terminal, &format!("{start} --to '2026-06-04 16:00:00 UTC' --wait")).await;

    transcript.remark("what is refused before anything is sent");
    for flags in [
        "--to '2026-06-04 14:31:59'",
        "--to yesterday",
        "--to '2026-06-04 14:31:59 CEST'",
        "--to-lsn 12345",
        "--to-xid 0",
        "--to-xid 742 --to-name x",
        "--exclusive",
        "--timeline 0",
        "--timeline 5-9f3c-1",
        "--apply-delay 1h",
        "--timeout 5m",
        "--wait --timeout 300",
        "--tablespace /a=/x --tablespace /a=/y",
        "--tablespace /a=/srv/pg/orders/x",
    ] {
        transcript.types(&terminal, &format!("{start} {flags}")).await;
    }
    transcript.types(&terminal, "walfleet restore start orders --on lab1 --data-dir ../x").await;
    transcript.remark("what an agent of this version does not do");
    controller.script().refusals.push_back(tonic::Status::unimplemented("standby restores: not in this version"));
    transcript.types(&terminal, &format!("{start} --standby")).await;
    transcript.check();
}

#[tokio::test]
async fn every_target_flag_reaches_the_controller() {
    let script = Script { jobs: vec![canned::restore_job(JobState::Queued, false)], ..fleet() };
    let controller = Controller::with(script).await;
    let terminal = Terminal::alone().at(&controller);
    let start = "walfleet restore start orders --on lab1 --data-dir /srv/pg/orders";
    let flags = "--to-xid 742 --exclusive --timeline 2 --action pause --tablespace /a=/x --tablespace 16385=/y \
                 --start --port 5433 --keep-archiving --backup bk_1 --delta --standby --apply-delay 1h30m";
    assert_eq!(terminal.types(&format!("{start} {flags}")).await.exit, Exit::Done);
    let asked = controller.script().asked.last().cloned();
    let Some(Asked::Restore(request)) = asked else { panic!("{asked:?}") };
    assert_eq!((request.cluster.as_str(), request.agent.as_str()), ("orders", "lab1"));
    assert!(!request.idempotency_key.is_empty());
    let order = request.order.unwrap();
    let target = order.target.clone().unwrap();
    use walfleet_proto::recovery::v1::recovery_target::Kind;
    assert_eq!(target.kind, Some(Kind::Xid(742)));
    assert!(target.exclusive);
    assert_eq!((target.timeline.as_str(), target.action.as_str()), ("2", "pause"));
    assert_eq!(order.tablespaces.len(), 2);
    assert_eq!((order.port, order.apply_delay_seconds, order.backup.as_str()), (5433, 5400, "bk_1"));
    assert!(order.start && order.keep_archiving && order.delta && order.standby && !order.plan_only);
    for (flag, kind) in [
        ("--to '2026-06-04 14:31:59.25 UTC'", Kind::TimeUs(canned::at("2026-06-04T14:31:59.25Z"))),
        ("--to-lsn 0/3000060", Kind::Lsn("0/3000060".to_owned())),
        ("--to-name before_migration", Kind::Name("before_migration".to_owned())),
        ("--immediate", Kind::Immediate(true)),
        ("--latest", Kind::Latest(true)),
        ("", Kind::Latest(true)),
    ] {
        terminal.types(&format!("{start} {flag}")).await;
        let asked = controller.script().asked.last().cloned();
        let Some(Asked::Restore(request)) = asked else { panic!("{asked:?}") };
        assert_eq!(request.order.unwrap().target.unwrap().kind, Some(kind), "{flag}");
    }
}

#[tokio::test]
async fn verification_that_finds_damage_is_no_success() {
    let controller = Controller::with(Script { jobs: vec![canned::job(JobState::Queued)], ..fleet() }).await;
    let terminal = Terminal::alone().at(&controller);
    let verified = |findings| {
        let report = VerifyReport { packs: 41, segments: 800, bytes: 3 << 30, findings };
        let mut job = canned::job(JobState::Succeeded);
        job.kind = "verify".to_owned();
        job.outcome = Some(walfleet_proto::job::v1::JobOutcome {
            report: Some(walfleet_proto::job::v1::job_outcome::Report::Verify(report)),
            ..Default::default()
        });
        Step::Job(Box::new(job))
    };
    let mut transcript = Transcript::of("verify");
    controller.script().watch.extend([verified(Vec::new())]);
    transcript.types(&terminal, "walfleet backup verify orders --wait").await;
    let finding = VerifyFinding {
        object: "packs/3f/3fa9c1".to_owned(),
        problem: "stored bytes do not have the pack's hash".to_owned(),
        backups: vec!["bk_06e2r4ycmn8q7t1w5x3z".to_owned()],
    };
    controller.script().watch.extend([verified(vec![finding])]);
    transcript.types(&terminal, "walfleet backup verify orders --backup bk_06e2r4ycmn8q7t1w5x3z --deep --wait").await;
    transcript.check();
}
