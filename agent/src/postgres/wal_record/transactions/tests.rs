//! What servers of the oldest and the newest release write, gathered and held against what was asked of them.

use std::time::Duration;

use walfleet_repository::postgres::{Segment, SegmentSize};

use super::*;
use crate::postgres::test_server::{Installation, TestServer, oldest_and_newest};
use crate::postgres::wal_record::{SegmentPlace, digest_segment};

const SETTINGS: &str = "wal_level=replica\nmax_prepared_transactions=5\nwal_keep_size=1GB\nautovacuum=off\n\
    wal_compression=on\ncheckpoint_timeout=1h";
const SEGMENT: u64 = 1 << 20;

/// A server and what its transactions are known by.
struct Witness {
    server: TestServer,
    client: tokio_postgres::Client,
    major: u32,
}

impl Witness {
    async fn start(installation: &Installation, settings: &str) -> Witness {
        let server = TestServer::start(installation, &["--wal-segsize=1"], &format!("{SETTINGS}\n{settings}"));
        let (client, connection) =
            tokio_postgres::connect(&server.connection_string(), tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let witness = Witness { major: installation.major, server, client };
        // What runs is told from here on.
        witness.sql("CHECKPOINT").await;
        witness
    }

    async fn sql(&self, statements: &str) {
        self.client.batch_execute(statements).await.unwrap_or_else(|error| panic!("{statements}: {error:?}"));
    }

    /// Runs statements as one transaction; its number.
    async fn transaction(&self, statements: &str) -> u32 {
        self.sql("BEGIN").await;
        let xid = self.number("SELECT (txid_current() & 4294967295)::bigint").await;
        self.sql(statements).await;
        self.sql("COMMIT").await;
        u32::try_from(xid).unwrap()
    }

    async fn number(&self, query: &str) -> i64 {
        self.client.query_one(query, &[]).await.unwrap().get(0)
    }

    async fn file(&self, table: &str) -> u32 {
        self.number(&format!("SELECT pg_relation_filenode('{table}')::bigint")).await as u32
    }

    async fn lsn(&self) -> Lsn {
        let row = self.client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap();
        row.get::<_, String>(0).parse().unwrap()
    }

    /// Every commit from a position on, in the order of the log; its segment is read from the beginning.
    async fn gathered(&self, from: Lsn) -> Vec<Transaction> {
        self.sql("SELECT pg_logical_emit_message(true, 'test', 'end')").await;
        let to = self.lsn().await;
        let size = SegmentSize::new(SEGMENT).unwrap();
        let (mut transactions, mut found, mut carry) = (Transactions::default(), Vec::new(), None);
        for number in from.segment_number(size)..=to.segment_number(size) {
            let segment = Segment { timeline: walfleet_repository::postgres::Timeline(1), number };
            let file = self.server.data_dir.join("pg_wal").join(segment.file_name(size));
            let bytes = std::fs::read(file).unwrap();
            let place = SegmentPlace { start: segment.start(size), size, timeline: segment.timeline, system_id: None };
            carry = transactions.read_segment(place, carry, &bytes, &mut |ended| found.push(ended)).unwrap();
        }
        assert!(!transactions.has_overflowed());
        found.retain(|ended| ended.commit_start >= from);
        found
    }
}

fn of(found: &[Transaction], xid: u32) -> &Transaction {
    found.iter().find(|one| one.xid == xid).unwrap_or_else(|| panic!("{xid} is not among {found:#?}"))
}

fn rows(inserted: u64, updated: u64, deleted: u64) -> RowCounts {
    RowCounts { inserted, updated, deleted }
}

#[tokio::test]
async fn rows_are_counted_by_relation_and_count_only_if_they_were_committed() {
    for installation in oldest_and_newest() {
        let witness = Witness::start(&installation, "").await;
        let major = witness.major;
        let from = witness.lsn().await;
        witness
            .sql(
                "CREATE TABLE shop (i int PRIMARY KEY, t text); CREATE TABLE other (i int);
                 CREATE TABLE halves (i int) PARTITION BY RANGE (i);
                 CREATE TABLE low PARTITION OF halves FOR VALUES FROM (0) TO (10);
                 CREATE TABLE high PARTITION OF halves FOR VALUES FROM (10) TO (20)",
            )
            .await;
        let (shop, other) = (witness.file("shop").await, witness.file("other").await);
        let single = "INSERT INTO shop SELECT i, repeat('x', 50) FROM generate_series(1, 20000) i";
        let inserting = witness.transaction(single).await;
        let copying =
            witness.transaction("CREATE TEMP TABLE t AS SELECT 1; COPY other FROM PROGRAM 'seq 1 3000'").await;
        let updating =
            witness.transaction("UPDATE shop SET t = 'y' WHERE i <= 700; INSERT INTO other VALUES (0)").await;
        let upserting = witness.transaction("INSERT INTO shop VALUES (1, 'z') ON CONFLICT (i) DO NOTHING").await;
        let emptying = witness.transaction("DELETE FROM shop").await;
        let nested = "SAVEPOINT a; INSERT INTO other SELECT generate_series(1, 5);
            SAVEPOINT b; DELETE FROM other; ROLLBACK TO b; SAVEPOINT c; INSERT INTO other SELECT generate_series(1, 7);
            RELEASE c; RELEASE a; INSERT INTO other VALUES (1)";
        let nested = witness.transaction(nested).await;
        witness.sql("INSERT INTO halves SELECT generate_series(0, 9)").await;
        let moving = witness.transaction("UPDATE halves SET i = i + 10 WHERE i < 4").await;
        let before_abort = witness.number("SELECT (txid_current() & 4294967295)::bigint").await as u32;
        witness.sql("BEGIN; DELETE FROM other; ROLLBACK").await;
        witness.sql("BEGIN; INSERT INTO other VALUES (2), (3); PREPARE TRANSACTION 'kept'").await;
        witness.sql("BEGIN; INSERT INTO other VALUES (4); PREPARE TRANSACTION 'lost'").await;
        witness.sql("COMMIT PREPARED 'kept'").await;
        witness.sql("ROLLBACK PREPARED 'lost'").await;
        let plain = witness.transaction("SELECT 1").await;

        let found = witness.gathered(from).await;
        let only = |xid: u32, relation: u32| match &of(&found, xid).rows[..] {
            [one] if one.relation.number == relation => one.rows,
            rows => panic!("release {major}: {rows:?}"),
        };
        assert_eq!(only(inserting, shop), rows(20_000, 0, 0), "release {major}");
        assert_eq!(only(copying, other), rows(3000, 0, 0), "release {major}: COPY inserts many rows by a record");
        let updating = of(&found, updating);
        assert_eq!(
            updating.rows.iter().map(|of| (of.relation.number, of.rows)).collect::<Vec<_>>(),
            [(shop, rows(0, 700, 0)), (other, rows(1, 0, 0))],
            "release {major}: most rows first"
        );
        assert_eq!(of(&found, upserting).all_rows(), rows(0, 0, 0), "release {major}");
        assert_eq!(only(emptying, shop), rows(0, 0, 20_000), "release {major}");
        assert_eq!(
            only(nested, other),
            rows(13, 0, 0),
            "release {major}: what was rolled back to a savepoint is left out"
        );
        assert_eq!(of(&found, moving).all_rows(), rows(4, 4, 0), "release {major}: rows that change their partition");
        assert_eq!(of(&found, plain).all_rows(), rows(0, 0, 0), "release {major}");
        assert!(!found.iter().any(|one| one.xid == before_abort + 1), "release {major}: it was rolled back");
        let kept = found.iter().find(|one| one.xid == before_abort + 2).expect("the prepared one");
        assert_eq!((kept.all_rows(), kept.rows[0].relation.number), (rows(2, 0, 0), other), "release {major}");
        assert!(!found.iter().any(|one| one.xid == before_abort + 3), "release {major}: it was rolled back");
        for one in &found {
            assert!(one.is_whole && !one.is_destructive(), "release {major}: {one:#?}");
            assert!(one.stop_before == one.commit_start && one.commit_start < one.commit_end);
        }
        let bytes = of(&found, emptying).wal_bytes;
        assert!((20_000 * 50..20_000 * 80).contains(&bytes), "release {major}: {bytes} bytes of deletions");
        assert!(of(&found, plain).wal_bytes < 200, "release {major}");
    }
}

#[tokio::test]
async fn what_becomes_of_files_is_told_apart() {
    for installation in oldest_and_newest() {
        let witness = Witness::start(&installation, "").await;
        let major = witness.major;
        let from = witness.lsn().await;
        let table = |name: &str| {
            format!(
                "CREATE TABLE {name} (i int PRIMARY KEY, t text, u int UNIQUE);
                 INSERT INTO {name} SELECT i, repeat('x', 90), i FROM generate_series(1, 500) i;"
            )
        };
        for name in ["dropped", "emptied", "reloaded", "bloated", "rewritten", "indexed", "swapped", "small"] {
            witness.sql(&table(name)).await;
        }
        witness.sql("CREATE UNLOGGED TABLE loose (i int PRIMARY KEY); INSERT INTO loose VALUES (1)").await;
        witness.sql("CREATE INDEX ON indexed USING brin (i); CREATE INDEX ON indexed USING hash (i)").await;
        witness.sql("CREATE MATERIALIZED VIEW seen AS SELECT * FROM bloated").await;
        let (dropped, emptied) = (witness.file("dropped").await, witness.file("emptied").await);
        let files = |found: &Transaction| found.dropped.iter().map(|of| of.number).collect::<Vec<_>>();

        let drop = witness.transaction("DROP TABLE dropped").await;
        let truncate = witness.transaction("TRUNCATE emptied").await;
        let loose = witness.transaction("TRUNCATE loose").await;
        let reload = witness.transaction("TRUNCATE reloaded; INSERT INTO reloaded SELECT * FROM small").await;
        let young =
            "CREATE TABLE young AS SELECT * FROM small; TRUNCATE young; INSERT INTO young VALUES (1); DROP TABLE young";
        let young = witness.transaction(young).await;
        let rewrite = witness.transaction("ALTER TABLE rewritten ALTER i TYPE bigint").await;
        let reindex = witness.transaction("REINDEX TABLE indexed").await;
        let refresh = witness.transaction("REFRESH MATERIALIZED VIEW seen").await;
        let swap = witness.transaction("DROP TABLE swapped; CREATE TABLE swapped (i int)").await;
        witness.sql("VACUUM FULL bloated").await;
        witness.sql("BEGIN; DROP TABLE small; ROLLBACK; BEGIN; TRUNCATE small; SAVEPOINT a; ROLLBACK").await;
        let rolled_back = witness.transaction("SAVEPOINT a; TRUNCATE small; ROLLBACK TO a").await;

        let found = witness.gathered(from).await;
        let change = |xid: u32| of(&found, xid).files;
        assert_eq!(change(drop), FileChange::Dropped, "release {major}");
        assert!(files(of(&found, drop)).contains(&dropped), "release {major}");
        assert_eq!(change(truncate), FileChange::Truncated, "release {major}");
        assert!(files(of(&found, truncate)).contains(&emptied), "release {major}");
        assert_eq!(change(loose), FileChange::Truncated, "release {major}");
        assert_eq!(change(reload), FileChange::Truncated, "release {major}");
        assert_eq!((change(young), of(&found, young).dropped_count), (FileChange::Kept, 0), "release {major}");
        assert_eq!(change(rewrite), FileChange::Replaced, "release {major}");
        assert_eq!(change(reindex), FileChange::Replaced, "release {major}");
        assert_eq!(change(refresh), FileChange::Replaced, "release {major}");
        assert_eq!(change(swap), FileChange::Replaced, "release {major}");
        assert_eq!(change(rolled_back), FileChange::Kept, "release {major}");
        for xid in [drop, truncate, loose, reload, swap] {
            assert!(of(&found, xid).is_destructive(), "release {major}: {:#?}", of(&found, xid));
        }
        for xid in [young, reindex, rolled_back] {
            assert!(!of(&found, xid).is_destructive(), "release {major}: {:#?}", of(&found, xid));
        }
        let destructive = found.iter().filter(|one| one.is_destructive() && one.files != FileChange::Replaced).count();
        assert_eq!(destructive, 4, "release {major}");
    }
}

/// Its number stands in the commit's record behind everything else, of which each release has more.
#[tokio::test]
async fn a_prepared_transaction_drops_under_its_own_number() {
    for installation in oldest_and_newest() {
        let witness = Witness::start(&installation, "").await;
        let major = witness.major;
        let from = witness.lsn().await;
        witness.sql("CREATE TABLE dropped (i int PRIMARY KEY); CREATE TABLE too (i int)").await;
        let files = [witness.file("dropped").await, witness.file("too").await];
        let xid = witness.number("SELECT (txid_current() & 4294967295)::bigint").await as u32 + 1;
        witness
            .sql("BEGIN; SAVEPOINT a; DROP TABLE dropped; RELEASE a; DROP TABLE too; PREPARE TRANSACTION 'it'")
            .await;
        witness.sql("COMMIT PREPARED 'it'").await;
        let found = witness.gathered(from).await;
        let drop = of(&found, xid);
        assert_eq!((drop.files, drop.is_whole), (FileChange::Dropped, true), "release {major}: {drop:#?}");
        let dropped: Vec<u32> = drop.dropped.iter().map(|file| file.number).collect();
        assert!(files.iter().all(|file| dropped.contains(file)), "release {major}: {dropped:?}");
    }
}

#[tokio::test]
async fn a_truncation_names_tables_where_wal_is_logical() {
    for installation in oldest_and_newest() {
        let witness = Witness::start(&installation, "wal_level=logical").await;
        let from = witness.lsn().await;
        witness.sql("CREATE TABLE emptied (i int); INSERT INTO emptied VALUES (1)").await;
        let database = witness.number("SELECT oid::bigint FROM pg_database WHERE datname = 'postgres'").await as u32;
        let oid = witness.file("emptied").await;
        let truncate = witness.transaction("TRUNCATE emptied").await;
        let found = witness.gathered(from).await;
        assert_eq!(of(&found, truncate).truncated, [(database, oid)]);
        assert_eq!(of(&found, truncate).files, FileChange::Truncated);
    }
}

/// Replay removes a database's files before it comes to the commit, and marks the database as invalid before that.
#[tokio::test]
async fn a_dropped_database_is_gone_before_the_commit() {
    for installation in oldest_and_newest() {
        let witness = Witness::start(&installation, "").await;
        let major = witness.major;
        witness.sql("CREATE DATABASE doomed").await;
        let oid = witness.number("SELECT oid::bigint FROM pg_database WHERE datname = 'doomed'").await as u32;
        witness.sql("CHECKPOINT").await;
        let before = witness.lsn().await;
        witness.sql("DROP DATABASE doomed").await;
        let found = witness.gathered(before).await;
        let drop = found.iter().find(|one| !one.dropped_databases.is_empty()).expect("the drop");
        assert_eq!(drop.dropped_databases, [oid], "release {major}");
        assert!(drop.is_destructive(), "release {major}");
        // Behind the checkpoint's own records, which nobody else writes after: nothing lies between.
        let distance = drop.stop_before.0 - before.0;
        assert!(drop.stop_before < drop.commit_start && distance < 1000, "release {major}: {before} {drop:#?}");
        let mut marks = Vec::new();
        witness.in_place_updates(before, &mut marks);
        assert_eq!(marks.first(), Some(&drop.stop_before), "release {major}: before the database is marked as invalid");
    }
}

impl Witness {
    /// Where rows of shared catalogs are updated in place.
    fn in_place_updates(&self, from: Lsn, marks: &mut Vec<Lsn>) {
        let size = SegmentSize::new(SEGMENT).unwrap();
        let segment = Segment::containing(walfleet_repository::postgres::Timeline(1), from, size);
        let bytes = std::fs::read(self.server.data_dir.join("pg_wal").join(segment.file_name(size))).unwrap();
        let mut decoder = Decoder::new(segment.start(size), size, segment.timeline, None, None).unwrap();
        let mut note = |record: &Record<'_>| {
            let is_in_place = record.rmgr == rmgr::HEAP && record.info & heap::MASK == heap::INPLACE;
            let is_shared = || first_block(record).unwrap().is_some_and(|block| block.tablespace == GLOBAL_TABLESPACE);
            if record.start >= from && is_in_place && is_shared() {
                marks.push(record.start);
            }
        };
        decoder.feed(&bytes, &mut note).unwrap();
    }
}

