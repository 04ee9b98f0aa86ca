//! Mutual TLS and logging in, against a controller with real certificates.

use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, IsCa, Issuer, KeyPair};
use tonic::Status;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};
use walfleet_ctl::Exit;
use walfleet_proto::agent::v1::{JoinReply, JoinRequest};

use crate::canned::fleet;
use crate::controller::{Controller, Script};
use crate::terminal::Terminal;

/// A certificate authority.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    fingerprint: String,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, name);
        let certificate = parameters.self_signed(&key).unwrap();
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate.der());
        let fingerprint = digest.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Authority { pem: certificate.pem(), issuer: Issuer::new(parameters, key), fingerprint }
    }

    /// Certificate and key.
    fn leaf(&self, names: &[&str], until: (i32, u8, u8)) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut parameters = CertificateParams::new(names.clone()).unwrap();
        parameters.distinguished_name.push(DnType::CommonName, names[0].clone());
        parameters.not_before = rcgen::date_time_ymd(2020, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(until.0, until.1, until.2);
        (parameters.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    fn context(&self, address: impl std::fmt::Display, authorities: &str, until: (i32, u8, u8)) -> String {
        let (certificate, key) = self.leaf(&["ann"], until);
        let block = |text: &str| text.lines().map(|line| format!("  {line}\n")).collect::<String>();
        format!(
            "controller: https://{address}\nauthorities: |\n{}certificate: |\n{}key: |\n{}",
            block(authorities),
            block(&certificate),
            block(&key)
        )
    }

    /// A controller that this authority certified, showing its chain down from the authority.
    async fn controller(&self, names: &[&str], script: Script) -> Controller {
        let (certificate, key) = self.leaf(names, LATER);
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(format!("{certificate}{}", self.pem), key))
            .client_ca_root(Certificate::from_pem(&self.pem))
            .client_auth_optional(true);
        Controller::start(script, Some(tls)).await
    }

    async fn strict_controller(&self) -> Controller {
        let (certificate, key) = self.leaf(&["127.0.0.1"], LATER);
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(certificate, key))
            .client_ca_root(Certificate::from_pem(&self.pem));
        Controller::start(fleet(), Some(tls)).await
    }
}

const LATER: (i32, u8, u8) = (2099, 1, 1);

#[tokio::test]
async fn a_certified_operator_is_let_in() {
    let fleet_authority = Authority::new("fleet");
    let controller = fleet_authority.strict_controller().await;
    let context = fleet_authority.context(controller.address, &fleet_authority.pem, LATER);
    let answer = Terminal::alone().with_context(&context).types("walfleet status -o json").await;
    assert_eq!(answer.exit, Exit::Done, "{answer:?}");
    assert_eq!(answer.json()["controller"], "ctl-1");
}

#[tokio::test]
async fn foreign_expired_and_misnamed_certificates_are_told_apart() {
    let ours = Authority::new("ours");
    let theirs = Authority::new("theirs");
    let controller = ours.strict_controller().await;
    let said = async |context: String, exit: Exit, text: &str| {
        let answer = Terminal::alone().with_context(&context).types("walfleet status").await;
        assert_eq!(answer.exit, exit, "{answer:?}");
        assert!(answer.stderr.contains(text) && answer.stderr.contains("\nHINT: "), "{answer:?}");
    };
    let foreign = theirs.context(controller.address, &ours.pem, LATER);
    said(foreign, Exit::Refused, "refuses this operator's certificate: another authority issued it").await;
    let expired = ours.context(controller.address, &ours.pem, (2021, 1, 1));
    said(expired, Exit::Refused, "refuses this operator's certificate: it has expired").await;
    let other_fleet = theirs.context(controller.address, &theirs.pem, LATER);
    said(other_fleet, Exit::Unreachable, "authorities did not issue").await;
    let misnamed = ours.controller(&["walfleet.example.org"], fleet()).await;
    let context = ours.context(misnamed.address, &ours.pem, LATER);
    said(context.clone(), Exit::Unreachable, "walfleet.example.org").await;
    let answer = Terminal::alone()
        .with_context(&format!("{context}server_name: walfleet.example.org\n"))
        .types("walfleet status")
        .await;
    assert_eq!(answer.exit, Exit::Done, "{answer:?}");
    let plain = Controller::with(fleet()).await;
    said(ours.context(plain.address, &ours.pem, LATER), Exit::Unreachable, "does not speak TLS").await;
}

/// Signs what a good token asks for.
fn admitting(authority: &Authority, role: &'static str) -> Script {
    let pem = authority.pem.clone();
    let key = KeyPair::from_pem(&authority.issuer.key().serialize_pem()).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&pem, key).unwrap();
    let admission = move |request: &JoinRequest| {
        assert!(request.token.contains(".secret."), "{}", request.token);
        let csr =
            CertificateSigningRequestParams::from_pem(&request.csr_pem).map_err(|_| Status::invalid_argument(""))?;
        let certificate = csr.signed_by(&issuer).map_err(|_| Status::internal(""))?;
        Ok(JoinReply {
            certificate_pem: certificate.pem(),
            authorities_pem: pem.clone(),
            not_after_us: 0,
            role: role.to_owned(),
        })
    };
    Script { admission: Some(Box::new(admission)), ..fleet() }
}

