//! The gathered changes beside two witnesses, on servers of every installed release: their files before and after, page
//! by page, and from 17 on their own WAL summaries.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use walfleet_repository::format::changed_blocks::{ChangedBlocks, ForkChanges, ForkName};
use walfleet_repository::postgres::{Segment, SegmentSize};

use super::changes::Changes;
use super::decoder::Decoder;
use super::meaning::meaning;
use super::record::Record;
use super::*;
use crate::postgres::control::ControlFile;
use crate::postgres::relation::{Fork, RelationFile};
use crate::postgres::test_server::{Installation, TestServer, installations};

const PAGE: usize = 8192;
/// Servers at work at once.
const ABREAST: usize = 3;

const SETTINGS: &str = "wal_level=replica\nmax_prepared_transactions=5\nwal_keep_size=1GB\nautovacuum=off\n\
    restore_command='false'\nwal_compression=on\nmax_wal_size=2GB\ncheckpoint_timeout=1h";

/// What is there before.
const BEFORE: &[&str] = &[
    "CREATE TABLE still AS SELECT i, repeat('x', 200) t FROM generate_series(1, 3000) i",
    "VACUUM (FREEZE) still",
    "CREATE TABLE rich (i int, t text, p point, a int[], r int4range, b text)",
    "ALTER TABLE rich ALTER b SET STORAGE EXTERNAL",
    "INSERT INTO rich SELECT i, md5(i::text), point(i, -i), ARRAY[i % 50, i % 7], int4range(i, i + 9),
     CASE WHEN i % 40 = 0 THEN repeat('b', 5000) END FROM generate_series(1, 4000) i",
    "CREATE UNIQUE INDEX ON rich (i); CREATE INDEX ON rich USING hash (t); CREATE INDEX ON rich USING gist (p);
     CREATE INDEX ON rich USING gist (r); CREATE INDEX ON rich USING spgist (p); CREATE INDEX ON rich USING gin (a);
     CREATE INDEX ON rich USING brin (i) WITH (pages_per_range = 2); CREATE INDEX ON rich USING spgist (t)",
    "DO $$ BEGIN IF EXISTS (SELECT FROM pg_available_extensions WHERE name = 'bloom') THEN
     CREATE EXTENSION bloom; CREATE INDEX ON rich USING bloom (i, t); END IF; END $$",
    "CREATE TABLE hot (i int PRIMARY KEY, n int) WITH (fillfactor = 50)",
    "INSERT INTO hot SELECT i, 0 FROM generate_series(1, 3000) i",
    "CREATE TABLE shrunk AS SELECT i, repeat('s', 100) t FROM generate_series(1, 3000) i",
    "CREATE TABLE emptied AS SELECT * FROM shrunk",
    "CREATE TABLE dropped AS SELECT * FROM shrunk",
    "CREATE TABLE moved AS SELECT * FROM shrunk",
    "CREATE TABLE rewritten AS SELECT * FROM shrunk",
    "CREATE TABLE hinted AS SELECT * FROM shrunk",
    "CREATE UNLOGGED TABLE loose AS SELECT * FROM shrunk; CREATE INDEX ON loose (i)",
    "CREATE MATERIALIZED VIEW seen AS SELECT * FROM shrunk",
    "CREATE SEQUENCE numbers; SELECT nextval('numbers')",
    "CREATE DATABASE plain",
    "CREATE DATABASE doomed",
];