#[tokio::test]
async fn a_transaction_that_began_before_the_reading_is_not_called_whole() {
    for installation in oldest_and_newest() {
        let witness = Witness::start(&installation, "").await;
        let major = witness.major;
        witness.sql("CREATE TABLE shop (i int)").await;
        witness.sql("BEGIN").await;
        let long = witness.number("SELECT (txid_current() & 4294967295)::bigint").await as u32;
        witness.sql("INSERT INTO shop SELECT generate_series(1, 30000)").await;
        let from = witness.lsn().await;
        witness.sql("CHECKPOINT; INSERT INTO shop SELECT generate_series(1, 2000); COMMIT").await;
        let later = witness.transaction("INSERT INTO shop VALUES (1)").await;
        let found = witness.gathered(from).await;
        let cut = of(&found, long);
        assert!(!cut.is_whole && (2000..32_000).contains(&cut.all_rows().inserted), "release {major}: {cut:#?}");
        assert!(of(&found, later).is_whole, "release {major}");
    }
}

/// A commit whose record is longer than what is kept of one.
#[tokio::test]
async fn a_transaction_of_very_many_subtransactions_is_counted_as_far_as_it_is_named() {
    let Some(installation) = oldest_and_newest().pop() else { return };
    let witness = Witness::start(&installation, "").await;
    witness.sql("CREATE TABLE shop (i int)").await;
    let from = witness.lsn().await;
    let many = witness.transaction(&many_blocks(20_000)).await;
    let few = witness.transaction(&many_blocks(300)).await;
    let found = witness.gathered(from).await;
    let cut = of(&found, many);
    assert!(!cut.is_whole && cut.all_rows().inserted > 16_000, "{cut:#?}");
    assert_eq!((of(&found, few).all_rows(), of(&found, few).is_whole), (rows(300, 0, 0), true));
}

