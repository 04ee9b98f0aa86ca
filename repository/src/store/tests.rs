use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::faulty::{Fault, FaultyStore, On};
use super::*;

fn key() -> Path {
    Path::from("clusters/orders/log/00000000000000000000")
}

fn faulty(seed: u64) -> (Arc<FaultyStore>, Store) {
    let faulty = FaultyStore::in_memory(seed);
    let store = Store::wrap(faulty.clone(), "faulty:///", RetryPolicy::impatient());
    (faulty, store)
}

fn folder() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().join("repository").display());
    let options = StoreOptions { folder: Folder::Create, retry: RetryPolicy::impatient(), ..StoreOptions::default() };
    let store = Store::open(&url, &options).unwrap();
    (folder, store)
}

fn bytes(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

#[tokio::test]
async fn a_folder_creates_once_reads_parts_and_lists() {
    let (_folder, store) = folder();
    assert_eq!(store.list(&Path::from("clusters")).await.unwrap(), []);
    assert_eq!(store.create(&key(), bytes("0123456789")).await.unwrap(), Creation::Created);
    assert_eq!(store.create(&key(), bytes("0123456789")).await.unwrap(), Creation::Created, "our own bytes");
    assert_eq!(store.create(&key(), bytes("9876543210")).await.unwrap(), Creation::AlreadyThere);
    assert_eq!(store.get(&key()).await.unwrap(), "0123456789");
    assert_eq!(store.get_range(&key(), 2..5).await.unwrap(), "234");
    assert_eq!(store.get_suffix(&key(), 4).await.unwrap(), (bytes("6789"), 10));
    assert_eq!(store.get_suffix(&key(), 400).await.unwrap(), (bytes("0123456789"), 10));
    assert_eq!(store.head(&key()).await.unwrap(), 10);
    let error = store.get_range(&key(), 8..12).await.unwrap_err();
    assert_eq!(error.kind(), &StoreErrorKind::OutOfRange { start: 8, end: 12, size: 10 });
    assert!(store.get(&Path::from("absent")).await.unwrap_err().is_not_found());
    assert_eq!(store.get_at_most(&key(), 10).await.unwrap(), "0123456789");
    let error = store.get_at_most(&key(), 9).await.unwrap_err();
    assert_eq!(error.kind(), &StoreErrorKind::TooLarge { size: 10, most: 9 });
    let listed = store.list(&Path::from("clusters")).await.unwrap();
    assert_eq!(listed.iter().map(|one| (&one.key, one.size)).collect::<Vec<_>>(), [(&key(), 10)]);
    let level = store.list_level(&Path::from("clusters")).await.unwrap();
    assert_eq!(level.folders, [Path::from("clusters/orders")]);
    assert_eq!(store.counters().puts, 3);
}

#[tokio::test]
async fn a_lost_reply_is_not_taken_for_a_competitor() {
    let (faulty, store) = faulty(1);
    faulty.inject(Fault::LoseReply, On::Put, "log", 1);
    assert_eq!(store.create(&key(), bytes("ours")).await.unwrap(), Creation::Created);
    assert_eq!(store.get(&key()).await.unwrap(), "ours");
    faulty.inject(Fault::LoseReply, On::Put, "log", 1);
    assert_eq!(store.create(&key(), bytes("theirs")).await.unwrap(), Creation::AlreadyThere);
}

#[tokio::test]
async fn a_conflict_under_which_nothing_lies_is_tried_again() {
    let (faulty, store) = faulty(1);
    faulty.inject(Fault::Conflict, On::Put, "log", 3);
    assert_eq!(store.create(&key(), bytes("ours")).await.unwrap(), Creation::Created);
    assert_eq!(store.get(&key()).await.unwrap(), "ours");
    assert_eq!(store.counters().retries, 3);
}

#[tokio::test]
async fn passing_faults_are_outlasted_and_lasting_ones_are_named() {
    let (faulty, store) = faulty(1);
    store.put_new(&key(), bytes("body")).await.unwrap();
    for fault in [Fault::Reject, Fault::LoseReply, Fault::Truncate, Fault::Hang] {
        faulty.inject(fault, On::Get, "log", 2);
        assert_eq!(store.get(&key()).await.unwrap(), "body", "{fault:?}");
    }
    faulty.inject(Fault::Reject, On::List, "", 2);
    assert_eq!(store.list(&Path::from("clusters")).await.unwrap().len(), 1);

    faulty.inject(Fault::Deny, On::Any, "", u64::MAX);
    let error = store.get(&key()).await.unwrap_err();
    assert_eq!(error.kind(), &StoreErrorKind::Unauthorized);
    assert!(error.to_string().starts_with("read \"clusters/orders/log/"), "{error}");
    assert!(error.to_string().contains("\nHINT: "), "{error}");
    faulty.heal();

    faulty.inject(Fault::Reject, On::Any, "", u64::MAX);
    let soon = RetryPolicy { deadline: Duration::from_millis(50), ..RetryPolicy::impatient() };
    let store = Store::wrap(faulty.clone(), "faulty:///", soon);
    let error = store.create(&key(), bytes("body")).await.unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("attempts in"), "{error}");
}

