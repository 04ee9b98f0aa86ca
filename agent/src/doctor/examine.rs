//! Looking at everything that protection depends on, without changing it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use walfleet_repository::cluster::{ClusterError, OpenCluster};
use walfleet_repository::store::probe::probe;

use super::{Diagnosis, Finding, ServerView, server_findings};
use crate::access::{Access, AccessError, ClusterAccess, HostKey, InstanceAccess, RepositoryAccess};
use crate::config::Config;
use crate::desired::DesiredStore;
use crate::identity::connect::{self, chain};
use crate::identity::{Identity, IdentityFolder};
use crate::postgres::control::ControlFile;
use crate::postgres::instance;
use crate::postgres::server::{Server, ServerFacts, ServerRole};
use crate::wal::client;
use crate::wal::socket::{Reply, Request};
use crate::wire;

const AGENT: &str = "agent";

/// A repository or server that says nothing for this long is not reachable, for a person who waits.
const PATIENCE: Duration = Duration::from_secs(60);

/// A difference of clocks that certificates and logs bear without harm, and one that they do not.
const CLOCK_ADVICE: SignedDuration = SignedDuration::from_secs(5);
const CLOCK_FIX: SignedDuration = SignedDuration::from_secs(60);

/// Whether repositories are asked to prove an atomic create, which leaves a small object behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Probe {
    Yes,
    No,
}

/// Examines this host. `program` is what archive_command should name.
pub async fn examine(config: &Config, program: &Path, probe: Probe) -> Diagnosis {
    let socket = socket(config).await;
    let mut findings = Vec::new();
    let access = match &config.repository {
        Some(_) => standalone(config, socket, &mut findings),
        None => member(config, socket, &mut findings).await,
    };
    let Some(access) = access else {
        return Diagnosis::new(findings);
    };
    for problem in &access.problems {
        let (message, fix) = problem.split_once("\nHINT: ").unwrap_or((problem, "see the message"));
        findings.push(Finding::fix("binding", AGENT, message, fix));
    }
    for repository in access.repositories.values() {
        findings.extend(look_at_repository(repository, probe).await);
    }
    if access.clusters.values().all(|cluster| cluster.instance.is_none()) {
        let fix = "name this host's instances in the agent's configuration";
        findings.push(Finding::advice("instances", AGENT, "no instance of this host is protected", fix));
    }
    for cluster in access.clusters.values() {
        findings.push(key(&access, cluster).await);
        if let Some(instance) = &cluster.instance {
            findings.extend(look_at_instance(cluster, instance, config, program).await);
        }
    }
    Diagnosis::new(findings)
}

async fn socket(config: &Config) -> Finding {
    const CHECK: &str = "socket";
    let path = config.socket_path();
    let asked = path.clone();
    let answer = tokio::task::spawn_blocking(move || client::ask(&asked, &Request::Ping {})).await;
    match answer {
        Ok(Ok(Reply::Done)) => Finding::ok(CHECK, AGENT, format!("the agent answers at {}", path.display())),
        Ok(Ok(Reply::Failed { message })) => Finding::fix(CHECK, AGENT, message, "look into the agent's log"),
        Ok(Err(error)) => Finding::fix(
            CHECK,
            AGENT,
            format!("no agent answers at {}: {error}", path.display()),
            "systemctl enable --now walfleet-agent",
        ),
        Err(error) => Finding::fix(CHECK, AGENT, error.to_string(), "report this as a bug"),
    }
}

/// What an agent needs before it can run comes before `socket`, whose advice is to start it.
fn standalone(config: &Config, socket: Finding, findings: &mut Vec<Finding>) -> Option<Access> {
    let access = key_file(config, findings);
    findings.push(socket);
    access
}

