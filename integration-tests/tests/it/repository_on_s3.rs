//! The repository's promises over real HTTP, with a store that loses answers, cuts connections and refuses.

use std::time::Duration;

use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::{block_on, runtime};
use walfleet_repository::backup::commit::{BackupSession, SessionSpec};
use walfleet_repository::cluster::OpenCluster;
use walfleet_repository::cluster_log::Author;
use walfleet_repository::format::wal_segment::SegmentFacts;
use walfleet_repository::key_file::{KeyFile, KeyKind};
use walfleet_repository::open::{Initialised, Repository, RepositorySpec};
use walfleet_repository::postgres::{Branch, Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};
use walfleet_repository::signature::Signer;
use walfleet_repository::store::{RetryPolicy, Store, StoreOptions};
use walfleet_repository::wal_archive::{ArchiveError, Archived, OwnedSegment};

const WAL: WalBranch =
    WalBranch { system_id: SystemId(7_412_000_000_000_000_001), timeline: Timeline::FIRST, branch: Branch::ROOT };

/// Its own connection to the bucket, as another host would have.
fn store(server: &S3Server) -> anyhow::Result<Store> {
    let retry = RetryPolicy { deadline: Duration::from_secs(60), ..RetryPolicy::impatient() };
    let options = StoreOptions { settings: server.settings(), retry, ..StoreOptions::default() };
    Ok(Store::open(&server.url("fleet"), &options)?)
}

fn spoil(server: &S3Server) {
    server.spoil(Rule::new(Fault::AnswerLost).method("PUT").one_in(7));
    server.spoil(Rule::new(Fault::Status(503)).one_in(11));
    server.spoil(Rule::new(Fault::Status(409)).method("PUT").one_in(13));
    server.spoil(Rule::new(Fault::TornAnswer(20)).method("GET").one_in(9));
    server.spoil(Rule::new(Fault::TornRequest(10)).method("PUT").one_in(17));
    server.spoil(Rule::new(Fault::Cut).one_in(19));
}

async fn make(server: &S3Server, key: &KeyFile) -> anyhow::Result<Repository> {
    let signer = Signer::from_seed(&key.signing_seed);
    let spec = RepositorySpec { root_public_key: signer.public_key(), recovery_recipient: key.recipient.id() };
    let (_, made) = Repository::init(store(server)?, spec).await?;
    assert!(matches!(made, Initialised::Made { .. }), "{made:?}");
    let (repository, again) = Repository::init(store(server)?, spec).await?;
    assert_eq!(again, Initialised::WasThere);
    Ok(repository)
}

#[test]
fn hosts_that_append_at_once_over_a_bad_line_lose_nothing_and_repeat_nothing() {
    const HOSTS: usize = 4;
    const RUNS: usize = 4;
    in_scratch(|scratch| {
        let server = S3Server::start(&scratch.join("s3"))?;
        let key = KeyFile::generate(KeyKind::Recovery)?;
        block_on(make(&server, &key))?;
        spoil(&server);
        let hosts: Vec<_> = (0..HOSTS)
            .map(|host| {
                let (store, key) = (store(&server), key.clone());
                runtime().spawn(async move {
                    let signer = std::sync::Arc::new(Signer::from_seed(&key.signing_seed));
                    let member = format!("host{host}");
                    let repository = Repository::open(store?, Some(signer.public_key())).await?;
                    let name = "orders".parse()?;
                    let cluster = OpenCluster::open_or_begin(
                        repository,
                        name,
                        &key.recipient,
                        Author::host(&signer),
                        (&member, None),
                    )
                    .await?;
                    for run in 0..RUNS {
                        let spec = SessionSpec { run: Some(format!("{member}-{run}")), wal: WAL, wal_floor: Lsn(0) };
                        let (session, _) = BackupSession::open(cluster.clone(), signer.clone(), &member, spec).await?;
                        session.abort("the test is over").await?;
                    }
                    anyhow::Ok(cluster.domain().clone())
                })
            })
            .collect();
        let domains: Vec<_> =
            block_on(futures::future::try_join_all(hosts))?.into_iter().collect::<anyhow::Result<_>>()?;
        assert!(domains.windows(2).all(|pair| pair[0] == pair[1]), "one domain for all: {domains:?}");
        assert!(server.strikes() > 20, "only {} faults struck", server.strikes());

        server.heal();
        let repository = block_on(Repository::open(store(&server)?, None))?;
        let mut log = repository.cluster_log(&"orders".parse()?);
        let state = block_on(log.refresh())?;
        assert_eq!(state.sessions().count(), HOSTS * RUNS);
        assert_eq!(state.open_sessions().count(), 0);
        assert_eq!(state.voids(), 0);
        Ok(())
    });
}

#[test]
fn a_segment_stored_over_a_bad_line_is_stored_once_and_comes_back_whole() {
    in_scratch(|scratch| {
        let server = S3Server::start(&scratch.join("s3"))?;
        let key = KeyFile::generate(KeyKind::Recovery)?;
        let signer = Signer::from_seed(&key.signing_seed);
        let repository = block_on(make(&server, &key))?;
        let name = "orders".parse()?;
        let cluster = block_on(OpenCluster::open_or_begin(
            repository,
            name,
            &key.recipient,
            Author::host(&signer),
            ("host1", None),
        ))?;
        let archive = cluster.wal_archive(1);
        let size = SegmentSize::new(1 << 20)?;
        let upload = |number: u64, fill: u8, member: &str| OwnedSegment {
            wal: WAL,
            segment: Segment { timeline: Timeline::FIRST, number },
            segment_size: size,
            content: (0..size.bytes()).map(|n| (n as u8).wrapping_mul(fill)).collect(),
            facts: SegmentFacts { valid_bytes: size.bytes(), ..SegmentFacts::default() },
            predecessor: None,
            member: member.to_owned(),
            shipped_at_us: 0,
        };
        spoil(&server);
        for number in 1..=20 {
            let stored = block_on(archive.put_segment(upload(number, 3, "a")))?;
            assert!(matches!(stored, Archived::Stored { .. }), "{number}: {stored:?}");
            let again = block_on(archive.put_segment(upload(number, 3, "b")))?;
            assert_eq!(again, Archived::AlreadyThere, "{number}");
            let other = block_on(archive.put_segment(upload(number, 5, "b")));
            assert!(matches!(other, Err(ArchiveError::Diverged { .. })), "{number}: {other:?}");
            let segment = Segment { timeline: Timeline::FIRST, number };
            let (_, content) = block_on(archive.get_segment(WAL, segment, size))?.expect("stored");
            assert_eq!(content, upload(number, 3, "a").content, "{number}");
        }
        assert!(server.strikes() > 20, "only {} faults struck", server.strikes());
        Ok(())
    });
}
