//! Admission against a real state: what two can do at once, and whose name it is.

use super::*;
use crate::identity::token::{NewToken, create};
use crate::state::embedded::Options;

struct Desk {
    _folder: tempfile::TempDir,
    state: State,
    enrolment: Arc<Enrolment>,
}

async fn desk(agent_lifetime: Duration) -> Desk {
    let folder = tempfile::tempdir().unwrap();
    let state = State::open(&folder.path().join("state"), Options::default()).unwrap();
    let authority = Arc::new(Authority::create(folder.path(), "test").unwrap());
    let roster = Roster::open(state.clone()).await.unwrap();
    let lifetimes =
        Lifetimes { agent: agent_lifetime, operator: Duration::from_secs(600), renewal_grace: Duration::ZERO };
    let enrolment = Arc::new(Enrolment::new(state.clone(), authority, roster, lifetimes));
    Desk { _folder: folder, state, enrolment }
}

impl Desk {
    async fn token(&self, role: Role) -> String {
        let labels = [("env".to_owned(), "prod".to_owned())].into();
        let new = NewToken { role, ttl: Duration::from_secs(60), labels, created_by: "ann".to_owned() };
        create(&self.state, "0123456789abcdef", new).await.unwrap().0
    }
}

fn join(token: &str, name: &str) -> Join {
    let key = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
    Join {
        token: token.to_owned(),
        name: name.to_owned(),
        csr_pem: csr.pem().unwrap(),
        writer_public_key: vec![1; 32],
        recipient: vec![2; 32],
        labels: [("env".to_owned(), "dev".to_owned()), ("rack".to_owned(), "7".to_owned())].into(),
        hostname: "host".to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_admits_one_member_however_many_try_at_once() {
    let desk = desk(Duration::from_secs(60)).await;
    for _ in 0..5 {
        let token = desk.token(Role::Agent).await;
        let tries = (0..8).map(|i| {
            let (enrolment, join) =
                (desk.enrolment.clone(), join(&token, &format!("db{i}-{}", token[4..14].to_owned())));
            tokio::spawn(async move { enrolment.join(&join).await })
        });
        let answers = futures::future::try_join_all(tries).await.unwrap();
        assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
        for refused in answers.into_iter().filter_map(Result::err) {
            assert!(matches!(refused, EnrolmentError::UsedToken { .. }), "{refused}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_goes_to_one_of_those_who_ask_for_it_at_once() {
    let desk = desk(Duration::from_secs(60)).await;
    let mut tries = Vec::new();
    for _ in 0..6 {
        let (enrolment, join) = (desk.enrolment.clone(), join(&desk.token(Role::Agent).await, "db1"));
        tries.push(tokio::spawn(async move { enrolment.join(&join).await }));
    }
    let answers = futures::future::try_join_all(tries).await.unwrap();
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
}

#[tokio::test]
async fn a_name_is_taken_over_only_when_its_holder_is_gone() {
    let desk = desk(Duration::from_secs(1)).await;
    let first = join(&desk.token(Role::Agent).await, "db1");
    let (member, _) = desk.enrolment.join(&first).await.unwrap();
    assert_eq!(member.labels["env"], "prod", "the token's labels are over the host's");
    assert_eq!(member.labels["rack"], "7");

    // Nobody else while it lives, in whatever role; itself, with a new token, may.
    for role in [Role::Agent, Role::Admin] {
        let taken = desk.enrolment.join(&join(&desk.token(role).await, "db1")).await;
        assert!(matches!(taken, Err(EnrolmentError::NameTaken { .. })));
    }
    let again = Join { token: desk.token(Role::Agent).await, ..first.clone() };
    assert_ne!(desk.enrolment.join(&again).await.unwrap().0.enrolment, member.enrolment);

    // Its certificate ended.
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let (successor, _) = desk.enrolment.join(&join(&desk.token(Role::Viewer).await, "db1")).await.unwrap();
    assert_eq!((successor.role, successor.writer_public_key), (Role::Viewer, None));
    let late = desk.enrolment.join(&again).await;
    assert!(matches!(late, Err(EnrolmentError::UsedToken { .. })), "a lost name does not come back with an old token");
}

#[tokio::test]
async fn an_agent_without_its_keys_and_labels_that_select_nothing_are_refused() {
    let desk = desk(Duration::from_secs(60)).await;
    let token = desk.token(Role::Agent).await;
    let good = join(&token, "db1");
    let bad = [
        Join { writer_public_key: vec![1; 31], ..good.clone() },
        Join { recipient: Vec::new(), ..good.clone() },
        Join { hostname: "h".repeat(256), ..good.clone() },
        Join { labels: [("a b".to_owned(), String::new())].into(), ..good.clone() },
        Join { labels: (0..65).map(|i| (format!("l{i}"), String::new())).collect(), ..good.clone() },
        Join { csr_pem: "no".to_owned(), ..good.clone() },
    ];
    for bad in bad {
        let refused = desk.enrolment.join(&bad).await.unwrap_err();
        assert!(matches!(refused, EnrolmentError::Invalid { .. } | EnrolmentError::Request(_)), "{refused}");
    }
    desk.enrolment.join(&good).await.expect("a refusal does not use up the token");
}