fn key_file(config: &Config, findings: &mut Vec<Finding>) -> Option<Access> {
    let repository = config.repository.as_ref()?;
    let name = match config.agent_name() {
        Ok(name) => name,
        Err(error) => {
            findings.push(Finding::fix("name", AGENT, error.to_string(), "set name in the configuration"));
            return None;
        }
    };
    match HostKey::read(&repository.key_file) {
        Ok(key) => {
            findings.push(Finding::ok("key_file", AGENT, repository.key_file.display().to_string()));
            Some(Access::standalone(config, name, repository, key))
        }
        Err(error) => {
            findings.push(Finding::from_error("key_file", AGENT, &error));
            None
        }
    }
}

/// As with [`standalone`]: joining comes before starting.
async fn member(config: &Config, socket: Finding, findings: &mut Vec<Finding>) -> Option<Access> {
    let Some(controller) = &config.controller else {
        let (message, fix) = ("neither a controller nor a repository is configured", "deploy/agent.yaml shows both");
        findings.extend([Finding::fix("configuration", AGENT, message, fix), socket]);
        return None;
    };
    let folder = IdentityFolder::new(&config.state_dir);
    let identity = match folder.load() {
        Ok(identity) => identity,
        Err(error) => {
            findings.extend([Finding::from_error("identity", AGENT, &error), socket]);
            return None;
        }
    };
    findings.extend([certificate(&identity, Timestamp::now()), socket]);
    findings.extend(look_at_controller(&controller.url, &identity).await);
    let bound = match DesiredStore::open(&config.state_dir) {
        Ok(store) => {
            let desired = store.watch().borrow().clone();
            desired.map(|desired| Access::member(config, &identity, folder.host_key_path(), &desired))
        }
        Err(error) => {
            findings.push(Finding::from_error("desired_state", AGENT, &error));
            return None;
        }
    };
    match bound {
        Some(Ok(access)) => Some(access),
        Some(Err(error)) => {
            findings.push(Finding::from_error("desired_state", AGENT, &error));
            None
        }
        None => {
            let message = "the controller has not said yet what this host is to do";
            findings.push(Finding::fix(
                "desired_state",
                AGENT,
                message,
                "start the agent, and let it reach the controller",
            ));
            None
        }
    }
}

fn certificate(identity: &Identity, now: Timestamp) -> Finding {
    const CHECK: &str = "certificate";
    let (name, until) = (identity.name(), identity.not_after());
    let clock = "set this host's clock (timedatectl, chronyc tracking); if it is right, join again with a new token";
    if now < identity.not_before() {
        return Finding::fix(CHECK, AGENT, format!("{name}: it is good from {} on only", identity.not_before()), clock);
    }
    if now >= until {
        return Finding::fix(CHECK, AGENT, format!("{name}: it expired at {until}"), clock);
    }
    Finding::ok(CHECK, AGENT, format!("{name}, until {until}"))
}

async fn look_at_controller(url: &str, identity: &Identity) -> Vec<Finding> {
    const CHECK: &str = "controller";
    let trust = match identity.trust() {
        Ok(trust) => trust,
        Err(error) => return vec![Finding::from_error(CHECK, url, &error)],
    };
    let channel = match connect::connect(url, &trust).await {
        Ok(channel) => channel,
        Err(error) => return vec![Finding::from_error(CHECK, url, &error)],
    };
    let met = wire::who_am_i(channel).await;
    let reached = match met.known_as {
        Ok((name, role)) => Finding::ok(CHECK, url, format!("it answers, and knows this host as {role} {name}")),
        Err(refused) => {
            let (message, hint) =
                refused.split_once("\nHINT: ").unwrap_or((&refused, "look into the controller's log"));
            Finding::fix(CHECK, url, format!("it does not take this host for a member: {message}"), hint)
        }
    };
    let compared =
        met.clock.map(|theirs| clocks("clock", url, "the controller's", Timestamp::now().duration_since(theirs)));
    std::iter::once(reached).chain(compared).collect()
}

fn clocks(check: &'static str, subject: &str, whose: &str, ahead: SignedDuration) -> Finding {
    let (by, way) = (ahead.abs(), if ahead.is_negative() { "behind" } else { "ahead of" });
    let message = format!("this host's clock is {} s {way} {whose}", by.as_secs());
    let fix = "timedatectl set-ntp true, on both hosts";
    if by > CLOCK_FIX {
        Finding::fix(check, subject, message, fix)
    } else if by > CLOCK_ADVICE {
        Finding::advice(check, subject, message, fix)
    } else {
        Finding::ok(check, subject, format!("as {whose}, within {} s", by.as_secs().max(1)))
    }
}

