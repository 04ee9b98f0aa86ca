//! The scan and the manifest against pg_basebackup and pg_verifybackup of every installed release: the same files, the
//! same bytes, and a backup of our own that the judge accepts and that stops being accepted when a byte changes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::Value;

use super::*;
use crate::backup::scan::{Scan, ScanSpec, Scanned, ScannedKind};
use crate::postgres::control::{ControlCopy, ControlFile};
use crate::postgres::server::{CheckpointPace, Server};
use crate::postgres::test_server::{Installation, TestServer, oldest_and_newest};
use walfleet_repository::checksum;

#[test]
fn odd_paths_and_times_are_written_as_the_server_writes_them() {
    let mut writer = ManifestWriter::new(Vec::new(), 18, SystemId(42)).unwrap();
    writer.file("a \"b\"\\\n\u{fc}".as_bytes(), 3, 1_780_583_519_999_999, Some(0xE27B_4E99)).unwrap();
    writer.file(b"\xff\xfe", 0, i64::MAX, None).unwrap();
    let range = |timeline, start, end| WalRange { timeline: Timeline(timeline), start: Lsn(start), end: Lsn(end) };
    let bytes = writer.finish(&[range(1, 0x28, 0x100), range(2, 0x100, 0x1_0000_0000)]).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let expected = "{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 42,\n\"Files\": [\n\
        { \"Path\": \"a \\\"b\\\"\\\\\\n\u{fc}\", \"Size\": 3, \"Last-Modified\": \"2026-06-04 14:31:59 GMT\", \
        \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"994e7be2\" },\n\
        { \"Encoded-Path\": \"fffe\", \"Size\": 0, \"Last-Modified\": \"1970-01-01 00:00:00 GMT\" }\n],\n\"WAL-Ranges\": [\n\
        { \"Timeline\": 1, \"Start-LSN\": \"0/28\", \"End-LSN\": \"0/100\" },\n\
        { \"Timeline\": 2, \"Start-LSN\": \"0/100\", \"End-LSN\": \"1/0\" }\n],\n\"Manifest-Checksum\": \"";
    assert!(text.starts_with(expected), "{text}");
    assert!(serde_json::from_str::<Value>(&text).is_ok());
}

/// A server with what makes backups hard: a tablespace outside, unlogged and temporary relations, odd names.
async fn server_with_odds(installation: &Installation) -> TestServer {
    let server = TestServer::start(installation, &[], "autovacuum=off");
    let location = server.folder().join("space");
    fs::create_dir(&location).unwrap();
    installation.give(&location);
    server
        .sql(&[
            &format!("CREATE TABLESPACE space LOCATION '{}'", location.display()),
            "CREATE TABLE rows AS SELECT i, repeat('x', 100) AS t FROM generate_series(1, 10000) i",
            "CREATE TABLE spaced (i int) TABLESPACE space",
            "CREATE UNLOGGED TABLE unlogged AS SELECT 1 AS i",
            "CREATE INDEX ON unlogged (i)",
            "CREATE TEMPORARY TABLE temporary AS SELECT 1 AS i",
            "VACUUM",
            "CHECKPOINT",
        ])
        .await;
    fs::write(server.data_dir.join("grüße \"x\""), "odd").unwrap();
    fs::write(server.data_dir.join(OsStr::from_bytes(b"not utf-8 \xff")), "odd").unwrap();
    for name in [OsStr::new("grüße \"x\""), OsStr::from_bytes(b"not utf-8 \xff")] {
        installation.give(&server.data_dir.join(name));
    }
    server
}

fn scan(server: &TestServer) -> Scan {
    let control = ControlFile::read(&server.data_dir).unwrap();
    let (data_dir, major) = (server.data_dir.clone(), server.installation.major);
    Scan::new(ScanSpec { data_dir, major, catalog_version: control.catalog_version, without_content: Vec::new() })
        .unwrap()
}

/// Path (encoded or not) to size and checksum.
fn listed(manifest: &Value) -> BTreeMap<String, (u64, String)> {
    let entry = |file: &Value| {
        let path = file["Path"].as_str().map_or_else(|| format!("hex {}", file["Encoded-Path"]), str::to_owned);
        (path, (file["Size"].as_u64().unwrap(), file["Checksum"].as_str().unwrap().to_owned()))
    };
    manifest["Files"].as_array().unwrap().iter().map(entry).collect()
}

#[tokio::test]
async fn the_scan_finds_what_pg_basebackup_takes_and_the_manifest_is_its_byte_for_byte() {
    for installation in oldest_and_newest() {
        if !installation.has("pg_basebackup") {
            continue;
        }
        let server = server_with_odds(&installation).await;
        let copy = server.folder().join("copy");
        let (host, target) = (server.folder().display().to_string(), copy.display().to_string());
        let mapping = format!("{host}/space={host}/space_copy");
        let arguments = ["-h", &host, "-U", "postgres", "-D", &target, "-T", &mapping, "-X", "none", "-c", "fast"];
        installation.run("pg_basebackup", &arguments);
        let text = fs::read_to_string(copy.join("backup_manifest")).unwrap();
        let theirs: Value = serde_json::from_str(&text).unwrap();

        let mut ours = BTreeMap::new();
        for scanned in scan(&server) {
            let Scanned::File(file) = scanned.unwrap() else { panic!("nothing is omitted here") };
            if file.kind == ScannedKind::Directory {
                continue;
            }
            let path = String::from_utf8(file.path.clone());
            let path = path.unwrap_or_else(|_| format!("hex \"{}\"", hexadecimal(&file.path)));
            let crc = checksum::crc32c(&fs::read(&file.absolute).unwrap());
            ours.insert(path, (file.size, hexadecimal(&crc.to_le_bytes())));
        }
        let mut expected = listed(&theirs);
        // In plain form pg_basebackup makes the links itself and takes no tablespace_map.
        for own in ["backup_label", "global/pg_control"] {
            assert!(expected.remove(own).is_some(), "{own}, release {}", installation.major);
        }
        assert_eq!(ours, expected, "release {}", installation.major);
        assert_eq!(written_again(&theirs, installation.major), text, "release {}", installation.major);
    }
}

