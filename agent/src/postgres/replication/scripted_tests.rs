//! Against a server that says what a real one says seldom or never.

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::connection::Socket;
use super::*;

const AT: Lsn = Lsn(0x100_0000);

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    out.put_u32(body.len() as u32 + 4);
    out.extend_from_slice(body);
    out
}

fn wal(start: Lsn, bytes: &[u8]) -> Vec<u8> {
    let mut body = vec![b'w'];
    body.put_u64(start.0);
    body.put_u64(start.0 + bytes.len() as u64);
    body.put_i64(1_000_000);
    body.extend_from_slice(bytes);
    message(b'd', &body)
}

fn row(values: &[&str]) -> Vec<u8> {
    let mut body = Vec::new();
    body.put_u16(values.len() as u16);
    for value in values {
        body.put_u32(value.len() as u32);
        body.extend_from_slice(value.as_bytes());
    }
    message(b'D', &body)
}

fn complaint(code: &str, text: &str) -> Vec<u8> {
    message(b'E', format!("SERROR\0C{code}\0M{text}\0\0").as_bytes())
}

fn copy_both() -> Vec<u8> {
    message(b'W', &[0, 0, 0])
}

fn ready() -> Vec<u8> {
    message(b'Z', b"I")
}

/// With a keepalive that answers a report which crossed the server's CopyDone.
fn switch_to(timeline: &str, lsn: &str) -> Vec<u8> {
    let end = [message(b'c', b""), message(b'd', &[b"k".as_slice(), &[0; 17]].concat()), message(b'T', &[0, 0])];
    [end.concat(), row(&[timeline, lsn]), message(b'C', b"START_STREAMING\0"), ready()].concat()
}

fn pair() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Connection::new(Socket::Unix(ours), Target("a script".to_owned())), theirs)
}

/// A stream whose server then says `script`, and is gone.
async fn stream_of(script: &[u8]) -> WalStream {
    let (connection, mut server) = pair();
    server.write_all(&[&copy_both(), script].concat()).await.unwrap();
    server.shutdown().await.unwrap();
    // Kept open for what we write.
    tokio::spawn(async move {
        let mut ignored = Vec::new();
        let _ = server.read_to_end(&mut ignored).await;
    });
    let request = StreamRequest { slot: Some("wf".to_owned()), at: AT, timeline: Timeline(1) };
    WalStream::start(connection, "START_REPLICATION", request).await.unwrap()
}

async fn first_error(script: &[u8]) -> ReplicationError {
    let mut stream = stream_of(script).await;
    loop {
        if let Err(error) = stream.next().await {
            return error;
        }
    }
}

#[tokio::test]
async fn wal_that_does_not_follow_what_came_before_is_refused() {
    let error = first_error(&[wal(AT, b"abc"), wal(Lsn(AT.0 + 4), b"d")].concat()).await;
    assert!(
        matches!(error, ReplicationError::NotContiguous { found: Lsn(0x100_0004), expected: Lsn(0x100_0003), .. }),
        "{error}"
    );
    let error = first_error(&wal(Lsn(0), b"abc")).await;
    assert!(matches!(error, ReplicationError::NotContiguous { expected: AT, .. }), "{error}");
}