async fn look_at_repository(repository: &RepositoryAccess, wanted: Probe) -> Vec<Finding> {
    const CHECK: &str = "repository";
    let late = || {
        let message = format!("{}: no answer within {} s", repository.url, PATIENCE.as_secs());
        Finding::fix(
            CHECK,
            &repository.name,
            message,
            "check the network, and the endpoint in the repository's options",
        )
    };
    let opened = match tokio::time::timeout(PATIENCE, repository.open()).await {
        Ok(Ok(opened)) => opened,
        Ok(Err(error)) => return vec![Finding::from_error(CHECK, &repository.name, &error)],
        Err(_) => return vec![late()],
    };
    let mut findings = vec![Finding::ok(CHECK, &repository.name, format!("{} is reachable", repository.url))];
    if wanted == Probe::Yes {
        findings.push(match tokio::time::timeout(PATIENCE, probe(opened.store())).await {
            Ok(Ok(report)) if report.is_atomic() => {
                Finding::ok("store_probe", &repository.name, format!("atomic: 1 of {} creates won", report.creates))
            }
            Ok(Ok(report)) => Finding::fix(
                "store_probe",
                &repository.name,
                format!("the store lets {} of {} concurrent creates of one object win", report.winners, report.creates),
                "use a store with conditional writes; this one can only be written to through a controller",
            ),
            Ok(Err(error)) => Finding::from_error("store_probe", &repository.name, &error),
            Err(_) => late(),
        });
    }
    findings
}

/// Whether this host can read what lies there of the cluster.
async fn key(access: &Access, cluster: &ClusterAccess) -> Finding {
    const CHECK: &str = "cluster_key";
    let subject = cluster.name.as_str();
    let opening = async {
        let repository = cluster.repository.open().await?;
        Ok::<_, AccessError>(OpenCluster::open(repository, cluster.name.clone(), &access.key.file.recipient).await?)
    };
    match tokio::time::timeout(PATIENCE, opening).await {
        Ok(Ok(_)) => Finding::ok(CHECK, subject, "this host can open it"),
        Ok(Err(AccessError::Cluster(ClusterError::Unknown(_)))) => {
            Finding::ok(CHECK, subject, "nothing is stored yet; the first to archive WAL makes the key")
        }
        Ok(Err(error)) => Finding::from_error(CHECK, subject, &error),
        Err(_) => Finding::fix(CHECK, subject, "the repository did not answer", "check the network"),
    }
}

async fn look_at_instance(
    cluster: &ClusterAccess,
    instance: &InstanceAccess,
    config: &Config,
    program: &Path,
) -> Vec<Finding> {
    let subject = cluster.name.as_str();
    let folder = instance.data_dir.clone();
    let readable = tokio::task::spawn_blocking(move || look_at_data_dir(&folder)).await;
    let mut findings = Vec::new();
    match readable {
        Ok(Ok(())) => {
            findings.push(Finding::ok("data_dir", subject, instance.data_dir.display().to_string()));
        }
        Ok(Err(problem)) => {
            let fix = "run the agent as the user that owns it (User= in the unit), or correct the instance's data_dir";
            findings.push(Finding::fix("data_dir", subject, problem, fix));
        }
        Err(error) => findings.push(Finding::fix("data_dir", subject, error.to_string(), "report this as a bug")),
    }
    findings.extend(match tokio::time::timeout(PATIENCE, look_at_server(subject, instance, config, program)).await {
        Ok(findings) => findings,
        Err(_) => vec![Finding::fix("postgres", subject, "the server does not answer", "look into the server's log")],
    });
    findings
}

