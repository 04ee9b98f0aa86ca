//! A controller for tests: a certificate authority of its own, both services, and nothing decided: tests say what it
//! answers and read what it was told.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType, IsCa, KeyPair,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Certificate, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};
use walfleet_proto::agent::v1::agent_link_server::{AgentLink, AgentLinkServer};
use walfleet_proto::agent::v1::enrolment_server::{Enrolment, EnrolmentServer};
use walfleet_proto::agent::v1::{
    AgentMessage, ControllerMessage, JoinReply, JoinRequest, RenewReply, RenewRequest, Welcome, agent_message,
    controller_message,
};

use crate::identity::token::AuthorityFingerprint;

type Authority = CertifiedIssuer<'static, KeyPair>;

pub struct FakeController {
    pub port: u16,
    pub authority: Arc<Authority>,
    /// Streams, as they come.
    pub streams: mpsc::Receiver<FakeStream>,
    pub joins: Arc<Mutex<Vec<JoinRequest>>>,
    /// Of the certificates it issues, relative to now.
    pub validity: Arc<Mutex<(time::Duration, time::Duration)>>,
    server: tokio::task::JoinHandle<()>,
}

/// The controller's side of one agent's stream.
pub struct FakeStream {
    from_agent: Streaming<AgentMessage>,
    to_agent: mpsc::Sender<Result<ControllerMessage, Status>>,
}

struct Services {
    authority: Arc<Authority>,
    streams: mpsc::Sender<FakeStream>,
    joins: Arc<Mutex<Vec<JoinRequest>>>,
    validity: Arc<Mutex<(time::Duration, time::Duration)>>,
}

pub fn new_authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "test fleet");
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

impl FakeController {
    pub async fn start() -> FakeController {
        FakeController::start_with(new_authority(), "localhost", time::Duration::days(1)).await
    }

    /// With a server certificate for `name` that is good until `server_validity` from now.
    pub async fn start_with(authority: Authority, name: &str, server_validity: time::Duration) -> FakeController {
        let authority = Arc::new(authority);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = time::OffsetDateTime::now_utc() - time::Duration::days(2);
        params.not_after = time::OffsetDateTime::now_utc() + server_validity;
        let leaf = params.signed_by(&key, &authority).unwrap();
        // The authority is sent along: joining hosts know it only by its fingerprint.
        let chain = leaf.pem() + &authority.pem();
        let tls = ServerTlsConfig::new()
            .identity(tonic::transport::Identity::from_pem(chain, key.serialize_pem()))
            .client_ca_root(Certificate::from_pem(authority.pem()))
            .client_auth_optional(true);

        let (sender, streams) = mpsc::channel(16);
        let joins = Arc::new(Mutex::new(Vec::new()));
        let validity = Arc::new(Mutex::new((-time::Duration::HOUR, time::Duration::DAY)));
        let services = Arc::new(Services {
            authority: Arc::clone(&authority),
            streams: sender,
            joins: Arc::clone(&joins),
            validity: Arc::clone(&validity),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(EnrolmentServer::from_arc(Arc::clone(&services)))
            .add_service(AgentLinkServer::from_arc(services))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move { server.await.unwrap() });
        FakeController { port, authority, streams, joins, validity, server }
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    pub fn token(&self) -> String {
        format!("wft_1.good.{}", AuthorityFingerprint::of_certificate(self.authority.der()))
    }

    pub async fn next_stream(&mut self) -> FakeStream {
        tokio::time::timeout(Duration::from_secs(20), self.streams.recv()).await.expect("a stream").unwrap()
    }
}

impl Drop for FakeController {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeStream {
    pub async fn send(&self, message: controller_message::Message) {
        self.to_agent.send(Ok(ControllerMessage { message: Some(message) })).await.unwrap();
    }

    pub async fn welcome(&self, leader_epoch: u64) {
        self.send(controller_message::Message::Welcome(Welcome {
            controller: "test".into(),
            heartbeat_seconds: 1,
            facts_interval_seconds: 60,
            leader_epoch,
        }))
        .await;
    }

    /// The next message that `pick` wants; others are passed over.
    pub async fn expect<T>(&mut self, what: &str, pick: impl Fn(agent_message::Message) -> Option<T>) -> T {
        let search = async {
            loop {
                let message = self.from_agent.message().await.unwrap().expect("the stream is open");
                if let Some(found) = message.message.and_then(&pick) {
                    return found;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), search).await.unwrap_or_else(|_| panic!("no {what}"))
    }

    /// Waits for the agent to end the stream.
    pub async fn ended(mut self) {
        let drain = async { while let Ok(Some(_)) = self.from_agent.message().await {} };
        tokio::time::timeout(Duration::from_secs(20), drain).await.expect("the agent ends the stream");
    }
}

impl Services {
    fn sign(&self, csr_pem: &str, name: &str) -> String {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        let (from, to) = *self.validity.lock().unwrap();
        request.params.not_before = time::OffsetDateTime::now_utc() + from;
        request.params.not_after = time::OffsetDateTime::now_utc() + to;
        request.params.distinguished_name.push(DnType::CommonName, name);
        request.signed_by(&self.authority).unwrap().pem()
    }
}

#[tonic::async_trait]
impl Enrolment for Services {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let request = request.into_inner();
        if !request.token.starts_with("wft_1.good.") {
            return Err(Status::unauthenticated("the token expired 5 minutes ago"));
        }
        if request.name == "taken" {
            return Err(Status::already_exists("it was seen 3 s ago"));
        }
        let certificate_pem = self.sign(&request.csr_pem, &request.name);
        self.joins.lock().unwrap().push(request);
        Ok(Response::new(JoinReply {
            certificate_pem,
            authorities_pem: self.authority.pem(),
            not_after_us: 0,
            role: "agent".into(),
        }))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewReply>, Status> {
        if request.peer_certs().is_none_or(|certificates| certificates.is_empty()) {
            return Err(Status::unauthenticated("no certificate"));
        }
        let certificate_pem = self.sign(&request.into_inner().csr_pem, "renewed");
        Ok(Response::new(RenewReply { certificate_pem, authorities_pem: self.authority.pem(), not_after_us: 0 }))
    }
}

#[tonic::async_trait]
impl AgentLink for Services {
    type AttachStream = ReceiverStream<Result<ControllerMessage, Status>>;

    async fn attach(&self, request: Request<Streaming<AgentMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        if request.peer_certs().is_none_or(|certificates| certificates.is_empty()) {
            return Err(Status::unauthenticated("no certificate"));
        }
        let (to_agent, outbound) = mpsc::channel(16);
        let stream = FakeStream { from_agent: request.into_inner(), to_agent };
        self.streams.send(stream).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}
