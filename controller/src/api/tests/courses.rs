//! Jobs from the asking to the end, through what goes wrong on the way.

use walfleet_proto::agent::v1::controller_message::Message as Told;
use walfleet_proto::job::v1::JobState;
use walfleet_proto::operator::v1 as operator;

use super::fake_agent::{entry, failed, succeeded};
use super::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_goes_its_way_and_whoever_watches_sees_it() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let job = world.start_backup("").await.expect("db1 can do it");
    let request = operator::GetJobRequest { id: job.id.clone() };
    let mut watched = world.jobs("vera").await.watch_job(request).await.expect("a stream").into_inner();
    let order = db1.offer().await;
    assert_eq!((order.job.as_str(), order.attempt, order.cluster.as_str()), (job.id.as_str(), 1, "orders"));
    db1.accept(&order).await;
    world.until_state(&job.id, JobState::Running).await;
    db1.progress(&order, 40).await;
    let mut shown = Vec::new();
    while let Some(view) = watched.message().await.expect("the watch is well") {
        if view.progress.as_ref().is_some_and(|progress| progress.done_bytes == 40) && !shown.contains(&40) {
            shown.push(40);
            db1.end(succeeded(&order)).await;
            db1.acknowledged(order.fencing_token).await;
        }
        if view.state() == JobState::Succeeded {
            assert!(view.outcome.is_some() && view.finished_at_us >= view.started_at_us);
            shown.push(100);
        }
    }
    assert_eq!(shown, [40, 100], "the watch ends with the job");
    // Known before the agent looks at the repository again.
    let cluster = world.cluster("orders").await.expect("it is there");
    assert_eq!(cluster.last_backup.map(|backup| backup.id), Some("bk_1".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_is_unknown_until_the_agent_returns_and_says_that_it_runs() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let job = world.start_backup("").await.expect("db1 can do it");
    let order = db1.offer().await;
    db1.accept(&order).await;
    world.until_state(&job.id, JobState::Running).await;
    drop(db1);
    let unknown = world.until_state(&job.id, JobState::Unknown).await;
    assert!(unknown.reason.contains("db1 was last heard"), "{}", unknown.reason);
    // Gone for longer than a lease: nobody is there to ask.
    let second = world.start_backup("").await.expect_err("db1 is away");
    assert!(second.message().contains("db1 is not connected"), "{second:?}");

    let mut db1 = world.agent_with("db1", vec![entry(&order, None)]).await;
    world.until_state(&job.id, JobState::Running).await;
    db1.end(succeeded(&order)).await;
    db1.acknowledged(order.fencing_token).await;
    world.until_state(&job.id, JobState::Succeeded).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_returns_without_the_job_has_lost_it() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let job = world.start_backup("").await.expect("db1 can do it");
    let order = db1.offer().await;
    db1.accept(&order).await;
    world.until_state(&job.id, JobState::Running).await;
    drop(db1);
    let _db1 = world.agent("db1").await;
    let lost = world.until_state(&job.id, JobState::Failed).await;
    let outcome = lost.outcome.expect("it says how");
    assert_eq!(outcome.error_code, "job.lost");
    assert!(outcome.error_message.contains("knows nothing of it"), "{}", outcome.error_message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connected_agent_that_names_the_job_no_more_has_lost_it_too() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let job = world.start_backup("").await.expect("db1 can do it");
    let order = db1.offer().await;
    // Accepted, and never to be heard of again.
    db1.answer(&order, true, false).await;
    let lost = world.until_state(&job.id, JobState::Failed).await;
    assert_eq!(lost.outcome.expect("it says how").error_code, "job.lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_restarts_in_the_middle_takes_the_job_up_where_the_agent_is() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let job = world.start_backup("").await.expect("db1 can do it");
    let order = db1.offer().await;
    db1.accept(&order).await;
    world.until_state(&job.id, JobState::Running).await;
    let world = world.restart().await;
    assert_eq!(db1.ended().await.code(), tonic::Code::Unavailable);
    assert_eq!(world.job(&job.id).await.state(), JobState::Running);
    // It ended while nobody listened; the journal kept how.
    let mut db1 = world.agent_with("db1", vec![entry(&order, Some(succeeded(&order)))]).await;
    db1.acknowledged(order.fencing_token).await;
    world.until_state(&job.id, JobState::Succeeded).await;
    // What it made is listed before any agent has looked at the repository, through another restart too.
    let world = world.restart().await;
    let request = operator::ListBackupsRequest { cluster: "orders".to_owned() };
    let listed = world.fleet("vera").await.list_backups(request).await.expect("a list").into_inner().backups;
    assert_eq!(listed.iter().map(|backup| backup.id.as_str()).collect::<Vec<_>>(), ["bk_1"]);
    let cluster = world.cluster("orders").await.expect("it is there");
    assert_eq!(cluster.last_backup.map(|backup| backup.id), Some("bk_1".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_a_job_whose_agent_stays_away_becomes_unknown_and_an_offered_one_is_offered_again() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let job = world.start_backup("").await.expect("db1 can do it");
    let order = db1.offer().await;
    drop(db1);
    let world = world.restart().await;
    // Who has not come back yet may still do it.
    world.start_backup("").await.expect("it is queued");
    let unknown = world.until_state(&job.id, JobState::Unknown).await;
    assert!(unknown.reason.contains("did not come back"), "{}", unknown.reason);
    let mut db1 = world.agent("db1").await;
    let again = db1.offer().await;
    assert_eq!((again.job, again.attempt, again.fencing_token), (order.job, 1, order.fencing_token));
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_count_once_and_those_of_replaced_attempts_not_at_all() {
    let world = World::new().await;
    world.apply(&world.documents(", backup: {retries: 1}")).await.expect("good documents");
    let mut db1 = world.agent("db1").await;
    db1.facts(super::fake_agent::primary()).await;
    world.until_known("orders").await;
    let job = world.start_backup("").await.expect("db1 can do it");
    let first = db1.offer().await;
    db1.accept(&first).await;
    for _ in 0..2 {
        db1.end(failed(&first, true)).await;
        db1.acknowledged(first.fencing_token).await;
    }
    let waiting = world.until_state(&job.id, JobState::Queued).await;
    assert!(waiting.reason.contains("the store does not answer; 1 of 1 retries"), "{}", waiting.reason);
    // The pause is a minute; a second attempt is begun behind the dispatcher's back.
    let id = job.id.parse().expect("an id");
    let later = jiff::Timestamp::now() + jiff::SignedDuration::from_mins(2);
    let offered = world.api.reconciler.jobs.offer(&id, "db1", later).await.expect("it is queued");
    assert!(offered.changed);
    let second = db1.offer().await;
    assert_eq!(second.attempt, 2);
    assert!(second.fencing_token > first.fencing_token);
    db1.accept(&second).await;
    world.until_state(&job.id, JobState::Running).await;
    // Stale: taken note of, so that the journal may forget it, and without effect.
    db1.end(succeeded(&first)).await;
    db1.acknowledged(first.fencing_token).await;
    assert_eq!(world.job(&job.id).await.state(), JobState::Running);
    db1.end(failed(&second, true)).await;
    db1.acknowledged(second.fencing_token).await;
    let over = world.until_state(&job.id, JobState::Failed).await;
    let outcome = over.outcome.expect("it says how");
    assert_eq!((outcome.exit_code, outcome.error_code.as_str()), (5, "store.away"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_while_offered_reaches_the_agent_and_ends_the_job() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let job = world.start_backup("").await.expect("db1 can do it");
    let order = db1.offer().await;
    let request = operator::GetJobRequest { id: job.id.clone() };
    let view = world.jobs("olli").await.cancel_job(request.clone()).await.expect("it can be").into_inner();
    assert_eq!((view.state(), view.reason.is_empty()), (JobState::Offered, false));
    db1.expect("cancel", |told| match told {
        Told::Cancel(cancel) if cancel.job == order.job && cancel.fencing_token == order.fencing_token => Some(()),
        _ => None,
    })
    .await;
    db1.answer(&order, false, true).await;
    world.until_state(&job.id, JobState::Cancelled).await;
    let again = world.jobs("olli").await.cancel_job(request).await.expect_err("it is over");
    assert_eq!(again.code(), tonic::Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_cancelled_while_its_agent_was_away_is_stopped_when_it_returns() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let job = world.start_backup("").await.expect("db1 can do it");
    let order = db1.offer().await;
    db1.accept(&order).await;
    world.until_state(&job.id, JobState::Running).await;
    drop(db1);
    world.until_state(&job.id, JobState::Unknown).await;
    let request = operator::GetJobRequest { id: job.id.clone() };
    world.jobs("olli").await.cancel_job(request).await.expect("it can be");
    world.until_state(&job.id, JobState::Cancelled).await;
    let mut db1 = world.agent_with("db1", vec![entry(&order, None)]).await;
    db1.expect("cancel", |told| matches!(told, Told::Cancel(cancel) if cancel.job == order.job).then_some(())).await;
    db1.end(succeeded(&order)).await;
    db1.acknowledged(order.fencing_token).await;
    assert_eq!(world.job(&job.id).await.state(), JobState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_finds_the_same_job() {
    let world = World::new().await;
    let _db1 = world.with_primary().await;
    let first = world.start_backup("once").await.expect("db1 can do it");
    let again = world.start_backup("once").await.expect("it is there");
    let other = world.start_backup("twice").await.expect("db1 can do it");
    assert_eq!(first.id, again.id);
    assert_ne!(first.id, other.id);
    let waiting = world.until_state(&other.id, JobState::Queued).await;
    let begun = std::time::Instant::now();
    while !world.job(&other.id).await.reason.contains("backs orders up now") {
        assert!(begun.elapsed() < super::world::PATIENCE, "{}", waiting.reason);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}