const LOAD: &[&str] = &[
    "INSERT INTO rich SELECT i, md5(i::text), point(i, -i), ARRAY[i % 50, i % 7], int4range(i, i + 9), repeat('c', 3000)
     FROM generate_series(4001, 6000) i",
    "UPDATE rich SET t = md5(t), p = point(i, i), a = a || 3 WHERE i % 11 = 0",
    "DELETE FROM rich WHERE i BETWEEN 500 AND 1500",
    "VACUUM rich",
    "BEGIN; INSERT INTO rich (i) SELECT generate_series(90000, 92000); ROLLBACK",
    "INSERT INTO rich (i, p) SELECT i, point(i % 100, i) FROM generate_series(10000, 12000) i",
    "UPDATE hot SET n = n + 1 WHERE i % 3 = 0; UPDATE hot SET n = n + 1 WHERE i % 5 = 0",
    "SELECT sum(n) FROM hot",
    "BEGIN; SELECT * FROM hot WHERE i < 9 FOR SHARE; SAVEPOINT a; UPDATE hot SET n = 9 WHERE i = 5; ROLLBACK TO a; COMMIT",
    "BEGIN; UPDATE hot SET n = 100 WHERE i = 1; PREPARE TRANSACTION 'one'",
    "BEGIN; CREATE TABLE prepared AS SELECT * FROM hot; PREPARE TRANSACTION 'two'",
    "DELETE FROM shrunk WHERE i > 700",
    "VACUUM shrunk",
    "INSERT INTO shrunk SELECT i, 'again' FROM generate_series(1, 2000) i",
    "TRUNCATE emptied; INSERT INTO emptied SELECT * FROM shrunk",
    "BEGIN; CREATE TABLE young AS SELECT * FROM shrunk; TRUNCATE young; INSERT INTO young VALUES (1, 'y'); COMMIT",
    "BEGIN; CREATE TABLE never AS SELECT * FROM shrunk; CREATE INDEX ON never (i); ROLLBACK",
    "CREATE TABLE brief AS SELECT * FROM shrunk; DROP TABLE brief",
    "DROP TABLE dropped",
    "ALTER TABLE moved SET TABLESPACE elsewhere",
    "CREATE INDEX ON moved (i) TABLESPACE elsewhere",
    "ALTER TABLE rewritten ALTER i TYPE bigint",
    "CREATE INDEX ON rewritten (i); CLUSTER rewritten USING rewritten_i_idx; REINDEX TABLE rewritten",
    "REINDEX INDEX CONCURRENTLY rewritten_i_idx",
    "CREATE UNLOGGED TABLE loose_too AS SELECT * FROM shrunk; CREATE INDEX ON loose_too USING gin ((ARRAY[i]))",
    "CREATE INDEX ON loose_too USING gist ((point(i, i))); CREATE INDEX ON loose_too USING spgist ((point(i, i)))",
    "ALTER TABLE loose SET LOGGED; CREATE TABLE lost AS SELECT * FROM shrunk; ALTER TABLE lost SET UNLOGGED",
    "REFRESH MATERIALIZED VIEW seen",
    "SELECT nextval('numbers') FROM generate_series(1, 100)",
    "SELECT lo_from_bytea(0, convert_to(repeat('l', 100000), 'UTF8'))",
    "CREATE TEMP TABLE temporary AS SELECT * FROM shrunk",
    "SELECT count(*) FROM hinted",
    "VACUUM FULL pg_class",
    "VACUUM FULL pg_database",
    "VACUUM FULL pg_proc",
    "ANALYZE",
    "DROP DATABASE doomed",
    "CREATE DATABASE there TEMPLATE plain TABLESPACE elsewhere",
    "ALTER DATABASE plain SET TABLESPACE elsewhere",
];

const BY_BOTH_WAYS: &[&str] = &[
    "CREATE DATABASE copied TEMPLATE there STRATEGY file_copy",
    "CREATE DATABASE logged TEMPLATE there STRATEGY wal_log",
];

/// After a checkpoint, and before a crash.
const AGAIN: &[&str] = &[
    "COMMIT PREPARED 'one'",
    "ROLLBACK PREPARED 'two'",
    "UPDATE rich SET t = md5(t), p = point(i, 7) WHERE i % 13 = 0",
    "INSERT INTO rich SELECT i, md5(i::text), point(i, -i), ARRAY[i % 50], int4range(i, i + 9), NULL
     FROM generate_series(20001, 21000) i",
    "SELECT gin_clean_pending_list(indexrelid) FROM pg_index JOIN pg_class c ON c.oid = indexrelid
     WHERE relam = (SELECT oid FROM pg_am WHERE amname = 'gin') AND indrelid = 'rich'::regclass",
    "DELETE FROM hot WHERE i > 2500",
    "VACUUM hot",
    "DELETE FROM rich WHERE i % 3 = 0",
    "VACUUM (FREEZE) rich",
    "TRUNCATE shrunk",
    "CREATE TABLE late AS SELECT * FROM rich",
    "DROP DATABASE there",
];

/// A relation's fork and a page of it.
type Pages = BTreeMap<(ForkName, u32), Vec<u8>>;