#[tokio::test]
async fn logging_in_makes_a_context_that_works() {
    let authority = Authority::new("fleet");
    let controller = authority.controller(&["127.0.0.1"], admitting(&authority, "operator")).await;
    let terminal = Terminal::alone();
    let token = format!("wft_1.secret.{}", authority.fingerprint);
    let line = format!("walfleet login --controller https://{} --token {token}", controller.address);
    let answer = terminal.types(&format!("{line} -o json")).await;
    assert_eq!(answer.exit, Exit::Done, "{answer:?}");
    let shown = answer.json();
    assert_eq!(
        (&shown["name"], &shown["role"], &shown["context"]),
        (&"ann".into(), &"operator".into(), &"127.0.0.1".into())
    );
    assert_eq!(terminal.types("walfleet status").await.exit, Exit::Done);
    let key = |terminal: &Terminal| {
        let text = std::fs::read_to_string(terminal.path(".config/walfleet/contexts/127.0.0.1.yaml")).unwrap();
        serde_yaml_ng::from_str::<serde_json::Value>(&text).unwrap()["key"].clone()
    };
    let before = key(&terminal);
    assert_eq!(terminal.types(&line).await.exit, Exit::Done, "again, with another token");
    assert_eq!(key(&terminal), before, "a living name keeps its key");
    let list = terminal.types("walfleet context list -o json").await.json();
    assert_eq!(list["contexts"][0]["operator"], "ann");
}

#[tokio::test]
async fn a_certificate_renews_itself_with_the_same_key() {
    let authority = Authority::new("fleet");
    let controller = authority.controller(&["127.0.0.1"], admitting(&authority, "operator")).await;
    let context = authority.context(controller.address, &authority.pem, LATER);
    let early = Terminal::alone().with_context(&context);
    assert_eq!(early.types("walfleet status").await.exit, Exit::Done);
    assert_eq!(early.context_now(), context, "nothing is due");
    let late = Terminal::alone().with_context(&context).at_time("2090-01-01T00:00:00Z");
    let answer = late.types("walfleet status").await;
    assert_eq!((answer.exit, answer.stderr.as_str()), (Exit::Done, ""), "{answer:?}");
    let renewed = late.context_now();
    assert_ne!(renewed, context);
    let read = |text: &str| serde_yaml_ng::from_str::<serde_json::Value>(text).unwrap();
    assert_eq!(read(&renewed)["key"], read(&context)["key"]);
    assert_eq!(late.types("walfleet cluster list").await.exit, Exit::Done, "the new one works");
    // Not renewed, and still good: the command goes on, with a warning.
    controller.script().admission = None;
    let refused = Terminal::alone().with_context(&context).at_time("2090-01-01T00:00:00Z");
    let answer = refused.types("walfleet status").await;
    assert_eq!(answer.exit, Exit::Done);
    assert!(answer.stderr.contains("was not renewed: renew certificate: the authority is asleep"), "{answer:?}");
}

#[tokio::test]
async fn a_token_is_never_sent_to_a_controller_it_does_not_name() {
    let authority = Authority::new("fleet");
    // It would admit anybody.
    let impostor = Authority::new("impostor");
    let controller = impostor.controller(&["127.0.0.1"], admitting(&impostor, "admin")).await;
    let token = format!("wft_1.secret.{}", authority.fingerprint);
    let line = format!("walfleet login --controller https://{} --token {token}", controller.address);
    let answer = Terminal::alone().types(&line).await;
    assert_eq!(answer.exit, Exit::Unreachable, "{answer:?}");
    assert!(answer.stderr.contains("no certificate it shows has the token's fingerprint"), "{answer:?}");
    assert!(!answer.stderr.contains("secret"), "{answer:?}");
    // The right authority in the chain does not help a server that it did not certify.
    let (certificate, key) = impostor.leaf(&["127.0.0.1"], LATER);
    let chain = Identity::from_pem(format!("{certificate}{}", authority.pem), key);
    let tls = ServerTlsConfig::new().identity(chain);
    let controller = Controller::start(admitting(&impostor, "admin"), Some(tls)).await;
    let line = format!("walfleet login --controller https://{} --token {token}", controller.address);
    let answer = Terminal::alone().types(&line).await;
    assert_eq!(answer.exit, Exit::Unreachable, "{answer:?}");
}

#[tokio::test]
async fn logins_that_cannot_work_say_why() {
    let authority = Authority::new("fleet");
    let controller = authority.controller(&["127.0.0.1"], admitting(&authority, "agent")).await;
    let token = format!("wft_1.secret.{}", authority.fingerprint);
    let url = format!("https://{}", controller.address);
    for (line, exit, text) in [
        (format!("--controller {url} --token {token}"), Exit::Refused, "admits an agent"),
        (format!("--controller {url} --token abc"), Exit::Usage, "not a join token"),
        (format!("--controller {url} --token {token} --name Ann!"), Exit::Usage, "cannot be an operator's name"),
        (format!("--controller http://example.org --token {token}"), Exit::Usage, "without encryption"),
        (format!("--controller example.org --token {token}"), Exit::Usage, "https://HOST:PORT"),
    ] {
        let answer = Terminal::alone().types(&format!("walfleet login {line}")).await;
        assert_eq!(answer.exit, exit, "{answer:?}");
        assert!(answer.stderr.contains(text), "{answer:?}");
    }
    controller.script().admission = None;
    let answer =
        Terminal::typing(&format!("{token}\n")).types(&format!("walfleet login --controller {url} --token -")).await;
    assert_eq!(answer.exit, Exit::Refused, "{answer:?}");
    assert!(answer.stderr.contains("the token is used\nHINT: "), "{answer:?}");
}
