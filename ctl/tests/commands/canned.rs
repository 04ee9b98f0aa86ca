//! A small fleet, as a controller would tell of it.

use std::collections::HashMap;

use walfleet_proto::agent::v1::{ArchiveFacts, InstanceFacts, InstanceRole, StreamFacts, Tablespace};
use walfleet_proto::job::v1::*;
use walfleet_proto::operator::v1::*;
use walfleet_proto::recovery::v1::*;

use crate::controller::Script;

pub fn at(text: &str) -> i64 {
    text.parse::<jiff::Timestamp>().unwrap().as_microsecond()
}

const GIB: u64 = 1 << 30;

fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

pub fn backup() -> BackupSummary {
    BackupSummary {
        id: "bk_06e2r4ycmn8q7t1w5x3z".to_owned(),
        cluster: "orders".to_owned(),
        system_identifier: 7_412_345_678_901_234_567,
        server_version_num: 160_004,
        timeline: 1,
        start_lsn: "1/2A000028".to_owned(),
        stop_lsn: "1/2B5C0100".to_owned(),
        started_at_us: at("2026-06-04T02:00:04Z"),
        finished_at_us: at("2026-06-04T02:03:24Z"),
        member: "db2".to_owned(),
        parents: vec!["bk_06dznc4v2b7k9m3p5r8t".to_owned()],
        cluster_bytes: 48 * GIB,
        read_bytes: 2 * GIB,
        new_bytes: GIB + GIB / 8,
        stored_bytes: 310 << 20,
        damaged_pages: 0,
        state: "committed".to_owned(),
        store_requests: 412,
        unexplained_slots: 0,
        read_all_because: String::new(),
    }
}

fn older_backup() -> BackupSummary {
    BackupSummary {
        id: "bk_06dznc4v2b7k9m3p5r8t".to_owned(),
        started_at_us: at("2026-06-03T02:00:02Z"),
        finished_at_us: at("2026-06-03T02:21:40Z"),
        parents: Vec::new(),
        read_bytes: 48 * GIB,
        read_all_because: "there was no backup to compare with".to_owned(),
        new_bytes: 47 * GIB,
        stored_bytes: 11 * GIB,
        damaged_pages: 3,
        store_requests: 1713,
        ..backup()
    }
}

fn instance(role: InstanceRole) -> InstanceFacts {
    InstanceFacts {
        cluster: "orders".to_owned(),
        system_identifier: 7_412_345_678_901_234_567,
        server_version_num: 160_004,
        role: role.into(),
        data_dir: "/var/lib/postgresql/16/main".to_owned(),
        port: 5432,
        timeline: 1,
        current_lsn: "1/3F00A2C8".to_owned(),
        cluster_bytes: 48 * GIB,
        data_checksums: true,
        archive: Some(ArchiveFacts {
            last_segment: "00000001000000010000003E".to_owned(),
            durable_lsn: "1/3F000000".to_owned(),
            durable_at_us: at("2026-06-04T14:41:58Z"),
            ready_segments: 0,
            failed_count: 2,
            last_error: String::new(),
            pg_wal_bytes: GIB,
            pg_wal_free_bytes: 90 * GIB,
            archive_command_set: true,
            stream: Some(StreamFacts {
                phase: "streaming".to_owned(),
                received_lsn: "1/3F00A2C8".to_owned(),
                complete_until_us: at("2026-06-04T14:41:58Z"),
                pieces: 340,
                segments: 12,
                piece_interval_ms: 1000,
                synchronous: "off".to_owned(),
                ..StreamFacts::default()
            }),
            pg_wal_full_in_seconds: 0,
            requests_last_hour: 3700,
            stored_bytes_last_hour: 210 << 20,
            durable_timeline: 1,
            quiet_from_lsn: String::new(),
        }),
        windows: Vec::new(),
        backups: Vec::new(),
        problems: Vec::new(),
        tablespaces: vec![Tablespace { oid: 16385, name: "fast".to_owned(), location: "/ssd/fast".to_owned() }],
    }
}