#[test]
fn the_changes_name_every_page_that_differs_and_all_that_postgresql_summarizes() {
    let installations = installations();
    std::thread::scope(|scope| {
        let mut running = std::collections::VecDeque::new();
        for installation in &installations {
            if running.len() == ABREAST
                && let Some(first) = running.pop_front()
            {
                std::thread::ScopedJoinHandle::join(first).unwrap();
            }
            running.push_back(scope.spawn(|| exercise(installation)));
        }
        running.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

fn exercise(installation: &Installation) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let run = |statements: &[&str], server: &TestServer| runtime.block_on(server.sql(statements));
    let major = installation.major;
    let summaries = if major >= 17 { "\nsummarize_wal=on" } else { "" };
    let server = TestServer::start(installation, &["--wal-segsize=1", "-k"], &format!("{SETTINGS}{summaries}"));
    let elsewhere = server.folder().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    installation.give(&elsewhere);
    run(&[&format!("CREATE TABLESPACE elsewhere LOCATION '{}'", elsewhere.display())], &server);
    run(BEFORE, &server);
    server.stop("fast");
    let from = ControlFile::read(&server.data_dir).unwrap().redo_lsn;
    let before = pages(&server.data_dir);

    server.launch();
    run(LOAD, &server);
    if major >= 15 {
        run(BY_BOTH_WAYS, &server);
    }
    run(&["CHECKPOINT"], &server);
    run(AGAIN, &server);
    server.stop("immediate");
    server.launch();
    run(&["INSERT INTO rich (i, t) SELECT i, 'after' FROM generate_series(30000, 31000) i", "VACUUM rich"], &server);
    run(&["SELECT count(*) FROM late", "CHECKPOINT"], &server);
    if major >= 17 {
        runtime.block_on(assert_covers_summaries(&server));
    }
    server.stop("fast");
    let control = ControlFile::read(&server.data_dir).unwrap();
    let after = pages(&server.data_dir);
    let changes = gathered(&server.data_dir, control.wal_segment_size, from, control.redo_lsn);
    assert_names_what_differs(major, &before, &after, &changes);
}

/// Whether the block may have changed.
fn names(changes: &ForkChanges, block: u32) -> bool {
    changes.cut_to.is_some_and(|cut| cut <= block) || changes.blocks.contains(block)
}

/// Whatever differs is named, and a good part of what does not is not.
fn assert_names_what_differs(major: u32, before: &Pages, after: &Pages, changes: &ChangedBlocks) {
    let (mut different, mut spared) = (0, 0);
    let mut missing = Vec::new();
    for ((fork, block), page) in after {
        let is_named = changes.is_database_changed(fork.tablespace, fork.database)
            || changes.fork(fork).is_some_and(|changes| names(changes, *block));
        let differs = match before.get(&(*fork, *block)) {
            Some(former) => former != page,
            // Files are extended with zeros past the log (RelationAddBlocks, src/backend/access/heap/hio.c).
            None => page.iter().any(|byte| *byte != 0),
        };
        different += u32::from(differs);
        spared += u32::from(!is_named);
        if differs && !is_named {
            missing.push((fork, block));
        }
    }
    assert!(missing.is_empty(), "release {major}: {} of {different} are not named: {missing:?}", missing.len());
    assert!(different > 1000 && spared > 1000, "release {major}: {different} differ, {spared} are spared");
}

/// Every page of every permanent relation's main and init forks, as files have them.
fn pages(data_dir: &Path) -> Pages {
    let mut folders = vec![(1664, 0, data_dir.join("global"))];
    let databases = |tablespace: u32, base: &Path| {
        let entries = std::fs::read_dir(base).into_iter().flatten().flatten();
        let numbered = entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())));
        numbered.map(move |(database, path)| (tablespace, database, path)).collect::<Vec<_>>()
    };
    folders.extend(databases(1663, &data_dir.join("base")));
    for (_, tablespace, link) in databases(0, &data_dir.join("pg_tblspc")) {
        for version in std::fs::read_dir(link).unwrap().flatten() {
            folders.extend(databases(tablespace, &version.path()));
        }
    }
    let mut pages = Pages::new();
    for (tablespace, database, folder) in folders {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            files.extend(RelationFile::parse(entry.file_name().as_encoded_bytes()).map(|file| (file, entry.path())));
        }
        let unlogged: BTreeSet<u32> =
            files.iter().filter(|(file, _)| file.fork == Fork::Init).map(|(file, _)| file.number).collect();
        for (file, path) in files {
            let fork = match file.fork {
                Fork::Main if !unlogged.contains(&file.number) => 0,
                Fork::Init => 3,
                _ => continue,
            };
            let name = ForkName { tablespace, database, relation: file.number, fork };
            let first = file.segment * 131_072;
            for (block, page) in (first..).zip(std::fs::read(path).unwrap().chunks(PAGE)) {
                pages.insert((name, block), page.to_vec());
            }
        }
    }
    pages
}

