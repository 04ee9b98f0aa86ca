//! Documents and views.

use tonic::Code;
use walfleet_proto::operator::v1 as operator;
use walfleet_proto::operator::v1::{ChangeKind, ProtectionState};

use super::fake_agent::primary;
use super::world::{PATIENCE, World, map};

fn cluster_document(name: &str, spec: &str) -> String {
    format!("---\napiVersion: walfleet/v1\nkind: Cluster\nname: {name}\nlabels: {{env: prod}}\nspec: {{{spec}}}\n")
}

fn policy(name: &str, selector: &str, repository: &str) -> String {
    format!(
        "---\napiVersion: walfleet/v1\nkind: Policy\nname: {name}\nspec: {{selector: '{selector}', repository: {repository}}}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn all_documents_take_effect_or_none() {
    let world = World::new().await;
    let good = world.documents("");
    for (bad, says) in [
        (format!("{good}{}", policy("silver", "env=prod", "nowhere")), "\"nowhere\" is not declared"),
        (format!("{good}---\nkind: Policy\n"), "document 3: apiVersion is missing"),
        (format!("{good}{}", cluster_document("orders", "members: 7")), "document 3"),
    ] {
        let refused = world.apply(&bad).await.expect_err("it is bad");
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(says), "{}", refused.message());
    }
    let request = operator::ListResourcesRequest::default();
    let listed = world.resources("vera").await.list_resources(request.clone()).await.expect("a list").into_inner();
    assert!(listed.resources.is_empty());

    let reply = world.apply(&good).await.expect("good documents");
    assert!(reply.changes.iter().all(|change| change.change() == ChangeKind::Created));
    let again = world.apply(&good).await.expect("good documents");
    assert!(again.changes.iter().all(|change| change.change() == ChangeKind::Unchanged));
    let listed = world.resources("vera").await.list_resources(request).await.expect("a list").into_inner();
    assert!(listed.resources.iter().all(|resource| resource.generation == 1 && resource.applied_by == "ann"));
}

