//! Passes at times that tests choose: nothing runs by itself here.

use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use walfleet_repository::key_file::{KeyFile, KeyKind};

use super::*;
use crate::fleet::observed::{AgentObserved, FactsObserved, InstanceObserved};
use crate::fleet::recovery::{GapNote, RecoveryRange, RecoveryWindow, WalGap};
use crate::fleet::{Timing, samples, store};
use crate::jobs::{Job, Phase};
use crate::resources::{document, stored};
use crate::state::embedded::Options;

fn at(text: &str) -> Timestamp {
    text.parse().expect(text)
}

fn timing() -> Timing {
    let long = Duration::from_secs(3600);
    Timing {
        heartbeat: long,
        // What was seen at the beginning counts for days.
        facts_interval: Duration::from_secs(86_400),
        lost_after: long,
        lease: long,
        offer: long,
        hello: long,
        store_interval: long,
        patience: long,
        tick: long,
        writer: long,
        history: Duration::from_secs(30 * 86_400),
        retention: crate::fleet::RetentionTiming::of(&crate::config::RetentionConfig::default()),
    }
}

struct Room {
    folder: tempfile::TempDir,
    reconciler: Arc<Reconciler>,
}

/// One cluster, seen at db1, which is not connected.
async fn room() -> Room {
    room_of(samples::instance("orders", 7)).await
}

async fn room_of(instance: InstanceObserved) -> Room {
    let folder = tempfile::tempdir().expect("a folder");
    KeeperKey::create(folder.path(), "test", &KeyFile::generate(KeyKind::Recovery).expect("a key")).expect("fresh");
    let state = State::open(&folder.path().join("state"), Options::default()).expect("a fresh state");
    let now = at("2026-06-01T12:00:00Z");
    let facts = FactsObserved { at: now, received_at: now, instances: vec![instance] };
    let observed = AgentObserved { hello: None, facts: Some(facts), last_seen: Some(now) };
    store::store_agent(&state, "db1", &observed).await.expect("it is small");
    let reconciler = reopened(&folder, state).await;
    Room { folder, reconciler }
}

async fn reopened(folder: &tempfile::TempDir, state: State) -> Arc<Reconciler> {
    let fleet = Fleet::new(timing(), store::load_agents(&state).await.expect("rows"));
    let roster = Roster::open(state.clone()).await.expect("rows");
    let keeper = Arc::new(KeeperKey::load(folder.path()).expect("a key"));
    let epoch = next_epoch(&state).await.expect("a state");
    let jobs = Jobs::open(state.clone()).await.expect("rows");
    Reconciler::new(state, fleet, jobs, roster, keeper, epoch)
}

impl Room {
    async fn apply(&self, schedule: &str) {
        let text = format!(
            "apiVersion: walfleet/v1\nkind: Repository\nname: main\nspec: {{url: 'file:///nowhere'}}\n---\n\
             apiVersion: walfleet/v1\nkind: Policy\nname: gold\nspec: {{selector: '', repository: main, backup: {{schedule: '{schedule}'}}}}\n"
        );
        let state = &self.reconciler.state;
        let version = Catalog::load(state).await.expect("rows").version;
        let planned = stored::plan(state, document::parse(&text).expect("good")).await.expect("rows");
        stored::commit(state, version, &planned, "ann", at("2026-06-01T12:00:00Z")).await.expect("nobody else");
    }

    async fn pass(&self, now: &str) -> PassReport {
        let report = self.reconciler.pass(at(now)).await;
        assert_eq!(report.problems, Vec::<String>::new());
        report
    }

    async fn jobs(&self) -> Vec<Job> {
        self.reconciler.jobs.active().await.expect("rows")
    }
}