/// What the records that begin in a range change.
fn gathered(data_dir: &Path, size: SegmentSize, from: Lsn, to: Lsn) -> ChangedBlocks {
    let (mut changes, mut whole, mut carry) = (Changes::default(), ChangedBlocks::default(), None);
    for number in from.0 / u64::from(size.bytes()).. {
        let segment = Segment { timeline: walfleet_repository::postgres::Timeline(1), number };
        let (start, file) = (segment.start(size), data_dir.join("pg_wal").join(segment.file_name(size)));
        if start >= to {
            break;
        }
        let bytes = std::fs::read(file).unwrap();
        let place = SegmentPlace { start, size, timeline: segment.timeline, system_id: None };
        let mut decoder = Decoder::new(start, size, segment.timeline, None, carry.clone()).unwrap();
        let mut note = |record: &Record<'_>| {
            if (from..to).contains(&record.start) {
                changes.note(record, &meaning(record).unwrap());
            }
        };
        decoder.feed(&bytes, &mut note).unwrap();
        let digest = digest_segment(place, carry, Duration::ZERO, &bytes).unwrap();
        if let Ok(changed) = ChangedBlocks::decode(&digest.changed_blocks.unwrap_or_default().encode()) {
            whole.absorb(&changed);
        }
        carry = digest.carry;
    }
    let changes = changes.finish().expect("every change is known");
    // The sum of what is stored beside segments reaches no less far.
    let mut both = whole.clone();
    both.absorb(&changes);
    assert!(from.segment_offset(size) != 0 || both == whole);
    changes
}

