//! Against real servers of the oldest and the newest release.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tokio::net::{TcpListener, UnixStream};
use tokio_postgres::{NoTls, SimpleQueryMessage};
use walfleet_repository::postgres::{Segment, TimelineHistory};

use super::*;
use crate::postgres::control::ControlFile;
use crate::postgres::server::local_connection_string;
use crate::postgres::test_server::{Installation, TestServer, oldest_and_newest};

const SMALL: &[&str] = &["--wal-segsize=1"];

fn mib() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

/// A sender that has ended gives back its place a moment after it is no longer seen (ProcKill, proc.c).
async fn connect(server: &TestServer) -> Replication {
    for _ in 0..200 {
        match Replication::connect(&server.connection_string(), "wf-test").await {
            Err(ReplicationError::NoSenderLeft { .. }) => tokio::time::sleep(Duration::from_millis(50)).await,
            connected => return connected.unwrap(),
        }
    }
    panic!("no sender is left")
}

/// The first value that a query gives.
async fn value(server: &TestServer, sql: &str) -> String {
    let (client, connection) = tokio_postgres::connect(&server.connection_string(), NoTls).await.unwrap();
    tokio::spawn(connection);
    let answer = client.simple_query(sql).await.unwrap();
    let row = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("").to_owned()),
        _ => None,
    });
    row.unwrap_or_default()
}