#[tokio::test]
async fn messages_that_are_none_are_refused_with_what_is_wrong_with_them() {
    let cases: [(&[u8], &str); 9] = [
        (b"d\0\0\0\x03", "a message d of 3 bytes"),
        (b"d\x7f\0\0\0", "a message d of 2130706432 bytes"),
        (b"HTTP/1.1 400 Bad Request", "a message H of 1414811695 bytes"),
        (&message(b'd', b""), "too short"),
        (&message(b'd', b"w12345678"), "too short"),
        (&message(b'd', b"x"), "of kind x"),
        (&message(b'?', b""), "unknown message tag"),
        (&ready(), "a message Z out of turn"),
        (&copy_both(), "a message W out of turn"),
    ];
    for (script, expected) in cases {
        let error = first_error(script).await;
        assert!(matches!(error, ReplicationError::Malformed { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error} has not: {expected}");
    }
    let error = first_error(&wal(AT, &vec![0; 2 << 20])[..4096]).await;
    assert!(error.to_string().contains("a message d of 2097181 bytes"), "{error}");
}

#[tokio::test]
async fn a_lost_connection_is_told_after_all_that_came_before() {
    let mut stream = stream_of(&[wal(AT, b"abc"), wal(Lsn(AT.0 + 3), b"defg")[..20].to_vec()].concat()).await;
    let StreamEvent::Wal { start, bytes, .. } = stream.next().await.unwrap() else { panic!("no WAL") };
    assert_eq!((start, &*bytes, stream.received_lsn()), (AT, &b"abc"[..], Lsn(AT.0 + 3)));
    let error = stream.next().await.unwrap_err();
    assert!(matches!(error, ReplicationError::Lost { source: None, .. }), "{error}");
    assert!(error.is_transient());
}

/// The server ends the session and closes: a report finds the socket closed before the reason was read.
#[tokio::test]
async fn a_report_that_finds_the_connection_closed_leaves_the_reason_to_be_read() {
    let (connection, mut server) = pair();
    let farewell = complaint("57P01", "terminating connection due to administrator command");
    server.write_all(&[copy_both(), wal(AT, b"abc"), farewell].concat()).await.unwrap();
    // Everything sent to it is read first: data left unread would turn its close into a reset.
    let reading = tokio::spawn(async move {
        let mut query = [0; 23];
        server.read_exact(&mut query).await.unwrap();
    });
    let request = StreamRequest { slot: None, at: AT, timeline: Timeline(1) };
    let mut stream = WalStream::start(connection, "START_REPLICATION", request).await.unwrap();
    reading.await.unwrap();
    for _ in 0..3 {
        stream.report(Positions { written_lsn: AT, ..Positions::default() }, Reply::NotNeeded).await;
    }
    assert!(matches!(stream.next().await.unwrap(), StreamEvent::Wal { .. }));
    let error = stream.next().await.unwrap_err();
    assert!(matches!(&error, ReplicationError::Terminated { refusal, .. } if refusal.code == "57P01"), "{error}");
}

#[tokio::test]
async fn a_server_that_shuts_down_says_so_in_the_midst_of_the_copy() {
    let error = first_error(&[wal(AT, b"abc"), message(b'C', b"COPY 0\0")].concat()).await;
    assert!(matches!(error, ReplicationError::ShutDown { at: Lsn(0x100_0003), .. }), "{error}");
}

#[tokio::test]
async fn the_end_of_a_timeline_gives_the_connection_back() {
    let mut stream = stream_of(&[wal(AT, b"abcd"), switch_to("2", "0/1000002")].concat()).await;
    assert!(matches!(stream.next().await.unwrap(), StreamEvent::Wal { .. }));
    let ended = StreamEvent::TimelineEnded { next: Timeline(2), switch_lsn: Lsn(0x100_0002) };
    assert_eq!(stream.next().await.unwrap(), ended);
    assert_eq!(stream.next().await.unwrap(), ended);
    let mut replication = stream.finish().await.unwrap();
    let error = replication.identify_system().await.unwrap_err();
    assert!(matches!(error, ReplicationError::Lost { .. }), "the script is at its end, not the command: {error}");
    for (timeline, lsn) in [("1", "0/1000000"), ("0", "0/1000000"), ("2", "0/1000001"), ("2", "nowhere"), ("", "")] {
        let error = first_error(&switch_to(timeline, lsn)).await;
        let is_refused = matches!(error, ReplicationError::Malformed { .. } | ReplicationError::Answer { .. });
        assert!(is_refused, "{timeline} {lsn}: {error}");
    }
}

#[tokio::test]
async fn a_call_to_next_that_is_dropped_at_any_byte_loses_nothing() {
    let (connection, mut server) = pair();
    server.write_all(&copy_both()).await.unwrap();
    let request = StreamRequest { slot: None, at: AT, timeline: Timeline(1) };
    let mut stream = WalStream::start(connection, "START_REPLICATION", request).await.unwrap();
    let script = [wal(AT, b"abc"), message(b'S', b"a\0b\0"), switch_to("2", "0/1000003")].concat();
    let mut events = Vec::new();
    for byte in script {
        server.write_all(&[byte]).await.unwrap();
        while let Ok(event) = tokio::time::timeout(Duration::from_millis(1), stream.next()).await {
            let event = event.unwrap();
            let is_end = matches!(event, StreamEvent::TimelineEnded { .. });
            events.push(event);
            if is_end {
                break;
            }
        }
    }
    assert!(matches!(
        &events[..],
        [StreamEvent::Wal { bytes, .. }, StreamEvent::TimelineEnded { .. }] if &bytes[..] == b"abc"
    ));
    let mut written = vec![0; 23 + 5];
    server.read_exact(&mut written).await.unwrap();
    assert_eq!(&written[23..], b"c\0\0\0\x04", "the copy is ended from this side too, once");
}

#[tokio::test]
async fn slices_of_wal_stay_as_they_are_while_more_is_read() {
    let mut script = Vec::new();
    let mut at = AT;
    let lengths = (0..60_usize).map(|index| 1 + (index * 7919) % (128 << 10)).collect::<Vec<_>>();
    for (index, length) in lengths.iter().enumerate() {
        script.extend(wal(at, &vec![index as u8; *length]));
        at = Lsn(at.0 + *length as u64);
    }
    let (connection, mut server) = pair();
    tokio::spawn(async move { server.write_all(&[copy_both(), script].concat()).await });
    let request = StreamRequest { slot: None, at: AT, timeline: Timeline(1) };
    let mut stream = WalStream::start(connection, "START_REPLICATION", request).await.unwrap();
    let mut kept = Vec::new();
    while stream.received_lsn() < at {
        let StreamEvent::Wal { bytes, .. } = stream.next().await.unwrap() else { panic!("no WAL") };
        kept.push(bytes);
        if kept.len() == 20 {
            // The buffers of these may be used again.
            kept.iter_mut().take(10).for_each(|bytes| *bytes = Bytes::new());
        }
    }
    for (index, (bytes, length)) in kept.iter().zip(lengths).enumerate().skip(10) {
        assert!(bytes.len() == length && bytes.iter().all(|byte| *byte == index as u8), "message {index}");
    }
}

#[tokio::test]
async fn a_command_given_up_midway_leaves_no_answer_to_the_next() {
    let (connection, _server) = pair();
    let mut replication = Replication { connection, is_identified: false };
    let given_up = tokio::time::timeout(Duration::from_millis(20), replication.wal_segment_size()).await;
    assert!(given_up.is_err());
    let error = replication.identify_system().await.unwrap_err();
    assert!(matches!(error, ReplicationError::Abandoned { .. }), "{error}");
}

#[tokio::test]
async fn what_the_server_complains_of_has_its_own_name() {
    let (connection, mut server) = pair();
    let mut replication = Replication { connection, is_identified: true };
    let told = complaint("55006", "replication slot \"wf2\" is active for PID 4711");
    server.write_all(&[told, ready()].concat()).await.unwrap();
    let error = replication.drop_slot("wf2").await.unwrap_err();
    assert!(matches!(error, ReplicationError::SlotInUse { pid: Some(4711), .. }), "{error}");
    let stopping = b"SERROR\0C55000\0Mno new commands\0Rexec_replication_command\0\0";
    server.write_all(&[message(b'E', stopping), ready()].concat()).await.unwrap();
    let error = replication.start(Some("wf"), AT, Timeline(1)).await.unwrap_err();
    assert!(matches!(error, ReplicationError::Terminated { .. }), "{error}");
}

#[test]
fn segment_sizes_read_as_show_prints_them() {
    let cases = [("1MB", 1), ("16MB", 16), ("1GB", 1024), ("1024kB", 1), ("1048576B", 1)];
    for (text, megabytes) in cases {
        assert_eq!(parse_segment_size(text).map(SegmentSize::bytes), Some(megabytes << 20), "{text}");
    }
    for text in ["", "MB", "16", "16 MB", "3MB", "2GB", "99999999999999999999GB", "17179869184GB", "-1MB", "é"] {
        assert_eq!(parse_segment_size(text), None, "{text}");
    }
}

/// Listens as a server does and answers the startup message with `script`.
async fn admission(script: Vec<u8>, parameters: &str) -> Result<Replication, ReplicationError> {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join(".s.PGSQL.5432")).unwrap();
    let server = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let length = socket.read_u32().await.unwrap() as usize - 4;
        let mut startup = vec![0; length];
        socket.read_exact(&mut startup).await.unwrap();
        socket.write_all(&script).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        startup
    });
    let text = format!("host={} user=wf {parameters}", dir.path().display());
    let result = Replication::connect(&text, "a-standby").await;
    let is_admitted = result.is_ok();
    let result = if is_admitted { result } else { return result };
    drop(result?);
    let startup = String::from_utf8_lossy(&server.await.unwrap()).into_owned();
    assert!(startup.contains("replication\0true\0") && startup.contains("application_name\0a-standby\0"), "{startup}");
    Replication::connect(&text, "a-standby").await
}