/// Everything that PostgreSQL's summarizer names is named here for the same range of WAL, with at least its reach.
async fn assert_covers_summaries(server: &TestServer) {
    let major = server.installation.major;
    let (client, connection) =
        tokio_postgres::connect(&server.connection_string(), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let size = ControlFile::read(&server.data_dir).unwrap().wal_segment_size;
    let redo = ControlFile::read(&server.data_dir).unwrap().redo_lsn;
    let query = "SELECT tli::int, start_lsn::text, end_lsn::text FROM pg_available_wal_summaries()";
    let deadline = Instant::now() + Duration::from_secs(60);
    let summaries = loop {
        let rows = client.query(query, &[]).await.unwrap();
        let lsn = |row: &tokio_postgres::Row, at| row.get::<_, String>(at).parse::<Lsn>().unwrap();
        let mut ranges: Vec<_> = rows.iter().map(|row| (lsn(row, 1), lsn(row, 2))).collect();
        ranges.sort_unstable();
        if ranges.last().is_some_and(|(_, end)| *end >= redo) {
            break ranges;
        }
        assert!(Instant::now() < deadline, "release {major}: summaries end at {:?}, not {redo}", ranges.last());
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let (mut blocks, mut cuts, mut dropped) = (0, 0, 0);
    for (from, to) in summaries {
        let changes = gathered(&server.data_dir, size, from, to);
        let query = format!(
            "SELECT reltablespace, reldatabase, relfilenode, relforknumber::int, relblocknumber, is_limit_block
             FROM pg_wal_summary_contents(1, '{from}', '{to}')"
        );
        for row in client.query(&query, &[]).await.unwrap() {
            let (fork, block): (i32, i64) = (row.get(3), row.get(4));
            let name =
                ForkName { tablespace: row.get(0), database: row.get(1), relation: row.get(2), fork: fork as u8 };
            if fork == 1 || fork == 2 || changes.is_database_changed(name.tablespace, name.database) {
                continue;
            }
            let (ours, block, is_cut) = (changes.fork(&name), block as u32, row.get::<_, bool>(5));
            let is_named = match is_cut {
                true => ours.is_some_and(|ours| ours.cut_to.is_some_and(|cut| cut <= block)),
                false => ours.is_some_and(|ours| names(ours, block)),
            };
            // The summarizer cuts all forks of a relation that was dropped to nothing.
            let is_gone = || is_cut && block == 0 && is_dropped(&server.data_dir, &name);
            assert!(is_named || is_gone(), "release {major}, {from} to {to}: {name:?} {block} cut {is_cut}: {ours:?}");
            blocks += u32::from(!is_cut);
            cuts += u32::from(is_cut && is_named);
            dropped += u32::from(!is_named);
        }
    }
    assert!(
        blocks > 500 && cuts > 20 && dropped > 5,
        "release {major}: {blocks} blocks, {cuts} cuts, {dropped} dropped"
    );
}

/// Whether nothing is left of a fork but the empty file that keeps its number until the next checkpoint.
fn is_dropped(data_dir: &Path, name: &ForkName) -> bool {
    let suffix = if name.fork == 3 { "_init" } else { "" };
    let file = format!("{}/{}{suffix}", name.database, name.relation);
    let folder = match name.tablespace {
        1664 => data_dir.join("global").join(format!("{}{suffix}", name.relation)),
        1663 => data_dir.join("base").join(file),
        tablespace => {
            let link = data_dir.join("pg_tblspc").join(tablespace.to_string());
            std::fs::read_dir(link).unwrap().flatten().next().unwrap().path().join(file)
        }
    };
    std::fs::metadata(folder).map_or(true, |metadata| metadata.len() == 0)
}

/// `cargo test -p walfleet-agent --lib gathering_costs -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn gathering_costs() {
    let installation = installations().pop().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = TestServer::start(&installation, &["-k"], "wal_keep_size=10GB\nmax_wal_size=10GB\nautovacuum=off");
    let run = |statements: &[&str]| runtime.block_on(server.sql(statements));
    run(&[
        "CREATE TABLE rows (i int PRIMARY KEY, n int, t text) WITH (fillfactor = 80)",
        "INSERT INTO rows SELECT i, 0, repeat('x', 80) FROM generate_series(1, 600000) i",
        "CHECKPOINT",
    ]);
    let mut mark = 0;
    let mut newer = || {
        let names = std::fs::read_dir(server.data_dir.join("pg_wal")).unwrap().flatten();
        let size = SegmentSize::new(16 << 20).unwrap();
        let segments = names.filter_map(|entry| Segment::from_file_name(entry.file_name().to_str()?, size).ok());
        let last = ControlFile::read(&server.data_dir).unwrap().redo_lsn.0 / (16 << 20);
        let numbers: BTreeSet<u64> =
            segments.map(|segment| segment.number).filter(|n| (mark + 1..last).contains(n)).collect();
        mark = last;
        numbers
            .into_iter()
            .map(|n| Segment { timeline: walfleet_repository::postgres::Timeline(1), number: n })
            .collect::<Vec<_>>()
    };
    let loads: [(&str, &[&str]); 3] = [
        ("inserts in order", &["SELECT 1"]),
        ("scattered updates with images", &["UPDATE rows SET n = n + 1 WHERE i % 40 = 0"]),
        (
            "scattered updates",
            &["UPDATE rows SET n = n + 1 WHERE i % 7 = 1", "UPDATE rows SET n = n + 1 WHERE i % 7 = 2"],
        ),
    ];
    for (what, statements) in loads {
        run(statements);
        run(&["CHECKPOINT"]);
        let segments = newer();
        measure(what, &server.data_dir, &segments);
    }
}

fn measure(what: &str, data_dir: &Path, segments: &[Segment]) {
    let size = SegmentSize::new(16 << 20).unwrap();
    let segments: Vec<_> = segments
        .iter()
        .map(|segment| (*segment, std::fs::read(data_dir.join("pg_wal").join(segment.file_name(size))).unwrap()))
        .collect();
    let (mut records, mut pages, mut named) = (0u64, 0u64, 0);
    let mut best = [f64::MAX; 3];
    for _ in 0..7 {
        for (way, best) in best.iter_mut().enumerate() {
            let begin = Instant::now();
            for (segment, bytes) in &segments {
                let (start, timeline) = (segment.start(size), segment.timeline);
                let mut changes = Changes::default();
                let mut direct = ChangedBlocks::default();
                let mut decoder = Decoder::new(start, size, timeline, None, None).unwrap();
                let mut note = |record: &Record<'_>| {
                    let meaning = meaning(record).unwrap();
                    if way == 1 {
                        changes.note(record, &meaning);
                    }
                    if way == 2 {
                        let _ = record.for_each_block(|b| {
                            pages += 1;
                            let name = ForkName {
                                tablespace: b.tablespace,
                                database: b.database,
                                relation: b.relation,
                                fork: b.fork,
                            };
                            direct.change(name, b.block);
                        });
                    }
                    records += 1;
                    std::hint::black_box(meaning);
                };
                decoder.feed(bytes, &mut note).unwrap();
                if way == 1 {
                    named += changes.finish().unwrap().block_count();
                }
            }
            *best = best.min(begin.elapsed().as_secs_f64());
        }
    }
    let count = segments.len().max(1) as f64;
    let per = |value: u64, rounds: u64| value / rounds / segments.len().max(1) as u64;
    let [without, with, direct] = best.map(|seconds| seconds * 1000.0 / count);
    eprintln!(
        "{what}: {} segments of {} records, {} pages, {} named: {without:.2} ms each, {with:.2} ms with changes, {direct:.2} ms direct",
        segments.len(),
        per(records, 21),
        per(pages, 7),
        per(named, 7),
    );
}
