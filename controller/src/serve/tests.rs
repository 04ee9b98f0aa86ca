//! The door over real TLS: who gets in, as whom, and who does not.

use std::path::Path;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};
use walfleet_proto::agent::v1::enrolment_client::EnrolmentClient;
use walfleet_proto::agent::v1::{JoinReply, JoinRequest, RenewRequest};
use walfleet_proto::operator::v1::access_client::AccessClient;
use walfleet_proto::operator::v1::audit_client::AuditClient;
use walfleet_proto::operator::v1::{
    CreateTokenRequest, ListEntriesRequest, ListTokensRequest, RevokeAgentRequest, RevokeTokenRequest,
    VerifyLogRequest, WhoAmIReply, WhoAmIRequest,
};

use super::*;
use crate::cli::{InitArgs, init};
use crate::identity::authority::{Subject, issue_with_new_key};
use crate::identity::token::{self, NewToken};
use crate::identity::{Role, peer};

/// A fleet's folder, its running controller, and the first admin's context.
struct Fleet {
    folder: tempfile::TempDir,
    running: Running,
    admin: Credentials,
}

#[derive(Clone)]
struct Credentials {
    certificate: String,
    key: String,
}

#[derive(serde::Deserialize)]
struct ContextFile {
    controller: String,
    authorities: String,
    certificate: String,
    key: String,
}

async fn new_fleet(change: impl FnOnce(&mut Config)) -> Fleet {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("controller");
    let args = InitArgs {
        dir: directory.clone(),
        listen: "127.0.0.1:0".parse().unwrap(),
        name: Some("test".to_owned()),
        san: vec!["walfleet.example".to_owned()],
        url: None,
        admin: "admin".to_owned(),
        metrics_listen: Some("127.0.0.1:0".parse().unwrap()),
        recovery_key: None,
    };
    init::init(&args, &mut std::io::sink()).await.unwrap();
    let running = start(config(&directory, change)).await.unwrap();
    let context = std::fs::read_to_string(directory.join(init::CONTEXT_FILE)).unwrap();
    let context: ContextFile = serde_yaml_ng::from_str(&context).unwrap();
    assert_eq!(context.controller, "https://walfleet.example:0");
    assert_eq!(context.authorities, running.foundation.enrolment.authority().pem());
    let admin = Credentials { certificate: context.certificate, key: context.key };
    Fleet { folder, running, admin }
}

fn config(directory: &Path, change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config::load(&directory.join(init::CONFIG_FILE)).unwrap();
    config.shutdown_seconds = 5;
    change(&mut config);
    config
}

impl Fleet {
    async fn connect(&self, credentials: Option<&Credentials>) -> Result<Channel, tonic::transport::Error> {
        let authorities = self.running.foundation.enrolment.authority().pem();
        let mut tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities)).domain_name("walfleet.example");
        if let Some(Credentials { certificate, key }) = credentials {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        let endpoint = Endpoint::from_shared(format!("https://{}", self.running.address)).unwrap();
        endpoint.tls_config(tls)?.connect().await
    }

    async fn access(&self, credentials: &Credentials) -> AccessClient<Channel> {
        AccessClient::new(self.connect(Some(credentials)).await.unwrap())
    }

    async fn who_am_i(&self, credentials: Option<&Credentials>) -> Result<WhoAmIReply, Status> {
        // With TLS 1.3 a certificate that is refused may show only at the first call.
        let channel = self.connect(credentials).await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(AccessClient::new(channel).who_am_i(WhoAmIRequest {}).await?.into_inner())
    }

    async fn token(&self, role: &str) -> String {
        let request = CreateTokenRequest {
            role: role.to_owned(),
            ttl_seconds: 60,
            labels: [("env".into(), "test".into())].into(),
        };
        self.access(&self.admin).await.create_token(request).await.unwrap().into_inner().token
    }

    async fn join(&self, token: &str, name: &str) -> Result<(Credentials, JoinReply), Status> {
        let key = rcgen::KeyPair::generate().unwrap();
        self.join_with(token, name, &key).await
    }

    async fn join_with(
        &self,
        token: &str,
        name: &str,
        key: &rcgen::KeyPair,
    ) -> Result<(Credentials, JoinReply), Status> {
        let request = JoinRequest {
            token: token.to_owned(),
            name: name.to_owned(),
            csr_pem: csr(key),
            writer_public_key: vec![1; 32].into(),
            recipient: vec![2; 32].into(),
            labels: Default::default(),
            hostname: "host".to_owned(),
        };
        let mut client = EnrolmentClient::new(self.connect(None).await.unwrap());
        let reply = client.join(request).await?.into_inner();
        Ok((Credentials { certificate: reply.certificate_pem.clone(), key: key.serialize_pem() }, reply))
    }
}