#[tokio::test]
async fn creates_by_many_have_one_winner_through_random_faults() {
    for seed in 0..20 {
        let (faulty, store) = faulty(seed);
        for (fault, probability) in [(Fault::LoseReply, 0.3), (Fault::Conflict, 0.2), (Fault::Reject, 0.2)] {
            faulty.inject_randomly(fault, On::Put, "", probability);
        }
        faulty.inject_randomly(Fault::Truncate, On::Get, "", 0.2);
        let store = &store;
        let creates = (0..8u8)
            .map(|writer| async move { (writer, store.create(&key(), Bytes::from(vec![writer; 100])).await.unwrap()) });
        let outcomes = futures::future::join_all(creates).await;
        let winners: Vec<u8> =
            outcomes.iter().filter(|(_, outcome)| *outcome == Creation::Created).map(|(writer, _)| *writer).collect();
        assert_eq!(winners.len(), 1, "seed {seed}");
        faulty.heal();
        assert_eq!(store.get(&key()).await.unwrap(), vec![winners[0]; 100], "seed {seed}");
    }
}

#[tokio::test]
async fn the_probe_tells_an_atomic_store_from_one_that_overwrites() {
    let (_folder, store) = folder();
    let report = probe::probe(&store).await.unwrap();
    assert!(report.is_atomic(), "{report:?}");
    assert_eq!((report.creates, report.winners), (32, 1));

    let store = Store::wrap(Arc::new(Overwriting(FaultyStore::in_memory(1))), "garage:///", RetryPolicy::impatient());
    let report = probe::probe(&store).await.unwrap();
    assert!(!report.is_atomic(), "{report:?}");

    let (faulty, store) = self::faulty(1);
    faulty.inject(Fault::Deny, On::Any, "", u64::MAX);
    assert_eq!(probe::probe(&store).await.unwrap_err().kind(), &StoreErrorKind::Unauthorized);
}

/// Ignores the condition of a create, as one widely used server does.
#[derive(Debug)]
struct Overwriting(Arc<FaultyStore>);

impl fmt::Display for Overwriting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Overwriting({})", self.0)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Overwriting {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> object_store::Result<object_store::PutResult> {
        self.0.put_opts(location, payload, PutOptions { mode: PutMode::Overwrite, ..opts }).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: object_store::PutMultipartOptions,
    ) -> object_store::Result<Box<dyn object_store::MultipartUpload>> {
        self.0.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.0.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: futures::stream::BoxStream<'static, object_store::Result<Path>>,
    ) -> futures::stream::BoxStream<'static, object_store::Result<Path>> {
        self.0.delete_stream(locations)
    }

    fn list(
        &self,
        prefix: Option<&Path>,
    ) -> futures::stream::BoxStream<'static, object_store::Result<object_store::ObjectMeta>> {
        self.0.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<object_store::ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: object_store::CopyOptions) -> object_store::Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

#[test]
fn urls_and_settings_that_cannot_work_are_refused_with_what_would() {
    let open = |url: &str, settings: &[(&str, &str)]| {
        let settings = settings.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Store::open(url, &StoreOptions { settings, ..StoreOptions::default() }).map(|_| ())
    };
    for (url, part) in [
        ("backups", "not a repository URL"),
        ("ftp://host/path", "\"ftp\" is not a kind of store"),
        ("file://host/path", "three slashes"),
        ("file:///nowhere/at/all", "is not a folder"),
        ("s3:///prefix", "no bucket"),
    ] {
        let error = open(url, &[]).unwrap_err().to_string();
        assert!(error.contains(part) && error.matches("HINT: ").count() == 1, "{url}: {error}");
    }
    let error = open("s3://key:secret@bucket/x", &[]).unwrap_err().to_string();
    assert!(error.contains("holds no credentials") && !error.contains("secret@"), "{error}");
    let region = ("region", "eu-1");
    assert!(open("s3://bucket/x", &[("endpont", "http://x"), region]).unwrap_err().to_string().contains("endpont"));
    assert!(open("s3://bucket/x", &[("allow_http", "yes"), region]).unwrap_err().to_string().contains("true or false"));
    assert!(open("s3://bucket/x", &[("endpoint", "http://127.0.0.1:1"), ("allow_http", "true"), region]).is_ok());
    let secret = StoreOptions {
        settings: [("secret_access_key".to_owned(), "geheim".to_owned())].into(),
        ..StoreOptions::default()
    };
    assert!(!format!("{secret:?}").contains("geheim"));
}

