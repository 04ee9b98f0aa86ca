//! The reader beside pg_waldump, record by record, on WAL that servers of every installed release write through a load,
//! a crash and a promotion.

use std::time::Duration;

use jiff::Timestamp;
use walfleet_repository::postgres::{Segment, SegmentSize, Timeline};

use super::decoder::Decoder;
use super::meaning::{Meaning, meaning};
use super::record::{BlockReference, Record};
use super::*;
use crate::postgres::test_server::{TestServer, installations};

/// What both say of a record.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Line {
    start: Lsn,
    body_len: u32,
    /// tablespace/database/relation, fork, block
    blocks: Vec<(String, u8, u32)>,
    completion: Option<(Outcome, i64)>,
}

const LOAD: &[&str] = &[
    "CREATE TABLE rows (i int PRIMARY KEY, t text)",
    "INSERT INTO rows SELECT i, repeat('x', 100) FROM generate_series(1, 20000) i",
    "BEGIN; UPDATE rows SET t = 'y' WHERE i % 7 = 0; SAVEPOINT s; DELETE FROM rows WHERE i < 50; ROLLBACK TO s; COMMIT",
    "BEGIN; INSERT INTO rows VALUES (-1, 'never'); ROLLBACK",
    "BEGIN; INSERT INTO rows VALUES (-2, 'two'); PREPARE TRANSACTION 'kept'",
    "BEGIN; INSERT INTO rows VALUES (-3, 'three'); PREPARE TRANSACTION 'lost'",
    "COMMIT PREPARED 'kept'",
    "ROLLBACK PREPARED 'lost'",
    "SELECT pg_create_restore_point('before')",
    "SELECT pg_logical_emit_message(true, 'long', repeat('z', 3000000))",
    "CHECKPOINT",
    "UPDATE rows SET t = 'z' WHERE i % 5 = 0",
    "VACUUM rows",
    "CREATE TABLE gone AS SELECT * FROM rows",
    "DROP TABLE gone",
    "SELECT pg_switch_wal()",
    "INSERT INTO rows VALUES (-4, 'four')",
];

#[tokio::test]
async fn every_record_reads_as_pg_waldump_reads_it() {
    for installation in installations() {
        if !installation.has("pg_waldump") {
            continue;
        }
        let settings = "wal_level=logical\nmax_prepared_transactions=5\nwal_keep_size=1GB\nwal_compression=on\n\
            restore_command='false'\nautovacuum=off";
        let server = TestServer::start(&installation, &["--wal-segsize=1"], settings);
        server.sql(LOAD).await;
        server.stop("immediate");
        server.launch();
        server.sql(&["DELETE FROM rows WHERE i = -4"]).await;
        server.stop("fast");
        std::fs::write(server.data_dir.join("standby.signal"), "").unwrap();
        server.launch();
        installation.run("pg_ctl", &["-D", &server.data_dir.display().to_string(), "-w", "promote"]);
        server.sql(&["INSERT INTO rows VALUES (-5, 'on timeline two')"]).await;
        server.stop("fast");

        let segments = segments(&server);
        let ours = decoded(&server, &segments);
        let theirs = dumped(&server, &segments);
        let major = installation.major;
        assert!(theirs.iter().filter(|line| line.completion.is_some()).count() > 10, "release {major}");
        let mut ours = ours.iter();
        for line in &theirs {
            assert_eq!(ours.next(), Some(line), "release {major}");
        }
        assert_eq!(ours.next(), None, "release {major}");
    }
}

/// The segments on the way from the first to the last, of timeline 2 where it has one.
fn segments(server: &TestServer) -> Vec<Segment> {
    let size = SegmentSize::new(1 << 20).unwrap();
    let mut by_number = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir(server.data_dir.join("pg_wal")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Ok(segment) = Segment::from_file_name(&name, size) else { continue };
        let newest = by_number.entry(segment.number).or_insert(segment);
        *newest = segment.max(*newest);
    }
    by_number.into_values().collect()
}