pub fn orders() -> ClusterView {
    let member = |agent: &str, role| Member {
        agent: agent.to_owned(),
        facts: Some(instance(role)),
        facts_at_us: at("2026-06-04T14:41:49Z"),
        connected: true,
    };
    ClusterView {
        name: "orders".to_owned(),
        labels: labels(&[("env", "prod"), ("tier", "a")]),
        state: ProtectionState::Protected.into(),
        reason: String::new(),
        system_identifier: 7_412_345_678_901_234_567,
        server_version_num: 160_004,
        members: vec![member("db1", InstanceRole::Primary), member("db2", InstanceRole::Standby)],
        windows: vec![RecoveryWindow {
            repository: "main".to_owned(),
            as_of_us: at("2026-06-04T14:41:50Z"),
            ranges: vec![RecoveryRange {
                from_us: at("2026-06-03T02:21:40Z"),
                to_us: at("2026-06-04T14:41:57.250Z"),
                from_lsn: "1/1C000100".to_owned(),
                to_lsn: "1/3F000000".to_owned(),
                timeline: 1,
                branch: "0000000000000000".to_owned(),
            }],
            gaps: Vec::new(),
            filled: Vec::new(),
            newest_commit_us: at("2026-06-04T14:41:57.250Z"),
            newest_lsn: "1/3F000000".to_owned(),
            newest_timeline: 1,
        }],
        last_backup: Some(backup()),
        policy: "standard".to_owned(),
        repository: "main".to_owned(),
        next_backup_us: at("2026-06-05T02:00:00Z"),
        cluster_bytes: 48 * GIB,
        lag_seconds: 0.9,
    }
}

/// At risk: WAL is missing in the middle.
fn billing() -> ClusterView {
    let note = |by: &str, reason: &str| GapNote {
        by: by.to_owned(),
        at_us: at("2026-06-03T09:32:00Z"),
        reason: reason.to_owned(),
    };
    let gap = |from: &str, to: &str, acknowledged| WalGap {
        timeline: 2,
        branch: "a1b2c3d4e5f60718".to_owned(),
        from_lsn: from.to_owned(),
        to_lsn: to.to_owned(),
        acknowledged,
        from_us: at("2026-06-03T09:15:00Z"),
        to_us: at("2026-06-03T09:31:30Z"),
        recorded: (!acknowledged)
            .then(|| note("db1", "the server let go of the WAL that replication slot walfleet kept")),
        acknowledgement: acknowledged.then(|| note("anna", "the night of the move")),
        system_identifier: 7,
    };
    let mut view = ClusterView {
        name: "billing".to_owned(),
        state: ProtectionState::AtRisk.into(),
        reason: "no backup for 31h, policy allows 26h".to_owned(),
        next_backup_us: 0,
        lag_seconds: 412.0,
        ..orders()
    };
    if let Some(window) = view.windows.first_mut() {
        window.gaps = vec![gap("0/5000000", "0/7000000", false), gap("0/1000000", "0/2000000", true)];
    }
    if let Some(archive) = view.members.first_mut().and_then(|member| member.facts.as_mut()?.archive.as_mut()) {
        archive.archive_command_set = false;
        archive.last_error = "repository main: permission denied".to_owned();
        archive.ready_segments = 37;
    }
    view
}

/// Declared a minute ago: nothing of it is stored yet.
fn sessions() -> ClusterView {
    ClusterView {
        name: "sessions".to_owned(),
        state: ProtectionState::Unprotected.into(),
        reason: "no backup yet".to_owned(),
        repository: "main".to_owned(),
        policy: "standard".to_owned(),
        next_backup_us: at("2026-06-04T14:45:00Z"),
        lag_seconds: -1.0,
        ..ClusterView::default()
    }
}

