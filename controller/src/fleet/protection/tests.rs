use std::collections::BTreeMap;

use walfleet_repository::postgres::Lsn;

use super::super::observed::{ArchiveObserved, InstanceObserved, StreamObserved, StreamPhase};
use super::super::recovery::RecoveryRange;
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
            durable_timeline: Some(1),
            durable_at: Some(at(-9)),
            quiet_from: None,
            ready_segments: 1,
            failed_count: 0,
            last_error: String::new(),
            pg_wal_bytes: 0,
            pg_wal_free_bytes: 0,
            archive_command_set: true,
            stream: None,
            pg_wal_full_in_seconds: None,
            requests_last_hour: 0,
            stored_bytes_last_hour: 0,
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
            filled: vec![],
            newest_commit: Some(at(-10)),
            newest_lsn: lsn("0/5000000"),
            newest_timeline: 1,
        }],
        backups: vec![BackupSummary {
            start_lsn: None,
            stop_lsn: None,
            started_at: Some(at(-7300)),
            finished_at: Some(at(-7200)),
            ..samples::backup("bk_1", 7, Lsn::INVALID)
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

/// Each on a host of its own, all connected and heard at 0.
fn assess_with(instances: &[InstanceObserved], objectives: &str, now: Timestamp) -> Assessment {
    let member = |instance| MemberSeen {
        agent: "db1",
        instance,
        facts_at: at(0),
        received_at: at(0),
        connected: true,
        vouches: true,
    };
    assess_members(instances.iter().map(member).collect(), objectives, now)
}

fn assess_members(members: Vec<MemberSeen<'_>>, objectives: &str, now: Timestamp) -> Assessment {
    let spec = policy(objectives);
    let cluster = ClusterSeen {
        name: "orders".parse().expect("a name"),
        labels: BTreeMap::new(),
        system_identifier: Some(7),
        spec: None,
        members,
        binding: Binding::To("gold"),
        is_surely_bound: true,
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
                i.windows[0].gaps.push(samples::gap((0x300_0000, 0x400_0000), 1));
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
        (
            change(|i| i.archive.as_mut().expect("given").pg_wal_full_in_seconds = Some(1)),
            "",
            0,
            Protection::AtRisk,
            "db1: pg_wal will be full in 1s",
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
            i.windows[0].ranges[0].to = None;
            i.archive = None;
        }),
        None
    );
}

/// With archive_command alone, whatever archive_timeout is: for what an idle server writes no segment is finished.
#[test]
fn an_idle_server_alarms_nobody_and_one_that_is_silent_after_a_change_does() {
    let after_a_day = |quiet_from: &str| {
        let mut instance = healthy();
        let archive = instance.archive.as_mut().expect("given");
        (archive.ready_segments, archive.durable_at) = (0, Some(at(-86_400)));
        archive.quiet_from = Some(quiet_from).filter(|text| !text.is_empty()).and_then(lsn);
        instance.windows[0].ranges[0].to = Some(at(-86_400));
        let assessment = assess_with(&[instance], "", at(0));
        (assessment.state, assessment.lag.map(|lag| lag.as_secs()))
    };
    assert_eq!(after_a_day("0/5000000"), (Protection::Protected, Some(0)));
    assert_eq!(after_a_day(""), (Protection::AtRisk, Some(86_400)), "it has written more");
    assert_eq!(after_a_day("0/6000000"), (Protection::AtRisk, Some(86_400)), "and what lies before is not there");
}

#[test]
fn a_backlog_that_a_stream_works_off_is_not_hidden_by_what_arrives_of_it() {
    let lag = |phase, archive_command_set| {
        let mut instance = healthy();
        let archive = instance.archive.as_mut().expect("given");
        // A part has just come, of WAL that is hours old.
        (archive.ready_segments, archive.durable_at) = (0, Some(at(-1)));
        archive.archive_command_set = archive_command_set;
        archive.stream = Some(StreamObserved { phase, complete_until: Some(at(-7000)), ..samples::stream() });
        instance.windows[0].ranges[0].to = Some(at(-7200));
        let assessment = assess_with(&[instance], "rpo: 60s", at(0));
        (assessment.state, assessment.lag.map(|lag| lag.as_secs()))
    };
    for (phase, archives) in [
        (StreamPhase::Streaming, false),
        (StreamPhase::Streaming, true),
        (StreamPhase::Following, true),
        (StreamPhase::Waiting, false),
    ] {
        assert_eq!(lag(phase, archives), (Protection::AtRisk, Some(7000)), "{phase:?} {archives}");
    }
    assert_eq!(lag(StreamPhase::Waiting, true), (Protection::Protected, Some(1)), "archive_command has brought it all");
}

#[test]
fn silence_of_those_who_know_is_no_peace() {
    let primary = healthy();
    let standby = InstanceObserved { role: InstanceRole::Standby, ..healthy() };
    let seen = |instance, received, vouches| MemberSeen {
        agent: "db1",
        instance,
        facts_at: at(received),
        received_at: at(received),
        // Connected anew, it has told nothing yet.
        connected: true,
        vouches,
    };
    // Heard a minute and a half ago; facts of any age are believed for six.
    for (vouches, objectives, state) in [
        (true, "rpo: 60s", Protection::Protected),
        (false, "rpo: 60s", Protection::Unknown),
        (false, "rpo: 5m", Protection::Protected),
        (false, "", Protection::Protected),
    ] {
        let assessment = assess_members(vec![seen(&primary, 0, vouches)], objectives, at(90));
        assert_eq!(assessment.state, state, "{objectives} {vouches}: {assessment:?}");
    }
    // A standby's agent is connected, which says nothing of what the primary has written since.
    for (vouches, objectives, state) in [
        (false, "rpo: 60s", Protection::AtRisk),
        (true, "rpo: 60s", Protection::Protected),
        (false, "rpo: 5m", Protection::Protected),
    ] {
        let members = vec![seen(&primary, 0, vouches), seen(&standby, 85, true)];
        let assessment = assess_members(members, objectives, at(90));
        assert_eq!(assessment.state, state, "{objectives} {vouches}: {assessment:?}");
    }
    // The primary's agent is gone, and so is what it would say of how far its server is.
    let members = vec![seen(&primary, 0, false), seen(&standby, 500, true)];
    let assessment = assess_members(members, "", at(500));
    assert!(assessment.reason.contains("the primary's agent was last heard 8m ago"), "{assessment:?}");
    let ahead = InstanceObserved { current_lsn: lsn("0/9000000"), ..standby.clone() };
    let members = vec![seen(&primary, 0, false), seen(&ahead, 500, true)];
    let lag = assess_members(members, "", at(500)).lag.expect("the standby tells").as_secs();
    assert_eq!(lag, 510, "since the newest commit that is stored");
    // A failover: nobody misses the old one.
    let members = vec![seen(&primary, 0, false), seen(&primary, 500, true)];
    assert!(!assess_members(members, "", at(500)).reason.contains("last heard"));
}

/// What it has on its timeline, and what another one has.
fn range(timeline: u32, to: &str, newest: i64) -> RecoveryRange {
    let to_lsn = lsn(to).expect("given");
    RecoveryRange { timeline, to_lsn, to: Some(at(newest)), ..healthy().windows[0].ranges[0].clone() }
}

#[test]
fn what_is_stored_of_another_timeline_does_not_hide_that_a_servers_own_is_not() {
    let on_two = |change: fn(&mut InstanceObserved)| {
        let mut instance = InstanceObserved { timeline: 2, ..healthy() };
        instance.archive.as_mut().expect("given").durable_timeline = None;
        change(&mut instance);
        instance
    };
    // Restored in place to where the old timeline has gone on far beyond, and nothing is stored since.
    let restored = on_two(|i| {
        i.windows[0].ranges = vec![range(1, "0/9000000", -1)];
        let archive = i.archive.as_mut().expect("given");
        (archive.durable_lsn, archive.durable_timeline, archive.durable_at) = (lsn("0/9000000"), Some(1), Some(at(-1)));
        archive.ready_segments = 0;
    });
    for objectives in ["", "rpo: 1h"] {
        let assessment = assess_with(std::slice::from_ref(&restored), objectives, at(0));
        assert_eq!((assessment.state, assessment.lag), (Protection::AtRisk, None), "{assessment:?}");
        assert!(assessment.reason.contains("of timeline 2, on which it is, nothing"), "{assessment:?}");
    }
    // A dead primary's tail after a failover, which its silent agent and the repository tell of.
    let promoted = on_two(|i| {
        i.windows[0].ranges = vec![range(1, "0/9000000", -1), range(2, "0/5000000", -70)];
        let archive = i.archive.as_mut().expect("given");
        (archive.durable_timeline, archive.durable_at) = (Some(2), Some(at(-60)));
    });
    let mut dead = InstanceObserved { role: InstanceRole::Down, current_lsn: None, timeline: 0, ..healthy() };
    dead.archive.as_mut().expect("given").durable_lsn = lsn("0/9000000");
    let assessment = assess_with(&[promoted.clone(), dead.clone()], "rpo: 60s", at(0));
    assert!(assessment.reason.contains("trails by 70s"), "{assessment:?}");
    // Rolled back on its timeline: what it is seen to have stored lies beyond where it is.
    let mut rolled_back = healthy();
    rolled_back.windows[0].ranges = vec![range(1, "0/9000000", -1)];
    rolled_back.archive = None;
    let mut standby = InstanceObserved { role: InstanceRole::Standby, ..healthy() };
    standby.archive.as_mut().expect("given").durable_lsn = lsn("0/9000000");
    assert_eq!(assess_with(&[rolled_back, standby], "", at(0)).lag, None);
    // An agent of an earlier release does not say which timeline it means; of a standby more may be stored than it replayed.
    assert_eq!(assess_with(&[on_two(|i| i.current_lsn = lsn("0/5000000"))], "", at(0)).lag, Some(SignedDuration::ZERO));
    let mut behind = InstanceObserved { role: InstanceRole::Standby, ..healthy() };
    behind.windows[0].ranges = vec![range(1, "0/9000000", -1)];
    assert_eq!(assess_with(&[behind], "", at(0)).lag, Some(SignedDuration::ZERO));
}
