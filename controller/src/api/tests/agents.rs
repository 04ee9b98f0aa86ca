//! The agents' stream: who is who, and what is refused.

use std::time::Duration;

use tonic::Code;
use walfleet_proto::agent::v1 as agent;
use walfleet_proto::agent::v1::agent_message::Message as Say;
use walfleet_proto::job::v1::JobState;

use super::fake_agent::{primary, succeeded};
use super::world::World;
use crate::identity::member::{self, Member};

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_stream_takes_the_older_ones_place() {
    let world = World::new().await;
    let mut old = world.agent("db1").await;
    let new = world.agent("db1").await;
    assert_eq!(old.ended().await.code(), Code::Aborted);
    new.facts(primary()).await;
    world.until_known("orders").await;
    let view = world.cluster("orders").await.expect("it is there");
    assert!(view.members[0].connected, "the old stream's end takes nothing from the new one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_agent_is_shown_as_gone_and_its_stream_ends() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    db1.mute();
    assert_eq!(db1.ended().await.code(), Code::DeadlineExceeded);
    let view = world.cluster("orders").await.expect("it is remembered");
    assert!(!view.members[0].connected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_agents_stream_ends_at_once_with_the_reason() {
    let world = World::new().await;
    let mut db1 = world.agent("db1").await;
    let state = &world.api.reconciler.state;
    let key = member::key(&"db1".parse().expect("a name"));
    state.modify_row::<Member, _>(&key, |member| member.revoked_at_us = Some(1)).await.expect("the row is there");
    let status = db1.ended().await;
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_cannot_speak_for_another_ones_job() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let mut db2 = world.agent("db2").await;
    let job = world.start_backup("").await.expect("db1 can do it");
    let order = db1.offer().await;
    db1.accept(&order).await;
    world.until_state(&job.id, JobState::Running).await;
    db2.end(succeeded(&order)).await;
    db2.acknowledged(order.fencing_token).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(world.job(&job.id).await.state(), JobState::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_survives_nonsense_but_not_a_second_hello_for_a_first() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let nonsense = [
        Say::Hello(agent::Hello::default()),
        Say::Facts(agent::Facts { at_us: i64::MAX, instances: vec![] }),
        Say::Facts(agent::Facts { at_us: 1, instances: vec![agent::InstanceFacts::default()] }),
        Say::JobAnswer(agent::JobAnswer { job: "../../etc".to_owned(), ..Default::default() }),
        Say::JobAnswer(agent::JobAnswer { job: "job_nobodyknows".to_owned(), accepted: true, ..Default::default() }),
        Say::Outcome(Default::default()),
        Say::Heartbeat(agent::Heartbeat { at_us: i64::MIN, running: vec![Default::default()] }),
    ];
    for message in nonsense {
        db1.say(message).await;
    }
    world.start_backup("").await.expect("db1 is still there");
    db1.offer().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_learns_its_share_and_a_generation_stands_for_one_content() {
    let world = World::new().await;
    let mut db1 = world.with_primary().await;
    let first = db1.desired(|desired| !desired.clusters.is_empty()).await;
    assert_eq!(first.repositories.len(), 1);
    assert_eq!(first.repositories[0].root_public_key.len(), 32);
    let cluster = &first.clusters[0];
    assert_eq!((cluster.name.as_str(), cluster.repository.as_str(), cluster.member), ("orders", "main", true));
    assert_eq!(cluster.recipients.len(), 1);
    assert_eq!(first.writer_chain.len(), 2, "the agent's certificate and the keeper's");
    drop(db1);
    // Nothing changed: through reconnects and restarts it is the same, the certificate included.
    let world = world.restart().await;
    let mut db1 = world.agent("db1").await;
    assert_eq!(db1.desired(|desired| !desired.clusters.is_empty()).await, first);
    let yaml = world.documents(", restore: {hosts: purpose=restore}");
    world.apply(&yaml).await.expect("good documents");
    let mut spare = world.agent("spare").await;
    let theirs = spare.desired(|desired| !desired.clusters.is_empty()).await;
    assert!(!theirs.clusters[0].member);
    let second = db1.desired(|desired| desired.generation > first.generation).await;
    let labels: Vec<&str> = second.clusters[0].recipients.iter().map(|recipient| recipient.label.as_str()).collect();
    assert_eq!(labels, ["db1", "spare"]);
}