/// Reads what only the owner may read.
fn look_at_data_dir(data_dir: &Path) -> Result<(), String> {
    instance::inspect(data_dir).map_err(|error| hintless(&error))?;
    ControlFile::read(data_dir).map_err(|error| hintless(&error))?;
    let base = data_dir.join("base");
    std::fs::read_dir(&base).map(|_| ()).map_err(|error| format!("read {}: {error}", base.display()))
}

fn hintless(error: &dyn std::error::Error) -> String {
    chain(error).lines().filter(|line| !line.starts_with("HINT: ")).collect::<Vec<_>>().join(" ")
}

async fn look_at_server(subject: &str, instance: &InstanceAccess, config: &Config, program: &Path) -> Vec<Finding> {
    const CHECK: &str = "postgres";
    let connection = match instance.connection_string() {
        Ok(connection) => connection,
        Err(error) => return vec![Finding::from_error(CHECK, subject, &error)],
    };
    let asked = async {
        let server = Server::connect(&connection).await?;
        let facts = server.facts().await?;
        let rights = server.rights().await?;
        let slot = server.slot(&config.wal.slot).await?;
        Ok::<_, crate::postgres::server::ServerError>((facts, rights, slot))
    };
    let (facts, rights, slot) = match asked.await {
        Ok(asked) => asked,
        Err(error) => return vec![Finding::from_error(CHECK, subject, &error)],
    };
    let mut findings = vec![server_is_the_one(subject, instance, &facts)];
    if let Ok(theirs) = Timestamp::from_microsecond(facts.clock_us) {
        findings.push(clocks("server_clock", subject, "the server's", Timestamp::now().duration_since(theirs)));
    }
    let socket: PathBuf = config.socket_path();
    let view = ServerView {
        facts: &facts,
        rights: Some(&rights),
        socket: Some(&socket),
        program: Some(program),
        // A standby is followed without a connection that stays open.
        streams: slot.is_some_and(|slot| slot.is_active || facts.role == ServerRole::Standby),
        shipping: config.wal.shipping(),
    };
    findings.extend(server_findings(subject, &view));
    findings
}

/// The server that answers must be the one whose files are read.
fn server_is_the_one(subject: &str, instance: &InstanceAccess, facts: &ServerFacts) -> Finding {
    const CHECK: &str = "postgres";
    let fix = "correct the instance's connection or data_dir";
    let version = format!("PostgreSQL {}.{} answers", facts.version_num / 10_000, facts.version_num % 10_000);
    match ControlFile::read(&instance.data_dir) {
        Ok(control) if control.system_id != facts.system_id => Finding::fix(
            CHECK,
            subject,
            format!(
                "the server that answers is system {}, and {} is system {}",
                facts.system_id,
                instance.data_dir.display(),
                control.system_id
            ),
            fix,
        ),
        // Unreadable files have their own finding.
        _ => Finding::ok(CHECK, subject, version),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::config::ControllerConfig;

    #[test]
    fn clocks_that_differ_are_told_apart_by_how_much() {
        let verdict = |seconds| clocks("clock", "x", "theirs", SignedDuration::from_secs(seconds)).verdict;
        assert_eq!((verdict(-3), verdict(10), verdict(-61)), (Verdict::Ok, Verdict::Advice, Verdict::Fix));
    }

    #[tokio::test]
    async fn a_bare_host_is_told_what_to_do_first() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config { state_dir: folder.path().to_owned(), ..Config::default() };
        let diagnosis = examine(&config, Path::new("walfleet-agent"), Probe::No).await;
        assert!(!diagnosis.healthy);
        let checks: Vec<_> = diagnosis.findings.iter().map(|finding| finding.check).collect();
        assert_eq!(checks, ["configuration", "socket"], "to be started once it is configured");
        let controller = ControllerConfig { url: "https://127.0.0.1:1".into() };
        let config = Config { controller: Some(controller), ..config };
        let diagnosis = examine(&config, Path::new("walfleet-agent"), Probe::No).await;
        let fixes: Vec<_> = diagnosis.findings.iter().filter_map(|finding| finding.fix.as_deref()).collect();
        assert!(fixes[0].contains("join") && fixes[1].contains("systemctl"), "{fixes:?}");
    }
}