#[tokio::test]
async fn missed_runs_become_one_job_and_a_run_never_two() {
    let mut room = room().await;
    room.apply("0 2 * * *").await;
    // Bound at noon: two o'clock that day is nobody's to catch up.
    assert_eq!(room.pass("2026-06-01T12:00:00Z").await.runs_created, 0);
    assert_eq!(room.pass("2026-06-01T12:00:01Z").await.runs_created, 0);
    // Away for a week.
    assert_eq!(room.pass("2026-06-09T10:00:00Z").await.runs_created, 1);
    assert_eq!(room.pass("2026-06-09T10:00:01Z").await.runs_created, 0);
    let jobs = room.jobs().await;
    let runs: Vec<String> = jobs.iter().filter_map(|job| job.run.as_ref().map(ToString::to_string)).collect();
    assert_eq!(runs, ["gold/orders/2026-06-09T02:00:00Z"]);
    assert_eq!(jobs[0].requested_by, "schedule");
    assert!(jobs[0].reason().contains("db1 is not connected"), "{}", jobs[0].reason());

    // The next run finds one waiting, which serves as well; no heap of jobs grows for a host that is away.
    assert_eq!(room.pass("2026-06-10T03:00:00Z").await.runs_created, 0);
    assert_eq!(room.jobs().await.len(), 1);
    // Once that one is over, the schedule goes on, through a restart too.
    let cancel = Event::Cancel { by: "ann".to_owned() };
    room.reconciler.jobs.apply(&jobs[0].id, cancel, at("2026-06-10T04:00:00Z")).await.expect("a row");
    room.reconciler = reopened(&room.folder, room.reconciler.state.clone()).await;
    assert_eq!(room.pass("2026-06-10T05:00:00Z").await.runs_created, 0);
    assert_eq!(room.pass("2026-06-11T02:00:00Z").await.runs_created, 1);
}

#[tokio::test]
async fn passes_at_the_same_time_make_a_run_once() {
    let room = room().await;
    room.apply("0 2 * * *").await;
    room.pass("2026-06-01T12:00:00Z").await;
    // Two controllers that both believe to be the only one.
    let other = reopened(&room.folder, room.reconciler.state.clone()).await;
    let now = at("2026-06-02T02:00:00Z");
    let (one, two) = tokio::join!(room.reconciler.pass(now), other.pass(now));
    assert_eq!(room.jobs().await.len(), 1, "{one:?} {two:?}");
}

#[tokio::test]
async fn a_recorded_gap_makes_one_backup_and_another_only_if_that_did_not_help() {
    let mut instance = samples::instance("orders", 7);
    instance.current_lsn = Some("0/6000000".parse().expect("an LSN"));
    let note = GapNote { by: "db1".to_owned(), at: at("2026-06-01T11:00:00Z"), reason: "it was lost".to_owned() };
    let gap = WalGap {
        timeline: 1,
        branch: "0".repeat(16),
        from_lsn: "0/3000000".parse().expect("an LSN"),
        to_lsn: "0/5000000".parse().expect("an LSN"),
        acknowledged: false,
        from: None,
        to: None,
        recorded: Some(note),
        acknowledgement: None,
        system_identifier: 7,
    };
    let range = RecoveryRange {
        from: None,
        to: None,
        from_lsn: "0/1000000".parse().expect("an LSN"),
        to_lsn: gap.from_lsn,
        timeline: 1,
        branch: gap.branch.clone(),
    };
    instance.windows = vec![RecoveryWindow {
        repository: "main".to_owned(),
        as_of: at("2026-06-01T11:59:00Z"),
        ranges: vec![range],
        gaps: vec![gap],
        filled: vec![],
        newest_commit: None,
        newest_lsn: None,
        newest_timeline: 1,
    }];
    let mut room = room_of(instance).await;
    assert_eq!(room.pass("2026-06-01T12:00:00Z").await.runs_created, 0, "nobody says where to");
    room.apply("0 2 * * *").await;
    assert_eq!(room.pass("2026-06-01T12:00:01Z").await.runs_created, 1);
    assert_eq!(room.pass("2026-06-01T12:20:00Z").await.runs_created, 0, "it waits");
    room.reconciler = reopened(&room.folder, room.reconciler.state.clone()).await;
    assert_eq!(room.pass("2026-06-01T12:21:00Z").await.runs_created, 0);
    let jobs = room.jobs().await;
    assert_eq!((jobs.len(), jobs[0].requested_by.as_str()), (1, "gap"));
    let cancel = Event::Cancel { by: "ann".to_owned() };
    room.reconciler.jobs.apply(&jobs[0].id, cancel, at("2026-06-01T12:22:00Z")).await.expect("a row");
    assert_eq!(room.pass("2026-06-01T12:23:00Z").await.runs_created, 1);
    let jobs = room.jobs().await;
    let cancel = Event::Cancel { by: "ann".to_owned() };
    room.reconciler.jobs.apply(&jobs[0].id, cancel, at("2026-06-01T12:24:00Z")).await.expect("a row");
    assert_eq!(room.pass("2026-06-01T12:25:00Z").await.runs_created, 0, "not so soon again");

    // Ever more seldom, and not for ever.
    let cluster: ClusterName = "orders".parse().expect("a name");
    for (too_soon, again) in [("12:52", "12:53"), ("14:52", "14:53"), ("20:52", "20:53")] {
        assert_eq!(room.pass(&format!("2026-06-01T{too_soon}:00Z")).await.runs_created, 0, "{too_soon}");
        let then = format!("2026-06-01T{again}:00Z");
        assert_eq!(room.pass(&then).await.runs_created, 1, "{again}");
        let jobs = room.jobs().await;
        let cancel = Event::Cancel { by: "ann".to_owned() };
        room.reconciler.jobs.apply(&jobs[0].id, cancel, at(&then)).await.expect("a row");
    }
    for hour in ["2026-06-01T21:30:00Z", "2026-06-02T01:59:00Z"] {
        assert_eq!(room.pass(hour).await.runs_created, 0, "{hour}");
        let overview = room.reconciler.overview(at(hour)).await.expect("rows");
        let said = overview.assess(&overview.picture.assemble().clusters[&cluster]).reason;
        assert!(said.contains("after 5 tries no backup begins behind 0/5000000"), "{said}");
    }
}

