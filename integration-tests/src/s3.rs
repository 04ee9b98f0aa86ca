//! A real S3 server in this process, over HTTP with signed requests, whose answers can be spoiled.
//!
//! The protocol and the files are s3s's; ours are the faults ([`fault`]), the record of requests, and the atomicity of
//! conditional writes: s3s-fs looks first and renames later, so two creates of one key could both succeed. Requests that
//! carry a condition therefore pass one at a time per key.

mod access;
pub mod fault;

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, HttpError, HttpResponse};
use s3s_fs::FileSystem;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use crate::{block_on, runtime};
use access::HostPolicy;
use fault::{Fault, Faults, Rule};

pub const BUCKET: &str = "backups";
pub const ACCESS_KEY_ID: &str = "walfleet-test";
pub const SECRET_ACCESS_KEY: &str = "not-a-secret";
pub const REGION: &str = "us-east-1";

/// One request as it came, whatever became of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    pub method: String,
    /// Bucket and key, without the leading slash.
    pub path: String,
    /// When it came.
    pub at: Instant,
}

/// Ends with its handle; connections are cut.
pub struct S3Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    service: S3Service,
    faults: Faults,
    seen: Mutex<Vec<Seen>>,
    /// One lock per key that was ever written under a condition.
    conditional: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl S3Server {
    /// Serves a folder; what an earlier server stored there is there again.
    pub fn start(folder: &Path) -> anyhow::Result<S3Server> {
        S3Server::start_at(folder, Ipv4Addr::LOCALHOST)
    }

    pub fn start_at(folder: &Path, address: Ipv4Addr) -> anyhow::Result<S3Server> {
        std::fs::create_dir_all(folder.join(BUCKET)).with_context(|| format!("create {}", folder.display()))?;
        let files =
            FileSystem::new(folder).map_err(|error| anyhow::anyhow!("serve {}: {error:?}", folder.display()))?;
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY_ID, SECRET_ACCESS_KEY));
        builder.set_access(HostPolicy { folder: folder.to_owned() });
        let shared = Arc::new(Shared {
            service: builder.build(),
            faults: Faults::default(),
            seen: Mutex::default(),
            conditional: Mutex::default(),
        });
        let listener = block_on(TcpListener::bind((address, 0))).context("listen for S3 requests")?;
        let address = listener.local_addr().context("ask for the S3 server's port")?;
        let accepting = runtime().spawn(accept(listener, shared.clone()));
        Ok(S3Server { address, shared, accepting })
    }

    /// "http://127.0.0.1:12345"
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// For a repository below `prefix` in the bucket.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// What a repository's `options` say about the way here.
    pub fn options(&self) -> BTreeMap<String, String> {
        let options = [("endpoint", self.endpoint()), ("allow_http", "true".to_owned()), ("region", REGION.to_owned())];
        options.map(|(name, value)| (name.to_owned(), value)).into()
    }

    /// What a process needs in its environment.
    pub fn credentials(&self) -> Vec<(String, String)> {
        let pairs = [("AWS_ACCESS_KEY_ID", ACCESS_KEY_ID), ("AWS_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY)];
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    /// Options and credentials in one, for this process only.
    pub fn settings(&self) -> BTreeMap<String, String> {
        let credentials = [("access_key_id", ACCESS_KEY_ID), ("secret_access_key", SECRET_ACCESS_KEY)];
        let mut settings = self.options();
        settings.extend(credentials.map(|(name, value)| (name.to_owned(), value.to_owned())));
        settings
    }

    /// Spoils answers from now on, as the rule says.
    pub fn spoil(&self, rule: Rule) {
        self.shared.faults.add(rule);
    }

    /// Forgets all rules.
    pub fn heal(&self) {
        self.shared.faults.clear();
    }

    /// How often rules have struck since the start.
    pub fn strikes(&self) -> u64 {
        self.shared.faults.strikes()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().expect("no holder panics").clone()
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Owns the connections' tasks, so that they end with it.
async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        // Both may be dropped at any await: a connection not yet accepted stays in the backlog.
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let _ = stream.set_nodelay(true);
                    let shared = shared.clone();
                    connections.spawn(async move {
                        let service = service_fn(move |request| answer(shared.clone(), request));
                        // An aborted connection is a fault on purpose, or the client's business.
                        let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                    });
                }
                // Out of descriptors, most likely.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(shared: Arc<Shared>, request: http::Request<Incoming>) -> Result<HttpResponse, HttpError> {
    let path = request.uri().path().trim_start_matches('/').to_owned();
    let method = request.method().to_string();
    shared.seen.lock().expect("no holder panics").push(Seen {
        method: method.clone(),
        path: path.clone(),
        at: Instant::now(),
    });
    match shared.faults.strike(&method, &path) {
        None => shared.serve(request, &path).await,
        Some(Fault::Status(status)) => {
            // As S3 does, the body is read first: a client that is still sending would not see the answer.
            let _ = request.into_body().collect().await;
            Ok(fault::refusal(status))
        }
        Some(Fault::Slow(delay)) => {
            tokio::time::sleep(delay).await;
            shared.serve(request, &path).await
        }
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Cut) => Err(cut()),
        Some(Fault::TornRequest(bytes)) => {
            fault::read_some(request.into_body(), bytes).await;
            Err(cut())
        }
        Some(Fault::AnswerLost) => {
            shared.serve(request, &path).await?;
            Err(cut())
        }
        Some(Fault::TornAnswer(bytes)) => fault::tear(shared.serve(request, &path).await?, bytes).await,
    }
}

impl Shared {
    async fn serve(&self, request: http::Request<Incoming>, path: &str) -> Result<HttpResponse, HttpError> {
        let conditional = ["if-none-match", "if-match"].iter().any(|name| request.headers().contains_key(*name));
        if !conditional || request.method() != http::Method::PUT {
            return self.service.call(request.map(Body::from)).await;
        }
        let lock = self.conditional.lock().expect("no holder panics").entry(path.to_owned()).or_default().clone();
        // The body is read before the lock is taken, so that a client that stalls delays only itself.
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(|error| HttpError::new(error.into()))?.to_bytes();
        let _one_at_a_time = lock.lock().await;
        self.service.call(http::Request::from_parts(head, Body::from(body))).await
    }
}

/// Makes hyper close the connection without an answer.
fn cut() -> HttpError {
    HttpError::new("cut on purpose".into())
}