/// Answers every request with the next of these status lines, the last one for ever.
async fn canned_server(statuses: &'static [&'static str]) -> (String, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let served = Arc::new(AtomicUsize::new(0));
    let counter = served.clone();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let status = statuses[counter.fetch_add(1, Ordering::SeqCst).min(statuses.len() - 1)];
            let mut request = vec![0; 8192];
            let _ = connection.read(&mut request).await;
            let body = "<Error><Code>Canned</Code></Error>";
            let reply =
                format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
            let _ = connection.write_all(reply.as_bytes()).await;
        }
    });
    (endpoint, served)
}

#[tokio::test]
async fn http_answers_mean_what_they_should() {
    let cases: [(&'static [&'static str], StoreErrorKind, usize); 4] = [
        (&["403 Forbidden"], StoreErrorKind::Unauthorized, 1),
        (&["404 Not Found"], StoreErrorKind::NotFound, 1),
        (&["400 Bad Request"], StoreErrorKind::Other, 1),
        (&["503 Slow Down", "500 Oops", "429 Too Many Requests", "404 Not Found"], StoreErrorKind::NotFound, 4),
    ];
    for (statuses, kind, requests) in cases {
        let (endpoint, served) = canned_server(statuses).await;
        let settings = [
            ("endpoint", endpoint.as_str()),
            ("allow_http", "true"),
            ("region", "us-east-1"),
            ("access_key_id", "key"),
            ("secret_access_key", "secret"),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let options = StoreOptions { settings, retry: RetryPolicy::impatient(), ..StoreOptions::default() };
        let store = Store::open("s3://bucket/prefix", &options).unwrap();
        let error = store.get(&key()).await.unwrap_err();
        assert_eq!(error.kind(), &kind, "{statuses:?}: {error}");
        assert_eq!(served.load(Ordering::SeqCst), requests, "{statuses:?}");
    }
    let settings = [("endpoint", "http://127.0.0.1:1"), ("allow_http", "true"), ("region", "us-east-1")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let keys = [("access_key_id", "k"), ("secret_access_key", "s")].map(|(n, v)| (n.to_owned(), v.to_owned()));
    let options = StoreOptions {
        settings: settings.into_iter().chain(keys).collect(),
        retry: RetryPolicy::never(),
        ..StoreOptions::default()
    };
    let store = Store::open("s3://bucket/prefix", &options).unwrap();
    let error = store.get(&key()).await.unwrap_err();
    assert_eq!(error.kind(), &StoreErrorKind::Unreachable, "{error}");
    let text = error.to_string();
    assert!(text.to_lowercase().contains("connect") && text.matches("HINT: ").count() == 1, "{text}");
}

#[tokio::test]
async fn what_somebody_waits_for_is_sent_again_when_no_answer_comes_and_its_failure_is_told_soon() {
    let faulty = FaultyStore::in_memory(1);
    let patient = Store::wrap(faulty.clone(), "faulty:///", RetryPolicy::default());
    let key = Path::from("tails/1");
    faulty.inject(Fault::Hang, On::Put, "tails", 1);
    let begun = std::time::Instant::now();
    let created = patient.hurried(0).create(&key, Bytes::from_static(b"piece")).await.unwrap();
    assert_eq!(created, Creation::Created);
    assert!((3..6).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    faulty.inject(Fault::Reject, On::Any, "tails", u64::MAX);
    let begun = std::time::Instant::now();
    patient.hurried(0).create(&Path::from("tails/2"), Bytes::from_static(b"piece")).await.unwrap_err();
    assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    let timeout = |tries| RetryPolicy::default().hurried(tries).request_timeout.as_secs();
    assert_eq!([0, 1, 2, 3, 40].map(timeout), [4, 8, 16, 30, 30]);
    assert_eq!(RetryPolicy::impatient().hurried(0), RetryPolicy::impatient());
}