fn csr(key: &rcgen::KeyPair) -> String {
    rcgen::CertificateParams::default().serialize_request(key).unwrap().pem().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_joins_acts_within_its_role_and_is_revoked() {
    let fleet = new_fleet(|_| {}).await;
    let admin = fleet.who_am_i(Some(&fleet.admin)).await.unwrap();
    assert_eq!((admin.name.as_str(), admin.role.as_str()), ("admin", "admin"));

    let token = fleet.token("agent").await;
    let fingerprint = fleet.running.foundation.enrolment.authority().fingerprint();
    assert!(token.starts_with("wft_") && token.ends_with(&format!(".{fingerprint}")) && fingerprint.len() == 16);
    let key = rcgen::KeyPair::generate().unwrap();
    let (agent, reply) = fleet.join_with(&token, "db1", &key).await.unwrap();
    assert_eq!(reply.role, "agent");
    assert_eq!(fleet.who_am_i(Some(&agent)).await.unwrap().name, "db1");
    let member = fleet.running.foundation.roster().member(&"db1".parse().unwrap()).unwrap();
    assert_eq!((member.labels["env"].as_str(), member.writer_public_key), ("test", Some("01".repeat(32))));

    // The same join again, as after a lost answer, changes nothing; anything else with the token is refused.
    fleet.join_with(&token, "db1", &key).await.unwrap();
    for name in ["db1", "db2"] {
        let refused = fleet.join(&token, name).await.err().unwrap();
        assert_eq!(refused.code(), Code::Unauthenticated);
        assert!(refused.message().contains("was used by db1"), "{refused}");
    }
    let second = fleet.token("agent").await;
    assert_eq!(fleet.join(&second, "db1").await.err().unwrap().code(), Code::AlreadyExists);

    // Roles.
    let mut as_agent = fleet.access(&agent).await;
    let refused = as_agent.list_tokens(ListTokensRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    let (viewer, _) = fleet.join(&fleet.token("viewer").await, "eve").await.unwrap();
    let refused = fleet.access(&viewer).await.create_token(CreateTokenRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert_eq!(fleet.who_am_i(None).await.unwrap_err().code(), Code::Unauthenticated);

    // Revoked: on the open connection, on its streams, on new connections; and the name is free for another key.
    let pem = agent.certificate.as_bytes();
    let der = rustls_pki_types::pem::PemObject::from_pem_slice(pem).unwrap();
    let identity = peer::PeerIdentity::from_certificate(&der).unwrap();
    let roster = fleet.running.foundation.roster().clone();
    let stream = tokio::spawn(async move { roster.until_refused(&identity).await });
    let mut as_admin = fleet.access(&fleet.admin).await;
    as_admin.revoke_agent(RevokeAgentRequest { name: "db1".into() }).await.unwrap();
    let refusal = tokio::time::timeout(Duration::from_secs(5), stream).await.unwrap().unwrap();
    assert!(matches!(refusal, crate::identity::Refusal::Revoked { .. }));
    assert_eq!(as_agent.who_am_i(WhoAmIRequest {}).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(fleet.who_am_i(Some(&agent)).await.unwrap_err().code(), Code::PermissionDenied);
    let (successor, _) = fleet.join(&second, "db1").await.unwrap();
    assert_eq!(fleet.who_am_i(Some(&successor)).await.unwrap().name, "db1");
    assert_eq!(fleet.who_am_i(Some(&agent)).await.unwrap_err().code(), Code::Unauthenticated, "of the older enrolment");

    let error = as_admin.revoke_agent(RevokeAgentRequest { name: "admin".into() }).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "the last admin stays");
    assert!(fleet.running.foundation.audit.verify().await.unwrap().last >= 7);
    let entries = fleet.running.foundation.audit.entries(0, 100).await.unwrap();
    assert!(entries.iter().any(|entry| entry.call == "Access.RevokeAgent" && entry.object == "db1"));
    assert!(entries.iter().all(|entry| !serde_json::to_string(entry).unwrap().contains(&token)));
    fleet.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn admins_read_the_audit_log_and_learn_when_it_was_tampered_with() {
    let fleet = new_fleet(|_| {}).await;
    let (viewer, _) = fleet.join(&fleet.token("viewer").await, "eve").await.unwrap();
    let mut audit = AuditClient::new(fleet.connect(Some(&fleet.admin)).await.unwrap());
    let list = |limit| ListEntriesRequest { since_us: 0, limit };
    let reply = audit.list_entries(list(2)).await.unwrap().into_inner();
    let calls: Vec<_> = reply.entries.iter().map(|entry| entry.call.as_str()).collect();
    assert_eq!((calls, reply.first, reply.last), (vec!["Access.CreateToken", "Enrolment.Join"], 1, 3));
    assert_eq!(audit.list_entries(list(0)).await.unwrap().into_inner().entries.len(), 3);
    let whole = audit.verify_log(VerifyLogRequest {}).await.unwrap().into_inner();
    assert_eq!((whole.last, &whole.head_hash), (3, &reply.entries[1].hash));
    assert_eq!(audit.list_entries(list(u32::MAX)).await.unwrap_err().code(), Code::InvalidArgument);

    let mut as_viewer = AuditClient::new(fleet.connect(Some(&viewer)).await.unwrap());
    assert_eq!(as_viewer.list_entries(list(1)).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(as_viewer.verify_log(VerifyLogRequest {}).await.unwrap_err().code(), Code::PermissionDenied);

    let state = &fleet.running.foundation.state;
    let (entries, _) = state.list("audit/entry/").await.unwrap();
    let changed = String::from_utf8(entries[1].value.to_vec()).unwrap().replace("viewer", "admin");
    state.put(entries[1].key.clone(), changed).await.unwrap();
    let broken = audit.verify_log(VerifyLogRequest {}).await.unwrap_err();
    assert_eq!(broken.code(), Code::DataLoss);
    assert!(broken.message().contains("entry 2"), "{broken}");
    fleet.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_that_are_not_in_force_admit_nobody() {
    let fleet = new_fleet(|_| {}).await;
    let foundation = &fleet.running.foundation;
    let new = NewToken {
        role: Role::Agent,
        ttl: Duration::from_millis(1),
        labels: Default::default(),
        created_by: "admin".to_owned(),
    };
    let (expired, _) = token::create(&foundation.state, "0123456789abcdef", new).await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    let refused = fleet.join(&expired, "db1").await.err().unwrap();
    assert!(refused.code() == Code::Unauthenticated && refused.message().contains("expired"), "{refused}");

    let good = fleet.token("agent").await;
    let (id, _) = good.split_once('.').unwrap();
    let wrong = format!("{id}.{}.0123456789abcdef", "0".repeat(40));
    for bad in [wrong.as_str(), "", "wft_", "wft_a.b.c", "wft_../../x.y.z", &"x".repeat(10_000)] {
        let refused = fleet.join(bad, "db1").await.err().unwrap();
        assert!(refused.code() == Code::Unauthenticated && refused.message().contains("not known"), "{refused}");
    }
    for name in ["", "DB1", "../x", &"a".repeat(64)] {
        assert_eq!(fleet.join(&good, name).await.err().unwrap().code(), Code::InvalidArgument);
    }
    let id = id.strip_prefix("wft_").unwrap().to_owned();
    let mut admin = fleet.access(&fleet.admin).await;
    let listed = admin.list_tokens(ListTokensRequest {}).await.unwrap().into_inner().tokens;
    assert!(listed.iter().any(|token| token.id == id && token.used_by.is_empty() && token.created_by == "admin"));
    admin.revoke_token(RevokeTokenRequest { id: id.clone() }).await.unwrap();
    assert_eq!(admin.revoke_token(RevokeTokenRequest { id }).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(fleet.join(&good, "db1").await.err().unwrap().code(), Code::Unauthenticated);
    let short = CreateTokenRequest { role: "agent".into(), ttl_seconds: 59, labels: Default::default() };
    assert_eq!(admin.create_token(short).await.unwrap_err().code(), Code::InvalidArgument);
    let unknown = CreateTokenRequest { role: "root".into(), ttl_seconds: 60, labels: Default::default() };
    assert_eq!(admin.create_token(unknown).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_another_authority_is_refused() {
    let fleet = new_fleet(|_| {}).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let foreign = Authority::create(elsewhere.path(), "elsewhere").unwrap();
    let subject = Subject { name: &"admin".parse().unwrap(), role: Role::Admin, enrolment: "init" };
    let (key, issued, _) = issue_with_new_key(&foreign, &subject, Duration::from_secs(60)).unwrap();
    let forged = Credentials { certificate: issued.pem, key };
    let refused = fleet.who_am_i(Some(&forged)).await.unwrap_err();
    assert!(!matches!(refused.code(), Code::Ok | Code::PermissionDenied | Code::Unauthenticated), "{refused:?}");
    // Ours, but of nobody who was ever admitted.
    let ours = fleet.running.foundation.enrolment.shared_authority();
    let subject = Subject { name: &"ghost".parse().unwrap(), role: Role::Admin, enrolment: "x" };
    let (key, issued, _) = issue_with_new_key(&ours, &subject, Duration::from_secs(60)).unwrap();
    let ghost = Credentials { certificate: issued.pem, key };
    assert_eq!(fleet.who_am_i(Some(&ghost)).await.unwrap_err().code(), Code::Unauthenticated);
    // A role that its admission did not give.
    let (viewer, _) = fleet.join(&fleet.token("viewer").await, "eve").await.unwrap();
    assert_eq!(fleet.who_am_i(Some(&viewer)).await.unwrap().role, "viewer");
    let member = fleet.running.foundation.roster().member(&"eve".parse().unwrap()).unwrap();
    let subject = Subject { name: &member.name, role: Role::Admin, enrolment: &member.enrolment };
    let (key, issued, _) = issue_with_new_key(&ours, &subject, Duration::from_secs(60)).unwrap();
    let raised = Credentials { certificate: issued.pem, key };
    assert_eq!(fleet.who_am_i(Some(&raised)).await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_certificate_renews_within_its_grace_and_does_nothing_else() {
    let fleet = new_fleet(|config| config.certificates.agent_seconds = 2).await;
    let (agent, _) = fleet.join(&fleet.token("agent").await, "db1").await.unwrap();
    let mut open = fleet.access(&agent).await;
    open.who_am_i(WhoAmIRequest {}).await.unwrap();
    tokio::time::sleep(Duration::from_millis(3100)).await;
    let refused = open.who_am_i(WhoAmIRequest {}).await.unwrap_err();
    assert!(refused.code() == Code::Unauthenticated && refused.message().contains("expired"), "{refused}");
    assert_eq!(fleet.who_am_i(Some(&agent)).await.unwrap_err().code(), Code::Unauthenticated);

    let key = rcgen::KeyPair::generate().unwrap();
    let mut client = EnrolmentClient::new(fleet.connect(Some(&agent)).await.unwrap());
    let renewed = client.renew(RenewRequest { csr_pem: csr(&key) }).await.unwrap().into_inner();
    let renewed = Credentials { certificate: renewed.certificate_pem, key: key.serialize_pem() };
    assert_eq!(fleet.who_am_i(Some(&renewed)).await.unwrap().name, "db1");
    let mut nobody = EnrolmentClient::new(fleet.connect(None).await.unwrap());
    let refused = nobody.renew(RenewRequest { csr_pem: csr(&key) }).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_controller_knows_its_members_and_health_follows_its_life() {
    let fleet = new_fleet(|_| {}).await;
    let (agent, _) = fleet.join(&fleet.token("agent").await, "db1").await.unwrap();
    let metrics = fleet.running.metrics_address.unwrap();
    let (health, text) = (get(metrics, "/healthz").await, get(metrics, "/metrics").await);
    assert!(health.starts_with("HTTP/1.1 200"), "{health}");
    let joined =
        "walfleet_controller_calls_total{service=\"walfleet.agent.v1.Enrolment\",method=\"Join\",code=\"OK\"} 1";
    assert!(text.contains(joined), "{text}");

    let directory = fleet.folder.path().join("controller");
    let second = start(config(&directory, |_| {})).await.err().unwrap();
    assert!(matches!(second, StartError::State(StateError::Locked { .. })), "{second}");
    let Fleet { folder, running, admin } = fleet;
    running.stop().await.unwrap();
    let running = start(config(&directory, |_| {})).await.unwrap();
    let fleet = Fleet { folder, running, admin };
    assert_eq!(fleet.who_am_i(Some(&agent)).await.unwrap().name, "db1");
    fleet.running.stop().await.unwrap();
}

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    use tokio::io::AsyncWriteExt;
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_and_surplus_connections_are_closed() {
    let fleet = new_fleet(|config| {
        config.limits.handshake_seconds = 1;
        config.limits.connections = 2;
    })
    .await;
    let mut silent = tokio::net::TcpStream::connect(fleet.running.address).await.unwrap();
    let _other = tokio::net::TcpStream::connect(fleet.running.address).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut surplus = tokio::net::TcpStream::connect(fleet.running.address).await.unwrap();
    let closed = tokio::time::timeout(Duration::from_millis(700), surplus.read_u8()).await;
    assert!(closed.expect("at once").is_err());
    let closed = tokio::time::timeout(Duration::from_secs(5), silent.read_u8()).await;
    assert!(closed.expect("after the handshake's deadline").is_err());
    tokio::time::sleep(Duration::from_millis(200)).await;
    fleet.who_am_i(Some(&fleet.admin)).await.expect("the places are free again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_certificate_is_renewed_under_running_connections() {
    let fleet = new_fleet(|config| config.certificates.server_seconds = 3).await;
    let mut open = fleet.access(&fleet.admin).await;
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        open.who_am_i(WhoAmIRequest {}).await.unwrap();
        fleet.who_am_i(Some(&fleet.admin)).await.unwrap();
    }
}

#[tokio::test]
async fn init_refuses_a_folder_that_holds_anything_and_run_one_that_holds_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let args = |dir: &Path| InitArgs {
        dir: dir.to_owned(),
        listen: "127.0.0.1:7400".parse().unwrap(),
        name: None,
        san: vec![],
        url: None,
        admin: "admin".to_owned(),
        metrics_listen: None,
        recovery_key: None,
    };
    std::fs::write(folder.path().join("precious"), "").unwrap();
    let error = init::init(&args(folder.path()), &mut std::io::sink()).await.unwrap_err();
    assert!(error.to_string().contains("precious"), "{error}");
    let bad = InitArgs { san: vec!["bad name".to_owned()], ..args(&folder.path().join("new")) };
    assert!(init::init(&bad, &mut std::io::sink()).await.is_err());
    assert!(!folder.path().join("new").exists());

    let mut said = Vec::new();
    init::init(&args(&folder.path().join("new")), &mut said).await.unwrap();
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("new/recovery.key") && said.contains("safe place"), "{said}");
    let empty = Config { directory: folder.path().join("nothing"), ..Config::default() };
    assert!(matches!(start(empty).await.err().unwrap(), StartError::NotInitialised { .. }));
}
