use std::collections::BTreeMap;

use super::super::observed::{ArchiveObserved, InstanceObserved};
use super::super::recovery::{RecoveryRange, WalGap};
use super::super::samples;
use super::*;
use crate::resources::{Document, PolicySpec, document};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_780_000_000 + seconds).expect("in range")
}

fn lsn(text: &str) -> Option<Lsn> {
    Some(text.parse().expect(text))
}

/// A healthy primary at 0/5000000 whose newest commit in the repository is ten seconds older than its facts at 0.
fn healthy() -> InstanceObserved {
    InstanceObserved {
        current_lsn: lsn("0/5000100"),
        archive: Some(ArchiveObserved {
            last_segment: "000000010000000000000004".to_owned(),
            durable_lsn: lsn("0/5000000"),
            durable_at: Some(at(-9)),
            ready_segments: 1,
            failed_count: 0,
            last_error: String::new(),
            pg_wal_bytes: 0,
            pg_wal_free_bytes: 0,
            archive_command_set: true,
        }),
        windows: vec![RecoveryWindow {
            repository: "main".to_owned(),
            as_of: at(-5),
            ranges: vec![RecoveryRange {
                from: Some(at(-7200)),
                to: Some(at(-10)),
                from_lsn: lsn("0/2000000").expect("given"),
                to_lsn: lsn("0/5000000").expect("given"),
                timeline: 1,
                branch: "0".repeat(16),
            }],
            gaps: vec![],
            newest_commit: Some(at(-10)),
            newest_lsn: lsn("0/5000000"),
            newest_timeline: 1,
        }],
        backups: vec![BackupSummary {
            id: "bk_1".parse().expect("an id"),
            cluster: "orders".parse().expect("a name"),
            system_identifier: 7,
            server_version_num: 170_000,
            timeline: 1,
            start_lsn: None,
            stop_lsn: None,
            started_at: Some(at(-7300)),
            finished_at: Some(at(-7200)),
            member: "db1".to_owned(),
            parents: vec![],
            cluster_bytes: 0,
            read_bytes: 0,
            new_bytes: 0,
            stored_bytes: 0,
            damaged_pages: 0,
            state: "committed".to_owned(),
            store_requests: 0,
            unexplained_slots: 0,
            read_all_because: String::new(),
        }],
        ..samples::instance("orders", 7)
    }
}

fn policy(objectives: &str) -> PolicySpec {
    let text = format!(
        "apiVersion: walfleet/v1\nkind: Policy\nname: gold\nspec: {{selector: '', repository: main, objectives: {{{objectives}}}}}"
    );
    match document::parse(&text).expect(objectives).remove(0) {
        Document::Policy(policy) => policy.spec,
        other => panic!("{other:?}"),
    }
}

fn assess_with(instances: &[InstanceObserved], objectives: &str, now: Timestamp) -> Assessment {
    let spec = policy(objectives);
    let cluster = ClusterSeen {
        name: "orders".parse().expect("a name"),
        labels: BTreeMap::new(),
        system_identifier: Some(7),
        spec: None,
        members: instances
            .iter()
            .map(|instance| MemberSeen { agent: "db1", instance, facts_at: at(0), received_at: at(0), connected: true })
            .collect(),
        binding: Binding::To("gold"),
        policy: Some(&spec),
        repository: Some("main"),
        problems: vec![],
    };
    assess(now, &cluster, None, Span::minutes(6))
}

#[test]
fn each_way_of_not_being_protected_is_told_apart_with_its_reason() {
    let change = |change: fn(&mut InstanceObserved)| {
        let mut instance = healthy();
        change(&mut instance);
        vec![instance]
    };
    let table: Vec<(Vec<InstanceObserved>, &str, i64, Protection, &str)> = vec![
        (vec![healthy()], "rpo: 60s, backup_age: 26h", 0, Protection::Protected, ""),
        (vec![healthy()], "rpo: 5s", 0, Protection::AtRisk, "trails by 10s, 5s is promised"),
        (vec![healthy()], "backup_age: 1h", 0, Protection::AtRisk, "backup is 2h old, 1h is promised"),
        (vec![healthy()], "", 600, Protection::Unknown, "last heard 10m ago"),
        (vec![], "", 0, Protection::Unknown, "no agent declares"),
        (change(|i| i.windows.clear()), "", 0, Protection::Unknown, "what the repository holds"),
        (
            change(|i| i.backups[0].unexplained_slots = 3),
            "",
            0,
            Protection::AtRisk,
            "3 slots that had changed past the WAL",
        ),
        (
            change(|i| {
                i.windows[0].ranges.clear();
                i.backups.clear();
            }),
            "",
            0,
            Protection::Unprotected,
            "no backup",
        ),
        (change(|i| i.windows[0].ranges.clear()), "", 0, Protection::Unprotected, "bk_1 cannot be made consistent"),
        (
            change(|i| {
                i.windows[0].gaps.push(WalGap {
                    timeline: 1,
                    branch: String::new(),
                    from_lsn: Lsn(0x300_0000),
                    to_lsn: Lsn(0x400_0000),
                    acknowledged: false,
                });
            }),
            "",
            0,
            Protection::AtRisk,
            "missing on timeline 1 from 0/3000000 to 0/4000000",
        ),
        (
            change(|i| i.archive.as_mut().expect("given").last_error = "no space".to_owned()),
            "",
            0,
            Protection::AtRisk,
            "archiving fails: no space",
        ),
        (change(|i| i.role = InstanceRole::Down), "rpo: 1h", 0, Protection::AtRisk, "not known how far"),
        (
            change(|i| i.problems.push("archive_mode is off\nHINT: turn it on".to_owned())),
            "",
            0,
            Protection::AtRisk,
            "db1: archive_mode is off",
        ),
    ];
    for (instances, objectives, now, state, reason) in table {
        let assessment = assess_with(&instances, objectives, at(now));
        assert_eq!(assessment.state, state, "{reason}: {assessment:?}");
        assert!(assessment.reason.contains(reason), "{reason:?} in {:?}", assessment.reason);
        assert_eq!(assessment.reason.is_empty(), state == Protection::Protected);
    }
}

#[test]
fn the_lag_is_nothing_when_all_is_durable_and_unknown_when_nothing_is_seen() {
    let lag = |change: fn(&mut InstanceObserved)| {
        let mut instance = healthy();
        change(&mut instance);
        assess_with(&[instance], "", at(0)).lag.map(|lag| lag.as_secs())
    };
    assert_eq!(lag(|_| {}), Some(10));
    assert_eq!(lag(|i| i.current_lsn = lsn("0/5000000")), Some(0));
    // With no segment waiting, the newest one's arrival tells more than its last commit.
    assert_eq!(lag(|i| i.archive.as_mut().expect("given").ready_segments = 0), Some(9));
    assert_eq!(lag(|i| i.current_lsn = None), None);
    assert_eq!(
        lag(|i| {
            i.windows[0].newest_commit = None;
            i.archive = None;
        }),
        None
    );
}