fn agents() -> Vec<AgentView> {
    let db1 = AgentView {
        name: "db1".to_owned(),
        hostname: "db1.example.org".to_owned(),
        labels: labels(&[("env", "prod")]),
        version: "0.1.0".to_owned(),
        connected: true,
        last_seen_us: at("2026-06-04T14:41:55Z"),
        joined_at_us: at("2026-05-01T09:00:00Z"),
        certificate_not_after_us: at("2026-06-05T09:00:00Z"),
        instances: vec![instance(InstanceRole::Primary)],
        running_jobs: vec!["job_06e3a1b2c3d4e5f6g7h8".to_owned()],
    };
    let lab1 = AgentView {
        name: "lab1".to_owned(),
        hostname: "lab1.example.org".to_owned(),
        connected: false,
        last_seen_us: at("2026-06-04T11:41:55Z"),
        instances: Vec::new(),
        running_jobs: Vec::new(),
        labels: HashMap::new(),
        ..db1.clone()
    };
    vec![db1, lab1]
}

pub fn job(state: JobState) -> JobView {
    JobView {
        id: "job_06e3a1b2c3d4e5f6g7h8".to_owned(),
        kind: "backup".to_owned(),
        cluster: "orders".to_owned(),
        agent: "db2".to_owned(),
        state: state.into(),
        attempt: 1,
        created_at_us: at("2026-06-04T14:40:00Z"),
        started_at_us: at("2026-06-04T14:40:01Z"),
        finished_at_us: 0,
        requested_by: "ann".to_owned(),
        progress: None,
        outcome: None,
        reason: String::new(),
        order: None,
    }
}

pub fn running(phase: &str, done: u64, total: u64) -> JobView {
    let progress = JobProgress {
        phase: phase.to_owned(),
        done_bytes: done,
        total_bytes: total,
        at_us: at("2026-06-04T14:40:05Z"),
        store_requests: 4,
        expected: Some(Expected { seconds: 200.0, basis: "the last 5 backups that read what changed".to_owned() }),
        ..JobProgress::default()
    };
    JobView { progress: Some(progress), ..job(JobState::Running) }
}

/// Moving, or not.
pub fn paced(bytes_per_second: Option<u64>, left_seconds: Option<u64>, still_seconds: u64) -> JobView {
    let copying = running("copy", 3 * GIB, 12 * GIB);
    let progress = copying.progress.clone().unwrap_or_default();
    let progress = JobProgress { bytes_per_second, left_seconds, still_seconds, spared_bytes: GIB, ..progress };
    JobView { progress: Some(progress), ..copying }
}

pub fn cost() -> JobCost {
    let phase = |phase: &str, seconds, bytes| PhaseCost { phase: phase.to_owned(), seconds, bytes };
    JobCost {
        gets: 35,
        heads: 0,
        puts: 15,
        lists: 2,
        retries: 1,
        received_bytes: 2 << 20,
        sent_bytes: 310 << 20,
        phases: vec![
            phase("checkpoint", 2.5, 0),
            phase("copy", 182.0, 48 * GIB),
            phase("wait for wal", 3.8, 0),
            phase("commit", 0.4, 0),
        ],
    }
}

pub fn planned_backup(report: BackupPlanReport) -> JobView {
    let outcome = JobOutcome {
        state: JobState::Succeeded.into(),
        report: Some(job_outcome::Report::BackupPlan(report)),
        ..JobOutcome::default()
    };
    JobView { kind: "backup_plan".to_owned(), outcome: Some(outcome), ..job(JobState::Succeeded) }
}

pub fn found(report: WalFindReport) -> JobView {
    let outcome = JobOutcome {
        state: JobState::Succeeded.into(),
        report: Some(job_outcome::Report::WalFind(report)),
        ..JobOutcome::default()
    };
    JobView { kind: "wal_find".to_owned(), outcome: Some(outcome), ..job(JobState::Succeeded) }
}