/// Their manifest's facts through our writer.
fn written_again(theirs: &Value, major: u32) -> String {
    let system_id = SystemId(theirs["System-Identifier"].as_u64().unwrap_or_default());
    let mut writer = ManifestWriter::new(Vec::new(), major, system_id).unwrap();
    let bytes_of = |hex: &str| -> Vec<u8> {
        hex.as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    };
    for file in theirs["Files"].as_array().unwrap() {
        let path = file["Path"].as_str().map(|path| path.as_bytes().to_vec());
        let path = path.unwrap_or_else(|| bytes_of(file["Encoded-Path"].as_str().unwrap()));
        let modified = file["Last-Modified"].as_str().unwrap().replace(" GMT", "Z");
        let modified: Timestamp = modified.parse().unwrap();
        let crc = bytes_of(file["Checksum"].as_str().unwrap());
        let crc = u32::from_le_bytes(crc.try_into().unwrap());
        writer.file(&path, file["Size"].as_u64().unwrap(), modified.as_microsecond(), Some(crc)).unwrap();
    }
    let range = |range: &Value| WalRange {
        timeline: Timeline(range["Timeline"].as_u64().unwrap() as u32),
        start: range["Start-LSN"].as_str().unwrap().parse().unwrap(),
        end: range["End-LSN"].as_str().unwrap().parse().unwrap(),
    };
    let ranges: Vec<WalRange> = theirs["WAL-Ranges"].as_array().unwrap().iter().map(range).collect();
    String::from_utf8(writer.finish(&ranges).unwrap()).unwrap()
}

#[tokio::test]
async fn pg_verifybackup_accepts_our_backup_until_a_byte_changes() {
    for installation in oldest_and_newest() {
        if !installation.has("pg_verifybackup") {
            continue;
        }
        let server = server_with_odds(&installation).await;
        let copy = server.folder().join("copy");
        let session = Server::connect(&server.connection_string()).await.unwrap();
        let facts = session.facts().await.unwrap();
        let session = session.start_backup("ours", CheckpointPace::Fast).await.unwrap();
        server.sql(&["INSERT INTO rows SELECT i, 'later' FROM generate_series(1, 1000) i"]).await;

        let mut manifest = ManifestWriter::new(Vec::new(), installation.major, facts.system_id).unwrap();
        fs::create_dir(&copy).unwrap();
        for scanned in scan(&server) {
            let Scanned::File(file) = scanned.unwrap() else { panic!("nothing is omitted here") };
            let target = copy.join(OsStr::from_bytes(&file.path));
            if file.kind == ScannedKind::Directory {
                fs::create_dir_all(target).unwrap();
                continue;
            }
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            let content = fs::read(&file.absolute).unwrap();
            fs::write(target, &content).unwrap();
            // A checksum may be unknown: the server's tools then take the size.
            let checksum = (content.len() < 100_000).then(|| checksum::crc32c(&content));
            manifest.file(&file.path, content.len() as u64, file.mtime_us, checksum).unwrap();
        }
        let control = ControlCopy::read(&server.data_dir).unwrap();
        let stop = session.stop().await.unwrap();
        for (name, content) in [
            ("global/pg_control", &control.bytes),
            ("backup_label", &stop.label_file),
            ("tablespace_map", &stop.tablespace_map),
        ] {
            fs::write(copy.join(name), content).unwrap();
            manifest.file(name.as_bytes(), content.len() as u64, 0, Some(checksum::crc32c(content))).unwrap();
        }
        let wal = server.data_dir.join("pg_wal");
        for entry in fs::read_dir(wal).unwrap().flatten().filter(|entry| entry.path().is_file()) {
            fs::copy(entry.path(), copy.join("pg_wal").join(entry.file_name())).unwrap();
        }
        let range = WalRange { timeline: stop.label.timeline, start: stop.label.start_lsn, end: stop.stop_lsn };
        fs::write(copy.join("backup_manifest"), manifest.finish(&[range]).unwrap()).unwrap();

        installation.give(&copy);
        let target = copy.display().to_string();
        let text = installation.run("pg_verifybackup", &[&target]);
        assert!(text.contains("successfully verified"), "{text}");
        damage(&copy.join("base"));
        let output = installation.try_run("pg_verifybackup", &[&target]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains("checksum mismatch"), "{text}");
    }
}

/// Changes a byte of some file below.
fn damage(folder: &Path) {
    let database = fs::read_dir(folder).unwrap().flatten().next().unwrap().path();
    let is_big = |path: &std::path::PathBuf| fs::metadata(path).unwrap().len() >= 8192;
    let file = fs::read_dir(database).unwrap().flatten().map(|entry| entry.path()).find(is_big).unwrap();
    let mut content = fs::read(&file).unwrap();
    content[100] ^= 1;
    fs::write(file, content).unwrap();
}