async fn wait_for(server: &TestServer, sql: &str, expected: &str) {
    for _ in 0..200 {
        if value(server, sql).await == expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{sql} is {}, not {expected}", value(server, sql).await);
}

/// Appends what comes, until `end` was received, which the server is told; it may be on another timeline then.
async fn receive_until(stream: &mut WalStream, end: Lsn, into: &mut Vec<u8>) {
    while stream.received_lsn() < end {
        let next = tokio::time::timeout(Duration::from_secs(30), stream.next());
        match next.await.expect("WAL comes").unwrap() {
            StreamEvent::Wal { start, bytes, server_end, sent_at_us } => {
                assert!(start.0 + bytes.len() as u64 == stream.received_lsn().0 && server_end >= start);
                assert!(sent_at_us > 1_700_000_000_000_000, "{sent_at_us}");
                into.extend_from_slice(&bytes);
            }
            StreamEvent::KeepAlive { is_reply_requested, .. } => {
                if is_reply_requested {
                    let written_lsn = stream.received_lsn();
                    stream.report(Positions { written_lsn, ..Positions::default() }, Reply::NotNeeded).await;
                }
            }
            StreamEvent::TimelineEnded { .. } => panic!("the timeline ended at {}", stream.received_lsn()),
        }
    }
}

/// Whether `bytes`, which begin at `start`, are what the server's files hold.
fn assert_is_in_files(data_dir: &Path, timeline: Timeline, start: Lsn, bytes: &[u8]) {
    assert_eq!(start, start.segment_start(mib()));
    let mut segment = Segment::containing(timeline, start, mib());
    for part in bytes.chunks(mib().bytes() as usize) {
        let name = segment.file_name(mib());
        let file = fs::read(data_dir.join("pg_wal").join(&name)).unwrap();
        assert!(file.get(..part.len()) == Some(part), "{name} differs");
        segment = segment.next();
    }
}

#[tokio::test]
async fn everything_that_a_busy_server_writes_arrives_as_its_files_hold_it() {
    for installation in oldest_and_newest() {
        let server = TestServer::start(&installation, SMALL, "wal_keep_size=512MB\nmax_wal_size=1GB");
        let mut replication = connect(&server).await;
        let identity = replication.identify_system().await.unwrap();
        let control = ControlFile::read(&server.data_dir).unwrap();
        assert_eq!((identity.system_id, identity.timeline), (control.system_id, Timeline(1)));
        assert_eq!(replication.wal_segment_size().await.unwrap(), mib());
        replication.create_slot("wf").await.unwrap();
        let restart = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'wf'";
        let start = value(&server, restart).await.parse::<Lsn>().unwrap().segment_start(mib());

        let mut stream = replication.start(Some("wf"), start, Timeline(1)).await.unwrap();
        let mut bytes = Vec::new();
        let work = async {
            server.sql(&["CREATE TABLE t (id int PRIMARY KEY, text text)"]).await;
            for round in 0..8 {
                let values = format!("SELECT i, repeat('x', i % 200) FROM generate_series({round}0001, {round}9999) i");
                server.sql(&[&format!("INSERT INTO t {values}"), "UPDATE t SET text = 'y' WHERE id % 7 = 0"]).await;
                if round % 3 == 0 {
                    server.sql(&["SELECT pg_switch_wal()", "CHECKPOINT"]).await;
                }
            }
            value(&server, "SELECT pg_current_wal_flush_lsn()").await.parse::<Lsn>().unwrap()
        };
        // Streamed while it works, as far as is known that there is something.
        let (end, ()) = tokio::join!(work, receive_until(&mut stream, Lsn(start.0 + (4 << 20)), &mut bytes));
        receive_until(&mut stream, end, &mut bytes).await;
        assert!(bytes.len() > 8 << 20, "{} bytes", bytes.len());
        assert_is_in_files(&server.data_dir, Timeline(1), start, &bytes);

        let all = Positions { written_lsn: end, flushed_lsn: end, applied_lsn: Lsn::INVALID };
        stream.report(all, Reply::Requested).await;
        let answer = tokio::time::timeout(Duration::from_secs(10), stream.next()).await.expect("a reply").unwrap();
        assert!(matches!(answer, StreamEvent::KeepAlive { .. } | StreamEvent::Wal { .. }));
        wait_for(&server, restart, &end.to_string()).await;
        let shown = "SELECT application_name || ' ' || coalesce(replay_lsn::text, '-') FROM pg_stat_replication";
        assert_eq!(value(&server, shown).await, "wf-test -");

        let mut replication = stream.finish().await.unwrap();
        assert!(replication.identify_system().await.unwrap().flushed_lsn >= end);
        replication.drop_slot("wf").await.unwrap();
    }
}

#[tokio::test]
async fn a_server_that_shuts_down_has_sent_all_its_wal() {
    for installation in oldest_and_newest() {
        let server = TestServer::start(&installation, SMALL, "");
        let mut replication = connect(&server).await;
        let at = replication.identify_system().await.unwrap().flushed_lsn;
        // Movable to another task.
        let receiver: tokio::task::JoinHandle<Result<(), ReplicationError>> = tokio::spawn(async move {
            let mut stream = replication.start(None, at, Timeline(1)).await?;
            loop {
                stream.next().await?;
                let received = stream.received_lsn();
                let all = Positions { written_lsn: received, flushed_lsn: received, applied_lsn: received };
                stream.report(all, Reply::NotNeeded).await;
            }
        });
        wait_for(&server, "SELECT state FROM pg_stat_replication", "streaming").await;
        let server = tokio::task::spawn_blocking(move || {
            server.stop("fast");
            server
        });
        let server = server.await.unwrap();
        let error = receiver.await.unwrap().unwrap_err();
        let ReplicationError::ShutDown { at, .. } = error else { panic!("{error}") };
        let control = ControlFile::read(&server.data_dir).unwrap();
        assert!(
            at > control.checkpoint_lsn,
            "the shutdown checkpoint at {} was received, {at}",
            control.checkpoint_lsn
        );
        let gone = Replication::connect(&server.connection_string(), "x").await.unwrap_err();
        assert!(matches!(gone, ReplicationError::Unreachable { .. }), "{gone}");
    }
}

#[tokio::test]
async fn a_promotion_ends_the_timeline_and_the_next_one_goes_on() {
    for installation in oldest_and_newest() {
        if !installation.has("pg_basebackup") {
            continue;
        }
        let primary = TestServer::start(&installation, SMALL, "wal_keep_size=64MB");
        let standby = TestServer::create(&installation);
        let (host, data_dir) = (primary.folder().display().to_string(), standby.data_dir.display().to_string());
        let arguments = ["-h", &host, "-U", "postgres", "-D", &data_dir, "-R", "-X", "stream", "-c", "fast"];
        installation.run("pg_basebackup", &arguments);
        standby.configure("");
        standby.launch();
        primary.sql(&["CREATE TABLE t AS SELECT generate_series(1, 10000)", "CHECKPOINT"]).await;
        let mut replication = connect(&standby).await;
        let identity = replication.identify_system().await.unwrap();
        let start = identity.flushed_lsn.segment_start(mib());
        let mut stream = replication.start(None, start, Timeline(1)).await.unwrap();
        let written = value(&primary, "SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        let mut bytes = Vec::new();
        receive_until(&mut stream, written, &mut bytes).await;

        installation.run("pg_ctl", &["-D", &data_dir, "-w", "promote"]);
        let (next, switch_lsn) = loop {
            match stream.next().await.unwrap() {
                StreamEvent::TimelineEnded { next, switch_lsn } => break (next, switch_lsn),
                StreamEvent::Wal { bytes: more, .. } => bytes.extend_from_slice(&more),
                StreamEvent::KeepAlive { .. } => {}
            }
        };
        assert!(next == Timeline(2) && switch_lsn >= written && switch_lsn <= stream.received_lsn());
        let mut replication = stream.finish().await.unwrap();
        let content = replication.timeline_history(next).await.unwrap();
        assert_eq!(content, fs::read(standby.data_dir.join("pg_wal/00000002.history")).unwrap());
        let history = TimelineHistory::parse(next, &content).unwrap();
        assert_eq!(history.switch_point(Timeline(1)), Some(switch_lsn));
        let error = replication.timeline_history(Timeline(1)).await.unwrap_err();
        assert!(matches!(error, ReplicationError::NoHistory { timeline: Timeline(1), .. }), "{error}");

        // Nothing is left of the old one from here: it ends before it begins.
        let mut stream = replication.start(None, switch_lsn, Timeline(1)).await.unwrap();
        assert_eq!(stream.next().await.unwrap(), StreamEvent::TimelineEnded { next, switch_lsn });
        let replication = stream.finish().await.unwrap();
        standby.sql(&["CREATE TABLE u AS SELECT generate_series(1, 10000)"]).await;
        let end = value(&standby, "SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        let start = switch_lsn.segment_start(mib());
        let mut stream = replication.start(None, start, next).await.unwrap();
        let mut bytes = Vec::new();
        receive_until(&mut stream, end, &mut bytes).await;
        assert_is_in_files(&standby.data_dir, next, start, &bytes);

        for (at, timeline) in [(Lsn(switch_lsn.0 + 8), Timeline(1)), (start, Timeline(7))] {
            let error = connect(&standby).await.start(None, at, timeline).await.unwrap_err();
            assert!(matches!(error, ReplicationError::NotInHistory { .. }), "{error}");
        }
    }
}

#[tokio::test]
async fn what_cannot_be_streamed_is_told_apart() {
    for installation in oldest_and_newest() {
        let settings = "wal_level=logical\nwal_keep_size=0\nmin_wal_size=2MB\nmax_replication_slots=2\n\
                        max_slot_wal_keep_size=2MB\nmax_wal_senders=2";
        let server = TestServer::start(&installation, SMALL, settings);
        let mut replication = connect(&server).await;
        let at = replication.identify_system().await.unwrap().flushed_lsn;
        slots(&server, &mut replication, at).await;
        let mut stream = replication.start(None, Lsn(at.0 + (1 << 30)), Timeline(1)).await.unwrap();
        let error = stream.next().await.unwrap_err();
        drop(stream);
        assert!(matches!(error, ReplicationError::Ahead { .. }), "{error}");
        lost_wal(&server, at).await;
    }
}

async fn slots(server: &TestServer, replication: &mut Replication, at: Lsn) {
    let error = connect(server).await.start(Some("wf"), at, Timeline(1)).await.unwrap_err();
    assert!(
        matches!(&error, ReplicationError::NoSlot { slot, refusal, .. } if slot == "wf" && refusal.code == "42704")
    );
    let error = replication.drop_slot("wf").await.unwrap_err();
    assert!(matches!(error, ReplicationError::NoSlot { .. }), "{error}");
    replication.create_slot("wf").await.unwrap();
    let error = replication.create_slot("wf").await.unwrap_err();
    assert!(matches!(error, ReplicationError::SlotExists { .. }), "{error}");
    for name in ["", "Not \"A\" Name", "a-b", &"x".repeat(64)] {
        let error = replication.create_slot(name).await.unwrap_err();
        assert!(matches!(error, ReplicationError::SlotName { .. }), "{error}");
    }

    let stream = connect(server).await.start(Some("wf"), at, Timeline(1)).await.unwrap();
    let error = replication.drop_slot("wf").await.unwrap_err();
    let ReplicationError::SlotInUse { pid, .. } = &error else { panic!("{error}") };
    let active = value(server, "SELECT active_pid FROM pg_replication_slots").await;
    assert_eq!(pid.map(|pid| pid.to_string()), Some(active));
    // This and the stream are all that max_wal_senders admits.
    let error = Replication::connect(&server.connection_string(), "third").await.unwrap_err();
    assert!(matches!(error, ReplicationError::NoSenderLeft { .. }), "{error}");
    drop(stream);
    wait_for(server, "SELECT count(*) FROM pg_stat_replication", "1").await;

    server.sql(&["SELECT pg_create_logical_replication_slot('other', 'pgoutput')"]).await;
    let error = connect(server).await.start(Some("other"), at, Timeline(1)).await.unwrap_err();
    assert!(matches!(error, ReplicationError::SlotInvalid { .. }), "{error}");
    let error = replication.create_slot("one_more").await.unwrap_err();
    assert!(matches!(error, ReplicationError::NoSlotLeft { .. }), "{error}");
    wait_for(server, "SELECT count(active_pid) FROM pg_replication_slots", "0").await;
    replication.drop_slot("other").await.unwrap();
}

/// Behind what the server keeps, with a slot and without. Releases before 18 let a lost slot begin,
/// and then miss its WAL.
async fn lost_wal(server: &TestServer, at: Lsn) {
    for _ in 0..8 {
        server.sql(&["CREATE TABLE t AS SELECT generate_series(1, 1000)", "DROP TABLE t"]).await;
        server.sql(&["SELECT pg_switch_wal()", "CHECKPOINT"]).await;
    }
    wait_for(server, "SELECT wal_status FROM pg_replication_slots", "lost").await;
    for slot in [None, Some("wf")] {
        wait_for(server, "SELECT count(*) FROM pg_stat_replication", "0").await;
        let error = match connect(server).await.start(slot, at, Timeline(1)).await {
            Ok(mut stream) => stream.next().await.unwrap_err(),
            Err(error) => error,
        };
        let is_slot_refused = slot.is_some() && server.installation.major >= 18;
        let is_expected = match &error {
            ReplicationError::WalRemoved { at: from, refusal, .. } => {
                *from == at && refusal.code == "58P01" && !is_slot_refused
            }
            ReplicationError::SlotInvalid { .. } => is_slot_refused,
            _ => false,
        };
        assert!(is_expected, "{slot:?}: {error}");
    }
}

/// `rules` in the place of what initdb wrote.
fn admit(server: &TestServer, rules: &str) {
    fs::write(server.data_dir.join("pg_hba.conf"), rules).unwrap();
    server.stop("fast");
    server.launch();
}

#[tokio::test]
async fn who_may_not_stream_is_told_what_is_missing() {
    for installation in oldest_and_newest() {
        let server = TestServer::start(&installation, &[], "");
        server.sql(&["CREATE ROLE \"Wal Fleet\" LOGIN"]).await;
        let connection = local_connection_string(&server.folder(), server.port, "Wal Fleet");
        let error = Replication::connect(&connection, "x").await.unwrap_err();
        let ReplicationError::MissingRight { grant, refusal, .. } = &error else { panic!("{error}") };
        assert_eq!((grant.as_str(), refusal.code.as_str()), ("ALTER ROLE \"Wal Fleet\" REPLICATION;", "42501"));
        server.sql(&[grant]).await;
        Replication::connect(&connection, "x").await.unwrap().identify_system().await.unwrap();

        admit(&server, "local all all trust\n");
        let error = Replication::connect(&connection, "x").await.unwrap_err();
        assert!(matches!(&error, ReplicationError::Rejected { refusal, .. } if refusal.code == "28000"), "{error}");
        assert!(error.to_string().contains("local replication \"Wal Fleet\" peer"), "{error}");
        assert!(!error.is_transient());
    }
}

#[tokio::test]
async fn passwords_are_given_in_every_way_that_a_server_asks_for_them() {
    for installation in oldest_and_newest() {
        let server = TestServer::start(&installation, &[], "");
        let secret = "pä'ss \\word";
        for (encryption, methods) in [("md5", &["md5", "password"][..]), ("scram-sha-256", &["scram-sha-256", "md5"])] {
            let set = format!("SET password_encryption = '{encryption}'");
            let role = format!("CREATE ROLE wf_{} LOGIN REPLICATION PASSWORD 'pä''ss \\word'", &encryption[..3]);
            sql_in_one_session(&server, &[&set, &role]).await;
            for method in methods {
                admit(&server, &format!("local all postgres trust\nlocal replication all {method}\n"));
                let user = format!("wf_{}", &encryption[..3]);
                let connection = local_connection_string(&server.folder(), server.port, &user);
                let quoted = secret.replace('\\', "\\\\").replace('\'', "\\'");
                let right = format!("{connection} password='{quoted}'");
                Replication::connect(&right, "x").await.unwrap().identify_system().await.unwrap();
                let error = Replication::connect(&format!("{connection} password=wrong"), "x").await.unwrap_err();
                let is_wrong = matches!(&error, ReplicationError::Rejected { refusal, .. } if refusal.code == "28P01");
                assert!(is_wrong, "{encryption} {method}: {error}");
                let error = Replication::connect(&connection, "x").await.unwrap_err();
                assert!(matches!(error, ReplicationError::Unauthenticated { .. }), "{encryption} {method}: {error}");
            }
        }
    }
}

async fn sql_in_one_session(server: &TestServer, statements: &[&str]) {
    let (client, connection) = tokio_postgres::connect(&server.connection_string(), NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute(&statements.join(";")).await.unwrap();
}

#[tokio::test]
async fn of_several_hosts_the_one_that_answers_is_taken() {
    let Some(installation) = oldest_and_newest().pop() else { return };
    let server = TestServer::start(&installation, &[], "");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let socket = server.folder().join(format!(".s.PGSQL.{}", server.port));
    // TCP in front of the server's socket.
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = UnixStream::connect(socket).await.unwrap();
        tokio::io::copy_bidirectional(&mut near, &mut far).await
    });
    let connection = format!("host=/nonexistent,localhost hostaddr=127.0.0.1,127.0.0.1 port=1,{port} user=postgres");
    let mut replication = Replication::connect(&connection, "x").await.unwrap();
    assert_eq!(replication.target().0, format!("PostgreSQL at 127.0.0.1 port {port} as postgres"));
    replication.identify_system().await.unwrap();
    let error = Replication::connect("postgres://postgres@%2Fnonexistent,127.0.0.1:1/x", "x").await.unwrap_err();
    let is_last = matches!(&error, ReplicationError::Unreachable { target, .. } if target.0.contains("127.0.0.1"));
    assert!(is_last, "{error}");
}

/// Of every release, since the grammar differs.
#[tokio::test]
async fn commands_are_understood_by_every_release() {
    for installation in crate::postgres::test_server::installations() {
        of_release(&installation).await;
    }
}

async fn of_release(installation: &Installation) {
    let server = TestServer::start(installation, &["--wal-segsize=64"], "");
    let mut replication = connect(&server).await;
    replication.create_slot("wf").await.unwrap();
    assert_eq!(replication.wal_segment_size().await.unwrap().bytes(), 64 << 20);
    let at: Lsn = value(&server, "SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    // Without identify_system before it.
    let mut stream = replication.start(Some("wf"), at, Timeline(1)).await.unwrap();
    server.sql(&["CREATE TABLE t ()"]).await;
    receive_until(&mut stream, Lsn(at.0 + 1), &mut Vec::new()).await;
    let mut replication = stream.finish().await.unwrap();
    replication.drop_slot("wf").await.unwrap();
}