#[tokio::test]
async fn a_controller_with_a_new_or_an_old_state_is_newer_than_the_one_before() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = |name: &str| State::open(&folder.path().join(name), Options::default()).expect("a fresh state");
    let lost = state("lost");
    let mut epoch = 0;
    for start in 1..=20 {
        let next = next_epoch(&lost).await.expect("a state");
        assert!(next > epoch, "start {start}: {next} after {epoch}");
        epoch = next;
    }
    // A controller does not start twenty times in a second.
    let made_anew = next_epoch(&state("new")).await.expect("a state");
    assert!(made_anew + 20 >= epoch && made_anew > 1_700_000_000, "{made_anew} after {epoch}");
}

#[tokio::test]
async fn history_is_bounded_by_number_and_by_age() {
    let room = room().await;
    room.apply("0 2 * * *").await;
    let jobs = &room.reconciler.jobs;
    let begin = at("2026-06-01T12:00:00Z");
    room.pass("2026-06-01T12:00:00Z").await;
    let cluster: ClusterName = "orders".parse().expect("a name");
    for day in 0..80 {
        let now = begin + SignedDuration::from_hours(24 * day);
        room.reconciler.pass(now).await;
        for job in room.jobs().await {
            let cancel = Event::Cancel { by: "ann".to_owned() };
            assert_eq!(jobs.apply(&job.id, cancel, now).await.expect("a row").job.phase(), Phase::Cancelled);
        }
    }
    room.reconciler.pass(begin + SignedDuration::from_hours(24 * 79 + 1)).await;
    let kept = jobs.done(Some(&cluster), 1000).await.expect("rows");
    assert_eq!(kept.len(), 30, "a month's");
    assert_eq!(jobs.done(None, 1000).await.expect("rows").len(), 30);
    assert!(jobs.get(&kept[0].id).await.is_ok());
    let (requests, _) = room.reconciler.state.list("job/request/").await.expect("keys");
    assert_eq!(requests.len(), 30, "what is forgotten leaves nothing behind");
    jobs.prune(&cluster, Timestamp::MAX).await.expect("rows");
    assert!(jobs.done(None, 10).await.expect("rows").is_empty());
}
