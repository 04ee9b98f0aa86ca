use std::sync::Arc;

use super::*;
use crate::fleet::clusters::{Enrolled, Pin, assemble};
use crate::fleet::observed::{AgentObserved, FactsObserved, HelloObserved, InstanceObserved};
use crate::fleet::samples;
use crate::jobs::JobState;
use crate::jobs::work::{BackupPlanWork, BackupWork, VerifyWork, Work};
use crate::resources::document;
use crate::resources::stored::Catalog;
use walfleet_repository::postgres::Lsn;

const NOW: i64 = 1_780_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(NOW + seconds).expect("in range")
}

fn agent(role: InstanceRole, lsn: u64, connected: bool) -> AgentSeen {
    let instance = InstanceObserved { role, current_lsn: Some(Lsn(lsn)), ..samples::instance("orders", 7) };
    let hello = HelloObserved { capabilities: vec!["backup".to_owned(), "restore".to_owned()], ..samples::hello() };
    let facts = FactsObserved { at: at(0), received_at: at(0), instances: vec![instance] };
    let observed = AgentObserved { hello: Some(hello), facts: Some(facts), last_seen: Some(at(0)) };
    AgentSeen {
        observed: Arc::new(observed),
        connected,
        vouches: connected,
        last_seen: Some(at(0)),
        enrolled: Enrolled::default(),
    }
}

fn catalog(prefer: &str) -> Catalog {
    let text = format!(
        "apiVersion: walfleet/v1\nkind: Repository\nname: main\nspec: {{url: 'file:///r'}}\n---\n\
         apiVersion: walfleet/v1\nkind: Policy\nname: gold\nspec: {{selector: '', repository: main, backup: {{prefer: {prefer}}}}}\n"
    );
    document::parse(&text).expect("good").into_iter().collect()
}

fn job(id: &str, work: Work, state: JobState, agent: Option<&str>) -> Job {
    Job {
        id: id.parse().expect("an id"),
        agent: agent.map(str::to_owned),
        state,
        ..crate::jobs::samples::queued(work, at(0))
    }
}

fn backup() -> Work {
    Work::Backup(BackupWork {
        repository: "main".to_owned(),
        fast_checkpoint: true,
        read_all: false,
        compression_level: None,
        processes: None,
    })
}

fn verify() -> Work {
    Work::Verify(VerifyWork { repository: "main".to_owned(), backup: None, deep: false })
}

fn queued() -> JobState {
    JobState::Queued { reason: String::new(), not_before: at(0) }
}

fn decide(jobs: &[Job], agents: &[(&str, AgentSeen)], prefer: &str) -> Vec<String> {
    let agents: BTreeMap<String, AgentSeen> =
        agents.iter().map(|(name, seen)| ((*name).to_owned(), seen.clone())).collect();
    let members = BTreeSet::new();
    let pin =
        Pin { system_identifier: 7, discovered_by: "db1".to_owned(), discovered_at: at(0), members, repository: None };
    let pins = [("orders".parse().expect("a name"), pin)].into();
    let catalog = catalog(prefer);
    let assembly = assemble(at(0), &agents, &pins, &catalog);
    plan(at(0), jobs, &agents, &assembly)
        .into_iter()
        .map(|(_, decision)| match decision {
            Decision::Offer { agent } => format!("to {agent}"),
            Decision::Wait { reason } => reason,
        })
        .collect()
}

#[test]
fn the_member_for_a_backup_is_the_preferred_one_among_those_that_are_fit() {
    use InstanceRole::{Down, Primary, Standby};
    let one = [job("job_1", backup(), queued(), None)];
    let (primary, near, far) = (agent(Primary, 100, true), agent(Standby, 90, true), agent(Standby, 50, true));
    let away = agent(Standby, 95, false);
    let table = [
        (vec![("db1", primary.clone()), ("db2", far.clone()), ("db3", near.clone())], "standby", "to db3"),
        (vec![("db1", primary.clone()), ("db2", far.clone())], "primary", "to db1"),
        (vec![("db1", primary.clone()), ("db2", away.clone())], "standby", "to db1"),
        (vec![("db1", agent(Down, 0, true)), ("db2", far)], "primary", "to db2"),
        (vec![("db1", agent(Down, 0, true))], "primary", "no server of orders answers (asked: db1)"),
        (vec![("db2", away)], "standby", "agent db2 is not connected"),
    ];
    for (agents, prefer, expected) in table {
        assert_eq!(decide(&one, &agents, prefer), [expected]);
    }
}

#[test]
fn a_cluster_is_backed_up_by_one_job_at_a_time_even_if_that_one_is_unknown() {
    let agents = [("db1", agent(InstanceRole::Primary, 100, true)), ("db2", agent(InstanceRole::Standby, 90, true))];
    let unknown = JobState::Unknown { since: at(0), reason: String::new(), accepted: true };
    let jobs = [job("job_1", backup(), unknown, Some("db1")), job("job_2", backup(), queued(), None)];
    assert_eq!(decide(&jobs, &agents, "standby"), ["job_1 backs orders up now"]);
    let jobs = [job("job_1", backup(), queued(), None), job("job_2", backup(), queued(), None)];
    assert_eq!(decide(&jobs, &agents, "standby"), ["to db2", "job_1 backs orders up now"]);
}

#[test]
fn a_plan_waits_for_no_job_and_no_job_for_a_plan_and_an_older_agent_is_not_asked_for_one() {
    let plan = || Work::BackupPlan(BackupPlanWork { repository: "main".to_owned(), read_all: false });
    let older = agent(InstanceRole::Primary, 100, true);
    let mut newer = older.clone();
    let hello = Arc::make_mut(&mut newer.observed).hello.as_mut().expect("it said hello");
    hello.capabilities.push("backup_plan".to_owned());
    let running = JobState::Running { since: at(0) };
    let jobs = [
        job("job_1", backup(), running.clone(), Some("db1")),
        job("job_2", plan(), running, Some("db1")),
        job("job_3", plan(), queued(), None),
    ];
    assert_eq!(decide(&jobs, &[("db1", newer.clone())], "primary"), ["to db1"]);
    let jobs = [job("job_1", plan(), queued(), None), job("job_2", backup(), queued(), None)];
    assert_eq!(decide(&jobs, &[("db1", newer)], "primary"), ["to db1", "to db1"]);
    assert_eq!(decide(&jobs, &[("db1", older)], "primary"), ["agent db1 does not offer backup_plan", "to db1"]);
}

#[test]
fn what_waits_says_why_and_a_pause_is_kept() {
    let agents = [("db1", agent(InstanceRole::Primary, 100, true))];
    let later = JobState::Queued { reason: String::new(), not_before: at(1) };
    assert!(decide(&[job("job_1", backup(), later, None)], &agents, "primary").is_empty());
    assert_eq!(
        decide(&[job("job_1", verify(), queued(), None)], &agents, "primary"),
        ["agent db1 does not offer verify"]
    );
    let elsewhere = Job { on: Some("db9".to_owned()), ..job("job_1", backup(), queued(), None) };
    assert_eq!(decide(&[elsewhere], &agents, "primary"), ["agent db9 never connected"]);
    assert_eq!(
        decide(&[job("job_1", backup(), queued(), None)], &[], "primary"),
        ["no agent declares an instance of orders"]
    );
}