fn many_blocks(count: u32) -> String {
    format!(
        "DO $$ BEGIN FOR i IN 1..{count} LOOP BEGIN INSERT INTO shop VALUES (i); EXCEPTION WHEN division_by_zero
         THEN NULL; END; END LOOP; END $$"
    )
}

#[test]
fn numbers_go_round() {
    assert!(precedes(3, 4) && !precedes(4, 4) && !precedes(5, 4));
    assert!(precedes(u32::MAX, 3) && !precedes(3, u32::MAX));
}

#[test]
fn the_digest_is_not_needed_for_a_carry() {
    // The fixture's carry is the same by either way of reading.
    let bytes = include_bytes!("../fixtures/18.wal");
    let mut whole = bytes.to_vec();
    whole.resize(1 << 20, 0);
    let size = SegmentSize::new(1 << 20).unwrap();
    let place = SegmentPlace {
        start: Lsn(0x90_0000),
        size,
        timeline: walfleet_repository::postgres::Timeline(1),
        system_id: None,
    };
    let digest = digest_segment(place, None, Duration::ZERO, &whole).unwrap();
    let mut count = 0;
    let carry = Transactions::default().read_segment(place, None, &whole, &mut |_| count += 1).unwrap();
    assert_eq!(carry.map(|carry| carry.position()), digest.carry.map(|carry| carry.position()));
    let commits = digest.completions.iter().filter(|one| one.outcome == Outcome::Commit).count();
    assert_eq!(count, commits);
}