pub fn find_report() -> WalFindReport {
    let file = |relfilenode| FoundFile { tablespace: 1663, database: 16390, relfilenode };
    let plain = FoundTransaction {
        committed_at_us: at("2026-06-04T14:31:57.101002Z"),
        xid: 741,
        lsn: "1/3DF00118".to_owned(),
        timeline: 1,
        kind: "insert".to_owned(),
        what: "inserts 1 row into 16390/16402".to_owned(),
        inserted: 1,
        relations: vec![FoundRelation { file: Some(file(16402)), inserted: 1, ..FoundRelation::default() }],
        wal_bytes: 248,
        whole: true,
        stop_lsn: "1/3DF000E8".to_owned(),
        restore: "--to-lsn 1/3DF000E8 --exclusive".to_owned(),
        ..FoundTransaction::default()
    };
    let delete = FoundTransaction {
        committed_at_us: at("2026-06-04T14:31:59.914Z"),
        xid: 742,
        lsn: "1/3E01FF60".to_owned(),
        kind: "delete".to_owned(),
        what: "deletes at least 20000 rows of 16390/16384".to_owned(),
        inserted: 0,
        deleted: 20_000,
        relations: vec![FoundRelation { file: Some(file(16384)), deleted: 20_000, ..FoundRelation::default() }],
        wal_bytes: 1_240_000,
        whole: false,
        stop_lsn: "1/3E01FF30".to_owned(),
        restore: "--to-lsn 1/3E01FF30 --exclusive".to_owned(),
        ..plain.clone()
    };
    let drop = FoundTransaction {
        committed_at_us: at("2026-06-04T14:32:03Z"),
        xid: 744,
        lsn: "1/3E100200".to_owned(),
        kind: "drop".to_owned(),
        what: "drops 16390/16402, 16390/16405 and 1 more".to_owned(),
        inserted: 0,
        relations: Vec::new(),
        dropped: vec![file(16402), file(16405), file(16407)],
        dropped_files: 3,
        wal_bytes: 9000,
        stop_lsn: "1/3E1000C8".to_owned(),
        restore: String::new(),
        not_restorable: "1/3E1000C8 is before the first backup was consistent, at 1/3F000100".to_owned(),
        ..plain.clone()
    };
    WalFindReport {
        around_us: at("2026-06-04T14:31:59Z"),
        from_us: at("2026-06-04T14:26:59Z"),
        to_us: at("2026-06-04T14:36:59Z"),
        commits: 1207,
        transactions: vec![plain, delete, drop],
        before: Some(FoundCommit { at_us: at("2026-06-04T14:26:58.75Z"), lsn: "1/3B000118".to_owned(), xid: 700 }),
        after: Some(FoundCommit { at_us: at("2026-06-04T14:37:00.5Z"), lsn: "1/3F000118".to_owned(), xid: 1908 }),
        searched_from_lsn: "1/39000000".to_owned(),
        searched_to_lsn: "1/40000000".to_owned(),
        segments: 7,
        notes: vec!["WAL from 1/3C000000 to 1/3D000000 is missing: what committed there is unknown".to_owned()],
    }
}

pub fn backed_up() -> JobView {
    let report = job_outcome::Report::Backup(backup());
    let outcome = JobOutcome {
        state: JobState::Succeeded.into(),
        report: Some(report),
        cost: Some(cost()),
        ..JobOutcome::default()
    };
    JobView { finished_at_us: at("2026-06-04T14:43:20Z"), outcome: Some(outcome), ..job(JobState::Succeeded) }
}

pub fn failed(exit_code: i32, code: &str, message: &str) -> JobView {
    let outcome = JobOutcome {
        state: JobState::Failed.into(),
        error_code: code.to_owned(),
        error_message: message.to_owned(),
        exit_code,
        ..JobOutcome::default()
    };
    JobView { finished_at_us: at("2026-06-04T14:43:20Z"), outcome: Some(outcome), ..job(JobState::Failed) }
}