#[tokio::test(flavor = "multi_thread")]
async fn viewers_may_look_at_what_would_change_and_only_admins_change_it() {
    let world = World::new().await;
    let _db1 = world.with_primary().await;
    let yaml =
        world.documents(", backup: {schedule: '0 2 * * *'}, restore: {hosts: name=spare}, wal: {piece_interval: 1m}");
    let mut request = operator::ApplyRequest { yaml, dry_run: true };
    let reply = world.resources("vera").await.apply(request.clone()).await.expect("it is only looked at").into_inner();
    let told: Vec<&String> = reply.changes.iter().flat_map(|change| &change.consequences).collect();
    assert!(told.iter().any(|line| line.contains("orders: next backup moves from none to ")), "{told:?}");
    let price = "moves from pieces every 1s (at most 13 dollars a month for pieces, at 5 dollars a million requests) to pieces every 1m";
    assert!(told.iter().any(|line| line.contains(price)), "{told:?}");
    assert!(told.iter().any(|line| line.contains("orders: spare may restore it from now on")), "{told:?}");
    request.dry_run = false;
    for name in ["vera", "olli"] {
        let refused = world.resources(name).await.apply(request.clone()).await.expect_err("not an admin");
        assert_eq!(refused.code(), Code::PermissionDenied);
    }
    assert_eq!(world.cluster("orders").await.expect("it is there").next_backup_us, 0);
    let entries = world.audit.entries(0, 100).await.expect("the log reads");
    let calls: Vec<(&str, bool)> =
        entries.iter().map(|entry| (entry.actor.as_str(), entry.outcome == "done")).collect();
    assert_eq!(calls, [("ann", true), ("vera", false), ("olli", false)], "looking is not recorded");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_cannot_be_given_two_policies() {
    let world = World::new().await;
    let _db1 = world.with_primary().await;
    let refused = world.apply(&policy("silver", "env=test", "main")).await.expect_err("gold binds it");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("gold and silver"), "{}", refused.message());
    assert!(refused.message().contains("orders"), "{}", refused.message());
    world.apply(&policy("silver", "env=prod", "main")).await.expect("it selects nothing yet");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_depend_on_is_not_deleted() {
    let world = World::new().await;
    let _db1 = world.with_primary().await;
    let delete = |kind: &str, name: &str| {
        let request = operator::DeleteResourceRequest { kind: kind.to_owned(), name: name.to_owned() };
        let world = &world;
        async move { world.resources("ann").await.delete_resource(request).await.map(|_| ()) }
    };
    let refused = delete("Repository", "main").await.expect_err("gold names it");
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("gold"), "{refused:?}");
    let refused = delete("Policy", "gold").await.expect_err("it binds orders");
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("orders"), "{refused:?}");
    assert_eq!(delete("Policy", "nobody").await.expect_err("it is not there").code(), Code::NotFound);
    assert_eq!(delete("Planet", "mars").await.expect_err("no such kind").code(), Code::InvalidArgument);
    world.apply(&policy("gold", "env=none", "main")).await.expect("it lets go");
    delete("Policy", "gold").await.expect("nothing hangs on it");
    let refused = delete("Repository", "main").await.expect_err("orders is still archived there");
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("WAL of orders"), "{refused:?}");
    let other = "apiVersion: walfleet/v1\nkind: Repository\nname: other\nspec: {url: 'file:///nowhere/other'}\n";
    world.apply(&format!("{other}{}", policy("iron", "", "other"))).await.expect("good documents");
    delete("Repository", "main").await.expect("nothing names it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_says_what_is_known_and_why_it_is_not_more() {
    let world = World::new().await;
    assert_eq!(world.cluster("orders").await.expect_err("nobody declared it").code(), Code::NotFound);
    let db1 = world.with_primary().await;
    let view = world.cluster("orders").await.expect("it is there");
    assert_eq!(
        view.labels.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        map(&[("env", "test"), ("name", "orders")])
    );
    assert_eq!((view.policy.as_str(), view.repository.as_str(), view.lag_seconds), ("gold", "main", -1.0));
    assert_eq!((view.state, view.reason.is_empty()), (ProtectionState::Unknown.into(), false));
    let mut facts = primary();
    facts.windows = vec![walfleet_proto::recovery::v1::RecoveryWindow {
        repository: "main".to_owned(),
        as_of_us: 1_780_000_000_000_000,
        ..Default::default()
    }];
    db1.facts(facts).await;
    let begun = std::time::Instant::now();
    loop {
        let status = world.fleet("vera").await.status(operator::StatusRequest {}).await.expect("a status").into_inner();
        assert_eq!((status.clusters.len(), status.controller.as_str()), (1, "test"));
        let view = &status.clusters[0];
        if view.state() == ProtectionState::Unprotected {
            assert!(view.reason.contains("no backup"), "{}", view.reason);
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{view:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let select = |selector: &str| operator::ListClustersRequest { selector: selector.to_owned() };
    let mut fleet = world.fleet("vera").await;
    assert_eq!(fleet.list_clusters(select("env=prod")).await.expect("a list").into_inner().clusters.len(), 0);
    assert_eq!(fleet.list_clusters(select("name=orders")).await.expect("a list").into_inner().clusters.len(), 1);
    assert_eq!(
        fleet.list_clusters(select("env in prod")).await.expect_err("no selector").code(),
        Code::InvalidArgument
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn declared_repositories_are_made_once_and_missed_when_they_are_gone() {
    let world = World::new().await;
    world.apply(&world.documents("")).await.expect("good documents");
    let begun = std::time::Instant::now();
    let root = world.repository().join("walfleet-repository");
    while !root.exists() {
        assert!(begun.elapsed() < PATIENCE, "{:?}", world.api.keeper.notices());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    world.api.keeper.round(jiff::Timestamp::now()).await;
    assert_eq!(world.api.keeper.notices(), Vec::<String>::new());
    std::fs::rename(world.repository(), world.folder.path().join("elsewhere")).expect("it is ours");
    world.api.keeper.round(jiff::Timestamp::now()).await;
    assert!(!world.repository().exists(), "a mount that is missing is not filled with an empty repository");
    let notices = world.api.keeper.notices();
    assert!(notices.len() == 1 && notices[0].contains("repository main"), "{notices:?}");
}
