use super::*;
use crate::jobs::work::VerifyWork;
use crate::state::embedded::Options;

fn now() -> Timestamp {
    Timestamp::from_second(1_780_000_000).unwrap()
}

fn request(by: &str, key: Option<&str>) -> NewJob {
    NewJob {
        cluster: "orders".parse().unwrap(),
        work: Work::Verify(VerifyWork { repository: "main".to_owned(), backup: None, deep: false }),
        on: None,
        requested_by: by.to_owned(),
        run: None,
        idempotency_key: key.map(str::to_owned),
        traceparent: String::new(),
        retries: 0,
    }
}

#[tokio::test]
async fn a_request_that_is_repeated_finds_its_job_even_of_another_store_and_nobody_elses() {
    let folder = tempfile::tempdir().unwrap();
    let state = State::open(&folder.path().join("state"), Options::default()).unwrap();
    let (jobs, others) = (Jobs::open(state.clone()).await.unwrap(), Jobs::open(state).await.unwrap());
    let made = |jobs: &Jobs, new: NewJob| {
        let jobs = jobs.clone();
        async move { jobs.create(new, Txn::default(), now()).await.unwrap().unwrap().id }
    };
    let first = made(&jobs, request("ann", Some("a"))).await;
    assert_eq!(made(&others, request("ann", Some("a"))).await, first);
    assert_ne!(made(&jobs, request("bob", Some("a"))).await, first, "another's key");
    assert_ne!(made(&jobs, request("ann", Some("b"))).await, first);
    assert_ne!(made(&jobs, request("ann", None)).await, made(&jobs, request("ann", None)).await);
    assert_eq!(jobs.active().await.unwrap().len(), 5);
    assert_eq!(jobs.get(&first).await.unwrap().requested_by, "ann");
}

#[tokio::test]
async fn a_job_whose_companions_do_not_hold_is_not_made() {
    let folder = tempfile::tempdir().unwrap();
    let state = State::open(&folder.path().join("state"), Options::default()).unwrap();
    let jobs = Jobs::open(state.clone()).await.unwrap();
    let absent =
        || Txn::default().when(Compare::absent("cursor".to_owned())).then(put_row("cursor".to_owned(), &1).unwrap());
    assert!(jobs.create(request("schedule", None), absent(), now()).await.unwrap().is_some());
    assert!(jobs.create(request("schedule", None), absent(), now()).await.unwrap().is_none());
    assert_eq!(jobs.active().await.unwrap().len(), 1);
    let unknown = "job_unknown".parse().unwrap();
    assert!(matches!(jobs.get(&unknown).await, Err(JobStoreError::NotFound { job }) if job == unknown));
}
