//! The S3 server of the tests does what S3 promises, and its faults are what they say: else every test on it is void.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{
    ClientOptions, Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, RetryConfig,
};
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::s3::{ACCESS_KEY_ID, BUCKET, REGION, S3Server, SECRET_ACCESS_KEY};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::{block_on, runtime};
use walfleet_repository::store::{Creation, RetryPolicy, Store};

/// Without retries: the test wants to see what the server did.
fn client(server: &S3Server) -> AmazonS3 {
    AmazonS3Builder::new()
        .with_endpoint(server.endpoint())
        .with_allow_http(true)
        .with_region(REGION)
        .with_bucket_name(BUCKET)
        .with_access_key_id(ACCESS_KEY_ID)
        .with_secret_access_key(SECRET_ACCESS_KEY)
        .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() })
        .with_client_options(ClientOptions::new().with_timeout(Duration::from_secs(2)).with_allow_http(true))
        .build()
        .expect("complete")
}

#[test]
fn of_32_concurrent_creates_exactly_one_succeeds() {
    in_scratch(|scratch| {
        let server = S3Server::start(&scratch.join("s3"))?;
        let store = Arc::new(client(&server));
        for round in 0..10 {
            let key = Path::from(format!("once/{round}"));
            let creates: Vec<_> = (0..32u8)
                .map(|writer| {
                    let (store, key) = (store.clone(), key.clone());
                    runtime().spawn(async move {
                        store.put_opts(&key, vec![writer; 1000].into(), PutOptions::from(PutMode::Create)).await
                    })
                })
                .collect();
            let outcomes = block_on(async { futures::future::join_all(creates).await });
            let winners: Vec<u8> = outcomes
                .into_iter()
                .zip(0u8..)
                .filter_map(|(outcome, writer)| match outcome.expect("no panic") {
                    Ok(_) => Some(writer),
                    Err(Error::AlreadyExists { .. }) => None,
                    Err(other) => panic!("writer {writer}: {other}"),
                })
                .collect();
            let stored = block_on(async { store.get(&key).await?.bytes().await })?;
            assert_eq!(winners.len(), 1, "round {round}: {winners:?}");
            assert_eq!(stored.first(), winners.first());
        }
        Ok(())
    });
}

#[test]
fn faults_are_what_they_say_and_hosts_may_not_delete() {
    in_scratch(|scratch| {
        let server = S3Server::start(&scratch.join("s3"))?;
        let store = client(&server);
        let key = Path::from("some/object");
        let put = |bytes: &'static [u8]| block_on(store.put(&key, bytes.into()));
        let get = || block_on(async { store.get(&key).await?.bytes().await });

        server.spoil(Rule::new(Fault::Status(503)).method("PUT").times(1));
        assert!(put(b"one").unwrap_err().to_string().contains("SlowDown"));
        assert!(matches!(get(), Err(Error::NotFound { .. })));

        server.spoil(Rule::new(Fault::TornRequest(1)).times(1));
        put(b"one").unwrap_err();
        assert!(matches!(get(), Err(Error::NotFound { .. })));

        server.spoil(Rule::new(Fault::AnswerLost).path_contains("some/").times(1));
        put(b"one").unwrap_err();
        assert_eq!(get()?, "one");

        server.spoil(Rule::new(Fault::TornAnswer(2)).method("GET").times(1));
        get().unwrap_err();

        server.spoil(Rule::new(Fault::Hang).times(1));
        assert!(get().unwrap_err().to_string().contains("HTTP error"));

        server.spoil(Rule::new(Fault::Cut).after(1));
        assert_eq!(get()?, "one");
        get().unwrap_err();
        assert_eq!(server.strikes(), 6);
        server.heal();
        assert_eq!(get()?, "one");

        let suffix = GetOptions { range: Some(GetRange::Suffix(100)), ..GetOptions::default() };
        assert_eq!(block_on(async { store.get_opts(&key, suffix).await?.bytes().await })?, "one");
        assert!(matches!(block_on(store.delete(&key)), Err(Error::PermissionDenied { .. })));
        Ok(())
    });
}

#[test]
fn the_repository_settles_a_create_whose_answer_was_lost() {
    in_scratch(|scratch| {
        let server = S3Server::start(&scratch.join("s3"))?;
        let store = Store::wrap(Arc::new(client(&server)), &server.url("x"), RetryPolicy::default());
        let key = Path::from("clusters/orders/log/1");
        for fault in [Fault::AnswerLost, Fault::Status(409), Fault::Status(503), Fault::Cut, Fault::TornRequest(3)] {
            server.spoil(Rule::new(fault).method("PUT").times(1));
            let key = key.clone().join(format!("{fault:?}"));
            assert_eq!(block_on(store.create(&key, "mine".into()))?, Creation::Created, "{fault:?}");
            assert_eq!(block_on(store.create(&key, "other".into()))?, Creation::AlreadyThere, "{fault:?}");
        }
        Ok(())
    });
}
