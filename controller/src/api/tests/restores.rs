//! What is refused before a restore becomes a job, and what reaches the agent.

use tonic::{Code, Status};
use walfleet_proto::job::v1::{JobState, RestoreOrder, job_order};
use walfleet_proto::operator::v1 as operator;
use walfleet_proto::recovery::v1 as recovery;
use walfleet_proto::recovery::v1::recovery_target::Kind;

use super::fake_agent::primary;
use super::world::World;

async fn restore(
    world: &World,
    agent: &str,
    change: impl FnOnce(&mut RestoreOrder),
) -> Result<operator::JobView, Status> {
    let mut order = RestoreOrder { data_dir: "/restore".to_owned(), start: true, ..Default::default() };
    change(&mut order);
    let request = operator::StartRestoreRequest {
        cluster: "orders".to_owned(),
        agent: agent.to_owned(),
        order: Some(order),
        idempotency_key: String::new(),
    };
    let reply = world.jobs("olli").await.start_restore(request).await?;
    Ok(reply.into_inner().job.expect("a job"))
}

#[tokio::test(flavor = "multi_thread")]
async fn only_members_and_hosts_that_the_policy_names_may_restore() {
    let world = World::new().await;
    let _db1 = world.with_primary().await;
    let mut spare = world.agent("spare").await;
    let refused = restore(&world, "spare", |_| {}).await.expect_err("gold names no hosts");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("spec.restore.hosts of Policy gold"), "{}", refused.message());
    let unknown = restore(&world, "nobody", |_| {}).await.expect_err("there is no such agent");
    assert_eq!(unknown.code(), Code::NotFound);
    world.apply(&world.documents(", restore: {hosts: purpose=restore}")).await.expect("good documents");
    let job = restore(&world, "spare", |order| {
        order.target =
            Some(recovery::RecoveryTarget { kind: Some(Kind::TimeUs(1_780_000_000_000_000)), ..Default::default() });
    })
    .await
    .expect("it may now");
    let order = spare.offer().await;
    assert_eq!(order.job, job.id);
    let Some(job_order::Work::Restore(work)) = order.work else { panic!("{:?}", order.work) };
    assert_eq!((work.repository.as_str(), work.data_dir.as_str(), work.start), ("main", "/restore", true));
    let target = work.target.expect("a target");
    assert_eq!(
        (target.kind, target.timeline.as_str(), target.action.as_str()),
        (Some(Kind::TimeUs(1_780_000_000_000_000)), "latest", "promote")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_cannot_be_meant_is_refused_with_the_fitting_code() {
    let world = World::new().await;
    let db1 = world.with_primary().await;
    let mut facts = primary();
    facts.windows = vec![recovery::RecoveryWindow {
        repository: "main".to_owned(),
        as_of_us: 1_780_000_000_000_000,
        ranges: vec![recovery::RecoveryRange {
            from_us: 1_770_000_000_000_000,
            to_us: 1_780_000_000_000_000,
            from_lsn: "0/3000000".to_owned(),
            to_lsn: "0/5000000".to_owned(),
            timeline: 1,
            branch: "0".repeat(16),
        }],
        ..Default::default()
    }];
    db1.facts(facts).await;
    let begun = std::time::Instant::now();
    while world.cluster("orders").await.expect("it is there").windows.is_empty() {
        assert!(begun.elapsed() < super::world::PATIENCE);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let target = |kind| Some(recovery::RecoveryTarget { kind: Some(kind), ..Default::default() });
    type Change = Box<dyn FnOnce(&mut RestoreOrder)>;
    let table: Vec<(Change, Code, &str)> = vec![
        (Box::new(|o| o.data_dir = "restore".to_owned()), Code::InvalidArgument, "order.data_dir"),
        (Box::new(|o| o.port = 70_000), Code::InvalidArgument, "order.port"),
        (Box::new(|o| o.apply_delay_seconds = 5), Code::InvalidArgument, "--standby"),
        (Box::new(|o| o.backup = "newest".to_owned()), Code::InvalidArgument, "backup"),
        (Box::new(|o| o.repository = "other".to_owned()), Code::NotFound, "repository"),
        (
            Box::new(|o| o.data_dir = "/var/lib/postgresql/17/main/".to_owned()),
            Code::FailedPrecondition,
            "a server runs in",
        ),
        (
            Box::new(move |o| o.target = target(Kind::TimeUs(1_769_999_999_000_000))),
            Code::OutOfRange,
            "before the first point",
        ),
        (Box::new(move |o| o.target = target(Kind::Lsn("0/2000000".to_owned()))), Code::OutOfRange, "0/3000000"),
        (Box::new(move |o| o.target = target(Kind::Lsn("3".to_owned()))), Code::InvalidArgument, "order.target.lsn"),
    ];
    for (change, code, says) in table {
        let refused = restore(&world, "db1", change).await.expect_err(says);
        assert_eq!(refused.code(), code, "{says}: {refused:?}");
        assert!(refused.message().contains(says), "{says}: {}", refused.message());
    }
    let job = restore(&world, "db1", |_| {}).await.expect("a member may");
    world.until_state(&job.id, JobState::Offered).await;
}