pub fn restore_report() -> RestoreReport {
    RestoreReport {
        data_dir: "/srv/pg/orders".to_owned(),
        backup: "bk_06e2r4ycmn8q7t1w5x3z".to_owned(),
        cluster_bytes: 48 * GIB,
        fetched_bytes: 11 * GIB,
        store_requests: 402,
        wal_from_lsn: "1/2A000028".to_owned(),
        wal_to_lsn: "1/3E000000".to_owned(),
        timeline: 1,
        reached_lsn: "1/3DFFFF38".to_owned(),
        reached_commit_us: at("2026-06-04T14:31:58.914Z"),
        server_state: "running (promoted)".to_owned(),
        connection: "host=/tmp port=5433 dbname=postgres".to_owned(),
        copy_seconds: 92.4,
        replay_seconds: 14.0,
        estimated_seconds: 0.0,
        notes: vec!["archive_mode is off".to_owned(), "listen_addresses is 'localhost'".to_owned()],
        wal_bytes: 319 << 20,
        wal_segments: 20,
        estimated_from: String::new(),
        at_most: false,
    }
}

pub fn restore_job(state: JobState, plan_only: bool) -> JobView {
    let order = RestoreOrder {
        repository: "main".to_owned(),
        target: Some(RecoveryTarget {
            kind: Some(recovery_target::Kind::TimeUs(at("2026-06-04T14:31:59Z"))),
            ..RecoveryTarget::default()
        }),
        data_dir: "/srv/pg/orders".to_owned(),
        start: true,
        plan_only,
        ..RestoreOrder::default()
    };
    let order = JobOrder { work: Some(job_order::Work::Restore(order)), ..JobOrder::default() };
    JobView { kind: "restore".to_owned(), agent: "lab1".to_owned(), order: Some(order), ..job(state) }
}

pub fn restored(report: RestoreReport, plan_only: bool) -> JobView {
    let outcome = JobOutcome {
        state: JobState::Succeeded.into(),
        report: Some(job_outcome::Report::Restore(report)),
        ..JobOutcome::default()
    };
    JobView { outcome: Some(outcome), ..restore_job(JobState::Succeeded, plan_only) }
}

fn resource(kind: &str, name: &str, yaml: &str, bound: &[&str]) -> Resource {
    Resource {
        kind: kind.to_owned(),
        name: name.to_owned(),
        yaml: yaml.to_owned(),
        generation: 3,
        applied_at_us: at("2026-06-01T10:00:00Z"),
        applied_by: "ann".to_owned(),
        bound_clusters: bound.iter().map(|name| (*name).to_owned()).collect(),
    }
}

fn changes() -> Vec<Change> {
    let field = |path: &str, before: &str, after: &str| FieldChange {
        path: path.to_owned(),
        before: before.to_owned(),
        after: after.to_owned(),
    };
    vec![
        Change {
            kind: "Policy".to_owned(),
            name: "standard".to_owned(),
            change: ChangeKind::Updated.into(),
            fields: vec![
                field("backup.schedule", "0 2 * * *", "0 */6 * * *"),
                field("labels", "env: prod\n", "env: prod\ntier: a\n"),
                field("wal.max_lag", "", "30s"),
                field("jitter", "10m", ""),
            ],
            consequences: vec![
                "orders: next backup moves from 2026-06-05 02:00:00 UTC to 2026-06-04 18:00:00 UTC".to_owned(),
            ],
        },
        Change {
            kind: "Repository".to_owned(),
            name: "main".to_owned(),
            change: ChangeKind::Unchanged.into(),
            ..Change::default()
        },
        Change {
            kind: "Cluster".to_owned(),
            name: "sessions".to_owned(),
            change: ChangeKind::Created.into(),
            fields: vec![field("members", "", "[db3]")],
            ..Change::default()
        },
    ]
}