fn authentication(code: u32, rest: &[u8]) -> Vec<u8> {
    let mut body = BytesMut::new();
    body.put_u32(code);
    body.extend_from_slice(rest);
    message(b'R', &body)
}

#[tokio::test]
async fn a_server_that_does_not_prove_itself_is_not_believed() {
    let admitted = [authentication(0, b""), message(b'K', &[0; 8]), ready()].concat();
    let gone = admission(admitted.clone(), "").await.unwrap_err();
    assert!(matches!(gone, ReplicationError::Unreachable { .. }), "admitted once, then nobody listens: {gone}");
    let offer = authentication(10, b"SCRAM-SHA-256\0\0");
    let cases: [(Vec<u8>, &str, &str); 7] = [
        ([offer.clone(), admitted.clone()].concat(), "password=x", "a message R out of turn"),
        ([offer, authentication(11, b"r=other,s=AAAA,i=1")].concat(), "password=x", "authenticate at"),
        (authentication(10, b"SOMETHING-NEW\0\0"), "password=x", "authenticate at"),
        (authentication(7, b""), "", "authenticate at"),
        (authentication(3, b""), "", "authenticate at"),
        (ready(), "", "a message Z out of turn"),
        (authentication(99, b""), "", "unknown authentication tag"),
    ];
    for (script, parameters, expected) in cases {
        let error = admission(script, parameters).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error} has not: {expected}");
    }
    for parameters in ["sslmode=require", "channel_binding=require"] {
        let error = admission(admitted.clone(), parameters).await.unwrap_err();
        assert!(matches!(error, ReplicationError::Tls), "{error}");
    }
    assert!(matches!(
        Replication::connect("host=/nonexistent user=wf", "a\0b").await,
        Err(ReplicationError::Unsendable { .. })
    ));
    assert!(matches!(
        Replication::connect("user=wf", "x").await,
        Err(ReplicationError::Incomplete { missing: "host" })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Frames whose lengths are right and whose contents are anything, and bytes that are not even frames.
    #[test]
    fn whatever_the_server_sends_ends_in_an_event_or_an_error(
        frames in prop::collection::vec(("[wkdcCDETZWRKSNAHG1]", prop::collection::vec(any::<u8>(), 0..40)), 0..6),
        tail in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let framed = frames.into_iter().flat_map(|(tag, body)| message(tag.as_bytes()[0], &body));
        let script: Vec<u8> = framed.chain(tail).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut stream = stream_of(&script).await;
            for _ in 0..8 {
                if stream.next().await.is_err() {
                    break;
                }
            }
            let (connection, mut server) = pair();
            server.write_all(&script).await.unwrap();
            drop(server);
            let _ = Replication { connection, is_identified: false }.identify_system().await;
        });
    }
}