fn decoded(server: &TestServer, segments: &[Segment]) -> Vec<Line> {
    let size = SegmentSize::new(1 << 20).unwrap();
    let (mut lines, mut carry) = (Vec::new(), None);
    let mut switched = false;
    for segment in segments {
        let bytes = std::fs::read(server.data_dir.join("pg_wal").join(segment.file_name(size))).unwrap();
        let place = SegmentPlace { start: segment.start(size), size, timeline: segment.timeline, system_id: None };
        let digest = digest_segment(place, carry.clone(), Duration::ZERO, &bytes).unwrap();
        assert_eq!((digest.malformed, digest.headless && carry.is_some()), (0, false));
        switched |= digest.recovery_ends.iter().any(|(_, to, from)| (to.0, from.0) == (2, 1));
        let mut decoder = Decoder::new(place.start, size, place.timeline, None, carry).unwrap();
        decoder.feed(&bytes, &mut |record| lines.push(line(record))).unwrap();
        carry = digest.carry;
        if carry.is_none() {
            break;
        }
    }
    assert!(switched, "the promotion is seen");
    lines
}

fn line(record: &Record<'_>) -> Line {
    let mut blocks = Vec::new();
    let name = |block: &BlockReference| format!("{}/{}/{}", block.tablespace, block.database, block.relation);
    record.for_each_block(|block| blocks.push((name(&block), block.fork, block.block))).unwrap();
    let completion = match meaning(record).unwrap() {
        Meaning::Completed(completion) => Some((completion.outcome, completion.at_us)),
        _ => None,
    };
    Line { start: record.start, body_len: record.body_len, blocks, completion }
}

fn dumped(server: &TestServer, segments: &[Segment]) -> Vec<Line> {
    let size = SegmentSize::new(1 << 20).unwrap();
    let mut lines = Vec::new();
    // pg_waldump reads one timeline's files.
    for timeline in [1, 2] {
        let of_it = |segment: &&Segment| segment.timeline == Timeline(timeline);
        let of_timeline: Vec<_> = segments.iter().filter(of_it).collect();
        let Some((first, last)) = of_timeline.first().zip(of_timeline.last()) else { continue };
        let folder = server.data_dir.join("pg_wal").display().to_string();
        let mut arguments = vec!["-p".to_owned(), folder, "-t".to_owned(), timeline.to_string()];
        if timeline == 1 {
            // Its last segment goes on in timeline 2's, where pg_waldump does not look.
            arguments.extend([first.file_name(size), last.file_name(size)]);
        } else {
            arguments.push(first.file_name(size));
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = server.installation.try_run("pg_waldump", &arguments);
        lines.extend(String::from_utf8_lossy(&output.stdout).lines().filter_map(parsed));
    }
    lines.sort_by_key(|line: &Line| line.start);
    lines.dedup();
    lines
}

/// `rmgr: Heap len (rec/tot): 54/ 150, tx: 733, lsn: 0/0155A, prev 0/0155, desc: INSERT …, blkref #0: rel 1663/5/1259 …`
fn parsed(text: &str) -> Option<Line> {
    let after = |what: &str| text.split_once(what).map(|(_, rest)| rest.trim_start());
    let until = |text: &str, ends: &[char]| text.split(ends).next().unwrap_or_default().trim().to_owned();
    let total: u32 = until(after("(rec/tot):")?.split_once('/')?.1, &[',']).parse().unwrap();
    let description = after("desc: ")?;
    let completion = text.starts_with("rmgr: Transaction").then(|| completion(description)).flatten();
    let blocks = text.split(", blkref #").skip(1).map(|block| {
        let block = block.split_once("rel ").unwrap().1;
        let mut words = block.split_whitespace();
        let relation = words.next().unwrap().to_owned();
        let fork = if block.contains("fork fsm") { 1 } else { 0 };
        let fork = if block.contains("fork vm") { 2 } else { fork };
        let number = words.skip_while(|word| *word != "blk").nth(1).unwrap();
        (relation, fork, until(number, &[',', ';']).parse().unwrap())
    });
    Some(Line {
        start: until(after("lsn: ")?, &[',']).parse().unwrap(),
        body_len: total - 24,
        blocks: blocks.collect(),
        completion,
    })
}

/// `COMMIT 2026-11-21 05:56:33.238621 UTC; …`, `ABORT_PREPARED 741: 2026-…`
fn completion(description: &str) -> Option<(Outcome, i64)> {
    let outcome = match description.split_whitespace().next()? {
        "COMMIT" | "COMMIT_PREPARED" => Outcome::Commit,
        "ABORT" | "ABORT_PREPARED" => Outcome::Abort,
        _ => return None,
    };
    let time = description.split(" UTC").next()?;
    let time = time.get(time.len().checked_sub(26)?..)?;
    let time: Timestamp = format!("{}Z", time.replace(' ', "T")).parse().unwrap();
    Some((outcome, time.as_microsecond()))
}