fn audit() -> Vec<AuditEntry> {
    let entry = |sequence: u64, at_us, actor: &str, role: &str, call: &str, object: &str, outcome: &str| AuditEntry {
        sequence,
        at_us,
        actor: actor.to_owned(),
        role: role.to_owned(),
        call: call.to_owned(),
        object: object.to_owned(),
        outcome: outcome.to_owned(),
        previous: format!("{:064x}", sequence - 1),
        hash: format!("{sequence:064x}"),
    };
    let refused = "PermissionDenied: bob has role operator, and this needs admin";
    vec![
        entry(
            1,
            at("2026-05-01T08:00:00Z"),
            "the host's administrator",
            "controller",
            "walfleet-controller",
            "admin ann",
            "done",
        ),
        entry(2, at("2026-06-04T14:40:00Z"), "bob", "operator", "Jobs.StartBackup", "cluster orders", "done"),
        entry(3, at("2026-06-04T14:41:00Z"), "bob", "operator", "Resources.Apply", "Policy standard", refused),
    ]
}

fn tokens() -> Vec<TokenView> {
    let open = TokenView {
        id: "7x2k".to_owned(),
        role: "agent".to_owned(),
        created_at_us: at("2026-06-04T14:40:00Z"),
        expires_at_us: at("2026-06-04T15:40:00Z"),
        created_by: "ann".to_owned(),
        labels: labels(&[("env", "prod")]),
        ..TokenView::default()
    };
    let used = TokenView {
        id: "5m1q".to_owned(),
        used_by: "db1".to_owned(),
        used_at_us: at("2026-06-04T13:00:00Z"),
        ..open.clone()
    };
    let expired = TokenView { id: "2b8d".to_owned(), expires_at_us: at("2026-06-04T12:00:00Z"), ..open.clone() };
    vec![open, used, expired]
}

fn retention() -> RetentionPlan {
    let of = |backup: &str, seen: &str, decision: RetentionDecision, reasons: &[&str]| BackupRetention {
        backup: backup.to_owned(),
        seen_at_us: at(seen),
        is_restorable: true,
        decision: decision.into(),
        reasons: reasons.iter().map(|reason| (*reason).to_owned()).collect(),
        until_us: 0,
    };
    let trash = BackupRetention {
        until_us: at("2026-06-08T02:40:00Z"),
        ..of("bk_06d5e1f4a2b7k9m3p5r8", "2026-05-25T02:21:44Z", RetentionDecision::Wait, &[])
    };
    let lost = BackupRetention {
        is_restorable: false,
        ..of(
            "bk_06dt0c4v2b7k9m3p5r8t",
            "2026-06-02T02:19:05Z",
            RetentionDecision::Keep,
            &["not restorable, and the WAL that is missing may be brought"],
        )
    };
    RetentionPlan {
        cluster: "orders".to_owned(),
        repository: "main".to_owned(),
        at_us: at("2026-06-04T14:41:58Z"),
        edge_us: at("2026-05-28T14:41:58Z"),
        backups: vec![
            of(
                "bk_06d4a2b7k9m3p5r8t0v1",
                "2026-04-30T02:20:10Z",
                RetentionDecision::Keep,
                &["monthly copy of 2026-04"],
            ),
            of("bk_06d4x2b7k9m3p5r8t0v1", "2026-05-24T02:20:51Z", RetentionDecision::Purge, &[]),
            trash,
            of("bk_06d8a2b7k9m3p5r8t0v1", "2026-05-27T02:20:18Z", RetentionDecision::Expire, &[]),
            of(
                "bk_06d9a2b7k9m3p5r8t0v1",
                "2026-05-28T02:20:31Z",
                RetentionDecision::Keep,
                &["the recovery window from 2026-05-28 14:41:58 UTC on begins with it"],
            ),
            lost,
            of(
                "bk_06e2r4ycmn8q7t1w5x3z",
                "2026-06-04T02:03:25Z",
                RetentionDecision::Keep,
                &[
                    "taken within the recovery window",
                    "the newest that can be restored",
                    "held by anna (hold_1): audit",
                ],
            ),
        ],
        wal: vec![WalRetention {
            system_identifier: 7_412_345_678_901_234_567,
            timeline: 1,
            branch: "0000000000000000".to_owned(),
            below_lsn: "1/12000000".to_owned(),
            segments: 1812,
        }],
        refused: vec![],
        acts_from_us: 0,
        digest: "0f3c9a1b2d4e5f60".to_owned(),
        can_be_released: false,
    }
}

fn replicas() -> Vec<ReplicaView> {
    let of = |repository: &str, cluster: &str| ReplicaView {
        repository: repository.to_owned(),
        replica_of: "main".to_owned(),
        cluster: cluster.to_owned(),
        complete_as_of_us: at("2026-06-04T14:41:50Z"),
        is_counted: true,
        ..ReplicaView::default()
    };
    vec![
        of("main-us", "billing"),
        ReplicaView { lacking_backups: 12, ..of("main-us", "orders") },
        ReplicaView { is_late: true, rpo_seconds: 5, ..of("main-us", "sessions") },
        ReplicaView { complete_as_of_us: 0, is_counted: false, ..of("vault", "orders") },
        ReplicaView { problem: "open s3://vault: no answer".to_owned(), ..of("vault", "sessions") },
    ]
}

pub fn garbage() -> Vec<ClusterGarbage> {
    let of = |cluster: &str, objects, bytes| ClusterGarbage {
        cluster: cluster.to_owned(),
        objects,
        bytes,
        removable_at_us: at("2026-06-05T14:41:58Z"),
        problem: String::new(),
    };
    vec![
        ClusterGarbage { removable_at_us: 0, ..of("billing", 0, 0) },
        of("orders", 1812, 41_000_000_000),
        ClusterGarbage { problem: "repository main did not answer within 20 s".to_owned(), ..of("sessions", 0, 0) },
    ]
}

fn holds() -> Vec<HoldView> {
    let of = |hold: &str, backup: &str, reason: &str| HoldView {
        hold: hold.to_owned(),
        cluster: "orders".to_owned(),
        repository: "main".to_owned(),
        backup: backup.to_owned(),
        reason: reason.to_owned(),
        owner: "anna".to_owned(),
        ..HoldView::default()
    };
    vec![
        HoldView {
            until_us: at("2027-01-01T00:00:00Z"),
            ..of("hold_06e2r4ycmn8q7t1w5x3z", "bk_06e2r4ycmn8q7t1w5x3z", "before the migration")
        },
        HoldView {
            from_us: at("2026-06-04T14:00:00Z"),
            to_us: at("2026-06-04T15:00:00Z"),
            is_stretch: true,
            ..of("hold_06e2s0a1b2c3d4e5f6g7", "bk_06e2r4ycmn8q7t1w5x3z", "incident 1812")
        },
    ]
}

/// A fleet with something of everything.
pub fn fleet() -> Script {
    let policy = "kind: Policy\nname: standard\nselector: env=prod\nbackup:\n  schedule: 0 2 * * *\n";
    let repository = "kind: Repository\nname: main\nurl: s3://backups/walfleet\n";
    let waiting = JobView {
        id: "job_06e3a9z8y7x6w5v4t3s2".to_owned(),
        cluster: "sessions".to_owned(),
        agent: String::new(),
        reason: "no member is connected".to_owned(),
        started_at_us: 0,
        requested_by: "schedule".to_owned(),
        ..job(JobState::Queued)
    };
    Script {
        status: StatusReply {
            controller: "ctl-1".to_owned(),
            controller_version: "0.1.0".to_owned(),
            as_of_us: at("2026-06-04T14:41:58Z"),
            clusters: vec![orders(), billing(), sessions()],
            agents: agents(),
            notices: vec!["the recovery key was never proven: walfleet key test".to_owned()],
        },
        agents: agents(),
        backups: vec![backup(), older_backup()],
        retention: retention(),
        holds: holds(),
        replicas: replicas(),
        resources: vec![
            resource("Policy", "standard", policy, &["orders", "sessions"]),
            resource("Repository", "main", repository, &[]),
        ],
        tokens: tokens(),
        audit: audit(),
        jobs: vec![paced(Some(310 << 20), Some(30), 0), waiting],
        changes: changes(),
        ..Script::default()
    }
}
